// SPDX-License-Identifier: MIT OR Apache-2.0
//! The requests that KVM gets while the guest runs, for the filter of system calls; kvm-ioctls makes them, but does not tell
//! their numbers (Linux `include/uapi/linux/kvm.h`).

use kvm_bindings::{kvm_irq_level, kvm_one_reg, KVMIO};
use nix::{request_code_none, request_code_write};

use crate::sandbox::Ioctls;

/// The requests.
pub(super) const IOCTLS: Ioctls = Ioctls {
    vcpu: &[
        request_code_none!(KVMIO, 0x80) as u32,                            // KVM_RUN
        request_code_write!(KVMIO, 0xab, size_of::<kvm_one_reg>()) as u32, // KVM_GET_ONE_REG
        request_code_write!(KVMIO, 0xac, size_of::<kvm_one_reg>()) as u32, // KVM_SET_ONE_REG
    ],
    any: &[
        request_code_write!(KVMIO, 0x61, size_of::<kvm_irq_level>()) as u32,
        request_code_none!(KVMIO, 0xce) as u32, // KVM_GET_STATS_FD
    ],
};
