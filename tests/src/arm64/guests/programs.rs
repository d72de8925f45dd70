// SPDX-License-Identifier: MIT OR Apache-2.0
//! What guests run in cases that are the same on every architecture: AArch64's side of it. Each function is described where its
//! program is; a *mark* is `HVC #0`, at which the program comes back. X0 is lost at each.

use crate::code;
use crate::harness::{CaseResult, Stop};
use crate::machine::{Machine, CODE};
use axvcpu_uapi::arm64::{General, System};
pub(super) use axvcpu_uapi::client::Vcpu;
use axvcpu_uapi::client::{Apic, Exit};
use axvcpu_uapi::exit::AxVCpuExitReason;

/// A machine that is about to run `code`.
pub(super) fn machine(code: &[u8]) -> Result<Machine, Stop> {
    Machine::new(code)
}

/// Another vCPU of the machine, which is about to run the same.
pub(super) fn another(m: &mut Machine, id: u32) -> Result<Vcpu, Stop> {
    Machine::vcpu_of(&m.vm, &m.space, id, Apic::None)
}

/// Whether the exit is a mark.
pub(super) fn is_mark(exit: &AxVCpuExitReason) -> bool {
    matches!(exit, AxVCpuExitReason::Hypercall { .. })
}

/// Runs to the next exit.
pub(super) fn run(vcpu: &mut Vcpu) -> Result<Exit, Stop> {
    Ok(vcpu.run()?)
}

/// Runs to the next exit, which must be a mark.
pub(super) fn marked(m: &mut Machine) -> CaseResult {
    m.expect_call().map(drop)
}

/// Runs to the mark behind the next one.
pub(super) fn marked_twice(m: &mut Machine) -> CaseResult {
    marked(m)?;
    marked(m)
}

/// What the program has read last.
pub(super) fn value(vcpu: &Vcpu) -> u64 {
    vcpu.general().x[2]
}

/// How many words the scribbler has written.
pub(super) fn written(vcpu: &Vcpu) -> u64 {
    vcpu.general().x[10]
}

/// The vCPU's registers, for people.
pub(super) fn describe(vcpu: &Vcpu) -> Result<String, Stop> {
    let (general, system): (General, System) = (vcpu.get()?, vcpu.get()?);
    Ok(format!("{general:x?} {system:x?}, syndrome {:x?}", vcpu.syndrome()))
}

/// Goes through X1 pages from 16 MiB on: the word at 16 of each must be X8 (or zero, with X9 set), and then gets X10. A mark, if all
/// were; otherwise a write to address 0.
pub(super) fn sweeper() -> &'static [u8] {
    code!(
        sweeper,
        "mov x3, #0x1000000",
        "2: ldr x2, [x3, #16]",
        "cmp x2, x8",
        "b.eq 3f",
        "cbz x9, 4f",
        "cbnz x2, 4f",
        "3: str x10, [x3, #16]",
        "add x3, x3, #1, lsl #12",
        "subs x1, x1, #1",
        "b.ne 2b",
        "hvc #0",
        "b .",
        "4: mov x0, #0",
        "str x2, [x0]",
        "b ."
    )
}

/// Has the sweeper begin.
pub(super) fn start_sweep(m: &mut Machine, pages: usize, old: u64, new: u64, or_zero: bool) -> CaseResult {
    m.modify(|general| {
        general.pc = CODE;
        (general.x[1], general.x[8], general.x[9], general.x[10]) = (pages as u64, old, or_zero.into(), new);
    })
}

/// Increments a word of random pages: X3 the first page, X11 their number less one, X9 the offset in pages, X8 the state of the
/// random numbers; X10 counts. A mark now and then.
pub(super) fn scribbler() -> &'static [u8] {
    code!(
        scribbler,
        "2: mov x1, #500",
        "3: eor x8, x8, x8, lsl #13",
        "eor x8, x8, x8, lsr #7",
        "eor x8, x8, x8, lsl #17",
        "and x2, x8, x11",
        "add x2, x3, x2, lsl #12",
        "add x2, x2, x9",
        "ldr x4, [x2]",
        "add x4, x4, #1",
        "str x4, [x2]",
        "add x10, x10, #1",
        "subs x1, x1, #1",
        "b.ne 3b",
        "hvc #0",
        "b 2b"
    )
}

/// Has the scribbler begin, in `pages` pages, a power of two, from `base` on.
pub(super) fn start_scribbling(vcpu: &mut Vcpu, base: u64, pages: u64, seed: u64, offset: u64) -> CaseResult {
    let mut general: General = vcpu.get()?;
    (general.x[3], general.x[8], general.x[9], general.x[11]) = (base, seed, offset, pages - 1);
    Ok(vcpu.set(&general)?)
}

/// Increments the word at X3 and marks, for ever.
pub(super) fn incrementer() -> &'static [u8] {
    code!(incrementer, "2: ldr x2, [x3]", "add x2, x2, #1", "str x2, [x3]", "hvc #0", "b 2b")
}

/// Has the incrementer begin at `addr`.
pub(super) fn start_writing(m: &mut Machine, addr: u64) -> CaseResult {
    m.modify(|general| (general.x[3], general.pc) = (addr, CODE))
}

/// Reads the word at 16 MiB, writes 0x11, and reads it back, with a mark behind each.
pub(super) fn writer() -> &'static [u8] {
    code!(
        writer,
        "mov x3, #0x1000000",
        "ldr x2, [x3]",
        "hvc #0",
        "mov x4, #0x11",
        "str x4, [x3]",
        "hvc #0",
        "ldr x2, [x3]",
        "hvc #0",
        "b ."
    )
}

/// Writes 77 at 16 MiB, and reads it, with a mark behind each.
pub(super) fn keeper() -> &'static [u8] {
    code!(keeper, "mov x3, #0x1000000", "mov x4, #77", "str x4, [x3]", "hvc #0", "ldr x2, [x3]", "hvc #0", "b .")
}

/// Increments the word at 16 MiB, and reads the one in the page behind, with a mark behind each, for ever.
pub(super) fn pair() -> &'static [u8] {
    code!(
        pair,
        "mov x3, #0x1000000",
        "add x5, x3, #1, lsl #12",
        "2: ldr x4, [x3]",
        "add x4, x4, #1",
        "str x4, [x3]",
        "hvc #0",
        "ldr x2, [x5]",
        "hvc #0",
        "b 2b"
    )
}

/// Writes at 16 MiB, goes to 0x3000 behind that and back, and goes to 0x1ff000 behind it and back and writes again, at 0x100000
/// behind it; with a mark behind each. At the two places there is [`GO_BACK`].
pub(super) fn visitor() -> &'static [u8] {
    code!(
        visitor,
        "mov x3, #0x1000000",
        "mov x4, #5",
        "str x4, [x3]",
        "hvc #0",
        "add x5, x3, #0x3, lsl #12",
        "adr x6, 2f",
        "br x5",
        "2: hvc #0",
        "add x5, x3, #0x1ff, lsl #12",
        "adr x6, 3f",
        "br x5",
        "3: add x5, x3, #0x100, lsl #12",
        "str x3, [x5]",
        "hvc #0",
        "b ."
    )
}

/// `BR X6`.
pub(super) const GO_BACK: u64 = 0xd61f_00c0;

/// Goes to 0x7800 behind 16 MiB, with the registers as they are but for X5.
pub(super) fn visit_for_good() -> &'static [u8] {
    code!(visit_for_good, "mov x5, #0x7800", "movk x5, #0x100, lsl #16", "br x5")
}
