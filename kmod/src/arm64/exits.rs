// SPDX-License-Identifier: GPL-2.0-only
//! The part of `RUN` that is AArch64's own: what the run page shows.

use axvcpu_uapi::{
    arm64::{PSTATE_EL0, PSTATE_MODE},
    exit::AxVCpuExitReason as Exit,
    run as abi_run,
    vcpu::ExitKind,
};
use vcpu_core::{AccessFlags, AxResult, AxVCpu, GuestPhysAddr};

use super::{TimerUpdate, VCpu};
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
pub(crate) fn enter(
    vcpu: &mut AxVCpu<VCpu, Host>,
    _go_on: impl FnMut(ExitKind, TimerUpdate) -> bool,
) -> AxResult {
    vcpu.run().map(|_| ())
}

impl Vcpu {
    /// The guest wrote `value` to the register for SGIs of `group`.
    pub(crate) fn send_ipi(&self, _inner: &Inner, value: u64, group: u64) {
        if let Some(gic) = self.vm.arch().gic.as_ref() {
            gic.send_sgi(self.shared.id as usize, value, group as u32, |cpu| self.vm.wake(cpu));
        }
    }

    /// Whether the nested page fault was an access to the interrupt controller, or a store that signals an eventfd, which is
    /// complete then.
    pub(crate) fn signals(&self, inner: &mut Inner, addr: GuestPhysAddr, access: AccessFlags, off: &IrqOff) -> bool {
        if access.contains(AccessFlags::PRESENT) {
            return false;
        }
        let Ok(arch) = inner.vcpu.arch_mut() else { return false };
        let store = |width, data| self.vm.ioeventfds.store(addr.as_u64(), width, data, off);
        arch.gic_access(addr, |cpu| self.vm.wake(cpu)) || arch.complete_store(addr, store)
    }

    /// Tells others what this vCPU has done to interrupts.
    #[inline]
    pub(crate) fn tell(&self, inner: &mut Inner, irq_off: &IrqOff) {
        let Some(notices) = inner.vcpu.arch_mut().ok().and_then(VCpu::take_notices) else { return };
        (0..64).filter(|cpu| notices.wake >> cpu & 1 != 0).for_each(|cpu| self.vm.wake(cpu));
        for intid in notices.ended() {
            // The line goes down before the device is asked whether it is to go up again.
            self.vm.irqfds.end(intid, irq_off, || _ = self.vm.set_spi(intid, false));
        }
    }

    /// There is no paravirtual clock.
    pub(crate) fn update_clock(&self, _inner: &mut Inner) {}

    /// Fills the run page for the user.
    pub(crate) fn show_exit(&self, inner: &Inner, exit: &Exit) {
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
