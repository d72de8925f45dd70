// SPDX-License-Identifier: MIT OR Apache-2.0
//! CPUID answers from the table that the program gave.

use crate::harness::{Case, CaseResult, Stop};
use crate::machine::{open, Machine, Mode};
use crate::{code, ensure, ensure_eq, table};
use axvcpu_uapi::client::{Apic, Errno, Error};
use axvcpu_uapi::x86::{CpuidEntry, CPUID_INDEX_SIGNIFICANT};

pub(super) fn cases() -> Vec<Case> {
    table! {
        "cpuid/every-supported-leaf" => every_leaf;
        "cpuid/leaves-that-are-not-in-the-table-are-zero" => absent;
        "cpuid/own-leaves-and-indices" => own;
        "cpuid/osxsave-follows-cr4" => osxsave;
        "cpuid/features-the-cpu-lacks-are-refused" => refused [abi];
        "cpuid/virtualization-is-not-offered" => nothing_nested [differs];
    }
}

/// Reads leaf and index from port 0x10, answers on port 0x11, for ever.
fn server() -> &'static [u8] {
    code!(
        server,
        64,
        "2: in eax, 0x10",
        "mov esi, eax",
        "in eax, 0x10",
        "mov ecx, eax",
        "mov eax, esi",
        "cpuid",
        "out 0x11, eax",
        "mov eax, ebx",
        "out 0x11, eax",
        "mov eax, ecx",
        "out 0x11, eax",
        "mov eax, edx",
        "out 0x11, eax",
        "jmp 2b",
    )
}

/// EAX, EBX, ECX and EDX that the guest gets.
fn ask(m: &mut Machine, function: u32, index: u32) -> Result<[u32; 4], Stop> {
    m.feed_word(0x10, function)?;
    m.feed_word(0x10, index)?;
    let mut answer = [0; 4];
    for word in &mut answer {
        *word = m.expect_word(0x11)? as u32;
    }
    Ok(answer)
}

/// The bits of a leaf that are the table's; the others depend on the CPU's state or number.
fn fixed(function: u32, index: u32) -> [u32; 4] {
    match (function, index) {
        (1, _) => [!0, 0x00ff_ffff, !(1 << 27), !(1 << 9)],
        (7, 0) => [!0, !0, !(1 << 4), !0],
        (0xb | 0x1f, _) => [!0, !0, !0, 0],
        (0xd, 0 | 1) => [!0, 0, !0, !0],
        (0x8000_0001, _) => [!0, !0, !0, !(1 << 9)],
        (0x8000_001e, _) => [0, !0xff, !0, !0],
        _ => [!0; 4],
    }
}

fn every_leaf() -> CaseResult {
    let mut m = Machine::new(Mode::Long, server())?;
    let table = m.system.supported_cpuid()?;
    ensure!(table.iter().any(|entry| entry.function == 1), "leaf 1 is not among {} supported entries", table.len());
    for entry in table {
        let found = ask(&mut m, entry.function, entry.index)?;
        let mask = fixed(entry.function, entry.index);
        for (i, word) in [entry.eax, entry.ebx, entry.ecx, entry.edx].into_iter().enumerate() {
            ensure_eq!(
                found[i] & mask[i],
                word & mask[i],
                "word {i} of leaf {:#x} index {:#x}",
                entry.function,
                entry.index
            );
        }
    }
    Ok(())
}

fn absent() -> CaseResult {
    let system = open()?;
    // Long mode needs its feature bit, and leaves beyond the highest that 0 and 80000000 name are not there.
    let kept = [0, 1, 0x8000_0000, 0x8000_0001];
    let table: Vec<_> = system.supported_cpuid()?.into_iter().filter(|entry| kept.contains(&entry.function)).collect();
    let mut m = Machine::build(system, Mode::Long, server(), Apic::None, &table)?;
    ensure!(ask(&mut m, 1, 0)?[3] & 1 == 1, "leaf 1 without an FPU");
    for function in [7, 0xd, 0x4000_0000, 0x7fff_ffff, 0x8000_0002, 0x8000_0008, u32::MAX] {
        ensure_eq!(ask(&mut m, function, 0)?, [0; 4], "leaf {function:#x}");
    }
    Ok(())
}

/// Leaves that describe the program's machine are the program's; the index counts where the entry says so.
fn own() -> CaseResult {
    let system = open()?;
    let mut table: Vec<_> = system.supported_cpuid()?.into_iter().filter(|entry| entry.function >> 28 != 4).collect();
    let base = CpuidEntry { function: 0x4000_0000, ..CpuidEntry::default() };
    let words = u32::from_le_bytes(*b"test");
    table.push(CpuidEntry { eax: 0x4000_0010, ebx: words, ecx: 2, edx: 3, ..base });
    let indexed = CpuidEntry { function: 0x4000_0010, flags: CPUID_INDEX_SIGNIFICANT, ..base };
    table.push(CpuidEntry { index: 1, eax: 0x11, ..indexed });
    table.push(CpuidEntry { index: 5, eax: 0x55, ..indexed });
    let mut m = Machine::build(system, Mode::Long, server(), Apic::None, &table)?;
    for index in [0, 7] {
        ensure_eq!(
            ask(&mut m, 0x4000_0000, index)?,
            [0x4000_0010, words, 2, 3],
            "leaf without index, asked for {index}"
        );
    }
    for (index, eax) in [(0, 0), (1, 0x11), (2, 0), (5, 0x55)] {
        ensure_eq!(ask(&mut m, 0x4000_0010, index)?, [eax, 0, 0, 0], "index {index}");
    }
    Ok(())
}

fn osxsave() -> CaseResult {
    let code = code!(
        osxsave,
        64,
        "mov eax, 1",
        "cpuid",
        "mov r8d, ecx",
        "mov rax, cr4",
        "bts rax, 18",
        "mov cr4, rax",
        "mov eax, 1",
        "cpuid",
        "mov r9d, ecx",
        "hlt",
    );
    let mut m = Machine::new(Mode::Long, code)?;
    if m.system.xcr0_supported()? == 0 {
        return Err(Stop::Skip("this CPU has no XSAVE".into()));
    }
    m.expect_halt()?;
    let gpr = m.vcpu.general().gpr;
    ensure_eq!((gpr[8] >> 27) & 1, 0, "OSXSAVE before CR4.OSXSAVE is set");
    ensure_eq!((gpr[9] >> 27) & 1, 1, "OSXSAVE after CR4.OSXSAVE is set");
    Ok(())
}

/// A feature that needs hardware cannot be promised where `SUPPORTED_CPUID` does not have it.
fn refused() -> CaseResult {
    let system = open()?;
    let supported = system.supported_cpuid()?;
    let vm = system.create_vm()?;
    for (id, (what, function, change)) in (0..).zip([
        ("leaf 1 ECX", 1, (|entry| entry.ecx = !0) as fn(&mut CpuidEntry)),
        ("leaf 7 EBX", 7, |entry| entry.ebx = !0),
        ("leaf 80000001 ECX", 0x8000_0001, |entry| entry.ecx = !0),
    ]) {
        let mut table = supported.clone();
        let Some(entry) = table.iter_mut().find(|entry| entry.function == function && entry.index == 0) else {
            continue;
        };
        change(entry);
        let mut vcpu = vm.create_vcpu(id)?;
        let space = vm.create_address_space()?;
        vcpu.set_entry(axvcpu_uapi::addr::GuestPhysAddr::new(0))?;
        vcpu.set_ept_root(&space)?;
        ensure_eq!(vcpu.setup(Apic::None, &table), Err(Error::Setup(Errno::EINVAL)), "{what} with every bit");
        // The refusal has left the vCPU as it was.
        vcpu.setup(Apic::None, &supported)?;
    }
    Ok(())
}

fn nothing_nested() -> CaseResult {
    for entry in open()?.supported_cpuid()? {
        match entry.function {
            1 => ensure_eq!((entry.ecx >> 5) & 1, 0, "VMX"),
            0x8000_0001 => ensure_eq!((entry.ecx >> 2) & 1, 0, "SVM"),
            0x8000_000a => ensure_eq!([entry.eax, entry.ebx, entry.ecx, entry.edx], [0; 4], "leaf 8000000a"),
            _ => {}
        }
    }
    Ok(())
}
