// SPDX-License-Identifier: MIT OR Apache-2.0
//! No guest keeps a translation of memory that the host has taken away, whatever it does at that moment.

use crate::harness::{self, Case, CaseResult, Stop};
use crate::machine::{Machine, Mode, DATA, HIGH, RAM_SIZE};
use crate::pin::{pin, Allowed, SELF};
use crate::{code, ensure, ensure_eq, table};
use axvcpu_uapi::client::Memory;
use axvcpu_uapi::exit::AxVCpuExitReason::Interrupted;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

pub(super) fn cases() -> Vec<Case> {
    table! {
        "memory/faults-while-the-host-discards" => faults_meet_discards, in 60;
        "memory/tlb-flushed-when-memory-goes" => flushed [abi];
    }
}

const PAGE: usize = 0x1000;

/// Waits until the guest has copied `value` to DATA.
fn echoed(ram: &Memory, value: u64, what: &str) -> CaseResult {
    let start = Instant::now();
    while ram.read_u64(DATA as usize)? != value {
        if start.elapsed() > Duration::from_secs(10) {
            return Err(Stop::Fail(format!("the guest still reads {:#x} {what}", ram.read_u64(DATA as usize)?)));
        }
        harness::check_time()?;
        thread::yield_now();
    }
    Ok(())
}

/// The guest copies a word to DATA over and over. The host discards a range that ends with the word's page: at the start it
/// takes the translation away, which makes the guest fault, and the page itself it frees only when it comes to it. A fault
/// that finds the page in between must not map it.
fn faults_meet_discards() -> CaseResult {
    const WORD: usize = RAM_SIZE - PAGE;
    let code =
        code!(faults_meet_discards, 64, "mov ebx, 0x3ff000", "2: mov rax, [rbx]", "mov [0x20000], rax", "jmp 2b");
    let mut m = Machine::new(Mode::Long, code)?;
    let (ram, kicker) = (Arc::clone(&m.ram), m.vcpu.kicker());
    let discarder = thread::spawn(move || -> CaseResult {
        let result = (1..=200u64).try_for_each(|round| {
            for at in (HIGH as usize..=WORD).step_by(PAGE) {
                ram.write_u64(at, round)?;
            }
            echoed(&ram, round, "instead of what was written")?;
            ram.discard(HIGH as usize, RAM_SIZE - HIGH as usize)?;
            echoed(&ram, 0, "of a page that is gone")
        });
        kicker.kick()?;
        result
    });
    let exit = m.run();
    harness::joined(discarder.join())??;
    ensure_eq!(exit?.reason, Interrupted, "exit");
    Ok(())
}

/// Emulators that empty the TLB at every exit hide a flush that was forgotten, but it is also counted. The vCPU stays on one
/// CPU, since a change of CPU makes it flush as well.
fn flushed() -> CaseResult {
    let code = code!(flushed, 64, "mov ebx, 0x100000", "2: mov rax, [rbx]", "out 0x80, al", "jmp 2b");
    let allowed = Allowed::now()?;
    pin(SELF, *allowed.cpus.first().ok_or(Stop::Fail("no CPU".into()))?)?;
    let mut m = Machine::new(Mode::Long, code)?;
    m.write_u64(HIGH, 5)?;
    m.expect_mark(0x80)?;
    for round in 0..5 {
        let before = m.vcpu.stats()?.tlb_flushes;
        m.expect_mark(0x80)?;
        ensure_eq!(m.vcpu.stats()?.tlb_flushes, before, "flushes while nothing changes, round {round}");
        m.ram.discard(HIGH as usize, PAGE)?;
        m.expect_mark(0x80)?;
        let flushes = m.vcpu.stats()?.tlb_flushes - before;
        ensure!(flushes > 0, "no flush after memory has gone, round {round}");
        ensure_eq!(m.vcpu.general().gpr[0], 0, "what the guest reads, round {round}");
    }
    Ok(())
}
