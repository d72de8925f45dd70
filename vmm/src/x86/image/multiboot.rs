// SPDX-License-Identifier: MIT OR Apache-2.0
//! Multiboot 1 (GNU Multiboot Specification 0.6.96): 32-bit entry with EAX holding a magic number and EBX the address of
//! a structure that leads to command line, modules and memory map.

use axvcpu_uapi::addr::GuestPhysAddr;

use super::{Loaded, Loader};
use crate::config::EntryMode;
use crate::image::elf::Elf;
use crate::image::ImageError;
use crate::x86::boot::{Start, StartRegisters};
use crate::x86::layout::{self, LOW_END};

/// Magic number of the header.
const HEADER_MAGIC: u32 = 0x1bad_b002;
/// Magic number in EAX.
const LOADER_MAGIC: u32 = 0x2bad_b002;
/// The header lies within this many bytes from the start of the file.
const SEARCH: usize = 8192;

/// Header flag: the load addresses are in the header.
const HAS_ADDRESSES: u32 = 1 << 16;
/// Header flags that a loader must know: page-aligned modules, memory information, video mode. Text mode is all a guest
/// gets here, so a wish for a video mode is heard and, as the specification allows, not granted.
const KNOWN_REQUIREMENTS: u32 = 0b111;
/// Header flags that a loader must refuse if it does not know them.
const REQUIREMENTS: u32 = 0xffff;

/// Information flags: what the structure holds.
const INFO_MEMORY: u32 = 1 << 0;
const INFO_CMDLINE: u32 = 1 << 2;
const INFO_MODULES: u32 = 1 << 3;
const INFO_MAP: u32 = 1 << 6;
const INFO_LOADER_NAME: u32 = 1 << 9;

/// Offsets in the information page.
const MAP: u64 = 0x100;
const MODULES: u64 = 0x800;
const LOADER_NAME: u64 = 0xf00;
/// Modules and map entries that the page has room for.
const MAX_MODULES: usize = 0x700 / 16;
const MAX_MAP: usize = 0x700 / 24;

/// A multiboot header.
pub(super) struct Header {
    /// Where in the file it lies.
    offset: usize,
    flags: u32,
    /// `header_addr`, `load_addr`, `load_end_addr`, `bss_end_addr`, `entry_addr`; only with [`HAS_ADDRESSES`].
    addresses: [u32; 5],
}

/// Looks for a header.
pub(super) fn find_header(image: &[u8]) -> Option<Header> {
    let word = |at: usize| Some(u32::from_le_bytes(image.get(at..at.checked_add(4)?)?.try_into().ok()?));
    (0..SEARCH.min(image.len())).step_by(4).find_map(|offset| {
        let (magic, flags, checksum) = (word(offset)?, word(offset + 4)?, word(offset + 8)?);
        if magic != HEADER_MAGIC || magic.wrapping_add(flags).wrapping_add(checksum) != 0 {
            return None;
        }
        let mut addresses = [0; 5];
        if flags & HAS_ADDRESSES != 0 {
            for (i, address) in addresses.iter_mut().enumerate() {
                *address = word(offset + 12 + 4 * i)?;
            }
        }
        Some(Header { offset, flags, addresses })
    })
}

impl Loader<'_> {
    pub(super) fn load_multiboot(
        &mut self,
        image: &[u8],
        header: &Header,
        elf: Option<&Elf<'_>>,
    ) -> Result<Loaded, ImageError> {
        if header.flags & REQUIREMENTS & !KNOWN_REQUIREMENTS != 0 {
            let flags = header.flags & REQUIREMENTS & !KNOWN_REQUIREMENTS;
            return Err(self.malformed("multiboot kernel", format!("it requires unknown features {flags:#x}")));
        }
        let (entry, end) = if header.flags & HAS_ADDRESSES != 0 {
            self.load_flat(image, header)?
        } else if let Some(elf) = elf {
            (elf.physical_entry(), self.load_segments(elf)?)
        } else {
            return Err(self.malformed("multiboot kernel", "it is neither ELF nor does its header hold addresses"));
        };
        if !self.ram.contains(&(entry..entry.saturating_add(1))) || entry > u32::MAX.into() {
            return Err(self.malformed("multiboot kernel", format!("its entry point {entry:#x} is not in memory")));
        }
        self.write_multiboot_info(end)?;
        let registers = StartRegisters { rax: LOADER_MAGIC.into(), rbx: layout::BOOT_INFO, ..Default::default() };
        Ok(Loaded {
            format: "multiboot",
            start: Start { mode: EntryMode::Protected, entry: GuestPhysAddr::new(entry), registers },
        })
    }

    /// Loads by the addresses in the header; returns the entry point and the end of the kernel.
    fn load_flat(&mut self, image: &[u8], header: &Header) -> Result<(u64, u64), ImageError> {
        let [header_addr, load, load_end, bss_end, entry] = header.addresses;
        let damaged = || self.malformed("multiboot kernel", "the addresses in its header contradict each other");
        // The byte at `load` lies as far before the header in the file as in memory.
        let before = header_addr.checked_sub(load).ok_or_else(damaged)? as usize;
        let start = header.offset.checked_sub(before).ok_or_else(damaged)?;
        let size = match load_end {
            0 => image.len() - start,
            end => end.checked_sub(load).ok_or_else(damaged)? as usize,
        };
        let data = start.checked_add(size).and_then(|end| image.get(start..end)).ok_or_else(damaged)?;
        let data_end = u64::from(load) + data.len() as u64;
        let end = data_end.max(bss_end.into());
        self.claim("the kernel", load.into(), end - u64::from(load))?;
        self.write(load.into(), data)?;
        Ok((entry.into(), end))
    }

    fn write_multiboot_info(&mut self, kernel_end: u64) -> Result<(), ImageError> {
        if self.config.modules.len() >= MAX_MODULES {
            return Err(self.conflict("multiboot kernel", "takes 111 modules"));
        }
        if self.arch.map.len() > MAX_MAP {
            return Err(
                self.conflict("multiboot kernel", "takes a memory map of 74 entries: give it fewer memory_regions")
            );
        }
        let base = layout::BOOT_INFO;
        self.placement.claim("the multiboot information", base..base + 0x1000)?;
        let config = self.config;
        let cmdline = self.place_cmdline(&config.cmdline)?;
        let modules = self.place_modules(kernel_end.max(layout::HIGH_START)..u32::MAX.into())?;
        for (i, module) in (0..).zip(&modules) {
            // Placed below 4 GiB, like the command lines.
            let entry = [module.base as u32, (module.base + module.size) as u32, module.cmdline as u32, 0];
            self.write(base + MODULES + 16 * i, &words(&entry))?;
        }
        for (i, entry) in (0..).zip(self.arch.map) {
            let mut bytes = words(&[20]);
            bytes.extend_from_slice(&entry.base.to_le_bytes());
            bytes.extend_from_slice(&entry.size.to_le_bytes());
            bytes.extend_from_slice(&(entry.kind as u32).to_le_bytes());
            self.write(base + MAP + 24 * i, &bytes)?;
        }
        self.write(base + LOADER_NAME, b"axvmm\0")?;

        let mut info = [0u32; 29];
        info[0] = INFO_MEMORY | INFO_CMDLINE | INFO_MODULES | INFO_MAP | INFO_LOADER_NAME;
        // In KiB: below 1 MiB, and above it up to the first hole.
        info[1] = (LOW_END >> 10) as u32;
        info[2] = u32::try_from((self.ram.first().end - layout::HIGH_START) >> 10).unwrap_or(u32::MAX);
        info[4] = cmdline as u32;
        info[5] = modules.len() as u32;
        info[6] = (base + MODULES) as u32;
        info[11] = (self.arch.map.len() * 24) as u32;
        info[12] = (base + MAP) as u32;
        info[16] = (base + LOADER_NAME) as u32;
        self.write(base, &words(&info))
    }
}

fn words(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}
