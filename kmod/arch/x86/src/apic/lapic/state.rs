// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! Saving and restoring the local APIC's registers.

use axvcpu_uapi::x86::LocalApic;
use vcpu_core::{AxError, AxResult};

use super::super::reg;
use super::access::ICR_BITS;
use super::{Clock, Lapic, Mode, LVT_COUNT, LVT_MASKED, SVR_BITS};

/// ESR: all bits.
const ERROR_BITS: u32 = 0xff;

impl Lapic {
    /// All registers, in the layout of the present mode. IA32_APIC_BASE and IA32_TSC_DEADLINE are MSRs and not among them;
    /// errors that no write of ESR has latched yet are lost.
    pub fn state(&mut self, clock: &dyn Fn() -> Clock) -> LocalApic {
        let mut state = LocalApic::default();
        for (slot, offset) in state.regs.iter_mut().zip((0u16..0x400).step_by(16)) {
            *slot = match offset {
                reg::APR => self.apr(),
                reg::DFR => self.dfr,
                reg::ICR_HIGH => self.icr_high,
                _ => self.read(offset, clock).unwrap_or(0),
            };
        }
        state
    }

    /// Sets all registers, in the layout of the present mode: set IA32_APIC_BASE before, IA32_TSC_DEADLINE after. Registers
    /// that follow from others (version, APR, PPR, in x2APIC mode LDR and DFR) are not looked at.
    ///
    /// # Errors
    /// [`AxError::InvalidRegister`], with nothing changed, if a register cannot hold its value: another id, reserved bits,
    /// vectors below 16 in ISR or IRR, a current count above the initial one, an unmasked LVT entry while disabled.
    pub fn set_state(&mut self, state: &LocalApic, clock: &dyn Fn() -> Clock) -> AxResult {
        let get = |offset: u16| state.regs.get(usize::from(offset / 16)).copied().unwrap_or(0);
        let within = |offset: u16, bits: u32| {
            Some(get(offset)).filter(|value| value & !bits == 0).ok_or(AxError::InvalidRegister)
        };
        let mut next = self.clone();
        let x2apic = self.mode() == Mode::X2Apic;
        if Some(get(reg::ID)) != self.read(reg::ID, clock) {
            return Err(AxError::InvalidRegister);
        }
        next.tpr = within(reg::TPR, 0xff)?;
        next.svr = within(reg::SVR, SVR_BITS)?;
        next.esr = within(reg::ESR, ERROR_BITS)?;
        next.errors = 0;
        next.icr = within(reg::ICR, ICR_BITS)?;
        next.icr_high = within(reg::ICR_HIGH, if x2apic { u32::MAX } else { 0xff00_0000 })?;
        if !x2apic {
            next.ldr = within(reg::LDR, 0xff00_0000)?;
            next.dfr =
                Some(get(reg::DFR)).filter(|dfr| dfr | 0xf000_0000 == u32::MAX).ok_or(AxError::InvalidRegister)?;
        }
        for (index, offset) in (0..).zip((0u16..0x80).step_by(16)) {
            let bits = if index == 0 { !0xffff } else { u32::MAX };
            next.isr.set_register(index, within(reg::ISR + offset, bits)?);
            next.tmr.set_register(index, get(reg::TMR + offset));
            next.irr.set_register(index, within(reg::IRR + offset, bits)?);
        }
        let forced = if next.enabled() { 0 } else { LVT_MASKED };
        for (index, offset) in (0..LVT_COUNT).zip((reg::LVT_TIMER..).step_by(16)) {
            let value = within(offset, self.lvt_bits(index))?;
            if value & forced != forced {
                return Err(AxError::InvalidRegister);
            }
            if let Some(slot) = next.lvt.get_mut(index) {
                *slot = value;
            }
        }
        let (initial, current) = (get(reg::INITIAL_COUNT), get(reg::CURRENT_COUNT));
        if current > initial {
            return Err(AxError::InvalidRegister);
        }
        let (mode, masked) = next.timer_lvt();
        next.timer.set_lvt(mode, masked);
        next.timer.restore(initial, current, within(reg::DIVIDE, 0xb)?, &clock());
        *self = next;
        Ok(())
    }
}
