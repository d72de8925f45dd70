// SPDX-License-Identifier: MIT OR Apache-2.0
//! Accesses of which one half is in one page and the other in the next, which the guest's tables may not allow: with the first
//! page in memory the CPU itself takes the abort, with the first page at the device the emulator has to make the same.

use axvcpu_uapi::arm64::{Fp, General, System, PSTATE_DAIF, PSTATE_EL0, PSTATE_EL1H, PSTATE_EL1T};

use super::{words, Bench, BYTES, HVC, MIDDLE, PLACES, SCTLR};
use crate::harness::{CaseResult, Stop};
use crate::machine::{DATA, HOLE, RAM, STACK, TABLES};
use crate::{code, ensure, ensure_eq};

/// Tables of level 2 and 3 (two of these) for what begins at [`WINDOW`].
const LEVEL2: u64 = TABLES + 0x2000;
const LEVEL3: u64 = TABLES + 0x3000;
/// A virtual address.
const WINDOW: u64 = 0x8000_0000;
/// A page, normal memory and inner shareable, that has been accessed; EL0 may access it; nobody may write it.
const PAGE: u64 = 0x703;
const USER: u64 = 1 << 6;
const READ_ONLY: u64 = 1 << 7;
/// PSTATE.PAN and UAO.
const PAN: u64 = 1 << 22;
const UAO: u64 = 1 << 23;
/// SVC #0.
const SVC: u32 = 0xd400_0001;
/// SCTLR_EL1.SPAN.
const SPAN: u64 = 1 << 23;

/// What is left behind.
#[derive(Debug, PartialEq)]
struct End {
    general: General,
    fp: Fp,
    elr: u64,
    spsr: u64,
    esr: u64,
    /// Relative to the first page.
    far: u64,
    second: Vec<u8>,
}

/// Whether a syndrome is that of a data abort, from EL0 or EL1.
fn is_abort(esr: u64) -> bool {
    esr >> 27 == 0x24 >> 1
}

impl Bench {
    /// Runs the instruction at `pc`, which accesses the end of page `window` behind [`WINDOW`] and the beginning of the next:
    /// the first is at `first`, and the other's entry is `second`.
    fn across(&mut self, window: u64, first: u64, second: u64, pc: u64, pstate: u64, sctlr: u64) -> Result<End, Stop> {
        self.m.write_u64(LEVEL3 + 8 * window, first | PAGE | USER)?;
        self.m.write_u64(LEVEL3 + 8 * (window + 1), second)?;
        let page = WINDOW + 0x1000 * window;
        self.m.write(DATA, &[0x5a; 16])?;
        // What the call before returns.
        self.m.vcpu.reply(0);
        let mut general = General { pc, pstate: pstate | PSTATE_DAIF, sp_el0: STACK, ..General::default() };
        (general.x[1], general.x[2], general.x[3]) = (page + 0xff8, 0x0102_0304_0506_0708, 0x1112_1314_1516_1718);
        general.x[4] = page + 0xffc;
        self.m.vcpu.set(&general)?;
        self.m.vcpu.set(&Fp::default())?;
        let mut system: System = self.m.vcpu.get()?;
        (system.sp_el1, system.sctlr_el1) = (STACK, sctlr);
        (system.elr_el1, system.spsr_el1, system.esr_el1, system.far_el1) = (0, 0, 0, page);
        self.m.vcpu.set(&system)?;
        self.run(0)?;
        let (mut general, system) = (self.m.vcpu.general(), self.m.registers()?);
        for x in [1, 4] {
            general.x[x] = general.x[x].wrapping_sub(page);
        }
        let mut second = vec![0; 16];
        self.m.ram.read((DATA - RAM) as usize, &mut second)?;
        let System { elr_el1: elr, spsr_el1: spsr, esr_el1: esr, far_el1: far, .. } = system;
        // After an abort what was to be loaded into vector registers is unknown.
        let fp = if is_abort(esr) { Fp::default() } else { self.m.vcpu.get()? };
        Ok(End { general, fp, elr, spsr, esr, far: far.wrapping_sub(page), second })
    }
}

pub(super) fn half_not_allowed() -> CaseResult {
    let words = words(code!(
        half_not_allowed,
        "ldp x2, x3, [x1]",
        "stp x2, x3, [x1]",
        "ldp x2, x3, [x1], #16",
        "stp q2, q3, [x4, #-16]!",
        "ldtr x2, [x4]",
        "sttr x2, [x4]",
        "ld1 {{v5.16b}}, [x1]",
    ));
    let mut bench = Bench::new()?;
    bench.m.write_u64(TABLES + 16, LEVEL2 | 3)?;
    bench.m.write_u64(LEVEL2, LEVEL3 | 3)?;
    bench.m.write_u64(LEVEL2 + 8, (LEVEL3 + 0x1000) | 3)?;
    // The code, which both levels may execute as neither may write it.
    bench.m.write_u64(LEVEL3, PLACES | PAGE | USER | READ_ONLY)?;
    for (i, word) in (0..).zip(&words) {
        bench.m.write_u64(PLACES + 16 * i, u64::from(SVC) << 32 | u64::from(*word))?;
        bench.m.write_u64(PLACES + 16 * i + 8, u64::from(HVC) << 32 | u64::from(*word))?;
    }
    let all = DATA | PAGE;
    let seconds = [all | USER, all, all | USER | READ_ONLY, all | READ_ONLY, all & !(1 << 10) | USER, 0];
    let states = [PSTATE_EL0, PSTATE_EL1H, PSTATE_EL1T, PSTATE_EL1H | PAN, PSTATE_EL1H | UAO];
    let sctlr = SCTLR | SPAN;
    let (mut window, mut aborts, mut emulated) = (4, 0, 0);
    for (i, word) in (0..).zip(&words) {
        for second in seconds {
            // A new place each time, so that no TLB knows it.
            for (state, sctlr) in states.iter().map(|state| (*state, sctlr)).chain([(PSTATE_EL1H, sctlr & !SPAN)]) {
                let pc = WINDOW + 16 * i + if state == PSTATE_EL0 { 0 } else { 8 };
                let memory = bench.across(window, BYTES + MIDDLE, second, pc, state, sctlr)?;
                ensure_eq!(bench.emulated, emulated, "in memory the CPU does it");
                let device = bench.across(window + 2, HOLE + MIDDLE, second, pc, state, sctlr)?;
                ensure_eq!(
                    device,
                    memory,
                    "{word:#010x} into {second:#x} with PSTATE {state:#x}, SCTLR_EL1 {sctlr:#x}"
                );
                aborts += u64::from(is_abort(memory.esr));
                emulated = bench.emulated;
                window += 4;
            }
        }
    }
    println!("# {emulated} accesses emulated, {aborts} aborts");
    ensure!(aborts > 50 && emulated > 100, "too few accesses, or aborts");
    Ok(())
}
