// SPDX-License-Identifier: MIT OR Apache-2.0
//! A vCPU's thread on x86: interrupts of the 8259s, instructions to be decoded, MSRs, ports, and how a guest that halts for
//! good is noticed.
//!
//! | file | owns |
//! |---|---|
//! | `access.rs` | memory, devices and vector registers as the instruction emulator sees them |
//! | `halted.rs` | finding out that no vCPU can go on |
//! | `state.rs` | register sets to and from the emulator, and for people |
//! | this file | the exits that only x86 has, interrupts of the 8259s |

use std::sync::Arc;

use axvcpu_uapi::client::Exit;
use axvcpu_uapi::exit::AxVCpuExitReason;
use axvcpu_uapi::vcpu::{self as abi, Event};
use axvcpu_uapi::x86::{
    Debug, Events, ACTIVITY_HALTED, ACTIVITY_WAIT_FOR_SIPI, EVENTS_EVENT_PENDING, EVENTS_INTERRUPT_SHADOW,
    EVENTS_NMI_PENDING,
};

use super::cpuid::Paging;
use super::emulate::{self, Direction, Exception, Fault, Outcome, Shortcuts, StringIo};
use super::hypervisor::X86Vcpu;
use crate::control::Stop;
use crate::exit::ExitCode;
use crate::hypervisor::Kick;
use crate::stats::UserExit;
use crate::vcpu::Runner;

mod access;
mod halted;
mod state;

use access::Access;
use halted::Halted;

/// Answer to a hypercall that does not exist: `-KVM_ENOSYS` (Linux `include/uapi/linux/kvm_para.h`), since guests know us
/// by KVM's paravirtual interface.
const KVM_ENOSYS: u64 = (-1000_i64) as u64;

/// Number of the debug exception.
const DEBUG_VECTOR: u32 = 1;
/// DR6: single step.
const DR6_BS: u64 = 1 << 14;

/// RFLAGS: interrupts enabled.
const RFLAGS_IF: u64 = 1 << 9;

/// What a vCPU's thread keeps.
pub struct Local {
    emulator: emulate::Config,
    shortcuts: Shortcuts,
    halted: Arc<Halted>,
    /// Whether this vCPU was halted for good when that was last known.
    is_halted: bool,
    /// A vector that the 8259s gave out and the vCPU could not take yet.
    acknowledged: Option<u8>,
    /// Whether the last exit said that an external interrupt could be delivered at once.
    window_open: bool,
    /// Whether an [`InterruptWindow`](AxVCpuExitReason::InterruptWindow) exit is asked for.
    window_requested: bool,
}

impl Local {
    /// For the threads of `count` vCPUs, whose CPUID tells `paging`.
    #[must_use]
    pub fn for_all(count: usize, paging: Paging) -> Vec<Self> {
        let halted = Halted::new(count);
        let Paging { phys_bits, gib_pages } = paging;
        let local = |id| Self {
            emulator: emulate::Config { phys_bits, gib_pages, ..emulate::Config::default() },
            shortcuts: Shortcuts::new(),
            halted: Arc::clone(&halted),
            is_halted: halted.at_start(id),
            acknowledged: None,
            window_open: false,
            window_requested: false,
        };
        (0..count).map(local).collect()
    }

    /// A handle that makes the vCPU return that `kick` makes return while it runs: it always runs.
    #[must_use]
    pub fn kicker(&self, kick: Box<dyn Kick>) -> Box<dyn Kick> {
        kick
    }
}

impl<V: X86Vcpu> Runner<V> {
    /// Before the guest runs on. Says whether it may.
    pub(crate) fn before_entry(&mut self) -> Result<bool, Stop> {
        self.offer_interrupt()?;
        Ok(true)
    }

    /// After it has left, before the exit is handled.
    pub(crate) fn after_exit(&mut self, exit: &Exit) -> Result<(), Stop> {
        self.local.window_open = exit.interrupt_window_open();
        if self.local.is_halted && !matches!(exit.reason, AxVCpuExitReason::Halt) {
            self.look_whether_halted(&exit.reason)?;
        }
        Ok(())
    }

    /// Hands the interrupt of the 8259s to the guest, or asks to be told when the guest can take it. As on a PC they are
    /// wired to the boot processor.
    fn offer_interrupt(&mut self) -> Result<(), Stop> {
        if self.id != 0 {
            return Ok(());
        }
        if self.local.window_open {
            if self.local.acknowledged.is_none() {
                self.local.acknowledged = self.machine.interrupts.acknowledge();
            }
            if let Some(vector) = self.local.acknowledged {
                // If not, one injected earlier has not been delivered yet: try again at the next window.
                if self.vcpu.interrupt(vector)? {
                    self.local.acknowledged = None;
                }
                // The one injected closes the window; another may wait behind it.
                self.local.window_open = false;
            }
        }
        let wanted = self.local.acknowledged.is_some() || self.machine.interrupts.is_pending();
        if wanted != self.local.window_requested {
            self.vcpu.request_interrupt_window(wanted);
            self.local.window_requested = wanted;
        }
        Ok(())
    }

    /// Handles an exit that only x86 has.
    pub(crate) fn handle_own(&mut self, exit: &Exit) -> Result<(), Stop> {
        match exit.reason {
            AxVCpuExitReason::IoRead { port, width } => {
                self.count(UserExit::PortRead);
                let mut data = [0; 8];
                self.machine.ports.read(port.into(), &mut data[..width.size()]);
                let value = u64::from_le_bytes(data) & width.mask();
                tracing::trace!("port {port:#x} ({} bytes) reads {value:#x}", width.size());
                self.vcpu.reply(value);
            }
            AxVCpuExitReason::IoWrite { port, width, data } => {
                self.count(UserExit::PortWrite);
                tracing::trace!("port {port:#x} ({} bytes) written with {data:#x}", width.size());
                self.machine.ports.write(port.into(), &data.to_le_bytes()[..width.size()]);
            }
            AxVCpuExitReason::NestedPageFault { addr, access_flags } => {
                self.count(UserExit::Mmio);
                tracing::trace!(%addr, ?access_flags, "access to device memory");
                self.emulate(exit, None)?;
            }
            AxVCpuExitReason::IoString { port, width, input, .. } => {
                self.count(UserExit::StringIo);
                let direction = if input { Direction::In } else { Direction::Out };
                self.emulate(exit, Some(StringIo { port, width: width.size() as u8, direction }))?;
            }
            AxVCpuExitReason::InterruptEnd { vector } => {
                self.count(UserExit::InterruptEnd);
                if let Some(vector) = vector {
                    self.machine.interrupts.end_of_interrupt(vector);
                }
            }
            AxVCpuExitReason::InterruptWindow => self.count(UserExit::Window),
            AxVCpuExitReason::SysRegRead { addr, .. } => {
                self.count(UserExit::MsrRead);
                tracing::debug!(rip = self.rip(), "unknown MSR {addr:#x} read: #GP");
                self.vcpu.reply_fault();
            }
            AxVCpuExitReason::SysRegWrite { addr, value } => {
                self.count(UserExit::MsrWrite);
                tracing::debug!(rip = self.rip(), "unknown MSR {addr:#x} written with {value:#x}: #GP");
                self.vcpu.reply_fault();
            }
            AxVCpuExitReason::Hypercall { nr, args } => {
                self.count(UserExit::Hypercall);
                tracing::debug!(nr, ?args, "unknown hypercall");
                self.vcpu.reply(KVM_ENOSYS);
            }
            AxVCpuExitReason::Halt => {
                self.count(UserExit::Halt);
                self.local.is_halted = true;
                if self.local.halted.halts(self.id as usize, |other| self.machine.control.kick(other)) {
                    return Err(Stop::Halted);
                }
            }
            AxVCpuExitReason::SystemReset => return Err(Stop::Reset("by the CPU")),
            AxVCpuExitReason::TripleFault => return Err(Stop::TripleFault(self.describe())),
            AxVCpuExitReason::TaskSwitch { selector, source } => {
                let what = format!("the guest switches tasks by hardware (selector {selector:#x}, source {source}), which is not supported");
                return Err(self.give_up(ExitCode::CannotContinue, &what));
            }
            ref other => return Err(self.unhandled(other)),
        }
        Ok(())
    }

    /// An exit of a vCPU that was halted for good: it has been woken, or is asked whether it has (see `halted.rs`).
    fn look_whether_halted(&mut self, reason: &AxVCpuExitReason) -> Result<(), Stop> {
        if matches!(reason, AxVCpuExitReason::Interrupted) {
            let events: Events = self.vcpu.get()?;
            let halted = match events.activity {
                ACTIVITY_WAIT_FOR_SIPI => true,
                ACTIVITY_HALTED => {
                    events.flags & (EVENTS_NMI_PENDING | EVENTS_EVENT_PENDING) == 0
                        && self.vcpu.general()?.rflags & RFLAGS_IF == 0
                }
                _ => false,
            };
            if halted {
                return if self.local.halted.stays(self.id as usize) { Err(Stop::Halted) } else { Ok(()) };
            }
        }
        self.local.is_halted = false;
        self.local.halted.wakes(self.id as usize);
        Ok(())
    }

    /// Carries out the instruction at RIP: string I/O, or an access to device memory.
    fn emulate(&mut self, exit: &Exit, string: Option<StringIo>) -> Result<(), Stop> {
        let fault = match exit.reason {
            AxVCpuExitReason::NestedPageFault { addr, access_flags } => {
                Some(Fault { addr, access: access_flags, user_mode: exit.user_mode() })
            }
            _ => None,
        };
        let mut general = self.vcpu.general()?;
        if let (Some(fault), Some(brief)) = (&fault, self.vcpu.brief()) {
            let mut access = Access::new(&mut self.vcpu, &self.machine);
            if self.local.shortcuts.take(&mut general, &brief, fault, &mut access)? {
                return Ok(self.vcpu.set_general(&general)?);
            }
        }
        let Some(snapshot) = self.vcpu.snapshot() else {
            return Err(
                self.give_up(ExitCode::AbiMismatch, "the module gave no snapshot with an exit that needs decoding")
            );
        };
        let before = state::to_emulator(&general, &snapshot, exit.user_mode());
        if let Some(fault) = &fault {
            let mut access = Access::new(&mut self.vcpu, &self.machine);
            let Local { shortcuts, emulator, .. } = &mut self.local;
            if shortcuts.learn(emulator, &before, fault, &mut access)?
                && shortcuts.take(&mut general, &(&snapshot).into(), fault, &mut access)?
            {
                return Ok(self.vcpu.set_general(&general)?);
            }
        }
        let mut cpu = before.clone();
        let mut access = Access::new(&mut self.vcpu, &self.machine);
        let result = match string {
            Some(io) => emulate::string_io(&self.local.emulator, &mut cpu, &mut access, io, exit.insn()),
            None => emulate::step(&self.local.emulator, &mut cpu, &mut access, exit.insn()),
        };
        let outcome = match result {
            Ok(outcome) => outcome,
            Err(emulate::Error::Bus(error)) => return Err(error.into()),
            Err(error) => return Err(self.give_up(ExitCode::CannotContinue, &error.to_string())),
        };
        if cpu.segments != before.segments {
            let segments = state::with_segments(snapshot.segments, &cpu);
            self.vcpu.set(&segments)?;
        }
        self.vcpu.set_general(&cpu.general())?;
        self.finish(outcome)
    }

    /// What an emulated instruction leaves behind besides registers.
    fn finish(&mut self, outcome: Outcome) -> Result<(), Stop> {
        let debug_trap = match outcome {
            Outcome::Exception(exception) => return self.inject_exception(exception),
            Outcome::Unfinished { debug_trap } => debug_trap,
            Outcome::Retired { debug_trap, interrupt_shadow } => {
                if interrupt_shadow {
                    let mut events: Events = self.vcpu.get()?;
                    events.flags |= EVENTS_INTERRUPT_SHADOW;
                    self.vcpu.set(&events)?;
                    self.local.window_open = false;
                }
                debug_trap
            }
        };
        if debug_trap {
            let mut debug: Debug = self.vcpu.get()?;
            debug.dr6 |= DR6_BS;
            self.vcpu.set(&debug)?;
            let event = Event { kind: abi::EVENT_EXCEPTION, vector: DEBUG_VECTOR, ..Event::default() };
            self.vcpu.inject(&event)?;
            self.local.window_open = false;
        }
        Ok(())
    }

    fn inject_exception(&mut self, exception: Exception) -> Result<(), Stop> {
        let protected = self.vcpu.snapshot().is_some_and(|snapshot| snapshot.control.cr0 & 1 != 0);
        let mut event = Event { kind: abi::EVENT_EXCEPTION, vector: exception.vector().into(), ..Event::default() };
        // Real mode pushes no error codes.
        if let Some(code) = exception.error_code().filter(|_| protected) {
            event.flags |= abi::EVENT_HAS_ERROR_CODE;
            event.error_code = code;
        }
        if let Exception::PageFault { address, .. } = exception {
            event.flags |= abi::EVENT_HAS_ADDRESS;
            event.address = address.as_u64();
        }
        self.local.window_open = false;
        self.vcpu.inject(&event)?;
        Ok(())
    }

    fn rip(&self) -> u64 {
        // For messages only.
        self.vcpu.general().map_or(0, |general| general.rip)
    }

    /// The vCPU's state for people.
    pub(crate) fn describe(&mut self) -> String {
        state::describe(&mut self.vcpu, &self.machine, self.id, &self.local.emulator)
    }
}
