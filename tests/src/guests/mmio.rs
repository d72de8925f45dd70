// SPDX-License-Identifier: MIT OR Apache-2.0
//! Accesses to what is not memory: the exit tells address and direction, the state is that before the instruction. The
//! cases know their instructions, so they carry them out by hand.

use crate::harness::{Case, CaseResult};
use crate::machine::{Machine, Mode, CODE, DATA, HOLE, HOLE_END, RAM_SIZE, TABLES};
use crate::{code, ensure, ensure_eq, table};
use axvcpu_uapi::exit::AccessFlags;
use axvcpu_uapi::exit::AccessWidth::{Byte, Dword};
use axvcpu_uapi::exit::AxVCpuExitReason::NestedPageFault;
use axvcpu_uapi::x86::{RAX, RDI, RSI};

pub(super) fn cases() -> Vec<Case> {
    table! {
        "mmio/reads-of-1-2-4-and-8-bytes" => reads [abi];
        "mmio/writes-of-1-2-4-and-8-bytes" => writes [abi];
        "mmio/from-real-mode" => real [abi];
        "mmio/from-protected-mode" => protected [abi];
        "mmio/read-across-pages" => read_across [abi];
        "mmio/write-from-memory-across-the-end" => write_across [abi];
        "mmio/read-modify-write" => modify [abi];
        "mmio/string-move-between-memory-and-device" => string_move [abi];
        "mmio/instruction-fetch" => fetch [abi];
        "mmio/page-table-that-is-not-memory" => page_table [abi];
        "mmio/beyond-the-ram" => beyond [abi];
        "mmio/repeats-until-it-is-handled" => repeats [abi];
    }
}

/// Compares what the CPU recorded of the instruction, if it did, with the code.
fn check_insn(exit: &axvcpu_uapi::client::Exit, code: &[u8], rip: u64) -> CaseResult {
    let at = (rip - CODE) as usize;
    let length = exit.insn().len().min(code.len() - at);
    ensure_eq!(exit.insn()[..length], code[at..at + length], "instruction bytes at {rip:#x}");
    Ok(())
}

fn reads() -> CaseResult {
    let code = code!(
        reads,
        64,
        "mov rax, -1",
        "mov al, [rbx + 1]",
        "mov rcx, rax",
        "mov rax, -1",
        "mov ax, [rbx + 2]",
        "mov rdx, rax",
        "mov eax, [rbx + 4]",
        "mov rsi, rax",
        "mov rax, [rbx + 8]",
        "hlt",
    );
    let mut m = Machine::new(Mode::Long, code)?;
    m.vcpu.set_gpr(3, HOLE)?;
    for (offset, length, mask, value) in [
        (1, 3, 0xff, 0x11),
        (2, 4, 0xffff, 0x2222),
        (4, 3, u64::MAX, 0x3333_3333),
        (8, 4, u64::MAX, 0x4444_4444_4444_4444),
    ] {
        let exit = m.expect_fault(HOLE + offset, AccessFlags::READ)?;
        check_insn(&exit, code, m.vcpu.general().rip)?;
        m.step_over(length, |general| general.gpr[RAX] = general.gpr[RAX] & !mask | value);
    }
    m.expect_halt()?;
    let gpr = m.vcpu.general().gpr;
    ensure_eq!(gpr[1], 0xffff_ffff_ffff_ff11, "after a byte");
    ensure_eq!(gpr[2], 0xffff_ffff_ffff_2222, "after a word");
    ensure_eq!(gpr[6], 0x3333_3333, "after 4 bytes");
    ensure_eq!(gpr[RAX], 0x4444_4444_4444_4444, "after 8 bytes");
    Ok(())
}

fn writes() -> CaseResult {
    let code = code!(
        writes,
        64,
        "mov [rbx], al",
        "mov [rbx + 0x1000], ax",
        "mov [rbx + 0x2000], eax",
        "mov [rbx + 0x3000], rax",
        "mov dword ptr [rbx + 0x4000], 0x12345678",
        "hlt",
    );
    let mut m = Machine::new(Mode::Long, code)?;
    m.modify(|general| (general.gpr[RAX], general.gpr[3]) = (0x1122_3344_5566_7788, HOLE))?;
    for (page, length) in [(0, 2), (1, 7), (2, 6), (3, 7), (4, 10)] {
        let exit = m.expect_fault(HOLE + 0x1000 * page, AccessFlags::WRITE)?;
        ensure!(!translated(&exit), "a translation is reported where there is none");
        check_insn(&exit, code, m.vcpu.general().rip)?;
        ensure_eq!(m.vcpu.general().gpr[RAX], 0x1122_3344_5566_7788, "the value to write");
        m.step_over(length, |_| ());
    }
    m.expect_halt()
}

/// Whether a fault had a translation, which did not allow the access.
fn translated(exit: &axvcpu_uapi::client::Exit) -> bool {
    matches!(exit.reason, NestedPageFault { access_flags, .. } if access_flags.contains(AccessFlags::PRESENT))
}

fn real() -> CaseResult {
    let code = code!(
        real,
        16,
        "mov ax, 0xb800",
        "mov es, ax",
        "mov di, 0x10",
        "mov es:[di], ax",
        "mov cl, es:[di + 4]",
        "mov al, cl",
        "out 0x80, al",
        "hlt",
    );
    let mut m = Machine::new(Mode::Real, code)?;
    m.expect_fault(0xb_8010, AccessFlags::WRITE)?;
    ensure_eq!(m.vcpu.general().gpr[RAX] & 0xffff, 0xb800, "the value to write");
    m.step_over(3, |_| ());
    m.expect_fault(0xb_8014, AccessFlags::READ)?;
    m.step_over(4, |general| general.gpr[1] = 0x6b);
    m.expect_out(0x80, Byte, 0x6b)?;
    m.expect_halt()
}

fn protected() -> CaseResult {
    let code = code!(
        protected,
        32,
        "mov edi, 0xfec00000",
        "mov dword ptr [edi], 0x10",
        "mov eax, [edi + 0x10]",
        "out 0x80, eax",
        "hlt",
    );
    let mut m = Machine::new(Mode::Protected, code)?;
    m.expect_fault(0xfec0_0000, AccessFlags::WRITE)?;
    m.step_over(6, |_| ());
    m.expect_fault(0xfec0_0010, AccessFlags::READ)?;
    m.step_over(3, |general| general.gpr[RAX] = 0x0017_8020);
    m.expect_out(0x80, Dword, 0x0017_8020)?;
    m.expect_halt()
}

/// An access over a page boundary inside a device exits for its first page.
fn read_across() -> CaseResult {
    let code = code!(read_across, 64, "mov rax, [rbx]", "hlt");
    let mut m = Machine::new(Mode::Long, code)?;
    m.vcpu.set_gpr(3, HOLE + 0xffc)?;
    m.expect_fault(HOLE + 0xffc, AccessFlags::READ)?;
    m.step_over(3, |general| general.gpr[RAX] = 0x8877_6655_4433_2211);
    m.expect_halt()?;
    ensure_eq!(m.vcpu.general().gpr[RAX], 0x8877_6655_4433_2211, "RAX");
    Ok(())
}

/// An access that begins in memory and ends in a device exits for the device's page, with nothing written yet.
fn write_across() -> CaseResult {
    let code = code!(write_across, 64, "mov [rbx], rax", "hlt");
    let mut m = Machine::new(Mode::Long, code)?;
    m.write_u64(HOLE - 8, 0)?;
    m.modify(|general| (general.gpr[RAX], general.gpr[3]) = (u64::MAX, HOLE - 4))?;
    // The first page must be present before the second can be what is missing.
    m.expect_fault(HOLE, AccessFlags::WRITE)?;
    ensure_eq!(m.vcpu.general().rip, CODE, "RIP");
    ensure_eq!(m.read_u64(HOLE - 8)?, 0, "memory before the device");
    m.step_over(3, |_| ());
    m.expect_halt()
}

/// OR to a device: a read for the CPU's purposes or a write, but one exit with the state before it.
fn modify() -> CaseResult {
    let code = code!(modify, 64, "or dword ptr [rbx], 4", "pushfq", "pop rax", "hlt");
    let mut m = Machine::new(Mode::Long, code)?;
    m.vcpu.set_gpr(3, HOLE_END - 4)?;
    m.expect_fault(HOLE_END - 4, AccessFlags::empty())?;
    m.step_over(3, |general| general.rflags |= 0x80);
    m.expect_halt()?;
    ensure_eq!(m.vcpu.general().gpr[RAX] & 0x80, 0x80, "RFLAGS.SF that the program set");
    Ok(())
}

fn string_move() -> CaseResult {
    let code = code!(string_move, 64, "cld", "rep movsd", "rep stosb", "hlt");
    let mut m = Machine::new(Mode::Long, code)?;
    m.write(DATA, &[1, 0, 0, 0, 2, 0, 0, 0])?;
    m.modify(|general| (general.gpr[RSI], general.gpr[RDI], general.gpr[1]) = (DATA, HOLE + 0x20, 2))?;
    for i in 0..2 {
        m.expect_fault(HOLE + 0x20 + 4 * i, AccessFlags::WRITE)?;
        let gpr = m.vcpu.general().gpr;
        ensure_eq!((gpr[RSI], gpr[RDI], gpr[1]), (DATA + 4 * i, HOLE + 0x20 + 4 * i, 2 - i), "RSI, RDI and RCX");
        ensure_eq!(u32::from_le_bytes(m.read(gpr[RSI])?), i as u32 + 1, "what RSI points to");
        m.step_over(0, |general| {
            general.gpr[RSI] += 4;
            general.gpr[RDI] += 4;
            general.gpr[1] -= 1;
        });
    }
    m.expect_halt()
}

fn fetch() -> CaseResult {
    let code = code!(fetch, 64, "jmp rbx", "hlt");
    let mut m = Machine::new(Mode::Long, code)?;
    m.vcpu.set_gpr(3, HOLE + 0x123)?;
    m.expect_fault(HOLE + 0x123, AccessFlags::EXECUTE)?;
    ensure_eq!(m.vcpu.general().rip, HOLE + 0x123, "RIP");
    m.modify(|general| general.rip = CODE + 2)?;
    m.expect_halt()
}

fn page_table() -> CaseResult {
    let code = code!(page_table, 64, "mov rax, [rbx]", "hlt");
    let mut m = Machine::new(Mode::Long, code)?;
    // The second GiB's page directory lies in the hole.
    m.write_u64(TABLES + 0x1008, (HOLE + 0x3000) | 7)?;
    m.vcpu.set_gpr(3, 0x4000_0000 + (5 << 21))?;
    m.expect_fault(HOLE + 0x3000 + 5 * 8, AccessFlags::PAGE_WALK)?;
    // A table that is there after all.
    m.write_u64(TABLES + 0x1008, (TABLES + 0x2000) | 7)?;
    m.write_u64(TABLES + 0x2000 + 5 * 8, (1 << 21) | 0x87)?;
    m.write_u64(1 << 21, 0x1234_5678_9abc_def0)?;
    m.expect_halt()?;
    ensure_eq!(m.vcpu.general().gpr[RAX], 0x1234_5678_9abc_def0, "RAX");
    Ok(())
}

fn beyond() -> CaseResult {
    let code = code!(beyond, 64, "mov al, [rbx]", "mov al, [rcx]", "hlt");
    let mut m = Machine::new(Mode::Long, code)?;
    m.modify(|general| (general.gpr[3], general.gpr[1]) = (RAM_SIZE as u64, 0x3fff_ffff))?;
    m.expect_fault(RAM_SIZE as u64, AccessFlags::READ)?;
    m.step_over(2, |_| ());
    m.expect_fault(0x3fff_ffff, AccessFlags::READ)?;
    m.step_over(2, |_| ());
    m.expect_halt()
}

/// Running on without doing anything about it gives the same exit again.
fn repeats() -> CaseResult {
    let code = code!(repeats, 64, "mov eax, [rbx]", "hlt");
    let mut m = Machine::new(Mode::Long, code)?;
    m.vcpu.set_gpr(3, HOLE)?;
    let before = m.expect_fault(HOLE, AccessFlags::READ)?.reason;
    let registers = m.vcpu.general();
    for _ in 0..3 {
        ensure_eq!(m.expect_fault(HOLE, AccessFlags::READ)?.reason, before, "exit");
        ensure_eq!(m.vcpu.general(), registers, "registers");
    }
    m.step_over(2, |_| ());
    m.expect_halt()
}
