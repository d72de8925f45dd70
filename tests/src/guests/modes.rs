// SPDX-License-Identifier: MIT OR Apache-2.0
//! Entry in real, protected and long mode, and the ways between them.

use crate::harness::{Case, CaseResult};
use crate::machine::{flat_segment, Machine, Mode, CODE, CR0_PE, DATA, STACK, USER_CODE, USER_DATA};
use crate::{code, ensure, ensure_eq, table};
use axvcpu_uapi::exit::AccessWidth::{Byte, Dword};
use axvcpu_uapi::x86::{Control, General, Segments, RAX, RSP};

pub(super) fn cases() -> Vec<Case> {
    table! {
        "mode/real-entry" => real_entry;
        "mode/real-wraps-at-64k" => real_wrap;
        "mode/protected-entry" => protected_entry;
        "mode/long-entry" => long_entry;
        "mode/compatibility-code-in-long-mode" => compatibility;
        "mode/user-mode-is-reported" => user_mode [abi];
        "mode/real-to-long-by-the-guest" => real_to_long;
    }
}

/// The state after SETUP alone is that of real mode at the entry point.
fn real_entry() -> CaseResult {
    let code = code!(real, 16, "mov eax, 0x12345678", "push cs", "pop bx", "out 0x80, eax", "hlt");
    let mut m = Machine::new(Mode::Real, code)?;
    let (control, segments, general): (Control, Segments, General) = (m.vcpu.get()?, m.vcpu.get()?, m.vcpu.get()?);
    ensure_eq!(control.cr0 & CR0_PE, 0, "CR0.PE");
    ensure_eq!(segments.cs.base + general.rip, CODE, "linear address of the entry point");
    ensure_eq!(general.rflags, 2, "RFLAGS");
    m.expect_out(0x80, Dword, 0x1234_5678)?;
    ensure_eq!(m.vcpu.general().gpr[3] & 0xffff, u64::from(segments.cs.selector), "CS as the guest sees it");
    m.expect_halt()
}

/// 16-bit address arithmetic: an address beyond 64 KiB wraps inside the segment.
fn real_wrap() -> CaseResult {
    let code = code!(
        wrap,
        16,
        "mov bx, 0xfff0",
        "mov si, 0x0510",
        "mov byte ptr [bx + si], 0x5a",
        "mov al, [0x500]",
        "out 0x80, al",
        "hlt",
    );
    let mut m = Machine::new(Mode::Real, code)?;
    m.expect_out(0x80, Byte, 0x5a)?;
    m.expect_halt()
}

fn protected_entry() -> CaseResult {
    let code = code!(
        protected,
        32,
        "push eax",
        "mov ebx, esp",
        "mov edi, 0x20000",
        "mov dword ptr [edi], 0xcafebabe",
        "mov eax, [edi]",
        "out 0x80, eax",
        "inc eax", // 0x40: a REX prefix if this were 64-bit code
        "out 0x80, eax",
        "hlt",
    );
    let mut m = Machine::new(Mode::Protected, code)?;
    m.expect_out(0x80, Dword, 0xcafe_babe)?;
    m.expect_out(0x80, Dword, 0xcafe_babf)?;
    ensure_eq!(m.vcpu.general().gpr[3], STACK - 4, "stack pointer after a 32-bit push");
    ensure_eq!(m.read_u64(DATA)? as u32, 0xcafe_babe, "memory that the guest wrote");
    m.expect_halt()
}

fn long_entry() -> CaseResult {
    let code = code!(
        long,
        64,
        "mov rax, 0x123456789abcdef0",
        "push rax",
        "mov rbx, rsp",
        "lea rcx, [rip + 77b]",
        "shr rax, 32",
        "out 0x80, eax",
        "hlt",
    );
    let mut m = Machine::new(Mode::Long, code)?;
    m.expect_out(0x80, Dword, 0x1234_5678)?;
    let general = m.vcpu.general();
    ensure_eq!(general.gpr[3], STACK - 8, "stack pointer after a 64-bit push");
    ensure_eq!(general.gpr[1], CODE, "RIP-relative address");
    ensure_eq!(m.read_u64(STACK - 8)?, 0x1234_5678_9abc_def0, "the pushed word");
    m.expect_halt()
}

/// Far return into a 32-bit segment and back.
fn compatibility() -> CaseResult {
    let code = code!(
        compat,
        64,
        "push 0x08",
        "push 0x1040",
        "retfq",
        ".org 77b + 0x40",
        ".code32",
        "mov eax, 0x40000000",
        "inc eax",
        "out 0x80, eax",
        "push 0x18",
        "push 0x1080",
        "retf",
        ".org 77b + 0x80",
        ".code64",
        "mov rax, 0x700000000",
        "shr rax, 32",
        "out 0x81, al",
        "hlt",
    );
    let mut m = Machine::new(Mode::Long, code)?;
    m.expect_out(0x80, Dword, 0x4000_0001)?;
    let segments: Segments = m.vcpu.get()?;
    ensure_eq!(segments.cs.selector, 8, "CS in compatibility mode");
    ensure_eq!(segments.cs.attributes & 0x600, 0x400, "CS.L and CS.D");
    m.expect_out(0x81, Byte, 7)?;
    let segments: Segments = m.vcpu.get()?;
    ensure_eq!(segments.cs.attributes & 0x600, 0x200, "CS.L and CS.D");
    m.expect_halt()
}

/// Ring 3 with IOPL 3 may use ports; the exit says that it is user mode, and HLT faults into ring 0.
fn user_mode() -> CaseResult {
    let code = code!(
        user,
        64,
        "out 0x80, al",
        "iretq",
        ".org 77b + 0x40",
        "out 0x81, al",
        "hlt",
        ".org 77b + 0x100", // #GP
        "out 0x82, al",
        "pop rax",
        "hlt",
    );
    let mut m = Machine::new(Mode::Long, code)?;
    m.vector(13, CODE + 0x100)?;
    let frame = [CODE + 0x40, USER_CODE.into(), 0x3002, DATA, USER_DATA.into()];
    for (i, word) in frame.into_iter().enumerate() {
        m.write_u64(STACK - 40 + 8 * i as u64, word)?;
    }
    m.modify(|general| general.gpr[RSP] = STACK - 40)?;
    let exit = m.expect_out(0x80, Byte, 0)?;
    ensure!(!exit.user_mode(), "ring 0 is reported as user mode");
    let exit = m.expect_out(0x81, Byte, 0)?;
    ensure!(exit.user_mode(), "ring 3 is not reported as user mode");
    let segments: Segments = m.vcpu.get()?;
    ensure_eq!(segments.cs.selector, USER_CODE, "CS in ring 3");
    ensure_eq!((segments.ss.attributes >> 5) & 3, 3, "DPL of SS, which is the CPL");
    let exit = m.expect_out(0x82, Byte, 0)?;
    ensure!(!exit.user_mode(), "the fault handler is reported as user mode");
    ensure_eq!(m.vcpu.general().gpr[RSP], STACK - 48, "stack from the TSS, with an error code");
    m.expect_halt()?;
    ensure_eq!(m.vcpu.general().gpr[RAX], 0, "error code of the fault");
    Ok(())
}

/// What a boot loader does: GDT, CR0.PE, far jump, PAE, EFER.LME, paging, far jump.
fn real_to_long() -> CaseResult {
    let code = code!(
        boot,
        16,
        "cli",
        "lgdt [0x7f0]",
        "mov eax, cr0",
        "or al, 1",
        "mov cr0, eax",
        ".byte 0x66, 0xea",
        ".long 0x1040",
        ".word 0x08",
        ".org 77b + 0x40",
        ".code32",
        "mov ax, 0x10",
        "mov ds, ax",
        "mov ss, ax",
        "mov eax, cr4",
        "or eax, 0x20",
        "mov cr4, eax",
        "mov eax, 0x10000",
        "mov cr3, eax",
        "mov ecx, 0xc0000080",
        "rdmsr",
        "or eax, 0x100",
        "wrmsr",
        "mov eax, cr0",
        "or eax, 0x80000000",
        "mov cr0, eax",
        "out 0x80, al",
        ".byte 0xea",
        ".long 0x1100",
        ".word 0x18",
        ".org 77b + 0x100",
        ".code64",
        "mov ecx, 0xc0000080",
        "rdmsr",
        "out 0x81, eax",
        "mov rax, 0x1122334455667788",
        "hlt",
    );
    let mut m = Machine::new(Mode::Real, code)?;
    let mut descriptor = [0; 6];
    descriptor[0] = 0x3f;
    descriptor[2..].copy_from_slice(&0x800u32.to_le_bytes());
    m.write(0x7f0, &descriptor)?;
    m.expect_mark(0x80)?;
    let segments: Segments = m.vcpu.get()?;
    ensure_eq!(segments.cs, flat_segment(8, 0xc9b), "CS of protected mode");
    let efer = m.expect_word(0x81)?;
    ensure_eq!(efer & 0x500, 0x500, "EFER.LME and EFER.LMA");
    m.expect_halt()?;
    ensure_eq!(m.vcpu.general().gpr[RAX], 0x1122_3344_5566_7788, "RAX");
    let segments: Segments = m.vcpu.get()?;
    ensure_eq!(segments.cs, flat_segment(0x18, 0xa9b), "CS of long mode");
    Ok(())
}
