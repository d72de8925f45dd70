// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! What the numbers of an exit mean, and those of an entry's event: basic exit reasons, exit qualifications, interruption
//! information (SDM vol. 3, chapter 28 and appendix C). Every reason that our controls can bring is named in
//! [`Code::decode`]; any other is reported as it is. Nothing here reads a VMCS.
#![forbid(unsafe_code)]

use vcpu_core::{AccessFlags, AccessWidth};

use crate::backend::{ControlAccess, Exit, Io};
use crate::events::Injection;

/// #BP.
const BP: u8 = 3;
/// #OF.
const OF: u8 = 4;
/// Bits of DR6 that #DB reports in the qualification: B0 to B3, BD, BS.
const DR6_REPORTED: u64 = 0x600f;
/// Of those, B0 to B3, which each #DB sets anew.
const DR6_BREAKPOINTS: u64 = 0xf;

/// Basic exit reason of CPUID.
pub(super) const CPUID: u32 = 10;
/// Basic exit reason of IN, OUT, INS and OUTS.
pub(super) const IO: u32 = 30;
/// Basic exit reason of RDMSR.
pub(super) const RDMSR: u32 = 31;
/// Basic exit reason of WRMSR.
pub(super) const WRMSR: u32 = 32;
/// Basic exit reason of an access that the nested page table does not allow.
pub(super) const EPT_VIOLATION: u32 = 48;
/// Exit reason: the entry has failed.
pub(super) const ENTRY_FAILURE: u32 = 1 << 31;

/// A basic exit reason, understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Code {
    /// An exception or a physical NMI.
    ExceptionOrNmi,
    /// A physical interrupt, still pending or acknowledged.
    Interrupt,
    /// Three faults in a row.
    TripleFault,
    /// A physical INIT, SIPI or SMI, which the host takes, or has taken, by itself.
    HostEvent,
    /// An interrupt or NMI window is open.
    Window,
    /// A task switch.
    TaskSwitch,
    /// CPUID.
    Cpuid,
    /// HLT.
    Hlt,
    /// INVD, WBINVD.
    CacheFlush,
    /// RDPMC.
    Rdpmc,
    /// VMCALL.
    Vmcall,
    /// An instruction that does not exist for guests.
    Undefined,
    /// Access to a control register.
    ControlRegister,
    /// Access to a debug register.
    DebugRegister,
    /// IN, OUT, INS, OUTS.
    Io,
    /// RDMSR.
    Rdmsr,
    /// WRMSR.
    Wrmsr,
    /// The entry was refused for the guest's state.
    InvalidState,
    /// The entry was refused for a machine check.
    EntryMachineCheck,
    /// A loop of PAUSE.
    Pause,
    /// An EPT violation.
    NestedPageFault,
    /// The preemption timer has expired.
    PreemptionTimer,
    /// XSETBV.
    Xsetbv,
    /// The task priority has sunk below the threshold.
    TaskPriority,
    /// The CPU has ended an interrupt whose end is to be reported.
    EndOfInterrupt,
    /// The CPU has stored what the guest wrote to a register of the local APIC.
    ApicWrite,
    /// Something else.
    Other,
}

impl Code {
    /// Of a basic exit reason (SDM vol. 3 appendix C).
    pub(super) const fn decode(reason: u32) -> Self {
        match reason & 0xffff {
            0 => Self::ExceptionOrNmi,
            1 => Self::Interrupt,
            2 => Self::TripleFault,
            3..=6 => Self::HostEvent,
            7 | 8 => Self::Window,
            9 => Self::TaskSwitch,
            CPUID => Self::Cpuid,
            12 => Self::Hlt,
            13 | 54 => Self::CacheFlush,
            15 => Self::Rdpmc,
            18 => Self::Vmcall,
            28 => Self::ControlRegister,
            29 => Self::DebugRegister,
            IO => Self::Io,
            RDMSR => Self::Rdmsr,
            WRMSR => Self::Wrmsr,
            33 => Self::InvalidState,
            40 => Self::Pause,
            41 => Self::EntryMachineCheck,
            43 => Self::TaskPriority,
            45 => Self::EndOfInterrupt,
            EPT_VIOLATION => Self::NestedPageFault,
            52 => Self::PreemptionTimer,
            55 => Self::Xsetbv,
            56 => Self::ApicWrite,
            // GETSEC, RSM; VMCLEAR to VMXON; MWAIT, MONITOR; INVEPT, INVVPID; VMFUNC; ENCLS, ENCLV; SEAMCALL, TDCALL.
            11 | 17 | 19..=27 | 36 | 39 | 50 | 53 | 59 | 60 | 70 | 76 | 77 => Self::Undefined,
            _ => Self::Other,
        }
    }
}

/// Interruption information (SDM vol. 3 sections 25.8.3, 25.9.2 and 25.9.3): vector, type, what comes with it.
pub(super) mod interruption {
    pub(in super::super) const VALID: u32 = 1 << 31;
    pub(in super::super) const HAS_CODE: u32 = 1 << 11;
    /// IRET had unblocked NMIs before it faulted.
    pub(in super::super) const IRET: u32 = 1 << 12;
    pub(in super::super) const EXTERNAL: u32 = 0;
    pub(in super::super) const NMI: u32 = 2;
    pub(in super::super) const EXCEPTION: u32 = 3;
    pub(in super::super) const SOFTWARE_INTERRUPT: u32 = 4;
    /// INT1.
    pub(in super::super) const PRIVILEGED: u32 = 5;
    /// INT3, INTO.
    pub(in super::super) const SOFTWARE_EXCEPTION: u32 = 6;

    pub(in super::super) const fn kind(info: u32) -> u32 {
        info >> 8 & 7
    }
}

/// An event for the fields of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct EntryEvent {
    /// Interruption information.
    pub(super) info: u32,
    pub(super) error_code: u32,
    /// Whether an instruction is behind it, by whose length RIP is advanced.
    pub(super) software: bool,
}

/// `event` for the fields of an entry. Without protected mode there are no error codes.
pub(super) fn encode_event(event: Injection, protected_mode: bool) -> EntryEvent {
    use interruption::{EXCEPTION, EXTERNAL, HAS_CODE, NMI, SOFTWARE_EXCEPTION, SOFTWARE_INTERRUPT, VALID};
    let plain = |kind: u32, vector: u8| VALID | kind << 8 | u32::from(vector);
    match event {
        Injection::External(vector) => EntryEvent { info: plain(EXTERNAL, vector), error_code: 0, software: false },
        Injection::Nmi => EntryEvent { info: plain(NMI, 2), error_code: 0, software: false },
        Injection::Exception(vector @ (BP | OF), _) => {
            EntryEvent { info: plain(SOFTWARE_EXCEPTION, vector), error_code: 0, software: true }
        }
        Injection::Exception(vector, Some(code)) if protected_mode => {
            EntryEvent { info: plain(EXCEPTION, vector) | HAS_CODE, error_code: code, software: false }
        }
        Injection::Exception(vector, _) => {
            EntryEvent { info: plain(EXCEPTION, vector), error_code: 0, software: false }
        }
        Injection::Software(vector) => {
            EntryEvent { info: plain(SOFTWARE_INTERRUPT, vector), error_code: 0, software: true }
        }
    }
}

/// The event in IDT-vectoring information. INT1, which is not injected, raises its #DB again when it is executed again.
pub(super) fn interrupted_event(info: u32, error_code: u32) -> Option<Injection> {
    use interruption::{EXCEPTION, EXTERNAL, HAS_CODE, NMI, SOFTWARE_EXCEPTION, SOFTWARE_INTERRUPT, VALID};
    if info & VALID == 0 {
        return None;
    }
    let vector = info as u8;
    Some(match interruption::kind(info) {
        EXTERNAL => Injection::External(vector),
        NMI => Injection::Nmi,
        EXCEPTION => Injection::Exception(vector, (info & HAS_CODE != 0).then_some(error_code)),
        SOFTWARE_EXCEPTION => Injection::Exception(vector, None),
        SOFTWARE_INTERRUPT => Injection::Software(vector),
        _ => return None,
    })
}

/// The vector of a physical interrupt that the exit has acknowledged. Below 32 are exceptions, which the host lets no device have.
pub(super) const fn acknowledged(info: u32) -> Option<u8> {
    if info & interruption::VALID != 0 && info as u8 >= 32 {
        Some(info as u8)
    } else {
        None
    }
}

/// Qualification of an I/O exit (SDM vol. 3 table 28-5).
pub(super) fn port_access(qualification: u64) -> Io {
    let width = match qualification & 7 {
        0 => AccessWidth::Byte,
        1 => AccessWidth::Word,
        _ => AccessWidth::Dword,
    };
    let bit = |bit: u32| qualification >> bit & 1 != 0;
    Io { port: (qualification >> 16) as u16, width, input: bit(3), string: bit(4), rep: bit(5) }
}

/// Qualification of a control register access (SDM vol. 3 table 28-3).
pub(super) const fn control_access(qualification: u64) -> ControlAccess {
    let number = (qualification & 0xf) as u8;
    let register = (qualification >> 8 & 0xf) as u8;
    match qualification >> 4 & 3 {
        0 => ControlAccess::Write { number, register },
        1 => ControlAccess::Read { number, register },
        2 => ControlAccess::Clts,
        _ => ControlAccess::Lmsw((qualification >> 16) as u16),
    }
}

/// Qualification of an EPT violation as access flags (SDM vol. 3 table 28-7).
pub(super) fn access_flags(qualification: u64) -> AccessFlags {
    let bit = |bit: u32| qualification >> bit & 1 != 0;
    let mut flags = match (bit(1), bit(2)) {
        (true, _) => AccessFlags::WRITE,
        (false, true) => AccessFlags::EXECUTE,
        (false, false) => AccessFlags::READ,
    };
    if qualification >> 3 & 7 != 0 {
        flags = flags.union(AccessFlags::PRESENT);
    }
    // The linear address is known, and it is not its translation that has failed, but a step on the way.
    if bit(7) && !bit(8) {
        flags = flags.union(AccessFlags::PAGE_WALK);
    }
    flags
}

/// Qualification of a task switch (SDM vol. 3 table 28-2).
pub(super) const fn task_switch(qualification: u64) -> Exit {
    let source = match qualification >> 30 & 3 {
        1 => 1,
        2 => 2,
        // CALL, or a task gate in the IDT.
        _ => 0,
    };
    Exit::TaskSwitch { selector: qualification as u16, source }
}

/// DR6 after a #DB that reports `qualification`.
pub(super) const fn after_debug_exception(dr6: u64, qualification: u64) -> u64 {
    dr6 & !DR6_BREAKPOINTS | qualification & DR6_REPORTED
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_those_of_appendix_c() {
        for (reason, exit) in [
            (0, Code::ExceptionOrNmi),
            (1, Code::Interrupt),
            (2, Code::TripleFault),
            (3, Code::HostEvent),
            (6, Code::HostEvent),
            (7, Code::Window),
            (8, Code::Window),
            (9, Code::TaskSwitch),
            (10, Code::Cpuid),
            (11, Code::Undefined),
            (12, Code::Hlt),
            (13, Code::CacheFlush),
            (14, Code::Other),
            (15, Code::Rdpmc),
            (16, Code::Other),
            (17, Code::Undefined),
            (18, Code::Vmcall),
            (19, Code::Undefined),
            (27, Code::Undefined),
            (28, Code::ControlRegister),
            (29, Code::DebugRegister),
            (30, Code::Io),
            (31, Code::Rdmsr),
            (32, Code::Wrmsr),
            (33, Code::InvalidState),
            (34, Code::Other),
            (36, Code::Undefined),
            (39, Code::Undefined),
            (40, Code::Pause),
            (41, Code::EntryMachineCheck),
            (43, Code::TaskPriority),
            (44, Code::Other),
            (45, Code::EndOfInterrupt),
            (48, Code::NestedPageFault),
            (49, Code::Other),
            (50, Code::Undefined),
            (52, Code::PreemptionTimer),
            (53, Code::Undefined),
            (54, Code::CacheFlush),
            (55, Code::Xsetbv),
            (56, Code::ApicWrite),
            (59, Code::Undefined),
            (60, Code::Undefined),
            (70, Code::Undefined),
            (75, Code::Other),
            (77, Code::Undefined),
            (ENTRY_FAILURE | 33, Code::InvalidState),
        ] {
            assert_eq!(Code::decode(reason), exit, "{reason}");
        }
    }

    #[test]
    fn events_have_the_format_of_interruption_information() {
        for (event, info, code, software) in [
            (Injection::External(0x30), 0x8000_0030, 0, false),
            (Injection::Nmi, 0x8000_0202, 0, false),
            (Injection::Exception(6, None), 0x8000_0306, 0, false),
            (Injection::Exception(14, Some(0x15)), 0x8000_0b0e, 0x15, false),
            (Injection::Exception(3, None), 0x8000_0603, 0, true),
            (Injection::Software(0x80), 0x8000_0480, 0, true),
        ] {
            assert_eq!(encode_event(event, true), EntryEvent { info, error_code: code, software }, "{event:?}");
            assert_eq!(interrupted_event(info, code), Some(event), "{info:#x}");
            assert_eq!(interrupted_event(info & !(1 << 31), code), None);
        }
        assert_eq!(interrupted_event(0x8000_0501, 0), None, "INT1 raises its exception again");
        assert_eq!(interrupted_event(0x8000_0130, 0), None, "type 1 is reserved");
    }

    #[test]
    fn acknowledged_interrupts_have_a_vector() {
        assert_eq!(acknowledged(0x8000_00ec), Some(0xec));
        assert_eq!(acknowledged(0x0000_00ec), None, "still pending");
        assert_eq!(acknowledged(0x8000_000f), None);
    }

    #[test]
    fn real_mode_has_no_error_codes() {
        let event = encode_event(Injection::GENERAL_PROTECTION, false);
        assert_eq!((event.info, event.error_code), (0x8000_030d, 0));
    }

    #[test]
    fn io_qualifications() {
        let io = |port, width, input, string, rep| Io { port, width, input, string, rep };
        assert_eq!(port_access(0x03f8_0000), io(0x3f8, AccessWidth::Byte, false, false, false));
        assert_eq!(port_access(0x03f8_0008), io(0x3f8, AccessWidth::Byte, true, false, false));
        assert_eq!(port_access(0x01f0_0039), io(0x1f0, AccessWidth::Word, true, true, true));
        assert_eq!(port_access(0x0cf8_0043), io(0xcf8, AccessWidth::Dword, false, false, false));
    }

    #[test]
    fn control_register_qualifications() {
        assert_eq!(control_access(0x0f04), ControlAccess::Write { number: 4, register: 15 });
        assert_eq!(control_access(0x0318), ControlAccess::Read { number: 8, register: 3 });
        assert_eq!(control_access(0x20), ControlAccess::Clts);
        assert_eq!(control_access(0xbeef_0030), ControlAccess::Lmsw(0xbeef));
    }

    #[test]
    fn violation_qualifications() {
        let union = |flags: &[AccessFlags]| flags.iter().fold(AccessFlags::empty(), |all, &flag| all.union(flag));
        use AccessFlags as F;
        for (qualification, flags) in [
            (0x181, union(&[F::READ])),
            (0x182, union(&[F::WRITE])),
            (0x1aa, union(&[F::WRITE, F::PRESENT])),
            (0x184, union(&[F::EXECUTE])),
            (0x081, union(&[F::READ, F::PAGE_WALK])),
            (0x08a, union(&[F::WRITE, F::PRESENT, F::PAGE_WALK])),
            (0x001, union(&[F::READ])),
        ] {
            assert_eq!(access_flags(qualification), flags, "{qualification:#x}");
        }
    }

    #[test]
    fn task_switch_qualifications() {
        assert!(matches!(task_switch(0x28), Exit::TaskSwitch { selector: 0x28, source: 0 }));
        assert!(matches!(task_switch(0x4000_0028), Exit::TaskSwitch { selector: 0x28, source: 1 }));
        assert!(matches!(task_switch(0x8000_0028), Exit::TaskSwitch { selector: 0x28, source: 2 }));
        assert!(matches!(task_switch(0xc000_0028), Exit::TaskSwitch { selector: 0x28, source: 0 }));
    }

    #[test]
    fn debug_exceptions_replace_the_breakpoints_and_add_the_rest() {
        assert_eq!(after_debug_exception(0xffff_0ff1, 0x4000), 0xffff_4ff0);
        assert_eq!(after_debug_exception(0xffff_4ff0, 2), 0xffff_4ff2);
        assert_eq!(after_debug_exception(0xffff_0ff0, 0x2000), 0xffff_2ff0);
    }
}
