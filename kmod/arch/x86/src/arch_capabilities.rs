// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! IA32_ARCH_CAPABILITIES (SDM vol. 4): what a guest is told of the weaknesses that its CPU has or has not. Without it a guest
//! has to assume the worst, and protects itself from what the CPU does not do: Linux, for instance, by page tables of its own
//! for user mode, and by writing SPEC_CTRL whenever its kernel is entered and left.
//!
//! Default deny: what is passed on is a property of the CPU that is the same for guest and host. What announces a control or
//! an MSR that guests do not have is not, nor what is advice to hypervisors, since no guest can be one.
#![forbid(unsafe_code)]

use crate::caps::Capabilities;

/// The MSR.
pub(crate) const ARCH_CAPABILITIES: u32 = 0x10a;

/// With IBRS set once, the CPU restricts predictions by itself at each change of privilege. About SPEC_CTRL, which a guest may
/// lack.
const IBRS_ALL: u64 = 1 << 1;

/// Bits that are passed on.
const PASSED: u64 = 1 << 0 // RDCL_NO: no Meltdown, no L1TF
    | IBRS_ALL
    | 1 << 2 // RSBA: an empty return stack buffer makes RET use other predictions
    | 1 << 4 // SSB_NO: no speculative store bypass
    | 1 << 5 // MDS_NO
    | 1 << 6 // IF_PSCHANGE_MC_NO: no machine check by a change of the page size
    | 1 << 8 // TAA_NO
    | 1 << 13 // SBDR_SSDP_NO
    | 1 << 14 // FBSDP_NO
    | 1 << 15 // PSDP_NO
    | 1 << 17 // FB_CLEAR: VERW also overwrites fill buffers
    | 1 << 19 // RRSBA: RSBA, restricted by IBRS
    | 1 << 20 // BHI_NO: no branch history injection
    | 1 << 24 // PBRSB_NO
    | 1 << 26 // GDS_NO: no gather data sampling
    | 1 << 27 // RFDS_NO: no register file data sampling
    | 1 << 28 // RFDS_CLEAR: VERW also clears the register file
    | 1 << 62; // ITS_NO: indirect targets are selected right

/// What a guest reads on a CPU with `caps`, or nothing, if there is no such MSR. `ibrs` tells that the guest has SPEC_CTRL.IBRS.
pub(crate) fn for_guest(caps: &Capabilities, ibrs: bool) -> Option<u64> {
    let passed = if ibrs { PASSED } else { PASSED & !IBRS_ALL };
    caps.arch_capabilities.map(|host| host & passed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(host: u64, ibrs: bool) -> Option<u64> {
        for_guest(&Capabilities { arch_capabilities: Some(host), ..Capabilities::none() }, ibrs)
    }

    #[test]
    fn properties_are_passed_on_and_controls_are_not() {
        for bit in [0, 1, 2, 4, 5, 6, 8, 13, 14, 15, 17, 19, 20, 24, 26, 27, 28, 62] {
            assert_eq!(of(1 << bit, true), Some(1 << bit), "{bit}");
        }
        // SKIP_L1DFL_VMENTRY, TSX_CTRL, MCU_CONTROL, MISC_PACKAGE_CTLS, ENERGY_FILTERING_CTL, DOITM, MCU_ENUMERATION, FB_CLEAR_CTRL,
        // XAPIC_DISABLE_STATUS, MCU_EXTENDED_SERVICE, OVERCLOCKING_STATUS, GDS_CTRL, IGN_UMONITOR, MON_UMON_MITG; the rest is
        // reserved.
        for bit in [3, 7, 9, 10, 11, 12, 16, 18, 21, 22, 23, 25, 29, 30].into_iter().chain(31..62).chain([63]) {
            assert_eq!(of(1 << bit, true), Some(0), "{bit}");
        }
    }

    #[test]
    fn without_ibrs_there_is_no_better_one() {
        assert_eq!((of(3, true), of(3, false)), (Some(3), Some(1)));
    }

    #[test]
    fn a_cpu_without_it_has_none_to_give() {
        assert_eq!(for_guest(&Capabilities::none(), true), None);
    }
}
