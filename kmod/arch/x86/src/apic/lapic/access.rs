// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The guest's access to the local APIC: the xAPIC page and the x2APIC MSRs, over one set of registers.

use super::super::{reg, Delivery, Message, Shorthand, MSR_TSC_DEADLINE, X2APIC_FIRST, X2APIC_LAST};
use super::{Clock, Effect, Lapic, Mode, VectorSet, FIRST_VECTOR, SVR_BITS};
use crate::fault::{GeneralProtection, GuestResult};

/// Version register: an integrated APIC (0x14) whose LVT has 6 entries. No suppression of EOI broadcasts (bit 24).
const VERSION: u32 = 0x0005_0014;

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
const ICR_MYSELF: u32 = 1 << 18;

impl Lapic {
    // --- Registers, whatever the mode ---

    /// LDR as the guest sees it. In x2APIC mode it follows from the id (SDM vol. 3 section 12.12.10.2).
    fn ldr(&self) -> u32 {
        match self.mode() {
            Mode::X2Apic => (self.config.id >> 4 << 16) | (1 << (self.config.id & 0xf)),
            _ => self.ldr,
        }
    }

    /// The arbitration priority (SDM vol. 3 section 12.6.2.4), which only xAPIC mode shows.
    pub(super) fn apr(&self) -> u32 {
        let class = |set: &VectorSet| u32::from(set.highest().unwrap_or(0)) & 0xf0;
        let (tpr, isr, irr) = (self.tpr & 0xf0, class(&self.isr), class(&self.irr));
        if tpr >= irr && tpr > isr {
            self.tpr
        } else {
            tpr.max(isr).max(irr)
        }
    }

    /// The registers that both modes have; `None` for what neither has or only one.
    pub(super) fn read(&mut self, offset: u16, clock: &dyn Fn() -> Clock) -> Option<u32> {
        let word = |first: u16| usize::from((offset - first) / 16);
        Some(match offset {
            reg::ID if self.mode() == Mode::X2Apic => self.config.id,
            reg::ID => self.config.id << 24,
            reg::VERSION => VERSION,
            reg::TPR => self.tpr,
            reg::PPR => u32::from(self.ppr()),
            reg::LDR => self.ldr(),
            reg::SVR => self.svr,
            reg::ISR..reg::TMR => self.isr.register(word(reg::ISR)),
            reg::TMR..reg::IRR => self.tmr.register(word(reg::TMR)),
            reg::IRR..reg::ESR => self.irr.register(word(reg::IRR)),
            reg::ESR => self.esr,
            reg::ICR => self.icr,
            reg::LVT_TIMER..=reg::LVT_ERROR => self.lvt.get(word(reg::LVT_TIMER)).copied()?,
            reg::INITIAL_COUNT => self.timer.initial_count(),
            reg::CURRENT_COUNT => {
                let clock = clock();
                self.poll_timer(&clock);
                self.timer.current_count(&clock)
            }
            reg::DIVIDE => self.timer.divide(),
            _ => return None,
        })
    }

    /// Writes the registers that both modes have; `None` for what neither has or only one. Bits that cannot be set are ignored.
    fn write(&mut self, offset: u16, value: u32, clock: &dyn Fn() -> Clock) -> Option<Effect> {
        match offset {
            reg::TPR => self.tpr = value & 0xff,
            reg::EOI => return Some(self.eoi()),
            reg::SVR => self.write_svr(value, clock),
            // What is written does not matter: the write latches the errors since the last one.
            reg::ESR => self.esr = core::mem::take(&mut self.errors),
            reg::LVT_TIMER..=reg::LVT_ERROR => {
                self.write_lvt(usize::from((offset - reg::LVT_TIMER) / 16), value, clock);
            }
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
                self.lvt_bits(usize::from((offset - reg::LVT_TIMER) / 16)) | read_only
            }
            reg::INITIAL_COUNT => u32::MAX,
            reg::DIVIDE => 0xb,
            _ => 0,
        }
    }

    /// Carries out an interrupt command. `destination` is in x2APIC layout if that is the mode, otherwise in bits 31:24.
    fn send(&mut self, command: u32, destination: u32) -> Effect {
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
            reg::DFR => self.dfr,
            reg::ICR_HIGH => self.icr_high,
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
            reg::LDR => self.ldr = value & 0xff00_0000,
            reg::DFR => self.dfr = value | 0x0fff_ffff,
            reg::ICR_HIGH => self.icr_high = value & 0xff00_0000,
            reg::ICR => {
                self.icr = value & ICR_BITS;
                return self.send(self.icr, self.icr_high);
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

    /// Whether MSR `index` is one of this APIC's (IA32_APIC_BASE apart, which has functions of its own).
    pub const fn owns_msr(index: u32) -> bool {
        matches!(index, MSR_TSC_DEADLINE | X2APIC_FIRST..=X2APIC_LAST)
    }

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
            Some((reg::ICR, low)) => Ok((u64::from(self.icr_high) << 32) | u64::from(low)),
            Some((_, low)) => Ok(low.into()),
            None => Err(GeneralProtection),
        }
    }

    /// The guest writes an x2APIC MSR or IA32_TSC_DEADLINE.
    ///
    /// # Errors
    /// [`GeneralProtection`] if there is no such register in this mode, if it is read-only, or if reserved bits are set.
    pub fn write_msr(&mut self, index: u32, value: u64, clock: &dyn Fn() -> Clock) -> GuestResult<Effect> {
        if index == MSR_TSC_DEADLINE && self.config.tsc_deadline {
            self.with_timer(clock, |timer, clock| timer.set_deadline(value, clock));
            return Ok(Effect::None);
        }
        let offset = self.x2apic_offset(index).ok_or(GeneralProtection)?;
        match offset {
            reg::ICR => {
                if value & ICR_RESERVED != 0 {
                    return Err(GeneralProtection);
                }
                self.icr = value as u32 & ICR_BITS;
                self.icr_high = (value >> 32) as u32;
                Ok(self.send(self.icr, self.icr_high))
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
