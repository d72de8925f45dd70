// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The virtual timer, CNTV (Arm ARM D12.2): when it asks for its interrupt.

/// CNTV_CTL_EL0.ENABLE.
pub const ENABLE: u64 = 1 << 0;
/// CNTV_CTL_EL0.IMASK.
pub const IMASK: u64 = 1 << 1;

/// The timer's registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timer {
    /// CNTV_CTL_EL0.
    pub control: u64,
    /// CNTV_CVAL_EL0.
    pub compare: u64,
}

impl Timer {
    /// Whether it is to interrupt at some time.
    #[inline]
    pub fn is_armed(self) -> bool {
        self.control & (ENABLE | IMASK) == ENABLE
    }

    /// Whether it asks for its interrupt when the guest's counter stands at `now`.
    #[inline]
    pub fn is_due(self, now: u64) -> bool {
        self.is_armed() && self.compare <= now
    }

    /// Nanoseconds until the guest's counter, which stands at `now` and counts `hertz` times in a second, is where the timer
    /// waits for. As many as there can be if that is too far, or the counter stands still.
    pub fn delay_ns(self, now: u64, hertz: u64) -> u64 {
        const SECOND: u64 = 1_000_000_000;
        let ticks = self.compare.saturating_sub(now);
        // In two parts, since the product would not fit. Rounded up: an expiry that is early would have to be repeated.
        let (Some(seconds), Some(rest)) = (ticks.checked_div(hertz), ticks.checked_rem(hertz)) else { return u64::MAX };
        let fraction = rest.checked_mul(SECOND).map_or(SECOND, |rest| rest.div_ceil(hertz));
        seconds.saturating_mul(SECOND).saturating_add(fraction)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn due_when_it_is_on_and_the_counter_is_there() {
        for (control, compare, due) in
            [(1, 100, true), (1, 101, false), (0, 100, false), (3, 100, false), (2, 0, false), (5, 0, true)]
        {
            assert_eq!(Timer { control, compare }.is_due(100), due, "{control} {compare}");
        }
    }

    #[test]
    fn delays_are_rounded_up_and_never_wrap() {
        let timer = |compare| Timer { control: 1, compare };
        assert_eq!(timer(100).delay_ns(100, 62_500_000), 0);
        assert_eq!(timer(100).delay_ns(200, 62_500_000), 0);
        assert_eq!(timer(101).delay_ns(100, 62_500_000), 16);
        assert_eq!(timer(101).delay_ns(100, 3_000_000_000), 1);
        assert_eq!(timer(u64::MAX).delay_ns(0, 24_000_000), u64::MAX);
        assert_eq!(timer(5).delay_ns(0, 0), u64::MAX);
    }
}
