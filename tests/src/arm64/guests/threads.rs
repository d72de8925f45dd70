// SPDX-License-Identifier: MIT OR Apache-2.0
//! Guests that do not come back by themselves, several vCPUs at once, and code that nobody has written.

use super::watchful_code;
use crate::harness::{self, Case, CaseResult, Stop};
use crate::machine::{Machine, CODE, DATA};
use crate::random::{self, Random};
use crate::{code, ensure, ensure_eq, table};
use axvcpu_uapi::arm64::{General, System, PSTATE_DAIF, PSTATE_EL1H};
use axvcpu_uapi::client::Apic;
use axvcpu_uapi::exit::AxVCpuExitReason as Exit;
use std::time::{Duration, Instant};

/// The cases.
pub(super) fn cases() -> Vec<Case> {
    table! {
        "threads/kick-ends-a-loop" => kick;
        "threads/kick-before-run" => kick_before;
        "threads/host-interrupts-go-on" => host_interrupts;
        "threads/two-vcpus-at-once" => two;
        "threads/memory-taken-from-a-running-vcpu" => taken, in 60;
        "threads/timer-of-the-guest-troubles-nobody" => timer;
        "hostile/random-code" => random_code, in 120;
    }
}

fn kick() -> CaseResult {
    let mut machine = Machine::new(code!(kick, "2: add x0, x0, #1", "b 2b"))?;
    let kicker = machine.vcpu.kicker();
    for _ in 0..20 {
        let before = machine.vcpu.get::<General>()?.x[0];
        // On a busy host the kick may come before the guest does.
        while machine.vcpu.general().x[0] <= before {
            let kicker = kicker.clone();
            let thread = std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(5));
                kicker.kick()
            });
            machine.expect(Exit::Interrupted)?;
            harness::joined(thread.join())??;
        }
    }
    Ok(())
}

fn kick_before() -> CaseResult {
    let mut machine = Machine::new(code!(kick_before, "hvc #0"))?;
    machine.vcpu.kicker().kick()?;
    machine.expect(Exit::Interrupted)?;
    machine.expect_call().map(|_| ())
}

fn host_interrupts() -> CaseResult {
    let mut machine = Machine::new(code!(host_interrupts, "b ."))?;
    let kicker = machine.vcpu.kicker();
    let thread = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(300));
        kicker.kick()
    });
    let started = Instant::now();
    machine.expect(Exit::Interrupted)?;
    ensure!(started.elapsed() < Duration::from_secs(5), "the kick took {:?}", started.elapsed());
    harness::joined(thread.join())??;
    let stats = machine.vcpu.stats()?;
    ensure!(stats.exits[0] >= 10, "only {} host interrupts in 300 ms", stats.exits[0]);
    Ok(())
}

fn two() -> CaseResult {
    // Each counts in a register of every kind and checks that it alone does.
    let code = watchful_code!(
        two,
        "mov x9, #0",
        "2: msr tpidr_el1, x1",
        "msr tpidr_el0, x1",
        "dup v7.2d, x1",
        "mov x3, #200",
        "3: subs x3, x3, #1",
        "b.ne 3b",
        "same mrs, tpidr_el1",
        "same mrs, tpidr_el0",
        "same umov, v7.d[1]",
        "add x9, x9, #1",
        "cmp x9, x4",
        "b.ne 2b",
        "mov x0, #0",
        "hvc #0",
        "4: mov x0, #1",
        "hvc #0"
    );
    let machine = Machine::new(code)?;
    std::thread::scope(|scope| {
        let threads: Vec<_> = (1..5u32)
            .map(|id| {
                let mut vcpu = Machine::vcpu_of(&machine.vm, &machine.space, id, Apic::None)?;
                Ok(scope.spawn(move || -> CaseResult {
                    let mut general: General = vcpu.get()?;
                    general.x[1] = u64::from(id) * 0x1_0001;
                    general.x[4] = 20_000;
                    vcpu.set(&general)?;
                    loop {
                        harness::check_time()?;
                        match vcpu.run()?.reason {
                            Exit::Interrupted => {}
                            Exit::Hypercall { nr, .. } => {
                                ensure_eq!(nr, 0, "vCPU {id} found another one's register");
                                return Ok(());
                            }
                            other => return Err(Stop::Fail(format!("vCPU {id}: {other:x?}"))),
                        }
                    }
                }))
            })
            .collect::<Result<_, Stop>>()?;
        threads.into_iter().try_for_each(|thread| harness::joined(thread.join())?)
    })
}

fn taken() -> CaseResult {
    // The guest reads a word and the one behind it, which must be the same, while the host takes the page away and fills
    // another one.
    let code = code!(
        taken,
        "movz x1, #0x4010, lsl #16",
        "2: ldr x2, [x1]",
        "ldr x3, [x1, #8]",
        "cmp x2, x3",
        "b.hi 3f",
        "add x9, x9, #1",
        "b 2b",
        "3: hvc #0"
    );
    let mut machine = Machine::new(code)?;
    let (ram, kicker) = (machine.ram.clone(), machine.vcpu.kicker());
    let offset = (DATA - crate::machine::RAM) as usize;
    let thread = std::thread::spawn(move || -> CaseResult {
        for round in 1..400u64 {
            ram.discard(offset, 0x1000)?;
            // In this order: the guest may see the second word change before the first, never the other way.
            ram.write_u64(offset + 8, round)?;
            ram.write_u64(offset, round)?;
        }
        Ok(kicker.kick()?)
    });
    let exit = machine.run()?;
    harness::joined(thread.join())??;
    ensure_eq!(exit.reason, Exit::Interrupted, "the guest saw a page that was gone");
    // Not every round finds the page mapped again.
    let invalidations = machine.vm.stats()?.invalidations;
    ensure!(invalidations >= 10, "only {invalidations} invalidations");
    machine.vcpu.kicker().kick()?;
    machine.run()?;
    ensure_eq!(machine.read_u64(DATA)?, 399, "the last value");
    Ok(())
}

fn timer() -> CaseResult {
    // A timer that is due at once, with nobody to take its interrupt.
    let code = code!(
        timer,
        "msr cntv_cval_el0, xzr",
        "mov x1, #1",
        "msr cntv_ctl_el0, x1",
        "isb",
        "mov x9, #0",
        "2: add x9, x9, #1",
        "cmp x9, x4",
        "b.ne 2b",
        "hvc #0"
    );
    let mut machine = Machine::new(code)?;
    machine.modify(|general| general.x[4] = 5_000_000)?;
    machine.expect_call()?;
    let registers: System = machine.registers()?;
    ensure_eq!((registers.cntv_ctl_el0, registers.cntv_cval_el0), (1, 0), "the timer's registers");
    Ok(())
}

fn random_code() -> CaseResult {
    let mut random = Random::new(random::seed()?);
    let deadline = Instant::now() + Duration::from_secs(15);
    let mut runs = 0;
    while Instant::now() < deadline {
        let code: Vec<u8> = (0..512).flat_map(|_| (random.word() as u32).to_le_bytes()).collect();
        let mut machine = Machine::new(&code)?;
        // EL1's vectors lead back into the code, so that it goes on.
        let back: Vec<u8> = (0..512).flat_map(|_| (random.word() as u32).to_le_bytes()).collect();
        machine.write(crate::machine::VECTORS, &back)?;
        machine.modify(|general| {
            for register in &mut general.x {
                *register = if random.below(2) == 0 { random.word() } else { DATA + (random.word() & 0xfff8) };
            }
            general.pstate = PSTATE_EL1H | (random.word() & PSTATE_DAIF);
            general.pc = CODE;
        })?;
        let kicker = machine.vcpu.kicker();
        let thread = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            kicker.kick()
        });
        // Any exit will do; the host must live.
        for _ in 0..200 {
            match machine.vcpu.run() {
                Ok(exit) if exit.reason == Exit::Interrupted => break,
                Ok(_) => machine.vcpu.reply(random.word()),
                Err(error) => return Err(error.into()),
            }
        }
        harness::joined(thread.join())??;
        runs += 1;
    }
    ensure!(runs >= 10, "only {runs} runs");
    Ok(())
}
