// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The local APIC itself: its state, modes, priorities and delivery, and its timer's interrupt. Owned by the vCPU's thread.
//! Its children are the guest's access to the registers (`access`), and saving and restoring them (`state`).

mod access;
mod state;
#[cfg(test)]
mod tests;

use vcpu_core::{AxError, AxResult};

use super::base::ApicBase;
use super::{Clock, Identity, Mailbox, Mode, Posted, Timer, TimerMode, TimerUpdate, VectorSet};
use crate::fault::{GeneralProtection, GuestResult};

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
/// Vectors below are reserved for exceptions (SDM vol. 3 section 12.5.2).
const FIRST_VECTOR: u8 = 16;

/// Index of an LVT entry in [`Lapic::lvt`]: their order in the xAPIC page.
#[derive(Clone, Copy)]
#[repr(usize)]
enum Lvt {
    Timer = 0,
    Lint0 = 3,
    Lint1 = 4,
    Error = 5,
}

/// Number of LVT entries.
const LVT_COUNT: usize = 6;

/// Bits that can be set in each LVT entry (SDM vol. 3 figure 12-8): vector and mask; the timer's mode; delivery mode; polarity
/// and trigger mode for the pins.
const LVT_BITS: [u32; LVT_COUNT] = [0x7_00ff, 0x1_07ff, 0x1_07ff, 0x1_a7ff, 0x1_a7ff, 0x1_00ff];

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
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lapic {
    config: Config,
    base: ApicBase,
    tpr: u32,
    /// Bits 31:24, xAPIC mode only.
    ldr: u32,
    /// xAPIC mode only.
    dfr: u32,
    svr: u32,
    isr: VectorSet,
    tmr: VectorSet,
    irr: VectorSet,
    /// Errors that the guest can read.
    esr: u32,
    /// Errors since the last write of ESR.
    errors: u32,
    icr: u32,
    /// Destination: bits 31:24 in xAPIC mode.
    icr_high: u32,
    lvt: [u32; LVT_COUNT],
    timer: Timer,
}

impl Lapic {
    /// A local APIC after reset. The boot processor's is then put into virtual wire mode, as a guest without firmware expects
    /// it (MultiProcessor Specification section 3.6.2.2): enabled, LINT0 takes the 8259's interrupts, LINT1 is NMI.
    pub fn new(config: Config) -> Self {
        let mut lapic = Self {
            config,
            base: ApicBase::new(config.boot_processor),
            tpr: 0,
            ldr: 0,
            dfr: u32::MAX,
            svr: SVR_RESET,
            isr: VectorSet::EMPTY,
            tmr: VectorSet::EMPTY,
            irr: VectorSet::EMPTY,
            esr: 0,
            errors: 0,
            icr: 0,
            icr_high: 0,
            lvt: [LVT_MASKED; LVT_COUNT],
            timer: Timer::new(),
        };
        if config.boot_processor {
            lapic.svr |= SVR_ENABLED;
            lapic.set_lvt(Lvt::Lint0, LVT_EXTINT);
            lapic.set_lvt(Lvt::Lint1, LVT_NMI);
        }
        lapic
    }

    /// INIT: registers as after reset; id, mode and IA32_APIC_BASE stay (SDM vol. 3 section 12.4.7.3).
    pub fn init(&mut self) {
        let config = Config { boot_processor: false, ..self.config };
        let fresh = Self::new(config);
        let mut timer = self.timer.clone();
        timer.reset();
        *self = Self { config: self.config, base: self.base, timer, ..fresh };
    }

    /// The APIC id.
    pub fn id(&self) -> u32 {
        self.config.id
    }

    /// The mode.
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
            Mode::X2Apic => {
                self.icr_high = 0;
                self.ldr = 0;
                self.dfr = u32::MAX;
            }
            Mode::XApic => self.icr_high = 0,
        }
        self.base.mode = mode;
    }

    // --- Priorities and delivery ---

    /// CR8: bits 7:4 of the task priority.
    pub fn cr8(&self) -> u8 {
        (self.tpr >> 4) as u8
    }

    /// The guest's CR8 is `cr8` (0 to 15). The low bits of TPR, which CR8 lacks, change only if CR8 does.
    pub fn set_cr8(&mut self, cr8: u8) {
        let cr8 = u32::from(cr8 & 0xf);
        if self.tpr >> 4 != cr8 {
            self.tpr = cr8 << 4;
        }
    }

    /// The processor priority (SDM vol. 3 section 12.8.3.1).
    pub fn ppr(&self) -> u8 {
        let in_service = self.isr.highest().unwrap_or(0) & 0xf0;
        let tpr = self.tpr as u8;
        if tpr & 0xf0 >= in_service {
            tpr
        } else {
            in_service
        }
    }

    /// The interrupt to deliver next: the highest one requested, if its class is above the processor priority. It takes
    /// the guest's CR8 into account, so [`set_cr8`](Self::set_cr8) first where the guest may have changed it.
    pub fn pending_vector(&self) -> Option<u8> {
        if self.mode() == Mode::Disabled {
            return None;
        }
        self.irr.highest().filter(|vector| vector & 0xf0 > self.ppr() & 0xf0)
    }

    /// The highest interrupt requested, whatever the priorities: what the window must be opened for.
    pub fn highest_request(&self) -> Option<u8> {
        self.irr.highest().filter(|_| self.mode() != Mode::Disabled)
    }

    /// The CPU takes [`pending_vector`](Self::pending_vector): it is in service now.
    pub fn acknowledge(&mut self) -> Option<u8> {
        let vector = self.pending_vector()?;
        self.irr.remove(vector);
        self.isr.insert(vector);
        Some(vector)
    }

    /// End of the interrupt of highest priority in service.
    pub fn eoi(&mut self) -> Effect {
        let Some(vector) = self.isr.highest() else { return Effect::None };
        self.isr.remove(vector);
        if self.tmr.contains(vector) {
            Effect::InterruptEnd(vector)
        } else {
            Effect::None
        }
    }

    /// Whether LINT0 passes the 8259's interrupts to the CPU: it is set up so, or the APIC is off and transparent.
    pub fn accepts_pic_interrupt(&self) -> bool {
        let lint0 = self.lvt(Lvt::Lint0);
        self.mode() == Mode::Disabled || lint0 & (LVT_MASKED | LVT_DELIVERY) == LVT_EXTINT
    }

    fn enabled(&self) -> bool {
        self.svr & SVR_ENABLED != 0
    }

    /// Who this APIC is, for [`Mailbox::publish`].
    pub fn identity(&self) -> Identity {
        Identity {
            id: self.config.id,
            logical: (self.ldr >> 24) as u8,
            cluster: self.dfr >> 28 == 0,
            mode: self.mode(),
            enabled: self.enabled(),
            priority: self.ppr(),
        }
    }

    /// Empties the mailbox into the registers: vectors into IRR, the timer's expiry into its interrupt, INIT into a reset of
    /// this APIC. What concerns the CPU is returned. With INIT, interrupts posted before it (or at the same time) are void.
    pub fn collect(&mut self, mailbox: &Mailbox, clock: &dyn Fn() -> Clock) -> Posted {
        let mut illegal = false;
        let disabled = self.mode() == Mode::Disabled;
        let (irr, tmr) = (&mut self.irr, &mut self.tmr);
        let posted = mailbox.take(|index, mut vectors, levels| {
            if disabled {
                return; // Sent to what the APIC was a moment ago.
            }
            if index == 0 {
                let reserved = (1u64 << FIRST_VECTOR) - 1;
                illegal |= vectors & reserved != 0;
                vectors &= !reserved;
            }
            irr.merge(index, vectors, levels, tmr);
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
            self.irr.insert(vector);
            self.tmr.remove(vector);
        }
    }

    /// Records an error and raises its interrupt, once until ESR is written: so the recursion through an illegal vector in
    /// the error entry itself ends.
    fn error(&mut self, error: u32) {
        if self.errors & error == 0 {
            self.errors |= error;
            self.raise(Lvt::Error);
        }
    }

    /// The source behind the timer or error entry fires.
    fn raise(&mut self, entry: Lvt) {
        let value = self.lvt(entry);
        if value & LVT_MASKED == 0 {
            self.request(value as u8);
        }
    }

    // --- Timer ---

    fn poll_timer(&mut self, clock: &Clock) {
        if self.timer.poll(clock) {
            self.raise(Lvt::Timer);
        }
    }

    /// What to do with the host's timer; the caller does it.
    pub fn timer_update(&mut self) -> TimerUpdate {
        self.timer.update()
    }

    /// The guest's TSC was written or its offset changed: `clock` reads the new one.
    pub fn tsc_changed(&mut self, clock: &dyn Fn() -> Clock) {
        self.timer.tsc_changed(&clock());
        self.poll_timer(&clock());
    }

    /// Changes the timer, having seen what happened before, and sees whether the change is due at once.
    fn with_timer(&mut self, clock: &dyn Fn() -> Clock, change: impl FnOnce(&mut Timer, &Clock)) {
        let clock = clock();
        self.poll_timer(&clock);
        change(&mut self.timer, &clock);
        self.poll_timer(&clock);
    }

    // --- LVT ---

    fn lvt(&self, entry: Lvt) -> u32 {
        self.lvt.get(entry as usize).copied().unwrap_or(LVT_MASKED)
    }

    fn set_lvt(&mut self, entry: Lvt, value: u32) {
        if let Some(slot) = self.lvt.get_mut(entry as usize) {
            *slot = value;
        }
    }

    /// What the timer entry means to the timer. The reserved mode 3 counts once.
    fn timer_lvt(&self) -> (TimerMode, bool) {
        let value = self.lvt(Lvt::Timer);
        let mode = match (value >> LVT_TIMER_MODE_SHIFT) & 3 {
            1 => TimerMode::Periodic,
            2 => TimerMode::TscDeadline,
            _ => TimerMode::OneShot,
        };
        (mode, value & LVT_MASKED != 0)
    }

    /// Bits that can be set in LVT entry `index`.
    fn lvt_bits(&self, index: usize) -> u32 {
        let bits = LVT_BITS.get(index).copied().unwrap_or(0);
        if index == Lvt::Timer as usize && !self.config.tsc_deadline {
            bits & !LVT_TIMER_DEADLINE
        } else {
            bits
        }
    }

    fn write_lvt(&mut self, index: usize, value: u32, clock: &dyn Fn() -> Clock) {
        // An APIC that is not enabled keeps every entry masked (SDM vol. 3 section 12.4.7.2).
        let forced = if self.enabled() { 0 } else { LVT_MASKED };
        let value = value & self.lvt_bits(index) | forced;
        if index == Lvt::Timer as usize {
            self.poll_timer(&clock());
        }
        if let Some(slot) = self.lvt.get_mut(index) {
            *slot = value;
        }
        if index == Lvt::Timer as usize {
            let (mode, masked) = self.timer_lvt();
            self.timer.set_lvt(mode, masked);
        }
    }

    fn write_svr(&mut self, value: u32, clock: &dyn Fn() -> Clock) {
        self.svr = value & SVR_BITS;
        if !self.enabled() {
            self.poll_timer(&clock());
            self.lvt.iter_mut().for_each(|entry| *entry |= LVT_MASKED);
            let (mode, masked) = self.timer_lvt();
            self.timer.set_lvt(mode, masked);
        }
    }
}
