// SPDX-License-Identifier: MIT OR Apache-2.0
//! External interrupts from the program: when the window is open, when it opens, and what shuts it for an instruction.

use crate::harness::{Case, CaseResult, Stop};
use crate::machine::{Machine, Mode, CODE, HOLE, STACK};
use crate::{code, ensure, ensure_eq, table};
use axvcpu_uapi::addr::GuestPhysAddr;
use axvcpu_uapi::client::{Memory, Permissions};
use axvcpu_uapi::exit::AccessFlags;
use axvcpu_uapi::exit::AxVCpuExitReason::InterruptWindow;
use axvcpu_uapi::vcpu::EVENT_EXTERNAL_INTERRUPT;
use axvcpu_uapi::x86::{Control, Events, EVENTS_INTERRUPT_SHADOW};
use std::sync::Arc;

pub(super) fn cases() -> Vec<Case> {
    table! {
        "interrupts/delivered-at-once-when-enabled" => at_once;
        "interrupts/wait-for-sti-and-one-more-instruction" => sti;
        "interrupts/in-real-mode" => real;
        "interrupts/window-is-reported" => window_state;
        "interrupts/window-exit-after-sti" => window_exit;
        "interrupts/window-exit-after-popf-has-no-shadow" => window_popf;
        "interrupts/shadow-of-sti-at-an-exit" => shadow_sti [abi];
        "interrupts/shadow-of-mov-ss-at-an-exit" => shadow_mov_ss [abi];
        "interrupts/shadow-set-by-the-program" => shadow_set [abi];
        "interrupts/halt-wakes-with-an-interrupt" => halt;
        "interrupts/one-after-the-other" => sequence;
    }
}

/// The RIP that the innermost frame of a handler without error code holds.
fn pushed_rip(m: &Machine) -> Result<u64, Stop> {
    m.read_u64(STACK - 40)
}

fn at_once() -> CaseResult {
    let code = code!(at_once, 64, "sti", "nop", "out 0x80, al", "hlt", ".org 77b + 0x100", "out 0x81, al", "iretq");
    let mut m = Machine::new(Mode::Long, code)?;
    m.vector(0x40, CODE + 0x100)?;
    let (_, exit) = m.expect_mark(0x80)?;
    ensure!(exit.interrupt_window_open(), "the window is not open with IF set");
    m.inject(EVENT_EXTERNAL_INTERRUPT, 0x40)?;
    let (_, exit) = m.expect_mark(0x81)?;
    ensure!(!exit.interrupt_window_open(), "the window is open in the handler, which has IF clear");
    ensure_eq!(pushed_rip(&m)?, CODE + 4, "interrupted RIP");
    ensure_eq!(m.read_u64(STACK - 24)? & 0x200, 0x200, "IF in the interrupted flags");
    m.expect_halt()
}

fn sti() -> CaseResult {
    let code = code!(
        sti,
        64,
        "out 0x80, al",
        "nop",
        "sti",
        "inc ebx",
        "inc ecx",
        "hlt",
        ".org 77b + 0x100",
        "out 0x81, al",
        "iretq"
    );
    let mut m = Machine::new(Mode::Long, code)?;
    m.vector(0x40, CODE + 0x100)?;
    m.expect_mark(0x80)?;
    m.inject(EVENT_EXTERNAL_INTERRUPT, 0x40)?;
    m.expect_mark(0x81)?;
    ensure_eq!(pushed_rip(&m)?, CODE + 6, "interrupted RIP, one instruction behind STI");
    let gpr = m.vcpu.general().gpr;
    ensure_eq!((gpr[3], gpr[1]), (1, 0), "EBX and ECX, the instructions after STI");
    m.expect_halt()
}

fn real() -> CaseResult {
    let code = code!(real, 16, "out 0x80, al", "sti", "nop", "nop", "hlt", ".org 77b + 0x100", "out 0x81, al", "iret");
    let mut m = Machine::new(Mode::Real, code)?;
    m.vector(0x21, CODE + 0x100)?;
    m.expect_mark(0x80)?;
    m.inject(EVENT_EXTERNAL_INTERRUPT, 0x21)?;
    m.expect_mark(0x81)?;
    let frame = m.read::<6>(STACK - 6)?;
    let cs: axvcpu_uapi::x86::Segments = m.vcpu.get()?;
    ensure_eq!(cs.cs.base, 0, "CS base in the handler");
    // IP, CS, FLAGS.
    let (ip, cs) = (u16::from_le_bytes([frame[0], frame[1]]), u16::from_le_bytes([frame[2], frame[3]]));
    ensure_eq!(u64::from(cs) * 16 + u64::from(ip), CODE + 4, "interrupted address");
    ensure_eq!(frame[5] & 2, 2, "IF in the interrupted flags");
    m.expect_halt()
}

fn window_state() -> CaseResult {
    let code = code!(
        window_state,
        64,
        "out 0x80, al",
        "sti",
        "nop",
        "out 0x80, al",
        "cli",
        "out 0x80, al",
        "sti",
        "out 0x80, al",
        "out 0x80, al",
        "hlt",
    );
    let mut m = Machine::new(Mode::Long, code)?;
    // An OUT in the shadow of STI ends the shadow when it is completed.
    for (i, open) in [false, true, false, true, true].into_iter().enumerate() {
        let (_, exit) = m.expect_mark(0x80)?;
        ensure_eq!(exit.interrupt_window_open(), open, "the window at OUT number {i}");
    }
    m.expect_halt()
}

fn window_exit() -> CaseResult {
    let code = code!(
        window_exit,
        64,
        "out 0x80, al",
        "nop",
        "sti",
        "nop",
        "2: jmp 2b",
        ".org 77b + 0x100",
        "out 0x81, al",
        "hlt",
    );
    let mut m = Machine::new(Mode::Long, code)?;
    m.vector(0x40, CODE + 0x100)?;
    m.expect_mark(0x80)?;
    m.vcpu.request_interrupt_window(true);
    let exit = m.expect(InterruptWindow)?;
    ensure!(exit.interrupt_window_open(), "the window is not open at its exit");
    ensure_eq!(m.vcpu.general().rip, CODE + 5, "RIP at the window: behind STI and its shadow");
    // The request stays until it is taken back, so it comes again at once.
    m.expect(InterruptWindow)?;
    m.vcpu.request_interrupt_window(false);
    m.inject(EVENT_EXTERNAL_INTERRUPT, 0x40)?;
    m.expect_mark(0x81)?;
    ensure_eq!(pushed_rip(&m)?, CODE + 5, "interrupted RIP");
    m.expect_halt()
}

fn window_popf() -> CaseResult {
    let code = code!(window_popf, 64, "push 0x202", "popfq", "nop", "2: jmp 2b");
    let mut m = Machine::new(Mode::Long, code)?;
    m.vcpu.request_interrupt_window(true);
    m.expect(InterruptWindow)?;
    ensure_eq!(m.vcpu.general().rip, CODE + 6, "RIP at the window: directly behind POPF");
    Ok(())
}

/// An instruction in a shadow touches the hole; the exit says so. With memory mapped there, it is executed, and only
/// then the interrupt comes.
fn shadow(code: &[u8], length: u64) -> CaseResult {
    let mut m = Machine::new(Mode::Long, code)?;
    m.vector(0x40, CODE + 0x100)?;
    m.vcpu.set_gpr(3, HOLE)?;
    let exit = m.expect_fault(HOLE, AccessFlags::READ)?;
    let at = m.vcpu.general().rip;
    ensure!(!exit.interrupt_window_open(), "the window is open in a shadow");
    ensure_eq!(m.vcpu.get::<Events>()?.flags & EVENTS_INTERRUPT_SHADOW, EVENTS_INTERRUPT_SHADOW, "shadow at the exit");
    let memory = Arc::new(Memory::anonymous(0x1000)?);
    memory.write(0, &[0x99])?;
    let slot = m.space.map_all(GuestPhysAddr::new(HOLE), memory, Permissions::RWX)?;
    m.inject(EVENT_EXTERNAL_INTERRUPT, 0x40)?;
    m.expect_mark(0x81)?;
    ensure_eq!(pushed_rip(&m)?, at + length, "interrupted RIP, behind the instruction in the shadow");
    ensure_eq!(m.vcpu.general().gpr[1], 0x99, "what the instruction in the shadow read");
    drop(slot);
    m.expect_halt()
}

fn shadow_sti() -> CaseResult {
    shadow(
        code!(
            shadow_sti,
            64,
            "xor ecx, ecx",
            "sti",
            "mov cl, [rbx]",
            "nop",
            "nop",
            "hlt",
            ".org 77b + 0x100",
            "out 0x81, al",
            "hlt",
        ),
        2,
    )
}

fn shadow_mov_ss() -> CaseResult {
    shadow(
        code!(
            shadow_mov_ss,
            64,
            "xor ecx, ecx",
            "sti",
            "nop",
            "mov eax, 0x10",
            "mov ss, eax",
            "mov cl, [rbx]",
            "nop",
            "nop",
            "hlt",
            ".org 77b + 0x100",
            "out 0x81, al",
            "hlt",
        ),
        2,
    )
}

fn shadow_set() -> CaseResult {
    let code =
        code!(shadow_set, 64, "out 0x80, al", "inc ebx", "inc ecx", "hlt", ".org 77b + 0x100", "out 0x81, al", "hlt",);
    let mut m = Machine::new(Mode::Long, code)?;
    m.vector(0x40, CODE + 0x100)?;
    m.interrupts(true)?;
    m.expect_mark(0x80)?;
    // The state behind the OUT, with a shadow over the next instruction.
    m.vcpu.set(&Events { flags: EVENTS_INTERRUPT_SHADOW, ..Events::default() })?;
    m.inject(EVENT_EXTERNAL_INTERRUPT, 0x40)?;
    m.expect_mark(0x81)?;
    ensure_eq!(pushed_rip(&m)?, CODE + 4, "interrupted RIP, one instruction on");
    m.expect_halt()
}

/// Without in-kernel APIC, HLT is an exit; the interrupt that the program injects then ends it.
fn halt() -> CaseResult {
    let code = code!(halt, 64, "sti", "hlt", "out 0x80, al", "hlt", ".org 77b + 0x100", "out 0x81, al", "iretq",);
    let mut m = Machine::new(Mode::Long, code)?;
    m.vector(0x40, CODE + 0x100)?;
    m.expect_halt()?;
    ensure_eq!(m.vcpu.general().rip, CODE + 2, "RIP behind HLT");
    m.inject(EVENT_EXTERNAL_INTERRUPT, 0x40)?;
    m.expect_mark(0x81)?;
    ensure_eq!(pushed_rip(&m)?, CODE + 2, "interrupted RIP, behind HLT");
    m.expect_mark(0x80)?;
    m.expect_halt()
}

/// CR8 does not hold back what the program injects as acknowledged; interrupts arrive in the order of injection.
fn sequence() -> CaseResult {
    let code = code!(
        sequence,
        64,
        "sti",
        "2: out 0x80, al",
        "jmp 2b",
        ".org 77b + 0x100",
        "out 0x81, al",
        "iretq",
        ".org 77b + 0x140",
        "out 0x82, al",
        "iretq",
    );
    let mut m = Machine::new(Mode::Long, code)?;
    m.vector(0x40, CODE + 0x100)?;
    m.vector(0x41, CODE + 0x140)?;
    let mut control: Control = m.vcpu.get()?;
    control.cr8 = 15;
    m.vcpu.set(&control)?;
    m.expect_mark(0x80)?;
    for (vector, port) in [(0x40, 0x81), (0x41, 0x82), (0x41, 0x82), (0x40, 0x81)] {
        m.inject(EVENT_EXTERNAL_INTERRUPT, vector)?;
        m.expect_marks(&[port, 0x80])?;
    }
    Ok(())
}
