// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The guest's clocks and its local APIC: here or userspace's, what entries ask of it, and what has been posted to it.

use vcpu_core::{AxError, AxResult, AxVCpuExitReason};

use super::{Guest, Registers};
use crate::apic::{Clock, Effect, Lapic, Mailbox, TimerUpdate, Watch};
use crate::cpu;
use crate::events::Activity;
use crate::hal::X86Hal;

/// IA32_APIC_BASE: boot processor.
const APIC_BASE_BSP: u64 = 1 << 8;

/// IA32_APIC_BASE of a vCPU that has been reset and whose local APIC is userspace's.
pub(super) const fn base_at_reset(vcpu_id: u32) -> u64 {
    0xfee0_0800 | if vcpu_id == 0 { APIC_BASE_BSP } else { 0 }
}

/// Whether userspace's local APIC can have this IA32_APIC_BASE: no reserved bits, and x2APIC mode only when enabled.
fn apic_base_valid(value: u64) -> bool {
    const EXTD: u64 = 1 << 10;
    const EN: u64 = 1 << 11;
    let reserved = !(0x000f_ffff_ffff_f000 | APIC_BASE_BSP | EXTD | EN);
    value & reserved == 0 && value & (EXTD | EN) != EXTD
}

/// What the local APIC has for an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ApicView {
    /// The interrupt that it would deliver.
    pub(crate) vector: Option<u8>,
    /// An interrupt waits for the task priority to fall.
    pub(crate) blocked_by_priority: bool,
    /// It lets interrupts of userspace's 8259 through.
    pub(crate) accepts_pic: bool,
    /// The task priority, as in CR8.
    pub(crate) cr8: u8,
}

/// The clocks, of a guest whose TSC is `offset` ahead of the host's.
fn clock<H: X86Hal>(offset: u64) -> Clock {
    Clock { now_ns: H::now_ns(), tsc: cpu::rdtsc().wrapping_add(offset), tsc_khz: H::tsc_khz() }
}

impl<H: X86Hal> Guest<H> {
    /// The guest's TSC.
    pub(crate) fn tsc(&self) -> u64 {
        cpu::rdtsc().wrapping_add(self.tsc_offset)
    }

    /// Calls `f` with the local APIC and a reader of the clocks.
    #[inline]
    pub(crate) fn with_lapic<T>(&mut self, f: impl FnOnce(&mut Lapic<H>, &dyn Fn() -> Clock) -> T) -> Option<T> {
        let offset = self.tsc_offset;
        self.lapic_mut().map(|lapic| f(lapic, &|| clock::<H>(offset)))
    }

    /// The local APIC, if it is here.
    pub(crate) fn lapic(&self) -> Option<&Lapic<H>> {
        self.lapic.as_ref()
    }

    /// The local APIC, to be changed.
    pub(crate) fn lapic_mut(&mut self) -> Option<&mut Lapic<H>> {
        self.apic_view = None;
        self.published = false;
        self.lapic.as_mut()
    }

    /// The local APIC, for the hardware to be told of it, which changes nothing.
    #[inline]
    pub(crate) fn lapic_for_hardware(&mut self) -> Option<&mut Lapic<H>> {
        self.lapic.as_mut()
    }

    /// The hardware has changed, or may have, what entries ask of the local APIC.
    #[inline]
    pub(crate) fn apic_changed(&mut self) {
        self.apic_view = None;
    }

    /// What the local APIC has for an entry.
    #[inline]
    pub(crate) fn apic_view(&mut self) -> ApicView {
        match self.apic_view {
            Some(view) => view,
            None => self.look_at_apic(),
        }
    }

    fn look_at_apic(&mut self) -> ApicView {
        let request = self.lapic().and_then(Lapic::highest_request);
        let vector = request.filter(|&vector| self.lapic().is_some_and(|lapic| lapic.is_deliverable(vector)));
        let view = ApicView {
            vector,
            blocked_by_priority: request.is_some() && vector.is_none(),
            accepts_pic: self.accepts_pic_interrupt(),
            cr8: self.cr8(),
        };
        self.apic_view = Some(view);
        view
    }

    /// What the host's timer is to do for the local APIC's. `watched` is
    /// [`watches_deadline`](crate::backend::Backend::watches_deadline). A vCPU that sleeps makes no entries that could wait for
    /// anything.
    #[inline]
    pub(crate) fn timer_update(&mut self, watched: bool) -> TimerUpdate {
        let watch = match self.events.activity() {
            Activity::Running if watched => Watch::Entries,
            Activity::Running => Watch::Exits,
            _ => Watch::Nobody,
        };
        let offset = self.tsc_offset;
        // Not `lapic_mut`: it changes nothing of what entries ask.
        self.lapic.as_mut().map_or(TimerUpdate::Unchanged, |lapic| lapic.timer_update(watch, &|| clock::<H>(offset)))
    }

    /// The guest writes IA32_TSC_DEADLINE. Whether that is done, since it only moves a deadline further away.
    #[inline]
    pub(crate) fn postpone(&mut self, deadline: u64) -> bool {
        let tsc = self.tsc();
        // Not `lapic_mut`, as above.
        self.lapic.as_mut().is_some_and(|lapic| lapic.postpone(deadline, tsc))
    }

    /// The guest's TSC that the local APIC's timer waits for, in TSC-deadline mode.
    #[inline]
    pub(crate) fn deadline(&self) -> Option<u64> {
        self.lapic().and_then(Lapic::deadline)
    }

    /// Has the local APIC's timer expire if the deadline has been reached. Whether it has.
    pub(crate) fn deadline_reached(&mut self) -> bool {
        let reached = self.deadline().is_some_and(|deadline| deadline <= self.tsc());
        if reached {
            self.with_lapic(|lapic, clock| lapic.look_at_timer(clock));
        }
        reached
    }

    /// Moves the guest's TSC.
    pub(crate) fn set_tsc_offset(&mut self, regs: &mut impl Registers, offset: u64) {
        self.tsc_offset = offset;
        regs.set_tsc_offset(offset);
        self.clock.tsc_changed();
        self.with_lapic(|lapic, clock| lapic.tsc_changed(clock));
    }

    pub(crate) fn cr8(&self) -> u8 {
        self.lapic.as_ref().map_or(self.cr8, Lapic::cr8)
    }

    pub(crate) fn set_cr8(&mut self, cr8: u8) {
        if cr8 == self.cr8() {
            return;
        }
        match self.lapic_mut() {
            Some(lapic) => lapic.set_cr8(cr8),
            None => self.cr8 = cr8 & 0xf,
        }
    }

    pub(crate) fn apic_base(&self) -> u64 {
        self.lapic.as_ref().map_or(self.apic_base, Lapic::base)
    }

    /// Sets IA32_APIC_BASE from userspace.
    pub(crate) fn restore_apic_base(&mut self, value: u64) -> AxResult {
        match self.lapic_mut() {
            Some(lapic) => lapic.restore_base(value),
            None if apic_base_valid(value) => {
                self.apic_base = value;
                Ok(())
            }
            None => Err(AxError::InvalidRegister),
        }
    }

    pub(crate) fn apic_id(&self) -> u32 {
        self.lapic.as_ref().map_or(self.vcpu_id, Lapic::id)
    }

    /// The interrupt that the local APIC would deliver.
    pub(super) fn apic_vector(&self) -> Option<u8> {
        self.lapic.as_ref().and_then(Lapic::pending_vector)
    }

    /// Whether the CPU takes interrupts of userspace's 8259.
    pub(super) fn accepts_pic_interrupt(&self) -> bool {
        self.lapic.as_ref().is_none_or(Lapic::accepts_pic_interrupt)
    }

    /// An access to the xAPIC page.
    pub(crate) fn apic_access(&mut self, offset: u32, write: Option<u32>) -> AxResult<u32> {
        let offset = u16::try_from(offset).ok().filter(|offset| *offset < 4096).ok_or(AxError::InvalidInput)?;
        let (value, effect) = self
            .with_lapic(|lapic, clock| match write {
                Some(value) => (0, lapic.write_page(offset, value, clock)),
                None => (lapic.read_page(offset, clock), Effect::None),
            })
            .ok_or(AxError::Unsupported)?;
        match effect {
            Effect::Ipi(command) => self.ipi = Some(command),
            // Reported as the exit of a later run: see `take_end`.
            Effect::InterruptEnd(vector) => self.msrs.interrupt_end = Some(vector),
            Effect::None => {}
        }
        Ok(value)
    }

    /// The interrupt command that the last access to the xAPIC page has left: destination, and the low half.
    pub(crate) fn take_ipi(&mut self) -> Option<(u64, u64)> {
        self.ipi.take().map(|command| (command >> 32, command & 0xffff_ffff))
    }

    /// The end of a level-triggered interrupt that an access to the xAPIC page brought, as an exit.
    pub(crate) fn take_end(&mut self) -> Option<AxVCpuExitReason> {
        self.msrs.interrupt_end.take().map(|vector| AxVCpuExitReason::InterruptEnd { vector: Some(vector) })
    }

    /// Takes what was posted. True if the vCPU must be put into the state after INIT; then, or if it already waits, the vector
    /// of a start-up IPI comes with it.
    pub(super) fn collect(&mut self, mailbox: &Mailbox<H>) -> (bool, Option<u8>) {
        let posted = match self.with_lapic(|lapic, clock| lapic.collect(mailbox, clock)) {
            Some(posted) => posted,
            None => mailbox.take(|_, _, _| {}),
        };
        self.events.post_nmis(posted.nmis);
        self.published = true;
        if let Some(lapic) = &self.lapic {
            mailbox.publish(lapic.identity());
        }
        (posted.init, posted.sipi)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn apic_bases() {
        for good in [0xfee0_0000, 0xfee0_0800, 0xfee0_0900, 0xfee0_0d00, 0xf_ffff_f000] {
            assert!(apic_base_valid(good), "{good:#x}");
        }
        for bad in [0xfee0_0801, 0xfee0_0400, 0xfee0_0a00, 1 << 52] {
            assert!(!apic_base_valid(bad), "{bad:#x}");
        }
    }
}
