// SPDX-License-Identifier: GPL-2.0-only
//! The part of `RUN` that is x86's own: inter-processor interrupts through the local APIC, writes that need no decoding, and
//! what the run page shows.

use axvcpu_uapi::{exit::AxVCpuExitReason as Exit, run as abi_run, vcpu::ExitKind};
use vcpu_core::{AccessFlags, AxResult, AxVCpu, GuestPhysAddr};
use x86_vcpu::apic::{Message, TimerUpdate};

use super::VCpu;
use crate::{
    ffi::IrqOff,
    hal::Host,
    vcpu::{Inner, Vcpu},
};

/// One entry, and more behind exits that concern nobody but the vCPU, as long as `go_on` agrees, which is told their kind and does what
/// the timer is to do.
///
/// # Errors
/// As [`AxVCpu::run`].
#[inline]
pub(crate) fn enter(
    vcpu: &mut AxVCpu<VCpu, Host>,
    mut go_on: impl FnMut(ExitKind, TimerUpdate) -> bool,
) -> AxResult {
    vcpu.run_by(|arch, entries, exit| {
        arch.run_while(exit, |mut step| {
            let again = go_on(step.kind(), step.timer_update());
            *entries = entries.wrapping_add(again.into());
            again
        })
    })
}

impl Vcpu {
    /// The guest wrote its interrupt command register.
    pub(crate) fn send_ipi(&self, inner: &Inner, destination: u64, command: u64) {
        let Ok(arch) = inner.vcpu.arch() else { return };
        if let Some(message) = Message::from_icr(destination << 32 | command & 0xffff_ffff, true) {
            self.vm.route(&message, Some(arch.apic_id()));
        }
    }

    /// Whether the nested page fault was a write that signals an eventfd, and that is complete with that.
    #[inline]
    pub(crate) fn signals(&self, inner: &mut Inner, addr: GuestPhysAddr, access: AccessFlags, off: &IrqOff) -> bool {
        let written = access.contains(AccessFlags::WRITE) && !access.contains(AccessFlags::PAGE_WALK);
        let complete = || inner.vcpu.arch_mut().is_ok_and(VCpu::skip_store);
        written && self.vm.ioeventfds.memory_write(addr.as_u64(), off, complete)
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
