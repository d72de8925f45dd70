// SPDX-License-Identifier: MIT OR Apache-2.0
//! The guests: a loop at EL1 with the MMU off, the same instructions for every hypervisor.
//!
//! | guest physical | content |
//! |---|---|
//! | [`CODE`] | the loop |
//! | [`VECTORS`] | exception vectors: interrupts are ended, and an undefined instruction is skipped |
//! | [`SMALL`], [`HUGE`] | places for memory that is mapped anew for each sample |
//! | [`GICD`], [`GICR`] | the interrupt controller |
//! | from [`MMIO`] | not memory |
//!
//! A loop is a piece of code that prepares, and a body that is executed X15 times; then comes a store to [`DONE`]. It starts
//! with X14 zero, the vCPU's number in X19, and addresses: X20 [`GICD`], X21 the frame of its SGIs and PPIs, X22 [`MMIO`],
//! X23 [`SMALL`], X24 [`HUGE`], X28 [`DONE`]. X9 and X10 are the handlers'; X14 counts interrupts.

use axvcpu_tests::code;
use axvcpu_uapi::arm64::{GIC_REDISTRIBUTOR_SIZE, PSTATE_DAIF, PSTATE_EL1H};
use axvcpu_uapi::client::Memory;

/// Size of the RAM at address 0.
pub(crate) const RAM_SIZE: usize = 2 << 20;
/// The loop.
pub(crate) const CODE: u64 = 0x1000;
/// EL1's vectors.
pub(crate) const VECTORS: u64 = 0x8000;
/// Memory by pages of 4 KiB.
pub(crate) const SMALL: u64 = 0x0800_0000;
/// Memory by pages of 2 MiB.
pub(crate) const HUGE: u64 = 0x1000_0000;
/// The distributor.
pub(crate) const GICD: u64 = 0x2000_0000;
/// The redistributors.
pub(crate) const GICR: u64 = 0x2010_0000;
/// No memory.
pub(crate) const MMIO: u64 = 0x3000_0000;
/// A store there ends a loop.
pub(crate) const DONE: u64 = MMIO + 0x1000;

/// The INTID that comes from outside: an SPI, edge-triggered.
pub(crate) const VECTOR: u8 = 40;

/// The processor state at the start: EL1, everything masked.
pub(crate) const PSTATE: u64 = PSTATE_EL1H | PSTATE_DAIF;

/// An instruction that does nothing.
pub(crate) const NOP: &[u8] = &0xd503_201f_u32.to_le_bytes();

/// `before`, `body` until X15 is zero, and `after`.
pub(crate) fn assemble(before: &[u8], body: &[u8], after: &[u8]) -> Vec<u8> {
    const SUB: u32 = 0xd100_05ef; // sub x15, x15, #1
    const CBNZ: u32 = 0xb500_000f; // cbnz x15, with the distance in instructions in bits 23:5
    const STORE: u32 = 0xb900_039f; // str wzr, [x28]
    let back = -(body.len() as i32 / 4 + 1);
    let mut code = [before, body].concat();
    code.extend(SUB.to_le_bytes());
    code.extend((CBNZ | (back as u32 & 0x7_ffff) << 5).to_le_bytes());
    code.extend(after);
    code.extend(STORE.to_le_bytes());
    code
}

/// Stores handlers.
///
/// # Errors
/// None that memory of [`RAM_SIZE`] could cause.
pub(crate) fn prepare(ram: &Memory) -> axvcpu_uapi::client::Result<()> {
    // Synchronous, and IRQ, from EL1 with SP_EL1.
    ram.write(VECTORS as usize + 0x200, fault_handler())?;
    ram.write(VECTORS as usize + 0x280, interrupt_handler())
}

/// Instructions of the handler of interrupts.
pub(crate) const INTERRUPT_INSTRUCTIONS: usize = 6;
/// Instructions of the handler of undefined instructions.
pub(crate) const FAULT_INSTRUCTIONS: usize = 4;

/// Stops the timer, if that is what it was.
fn interrupt_handler() -> &'static [u8] {
    code!(
        interrupt,
        "mrs x10, icc_iar1_el1",
        "msr cntv_ctl_el0, xzr",
        "isb",
        "msr icc_eoir1_el1, x10",
        "add x14, x14, #1",
        "eret"
    )
}

fn fault_handler() -> &'static [u8] {
    code!(fault, "mrs x9, elr_el1", "add x9, x9, #4", "msr elr_el1, x9", "eret")
}

/// X14 to X28 at the start of `turns` turns of the loop on vCPU `id`, as the head of this file has them.
pub(crate) fn general(id: u32, turns: u64) -> [(usize, u64); 9] {
    // A redistributor's second frame of 64 KiB.
    let private = GICR + GIC_REDISTRIBUTOR_SIZE * u64::from(id) + GIC_REDISTRIBUTOR_SIZE / 2;
    [(14, 0), (15, turns), (19, id.into()), (20, GICD), (21, private), (22, MMIO), (23, SMALL), (24, HUGE), (28, DONE)]
}
