// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! What exits mean (SDM vol. 3, chapter 28 and appendix C). Every reason that our controls can bring is named in
//! [`Code::decode`]; any other is reported as it is.

use axvcpu_uapi::vcpu::ExitKind;
use vcpu_core::{AccessFlags, AccessWidth, GuestPhysAddr};

use super::fields::Field;
use super::instructions;
use super::registers::BLOCKING_NMI;
use super::switch;
use super::vmcs::Vmcs;
use super::Vmx;
use crate::apic::Effect;
use crate::backend::{ControlAccess, Exit, Exited, Frequent, Instruction, Io, Simple};
use crate::cpu;
use crate::events::{Injection, Plan, AC, DB};
use crate::hal::X86Hal;
use crate::state::{Guest, Registers};
use crate::switch::LAUNCHED;

/// #BP.
const BP: u8 = 3;
/// #OF.
const OF: u8 = 4;
/// #MC.
const MC: u8 = 18;
/// Bits of DR6 that #DB reports in the qualification: B0 to B3, BD, BS.
const DR6_REPORTED: u64 = 0x600f;
/// Of those, B0 to B3, which each #DB sets anew.
const DR6_BREAKPOINTS: u64 = 0xf;

/// Basic exit reason of CPUID.
const CPUID: u32 = 10;
/// Basic exit reason of IN, OUT, INS and OUTS.
const IO: u32 = 30;
/// Basic exit reason of RDMSR.
const RDMSR: u32 = 31;
/// Basic exit reason of WRMSR.
const WRMSR: u32 = 32;
/// Basic exit reason of an access that the nested page table does not allow.
const EPT_VIOLATION: u32 = 48;
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
mod interruption {
    pub(super) const VALID: u32 = 1 << 31;
    pub(super) const HAS_CODE: u32 = 1 << 11;
    /// IRET had unblocked NMIs before it faulted.
    pub(super) const IRET: u32 = 1 << 12;
    pub(super) const EXTERNAL: u32 = 0;
    pub(super) const NMI: u32 = 2;
    pub(super) const EXCEPTION: u32 = 3;
    pub(super) const SOFTWARE_INTERRUPT: u32 = 4;
    /// INT1.
    pub(super) const PRIVILEGED: u32 = 5;
    /// INT3, INTO.
    pub(super) const SOFTWARE_EXCEPTION: u32 = 6;

    pub(super) const fn kind(info: u32) -> u32 {
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
pub(super) fn decode_event(info: u32, error_code: u32) -> Option<Injection> {
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
const fn acknowledged(info: u32) -> Option<u8> {
    if info & interruption::VALID != 0 && info as u8 >= 32 {
        Some(info as u8)
    } else {
        None
    }
}

/// Qualification of an I/O exit (SDM vol. 3 table 28-5).
fn decode_io(qualification: u64) -> Io {
    let width = match qualification & 7 {
        0 => AccessWidth::Byte,
        1 => AccessWidth::Word,
        _ => AccessWidth::Dword,
    };
    let bit = |bit: u32| qualification >> bit & 1 != 0;
    Io { port: (qualification >> 16) as u16, width, input: bit(3), string: bit(4), rep: bit(5) }
}

/// Qualification of a control register access (SDM vol. 3 table 28-3).
const fn decode_control(qualification: u64) -> ControlAccess {
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
fn access_flags(qualification: u64) -> AccessFlags {
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
const fn task_switch(qualification: u64) -> Exit {
    let source = match qualification >> 30 & 3 {
        1 => 1,
        2 => 2,
        // CALL, or a task gate in the IDT.
        _ => 0,
    };
    Exit::TaskSwitch { selector: qualification as u16, source }
}

/// DR6 after a #DB that reports `qualification`.
const fn after_debug_exception(dr6: u64, qualification: u64) -> u64 {
    dr6 & !DR6_BREAKPOINTS | qualification & DR6_REPORTED
}

impl<H: X86Hal> Vmx<H> {
    /// The exit, if it is one that [`Backend::frequent`](crate::backend::Backend::frequent) is about. An instruction's own comes while no
    /// event is being delivered; and no NMI was blocked.
    #[inline]
    pub(super) fn frequent_exit(&mut self, guest: &mut Guest<H>) -> Option<Frequent> {
        if self.regs.frame.result != switch::EXITED {
            return None;
        }
        // SAFETY: Interrupts are off in the inner window, in which our VMCS is current.
        let vmcs = unsafe { Vmcs::current() };
        // The whole field, whose upper bits tell of what is not simple.
        let instruction = match vmcs.read(Field::ExitReason) as u32 {
            IO => match decode_io(vmcs.read(Field::ExitQualification)) {
                Io { string: true, .. } => return None,
                io => Simple::Io(io),
            },
            CPUID => Simple::Cpuid,
            RDMSR => Simple::Rdmsr,
            WRMSR => Simple::Wrmsr,
            EPT_VIOLATION if vmcs.read(Field::ExitVectoring) & u64::from(interruption::VALID) == 0 => {
                let addr = GuestPhysAddr::new(vmcs.read(Field::ExitGuestPhysicalAddress));
                let access = access_flags(vmcs.read(Field::ExitQualification));
                self.taken(guest);
                self.regs.read_exit(&vmcs, false);
                return Some(Frequent::PageFault { addr, access });
            }
            _ => return None,
        };
        self.taken(guest);
        self.regs.read_exit(&vmcs, false);
        Some(Frequent::Instruction(instruction, self.next_rip(&vmcs)))
    }

    /// The CPU has entered the guest: the VMCS is launched, and the task priority is what the guest has made of it.
    #[inline]
    fn taken(&mut self, guest: &mut Guest<H>) {
        self.regs.frame.flags |= LAUNCHED;
        if self.local.virtual_apic.keeps_priority_only(guest.lapic()) {
            guest.apic_changed();
        }
    }

    /// Puts into `guest.exited` what the exit was that the current VMCS tells of.
    #[inline(never)]
    pub(super) fn decode_exit(&mut self, guest: &mut Guest<H>, plan: &Plan) {
        // SAFETY: Interrupts are off in the inner window, in which our VMCS is current.
        let vmcs = unsafe { Vmcs::current() };
        let reason = vmcs.read(Field::ExitReason) as u32;
        if reason & ENTRY_FAILURE != 0 {
            guest.exited = self.invalid_state(guest, plan, reason, vmcs.read(Field::ExitQualification));
            return;
        }
        self.taken(guest);
        let debug = guest.debug.loaded();
        if debug {
            // SAFETY: Kernel context; the guest's DR6 is in the CPU.
            let (dr6, _) = unsafe { cpu::debug_status_control() };
            self.regs.set_dr6(dr6);
        }
        let code = Code::decode(reason);
        if code == Code::Interrupt && self.local.virtual_apic.takes_posted_interrupts() {
            // SAFETY: The vCPU is bound: preemption is off, so the record is this CPU's and nobody else uses it meanwhile.
            let per_cpu = unsafe { H::per_cpu().as_mut() };
            per_cpu.host_interrupt = acknowledged(vmcs.read(Field::ExitInterruption) as u32);
        }
        let interruptibility = self.regs.read_exit(&vmcs, debug);
        let interrupted = interrupted(&vmcs);
        if interruptibility & BLOCKING_NMI == 0 {
            self.follow_nmi(guest, &vmcs, code, interrupted);
        }
        if interrupted.is_some() && interrupted == plan.inject {
            self.undo_injected_length();
        }
        guest.exited = Exited { exit: self.exit(guest, &vmcs, code, reason), interrupted };
    }

    fn exit(&mut self, guest: &mut Guest<H>, vmcs: &Vmcs, code: Code, reason: u32) -> Exit {
        let qualification = || vmcs.read(Field::ExitQualification);
        let instruction = match code {
            Code::Cpuid => Instruction::Simple(Simple::Cpuid),
            Code::Rdmsr => Instruction::Simple(Simple::Rdmsr),
            Code::Wrmsr => Instruction::Simple(Simple::Wrmsr),
            Code::Io => decode_io(qualification()).into(),
            Code::Hlt => Instruction::Hlt,
            Code::Pause => Instruction::Pause,
            Code::Vmcall => Instruction::Hypercall,
            Code::ControlRegister => Instruction::Control(decode_control(qualification())),
            Code::Xsetbv => Instruction::Xsetbv,
            Code::CacheFlush => Instruction::CacheFlush,
            Code::Interrupt => return Exit::Interrupt,
            Code::PreemptionTimer => return Exit::PreemptionTimer,
            Code::NestedPageFault => {
                return Exit::PageFault {
                    addr: GuestPhysAddr::new(vmcs.read(Field::ExitGuestPhysicalAddress)),
                    access: access_flags(qualification()),
                };
            }
            Code::ExceptionOrNmi => return self.exception(vmcs, reason),
            Code::HostEvent => return Exit::Done(ExitKind::Other),
            Code::Window => return Exit::Window,
            Code::DebugRegister => {
                // SAFETY: Kernel context, in the inner window.
                unsafe { guest.debug.load() };
                return Exit::Done(ExitKind::Register);
            }
            // What these exits are about has happened: RIP is behind the instruction.
            Code::TaskPriority => return Exit::Apic(Effect::None),
            Code::EndOfInterrupt => {
                let vector = qualification() as u8;
                return Exit::Apic(guest.lapic().map_or(Effect::None, |lapic| lapic.ended_by_hardware(vector)));
            }
            Code::ApicWrite => {
                let offset = qualification() as u16 & 0xfff;
                let effect = guest.with_lapic(|lapic, clock| lapic.written_by_hardware(offset, clock));
                return Exit::Apic(effect.unwrap_or(Effect::None));
            }
            Code::Undefined => return Exit::Raise(Injection::UNDEFINED),
            Code::Rdpmc => return Exit::Raise(Injection::GENERAL_PROTECTION),
            Code::TaskSwitch => return task_switch(qualification()),
            Code::TripleFault => return Exit::TripleFault,
            Code::InvalidState | Code::EntryMachineCheck | Code::Other => {
                return Exit::Unknown {
                    code: reason.into(),
                    info1: qualification(),
                    info2: vmcs.read(Field::ExitGuestPhysicalAddress),
                }
            }
        };
        let next = self.next_rip(vmcs);
        if let Instruction::IoString(_) = instruction {
            self.local.string_next = next;
        }
        Exit::Instruction(instruction, next)
    }

    /// Where the instruction behind the one of the exit is.
    fn next_rip(&self, vmcs: &Vmcs) -> u64 {
        self.regs.rip().wrapping_add(vmcs.read(Field::ExitInstructionLength) & 0xf)
    }

    /// Keeps track of whether NMIs are blocked: the CPU has unblocked them, at IRET.
    fn follow_nmi(&self, guest: &mut Guest<H>, vmcs: &Vmcs, code: Code, interrupted: Option<Injection>) {
        if !guest.events.nmi_masked() {
            return;
        }
        // An IRET that faults has unblocked them too early, and will be executed again (SDM vol. 3 section 28.2.3).
        let iret_faulted = interrupted.is_none()
            && match code {
                Code::NestedPageFault => vmcs.read(Field::ExitQualification) & u64::from(interruption::IRET) != 0,
                Code::ExceptionOrNmi => vmcs.read(Field::ExitInterruption) & u64::from(interruption::IRET) != 0,
                _ => false,
            };
        if !iret_faulted && interrupted != Some(Injection::Nmi) {
            guest.events.unmask_nmi();
        }
    }

    /// An exception that we have asked for, or a physical NMI.
    fn exception(&mut self, vmcs: &Vmcs, reason: u32) -> Exit {
        let information = vmcs.read(Field::ExitInterruption) as u32;
        let qualification = vmcs.read(Field::ExitQualification);
        match (interruption::kind(information), information as u8) {
            (interruption::NMI, _) => {
                // SAFETY: Kernel context with the host's IDT: FRED hosts have no VMX backend.
                unsafe { instructions::raise_nmi() };
                Exit::Done(ExitKind::Other)
            }
            (interruption::EXCEPTION, MC) => {
                // SAFETY: As above.
                unsafe { cpu::raise_machine_check() };
                Exit::MachineCheck
            }
            (interruption::PRIVILEGED, _) => {
                // INT1: a trap, but RIP is at it.
                self.regs.set_rip(self.next_rip(vmcs));
                Exit::Exception(Injection::DEBUG)
            }
            (interruption::EXCEPTION, DB) => {
                let dr6 = after_debug_exception(self.regs.dr6(), qualification);
                self.regs.set_dr6(dr6);
                Exit::Exception(Injection::DEBUG)
            }
            (interruption::EXCEPTION, AC) => {
                let code = vmcs.read(Field::ExitInterruptionErrorCode) as u32;
                Exit::Exception(Injection::Exception(AC, Some(code)))
            }
            _ => Exit::Unknown { code: reason.into(), info1: qualification, info2: information.into() },
        }
    }
}

/// The event whose delivery the exit has interrupted.
#[inline]
fn interrupted(vmcs: &Vmcs) -> Option<Injection> {
    let information = vmcs.read(Field::ExitVectoring) as u32;
    if information & interruption::VALID == 0 {
        return None;
    }
    decode_event(information, vmcs.read(Field::ExitVectoringErrorCode) as u32)
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
            assert_eq!(decode_event(info, code), Some(event), "{info:#x}");
            assert_eq!(decode_event(info & !(1 << 31), code), None);
        }
        assert_eq!(decode_event(0x8000_0501, 0), None, "INT1 raises its exception again");
        assert_eq!(decode_event(0x8000_0130, 0), None, "type 1 is reserved");
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
        assert_eq!(decode_io(0x03f8_0000), io(0x3f8, AccessWidth::Byte, false, false, false));
        assert_eq!(decode_io(0x03f8_0008), io(0x3f8, AccessWidth::Byte, true, false, false));
        assert_eq!(decode_io(0x01f0_0039), io(0x1f0, AccessWidth::Word, true, true, true));
        assert_eq!(decode_io(0x0cf8_0043), io(0xcf8, AccessWidth::Dword, false, false, false));
    }

    #[test]
    fn control_register_qualifications() {
        assert_eq!(decode_control(0x0f04), ControlAccess::Write { number: 4, register: 15 });
        assert_eq!(decode_control(0x0318), ControlAccess::Read { number: 8, register: 3 });
        assert_eq!(decode_control(0x20), ControlAccess::Clts);
        assert_eq!(decode_control(0xbeef_0030), ControlAccess::Lmsw(0xbeef));
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
