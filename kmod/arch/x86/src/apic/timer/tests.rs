// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The timer against the manual, and against a host that is late.

use super::*;
use proptest::prelude::*;

const KHZ: u32 = 2_600_000;

fn at(now_ns: u64) -> Clock {
    Clock { now_ns, tsc: now_ns * 26 / 10, tsc_khz: KHZ }
}

fn timer(mode: TimerMode) -> Timer {
    let mut timer = Timer::new();
    timer.set_lvt(mode, false);
    timer.set_divide(0xb, &at(0)); // by 1
    timer
}

#[test]
fn divisors_are_those_of_the_manual() {
    for (code, divisor) in [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (10, 128), (11, 1)] {
        let mut timer = Timer::new();
        timer.set_divide(code, &at(0));
        assert_eq!(timer.divisor(), divisor);
    }
}

#[test]
fn the_hosts_timer_is_moved_back_only_for_a_sleeper() {
    let mut timer = timer(TimerMode::TscDeadline);
    timer.set_deadline(2_600_000, &at(0));
    assert_eq!(timer.update(Watch::Exits), TimerUpdate::Arm(1_000_000));
    timer.set_deadline(5_200_000, &at(0));
    assert_eq!(timer.update(Watch::Exits), TimerUpdate::Unchanged, "early enough");
    assert_eq!(timer.update(Watch::Nobody), TimerUpdate::Arm(2_000_000));
    timer.set_deadline(1_300_000, &at(0));
    assert_eq!(timer.update(Watch::Exits), TimerUpdate::Arm(500_000), "sooner");
    timer.set_deadline(5_200_000, &at(0));
    assert_eq!(timer.update(Watch::Exits), TimerUpdate::Unchanged);
    // It fires for the deadline that is no more.
    timer.host_fired();
    assert!(!timer.poll(&at(500_000)));
    assert_eq!(timer.update(Watch::Exits), TimerUpdate::Arm(2_000_000));
    timer.set_deadline(0, &at(600_000));
    assert_eq!(timer.update(Watch::Exits), TimerUpdate::Cancel);
}

#[test]
fn a_postponed_deadline_is_estimated_when_somebody_looks() {
    let mut timer = timer(TimerMode::TscDeadline);
    assert!(!timer.postpone(2_600_000, 0), "none is set");
    timer.set_deadline(2_600_000, &at(0));
    assert_eq!(timer.update(Watch::Exits), TimerUpdate::Arm(1_000_000));
    for (deadline, tsc) in [(2_599_999, 0), (0, 0), (5_200_000, 2_600_000)] {
        assert!(!timer.postpone(deadline, tsc), "sooner, never, or the first one is due");
    }
    assert!(timer.postpone(5_200_000, 2_599_999));
    assert_eq!((timer.watched_deadline(), timer.update(Watch::Exits)), (Some(5_200_000), TimerUpdate::Unchanged));
    timer.host_fired();
    assert!(!timer.poll(&at(900_000)), "not even the first one");
    assert_eq!(timer.update(Watch::Exits), TimerUpdate::Arm(2_000_000));
    assert!(timer.poll(&at(2_000_000)));
    assert!(!timer.postpone(7_800_000, 5_200_000), "none is set any more");
    timer.set_lvt(TimerMode::Periodic, false);
    timer.set_initial_count(1_000_000, &at(0));
    assert!(!timer.postpone(7_800_000, 0), "another mode");
}

#[test]
fn one_shot_fires_once() {
    let mut timer = timer(TimerMode::OneShot);
    timer.set_initial_count(1000, &at(5000));
    assert_eq!(timer.update(Watch::Nobody), TimerUpdate::Arm(6000));
    assert_eq!(timer.update(Watch::Nobody), TimerUpdate::Unchanged);
    assert_eq!(timer.current_count(&at(5000)), 1000);
    assert_eq!(timer.current_count(&at(5250)), 750);
    assert!(!timer.poll(&at(5999)));
    timer.host_fired();
    assert!(timer.poll(&at(6000)));
    assert!(!timer.poll(&at(9000)));
    assert_eq!((timer.current_count(&at(9000)), timer.initial_count()), (0, 1000));
    assert_eq!(timer.update(Watch::Nobody), TimerUpdate::Unchanged);
}

#[test]
fn a_deadline_that_is_watched_needs_no_host_timer() {
    let mut timer = timer(TimerMode::TscDeadline);
    assert_eq!((timer.watched_deadline(), timer.update(Watch::Entries)), (None, TimerUpdate::Unchanged));
    timer.set_deadline(2600, &at(0));
    assert_eq!((timer.watched_deadline(), timer.update(Watch::Entries)), (Some(2600), TimerUpdate::Unchanged));
    assert_eq!(timer.update(Watch::Nobody), TimerUpdate::Arm(1000), "nobody watches any more");
    assert_eq!(timer.update(Watch::Entries), TimerUpdate::Cancel);
    timer.set_lvt(TimerMode::TscDeadline, true);
    assert_eq!(timer.watched_deadline(), None, "masked");
    timer.set_lvt(TimerMode::OneShot, false);
    timer.set_initial_count(1000, &at(0));
    assert_eq!((timer.watched_deadline(), timer.update(Watch::Entries)), (None, TimerUpdate::Arm(1000)));
}

#[test]
fn stopping_cancels() {
    let mut timer = timer(TimerMode::OneShot);
    timer.set_initial_count(1000, &at(0));
    assert_eq!(timer.update(Watch::Nobody), TimerUpdate::Arm(1000));
    timer.set_initial_count(0, &at(10));
    assert_eq!(timer.update(Watch::Nobody), TimerUpdate::Cancel);
    assert!(!timer.poll(&at(2000)));
}

#[test]
fn a_host_timer_that_fires_early_is_armed_again() {
    let mut timer = timer(TimerMode::OneShot);
    timer.set_initial_count(1000, &at(0));
    assert_eq!(timer.update(Watch::Nobody), TimerUpdate::Arm(1000));
    timer.host_fired();
    assert!(!timer.poll(&at(900)));
    assert_eq!(timer.update(Watch::Nobody), TimerUpdate::Arm(1000));
}

#[test]
fn periods_stay_on_the_grid() {
    let mut timer = timer(TimerMode::Periodic);
    timer.set_initial_count(1_000_000, &at(7));
    assert_eq!(timer.update(Watch::Nobody), TimerUpdate::Arm(1_000_007));
    timer.host_fired();
    assert!(timer.poll(&at(1_000_300)), "late by 293 ns");
    assert_eq!(timer.update(Watch::Nobody), TimerUpdate::Arm(2_000_007), "no drift");
    timer.host_fired();
    assert!(timer.poll(&at(5_500_007)));
    assert!(!timer.poll(&at(5_500_007)), "missed periods are one interrupt");
    assert_eq!(timer.update(Watch::Nobody), TimerUpdate::Arm(6_000_007));
    assert_eq!(timer.current_count(&at(5_500_007)), 500_000);
}

#[test]
fn short_periods_are_stretched() {
    let mut timer = timer(TimerMode::Periodic);
    timer.set_initial_count(1, &at(0));
    assert_eq!(timer.update(Watch::Nobody), TimerUpdate::Arm(MIN_PERIOD_NS));
    assert_eq!(timer.current_count(&at(0)), 1);
    timer.host_fired();
    assert!(timer.poll(&at(MIN_PERIOD_NS)));
    assert_eq!(timer.update(Watch::Nobody), TimerUpdate::Arm(2 * MIN_PERIOD_NS));
}

#[test]
fn a_masked_timer_counts_but_neither_fires_nor_needs_the_host() {
    let mut timer = timer(TimerMode::Periodic);
    timer.set_initial_count(1_000_000, &at(0));
    assert_eq!(timer.update(Watch::Nobody), TimerUpdate::Arm(1_000_000));
    timer.set_lvt(TimerMode::Periodic, true);
    assert_eq!(timer.update(Watch::Nobody), TimerUpdate::Cancel);
    assert!(!timer.poll(&at(2_400_000)));
    assert_eq!(timer.current_count(&at(2_400_000)), 600_000);
    timer.set_lvt(TimerMode::Periodic, false);
    assert_eq!(timer.update(Watch::Nobody), TimerUpdate::Arm(3_000_000));
}

#[test]
fn divide_change_keeps_the_count() {
    let mut timer = timer(TimerMode::OneShot);
    timer.set_initial_count(1000, &at(0));
    timer.set_divide(0x3, &at(400)); // by 16
    assert_eq!(timer.current_count(&at(400)), 600);
    assert_eq!(timer.update(Watch::Nobody), TimerUpdate::Arm(400 + 600 * 16));
}

#[test]
fn deadline_fires_by_the_tsc() {
    let mut timer = timer(TimerMode::TscDeadline);
    let now = at(1_000_000);
    timer.set_deadline(now.tsc + 2600, &now);
    assert_eq!(timer.deadline(), now.tsc + 2600);
    assert_eq!(timer.update(Watch::Nobody), TimerUpdate::Arm(1_001_000));
    timer.host_fired();
    // The host's clock says it is time, the TSC lags by 26 ticks: 10 ns more.
    assert!(!timer.poll(&Clock { now_ns: 1_001_000, tsc: now.tsc + 2574, tsc_khz: KHZ }));
    assert_eq!(timer.update(Watch::Nobody), TimerUpdate::Arm(1_001_010));
    timer.host_fired();
    assert!(timer.poll(&at(1_001_010)));
    assert_eq!((timer.deadline(), timer.update(Watch::Nobody)), (0, TimerUpdate::Unchanged));
}

#[test]
fn past_deadline_is_due_at_once() {
    let mut timer = timer(TimerMode::TscDeadline);
    timer.set_deadline(1, &at(1_000_000));
    assert!(timer.poll(&at(1_000_000)));
    assert_eq!((timer.deadline(), timer.update(Watch::Nobody)), (0, TimerUpdate::Unchanged));
}

#[test]
fn a_moved_tsc_moves_the_deadline() {
    let mut timer = timer(TimerMode::TscDeadline);
    timer.set_deadline(26_000, &at(0));
    assert_eq!(timer.update(Watch::Nobody), TimerUpdate::Arm(10_000));
    timer.estimate(&Clock { now_ns: 100, tsc: 13_000, tsc_khz: KHZ });
    assert_eq!(timer.update(Watch::Nobody), TimerUpdate::Arm(5_100));
}

#[test]
fn modes_keep_to_their_own_registers() {
    let mut timer = timer(TimerMode::TscDeadline);
    timer.set_initial_count(5, &at(0));
    assert_eq!((timer.initial_count(), timer.update(Watch::Nobody)), (0, TimerUpdate::Unchanged));
    timer.set_deadline(u64::MAX, &at(0));
    timer.set_lvt(TimerMode::OneShot, false);
    assert_eq!(timer.deadline(), 0, "leaving the mode disarms");
    timer.set_deadline(7, &at(0));
    assert_eq!((timer.deadline(), timer.update(Watch::Nobody)), (0, TimerUpdate::Unchanged));
    timer.set_initial_count(1_000_000, &at(0));
    timer.set_lvt(TimerMode::Periodic, false);
    assert!(timer.poll(&at(1_000_000)), "one-shot to periodic goes on counting");
    assert_eq!(timer.update(Watch::Nobody), TimerUpdate::Arm(2_000_000));
    timer.set_lvt(TimerMode::TscDeadline, false);
    assert_eq!(timer.update(Watch::Nobody), TimerUpdate::Cancel);
}

#[test]
fn restore_continues() {
    let mut timer = timer(TimerMode::Periodic);
    timer.restore(1_000_000, 250_000, 0xb, &at(100));
    assert_eq!(timer.update(Watch::Nobody), TimerUpdate::Arm(250_100));
    assert!(timer.poll(&at(250_100)));
    assert_eq!(timer.update(Watch::Nobody), TimerUpdate::Arm(1_250_100));
    timer.set_lvt(TimerMode::OneShot, false);
    timer.restore(1_000_000, 0, 0xb, &at(100));
    assert_eq!(timer.update(Watch::Nobody), TimerUpdate::Cancel, "an expired one-shot stays expired");
    timer.set_lvt(TimerMode::Periodic, false);
    timer.restore(1_000_000, 0, 0xb, &at(100));
    assert_eq!(
        timer.update(Watch::Nobody),
        TimerUpdate::Unchanged,
        "and so does one that was made periodic afterwards"
    );
}

/// Writes a deadline as the local APIC does. Whether an interrupt is due.
fn write_deadline(timer: &mut Timer, deadline: u64, clock: &Clock) -> bool {
    let before = timer.poll(clock);
    timer.set_deadline(deadline, clock);
    timer.poll(clock) || before
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(if cfg!(miri) { 16 } else { 2000 }) })]
    #[test]
    fn a_host_that_obeys_sees_every_expiry(initial in 1u32..5_000_000, divide in 0u32..16, jitter in proptest::collection::vec(0u64..3_000_000, 1..20)) {
        let mut timer = timer(TimerMode::Periodic);
        timer.set_divide(divide, &at(0));
        timer.set_initial_count(initial, &at(0));
        let span = timer.span();
        for late in jitter {
            let TimerUpdate::Arm(target) = timer.update(Watch::Nobody) else { panic!("not armed") };
            prop_assert_eq!(target % span, 0, "off the grid");
            timer.host_fired();
            prop_assert!(timer.poll(&at(target + late)));
            prop_assert!(timer.current_count(&at(target + late)) <= initial);
        }
    }

    #[test]
    fn postponing_loses_no_interrupt(writes in proptest::collection::vec((0u64..2_000_000, 0u64..10_000_000, any::<bool>()), 1..40)) {
        let (mut short, mut long, mut now) = (timer(TimerMode::TscDeadline), timer(TimerMode::TscDeadline), 0);
        for (pause, distance, look) in writes {
            now += pause;
            let clock = at(now);
            let deadline = clock.tsc + distance;
            let due = write_deadline(&mut long, deadline, &clock);
            prop_assert_eq!(!short.postpone(deadline, clock.tsc) && write_deadline(&mut short, deadline, &clock), due);
            prop_assert_eq!(short.deadline(), long.deadline());
            prop_assert!(short.expiry <= long.expiry && short.expiry.is_some() == long.expiry.is_some());
            if look {
                prop_assert!(!short.poll(&clock));
                prop_assert_eq!(short.expiry, long.expiry);
            }
        }
    }
}
