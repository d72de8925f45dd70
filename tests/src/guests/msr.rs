// SPDX-License-Identifier: MIT OR Apache-2.0
//! Model-specific registers: the ones on the list work, all others are the program's to answer or to refuse.

use crate::flaws;
use crate::harness::{Case, CaseResult, Stop};
use crate::machine::{Machine, Mode, CODE, STACK};
use crate::{code, ensure, ensure_eq, table};
use axvcpu_uapi::exit::AccessWidth::Byte;
use axvcpu_uapi::exit::AxVCpuExitReason::{SysRegRead, SysRegWrite};
use axvcpu_uapi::x86::{Msr, Segments};

pub(super) fn cases() -> Vec<Case> {
    table! {
        "msr/denied-read-is-answered-by-the-program" => read;
        "msr/denied-read-refused-faults" => read_refused;
        "msr/denied-write-reaches-the-program" => write;
        "msr/denied-write-refused-faults" => write_refused;
        "msr/nothing-dangerous-is-on-the-list" => dangerous [differs];
        "msr/allowed-ones-do-not-exit" => allowed;
        "msr/bad-addresses-fault-in-the-guest" => bad_addresses;
        "msr/bad-memory-type-faults-in-the-guest" => bad_type;
        "msr/bases-are-the-segments-bases" => bases;
        "msr/time-stamp-counter" => tsc;
        "msr/efer-keeps-lma" => efer [differs];
    }
}

/// A number that no CPU uses.
const NOBODY: u32 = 0x1234_5678;

fn read() -> CaseResult {
    let code = code!(read, 64, "mov rax, -1", "mov rdx, -1", "mov ecx, 0x12345678", "rdmsr", "hlt");
    let mut m = Machine::new(Mode::Long, code)?;
    m.expect(SysRegRead { addr: NOBODY.into(), reg: 0 })?;
    m.vcpu.reply(0x1122_3344_5566_7788);
    m.expect_halt()?;
    let gpr = m.vcpu.general().gpr;
    ensure_eq!((gpr[0], gpr[2]), (0x5566_7788, 0x1122_3344), "RAX and RDX");
    Ok(())
}

/// Handler of #GP that says on port 0x82 that it ran, and halts.
fn with_handler(code: &[u8]) -> Result<Machine, Stop> {
    let mut bytes = vec![0; 0x100 + 4];
    bytes[..code.len()].copy_from_slice(code);
    bytes[0x100..].copy_from_slice(code!(handler, 64, "out 0x82, al", "pop rbx", "hlt"));
    let m = Machine::new(Mode::Long, &bytes)?;
    m.vector(13, CODE + 0x100)?;
    Ok(m)
}

/// Expects #GP(0) at `rip`.
fn expect_fault(m: &mut Machine, rip: u64) -> CaseResult {
    m.expect_mark(0x82)?;
    ensure_eq!(m.read_u64(STACK - 48)?, 0, "error code");
    ensure_eq!(m.read_u64(STACK - 40)?, rip, "RIP that the fault pushed");
    m.expect_halt()
}

fn read_refused() -> CaseResult {
    let code = code!(read_refused, 64, "mov eax, 7", "mov edx, 8", "mov ecx, 0x12345678", "rdmsr", "hlt");
    let mut m = with_handler(code)?;
    m.expect(SysRegRead { addr: NOBODY.into(), reg: 0 })?;
    m.vcpu.reply_fault();
    expect_fault(&mut m, CODE + 15)?;
    let gpr = m.vcpu.general().gpr;
    ensure_eq!((gpr[0], gpr[2]), (7, 8), "RAX and RDX after the fault");
    Ok(())
}

fn write() -> CaseResult {
    let code = code!(write, 64, "mov rax, -2", "mov edx, 0x11", "mov ecx, 0x12345678", "wrmsr", "out 0x80, al", "hlt");
    let mut m = with_handler(code)?;
    m.expect(SysRegWrite { addr: NOBODY.into(), value: 0x11_ffff_fffe })?;
    m.expect_out(0x80, Byte, 0xfe)?;
    m.expect_halt()
}

fn write_refused() -> CaseResult {
    let code = code!(write_refused, 64, "mov ecx, 0x12345678", "wrmsr", "hlt");
    let mut m = with_handler(code)?;
    m.modify(|general| (general.gpr[0], general.gpr[2]) = (0, 0))?;
    m.expect(SysRegWrite { addr: NOBODY.into(), value: 0 })?;
    m.vcpu.reply_fault();
    expect_fault(&mut m, CODE + 5)
}

/// Reads the MSR whose number is fed to port 0x10, and writes back what it read.
fn server() -> &'static [u8] {
    code!(server, 64, "2: in eax, 0x10", "mov ecx, eax", "rdmsr", "out 0x11, eax", "wrmsr", "out 0x12, al", "jmp 2b",)
}

/// Machine checks, power management, debugging, virtualization and the like must never reach the host's registers:
/// whatever the module does with them (answer, fault, or ask), it does not pass a host value through that the program
/// did not give.
fn dangerous() -> CaseResult {
    let mut m = with_handler(server())?;
    for msr in [
        0x1d9,       // DEBUGCTL
        0x198,       // PERF_STATUS
        0x1a2,       // TEMPERATURE_TARGET
        0x3a,        // FEATURE_CONTROL
        0x480,       // VMX_BASIC
        0xc001_0010, // SYSCFG
        0xc001_0114, // VM_CR
        0xc001_0117, // VM_HSAVE_PA
        0xc001_0015, // HWCR
        0xc001_0200, // PERF_CTL0
    ] {
        m.feed_word(0x10, msr)?;
        let exit = m.run()?;
        use axvcpu_uapi::exit::AxVCpuExitReason::IoWrite;
        match exit.reason {
            // The usual: not on the list.
            SysRegRead { addr, reg: 0 } => {
                ensure_eq!(addr, u64::from(msr), "number of the MSR");
                m.vcpu.reply(0x5a);
                ensure_eq!(m.expect_word(0x11)?, 0x5a, "the program's answer");
                m.expect(SysRegWrite { addr, value: 0x5a })?;
                m.expect_mark(0x12)?;
            }
            // Emulated: then it must not be the location of the host's state save area.
            IoWrite { port: 0x11, data, .. } => {
                ensure!(msr != 0xc001_0117, "VM_HSAVE_PA is {data:#x}");
                match m.run()?.reason {
                    SysRegWrite { .. } => m.expect_mark(0x12).map(drop)?,
                    IoWrite { port: 0x12, .. } => {}
                    other => return Err(Stop::Fail(format!("MSR {msr:#x}: {other:?}"))),
                }
            }
            other => return Err(Stop::Fail(format!("MSR {msr:#x}: {other:?}"))),
        }
    }
    Ok(())
}

fn allowed() -> CaseResult {
    let mut m = with_handler(server())?;
    for (msr, value) in
        [(0xc000_0102u32, 0x1_0000u64), (0xc000_0081, 0x42), (0xc000_0082, 0x1234), (0x174, 8), (0x277, 6)]
    {
        m.vcpu.set_msrs(&[Msr { index: msr, value, reserved: 0 }])?;
        m.feed_word(0x10, msr)?;
        ensure_eq!(m.expect_word(0x11)?, value & 0xffff_ffff, "MSR {msr:#x}");
        m.expect_mark(0x12)?;
    }
    Ok(())
}

/// Addresses that are not canonical, each written with a handler that skips the WRMSR.
fn bad_addresses() -> CaseResult {
    flaws::MSR_ADDRESSES_UNCHECKED.skip()?;
    let code = code!(
        bad_addresses,
        64,
        "mov edx, 0x40000000",
        "mov ecx, 0xc0000082", // LSTAR
        "wrmsr",
        "mov ecx, 0xc0000102", // KERNEL_GS_BASE
        "wrmsr",
        "mov ecx, 0xc0000100", // FS_BASE
        "wrmsr",
        "hlt",
        ".org 77b + 0x100",
        "add rsp, 8",
        "add qword ptr [rsp], 2",
        "inc r14",
        "iretq",
    );
    let mut m = Machine::new(Mode::Long, code)?;
    m.vector(13, CODE + 0x100)?;
    m.expect_halt()?;
    ensure_eq!(m.vcpu.general().gpr[14], 3, "faults that the guest counted");
    Ok(())
}

fn bad_type() -> CaseResult {
    let code = code!(bad_type, 64, "xor edx, edx", "mov eax, 2", "mov ecx, 0x277", "wrmsr", "hlt");
    let mut m = with_handler(code)?;
    expect_fault(&mut m, CODE + 12)
}

fn bases() -> CaseResult {
    let code = code!(
        bases,
        64,
        "mov ecx, 0xc0000100",
        "mov eax, 0x1000",
        "xor edx, edx",
        "wrmsr",
        "inc ecx",
        "mov eax, 0x2000",
        "wrmsr",
        "mov rbx, fs:[0]",
        "swapgs",
        "rdmsr",
        "hlt",
    );
    let mut m = Machine::new(Mode::Long, code)?;
    m.vcpu.set_msrs(&[Msr { index: 0xc000_0102, value: 0x3000, reserved: 0 }])?;
    m.expect_halt()?;
    let segments: Segments = m.vcpu.get()?;
    ensure_eq!((segments.fs.base, segments.gs.base), (0x1000, 0x3000), "bases of FS and GS");
    ensure_eq!(m.vcpu.general().gpr[0], 0x3000, "GS_BASE as read after SWAPGS");
    ensure_eq!(m.vcpu.general().gpr[3], m.read_u64(0x1000)?, "word through FS");
    ensure_eq!(m.vcpu.msrs(&[0xc000_0102])?[0].value, 0x2000, "KERNEL_GS_BASE after SWAPGS");
    Ok(())
}

/// The counter runs, RDTSC and RDMSR agree, and the guest can set it.
fn tsc() -> CaseResult {
    let code = code!(
        tsc,
        64,
        "rdtsc",
        "shl rdx, 32",
        "lea r8, [rax + rdx]",
        "mov ecx, 0x10",
        "rdmsr",
        "shl rdx, 32",
        "lea r9, [rax + rdx]",
        "out 0x80, al",
        "rdtsc",
        "shl rdx, 32",
        "lea r10, [rax + rdx]",
        "xor eax, eax",
        "mov edx, 0x100",
        "wrmsr",
        "rdtsc",
        "shl rdx, 32",
        "lea r11, [rax + rdx]",
        "hlt",
    );
    let mut m = Machine::new(Mode::Long, code)?;
    m.expect_mark(0x80)?;
    m.expect_halt()?;
    let gpr = m.vcpu.general().gpr;
    ensure!(gpr[8] < gpr[9], "RDMSR {:#x} is not behind RDTSC {:#x}", gpr[9], gpr[8]);
    ensure!(gpr[9] < gpr[10], "RDTSC {:#x} is not behind RDMSR {:#x}", gpr[10], gpr[9]);
    ensure!(gpr[11] >> 40 == 1, "RDTSC {:#x} does not follow the value written", gpr[11]);
    Ok(())
}

/// EFER.LMA is read-only, and SVM cannot be switched on.
fn efer() -> CaseResult {
    let code = code!(
        efer,
        64,
        "mov ecx, 0xc0000080",
        "rdmsr",
        "mov r8d, eax",
        "and eax, 0xfffffbfe", // LMA and SCE off
        "wrmsr",
        "rdmsr",
        "mov r9d, eax",
        "or eax, 0x1000", // SVME
        "wrmsr",
        "rdmsr",
        "hlt",
        ".org 77b + 0x100",
        "mov r10d, 1",
        "hlt",
    );
    let mut m = Machine::new(Mode::Long, code)?;
    m.vector(13, CODE + 0x100)?;
    m.expect_halt()?;
    let gpr = m.vcpu.general().gpr;
    ensure_eq!(gpr[8], 0xd01, "EFER as entered");
    ensure_eq!(gpr[9], 0xd00, "EFER after LMA and SCE were cleared");
    ensure_eq!(gpr[10], 1, "faults of switching SVM on");
    Ok(())
}
