// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! Exceptions that the vCPU takes to EL1, made by software as the CPU would make them (Arm ARM D1.3.1, "Exception entry
//! terminology", pseudocode AArch64.TakeException).

use axvcpu_uapi::arm64::{General, PSTATE_DAIF, PSTATE_EL1H, PSTATE_MODE};

/// An exception for EL1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exception {
    /// The instruction at `pc` is undefined.
    Undefined {
        /// Its address.
        pc: u64,
    },
    /// A synchronous external abort of the access at `far` by the instruction at `pc`.
    ExternalAbort {
        /// Its address.
        pc: u64,
        /// The address that it accessed.
        far: u64,
        /// The syndrome of the exit, for what is the same in the guest's.
        write: bool,
    },
}

/// What of EL1's registers decides how an exception is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Environment {
    /// VBAR_EL1.
    pub vbar: u64,
    /// SCTLR_EL1.
    pub sctlr: u64,
    /// The guest's CPU has FEAT_PAN.
    pub pan: bool,
    /// The guest's CPU has FEAT_SSBS.
    pub ssbs: bool,
}

/// What the exception leaves in EL1's registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taken {
    /// ELR_EL1.
    pub elr: u64,
    /// SPSR_EL1.
    pub spsr: u64,
    /// ESR_EL1.
    pub esr: u64,
    /// FAR_EL1, if the exception sets it.
    pub far: Option<u64>,
}

/// SCTLR_EL1.SPAN: set, an exception leaves PSTATE.PAN as it is.
const SCTLR_SPAN: u64 = 1 << 23;
/// SCTLR_EL1.DSSBS: the value of PSTATE.SSBS after an exception.
const SCTLR_DSSBS: u64 = 1 << 44;
/// SPSR: N, Z, C and V.
const NZCV: u64 = 0xf << 28;
/// SPSR: DIT.
const DIT: u64 = 1 << 24;
/// SPSR: PAN.
const PAN: u64 = 1 << 22;
/// SPSR: SSBS.
const SSBS: u64 = 1 << 12;

impl Exception {
    /// Takes the exception: PC and processor state go to EL1's handler. The guest is in AArch64.
    pub fn take(self, general: &mut General, environment: &Environment) -> Taken {
        let pstate = general.pstate;
        let from_el0 = pstate & PSTATE_MODE == 0;
        // ESR_EL1.IL: the instruction is 32 bits long.
        let (elr, class, iss, far) = match self {
            Self::Undefined { pc } => (pc, 0x00, 0, None),
            // Data abort from EL0 or from EL1; a synchronous external abort, not on a table walk; WnR.
            Self::ExternalAbort { pc, far, write } => {
                (pc, if from_el0 { 0x24 } else { 0x25 }, 0x10 | u64::from(write) << 6, Some(far))
            }
        };
        let offset = match pstate & PSTATE_MODE {
            0b0000 => 0x400,
            0b0100 => 0x000,
            _ => 0x200,
        };
        let mut new = PSTATE_EL1H | PSTATE_DAIF | pstate & (NZCV | DIT);
        if environment.pan && (pstate & PAN != 0 || environment.sctlr & SCTLR_SPAN == 0) {
            new |= PAN;
        }
        if environment.ssbs && environment.sctlr & SCTLR_DSSBS != 0 {
            new |= SSBS;
        }
        general.pstate = new;
        general.pc = environment.vbar.wrapping_add(offset);
        Taken { elr, spsr: pstate, esr: class << 26 | 1 << 25 | iss, far }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ENVIRONMENT: Environment = Environment { vbar: 0x8000, sctlr: SCTLR_SPAN, pan: true, ssbs: true };

    fn general(pstate: u64) -> General {
        General { pc: 0x1004, pstate, ..General::default() }
    }

    #[test]
    fn the_vector_depends_on_where_the_guest_was() {
        for (mode, offset, class) in [(0b0000, 0x400, 0x24), (0b0100, 0, 0x25), (0b0101, 0x200, 0x25)] {
            let mut undefined = general(mode);
            let taken = Exception::Undefined { pc: 0x1000 }.take(&mut undefined, &ENVIRONMENT);
            assert_eq!((undefined.pc, undefined.pstate), (0x8000 + offset, 0x3c5));
            assert_eq!(taken, Taken { elr: 0x1000, spsr: mode, esr: 0x0200_0000, far: None });
            let mut abort = general(mode);
            let taken =
                Exception::ExternalAbort { pc: 0x1000, far: 0x9_0000, write: true }.take(&mut abort, &ENVIRONMENT);
            assert_eq!((taken.esr, taken.far), (class << 26 | 1 << 25 | 0x50, Some(0x9_0000)));
        }
    }

    #[test]
    fn flags_survive_and_the_rest_follows_sctlr() {
        let start = NZCV | DIT | PAN | SSBS | 1 << 21 | 1 << 20 | 0b0101; // SS and IL go
        let mut kept = general(start);
        let taken = Exception::Undefined { pc: 0 }.take(&mut kept, &ENVIRONMENT);
        assert_eq!((kept.pstate, taken.spsr), (NZCV | DIT | PAN | 0x3c5, start));
        let mut set = general(0b0101);
        let sctlr = SCTLR_DSSBS;
        Exception::Undefined { pc: 0 }.take(&mut set, &Environment { sctlr, ..ENVIRONMENT });
        assert_eq!(set.pstate, PAN | SSBS | 0x3c5);
        let mut without = general(0b0101);
        let bare = Environment { sctlr, pan: false, ssbs: false, ..ENVIRONMENT };
        Exception::Undefined { pc: 0 }.take(&mut without, &bare);
        assert_eq!(without.pstate, 0x3c5);
    }
}
