// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! Events that wait for the guest: exceptions, NMIs, external and software interrupts; which of them goes in at the next
//! entry, and for which the guest must be stopped as soon as it can take them (APM vol. 2 sections 8.5, 15.20 and 15.21).
//!
//! [`injection`] is what an event is. No hardware here: a backend tells the situation, and carries out the plan.

mod injection;
#[cfg(test)]
mod tests;

use axvcpu_uapi::vcpu::{Event, EVENT_EXCEPTION, EVENT_EXTERNAL_INTERRUPT, EVENT_NMI, EVENT_SOFTWARE_INTERRUPT};
use axvcpu_uapi::x86::{
    self as uapi, ACTIVITY_HALTED, ACTIVITY_RUNNING, ACTIVITY_WAIT_FOR_SIPI, EVENTS_EVENT_PENDING,
    EVENTS_EXTERNAL_PENDING, EVENTS_INTERRUPT_SHADOW, EVENTS_NMI_MASKED, EVENTS_NMI_PENDING,
};
use vcpu_core::{AxError, AxResult};

use injection::{combine, decode, encode, Combined, DF};
pub(crate) use injection::{Injection, AC, DB};

/// What the vCPU is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Activity {
    /// Executing instructions.
    Running,
    /// Halted by HLT.
    Halted,
    /// After INIT, waiting for a start-up IPI.
    WaitForSipi,
}

/// What the guest's registers say about taking events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Situation {
    /// RFLAGS.IF.
    pub(crate) interrupts_enabled: bool,
    /// In the shadow of STI or MOV SS.
    pub(crate) shadow: bool,
}

/// What to do at the next entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    /// Inject this.
    pub(crate) inject: Option<Injection>,
    /// Put this into CR2 before.
    pub(crate) address: Option<u64>,
    /// The injection is the local APIC's interrupt: acknowledge it.
    pub(crate) acknowledge: bool,
    /// Exit as soon as the guest can take an external interrupt.
    pub(crate) interrupt_window: bool,
    /// Exit as soon as the guest can take an NMI.
    pub(crate) nmi_window: bool,
}

impl Plan {
    /// No event, and no wish.
    pub(crate) const NOTHING: Self =
        Self { inject: None, address: None, acknowledge: false, interrupt_window: false, nmi_window: false };

    /// Whether an exit is to tell of something.
    #[inline]
    pub(crate) fn has_wish(&self) -> bool {
        self.interrupt_window || self.nmi_window
    }
}

/// The events of one vCPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Events {
    /// Goes in at the next entry, before any instruction.
    event: Option<Injection>,
    /// CR2 for it.
    address: Option<u64>,
    /// An interrupt that was acknowledged, whose delivery an exception has pushed aside. It waits for the window again.
    displaced: Option<u8>,
    /// From userspace's interrupt controller, waiting for the window.
    external: Option<u8>,
    /// NMIs waiting: one, or one behind the one in service.
    nmis: u8,
    nmi_masked: bool,
    activity: Activity,
    /// Userspace wants to know when the window opens.
    window_requested: bool,
}

impl Events {
    /// Nothing waits.
    pub(crate) const fn new() -> Self {
        Self {
            event: None,
            address: None,
            displaced: None,
            external: None,
            nmis: 0,
            nmi_masked: false,
            activity: Activity::Running,
            window_requested: false,
        }
    }

    /// INIT: whatever waited is void (APM vol. 2 section 14.1.3). What userspace wants stays.
    pub(crate) fn reset(&mut self, activity: Activity) {
        *self = Self { activity, window_requested: self.window_requested, ..Self::new() };
    }

    #[inline]
    pub(crate) fn activity(&self) -> Activity {
        self.activity
    }

    #[inline]
    pub(crate) fn set_activity(&mut self, activity: Activity) {
        self.activity = activity;
    }

    pub(crate) fn request_window(&mut self, wanted: bool) {
        self.window_requested = wanted;
    }

    #[inline]
    pub(crate) fn window_requested(&self) -> bool {
        self.window_requested
    }

    #[inline]
    pub(crate) fn nmi_masked(&self) -> bool {
        self.nmi_masked
    }

    /// IRET has been executed.
    pub(crate) fn unmask_nmi(&mut self) {
        self.nmi_masked = false;
    }

    #[inline]
    pub(crate) fn nmi_pending(&self) -> bool {
        self.nmis != 0
    }

    /// Adds NMIs; hardware remembers no more than two.
    #[inline]
    pub(crate) fn post_nmis(&mut self, count: u8) {
        self.nmis = self.nmis.saturating_add(count).min(if self.nmi_masked { 1 } else { 2 });
    }

    /// Whether an event goes in before the instruction at RIP: then that is not the instruction that has caused the last exit.
    pub(crate) fn event_waits(&self) -> bool {
        self.event.is_some()
    }

    /// Raises an exception at the current instruction. It takes the place of whatever waits to go in: there can be nothing, or
    /// the #DB of an instruction that is undone by this.
    pub(crate) fn raise(&mut self, exception: Injection) {
        self.event = Some(exception);
        self.address = None;
    }

    /// Raises #DB after an instruction that was completed for the guest, unless something else is to go in.
    pub(crate) fn raise_trap(&mut self) {
        if self.event.is_none() {
            self.event = Some(Injection::DEBUG);
        }
    }

    /// Takes back [`raise_trap`](Self::raise_trap).
    pub(crate) fn cancel_trap(&mut self) {
        if self.event == Some(Injection::DEBUG) {
            self.event = None;
        }
    }

    /// An exit has interrupted the delivery of `info`; `injected` is what was injected at the entry before it. An event that
    /// the guest's own instruction raised is raised again by that instruction.
    pub(crate) fn requeue(&mut self, info: Injection, injected: Option<Injection>) {
        if info.is_software() && injected != Some(info) {
            return;
        }
        self.event = Some(info);
        self.address = None;
    }

    /// The exit is exception `second`, which the guest is to get, raised while `info` was delivered, if anything was. True if
    /// the vCPU shuts down instead.
    #[must_use]
    pub(crate) fn exception_exit(&mut self, second: Injection, info: Option<Injection>) -> bool {
        let vector = match second {
            Injection::Exception(vector, _) => vector,
            _ => return false,
        };
        let next = match info.map_or(Combined::Second, |first| combine(first, vector)) {
            Combined::Shutdown => return true,
            Combined::DoubleFault => Injection::Exception(DF, Some(0)),
            Combined::Second => second,
        };
        match info {
            Some(Injection::External(vector)) => self.displaced = Some(vector),
            Some(Injection::Nmi) => {
                self.nmi_masked = false;
                self.post_nmis(1);
            }
            // INT n that was injected has no instruction to raise it again; the guest loses it as it would lose it in
            // hardware if its handler did not return to the instruction. Exceptions are raised again by their instruction.
            _ => {}
        }
        self.raise(next);
        false
    }

    /// An external interrupt waits, other than the local APIC's.
    #[inline]
    fn waiting(&self) -> Option<u8> {
        self.displaced.or(self.external)
    }

    /// Whether userspace could hand in an external interrupt that would be delivered at once.
    #[inline]
    pub(crate) fn window_open(&self, situation: Situation) -> bool {
        situation.interrupts_enabled && !situation.shadow && self.event.is_none() && self.waiting().is_none()
    }

    /// Whether an event waits that ends HLT. `apic` says whether the local APIC has an interrupt for the CPU.
    #[inline]
    pub(crate) fn wakes(&self, situation: Situation, apic: bool) -> bool {
        self.event.is_some()
            || (self.nmis != 0 && !self.nmi_masked)
            || (situation.interrupts_enabled && (apic || self.waiting().is_some()))
    }

    /// Whether the next entry has nothing to inject and nothing to ask for, unless the local APIC has.
    #[inline]
    pub(crate) fn is_idle(&self) -> bool {
        self.nmis == 0 && !self.window_requested && self.event.is_none() && self.waiting().is_none()
    }

    /// Decides on the next entry, and takes out what it injects. `apic` is the interrupt that the local APIC would deliver,
    /// `accepts_pic` whether it lets interrupts of userspace's 8259 through.
    #[inline]
    pub(crate) fn plan(&mut self, situation: Situation, apic: Option<u8>, accepts_pic: bool) -> Plan {
        let mut plan = Plan::NOTHING;
        let mut apic = apic;
        if let Some(event) = self.event.take() {
            plan.inject = Some(event);
            plan.address = self.address.take();
        } else if self.nmis != 0 && !self.nmi_masked && !situation.shadow {
            self.nmis = self.nmis.saturating_sub(1);
            self.nmi_masked = true;
            plan.inject = Some(Injection::Nmi);
        } else if situation.interrupts_enabled && !situation.shadow {
            if let Some(vector) = self.displaced.take().or_else(|| self.external.take()) {
                plan.inject = Some(Injection::External(vector));
            } else if let Some(vector) = apic.take() {
                plan.inject = Some(Injection::External(vector));
                plan.acknowledge = true;
            }
        }
        plan.nmi_window = self.nmis != 0;
        plan.interrupt_window = (self.window_requested && accepts_pic) || self.waiting().is_some() || apic.is_some();
        plan
    }

    /// The entry was refused: `injected` is still to be delivered.
    pub(crate) fn undo(&mut self, injected: Option<Injection>) {
        if let Some(injected) = injected {
            self.event = Some(injected);
        }
    }

    /// Takes an event from userspace. `protected_mode` is CR0.PE: without it exceptions have no error codes.
    ///
    /// # Errors
    /// [`AxError::InvalidInput`] for one that does not exist, [`AxError::EventPending`] if one like it waits already.
    pub(crate) fn inject(&mut self, event: &Event, protected_mode: bool) -> AxResult {
        let vector = u8::try_from(event.vector).map_err(|_| AxError::InvalidInput);
        let flags = event.flags;
        if event.kind != EVENT_EXCEPTION && flags != 0 {
            return Err(AxError::InvalidInput);
        }
        match event.kind {
            EVENT_EXTERNAL_INTERRUPT => {
                let vector = vector?;
                if self.external.is_some() {
                    return Err(AxError::EventPending);
                }
                self.external = Some(vector);
            }
            EVENT_NMI => {
                if self.nmis != 0 {
                    return Err(AxError::EventPending);
                }
                self.nmis = 1;
            }
            EVENT_EXCEPTION | EVENT_SOFTWARE_INTERRUPT => {
                let (injection, address) = decode(event, vector?, protected_mode)?;
                if self.event.is_some() {
                    return Err(AxError::EventPending);
                }
                self.event = Some(injection);
                self.address = address;
                self.activity = Activity::Running;
            }
            _ => return Err(AxError::InvalidInput),
        }
        Ok(())
    }

    /// The state for userspace; `shadow` is the hardware's.
    pub(crate) fn state(&self, shadow: bool) -> uapi::Events {
        let flag = |condition, flag| if condition { flag } else { 0 };
        uapi::Events {
            flags: flag(shadow, EVENTS_INTERRUPT_SHADOW)
                | flag(self.nmi_masked, EVENTS_NMI_MASKED)
                | flag(self.nmis != 0, EVENTS_NMI_PENDING)
                | flag(self.waiting().is_some(), EVENTS_EXTERNAL_PENDING)
                | flag(self.event.is_some(), EVENTS_EVENT_PENDING),
            activity: match self.activity {
                Activity::Running => ACTIVITY_RUNNING,
                Activity::Halted => ACTIVITY_HALTED,
                Activity::WaitForSipi => ACTIVITY_WAIT_FOR_SIPI,
            },
            external_vector: self.waiting().map_or(0, u32::from),
            event: self.event.map_or_else(Event::default, |injection| encode(injection, self.address)),
            ..uapi::Events::default()
        }
    }

    /// Replaces the state by one from userspace.
    ///
    /// # Errors
    /// [`AxError::InvalidInput`] if it is none that [`state`](Self::state) gives.
    pub(crate) fn set_state(&mut self, state: &uapi::Events, protected_mode: bool) -> AxResult {
        const KNOWN: u32 = EVENTS_INTERRUPT_SHADOW
            | EVENTS_NMI_MASKED
            | EVENTS_NMI_PENDING
            | EVENTS_EXTERNAL_PENDING
            | EVENTS_EVENT_PENDING;
        if state.flags & !KNOWN != 0 || state.reserved0 != 0 || state.reserved != [0; 2] {
            return Err(AxError::InvalidInput);
        }
        let has = |flag| state.flags & flag != 0;
        let mut new = Self { window_requested: self.window_requested, ..Self::new() };
        new.nmi_masked = has(EVENTS_NMI_MASKED);
        new.nmis = has(EVENTS_NMI_PENDING).into();
        if has(EVENTS_EXTERNAL_PENDING) {
            new.external = Some(u8::try_from(state.external_vector).map_err(|_| AxError::InvalidInput)?);
        } else if state.external_vector != 0 {
            return Err(AxError::InvalidInput);
        }
        if has(EVENTS_EVENT_PENDING) {
            let vector = u8::try_from(state.event.vector).map_err(|_| AxError::InvalidInput)?;
            let (injection, address) = decode(&state.event, vector, protected_mode)?;
            new.event = Some(injection);
            new.address = address;
        } else if state.event != Event::default() {
            return Err(AxError::InvalidInput);
        }
        new.activity = match state.activity {
            ACTIVITY_RUNNING => Activity::Running,
            ACTIVITY_HALTED => Activity::Halted,
            ACTIVITY_WAIT_FOR_SIPI => Activity::WaitForSipi,
            _ => return Err(AxError::InvalidInput),
        };
        *self = new;
        Ok(())
    }
}
