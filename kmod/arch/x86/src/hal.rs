// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! What the x86 backends ask of the kernel beyond [`AxVCpuHal`].

use core::ptr::NonNull;

use vcpu_core::AxVCpuHal;

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

    /// What the world switch must do against speculative execution attacks, as the host has decided for itself.
    fn mitigations() -> Mitigations {
        Mitigations::default()
    }
}

/// Measures against speculative execution attacks. The default is all that a host need not know of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mitigations {
    /// Clear the CPU's buffers by VERW before each entry (Linux: `X86_FEATURE_CLEAR_CPU_BUF_VM`).
    pub clear_buffers: bool,
    /// Refill the return stack buffer after each exit (Linux: `X86_FEATURE_RSB_VMEXIT`).
    pub refill_rsb: bool,
    /// Indirect branch prediction barrier when a CPU goes from one vCPU to another (Linux: `switch_vcpu_ibpb`).
    pub branch_barrier: bool,
    /// Make the CPU forget return predictions that the guest has trained, after each exit, by the kernel's own
    /// `entry_untrain_ret` (Linux: `X86_FEATURE_UNRET`). Not part of the default, as the routine exists only where it is needed.
    pub untrain_returns: bool,
    /// Indirect branch prediction barrier after each exit (Linux: `X86_FEATURE_IBPB_ON_VMEXIT`).
    pub barrier_at_exit: bool,
    /// Indirect branch prediction barrier before userspace runs on a CPU that ran a guest (Linux: `X86_FEATURE_IBPB_EXIT_TO_USER`).
    pub barrier_before_user: bool,
}

impl Default for Mitigations {
    fn default() -> Self {
        Self {
            clear_buffers: true,
            refill_rsb: true,
            branch_barrier: true,
            untrain_returns: false,
            barrier_at_exit: false,
            barrier_before_user: false,
        }
    }
}
