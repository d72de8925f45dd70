// SPDX-License-Identifier: MIT OR Apache-2.0
//! The table of assembled guests for AArch64: each case is a few instructions, an initial state, and the exits and registers
//! that must come of them.

mod beside;
mod calls;
mod deactivation;
mod eventfds;
mod gic;
mod interrupts;
mod memory;
mod mmio;
mod registers;
mod smp;
mod sysregs;
mod threads;
mod timer;

/// Code with `same move, source`: by that instruction X2 takes what is at the source, and goes on at the label 4 unless it is
/// X1.
macro_rules! watchful_code {
    ($name:ident, $($line:literal),+ $(,)?) => {
        $crate::code!(
            $name,
            ".macro same move, source:vararg",
            "\\move x2, \\source",
            "cmp x2, x1",
            "b.ne 4f",
            ".endm",
            $($line,)+
            ".purgem same"
        )
    };
}
use watchful_code;

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
        gic::cases(),
        deactivation::cases(),
        eventfds::cases(),
        timer::cases(),
        smp::cases(),
        beside::cases(),
    ]
    .into_iter()
    .flatten()
    .collect()
}
