// SPDX-License-Identifier: GPL-2.0-only
//! The ioctls of a vCPU that AArch64 does in its own way.

use arm_vcpu::{ArmCreateConfig, ArmSetupConfig};
use axvcpu_uapi::vcpu::{Setup, SETUP_IN_KERNEL_APIC};
use kernel::prelude::*;

use super::VmState;
use crate::{
    abi,
    vcpu::{Inner, Vcpu},
};

/// Registers that `SET_GPR` knows.
pub(crate) const GENERAL_REGISTERS: u32 = 31;

/// What the backend must know of vCPU `id` to create it.
pub(crate) fn create_config(vm: &VmState, id: u32) -> ArmCreateConfig {
    ArmCreateConfig { vcpu_id: id, counter_origin: vm.counter_origin }
}

/// An ioctl of a vCPU that only AArch64 has: there is none.
///
/// # Errors
/// `ENOTTY`.
pub(crate) fn vcpu_ioctl(_vcpu: &Vcpu, _inner: &mut Inner, _cmd: u32, _arg: usize) -> Result<isize> {
    Err(ENOTTY)
}

impl Vcpu {
    /// `SETUP`.
    ///
    /// # Errors
    /// `EINVAL` for anything that only x86 has or if the vCPU has no redistributor, `ENODATA` if there is no GIC, and those of
    /// the state machine.
    pub(crate) fn setup(&self, inner: &mut Inner, arg: Setup) -> Result<isize> {
        abi::must_be_zero(&[(arg.flags & !SETUP_IN_KERNEL_APIC).into(), arg.cpuid_count.into(), arg.cpuid_addr])?;
        abi::must_be_zero(&arg.reserved)?;
        let takes_part = arg.flags & SETUP_IN_KERNEL_APIC != 0;
        let gic = match (takes_part, self.vm.arch().gic.as_ref()) {
            (true, None) => return Err(ENODATA),
            (true, gic) => gic.cloned(),
            (false, _) => None,
        };
        inner.vcpu.setup(ArmSetupConfig { gic }).map_err(abi::errno)?;
        inner.in_kernel_apic = takes_part;
        self.publish(inner);
        Ok(0)
    }
}
