// SPDX-License-Identifier: GPL-2.0-only
//! What `/dev/axvcpu` tells of an AArch64 host, and what a VM has that is its own: when its counter started.

use arm_vcpu::Capabilities;
use axvcpu_uapi::system::{
    SystemInfo, ARCH_AARCH64, BACKEND_NONE, BACKEND_VHE, FEATURE_DIRTY_LOG, FEATURE_HUGE_2M, STATUS_HOST_NOT_AT_EL2, STATUS_READY,
    STATUS_TOO_OLD,
};
use kernel::prelude::*;
use vcpu_core::{AxError, AxResult};

use crate::vm::Vm;

/// An ioctl of the device that only AArch64 has: there is none.
///
/// # Errors
/// `ENOTTY`.
pub(crate) fn system_ioctl(_cmd: u32, _arg: usize) -> Result<isize> {
    Err(ENOTTY)
}

/// Whether vCPUs can run now. KVM beside us is no hindrance.
///
/// # Errors
/// Why not.
pub(crate) fn usable() -> AxResult {
    arm_vcpu::detect()
}

/// Adds what there is to say of the host and its backend.
pub(crate) fn describe(info: SystemInfo) -> SystemInfo {
    let info = SystemInfo { arch: ARCH_AARCH64, tsc_khz: arm_vcpu::counter_khz(), ..info };
    match Capabilities::host() {
        Ok(caps) => SystemInfo {
            backend: BACKEND_VHE,
            status: STATUS_READY,
            features: FEATURE_HUGE_2M | FEATURE_DIRTY_LOG,
            guest_phys_bits: caps.shape.bits(),
            ..info
        },
        Err(AxError::NoHardware) => SystemInfo { backend: BACKEND_NONE, status: STATUS_HOST_NOT_AT_EL2, ..info },
        Err(_) => SystemInfo { backend: BACKEND_VHE, status: STATUS_TOO_OLD, ..info },
    }
}

/// What a VM keeps: the host's counter when the guest's was 0.
pub(crate) struct VmState {
    pub(crate) counter_origin: u64,
}

/// The state of a new VM.
pub(crate) fn new_vm() -> VmState {
    VmState { counter_origin: arm_vcpu::counter() }
}

/// An ioctl of a VM that only AArch64 has: there is none.
///
/// # Errors
/// `ENOTTY`.
pub(crate) fn vm_ioctl(_vm: &Vm, _cmd: u32, _arg: usize) -> Result<isize> {
    Err(ENOTTY)
}

/// An interrupt message. There is none: no interrupt controller is in the kernel that would take it.
pub(crate) struct Message {
    pub(crate) vector: u8,
    pub(crate) level: bool,
}

impl Message {
    /// # Errors
    /// `Unsupported`, always.
    pub(crate) fn from_msi(_address: u64, _data: u32) -> AxResult<Self> {
        Err(AxError::Unsupported)
    }
}

impl Vm {
    /// Nobody takes messages.
    pub(crate) fn route(&self, _message: &Message, _sender: Option<u32>) -> bool {
        false
    }
}
