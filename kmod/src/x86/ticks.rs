// SPDX-License-Identifier: GPL-2.0-only
//! The clock for lengths of time: the TSC, where the host trusts it when the module is loaded. Otherwise there is none but the
//! monotonic clock.

use core::sync::atomic::{AtomicU64, Ordering};

use super::ffi;

/// Nanoseconds of a tick, with 32 bits behind the point. 0 if there is no clock.
static NS_PER_TICK: AtomicU64 = AtomicU64::new(0);

/// Looks for the clock. To be called once, before any vCPU exists.
pub(super) fn start() {
    // A tick of a kHz has 10^6 ns, which take 20 bits.
    let scale = (1_000_000u64 << 32).checked_div(ffi::tsc_khz().into()).filter(|_| ffi::tsc_stable());
    NS_PER_TICK.store(scale.unwrap_or(0), Ordering::Relaxed);
}

/// The clock, if there is one.
#[inline]
pub(crate) fn ticks() -> Option<u64> {
    (NS_PER_TICK.load(Ordering::Relaxed) != 0).then(x86_vcpu::read_tsc)
}

/// The nanoseconds of a number of ticks, which are nanoseconds already if there is no clock.
#[inline]
pub(crate) fn ticks_to_ns(ticks: u64) -> u64 {
    match NS_PER_TICK.load(Ordering::Relaxed) {
        0 => ticks,
        scale => (u128::from(ticks).wrapping_mul(scale.into()) >> 32) as u64,
    }
}
