// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The guest's memory type range registers, and what PAT may hold (SDM vol. 3 sections 13.11 and 13.12, APM vol. 2 sections
//! 7.7 and 7.8).
//!
//! Under nested paging the guest's MTRRs have no effect: the type comes from the nested page table, the host's MTRRs and the
//! guest's PAT (APM vol. 2 section 15.25.8). They are kept so that the guest finds what it wrote.
#![forbid(unsafe_code)]

use crate::fault::{GeneralProtection, GuestResult};
use x86::msr;

/// Number of variable ranges.
const VARIABLE: usize = 8;
/// The fixed-range registers: one for 64 KiB ranges, two for 16 KiB, eight for 4 KiB.
const FIXED: [u32; 11] = [0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f];
/// The last register of the last variable range.
const VARIABLE_LAST: u32 = msr::IA32_MTRR_PHYSBASE0 + 2 * VARIABLE as u32 - 1;

/// IA32_MTRRCAP: number of variable ranges, fixed ranges (bit 8), write-combining (bit 10).
const CAPABILITIES: u64 = VARIABLE as u64 | (1 << 8) | (1 << 10);
/// IA32_MTRR_DEF_TYPE: enabled.
const DEF_TYPE_ENABLED: u64 = 1 << 11;
/// IA32_MTRR_DEF_TYPE: fixed ranges enabled.
const DEF_TYPE_FIXED: u64 = 1 << 10;
/// IA32_MTRR_PHYSMASKn: valid.
const MASK_VALID: u64 = 1 << 11;
/// Write-back.
const WRITE_BACK: u64 = 6;

/// Whether `memory_type` is one that an MTRR can give: UC, WC, WT, WP or WB.
const fn is_memory_type(memory_type: u8) -> bool {
    matches!(memory_type, 0 | 1 | 4 | 5 | 6)
}

/// Whether IA32_PAT can hold `value`: each byte a memory type, UC- (7) included.
pub fn is_valid_pat(value: u64) -> bool {
    value.to_le_bytes().into_iter().all(|memory_type| is_memory_type(memory_type) || memory_type == 7)
}

/// The MTRRs of one vCPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mtrr {
    def_type: u64,
    /// In the order of [`FIXED`].
    fixed: [u64; FIXED.len()],
    /// Bases at even, masks at odd indices, in the order of their MSRs.
    variable: [u64; 2 * VARIABLE],
}

impl Default for Mtrr {
    fn default() -> Self {
        Self::new()
    }
}

impl Mtrr {
    /// As firmware leaves them, for a guest that has none: enabled, everything write-back by default.
    pub const fn new() -> Self {
        Self { def_type: DEF_TYPE_ENABLED | WRITE_BACK, fixed: [0; FIXED.len()], variable: [0; 2 * VARIABLE] }
    }

    /// Whether MSR `index` is one of these.
    pub fn owns_msr(index: u32) -> bool {
        matches!(index, msr::IA32_MTRRCAP | msr::IA32_MTRR_DEF_TYPE | msr::IA32_MTRR_PHYSBASE0..=VARIABLE_LAST)
            || FIXED.contains(&index)
    }

    /// The register behind MSR `index`.
    fn slot(&mut self, index: u32) -> Option<&mut u64> {
        if index == msr::IA32_MTRR_DEF_TYPE {
            return Some(&mut self.def_type);
        }
        if let Some(position) = FIXED.iter().position(|fixed| *fixed == index) {
            return self.fixed.get_mut(position);
        }
        self.variable.get_mut(index.checked_sub(msr::IA32_MTRR_PHYSBASE0)? as usize)
    }

    /// Reads an MTRR or IA32_MTRRCAP.
    ///
    /// # Errors
    /// [`GeneralProtection`] if `index` is none.
    pub fn read(&mut self, index: u32) -> GuestResult<u64> {
        if index == msr::IA32_MTRRCAP {
            return Ok(CAPABILITIES);
        }
        self.slot(index).map(|slot| *slot).ok_or(GeneralProtection)
    }

    /// Writes an MTRR. `phys_bits` is the width of a guest physical address.
    ///
    /// # Errors
    /// [`GeneralProtection`], with nothing changed, if `index` is none, for IA32_MTRRCAP, for reserved memory types and
    /// reserved bits.
    pub fn write(&mut self, index: u32, value: u64, phys_bits: u32) -> GuestResult {
        let beyond = u64::MAX.checked_shl(phys_bits).unwrap_or(0);
        let valid = match index {
            msr::IA32_MTRR_DEF_TYPE => {
                is_memory_type(value as u8) && value & !(DEF_TYPE_ENABLED | DEF_TYPE_FIXED | 0xff) == 0
            }
            msr::IA32_MTRR_PHYSBASE0..=VARIABLE_LAST if index % 2 == 0 => {
                is_memory_type(value as u8) && value & (beyond | 0xf00) == 0
            }
            msr::IA32_MTRR_PHYSBASE0..=VARIABLE_LAST => value & (beyond | (MASK_VALID - 1)) == 0,
            _ => FIXED.contains(&index) && value.to_le_bytes().into_iter().all(is_memory_type),
        };
        match self.slot(index) {
            Some(slot) if valid => {
                *slot = value;
                Ok(())
            }
            _ => Err(GeneralProtection),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FAULT: GuestResult = Err(GeneralProtection);

    #[test]
    fn a_guest_without_firmware_finds_write_back() {
        assert_eq!(Mtrr::new().read(0x2ff), Ok(0x806));
        assert_eq!(Mtrr::new().read(0xfe), Ok(0x508));
    }

    #[test]
    fn every_register_keeps_its_own_value() {
        let mut mtrr = Mtrr::new();
        let indices = || (0x200..=0x20f).chain(FIXED);
        let value = |index: u32| match index {
            0x200..=0x20f if index % 2 == 0 => (u64::from(index) << 12) | 6,
            0x200..=0x20f => (u64::from(index) << 12) | (1 << 11),
            // One byte's type and place tell the registers apart.
            _ => [1, 4, 5, 6][index as usize % 4] << (8 * (index / 4 % 8)),
        };
        for index in indices() {
            assert_eq!(mtrr.write(index, value(index), 40), Ok(()), "{index:#x}");
        }
        for index in indices() {
            assert_eq!(mtrr.read(index), Ok(value(index)), "{index:#x}");
            assert!(Mtrr::owns_msr(index));
        }
        assert_eq!(mtrr.read(0x2ff), Ok(0x806));
    }

    #[test]
    fn other_msrs_are_none() {
        for index in [0, 0xfd, 0x1ff, 0x210, 0x251, 0x257, 0x25a, 0x270, 0x277, 0x300, u32::MAX] {
            assert!(!Mtrr::owns_msr(index));
            assert_eq!(Mtrr::new().read(index), Err(GeneralProtection), "{index:#x}");
            assert_eq!(Mtrr::new().write(index, 0, 40), FAULT, "{index:#x}");
        }
    }

    #[test]
    fn reserved_bits_and_types_fault_and_change_nothing() {
        for (index, value) in [
            (0xfe, 0x508),
            (0x2ff, 0x802),
            (0x2ff, 0x807),
            (0x2ff, 0x906),
            (0x2ff, 0x1806),
            (0x200, 2),
            (0x200, 0x106),
            (0x20e, (1 << 40) | 6),
            (0x201, 1),
            (0x201, 0x400),
            (0x20f, (1 << 40) | 0x800),
            (0x250, 0x0600_0000_0000_0002),
            (0x26f, 0x0700_0000_0000_0000),
        ] {
            let mut mtrr = Mtrr::new();
            assert_eq!(mtrr.write(index, value, 40), FAULT, "{index:#x} {value:#x}");
            assert_eq!(mtrr, Mtrr::new());
        }
        assert_eq!(Mtrr::new().write(0x20e, (1 << 40) | 6, 48), Ok(()), "the width counts");
        assert_eq!(Mtrr::new().write(0x2ff, 0xc00, 40), Ok(()));
    }

    #[test]
    fn pat_values() {
        assert!(is_valid_pat(0x0007_0406_0007_0406));
        assert!(is_valid_pat(0x0407_0506_0007_0106));
        assert!(!is_valid_pat(0x0007_0406_0007_0206));
        assert!(!is_valid_pat(0x0307_0406_0007_0406));
        assert!(!is_valid_pat(0x0807_0406_0007_0406));
    }
}
