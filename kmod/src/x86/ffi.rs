// SPDX-License-Identifier: GPL-2.0-only
//! The functions of `x86/helpers.c` that only x86 has.

use x86_vcpu::HostFlags;

mod raw {
    extern "C" {
        pub(super) fn axvcpu_host_flags() -> u32;
        pub(super) fn axvcpu_l1d_flush() -> u32;
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

/// What the host's kernel knows of its CPU and has decided against speculative execution attacks.
pub(crate) fn host_flags() -> HostFlags {
    // SAFETY: Reads the CPU's feature flags.
    HostFlags(unsafe { raw::axvcpu_host_flags() })
}

/// The module's parameter `l1d_flush`, which is constant while it is loaded.
pub(crate) fn l1d_flush() -> u32 {
    // SAFETY: Reads a variable.
    unsafe { raw::axvcpu_l1d_flush() }
}
