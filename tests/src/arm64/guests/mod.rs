// SPDX-License-Identifier: MIT OR Apache-2.0
//! The table of assembled guests for AArch64: each case is a few instructions, an initial state, and the exits and registers
//! that must come of them.

mod beside;
mod calls;
mod memory;
mod mmio;
mod registers;
mod sysregs;
mod threads;

use crate::harness::Case;

/// Every case.
pub fn cases() -> Vec<Case> {
    [
        calls::cases(),
        mmio::cases(),
        memory::cases(),
        sysregs::cases(),
        registers::cases(),
        threads::cases(),
        beside::cases(),
    ]
    .into_iter()
    .flatten()
    .collect()
}
