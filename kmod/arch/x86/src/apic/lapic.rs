// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The local APIC itself: its state, modes, priorities and delivery, and its timer's interrupt. Owned by the vCPU's thread.
//! Its children are the guest's access to the registers (`access`), what hardware that works on them must know (`hardware`), and
//! saving and restoring them (`state`).

mod access;
mod hardware;
mod state;
#[cfg(test)]
mod tests;

use vcpu_core::{AxError, AxResult, AxVCpuHal};

use super::base::ApicBase;
use super::registers::{Registers, Set};
use super::{reg, Clock, Identity, Mailbox, Mode, Posted, Timer, TimerMode, TimerUpdate, Watch, FIRST_VECTOR};
use crate::fault::{GeneralProtection, GuestResult};
use crate::frame::Framed;

/// SVR: enabled by software.
const SVR_ENABLED: u32 = 1 << 8;
/// SVR: bits that can be set; bit 9 switches focus processor checking, which does nothing any more, off.
const SVR_BITS: u32 = 0x3ff;
/// SVR after reset.
const SVR_RESET: u32 = 0xff;

/// LVT: masked.
const LVT_MASKED: u32 = 1 << 16;
/// LVT: where the timer's mode is.
const LVT_TIMER_MODE_SHIFT: u32 = 17;
/// LVT timer: TSC-deadline mode.
const LVT_TIMER_DEADLINE: u32 = 2 << LVT_TIMER_MODE_SHIFT;
/// LVT: delivery mode.
const LVT_DELIVERY: u32 = 0x700;
/// LVT: delivery by the 8259.
const LVT_EXTINT: u32 = 0x700;
/// LVT: delivery as NMI.
const LVT_NMI: u32 = 0x400;

/// ESR: an illegal vector was received, or is in an LVT entry that fired.
const ERROR_RECEIVE_VECTOR: u32 = 1 << 6;

/// Version register: an integrated APIC (0x14) whose LVT has 6 entries. No suppression of EOI broadcasts (bit 24).
const VERSION: u32 = 0x0005_0014;

/// Offsets of the LVT entries.
fn lvt_entries() -> impl Iterator<Item = u16> {
    (reg::LVT_TIMER..=reg::LVT_ERROR).step_by(16)
}

/// Bits that can be set in each LVT entry (SDM vol. 3 figure 12-8): vector and mask; the timer's mode; delivery mode; polarity
/// and trigger mode for the pins.
const fn lvt_bits(offset: u16) -> u32 {
    match offset {
        reg::LVT_TIMER => 0x7_00ff,
        reg::LVT_THERMAL | reg::LVT_PERFORMANCE => 0x1_07ff,
        reg::LVT_LINT0 | reg::LVT_LINT1 => 0x1_a7ff,
        reg::LVT_ERROR => 0x1_00ff,
        _ => 0,
    }
}

/// What cannot change in the life of a local APIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// APIC id.
    pub id: u32,
    /// The boot processor: vCPU 0.
    pub boot_processor: bool,
    /// The guest's CPUID has the x2APIC.
    pub x2apic: bool,
    /// The guest's CPUID has the timer's TSC-deadline mode.
    pub tsc_deadline: bool,
}

/// What a register write does outside the APIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    None,
    /// The guest ended a level-triggered interrupt: tell the I/O APIC.
    InterruptEnd(u8),
    /// An inter-processor interrupt leaves: an interrupt command in the layout of x2APIC mode (destination in bits 63:32, all
    /// ones for everybody) whatever the APIC's mode, for [`Message::from_icr`](super::Message::from_icr) with `x2apic` true.
    Ipi(u64),
}

/// A local APIC.
///
/// Functions that may have to do with the timer take a closure that reads the clocks; most calls never call it.
pub struct Lapic<H: AxVCpuHal> {
    config: Config,
    base: ApicBase,
    /// What the guest reads, in the layout of the present mode. Computed when read, and not kept here: PPR, APR and the current
    /// count. Owned by others, and shown here: the timer's initial count and divide configuration.
    registers: Framed<Registers, H>,
    /// Errors since the last write of ESR.
    errors: u32,
    timer: Timer,
    /// We have changed a set of vectors: see [`take_changed`](Self::take_changed).
    changed: bool,
}

impl<H: AxVCpuHal> Lapic<H> {
    /// A local APIC after reset. The boot processor's is then put into virtual wire mode, as a guest without firmware expects
    /// it (MultiProcessor Specification section 3.6.2.2): enabled, LINT0 takes the 8259's interrupts, LINT1 is NMI. May sleep.
    ///
    /// # Errors
    /// [`AxError::NoMemory`].
    pub fn new(config: Config) -> AxResult<Self> {
        let mut lapic = Self {
            config,
            base: ApicBase::new(config.boot_processor),
            registers: Framed::zeroed()?,
            errors: 0,
            timer: Timer::new(),
            changed: true,
        };
        lapic.init();
        if config.boot_processor {
            let registers = &mut *lapic.registers;
            registers.set(reg::SVR, SVR_RESET | SVR_ENABLED);
            registers.set(reg::LVT_LINT0, LVT_EXTINT);
            registers.set(reg::LVT_LINT1, LVT_NMI);
        }
        Ok(lapic)
    }

    /// INIT: registers as after reset; id, mode and IA32_APIC_BASE stay (SDM vol. 3 section 12.4.7.3).
    pub fn init(&mut self) {
        let registers = &mut *self.registers;
        registers.clear();
        registers.set(reg::VERSION, VERSION);
        registers.set(reg::DFR, u32::MAX);
        registers.set(reg::SVR, SVR_RESET);
        for offset in lvt_entries() {
            registers.set(offset, LVT_MASKED);
        }
        self.errors = 0;
        self.changed = true;
        self.timer.reset();
        self.show_ids();
    }

    /// Shows the id, and in x2APIC mode the logical id that follows from it (SDM vol. 3 section 12.12.10.2), in the layout of the
    /// mode.
    fn show_ids(&mut self) {
        let id = self.config.id;
        let registers = &mut *self.registers;
        if self.base.mode == Mode::X2Apic {
            registers.set(reg::ID, id);
            registers.set(reg::LDR, (id >> 4 << 16) | (1 << (id & 0xf)));
        } else {
            registers.set(reg::ID, id << 24);
        }
    }

    /// Shows what the timer keeps.
    fn show_timer(&mut self) {
        let registers = &mut *self.registers;
        registers.set(reg::INITIAL_COUNT, self.timer.initial_count());
        registers.set(reg::DIVIDE, self.timer.divide());
    }

    /// The APIC id.
    #[inline]
    pub fn id(&self) -> u32 {
        self.config.id
    }

    /// The mode.
    #[inline]
    pub fn mode(&self) -> Mode {
        self.base.mode
    }

    // --- IA32_APIC_BASE ---

    /// IA32_APIC_BASE.
    pub fn base(&self) -> u64 {
        self.base.value()
    }

    /// The guest writes IA32_APIC_BASE.
    ///
    /// # Errors
    /// [`GeneralProtection`] for reserved bits, for a move of the page (not offered) and for illegal mode changes.
    pub fn set_base(&mut self, value: u64) -> GuestResult {
        let mode = ApicBase::decode(value, self.config.x2apic)?;
        if !self.base.may_become(mode) {
            return Err(GeneralProtection);
        }
        self.change_mode(mode);
        Ok(())
    }

    /// Sets IA32_APIC_BASE from outside the guest, where any mode may follow any other.
    ///
    /// # Errors
    /// [`AxError::InvalidRegister`] for a value that the register cannot hold.
    pub fn restore_base(&mut self, value: u64) -> AxResult {
        let mode = ApicBase::decode(value, self.config.x2apic).map_err(|_| AxError::InvalidRegister)?;
        self.change_mode(mode);
        Ok(())
    }

    fn change_mode(&mut self, mode: Mode) {
        if mode == self.base.mode {
            return;
        }
        match mode {
            // The registers are lost (SDM vol. 3 section 12.4.3).
            Mode::Disabled => self.init(),
            // ICR's high half is cleared; the ids that only xAPIC mode has are lost (SDM vol. 3 section 12.12.5.1).
            Mode::X2Apic | Mode::XApic => {
                let registers = &mut *self.registers;
                registers.set(reg::ICR_HIGH, 0);
                if Mode::X2Apic == mode || Mode::X2Apic == self.base.mode {
                    registers.set(reg::LDR, 0);
                    registers.set(reg::DFR, u32::MAX);
                }
            }
        }
        self.base.mode = mode;
        self.show_ids();
    }

    // --- Priorities and delivery ---

    /// CR8: bits 7:4 of the task priority.
    #[inline]
    pub fn cr8(&self) -> u8 {
        (self.registers.get(reg::TPR) >> 4) as u8
    }

    /// The guest's CR8 is `cr8` (0 to 15). The low bits of TPR, which CR8 lacks, change only if CR8 does.
    #[inline]
    pub fn set_cr8(&mut self, cr8: u8) {
        let cr8 = u32::from(cr8 & 0xf);
        let registers = &mut *self.registers;
        if registers.get(reg::TPR) >> 4 != cr8 {
            registers.set(reg::TPR, cr8 << 4);
        }
    }

    /// The processor priority (SDM vol. 3 section 12.8.3.1).
    #[inline]
    pub fn ppr(&self) -> u8 {
        let registers = &*self.registers;
        let in_service = registers.highest(Set::InService).unwrap_or(0) & 0xf0;
        let tpr = registers.get(reg::TPR) as u8;
        if tpr & 0xf0 >= in_service {
            tpr
        } else {
            in_service
        }
    }

    /// The interrupt to deliver next: the highest one requested, if its class is above the processor priority. It takes
    /// the guest's CR8 into account, so [`set_cr8`](Self::set_cr8) first where the guest may have changed it.
    #[inline]
    pub fn pending_vector(&self) -> Option<u8> {
        self.highest_request().filter(|&vector| self.is_deliverable(vector))
    }

    /// Whether the class of `vector` is above the processor priority.
    #[inline]
    pub fn is_deliverable(&self, vector: u8) -> bool {
        vector & 0xf0 > self.ppr() & 0xf0
    }

    /// The highest interrupt requested, whatever the priorities: what the window must be opened for.
    #[inline]
    pub fn highest_request(&self) -> Option<u8> {
        if self.mode() == Mode::Disabled {
            return None;
        }
        self.registers.highest(Set::Requested)
    }

    /// The CPU takes `vector`, the [`pending_vector`](Self::pending_vector): it is in service now.
    pub fn acknowledge(&mut self, vector: u8) {
        let registers = &mut *self.registers;
        registers.remove(Set::Requested, vector);
        registers.insert(Set::InService, vector);
        self.changed = true;
    }

    /// End of the interrupt of highest priority in service.
    #[inline]
    pub fn eoi(&mut self) -> Effect {
        let registers = &mut *self.registers;
        let Some(vector) = registers.highest(Set::InService) else { return Effect::None };
        registers.remove(Set::InService, vector);
        self.changed = true;
        self.ended(vector)
    }

    /// `vector` is no longer in service.
    fn ended(&self, vector: u8) -> Effect {
        if self.registers.contains(Set::Level, vector) {
            Effect::InterruptEnd(vector)
        } else {
            Effect::None
        }
    }

    /// Whether LINT0 passes the 8259's interrupts to the CPU: it is set up so, or the APIC is off and transparent.
    #[inline]
    pub fn accepts_pic_interrupt(&self) -> bool {
        let lint0 = self.registers.get(reg::LVT_LINT0);
        self.mode() == Mode::Disabled || lint0 & (LVT_MASKED | LVT_DELIVERY) == LVT_EXTINT
    }

    #[inline]
    fn enabled(&self) -> bool {
        self.registers.get(reg::SVR) & SVR_ENABLED != 0
    }

    /// Who this APIC is, for [`Mailbox::publish`].
    #[inline]
    pub fn identity(&self) -> Identity {
        let registers = &*self.registers;
        let logical = if self.mode() == Mode::X2Apic { 0 } else { registers.get(reg::LDR) >> 24 };
        Identity {
            id: self.config.id,
            logical: logical as u8,
            cluster: registers.get(reg::DFR) >> 28 == 0,
            mode: self.mode(),
            enabled: self.enabled(),
            priority: self.ppr(),
        }
    }

    /// Empties the mailbox into the registers: vectors into IRR, the timer's expiry into its interrupt, INIT into a reset of
    /// this APIC. What concerns the CPU is returned. With INIT, interrupts posted before it (or at the same time) are void.
    pub fn collect(&mut self, mailbox: &Mailbox<H>, clock: &dyn Fn() -> Clock) -> Posted {
        let mut illegal = false;
        let disabled = self.mode() == Mode::Disabled;
        let (registers, changed) = (&mut self.registers, &mut self.changed);
        let posted = mailbox.take(|index, mut vectors, levels| {
            if disabled {
                return; // Sent to what the APIC was a moment ago.
            }
            if index == 0 {
                let reserved = (1u64 << FIRST_VECTOR) - 1;
                illegal |= vectors & reserved != 0;
                vectors &= !reserved;
            }
            registers.request(index, vectors, levels);
            *changed = true;
        });
        if posted.timer {
            self.timer.host_fired();
        }
        if posted.init {
            self.init();
            return posted;
        }
        if illegal {
            self.error(ERROR_RECEIVE_VECTOR);
        }
        if posted.timer {
            self.poll_timer(&clock());
        }
        posted
    }

    /// An edge-triggered interrupt of this APIC's own.
    fn request(&mut self, vector: u8) {
        if vector < FIRST_VECTOR {
            self.error(ERROR_RECEIVE_VECTOR);
        } else if self.enabled() && self.mode() != Mode::Disabled {
            let registers = &mut *self.registers;
            registers.insert(Set::Requested, vector);
            registers.remove(Set::Level, vector);
            self.changed = true;
        }
    }

    /// Records an error and raises its interrupt, once until ESR is written: so the recursion through an illegal vector in
    /// the error entry itself ends.
    fn error(&mut self, error: u32) {
        if self.errors & error == 0 {
            self.errors |= error;
            self.raise(reg::LVT_ERROR);
        }
    }

    /// The source behind the timer or error entry fires.
    fn raise(&mut self, entry: u16) {
        let value = self.registers.get(entry);
        if value & LVT_MASKED == 0 {
            self.request(value as u8);
        }
    }

    // --- Timer ---

    #[inline]
    fn poll_timer(&mut self, clock: &Clock) {
        if self.timer.poll(clock) {
            self.raise(reg::LVT_TIMER);
        }
    }

    /// What to do with the host's timer; the caller does it. See [`Timer::update`].
    #[inline]
    pub fn timer_update(&mut self, watch: Watch, clock: &dyn Fn() -> Clock) -> TimerUpdate {
        if watch == Watch::Nobody && self.timer.is_postponed() {
            self.timer.estimate(&clock());
        }
        self.timer.update(watch)
    }

    /// The guest writes IA32_TSC_DEADLINE while its TSC is `tsc`: see [`Timer::postpone`].
    #[inline]
    pub(crate) fn postpone(&mut self, deadline: u64, tsc: u64) -> bool {
        self.timer.postpone(deadline, tsc)
    }

    /// The guest's TSC at which the timer's interrupt is due, in TSC-deadline mode.
    #[inline]
    pub(crate) fn deadline(&self) -> Option<u64> {
        self.timer.watched_deadline()
    }

    /// Sees whether the timer has expired.
    pub(crate) fn look_at_timer(&mut self, clock: &dyn Fn() -> Clock) {
        self.poll_timer(&clock());
    }

    /// The guest's TSC was written or its offset changed: `clock` reads the new one.
    pub fn tsc_changed(&mut self, clock: &dyn Fn() -> Clock) {
        self.timer.estimate(&clock());
        self.poll_timer(&clock());
    }

    /// Changes the timer, having seen what happened before, and sees whether the change is due at once.
    fn with_timer(&mut self, clock: &dyn Fn() -> Clock, change: impl FnOnce(&mut Timer, &Clock)) {
        let clock = clock();
        self.poll_timer(&clock);
        change(&mut self.timer, &clock);
        self.show_timer();
        self.poll_timer(&clock);
    }

    // --- LVT ---

    /// What the timer entry means to the timer. The reserved mode 3 counts once.
    fn timer_lvt(&self) -> (TimerMode, bool) {
        let value = self.registers.get(reg::LVT_TIMER);
        let mode = match (value >> LVT_TIMER_MODE_SHIFT) & 3 {
            1 => TimerMode::Periodic,
            2 => TimerMode::TscDeadline,
            _ => TimerMode::OneShot,
        };
        (mode, value & LVT_MASKED != 0)
    }

    /// The timer follows its LVT entry.
    fn follow_timer_lvt(&mut self) {
        let (mode, masked) = self.timer_lvt();
        self.timer.set_lvt(mode, masked);
        self.show_timer();
    }

    /// Bits that can be set in the LVT entry at `offset`.
    fn lvt_bits(&self, offset: u16) -> u32 {
        let bits = lvt_bits(offset);
        if offset == reg::LVT_TIMER && !self.config.tsc_deadline {
            bits & !LVT_TIMER_DEADLINE
        } else {
            bits
        }
    }

    fn write_lvt(&mut self, offset: u16, value: u32, clock: &dyn Fn() -> Clock) {
        // An APIC that is not enabled keeps every entry masked (SDM vol. 3 section 12.4.7.2).
        let forced = if self.enabled() { 0 } else { LVT_MASKED };
        let value = value & self.lvt_bits(offset) | forced;
        if offset == reg::LVT_TIMER {
            self.poll_timer(&clock());
        }
        self.registers.set(offset, value);
        if offset == reg::LVT_TIMER {
            self.follow_timer_lvt();
        }
    }

    fn write_svr(&mut self, value: u32, clock: &dyn Fn() -> Clock) {
        self.registers.set(reg::SVR, value & SVR_BITS);
        if !self.enabled() {
            self.poll_timer(&clock());
            let registers = &mut *self.registers;
            for offset in lvt_entries() {
                registers.set(offset, registers.get(offset) | LVT_MASKED);
            }
            self.follow_timer_lvt();
        }
    }
}
