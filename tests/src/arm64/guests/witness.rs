// SPDX-License-Identifier: MIT OR Apache-2.0
//! The host's registers that no program can see: a module of the lab's (`scripts/lab/witness`) reads them right before and right
//! behind each stretch of a guest that leaves something else in all it can reach.

use super::interrupts::{machine, SYNCHRONOUS};
use crate::harness::{Case, CaseResult, Stop};
use crate::machine::Machine;
use crate::pin::{pin, Allowed, SELF};
use crate::{code, ensure, ensure_eq, gic_code, table};
use axvcpu_uapi::exit::AxVCpuExitReason as Exit;
use std::fs;
use std::path::Path;
use std::process::{self, Command};

/// The cases.
pub(super) fn cases() -> Vec<Case> {
    table! {
        "host/registers-of-el2" => registers, in 60;
    }
}

/// The witness, as long as it is loaded.
struct Witness;

impl Witness {
    const MODULE: &'static str = "/lab/tests/axvcpu_witness.ko";
    const TESTIMONY: &'static str = "/sys/kernel/debug/axvcpu-witness";

    /// Loads it, for the guest of this process's.
    fn call() -> Result<Self, Stop> {
        if !Path::new(Self::MODULE).exists() {
            return Err(Stop::Skip(format!("there is no {}", Self::MODULE)));
        }
        run(Command::new("insmod").arg(Self::MODULE).arg(format!("pid={}", process::id())))?;
        Ok(Self)
    }

    /// How many windows there were, and each register: its name, and how many of them it was wrong in.
    fn hear(&self) -> Result<(u64, Vec<Testimony>), Stop> {
        let text = fs::read_to_string(Self::TESTIMONY)?;
        let mut lines = text.lines().map(|line| line.split_once(' ').unwrap_or((line, "")));
        let number = |word: &str| word.parse().map_err(|_| Stop::Fail(format!("not what the witness says: {text}")));
        let windows = match lines.next() {
            Some(("windows", count)) => number(count)?,
            _ => return Err(Stop::Fail(format!("not what the witness says: {text}"))),
        };
        let registers = lines.map(|(name, rest)| {
            let (wrong, values) = rest.split_once(' ').unwrap_or((rest, ""));
            Ok(Testimony { name: name.into(), wrong: number(wrong)?, values: values.into() })
        });
        Ok((windows, registers.collect::<Result<_, Stop>>()?))
    }
}

impl Drop for Witness {
    fn drop(&mut self) {
        // If it stays, so does the host's state, which the next case to need it will tell.
        let _ = run(Command::new("rmmod").arg("axvcpu_witness"));
    }
}

/// What the witness says of a register.
struct Testimony {
    name: String,
    wrong: u64,
    /// What it should have been, and what it was.
    values: String,
}

fn run(command: &mut Command) -> CaseResult {
    let output = command.output()?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// A [`gic_code!`] with the timer due for ever, whose handler of undefined instructions is [`skipping`]: leaves X9 in all that it may
/// reach and all that it may not, and calls; then again with another X9.
fn trespasser() -> &'static [u8] {
    gic_code!(
        trespasser,
        // More to list than the timer: SGIs 1 to 3 to itself.
        "mov x9, #1",
        "movk x9, #0x100, lsl #16",
        "msr icc_sgi1r_el1, x9",
        "movk x9, #0x200, lsl #16",
        "msr icc_sgi1r_el1, x9",
        "movk x9, #0x300, lsl #16",
        "msr icc_sgi1r_el1, x9",
        "msr cntv_cval_el0, xzr",
        "mov x9, #1",
        "msr cntv_ctl_el0, x9",
        "isb",
        "mov x9, #-1",
        "2: msr tpidr_el0, x9",
        "msr tpidrro_el0, x9",
        "msr tpidr_el1, x9",
        "msr S3_3_C13_C0_5, x9", // TPIDR2_EL0
        "msr contextidr_el1, x9",
        "msr cntkctl_el1, x9",
        "msr par_el1, x9",
        "msr csselr_el1, x9",
        "msr far_el1, x9",
        "msr mair_el1, x9",
        "msr ttbr0_el1, x9",
        "msr ttbr1_el1, x9",
        "msr S3_0_C1_C0_6, x9", // GCR_EL1
        "msr S3_0_C1_C2_0, x9", // ZCR_EL1
        "msr S3_0_C1_C2_6, x9", // SMCR_EL1
        "msr S3_0_C5_C6_0, x9", // TFSR_EL1
        // Debugging.
        "msr mdscr_el1, x9",
        "msr oslar_el1, x9",
        "msr dbgbvr0_el1, x9",
        "msr dbgbcr0_el1, x9",
        "msr dbgwvr0_el1, x9",
        "msr dbgwcr0_el1, x9",
        // Counting.
        "msr pmcr_el0, x9",
        "msr pmcntenset_el0, x9",
        "msr pmuserenr_el0, x9",
        "msr pmintenset_el1, x9",
        "msr pmccfiltr_el0, x9",
        // The keys of pointer authentication.
        "msr S3_0_C2_C1_0, x9",
        "msr S3_0_C2_C1_1, x9",
        "msr S3_0_C2_C1_2, x9",
        "msr S3_0_C2_C2_0, x9",
        "msr S3_0_C2_C2_2, x9",
        // The interrupt controller.
        "msr icc_sre_el1, x9",
        "msr icc_ctlr_el1, x9",
        "msr icc_bpr1_el1, x9",
        "msr icc_pmr_el1, x9",
        "msr icc_igrpen1_el1, x9",
        // Of the processor state: PAN, UAO, DIT, SSBS, TCO.
        "msr S3_0_C4_C2_3, x9",
        "msr S3_0_C4_C2_4, x9",
        "msr S3_3_C4_C2_5, x9",
        "msr S3_3_C4_C2_6, x9",
        "msr S3_3_C4_C2_7, x9",
        "hvc #0",
        "mvn x9, x9",
        "b 2b"
    )
}

/// Goes on behind the instruction.
fn skipping() -> &'static [u8] {
    code!(skipping, "mrs x10, elr_el1", "add x10, x10, #4", "msr elr_el1, x10", "eret")
}

/// Runs to the next call. What goes to userspace on the way is done.
fn next_call(m: &mut Machine) -> CaseResult {
    loop {
        match m.run()?.reason {
            Exit::Hypercall { .. } => return Ok(()),
            Exit::SysRegWrite { .. } => {}
            other => return Err(Stop::Fail(format!("an unexpected exit: {other:x?}"))),
        }
    }
}

fn registers() -> CaseResult {
    const ROUNDS: u64 = 60;
    let allowed = Allowed::now()?;
    let cpu = *allowed.cpus.first().ok_or_else(|| Stop::Fail("no CPU".into()))?;
    let mut m = machine(trespasser(), &[])?;
    m.write(SYNCHRONOUS, skipping())?;
    let witness = Witness::call()?;
    pin(SELF, cpu)?;
    for _ in 0..ROUNDS {
        next_call(&mut m)?;
    }
    let (windows, registers) = witness.hear()?;
    // In its first window the timer was not due beforehand.
    ensure!(windows >= ROUNDS - 1, "the witness saw {windows} windows");
    for name in ["HCR_EL2", "TPIDR_EL0", "ICH_LR0_EL2", "SCTLR_EL2", "DAIF"] {
        ensure!(registers.iter().any(|register| register.name == name), "the witness did not look at {name}");
    }
    let wrong: Vec<String> = registers
        .iter()
        .filter(|register| register.wrong != 0)
        .map(|Testimony { name, wrong, values }| format!("{name} in {wrong} of {windows} windows ({values})"))
        .collect();
    ensure_eq!(wrong, Vec::<String>::new(), "registers that the host did not get back");
    Ok(())
}
