// SPDX-License-Identifier: MIT OR Apache-2.0
//! The PVH boot protocol (Xen `docs/misc/pvh.pandoc`, `xen/include/public/arch-x86/hvm/start_info.h`): 32-bit entry with
//! EBX at a structure that leads to modules, command line, memory map and ACPI tables.

use axvcpu_uapi::addr::GuestPhysAddr;
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::ByteValued as _;

use super::{Loaded, Loader};
use crate::config::EntryMode;
use crate::image::elf::{Elf, Fields};
use crate::image::ImageError;
use crate::x86::boot::{Start, StartRegisters};
use crate::x86::layout;

/// A segment of notes.
const PT_NOTE: u32 = 4;
/// `XEN_ELFNOTE_PHYS32_ENTRY`: the 32-bit physical entry point.
const NOTE: u32 = 18;

/// `XEN_HVM_START_MAGIC_VALUE`.
const MAGIC: u32 = 0x336e_c578;
/// Offset of the memory map in the information page.
const MEMMAP: u64 = 0x100;
/// Offset of the module list in the information page.
const MODULES: u64 = 0x800;
/// Modules that the page has room for.
const MAX_MODULES: usize = 0x800 / size_of::<hvm_modlist_entry>();
/// Memory map entries that the page has room for.
const MAX_MAP: usize = (MODULES - MEMMAP) as usize / size_of::<hvm_memmap_table_entry>();

/// The entry point by this protocol, if the kernel speaks it.
pub(super) fn entry(elf: &Elf<'_>) -> Option<u64> {
    elf.segments.iter().filter(|segment| segment.kind == PT_NOTE).find_map(|segment| {
        let notes = elf.data(segment)?;
        let mut at = 0usize;
        loop {
            let fields = Fields(notes.get(at..)?);
            let name_size = usize::try_from(fields.u32(0)?).ok()?;
            let data_size = usize::try_from(fields.u32(4)?).ok()?;
            let name = 12usize;
            let data = name.checked_add(name_size.checked_next_multiple_of(4)?)?;
            if fields.u32(8)? == NOTE && fields.0.get(name..name + name_size)? == b"Xen\0" {
                return match data_size {
                    4.. => fields.u32(data).map(u64::from),
                    _ => None,
                };
            }
            at = at.checked_add(data.checked_add(data_size.checked_next_multiple_of(4)?)?)?;
        }
    })
}

impl Loader<'_> {
    pub(super) fn load_pvh(&mut self, elf: &Elf<'_>, entry: u64) -> Result<Loaded, ImageError> {
        let end = self.load_segments(elf)?;
        if !self.ram.contains(&(entry..entry + 1)) {
            return Err(self.malformed("PVH kernel", format!("its entry point {entry:#x} is not in memory")));
        }
        if self.config.modules.len() >= MAX_MODULES {
            return Err(self.conflict("PVH kernel", "takes 63 modules"));
        }
        if self.arch.map.len() > MAX_MAP {
            return Err(self.conflict("PVH kernel", "takes a memory map of 74 entries: give it fewer memory_regions"));
        }
        self.placement.claim("the PVH start information", layout::BOOT_INFO..layout::BOOT_INFO + 0x1000)?;
        let config = self.config;
        let cmdline = self.place_cmdline(&config.cmdline)?;
        let modules = self.place_modules(end.max(layout::HIGH_START)..u32::MAX.into())?;
        for (i, module) in (0..).zip(&modules) {
            let entry =
                hvm_modlist_entry { paddr: module.base, size: module.size, cmdline_paddr: module.cmdline, reserved: 0 };
            self.write(layout::BOOT_INFO + MODULES + i * size_of_val(&entry) as u64, entry.as_slice())?;
        }
        for (i, entry) in (0..).zip(self.arch.map) {
            let entry =
                hvm_memmap_table_entry { addr: entry.base, size: entry.size, type_: entry.kind as u32, reserved: 0 };
            self.write(layout::BOOT_INFO + MEMMAP + i * size_of_val(&entry) as u64, entry.as_slice())?;
        }
        let info = hvm_start_info {
            magic: MAGIC,
            version: 1,
            flags: 0,
            nr_modules: modules.len() as u32,
            modlist_paddr: if modules.is_empty() { 0 } else { layout::BOOT_INFO + MODULES },
            cmdline_paddr: cmdline,
            rsdp_paddr: self.arch.rsdp.as_u64(),
            memmap_paddr: layout::BOOT_INFO + MEMMAP,
            memmap_entries: self.arch.map.len() as u32,
            reserved: 0,
        };
        self.write(layout::BOOT_INFO, info.as_slice())?;
        let registers = StartRegisters { rbx: layout::BOOT_INFO, ..Default::default() };
        Ok(Loaded {
            format: "ELF, PVH",
            start: Start { mode: EntryMode::Protected, entry: GuestPhysAddr::new(entry), registers },
        })
    }
}
