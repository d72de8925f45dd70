// SPDX-License-Identifier: GPL-2.0-only
//! The functions of `x86/helpers.c` that only x86 has.

use core::sync::atomic::{AtomicU32, Ordering};

mod raw {
    extern "C" {
        pub(super) fn axvcpu_mitigations() -> u32;
        pub(super) fn axvcpu_notification_vector() -> u32;
        pub(super) fn axvcpu_notify_posted(cpu: i32);
        pub(super) fn axvcpu_apic_steps() -> u32;
        pub(super) fn axvcpu_tsc_khz() -> u32;
        pub(super) fn axvcpu_tsc_stable() -> bool;
    }
}

/// The vector that tells a CPU of posted interrupts, if the host has one.
pub(crate) fn notification_vector() -> Option<u8> {
    // SAFETY: A constant.
    u8::try_from(unsafe { raw::axvcpu_notification_vector() }).ok().filter(|vector| *vector != 0)
}

/// Sends that vector to `cpu`, unless it is this one. From any context.
pub(crate) fn notify_posted(cpu: i32) {
    // SAFETY: The helper checks that the CPU is online.
    unsafe { raw::axvcpu_notify_posted(cpu) }
}

/// The module's parameter `apic_steps`, which is constant while it is loaded.
pub(crate) fn apic_steps() -> u8 {
    // SAFETY: Reads a variable.
    u8::try_from(unsafe { raw::axvcpu_apic_steps() }).unwrap_or(u8::MAX)
}

/// Frequency of the host's time-stamp counter, in kHz.
pub(crate) fn tsc_khz() -> u32 {
    // SAFETY: Reads a variable that is constant after boot.
    unsafe { raw::axvcpu_tsc_khz() }
}

/// Whether the host trusts its time-stamp counters to agree and not to stop.
pub(crate) fn tsc_stable() -> bool {
    // SAFETY: Reads a variable.
    unsafe { raw::axvcpu_tsc_stable() }
}

/// What the host has decided to do against speculative execution attacks by guests.
#[derive(Clone, Copy)]
pub(crate) struct Mitigations(u32);

impl Mitigations {
    /// The host's decision, which is final after boot, so it is asked for once.
    #[inline]
    pub(crate) fn of_host() -> Self {
        /// Somebody has asked.
        const KNOWN: u32 = 1 << 31;
        static DECISION: AtomicU32 = AtomicU32::new(0);
        let mut bits = DECISION.load(Ordering::Relaxed);
        if bits & KNOWN == 0 {
            // SAFETY: Reads the CPU's feature flags.
            bits = unsafe { raw::axvcpu_mitigations() } | KNOWN;
            DECISION.store(bits, Ordering::Relaxed);
        }
        Self(bits)
    }

    /// Clear the CPU's buffers before each entry.
    #[inline]
    pub(crate) fn clear_buffers(self) -> bool {
        self.0 & 1 != 0
    }

    /// Refill the return stack buffer after each exit.
    #[inline]
    pub(crate) fn refill_rsb(self) -> bool {
        self.0 >> 1 & 1 != 0
    }

    /// Untrain return predictions after each exit.
    #[inline]
    pub(crate) fn untrain_returns(self) -> bool {
        self.0 >> 2 & 1 != 0
    }

    /// Branch prediction barrier after each exit.
    #[inline]
    pub(crate) fn barrier_at_exit(self) -> bool {
        self.0 >> 3 & 1 != 0
    }

    /// Branch prediction barrier before userspace runs on a CPU that ran a guest (VMSCAPE).
    #[inline]
    pub(crate) fn barrier_before_user(self) -> bool {
        self.0 >> 4 & 1 != 0
    }
}
