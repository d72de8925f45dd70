// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The local APIC, as pure logic (Intel SDM vol. 3 chapter 12, AMD APM vol. 2 chapter 16).
//!
//! - [`Lapic`]: the rules of the registers, which lie in a page as hardware has them (`registers`). It belongs to the vCPU's
//!   thread alone; no lock, no atomic.
//! - [`Mailbox`]: what everybody else may touch, from any context: posted interrupts, NMIs, INIT, start-up IPIs, the timer's
//!   expiry, and the identity that routing reads.
//! - [`Message`]: an interrupt on its way, decoded from an MSI or an interrupt command, and the rules that say who gets it.
//! - [`Timer`]: the timer's three modes over host nanoseconds and guest TSC ticks.
//!
//! The cycle on the vCPU's thread, before each entry: [`Lapic::collect`] what was posted, act on its INIT, SIPI and NMIs,
//! inject [`Lapic::pending_vector`] after [`Lapic::acknowledge`], hand [`Lapic::timer_update`] to the host's timer.
#![forbid(unsafe_code)]

mod base;
mod clock;
mod lapic;
mod mailbox;
mod message;
mod posted;
mod registers;
mod timer;

pub use base::Mode;
pub use clock::Clock;
pub use lapic::{Config, Effect, Lapic};
pub use mailbox::{Identity, Mailbox, Notice, Posted};
pub use message::{Delivery, Message, Shorthand};
pub(crate) use posted::Descriptor;
pub(crate) use registers::Registers;
pub use timer::{Timer, TimerMode, TimerUpdate, Watch, MIN_PERIOD_NS};

/// Vectors below are reserved for exceptions (SDM vol. 3 section 12.5.2).
const FIRST_VECTOR: u8 = 16;

/// Physical address of the xAPIC page. Guests cannot move it.
pub const BASE_ADDRESS: u64 = 0xfee0_0000;

/// Byte offsets of the registers in the xAPIC page (SDM vol. 3 table 12-1). The x2APIC MSR is 0x800 + offset / 16.
pub mod reg {
    /// Local APIC id.
    pub const ID: u16 = 0x020;
    /// Version.
    pub const VERSION: u16 = 0x030;
    /// Task priority.
    pub const TPR: u16 = 0x080;
    /// Arbitration priority.
    pub const APR: u16 = 0x090;
    /// Processor priority.
    pub const PPR: u16 = 0x0a0;
    /// End of interrupt.
    pub const EOI: u16 = 0x0b0;
    /// Remote read.
    pub const RRD: u16 = 0x0c0;
    /// Logical destination.
    pub const LDR: u16 = 0x0d0;
    /// Destination format.
    pub const DFR: u16 = 0x0e0;
    /// Spurious interrupt vector.
    pub const SVR: u16 = 0x0f0;
    /// First word of the in-service register.
    pub const ISR: u16 = 0x100;
    /// First word of the trigger mode register.
    pub const TMR: u16 = 0x180;
    /// First word of the interrupt request register.
    pub const IRR: u16 = 0x200;
    /// Error status.
    pub const ESR: u16 = 0x280;
    /// Interrupt command, low half (x2APIC: all of it).
    pub const ICR: u16 = 0x300;
    /// Interrupt command, high half.
    pub const ICR_HIGH: u16 = 0x310;
    /// LVT timer.
    pub const LVT_TIMER: u16 = 0x320;
    /// LVT thermal sensor.
    pub const LVT_THERMAL: u16 = 0x330;
    /// LVT performance counters.
    pub const LVT_PERFORMANCE: u16 = 0x340;
    /// LVT LINT0.
    pub const LVT_LINT0: u16 = 0x350;
    /// LVT LINT1.
    pub const LVT_LINT1: u16 = 0x360;
    /// LVT error.
    pub const LVT_ERROR: u16 = 0x370;
    /// Timer: initial count.
    pub const INITIAL_COUNT: u16 = 0x380;
    /// Timer: current count.
    pub const CURRENT_COUNT: u16 = 0x390;
    /// Timer: divide configuration.
    pub const DIVIDE: u16 = 0x3e0;
    /// Self IPI (x2APIC only).
    pub const SELF_IPI: u16 = 0x3f0;
}

/// The first x2APIC MSR.
pub const X2APIC_FIRST: u32 = 0x800;
/// The last MSR of the range reserved for the x2APIC.
pub const X2APIC_LAST: u32 = 0x8ff;
/// IA32_TSC_DEADLINE.
pub const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// IA32_APIC_BASE.
pub const MSR_APIC_BASE: u32 = 0x1b;

/// The end of an interrupt, in x2APIC mode.
const MSR_EOI: u32 = X2APIC_FIRST + reg::EOI as u32 / 16;

/// Whether MSR `index` is one of a local APIC's (IA32_APIC_BASE apart, which has functions of its own).
#[inline]
pub const fn owns_msr(index: u32) -> bool {
    matches!(index, MSR_TSC_DEADLINE | X2APIC_FIRST..=X2APIC_LAST)
}

/// Whether a write of MSR `index` leaves the local APIC as it is for those who send it interrupts, but for the priority by which they
/// may choose between several, which they can learn of later; and leaves CR8 as it is.
#[inline]
pub(crate) const fn is_own_affair(index: u32) -> bool {
    match index {
        MSR_TSC_DEADLINE => true,
        X2APIC_FIRST..=X2APIC_LAST => {
            matches!((index - X2APIC_FIRST) as u16 * 16, reg::EOI | reg::ICR | reg::INITIAL_COUNT | reg::SELF_IPI)
        }
        _ => false,
    }
}
