// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! Turns of the guest, one after the other. This is the hot path of the module.
//!
//! An exit goes one of three ways, from the shortest on:
//!
//! 1. Frequent instructions ([`Backend::simple`]) that end here and leave nothing to inject: the control block stays as it is but
//!    for RIP, and the next entry follows at once.
//! 2. Others that end here, or leave something to inject: the next entry is prepared anew.
//! 3. The rest is the caller's.
//!
//! Before each entry but the first the caller is asked whether the guest may go on; what it looks at is its own affair.

use axvcpu_uapi::vcpu::ExitKind;
use vcpu_core::{AxError, AxResult, AxVCpuExitReason as Reason};

use crate::apic::TimerUpdate;
use crate::backend::{Backend, Exited, Simple};
use crate::events::{Activity, Injection, Plan};
use crate::hal::X86Hal;
use crate::regs::{rflags, DR7_GD};
use crate::state::{Guest, Registers};

/// An exit that is over, and has changed nothing that anybody else looks at, but for the timer.
pub struct Step<'a, H: X86Hal> {
    guest: &'a mut Guest<H>,
    /// [`Backend::watches_deadline`].
    watched: bool,
}

impl<H: X86Hal> Step<'_, H> {
    /// For the statistics.
    #[inline]
    pub fn kind(&self) -> ExitKind {
        self.guest.exit_kind
    }

    /// What the host's timer is to do now: see [`X86VCpu::timer_update`](crate::X86VCpu::timer_update).
    #[inline]
    pub fn timer_update(&mut self) -> TimerUpdate {
        // The other exits have nothing to do with it.
        if self.guest.exit_kind == ExitKind::MsrWrite {
            self.guest.timer_update(self.watched)
        } else {
            TimerUpdate::Unchanged
        }
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
    /// [`AxError::NotBound`]; [`AxError::HardwareLost`], with the CPU left.
    #[inline]
    pub(crate) fn run_while(
        &mut self,
        hw: &mut impl Backend<H>,
        exit: &mut Reason,
        mut go_on: impl FnMut(Step<'_, H>) -> bool,
    ) -> AxResult {
        if !self.bound {
            return Err(AxError::NotBound);
        }
        loop {
            if let Some(reason) = self.without_entry(hw.regs()) {
                *exit = reason;
                return Ok(());
            }
            match self.turns(hw, exit, &mut go_on) {
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
    fn turns(
        &mut self,
        hw: &mut impl Backend<H>,
        exit: &mut Reason,
        go_on: &mut impl FnMut(Step<'_, H>) -> bool,
    ) -> AxResult<Go> {
        if let Some(before) = hw.ready(self)? {
            self.exited = Exited { exit: before, interrupted: None };
            *exit = self.handle(hw.regs_mut(), &Plan::NOTHING);
            return Ok(Go::Back);
        }
        let plan = self.plan(hw);
        let prepared_for_more = hw.prepare(self, &plan)?;
        loop {
            hw.enter()?;
            self.private = false;
            let simple = if prepared_for_more { hw.simple(self) } else { None };
            match simple {
                Some((instruction, next)) => *exit = self.execute_simple(hw.regs_mut(), instruction, next),
                None => {
                    hw.decode(self, &plan)?;
                    *exit = self.handle(hw.regs_mut(), &plan);
                }
            }
            if !self.private || !go_on(Step { watched: hw.watches_deadline(), guest: self }) {
                return Ok(Go::Back);
            }
            match simple {
                Some((Simple::Cpuid | Simple::Rdmsr, _)) if !self.events.event_waits() => {}
                Some((Simple::Wrmsr, _)) if !self.events.event_waits() && self.apic_rests(hw) => {}
                _ => return Ok(Go::On),
            }
            hw.again(self)?;
        }
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
        if plan.acknowledge {
            if let Some(lapic) = self.lapic_mut() {
                lapic.acknowledge();
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
