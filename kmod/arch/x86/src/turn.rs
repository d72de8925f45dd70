// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! Turns of the guest, one after the other. This is the hot path of the module.
//!
//! An exit goes one of three ways, from the shortest on:
//!
//! 1. Frequent ones ([`Backend::frequent`]) that end here and leave nothing to inject: the control block stays as it is but for
//!    RIP, and the next entry follows at once.
//! 2. Others that end here, or leave something to inject: the next entry is prepared anew.
//! 3. The rest is the caller's.
//!
//! Before each entry but the first the caller is asked whether the guest may go on; what it looks at is its own affair. It is
//! also asked whether it knows what to do about a write to a port or a nested page fault right here: see [`Turns`].

use axvcpu_uapi::vcpu::ExitKind;
use vcpu_core::{AccessFlags, AccessWidth, AxError, AxResult, AxVCpuExitReason as Reason, GuestPhysAddr};

use crate::apic::TimerUpdate;
use crate::backend::{Backend, Exited, Frequent};
use crate::events::{Activity, Injection, Plan};
use crate::hal::X86Hal;
use crate::regs::{rflags, DR7_GD};
use crate::state::{Guest, Registers};

/// Who has the guest run: what is asked of the caller between two entries.
pub trait Turns {
    /// An exit of `kind` is over, and has changed nothing that anybody else looks at, but for the timer, which is to follow
    /// `timer`: see [`X86VCpu::timer_update`](crate::X86VCpu::timer_update). Whether the guest may go on.
    fn go_on(&mut self, kind: ExitKind, timer: TimerUpdate) -> bool;

    /// The guest has written `data` to a port. Whether that was all, and is done.
    fn port_write(&mut self, port: u16, width: AccessWidth, data: u64) -> bool;

    /// The nested page table has not allowed an access. If it is a write by a plain store, `skip_store` goes on behind the
    /// instruction, without the write, and says so; otherwise it does nothing.
    fn page_fault(&mut self, addr: GuestPhysAddr, access: AccessFlags, skip_store: impl FnOnce() -> bool) -> PageFault;
}

/// What has become of a nested page fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageFault {
    /// It is over, and was an exit of this kind.
    Over(ExitKind),
    /// It is to be dealt with after the guest has been left.
    Later,
    /// It is for the user, who will want to see all registers.
    User,
}

/// One entry, whatever comes.
pub(crate) struct Once;

impl Turns for Once {
    fn go_on(&mut self, _kind: ExitKind, _timer: TimerUpdate) -> bool {
        false
    }

    fn port_write(&mut self, _port: u16, _width: AccessWidth, _data: u64) -> bool {
        false
    }

    fn page_fault(&mut self, _: GuestPhysAddr, _: AccessFlags, _: impl FnOnce() -> bool) -> PageFault {
        PageFault::Later
    }
}

/// How to go on.
enum Go {
    /// With another preparation.
    On,
    /// Back to the caller.
    Back,
}

impl<H: X86Hal> Guest<H> {
    /// Enters the guest, if it executes instructions, and deals with its exits: see
    /// [`X86VCpu::run_while`](crate::X86VCpu::run_while). The vCPU is bound, and interrupts are off.
    ///
    /// # Errors
    /// [`AxError::NotBound`]; [`AxError::HardwareLost`] and [`AxError::StateLost`], with the CPU left.
    #[inline]
    pub(crate) fn run_while(
        &mut self,
        hw: &mut impl Backend<H>,
        exit: &mut Reason,
        turns: &mut impl Turns,
    ) -> AxResult {
        if !self.bound {
            return Err(AxError::NotBound);
        }
        loop {
            if let Some(reason) = self.without_entry(hw.regs()) {
                *exit = reason;
                return Ok(());
            }
            match self.turns(hw, exit, turns) {
                Ok(Go::On) => {}
                Ok(Go::Back) => return Ok(()),
                Err(error) => {
                    // The caller cannot reach the vCPU any more, so nobody else does it.
                    let _ = hw.leave(self);
                    return Err(error);
                }
            }
        }
    }

    /// What there is to report before the guest is entered.
    #[inline]
    fn without_entry(&mut self, regs: &impl Registers) -> Option<Reason> {
        if self.msrs.interrupt_end.is_some() {
            self.exit_kind = ExitKind::Other;
            return self.take_end();
        }
        if self.events.activity() != Activity::Running && !self.update_activity(regs) {
            self.exit_kind = ExitKind::Halt;
            return Some(Reason::Halt);
        }
        if self.events.window_requested() && self.window_open(regs) {
            self.exit_kind = ExitKind::Window;
            return Some(Reason::InterruptWindow);
        }
        None
    }

    /// Entries that need one preparation.
    #[inline(never)] // So that registers are enough for the loop.
    fn turns(&mut self, hw: &mut impl Backend<H>, exit: &mut Reason, turns: &mut impl Turns) -> AxResult<Go> {
        if let Some(before) = hw.ready(self)? {
            self.exited = Exited { exit: before, interrupted: None };
            *exit = Reason::Nothing;
            self.handle(hw.regs_mut(), &Plan::NOTHING, exit);
            return Ok(Go::Back);
        }
        let mut plan = self.plan(hw);
        let prepared_for_more = hw.prepare(self, &plan)?;
        loop {
            hw.enter()?;
            self.private = false;
            *exit = Reason::Nothing;
            let frequent = if prepared_for_more { hw.frequent(self) } else { None };
            match frequent {
                Some(Frequent::Instruction(instruction, next)) => {
                    self.execute_simple(hw.regs_mut(), instruction, next, exit);
                }
                Some(Frequent::PageFault { addr, access }) => {
                    self.exit_kind = ExitKind::PageFault;
                    *exit = Reason::NestedPageFault { addr, access_flags: access };
                }
                None => {
                    hw.decode(self, &plan)?;
                    self.handle(hw.regs_mut(), &plan, exit);
                }
            }
            if !self.private && !self.settle(hw, exit, turns) {
                return Ok(Go::Back);
            }
            // The other exits have nothing to do with it.
            let wrote_msr = self.exit_kind == ExitKind::MsrWrite;
            let timer = if wrote_msr { self.timer_update(hw.watches_deadline()) } else { TimerUpdate::Unchanged };
            if !turns.go_on(self.exit_kind, timer) {
                return Ok(Go::Back);
            }
            if frequent.is_none() || self.events.event_waits() || wrote_msr && !self.apic_rests(hw) {
                return Ok(Go::On);
            }
            if plan.inject.is_some() {
                plan = Plan::NOTHING;
            }
            hw.again(self)?;
        }
    }

    /// Whether the last exit is one that only the caller can deal with, and is over by what it has done.
    #[inline]
    fn settle<B: Backend<H>>(&mut self, hw: &mut B, exit: &mut Reason, turns: &mut impl Turns) -> bool {
        let over = match *exit {
            Reason::IoWrite { port, width, data } => turns.port_write(port, width, data),
            Reason::NestedPageFault { addr, access_flags } => {
                match turns.page_fault(addr, access_flags, || self.skip_store::<B::Format>(hw.regs_mut())) {
                    PageFault::Over(kind) => {
                        self.exit_kind = kind;
                        true
                    }
                    PageFault::Later => false,
                    PageFault::User => {
                        hw.show_all();
                        false
                    }
                }
            }
            Reason::IoString { .. } => {
                hw.show_all();
                false
            }
            _ => false,
        };
        if over {
            *exit = Reason::Nothing;
        }
        over
    }

    /// Whether the local APIC asks nothing of the next entry: it has no interrupt, and there is nobody else to be told what it has.
    #[inline]
    fn apic_rests(&self, hw: &impl Backend<H>) -> bool {
        !hw.delivers_interrupts(self) && self.lapic().is_none_or(|lapic| lapic.highest_request().is_none())
    }

    /// Chooses what the next entry injects and which exits it asks for.
    fn plan(&mut self, hw: &mut impl Backend<H>) -> Plan {
        let apic = self.apic_view();
        let vector = if hw.delivers_interrupts(self) { None } else { apic.vector };
        if vector.is_none() && self.events.is_idle() {
            return Plan::NOTHING;
        }
        let regs = hw.regs_mut();
        let situation = self.situation(regs);
        let plan = self.events.plan(situation, vector, apic.accepts_pic);
        if let Some(vector) = vector.filter(|_| plan.acknowledge) {
            if let Some(lapic) = self.lapic_mut() {
                lapic.acknowledge(vector);
            }
        }
        if let Some(address) = plan.address {
            regs.set_cr2(address);
        }
        if let Some(event) = plan.inject {
            self.injections = self.injections.wrapping_add(1);
            if event.is_fault() {
                regs.set_rflags(regs.rflags() | rflags::RF);
            }
            if event == Injection::DEBUG {
                // Delivering #DB clears DR7.GD (APM vol. 2 section 13.1.1.4, SDM vol. 3 section 18.2.4); an injected one does
                // not do it by itself.
                regs.set_dr7(regs.dr7() & !DR7_GD);
            }
        }
        plan
    }
}
