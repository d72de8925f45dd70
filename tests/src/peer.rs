// SPDX-License-Identifier: MIT OR Apache-2.0
//! A guest of KVM that works hard and is checked all the time: company for guests of ours on the same CPUs.
//!
//! It shares no code with axvcpu, only the CPU, so whatever the two hypervisors do to each other shows here as a wrong
//! number, a refused run or a crash. Each round goes through memory (nested pages, TLB), carries a sum in an XMM register
//! (FPU state), reads back MSRs that KVM leaves in the CPU while its guest runs and for a while after (KVM's user-return
//! MSRs, and KERNEL_GS_BASE), exits into the kernel (CPUID) and to here (OUT). The host computes every round as well.

use crate::code;
use axvcpu_uapi::client::{Backing, Memory};
use kvm_bindings::{kvm_regs, kvm_segment, kvm_userspace_memory_region, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use std::error::Error;

/// Size of the guest's memory, which begins at 0, in bytes.
const RAM_SIZE: usize = 2 << 20;
const CODE: u64 = 0x1000;
/// Three page tables: the first GiB, identical, by pages of 2 MiB.
const TABLES: u64 = 0x2000;
/// What the rounds go through, [`WORDS`] words.
const DATA: u64 = 0x10_0000;
const WORDS: usize = 32 << 10;

/// Port at which a round's results arrive.
const RESULT: u16 = 0x10;
/// Port at which the guest reports MSRs that are not what it wrote.
const WRONG_MSR: u16 = 0x11;

/// Multiplier of the sequence that runs through memory.
const FACTOR: u64 = 0x5851_f42d_4c95_7f2d;
/// What the guest writes to LSTAR and KERNEL_GS_BASE: a canonical address that no kernel has there.
const MARK: u64 = 0x0000_1357_9bdf_2468;

/// RSI is the memory's start, RBP its number of words, R8 the factor, R9 the mark, R10 the running value; XMM7 carries
/// the sum of what R10 was after each round.
fn program() -> &'static [u8] {
    code!(
        program,
        64,
        "mov rax, r9",
        "mov rdx, r9",
        "shr rdx, 32",
        "mov ecx, 0xc0000082", // LSTAR
        "wrmsr",
        "mov ecx, 0xc0000102", // KERNEL_GS_BASE
        "wrmsr",
        "pxor xmm7, xmm7",
        "2: mov rdi, rsi",
        "mov rcx, rbp",
        "3: imul r10, r8",
        "add r10, [rdi]",
        "mov [rdi], r10",
        "add rdi, 8",
        "dec rcx",
        "jnz 3b",
        "movq xmm6, r10",
        "paddq xmm7, xmm6",
        "mov ecx, 0xc0000082",
        "rdmsr",
        "shl rdx, 32",
        "or rax, rdx",
        "cmp rax, r9",
        "jne 4f",
        "mov ecx, 0xc0000102",
        "rdmsr",
        "shl rdx, 32",
        "or rax, rdx",
        "cmp rax, r9",
        "jne 4f",
        "xor eax, eax",
        "cpuid",
        "movq rax, xmm7",
        "out 0x10, eax",
        "shr rax, 32",
        "out 0x10, eax",
        "jmp 2b",
        "4: out 0x11, eax",
        "hlt",
    )
}

/// The same on the host.
struct Model {
    memory: Vec<u64>,
    running: u64,
    sum: u64,
}

impl Model {
    fn new() -> Self {
        Self { memory: (0..WORDS as u64).map(|i| i.wrapping_mul(FACTOR)).collect(), running: 0, sum: 0 }
    }

    /// The next round's result.
    fn round(&mut self) -> u64 {
        for word in &mut self.memory {
            self.running = self.running.wrapping_mul(FACTOR).wrapping_add(*word);
            *word = self.running;
        }
        self.sum = self.sum.wrapping_add(self.running);
        self.sum
    }
}

/// Runs the guest until `done` says, when told the number of rounds behind it, that it is enough. Gives that number.
///
/// # Errors
/// What KVM refuses, or what is wrong with the guest's work.
pub fn run(mut done: impl FnMut(u64) -> bool) -> Result<u64, Box<dyn Error>> {
    let ram = Memory::anonymous(RAM_SIZE)?;
    let kvm = Kvm::new()?;
    let vm = kvm.create_vm()?;
    let mut model = Model::new();
    fill(&ram, &model)?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: RAM_SIZE as u64,
        userspace_addr: ram.start().as_ptr() as u64,
    };
    // SAFETY: the region is `ram`, which as the earlier local outlives VM and vCPU, and which is reached through raw
    // pointers only, so a guest that writes there breaks no reference.
    unsafe { vm.set_user_memory_region(region) }?;
    let mut vcpu = vm.create_vcpu(0)?;
    vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)?;
    enter_long_mode(&vcpu)?;

    let mut rounds = 0;
    while !done(rounds) {
        let expected = model.round();
        let low = result(&mut vcpu)?;
        let found = u64::from(low) | (u64::from(result(&mut vcpu)?) << 32);
        if found != expected {
            return Err(format!("round {rounds}: the guest computed {found:#x} instead of {expected:#x}").into());
        }
        rounds += 1;
    }
    Ok(rounds)
}

fn fill(ram: &Memory, model: &Model) -> Result<(), Box<dyn Error>> {
    ram.write(CODE as usize, program())?;
    // Bits P, RW; the page directory's entries are pages (PS).
    ram.write_u64(TABLES as usize, (TABLES + 0x1000) | 3)?;
    ram.write_u64(TABLES as usize + 0x1000, (TABLES + 0x2000) | 3)?;
    for i in 0..512 {
        ram.write_u64(TABLES as usize + 0x2000 + 8 * i, ((i as u64) << 21) | 0x83)?;
    }
    for (i, word) in model.memory.iter().enumerate() {
        ram.write_u64(DATA as usize + 8 * i, *word)?;
    }
    Ok(())
}

fn enter_long_mode(vcpu: &VcpuFd) -> Result<(), Box<dyn Error>> {
    let mut special = vcpu.get_sregs()?;
    let flat = kvm_segment { limit: u32::MAX, present: 1, s: 1, g: 1, ..Default::default() };
    special.cs = kvm_segment { selector: 8, type_: 11, l: 1, ..flat };
    let data = kvm_segment { selector: 16, type_: 3, db: 1, ..flat };
    (special.ds, special.es, special.fs, special.gs, special.ss) = (data, data, data, data, data);
    special.cr0 = 1 << 31 | 1 << 16 | 1 << 5 | 1 << 1 | 1; // PG, WP, NE, MP, PE
    special.cr3 = TABLES;
    special.cr4 = 1 << 10 | 1 << 9 | 1 << 5; // OSXMMEXCPT, OSFXSR, PAE
    special.efer = 1 << 10 | 1 << 8; // LMA, LME
    vcpu.set_sregs(&special)?;
    vcpu.set_regs(&kvm_regs {
        rip: CODE,
        rflags: 2,
        rsi: DATA,
        rbp: WORDS as u64,
        r8: FACTOR,
        r9: MARK,
        ..Default::default()
    })?;
    Ok(())
}

/// Runs to the next half of a result.
fn result(vcpu: &mut VcpuFd) -> Result<u32, Box<dyn Error>> {
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(RESULT, &[a, b, c, d])) => return Ok(u32::from_le_bytes([a, b, c, d])),
            Ok(VcpuExit::IoOut(WRONG_MSR, _)) => return Err("the guest read MSRs that are not what it wrote".into()),
            Ok(other) => return Err(format!("an exit that this guest has no reason for: {other:?}").into()),
            Err(error) if error.errno() == nix::libc::EINTR => {}
            Err(error) => return Err(format!("KVM_RUN: {error}").into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_model_depends_on_every_word_and_every_round() {
        let (mut one, mut other) = (Model::new(), Model::new());
        assert_eq!(one.round(), other.round());
        other.memory[WORDS / 2] ^= 1;
        let (a, b) = (one.round(), other.round());
        assert_ne!(a, b);
        assert_ne!(a, one.round());
    }

    #[test]
    fn the_program_fits_below_the_tables() {
        assert!(!program().is_empty() && program().len() < (TABLES - CODE) as usize);
    }
}
