// SPDX-License-Identifier: GPL-2.0-only
//! The part of `RUN` that is AArch64's own: SGIs, accesses to the interrupt controller, and what the run page shows.

use axvcpu_uapi::{
    arm64::{PSTATE_EL0, PSTATE_MODE},
    exit::AxVCpuExitReason as Exit,
    run as abi_run,
    vcpu::ExitKind,
};
use kernel::prelude::*;
use vcpu_core::{AccessFlags, AxResult, AxVCpu};

use super::VCpu;
use crate::{
    abi,
    aspace::Fault,
    ffi::{IrqOff, PreemptOff},
    hal::Host,
    run::{self, Between},
    shared::Shared,
    vcpu::{Inner, Vcpu},
    vm::Vm,
};

/// One entry, and more behind exits that concern nobody but the vCPU, and what is done about a nested page fault. Gives the kind of the
/// last exit.
///
/// # Errors
/// As [`AxVCpu::run`].
#[inline]
pub(crate) fn enter(vcpu: &mut AxVCpu<VCpu, Host>, between: &mut Between<'_>) -> AxResult<ExitKind> {
    vcpu.run_by(|arch, entries, exit| loop {
        arch.run_into(exit)?;
        if !matches!(exit, Exit::Nothing) || !arch.concerns_nobody() {
            return Ok(());
        }
        run::follow(between.timer, arch.timer_update());
        if !between.may_go_on(arch.exit_kind()) {
            return Ok(());
        }
        *entries = entries.wrapping_add(1);
    })?;
    let Exit::NestedPageFault { addr, access_flags } = *vcpu.exit() else {
        return Ok(vcpu.arch()?.exit_kind());
    };
    let Between { vm, irq_off, .. } = *between;
    // An access to the interrupt controller, or a store that signals an eventfd, is complete then.
    let is_device = !access_flags.contains(AccessFlags::PRESENT) && {
        let own = between.shared;
        let arch = vcpu.arch_mut()?;
        let store = |width, data| vm.ioeventfds.store(addr.as_u64(), width, data, irq_off);
        arch.gic_access(addr, |cpu| wake(vm, own, cpu)) || arch.complete_store(store)
    };
    let kind = if is_device {
        Some(ExitKind::Mmio)
    } else {
        matches!(between.fault(addr, access_flags), Some(Fault::Resolved)).then_some(ExitKind::PageFault)
    };
    if kind.is_some() {
        vcpu.settle();
    }
    Ok(kind.unwrap_or(ExitKind::PageFault))
}

/// vCPU `cpu` must look at its interrupts. If that is `own`, whose thread does this, it is enough to say so: it looks before its next
/// entry, and before it sleeps.
fn wake(vm: &Vm, own: &Shared, cpu: usize) {
    if cpu == own.id as usize {
        own.mailbox.post();
    } else {
        vm.wake(cpu);
    }
}

/// One window. Interrupts are off only while the guest has the CPU: the kernel lends the FPU with interrupts on only.
///
/// # Errors
/// Those of binding and unbinding, and of `turns`.
pub(crate) fn in_window<T>(inner: &mut Inner, turns: impl FnOnce(&mut Inner, &IrqOff) -> Result<T>) -> Result<T> {
    let pinned = PreemptOff::new();
    inner.vcpu.bind().map_err(abi::errno)?;
    let irq_off = IrqOff::new();
    let result = turns(inner, &irq_off);
    drop(irq_off);
    let unbound = inner.vcpu.unbind().map_err(abi::errno);
    drop(pinned);
    let result = result?;
    unbound?;
    Ok(result)
}

/// Makes everything known that the run page shows after an exit at an address that is no memory: it is already.
///
/// # Errors
/// None.
pub(crate) fn show_all(_inner: &mut Inner) -> AxResult {
    Ok(())
}

impl Vcpu {
    /// The guest wrote `value` to the register for SGIs of `group`.
    pub(crate) fn send_ipi(&self, _inner: &Inner, value: u64, group: u64) {
        if let Some(gic) = self.vm.arch().gic.as_ref() {
            gic.send_sgi(self.shared.id as usize, value, group as u32, |cpu| wake(&self.vm, &self.shared, cpu));
        }
    }

    /// Tells others what this vCPU has done to interrupts.
    #[inline]
    pub(crate) fn tell(&self, inner: &mut Inner, irq_off: &IrqOff) {
        let Ok(arch) = inner.vcpu.arch_mut() else { return };
        // A line goes down before the device is asked whether it is to go up again.
        let end = |intid| _ = self.vm.irqfds.end(intid, irq_off, || _ = self.vm.set_spi(intid, false));
        let told = arch.tell(end);
        if told != 0 {
            (0..64).filter(|cpu| told >> cpu & 1 != 0).for_each(|cpu| wake(&self.vm, &self.shared, cpu));
        }
    }

    /// There is no paravirtual clock.
    pub(crate) fn update_clock(&self, _inner: &mut Inner) {}

    /// Fills the run page for the user.
    pub(crate) fn show_exit(&self, inner: &Inner, exit: &Exit) {
        let page = &self.page;
        page.set_exit(exit.encode());
        let Ok(arch) = inner.vcpu.arch() else { return };
        let (general, pstate) = arch.general_as_left();
        let user = pstate & PSTATE_MODE == PSTATE_EL0;
        page.set_state(if user { abi_run::STATE_USER_MODE } else { 0 });
        page.set_general(general, pstate);
        let (esr, far) = arch.syndrome();
        page.set_esr(esr);
        page.set_far(far);
    }
}
