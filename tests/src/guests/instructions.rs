// SPDX-License-Identifier: MIT OR Apache-2.0
//! Instructions that need a decision: carried out, made harmless, or refused.

use crate::flaws;
use crate::harness::{Case, CaseResult, Stop};
use crate::machine::{Machine, Mode, CODE, GDT, TSS};
use crate::{code, ensure, ensure_eq, table};
use axvcpu_uapi::exit::AccessWidth::Byte;
use axvcpu_uapi::exit::AxVCpuExitReason::{Hypercall, TaskSwitch, TripleFault};
use axvcpu_uapi::system::{BACKEND_SVM, BACKEND_VMX};
use axvcpu_uapi::x86::{Control, General, Segments};

pub(super) fn cases() -> Vec<Case> {
    table! {
        "instructions/hypercall" => hypercall [differs];
        "instructions/undefined-ones-fault" => undefined [differs];
        "instructions/counters-are-refused" => counters;
        "instructions/cache-and-tlb" => caches;
        "instructions/rdtscp" => rdtscp;
        "instructions/pause-loop" => pause;
        "instructions/triple-fault" => triple_fault [differs];
        "instructions/task-switch-by-jump" => task_jump [differs];
        "instructions/prefixes-before-an-intercepted-one" => prefixes;
        "instructions/self-modifying-code" => self_modifying;
    }
}

fn hypercall() -> CaseResult {
    let svm = code!(vmmcall, 64, ".byte 0x0f, 0x01, 0xd9", "out 0x80, al", "hlt");
    let vmx = code!(vmcall, 64, ".byte 0x0f, 0x01, 0xc1", "out 0x80, al", "hlt");
    let mut m = Machine::new(Mode::Long, svm)?;
    match m.system.info()?.backend {
        BACKEND_SVM => {}
        BACKEND_VMX => m.write(CODE, vmx)?,
        other => return Err(Stop::Skip(format!("backend {other} has another instruction for it"))),
    }
    m.modify(|general| {
        for (i, reg) in [0, 3, 1, 2, 6, 7, 8].into_iter().enumerate() {
            general.gpr[reg] = 0x1111_0000_0000_0000 * (i as u64 + 1) + 5;
        }
    })?;
    let args = [2, 3, 4, 5, 6, 7].map(|i| 0x1111_0000_0000_0000 * i + 5);
    m.expect(Hypercall { nr: 0x1111_0000_0000_0005, args })?;
    m.vcpu.reply(0xffff_ffff_ffff_ff42);
    m.expect_out(0x80, Byte, 0x42)?;
    ensure_eq!(m.vcpu.general().gpr[0], 0xffff_ffff_ffff_ff42, "RAX");
    m.expect_halt()
}

/// Runs `code`, which executes instructions that must raise `vector`, each of the length in R15; returns the registers
/// at the end. The handler counts in R14 and steps over the instruction.
fn faulting(code: &[u8], vector: u8) -> Result<General, Stop> {
    let mut m = Machine::new(Mode::Long, code)?;
    let handler = if vector == 13 {
        code!(with_error, 64, "add rsp, 8", "add [rsp], r15", "inc r14", "iretq")
    } else {
        code!(without_error, 64, "add [rsp], r15", "inc r14", "iretq")
    };
    m.write(CODE + 0x300, handler)?;
    m.vector(vector, CODE + 0x300)?;
    m.expect_halt()?;
    Ok(m.vcpu.general())
}

/// Nested virtualization, secure launch and MONITOR are not offered: #UD, as on a CPU without them.
fn undefined() -> CaseResult {
    let code = code!(
        undefined,
        64,
        "mov r15d, 3",
        "xor eax, eax",
        ".byte 0x0f, 0x01, 0xd8", // vmrun
        ".byte 0x0f, 0x01, 0xda", // vmload
        ".byte 0x0f, 0x01, 0xdb", // vmsave
        ".byte 0x0f, 0x01, 0xdc", // stgi
        ".byte 0x0f, 0x01, 0xdd", // clgi
        ".byte 0x0f, 0x01, 0xde", // skinit
        ".byte 0x0f, 0x01, 0xdf", // invlpga
        "lea rax, [rsp]",
        "xor ecx, ecx",
        "xor edx, edx",
        ".byte 0x0f, 0x01, 0xc8", // monitor
        ".byte 0x0f, 0x01, 0xc9", // mwait
        ".byte 0x0f, 0x01, 0xc2", // vmlaunch
        "mov r15d, 2",
        "ud2",
        "hlt",
    );
    ensure_eq!(faulting(code, 6)?.gpr[14], 11, "#UD that the guest counted");
    Ok(())
}

fn counters() -> CaseResult {
    let code = code!(counters, 64, "mov r15d, 2", "xor ecx, ecx", "rdpmc", "mov ecx, 5", "rdpmc", "hlt");
    ensure_eq!(faulting(code, 13)?.gpr[14], 2, "#GP that the guest counted");
    Ok(())
}

fn caches() -> CaseResult {
    let code = code!(
        caches,
        64,
        "wbinvd",
        "invd",
        "mov eax, 0x20000",
        "invlpg [rax]",
        "clflush [rax]",
        "mov rax, cr3",
        "mov cr3, rax",
        "mov byte ptr [0x20000], 0x77",
        "wbinvd",
        "mov al, [0x20000]",
        "out 0x80, al",
        "hlt",
    );
    let mut m = Machine::new(Mode::Long, code)?;
    m.expect_out(0x80, Byte, 0x77)?;
    m.expect_halt()
}

fn rdtscp() -> CaseResult {
    let code = code!(rdtscp, 64, "rdtscp", "mov esi, ecx", "hlt");
    let mut m = Machine::new(Mode::Long, code)?;
    let entry = m.system.supported_cpuid()?.into_iter().find(|entry| entry.function == 0x8000_0001);
    if entry.is_none_or(|entry| (entry.edx >> 27) & 1 == 0) {
        return Err(Stop::Skip("this CPU has no RDTSCP".into()));
    }
    m.vcpu.set_msrs(&[axvcpu_uapi::x86::Msr { index: 0xc000_0103, value: 0xabc, reserved: 0 }])?;
    m.expect_halt()?;
    ensure_eq!(m.vcpu.general().gpr[6], 0xabc, "TSC_AUX");
    // The host keeps its own: getcpu() reads TSC_AUX in the vDSO.
    for _ in 0..100 {
        let cpu = nix::sched::sched_getcpu()?;
        ensure!(cpu < 4096, "getcpu() says {cpu} after the guest ran");
    }
    Ok(())
}

fn pause() -> CaseResult {
    let code = code!(pause, 64, "mov ecx, 20000", "2: pause", "loop 2b", "out 0x80, al", "hlt");
    let mut m = Machine::new(Mode::Long, code)?;
    m.expect_out(0x80, Byte, 0)?;
    m.expect_halt()
}

/// A fault without a handler, in each mode. The state is then lost (APM vol. 2 section 15.14.3), but the vCPU is not:
/// with registers set anew it runs.
fn triple_fault() -> CaseResult {
    for mode in [Mode::Real, Mode::Protected, Mode::Long] {
        let mut m = Machine::new(mode, code!(triple_fault, 64, "ud2", "hlt"))?;
        let (control, segments, general): (Control, Segments, General) = (m.vcpu.get()?, m.vcpu.get()?, m.vcpu.get()?);
        let mut without = segments;
        without.idtr.limit = 0;
        m.vcpu.set(&without)?;
        m.expect(TripleFault).map_err(|stop| stop.context(format_args!("{mode:?}")))?;
        m.vcpu.set(&control)?;
        m.vcpu.set(&segments)?;
        m.vcpu.set(&General { rip: general.rip + 2, ..general })?;
        m.expect_halt().map_err(|stop| stop.context(format_args!("{mode:?}")))?;
    }
    Ok(())
}

/// A far jump to a task is reported, not carried out.
fn task_jump() -> CaseResult {
    flaws::TASK_SWITCHES_UNSEEN.skip()?;
    let code = code!(task_jump, 32, ".byte 0xea", ".long 0", ".word 0x28", "hlt");
    let mut m = Machine::new(Mode::Protected, code)?;
    // An available 32-bit TSS at selector 0x28.
    m.write_u64(GDT + 0x28, 0x0000_8900_0000_0067 | ((TSS + 0x80) << 16))?;
    m.expect(TaskSwitch { selector: 0x28, source: 2 })?;
    Ok(())
}

/// Prefixes that mean nothing are part of the instruction's length, found with or without the CPU's help.
fn prefixes() -> CaseResult {
    let code = code!(
        prefixes,
        64,
        "xor eax, eax",
        ".byte 0x66, 0x2e, 0x48, 0x0f, 0xa2", // cpuid
        ".byte 0x3e, 0x66, 0x41, 0xf4",       // hlt
        ".byte 0xf2, 0x36, 0x0f, 0x31",       // rdtsc
        "mov ecx, 0x12345678",
        ".byte 0x64, 0x66, 0x0f, 0x32", // rdmsr
        ".byte 0x2e, 0x2e, 0x2e, 0x2e, 0x2e, 0x2e, 0x2e, 0x2e, 0x2e, 0x2e, 0x2e, 0x2e, 0x2e, 0xf4", // hlt
        "out 0x80, al",
        "hlt",
    );
    let mut m = Machine::new(Mode::Long, code)?;
    m.expect_halt()?;
    ensure_eq!(m.vcpu.general().rip, CODE + 11, "RIP behind CPUID and HLT");
    m.expect(axvcpu_uapi::exit::AxVCpuExitReason::SysRegRead { addr: 0x1234_5678, reg: 0 })?;
    m.vcpu.reply(0x33);
    m.expect_halt()?;
    ensure_eq!(m.vcpu.general().rip, CODE + 38, "RIP behind RDTSC, MOV, RDMSR and HLT");
    m.expect_out(0x80, Byte, 0x33)?;
    m.expect_halt()
}

/// Code that the guest writes, and code that the program writes. A jump comes between (SDM vol. 3 section 10.1.3).
fn self_modifying() -> CaseResult {
    let code = code!(
        self_modifying,
        64,
        "mov byte ptr [rip + 3f + 1], cl",
        "jmp 2f",
        "2: nop",
        "3: mov al, 0x11",
        "out 0x80, al",
        "inc cl",
        "jmp 77b",
    );
    let mut m = Machine::new(Mode::Long, code)?;
    m.vcpu.set_gpr(1, 0x20)?;
    for value in 0x20..0x24 {
        m.expect_out(0x80, Byte, value)?;
    }
    let code = code!(modified, 64, "mov al, 0x11", "out 0x80, al", "jmp 77b");
    m.write(CODE, code)?;
    m.modify(|general| general.rip = CODE)?;
    for value in 0x41..0x44 {
        m.write(CODE + 1, &[value])?;
        m.expect_out(0x80, Byte, value.into())?;
    }
    Ok(())
}
