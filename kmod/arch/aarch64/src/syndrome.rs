// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! ESR_EL2: the syndrome of an exception (Arm ARM D24.2.40, "ESR_EL2, Exception Syndrome Register").

use axvcpu_uapi::arm64::system_register;
use axvcpu_uapi::exit::AccessWidth;

/// Exception classes that a guest's exit can have.
pub mod class {
    /// WFI, WFE and their variants.
    pub const WFX: u64 = 0x01;
    /// SIMD or floating point, trapped by CPTR_EL2.
    pub const FP: u64 = 0x07;
    /// Pointer authentication, trapped by HCR_EL2.API.
    pub const PAUTH: u64 = 0x09;
    /// LD64B or ST64B.
    pub const LS64: u64 = 0x0a;
    /// HVC.
    pub const HVC: u64 = 0x16;
    /// SMC.
    pub const SMC: u64 = 0x17;
    /// MRS, MSR or a system instruction.
    pub const SYSTEM: u64 = 0x18;
    /// SVE, trapped by CPTR_EL2.
    pub const SVE: u64 = 0x19;
    /// SME, trapped by CPTR_EL2.
    pub const SME: u64 = 0x1d;
    /// Instruction abort.
    pub const INSTRUCTION_ABORT: u64 = 0x20;
    /// Data abort.
    pub const DATA_ABORT: u64 = 0x24;
    /// Guarded control stack.
    pub const GCS: u64 = 0x2d;
}

/// An ESR_EL2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Syndrome(pub u64);

/// An access to a system register, or a system instruction, that was trapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SystemAccess {
    /// Which one: [`system_register`].
    pub register: u64,
    /// The general register, 31 for the zero register.
    pub general: usize,
    /// MRS rather than MSR.
    pub read: bool,
}

/// How a data abort's instruction accesses memory, where the hardware tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transfer {
    /// Width of the access.
    pub width: AccessWidth,
    /// The general register, 31 for the zero register.
    pub general: usize,
    /// Width of the register: X or W.
    pub general_width: AccessWidth,
    /// Whether a value read is sign-extended.
    pub sign_extend: bool,
}

impl Transfer {
    /// What a load of `value` puts into the register: `value` in the access's width, extended.
    #[inline]
    pub const fn extend(self, value: u64) -> u64 {
        let value = value & self.width.mask();
        // The widths are 8 to 64 bits.
        let unused = 64 - 8 * self.width.size() as u32;
        let value = if self.sign_extend { ((value << unused) as i64 >> unused) as u64 } else { value };
        value & self.general_width.mask()
    }
}

/// The kind of an abort: its fault status code, without the level.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// There is no translation.
    Translation,
    /// The access flag is not set.
    AccessFlag,
    /// The translation does not allow it.
    Permission,
    /// Anything else: an external abort, an address size fault, a TLB conflict, ...
    Other,
}

impl Syndrome {
    /// The exception class.
    #[inline]
    pub const fn class(self) -> u64 {
        self.0 >> 26 & 0x3f
    }

    #[inline]
    const fn bit(self, bit: u32) -> bool {
        self.0 >> bit & 1 != 0
    }

    /// Of WFI and its kin: whether it is WFE or WFET.
    #[inline]
    pub const fn is_wfe(self) -> bool {
        self.bit(0)
    }

    /// Of a trapped MRS, MSR or system instruction: which.
    #[inline]
    pub fn system_access(self) -> SystemAccess {
        let field = |shift: u32, mask: u64| self.0 >> shift & mask;
        SystemAccess {
            register: system_register(field(20, 3), field(14, 7), field(10, 15), field(1, 15), field(17, 7)),
            general: field(5, 31) as usize,
            read: self.bit(0),
        }
    }

    /// Of an abort: what kind of fault.
    #[inline]
    pub const fn fault(self) -> FaultKind {
        match self.0 & 0x3f {
            // Levels 0 to 3, and -1.
            0x04..=0x07 | 0x2b => FaultKind::Translation,
            0x08..=0x0b => FaultKind::AccessFlag,
            0x0c..=0x0f => FaultKind::Permission,
            _ => FaultKind::Other,
        }
    }

    /// Of an abort: whether the walk of the guest's own tables caused it.
    #[inline]
    pub const fn in_table_walk(self) -> bool {
        self.bit(7)
    }

    /// Of a data abort: whether it was a write. Cache maintenance counts as one.
    #[inline]
    pub const fn is_write(self) -> bool {
        self.bit(6)
    }

    /// Of a data abort: whether a cache maintenance (or address translation) instruction caused it.
    #[inline]
    pub const fn is_cache_maintenance(self) -> bool {
        self.bit(8)
    }

    /// Of a data abort: the transfer, where the hardware describes it (ISV): loads and stores of one general register
    /// without writeback.
    #[inline]
    pub const fn transfer(self) -> Option<Transfer> {
        if !self.bit(24) {
            return None;
        }
        Some(Transfer {
            width: match self.0 >> 22 & 3 {
                0 => AccessWidth::Byte,
                1 => AccessWidth::Word,
                2 => AccessWidth::Dword,
                _ => AccessWidth::Qword,
            },
            general: (self.0 >> 16 & 31) as usize,
            general_width: if self.bit(15) { AccessWidth::Qword } else { AccessWidth::Dword },
            sign_extend: self.bit(21),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn system_accesses_name_the_register_of_the_instruction() {
        // MRS X3, MIDR_EL1: op0 3, op1 0, CRn 0, CRm 0, op2 0.
        let read = Syndrome(0x18 << 26 | 1 << 25 | 3 << 20 | 3 << 5 | 1);
        assert_eq!(read.class(), class::SYSTEM);
        assert_eq!(read.system_access(), SystemAccess { register: 0xc000, general: 3, read: true });
        // MSR OSLAR_EL1, XZR: op0 2, op1 0, CRn 1, CRm 0, op2 4.
        let write = Syndrome(0x18 << 26 | 1 << 25 | 2 << 20 | 4 << 17 | 1 << 10 | 31 << 5);
        let register = system_register(2, 0, 1, 0, 4);
        assert_eq!(write.system_access(), SystemAccess { register, general: 31, read: false });
    }

    #[test]
    fn transfers_are_told_only_with_isv() {
        // LDRSH W5, [..]: ISV, SAS 1, SSE, SRT 5, SF 0, translation fault of level 2.
        let load = Syndrome(0x24 << 26 | 1 << 25 | 1 << 24 | 1 << 22 | 1 << 21 | 5 << 16 | 0x06);
        let transfer =
            Transfer { width: AccessWidth::Word, general: 5, general_width: AccessWidth::Dword, sign_extend: true };
        assert_eq!((load.transfer(), load.is_write(), load.fault()), (Some(transfer), false, FaultKind::Translation));
        assert_eq!(Syndrome(load.0 & !(1 << 24)).transfer(), None);
        // STR X31, [..]: SAS 3, SF, WnR.
        let store = Syndrome(0x24 << 26 | 1 << 25 | 1 << 24 | 3 << 22 | 31 << 16 | 1 << 15 | 1 << 6 | 0x0f);
        let transfer = store.transfer().unwrap();
        assert_eq!((transfer.width, transfer.general), (AccessWidth::Qword, 31));
        assert_eq!((store.is_write(), store.fault()), (true, FaultKind::Permission));
    }

    #[test]
    fn fault_codes() {
        for (codes, kind) in [
            (&[0x04, 0x05, 0x06, 0x07, 0x2b][..], FaultKind::Translation),
            (&[0x08, 0x09, 0x0a, 0x0b], FaultKind::AccessFlag),
            (&[0x0c, 0x0d, 0x0e, 0x0f], FaultKind::Permission),
            (&[0x00, 0x10, 0x13, 0x14, 0x21, 0x30, 0x3f], FaultKind::Other),
        ] {
            for code in codes {
                assert_eq!(Syndrome(0x24 << 26 | code).fault(), kind, "{code:#x}");
            }
        }
    }

    #[test]
    fn loads_extend_to_the_register() {
        use AccessWidth::{Byte, Dword, Qword, Word};
        for (value, width, general_width, sign_extend, expected) in [
            (0x1_80, Byte, Dword, false, 0x80),
            (0x80, Byte, Dword, true, 0xffff_ff80),
            (0x8000, Word, Qword, true, 0xffff_ffff_ffff_8000),
            (0x7fff, Word, Qword, true, 0x7fff),
            (u64::MAX, Dword, Dword, false, 0xffff_ffff),
            (0x8000_0000, Dword, Qword, true, 0xffff_ffff_8000_0000),
            (u64::MAX, Qword, Qword, false, u64::MAX),
        ] {
            let transfer = Transfer { width, general: 0, general_width, sign_extend };
            assert_eq!(transfer.extend(value), expected, "{value:#x} {transfer:?}");
        }
    }
}
