// SPDX-License-Identifier: MIT OR Apache-2.0
//! Several vCPUs of one machine: SGIs between them, SPIs for one or the other, and starting and stopping them by PSCI.

use super::interrupts::{self, when_asleep};
use super::timer;
use crate::gic_code;
use crate::harness::{self, Case, CaseResult, Stop};
use crate::machine::{Machine, CODE, GICD, STACK};
use crate::{code, ensure, ensure_eq, table};
use axvcpu_uapi::arm64::{General, System, GIC_SET_SPI, PSTATE_DAIF, PSTATE_EL1H};
use axvcpu_uapi::client::{Apic, Kicker, Vcpu};
use axvcpu_uapi::exit::AxVCpuExitReason as Exit;
use std::thread;

/// The cases.
pub(super) fn cases() -> Vec<Case> {
    table! {
        "smp/sgis-between-two-that-wait" => ping_pong, in 60;
        "smp/sgis-between-two-that-spin" => spinning, in 60;
        "smp/sgi-to-all-others" => broadcast, in 60;
        "smp/spi-follows-its-route" => routed, in 60;
        "smp/timers-of-each" => timers, in 60;
        "smp/cpu-on-off-and-on" => power, in 60;
    }
}

/// A machine with a GIC and `count` vCPUs, all about to run `code`, each with its number in X19 and a stack of its own.
/// `handler` takes their IRQs.
pub(super) fn machine(code: &[u8], handler: &[u8], count: u32) -> Result<(Machine, Vec<Vcpu>), Stop> {
    let mut m = interrupts::machine(code, handler)?;
    let others = (1..count).map(|id| {
        let mut vcpu = Machine::vcpu_of(&m.vm, &m.space, id, Apic::InKernel)?;
        let mut general: General = vcpu.get()?;
        general.x[19] = id.into();
        vcpu.set(&general)?;
        let system: System = vcpu.get()?;
        vcpu.set(&System { sp_el1: STACK + 0x1000 * u64::from(id), ..system })?;
        Ok(vcpu)
    });
    let others = others.collect::<Result<_, Stop>>()?;
    m.modify(|general| general.x[19] = 0)?;
    Ok((m, others))
}

/// Runs to the next hypercall and returns X0 and X1.
fn call(vcpu: &mut Vcpu) -> Result<(u64, u64), Stop> {
    loop {
        harness::check_time()?;
        match vcpu.run()?.reason {
            Exit::Hypercall { nr, args } => return Ok((nr, args[0])),
            Exit::Interrupted => {}
            other => return Err(Stop::Fail(format!("{other:x?} at {:x}", vcpu.general().pc))),
        }
    }
}

/// Runs all vCPUs, each to its next hypercall, and returns what that said.
pub(super) fn all(m: &mut Machine, others: &mut [Vcpu]) -> Result<Vec<(u64, u64)>, Stop> {
    thread::scope(|scope| {
        let threads: Vec<_> = others.iter_mut().map(|vcpu| scope.spawn(|| call(vcpu))).collect();
        let first = call(&mut m.vcpu);
        let rest = threads.into_iter().map(|thread| harness::joined(thread.join())?);
        std::iter::once(first).chain(rest).collect()
    })
}

/// Counts interrupts in X7.
fn counting() -> &'static [u8] {
    code!(counting, "mrs x10, icc_iar1_el1", "add x7, x7, #1", "msr icc_eoir1_el1, x10", "eret")
}

const ROUNDS: u64 = 500;

/// A guest of two vCPUs that take turns, [`ROUNDS`] times: vCPU 0 sends SGI 3 to vCPU 1 and waits for the answer. X7 counts
/// interrupts, X8 rounds; `$begin` is executed once, `$wait` until X7 has reached X8, whose comparison it ends with.
macro_rules! taking_turns {
    ($name:ident, $begin:literal, $($wait:literal),+ $(,)?) => {
        gic_code!(
            $name,
            // Both are ready.
            "movz x4, #0x4010, lsl #16",
            "mov x9, #1",
            "str x9, [x4, x19, lsl #3]",
            "6: ldr x9, [x4]",
            "cbz x9, 6b",
            "7: ldr x9, [x4, #8]",
            "cbz x9, 7b",
            "mov x7, #0",
            "mov x8, #0",
            "eor x5, x19, #1",
            "mov x9, #1",
            "lsl x5, x9, x5",
            "movk x5, #0x300, lsl #16",
            $begin,
            "cbnz x19, 3f",
            "2: msr icc_sgi1r_el1, x5",
            "isb",
            "3: add x8, x8, #1",
            $($wait,)+
            "b.lt 4b",
            "cmp x8, #500",
            "b.lt 2b",
            "cbz x19, 5f",
            "msr icc_sgi1r_el1, x5",
            "isb",
            "5: mov x0, x7",
            "mov x1, x8",
            "hvc #0"
        )
    };
}

/// Runs one of [`taking_turns!`].
fn take_turns(code: &'static [u8]) -> CaseResult {
    let (mut m, mut others) = machine(code, counting(), 2)?;
    let counts = all(&mut m, &mut others)?;
    ensure_eq!(counts, [(ROUNDS, ROUNDS), (ROUNDS, ROUNDS)], "interrupts and rounds");
    Ok(())
}

fn ping_pong() -> CaseResult {
    // WFI with exceptions masked, then let them in.
    take_turns(taking_turns!(
        ping_pong,
        "msr daifset, #2",
        "4: wfi",
        "msr daifclr, #2",
        "isb",
        "msr daifset, #2",
        "cmp x7, x8",
    ))
}

fn spinning() -> CaseResult {
    take_turns(taking_turns!(spinning, "msr daifclr, #2", "4: yield", "cmp x7, x8"))
}

fn broadcast() -> CaseResult {
    // vCPU 0 waits until the three others have announced themselves in memory, then interrupts them all, with IRM.
    let code = gic_code!(
        broadcast,
        "mov x7, #0",
        "movz x4, #0x4010, lsl #16",
        "mov x9, #1",
        "str x9, [x4, x19, lsl #3]",
        "cbnz x19, 4f",
        "2: ldr x9, [x4, #8]",
        "ldr x8, [x4, #16]",
        "and x9, x9, x8",
        "ldr x8, [x4, #24]",
        "and x9, x9, x8",
        "cbz x9, 2b",
        "movz x9, #0x100, lsl #32",
        "movk x9, #0x500, lsl #16",
        "msr icc_sgi1r_el1, x9",
        "isb",
        "msr daifclr, #2",
        "isb",
        "b 5f",
        "4: wfi",
        "msr daifclr, #2",
        "isb",
        "msr daifset, #2",
        "cbz x7, 4b",
        "5: mov x0, x7",
        "hvc #0"
    );
    let (mut m, mut others) = machine(code, counting(), 4)?;
    let counts: Vec<u64> = all(&mut m, &mut others)?.into_iter().map(|(count, _)| count).collect();
    ensure_eq!(counts, [0, 1, 1, 1], "interrupts of each");
    Ok(())
}

fn routed() -> CaseResult {
    // Edge-triggered SPI 40, first for vCPU 0, then by vCPU 0's own doing for vCPU 1.
    let code = gic_code!(
        routed,
        "mov x7, #0",
        "movz w9, #2, lsl #16",
        "str w9, [x20, #0xc08]",
        "2: wfi",
        "msr daifclr, #2",
        "isb",
        "msr daifset, #2",
        "cbz x7, 2b",
        "mov x7, #0",
        "mov x9, #0x6140",
        "mov x8, #1",
        "str x8, [x20, x9]",
        "mov x0, x19",
        "mov x1, x10",
        "hvc #0",
        "b 2b"
    );
    let (mut m, mut others) = machine(code, counting(), 2)?;
    let (vm, kicker) = (m.vm.clone(), m.vcpu.kicker());
    // What a vCPU comes to that is interrupted once it sleeps.
    let interrupted = |vcpu: &mut Vcpu, watched: Kicker| -> Result<(u64, u64), Stop> {
        let vm = vm.clone();
        let thread = when_asleep(watched, move || Ok(vm.signal_msi(GICD + GIC_SET_SPI, 40)?));
        let said = call(vcpu);
        interrupts::join(thread)??;
        said
    };
    ensure_eq!(interrupted(&mut m.vcpu, kicker)?, (0, 40), "by reset, it is vCPU 0's");
    let other = others.first_mut().ok_or_else(|| Stop::Fail("no second vCPU".into()))?;
    for _ in 0..5 {
        let kicker = other.kicker();
        ensure_eq!(interrupted(other, kicker)?, (1, 40), "routed to vCPU 1");
    }
    Ok(())
}

fn timers() -> CaseResult {
    // Each vCPU counts 50 ticks of its own, of different length. The next one is due a period after the handler has run, not after the
    // last: on a slow host there would be no time left between two of them.
    let code = timer::ticking_code!(
        timers,
        ("add x9, x19, #1", "mov x8, #500", "mul x9, x9, x8"),
        "cmp x7, #50",
        "mrs x0, cntvct_el0",
        "sub x0, x0, x5",
        "mov x9, #49",
        "mul x1, x9, x6",
        "hvc #0"
    );
    let (mut m, mut others) = machine(code, timer::ticking(), 4)?;
    for (id, (took, least)) in all(&mut m, &mut others)?.into_iter().enumerate() {
        ensure!(took >= least, "vCPU {id}: 50 ticks in {took} counts, which is less than {least}");
    }
    Ok(())
}

fn power() -> CaseResult {
    // vCPU 0 starts vCPU 1, which says so and switches itself off; then once more.
    let code = code!(
        power,
        "cbnz x19, 3f",
        "2: movz x0, #0xc400, lsl #16",
        "movk x0, #3",
        "mov x1, #1",
        "adr x2, 3f",
        "mov x3, #0x77",
        "smc #0",
        "hvc #1",
        "b 2b",
        "3: mov x1, x0",
        "mrs x2, mpidr_el1",
        "mov x0, #0x99",
        "hvc #1",
        "movz x0, #0x8400, lsl #16",
        "movk x0, #2",
        "hvc #0",
        "b ."
    );
    let (mut m, mut others) = machine(code, counting(), 2)?;
    let other = others.first_mut().ok_or_else(|| Stop::Fail("no second vCPU".into()))?;
    for round in 0..3 {
        let Exit::CpuUp { target_cpu, entry_point, arg } = m.run()?.reason else {
            return Err(Stop::Fail("no CPU_ON".into()));
        };
        ensure_eq!((target_cpu, arg), (1, 0x77), "whom, and with what");
        ensure!(entry_point.as_u64() > CODE, "where");
        let mut general: General = other.get()?;
        general.x[0] = arg;
        general.pc = entry_point.as_u64();
        general.pstate = PSTATE_EL1H | PSTATE_DAIF;
        other.set(&general)?;
        m.vcpu.reply(0);
        ensure_eq!(m.expect_call()?[0], 0, "SUCCESS");
        ensure_eq!(call(other)?, (0x99, 0x77), "round {round}: it runs, with its argument");
        ensure_eq!(other.run()?.reason, Exit::CpuDown { state: 0 }, "it is off");
    }
    Ok(())
}
