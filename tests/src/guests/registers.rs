// SPDX-License-Identifier: MIT OR Apache-2.0
//! Register sets survive the way into the guest and back: written by the host and read by the guest, and the reverse.

use crate::flaws;
use crate::harness::{Case, CaseResult};
use crate::machine::{Machine, Mode, CODE, CR4_OSXSAVE, DATA, FLAGS, GDT, STACK, TSS};
use crate::{code, ensure, ensure_eq, table};
use axvcpu_uapi::client::{Apic, Errno, Error};
use axvcpu_uapi::exit::AccessWidth::Byte;
use axvcpu_uapi::vcpu::{Event, EVENT_EXCEPTION, EVENT_HAS_ERROR_CODE};
use axvcpu_uapi::x86::{
    Control, Debug, DescriptorTable, Events, General, LocalApic, Msr, Segment, Segments, EVENTS_EVENT_PENDING,
    EVENTS_EXTERNAL_PENDING, EVENTS_INTERRUPT_SHADOW, EVENTS_NMI_MASKED, EVENTS_NMI_PENDING, RSP,
};

pub(super) fn cases() -> Vec<Case> {
    table! {
        "registers/general-into-the-guest" => general_in;
        "registers/general-out-of-the-guest" => general_out;
        "registers/general-through-the-run-page" => run_page [abi];
        "registers/set-gpr" => set_gpr [abi];
        "registers/segments" => segments;
        "registers/segments-out-of-the-guest" => segments_out;
        "registers/control" => control [differs];
        "registers/debug" => debug;
        "registers/debug-exceptions-in-the-guest" => breakpoint;
        "registers/msrs" => msrs [differs];
        "registers/xsave" => xsave;
        "registers/events" => events [abi];
        "registers/local-apic" => local_apic [abi];
    }
}

/// Values that differ in every byte from each other, and in RSP is a stack.
fn pattern() -> General {
    let mut general = General { rip: CODE, rflags: FLAGS | 0xcd5 | (1 << 21), ..General::default() };
    for (i, gpr) in general.gpr.iter_mut().enumerate() {
        *gpr = 0x0101_0101_0101_0101u64.wrapping_mul(0x10 + i as u64) ^ 0x8000_0000_0000_0000;
    }
    general.gpr[RSP] = STACK;
    general
}

/// Pushes every register, from RAX to R15, then the flags.
fn push_all() -> &'static [u8] {
    code!(
        push_all, 64, "push rax", "push rcx", "push rdx", "push rbx", "push rsp", "push rbp", "push rsi", "push rdi",
        "push r8", "push r9", "push r10", "push r11", "push r12", "push r13", "push r14", "push r15", "pushfq", "hlt",
    )
}

/// What [`push_all`] left on the stack.
fn pushed(m: &Machine) -> Result<General, crate::harness::Stop> {
    let mut general = General { rip: CODE, ..General::default() };
    for (i, gpr) in general.gpr.iter_mut().enumerate() {
        *gpr = m.read_u64(STACK - 8 * (i as u64 + 1))?;
    }
    general.gpr[RSP] += 32; // PUSH RSP stores the value before it, after four others.
    general.rflags = m.read_u64(STACK - 8 * 17)?;
    Ok(general)
}

fn general_in() -> CaseResult {
    let mut m = Machine::new(Mode::Long, push_all())?;
    m.vcpu.set(&pattern())?;
    ensure_eq!(m.vcpu.get::<General>()?, pattern(), "registers as read back");
    m.expect_halt()?;
    ensure_eq!(pushed(&m)?, pattern(), "registers as the guest saw them");
    Ok(())
}

fn general_out() -> CaseResult {
    let code = code!(
        general_out,
        64,
        "mov rax, 0x0101010101010101",
        "mov rcx, rax",
        "add rcx, rax",
        "mov rdx, rcx",
        "add rdx, rax",
        "mov rbx, rdx",
        "add rbx, rax",
        "mov rbp, rbx",
        "add rbp, rax",
        "mov rsi, rbp",
        "add rsi, rax",
        "mov rdi, rsi",
        "add rdi, rax",
        "mov r8, rdi",
        "add r8, rax",
        "mov r9, r8",
        "add r9, rax",
        "mov r10, r9",
        "add r10, rax",
        "mov r11, r10",
        "add r11, rax",
        "mov r12, r11",
        "add r12, rax",
        "mov r13, r12",
        "add r13, rax",
        "mov r14, r13",
        "add r14, rax",
        "mov r15, r14",
        "add r15, rax",
        "push 0x246",
        "popfq",
        "hlt",
    );
    let mut m = Machine::new(Mode::Long, code)?;
    m.expect_halt()?;
    let order = [0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];
    let mut expected = General { rip: CODE + code.len() as u64, rflags: 0x246, ..General::default() };
    for (i, reg) in order.into_iter().enumerate() {
        expected.gpr[reg] = 0x0101_0101_0101_0101 * (i as u64 + 1);
    }
    expected.gpr[RSP] = STACK;
    ensure_eq!(m.vcpu.general(), expected, "registers in the run page");
    ensure_eq!(m.vcpu.get::<General>()?, expected, "registers by ioctl");
    Ok(())
}

/// A change made in the run page is applied once, by the next run only.
fn run_page() -> CaseResult {
    let code = code!(run_page, 64, "out 0x80, al", "out 0x80, al", "inc al", "out 0x80, al", "hlt");
    let mut m = Machine::new(Mode::Long, code)?;
    m.expect_out(0x80, Byte, 0)?;
    m.vcpu.modify_general(|general| general.gpr[0] = 0x41);
    m.expect_out(0x80, Byte, 0x41)?;
    m.expect_out(0x80, Byte, 0x42)?;
    // Without the request flag the page's content is ignored: the handle clears it when the set is written by ioctl.
    m.vcpu.modify_general(|general| general.gpr[0] = 0x99);
    m.modify(|general| general.gpr[0] = 0x77)?;
    m.expect_halt()?;
    ensure_eq!(m.vcpu.general().gpr[0], 0x77, "RAX");
    Ok(())
}

fn set_gpr() -> CaseResult {
    let mut m = Machine::new(Mode::Long, push_all())?;
    for (reg, value) in pattern().gpr.into_iter().enumerate() {
        m.vcpu.set_gpr(reg as u32, value)?;
    }
    ensure_eq!(m.vcpu.set_gpr(16, 1), Err(Error::SetGpr(Errno::EINVAL)), "register 16");
    ensure_eq!(m.vcpu.set_gpr(u32::MAX, 1), Err(Error::SetGpr(Errno::EINVAL)), "register 2^32 - 1");
    m.expect_halt()?;
    ensure_eq!(pushed(&m)?.gpr, pattern().gpr, "registers as the guest saw them");
    Ok(())
}

fn segments() -> CaseResult {
    let code = code!(
        segments,
        64,
        "mov rax, fs:[8]",
        "mov rbx, gs:[16]",
        "mov edi, 0x20000",
        "sgdt [rdi]",
        "sidt [rdi + 16]",
        "str r8w",
        "sldt r9w",
        "mov r10w, fs",
        "mov r11w, ds",
        "hlt",
    );
    let mut m = Machine::new(Mode::Long, code)?;
    m.write_u64(DATA + 0x1008, 0x1111_2222_3333_4444)?;
    m.write_u64(DATA + 0x2010, 0x5555_6666_7777_8888)?;
    let mut set: Segments = m.vcpu.get()?;
    set.fs = Segment { base: DATA + 0x1000, limit: 0xffff_ffff, selector: 0x10, attributes: 0xc93 };
    set.gs = Segment { base: DATA + 0x2000, limit: 0xffff_ffff, selector: 0x10, attributes: 0xc93 };
    set.ldtr = Segment { base: 0x3000, limit: 0xfff, selector: 0x40, attributes: 0x82 };
    set.tr = Segment { base: TSS, limit: 0x67, selector: 0x20, attributes: 0x8b };
    set.gdtr = DescriptorTable { base: GDT, limit: 0x47, ..DescriptorTable::default() };
    set.idtr = DescriptorTable { base: 0x2000, limit: 0xabc, ..DescriptorTable::default() };
    m.vcpu.set(&set)?;
    ensure_eq!(m.vcpu.get::<Segments>()?, set, "segments as read back");
    m.expect_halt()?;
    let general = m.vcpu.general();
    ensure_eq!(general.gpr[0], 0x1111_2222_3333_4444, "word through FS");
    ensure_eq!(general.gpr[3], 0x5555_6666_7777_8888, "word through GS");
    ensure_eq!(general.gpr[8] & 0xffff, 0x20, "STR");
    ensure_eq!(general.gpr[9] & 0xffff, 0x40, "SLDT");
    ensure_eq!(general.gpr[10] & 0xffff, 0x10, "FS");
    ensure_eq!(general.gpr[11] & 0xffff, 0x10, "DS");
    ensure_eq!(m.read::<10>(DATA)?, [0x47, 0, 0, 8, 0, 0, 0, 0, 0, 0], "SGDT");
    ensure_eq!(m.read::<10>(DATA + 16)?, [0xbc, 0xa, 0, 0x20, 0, 0, 0, 0, 0, 0], "SIDT");
    ensure_eq!(m.vcpu.get::<Segments>()?, set, "segments after the run");
    Ok(())
}

/// Segment loads in real mode show up in base and selector.
fn segments_out() -> CaseResult {
    let code = code!(
        segments_out,
        16,
        "mov ax, 0x1230",
        "mov ds, ax",
        "mov ax, 0x4560",
        "mov gs, ax",
        "lidt cs:[0x1100]",
        "hlt",
        ".org 77b + 0x100",
        ".word 0x1ff",
        ".long 0x123456"
    );
    let mut m = Machine::new(Mode::Real, code)?;
    m.expect_halt()?;
    let set: Segments = m.vcpu.get()?;
    ensure_eq!((set.ds.selector, set.ds.base), (0x1230, 0x1_2300), "DS");
    ensure_eq!((set.gs.selector, set.gs.base), (0x4560, 0x4_5600), "GS");
    ensure_eq!((set.idtr.base, set.idtr.limit), (0x12_3456, 0x1ff), "IDTR");
    Ok(())
}

fn control() -> CaseResult {
    let code = code!(
        control,
        64,
        "mov rax, cr2",
        "mov rbx, cr3",
        "mov rdx, cr4",
        "mov rsi, cr8",
        "mov rdi, cr0",
        "out 0x80, al",
        "mov rax, 0x7fff12345678",
        "mov cr2, rax",
        "mov eax, 3",
        "mov cr8, rax",
        "mov rax, cr4",
        "or eax, 4",
        "mov cr4, rax",
        "mov rax, cr3",
        "or eax, 8",
        "mov cr3, rax",
        "hlt"
    );
    let mut m = Machine::new(Mode::Long, code)?;
    let mut set: Control = m.vcpu.get()?;
    set.cr2 = 0xffff_8000_1234_5678;
    set.cr8 = 9;
    set.cr4 |= 1 << 3; // DE
    m.vcpu.set(&set)?;
    ensure_eq!(m.vcpu.get::<Control>()?, set, "control registers as read back");
    m.expect_mark(0x80)?;
    let general = m.vcpu.general();
    ensure_eq!(general.gpr[0], set.cr2, "CR2 as the guest saw it");
    ensure_eq!(general.gpr[3], set.cr3, "CR3 as the guest saw it");
    ensure_eq!(general.gpr[2], set.cr4, "CR4 as the guest saw it");
    ensure_eq!(general.gpr[6], set.cr8, "CR8 as the guest saw it");
    ensure_eq!(general.gpr[7], set.cr0, "CR0 as the guest saw it");
    m.expect_halt()?;
    let expected = Control { cr2: 0x7fff_1234_5678, cr8: 3, cr4: set.cr4 | 4, cr3: set.cr3 | 8, ..set };
    ensure_eq!(m.vcpu.get::<Control>()?, expected, "control registers that the guest wrote");
    Ok(())
}

fn debug() -> CaseResult {
    let code = code!(
        debug,
        64,
        "mov rax, dr0",
        "mov rbx, dr1",
        "mov rcx, dr2",
        "mov rdx, dr3",
        "mov rsi, dr6",
        "mov rdi, dr7",
        "out 0x80, al",
        "mov r8, 0x1234",
        "mov dr2, r8",
        "mov r8, 0x400",
        "mov dr7, r8",
        "hlt"
    );
    let mut m = Machine::new(Mode::Long, code)?;
    let set = Debug { dr: [0x1000_0000, 0x2000_0000, 0x3000_0000, 0x4000_0000], dr6: 0xffff_0ff0, dr7: 0x455 };
    m.vcpu.set(&set)?;
    ensure_eq!(m.vcpu.get::<Debug>()?, set, "debug registers as read back");
    m.expect_mark(0x80)?;
    let general = m.vcpu.general();
    ensure_eq!(
        [general.gpr[0], general.gpr[3], general.gpr[1], general.gpr[2]],
        set.dr,
        "DR0 to DR3 as the guest saw them"
    );
    ensure_eq!(general.gpr[6], set.dr6, "DR6 as the guest saw it");
    ensure_eq!(general.gpr[7], set.dr7, "DR7 as the guest saw it");
    m.expect_halt()?;
    let mut expected = set;
    (expected.dr[2], expected.dr7) = (0x1234, 0x400);
    ensure_eq!(m.vcpu.get::<Debug>()?, expected, "debug registers that the guest wrote");
    Ok(())
}

/// A breakpoint of the guest's own raises #DB in the guest, over exits in between.
fn breakpoint() -> CaseResult {
    let code = code!(
        breakpoint,
        64,
        "lea rax, [rip + 2f]",
        "mov dr0, rax",
        "mov eax, 0x401",
        "mov dr7, rax",
        "out 0x80, al",
        "nop",
        "2: nop",
        "out 0x81, al",
        "hlt",
        ".org 77b + 0x100",
        "mov rbx, dr6",
        "mov rcx, [rsp]",
        "out 0x82, al",
        "hlt"
    );
    let mut m = Machine::new(Mode::Long, code)?;
    m.vector(1, CODE + 0x100)?;
    m.expect_mark(0x80)?;
    let at = m.vcpu.get::<Debug>()?.dr[0];
    m.expect_mark(0x82)?;
    let general = m.vcpu.general();
    ensure_eq!(general.gpr[1], at, "RIP that #DB pushed");
    if !flaws::DR6_LATE.here() {
        ensure_eq!(general.gpr[3] & 0xf, 1, "DR6.B0");
    }
    m.expect_halt()
}

/// Model-specific registers with per-vCPU values that reset, and what the test writes to them.
const MSRS: [(u32, u64); 11] = [
    (0xc000_0102, 0xffff_8000_0000_1000), // KERNEL_GS_BASE
    (0xc000_0100, 0x0000_7000_0000_2000), // FS_BASE
    (0xc000_0101, 0xffff_9000_0000_3000), // GS_BASE
    (0xc000_0081, 0x0023_0010_0000_0000), // STAR
    (0xc000_0082, 0xffff_ffff_8100_0000), // LSTAR
    (0xc000_0083, 0xffff_ffff_8200_0000), // CSTAR
    (0xc000_0084, 0x0004_7700),           // SFMASK
    (0x174, 0x10),                        // SYSENTER_CS
    (0x175, 0xffff_8800_0000_4000),       // SYSENTER_ESP
    (0x176, 0xffff_8800_0000_5000),       // SYSENTER_EIP
    (0x277, 0x0007_0406_0007_0406),       // PAT
];

fn msrs() -> CaseResult {
    // Copies the registers whose numbers stand at DATA to DATA + 0x800, and changes each in its lowest free bit.
    let code = code!(
        msrs,
        64,
        "mov esi, 0x20000",
        "mov edi, 0x20800",
        "2: mov ecx, [rsi]",
        "test ecx, ecx",
        "jz 3f",
        "rdmsr",
        "mov [rdi], eax",
        "mov [rdi + 4], edx",
        "xor eax, 0x100",
        "wrmsr",
        "add esi, 8",
        "add edi, 8",
        "jmp 2b",
        "3: hlt"
    );
    let mut m = Machine::new(Mode::Long, code)?;
    let set = MSRS.map(|(index, value)| Msr { index, value, reserved: 0 });
    m.vcpu.set_msrs(&set)?;
    let indices = MSRS.map(|(index, _)| index);
    ensure_eq!(m.vcpu.msrs(&indices)?, set, "MSRs as read back");
    for (i, index) in indices.into_iter().enumerate() {
        m.write_u64(DATA + 8 * i as u64, index.into())?;
    }
    m.expect_halt()?;
    for (i, (index, value)) in MSRS.into_iter().enumerate() {
        ensure_eq!(m.read_u64(DATA + 0x800 + 8 * i as u64)?, value, "MSR {index:#x} as the guest saw it");
    }
    let changed = MSRS.map(|(index, value)| Msr { index, value: value ^ 0x100, reserved: 0 });
    ensure_eq!(m.vcpu.msrs(&indices)?, changed, "MSRs that the guest wrote");
    Ok(())
}

/// Offsets in the XSAVE area (SDM vol. 1 section 13.4): MXCSR, XMM0, and the bit map of components.
const MXCSR: usize = 24;
const XMM0: usize = 160;
const XSTATE_BV: usize = 512;

fn xsave() -> CaseResult {
    let code = code!(
        xsave,
        64,
        "mov edi, 0x20000",
        "movups [rdi], xmm0",
        "movups [rdi + 16], xmm15",
        "stmxcsr [rdi + 32]",
        "pcmpeqd xmm3, xmm3",
        "fld1",
        "hlt"
    );
    let mut m = Machine::new(Mode::Long, code)?;
    let mut area = m.vcpu.xsave()?;
    area[MXCSR..MXCSR + 4].copy_from_slice(&0x1fa0u32.to_le_bytes());
    for i in 0..16 {
        area[XMM0 + 16 * i..XMM0 + 16 * (i + 1)].fill(0xa0 + i as u8);
    }
    area[XSTATE_BV] |= 3;
    m.vcpu.set_xsave(&area)?;
    let back = m.vcpu.xsave()?;
    ensure_eq!(back[XMM0..XMM0 + 256], area[XMM0..XMM0 + 256], "XMM registers as read back");
    m.expect_halt()?;
    ensure_eq!(m.read::<16>(DATA)?, [0xa0; 16], "XMM0 as the guest saw it");
    ensure_eq!(m.read::<16>(DATA + 16)?, [0xaf; 16], "XMM15 as the guest saw it");
    ensure_eq!(m.read::<4>(DATA + 32)?, 0x1fa0u32.to_le_bytes(), "MXCSR as the guest saw it");
    let after = m.vcpu.xsave()?;
    ensure_eq!(after[XMM0 + 48..XMM0 + 64], [0xff; 16], "XMM3 that the guest wrote");
    // ST0 is 1.0: exponent 0x3fff and the explicit leading one.
    ensure_eq!(after[32..42], [0, 0, 0, 0, 0, 0, 0, 0x80, 0xff, 0x3f], "ST0 that the guest wrote");
    ensure!(after[XSTATE_BV] & 3 == 3, "XSTATE_BV does not show the used components");
    Ok(())
}

fn events() -> CaseResult {
    let mut m = Machine::new(Mode::Long, &[0xf4])?;
    ensure_eq!(m.vcpu.get::<Events>()?, Events::default(), "events of a fresh vCPU");
    let set = Events {
        flags: EVENTS_INTERRUPT_SHADOW
            | EVENTS_NMI_MASKED
            | EVENTS_NMI_PENDING
            | EVENTS_EXTERNAL_PENDING
            | EVENTS_EVENT_PENDING,
        external_vector: 0x41,
        event: Event { kind: EVENT_EXCEPTION, vector: 13, error_code: 0x18, flags: EVENT_HAS_ERROR_CODE, address: 0 },
        ..Events::default()
    };
    m.vcpu.set(&set)?;
    ensure_eq!(m.vcpu.get::<Events>()?, set, "events as read back");
    m.vcpu.set(&Events::default())?;
    m.expect_halt()?;
    ensure_eq!(m.vcpu.get::<Events>()?, Events::default(), "events after an exit that left none");
    Ok(())
}

fn local_apic() -> CaseResult {
    let mut m = Machine::with(Mode::Long, &[0xf4], Apic::InKernel)?;
    let mut set: LocalApic = m.vcpu.get()?;
    // The boot processor's APIC is enabled, as firmware leaves it.
    ensure_eq!(set.regs[0xf] & 0x1ff, 0x1ff, "spurious vector register after reset");
    ensure_eq!(set.regs[3] & 0xff, 0x14, "version register: integrated APIC");
    set.regs[0x8] = 0x30; // TPR
    set.regs[0xf] = 0x1ff; // SVR: enabled
    set.regs[0xd] = 0x0100_0000; // LDR
    set.regs[0x35] = 0x700; // LINT0: ExtINT, not masked
    set.regs[0x3e] = 0xb; // divide by 1
    set.regs[0x10 + 2] = 1 << 1; // ISR: vector 0x41
    set.regs[0x20 + 3] = 1 << 2; // IRR: vector 0x62
    m.vcpu.set(&set)?;
    let back: LocalApic = m.vcpu.get()?;
    for (i, name) in [
        (2, "ID"),
        (8, "TPR"),
        (0xd, "LDR"),
        (0xe, "DFR"),
        (0xf, "SVR"),
        (0x12, "ISR"),
        (0x23, "IRR"),
        (0x35, "LINT0"),
        (0x3e, "divide configuration"),
    ] {
        ensure_eq!(back.regs[i], set.regs[i], "{name} as read back");
    }
    ensure_eq!(m.vcpu.apic_access(0x80, None)?, 0x30, "TPR as the guest would read it");
    ensure_eq!(m.vcpu.get::<Control>()?.cr8, 3, "CR8, which is the TPR's upper half");
    // An APIC that is not in the kernel has no registers.
    let m = Machine::new(Mode::Long, &[0xf4])?;
    ensure_eq!(
        m.vcpu.get::<LocalApic>().err().and_then(|error| error.errno()),
        Some(Errno::EOPNOTSUPP),
        "the registers of an APIC that is not there"
    );
    ensure_eq!(m.vcpu.get::<Control>()?.cr4 & CR4_OSXSAVE, 0, "CR4.OSXSAVE");
    Ok(())
}
