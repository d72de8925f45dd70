// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! Events: their order, their combinations, and their state for userspace.

use super::injection::PF;
use super::*;
use axvcpu_uapi::vcpu::{EVENT_HAS_ADDRESS, EVENT_HAS_ERROR_CODE};

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
    assert!(!Injection::Nmi.is_fault() && !Injection::External(14).is_fault() && !Injection::Software(13).is_fault());
}

#[test]
fn page_faults_bring_their_address() {
    let mut events = Events::new();
    let fault = Event { flags: EVENT_HAS_ERROR_CODE | EVENT_HAS_ADDRESS, address: 0x1234, ..exception(14, Some(6)) };
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
