// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The guest's access to the local APIC: the xAPIC page and the x2APIC MSRs, over one set of registers.

use vcpu_core::AxVCpuHal;

use super::super::{reg, Delivery, Message, Shorthand, FIRST_VECTOR, MSR_EOI, MSR_TSC_DEADLINE, X2APIC_FIRST};
use super::{Clock, Effect, Lapic, Mode, Set, SVR_BITS};
use crate::fault::{GeneralProtection, GuestResult};

/// LVT: delivery status. Read-only, and always zero here: interrupts do not linger on the way.
const LVT_DELIVERY_STATUS: u32 = 1 << 12;
/// LVT LINT0 and LINT1: remote IRR. Read-only, and always zero here: the pins are not driven by level.
const LVT_REMOTE_IRR: u32 = 1 << 14;

/// ESR: an illegal vector was sent.
const ERROR_SEND_VECTOR: u32 = 1 << 5;
/// ESR: access to a register that does not exist.
const ERROR_REGISTER: u32 = 1 << 7;

/// ICR, x2APIC mode: bits that must be zero. Bit 12, delivery status, is ignored: software writes back what it has read.
const ICR_RESERVED: u64 = 0xfff0_0000 | (1 << 17) | (1 << 16) | (1 << 13);
/// ICR: bits that are stored: all that are not reserved but delivery status (bit 12), which is always idle.
pub(super) const ICR_BITS: u32 = 0x000c_cfff;
/// ICR: to the sender itself.
pub(super) const ICR_MYSELF: u32 = 1 << 18;

impl<H: AxVCpuHal> Lapic<H> {
    // --- Registers, whatever the mode ---

    /// The arbitration priority (SDM vol. 3 section 12.6.2.4), which only xAPIC mode shows.
    pub(super) fn apr(&self) -> u32 {
        let registers = &*self.registers;
        let class = |set| u32::from(registers.highest(set).unwrap_or(0)) & 0xf0;
        let (tpr, isr, irr) = (registers.get(reg::TPR), class(Set::InService), class(Set::Requested));
        if tpr & 0xf0 >= irr && tpr & 0xf0 > isr {
            tpr
        } else {
            (tpr & 0xf0).max(isr).max(irr)
        }
    }

    /// The registers that both modes have; `None` for what neither has or only one.
    pub(super) fn read(&mut self, offset: u16, clock: &dyn Fn() -> Clock) -> Option<u32> {
        Some(match offset {
            reg::PPR => u32::from(self.ppr()),
            reg::CURRENT_COUNT => {
                let clock = clock();
                self.poll_timer(&clock);
                self.timer.current_count(&clock)
            }
            reg::ID
            | reg::VERSION
            | reg::TPR
            | reg::LDR
            | reg::SVR
            | reg::ISR..=reg::ESR
            | reg::ICR
            | reg::LVT_TIMER..=reg::INITIAL_COUNT
            | reg::DIVIDE => self.registers.get(offset),
            _ => return None,
        })
    }

    /// Writes the registers that both modes have; `None` for what neither has or only one. Bits that cannot be set are ignored.
    pub(super) fn write(&mut self, offset: u16, value: u32, clock: &dyn Fn() -> Clock) -> Option<Effect> {
        match offset {
            reg::TPR => self.registers.set(reg::TPR, value & 0xff),
            reg::EOI => return Some(self.eoi()),
            reg::SVR => self.write_svr(value, clock),
            // What is written does not matter: the write latches the errors since the last one.
            reg::ESR => self.registers.set(reg::ESR, core::mem::take(&mut self.errors)),
            reg::LVT_TIMER..=reg::LVT_ERROR => self.write_lvt(offset, value, clock),
            reg::INITIAL_COUNT => self.with_timer(clock, |timer, clock| timer.set_initial_count(value, clock)),
            reg::DIVIDE => self.with_timer(clock, |timer, clock| timer.set_divide(value, clock)),
            _ => return None,
        }
        Some(Effect::None)
    }

    /// Bits that may be written to a register that exists in x2APIC mode; a write of any other faults.
    fn writable_bits(&self, offset: u16) -> u32 {
        match offset {
            reg::TPR => 0xff,
            reg::EOI | reg::ESR => 0,
            reg::SVR => SVR_BITS,
            reg::LVT_TIMER..=reg::LVT_ERROR => {
                let remote_irr = matches!(offset, reg::LVT_LINT0 | reg::LVT_LINT1);
                let read_only = LVT_DELIVERY_STATUS | if remote_irr { LVT_REMOTE_IRR } else { 0 };
                self.lvt_bits(offset) | read_only
            }
            reg::INITIAL_COUNT => u32::MAX,
            reg::DIVIDE => 0xb,
            _ => 0,
        }
    }

    /// Carries out an interrupt command. `destination` is in x2APIC layout if that is the mode, otherwise in bits 31:24.
    pub(super) fn send(&mut self, command: u32, destination: u32) -> Effect {
        let x2apic = self.mode() == Mode::X2Apic;
        let Some(message) = Message::from_icr((u64::from(destination) << 32) | u64::from(command), x2apic) else {
            return Effect::None;
        };
        match message.delivery {
            Delivery::Fixed | Delivery::LowestPriority if message.vector < FIRST_VECTOR => {
                self.error(ERROR_SEND_VECTOR);
                Effect::None
            }
            // The common case of a self IPI needs nobody else.
            Delivery::Fixed if message.shorthand == Shorthand::Myself => {
                self.request(message.vector);
                Effect::None
            }
            Delivery::Smi => Effect::None,
            _ => {
                let destination = if message.broadcast { u32::MAX } else { message.destination };
                Effect::Ipi((u64::from(destination) << 32) | u64::from(command))
            }
        }
    }

    // --- xAPIC page ---

    /// The guest reads 32 bits at byte `offset` of the xAPIC page. Where no register starts zero is read; outside xAPIC mode
    /// there is no page, and all ones are, as from a bus where nobody answers.
    pub fn read_page(&mut self, offset: u16, clock: &dyn Fn() -> Clock) -> u32 {
        if self.mode() != Mode::XApic {
            return u32::MAX;
        }
        match offset {
            _ if offset & 0xf != 0 => 0,
            reg::APR => self.apr(),
            // EOI is write-only, remote read is not supported.
            reg::EOI | reg::RRD => 0,
            reg::DFR | reg::ICR_HIGH => self.registers.get(offset),
            _ => self.read(offset, clock).unwrap_or_else(|| {
                self.error(ERROR_REGISTER);
                0
            }),
        }
    }

    /// The guest writes 32 bits at byte `offset` of the xAPIC page. Writes of read-only registers do nothing; the id is one of
    /// them, so that it always names the vCPU. Outside xAPIC mode there is no page and the write is lost.
    pub fn write_page(&mut self, offset: u16, value: u32, clock: &dyn Fn() -> Clock) -> Effect {
        if self.mode() != Mode::XApic || offset & 0xf != 0 {
            return Effect::None;
        }
        match offset {
            reg::LDR | reg::ICR_HIGH => self.registers.set(offset, value & 0xff00_0000),
            reg::DFR => self.registers.set(reg::DFR, value | 0x0fff_ffff),
            reg::ICR => {
                let command = value & ICR_BITS;
                self.registers.set(reg::ICR, command);
                return self.send(command, self.registers.get(reg::ICR_HIGH));
            }
            reg::APR | reg::RRD | reg::SELF_IPI => {}
            _ => match self.write(offset, value, clock) {
                Some(effect) => return effect,
                // Registers that can be read exist: they are read-only.
                None if self.read(offset, clock).is_some() => {}
                None => self.error(ERROR_REGISTER),
            },
        }
        Effect::None
    }

    // --- MSRs ---

    /// The guest reads an x2APIC MSR or IA32_TSC_DEADLINE.
    ///
    /// # Errors
    /// [`GeneralProtection`] if there is no such register in this mode, or if it is write-only.
    pub fn read_msr(&mut self, index: u32, clock: &dyn Fn() -> Clock) -> GuestResult<u64> {
        if index == MSR_TSC_DEADLINE && self.config.tsc_deadline {
            self.poll_timer(&clock());
            return Ok(self.timer.deadline());
        }
        let low = self.x2apic_offset(index).and_then(|offset| Some((offset, self.read(offset, clock)?)));
        match low {
            Some((reg::ICR, low)) => Ok((u64::from(self.registers.get(reg::ICR_HIGH)) << 32) | u64::from(low)),
            Some((_, low)) => Ok(low.into()),
            None => Err(GeneralProtection),
        }
    }

    /// The guest writes an x2APIC MSR or IA32_TSC_DEADLINE.
    ///
    /// # Errors
    /// [`GeneralProtection`] if there is no such register in this mode, if it is read-only, or if reserved bits are set.
    #[inline]
    pub fn write_msr(&mut self, index: u32, value: u64, clock: &dyn Fn() -> Clock) -> GuestResult<Effect> {
        // What an interrupt's handler writes.
        if index == MSR_EOI && value == 0 && self.mode() == Mode::X2Apic {
            return Ok(self.eoi());
        }
        if index == MSR_TSC_DEADLINE && self.config.tsc_deadline {
            let clock = clock();
            self.poll_timer(&clock);
            self.timer.set_deadline(value, &clock);
            self.poll_timer(&clock);
            return Ok(Effect::None);
        }
        self.write_other_msr(index, value, clock)
    }

    #[inline(never)]
    fn write_other_msr(&mut self, index: u32, value: u64, clock: &dyn Fn() -> Clock) -> GuestResult<Effect> {
        let offset = self.x2apic_offset(index).ok_or(GeneralProtection)?;
        match offset {
            reg::ICR => {
                if value & ICR_RESERVED != 0 {
                    return Err(GeneralProtection);
                }
                let (command, destination) = (value as u32 & ICR_BITS, (value >> 32) as u32);
                let registers = &mut *self.registers;
                registers.set(reg::ICR, command);
                registers.set(reg::ICR_HIGH, destination);
                Ok(self.send(command, destination))
            }
            reg::SELF_IPI => {
                let vector = u8::try_from(value).map_err(|_| GeneralProtection)?;
                Ok(self.send(u32::from(vector) | ICR_MYSELF, 0))
            }
            _ => {
                let low = u32::try_from(value).map_err(|_| GeneralProtection)?;
                if low & !self.writable_bits(offset) != 0 {
                    return Err(GeneralProtection);
                }
                self.write(offset, low, clock).ok_or(GeneralProtection)
            }
        }
    }

    /// The register behind an x2APIC MSR, if the mode is right. All those of xAPIC mode only (APR, RRD, DFR, the high half of
    /// ICR) are neither readable nor writable through [`read`](Self::read) and [`write`](Self::write).
    fn x2apic_offset(&self, index: u32) -> Option<u16> {
        let register = index.checked_sub(X2APIC_FIRST).filter(|_| self.mode() == Mode::X2Apic)?;
        u16::try_from(register).ok().filter(|register| *register < 0x40).map(|register| register * 16)
    }
}
