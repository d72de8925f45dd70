// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! What the x86 backends ask of the kernel beyond [`AxVCpuHal`].

use core::ptr::NonNull;

use vcpu_core::AxVCpuHal;

use crate::mitigations::Mitigations;
use crate::percpu::X86PerCpu;
use crate::svm::PermissionMaps;

/// Services of an x86 host.
pub trait X86Hal: AxVCpuHal {
    /// This CPU's record. Called with preemption off; the record stays where it is, and only this CPU uses it, until
    /// preemption is on again.
    fn per_cpu() -> NonNull<X86PerCpu<Self>>;

    /// The permission maps that every vCPU on SVM uses, if there is SVM. They outlive the last vCPU.
    fn svm_maps() -> Option<&'static PermissionMaps<Self>>;

    /// Frequency of the time-stamp counter, in kHz; not 0.
    fn tsc_khz() -> u32;

    /// How many of the steps in which the CPU can take the local APIC off our hands may be taken, if it has them: 0 none, 1 the
    /// task priority, 2 also the delivery of interrupts, 3 also interrupts posted by other CPUs.
    fn apic_steps() -> u8 {
        u8::MAX
    }

    /// The vector that tells a CPU of interrupts posted to the vCPU that it runs, if the host has one. The host's handler of it
    /// does nothing.
    fn notification_vector() -> Option<u8> {
        None
    }

    /// What is to be done against speculative execution attacks. Asked for when a CPU's record is made.
    fn mitigations() -> Mitigations {
        Mitigations::default()
    }
}
