// SPDX-License-Identifier: MIT OR Apache-2.0
//! The branches that overwrite a guest's branch history at each exit. Emulated CPUs predict nothing; but where the counter counts
//! instructions they can be counted, from one CPU model to another (`scripts/tests/aarch64`).

use crate::harness::{Case, CaseResult, Stop};
use crate::machine::Machine;
use crate::{code, ensure, table};
use std::process::Command;

/// The cases.
pub(super) fn cases() -> Vec<Case> {
    table! {
        "history/instructions-of-an-exit" => exit;
    }
}

/// QEMU's frequency of a counter that counts instructions.
const INSTRUCTIONS: u64 = 1_000_000_000;

/// Tells the fewest instructions that an exit has taken which the kernel answers, and what the module says of the branches among
/// them: more of them than three to each branch.
fn exit() -> CaseResult {
    let code = code!(
        exit,
        "mrs x1, cntfrq_el0",
        "mov x0, #-1",
        "mov x2, #1000",
        "2: isb",
        "mrs x3, cntvct_el0",
        "mrs x4, id_aa64pfr0_el1",
        "mrs x5, cntvct_el0",
        "sub x5, x5, x3",
        "cmp x5, x0",
        "csel x0, x5, x0, lo",
        "subs x2, x2, #1",
        "b.ne 2b",
        "hvc #0"
    );
    let [instructions, frequency, ..] = Machine::new(code)?.expect_call()?;
    if frequency != INSTRUCTIONS {
        return Err(Stop::Skip("the counter does not count instructions".into()));
    }
    let messages = Command::new("dmesg").output()?.stdout;
    let messages = String::from_utf8_lossy(&messages);
    let branches: u64 = messages
        .lines()
        .filter_map(|line| line.split_once("axvcpu: after exit: ")?.1.split_once(" branches")?.0.parse().ok())
        .next_back()
        .unwrap_or(0);
    println!("# branches={branches} instructions={instructions}");
    ensure!(instructions > 3 * branches, "an exit with {branches} branches takes {instructions} instructions");
    Ok(())
}
