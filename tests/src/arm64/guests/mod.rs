// SPDX-License-Identifier: MIT OR Apache-2.0
//! The table of assembled guests for AArch64: each case is a few instructions, an initial state, and the exits and registers
//! that must come of them.

mod beside;
mod calls;
mod deactivation;
#[path = "../../guests/dirty.rs"]
mod dirty;
mod eventfds;
mod gic;
mod history;
mod host;
#[path = "../../guests/host_memory/mod.rs"]
mod host_memory;
mod interrupts;
mod memory;
mod mmio;
mod programs;
mod registers;
mod smp;
mod sysregs;
mod threads;
mod timer;
mod undecoded;
mod witness;

/// Code with `same move, source`: by that instruction X2 takes what is at the source, and goes on at the label 4 unless it is
/// X1. Of another kind than [`code!`](crate::code) by that macro's name and `!` before the code's name.
macro_rules! watchful_code {
    ($kind:ident! $name:ident, $($line:literal),+ $(,)?) => {
        $crate::$kind!(
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
    ($name:ident, $($line:literal),+ $(,)?) => {
        watchful_code!(code! $name, $($line),+)
    };
}
use watchful_code;

use crate::harness::Case;

/// Every case.
pub fn cases() -> Vec<Case> {
    [
        calls::cases(),
        mmio::cases(),
        undecoded::cases(),
        memory::cases(),
        host_memory::cases(),
        dirty::cases(),
        sysregs::cases(),
        registers::cases(),
        threads::cases(),
        gic::cases(),
        deactivation::cases(),
        eventfds::cases(),
        timer::cases(),
        smp::cases(),
        history::cases(),
        host::cases(),
        witness::cases(),
        beside::cases(),
    ]
    .into_iter()
    .flatten()
    .collect()
}
