// SPDX-License-Identifier: MIT OR Apache-2.0
//! The paravirtual clock as what it is to guest memory: something that the module itself writes.

use super::dirty::{gpa, map, read, BASE};
use crate::harness::{Case, CaseResult};
use crate::machine::{Machine, Mode};
use crate::{code, ensure, ensure_eq, table};

pub(super) fn cases() -> Vec<Case> {
    table! {
        "dirty-log/tells-what-the-module-writes" => logged [abi];
    }
}

/// The paravirtual clock is written by the module.
fn logged() -> CaseResult {
    let code =
        code!(logged, 64, "mov ecx, 0x4b564d01", "mov eax, 0x1003001", "xor edx, edx", "wrmsr", "out 0x80, al", "hlt");
    let mut m = Machine::new(Mode::Long, code)?;
    let slot = map(&m, 1 << 20, false)?;
    m.space.start_dirty_log(gpa(BASE), 1 << 20)?;
    m.expect_mark(0x80)?;
    ensure!(slot.memory().read_u64(slot.offset() + 0x3000)? != 0, "the guest has no clock");
    ensure_eq!(read(&m.space, 4)?, [3], "pages written");
    drop(slot);
    Ok(())
}
