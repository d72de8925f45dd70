// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! Saving and restoring the local APIC's registers.

use axvcpu_uapi::x86::LocalApic;
use vcpu_core::{AxError, AxResult, AxVCpuHal};

use super::super::reg;
use super::access::ICR_BITS;
use super::{lvt_entries, Clock, Lapic, Mode, LVT_MASKED, SVR_BITS, SVR_ENABLED};

/// ESR: all bits.
const ERROR_BITS: u32 = 0xff;
/// Divide configuration: all bits.
const DIVIDE_BITS: u32 = 0xb;

impl<H: AxVCpuHal> Lapic<H> {
    /// All registers, in the layout of the present mode. IA32_APIC_BASE and IA32_TSC_DEADLINE are MSRs and not among them;
    /// errors that no write of ESR has latched yet are lost.
    pub fn state(&mut self, clock: &dyn Fn() -> Clock) -> LocalApic {
        let mut state = LocalApic::default();
        for (slot, offset) in state.regs.iter_mut().zip((0u16..0x400).step_by(16)) {
            *slot = match offset {
                reg::APR => self.apr(),
                reg::DFR | reg::ICR_HIGH => self.registers.get(offset),
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
        let x2apic = self.mode() == Mode::X2Apic;
        if get(reg::ID) != self.registers.get(reg::ID) {
            return Err(AxError::InvalidRegister);
        }
        // All of it is looked at before any of it is set.
        let svr = within(reg::SVR, SVR_BITS)?;
        within(reg::TPR, 0xff)?;
        within(reg::ESR, ERROR_BITS)?;
        within(reg::ICR, ICR_BITS)?;
        within(reg::ICR_HIGH, if x2apic { u32::MAX } else { 0xff00_0000 })?;
        if !x2apic {
            within(reg::LDR, 0xff00_0000)?;
            if get(reg::DFR) | 0xf000_0000 != u32::MAX {
                return Err(AxError::InvalidRegister);
            }
        }
        within(reg::ISR, !0xffff)?;
        within(reg::IRR, !0xffff)?;
        let forced = if svr & SVR_ENABLED != 0 { 0 } else { LVT_MASKED };
        for offset in lvt_entries() {
            if within(offset, self.lvt_bits(offset))? & forced != forced {
                return Err(AxError::InvalidRegister);
            }
        }
        let (initial, current, divide) =
            (get(reg::INITIAL_COUNT), get(reg::CURRENT_COUNT), within(reg::DIVIDE, DIVIDE_BITS)?);
        if current > initial {
            return Err(AxError::InvalidRegister);
        }
        let identifying = [reg::LDR, reg::DFR].into_iter().filter(|_| !x2apic);
        let plain = [reg::TPR, reg::SVR, reg::ESR, reg::ICR, reg::ICR_HIGH].into_iter();
        let sets = (reg::ISR..reg::ESR).step_by(16);
        let registers = &mut *self.registers;
        for offset in identifying.chain(plain).chain(sets).chain(lvt_entries()) {
            registers.set(offset, get(offset));
        }
        self.errors = 0;
        self.changed = true;
        let (mode, masked) = self.timer_lvt();
        self.timer.set_lvt(mode, masked);
        self.timer.restore(initial, current, divide, &clock());
        self.show_timer();
        Ok(())
    }
}
