// SPDX-License-Identifier: MIT OR Apache-2.0
//! System registers: what a guest is told of its CPU, and what it does not have.

use crate::harness::{Case, CaseResult};
use crate::machine::{Machine, CODE};
use crate::{code, ensure, ensure_eq, table};
use axvcpu_uapi::arm64::{system_register, System};
use axvcpu_uapi::client::Apic;
use axvcpu_uapi::exit::AxVCpuExitReason as Exit;

/// The cases.
pub(super) fn cases() -> Vec<Case> {
    table! {
        "sysregs/id-registers-show-what-is-switched" => id_registers;
        "sysregs/identity" => identity;
        "sysregs/counters" => counters;
        "sysregs/debug-registers-do-nothing" => debug;
        "sysregs/hidden-ones-are-undefined" => hidden;
        "sysregs/unknown-ones-go-to-userspace" => unknown;
        "sysregs/refused-ones-are-undefined" => refused;
        "sysregs/pointer-authentication-keys-are-the-hosts" => keys;
        "sysregs/sve-is-undefined" => sve;
        "sysregs/set-way-maintenance-goes-to-userspace" => set_way;
    }
}

/// The syndrome of an undefined instruction.
const UNDEFINED: u64 = 1 << 25;

fn id_registers() -> CaseResult {
    let code = code!(
        id_registers,
        "mrs x0, id_aa64pfr0_el1",
        "mrs x1, id_aa64pfr1_el1",
        "mrs x2, id_aa64dfr0_el1",
        "mrs x3, id_aa64isar1_el1",
        "mrs x4, id_aa64mmfr0_el1",
        "mrs x5, id_aa64mmfr1_el1",
        "mrs x6, S3_0_C0_C4_4", // ID_AA64ZFR0_EL1
        "hvc #0"
    );
    let mut machine = Machine::new(code)?;
    let [pfr0, pfr1, dfr0, isar1, mmfr0, mmfr1, zfr0] = machine.expect_call()?;
    ensure_eq!(pfr0 & 0xffff, 0x0011, "EL0 and EL1, AArch64 only");
    ensure_eq!(pfr0 >> 24 & 0xff_ffff, 0, "no GIC, RAS, SVE, SEL2, MPAM, AMU");
    ensure_eq!(pfr1 & !0xff, 0, "no MTE, SME");
    ensure_eq!(dfr0, 0x10_1006, "Armv8 debug, no PMU");
    ensure_eq!(isar1 & 0xff00_0ff0, 0, "no pointer authentication");
    ensure_eq!(mmfr1 >> 4 & 0xff, 0, "no VMIDs, no VHE");
    ensure_eq!(zfr0, 0, "no SVE");
    let widths = [32, 36, 40, 42, 44, 48, 52];
    let bits = widths.get((mmfr0 & 15) as usize).copied();
    ensure_eq!(bits, Some(machine.system.info()?.guest_phys_bits), "the width of addresses");
    Ok(())
}

fn identity() -> CaseResult {
    let code =
        code!(identity, "mrs x0, midr_el1", "mrs x1, mpidr_el1", "mrs x2, revidr_el1", "mrs x3, currentel", "hvc #0");
    let mut machine = Machine::new(code)?;
    machine.vcpu = Machine::vcpu_of(&machine.vm, &machine.space, 21, Apic::None)?;
    let [midr, mpidr, revidr, el, ..] = machine.expect_call()?;
    // Bits 19:16: the architecture is told by the ID registers.
    ensure!(midr >> 16 & 15 == 15, "MIDR_EL1 is {midr:#x}");
    ensure_eq!((mpidr, revidr, el), (1 << 31 | 1 << 8 | 5, 0, 1 << 2), "MPIDR_EL1, REVIDR_EL1, CurrentEL");
    let registers: System = machine.vcpu.get()?;
    ensure_eq!(registers.mpidr_el1, mpidr, "as userspace sees it");
    ensure!(machine.vcpu.set(&System { mpidr_el1: 1 << 31, ..registers }).is_err(), "it cannot be changed");
    Ok(())
}

fn counters() -> CaseResult {
    let code = code!(
        counters,
        "mrs x0, cntvct_el0",
        "isb",
        "mrs x1, cntpct_el0",
        "isb",
        "mrs x2, cntvct_el0",
        "mrs x3, cntfrq_el0",
        "hvc #0"
    );
    let mut machine = Machine::new(code)?;
    let [first, physical, last, frequency, ..] = machine.expect_call()?;
    ensure!(first <= physical && physical <= last, "{first} {physical} {last}");
    ensure_eq!(frequency / 1000, u64::from(machine.system.info()?.tsc_khz), "frequency");
    ensure!(first / frequency < 60, "it started with the VM, not {} s ago", first / frequency);
    Ok(())
}

fn debug() -> CaseResult {
    let code = code!(
        debug,
        "mov x9, #0x8000",
        "msr mdscr_el1, x9",
        "mrs x0, mdscr_el1",
        "msr oslar_el1, xzr",
        "mrs x1, oslsr_el1",
        "mov x9, #0x1e5",
        "msr dbgbcr0_el1, x9",
        "mrs x2, dbgbcr0_el1",
        "adr x9, 2f",
        "msr dbgbvr0_el1, x9",
        "isb",
        "2: mov x3, #3",
        "hvc #0"
    );
    let [mdscr, oslsr, control, x3, ..] = Machine::new(code)?.expect_call()?;
    ensure_eq!((mdscr, oslsr, control, x3), (0x8000, 8, 0, 3), "registers");
    Ok(())
}

/// Runs `code`, whose first instruction must be undefined.
fn expect_undefined(code: &[u8], what: &str) -> CaseResult {
    let mut machine = Machine::new(code)?;
    let registers = machine.expect_exception(4).map_err(|stop| stop.context(what))?;
    ensure_eq!((registers.esr_el1, registers.elr_el1), (UNDEFINED, CODE), "{what}: ESR_EL1, ELR_EL1");
    ensure_eq!(registers.spsr_el1 & 0x3cf, 0x3c5, "{what}: SPSR_EL1");
    Ok(())
}

fn hidden() -> CaseResult {
    expect_undefined(code!(pmcr, "mrs x0, pmcr_el0", "hvc #0"), "PMCR_EL0")?;
    expect_undefined(code!(icc, "mrs x0, S3_0_C12_C12_0", "hvc #0"), "ICC_IAR1_EL1")?;
    expect_undefined(code!(pmu, "msr pmintenset_el1, x0", "hvc #0"), "PMINTENSET_EL1")?;
    expect_undefined(code!(claim, "mrs x0, dbgclaimset_el1", "hvc #0"), "DBGCLAIMSET_EL1")?;
    expect_undefined(code!(el2, "mrs x0, S3_4_C1_C1_0", "hvc #0"), "HCR_EL2")
}

fn unknown() -> CaseResult {
    let code = code!(unknown, "mrs x1, cntp_ctl_el0", "msr cntp_cval_el0, x2", "hvc #0");
    let mut machine = Machine::new(code)?;
    machine.modify(|general| general.x[2] = 0x77)?;
    machine.expect(Exit::SysRegRead { addr: system_register(3, 3, 14, 2, 1), reg: 1 })?;
    machine.vcpu.reply(0x1234);
    machine.expect(Exit::SysRegWrite { addr: system_register(3, 3, 14, 2, 2), value: 0x77 })?;
    ensure_eq!(machine.expect_call()?[1], 0x1234, "the answer");
    Ok(())
}

fn refused() -> CaseResult {
    let mut machine = Machine::new(code!(refused, "mov x1, #5", "mrs x1, cntp_ctl_el0", "hvc #0"))?;
    machine.run()?;
    machine.vcpu.reply_fault();
    let registers = machine.expect_exception(4)?;
    ensure_eq!((registers.esr_el1, registers.elr_el1), (UNDEFINED, CODE + 4), "ESR_EL1, ELR_EL1");
    ensure_eq!(machine.vcpu.general().x[1], 5, "the register");
    Ok(())
}

fn keys() -> CaseResult {
    // APIAKeyLo_EL1: the host's own return addresses are signed with it.
    expect_undefined(code!(write_key, "msr S3_0_C2_C1_0, x0", "hvc #0"), "write")?;
    expect_undefined(code!(read_key, "mrs x0, S3_0_C2_C1_0", "hvc #0"), "read")
}

fn sve() -> CaseResult {
    // RDVL X0, #1. EL1 allows it, so that it is not EL1 that stops it.
    let mut machine = Machine::new(code!(sve, ".inst 0x04bf5020", "hvc #0"))?;
    let registers = System { cpacr_el1: 3 << 20 | 3 << 16, ..machine.registers()? };
    machine.vcpu.set(&registers)?;
    let registers = machine.expect_exception(4)?;
    ensure_eq!((registers.esr_el1, registers.elr_el1), (UNDEFINED, CODE), "ESR_EL1, ELR_EL1");
    Ok(())
}

fn set_way() -> CaseResult {
    let code = code!(set_way, "mov x0, #0", "dc cisw, x0", "mov x0, #3", "hvc #0");
    let mut machine = Machine::new(code)?;
    machine.expect(Exit::SysRegWrite { addr: system_register(1, 0, 7, 14, 2), value: 0 })?;
    ensure_eq!(machine.expect_call()?[0], 3, "it went on");
    Ok(())
}
