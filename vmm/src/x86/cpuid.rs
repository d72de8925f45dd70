// SPDX-License-Identifier: MIT OR Apache-2.0
//! The guest's CPUID table: what the module offers, with APIC ids and topology of each vCPU filled in.
//!
//! Feature bits and the brand string stay as the module gives them: it knows what it can honour.

use axvcpu_uapi::x86::{CpuidEntry, CPUID_INDEX_SIGNIFICANT};

/// CPUID 1: hyper-threading technology, here "there is more than one logical processor".
const LEAF1_EDX_HTT: u32 = 1 << 28;
/// CPUID 1: x2APIC.
const LEAF1_ECX_X2APIC: u32 = 1 << 21;
/// CPUID 8000_0001: the cores are legacy siblings ("CmpLegacy").
const LEAF8_1_ECX_CMP_LEGACY: u32 = 1 << 1;

/// CPUID 0, EBX: the vendors whose leaves are AMD's, "AuthenticAMD" and "HygonGenuine".
const AMD_VENDORS: [u32; 2] = [u32::from_le_bytes(*b"Auth"), u32::from_le_bytes(*b"Hygo")];

/// The table for vCPU `id` of `count`.
#[must_use]
pub fn for_vcpu(supported: &[CpuidEntry], id: u32, count: u32) -> Vec<CpuidEntry> {
    let mut table: Vec<CpuidEntry> = supported.iter().copied().filter(|entry| !is_topology(entry.function)).collect();
    let has_x2apic = table.iter().any(|entry| entry.function == 1 && entry.ecx & LEAF1_ECX_X2APIC != 0);
    let is_amd = table.iter().any(|entry| entry.function == 0 && AMD_VENDORS.contains(&entry.ebx));
    let id_bits = count.next_power_of_two().trailing_zeros();
    for entry in &mut table {
        match entry.function {
            1 => {
                entry.ebx = (entry.ebx & 0xffff) | (id & 0xff) << 24 | count.min(0xff) << 16;
                set(&mut entry.edx, LEAF1_EDX_HTT, count > 1);
            }
            // Cache topology: EAX 25:14 logical processors that share the cache, 31:26 cores in the package, minus 1.
            4 if entry.eax & 0x1f != 0 => {
                let shared = if entry.eax >> 5 & 7 >= 3 { count - 1 } else { 0 };
                entry.eax = (entry.eax & 0x3fff) | (shared & 0xfff) << 14 | ((count - 1) & 0x3f) << 26;
            }
            0x8000_0001 if is_amd => set(&mut entry.ecx, LEAF8_1_ECX_CMP_LEGACY, count > 1),
            // ECX 7:0 cores minus 1, 15:12 bits of the APIC id that number them.
            0x8000_0008 if is_amd => entry.ecx = (entry.ecx & !0xf0ff) | ((count - 1) & 0xff) | (id_bits & 0xf) << 12,
            // AMD cache topology: EAX 25:14 logical processors that share the cache, minus 1.
            0x8000_001d if entry.eax & 0x1f != 0 => {
                let shared = if entry.eax >> 5 & 7 >= 3 { count - 1 } else { 0 };
                entry.eax = (entry.eax & 0x3fff) | (shared & 0xfff) << 14;
            }
            // AMD extended topology: APIC id; core id, one thread a core; node 0 of one.
            0x8000_001e => {
                entry.eax = id;
                entry.ebx = id & 0xff;
                entry.ecx = 0;
            }
            _ => {}
        }
    }
    // Extended topology (SDM volume 3A, section 10.9.1): a leaf without levels would be taken for one CPU of id 0, so it is
    // there if the guest may have x2APIC, and if the highest basic leaf reaches it.
    let reaches = table.iter().any(|entry| entry.function == 0 && entry.eax >= 0xb);
    if has_x2apic && reaches {
        let level = |index, shift, processors, kind: u32| CpuidEntry {
            function: 0xb,
            index,
            flags: CPUID_INDEX_SIGNIFICANT,
            eax: shift,
            ebx: processors,
            ecx: index | kind << 8,
            edx: id,
            ..CpuidEntry::default()
        };
        // Threads: one in each core. Cores: all of them in one package. Then the end.
        table.extend([level(0, 0, 1, 1), level(1, id_bits, count, 2), level(2, 0, 0, 0)]);
    }
    table
}

/// Leaves that are written anew: extended topology and its second version, which is left out.
fn is_topology(function: u32) -> bool {
    matches!(function, 0xb | 0x1f | 0x8000_0026)
}

fn set(register: &mut u32, bit: u32, on: bool) {
    *register = if on { *register | bit } else { *register & !bit };
}

/// What page-table walks depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Paging {
    /// Width of a physical address in bits.
    pub phys_bits: u8,
    /// Whether there are pages of 1 GiB.
    pub gib_pages: bool,
}

/// What the table tells of paging.
#[must_use]
pub fn paging_features(table: &[CpuidEntry]) -> Paging {
    let leaf = |function| table.iter().find(|entry| entry.function == function);
    let phys_bits = leaf(0x8000_0008).map_or(36, |entry| entry.eax as u8);
    let gib_pages = leaf(0x8000_0001).is_some_and(|entry| entry.edx & 1 << 26 != 0);
    Paging { phys_bits: phys_bits.clamp(32, 52), gib_pages }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn supported() -> Vec<CpuidEntry> {
        let leaf = |function, eax, ebx, ecx, edx| CpuidEntry { function, eax, ebx, ecx, edx, ..CpuidEntry::default() };
        vec![
            leaf(0, 0xd, AMD_VENDORS[0], 2, 3),
            leaf(1, 0x80_0f12, 0x55aa_0800, LEAF1_ECX_X2APIC | 1, LEAF1_EDX_HTT | 1),
            leaf(0xb, 9, 9, 9, 9),
            leaf(0x8000_0001, 0, 0, LEAF8_1_ECX_CMP_LEGACY, 1 << 26),
            leaf(0x8000_0002, u32::from_le_bytes(*b"bran"), 0, 0, 0),
            leaf(0x8000_0008, 0x3030, 0, 0x7_f003, 0),
            leaf(0x8000_001e, 77, 77, 77, 77),
        ]
    }

    fn find(table: &[CpuidEntry], function: u32, index: u32) -> CpuidEntry {
        let all: Vec<_> = table.iter().filter(|e| e.function == function && e.index == index).collect();
        assert_eq!(all.len(), 1, "leaf {function:#x}.{index}");
        *all[0]
    }

    #[test]
    fn one_cpu() {
        let table = for_vcpu(&supported(), 0, 1);
        assert_eq!(find(&table, 1, 0).ebx, 0x0001_0800);
        assert_eq!(find(&table, 1, 0).edx, 1);
        assert_eq!(find(&table, 0x8000_0001, 0).ecx, 0);
        assert_eq!(find(&table, 0x8000_0008, 0).ecx, 0x7_0000);
        assert_eq!(find(&table, 0x8000_0002, 0), supported()[4], "the brand string is untouched");
        let cores = find(&table, 0xb, 1);
        assert_eq!((cores.eax, cores.ebx, cores.ecx, cores.edx), (0, 1, 0x201, 0));
    }

    #[test]
    fn every_cpu_has_its_own_ids() {
        for id in 0..6 {
            let table = for_vcpu(&supported(), id, 6);
            assert_eq!(find(&table, 1, 0).ebx, id << 24 | 6 << 16 | 0x800);
            assert_ne!(find(&table, 1, 0).edx & LEAF1_EDX_HTT, 0);
            assert_eq!(find(&table, 0xb, 0).edx, id);
            let cores = find(&table, 0xb, 1);
            assert_eq!((cores.eax, cores.ebx), (3, 6));
            assert_eq!(find(&table, 0xb, 2).ecx, 2, "end of levels");
            assert_eq!(find(&table, 0x8000_0008, 0).ecx, 0x7_3005);
            let amd = find(&table, 0x8000_001e, 0);
            assert_eq!((amd.eax, amd.ebx, amd.ecx), (id, id, 0));
        }
    }

    #[test]
    fn bits_of_amd_are_not_for_others() {
        let mut supported = supported();
        supported[0].ebx = u32::from_le_bytes(*b"Genu");
        supported[3].ecx = 0;
        supported[5].ecx = 0;
        let table = for_vcpu(&supported, 1, 4);
        assert_eq!(find(&table, 0x8000_0001, 0).ecx, 0);
        assert_eq!(find(&table, 0x8000_0008, 0).ecx, 0);
        assert_eq!(find(&table, 0xb, 1).ebx, 4);
    }

    #[test]
    fn caches_of_intel_are_shared_by_all_from_the_third_level_on() {
        let cache = |index, eax| CpuidEntry { function: 4, index, eax, ..CpuidEntry::default() };
        let table = for_vcpu(&[cache(0, 0x7c00_4121), cache(3, 0xfc1f_c163), cache(4, 0)], 2, 4);
        assert_eq!(find(&table, 4, 0).eax, 3 << 26 | 0x121);
        assert_eq!(find(&table, 4, 3).eax, 3 << 26 | 3 << 14 | 0x163);
        assert_eq!(find(&table, 4, 4).eax, 0, "the end of the list");
    }

    #[test]
    fn no_topology_beyond_the_highest_leaf() {
        let mut supported = supported();
        supported[0].eax = 7;
        assert!(for_vcpu(&supported, 0, 1).iter().all(|entry| entry.function != 0xb));
    }

    #[test]
    fn features_of_paging() {
        assert_eq!(paging_features(&supported()), Paging { phys_bits: 48, gib_pages: true });
        assert_eq!(paging_features(&[]), Paging { phys_bits: 36, gib_pages: false });
    }
}
