// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The local APIC's registers and what reading and writing them does. Owned by the vCPU's thread.

use axvcpu_uapi::x86::LocalApic;
use vcpu_core::{AxError, AxResult};

use super::base::ApicBase;
use super::{
    reg, Clock, Delivery, Identity, Mailbox, Message, Mode, Posted, Shorthand, Timer, TimerMode, TimerUpdate,
    VectorSet, MSR_TSC_DEADLINE, X2APIC_FIRST, X2APIC_LAST,
};
use crate::fault::{GeneralProtection, GuestResult};

/// Version register: an integrated APIC (0x14) whose LVT has 6 entries. No suppression of EOI broadcasts (bit 24).
const VERSION: u32 = 0x0005_0014;

/// SVR: enabled by software.
const SVR_ENABLED: u32 = 1 << 8;
/// SVR: bits that can be set; bit 9 switches focus processor checking, which does nothing any more, off.
const SVR_BITS: u32 = 0x3ff;
/// SVR after reset.
const SVR_RESET: u32 = 0xff;

/// LVT: masked.
const LVT_MASKED: u32 = 1 << 16;
/// LVT: delivery status and remote IRR. Read-only, and always zero here: interrupts do not linger on the way.
const LVT_READ_ONLY: u32 = 1 << 12 | 1 << 14;
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

/// ESR: an illegal vector was sent.
const ERROR_SEND_VECTOR: u32 = 1 << 5;
/// ESR: an illegal vector was received, or is in an LVT entry that fired.
const ERROR_RECEIVE_VECTOR: u32 = 1 << 6;
/// ESR: access to a register that does not exist.
const ERROR_REGISTER: u32 = 1 << 7;
/// ESR: all bits.
const ERROR_BITS: u32 = 0xff;

/// ICR, x2APIC mode: bits that must be zero. Bit 12, delivery status, is ignored: software writes back what it has read.
const ICR_RESERVED: u64 = 0xfff0_0000 | 1 << 17 | 1 << 16 | 1 << 13;
/// ICR: bits that are stored.
const ICR_BITS: u32 = 0x000c_cfff;

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
    /// ones for everybody) whatever the APIC's mode, for [`Message::from_icr`] with `x2apic` true.
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
        let (irr, tmr) = (&mut self.irr, &mut self.tmr);
        let posted = mailbox.take(|index, mut vectors, levels| {
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

    /// What the timer entry means to the timer. Mode 3 is reserved, and mode 2 where TSC-deadline is not offered; both count
    /// once.
    fn timer_lvt(&self) -> (TimerMode, bool) {
        let value = self.lvt(Lvt::Timer);
        let mode = match value >> LVT_TIMER_MODE_SHIFT & 3 {
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

    // --- Registers, whatever the mode ---

    /// LDR as the guest sees it. In x2APIC mode it follows from the id (SDM vol. 3 section 12.12.10.2).
    fn ldr(&self) -> u32 {
        match self.mode() {
            Mode::X2Apic => self.config.id >> 4 << 16 | 1 << (self.config.id & 0xf),
            _ => self.ldr,
        }
    }

    /// The arbitration priority (SDM vol. 3 section 12.6.2.4), which only xAPIC mode shows.
    fn apr(&self) -> u32 {
        let class = |set: &VectorSet| u32::from(set.highest().unwrap_or(0)) & 0xf0;
        let (tpr, isr, irr) = (self.tpr & 0xf0, class(&self.isr), class(&self.irr));
        if tpr >= irr && tpr > isr {
            self.tpr
        } else {
            tpr.max(isr).max(irr)
        }
    }

    /// The registers that both modes have; `None` for what neither has or only one.
    fn read(&mut self, offset: u16, clock: &dyn Fn() -> Clock) -> Option<u32> {
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
                self.lvt_bits(usize::from((offset - reg::LVT_TIMER) / 16))
                    | LVT_READ_ONLY & !(1 << 14)
                    | lint_irr(offset)
            }
            reg::INITIAL_COUNT => u32::MAX,
            reg::DIVIDE => 0xb,
            _ => 0,
        }
    }

    /// Carries out an interrupt command. `destination` is in x2APIC layout if that is the mode, otherwise in bits 31:24.
    fn send(&mut self, command: u32, destination: u32) -> Effect {
        let x2apic = self.mode() == Mode::X2Apic;
        let Some(message) = Message::from_icr(u64::from(destination) << 32 | u64::from(command), x2apic) else {
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
                Effect::Ipi(u64::from(destination) << 32 | u64::from(command))
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
                self.icr = value & ICR_BITS & !(1 << 12);
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
            Some((reg::ICR, low)) => Ok(u64::from(self.icr_high) << 32 | u64::from(low)),
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
                self.icr = value as u32 & ICR_BITS & !(1 << 12);
                self.icr_high = (value >> 32) as u32;
                Ok(self.send(self.icr, self.icr_high))
            }
            reg::SELF_IPI => {
                let vector = u8::try_from(value).map_err(|_| GeneralProtection)?;
                self.request(vector);
                Ok(Effect::None)
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

    // --- Saving and restoring ---

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
        next.icr = within(reg::ICR, ICR_BITS & !(1 << 12))?;
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
            let reserved_mode = index == Lvt::Timer as usize && value >> LVT_TIMER_MODE_SHIFT & 3 == 3;
            if value & forced != forced || reserved_mode {
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

/// Remote IRR, for the registers that have it.
const fn lint_irr(offset: u16) -> u32 {
    if matches!(offset, reg::LVT_LINT0 | reg::LVT_LINT1) {
        1 << 14
    } else {
        0
    }
}
