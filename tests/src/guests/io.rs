// SPDX-License-Identifier: MIT OR Apache-2.0
//! Port I/O: widths, forms, and the string instructions, which exit before they are executed.

use crate::harness::{Case, CaseResult};
use crate::machine::{Machine, Mode, CODE, DATA};
use crate::{code, ensure_eq, table};
use axvcpu_uapi::exit::AccessWidth::{self, Byte, Dword, Word};
use axvcpu_uapi::exit::AxVCpuExitReason::{IoRead, IoString};
use axvcpu_uapi::x86::{General, RAX, RCX, RDI, RSI};

pub(super) fn cases() -> Vec<Case> {
    table! {
        "io/out-of-1-2-and-4-bytes" => out_widths;
        "io/in-of-1-2-and-4-bytes" => in_widths;
        "io/in-clears-the-upper-half-in-long-mode" => in_long;
        "io/every-port-exits" => ports;
        "io/reply-wins-over-a-changed-register" => reply_order [abi];
        "io/outs-repeated-across-pages" => outs [abi];
        "io/ins-repeated-across-pages" => ins [abi];
        "io/outs-once-each-width" => outs_once [abi];
        "io/ins-backwards-with-prefixes" => ins_backwards [abi];
    }
}

fn out_widths() -> CaseResult {
    let code = code!(
        out_widths,
        16,
        "mov eax, 0x89abcdef",
        "mov dx, 0x3f8",
        "out dx, al",
        "out dx, ax",
        "out dx, eax",
        "out 0x42, al",
        "out 0x43, ax",
        "out 0x44, eax",
        "hlt",
    );
    let mut m = Machine::new(Mode::Real, code)?;
    m.expect_out(0x3f8, Byte, 0xef)?;
    m.expect_out(0x3f8, Word, 0xcdef)?;
    m.expect_out(0x3f8, Dword, 0x89ab_cdef)?;
    m.expect_out(0x42, Byte, 0xef)?;
    m.expect_out(0x43, Word, 0xcdef)?;
    m.expect_out(0x44, Dword, 0x89ab_cdef)?;
    m.expect_halt()
}

/// IN changes as many bytes of EAX as it reads, whatever else the reply holds.
fn in_widths() -> CaseResult {
    let code = code!(
        in_widths,
        32,
        "mov eax, 0x89abcdef",
        "mov dx, 0x1234",
        "in al, dx",
        "out 0x80, eax",
        "in ax, 0x61",
        "out 0x80, eax",
        "in eax, dx",
        "out 0x80, eax",
        "hlt",
    );
    let mut m = Machine::new(Mode::Protected, code)?;
    m.expect(IoRead { port: 0x1234, width: Byte })?;
    m.vcpu.reply(0xffff_ffff_ffff_ff11);
    m.expect_out(0x80, Dword, 0x89ab_cd11)?;
    m.expect(IoRead { port: 0x61, width: Word })?;
    m.vcpu.reply(0xffff_ffff_ffff_2233);
    m.expect_out(0x80, Dword, 0x89ab_2233)?;
    m.expect(IoRead { port: 0x1234, width: Dword })?;
    m.vcpu.reply(0xffff_ffff_4455_6677);
    m.expect_out(0x80, Dword, 0x4455_6677)?;
    m.expect_halt()
}

fn in_long() -> CaseResult {
    let code = code!(in_long, 64, "mov rax, -1", "in al, 0x60", "mov rbx, rax", "mov rax, -1", "in eax, 0x60", "hlt");
    let mut m = Machine::new(Mode::Long, code)?;
    m.expect(IoRead { port: 0x60, width: Byte })?;
    m.vcpu.reply(0x5a);
    m.expect(IoRead { port: 0x60, width: Dword })?;
    m.vcpu.reply(0x8000_0001);
    m.expect_halt()?;
    let general = m.vcpu.general();
    ensure_eq!(general.gpr[3], 0xffff_ffff_ffff_ff5a, "RAX after IN AL");
    ensure_eq!(general.gpr[RAX], 0x8000_0001, "RAX after IN EAX");
    Ok(())
}

/// No port reaches the hardware: not the debug port, the PIC, PCI configuration, nor the last, which wraps.
fn ports() -> CaseResult {
    let code = code!(ports, 64, "2: in eax, dx", "jmp 2b");
    let mut m = Machine::new(Mode::Long, code)?;
    for port in [0, 0x20, 0x60, 0x61, 0x70, 0x80, 0xb2, 0xcf8, 0xcfc, 0x3f8, 0x7fff, 0x8000, 0xffff] {
        m.vcpu.set_gpr(2, u64::from(port))?;
        m.expect(IoRead { port, width: Dword })?;
        m.vcpu.reply(0);
    }
    Ok(())
}

/// The program may change registers at an IN exit; the value read arrives after that.
fn reply_order() -> CaseResult {
    let code = code!(reply_order, 64, "in al, 0x60", "hlt");
    let mut m = Machine::new(Mode::Long, code)?;
    m.expect(IoRead { port: 0x60, width: Byte })?;
    m.vcpu.modify_general(|general| general.gpr[RAX] = 0x1111);
    m.vcpu.reply(0x22);
    m.expect_halt()?;
    ensure_eq!(m.vcpu.general().gpr[RAX], 0x1122, "RAX");
    Ok(())
}

/// Expects string I/O at RIP, the state untouched.
fn expect_string(
    m: &mut Machine,
    at: u64,
    (port, width, input, rep): (u16, AccessWidth, bool, bool),
) -> Result<General, crate::harness::Stop> {
    m.expect(IoString { port, width, input, rep })?;
    let general = m.vcpu.general();
    ensure_eq!(general.rip, at, "RIP at the string instruction");
    let snapshot = m.vcpu.snapshot().ok_or(crate::harness::Stop::Fail("string I/O without snapshot".into()))?;
    ensure_eq!(snapshot.segments, m.vcpu.get()?, "segments of the snapshot");
    ensure_eq!(snapshot.control, m.vcpu.get()?, "control registers of the snapshot");
    Ok(general)
}

fn outs() -> CaseResult {
    let code = code!(outs, 64, "cld", "rep outsd", "hlt");
    let mut m = Machine::new(Mode::Long, code)?;
    let start = DATA + 0xff8;
    let items: Vec<u32> = (0..5).map(|i| 0x1111_1111 * (i + 1)).collect();
    for (i, item) in items.iter().enumerate() {
        m.write(start + 4 * i as u64, &item.to_le_bytes())?;
    }
    m.modify(|general| (general.gpr[RSI], general.gpr[RCX], general.gpr[2]) = (start, 5, 0x1f0))?;
    let general = expect_string(&mut m, CODE + 1, (0x1f0, Dword, false, true))?;
    ensure_eq!((general.gpr[RSI], general.gpr[RCX]), (start, 5), "RSI and RCX");
    // What the device gets: the program reads it where RSI points, over the page boundary.
    for (i, item) in items.iter().enumerate() {
        ensure_eq!(u32::from_le_bytes(m.read(general.gpr[RSI] + 4 * i as u64)?), *item, "item {i}");
    }
    m.step_over(2, |general| (general.gpr[RSI], general.gpr[RCX]) = (start + 20, 0));
    m.expect_halt()?;
    ensure_eq!(m.vcpu.general().gpr[RSI], start + 20, "RSI afterwards");
    Ok(())
}

fn ins() -> CaseResult {
    let code = code!(ins, 64, "cld", "rep insb", "mov eax, [rbx]", "out 0x80, eax", "hlt",);
    let mut m = Machine::new(Mode::Long, code)?;
    let start = DATA + 0xffe;
    m.modify(|general| {
        (general.gpr[RDI], general.gpr[RCX], general.gpr[2], general.gpr[3]) = (start, 4, 0x1f0, start);
    })?;
    // Half of it, then the rest: the program may stop between items, with the registers saying so.
    expect_string(&mut m, CODE + 1, (0x1f0, Byte, true, true))?;
    m.write(start, &[1, 2])?;
    m.step_over(0, |general| (general.gpr[RDI], general.gpr[RCX]) = (start + 2, 2));
    let general = expect_string(&mut m, CODE + 1, (0x1f0, Byte, true, true))?;
    ensure_eq!((general.gpr[RDI], general.gpr[RCX]), (start + 2, 2), "RDI and RCX half-way");
    m.write(start + 2, &[3, 4])?;
    m.step_over(2, |general| (general.gpr[RDI], general.gpr[RCX]) = (start + 4, 0));
    m.expect_out(0x80, Dword, 0x0403_0201)?;
    m.expect_halt()
}

fn outs_once() -> CaseResult {
    let code = code!(outs_once, 16, "mov dx, 0x99", "outsb", "outsw", "outsd", "insb", "insw", "insd", "hlt");
    let mut m = Machine::new(Mode::Real, code)?;
    let mut at = CODE + 3;
    for (input, widths) in [(false, [Byte, Word, Dword]), (true, [Byte, Word, Dword])] {
        for width in widths {
            let general = m.run()?;
            let found = general.reason;
            ensure_eq!(found, IoString { port: 0x99, width, input, rep: false }, "exit");
            let cs: axvcpu_uapi::x86::Segments = m.vcpu.get()?;
            ensure_eq!(cs.cs.base + m.vcpu.general().rip, at, "linear address of the instruction");
            // The 32-bit forms have an operand-size prefix in 16-bit code.
            let length = if width == Dword { 2 } else { 1 };
            m.step_over(length, |_| ());
            at += length;
        }
    }
    m.expect_halt()
}

/// Direction flag, segment override and address-size prefix are the program's to honour; RIP still points at the first
/// prefix.
fn ins_backwards() -> CaseResult {
    let code = code!(ins_backwards, 64, "std", ".byte 0x67, 0x65, 0xf3, 0x6e", "hlt"); // rep outs dx, byte ptr gs:[esi]
    let mut m = Machine::new(Mode::Long, code)?;
    m.modify(|general| (general.gpr[RSI], general.gpr[RCX], general.gpr[2]) = (0x1_0000_0000 | DATA, 3, 0x77))?;
    let general = expect_string(&mut m, CODE + 1, (0x77, Byte, false, true))?;
    ensure_eq!(general.rflags & (1 << 10), 1 << 10, "RFLAGS.DF");
    ensure_eq!(general.gpr[RSI], 0x1_0000_0000 | DATA, "RSI, of which the instruction uses the low half");
    m.step_over(4, |general| general.gpr[RCX] = 0);
    m.expect_halt()
}
