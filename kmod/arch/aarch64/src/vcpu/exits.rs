// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! What a vCPU's exits come to: what is answered here, what goes to userspace, and what becomes of its answer. In between, the
//! vCPU keeps what waits for the answer, and the exception that the guest takes instead.

use core::ops::Deref;

use axvcpu_uapi::exit::AccessWidth;
use axvcpu_uapi::vcpu::ExitKind;
use vcpu_core::{AxVCpuExitReason as Exit, GuestPhysAddr};

use super::{ArmVCpu, State};
use crate::exception::Exception;
use crate::exit::{self, DeviceAccess, Event};
use crate::gic::{Access, Gic};
use crate::hal::ArmHal;
use crate::syndrome::{class, Syndrome, SystemAccess, Transfer};
use crate::{cpu, psci, sysreg, window};

/// An answer from userspace.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reply {
    /// The value read, or the hypercall's result.
    pub value: u64,
    /// Refuse the access: the guest gets an exception.
    pub fault: bool,
}

/// What waits for userspace's answer. The PC is behind the instruction already.
#[derive(Clone, Copy, Debug)]
pub(super) enum Open {
    Nothing,
    /// A read of a register.
    SysRead {
        general: usize,
    },
    SysWrite,
    MmioRead(Transfer),
    MmioWrite,
    Call,
}

impl<H: ArmHal, G: Deref<Target = Gic<H>>> ArmVCpu<H, G> {
    /// Takes userspace's answer to the last exit.
    pub fn complete(&mut self, reply: Reply) {
        let (at, far) = (self.at, self.state().frame.far);
        let open = core::mem::replace(&mut self.open, Open::Nothing);
        let frame = &mut self.state_mut().frame;
        let abort = |write| Some(Exception::ExternalAbort { pc: at, far, write });
        let exception = match (open, reply.fault) {
            (Open::Nothing, _) | (Open::MmioWrite | Open::SysWrite, false) => None,
            (Open::SysRead { .. } | Open::SysWrite, true) => Some(Exception::Undefined { pc: at }),
            (Open::MmioRead(_), true) => abort(false),
            (Open::MmioWrite, true) => abort(true),
            (Open::SysRead { general }, false) => {
                frame.set_register(general, reply.value);
                None
            }
            (Open::MmioRead(transfer), false) => {
                frame.set_register(transfer.general, transfer.extend(reply.value));
                None
            }
            (Open::Call, _) => {
                frame.set_register(0, reply.value);
                None
            }
        };
        if exception.is_some() {
            self.exception = exception;
        }
    }

    /// The last exit, a nested page fault, turned out to be an access to what is no memory: makes it the exit for that, if the
    /// hardware has decoded it. Cache maintenance of what is no memory is none, and done: `Nothing`.
    pub fn not_memory(&mut self, exit: &mut Exit) {
        let Exit::NestedPageFault { addr, .. } = *exit else { return };
        let frame = &mut self.state_mut().frame;
        let syndrome = Syndrome(frame.esr);
        if syndrome.class() == class::DATA_ABORT && syndrome.is_cache_maintenance() && !syndrome.in_table_walk() {
            frame.skip();
            *exit = Exit::Nothing;
        } else if let Some(access) = DeviceAccess::of(frame) {
            frame.skip();
            *exit = access.exit(addr);
            self.open = if access.store.is_some() { Open::MmioWrite } else { Open::MmioRead(access.transfer) };
        }
    }

    /// Carries out an access to the interrupt controller's registers, if the exit was one that the hardware has decoded, at
    /// `addr`. The guest has not been left since. vCPUs that must look at their interrupts are given to `wake`.
    pub fn gic_access(&mut self, addr: GuestPhysAddr, wake: impl FnMut(usize)) -> bool {
        let at = addr.as_u64();
        let Some(interrupts) = self.interrupts.as_mut().filter(|interrupts| interrupts.covers(at)) else {
            return false;
        };
        // SAFETY: The type invariant.
        let State { frame, interface, .. } = unsafe { self.state.as_mut() };
        let (true, Some(DeviceAccess { transfer, store })) = (self.loaded, DeviceAccess::of(frame)) else {
            return false;
        };
        let access = store.map_or(Access::Read, Access::Write);
        let gic = if access == Access::Read && !interrupts.without_lists().shows_states(at) {
            interrupts.without_lists()
        } else {
            // SAFETY: The guest is loaded.
            unsafe { interrupts.tell_all(interface) }
        };
        let value = gic.access(at, transfer.width, access, wake).unwrap_or(0);
        if access == Access::Read {
            frame.set_register(transfer.general, transfer.extend(value));
        }
        frame.skip();
        true
    }

    /// The exit was an access to what is no memory. If it was a store that the hardware has decoded, its width and value are shown
    /// to `done`, which tells whether it is complete with that.
    pub fn complete_store(&mut self, done: impl FnOnce(AccessWidth, u64) -> bool) -> bool {
        let frame = &mut self.state_mut().frame;
        let Some(DeviceAccess { transfer, store: Some(data) }) = DeviceAccess::of(frame) else { return false };
        let complete = done(transfer.width, data);
        if complete {
            frame.skip();
        }
        complete
    }

    /// Puts what the exit in the frame comes to into `exit`, which is [`Nothing`](Exit::Nothing) so far.
    pub(super) fn handle(&mut self, exit: &mut Exit) {
        self.at = self.state().frame.general.pc;
        // SAFETY: The guest is loaded. PAR_EL1 is the guest's; whoever compares it across a fault sees a change, as under any
        // hypervisor that the architecture allows to do this.
        let event = exit::classify(&self.state().frame, |addr, write| unsafe {
            let guests = cpu::ParEl1.get();
            let found = cpu::translate(addr, write);
            cpu::ParEl1.set(guests);
            found
        });
        self.kind = match event {
            Event::HostInterrupt => {
                *exit = Exit::ExternalInterrupt { vector: 0 };
                ExitKind::HostInterrupt
            }
            Event::SystemError => {
                *exit = Exit::MachineCheck;
                ExitKind::Other
            }
            Event::AArch32 => {
                let pstate = self.state().frame.general.pstate;
                *exit = Exit::InvalidGuestState { reason: pstate, qualification: 0, field: 0 };
                ExitKind::Other
            }
            Event::Wait => {
                self.state_mut().frame.skip();
                self.wait();
                *exit = Exit::Halt;
                ExitKind::Halt
            }
            Event::Yield => {
                self.state_mut().frame.skip();
                ExitKind::Pause
            }
            Event::Call { smc } => {
                self.call(smc, exit);
                ExitKind::Hypercall
            }
            Event::System(access) => self.system_access(access, exit),
            Event::Undefined => {
                self.exception = Some(Exception::Undefined { pc: self.at });
                ExitKind::Other
            }
            Event::Abort(abort) => {
                *exit = Exit::NestedPageFault { addr: abort.addr, access_flags: abort.access };
                ExitKind::Mmio
            }
            Event::Lost => ExitKind::PageFault,
            Event::Unknown => {
                let frame = &self.state().frame;
                let code = Syndrome(frame.esr).class();
                *exit = Exit::Unknown { code, info1: frame.esr, info2: frame.far };
                ExitKind::Other
            }
        };
    }

    /// The guest waits for an interrupt.
    fn wait(&mut self) {
        if let Some(interrupts) = &mut self.interrupts {
            interrupts.wait();
        }
    }

    /// HVC or SMC.
    fn call(&mut self, smc: bool, exit: &mut Exit) {
        let outcome = exit::call(&self.state().frame);
        let frame = &mut self.state_mut().frame;
        if smc {
            frame.skip();
        }
        match outcome {
            psci::Outcome::Done(value) => frame.set_register(0, value as u64),
            psci::Outcome::Exit(outcome) => {
                // What the guest finds in X0 if it goes on: SUCCESS after a suspension, or userspace's answer. The other
                // calls do not return, but to a vCPU whose registers are set anew.
                match outcome {
                    Exit::Halt => {
                        frame.set_register(0, 0);
                        self.wait();
                    }
                    Exit::CpuUp { .. } | Exit::Hypercall { .. } => self.open = Open::Call,
                    _ => {}
                }
                *exit = outcome;
            }
            // There is no firmware below us for anybody else's calls.
            psci::Outcome::Foreign if smc => frame.set_register(0, psci::NOT_SUPPORTED as u64),
            psci::Outcome::Foreign => {
                *exit = exit::hypercall(frame);
                self.open = Open::Call;
            }
        }
    }

    /// A trapped system register.
    fn system_access(&mut self, access: SystemAccess, exit: &mut Exit) -> ExitKind {
        let (origin, ids) = (self.setting.counter_origin, self.caps.ids);
        let State { frame, system, .. } = self.state_mut();
        let value = frame.register(access.general);
        let kind = if access.read { ExitKind::MsrRead } else { ExitKind::MsrWrite };
        let outcome = sysreg::access(access, value, system, &ids, || window::counter().wrapping_sub(origin));
        match outcome {
            sysreg::Outcome::Undefined => {
                self.exception = Some(Exception::Undefined { pc: self.at });
                return kind;
            }
            sysreg::Outcome::Value(value) => frame.set_register(access.general, value),
            sysreg::Outcome::Done
            | sysreg::Outcome::User
            | sysreg::Outcome::Sgi { .. }
            | sysreg::Outcome::Deactivate => {}
        }
        frame.skip();
        if let sysreg::Outcome::Sgi { group } = outcome {
            *exit = Exit::SendIPI {
                target_cpu: value,
                target_cpu_aux: 0,
                send_to_all: value >> 40 & 1 != 0,
                send_to_self: false,
                vector: group.into(),
            };
            return ExitKind::Ipi;
        }
        if let (sysreg::Outcome::Deactivate, Some(interrupts)) = (outcome, &mut self.interrupts) {
            // SAFETY: The type invariant, and the guest is loaded.
            unsafe { interrupts.deactivate(&mut self.state.as_mut().interface, value) };
        }
        if outcome != sysreg::Outcome::User {
            return kind;
        }
        (self.open, *exit) = if access.read {
            let general = access.general;
            (Open::SysRead { general }, Exit::SysRegRead { addr: access.register, reg: general })
        } else {
            (Open::SysWrite, Exit::SysRegWrite { addr: access.register, value })
        };
        ExitKind::MsrUser
    }
}
