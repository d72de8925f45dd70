// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! Reads an exit from the current VMCS, and tells what follows from it. What its numbers mean is in [`decode`].
//! Interrupts are off, in the inner window.

use axvcpu_uapi::vcpu::ExitKind;
use vcpu_core::GuestPhysAddr;

use super::decode::{self, interruption, Code, ENTRY_FAILURE};
use super::fields::Field;
use super::instructions;
use super::registers::BLOCKING_NMI;
use super::switch;
use super::vmcs::Vmcs;
use super::Vmx;
use crate::apic::Effect;
use crate::backend::{Exit, Exited, Frequent, Instruction, Io, Simple};
use crate::cpu;
use crate::events::{Injection, Plan, AC, DB};
use crate::hal::X86Hal;
use crate::state::{Guest, Registers};
use crate::switch::LAUNCHED;

/// #MC.
const MC: u8 = 18;

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
            decode::IO => match decode::port_access(vmcs.read(Field::ExitQualification)) {
                Io { string: true, .. } => return None,
                io => Simple::Io(io),
            },
            decode::CPUID => Simple::Cpuid,
            decode::RDMSR => Simple::Rdmsr,
            decode::WRMSR => Simple::Wrmsr,
            decode::EPT_VIOLATION if vmcs.read(Field::ExitVectoring) & u64::from(interruption::VALID) == 0 => {
                let addr = GuestPhysAddr::new(vmcs.read(Field::ExitGuestPhysicalAddress));
                let access = decode::access_flags(vmcs.read(Field::ExitQualification));
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
            per_cpu.host_interrupt = decode::acknowledged(vmcs.read(Field::ExitInterruption) as u32);
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
            Code::Io => decode::port_access(qualification()).into(),
            Code::Hlt => Instruction::Hlt,
            Code::Pause => Instruction::Pause,
            Code::Vmcall => Instruction::Hypercall,
            Code::ControlRegister => Instruction::Control(decode::control_access(qualification())),
            Code::Xsetbv => Instruction::Xsetbv,
            Code::CacheFlush => Instruction::CacheFlush,
            Code::Interrupt => return Exit::Interrupt,
            Code::PreemptionTimer => return Exit::PreemptionTimer,
            Code::NestedPageFault => {
                return Exit::PageFault {
                    addr: GuestPhysAddr::new(vmcs.read(Field::ExitGuestPhysicalAddress)),
                    access: decode::access_flags(qualification()),
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
            Code::TaskSwitch => return decode::task_switch(qualification()),
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
                let dr6 = decode::after_debug_exception(self.regs.dr6(), qualification);
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
    decode::interrupted_event(information, vmcs.read(Field::ExitVectoringErrorCode) as u32)
}
