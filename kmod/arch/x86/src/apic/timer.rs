// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The APIC timer: one-shot, periodic and TSC-deadline (SDM vol. 3 section 12.5.4), over the host's nanoseconds and the
//! guest's TSC. It decides when the host's timer must fire; it never starts one itself.
//!
//! The counter is driven at 1 GHz before division, so one count is `divisor` nanoseconds. Guests measure this frequency or are
//! told by the VMM.

use super::clock::{Clock, NEVER_NS};

/// The shortest period of a periodic timer, in nanoseconds: a guest that asks for less gets this, so that no guest can storm
/// the host with timer interrupts it need not even handle. One-shot timers need no bound: each shot costs the guest an exit.
pub const MIN_PERIOD_NS: u64 = 200_000;

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
    /// The estimate is that of a deadline before this one: too early.
    postponed: bool,
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
        Self {
            mode: TimerMode::OneShot,
            masked: true,
            initial: 0,
            divide: 0,
            deadline: 0,
            expiry: None,
            postponed: false,
            armed: None,
        }
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
                    if expiry <= clock.now_ns || self.postponed {
                        self.estimate(clock);
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
            self.postponed = false;
        }
    }

    /// Writes IA32_TSC_DEADLINE while the TSC is `tsc`, if that only moves a deadline that is ahead further away: then the estimate
    /// of when the timer expires may stay, which is early, and the clocks need not be read nor converted. Whether that was it.
    /// Nothing has happened before, and nothing is due.
    #[inline]
    pub fn postpone(&mut self, deadline: u64, tsc: u64) -> bool {
        let ahead = self.mode == TimerMode::TscDeadline && self.expiry.is_some() && tsc < self.deadline;
        if !ahead || deadline < self.deadline {
            return false;
        }
        self.deadline = deadline;
        self.postponed = true;
        true
    }

    /// Whether the estimate of when the timer expires is known to be early.
    #[inline]
    pub fn is_postponed(&self) -> bool {
        self.postponed
    }

    /// Estimates when a timer that waits for a deadline expires: anew if the deadline was [postponed](Self::postpone), or if the
    /// guest's TSC was changed by other means than passing, so that the deadline lies elsewhere now.
    pub fn estimate(&mut self, clock: &Clock) {
        self.postponed = false;
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
mod tests;
