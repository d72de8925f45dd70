// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! What the crate asks of a virtualization extension, [`Backend`], and what an entry into the guest comes back with,
//! [`Exited`]. Both backends speak of exits in these terms only; what is done about them is in `exit.rs`, once.

use axvcpu_uapi::vcpu::ExitKind;
use vcpu_core::npt::Format;
use vcpu_core::{AccessFlags, AccessWidth, AxResult, GuestPhysAddr};

use crate::apic::Effect;
use crate::events::{Injection, Plan};
use crate::hal::X86Hal;
use crate::state::{Guest, Registers};
use crate::vcpu::InsnInfo;

/// A virtualization extension, as one vCPU uses it: the control block, the world switch, the decoding of the hardware's exit
/// codes, and the windows in which the CPU is the guest's. The order of calls is that of [`AxArchVCpu`](vcpu_core::AxArchVCpu).
pub(crate) trait Backend<H: X86Hal> {
    /// The registers that the control block holds.
    type Registers: Registers;

    /// The format of the nested page table.
    type Format: Format;

    /// The registers.
    fn regs(&self) -> &Self::Registers;

    /// The registers, to be changed.
    fn regs_mut(&mut self) -> &mut Self::Registers;

    /// The guest's CPUID and nested page table are known.
    fn setup(&mut self, guest: &Guest<H>);

    /// Takes the CPU: all of the host's state is switched that the host does not need while it looks at exits, if the next
    /// method does not do it. Preemption is off from before this call until after [`close`](Self::close).
    ///
    /// # Errors
    /// [`AxError::HardwareBusy`](vcpu_core::AxError::HardwareBusy), with everything as it was.
    fn open(&mut self, guest: &mut Guest<H>) -> AxResult;

    /// Gives the CPU back. [`leave`](Self::leave) has been called.
    ///
    /// # Errors
    /// As the hardware's, and the CPU is given back nevertheless.
    fn close(&mut self, guest: &mut Guest<H>) -> AxResult;

    /// What an entry needs and what may fail, before events are taken out of their queues for it. Interrupts are off until
    /// after [`leave`](Self::leave). An exit, if the guest's memory must be mapped first.
    ///
    /// # Errors
    /// [`AxError::HardwareLost`](vcpu_core::AxError::HardwareLost).
    fn ready(&mut self, guest: &mut Guest<H>) -> AxResult<Option<Exit>>;

    /// Whether the CPU delivers the local APIC's interrupts by itself: then none of them is for a plan.
    fn delivers_interrupts(&self, _guest: &Guest<H>) -> bool {
        false
    }

    /// Whether interrupts can be posted to it while it runs. Settled by [`setup`](Self::setup).
    fn takes_posted_interrupts(&self) -> bool {
        false
    }

    /// Whether entries end when the guest's TSC reaches the deadline of the local APIC's timer.
    fn watches_deadline(&self) -> bool {
        false
    }

    /// Completes the control block for an entry with the events of `plan`. True if it is good for any number of entries, all but the
    /// first without an event: as long as nothing but [`frequent`](Self::frequent) exits come, [`again`](Self::again) is all that it
    /// needs between two of them.
    ///
    /// # Errors
    /// [`AxError::HardwareLost`](vcpu_core::AxError::HardwareLost).
    fn prepare(&mut self, guest: &mut Guest<H>, plan: &Plan) -> AxResult<bool>;

    /// One entry. How it ended is for the next two to say.
    ///
    /// # Errors
    /// [`AxError::HardwareLost`](vcpu_core::AxError::HardwareLost); [`AxError::StateLost`](vcpu_core::AxError::StateLost).
    fn enter(&mut self) -> AxResult;

    /// The last exit, if it is one of the frequent ones, found with the least effort. To be asked only if
    /// [`prepare`](Self::prepare) said so; `None` if [`decode`](Self::decode) is to find out.
    fn frequent(&mut self, guest: &mut Guest<H>) -> Option<Frequent>;

    /// Makes the control block ready for the entry behind a [`frequent`](Self::frequent) exit.
    ///
    /// # Errors
    /// [`AxError::HardwareLost`](vcpu_core::AxError::HardwareLost).
    fn again(&mut self, guest: &Guest<H>) -> AxResult;

    /// The user of the last exit will want to see all registers when the guest has been [left](Self::leave).
    fn show_all(&mut self) {}

    /// Puts into `guest.exited` how the last entry, which was prepared with `plan`, ended.
    ///
    /// # Errors
    /// [`AxError::HardwareLost`](vcpu_core::AxError::HardwareLost).
    fn decode(&mut self, guest: &mut Guest<H>, plan: &Plan) -> AxResult;

    /// Ends what [`ready`](Self::ready) has begun on this CPU. Nothing if there is nothing to end.
    ///
    /// # Errors
    /// [`AxError::HardwareLost`](vcpu_core::AxError::HardwareLost): the CPU is as it was before, the vCPU may not be.
    fn leave(&mut self, guest: &mut Guest<H>) -> AxResult;

    /// The guest's registers or events have been replaced: whatever was in the middle of being done for it is void.
    fn forget(&mut self);

    /// Makes all registers readable and settable, outside of a window. Kernel context.
    ///
    /// # Errors
    /// [`AxError::HardwareLost`](vcpu_core::AxError::HardwareLost).
    fn synchronize(&mut self) -> AxResult;

    /// The last exit's instruction, as far as the CPU has told it.
    fn insn_info(&self, guest: &Guest<H>) -> InsnInfo;
}

/// How an entry ended.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Exited {
    pub(crate) exit: Exit,
    /// The event whose delivery to the guest the exit has interrupted.
    pub(crate) interrupted: Option<Injection>,
}

impl Exited {
    /// Nothing has happened yet.
    pub(crate) const NEVER: Self = Self { exit: Exit::Done(ExitKind::Other), interrupted: None };
}

/// An exit, in terms of the architecture. Small: it is passed on at every exit.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Exit {
    /// An instruction that is executed for the guest, and where the one behind it is.
    Instruction(Instruction, u64),
    /// A physical interrupt, which the host takes when it has interrupts on again.
    Interrupt,
    /// The TSC has reached the local APIC's deadline, or the CPU can wait no longer for it.
    PreemptionTimer,
    /// An access that the nested page table does not allow.
    PageFault { addr: GuestPhysAddr, access: AccessFlags },
    /// The guest can take an event that it was entered for.
    Window,
    /// The CPU has carried out an access to the local APIC, and this is left to do.
    Apic(Effect),
    /// An exception that has been kept from the guest, and is its own.
    Exception(Injection),
    /// The guest's instruction raises this exception, whatever the CPU says.
    Raise(Injection),
    /// The backend has dealt with it. The guest goes on where it is.
    Done(ExitKind),
    /// A task switch: see [`Reason::TaskSwitch`](vcpu_core::AxVCpuExitReason::TaskSwitch).
    TaskSwitch { selector: u16, source: u8 },
    /// Three faults in a row.
    TripleFault,
    /// A machine check, which the host has been told of.
    MachineCheck,
    /// An instruction that nobody executes for guests, by the hardware's code.
    Unsupported(u64),
    /// Something that the controls do not ask for.
    Unknown { code: u64, info1: u64, info2: u64 },
    /// The guest was not entered, and its registers and events are as before.
    NotEntered(Refusal),
}

/// Why the guest was not entered.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Refusal {
    /// For the controls, by the hardware's code.
    Controls(u64),
    /// For the guest's state. `field` is the first that our own check finds wrong, in the backend's numbers; 0 if it finds none.
    State { reason: u64, qualification: u64, field: u64 },
    /// A machine check came, which the host has been told of.
    MachineCheck,
}

impl Exit {
    /// For the statistics. What only the outcome tells is corrected there.
    #[inline]
    pub(crate) fn kind(&self) -> ExitKind {
        match self {
            Self::Instruction(instruction, _) => instruction.kind(),
            Self::Interrupt | Self::PreemptionTimer => ExitKind::HostInterrupt,
            Self::PageFault { .. } => ExitKind::PageFault,
            Self::Window => ExitKind::Window,
            Self::Apic(_) => ExitKind::Apic,
            Self::Done(kind) => *kind,
            _ => ExitKind::Other,
        }
    }
}

/// An exit that comes often.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Frequent {
    /// An instruction, and where the one behind it is.
    Instruction(Simple, u64),
    /// [`Exit::PageFault`]. No event was being delivered.
    PageFault { addr: GuestPhysAddr, access: AccessFlags },
}

/// An instruction that exits often, and whose exit is easily dealt with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Simple {
    /// CPUID.
    Cpuid,
    /// RDMSR.
    Rdmsr,
    /// WRMSR.
    Wrmsr,
    /// IN, OUT.
    Io(Io),
}

impl Simple {
    /// For the statistics.
    #[inline]
    pub(crate) const fn kind(self) -> ExitKind {
        match self {
            Self::Cpuid => ExitKind::Cpuid,
            Self::Rdmsr => ExitKind::MsrRead,
            Self::Wrmsr => ExitKind::MsrWrite,
            Self::Io(_) => ExitKind::PortIo,
        }
    }
}

/// An instruction that exits, with its operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Instruction {
    /// One of the frequent ones.
    Simple(Simple),
    /// INVD, WBINVD: guests' caches are the host's.
    CacheFlush,
    /// PAUSE, in a loop.
    Pause,
    /// INS, OUTS.
    IoString(Io),
    /// HLT.
    Hlt,
    /// An access to a control register.
    Control(ControlAccess),
    /// XSETBV.
    Xsetbv,
    /// VMMCALL, VMCALL.
    Hypercall,
}

impl Instruction {
    /// For the statistics.
    #[inline]
    pub(crate) const fn kind(self) -> ExitKind {
        match self {
            Self::Simple(simple) => simple.kind(),
            Self::CacheFlush => ExitKind::Other,
            Self::Pause => ExitKind::Pause,
            Self::IoString(_) => ExitKind::PortIo,
            Self::Hlt => ExitKind::Halt,
            Self::Control(_) => ExitKind::Register,
            Self::Xsetbv => ExitKind::Xsetbv,
            Self::Hypercall => ExitKind::Hypercall,
        }
    }
}

impl From<Io> for Instruction {
    fn from(io: Io) -> Self {
        if io.string {
            Self::IoString(io)
        } else {
            Self::Simple(Simple::Io(io))
        }
    }
}

/// A port access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Io {
    pub(crate) port: u16,
    pub(crate) width: AccessWidth,
    pub(crate) input: bool,
    /// INS, OUTS.
    pub(crate) string: bool,
    pub(crate) rep: bool,
}

/// An access to a control register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ControlAccess {
    /// MOV to control register `number` from general register `register`.
    Write { number: u8, register: u8 },
    /// MOV from control register `number` to general register `register`.
    Read { number: u8, register: u8 },
    /// CLTS.
    Clts,
    /// LMSW of this value.
    Lmsw(u16),
}
