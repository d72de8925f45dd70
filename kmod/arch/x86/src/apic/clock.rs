// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The clocks that a local APIC is shown, and the host's time at which the guest's TSC will reach a value.

/// The latest time that Linux's high-resolution timers take (`KTIME_MAX`).
pub(super) const NEVER_NS: u64 = i64::MAX as u64;

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
    pub(super) fn host_time_of(&self, deadline: u64) -> u64 {
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

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
    }
}
