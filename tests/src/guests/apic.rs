// SPDX-License-Identifier: MIT OR Apache-2.0
//! The local APIC in the kernel: messages, priorities, end of interrupt, timer, inter-processor interrupts, and HLT
//! that sleeps.

use super::x2apic::{machine, register, started, x2apic_code, MSI};
use crate::harness::{self, Case, CaseResult, Stop};
use crate::machine::{Machine, Mode, CODE, STACK};
use crate::{code, ensure, ensure_eq, table};
use axvcpu_uapi::addr::GuestPhysAddr;
use axvcpu_uapi::client::{Apic, Errno, Error};
use axvcpu_uapi::exit::AccessFlags;
use axvcpu_uapi::exit::AccessWidth::Byte;
use axvcpu_uapi::exit::AxVCpuExitReason::{Halt, InterruptEnd, Interrupted, IoWrite};
use axvcpu_uapi::x86::{Control, Events, ACTIVITY_HALTED, ACTIVITY_WAIT_FOR_SIPI};
use std::thread;
use std::time::Duration;

pub(super) fn cases() -> Vec<Case> {
    table! {
        "apic/message-to-a-running-guest" => message;
        "apic/halt-sleeps-until-a-message" => halt_sleeps [abi];
        "apic/halt-with-a-pending-interrupt-does-not-sleep" => halt_pending;
        "apic/halt-without-wake-up-is-an-exit" => halt_dead [differs];
        "apic/halt-ends-with-a-kick-and-goes-on-sleeping" => halt_kick [abi];
        "apic/priorities-and-end-of-interrupt" => priorities;
        "apic/cr8-holds-back" => cr8;
        "apic/level-triggered-end-is-reported" => level;
        "apic/nmi-message" => nmi;
        "apic/self-ipi" => self_ipi;
        "apic/register-page-accesses" => page [abi];
        "apic/x2apic-registers" => x2apic;
        "apic/timer-one-shot" => timer_once;
        "apic/timer-periodic" => timer_periodic;
        "apic/timer-deadline" => timer_deadline;
        "apic/second-cpu-starts-with-init-and-sipi" => second_cpu [abi];
        "apic/bad-accesses-are-refused" => refused [abi];
    }
}

fn message() -> CaseResult {
    let code = code!(message, 64, "sti", "out 0x80, al", "2: jmp 2b", ".org 77b + 0x100", "out 0x81, al", "hlt");
    let mut m = started(code)?;
    let messages = m.messages.clone();
    let sender = thread::spawn(move || {
        thread::sleep(Duration::from_millis(30));
        messages.signal_msi(MSI, 0x40);
    });
    m.expect_mark(0x81)?;
    harness::joined(sender.join())?;
    Ok(())
}

fn halt_sleeps() -> CaseResult {
    let code =
        code!(halt_sleeps, 64, "sti", "hlt", "out 0x80, al", "2: jmp 2b", ".org 77b + 0x100", "out 0x81, al", "iretq",);
    let mut m = machine(code)?;
    let (vm, kicker) = (m.vm.clone(), m.vcpu.kicker());
    let sender = thread::spawn(move || -> CaseResult {
        // State 4: blocked.
        harness::wait_until("the vCPU to sleep", || Ok(kicker.stats()?.state == 4))?;
        thread::sleep(Duration::from_millis(50));
        Ok(vm.signal_msi(MSI, 0x40)?)
    });
    m.expect_mark(0x81)?;
    harness::joined(sender.join())??;
    ensure_eq!(m.read_u64(STACK - 40)?, CODE + 2, "interrupted RIP, behind HLT");
    m.expect_mark(0x80)?;
    let stats = m.vcpu.stats()?;
    ensure!(stats.halt_ns >= 40_000_000, "slept {} ns, expected at least 40 ms", stats.halt_ns);
    Ok(())
}

fn halt_pending() -> CaseResult {
    let code = code!(
        halt_pending,
        64,
        "out 0x80, al",
        "sti",
        "hlt",
        "out 0x82, al",
        ".org 77b + 0x100",
        "out 0x81, al",
        "iretq"
    );
    let mut m = started(code)?;
    m.messages.signal_msi(MSI, 0x40);
    m.expect_mark(0x81)?;
    // The shadow of STI covers HLT, which the interrupt ends.
    ensure_eq!(m.read_u64(STACK - 40)?, CODE + 4, "interrupted RIP, behind HLT");
    m.expect_mark(0x82)?;
    Ok(())
}

/// With interrupts off nothing ordinary can end HLT: the program is told.
fn halt_dead() -> CaseResult {
    let mut m = machine(code!(halt_dead, 64, "cli", "hlt", "out 0x80, al"))?;
    m.expect_halt()?;
    ensure_eq!(m.vcpu.general().rip, CODE + 2, "RIP behind HLT");
    ensure_eq!(m.vcpu.get::<Events>()?.activity, ACTIVITY_HALTED, "activity");
    // An NMI does end it.
    m.write(CODE + 0x200, code!(nmi_handler, 64, "out 0x82, al", "iretq"))?;
    m.vector(2, CODE + 0x200)?;
    m.messages.signal_msi(MSI, 0x400);
    m.expect_marks(&[0x82, 0x80])
}

fn halt_kick() -> CaseResult {
    let code = code!(halt_kick, 64, "sti", "hlt", "out 0x80, al", "2: jmp 2b", ".org 77b + 0x100", "iretq");
    let mut m = machine(code)?;
    for _ in 0..3 {
        let kicker = m.vcpu.kicker();
        let kick = thread::spawn(move || -> CaseResult {
            harness::wait_until("the vCPU to sleep", || Ok(kicker.stats()?.state == 4))?;
            Ok(kicker.kick()?)
        });
        m.expect(Interrupted)?;
        harness::joined(kick.join())??;
        ensure_eq!(m.vcpu.get::<Events>()?.activity, ACTIVITY_HALTED, "activity after the kick");
    }
    m.messages.signal_msi(MSI, 0x40);
    m.expect_mark(0x80)?;
    ensure_eq!(m.vcpu.get::<Events>()?.activity, 0, "activity of a guest that runs");
    Ok(())
}

/// The higher vector interrupts the lower one's handler, and the lower one does not interrupt the higher's until EOI.
fn priorities() -> CaseResult {
    let code = x2apic_code!(
        priorities,
        "out 0x80, al",
        "sti",
        "nop",
        "out 0x83, al",
        "hlt",
        ".org 77b + 0x100", // 0x40
        "sti",
        "out 0x81, al",
        "eoi",
        "iretq",
        ".org 77b + 0x180", // 0x60
        "sti",
        "nop",
        "out 0x82, al",
        "eoi",
        "nop",
        "out 0x84, al",
        "iretq",
    );
    let mut m = started(code)?;
    // Both wait: the higher goes first, and the lower comes in the moment of its EOI.
    m.messages.signal_msi(MSI, 0x40);
    m.messages.signal_msi(MSI, 0x60);
    m.expect_mark(0x82)?;
    ensure_eq!(register(&m, 0xa0)?, 0x60, "processor priority in the handler of 0x60");
    m.expect_mark(0x81)?;
    // The higher again, into the handler of the lower.
    m.messages.signal_msi(MSI, 0x60);
    m.expect_marks(&[0x82, 0x84, 0x84, 0x83])?;
    ensure_eq!(register(&m, 0xa0)?, 0, "processor priority after both");
    Ok(())
}

fn cr8() -> CaseResult {
    let code = code!(
        cr8,
        64,
        "mov eax, 4",
        "mov cr8, rax",
        "sti",
        "nop",
        "out 0x80, al",
        "nop",
        "out 0x80, al",
        "xor eax, eax",
        "mov cr8, rax",
        "nop",
        "out 0x82, al",
        "hlt",
        ".org 77b + 0x100",
        "out 0x81, al",
        "iretq",
    );
    let mut m = started(code)?;
    m.messages.signal_msi(MSI, 0x40);
    m.expect_mark(0x80)?;
    ensure_eq!(m.vcpu.apic_access(0x80, None)?, 0x40, "task priority register");
    m.expect_marks(&[0x81, 0x82])
}

fn level() -> CaseResult {
    let code = x2apic_code!(level, "sti", "out 0x80, al", "nop", "out 0x83, al", "hlt", "watched 0x100, 0x81, 0x82",);
    let mut m = started(code)?;
    // Level-triggered and asserted.
    m.messages.level_triggered(MSI, 0xc040);
    m.messages.signal_msi(MSI, 0xc040);
    m.expect_mark(0x81)?;
    ensure_eq!(register(&m, 0x180 + 0x20)?, 1, "trigger mode of vector 0x40");
    m.expect(InterruptEnd { vector: Some(0x40) })?;
    m.expect_marks(&[0x82, 0x83])
}

fn nmi() -> CaseResult {
    let code = code!(nmi, 64, "cli", "out 0x80, al", "2: jmp 2b", ".org 77b + 0x100", "out 0x81, al", "hlt");
    let mut m = machine(code)?;
    m.vector(2, CODE + 0x100)?;
    m.expect_mark(0x80)?;
    m.messages.signal_msi(MSI, 0x400);
    m.expect_mark(0x81)?;
    Ok(())
}

fn self_ipi() -> CaseResult {
    let code = x2apic_code!(
        self_ipi,
        "sti",
        "write 0x83f, 0x40",
        "nop",
        "out 0x80, al",
        "write 0x830, 0x40060",
        "nop",
        "out 0x80, al",
        "hlt",
        "handler 0x100, 0x81",
        "handler 0x180, 0x82",
    );
    let mut m = machine(code)?;
    m.expect_marks(&[0x81, 0x80, 0x82, 0x80])
}

/// The xAPIC's page is not memory: the program decodes and hands the access back.
fn page() -> CaseResult {
    let code = code!(
        page,
        64,
        "mov eax, [rbx + 0x30]",
        "mov esi, eax",
        "mov dword ptr [rbx + 0x80], 0x50",
        "mov rdi, cr8",
        "hlt"
    );
    let mut m = Machine::with(Mode::Long, code, Apic::InKernel)?;
    // Long mode maps one GiB; the page is reached through another alias of it: entry 3 of the PDPT, 2 MiB page 0x1f7.
    m.write_u64(crate::machine::TABLES + 0x1018, (crate::machine::TABLES + 0x3000) | 7)?;
    m.write_u64(crate::machine::TABLES + 0x3000 + 8 * 0x1f7, 0xfee0_0000 | 0x87)?;
    m.vcpu.set_gpr(3, 0xfee0_0000)?;
    m.expect_fault(0xfee0_0030, AccessFlags::READ)?;
    let version = m.vcpu.apic_access(0x30, None)?;
    m.step_over(3, |general| general.gpr[0] = version.into());
    m.expect_fault(0xfee0_0080, AccessFlags::WRITE)?;
    m.vcpu.apic_access(0x80, Some(0x50))?;
    m.step_over(10, |_| ());
    m.expect_halt()?;
    let gpr = m.vcpu.general().gpr;
    ensure_eq!(gpr[6], u64::from(version), "version register");
    ensure_eq!(gpr[7], 5, "CR8");
    Ok(())
}

fn x2apic() -> CaseResult {
    let code = x2apic_code!(
        x2apic,
        "mov ecx, 0x802",
        "rdmsr",
        "mov r8d, eax",
        "mov ecx, 0x803",
        "rdmsr",
        "mov r9d, eax",
        "write 0x808, 0x70",
        "mov r10, cr8",
        "mov ecx, 0x80d",
        "rdmsr",
        "mov r11d, eax",
        "mov ecx, 0x80e",
        "rdmsr",
        "out 0x82, al",
        ".org 77b + 0x100",
        "mov r12d, 1",
        "out 0x82, al",
    );
    let mut m = machine(code)?;
    m.vector(13, CODE + 0x100)?;
    m.expect_mark(0x82)?;
    let gpr = m.vcpu.general().gpr;
    ensure_eq!(gpr[8], 0, "x2APIC id");
    ensure_eq!(gpr[9] & 0xff, 0x14, "version");
    ensure_eq!(gpr[10], 7, "CR8 after the task priority was written");
    ensure_eq!(gpr[11], 1, "logical id: cluster 0, bit 0");
    ensure_eq!(gpr[12], 1, "faults of a register that x2APIC mode does not have");
    ensure_eq!(m.vcpu.get::<Control>()?.apic_base, 0xfee0_0d00, "APIC base");
    Ok(())
}

fn timer_once() -> CaseResult {
    let code = x2apic_code!(
        timer_once,
        "write 0x83e, 0xb",
        "write 0x832, 0x40",
        "write 0x838, 200000000",
        "mov ecx, 0x839",
        "rdmsr",
        "out 0x80, eax",
        "sti",
        "hlt",
        "out 0x82, al",
        "rdmsr",
        "out 0x80, eax",
        "hlt",
        ".org 77b + 0x100",
        "out 0x81, al",
        "iretq",
    );
    let mut m = machine(code)?;
    let left = m.expect_word(0x80)?;
    ensure!((1..=200_000_000).contains(&left), "current count {left} after a start at 200,000,000");
    m.expect_marks(&[0x81, 0x82])?;
    ensure_eq!(m.expect_word(0x80)?, 0, "current count when the timer has fired");
    Ok(())
}

/// Three periods, then the timer is masked.
fn timer_periodic() -> CaseResult {
    let code = x2apic_code!(
        timer_periodic,
        "write 0x83e, 0xb",
        "write 0x832, 0x20040",
        "write 0x838, 20000000",
        "2: sti",
        "hlt",
        "cli",
        "jmp 2b",
        ".org 77b + 0x100",
        "inc r14",
        "mov eax, r14d",
        "out 0x81, al",
        "eoi",
        "iretq",
    );
    let mut m = machine(code)?;
    for count in 1..=3 {
        m.expect_out(0x81, Byte, count)?;
    }
    Ok(())
}

fn timer_deadline() -> CaseResult {
    let code = x2apic_code!(
        timer_deadline,
        "write 0x832, 0x40040",
        "rdtsc",
        "add eax, 40000000",
        "adc edx, 0",
        "mov r8d, eax",
        "mov r9d, edx",
        "mov ecx, 0x6e0",
        "wrmsr",
        "sti",
        "hlt",
        "cli",
        "mov ecx, 0x6e0",
        "rdmsr",
        "mov r10d, eax",
        "or r10d, edx",
        "out 0x80, al",
        "hlt",
        ".org 77b + 0x100",
        "rdtsc",
        "shl rdx, 32",
        "lea r11, [rax + rdx]",
        "iretq",
    );
    let mut m = machine(code)?;
    let entry = m.system.supported_cpuid()?.into_iter().find(|entry| entry.function == 1);
    if entry.is_none_or(|entry| (entry.ecx >> 24) & 1 == 0) {
        return Err(Stop::Skip("TSC deadlines are not offered here".into()));
    }
    m.expect_mark(0x80)?;
    let gpr = m.vcpu.general().gpr;
    let deadline = (gpr[9] << 32) | gpr[8];
    ensure!(gpr[11] >= deadline, "the timer fired at {:#x}, before {deadline:#x}", gpr[11]);
    ensure_eq!(gpr[10], 0, "deadline register after it fired");
    Ok(())
}

/// CPU 0 sends INIT and start-up messages through its x2APIC; CPU 1 comes up in real mode at the page that they name.
fn second_cpu() -> CaseResult {
    let code = x2apic_code!(
        second_cpu,
        "mov edx, 1",
        "mov ecx, 0x830",
        "mov eax, 0x4500",
        "wrmsr",
        "mov eax, 0x4605",
        "wrmsr",
        "out 0x80, al",
        "hlt",
    );
    let ap = code!(ap, 16, "mov ax, cs", "out 0x90, ax", "cli", "hlt");
    let mut m = machine(code)?;
    m.write(0x5000, ap)?;
    let mut second = m.vm.create_vcpu(1)?;
    harness::watch(second.kicker());
    second.set_entry(GuestPhysAddr::new(0))?;
    second.set_ept_root(&m.space)?;
    second.setup(Apic::InKernel, &m.system.supported_cpuid()?)?;
    ensure_eq!(second.get::<Events>()?.activity, ACTIVITY_WAIT_FOR_SIPI, "activity of CPU 1");
    let thread = thread::spawn(move || -> Result<_, Stop> {
        let first = second.run()?.reason;
        let then = second.run()?.reason;
        Ok((first, then))
    });
    m.expect_mark(0x80)?;
    let (first, then) = harness::joined(thread.join())??;
    let width = axvcpu_uapi::exit::AccessWidth::Word;
    ensure_eq!(first, IoWrite { port: 0x90, width, data: 0x500 }, "first exit of CPU 1");
    ensure_eq!(then, Halt, "second exit of CPU 1");
    Ok(())
}

fn refused() -> CaseResult {
    let mut m = machine(&[0xf4])?;
    for offset in [0x1000, 0x1001, u32::MAX] {
        ensure_eq!(
            m.vcpu.apic_access(offset, None),
            Err(Error::ApicAccess(Errno::EINVAL)),
            "reading at offset {offset:#x}"
        );
    }
    let bad = m.vm.signal_msi(0x1000, 0x40);
    ensure_eq!(bad, Err(Error::SignalMsi(Errno::EINVAL)), "a message to an ordinary address");
    let mut m = Machine::new(Mode::Long, &[0xf4])?;
    ensure_eq!(m.vcpu.apic_access(0x30, None), Err(Error::ApicAccess(Errno::EOPNOTSUPP)), "an APIC that is not there");
    Ok(())
}
