// SPDX-License-Identifier: MIT OR Apache-2.0
//! The requests that KVM gets while the guest runs, for the filter of system calls; kvm-ioctls makes them, but does not tell
//! their numbers (Linux `include/uapi/linux/kvm.h`).

use kvm_bindings::{
    kvm_debugregs, kvm_interrupt, kvm_irq_routing, kvm_lapic_state, kvm_mp_state, kvm_msi, kvm_msrs, kvm_regs,
    kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave, KVMIO,
};
use nix::{request_code_none, request_code_read, request_code_readwrite, request_code_write};

use crate::sandbox::Ioctls;

/// The requests.
pub(super) const IOCTLS: Ioctls = Ioctls {
    vcpu: &[
        request_code_none!(KVMIO, 0x80) as u32, // KVM_RUN
        request_code_read!(KVMIO, 0x81, size_of::<kvm_regs>()) as u32,
        request_code_write!(KVMIO, 0x82, size_of::<kvm_regs>()) as u32,
        request_code_read!(KVMIO, 0x83, size_of::<kvm_sregs>()) as u32,
        request_code_write!(KVMIO, 0x84, size_of::<kvm_sregs>()) as u32,
        request_code_write!(KVMIO, 0x86, size_of::<kvm_interrupt>()) as u32,
        request_code_readwrite!(KVMIO, 0x88, size_of::<kvm_msrs>()) as u32,
        request_code_write!(KVMIO, 0x89, size_of::<kvm_msrs>()) as u32,
        request_code_read!(KVMIO, 0x8e, size_of::<kvm_lapic_state>()) as u32,
        request_code_write!(KVMIO, 0x8f, size_of::<kvm_lapic_state>()) as u32,
        request_code_read!(KVMIO, 0x98, size_of::<kvm_mp_state>()) as u32,
        request_code_write!(KVMIO, 0x99, size_of::<kvm_mp_state>()) as u32,
        request_code_none!(KVMIO, 0x9a) as u32, // KVM_NMI
        request_code_read!(KVMIO, 0x9f, size_of::<kvm_vcpu_events>()) as u32,
        request_code_write!(KVMIO, 0xa0, size_of::<kvm_vcpu_events>()) as u32,
        request_code_read!(KVMIO, 0xa1, size_of::<kvm_debugregs>()) as u32,
        request_code_write!(KVMIO, 0xa2, size_of::<kvm_debugregs>()) as u32,
        request_code_read!(KVMIO, 0xa4, size_of::<kvm_xsave>()) as u32,
        request_code_write!(KVMIO, 0xa5, size_of::<kvm_xsave>()) as u32,
        request_code_read!(KVMIO, 0xa6, size_of::<kvm_xcrs>()) as u32,
        request_code_write!(KVMIO, 0xa7, size_of::<kvm_xcrs>()) as u32,
    ],
    any: &[
        request_code_write!(KVMIO, 0x6a, size_of::<kvm_irq_routing>()) as u32,
        request_code_write!(KVMIO, 0xa5, size_of::<kvm_msi>()) as u32,
        request_code_none!(KVMIO, 0xce) as u32, // KVM_GET_STATS_FD
    ],
};
