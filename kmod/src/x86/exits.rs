// SPDX-License-Identifier: GPL-2.0-only
//! The part of `RUN` that is x86's own: inter-processor interrupts through the local APIC, writes that need no decoding, and
//! what the run page shows.

use axvcpu_uapi::{exit::AxVCpuExitReason as Exit, run as abi_run, vcpu::ExitKind};
use kernel::prelude::*;
use vcpu_core::{AccessFlags, AccessWidth, AxResult, AxVCpu, GuestPhysAddr};
use x86_vcpu::{
    apic::{Message, TimerUpdate},
    HostInterrupt, PageFault, Turns,
};

use super::VCpu;
use crate::{
    abi,
    aspace::Fault,
    ffi::IrqOff,
    hal::Host,
    run::{self, Between},
    vcpu::{Inner, Vcpu},
};

/// One entry, and more behind exits that concern nobody but the vCPU or that `between` deals with. Gives the kind of the last exit.
///
/// # Errors
/// As [`AxVCpu::run`].
#[inline]
pub(crate) fn enter(vcpu: &mut AxVCpu<VCpu, Host>, between: &mut Between<'_>) -> AxResult<ExitKind> {
    vcpu.run_by(|arch, entries, exit| arch.run_while(exit, &mut Entries { between, entries }))?;
    Ok(vcpu.arch()?.exit_kind())
}

/// One window, with interrupts off from beginning to end: so no softirq can come between that would have to be kept from using the
/// FPU, and what interrupts do is done with all of the host's state in place. The first may be one that an exit has taken from
/// the local APIC.
///
/// # Errors
/// Those of binding and unbinding, and of `turns`.
pub(crate) fn in_window<T>(inner: &mut Inner, turns: impl FnOnce(&mut Inner, &IrqOff) -> Result<T>) -> Result<T> {
    let irq_off = IrqOff::new();
    inner.vcpu.bind().map_err(abi::errno)?;
    let result = turns(inner, &irq_off);
    let unbound = inner.vcpu.unbind().map_err(abi::errno);
    match HostInterrupt::take::<Host>() {
        // SAFETY: Interrupts are off and can go on, as the vCPU is unbound and with that has given back the host's state; a host
        // without an IDT has no such interrupts.
        Some(interrupt) => irq_off.end_by(|| unsafe { interrupt.deliver() }),
        None => drop(irq_off),
    }
    let result = result?;
    unbound?;
    Ok(result)
}

/// Makes everything known that the run page shows after an exit at an address that is no memory.
///
/// # Errors
/// As [`VCpu::synchronize`].
pub(crate) fn show_all(inner: &mut Inner) -> AxResult {
    inner.vcpu.arch_mut()?.synchronize()
}

/// Entries in a row, and their number.
struct Entries<'a, 'b> {
    between: &'a mut Between<'b>,
    entries: &'a mut u64,
}

impl Turns for Entries<'_, '_> {
    #[inline(always)] // At each exit.
    fn go_on(&mut self, kind: ExitKind, timer: TimerUpdate) -> bool {
        run::follow(self.between.timer, timer);
        let again = self.between.may_go_on(kind);
        *self.entries = self.entries.wrapping_add(again.into());
        again
    }

    #[inline]
    fn port_write(&mut self, port: u16, width: AccessWidth, data: u64) -> bool {
        self.between.vm.ioeventfds.port_write(port, width, data, self.between.irq_off)
    }

    #[inline]
    fn page_fault(
        &mut self,
        addr: GuestPhysAddr,
        access: AccessFlags,
        skip_store: impl FnOnce() -> bool,
    ) -> PageFault {
        let written = access.contains(AccessFlags::WRITE) && !access.contains(AccessFlags::PAGE_WALK);
        let Between { vm, irq_off, .. } = *self.between;
        if written && vm.ioeventfds.memory_write(addr.as_u64(), irq_off, skip_store) {
            return PageFault::Over(ExitKind::Mmio);
        }
        match self.between.fault(addr, access) {
            Some(Fault::Resolved) => PageFault::Over(ExitKind::PageFault),
            Some(Fault::NotMemory) => PageFault::User,
            None => PageFault::Later,
        }
    }
}

impl Vcpu {
    /// The guest wrote its interrupt command register.
    pub(crate) fn send_ipi(&self, inner: &Inner, destination: u64, command: u64) {
        let Ok(arch) = inner.vcpu.arch() else { return };
        if let Some(message) = Message::from_icr(destination << 32 | command & 0xffff_ffff, true) {
            self.vm.route(&message, Some(arch.apic_id()));
        }
    }

    /// Tells others what this vCPU has done to interrupts: here exits do.
    #[inline]
    pub(crate) fn tell(&self, _inner: &mut Inner, _irq_off: &IrqOff) {}

    /// After an access to the local APIC by ioctl: what the registers set in motion.
    pub(crate) fn after_apic(&self, inner: &mut Inner) {
        self.set_timer(inner);
        let Ok(arch) = inner.vcpu.arch_mut() else { return };
        if let Some((destination, command)) = arch.take_ipi() {
            self.send_ipi(inner, destination, command);
        }
    }

    /// Fills the run page for the user.
    pub(crate) fn show_exit(&self, inner: &Inner, exit: &Exit) {
        let page = &self.page;
        page.set_exit(exit.encode());
        let Ok(arch) = inner.vcpu.arch() else { return };
        let mut state = 0;
        if arch.interrupt_window_open() {
            state |= abi_run::STATE_INTERRUPT_WINDOW_OPEN;
        }
        if arch.user_mode() {
            state |= abi_run::STATE_USER_MODE;
        }
        let (rip, rflags) = arch.each_gpr(|register, value| page.set_gpr(register, value));
        page.set_rip(rip);
        page.set_rflags(rflags);
        if matches!(exit, Exit::NestedPageFault { .. } | Exit::IoString { .. }) {
            page.set_control(arch.control());
            page.set_segments(arch.segments());
            let insn = arch.insn_info();
            page.set_insn(insn.bytes);
            page.set_insn_len(insn.len.into());
            page.set_next_rip(insn.next_rip);
            state |= abi_run::STATE_SNAPSHOT_VALID;
        }
        page.set_state(state);
    }
}
