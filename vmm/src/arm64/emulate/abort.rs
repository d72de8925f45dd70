// SPDX-License-Identifier: MIT OR Apache-2.0
//! The data abort that a guest takes at EL1, made by software as the CPU would make it (Arm ARM D1.3.1, "Exception entry
//! terminology", pseudocode AArch64.TakeException).

use axvcpu_uapi::addr::GuestVirtAddr;
use axvcpu_uapi::arm64::{General, System, PSTATE_DAIF, PSTATE_EL0, PSTATE_EL1H, PSTATE_EL1T, PSTATE_MODE};

/// SCTLR_EL1.SPAN: set, an exception leaves PSTATE.PAN as it is. (A CPU without PAN has it set always.)
const SCTLR_SPAN: u64 = 1 << 23;
/// SCTLR_EL1.DSSBS: the value of PSTATE.SSBS after an exception.
const SCTLR_DSSBS: u64 = 1 << 44;
/// PSTATE: the flags N, Z, C and V, and DIT, which stay.
const PSTATE_KEPT: u64 = 0xf << 28 | 1 << 24;
/// PSTATE.PAN.
pub(super) const PSTATE_PAN: u64 = 1 << 22;
/// PSTATE.SSBS.
const PSTATE_SSBS: u64 = 1 << 12;

/// ESR_EL1: a data abort from EL0, or from EL1; of an instruction of 32 bits.
const FROM_EL0: u64 = 0x24 << 26 | 1 << 25;
const FROM_EL1: u64 = 0x25 << 26 | 1 << 25;
/// ESR_EL1.ISS.WnR: a write.
const WRITE: u64 = 1 << 6;

/// Has the guest take a data abort of the access of `at` by the instruction at its PC, with `status` for ESR_EL1.DFSC.
pub(super) fn take(general: &mut General, system: &mut System, at: GuestVirtAddr, status: u64, write: bool) {
    let pstate = general.pstate;
    let (vector, class) = match pstate & PSTATE_MODE {
        PSTATE_EL0 => (0x400, FROM_EL0),
        PSTATE_EL1T => (0, FROM_EL1),
        _ => (0x200, FROM_EL1),
    };
    system.elr_el1 = general.pc;
    system.spsr_el1 = pstate;
    system.esr_el1 = class | status | if write { WRITE } else { 0 };
    system.far_el1 = at.as_u64();
    general.pstate = PSTATE_EL1H | PSTATE_DAIF | pstate & (PSTATE_KEPT | PSTATE_PAN);
    if system.sctlr_el1 & SCTLR_SPAN == 0 {
        general.pstate |= PSTATE_PAN;
    }
    if system.sctlr_el1 & SCTLR_DSSBS != 0 {
        general.pstate |= PSTATE_SSBS;
    }
    general.pc = system.vbar_el1.wrapping_add(vector);
}
