// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The APIC timer: one-shot, periodic and TSC-deadline (SDM vol. 3 section 12.5.4), over the host's nanoseconds and the
//! guest's TSC. It decides when the host's timer must fire; it never starts one itself.
//!
//! The counter is driven at 1 GHz before division, so one count is `divisor` nanoseconds. Guests measure this frequency or are
//! told by the VMM.

/// The shortest period of a periodic timer, in nanoseconds: a guest that asks for less gets this, so that no guest can storm
/// the host with timer interrupts it need not even handle. One-shot timers need no bound: each shot costs the guest an exit.
pub const MIN_PERIOD_NS: u64 = 200_000;

/// The latest time that Linux's high-resolution timers take (`KTIME_MAX`).
const NEVER_NS: u64 = i64::MAX as u64;

/// One reading of the clocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Clock {
    /// The host's monotonic clock, in nanoseconds.
    pub now_ns: u64,
    /// The guest's TSC at that moment.
    pub tsc: u64,
    /// The guest's TSC frequency in kHz. Zero means that there is none: deadlines then are never reached by time.
    pub tsc_khz: u32,
}

impl Clock {
    /// The host time at which the guest's TSC reaches `deadline`: not earlier, at most 1 ns late, saturated at the end of time.
    fn host_time_of(&self, deadline: u64) -> u64 {
        let Some(ticks) = deadline.checked_sub(self.tsc) else { return self.now_ns };
        let khz = u64::from(self.tsc_khz);
        // ticks * 10^6 / khz in two parts, since the product overflows 64 bits after hours: whole milliseconds and the rest,
        // which is below 2^32 * 10^6.
        let (Some(whole), Some(rest)) = (ticks.checked_div(khz), ticks.checked_rem(khz)) else { return NEVER_NS };
        let rounded_up = rest.wrapping_mul(1_000_000).wrapping_add(khz).wrapping_sub(1).checked_div(khz).unwrap_or(0);
        let ns = whole.saturating_mul(1_000_000).saturating_add(rounded_up);
        self.now_ns.saturating_add(ns).min(NEVER_NS)
    }
}

/// The timer's mode: bits 18:17 of its LVT entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TimerMode {
    /// Counts down once.
    OneShot,
    /// Counts down again and again.
    Periodic,
    /// Fires when the TSC reaches IA32_TSC_DEADLINE.
    TscDeadline,
}

/// What to do with the host's timer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TimerUpdate {
    /// Nothing.
    Unchanged,
    /// Stop it.
    Cancel,
    /// Let it fire at this time of the host's monotonic clock, in nanoseconds, instead of any earlier setting.
    Arm(u64),
}

/// Who looks at the timer besides the host's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Watch {
    /// Nobody: the vCPU sleeps.
    Nobody,
    /// The vCPU runs: whoever makes it exit makes it look.
    Exits,
    /// The vCPU runs, and besides its entries end when the TSC reaches a deadline.
    Entries,
}

/// The timer of one local APIC.
///
/// Callers [`poll`](Self::poll) before and after they change something: before, so that what has happened until now happened
/// under the old settings, and after, because the change may be due at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Timer {
    mode: TimerMode,
    masked: bool,
    /// Initial count register.
    initial: u32,
    /// Divide configuration register.
    divide: u32,
    /// IA32_TSC_DEADLINE; 0 when disarmed.
    deadline: u64,
    /// Host time of the next expiry, if the timer runs. In TSC-deadline mode an estimate: the TSC itself decides.
    expiry: Option<u64>,
    /// What the host's timer is set to.
    armed: Option<u64>,
}

impl Default for Timer {
    fn default() -> Self {
        Self::new()
    }
}

impl Timer {
    /// The state after reset: stopped and masked.
    pub const fn new() -> Self {
        Self { mode: TimerMode::OneShot, masked: true, initial: 0, divide: 0, deadline: 0, expiry: None, armed: None }
    }

    /// Back to the state after reset, except that what the host's timer is set to is not forgotten.
    pub fn reset(&mut self) {
        *self = Self { armed: self.armed, ..Self::new() };
    }

    /// Nanoseconds of one count: 1 to 128. Bits 3, 1 and 0 of the divide configuration say which power of two, one off
    /// (SDM vol. 3 figure 12-10).
    fn divisor(&self) -> u64 {
        let code = (self.divide >> 1) & 4 | self.divide & 3;
        1 << ((code + 1) & 7)
    }

    /// Nanoseconds from loading the initial count to expiry.
    fn span(&self) -> u64 {
        let span = u64::from(self.initial) * self.divisor();
        if self.mode == TimerMode::Periodic {
            span.max(MIN_PERIOD_NS)
        } else {
            span
        }
    }

    /// Sees what has happened until now. True if the timer expired, unmasked: its interrupt is due. Periods that were missed
    /// become one interrupt, and the next period starts on the grid of the first.
    #[must_use = "an expiry is an interrupt"]
    #[inline]
    pub fn poll(&mut self, clock: &Clock) -> bool {
        let Some(expiry) = self.expiry else { return false };
        match self.mode {
            TimerMode::TscDeadline => {
                if clock.tsc < self.deadline {
                    // The host's clock is disciplined and the TSC is not, so the estimate can be early. Estimate again.
                    if expiry <= clock.now_ns {
                        self.expiry = Some(clock.host_time_of(self.deadline));
                    }
                    return false;
                }
                self.deadline = 0;
                self.expiry = None;
            }
            TimerMode::OneShot | TimerMode::Periodic => {
                let Some(late) = clock.now_ns.checked_sub(expiry) else { return false };
                let span = self.span();
                self.expiry = match self.mode {
                    // late - late % span is the whole periods missed; the span is not zero, see MIN_PERIOD_NS.
                    TimerMode::Periodic => {
                        Some(clock.now_ns.saturating_sub(late.checked_rem(span).unwrap_or(0)).saturating_add(span))
                    }
                    _ => None,
                };
            }
        }
        !self.masked
    }

    /// Sets what the LVT entry says: mode and mask.
    ///
    /// A change to or from TSC-deadline mode disarms the timer. Between one-shot and periodic the count goes on, as it does on
    /// processors (KVM relies on the same; the SDM's text would have it disarmed).
    pub fn set_lvt(&mut self, mode: TimerMode, masked: bool) {
        if self.mode != mode && (self.mode == TimerMode::TscDeadline || mode == TimerMode::TscDeadline) {
            self.initial = 0;
            self.deadline = 0;
            self.expiry = None;
        }
        self.mode = mode;
        self.masked = masked;
    }

    /// The mode.
    pub fn mode(&self) -> TimerMode {
        self.mode
    }

    /// The initial count register.
    pub fn initial_count(&self) -> u32 {
        self.initial
    }

    /// Writes the initial count, which starts the timer, or stops it if zero. Ignored in TSC-deadline mode.
    pub fn set_initial_count(&mut self, count: u32, clock: &Clock) {
        if self.mode != TimerMode::TscDeadline {
            self.initial = count;
            self.expiry = (count != 0).then(|| clock.now_ns.saturating_add(self.span()));
        }
    }

    /// The current count: zero when the timer does not run and in TSC-deadline mode. [`poll`](Self::poll) first.
    pub fn current_count(&self, clock: &Clock) -> u32 {
        match self.expiry {
            Some(expiry) if self.mode != TimerMode::TscDeadline => {
                let count = expiry.saturating_sub(clock.now_ns).div_ceil(self.divisor());
                // The bound on periods makes a period longer than its counts: the count then waits at its start.
                u32::try_from(count).unwrap_or(u32::MAX).min(self.initial)
            }
            _ => 0,
        }
    }

    /// The divide configuration register.
    pub fn divide(&self) -> u32 {
        self.divide
    }

    /// Writes the divide configuration. A running count goes on from where it is, at the new speed.
    pub fn set_divide(&mut self, divide: u32, clock: &Clock) {
        let count = self.current_count(clock);
        self.divide = divide & 0xb;
        if self.mode != TimerMode::TscDeadline && self.expiry.is_some() {
            self.resume(count, clock);
        }
    }

    /// Lets the timer run from `count`.
    fn resume(&mut self, count: u32, clock: &Clock) {
        self.expiry = Some(clock.now_ns.saturating_add(u64::from(count) * self.divisor()));
    }

    /// IA32_TSC_DEADLINE: zero when disarmed, and in the other modes.
    pub fn deadline(&self) -> u64 {
        self.deadline
    }

    /// Writes IA32_TSC_DEADLINE; zero disarms. Ignored in the other modes.
    #[inline]
    pub fn set_deadline(&mut self, deadline: u64, clock: &Clock) {
        if self.mode == TimerMode::TscDeadline {
            self.deadline = deadline;
            self.expiry = (deadline != 0).then(|| clock.host_time_of(deadline));
        }
    }

    /// The guest's TSC was changed by other means than passing: the deadline lies elsewhere now.
    pub fn tsc_changed(&mut self, clock: &Clock) {
        if self.mode == TimerMode::TscDeadline && self.expiry.is_some() {
            self.expiry = Some(clock.host_time_of(self.deadline));
        }
    }

    /// Sets a saved state of the counting modes: initial count, current count and divide configuration, after
    /// [`set_lvt`](Self::set_lvt). A current count of zero is that of a timer that does not run: one that runs shows at least 1
    /// until it expires.
    pub fn restore(&mut self, initial: u32, current: u32, divide: u32, clock: &Clock) {
        self.deadline = 0;
        self.expiry = None;
        self.divide = divide & 0xb;
        self.initial = if self.mode == TimerMode::TscDeadline { 0 } else { initial };
        if self.initial != 0 && current != 0 {
            self.resume(current, clock);
        }
    }

    /// The host's timer has fired.
    pub fn host_fired(&mut self) {
        self.armed = None;
    }

    /// The guest's TSC at which the interrupt is due, if that is what it runs by.
    #[inline]
    pub fn watched_deadline(&self) -> Option<u64> {
        (self.mode == TimerMode::TscDeadline && !self.masked && self.expiry.is_some()).then_some(self.deadline)
    }

    /// What to do with the host's timer, after [`poll`](Self::poll); the caller does it. A masked timer needs no host timer:
    /// what it would have done is found out when somebody looks. Nor does a deadline that entries wait for.
    ///
    /// While the vCPU runs, a host timer that fires too early stays as it is: that costs one exit at most, and moving it would cost as
    /// much whenever the guest sets a deadline.
    #[inline]
    pub fn update(&mut self, watch: Watch) -> TimerUpdate {
        let wanted = if self.masked || watch == Watch::Entries && self.mode == TimerMode::TscDeadline {
            None
        } else {
            self.expiry.map(|ns| ns.min(NEVER_NS))
        };
        let will_do = match (wanted, self.armed) {
            (Some(wanted), Some(armed)) => armed == wanted || armed < wanted && watch != Watch::Nobody,
            (wanted, armed) => wanted == armed,
        };
        if will_do {
            return TimerUpdate::Unchanged;
        }
        self.armed = wanted;
        wanted.map_or(TimerUpdate::Cancel, TimerUpdate::Arm)
    }
}

#[cfg(test)]
mod tests {
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
        timer.tsc_changed(&Clock { now_ns: 100, tsc: 13_000, tsc_khz: KHZ });
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

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(if cfg!(miri) { 16 } else { 2000 }) })]
        #[test]
        fn conversion_is_exact_and_never_overflows(now_ns: u64, tsc: u64, deadline: u64, tsc_khz: u32) {
            let got = Clock { now_ns, tsc, tsc_khz }.host_time_of(deadline);
            let exact = match (deadline.checked_sub(tsc), tsc_khz) {
                (None, _) => u128::from(now_ns),
                (_, 0) => u128::from(NEVER_NS),
                (Some(ticks), khz) => (u128::from(now_ns) + (u128::from(ticks) * 1_000_000).div_ceil(u128::from(khz))).min(u128::from(NEVER_NS)),
            };
            prop_assert_eq!(u128::from(got), exact);
        }

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
    }
}
