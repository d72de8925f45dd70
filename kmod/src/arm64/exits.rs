// SPDX-License-Identifier: GPL-2.0-only
//! The part of `RUN` that is AArch64's own: what the run page shows.

use axvcpu_uapi::{
    arm64::{PSTATE_EL0, PSTATE_MODE},
    exit::AxVCpuExitReason as Exit,
    run as abi_run,
    vcpu::ExitKind,
};
use vcpu_core::{AccessFlags, AxResult, AxVCpu, GuestPhysAddr};

use super::VCpu;
use crate::{
    ffi::IrqOff,
    hal::Host,
    vcpu::{Inner, Vcpu},
};

/// One entry: every exit is looked at by the caller.
///
/// # Errors
/// As [`AxVCpu::run`].
#[inline]
pub(crate) fn enter(vcpu: &mut AxVCpu<VCpu, Host>, _go_on: impl FnMut(ExitKind) -> bool) -> AxResult<Exit> {
    vcpu.run()
}

impl Vcpu {
    /// Interrupts between vCPUs would be an interrupt controller's, which is not in the kernel.
    pub(crate) fn send_ipi(&self, _inner: &Inner, _target: u64, _vector: u64) {}

    /// Writes come with what the guest has written, to be matched by the user.
    pub(crate) fn signals(&self, _inner: &mut Inner, _addr: GuestPhysAddr, _access: AccessFlags, _off: &IrqOff) -> bool {
        false
    }

    /// There is no paravirtual clock.
    pub(crate) fn update_clock(&self, _inner: &mut Inner) {}

    /// Fills the run page for the user.
    pub(crate) fn show_exit(&self, inner: &mut Inner, exit: &Exit) {
        let page = &self.page;
        page.set_exit(exit.encode());
        let Ok(arch) = inner.vcpu.arch() else { return };
        let general = arch.general();
        let user = general.pstate & PSTATE_MODE == PSTATE_EL0;
        page.set_state(if user { abi_run::STATE_USER_MODE } else { 0 });
        page.set_general(general);
        let (esr, far) = arch.syndrome();
        page.set_esr(esr);
        page.set_far(far);
    }
}
