// SPDX-License-Identifier: MIT OR Apache-2.0
//! Calls to the hypervisor and to what stands in for firmware, and waiting.

use crate::harness::{Case, CaseResult};
use crate::machine::{Machine, CODE};
use crate::{code, ensure_eq, table};
use axvcpu_uapi::addr::GuestPhysAddr;
use axvcpu_uapi::exit::AxVCpuExitReason as Exit;

/// The cases.
pub(super) fn cases() -> Vec<Case> {
    table! {
        "calls/hvc" => hvc;
        "calls/hvc-answer" => hvc_answer;
        "calls/smc-never-reaches-firmware" => smc;
        "psci/version-and-features" => psci_version;
        "psci/cpu-on" => cpu_on;
        "psci/affinity-info" => affinity_info;
        "psci/off-and-reset" => off_and_reset;
        "wait/wfi" => wfi;
        "wait/cpu-suspend" => cpu_suspend;
        "wait/wfe-goes-on" => wfe;
    }
}

fn hvc() -> CaseResult {
    let code = code!(
        hvc,
        "mov x0, #0x1000",
        "mov x1, #1",
        "mov x2, #2",
        "mov x3, #3",
        "mov x4, #4",
        "mov x5, #5",
        "mov x6, #6",
        "hvc #0x42"
    );
    let mut machine = Machine::new(code)?;
    machine.expect(Exit::Hypercall { nr: 0x1000, args: [1, 2, 3, 4, 5, 6] })?;
    ensure_eq!(machine.vcpu.general().pc, CODE + code.len() as u64, "the PC is behind the instruction");
    Ok(())
}

fn hvc_answer() -> CaseResult {
    let code = code!(hvc_answer, "mov x9, #0", "2: mov x0, x9", "hvc #0", "add x9, x0, #1", "b 2b");
    let mut machine = Machine::new(code)?;
    let mut expected = 0;
    for round in 0..1000 {
        let [nr, ..] = machine.expect_call()?;
        ensure_eq!(nr, expected, "round {round}");
        machine.vcpu.reply(3 * round);
        expected = 3 * round + 1;
    }
    Ok(())
}

fn smc() -> CaseResult {
    // A vendor's call, and a secure monitor's that would be fatal: SYSTEM_OFF of PSCI is ours, so not that.
    let code = code!(
        smc,
        "movz x0, #0x8200, lsl #16",
        "smc #0",
        "mov x1, x0",
        "movz x0, #0xc300, lsl #16",
        "movk x0, #0x17",
        "smc #0",
        "mov x2, x0",
        "mov x0, #0",
        "hvc #0"
    );
    let mut machine = Machine::new(code)?;
    let [_, vendor, sip, ..] = machine.expect_call()?;
    ensure_eq!((vendor, sip), (u64::MAX, u64::MAX), "not supported");
    Ok(())
}

fn psci_version() -> CaseResult {
    let code = code!(
        psci_version,
        "movz x0, #0x8400, lsl #16",
        "smc #0",
        "mov x1, x0",
        "movz x0, #0x8400, lsl #16",
        "hvc #0",
        "mov x2, x0",
        "movz x0, #0x8400, lsl #16",
        "movk x0, #0xa",
        "movz x1, #0xc400, lsl #16",
        "movk x1, #3",
        "hvc #0",
        "mov x3, x0",
        "movz x0, #0x8000, lsl #16",
        "hvc #0",
        "mov x4, x0",
        "mov x1, x2",
        "mov x0, #0x99",
        "hvc #0"
    );
    let mut machine = Machine::new(code)?;
    let [nr, by_hvc, same, features, smccc, ..] = machine.expect_call()?;
    ensure_eq!((nr, by_hvc, same), (0x99, 0x1_0001, 0x1_0001), "PSCI 1.1");
    ensure_eq!((features, smccc), (0, 0x1_0001), "CPU_ON is there; SMCCC 1.1");
    Ok(())
}

fn cpu_on() -> CaseResult {
    let code = code!(
        cpu_on,
        "movz x0, #0xc400, lsl #16",
        "movk x0, #3",
        "mov x1, #1",
        "movz x2, #0x4000, lsl #16",
        "mov x3, #0x77",
        "smc #0",
        "hvc #1"
    );
    let mut machine = Machine::new(code)?;
    let entry_point = GuestPhysAddr::new(0x4000_0000);
    machine.expect(Exit::CpuUp { target_cpu: 1, entry_point, arg: 0x77 })?;
    machine.vcpu.reply(-4i64 as u64); // ALREADY_ON
    let [answer, ..] = machine.expect_call()?;
    ensure_eq!(answer, -4i64 as u64, "the answer");
    Ok(())
}

fn affinity_info() -> CaseResult {
    let code = code!(
        affinity_info,
        "movz x0, #0xc400, lsl #16",
        "movk x0, #4",
        "mov x1, #1",
        "mov x2, #0",
        "smc #0",
        "hvc #1"
    );
    let mut machine = Machine::new(code)?;
    let [nr, target, level, ..] = machine.expect_call()?;
    ensure_eq!((nr, target, level), (0xc400_0004, 1, 0), "the call");
    machine.vcpu.reply(1); // OFF
    ensure_eq!(machine.expect_call()?[0], 1, "the answer");
    Ok(())
}

fn off_and_reset() -> CaseResult {
    let code = code!(
        off_and_reset,
        "movz x0, #0x8400, lsl #16",
        "movk x0, #9",
        "hvc #0",
        "movz x0, #0x8400, lsl #16",
        "movk x0, #2",
        "hvc #0",
        "movz x0, #0x8400, lsl #16",
        "movk x0, #8",
        "hvc #0",
        "b ."
    );
    let mut machine = Machine::new(code)?;
    machine.expect(Exit::SystemReset)?;
    machine.expect(Exit::CpuDown { state: 0 })?;
    machine.expect(Exit::SystemDown)
}

fn wfi() -> CaseResult {
    let code = code!(wfi, "mov x0, #1", "wfi", "add x0, x0, #1", "wfi", "hvc #0");
    let mut machine = Machine::new(code)?;
    machine.expect(Exit::Halt)?;
    ensure_eq!(machine.vcpu.general().pc, CODE + 8, "behind WFI");
    machine.expect(Exit::Halt)?;
    ensure_eq!(machine.expect_call()?[0], 2, "it went on");
    Ok(())
}

fn cpu_suspend() -> CaseResult {
    let code = code!(cpu_suspend, "movz x0, #0xc400, lsl #16", "movk x0, #1", "hvc #0", "add x0, x0, #5", "hvc #0");
    let mut machine = Machine::new(code)?;
    machine.expect(Exit::Halt)?;
    ensure_eq!(machine.expect_call()?[0], 5, "SUCCESS when it ends");
    Ok(())
}

fn wfe() -> CaseResult {
    let code = code!(wfe, "mov x0, #0", "2: wfe", "add x0, x0, #1", "cmp x0, #100", "b.ne 2b", "hvc #0");
    let mut machine = Machine::new(code)?;
    ensure_eq!(machine.expect_call()?[0], 100, "rounds");
    Ok(())
}
