// SPDX-License-Identifier: MIT OR Apache-2.0
//! What guests run in cases that are the same on every architecture: x86's side of it. Each function is described where its
//! program is; a *mark* is `OUT 0x80, AL`, at which the program comes back.

use crate::code;
use crate::flaws;
use crate::harness::{CaseResult, Stop};
pub(super) use crate::hypervisor::Vcpu;
use crate::machine::{Machine, Mode, CODE};
use axvcpu_uapi::client::{Errno, Exit};
use axvcpu_uapi::exit::AxVCpuExitReason;
use axvcpu_uapi::x86::{Control, General};

/// A machine that is about to run `code`.
pub(super) fn machine(code: &[u8]) -> Result<Machine, Stop> {
    Machine::new(Mode::Long, code)
}

/// Another vCPU of the machine, which is about to run the same.
pub(super) fn another(m: &mut Machine, id: u32) -> Result<Vcpu, Stop> {
    m.add_vcpu(id)
}

/// Whether the exit is a mark.
pub(super) fn is_mark(exit: &AxVCpuExitReason) -> bool {
    matches!(exit, AxVCpuExitReason::IoWrite { port: 0x80, .. })
}

/// Runs to the next exit.
pub(super) fn run(vcpu: &mut Vcpu) -> Result<Exit, Stop> {
    vcpu.run().or_else(|error| {
        if error.errno() == Some(Errno::EUCLEAN) {
            flaws::STATE_LOST.skip()?;
        }
        Err(error.into())
    })
}

/// Runs to the next exit, which must be a mark.
pub(super) fn marked(m: &mut Machine) -> CaseResult {
    m.expect_mark(0x80).map(drop)
}

/// Runs to the mark behind the next one.
pub(super) fn marked_twice(m: &mut Machine) -> CaseResult {
    m.expect_marks(&[0x80, 0x80])
}

/// What the program has read last.
pub(super) fn value(vcpu: &Vcpu) -> u64 {
    vcpu.general().gpr[0]
}

/// How many words the scribbler has written.
pub(super) fn written(vcpu: &Vcpu) -> u64 {
    vcpu.general().gpr[10]
}

/// The vCPU's registers, for people.
pub(super) fn describe(vcpu: &Vcpu) -> Result<String, Stop> {
    let (general, control): (General, Control) = (vcpu.get()?, vcpu.get()?);
    Ok(format!("{general:x?} {control:x?}"))
}

/// Goes through RCX pages from 16 MiB on: the word at 16 of each must be R8 (or zero, with R9 set), and then gets R10. A mark, if
/// all were.
pub(super) fn sweeper() -> &'static [u8] {
    code!(
        sweeper,
        64,
        "mov ebx, 0x1000000",
        "2: mov rax, [rbx + 16]",
        "cmp rax, r8",
        "je 3f",
        "test r9, r9",
        "jz 4f",
        "test rax, rax",
        "jnz 4f",
        "3: mov [rbx + 16], r10",
        "add rbx, 0x1000",
        "dec ecx",
        "jnz 2b",
        "mov al, 1",
        "out 0x80, al",
        "hlt",
        "4: out 0x81, al",
        "hlt",
    )
}

/// Has the sweeper begin.
pub(super) fn start_sweep(m: &mut Machine, pages: usize, old: u64, new: u64, or_zero: bool) -> CaseResult {
    m.modify(|general| {
        general.rip = CODE;
        (general.gpr[1], general.gpr[8], general.gpr[9], general.gpr[10]) = (pages as u64, old, or_zero.into(), new);
    })
}

/// Increments a word of random pages: RBX the first page, R11 their number less one, R9 the offset in pages, R8 the state of the
/// random numbers; R10 counts. A mark now and then.
pub(super) fn scribbler() -> &'static [u8] {
    code!(
        scribbler,
        64,
        "2: mov ecx, 500",
        "3: mov rax, r8",
        "shl rax, 13",
        "xor r8, rax",
        "mov rax, r8",
        "shr rax, 7",
        "xor r8, rax",
        "mov rax, r8",
        "shl rax, 17",
        "xor r8, rax",
        "mov rax, r8",
        "and rax, r11",
        "shl rax, 12",
        "add rax, rbx",
        "inc qword ptr [rax + r9]",
        "inc r10",
        "dec ecx",
        "jnz 3b",
        "out 0x80, al",
        "jmp 2b",
    )
}

/// Has the scribbler begin, in `pages` pages, a power of two, from `base` on.
pub(super) fn start_scribbling(vcpu: &mut Vcpu, base: u64, pages: u64, seed: u64, offset: u64) -> CaseResult {
    let mut general: General = vcpu.get()?;
    (general.gpr[3], general.gpr[8], general.gpr[9], general.gpr[11]) = (base, seed, offset, pages - 1);
    Ok(vcpu.set(&general)?)
}

/// Increments the word at RBX and marks, for ever.
pub(super) fn incrementer() -> &'static [u8] {
    code!(incrementer, 64, "2: inc qword ptr [rbx]", "out 0x80, al", "jmp 2b")
}

/// Has the incrementer begin at `addr`.
pub(super) fn start_writing(m: &mut Machine, addr: u64) -> CaseResult {
    m.modify(|general| (general.gpr[3], general.rip) = (addr, CODE))
}

/// Reads the word at 16 MiB, writes 0x11, and reads it back, with a mark behind each.
pub(super) fn writer() -> &'static [u8] {
    code!(
        writer,
        64,
        "mov ebx, 0x1000000",
        "mov rax, [rbx]",
        "out 0x80, al",
        "mov qword ptr [rbx], 0x11",
        "out 0x80, al",
        "mov rax, [rbx]",
        "out 0x80, al",
        "hlt",
    )
}

/// Writes 77 at 16 MiB, and reads it, with a mark behind each.
pub(super) fn keeper() -> &'static [u8] {
    code!(
        keeper,
        64,
        "mov ebx, 0x1000000",
        "mov qword ptr [rbx], 77",
        "out 0x80, al",
        "mov rax, [rbx]",
        "out 0x80, al",
        "hlt"
    )
}

/// Increments the word at 16 MiB, and reads the one in the page behind, with a mark behind each, for ever.
pub(super) fn pair() -> &'static [u8] {
    code!(
        pair,
        64,
        "mov ebx, 0x1000000",
        "2: inc qword ptr [rbx]",
        "out 0x80, al",
        "mov rax, [rbx + 0x1000]",
        "out 0x80, al",
        "jmp 2b",
    )
}

/// Writes at 16 MiB, goes to 0x3000 behind that and back, and goes to 0x1ff000 behind it and back and writes again, at 0x100000
/// behind it; with a mark behind each. At the two places there is [`GO_BACK`].
pub(super) fn visitor() -> &'static [u8] {
    code!(
        visitor,
        64,
        "mov ebx, 0x1000000",
        "mov qword ptr [rbx], 5",
        "out 0x80, al",
        "lea rdi, [rbx + 0x3000]",
        "lea rsi, [rip + 2f]",
        "jmp rdi",
        "2: out 0x80, al",
        "lea rdi, [rbx + 0x1ff000]",
        "lea rsi, [rip + 3f]",
        "jmp rdi",
        "3: mov [rbx + 0x100000], rbx",
        "out 0x80, al",
        "hlt",
    )
}

/// `jmp rsi`.
pub(super) const GO_BACK: u64 = 0xe6ff;

/// Goes to 0x7800 behind 16 MiB, with the registers as they are but for RAX.
pub(super) fn visit_for_good() -> &'static [u8] {
    code!(visit_for_good, 64, "mov eax, 0x1007800", "jmp rax")
}
