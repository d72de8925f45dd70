// SPDX-License-Identifier: MIT OR Apache-2.0
//! The virtual timer, and waiting for it.

use super::interrupts::{machine, nothing_comes};
use crate::gic_code;
use crate::harness::{Case, CaseResult};
use crate::machine::Machine;
use crate::{code, ensure, ensure_eq, table};
use axvcpu_uapi::arm64::System;
use axvcpu_uapi::exit::AxVCpuExitReason as Exit;
use axvcpu_uapi::vcpu::ExitKind;
use std::time::{Duration, Instant};

/// The cases.
pub(super) fn cases() -> Vec<Case> {
    table! {
        "timer/interrupts-a-running-guest" => running;
        "timer/wakes-a-waiting-guest" => waiting;
        "timer/masked-exceptions-still-end-wfi" => masked;
        "timer/asks-until-it-is-stopped" => level;
        "timer/far-away-sleeps-on" => far;
        "timer/ticks-without-the-program" => ticks;
        "timer/set-by-the-program" => set_by_program;
        "timer/physical-one-goes-to-the-program" => physical;
    }
}

/// Counts the timer's interrupts in X7, and has the next one come X6 counts later.
pub(super) fn ticking() -> &'static [u8] {
    code!(
        ticking,
        "mrs x10, icc_iar1_el1",
        "mrs x9, cntvct_el0",
        "add x9, x9, x6",
        "msr cntv_cval_el0, x9",
        "isb",
        "add x7, x7, #1",
        "msr icc_eoir1_el1, x10",
        "eret"
    )
}

/// A [`gic_code!`] whose timer ticks, with [`ticking`] as handler: as many times a second as X9 says behind `$rate`, until `$enough`
/// compares X7 with how often is enough. X5 is the counter at the beginning.
macro_rules! ticking_code {
    ($name:ident, ($($rate:literal),+), $enough:literal, $($line:literal),+ $(,)?) => {
        $crate::gic_code!(
            $name,
            "mov x7, #0",
            "mrs x6, cntfrq_el0",
            $($rate,)+
            "udiv x6, x6, x9",
            "mrs x5, cntvct_el0",
            "add x9, x5, x6",
            "msr cntv_cval_el0, x9",
            "mov x9, #1",
            "msr cntv_ctl_el0, x9",
            "isb",
            "msr daifclr, #2",
            "2: wfi",
            $enough,
            "b.lt 2b",
            $($line),+
        )
    };
}
pub(super) use ticking_code;

/// A handler that stops the timer, with X1 how late its interrupt comes, in counts, and then does `$more`.
macro_rules! stopping {
    ($name:ident, $($more:literal),+) => {
        code!(
            $name,
            "mrs x10, icc_iar1_el1",
            "mrs x1, cntvct_el0",
            "mrs x2, cntv_cval_el0",
            "sub x1, x1, x2",
            "msr cntv_ctl_el0, xzr",
            "isb",
            "msr icc_eoir1_el1, x10",
            "mov x0, x10",
            "hvc #1",
            $($more),+
        )
    };
}

fn stopping() -> &'static [u8] {
    stopping!(stopping, "eret")
}

/// The next hypercall is the timer's interrupt, and was not early. Late it may be: the host is emulated, and busy.
fn expect_timer(m: &mut Machine) -> CaseResult {
    let [intid, late, ..] = m.expect_call()?;
    ensure_eq!(intid, 27, "the interrupt");
    ensure!((late as i64) >= 0, "{} counts early", -(late as i64));
    let seconds = late / (u64::from(m.system.info()?.tsc_khz) * 1000);
    ensure!(seconds < 5, "{seconds} seconds late");
    Ok(())
}

fn running() -> CaseResult {
    let code = gic_code!(
        running,
        "msr daifclr, #2",
        "2: movz x9, #1, lsl #16",
        "msr cntv_tval_el0, x9",
        "mov x9, #1",
        "msr cntv_ctl_el0, x9",
        "isb",
        "3: mrs x9, cntv_ctl_el0",
        "tbnz x9, #0, 3b",
        "b 2b"
    );
    let mut m = machine(code, stopping())?;
    for _ in 0..10 {
        expect_timer(&mut m)?;
    }
    Ok(())
}

fn waiting() -> CaseResult {
    // 5 ms. A busy host may need so long to the WFI, which the handler leaves behind in any case.
    let code = gic_code!(
        waiting,
        "adr x22, 3f",
        "mrs x11, cntfrq_el0",
        "mov x9, #200",
        "udiv x11, x11, x9",
        "msr daifclr, #2",
        "2: msr cntv_tval_el0, x11",
        "mov x9, #1",
        "msr cntv_ctl_el0, x9",
        "isb",
        "wfi",
        "3: b 2b"
    );
    let mut m = machine(code, stopping!(stopping_behind_wfi, "msr elr_el1, x22", "eret"))?;
    for _ in 0..10 {
        expect_timer(&mut m)?;
    }
    let stats = m.vcpu.stats()?;
    ensure!(stats.halt_ns > 1_000_000, "it slept for {} ns only", stats.halt_ns);
    Ok(())
}

fn masked() -> CaseResult {
    let code = gic_code!(
        masked,
        "mov x8, #5",
        "2: movz x9, #2, lsl #16",
        "msr cntv_tval_el0, x9",
        "mov x9, #1",
        "msr cntv_ctl_el0, x9",
        "isb",
        "wfi",
        "mrs x1, cntvct_el0",
        "mrs x2, cntv_cval_el0",
        "sub x1, x1, x2",
        "mrs x0, icc_hppir1_el1",
        "msr cntv_ctl_el0, xzr",
        "isb",
        "hvc #0",
        "subs x8, x8, #1",
        "b.ne 2b",
        "mov x0, #0",
        "hvc #0"
    );
    let mut m = machine(code, stopping())?;
    for _ in 0..5 {
        expect_timer(&mut m)?;
    }
    ensure_eq!(m.expect_call()?[0], 0, "it was never taken");
    Ok(())
}

fn level() -> CaseResult {
    // Ended without a look at the timer it comes again; with IMASK set it does not, until that is cleared.
    let ending = code!(
        ending,
        "mrs x10, icc_iar1_el1",
        "cbz x5, 2f",
        "mov x9, #3",
        "msr cntv_ctl_el0, x9",
        "isb",
        "2: msr icc_eoir1_el1, x10",
        "mov x0, x10",
        "mrs x1, cntv_ctl_el0",
        "hvc #1",
        "eret"
    );
    let code = gic_code!(
        level,
        "mov x5, #0",
        "msr cntv_cval_el0, xzr",
        "mov x9, #1",
        "msr cntv_ctl_el0, x9",
        "msr daifclr, #2",
        "2: b 2b"
    );
    let mut m = machine(code, ending)?;
    for _ in 0..3 {
        ensure_eq!(m.expect_call()?[0], 27, "it asks");
    }
    m.modify(|general| general.x[5] = 1)?;
    let [intid, control, ..] = m.expect_call()?;
    ensure_eq!((intid, control), (27, 7), "it is masked, and due");
    nothing_comes(&mut m)?;
    let registers: System = m.registers()?;
    ensure_eq!(registers.cntv_ctl_el0, 3, "the guest's own mask");
    m.vcpu.set(&System { cntv_ctl_el0: 1, ..registers })?;
    ensure_eq!(m.expect_call()?[0], 27, "it asks again");
    Ok(())
}

fn far() -> CaseResult {
    let code = gic_code!(
        far,
        "mov x9, #-1",
        "msr cntv_cval_el0, x9",
        "mov x9, #1",
        "msr cntv_ctl_el0, x9",
        "isb",
        "2: wfi",
        "mov x0, #9",
        "hvc #0",
        "b 2b"
    );
    let mut m = machine(code, stopping())?;
    for _ in 0..3 {
        nothing_comes(&mut m)?;
    }
    let stats = m.vcpu.stats()?;
    ensure!(stats.exits[ExitKind::Halt as usize] <= 3, "WFI {} times", stats.exits[ExitKind::Halt as usize]);
    Ok(())
}

fn ticks() -> CaseResult {
    // 100 ticks, each 1/1000 of a second after the handler of the last, which alone counts them.
    let code = ticking_code!(
        ticks,
        ("mov x9, #1000"),
        "cmp x7, #100",
        "mrs x1, cntvct_el0",
        "sub x1, x1, x5",
        "mrs x2, cntfrq_el0",
        "mov x0, x7",
        "hvc #0"
    );
    let mut m = machine(code, ticking())?;
    let started = Instant::now();
    let [count, elapsed, frequency, ..] = m.expect_call()?;
    let host = started.elapsed();
    ensure!(count >= 100, "{count} ticks");
    let guest = Duration::from_secs_f64(elapsed as f64 / frequency as f64);
    ensure!(guest >= Duration::from_millis(count), "{count} ticks of 1 ms took {guest:?} in the guest");
    ensure!(guest <= host + Duration::from_millis(1), "{guest:?} in the guest, {host:?} outside");
    Ok(())
}

fn set_by_program() -> CaseResult {
    let code = gic_code!(set_by_program, "msr daifclr, #2", "hvc #0", "2: wfi", "b 2b");
    let mut m = machine(code, stopping())?;
    m.expect_call()?;
    let registers: System = m.registers()?;
    m.vcpu.set(&System { cntv_ctl_el0: 1, cntv_cval_el0: 1, ..registers })?;
    let [intid, ..] = m.expect_call()?;
    ensure_eq!(intid, 27, "the timer's interrupt");
    Ok(())
}

fn physical() -> CaseResult {
    // CNTP_CTL_EL0, which is not offered: op0 3, op1 3, CRn 14, CRm 2, op2 1.
    let register = axvcpu_uapi::arm64::system_register(3, 3, 14, 2, 1);
    let mut m = machine(gic_code!(physical, "mrs x3, cntp_ctl_el0", "hvc #0"), stopping())?;
    m.expect(Exit::SysRegRead { addr: register, reg: 3 })?;
    m.vcpu.reply_fault();
    m.expect_exception(4).map(|_| ())
}
