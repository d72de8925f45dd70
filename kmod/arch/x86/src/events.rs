// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! Events that wait for the guest: exceptions, NMIs, external and software interrupts; which of them goes in at the next
//! entry, and for which the guest must be stopped as soon as it can take them (APM vol. 2 sections 8.5, 15.20 and 15.21).
//!
//! No hardware here: a backend tells the situation, and carries out the plan.

use axvcpu_uapi::vcpu::{
    Event, EVENT_EXCEPTION, EVENT_EXTERNAL_INTERRUPT, EVENT_HAS_ADDRESS, EVENT_HAS_ERROR_CODE, EVENT_NMI,
    EVENT_SOFTWARE_INTERRUPT,
};
use axvcpu_uapi::x86::{
    self as uapi, ACTIVITY_HALTED, ACTIVITY_RUNNING, ACTIVITY_WAIT_FOR_SIPI, EVENTS_EVENT_PENDING,
    EVENTS_EXTERNAL_PENDING, EVENTS_INTERRUPT_SHADOW, EVENTS_NMI_MASKED, EVENTS_NMI_PENDING,
};
use vcpu_core::{AxError, AxResult};

/// #DB.
pub(crate) const DB: u8 = 1;
/// #BP.
const BP: u8 = 3;
/// #OF.
const OF: u8 = 4;
/// #UD.
pub(crate) const UD: u8 = 6;
/// #DF.
const DF: u8 = 8;
/// #GP.
pub(crate) const GP: u8 = 13;
/// #PF.
const PF: u8 = 14;
/// #MC.
const MC: u8 = 18;
/// #AC.
pub(crate) const AC: u8 = 17;

/// Vectors of exceptions that push an error code: #DF, #TS, #NP, #SS, #GP, #PF, #AC, #CP, #VC, #SX.
const WITH_ERROR_CODE: u32 = 1 << 8 | 0x1f << 10 | 1 << 17 | 1 << 21 | 3 << 29;
/// Vectors that no exception has: NMI's, 9, 15, and those from 22 to 27 and 31. The hardware refuses to inject them.
const NO_EXCEPTION: u32 = 1 << 2 | 1 << 9 | 1 << 15 | 0x3f << 22 | 1 << 31;

/// An event that enters the guest through its IDT. The numbers are those of EVENTINJ and EXITINTINFO.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Injection {
    /// An external interrupt.
    External(u8),
    /// NMI.
    Nmi,
    /// An exception, with its error code where it has one.
    Exception(u8, Option<u32>),
    /// `INT n`.
    Software(u8),
}

impl Injection {
    /// #GP(0).
    pub(crate) const GENERAL_PROTECTION: Self = Self::Exception(GP, Some(0));
    /// #UD.
    pub(crate) const UNDEFINED: Self = Self::Exception(UD, None);
    /// #DB.
    pub(crate) const DEBUG: Self = Self::Exception(DB, None);

    /// Whether it is a fault: RFLAGS on the stack has RF set, so that an instruction breakpoint on the restarted instruction
    /// does not hit twice (APM vol. 2 sections 3.1.6 and 8.2). #DB is either, and comes with RF as it should be.
    pub(crate) const fn is_fault(self) -> bool {
        matches!(self, Self::Exception(vector, _) if !matches!(vector, DB | BP | OF | DF | MC))
    }

    /// Whether the guest's own instruction raises it, so that RIP is at that instruction until it is delivered and executing
    /// it again raises it again.
    const fn is_software(self) -> bool {
        matches!(self, Self::Software(_) | Self::Exception(BP | OF, _))
    }
}

/// What becomes of an exception that is raised while another event is delivered (APM vol. 2 section 8.2.9).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Combined {
    /// The second is delivered.
    Second,
    /// #DF is.
    DoubleFault,
    /// The CPU shuts down.
    Shutdown,
}

/// Combines exception `second` with `first`, during whose delivery it was raised.
pub(crate) fn combine(first: Injection, second: u8) -> Combined {
    let Injection::Exception(first, _) = first else { return Combined::Second };
    let contributory = |vector| matches!(vector, 0 | 10..=13 | 21);
    match first {
        DF if contributory(second) || second == PF => Combined::Shutdown,
        PF if contributory(second) || second == PF => Combined::DoubleFault,
        _ if contributory(first) && contributory(second) => Combined::DoubleFault,
        _ => Combined::Second,
    }
}

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

/// The event of this description, and the address for CR2.
fn decode(event: &Event, vector: u8, protected_mode: bool) -> AxResult<(Injection, Option<u64>)> {
    let has_code = event.flags & EVENT_HAS_ERROR_CODE != 0;
    let has_address = event.flags & EVENT_HAS_ADDRESS != 0;
    if event.flags & !(EVENT_HAS_ERROR_CODE | EVENT_HAS_ADDRESS) != 0 {
        return Err(AxError::InvalidInput);
    }
    let injection = match event.kind {
        EVENT_EXTERNAL_INTERRUPT if event.flags == 0 => Injection::External(vector),
        EVENT_NMI if event.flags == 0 => Injection::Nmi,
        EVENT_SOFTWARE_INTERRUPT if event.flags == 0 => Injection::Software(vector),
        EVENT_EXCEPTION => {
            let bit = 1u32.checked_shl(vector.into()).ok_or(AxError::InvalidInput)?;
            // Real mode has no error codes.
            let expects_code = WITH_ERROR_CODE & bit != 0 && protected_mode;
            if NO_EXCEPTION & bit != 0 || has_code != expects_code || (has_address && vector != PF) {
                return Err(AxError::InvalidInput);
            }
            Injection::Exception(vector, has_code.then_some(event.error_code))
        }
        _ => return Err(AxError::InvalidInput),
    };
    Ok((injection, has_address.then_some(event.address)))
}

/// The description of an event.
fn encode(injection: Injection, address: Option<u64>) -> Event {
    let (kind, vector, code) = match injection {
        Injection::External(vector) => (EVENT_EXTERNAL_INTERRUPT, vector, None),
        Injection::Nmi => (EVENT_NMI, 0, None),
        Injection::Exception(vector, code) => (EVENT_EXCEPTION, vector, code),
        Injection::Software(vector) => (EVENT_SOFTWARE_INTERRUPT, vector, None),
    };
    let flag = |condition, flag| if condition { flag } else { 0 };
    Event {
        kind,
        vector: vector.into(),
        error_code: code.unwrap_or(0),
        flags: flag(code.is_some(), EVENT_HAS_ERROR_CODE) | flag(address.is_some(), EVENT_HAS_ADDRESS),
        address: address.unwrap_or(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPEN: Situation = Situation { interrupts_enabled: true, shadow: false };
    const CLOSED: Situation = Situation { interrupts_enabled: false, shadow: false };
    const SHADOW: Situation = Situation { interrupts_enabled: true, shadow: true };

    fn external(vector: u32) -> Event {
        Event { kind: EVENT_EXTERNAL_INTERRUPT, vector, ..Event::default() }
    }

    fn exception(vector: u32, error_code: Option<u32>) -> Event {
        Event {
            kind: EVENT_EXCEPTION,
            vector,
            error_code: error_code.unwrap_or(0),
            flags: if error_code.is_some() { EVENT_HAS_ERROR_CODE } else { 0 },
            address: 0,
        }
    }

    fn nmi() -> Event {
        Event { kind: EVENT_NMI, ..Event::default() }
    }

    #[test]
    fn combinations_are_those_of_the_manual() {
        use Combined::*;
        // Rows: first #DE, #DB, #DF, #TS, #GP, #PF, #AC; columns the same as second.
        let vectors = [0u8, 1, 8, 10, 13, 14, 17];
        let table = [
            [DoubleFault, Second, Second, DoubleFault, DoubleFault, Second, Second],
            [Second, Second, Second, Second, Second, Second, Second],
            [Shutdown, Second, Second, Shutdown, Shutdown, Shutdown, Second],
            [DoubleFault, Second, Second, DoubleFault, DoubleFault, Second, Second],
            [DoubleFault, Second, Second, DoubleFault, DoubleFault, Second, Second],
            [DoubleFault, Second, Second, DoubleFault, DoubleFault, DoubleFault, Second],
            [Second, Second, Second, Second, Second, Second, Second],
        ];
        for (first, row) in vectors.into_iter().zip(table) {
            for (second, expected) in vectors.into_iter().zip(row) {
                assert_eq!(combine(Injection::Exception(first, None), second), expected, "{first} then {second}");
            }
        }
        for benign in [Injection::External(14), Injection::Nmi, Injection::Software(13)] {
            assert_eq!(combine(benign, PF), Second);
        }
    }

    #[test]
    fn an_interrupt_waits_for_the_window() {
        let mut events = Events::new();
        events.inject(&external(0x30), true).unwrap();
        assert_eq!(events.inject(&external(0x31), true), Err(AxError::EventPending));
        for closed in [CLOSED, SHADOW] {
            let plan = events.plan(closed, None, true);
            assert_eq!((plan.inject, plan.interrupt_window), (None, true));
        }
        let plan = events.plan(OPEN, None, true);
        assert_eq!((plan.inject, plan.interrupt_window), (Some(Injection::External(0x30)), false));
        assert_eq!(events.plan(OPEN, None, true).inject, None);
    }

    #[test]
    fn order_is_event_then_nmi_then_interrupts() {
        let mut events = Events::new();
        events.inject(&external(0x30), true).unwrap();
        events.inject(&nmi(), true).unwrap();
        events.inject(&exception(13, Some(8)), true).unwrap();
        let plan = events.plan(OPEN, Some(0x40), true);
        assert_eq!(plan.inject, Some(Injection::Exception(13, Some(8))));
        assert!(plan.interrupt_window && plan.nmi_window);
        let plan = events.plan(OPEN, Some(0x40), true);
        assert_eq!((plan.inject, plan.interrupt_window, plan.nmi_window), (Some(Injection::Nmi), true, false));
        let plan = events.plan(OPEN, Some(0x40), true);
        assert_eq!(plan.inject, Some(Injection::External(0x30)));
        assert!(!plan.acknowledge && plan.interrupt_window);
        let plan = events.plan(OPEN, Some(0x40), true);
        assert_eq!(plan.inject, Some(Injection::External(0x40)));
        assert!(plan.acknowledge && !plan.interrupt_window);
    }

    #[test]
    fn nmis_wait_for_iret_and_shadows() {
        let mut events = Events::new();
        events.inject(&nmi(), true).unwrap();
        assert_eq!(events.plan(Situation { interrupts_enabled: false, shadow: true }, None, true).inject, None);
        assert_eq!(events.plan(CLOSED, None, true).inject, Some(Injection::Nmi));
        events.post_nmis(2);
        let plan = events.plan(CLOSED, None, true);
        assert_eq!((plan.inject, plan.nmi_window), (None, true), "masked");
        events.unmask_nmi();
        assert_eq!(events.plan(CLOSED, None, true).inject, Some(Injection::Nmi));
        assert!(!events.nmi_pending(), "one is latched behind the one in service, not two");
    }

    #[test]
    fn interrupted_deliveries_go_in_again() {
        for info in [
            Injection::External(0x50),
            Injection::Nmi,
            Injection::Exception(13, Some(0x18)),
            Injection::Exception(14, Some(2)),
            Injection::Exception(1, None),
        ] {
            let mut events = Events::new();
            events.requeue(info, None);
            assert_eq!(events.plan(CLOSED, None, true).inject, Some(info), "without a window: it was taken already");
        }
    }

    #[test]
    fn software_events_are_raised_again_by_their_instruction() {
        for info in [Injection::Software(0x80), Injection::Exception(3, None), Injection::Exception(4, None)] {
            let mut events = Events::new();
            events.requeue(info, None);
            assert_eq!(events.plan(OPEN, None, true).inject, None, "{info:?}");
            events.requeue(info, Some(info));
            assert_eq!(events.plan(OPEN, None, true).inject, Some(info), "there is no instruction behind {info:?}");
        }
    }

    #[test]
    fn an_exception_during_delivery_displaces_an_interrupt_but_does_not_lose_it() {
        let mut events = Events::new();
        assert!(!events.exception_exit(Injection::Exception(AC, Some(0)), Some(Injection::External(0x60))));
        let plan = events.plan(OPEN, None, true);
        assert_eq!((plan.inject, plan.interrupt_window), (Some(Injection::Exception(AC, Some(0))), true));
        assert_eq!(events.plan(CLOSED, None, true).inject, None, "now it needs the window again");
        assert_eq!(events.plan(OPEN, None, true).inject, Some(Injection::External(0x60)));

        assert!(!events.exception_exit(Injection::DEBUG, Some(Injection::Nmi)));
        assert_eq!(events.plan(CLOSED, None, true).inject, Some(Injection::DEBUG));
        assert_eq!(events.plan(CLOSED, None, true).inject, Some(Injection::Nmi));
    }

    #[test]
    fn faults_upon_faults_end_in_shutdown() {
        let mut events = Events::new();
        assert!(!events.exception_exit(Injection::GENERAL_PROTECTION, Some(Injection::Exception(14, Some(0)))));
        let double = events.plan(CLOSED, None, true).inject;
        assert_eq!(double, Some(Injection::Exception(8, Some(0))));
        assert!(events.exception_exit(Injection::GENERAL_PROTECTION, double));
    }

    #[test]
    fn bad_events_are_refused() {
        let mut events = Events::new();
        for (why, bad) in [
            ("kind 1", Event { kind: 1, ..Event::default() }),
            ("kind 5", Event { kind: 5, ..Event::default() }),
            ("vector 256", external(256)),
            ("exception 2", exception(2, None)),
            ("exception 32", exception(32, None)),
            ("exception 15", exception(15, None)),
            ("#UD with code", exception(6, Some(0))),
            ("unknown flag", Event { flags: 4, ..exception(6, None) }),
            ("address of #UD", Event { flags: EVENT_HAS_ADDRESS, ..exception(6, None) }),
            ("flags of an interrupt", Event { flags: 1, ..external(0x30) }),
        ] {
            assert_eq!(events.inject(&bad, true), Err(AxError::InvalidInput), "{why}");
            assert_eq!(events, Events::new());
        }
    }

    #[test]
    fn exceptions_have_error_codes_where_the_architecture_has_them() {
        for (event, protected_mode, good) in [
            (exception(13, Some(5)), true, true),
            (exception(13, None), true, false),
            (exception(13, Some(5)), false, false),
            (exception(13, None), false, true),
            (exception(6, None), true, true),
            (exception(6, Some(0)), true, false),
        ] {
            assert_eq!(Events::new().inject(&event, protected_mode).is_ok(), good, "{event:?} {protected_mode}");
        }
    }

    #[test]
    fn faults_restart_their_instruction() {
        for vector in [0, 5, 6, 13, 14, 17] {
            assert!(Injection::Exception(vector, None).is_fault(), "{vector}");
        }
        for other in [1, 3, 4, 8, 18].map(|vector| Injection::Exception(vector, None)) {
            assert!(!other.is_fault(), "{other:?}");
        }
        assert!(
            !Injection::Nmi.is_fault() && !Injection::External(14).is_fault() && !Injection::Software(13).is_fault()
        );
    }

    #[test]
    fn page_faults_bring_their_address() {
        let mut events = Events::new();
        let fault =
            Event { flags: EVENT_HAS_ERROR_CODE | EVENT_HAS_ADDRESS, address: 0x1234, ..exception(14, Some(6)) };
        events.inject(&fault, true).unwrap();
        let plan = events.plan(CLOSED, None, true);
        assert_eq!((plan.inject, plan.address), (Some(Injection::Exception(14, Some(6))), Some(0x1234)));
    }

    #[test]
    fn states_round_trip() {
        let mut events = Events::new();
        events.inject(&external(0x21), true).unwrap();
        events.inject(&nmi(), true).unwrap();
        events.inject(&Event { flags: 3, address: 9, ..exception(14, Some(6)) }, true).unwrap();
        let state = events.state(true);
        assert_eq!(
            state.flags,
            EVENTS_INTERRUPT_SHADOW | EVENTS_NMI_PENDING | EVENTS_EXTERNAL_PENDING | EVENTS_EVENT_PENDING
        );
        let mut other = Events::new();
        other.set_state(&state, true).unwrap();
        assert_eq!(other, events);
        for bad in [
            uapi::Events { flags: 1 << 5, ..state },
            uapi::Events { activity: 3, ..state },
            uapi::Events { external_vector: 256, ..state },
            uapi::Events { reserved: [0, 1], ..state },
            uapi::Events { flags: 0, ..state },
        ] {
            assert_eq!(other.set_state(&bad, true), Err(AxError::InvalidInput));
            assert_eq!(other, events);
        }
    }

    #[test]
    fn hlt_ends_with_what_can_be_delivered() {
        let mut events = Events::new();
        assert!(!events.wakes(OPEN, false) && events.wakes(OPEN, true) && !events.wakes(CLOSED, true));
        events.inject(&external(0x20), true).unwrap();
        assert!(events.wakes(OPEN, false) && !events.wakes(CLOSED, false));
        events.inject(&nmi(), true).unwrap();
        assert!(events.wakes(CLOSED, false));
    }
}
