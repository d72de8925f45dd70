// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! Access to the current VMCS, and the form that it gives to segment attributes.

use vcpu_core::{AxError, AxResult};

use super::fields::Field;
use super::instructions;
use crate::regs::segment;

/// Access rights: the segment is unusable (SDM vol. 3 section 25.4.1).
const UNUSABLE: u32 = 1 << 16;

/// Access to the current VMCS. A failed write is kept until [`finish`](Self::finish).
pub(super) struct Vmcs {
    failed: bool,
}

impl Vmcs {
    /// # Safety
    /// At CPL 0, interrupts are off as long as the object exists, and the current VMCS is the vCPU's that the caller works on.
    #[inline]
    pub(super) unsafe fn current() -> Self {
        Self { failed: false }
    }

    /// A field that the CPU has. By the promise of [`current`](Self::current) this cannot fail; should VMX have gone in spite of it,
    /// the value is 0, and the next write or entry says so.
    #[inline]
    pub(super) fn read(&self, field: Field) -> u64 {
        // SAFETY: By the promise of `current`.
        unsafe { instructions::vmread(field.encoding()) }
    }

    /// Writes a field.
    #[inline]
    pub(super) fn write(&mut self, field: Field, value: u64) {
        // SAFETY: By the promise of `current`.
        if unsafe { instructions::vmwrite(field.encoding(), value) }.is_err() {
            self.failed = true;
        }
    }

    /// Writes a field, of which `last` is what it holds, if it is to hold something else.
    #[inline]
    pub(super) fn update(&mut self, field: Field, last: &mut u64, value: u64) {
        if *last != value {
            *last = value;
            self.write(field, value);
        }
    }

    /// Whether all writes have worked.
    ///
    /// # Errors
    /// [`AxError::HardwareLost`].
    pub(super) fn finish(self) -> AxResult {
        if self.failed {
            return Err(AxError::HardwareLost);
        }
        Ok(())
    }
}

/// Attributes in the format of the ABI as access rights.
pub(super) const fn rights(attributes: u16) -> u32 {
    let a = attributes as u32;
    let unusable = if attributes & segment::P == 0 { UNUSABLE } else { 0 };
    a & 0xff | (a & 0xf00) << 4 | unusable
}

/// Access rights as attributes in the format of the ABI, where P tells whether a segment can be used.
pub(super) const fn attributes(rights: u32) -> u16 {
    let a = (rights & 0xff | rights >> 4 & 0xf00) as u16;
    if rights & UNUSABLE != 0 {
        a & !segment::P
    } else {
        a
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rights_and_attributes_are_the_same_thing() {
        for (attributes_, rights_) in [(0xa9b, 0xa09b), (0xc93, 0xc093), (0x093, 0x93), (0x08b, 0x8b), (0xfff, 0xf0ff)]
        {
            assert_eq!(rights(attributes_), rights_);
            assert_eq!(attributes(rights_), attributes_);
        }
        assert_eq!(rights(0xa1b) & UNUSABLE, UNUSABLE, "not present is unusable");
        assert_eq!(attributes(0x1_0093), 0x13, "unusable is not present, with the DPL kept");
        assert_eq!(attributes(0x1_00f3) >> 5 & 3, 3);
    }
}
