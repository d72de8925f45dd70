// SPDX-License-Identifier: MIT OR Apache-2.0
//! The local APIC where a CPU may take part in it: priorities, ends of interrupts and messages that reach a guest which does
//! not leave, registers that are read and written while interrupts are in flight. The same must come out whoever does it.

use super::x2apic::{machine, register, started, x2apic_code, MSI};
use crate::harness::{self, Case, CaseResult, Stop};
use crate::machine::{Machine, CODE, DATA};
use crate::pin::{pin, Allowed, SELF};
use crate::{code, ensure, ensure_eq, table};
use axvcpu_uapi::client::{Memory, Vm};
use axvcpu_uapi::exit::AccessWidth::Byte;
use axvcpu_uapi::exit::AxVCpuExitReason::{InterruptEnd, Interrupted, IoWrite};
use axvcpu_uapi::x86::{Control, LocalApic};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

pub(super) fn cases() -> Vec<Case> {
    table! {
        "delivery/task-priority-holds-back-and-lets-go" => task_priority [differs];
        "delivery/priorities-show-in-the-handler" => nested;
        "delivery/self-ipi-while-in-service-waits" => self_ipi_in_service;
        "delivery/self-ipi-of-a-reserved-vector-is-an-error" => reserved_self_ipi [differs];
        "delivery/end-is-reported-of-the-latest-trigger-mode" => trigger_mode [abi];
        "delivery/self-ipi-after-a-level-is-an-edge" => own_edge [abi];
        "delivery/end-in-the-xapic-page" => xapic_end [abi];
        "delivery/registers-are-shut-when-x2apic-mode-ends" => mode_ends;
        "delivery/messages-to-a-guest-that-does-not-leave" => running [abi], in 60;
        "delivery/messages-from-another-cpu-without-an-exit" => without_exits [abi], in 60;
        "delivery/messages-at-the-edge-of-an-entry" => edge [abi], in 60;
        "delivery/messages-wake-and-none-is-lost" => sleeping [abi], in 60;
        "delivery/registers-in-flight" => in_flight [abi];
        "delivery/pending-on-another-cpu" => moved [abi];
        "delivery/nmi-into-a-handler" => nmi [abi];
    }
}

fn task_priority() -> CaseResult {
    let code = x2apic_code!(
        task_priority,
        "sti",
        "write 0x808, 0x5f",
        "write 0x83f, 0x40",
        "nop",
        "out 0x80, al",
        "write 0x83f, 0x60",
        "nop",
        "out 0x83, al",
        "mov rbx, cr8",
        "mov eax, 4", // The class of what waits: not below it.
        "mov cr8, rax",
        "nop",
        "out 0x84, al",
        "write 0x808, 0x3f",
        "nop",
        "out 0x85, al",
        "hlt",
        "handler 0x100, 0x81",
        "handler 0x180, 0x82",
    );
    let mut m = started(code)?;
    ensure_eq!(register(&m, 0x220)?, 1, "IRR of vectors 0x40 and up");
    ensure_eq!(register(&m, 0xa0)?, 0x5f, "processor priority");
    m.expect_marks(&[0x82, 0x83, 0x84])?;
    ensure_eq!(m.vcpu.general().gpr[3], 5, "CR8 under a task priority of 0x5f");
    ensure_eq!(m.vcpu.get::<Control>()?.cr8, 4, "CR8");
    m.expect_marks(&[0x81, 0x85])?;
    ensure_eq!(register(&m, 0x80)?, 0x3f, "task priority");
    Ok(())
}

/// Three classes nest, and each handler reads its own priority and what is in service.
fn nested() -> CaseResult {
    let code = x2apic_code!(
        nested,
        "sti",
        "write 0x83f, 0x40",
        "out 0x80, al",
        "hlt",
        ".org 77b + 0x100", // 0x40
        "sti",
        "write 0x83f, 0x60",
        "mov ecx, 0x80a",
        "rdmsr",
        "out 0x81, al",
        "eoi",
        "iretq",
        ".org 77b + 0x180", // 0x60
        "sti",
        "write 0x83f, 0x41", // Waits until both are over.
        "nop",
        "mov ecx, 0x80a",
        "rdmsr",
        "out 0x82, al",
        "mov ecx, 0x812", // ISR of 0x40 and up
        "rdmsr",
        "out 0x83, eax",
        "mov ecx, 0x822", // IRR
        "rdmsr",
        "out 0x83, eax",
        "eoi",
        "iretq",
        "handler 0x200, 0x84", // 0x41
    );
    let mut m = machine(code)?;
    m.vector(0x41, CODE + 0x200)?;
    m.expect_out(0x82, Byte, 0x60)?;
    ensure_eq!(m.expect_word(0x83)?, 1, "in service besides 0x60");
    ensure_eq!(m.expect_word(0x83)?, 2, "requested");
    m.expect_out(0x81, Byte, 0x40)?;
    m.expect_marks(&[0x84, 0x80])?;
    ensure_eq!(register(&m, 0xa0)?, 0, "processor priority after all");
    Ok(())
}

fn self_ipi_in_service() -> CaseResult {
    let code = x2apic_code!(
        self_ipi_in_service,
        "sti",
        "write 0x83f, 0x40",
        "out 0x80, al",
        "hlt",
        ".org 77b + 0x100",
        "inc r14d",
        "mov eax, r14d",
        "out 0x81, al",
        "cmp r14d, 3",
        "je 3f",
        "sti",
        "write 0x83f, 0x40",
        "nop",
        "out 0x82, al",
        "cli",
        "3: eoi",
        "iretq",
    );
    let mut m = machine(code)?;
    for (port, value) in [(0x81, 1), (0x82, 0x40), (0x81, 2), (0x82, 0x40), (0x81, 3), (0x80, 3)] {
        m.expect_out(port, Byte, value)?;
    }
    Ok(())
}

/// Vectors below 16 are exceptions': bit 5 of the error status, and the error's own interrupt.
fn reserved_self_ipi() -> CaseResult {
    let code = x2apic_code!(
        reserved_self_ipi,
        "write 0x837, 0x40",
        "sti",
        "write 0x83f, 0x0f",
        "nop",
        "write 0x828, 0",
        "mov ecx, 0x828",
        "rdmsr",
        "out 0x80, eax",
        "hlt",
        "handler 0x100, 0x81",
    );
    let mut m = machine(code)?;
    m.expect_mark(0x81)?;
    ensure_eq!(m.expect_word(0x80)?, 1 << 5, "error status");
    Ok(())
}

fn trigger_mode() -> CaseResult {
    let code = x2apic_code!(trigger_mode, "sti", "2: out 0x80, al", "nop", "jmp 2b", "watched 0x100, 0x81, 0x82",);
    let mut m = started(code)?;
    for level in [true, false, false, true, true, false] {
        m.vm.signal_msi(MSI, if level { 0xc040 } else { 0x40 })?;
        m.expect_mark(0x81)?;
        ensure_eq!(register(&m, 0x1a0)?, u32::from(level), "trigger mode");
        if level {
            m.expect(InterruptEnd { vector: Some(0x40) })?;
        }
        m.expect_marks(&[0x82, 0x80])?;
    }
    Ok(())
}

/// The vector was level-triggered when a message brought it; the guest's own interrupt of it ends without anybody being told.
fn own_edge() -> CaseResult {
    let code = x2apic_code!(
        own_edge,
        "sti",
        "out 0x80, al",
        "nop",
        "write 0x83f, 0x40",
        "out 0x83, al",
        "hlt",
        "handler 0x100, 0x81",
    );
    let mut m = started(code)?;
    m.vm.signal_msi(MSI, 0xc040)?;
    m.expect_mark(0x81)?;
    m.expect(InterruptEnd { vector: Some(0x40) })?;
    m.expect_marks(&[0x81, 0x83])
}

/// The program writes EOI for the guest: what was held back by the interrupt in service comes then.
fn xapic_end() -> CaseResult {
    let code = code!(
        xapic_end,
        64,
        "sti",
        "2: out 0x80, al",
        "nop",
        "jmp 2b",
        ".org 77b + 0x100",
        "out 0x81, al",
        "iretq",
        ".org 77b + 0x180",
        "out 0x82, al",
        "iretq",
    );
    let mut m = started(code)?;
    m.vm.signal_msi(MSI, 0xc060)?;
    m.expect_mark(0x82)?;
    m.vm.signal_msi(MSI, 0x40)?;
    m.expect_mark(0x80)?;
    ensure_eq!(m.vcpu.apic_access(0xa0, None)?, 0x60, "processor priority");
    m.vcpu.apic_access(0xb0, Some(0))?;
    m.expect(InterruptEnd { vector: Some(0x60) })?;
    m.expect_mark(0x81)?;
    m.vcpu.apic_access(0xb0, Some(0))?;
    m.expect_mark(0x80)?;
    ensure_eq!(m.vcpu.apic_access(0xa0, None)?, 0, "processor priority");
    Ok(())
}

/// The MSRs fault again, reads and writes, so that none of the host's can be reached by them.
fn mode_ends() -> CaseResult {
    let code = x2apic_code!(
        mode_ends,
        "write 0x808, 0x30",
        "mov ecx, 0x808",
        "rdmsr",
        "out 0x80, al",
        "write 0x1b, 0xfee00100", // The boot processor's, switched off.
        "mov ecx, 0x808",
        "rdmsr",
        "mov ecx, 0x80b",
        "xor eax, eax",
        "xor edx, edx",
        "wrmsr",
        "write 0x1b, 0xfee00900",
        "mov ecx, 0x802",
        "rdmsr",
        "mov ecx, 0x83f",
        "wrmsr",
        "out 0x82, al",
        "hlt",
        ".org 77b + 0x180",
        "out 0x81, al",
        "add rsp, 8",
        "add qword ptr [rsp], 2", // Behind RDMSR or WRMSR.
        "iretq",
    );
    let mut m = machine(code)?;
    m.vector(13, CODE + 0x180)?;
    m.expect_out(0x80, Byte, 0x30)?;
    for _ in 0..4 {
        m.expect_mark(0x81)?;
    }
    m.expect_mark(0x82)?;
    Ok(())
}

/// Handlers of 0x40 and 0x60 that count at DATA and DATA + 8.
macro_rules! counting {
    ($name:ident, $($line:literal),+ $(,)?) => {
        x2apic_code!(
            $name,
            $($line,)+
            ".org 77b + 0x100",
            "inc qword ptr [0x20000]",
            "eoi",
            "iretq",
            ".org 77b + 0x180",
            "inc qword ptr [0x20008]",
            "eoi",
            "iretq",
        )
    };
}

/// Sends messages of the vectors, each when the guest has counted the one before at the address that belongs to it.
fn send(vm: &Vm, ram: &Memory, numbers: std::ops::RangeInclusive<u64>, vectors: &[(u32, u64)]) -> CaseResult {
    for number in numbers {
        for &(vector, at) in vectors {
            vm.signal_msi(MSI, vector)?;
            let start = Instant::now();
            while ram.read_u64(at as usize)? != number {
                ensure!(start.elapsed() < Duration::from_secs(20), "message {number} of {vector:#x} was not delivered");
                thread::yield_now();
            }
        }
    }
    Ok(())
}

/// Runs `m` while another thread sends `count` pairs of messages, from the CPU `from` if that is given.
fn receive(m: &mut Machine, count: u64, from: Option<usize>) -> CaseResult {
    let (vm, ram, kicker) = (m.vm.clone(), Arc::clone(&m.ram), m.vcpu.kicker());
    let sender = thread::spawn(move || {
        let pinned = from.map_or(Ok(()), |cpu| pin(SELF, cpu));
        let result = pinned.and_then(|()| send(&vm, &ram, 1..=count, &[(0x40, DATA), (0x60, DATA + 8)]));
        kicker.kick()?;
        result
    });
    let result = loop {
        match m.run() {
            Ok(exit) if matches!(exit.reason, IoWrite { .. }) => {}
            Ok(exit) if exit.reason == Interrupted => break Ok(()),
            Ok(exit) => break Err(Stop::Fail(format!("found {:x?}", exit.reason))),
            Err(stop) => break Err(stop),
        }
    };
    harness::joined(sender.join())??;
    result?;
    ensure_eq!((m.read_u64(DATA)?, m.read_u64(DATA + 8)?), (count, count), "interrupts counted");
    Ok(())
}

fn running() -> CaseResult {
    let mut m = machine(counting!(running, "sti", "2: pause", "jmp 2b"))?;
    receive(&mut m, 100, None)
}

/// Where the CPU takes posted interrupts, a guest that runs on one CPU need not leave for what another CPU sends.
fn without_exits() -> CaseResult {
    const PAIRS: u64 = 100;
    let allowed = Allowed::several()?;
    let mut m = machine(counting!(without_exits, "sti", "2: jmp 2b"))?;
    pin(SELF, allowed.cpus[0])?;
    let before = m.vcpu.stats()?;
    receive(&mut m, PAIRS, Some(allowed.cpus[1]))?;
    let after = m.vcpu.stats()?;
    let entries = after.entries - before.entries;
    let injections = after.injections - before.injections;
    println!("# {} messages, {entries} entries, {injections} injections", 2 * PAIRS);
    // A few have met memory that was not mapped yet.
    if injections >= PAIRS {
        return Err(Stop::Skip("the CPU delivers no interrupts by itself".into()));
    }
    if std::fs::read_to_string("/sys/module/axvcpu/parameters/apic_steps")?.trim() != "3" {
        return Err(Stop::Skip("the module posts no interrupts to the CPU: apic_steps".into()));
    }
    ensure!(entries < PAIRS, "{entries} entries for {} messages", 2 * PAIRS);
    Ok(())
}

fn edge() -> CaseResult {
    let mut m = machine(counting!(edge, "sti", "2: out 0x80, al", "jmp 2b"))?;
    receive(&mut m, 100, None)
}

fn sleeping() -> CaseResult {
    let mut m = machine(counting!(sleeping, "2: sti", "hlt", "cli", "jmp 2b"))?;
    receive(&mut m, 100, None)
}

/// What is requested and in service can be read, and set: the guest finds what was set.
fn in_flight() -> CaseResult {
    let code = x2apic_code!(
        in_flight,
        "sti",
        "write 0x83f, 0x40",
        "out 0x83, al",
        "nop",
        "out 0x84, al",
        "hlt",
        ".org 77b + 0x100", // 0x40
        "write 0x83f, 0x41",
        "out 0x80, al",
        "eoi",
        "iretq",
        "handler 0x180, 0x82", // 0x60
        "handler 0x200, 0x81", // 0x41
    );
    let mut m = machine(code)?;
    m.vector(0x41, CODE + 0x200)?;
    m.expect_mark(0x80)?;
    let mut apic: LocalApic = m.vcpu.get()?;
    ensure_eq!((apic.regs[0x12], apic.regs[0x22]), (1, 2), "in service and requested");
    // 0x41 is taken away, and 0x60 put in its place, level-triggered; 0x40 stays in service.
    apic.regs[0x22] = 0;
    apic.regs[0x23] = 1;
    apic.regs[0x1b] = 1;
    m.vcpu.set(&apic)?;
    ensure_eq!(m.vcpu.get::<LocalApic>()?.regs[0x23], 1, "requested, as set");
    // The handler's IRET opens the window, behind its EOI.
    m.expect_mark(0x82)?;
    m.expect(InterruptEnd { vector: Some(0x60) })?;
    m.expect_mark(0x83)?;
    // Nothing in service any more, and one requested that was not.
    let mut apic: LocalApic = m.vcpu.get()?;
    ensure_eq!((apic.regs[0x12], apic.regs[0x13], apic.regs[0x23]), (0, 0, 0), "in service and requested");
    apic.regs[0x22] = 2;
    m.vcpu.set(&apic)?;
    m.expect_marks(&[0x81, 0x84])
}

/// Requested on one CPU, delivered on another, many times.
fn moved() -> CaseResult {
    let allowed = Allowed::several()?;
    let mut m = machine(counting!(
        moved,
        "2: out 0x80, al",
        "write 0x83f, 0x60",
        "out 0x81, al",
        "sti",
        "nop",
        "cli",
        "jmp 2b",
    ))?;
    for (round, cpu) in (1..=60).zip(allowed.cpus.iter().cycle()) {
        pin(SELF, *cpu)?;
        m.expect_mark(0x80)?;
        ensure_eq!((m.read_u64(DATA)?, m.read_u64(DATA + 8)?), (round - 1, round - 1), "interrupts counted");
        m.vm.signal_msi(MSI, 0x40)?;
        m.expect_mark(0x81)?;
    }
    let migrations = m.vcpu.stats()?.migrations;
    ensure!(migrations > 10, "the vCPU moved {migrations} times");
    Ok(())
}

/// An NMI comes into the handler of an interrupt, which it leaves in service.
fn nmi() -> CaseResult {
    let code = x2apic_code!(
        nmi,
        "sti",
        "write 0x83f, 0x40",
        "out 0x84, al",
        "hlt",
        ".org 77b + 0x100",
        "out 0x80, al",
        "nop",
        "out 0x83, al",
        "eoi",
        "iretq",
        ".org 77b + 0x180",
        "out 0x82, al",
        "iretq",
    );
    let mut m = machine(code)?;
    m.vector(2, CODE + 0x180)?;
    m.expect_mark(0x80)?;
    m.vm.signal_msi(MSI, 0x400)?;
    m.vm.signal_msi(MSI, 0x40)?;
    m.expect_mark(0x82)?;
    ensure_eq!((register(&m, 0x120)?, register(&m, 0x220)?), (1, 1), "in service and requested");
    m.expect_marks(&[0x83, 0x80, 0x83, 0x84])
}
