// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where everything lies in the guest: physical addresses of memory, boot data and devices, and I/O ports.
//!
//! | address | what |
//! |---|---|
//! | `0x7_0000` | command lines, up to `0x8_0000` |
//! | `0x8_8000` | stack of a plain 64-bit kernel, downwards from `0x8_c000` |
//! | `0x8_c000` | PVH start information or multiboot information |
//! | `0x8_d000` | Linux boot parameters ("zero page") |
//! | `0x8_e000` | GDT for entry in protected or long mode |
//! | `0x9_0000` | page tables that map the first 4 GiB one to one, six pages |
//! | `0x9_fc00` | end of low memory: extended BIOS data area |
//! | `0xe_0000` | ACPI tables, up to `0x10_0000` |
//! | `0xf_fff0` | real-mode reset vector: code that resets the machine |
//! | `0x10_0000` | kernels; raw binaries and kernels may also use what is free below `0x7_0000` |
//! | `0xc000_0000` | where memory gives way to devices if axvmm chooses the layout |
//! | `0xfec0_0000` | I/O APIC |
//! | `0xfee0_0000` | local APIC |
//! | `0xfeff_c000` | four pages that KVM wants for itself |

use std::ops::Range;

use crate::config::MemoryRegion;

/// Command lines.
pub const CMDLINES: Range<u64> = 0x7_0000..0x8_0000;
/// The stack that a plain 64-bit kernel is given.
pub const STACK: Range<u64> = 0x8_8000..0x8_c000;
/// PVH or multiboot information, one page.
pub const BOOT_INFO: u64 = 0x8_c000;
/// Linux boot parameters, one page.
pub const ZERO_PAGE: u64 = 0x8_d000;
/// The GDT at entry, one page.
pub const GDT: u64 = 0x8_e000;
/// Page tables for entry in long mode: PML4, PDPT, four page directories.
pub const PAGE_TABLES: u64 = 0x9_0000;
/// End of usable low memory.
pub const EBDA: u64 = 0x9_fc00;
/// End of conventional memory.
pub const LOW_END: u64 = 0xa_0000;
/// ACPI tables.
pub const ACPI: Range<u64> = 0xe_0000..0x10_0000;
/// Where real-mode code jumps to reset a PC: the entry point of its firmware. Inside of [`ACPI`], far behind the tables.
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// Start of extended memory, where kernels are loaded.
pub const HIGH_START: u64 = 0x10_0000;
/// Where guest memory begins.
pub const RAM_START: u64 = 0;
/// The last address at which a raw binary can start: one outside long mode has to, below 4 GiB.
pub const LAST_ENTRY: u64 = u32::MAX as u64;
/// The smallest guest memory.
pub const MIN_MEMORY: u64 = 2 << 20;

/// Where memory stops below 4 GiB if axvmm chooses the layout.
const LOW_MEMORY_END: u64 = 0xc000_0000;
/// Where it goes on.
const HIGH_MEMORY_START: u64 = 1 << 32;

/// The addresses that devices may occupy: no memory can be there.
pub const DEVICE_HOLE: Range<u64> = 0xfe00_0000..0x1_0000_0000;
/// The I/O APIC's registers.
pub const IOAPIC: Range<u64> = 0xfec0_0000..0xfec0_1000;
/// The local APIC's registers.
pub const LOCAL_APIC: Range<u64> = 0xfee0_0000..0xfee0_1000;

/// A page that KVM keeps identity-mapped page tables in.
pub const KVM_IDENTITY_MAP: u64 = 0xfeff_c000;
/// Three pages in which KVM keeps a task state segment.
pub const KVM_TSS: u64 = KVM_IDENTITY_MAP + 0x1000;

/// I/O ports of the machine.
pub mod port {
    use std::ops::RangeInclusive;

    /// First 8259 interrupt controller.
    pub const PIC1: RangeInclusive<u16> = 0x20..=0x21;
    /// 8254 timer.
    pub const PIT: RangeInclusive<u16> = 0x40..=0x43;
    /// Keyboard controller.
    pub const KEYBOARD: [u16; 2] = [0x60, 0x64];
    /// System control port B: gate and output of timer channel 2.
    pub const SYSTEM_B: u16 = 0x61;
    /// CMOS RAM and clock.
    pub const CMOS: RangeInclusive<u16> = 0x70..=0x71;
    /// System control port A: A20 gate, fast reset.
    pub const SYSTEM_A: u16 = 0x92;
    /// Second 8259 interrupt controller.
    pub const PIC2: RangeInclusive<u16> = 0xa0..=0xa1;
    /// COM1.
    pub const COM1: RangeInclusive<u16> = 0x3f8..=0x3ff;
    /// Edge/level control of the 8259s.
    pub const ELCR: RangeInclusive<u16> = 0x4d0..=0x4d1;
    /// ACPI sleep control and sleep status registers.
    pub const ACPI_SLEEP: RangeInclusive<u16> = 0x600..=0x601;
    /// PCI configuration address and data, with the reset control register at 0xcf9.
    pub const PCI: RangeInclusive<u16> = 0xcf8..=0xcff;
    /// Reset control register.
    pub const RESET: u16 = 0xcf9;
}

/// The name of the device that owns any of the `count` ports from `first`, if there is one.
#[must_use]
pub fn port_owner(first: u16, count: u16) -> Option<&'static str> {
    let last = first.saturating_add(count - 1);
    let owners = [
        (port::PIC1, "the interrupt controller"),
        (port::PIT, "the timer"),
        (0x60..=0x64, "the keyboard controller and the timer"),
        (port::CMOS, "the clock"),
        (port::SYSTEM_A..=port::SYSTEM_A, "system control"),
        (port::PIC2, "the interrupt controller"),
        (port::COM1, "COM1"),
        (port::ELCR, "the interrupt controller"),
        (port::ACPI_SLEEP, "ACPI"),
        (port::PCI, "PCI and reset control"),
    ];
    owners.into_iter().find(|(range, _)| first <= *range.end() && last >= *range.start()).map(|(_, name)| name)
}

/// Memory of `size` bytes laid out as in a PC: from 0 up, with a gap for devices below 4 GiB.
#[must_use]
pub fn default_regions(size: u64) -> Vec<MemoryRegion> {
    if size <= LOW_MEMORY_END {
        return vec![MemoryRegion { base: 0, size }];
    }
    vec![
        MemoryRegion { base: 0, size: LOW_MEMORY_END },
        MemoryRegion { base: HIGH_MEMORY_START, size: size - LOW_MEMORY_END },
    ]
}

/// What a range of the memory map is; the numbers are those of the E820 interface (ACPI 6.5, table 15.6), used alike by
/// Linux, PVH and multiboot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum MapKind {
    /// Usable memory.
    Ram = 1,
    /// Not to be used.
    Reserved = 2,
    /// ACPI tables: memory once they have been read.
    Acpi = 3,
}

/// An entry of the memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapEntry {
    /// First address.
    pub base: u64,
    /// Size in bytes.
    pub size: u64,
    /// What it is.
    pub kind: MapKind,
}

/// The memory map that the guest is told: RAM with the holes of a PC below 1 MiB, and the device registers.
///
/// `memory` begins with a region at 0 of at least [`MIN_MEMORY`], as [`crate::config`] makes sure.
#[must_use]
pub fn memory_map(memory: &[MemoryRegion]) -> Vec<MapEntry> {
    let entry = |range: Range<u64>, kind| MapEntry { base: range.start, size: range.end - range.start, kind };
    let mut map =
        vec![entry(0..EBDA, MapKind::Ram), entry(EBDA..LOW_END, MapKind::Reserved), entry(ACPI, MapKind::Acpi)];
    let mut devices = vec![entry(IOAPIC, MapKind::Reserved), entry(LOCAL_APIC, MapKind::Reserved)];
    for region in memory {
        if region.base > DEVICE_HOLE.start {
            map.append(&mut devices);
        }
        map.push(entry(region.base.max(HIGH_START)..region.end(), MapKind::Ram));
    }
    map.append(&mut devices);
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_goes_around_the_devices() {
        assert_eq!(default_regions(512 << 20), [MemoryRegion { base: 0, size: 512 << 20 }]);
        assert_eq!(
            default_regions(4 << 30),
            [MemoryRegion { base: 0, size: 3 << 30 }, MemoryRegion { base: 4 << 30, size: 1 << 30 }]
        );
    }

    #[test]
    fn map_is_ascending_and_tells_all_memory_above_1_mib() {
        for size in [MIN_MEMORY, 128 << 20, 3 << 30, 5 << 30] {
            let map = memory_map(&default_regions(size));
            for pair in map.windows(2) {
                assert!(pair[0].base + pair[0].size <= pair[1].base, "{pair:?}");
            }
            let ram: u64 = map.iter().filter(|e| e.kind == MapKind::Ram && e.base != 0).map(|e| e.size).sum();
            assert_eq!(ram, size - HIGH_START);
            assert!(map.iter().all(|e| e.size > 0));
        }
    }

    #[test]
    fn boot_data_does_not_overlap() {
        let pieces = [
            CMDLINES,
            STACK,
            BOOT_INFO..BOOT_INFO + 0x1000,
            ZERO_PAGE..ZERO_PAGE + 0x1000,
            GDT..GDT + 0x1000,
            PAGE_TABLES..PAGE_TABLES + 6 * 0x1000,
            EBDA..LOW_END,
            ACPI,
            HIGH_START..MIN_MEMORY,
        ];
        for pair in pieces.windows(2) {
            assert!(pair[0].end <= pair[1].start, "{pair:x?}");
        }
    }

    #[test]
    fn ports_know_their_owner() {
        assert_eq!(port_owner(0xf4, 4), None);
        assert_eq!(port_owner(0xe9, 1), None);
        assert_eq!(port_owner(0x3f6, 4), Some("COM1"));
        assert_eq!(port_owner(0x3ff, 1), Some("COM1"));
        assert_eq!(port_owner(0xffff, 4), None);
    }
}
