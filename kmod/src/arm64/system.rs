// SPDX-License-Identifier: GPL-2.0-only
//! What `/dev/axvcpu` tells of an AArch64 host.

use arm_vcpu::Capabilities;
use axvcpu_uapi::system::{
    SystemInfo, ARCH_AARCH64, BACKEND_NONE, BACKEND_VHE, FEATURE_DIRTY_LOG, FEATURE_EVENTFD, FEATURE_HUGE_2M,
    FEATURE_IN_KERNEL_APIC, STATUS_HOST_NOT_AT_EL2, STATUS_READY, STATUS_TOO_OLD,
};
use kernel::prelude::*;
use vcpu_core::{AxError, AxResult};

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
    super::detect()
}

/// Adds what there is to say of the host and its backend.
pub(crate) fn describe(info: SystemInfo) -> SystemInfo {
    let info = SystemInfo { arch: ARCH_AARCH64, tsc_khz: arm_vcpu::counter_khz(), ..info };
    match super::detect().and_then(|()| Capabilities::host()) {
        Ok(caps) => SystemInfo {
            backend: BACKEND_VHE,
            status: STATUS_READY,
            features: FEATURE_IN_KERNEL_APIC | FEATURE_HUGE_2M | FEATURE_EVENTFD | FEATURE_DIRTY_LOG,
            guest_phys_bits: caps.shape.bits(),
            ..info
        },
        Err(AxError::NoHardware) => SystemInfo { backend: BACKEND_NONE, status: STATUS_HOST_NOT_AT_EL2, ..info },
        Err(_) => SystemInfo { backend: BACKEND_VHE, status: STATUS_TOO_OLD, ..info },
    }
}
