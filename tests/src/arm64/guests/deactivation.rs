// SPDX-License-Identifier: MIT OR Apache-2.0
//! The second half of an interrupt's end with EOImode 1: deactivation, by the vCPU that has acknowledged the interrupt or by
//! another one, which runs at the same time.

use super::smp::{all, machine};
use crate::eventfd::eventfd;
use crate::gic_code;
use crate::harness::{Case, CaseResult};
use crate::machine::{GICD, HOLE};
use crate::{code, ensure, ensure_eq, table};
use axvcpu_uapi::arm64::{GIC_CLEAR_SPI, GIC_SET_SPI};
use std::os::fd::AsFd;

/// The cases.
pub(super) fn cases() -> Vec<Case> {
    table! {
        "deactivation/on-another-vcpu" => by_the_other, in 60;
        "deactivation/by-the-active-register-of-another-vcpu" => by_register, in 60;
        "deactivation/of-a-level-is-told-to-its-eventfd" => resampled, in 60;
        "deactivation/of-the-timer-lets-it-come-again" => timer, in 60;
    }
}

/// How often [`rounds`] goes round.
const ROUNDS: u64 = 200;

/// IRQs: the priority is dropped, and X7 counts.
fn lowering() -> &'static [u8] {
    code!(lowering, "mrs x10, icc_iar1_el1", "msr icc_eoir1_el1, x10", "isb", "add x7, x7, #1", "eret")
}

/// A guest of two vCPUs: SPI 40, an edge, is made pending by vCPU 1 and taken by vCPU 0, which only spins and counts. When
/// vCPU 1 finds the count in memory risen, it deactivates the interrupt by `$deactivate` (X9 may be used), and begins again. The
/// count is at X4, which is in memory, and vCPU 0 leaves the guest for nobody.
macro_rules! rounds {
    ($name:ident, $($deactivate:literal),+ $(,)?) => {
        gic_code!(
            $name,
            "movz x4, #0x4010, lsl #16",
            "mov x7, #0",
            "mov x9, #2",
            "msr icc_ctlr_el1, x9",
            "isb",
            "cbnz x19, 3f",
            // vCPU 0.
            "movz w9, #2, lsl #16",
            "str w9, [x20, #0xc08]",
            "msr daifclr, #2",
            "mov x9, #1",
            "str x9, [x4, #8]",
            "2: str x7, [x4]",
            "cmp x7, #200",
            "b.lt 2b",
            "mov x0, x7",
            "hvc #0",
            // vCPU 1: vCPU 0 is ready.
            "3: ldr x9, [x4, #8]",
            "cbz x9, 3b",
            "mov x8, #0",
            "4: mov w9, #40",
            "str w9, [x20, #0x40]",
            "add x8, x8, #1",
            "5: ldr x9, [x4]",
            "cmp x9, x8",
            "b.lt 5b",
            $($deactivate,)+
            "cmp x8, #200",
            "b.lt 4b",
            "mov x0, x8",
            "hvc #0"
        )
    };
}

fn go_round(code: &'static [u8]) -> CaseResult {
    let (mut m, mut others) = machine(code, lowering(), 2)?;
    let counts: Vec<u64> = all(&mut m, &mut others)?.into_iter().map(|(count, _)| count).collect();
    ensure_eq!(counts, [ROUNDS, ROUNDS], "interrupts, and deactivations");
    Ok(())
}

fn by_the_other() -> CaseResult {
    go_round(rounds!(by_the_other, "mov x9, #40", "msr icc_dir_el1, x9", "isb"))
}

fn by_register() -> CaseResult {
    // GICD_ICACTIVER1.
    go_round(rounds!(by_register, "mov w9, #0x100", "str w9, [x20, #0x384]"))
}

fn resampled() -> CaseResult {
    // vCPU 0 takes SPI 40, a level; vCPU 1 deactivates it when told so by memory, and tells the device at HOLE.
    let code = gic_code!(
        resampled,
        "movz x4, #0x4010, lsl #16",
        "mov x7, #0",
        "mov x9, #2",
        "msr icc_ctlr_el1, x9",
        "isb",
        "cbnz x19, 3f",
        "msr daifclr, #2",
        "2: str x7, [x4]",
        "ldr x9, [x4, #8]",
        "cbz x9, 2b",
        "mov x0, x7",
        "hvc #0",
        "3: ldr x9, [x4]",
        "cbz x9, 3b",
        "mov x9, #40",
        "msr icc_dir_el1, x9",
        "isb",
        "movz x9, #0x0900, lsl #16",
        "str xzr, [x9]",
        "mov x9, #1",
        "str x9, [x4, #8]",
        "mov x0, #9",
        "hvc #0"
    );
    let (mut m, mut others) = machine(code, lowering(), 2)?;
    let (event, resample, told) = (eventfd()?, eventfd()?, eventfd()?);
    m.vm.attach_interrupt(&event, GICD + GIC_SET_SPI, 40, Some(resample.as_fd()))?;
    let at = axvcpu_uapi::client::IoAddress::Memory(HOLE);
    m.vm.attach_io(&told, axvcpu_uapi::client::IoPattern::any(at))?;
    event.write(1)?;
    let said = all(&mut m, &mut others)?;
    ensure_eq!(said.iter().map(|(nr, _)| *nr).collect::<Vec<_>>(), [1, 9], "one interrupt, and its end");
    ensure_eq!((told.read(), resample.read()), (Ok(1), Ok(1)), "the end is told once");
    Ok(m.vm.signal_msi(GICD + GIC_CLEAR_SPI, 40)?)
}

fn timer() -> CaseResult {
    // With several redistributors ICC_DIR_EL1 is trapped, so the physical interrupt behind the timer's is not deactivated by the
    // CPU. The handler sets the timer anew before it deactivates.
    let handler = code!(
        handler,
        "mrs x10, icc_iar1_el1",
        "msr icc_eoir1_el1, x10",
        "mrs x9, cntvct_el0",
        "add x9, x9, x6",
        "msr cntv_cval_el0, x9",
        "isb",
        "msr icc_dir_el1, x10",
        "isb",
        "add x7, x7, #1",
        "eret"
    );
    let code = gic_code!(
        timer_again,
        "mov x7, #0",
        "mov x9, #2",
        "msr icc_ctlr_el1, x9",
        "mrs x6, cntfrq_el0",
        "mov x9, #1000",
        "udiv x6, x6, x9",
        "mrs x9, cntvct_el0",
        "msr cntv_cval_el0, x9",
        "mov x9, #1",
        "msr cntv_ctl_el0, x9",
        "isb",
        "msr daifclr, #2",
        "2: cmp x7, #50",
        "b.lt 2b",
        "mov x0, x7",
        "hvc #0"
    );
    let (mut m, mut others) = machine(code, handler, 1)?;
    let ticks = all(&mut m, &mut others)?.first().map_or(0, |(count, _)| *count);
    // One more may come on the way out.
    ensure!(ticks >= 50, "only {ticks} ticks");
    Ok(())
}
