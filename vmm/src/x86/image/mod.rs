// SPDX-License-Identifier: MIT OR Apache-2.0
//! Kernels for x86, and how the CPU starts them.
//!
//! The format is recognised by content:
//!
//! | format | protocol | file |
//! |---|---|---|
//! | bzImage | Linux boot protocol, 64-bit (or 32-bit) entry | `bzimage.rs` |
//! | ELF with a PVH note | PVH start information, 32-bit entry | `pvh.rs` |
//! | ELF or flat with a multiboot 1 header | multiboot information, 32-bit entry | `multiboot.rs` |
//! | other 64-bit ELF | 64-bit entry with Linux boot parameters in RSI and a stack | `elf64.rs` |
//! | anything else, given `entry_point` | none | this file |

use axvcpu_uapi::addr::GuestPhysAddr;

use super::boot::{Start, StartRegisters};
use super::layout::{self, MapEntry};
use crate::config::{EntryMode, KernelConfig};
use crate::image::content::{self, Wanted};
use crate::image::elf::{self, Elf};
use crate::image::{self, ImageError, Placement, Role};
use crate::memory::Ram;

mod bzimage;
mod elf64;
mod multiboot;
mod pvh;
#[cfg(test)]
mod tests;

/// A kernel in guest memory.
pub type Loaded = image::Loaded<Start>;

/// What x86's loaders know beyond what all know.
struct Pc<'a> {
    map: &'a [MapEntry],
    rsdp: GuestPhysAddr,
    /// Next free byte for a command line.
    cmdlines: u64,
}

type Loader<'a> = image::Loader<'a, Pc<'a>>;

/// What is a kernel here.
pub(crate) const WANTED: Wanted = Wanted {
    name: "x86-64",
    elf: &[elf::EM_X86_64, elf::EM_386],
    pe: 0x8664,
    kernels: "Kernels are bzImage (vmlinuz), ELF (PVH or 64-bit) and multiboot; for raw machine code give entry_point.",
};

/// Loads what `config` names into `ram`. `map` is the memory map the guest gets, `rsdp` where its ACPI tables begin.
///
/// # Errors
/// The first problem found; `ram` may then have been written in part.
pub fn load(config: &KernelConfig, ram: &Ram, map: &[MapEntry], rsdp: GuestPhysAddr) -> Result<Loaded, ImageError> {
    let image = image::read_kernel(&config.path)?;
    let mut placement = Placement::new(ram);
    placement.claim("the extended BIOS data area", layout::EBDA..layout::LOW_END)?;
    placement.claim("the ACPI tables", layout::ACPI)?;
    let mut loader = Loader { config, ram, placement, arch: Pc { map, rsdp, cmdlines: layout::CMDLINES.start } };
    let loaded = loader.load(&image)?;
    for (name, range) in loaded.start.memory() {
        loader.placement.claim(name, range)?;
    }
    loaded.start.prepare(ram).map_err(|error| loader.too_small(error.to_string()))?;
    Ok(loaded)
}

impl Loader<'_> {
    fn load(&mut self, image: &[u8]) -> Result<Loaded, ImageError> {
        if bzimage::recognise(image) {
            self.refuse_entry_point("bzImage")?;
            return self.load_bzimage(image);
        }
        if let Some(header) = multiboot::find_header(image) {
            // A kernel that speaks both protocols is started by PVH, which knows about 64-bit memory and ACPI.
            let elf = Elf::parse(image, WANTED.elf).ok();
            if elf.as_ref().is_none_or(|elf| pvh::entry(elf).is_none()) {
                self.refuse_entry_point("multiboot kernel")?;
                return self.load_multiboot(image, &header, elf.as_ref());
            }
        }
        if image.starts_with(elf::MAGIC) {
            if let Ok(elf) = Elf::parse(image, WANTED.elf) {
                if let Some(entry) = pvh::entry(&elf) {
                    self.refuse_entry_point("PVH kernel")?;
                    return self.load_pvh(&elf, entry);
                }
                if elf.is_bootable_64() {
                    self.refuse_entry_point("64-bit ELF kernel")?;
                    return self.load_elf(&elf);
                }
            }
        }
        match self.config.entry_point {
            Some(entry) if !image.is_empty() => self.load_raw(image, entry),
            _ => Err(content::not_a_kernel(&self.config.path, image, &WANTED)),
        }
    }

    fn load_raw(&mut self, image: &[u8], entry: u64) -> Result<Loaded, ImageError> {
        self.place_raw(image, entry)?;
        let start = Start {
            mode: self.config.entry_mode,
            entry: GuestPhysAddr::new(entry),
            registers: StartRegisters::default(),
        };
        Ok(Loaded {
            format: match self.config.entry_mode {
                EntryMode::Real => "raw binary, real mode",
                EntryMode::Protected => "raw binary, protected mode",
                EntryMode::Long => "raw binary, long mode",
            },
            start,
        })
    }

    /// Stores a command line with its NUL and returns its address.
    fn place_cmdline(&mut self, text: &str) -> Result<u64, ImageError> {
        let at = self.arch.cmdlines;
        let next = at + text.len() as u64 + 1;
        if next > layout::CMDLINES.end {
            return Err(ImageError::CmdlinesTooLong { limit: layout::CMDLINES.end - layout::CMDLINES.start });
        }
        if at == layout::CMDLINES.start {
            self.placement.claim("the command lines", layout::CMDLINES)?;
        }
        self.write(at, text.as_bytes())?;
        self.write(next - 1, &[0])?;
        self.arch.cmdlines = next;
        Ok(at)
    }

    /// The RAM disk, if there is one, and the modules, in order, with their command lines; placed upwards.
    fn place_modules(&mut self, limits: std::ops::Range<u64>) -> Result<Vec<PlacedModule>, ImageError> {
        let config = self.config;
        let ramdisk = config.ramdisk.iter().map(|path| (Role::Ramdisk, path, ""));
        let modules = config.modules.iter().map(|module| (Role::Module, &module.path, module.cmdline.as_str()));
        ramdisk
            .chain(modules)
            .map(|(role, path, cmdline)| {
                let (base, size) = self.place_file(role, path, limits.clone(), false)?;
                Ok(PlacedModule { base, size, cmdline: self.place_cmdline(cmdline)? })
            })
            .collect()
    }
}

/// A module in guest memory.
struct PlacedModule {
    base: u64,
    size: u64,
    cmdline: u64,
}
