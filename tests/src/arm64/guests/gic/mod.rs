// SPDX-License-Identifier: MIT OR Apache-2.0
//! The interrupt controller: what a guest sees of it, and which interrupts reach it when.
//!
//! The guests begin with [`told_code!`], which readies the vCPU's part of the controller and stores what the case says in the
//! distributor, and take interrupts with [`handler`].

mod arrival;
mod order;
mod registers;

use super::interrupts;
use crate::code;
use crate::ensure_eq;
use crate::harness::{Case, CaseResult, Stop};
use crate::machine::{Machine, DATA, GICD};
use axvcpu_uapi::arm64::{GIC_CLEAR_SPI, GIC_SET_SPI};

/// The cases.
pub(super) fn cases() -> Vec<Case> {
    [registers::cases(), arrival::cases(), order::cases()].into_iter().flatten().collect()
}

/// A store to a register of the distributor: its offset, and a word.
type Store = (u32, u32);

// Registers of the distributor (Arm IHI 0069, section 12.9), of the SPIs that the cases use.
/// Groups of all.
const CTLR: u32 = 0;
/// Groups of SPIs 32 to 63, a bit each.
const IGROUPR1: u32 = 0x84;
/// Disables SPIs 32 to 63.
const ICENABLER1: u32 = 0x184;
/// Makes SPIs 32 to 63 pending.
const ISPENDR1: u32 = 0x204;
/// Priorities of SPIs 32 to 35, a byte each; the next four follow.
const IPRIORITYR8: u32 = 0x420;
/// Priorities of SPIs 40 to 43.
const IPRIORITYR10: u32 = IPRIORITYR8 + 8;
/// Configuration of SPIs 32 to 47, two bits each, of which the upper one says that it is an edge.
const ICFGR2: u32 = 0xc08;
/// Configuration of SPIs 48 to 63.
const ICFGR3: u32 = 0xc0c;

/// SPI 40 is an edge.
const EDGE_40: Store = (ICFGR2, 2 << 16);

/// Where a guest finds its stores: offset and word of each, and [`LAST`].
const STORES: u64 = DATA;
/// In place of an offset, the end.
const LAST: u32 = 1 << 31;

/// A [`gic_code!`] that goes on with the stores which [`machine`] was given. X9, X22 and X23 are lost.
macro_rules! told_code {
    ($name:ident, $($line:literal),+ $(,)?) => {
        $crate::gic_code!(
            $name,
            "movz x22, #0x4010, lsl #16",
            "8: ldp w9, w23, [x22], #8",
            "tbnz w9, #31, 9f",
            "str w23, [x20, x9]",
            "b 8b",
            "9:",
            $($line),+
        )
    };
}
use told_code;

/// What interrupts are handled with: X10 is the INTID. `HVC` behind the acknowledgement and behind the end. X0 is as before.
fn handler() -> &'static [u8] {
    code!(
        handler,
        "mov x11, x0",
        "mrs x10, icc_iar1_el1",
        "mov x0, x10",
        "hvc #1",
        "msr icc_eoir1_el1, x10",
        "isb",
        "mov x0, #0xe0d",
        "hvc #2",
        "mov x0, x11",
        "eret"
    )
}

/// X0 at the second `HVC` of the handler.
const END: u64 = 0xe0d;

/// A guest that lets interrupts in, says [`READY`] and spins.
fn spinning() -> &'static [u8] {
    told_code!(spinning, "msr daifclr, #2", "mov x0, #7", "hvc #0", "2: b 2b")
}

/// A guest that lets interrupts in and sleeps, and says [`READY`] each time it wakes.
fn sleeping() -> &'static [u8] {
    told_code!(sleeping, "msr daifclr, #2", "2: wfi", "mov x0, #7", "hvc #0", "b 2b")
}

/// X0 of a guest's own call.
const READY: u64 = 7;

/// A machine with a GIC that is about to run `code`, a [`told_code!`] with these stores, and has the handler in place.
fn machine(code: &[u8], stores: &[Store]) -> Result<Machine, Stop> {
    let machine = interrupts::machine(code, handler())?;
    let words: Vec<u8> = stores
        .iter()
        .chain(&[(LAST, 0)])
        .flat_map(|(offset, word)| [*offset, *word])
        .flat_map(u32::to_le_bytes)
        .collect();
    machine.write(STORES, &words)?;
    Ok(machine)
}

/// The same, of a guest that is [`spinning`] and has said so.
fn ready(stores: &[Store]) -> Result<Machine, Stop> {
    let mut machine = machine(spinning(), stores)?;
    expect(&mut machine, READY, "the guest is ready")?;
    Ok(machine)
}

fn set(machine: &Machine, intid: u32) -> CaseResult {
    Ok(machine.vm.signal_msi(GICD + GIC_SET_SPI, intid)?)
}

fn clear(machine: &Machine, intid: u32) -> CaseResult {
    Ok(machine.vm.signal_msi(GICD + GIC_CLEAR_SPI, intid)?)
}

/// Runs to the next hypercall, whose X0 must be `expected`.
fn expect(machine: &mut Machine, expected: u64, what: &str) -> CaseResult {
    let [found, ..] = machine.expect_call()?;
    ensure_eq!(found, expected, "{what}");
    Ok(())
}
