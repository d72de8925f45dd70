// SPDX-License-Identifier: MIT OR Apache-2.0
//! vCPUs that need each other, on as many threads and often more than the host has CPUs: they sleep and wake each other,
//! wait for each other's answers, and spin. One lost interrupt or wake-up, and the case hangs for good: there is no timer
//! that would save it.

use super::x2apic::apic_code;
use crate::cpus::Cpus;
use crate::harness::{Case, CaseResult, Stop};
use crate::machine::{CODE, DATA};
use crate::{code, ensure, ensure_eq, table};
use axvcpu_uapi::vcpu::ExitKind;
use axvcpu_uapi::x86::General;
use std::time::Instant;

pub(super) fn cases() -> Vec<Case> {
    table! {
        "smp/two-sleepers-wake-each-other" => two_sleepers, in 90;
        "smp/ring-of-eight-sleepers" => ring_of_sleepers, in 90;
        "smp/two-wait-for-answers" => two_answers, in 90;
        "smp/eight-wait-for-answers" => eight_answers, in 90;
        "smp/four-spin-until-it-is-their-turn" => spinners, in 90;
    }
}

/// Where each vCPU's own counters are, 64 bytes apart.
const ROWS: u64 = DATA;
/// A counter of all.
const SHARED: u64 = DATA + 0x2000;

/// vCPUs 0 to `count - 1` in x2APIC mode, all before the same code, with R12 the number of rounds, R13 the own row, R14 the
/// number of vCPUs, R15 the own number, RBP the first row and RBX the shared counter. Vector 0x40 is handled at 0x100.
fn team(code: &[u8], count: u32, rounds: u64) -> Result<Cpus, Stop> {
    let others: Vec<u32> = (1..count).collect();
    let mut cpus = Cpus::new(code, &others, true)?;
    cpus.machine.vector(0x40, CODE + 0x100)?;
    for place in 0..count {
        let vcpu = cpus.vcpu(place as usize);
        let mut general: General = vcpu.get()?;
        let id = u64::from(place);
        general.rip = CODE;
        general.gpr[12..].copy_from_slice(&[rounds, ROWS + 64 * id, count.into(), id]);
        (general.gpr[3], general.gpr[5]) = (SHARED, ROWS);
        vcpu.set(&general)?;
    }
    Ok(cpus)
}

/// A token goes round: whoever gets it wakes the next and goes to sleep. `STI` right before `HLT` lets no interrupt in
/// between; the hypervisor has to keep the same promise when the vCPU goes to sleep.
fn sleepers(count: u32, rounds: u64) -> CaseResult {
    let code = apic_code!(
        sleepers,
        "cli",
        "test r15, r15",
        "jz 4f", // The first has the token.
        "2: cmp dword ptr [r13], 0",
        "jne 3f",
        "sti",
        "hlt",
        "cli",
        "jmp 2b",
        "3: dec dword ptr [r13]",
        "4: mov edx, r15d",
        "inc edx",
        "cmp edx, r14d",
        "jb 5f",
        "xor edx, edx",
        "5: mov ecx, 0x830",
        "mov eax, 0x4040",
        "wrmsr",
        "dec r12d",
        "jnz 2b",
        "out 0x81, al",
        ".org 77b + 0x100",
        "inc dword ptr [r13]",
        "eoi",
        "iretq",
    );
    let mut cpus = team(code, count, rounds)?;
    let begin = Instant::now();
    cpus.run_all(0x81)?;
    let hops = rounds * u64::from(count);
    println!("{count} sleepers: {} us a wake-up", begin.elapsed().as_micros() as u64 / hops);
    let halts: u64 = halts(&mut cpus)?;
    ensure!(halts > hops / 4, "{halts} exits by HLT for {hops} wake-ups: hardly anybody slept");
    Ok(())
}

fn halts(cpus: &mut Cpus) -> Result<u64, Stop> {
    let mut sum = 0;
    for place in 0..cpus.ids.len() {
        sum += cpus.vcpu(place).exits(ExitKind::Halt)?.unwrap_or(0);
    }
    Ok(sum)
}

fn two_sleepers() -> CaseResult {
    sleepers(2, 2000)
}

fn ring_of_sleepers() -> CaseResult {
    sleepers(8, 300)
}

/// The pattern of a TLB shoot-down: each asks all others by a broadcast, and spins until all have answered from their
/// handlers; everybody does so all the time.
fn answers(count: u32, rounds: u64) -> CaseResult {
    let code = apic_code!(
        answers,
        "sti",
        "2: xor ecx, ecx", // A byte in each other row: the question.
        "3: cmp ecx, r15d",
        "je 4f",
        "mov eax, ecx",
        "shl eax, 6",
        "add rax, rbp",
        "mov byte ptr [rax + r15], 1",
        "4: inc ecx",
        "cmp ecx, r14d",
        "jb 3b",
        "write 0x830, 0xc4040",
        "xor ecx, ecx", // It is cleared: the answer.
        "5: mov eax, ecx",
        "shl eax, 6",
        "add rax, rbp",
        "6: cmp byte ptr [rax + r15], 0",
        "je 7f",
        "pause",
        "jmp 6b",
        "7: inc ecx",
        "cmp ecx, r14d",
        "jb 5b",
        "dec r12d",
        "jnz 2b",
        "cli",
        "lock inc dword ptr [rbx]", // Go on answering until nobody asks any more.
        "8: mov eax, [rbx]",
        "cmp eax, r14d",
        "je 9f",
        "sti",
        "hlt",
        "cli",
        "jmp 8b",
        "9: write 0x830, 0xc4040",
        "out 0x81, al",
        ".org 77b + 0x100",
        "push rcx",
        "xor ecx, ecx",
        "2: mov byte ptr [r13 + rcx], 0",
        "inc ecx",
        "cmp ecx, r14d",
        "jb 2b",
        "pop rcx",
        "eoi",
        "iretq",
    );
    let mut cpus = team(code, count, rounds)?;
    let begin = Instant::now();
    cpus.run_all(0x81)?;
    let micros = begin.elapsed().as_micros() as u64;
    println!("{count} wait for answers: {} us a round, {}", micros / rounds, pauses(&mut cpus)?);
    ensure_eq!(cpus.machine.read_u64(SHARED)? as u32, count, "vCPUs that came to the end");
    Ok(())
}

fn two_answers() -> CaseResult {
    answers(2, 500)
}

fn eight_answers() -> CaseResult {
    answers(8, 40)
}

/// How often all left the guest because of a loop of PAUSE, in words.
fn pauses(cpus: &mut Cpus) -> Result<String, Stop> {
    let mut sum = 0;
    for place in 0..cpus.ids.len() {
        let Some(count) = cpus.vcpu(place).exits(ExitKind::Pause)? else { return Ok("loops not counted".into()) };
        sum += count;
    }
    Ok(format!("{sum} exits of loops"))
}

/// Nobody sleeps: each spins with PAUSE until the counter is its own. On fewer CPUs all depends on who gets to run.
fn spinners() -> CaseResult {
    let code = code!(
        spinners,
        64,
        "sti",
        "xor edi, edi",
        "mov esi, r15d", // The next count that is ours.
        "2: cmp [rbx], esi",
        "je 3f",
        "pause",
        "jmp 2b",
        "3: add esi, r14d",
        "inc dword ptr [rbx]",
        "dec r12d",
        "jnz 2b",
        "out 0x81, al",
    );
    let (count, rounds) = (4, 25);
    let mut cpus = team(code, count, rounds)?;
    let begin = Instant::now();
    cpus.run_all(0x81)?;
    let turns = rounds * u64::from(count);
    println!("{count} spin: {} us a turn, {}", begin.elapsed().as_micros() as u64 / turns, pauses(&mut cpus)?);
    ensure_eq!(u64::from(cpus.machine.read_u64(SHARED)? as u32), turns, "turns taken");
    Ok(())
}
