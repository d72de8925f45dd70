// SPDX-License-Identifier: MIT OR Apache-2.0
//! Values that the architecture forbids: refused for the host, #GP for the guest, and nothing changed in either case.

use crate::flaws;
use crate::harness::{Case, CaseResult, Stop};
use crate::hypervisor::Set;
use crate::machine::{
    Machine, Mode, CODE, CR0_CD, CR0_ET, CR0_MP, CR0_NE, CR0_NW, CR0_PE, CR0_PG, CR0_WP, CR4_OSFXSR, CR4_OSXMMEXCPT,
    CR4_OSXSAVE, CR4_PAE, EFER_LMA, EFER_LME, EFER_NXE, EFER_SCE, STACK, TABLES,
};
use crate::{code, ensure_eq, table};
use axvcpu_uapi::client::Errno;
use axvcpu_uapi::x86::{Control, Debug, Events, General, Msr, Segments};

pub(super) fn cases() -> Vec<Case> {
    table! {
        "validity/general-from-the-host" => general [abi];
        "validity/control-from-the-host" => control [abi];
        "validity/debug-from-the-host" => debug [abi];
        "validity/segments-from-the-host" => segments [abi];
        "validity/msrs-from-the-host-all-or-none" => msrs [abi];
        "validity/xsave-from-the-host" => xsave [abi];
        "validity/events-from-the-host" => events [abi];
        "validity/cr0-from-the-guest" => guest_cr0;
        "validity/cr0-upper-half-from-the-guest" => guest_cr0_high;
        "validity/cr3-from-the-guest" => guest_cr3;
        "validity/cr4-from-the-guest" => guest_cr4 [differs];
        "validity/cr8-from-the-guest" => guest_cr8 [differs];
        "validity/efer-from-the-guest" => guest_efer;
        "validity/xcr0-from-the-guest" => guest_xcr0 [differs];
        "validity/debug-from-the-guest" => guest_debug;
    }
}

fn machine() -> Result<Machine, Stop> {
    Machine::new(Mode::Long, &[0xf4])
}

/// What is wrong with a set, and how to make it so.
type Bad<S> = (&'static str, fn(&mut S));

/// Writes a set changed by each of `changes`, all of which must be refused without effect.
fn refused<S: Set + PartialEq + std::fmt::Debug>(m: &mut Machine, changes: &[Bad<S>]) -> CaseResult {
    let before: S = m.vcpu.get()?;
    for (what, change) in changes {
        let mut set = before;
        change(&mut set);
        let errno = m.vcpu.set(&set).err().and_then(|error| error.errno());
        ensure_eq!(errno, Some(Errno::EINVAL), "{what}");
        ensure_eq!(m.vcpu.get::<S>()?, before, "the set after '{what}' was refused");
    }
    Ok(())
}

fn general() -> CaseResult {
    refused::<General>(
        &mut machine()?,
        &[
            ("RFLAGS bit 3", |set| set.rflags |= 1 << 3),
            ("RFLAGS bit 15", |set| set.rflags |= 1 << 15),
            ("RFLAGS bit 22", |set| set.rflags |= 1 << 22),
            ("RFLAGS bit 63", |set| set.rflags |= 1 << 63),
            ("RFLAGS.VM in long mode", |set| set.rflags |= 1 << 17),
        ],
    )
}

fn control() -> CaseResult {
    refused::<Control>(
        &mut machine()?,
        &[
            ("CR0.PG without CR0.PE", |set| set.cr0 &= !CR0_PE),
            ("CR0.NW without CR0.CD", |set| set.cr0 = set.cr0 & !CR0_CD | CR0_NW),
            ("CR0 bit 32", |set| set.cr0 |= 1 << 32),
            ("long mode without CR4.PAE", |set| set.cr4 &= !CR4_PAE),
            ("CR4 bit 15", |set| set.cr4 |= 1 << 15),
            ("CR4 bit 63", |set| set.cr4 |= 1 << 63),
            ("CR3 beyond the physical address", |set| set.cr3 |= 1 << 62),
            ("CR8 of 16", |set| set.cr8 = 16),
            ("EFER bit 1", |set| set.efer |= 1 << 1),
            ("EFER bit 63", |set| set.efer |= 1 << 63),
            ("EFER.LMA without EFER.LME", |set| set.efer &= !EFER_LME),
            ("EFER.LMA clear in long mode", |set| set.efer &= !EFER_LMA),
            ("EFER.LMA without paging", |set| set.cr0 &= !CR0_PG),
            ("XCR0 without x87", |set| set.xcr0 = 0),
            ("XCR0 with AVX but without SSE", |set| set.xcr0 = 5),
            ("XCR0 bit 63", |set| set.xcr0 |= 1 << 63),
            ("APIC base bit 0", |set| set.apic_base |= 1),
        ],
    )
}

fn debug() -> CaseResult {
    refused::<Debug>(
        &mut machine()?,
        &[("DR6 bit 32", |set| set.dr6 |= 1 << 32), ("DR7 bit 32", |set| set.dr7 |= 1 << 32)],
    )
}

fn segments() -> CaseResult {
    refused::<Segments>(
        &mut machine()?,
        &[
            ("attribute bit 12", |set| set.ds.attributes |= 1 << 12),
            ("FS base that is not canonical", |set| set.fs.base = 1 << 62),
            ("GS base that is not canonical", |set| set.gs.base = 1 << 62),
            ("TR base that is not canonical", |set| set.tr.base = 1 << 62),
            ("reserved field of GDTR", |set| set.gdtr.reserved[1] = 1),
            ("reserved field of IDTR", |set| set.idtr.reserved[2] = 1),
        ],
    )
}

fn msrs() -> CaseResult {
    const KERNEL_GS_BASE: u32 = 0xc000_0102;
    const PAT: u32 = 0x277;
    let mut m = machine()?;
    let msr = |index, value| Msr { index, value, reserved: 0 };
    m.vcpu.set_msrs(&[msr(KERNEL_GS_BASE, 0x1000)])?;
    let bad = [
        ("an MSR that nobody has", msr(0x1234_5678, 0)),
        ("an address that is not canonical", msr(0xc000_0082, 1 << 62)),
        ("the upper half of SYSCALL's flag mask", msr(0xc000_0084, 1 << 32)),
        ("a memory type that is none", msr(PAT, 2)),
        ("EFER bit 63", msr(0xc000_0080, 1 << 63)),
        ("a reserved field", Msr { reserved: 1, ..msr(PAT, 6) }),
    ];
    for (what, bad) in bad {
        let errno = m.vcpu.set_msrs(&[msr(KERNEL_GS_BASE, 0x2000), bad]).err().and_then(|error| error.errno());
        ensure_eq!(errno, Some(Errno::EINVAL), "{what}");
        ensure_eq!(m.vcpu.msrs(&[KERNEL_GS_BASE])?[0].value, 0x1000, "the MSR before {what}");
    }
    let errno = m.vcpu.msrs(&[0x1234_5678]).err().and_then(|error| error.errno());
    ensure_eq!(errno, Some(Errno::EINVAL), "reading an MSR that nobody has");
    Ok(())
}

fn xsave() -> CaseResult {
    let mut m = machine()?;
    let before = m.vcpu.xsave()?;
    let bad: [Bad<Vec<u8>>; 5] = [
        ("a component that does not exist", |area| area[512 + 7] |= 0x40),
        ("a reserved bit of the header", |area| area[512 + 24] |= 1),
        ("a reserved bit of MXCSR", |area| area[24 + 3] |= 0x80),
        ("an area that is too short", |area| area.truncate(512)),
        ("an area that is too long", |area| area.push(0)),
    ];
    for (what, change) in bad {
        let mut area = before.clone();
        area[512] |= 3;
        change(&mut area);
        let errno = m.vcpu.set_xsave(&area).err().and_then(|error| error.errno());
        ensure_eq!(errno, Some(Errno::EINVAL), "{what}");
        ensure_eq!(m.vcpu.xsave()?, before, "the state after {what} was refused");
    }
    Ok(())
}

fn events() -> CaseResult {
    refused::<Events>(
        &mut machine()?,
        &[
            ("an unknown flag", |set| set.flags |= 1 << 5),
            ("an unknown activity", |set| set.activity = 3),
            ("a vector of 256", |set| (set.flags, set.external_vector) = (1 << 3, 256)),
            ("a reserved field", |set| set.reserved[0] = 1),
            ("an event of no kind", |set| (set.flags, set.event.kind) = (1 << 4, 1)),
            ("an exception of vector 32", |set| {
                (set.flags, set.event.kind, set.event.vector) = (1 << 4, 3, 32);
            }),
        ],
    )
}

/// Runs guest code whose instructions fault as often as `faults` says. The #GP handler at CODE + 0x300 steps over the
/// instruction, whose length the code keeps in R15, and counts in R14. Registers are compared after it.
fn faults(code: &'static [u8], faults: u64) -> Result<Machine, Stop> {
    let mut m = machine()?;
    m.write(CODE, code)?;
    // add rsp, 8; add [rsp], r15; inc r14; iretq
    m.write(CODE + 0x300, code!(handler, 64, "add rsp, 8", "add [rsp], r15", "inc r14", "iretq"))?;
    m.vector(13, CODE + 0x300)?;
    let before = m.vcpu.get::<Control>()?;
    let debug: Debug = m.vcpu.get()?;
    m.expect_halt()?;
    ensure_eq!(m.vcpu.general().gpr[14], faults, "faults that the guest counted");
    ensure_eq!(m.vcpu.get::<Control>()?, before, "control registers after the faults");
    ensure_eq!(m.vcpu.get::<Debug>()?, debug, "debug registers after the faults");
    Ok(m)
}

/// Runs `instruction` with each of `values` in RAX, or in EDX:EAX; every one must fault.
fn all_fault(code: &'static [u8], values: &[(&str, u64)]) -> CaseResult {
    for (what, value) in values {
        let mut m = machine()?;
        m.write(CODE, code)?;
        m.write(CODE + 0x100, code!(says_so, 64, "out 0x82, al", "hlt"))?;
        m.vector(13, CODE + 0x100)?;
        m.modify(|general| (general.gpr[0], general.gpr[1], general.gpr[2]) = (*value, 0xc000_0080, value >> 32))?;
        let before = m.vcpu.get::<Control>()?;
        m.expect_mark(0x82).map_err(|stop| stop.context(what))?;
        ensure_eq!(m.read_u64(STACK - 40)?, CODE, "RIP of the fault after {what}");
        ensure_eq!(m.vcpu.get::<Control>()?, before, "control registers after {what}");
    }
    Ok(())
}

/// The values that control registers have in these tests.
const CR0: u64 = CR0_PG | CR0_WP | CR0_NE | CR0_ET | CR0_MP | CR0_PE;
const CR4: u64 = CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT;
const EFER: u64 = EFER_LME | EFER_LMA | EFER_NXE | EFER_SCE;

fn guest_cr0() -> CaseResult {
    let code = code!(to_cr0, 64, "mov cr0, rax", "out 0x80, al");
    all_fault(code, &[("CR0.PG without CR0.PE", CR0 & !CR0_PE), ("CR0.NW without CR0.CD", CR0 | CR0_NW)])
}

fn guest_cr0_high() -> CaseResult {
    flaws::CR0_HALF_CHECKED.skip()?;
    all_fault(code!(to_cr0_high, 64, "mov cr0, rax", "out 0x80, al"), &[("CR0 bit 32", CR0 | (1 << 32))])
}

fn guest_cr3() -> CaseResult {
    flaws::CR3_UNCHECKED.skip()?;
    all_fault(code!(to_cr3, 64, "mov cr3, rax", "out 0x80, al"), &[("CR3 bit 61", TABLES | (1 << 61))])
}

fn guest_cr4() -> CaseResult {
    all_fault(
        code!(to_cr4, 64, "mov cr4, rax", "out 0x80, al"),
        &[
            ("CR4 without PAE in long mode", CR4 & !CR4_PAE),
            ("CR4 bit 15", CR4 | (1 << 15)),
            ("CR4.VMXE", CR4 | (1 << 13)),
        ],
    )
}

fn guest_cr8() -> CaseResult {
    flaws::CR8_UNCHECKED.skip()?;
    all_fault(code!(to_cr8, 64, "mov cr8, rax", "out 0x80, al"), &[("CR8 of 16", 16), ("CR8 of 2^63", 1 << 63)])
}

fn guest_efer() -> CaseResult {
    all_fault(
        code!(to_efer, 64, "wrmsr", "out 0x80, al"),
        &[
            ("EFER bit 1", EFER | 2),
            ("EFER bit 63", EFER | (1 << 63)),
            ("EFER without LME while paging is on", EFER & !EFER_LME),
        ],
    )
}

fn guest_xcr0() -> CaseResult {
    let code = code!(
        guest_xcr0,
        64,
        "mov r15d, 3",
        "mov rax, cr4",
        "bts rax, 18",
        "mov cr4, rax",
        "xor ecx, ecx",
        "xor edx, edx",
        "mov eax, 7",
        "xsetbv", // x87, SSE, AVX: fine, if the CPU has AVX
        "xgetbv",
        "mov r13d, eax",
        "xor eax, eax",
        "xsetbv", // without x87
        "mov eax, 5",
        "xsetbv", // AVX without SSE
        "mov eax, 3",
        "mov edx, 0x80000000",
        "xsetbv", // a component that does not exist
        "xor edx, edx",
        "mov ecx, 1",
        "xsetbv", // another register
        "xor ecx, ecx",
        "mov eax, 1",
        "xsetbv", // back to the value of reset
        "mov rax, cr4",
        "btr rax, 18",
        "mov cr4, rax",
        "hlt",
    );
    let supported = machine()?.system.xcr0_supported()?;
    if supported == 0 {
        return Err(Stop::Skip("this CPU has no XSAVE".into()));
    }
    let avx = supported & 7 == 7;
    let m = faults(code, if avx { 4 } else { 5 })?;
    ensure_eq!(m.vcpu.general().gpr[13], if avx { 7 } else { 1 }, "XCR0 that the guest set");
    ensure_eq!(m.vcpu.get::<Control>()?.cr4 & CR4_OSXSAVE, 0, "CR4.OSXSAVE");
    Ok(())
}

fn guest_debug() -> CaseResult {
    let code = code!(
        guest_debug,
        64,
        "mov r15d, 3",
        "mov rax, dr7",
        "bts rax, 35",
        "mov dr7, rax",
        "mov rax, dr6",
        "bts rax, 35",
        "mov dr6, rax",
        "hlt",
    );
    faults(code, 2).map(drop)
}
