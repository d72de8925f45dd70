// SPDX-License-Identifier: GPL-2.0-only
//! The host as the x86 backends see it.

use core::ptr::NonNull;

use x86_vcpu::{Mitigations, PermissionMaps, X86Hal, X86PerCpu};

use super::{backends, ffi};
use crate::{hal::Host, percpu};

impl X86Hal for Host {
    fn per_cpu() -> NonNull<X86PerCpu<Self>> {
        percpu::current()
    }

    fn svm_maps() -> Option<&'static PermissionMaps<Self>> {
        backends::svm_maps()
    }

    fn tsc_khz() -> u32 {
        ffi::tsc_khz()
    }

    fn apic_steps() -> u8 {
        ffi::apic_steps()
    }

    fn notification_vector() -> Option<u8> {
        ffi::notification_vector()
    }

    fn mitigations() -> Mitigations {
        Mitigations::new(ffi::host_flags(), ffi::l1d_flush())
    }
}
