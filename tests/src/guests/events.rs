// SPDX-License-Identifier: MIT OR Apache-2.0
//! Exceptions, NMIs and software interrupts that the program injects, and events whose delivery is interrupted by an
//! exit.

use crate::flaws;
use crate::harness::{Case, CaseResult, Stop};
use crate::machine::{Machine, Mode, CODE, DATA, HIGH, HOLE, STACK};
use crate::{code, ensure, ensure_eq, table};
use axvcpu_uapi::addr::GuestPhysAddr;
use axvcpu_uapi::client::{Errno, Error, Memory, Permissions};
use axvcpu_uapi::exit::AccessFlags;
use axvcpu_uapi::exit::AxVCpuExitReason::TripleFault;
use axvcpu_uapi::vcpu::{
    Event, EVENT_EXCEPTION, EVENT_EXTERNAL_INTERRUPT, EVENT_HAS_ADDRESS, EVENT_HAS_ERROR_CODE, EVENT_NMI,
    EVENT_SOFTWARE_INTERRUPT,
};
use axvcpu_uapi::x86::{Control, Events, Segments, EVENTS_NMI_MASKED, RSP};
use std::sync::Arc;

pub(super) fn cases() -> Vec<Case> {
    table! {
        "events/exception-without-error-code" => no_error_code;
        "events/exception-with-error-code" => error_code;
        "events/page-fault-sets-cr2" => page_fault;
        "events/software-interrupt" => software [differs];
        "events/nmi-and-its-mask" => nmi;
        "events/nmi-ignores-the-interrupt-flag" => nmi_if;
        "events/bad-ones-are-refused" => refused [abi];
        "events/the-guests-own-exceptions-stay-inside" => own;
        "events/handlers-in-pages-that-are-not-mapped-yet" => handlers_not_mapped;
        "events/delivery-into-a-discarded-page" => discarded [differs];
        "events/delivery-into-a-page-that-is-not-memory" => not_memory [abi];
        "events/interrupt-delivery-into-a-page-that-is-not-memory" => interrupt_not_memory [abi];
        "events/fault-during-delivery-is-a-double-fault" => double_fault;
        "events/delivery-without-a-handler-is-a-triple-fault" => no_handler;
    }
}

/// A guest in long mode: at CODE `out 0x80; nop; hlt`, and at CODE + 0x100 a handler that says so on port 0x81 and
/// halts.
fn machine() -> Result<Machine, Stop> {
    let code =
        code!(machine, 64, "out 0x80, al", "nop", "out 0x80, al", "hlt", ".org 77b + 0x100", "out 0x81, al", "hlt",);
    let mut m = Machine::new(Mode::Long, code)?;
    m.expect_mark(0x80)?;
    Ok(m)
}

/// RFLAGS.RF, which the CPU sets in the flags that a fault pushes.
const RF: u64 = 1 << 16;

/// The frame of a handler in long mode without change of stack: the words from the top of the original stack down,
/// without RF in the flags.
fn frame<const N: usize>(m: &Machine, top: u64) -> Result<[u64; N], Stop> {
    let mut words = [0; N];
    for (i, word) in words.iter_mut().enumerate() {
        *word = m.read_u64(top - 8 * (i as u64 + 1))?;
    }
    words[2] &= !RF;
    Ok(words)
}

fn no_error_code() -> CaseResult {
    let mut m = machine()?;
    m.vector(6, CODE + 0x100)?;
    m.inject(EVENT_EXCEPTION, 6)?;
    m.expect_mark(0x81)?;
    // SS, RSP, RFLAGS, CS, RIP: the OUT before has been completed.
    ensure_eq!(frame(&m, STACK)?, [0x10, STACK, 2, 0x18, CODE + 2], "frame of #UD");
    ensure_eq!(m.vcpu.general().gpr[RSP], STACK - 40, "RSP in the handler");
    m.expect_halt()
}

fn error_code() -> CaseResult {
    let mut m = machine()?;
    m.vector(13, CODE + 0x100)?;
    m.vcpu.inject(&Event {
        kind: EVENT_EXCEPTION,
        vector: 13,
        error_code: 0x1234,
        flags: EVENT_HAS_ERROR_CODE,
        ..Event::default()
    })?;
    m.expect_mark(0x81)?;
    ensure_eq!(frame(&m, STACK)?, [0x10, STACK, 2, 0x18, CODE + 2, 0x1234], "frame of #GP");
    m.expect_halt()
}

fn page_fault() -> CaseResult {
    let mut m = machine()?;
    m.vector(14, CODE + 0x100)?;
    m.vcpu.inject(&Event {
        kind: EVENT_EXCEPTION,
        vector: 14,
        error_code: 6,
        flags: EVENT_HAS_ERROR_CODE | EVENT_HAS_ADDRESS,
        address: 0x7fff_dead_beef,
    })?;
    m.expect_mark(0x81)?;
    ensure_eq!(m.vcpu.get::<Control>()?.cr2, 0x7fff_dead_beef, "CR2");
    ensure_eq!(frame(&m, STACK)?, [0x10, STACK, 2, 0x18, CODE + 2, 6], "frame of #PF");
    m.expect_halt()
}

fn software() -> CaseResult {
    let mut m = machine()?;
    m.vector(0x80, CODE + 0x100)?;
    m.inject(EVENT_SOFTWARE_INTERRUPT, 0x80)?;
    m.expect_mark(0x81)?;
    ensure_eq!(frame(&m, STACK)?, [0x10, STACK, 2, 0x18, CODE + 2], "frame of INT 0x80");
    m.expect_halt()
}

/// A second NMI waits until the first one's IRET; it is not lost.
fn nmi() -> CaseResult {
    flaws::DR6_LATE.skip()?;
    let code = code!(
        nmi,
        64,
        "out 0x80, al",
        "nop",
        "nop",
        "hlt",
        ".org 77b + 0x100",
        "out 0x81, al",
        "out 0x82, al",
        "iretq",
    );
    let mut m = Machine::new(Mode::Long, code)?;
    m.vector(2, CODE + 0x100)?;
    m.expect_mark(0x80)?;
    m.inject(EVENT_NMI, 0)?;
    m.expect_mark(0x81)?;
    let events: Events = m.vcpu.get()?;
    ensure!(events.flags & EVENTS_NMI_MASKED != 0, "NMIs are not masked in the handler");
    m.inject(EVENT_NMI, 0)?;
    m.expect_mark(0x82)?;
    ensure_eq!(m.vcpu.general().gpr[RSP], STACK - 40, "RSP in the first handler");
    m.expect_marks(&[0x81, 0x82])?;
    m.expect_halt()?;
    ensure_eq!(m.vcpu.get::<Events>()?.flags & EVENTS_NMI_MASKED, 0, "NMI mask after IRET");
    Ok(())
}

fn nmi_if() -> CaseResult {
    let mut m = machine()?;
    m.vector(2, CODE + 0x100)?;
    ensure_eq!(m.vcpu.general().rflags & 0x200, 0, "RFLAGS.IF");
    m.inject(EVENT_NMI, 0)?;
    m.expect_mark(0x81)?;
    ensure_eq!(frame(&m, STACK)?, [0x10, STACK, 2, 0x18, CODE + 2], "frame of the NMI");
    m.expect_halt()
}

fn refused() -> CaseResult {
    let mut m = machine()?;
    let event = |kind, vector, flags| Event { kind, vector, flags, ..Event::default() };
    for (what, bad) in [
        ("kind 1", event(1, 3, 0)),
        ("kind 5", event(5, 3, 0)),
        ("vector 256", event(EVENT_EXTERNAL_INTERRUPT, 256, 0)),
        ("exception 2", event(EVENT_EXCEPTION, 2, 0)),
        ("exception 32", event(EVENT_EXCEPTION, 32, 0)),
        ("unknown flag", event(EVENT_EXCEPTION, 6, 4)),
        ("#GP without its error code", event(EVENT_EXCEPTION, 13, 0)),
        ("#UD with an error code", event(EVENT_EXCEPTION, 6, EVENT_HAS_ERROR_CODE)),
        ("software interrupt 256", event(EVENT_SOFTWARE_INTERRUPT, 256, 0)),
    ] {
        ensure_eq!(m.vcpu.inject(&bad), Err(Error::Inject(Errno::EINVAL)), "{what}");
    }
    m.inject(EVENT_EXCEPTION, 6)?;
    ensure_eq!(m.vcpu.inject(&event(EVENT_EXCEPTION, 6, 0)), Err(Error::Inject(Errno::EAGAIN)), "a second exception");
    m.inject(EVENT_EXTERNAL_INTERRUPT, 0x40)?;
    let again = m.vcpu.inject(&event(EVENT_EXTERNAL_INTERRUPT, 0x41, 0));
    ensure_eq!(again, Err(Error::Inject(Errno::EAGAIN)), "a second interrupt");
    // The first of each is still there.
    let events: Events = m.vcpu.get()?;
    ensure_eq!((events.external_vector, events.event.vector), (0x40, 6), "what waits");
    Ok(())
}

/// Faults of the guest's own making go to its handlers without an exit.
fn own() -> CaseResult {
    let code = code!(
        own,
        64,
        "xor ecx, ecx",
        "div ecx",
        "2: int3",
        "mov rax, [rdi]",
        "hlt",
        ".org 77b + 0x100",
        "or r8d, 1",
        "add qword ptr [rsp], 2",
        "iretq",
        ".org 77b + 0x120",
        "or r8d, 2",
        "iretq",
        ".org 77b + 0x140",
        "or r8d, 4",
        "add rsp, 8",
        "add qword ptr [rsp], 3",
        "mov rbx, cr2",
        "iretq",
    );
    let mut m = Machine::new(Mode::Long, code)?;
    m.vector(0, CODE + 0x100)?;
    m.vector(3, CODE + 0x120)?;
    m.vector(14, CODE + 0x140)?;
    m.vcpu.set_gpr(7, 0x5_1234_5678)?;
    m.expect_halt()?;
    let gpr = m.vcpu.general().gpr;
    ensure_eq!(gpr[8], 7, "handlers that ran");
    ensure_eq!(gpr[3], 0x5_1234_5678, "CR2 in the handler");
    Ok(())
}

/// The stack's page is gone when the event is delivered; the module brings it back and delivers the event once.
/// The first instruction of each handler exits, when the exception has been delivered and nothing has been executed since.
fn handlers_not_mapped() -> CaseResult {
    let code = code!(
        handlers_not_mapped,
        64,
        "ud2",
        "xor ecx, ecx",
        "div ecx",
        "mov eax, [rdi]",
        "mov edi, 0x80000000", // Beyond the page tables.
        "mov eax, [rdi]",
        "mov rbx, rsp",
        "out 0x80, al",
    );
    // mov rbx, rsp; out 0x81, al; behind the instruction, whose length is 2: add qword ptr [rsp], 2; iretq
    let plain = [0x48, 0x89, 0xe3, 0xe6, 0x81, 0x48, 0x83, 0x04, 0x24, 2, 0x48, 0xcf];
    // The same with add rsp, 8 before it is behind the instruction.
    let with_code = [0x48, 0x89, 0xe3, 0xe6, 0x81, 0x48, 0x83, 0xc4, 8, 0x48, 0x83, 0x04, 0x24, 2, 0x48, 0xcf];
    let mut m = Machine::new(Mode::Long, code)?;
    let vectors = [6u8, 0, 13, 14];
    for (page, vector) in (1..).zip(vectors) {
        let at = HIGH + page * 0x1000;
        m.vector(vector, at)?;
        m.write(at, if vector < 8 { &plain } else { &with_code })?;
    }
    m.vcpu.set_gpr(7, 1 << 63)?; // Not canonical.
    for (vector, at) in vectors.into_iter().zip([0, 4, 6, 13]) {
        m.expect_mark(0x81)?;
        let size = if vector < 8 { 40 } else { 48 };
        ensure_eq!(m.vcpu.general().gpr[3], STACK - size, "RSP in the handler of {vector}");
        ensure_eq!(m.read_u64(STACK - 40)?, CODE + at, "RIP in the frame of {vector}");
    }
    m.expect_mark(0x80)?;
    ensure_eq!(m.vcpu.general().gpr[3], STACK, "RSP when they have returned");
    Ok(())
}

fn discarded() -> CaseResult {
    let code =
        code!(discarded, 64, "out 0x80, al", "nop", "hlt", ".org 77b + 0x100", "inc r14", "out 0x81, al", "iretq",);
    for (kind, vector) in [(EVENT_EXCEPTION, 6), (EVENT_NMI, 2), (EVENT_SOFTWARE_INTERRUPT, 0x80)] {
        let mut m = Machine::new(Mode::Long, code)?;
        m.vector(vector, CODE + 0x100)?;
        m.modify(|general| general.gpr[RSP] = HIGH + 0x1000)?;
        m.expect_mark(0x80)?;
        m.ram.discard(HIGH as usize, 0x1000)?;
        m.inject(kind, vector)?;
        m.expect_mark(0x81)?;
        ensure_eq!(frame(&m, HIGH + 0x1000)?, [0x10, HIGH + 0x1000, 2, 0x18, CODE + 2], "frame");
        m.expect_halt()?;
        ensure_eq!(m.vcpu.general().gpr[14], 1, "times that the handler ran");
    }
    Ok(())
}

/// The stack is a hole when the event is delivered: the program sees a fault, maps memory, and the event is delivered
/// once.
fn deliver_into_hole(m: &mut Machine, inject: impl FnOnce(&mut Machine) -> CaseResult, frame_flags: u64) -> CaseResult {
    m.modify(|general| general.gpr[RSP] = HOLE + 0x1000)?;
    inject(m)?;
    let exit = m.run()?;
    ensure!(
        matches!(exit.reason, axvcpu_uapi::exit::AxVCpuExitReason::NestedPageFault { addr, access_flags }
            if addr.as_u64() & !0xfff == HOLE && access_flags.contains(AccessFlags::WRITE)),
        "exit: {:x?}",
        exit.reason
    );
    ensure_eq!(m.vcpu.general().rip, CODE + 2, "RIP while the event waits");
    let stack = Arc::new(Memory::anonymous(0x1000)?);
    let slot = m.space.map_all(GuestPhysAddr::new(HOLE), Arc::clone(&stack), Permissions::RWX)?;
    m.expect_mark(0x81)?;
    let mut words = [0; 5];
    for (i, word) in words.iter_mut().enumerate() {
        *word = stack.read_u64(0x1000 - 8 * (i + 1))?;
    }
    words[2] &= !RF;
    ensure_eq!(words, [0x10, HOLE + 0x1000, frame_flags, 0x18, CODE + 2], "frame");
    m.expect_mark(0x83)?;
    m.expect_halt()?;
    ensure_eq!(m.vcpu.general().gpr[14], 1, "times that the handler ran");
    drop(slot);
    Ok(())
}

fn hole_code() -> &'static [u8] {
    code!(hole_code, 64, "out 0x80, al", "out 0x83, al", "hlt", ".org 77b + 0x100", "inc r14", "out 0x81, al", "iretq",)
}

fn not_memory() -> CaseResult {
    for (kind, vector) in [(EVENT_EXCEPTION, 6), (EVENT_NMI, 2), (EVENT_SOFTWARE_INTERRUPT, 0x80)] {
        let mut m = Machine::new(Mode::Long, hole_code())?;
        m.vector(vector, CODE + 0x100)?;
        m.expect_mark(0x80)?;
        deliver_into_hole(&mut m, |m| m.inject(kind, vector), 2)
            .map_err(|stop| stop.context(format_args!("event of kind {kind}")))?;
    }
    Ok(())
}

fn interrupt_not_memory() -> CaseResult {
    let mut m = Machine::new(Mode::Long, hole_code())?;
    m.vector(0x40, CODE + 0x100)?;
    m.interrupts(true)?;
    m.expect_mark(0x80)?;
    deliver_into_hole(&mut m, |m| m.inject(EVENT_EXTERNAL_INTERRUPT, 0x40), 0x202)
}

/// The gate of the injected vector is not present: #NP during delivery of a #GP makes #DF.
fn double_fault() -> CaseResult {
    let mut m = machine()?;
    m.vector(8, CODE + 0x100)?;
    m.vcpu.inject(&Event { kind: EVENT_EXCEPTION, vector: 13, flags: EVENT_HAS_ERROR_CODE, ..Event::default() })?;
    m.expect_mark(0x81)?;
    ensure_eq!(frame(&m, STACK)?, [0x10, STACK, 2, 0x18, CODE + 2, 0], "frame of #DF");
    m.expect_halt()
}

fn no_handler() -> CaseResult {
    let mut m = machine()?;
    let mut segments: Segments = m.vcpu.get()?;
    segments.idtr.limit = 0;
    segments.idtr.base = DATA;
    m.vcpu.set(&segments)?;
    m.inject(EVENT_EXCEPTION, 6)?;
    m.expect(TripleFault)?;
    Ok(())
}
