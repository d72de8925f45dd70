// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The CPUID policy on two made-up hosts that have every bit there is.

use std::collections::BTreeMap;
use std::vec::Vec;

use axvcpu_uapi::x86::{CpuidEntry, CPUID_INDEX_SIGNIFICANT};
use vcpu_core::{AxError, AxResult};

use super::*;
use crate::testing::TestHal;

type Table = CpuidTable<TestHal>;

const CAPS: Caps = Caps { xcr0: SUPPORTED_XCR0, phys_bits: 48, tsc_khz: 2_600_000, speculation_control: false };

fn leaf(eax: u32, ebx: u32, ecx: u32, edx: u32) -> CpuidResult {
    CpuidResult { eax, ebx, ecx, edx }
}

/// Size and offset of the XSAVE components: like AMD's Zen 4, but with an odd size before the aligned component 7.
fn component(index: u32) -> (u32, u32) {
    match index {
        2 => (256, 576),
        5 => (64, 832),
        6 => (520, 896),
        7 => (1024, 1472),
        9 => (8, 2496),
        _ => (0, 0),
    }
}

/// A host with every feature bit set.
fn rich(vendor: [u32; 3]) -> impl Fn(u32, u32) -> CpuidResult {
    move |function, index| match function {
        0 => leaf(0x24, vendor[0], vendor[2], vendor[1]),
        1 => leaf(0x00a1_0f11, 0x0710_0800, u32::MAX, u32::MAX),
        4 | 0x8000_001d if index < 4 => leaf(!0x1f | 1, 0x01c0_003f, 0x3f, 0),
        4 | 0x8000_001d => ZERO,
        7 if index == 0 => leaf(2, u32::MAX, u32::MAX, u32::MAX),
        0xd if index == 0 => leaf(0x6_02ff, 11008, 11008, 0),
        0xd if index == 1 => leaf(0x1f, 11008, 0x1900, 0),
        0xd => {
            let (size, offset) = component(index);
            leaf(size, offset, if index == 7 { 2 } else { 0 }, 0)
        }
        0x8000_0000 => leaf(0x8000_0028, vendor[0], vendor[2], vendor[1]),
        0x8000_0008 => leaf(0x0030_3934, u32::MAX, u32::MAX, u32::MAX),
        0..=0x24 | 0x8000_0001..=0x8000_0028 | 0x4000_0000..=0x4000_00ff => {
            leaf(u32::MAX, u32::MAX, u32::MAX, u32::MAX)
        }
        _ => ZERO,
    }
}

const AMD: [u32; 3] = [0x6874_7541, 0x6974_6e65, 0x444d_4163];
const INTEL: [u32; 3] = [0x756e_6547, 0x4965_6e69, 0x6c65_746e];

fn offered(host: HostCpuid<'_>, caps: &Caps) -> Vec<CpuidEntry> {
    let mut entries = Vec::new();
    supported(host, caps, &mut |entry| entries.push(entry));
    entries
}

fn find(entries: &[CpuidEntry], function: u32, index: u32) -> CpuidEntry {
    *entries.iter().find(|entry| (entry.function, entry.index) == (function, index)).unwrap()
}

fn load(entries: &[CpuidEntry], host: HostCpuid<'_>, caps: &Caps) -> AxResult<Table> {
    Table::load(entries.len(), |position| Ok(entries[position]), host, caps)
}

fn entry(function: u32, answer: [u32; 4]) -> CpuidEntry {
    let [eax, ebx, ecx, edx] = answer;
    CpuidEntry { function, eax, ebx, ecx, edx, ..CpuidEntry::default() }
}

fn indexed(function: u32, index: u32, answer: [u32; 4]) -> CpuidEntry {
    CpuidEntry { index, flags: CPUID_INDEX_SIGNIFICANT, ..entry(function, answer) }
}

const DYNAMIC: Dynamic = Dynamic { cr4: 0, xcr0: 1, apic_enabled: true, apic_id: 0 };

#[test]
fn what_is_offered_can_be_loaded() {
    for vendor in [AMD, INTEL] {
        let host = rich(vendor);
        for xcr0 in if cfg!(miri) { &[7][..] } else { &[1, 3, 7, 0x207, 0xe7, u64::MAX] }.iter().copied() {
            let caps = Caps { xcr0, speculation_control: xcr0 == 7, ..CAPS };
            let entries = offered(&host, &caps);
            let table = load(&entries, &host, &caps).map(|table| table.entries().collect::<Vec<_>>());
            assert_eq!(table, Ok(entries.clone()), "{xcr0:#x}");
            let unique: BTreeMap<_, _> = entries.iter().map(|entry| ((entry.function, entry.index), ())).collect();
            assert_eq!(unique.len(), entries.len(), "no question has two answers");
            assert!(entries.len() <= MAX_ENTRIES);
        }
    }
}

#[test]
fn dangerous_features_are_never_offered() {
    for vendor in [AMD, INTEL] {
        let host = rich(vendor);
        let entries = offered(&host, &Caps { speculation_control: true, ..CAPS });
        let leaf1 = find(&entries, 1, 0);
        for (bit, name) in [(2, "DTES64"), (3, "MONITOR"), (5, "VMX"), (6, "SMX"), (15, "PDCM"), (27, "OSXSAVE")] {
            assert_eq!((leaf1.ecx >> bit) & 1, 0, "{name}");
        }
        for (bit, name) in [(21, "DS"), (22, "ACPI"), (28, "HTT"), (29, "TM")] {
            assert_eq!((leaf1.edx >> bit) & 1, 0, "{name}");
        }
        let leaf7 = find(&entries, 7, 0);
        for (bit, name) in
            [(1, "TSC_ADJUST"), (2, "SGX"), (4, "HLE"), (11, "RTM"), (12, "RDT-M"), (14, "MPX"), (25, "PT")]
        {
            assert_eq!((leaf7.ebx >> bit) & 1, 0, "{name}");
        }
        for (bit, name) in [(4, "OSPKE"), (5, "WAITPKG"), (7, "CET_SS"), (23, "KL"), (29, "ENQCMD"), (31, "PKS")] {
            assert_eq!((leaf7.ecx >> bit) & 1, 0, "{name}");
        }
        for (bit, name) in
            [(20, "CET_IBT"), (22, "AMX-BF16"), (24, "AMX-TILE"), (28, "FLUSH_CMD"), (30, "CORE_CAPABILITIES")]
        {
            assert_eq!((leaf7.edx >> bit) & 1, 0, "{name}");
        }
        assert_eq!(find(&entries, 0xd, 1).eax, 0x7, "neither XSAVES nor XFD");
        assert_eq!((find(&entries, 0xd, 1).ecx, find(&entries, 0xd, 1).edx), (0, 0), "no XSS");
        assert_eq!(find(&entries, 0xd, 0).eax, 0x2e7);
        let leaf81 = find(&entries, 0x8000_0001, 0);
        for (bit, name) in
            [(2, "SVM"), (3, "EXTAPIC"), (10, "IBS"), (12, "SKINIT"), (15, "LWP"), (23, "PERFCTR"), (29, "MONITORX")]
        {
            assert_eq!((leaf81.ecx >> bit) & 1, 0, "{name}");
        }
        for absent in [
            5,
            0xa,
            0xf,
            0x10,
            0x12,
            0x14,
            0x17,
            0x19,
            0x1d,
            0x8000_000a,
            0x8000_001b,
            0x8000_001f,
            0x8000_0020,
            0x8000_0022,
        ] {
            assert!(entries.iter().all(|entry| entry.function != absent), "{absent:#x}");
        }
        assert_eq!(find(&entries, 6, 0).eax, 1 << 2);
    }
}

#[test]
fn each_vendor_has_its_own_leaves() {
    let (amd, intel) = (offered(&rich(AMD), &CAPS), offered(&rich(INTEL), &CAPS));
    let has = |entries: &[CpuidEntry], function| entries.iter().any(|entry| entry.function == function);
    for (function, on_amd, on_intel) in [
        (2, false, true),
        (4, false, true),
        (0x8000_001d, true, false),
        (0x8000_001e, true, false),
        (0x8000_0021, true, false),
    ] {
        assert_eq!((has(&amd, function), has(&intel, function)), (on_amd, on_intel), "{function:#x}");
    }
    assert_eq!(find(&amd, 0x8000_0000, 0).eax, 0x8000_0021);
    assert_eq!(find(&intel, 0x8000_0000, 0).eax, 0x8000_0008);
    assert_eq!((find(&amd, 0x8000_0001, 0).edx >> 9) & 1, 1, "AMD repeats leaf 1");
    assert_eq!(find(&intel, 0x8000_0001, 0).edx & 0x0183_f3ff, 0);
    assert_eq!(find(&intel, 4, 0).eax, 0x3fe1, "a cache shared by nobody else");
}

#[test]
fn linux_finds_a_kvm_clock_and_an_x2apic() {
    let entries = offered(&rich(AMD), &CAPS);
    let signature = find(&entries, 0x4000_0000, 0);
    let mut text = Vec::new();
    [signature.ebx, signature.ecx, signature.edx].iter().for_each(|word| text.extend(word.to_le_bytes()));
    assert_eq!(text, b"KVMKVMKVM\0\0\0");
    assert_eq!(signature.eax, 0x4000_0010);
    let features = find(&entries, 0x4000_0001, 0);
    assert_eq!(
        features.eax,
        (1 << 0) | (1 << 1) | (1 << 3) | (1 << 15) | (1 << 24),
        "and nothing else, PV EOI in particular"
    );
    assert_eq!((features.ebx, features.ecx, features.edx), (0, 0, 0));
    let timing = find(&entries, 0x4000_0010, 0);
    assert_eq!((timing.eax, timing.ebx), (2_600_000, 1_000_000));
    for bit in [21, 24, 31] {
        assert_eq!((find(&entries, 1, 0).ecx >> bit) & 1, 1);
    }
}

#[test]
fn a_poor_host_gives_little_but_what_is_emulated() {
    // A host whose last leaf is 1 and that has no extended state at all.
    let host = |function, _| match function {
        0 => leaf(1, AMD[0], AMD[2], AMD[1]),
        1 => leaf(0x600, 0, 1, 0x0781_abff),
        0x8000_0000 => leaf(0x8000_0001, AMD[0], AMD[2], AMD[1]),
        0x8000_0001 => leaf(0, 0, 0, 1 << 29),
        // What a real CPU gives beyond its last leaf is anything.
        _ => leaf(u32::MAX, u32::MAX, u32::MAX, u32::MAX),
    };
    let caps = Caps { xcr0: 0, ..CAPS };
    let entries = offered(&host, &caps);
    assert_eq!(find(&entries, 1, 0).ecx, 1 | (1 << 21) | (1 << 24) | (1 << 31));
    assert_eq!(find(&entries, 7, 0), CpuidEntry { flags: 1, ..entry(7, [0; 4]) });
    assert_eq!((find(&entries, 0xd, 0).eax, find(&entries, 0xd, 1).eax), (0, 0));
    assert_eq!(find(&entries, 0x8000_0008, 0).ebx, 0);
    assert_eq!(find(&entries, 0x8000_0001, 0).edx, (1 << 29) | (1 << 9));
}

#[test]
fn vector_instructions_need_their_state() {
    let host = rich(AMD);
    let bits = |xcr0, feature: fn(&[CpuidEntry]) -> u32| feature(&offered(&host, &Caps { xcr0, ..CAPS }));
    let avx = |entries: &[CpuidEntry]| (find(entries, 1, 0).ecx >> 28) & 1;
    let avx2 = |entries: &[CpuidEntry]| (find(entries, 7, 0).ebx >> 5) & 1;
    let avx512f = |entries: &[CpuidEntry]| (find(entries, 7, 0).ebx >> 16) & 1;
    let pku = |entries: &[CpuidEntry]| (find(entries, 7, 0).ecx >> 3) & 1;
    assert_eq!((bits(3, avx), bits(5, avx), bits(7, avx)), (0, 0, 1));
    assert_eq!((bits(3, avx2), bits(7, avx2)), (0, 1));
    assert_eq!((bits(7, avx512f), bits(0x67, avx512f), bits(0xe3, avx512f), bits(0xe7, avx512f)), (0, 0, 0, 1));
    assert_eq!((bits(7, pku), bits(0x207, pku)), (0, 1));
}

#[test]
fn speculation_control_is_offered_only_if_switched() {
    let host = rich(AMD);
    for (speculation_control, expected) in [(false, 0), (true, 1)] {
        let entries = offered(&host, &Caps { speculation_control, ..CAPS });
        for bit in [26, 27, 31] {
            assert_eq!((find(&entries, 7, 0).edx >> bit) & 1, expected);
        }
        for bit in [12, 14, 15, 24] {
            assert_eq!((find(&entries, 0x8000_0008, 0).ebx >> bit) & 1, expected);
        }
    }
}

/// Loads one entry together with those it depends on.
fn verdict(entry: CpuidEntry, caps: &Caps) -> AxResult<usize> {
    load(&[entry], &rich(AMD), caps).map(|table| table.len())
}

#[test]
fn what_hardware_cannot_honour_is_refused() {
    let refused = Err(AxError::InvalidInput);
    for bad in [
        entry(1, [0, 0, 1 << 5, 0]),
        entry(1, [0, 0, 1 << 3, 0]),
        entry(1, [0, 0, 0, 1 << 21]),
        indexed(7, 0, [0, 1 << 14, 0, 0]),
        indexed(7, 0, [2, 0, 0, 0]),
        indexed(7, 2, [1, 0, 0, 0]),
        indexed(0xd, 0, [1 << 3, 0, 0, 0]),
        indexed(0xd, 0, [0x5, 0, 0, 0]),
        indexed(0xd, 0, [0x27, 0, 0, 0]),
        indexed(0xd, 0, [0x6, 0, 0, 0]),
        indexed(0xd, 1, [1 << 3, 0, 0, 0]),
        indexed(0xd, 2, [256, 512, 0, 0]),
        indexed(0xd, 2, [0, 576, 0, 0]),
        indexed(0xd, 11, [16, 0, 1, 0]),
        entry(0xd, [7, 0, 0, 0]),
        entry(0xa, [1, 0, 0, 0]),
        entry(0x8000_0001, [0, 0, 1 << 2, 0]),
        entry(0x8000_0008, [0x3031, 0, 0, 0]),
        entry(0x8000_0008, [0x3430, 0, 0, 0]),
        entry(0x8000_0008, [0x301f, 0, 0, 0]),
        entry(0x8000_000a, [1, 0, 0, 0]),
        entry(0x8000_0007, [0, 0, 0, 1 << 7]),
    ] {
        assert_eq!(verdict(bad, &CAPS), refused, "{bad:x?}");
    }
    let no_pku = Caps { xcr0: 7, ..CAPS };
    assert_eq!(verdict(indexed(7, 0, [0, 0, 1 << 3, 0]), &no_pku), refused);
    assert_eq!(verdict(indexed(7, 0, [0, 0, 1 << 3, 0]), &CAPS), Ok(1));
}

#[test]
fn a_vmm_may_choose_what_costs_nothing() {
    for good in [
        entry(0, [0x10, 1, 2, 3]),
        entry(1, [0x12345, 0x0408_0800, 1, 1 << 28]),
        entry(0xa, [0; 4]),
        indexed(0xb, 0, [1, 2, 0x100, 7]),
        indexed(0xb, 1, [4, 16, 0x201, 7]),
        indexed(0xd, 0, [7, 0, 0, 0]),
        indexed(0xd, 2, [256, 576, 0, 0]),
        indexed(0xd, 9, [0; 4]),
        entry(0x4000_0000, [0x4000_0001, 1, 2, 3]),
        entry(0x4000_0100, [u32::MAX; 4]),
        entry(0x8000_0002, [1, 2, 3, 4]),
        entry(0x8000_0008, [0x3028, 0, 0x3003, 0]),
        entry(0x8000_0008, [0x3930, 0, 0, 0]),
        entry(0x8000_001e, [0, 0x0100, 0, 0]),
    ] {
        assert_eq!(verdict(good, &CAPS), Ok(1), "{good:x?}");
    }
}

#[test]
fn malformed_tables_are_refused() {
    let invalid = Some(AxError::InvalidInput);
    let host = rich(AMD);
    let error = |entries: &[CpuidEntry]| load(entries, &host, &CAPS).err();
    assert_eq!(error(&[CpuidEntry { reserved: 1, ..entry(0, [0; 4]) }]), invalid);
    assert_eq!(error(&[CpuidEntry { flags: 2, ..entry(0, [0; 4]) }]), invalid);
    assert_eq!(error(&[CpuidEntry { index: 1, ..entry(0, [0; 4]) }]), invalid);
    assert_eq!(error(&[entry(1, [0; 4]), entry(1, [0; 4])]), invalid);
    assert_eq!(error(&[indexed(7, 0, [0; 4]), indexed(7, 0, [0; 4])]), invalid);
    assert_eq!(error(&[indexed(7, 0, [0; 4]), entry(7, [0; 4])]), invalid, "in either order");
    assert_eq!(error(&[entry(7, [0; 4]), indexed(7, 1, [0; 4])]), invalid);
    assert_eq!(error(&[indexed(7, 0, [0; 4]), indexed(7, 1, [0; 4])]), None);
    let mut many: Vec<_> = (0..MAX_ENTRIES as u32).map(|index| entry(0x4000_0000 + index, [1; 4])).collect();
    assert_eq!(load(&many, &host, &CAPS).map(|table| table.len()), Ok(MAX_ENTRIES));
    many.push(entry(0, [0; 4]));
    assert_eq!(error(&many), Some(AxError::LimitReached));
    assert_eq!(Table::load(1, |_| Err(AxError::NotMapped), &host, &CAPS).err(), Some(AxError::NotMapped));
    assert!(load(&[], &host, &CAPS).unwrap().is_empty());
}

#[test]
fn answers_follow_the_registers() {
    let host = rich(AMD);
    let table = load(&offered(&host, &CAPS), &host, &CAPS).unwrap();
    let ask = |function, index, dynamic: Dynamic| table.lookup(function, index, &dynamic);
    assert_eq!((ask(1, 0, DYNAMIC).ecx >> 27) & 1, 0);
    assert_eq!((ask(1, 0, Dynamic { cr4: 1 << 18, ..DYNAMIC }).ecx >> 27) & 1, 1);
    assert_eq!((ask(7, 0, DYNAMIC).ecx >> 4) & 1, 0);
    assert_eq!((ask(7, 0, Dynamic { cr4: 1 << 22, ..DYNAMIC }).ecx >> 4) & 1, 1);
    assert_eq!(((ask(1, 0, DYNAMIC).edx >> 9) & 1, (ask(0x8000_0001, 0, DYNAMIC).edx >> 9) & 1), (1, 1));
    let off = Dynamic { apic_enabled: false, ..DYNAMIC };
    assert_eq!(((ask(1, 0, off).edx >> 9) & 1, (ask(0x8000_0001, 0, off).edx >> 9) & 1), (0, 0));
    let id = Dynamic { apic_id: 0x123, ..DYNAMIC };
    assert_eq!(ask(1, 0, id).ebx >> 24, 0x23);
    assert_eq!((ask(1, 0, id).ebx >> 16) & 0xff, 1, "the rest of EBX stays");
    assert_eq!((ask(0xb, 0, id).edx, ask(0xb, 0, id).ecx), (0x123, 0x100));
    assert_eq!((ask(0xb, 1, id).edx, ask(0xb, 1, id).ecx), (0x123, 0x201));
    assert_eq!((ask(0xb, 5, id).edx, ask(0xb, 5, id).ecx, ask(0xb, 5, id).ebx), (0x123, 5, 0));
    assert_eq!(ask(0x8000_001e, 0, id).eax, 0x123);
}

#[test]
fn xsave_sizes_follow_xcr0() {
    let host = rich(AMD);
    let table = load(&offered(&host, &CAPS), &host, &CAPS).unwrap();
    for (xcr0, standard, compacted) in [
        (1, 576, 576),
        (3, 576, 576),
        (7, 832, 832),
        // Component 7 is aligned to 64 bytes: 1416 becomes 1472. Component 9 follows at once.
        (0xe7, 2496, 576 + 256 + 64 + 520 + 56 + 1024),
        (0x2e7, 2504, 576 + 256 + 64 + 520 + 56 + 1024 + 8),
        // Alone, PKRU keeps its place in the standard format and moves up in the compacted one.
        (0x203, 2504, 584),
    ] {
        let dynamic = Dynamic { xcr0, ..DYNAMIC };
        assert_eq!(table.lookup(0xd, 0, &dynamic).ebx, standard, "{xcr0:#x}");
        assert_eq!(table.lookup(0xd, 0, &dynamic).ecx, 2504);
        assert_eq!(table.lookup(0xd, 1, &dynamic).ebx, compacted, "{xcr0:#x}");
    }
    let without = indexed(0xd, 1, [0; 4]);
    let table = load(&[entry(0, [0xd, 0, 0, 0]), without], &host, &CAPS).unwrap();
    assert_eq!(table.lookup(0xd, 1, &DYNAMIC).ebx, 0, "no XSAVEC");
}

#[test]
fn leaves_out_of_range_answer_as_the_vendor_does() {
    for (vendor, beyond) in [(AMD, 0), (INTEL, 1 << 2)] {
        let host = rich(vendor);
        let entries = [
            // The last basic leaf is 6; there is an entry behind it, which no guest may see.
            entry(0, [6, vendor[0], vendor[2], vendor[1]]),
            entry(6, [1 << 2, 0, 0, 0]),
            indexed(7, 0, [1, 1, 0, 0]),
            entry(0x4000_0000, [0x4000_0001, 0, 0, 0]),
            entry(0x4000_0001, [9, 0, 0, 0]),
            entry(0x4000_0002, [8, 0, 0, 0]),
            entry(0x8000_0000, [0x8000_0002, 0, 0, 0]),
            entry(0x8000_0003, [7, 0, 0, 0]),
        ];
        let table = load(&entries, &host, &CAPS).unwrap();
        let eax = |function| table.lookup(function, 0, &DYNAMIC).eax;
        assert_eq!((eax(6), eax(0x4000_0001), eax(0x8000_0000)), (4, 9, 0x8000_0002));
        assert_eq!((eax(5), eax(0x8000_0001)), (0, 0), "in range without an entry");
        for function in [7, 0x3fff_ffff, 0x4000_0002, 0x4000_0100, 0x6000_0000, 0x8000_0003, 0xc000_0000, u32::MAX] {
            assert_eq!(eax(function), beyond, "{function:#x}");
        }
    }
}

#[test]
fn no_answer_comes_from_the_host_behind_the_tables_back() {
    let host = rich(AMD);
    let table = load(&[], &host, &CAPS).unwrap();
    for function in [0, 1, 7, 0xb, 0xd, 0x4000_0000, 0x8000_0000, 0x8000_0001, 0x8000_001e, u32::MAX] {
        let answer = table.lookup(function, 0, &DYNAMIC);
        assert_eq!((answer.eax, answer.ecx, answer.edx), (0, 0, 0), "{function:#x}");
    }
}

#[test]
fn register_masks_follow_the_features() {
    let host = rich(AMD);
    let table = load(&offered(&host, &CAPS), &host, &CAPS).unwrap();
    assert_eq!(table.cr4_bits(), 0x0077_1fff);
    assert_eq!(table.efer_bits(), 0xd01);
    assert_eq!((table.xcr0(), table.phys_bits()), (0x2e7, 48));
    assert!(table.has(Feature::X2APIC) && table.has(Feature::RDTSCP) && !table.has(Feature::AMD_SSBD));
    let bare = load(&[], &host, &CAPS).unwrap();
    assert_eq!((bare.cr4_bits(), bare.efer_bits(), bare.xcr0(), bare.phys_bits()), (1 << 8, 0, 0, 36));
}
