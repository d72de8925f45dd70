// SPDX-License-Identifier: MIT OR Apache-2.0
//! Beside KVM: guests of both on the same CPUs at the same time, each of which checks that its registers, its memory and its
//! translations stay its own.

use super::watchful_code;
use crate::harness::{self, Case, CaseResult, Stop};
use crate::machine::{Machine, CODE, DATA, HOLE, RAM};
use crate::{code, ensure, ensure_eq, table};
use axvcpu_uapi::client::{Backing, Memory};
use axvcpu_uapi::exit::AxVCpuExitReason as Exit;
use kvm_bindings::{kvm_userspace_memory_region, kvm_vcpu_init};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The cases.
pub(super) fn cases() -> Vec<Case> {
    table! {
        "kvm/guests-of-both-on-the-same-cpus" => both, in 60;
        "kvm/beside-guests-that-fault" => faults, in 60;
    }
}

/// Fills registers with X1, waits, and counts in X9 how often they were still what they must be. The word at DATA
/// must be X1 too. Then a write to HOLE: the count; a mismatch is told at HOLE + 8.
fn guard() -> &'static [u8] {
    watchful_code!(
        guard,
        "movz x10, #0x4010, lsl #16",
        "movz x11, #0x0900, lsl #16",
        "str x1, [x10]",
        "2: msr tpidr_el1, x1",
        "msr tpidr_el0, x1",
        "msr contextidr_el1, x1",
        "msr afsr0_el1, xzr",
        "msr far_el1, x1",
        "msr mair_el1, x1",
        "dup v7.2d, x1",
        "mov x3, #100",
        "3: subs x3, x3, #1",
        "b.ne 3b",
        "same mrs, tpidr_el1",
        "same mrs, tpidr_el0",
        "same mrs, far_el1",
        "same mrs, mair_el1",
        "same umov, v7.d[1]",
        "same ldr, [x10]",
        "add x9, x9, #1",
        "str x9, [x11]",
        "b 2b",
        "4: str x2, [x11, #8]",
        "b 4b"
    )
}

/// A guest of KVM's that runs the same code at the same addresses.
struct KvmGuest {
    vcpu: VcpuFd,
    _vm: VmFd,
    /// Outlives the VM.
    _ram: Memory,
}

/// KVM's number of a core register: the offset in `struct user_pt_regs` in words of 32 bits (KVM API, section 4.68).
const fn core_register(offset: u64) -> u64 {
    0x6030_0000_0010_0000 | offset / 4
}

/// An error of KVM's.
fn failed(what: &str, error: kvm_ioctls::Error) -> Stop {
    Stop::Fail(format!("KVM: {what}: {error}"))
}

impl KvmGuest {
    fn new(mark: u64) -> Result<Self, Stop> {
        let kvm = Kvm::new().map_err(|_| Stop::Skip("there is no KVM beside us".into()))?;
        let vm = kvm.create_vm().map_err(|error| failed("VM", error))?;
        let ram = Memory::anonymous(4 << 20)?;
        ram.write((CODE - RAM) as usize, guard())?;
        let region = kvm_userspace_memory_region {
            slot: 0,
            guest_phys_addr: RAM,
            memory_size: 4 << 20,
            userspace_addr: ram.start().as_ptr() as u64,
            flags: 0,
        };
        // SAFETY: the memory is the guest's alone and outlives the VM.
        unsafe { vm.set_user_memory_region(region) }.map_err(|error| failed("memory", error))?;
        let vcpu = vm.create_vcpu(0).map_err(|error| failed("vCPU", error))?;
        let mut target = kvm_vcpu_init::default();
        vm.get_preferred_target(&mut target).map_err(|error| failed("target", error))?;
        vcpu.vcpu_init(&target).map_err(|error| failed("vCPU set-up", error))?;
        let set = |offset, value: u64| {
            vcpu.set_one_reg(core_register(offset), &value.to_le_bytes()).map_err(|error| failed("register", error))
        };
        set(8, mark)?; // X1
        set(8 * 9, 0)?; // X9
        set(256, CODE)?; // PC
                         // CPACR_EL1: SIMD and floating point.
        let cpacr = 0x6030_0000_0013_0000 | axvcpu_uapi::arm64::system_register(3, 0, 1, 0, 2);
        vcpu.set_one_reg(cpacr, &(3u64 << 20).to_le_bytes()).map_err(|error| failed("CPACR_EL1", error))?;
        Ok(Self { vcpu, _vm: vm, _ram: ram })
    }

    /// Runs to the next write to device memory, which must be the count `expected`.
    fn round(&mut self, expected: u64) -> CaseResult {
        loop {
            match self.vcpu.run() {
                Ok(VcpuExit::MmioWrite(addr, data)) => {
                    let value = data.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte));
                    ensure_eq!((addr, value), (HOLE, expected), "KVM's guest");
                    return Ok(());
                }
                Ok(other) => return Err(Stop::Fail(format!("KVM's guest: {other:?}"))),
                Err(error) if error.errno() == nix::libc::EINTR => harness::check_time()?,
                Err(error) => return Err(failed("run", error)),
            }
        }
    }
}

/// Runs two guests of KVM's on threads of their own while `ours` runs here.
fn beside(mut ours: impl FnMut(u64) -> CaseResult) -> CaseResult {
    let stop = Arc::new(AtomicBool::new(false));
    let mut threads = Vec::new();
    for mark in [0xaaaa, 0xbbbb] {
        let mut guest = KvmGuest::new(mark)?;
        let stop = Arc::clone(&stop);
        threads.push(std::thread::spawn(move || -> Result<u64, Stop> {
            let mut rounds = 0;
            while !stop.load(Ordering::Relaxed) {
                harness::check_time()?;
                rounds += 1;
                guest.round(rounds)?;
            }
            Ok(rounds)
        }));
    }
    let until = Instant::now() + Duration::from_secs(4);
    let mut rounds = 0;
    let mut result = Ok(());
    while result.is_ok() && Instant::now() < until {
        rounds += 1;
        result = ours(rounds);
    }
    stop.store(true, Ordering::Relaxed);
    for thread in threads {
        let theirs = harness::joined(thread.join())??;
        ensure!(theirs >= 100, "KVM's guest ran only {theirs} rounds");
    }
    result?;
    ensure!(rounds >= 100, "our guest ran only {rounds} rounds");
    Ok(())
}

fn both() -> CaseResult {
    let mut machine = Machine::new(guard())?;
    machine.modify(|general| general.x[1] = 0xcccc)?;
    beside(|round| {
        let width = axvcpu_uapi::exit::AccessWidth::Qword;
        let addr = axvcpu_uapi::addr::GuestPhysAddr::new(HOLE);
        machine.expect(Exit::MmioWrite { addr, width, data: round })
    })
}

/// Each round with its page of memory anew, so that both sides' translations change all the time.
fn faults() -> CaseResult {
    let code = code!(
        faults,
        "movz x10, #0x4010, lsl #16",
        "2: ldr x0, [x10]",
        "str x1, [x10]",
        "ldr x2, [x10]",
        "hvc #0",
        "b 2b"
    );
    let mut machine = Machine::new(code)?;
    machine.modify(|general| general.x[1] = 0xdddd)?;
    beside(|round| {
        let [before, _, after, ..] = machine.expect_call()?;
        ensure_eq!((before, after), (0, 0xdddd), "round {round}");
        ensure_eq!(machine.read_u64(DATA)?, 0xdddd, "round {round}");
        machine.ram.discard((DATA - RAM) as usize, 0x1000)?;
        Ok(())
    })
}
