// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! System registers whose accesses are trapped: which of them the kernel answers, and which a guest does not have. What is
//! neither goes to userspace.

use axvcpu_uapi::arm64::{system_register, System};

use crate::id::IdRegisters;
use crate::syndrome::SystemAccess;

/// What becomes of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// A read gives this.
    Value(u64),
    /// A write is done, or means nothing.
    Done,
    /// The guest's CPU has no such register: an undefined instruction.
    Undefined,
    /// A write of an SGI for interrupts of this group.
    Sgi {
        /// 0 or 1.
        group: u32,
    },
    /// A write that deactivates an interrupt.
    Deactivate,
    /// Userspace decides.
    User,
}

/// Declares registers and ranges of them by their encoding.
const fn sr(op0: u64, op1: u64, crn: u64, crm: u64, op2: u64) -> u64 {
    system_register(op0, op1, crn, crm, op2)
}

const MDSCR_EL1: u64 = sr(2, 0, 0, 2, 2);
const OSLAR_EL1: u64 = sr(2, 0, 1, 0, 4);
const OSLSR_EL1: u64 = sr(2, 0, 1, 1, 4);
const OSDLR_EL1: u64 = sr(2, 0, 1, 3, 4);
const MDRAR_EL1: u64 = sr(2, 0, 1, 0, 0);
const ACTLR_EL1: u64 = sr(3, 0, 1, 0, 1);
const REVIDR_EL1: u64 = sr(3, 0, 0, 0, 6);
const AIDR_EL1: u64 = sr(3, 1, 0, 0, 7);
const ICC_DIR_EL1: u64 = sr(3, 0, 12, 11, 1);
const ICC_SGI1R_EL1: u64 = sr(3, 0, 12, 11, 5);
const ICC_ASGI1R_EL1: u64 = sr(3, 0, 12, 11, 6);
const ICC_SGI0R_EL1: u64 = sr(3, 0, 12, 11, 7);
const ICC_SRE_EL1: u64 = sr(3, 0, 12, 12, 5);
const CNTPCT_EL0: u64 = sr(3, 3, 14, 0, 1);

/// OSLSR_EL1.OSLM: the OS lock is there. It is never locked: debug exceptions are not offered anyway.
const OSLSR_LOCK_IMPLEMENTED: u64 = 1 << 3;
/// MDSCR_EL1: bits that software may set and that have no effect here: SS, KDE, MDE, TDCC.
const MDSCR_KEPT: u64 = 1 << 15 | 1 << 13 | 1 << 12 | 1 << 0;

/// ICC_SRE_EL1: the system register interface is on, and there is no bypass (SRE, DFB, DIB). It cannot be switched off.
const SRE_ALWAYS: u64 = 7;

/// Answers the access by a guest whose registers are `system` and `ids`, whose counter stands at `counter`, and which wants
/// to write `value`.
pub fn access(
    access: SystemAccess,
    value: u64,
    system: &mut System,
    ids: &IdRegisters,
    counter: impl FnOnce() -> u64,
) -> Outcome {
    let register = access.register;
    if let Some(id) = ids.get(register) {
        return if access.read { Outcome::Value(id) } else { Outcome::Undefined };
    }
    match (register, access.read) {
        (CNTPCT_EL0, true) => Outcome::Value(counter()),
        (REVIDR_EL1 | AIDR_EL1 | ACTLR_EL1 | MDRAR_EL1 | OSDLR_EL1, true) => Outcome::Value(0),
        (ACTLR_EL1 | OSLAR_EL1 | OSDLR_EL1, false) => Outcome::Done,
        (OSLSR_EL1, true) => Outcome::Value(OSLSR_LOCK_IMPLEMENTED),
        (MDSCR_EL1, true) => Outcome::Value(system.mdscr_el1),
        (MDSCR_EL1, false) => {
            system.mdscr_el1 = value & MDSCR_KEPT;
            Outcome::Done
        }
        // Those of the CPU interface that are trapped where the guest has one. With one security state, the alias is
        // for the other group (IHI 0069 section 12.2.13).
        (ICC_SGI1R_EL1, false) if ids.gic() => Outcome::Sgi { group: 1 },
        (ICC_ASGI1R_EL1 | ICC_SGI0R_EL1, false) if ids.gic() => Outcome::Sgi { group: 0 },
        (ICC_DIR_EL1, false) if ids.gic() => Outcome::Deactivate,
        (ICC_SRE_EL1, true) if ids.gic() => Outcome::Value(SRE_ALWAYS),
        (ICC_SRE_EL1, false) if ids.gic() => Outcome::Done,
        (_, read) if is_breakpoint(register) => {
            if read {
                Outcome::Value(0)
            } else {
                Outcome::Done
            }
        }
        _ if is_hidden(register) => Outcome::Undefined,
        _ => Outcome::User,
    }
}

/// DBGBVR, DBGBCR, DBGWVR and DBGWCR of the two breakpoints and two watchpoints that the ID register tells of.
const fn is_breakpoint(register: u64) -> bool {
    let (crm, op2) = (register >> 3 & 15, register & 7);
    register & !0x7f == sr(2, 0, 0, 0, 0) && crm < 2 && op2 >= 4
}

/// Whether the register belongs to a feature that the ID registers do not show.
const fn is_hidden(register: u64) -> bool {
    let (op0, op1) = (register >> 14 & 3, register >> 11 & 7);
    let (crn, crm, op2) = (register >> 7 & 15, register >> 3 & 15, register & 7);
    match (op0, op1, crn) {
        // The rest of debug and trace.
        (2, _, _) => true,
        // Pointer authentication keys; RAS error records; MTE's tags and seeds; SVE, SME and trace filter controls.
        (3, 0, 2) => crm == 1 || crm == 2 || crm == 3,
        (3, 0, 5) => crm >= 3,
        (3, 0, 1) => (crm == 0 && op2 >= 3) || crm == 2,
        // GMID_EL1, SMIDR_EL1.
        (3, 1, 0) => crm == 0 && (op2 == 4 || op2 == 6),
        // PMU and profiling.
        (3, 0, 9) | (3, 3, 9) => true,
        // MPAM, LORegions.
        (3, 0, 10) => crm == 4 || crm == 5 || (crm == 2 && op2 >= 2) || crm == 3,
        // GIC CPU interface; deferred errors.
        (3, 0, 12) => crm >= 8 || crm == 1,
        (3, 0, 4) => crm == 6,
        // SCXTNUM_EL1, SCXTNUM_EL0, TPIDR2_EL0; the activity monitors.
        (3, 0, 13) => op2 == 7 || op2 == 5,
        (3, 3, 13) => crm != 0 || op2 == 7 || op2 == 5,
        // PMU event registers.
        (3, 3, 14) => crm >= 8,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axvcpu_uapi::AbiStruct;

    fn read(register: u64) -> Outcome {
        let mut system = System { mdscr_el1: 1 << 15, ..System::ZERO };
        access(SystemAccess { register, general: 0, read: true }, 0, &mut system, &ids(), || 1234)
    }

    fn write(register: u64) -> Outcome {
        access(SystemAccess { register, general: 0, read: false }, 7, &mut System::ZERO.clone(), &ids(), || 0)
    }

    fn ids() -> IdRegisters {
        IdRegisters::new(|_, _| 0, 5)
    }

    #[test]
    fn what_the_kernel_answers() {
        assert_eq!(read(sr(3, 0, 0, 4, 0)), Outcome::Value(0x11), "ID_AA64PFR0_EL1");
        assert_eq!(write(sr(3, 0, 0, 4, 0)), Outcome::Undefined, "read-only");
        assert_eq!(read(CNTPCT_EL0), Outcome::Value(1234));
        assert_eq!((read(OSLSR_EL1), write(OSLAR_EL1)), (Outcome::Value(8), Outcome::Done));
        assert_eq!((read(ACTLR_EL1), write(ACTLR_EL1)), (Outcome::Value(0), Outcome::Done));
        // DBGBVR1_EL1, and DBGBVR2_EL1, which is not there.
        assert_eq!((read(sr(2, 0, 0, 1, 4)), write(sr(2, 0, 0, 1, 4))), (Outcome::Value(0), Outcome::Done));
        assert_eq!(read(sr(2, 0, 0, 2, 4)), Outcome::Undefined);
    }

    #[test]
    fn the_debug_status_register_keeps_what_software_may_set() {
        let mut system = System::ZERO;
        let write = SystemAccess { register: MDSCR_EL1, general: 0, read: false };
        assert_eq!(access(write, u64::MAX, &mut system, &ids(), || 0), Outcome::Done);
        assert_eq!(system.mdscr_el1, MDSCR_KEPT);
        assert_eq!(read(MDSCR_EL1), Outcome::Value(1 << 15));
    }

    #[test]
    fn the_cpu_interface_is_there_with_a_gic() {
        let mut with = ids();
        with.show_gic();
        let ask = |register, read, ids: &IdRegisters| {
            access(SystemAccess { register, general: 0, read }, 7, &mut System::ZERO.clone(), ids, || 0)
        };
        for (register, read, expected) in [
            (ICC_SGI1R_EL1, false, Outcome::Sgi { group: 1 }),
            (ICC_SGI0R_EL1, false, Outcome::Sgi { group: 0 }),
            (ICC_ASGI1R_EL1, false, Outcome::Sgi { group: 0 }),
            (ICC_SRE_EL1, true, Outcome::Value(7)),
            (ICC_SRE_EL1, false, Outcome::Done),
            (ICC_DIR_EL1, false, Outcome::Deactivate),
            (ICC_SGI1R_EL1, true, Outcome::Undefined),
            (sr(3, 0, 12, 12, 0), true, Outcome::Undefined), // ICC_IAR1_EL1, which is not trapped then
        ] {
            assert_eq!(ask(register, read, &with), expected, "{register:#x}");
            assert_eq!(ask(register, read, &ids()), Outcome::Undefined, "{register:#x} without");
        }
    }

    #[test]
    fn hidden_features_are_undefined_and_the_unknown_goes_to_userspace() {
        let hidden = [
            sr(3, 0, 2, 1, 0),   // APIAKeyLo_EL1
            sr(3, 3, 9, 12, 0),  // PMCR_EL0
            sr(3, 3, 14, 15, 7), // PMCCFILTR_EL0
            sr(3, 0, 12, 12, 0), // ICC_IAR1_EL1
            sr(3, 0, 1, 2, 0),   // ZCR_EL1
            sr(3, 0, 10, 4, 3),  // LORC_EL1... and its kin
            sr(3, 0, 13, 0, 7),  // SCXTNUM_EL1
            sr(3, 3, 13, 2, 0),  // AMCR_EL0
            sr(2, 1, 0, 0, 0),   // trace
        ];
        for register in hidden {
            assert_eq!((read(register), write(register)), (Outcome::Undefined, Outcome::Undefined), "{register:#x}");
        }
        // The physical timer, and what is the implementation's own.
        for user in [sr(3, 3, 14, 2, 1), sr(3, 0, 15, 0, 0), sr(3, 7, 11, 0, 0)] {
            assert_eq!((read(user), write(user)), (Outcome::User, Outcome::User), "{user:#x}");
        }
    }
}
