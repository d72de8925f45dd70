// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! IA32_APIC_BASE: the APIC's mode and the moves between modes (SDM vol. 3 section 12.12.1 and 12.12.5, APM vol. 2 section 16.9).

use super::BASE_ADDRESS;
use crate::fault::{GeneralProtection, GuestResult};

/// The boot processor.
const BSP: u64 = 1 << 8;
/// x2APIC mode.
const EXTD: u64 = 1 << 10;
/// Globally enabled.
const EN: u64 = 1 << 11;

/// The mode that IA32_APIC_BASE selects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Mode {
    /// Switched off: no register can be reached and no message is received.
    Disabled = 0,
    /// Registers in the page at [`BASE_ADDRESS`].
    XApic = 1,
    /// Registers as MSRs, 32-bit ids.
    X2Apic = 2,
}

/// IA32_APIC_BASE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ApicBase {
    pub(super) mode: Mode,
    boot_processor: bool,
}

impl ApicBase {
    /// The state after reset: xAPIC mode.
    pub(super) const fn new(boot_processor: bool) -> Self {
        Self { mode: Mode::XApic, boot_processor }
    }

    /// The register's value.
    pub(super) const fn value(self) -> u64 {
        let mode = match self.mode {
            Mode::Disabled => 0,
            Mode::XApic => EN,
            Mode::X2Apic => EN | EXTD,
        };
        BASE_ADDRESS | mode | if self.boot_processor { BSP } else { 0 }
    }

    /// The mode that `value` asks for, if a register may hold `value` at all.
    ///
    /// The page stays where it is: moving it is an obsolete feature that no guest in use needs, so the address bits are
    /// treated as fixed ones. The BSP flag is set by hardware (SDM vol. 3 section 9.4.1); what is written to it is ignored.
    pub(super) fn decode(value: u64, x2apic: bool) -> GuestResult<Mode> {
        if value & !(BSP | EXTD | EN) != BASE_ADDRESS {
            return Err(GeneralProtection);
        }
        match (value & EN != 0, value & EXTD != 0) {
            (false, false) => Ok(Mode::Disabled),
            (true, false) => Ok(Mode::XApic),
            (true, true) if x2apic => Ok(Mode::X2Apic),
            _ => Err(GeneralProtection),
        }
    }

    /// Whether a guest may go from this mode to `next` by a write: x2APIC mode is entered from xAPIC mode and left through
    /// the disabled state only.
    pub(super) fn may_become(self, next: Mode) -> bool {
        !matches!((self.mode, next), (Mode::Disabled, Mode::X2Apic) | (Mode::X2Apic, Mode::XApic))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transitions_are_those_of_the_manual() {
        use Mode::*;
        let legal = |from, to| ApicBase { mode: from, boot_processor: false }.may_become(to);
        for (from, to, expected) in [
            (Disabled, Disabled, true),
            (Disabled, XApic, true),
            (Disabled, X2Apic, false),
            (XApic, Disabled, true),
            (XApic, XApic, true),
            (XApic, X2Apic, true),
            (X2Apic, Disabled, true),
            (X2Apic, XApic, false),
            (X2Apic, X2Apic, true),
        ] {
            assert_eq!(legal(from, to), expected, "{from:?} -> {to:?}");
        }
    }

    #[test]
    fn values_decode_or_fault() {
        assert_eq!(ApicBase::decode(0xfee0_0900, true), Ok(Mode::XApic));
        assert_eq!(ApicBase::decode(0xfee0_0d00, true), Ok(Mode::X2Apic));
        assert_eq!(ApicBase::decode(0xfee0_0000, true), Ok(Mode::Disabled));
        for bad in [0xfee0_0400, 0xfee0_0801, 0xfed0_0800, 0x1_fee0_0800, 0x800, 0xfee0_0a00] {
            assert_eq!(ApicBase::decode(bad, true), Err(GeneralProtection), "{bad:#x}");
        }
        assert_eq!(ApicBase::decode(0xfee0_0c00, false), Err(GeneralProtection), "x2APIC not offered");
    }

    #[test]
    fn value_round_trips() {
        for mode in [Mode::Disabled, Mode::XApic, Mode::X2Apic] {
            assert_eq!(ApicBase::decode(ApicBase { mode, boot_processor: true }.value(), true), Ok(mode));
        }
        assert_eq!(ApicBase::new(true).value(), 0xfee0_0900);
        assert_eq!(ApicBase::new(false).value(), 0xfee0_0800);
    }
}
