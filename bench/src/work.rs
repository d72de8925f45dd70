// SPDX-License-Identifier: MIT OR Apache-2.0
//! What guests do again and again.

use crate::arch::{assemble, NOP};

/// A loop.
#[derive(Clone, Copy)]
pub(crate) struct Loop {
    /// Done once.
    pub(crate) before: &'static [u8],
    /// Done again and again.
    pub(crate) body: &'static [u8],
    /// Instructions that the guest executes for each turn of the body, those of handlers included.
    pub(crate) instructions: usize,
}

impl Loop {
    /// The code.
    pub(crate) fn code(&self) -> Vec<u8> {
        assemble(self.before, self.body, &[])
    }

    /// The code without what the body does: as many instructions that do nothing.
    pub(crate) fn empty(&self) -> Vec<u8> {
        assemble(self.before, &NOP.repeat(self.instructions), &[])
    }
}

/// A loop in which the guest spins until it is interrupted, and counts how often.
pub(crate) struct Spinning {
    /// The code.
    pub(crate) code: Vec<u8>,
    /// Instructions of each time around.
    pub(crate) spin: u64,
    /// Instructions of a turn without them, those of the handler included.
    pub(crate) fixed: u64,
}
