// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! What exits mean (SDM vol. 3, chapter 28 and appendix C), and what is done about each. Every reason that our controls can
//! bring is named in [`Exit::decode`]; any other is reported as it is.

use axvcpu_uapi::vcpu::ExitKind;
use axvcpu_uapi::x86::{RAX, RBX, RCX, RDI, RDX, RSI};
use vcpu_core::{AccessFlags, AccessWidth, AxVCpuExitReason as Reason, GuestPhysAddr};

use super::fields::Field;
use super::instructions;
use super::registers::{Vmcs, BLOCKING_NMI};
use super::switch::LAUNCHED;
use super::VmxVCpu;
use crate::apic::Effect;
use crate::cpu;
use crate::events::{Activity, Injection, AC, DB};
use crate::hal::X86Hal;
use crate::msr::{Access, Written, PRED_CMD, PRED_CMD_IBPB};
use crate::regs::cr0;
use crate::state::{is_long_code, Pending, Registers};

/// R8.
const R8: usize = 8;
/// TSC_AUX.
const TSC_AUX: u32 = 0xc000_0103;
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

/// Exit reason: the entry has failed.
pub(super) const ENTRY_FAILURE: u32 = 1 << 31;

/// A basic exit reason, understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Exit {
    /// An exception or a physical NMI.
    ExceptionOrNmi,
    /// A physical interrupt, still pending.
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
    /// The preemption timer has expired: the host's turn.
    PreemptionTimer,
    /// XSETBV.
    Xsetbv,
    /// Something else.
    Other,
}

impl Exit {
    /// Of a basic exit reason (SDM vol. 3 appendix C).
    pub(super) const fn decode(reason: u32) -> Self {
        match reason & 0xffff {
            0 => Self::ExceptionOrNmi,
            1 => Self::Interrupt,
            2 => Self::TripleFault,
            3..=6 => Self::HostEvent,
            7 | 8 => Self::Window,
            9 => Self::TaskSwitch,
            10 => Self::Cpuid,
            12 => Self::Hlt,
            13 | 54 => Self::CacheFlush,
            15 => Self::Rdpmc,
            18 => Self::Vmcall,
            28 => Self::ControlRegister,
            29 => Self::DebugRegister,
            30 => Self::Io,
            31 => Self::Rdmsr,
            32 => Self::Wrmsr,
            33 => Self::InvalidState,
            40 => Self::Pause,
            41 => Self::EntryMachineCheck,
            48 => Self::NestedPageFault,
            52 => Self::PreemptionTimer,
            55 => Self::Xsetbv,
            // GETSEC, RSM; VMCLEAR to VMXON; MWAIT, MONITOR; INVEPT, INVVPID; VMFUNC.
            11 | 17 | 19..=27 | 36 | 39 | 50 | 53 | 59 => Self::Undefined,
            _ => Self::Other,
        }
    }

    /// For the statistics.
    const fn kind(self) -> ExitKind {
        match self {
            Self::ControlRegister | Self::DebugRegister => ExitKind::Register,
            Self::Interrupt | Self::PreemptionTimer => ExitKind::HostInterrupt,
            Self::Window => ExitKind::Window,
            Self::Cpuid => ExitKind::Cpuid,
            Self::Pause => ExitKind::Pause,
            Self::Hlt => ExitKind::Halt,
            Self::Io => ExitKind::PortIo,
            Self::Rdmsr => ExitKind::MsrRead,
            Self::Wrmsr => ExitKind::MsrWrite,
            Self::Vmcall => ExitKind::Hypercall,
            Self::Xsetbv => ExitKind::Xsetbv,
            Self::NestedPageFault => ExitKind::PageFault,
            _ => ExitKind::Other,
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

/// Qualification of an I/O exit (SDM vol. 3 table 28-5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Io {
    port: u16,
    width: AccessWidth,
    input: bool,
    pub(super) string: bool,
    rep: bool,
}

impl Io {
    pub(super) fn decode(qualification: u64) -> Self {
        let width = match qualification & 7 {
            0 => AccessWidth::Byte,
            1 => AccessWidth::Word,
            _ => AccessWidth::Dword,
        };
        let bit = |bit: u32| qualification >> bit & 1 != 0;
        Self { port: (qualification >> 16) as u16, width, input: bit(3), string: bit(4), rep: bit(5) }
    }
}

/// Qualification of a control register access (SDM vol. 3 table 28-3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ControlAccess {
    /// MOV to control register `number` from general register `register`.
    Write { number: u8, register: u8 },
    /// MOV from control register `number` to general register `register`.
    Read { number: u8, register: u8 },
    /// CLTS.
    Clts,
    /// LMSW of this value.
    Lmsw(u16),
}

impl ControlAccess {
    const fn decode(qualification: u64) -> Self {
        let number = (qualification & 0xf) as u8;
        let register = (qualification >> 8 & 0xf) as u8;
        match qualification >> 4 & 3 {
            0 => Self::Write { number, register },
            1 => Self::Read { number, register },
            2 => Self::Clts,
            _ => Self::Lmsw((qualification >> 16) as u16),
        }
    }
}

/// CR0 after LMSW of `value`: the low four bits, except that PE cannot be cleared.
const fn after_lmsw(cr0: u64, value: u16) -> u64 {
    cr0 & !(cr0::MP | cr0::EM | cr0::TS) | value as u64 & 0xf
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
const fn task_switch(qualification: u64) -> Reason {
    let source = match qualification >> 30 & 3 {
        1 => 1,
        2 => 2,
        // CALL, or a task gate in the IDT.
        _ => 0,
    };
    Reason::TaskSwitch { selector: qualification as u16, source }
}

/// DR6 after a #DB that reports `qualification`.
const fn after_debug_exception(dr6: u64, qualification: u64) -> u64 {
    dr6 & !DR6_BREAKPOINTS | qualification & DR6_REPORTED
}

/// What an exit tells of itself.
struct Information {
    reason: u32,
    qualification: u64,
    /// Interruption information, of an exception or NMI.
    interruption: u32,
    error_code: u32,
    /// Where the next instruction is, for an instruction that exits.
    next: u64,
}

impl<H: X86Hal> VmxVCpu<H> {
    /// Deals with the exit that the current VMCS tells of.
    ///
    /// # Errors
    /// [`AxError::HardwareLost`](vcpu_core::AxError::HardwareLost).
    pub(super) fn handle_exit(&mut self) -> vcpu_core::AxResult<Reason> {
        // SAFETY: Interrupts are off in the inner window, in which our VMCS is current.
        let mut vmcs = unsafe { Vmcs::current() };
        let reason = vmcs.read(Field::ExitReason) as u32;
        let qualification = vmcs.read(Field::ExitQualification);
        if reason & ENTRY_FAILURE != 0 {
            vmcs.finish()?;
            return Ok(self.invalid_state(reason, qualification));
        }
        self.regs.frame.flags |= LAUNCHED;
        let exit = Exit::decode(reason);
        self.local.exit_kind = exit.kind();
        let interruptibility = self.regs.read_exit(&mut vmcs);
        let vectoring = vmcs.read(Field::ExitVectoring) as u32;
        let vectoring_code = vmcs.read(Field::ExitVectoringErrorCode) as u32;
        let length = vmcs.read(Field::ExitInstructionLength) & 0xf;
        let information = Information {
            reason,
            qualification,
            interruption: if exit == Exit::ExceptionOrNmi { vmcs.read(Field::ExitInterruption) as u32 } else { 0 },
            error_code: if exit == Exit::ExceptionOrNmi {
                vmcs.read(Field::ExitInterruptionErrorCode) as u32
            } else {
                0
            },
            next: self.regs.rip().wrapping_add(length),
        };
        let address = vmcs.read(Field::ExitGuestPhysicalAddress);
        vmcs.finish()?;
        if self.breakpoints_loaded() {
            // SAFETY: Kernel context; the guest's DR6 is in the CPU.
            let (dr6, _) = unsafe { cpu::debug_status_control() };
            self.regs.set_dr6(dr6);
        }
        let interrupted = decode_event(vectoring, vectoring_code);
        self.follow_nmi(exit, &information, interruptibility, interrupted);
        let injected = self.local.injected.take();
        if self.local.injected_length != 0 && interrupted.is_some() && interrupted == injected {
            // Injected with an instruction that does not exist: RIP goes behind it again.
            self.regs.set_rip(self.regs.rip().wrapping_add(self.local.injected_length.into()));
        }
        // Exceptions combine with what was being delivered; after a triple fault there is nothing to go on with.
        let exception =
            exit == Exit::ExceptionOrNmi && interruption::kind(information.interruption) != interruption::NMI;
        if !exception && exit != Exit::TripleFault {
            if let Some(event) = interrupted {
                self.guest.events.requeue(event, injected);
            }
        }
        Ok(self.dispatch(exit, &information, address, interrupted))
    }

    fn dispatch(&mut self, exit: Exit, i: &Information, address: u64, interrupted: Option<Injection>) -> Reason {
        let Information { reason, qualification, next, .. } = *i;
        match exit {
            Exit::Interrupt => Reason::ExternalInterrupt { vector: 0 },
            Exit::PreemptionTimer => Reason::PreemptionTimer,
            Exit::NestedPageFault => {
                Reason::NestedPageFault { addr: GuestPhysAddr::new(address), access_flags: access_flags(qualification) }
            }
            Exit::ExceptionOrNmi => self.exception(i, interrupted),
            Exit::HostEvent => Reason::Nothing,
            Exit::Window => {
                if self.guest.events.window_requested() && self.guest.window_open(&self.regs) {
                    Reason::InterruptWindow
                } else {
                    Reason::Nothing
                }
            }
            Exit::Cpuid => {
                self.guest.cpuid(&mut self.regs);
                self.go_on(next)
            }
            Exit::CacheFlush | Exit::Pause => self.go_on(next),
            Exit::Rdmsr => self.rdmsr(next),
            Exit::Wrmsr => self.wrmsr(next),
            Exit::Io => self.io(Io::decode(qualification), next),
            Exit::Hlt => self.hlt(next),
            Exit::ControlRegister => self.control_register(ControlAccess::decode(qualification), next),
            Exit::DebugRegister => {
                self.load_breakpoints();
                Reason::Nothing
            }
            Exit::Xsetbv => self.xsetbv(next),
            Exit::Vmcall => self.vmcall(next),
            Exit::Undefined => {
                self.guest.undefined();
                Reason::Nothing
            }
            Exit::Rdpmc => {
                self.guest.general_protection();
                Reason::Nothing
            }
            Exit::TaskSwitch => task_switch(qualification),
            Exit::TripleFault => Reason::TripleFault,
            Exit::InvalidState | Exit::EntryMachineCheck | Exit::Other => {
                Reason::Unknown { code: reason.into(), info1: qualification, info2: address }
            }
        }
    }

    /// Keeps track of whether NMIs are blocked: the CPU unblocks them at IRET.
    fn follow_nmi(&mut self, exit: Exit, i: &Information, interruptibility: u32, interrupted: Option<Injection>) {
        // An IRET that faults has unblocked them too early, and will be executed again (SDM vol. 3 section 28.2.3).
        let iret_faulted = interrupted.is_none()
            && match exit {
                Exit::NestedPageFault => i.qualification & u64::from(interruption::IRET) != 0,
                Exit::ExceptionOrNmi => i.interruption & interruption::IRET != 0,
                _ => false,
            };
        let delivered_again = interrupted == Some(Injection::Nmi);
        if interruptibility & BLOCKING_NMI == 0 && !iret_faulted && !delivered_again {
            self.guest.events.unmask_nmi();
        }
    }

    /// An exception that we have asked for, or a physical NMI.
    fn exception(&mut self, i: &Information, interrupted: Option<Injection>) -> Reason {
        let vector = i.interruption as u8;
        match (interruption::kind(i.interruption), vector) {
            (interruption::NMI, _) => {
                // SAFETY: Kernel context with the host's IDT: FRED hosts have no VMX backend.
                unsafe { instructions::raise_nmi() };
                Reason::Nothing
            }
            (interruption::EXCEPTION, MC) => {
                // SAFETY: As above.
                unsafe { cpu::raise_machine_check() };
                Reason::MachineCheck
            }
            (interruption::PRIVILEGED, _) => {
                // INT1: a trap, but RIP is at it.
                self.regs.set_rip(i.next);
                self.reflect(Injection::Exception(DB, None), interrupted)
            }
            (interruption::EXCEPTION, DB) => {
                let dr6 = after_debug_exception(self.regs.dr6(), i.qualification);
                self.regs.set_dr6(dr6);
                self.reflect(Injection::Exception(DB, None), interrupted)
            }
            (interruption::EXCEPTION, AC) => self.reflect(Injection::Exception(AC, Some(i.error_code)), interrupted),
            _ => Reason::Unknown { code: i.reason.into(), info1: i.qualification, info2: i.interruption.into() },
        }
    }

    /// The guest gets `exception`, which the exit has kept from it.
    fn reflect(&mut self, exception: Injection, interrupted: Option<Injection>) -> Reason {
        if self.guest.events.exception_exit(exception, interrupted) {
            return Reason::TripleFault;
        }
        Reason::Nothing
    }

    // --- Instructions ---

    /// The instruction has been executed for the guest.
    fn go_on(&mut self, next: u64) -> Reason {
        self.guest.advance(&mut self.regs, next);
        Reason::Nothing
    }

    fn fault(&mut self) -> Reason {
        self.guest.general_protection();
        Reason::Nothing
    }

    fn rdmsr(&mut self, next: u64) -> Reason {
        let rip = self.regs.rip();
        let index = self.regs.gpr(RCX) as u32;
        match self.guest.read_msr(&self.regs, index) {
            Access::Done(value) => {
                self.regs.set_gpr(RAX, value & 0xffff_ffff);
                self.regs.set_gpr(RDX, value >> 32);
                self.go_on(next)
            }
            Access::Fault => self.fault(),
            Access::User => {
                self.local.exit_kind = ExitKind::MsrUser;
                self.guest.advance(&mut self.regs, next);
                self.guest.pending = Pending::MsrRead { rip };
                Reason::SysRegRead { addr: index.into(), reg: 0 }
            }
        }
    }

    fn wrmsr(&mut self, next: u64) -> Reason {
        let rip = self.regs.rip();
        let index = self.regs.gpr(RCX) as u32;
        let value = self.regs.gpr(RDX) << 32 | self.regs.gpr(RAX) & 0xffff_ffff;
        match self.guest.write_msr(&mut self.regs, index, value) {
            Access::Done(written) => {
                self.guest.advance(&mut self.regs, next);
                self.after_write(index, written)
            }
            Access::Fault => self.fault(),
            Access::User => {
                self.local.exit_kind = ExitKind::MsrUser;
                self.guest.advance(&mut self.regs, next);
                self.guest.pending = Pending::MsrWrite { rip };
                Reason::SysRegWrite { addr: index.into(), value }
            }
        }
    }

    /// What a write of an MSR has set off.
    fn after_write(&mut self, index: u32, written: Written) -> Reason {
        match written {
            Written::Quiet => {
                if index == TSC_AUX {
                    // SAFETY: In the inner window, which has TSC_AUX for the guest; the CPU has it, or the guest could not
                    // write it.
                    unsafe { cpu::wrmsr(index, self.guest.msrs.tsc_aux) };
                }
                Reason::Nothing
            }
            Written::BranchBarrier => {
                // SAFETY: Kernel context; the CPU has it, or the guest could not write it.
                unsafe { cpu::wrmsr(PRED_CMD, PRED_CMD_IBPB) };
                Reason::Nothing
            }
            Written::Apic(Effect::None) => Reason::Nothing,
            Written::Apic(Effect::InterruptEnd(vector)) => Reason::InterruptEnd { vector: Some(vector) },
            Written::Apic(Effect::Ipi(command)) => {
                self.local.exit_kind = ExitKind::Ipi;
                Reason::SendIPI {
                    target_cpu: command >> 32,
                    target_cpu_aux: 0,
                    send_to_all: command >> 18 & 3 >= 2,
                    send_to_self: command >> 18 & 3 == 1 || command >> 18 & 3 == 2,
                    vector: command & 0xffff_ffff,
                }
            }
        }
    }

    fn io(&mut self, io: Io, next: u64) -> Reason {
        let Io { port, width, input, string, rep } = io;
        if string {
            self.local.string_next = next;
            return Reason::IoString { port, width, input, rep };
        }
        self.guest.advance(&mut self.regs, next);
        if input {
            self.guest.pending = Pending::Input { bytes: width.size() };
            Reason::IoRead { port, width }
        } else {
            Reason::IoWrite { port, width, data: self.regs.gpr(RAX) & width.mask() }
        }
    }

    fn hlt(&mut self, next: u64) -> Reason {
        self.guest.advance(&mut self.regs, next);
        if self.guest.lapic.is_none() {
            return Reason::Halt;
        }
        self.guest.events.set_activity(Activity::Halted);
        if self.guest.update_activity(&self.regs) {
            Reason::Nothing
        } else {
            Reason::Halt
        }
    }

    fn control_register(&mut self, access: ControlAccess, next: u64) -> Reason {
        let allowed = match access {
            ControlAccess::Write { number, register } => {
                let value = self.operand(register);
                match number {
                    0 => self.guest.write_cr0(&mut self.regs, value).is_ok(),
                    4 => self.guest.write_cr4(&mut self.regs, value).is_ok(),
                    8 if value <= 15 => {
                        self.guest.set_cr8(value as u8);
                        true
                    }
                    _ => false,
                }
            }
            ControlAccess::Read { number: 8, register } => {
                let value = self.guest.cr8();
                self.regs.set_gpr(register.into(), value.into());
                true
            }
            ControlAccess::Read { .. } => false,
            ControlAccess::Clts => {
                let value = self.regs.cr0() & !cr0::TS;
                self.regs.set_cr0(value);
                true
            }
            ControlAccess::Lmsw(value) => {
                let value = after_lmsw(self.regs.cr0(), value);
                self.guest.write_cr0(&mut self.regs, value).is_ok()
            }
        };
        if allowed {
            self.go_on(next)
        } else {
            self.fault()
        }
    }

    /// The general register operand of a MOV to a control register: 32 bits outside of 64-bit code.
    fn operand(&self, register: u8) -> u64 {
        let value = self.regs.gpr(register.into());
        if is_long_code(&self.regs) {
            value
        } else {
            value & 0xffff_ffff
        }
    }

    fn xsetbv(&mut self, next: u64) -> Reason {
        if !self.guest.xsetbv(&self.regs) {
            return self.fault();
        }
        // SAFETY: In a window, which has XCR0 for the guest and puts the host's back; the CPU takes the value, since it is a
        // valid combination of components that the host itself has enabled.
        unsafe { cpu::set_xcr0(self.guest.xcr0) };
        self.go_on(next)
    }

    fn vmcall(&mut self, next: u64) -> Reason {
        self.guest.advance(&mut self.regs, next);
        self.guest.pending = Pending::Hypercall;
        let gpr = |register| self.regs.gpr(register);
        Reason::Hypercall { nr: gpr(RAX), args: [gpr(RBX), gpr(RCX), gpr(RDX), gpr(RSI), gpr(RDI), gpr(R8)] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_those_of_appendix_c() {
        for (reason, exit) in [
            (0, Exit::ExceptionOrNmi),
            (1, Exit::Interrupt),
            (2, Exit::TripleFault),
            (3, Exit::HostEvent),
            (6, Exit::HostEvent),
            (7, Exit::Window),
            (8, Exit::Window),
            (9, Exit::TaskSwitch),
            (10, Exit::Cpuid),
            (11, Exit::Undefined),
            (12, Exit::Hlt),
            (13, Exit::CacheFlush),
            (14, Exit::Other),
            (15, Exit::Rdpmc),
            (16, Exit::Other),
            (17, Exit::Undefined),
            (18, Exit::Vmcall),
            (19, Exit::Undefined),
            (27, Exit::Undefined),
            (28, Exit::ControlRegister),
            (29, Exit::DebugRegister),
            (30, Exit::Io),
            (31, Exit::Rdmsr),
            (32, Exit::Wrmsr),
            (33, Exit::InvalidState),
            (34, Exit::Other),
            (36, Exit::Undefined),
            (39, Exit::Undefined),
            (40, Exit::Pause),
            (41, Exit::EntryMachineCheck),
            (48, Exit::NestedPageFault),
            (49, Exit::Other),
            (50, Exit::Undefined),
            (52, Exit::PreemptionTimer),
            (53, Exit::Undefined),
            (54, Exit::CacheFlush),
            (55, Exit::Xsetbv),
            (59, Exit::Undefined),
            (70, Exit::Other),
            (ENTRY_FAILURE | 33, Exit::InvalidState),
        ] {
            assert_eq!(Exit::decode(reason), exit, "{reason}");
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
    fn real_mode_has_no_error_codes() {
        let event = encode_event(Injection::GENERAL_PROTECTION, false);
        assert_eq!((event.info, event.error_code), (0x8000_030d, 0));
    }

    #[test]
    fn io_qualifications() {
        let io = |port, width, input, string, rep| Io { port, width, input, string, rep };
        assert_eq!(Io::decode(0x03f8_0000), io(0x3f8, AccessWidth::Byte, false, false, false));
        assert_eq!(Io::decode(0x03f8_0008), io(0x3f8, AccessWidth::Byte, true, false, false));
        assert_eq!(Io::decode(0x01f0_0039), io(0x1f0, AccessWidth::Word, true, true, true));
        assert_eq!(Io::decode(0x0cf8_0043), io(0xcf8, AccessWidth::Dword, false, false, false));
    }

    #[test]
    fn control_register_qualifications() {
        assert_eq!(ControlAccess::decode(0x0f04), ControlAccess::Write { number: 4, register: 15 });
        assert_eq!(ControlAccess::decode(0x0318), ControlAccess::Read { number: 8, register: 3 });
        assert_eq!(ControlAccess::decode(0x20), ControlAccess::Clts);
        assert_eq!(ControlAccess::decode(0xbeef_0030), ControlAccess::Lmsw(0xbeef));
    }

    #[test]
    fn lmsw_sets_but_does_not_clear_protected_mode() {
        assert_eq!(after_lmsw(0x8000_0011, 0), 0x8000_0011);
        assert_eq!(after_lmsw(0x10, 0xffff), 0x1f);
        assert_eq!(after_lmsw(0x1e, 1), 0x11);
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
        assert_eq!(task_switch(0x28), Reason::TaskSwitch { selector: 0x28, source: 0 });
        assert_eq!(task_switch(0x4000_0028), Reason::TaskSwitch { selector: 0x28, source: 1 });
        assert_eq!(task_switch(0x8000_0028), Reason::TaskSwitch { selector: 0x28, source: 2 });
        assert_eq!(task_switch(0xc000_0028), Reason::TaskSwitch { selector: 0x28, source: 0 });
    }

    #[test]
    fn debug_exceptions_replace_the_breakpoints_and_add_the_rest() {
        assert_eq!(after_debug_exception(0xffff_0ff1, 0x4000), 0xffff_4ff0);
        assert_eq!(after_debug_exception(0xffff_4ff0, 2), 0xffff_4ff2);
        assert_eq!(after_debug_exception(0xffff_0ff0, 0x2000), 0xffff_2ff0);
    }
}
