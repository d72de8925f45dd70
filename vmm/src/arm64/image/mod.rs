// SPDX-License-Identifier: MIT OR Apache-2.0
//! Kernels for AArch64, and how the CPU starts them.
//!
//! The format is recognised by content:
//!
//! | format | what |
//! |---|---|
//! | Image | Linux and others that have its header (Linux `Documentation/arch/arm64/booting.rst`) |
//! | 64-bit ELF | kernels linked at physical addresses |
//! | anything else, given `entry_point` | raw binaries |
//!
//! All of them start in the same way: at EL1 with MMU and caches off, X0 at the device tree. linux-loader's reader of
//! Images is not used: it exists in programs for AArch64 only, so no other machine could test what is built on it, and it
//! puts the kernel where something else may lie.

use axvcpu_uapi::addr::GuestPhysAddr;

use super::boot::Start;
use super::fdt;
use super::layout::RAM_START;
use crate::config::KernelConfig;
use crate::image::content::{self, Wanted};
use crate::image::elf::{self, Elf, Fields};
use crate::image::{self, ImageError, Placement, Role};
use crate::memory::Ram;

#[cfg(test)]
mod tests;

/// A kernel in guest memory.
pub type Loaded = image::Loaded<Start>;

type Loader<'a> = image::Loader<'a, &'a fdt::Machine<'a>>;

/// What is a kernel here.
pub(crate) const WANTED: Wanted = Wanted {
    name: "arm64",
    elf: &[elf::EM_AARCH64],
    pe: 0xaa64,
    kernels:
        "Kernels are Image (vmlinuz, if it is not compressed) and 64-bit ELF; for raw machine code give entry_point.",
};

/// The header of an Image has its magic number here.
const MAGIC_AT: usize = 0x38;
const MAGIC: &[u8] = b"ARM\x64";
/// Offset of the header's flags.
const FLAGS_AT: usize = 0x18;
/// Header flags: the kernel is big-endian.
const BIG_ENDIAN: u64 = 1 << 0;
/// Images lie this far apart, and `text_offset` behind that.
const ALIGNMENT: u64 = 2 << 20;
/// RAM disk and device tree lie in as much of the memory's beginning: the RAM disk has to be in a window of 32 GiB, aligned
/// to 1 GiB, together with the kernel.
const WINDOW: u64 = 31 << 30;

/// The fields of an Image's header that matter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Header {
    text_offset: u64,
    image_size: u64,
    flags: u64,
}

impl Header {
    fn read(image: &[u8]) -> Option<Self> {
        let fields = Fields(image);
        let magic = image.get(MAGIC_AT..MAGIC_AT + MAGIC.len())?;
        (magic == MAGIC).then_some(())?;
        Some(Self { text_offset: fields.u64(8)?, image_size: fields.u64(16)?, flags: fields.u64(FLAGS_AT)? })
    }
}

/// Loads what `config` names into `ram`, and the device tree of `machine`.
///
/// # Errors
/// The first problem found; `ram` may then have been written in part.
pub fn load(config: &KernelConfig, ram: &Ram, machine: &fdt::Machine<'_>) -> Result<Loaded, ImageError> {
    let image = image::read_kernel(&config.path)?;
    let mut loader = Loader { config, ram, placement: Placement::new(ram), arch: machine };
    let (format, entry) = loader.load(&image)?;
    let fdt = loader.place_tree()?;
    Ok(Loaded { format, start: Start { entry: GuestPhysAddr::new(entry), fdt: GuestPhysAddr::new(fdt) } })
}

impl Loader<'_> {
    /// The kernel's format, and where it starts.
    fn load(&mut self, image: &[u8]) -> Result<(&'static str, u64), ImageError> {
        if let Some(header) = Header::read(image) {
            self.refuse_entry_point("arm64 Image")?;
            return self.load_image(image, header);
        }
        if image.starts_with(elf::MAGIC) {
            if let Some(elf) = Elf::parse(image, WANTED.elf).ok().filter(Elf::is_bootable_64) {
                self.refuse_entry_point("64-bit ELF kernel")?;
                self.load_segments(&elf)?;
                let entry = elf.physical_entry();
                if !self.ram.contains(&(entry..entry.saturating_add(1))) {
                    return Err(self.malformed("ELF file", format!("its entry point {entry:#x} is in no segment")));
                }
                return Ok(("64-bit ELF", entry));
            }
        }
        match self.config.entry_point {
            Some(entry) if !image.is_empty() => {
                self.place_raw(image, entry)?;
                Ok(("raw binary", entry))
            }
            _ => Err(not_a_kernel(self.config, image)),
        }
    }

    fn load_image(&mut self, image: &[u8], header: Header) -> Result<(&'static str, u64), ImageError> {
        let format = "arm64 Image";
        if header.flags & BIG_ENDIAN != 0 {
            return Err(self.conflict(format, "is built for big-endian CPUs: only little-endian ones are offered"));
        }
        if header.image_size == 0 {
            return Err(self.malformed(format, "its header does not tell its size, as before Linux 3.17"));
        }
        if header.image_size < image.len() as u64 {
            return Err(self.malformed(format, "its header tells a smaller size than it has"));
        }
        let at = RAM_START.next_multiple_of(ALIGNMENT).checked_add(header.text_offset);
        let Some(at) = at.filter(|at| at.checked_add(header.image_size).is_some()) else {
            return Err(self.malformed(format, "its header tells a place that does not exist"));
        };
        self.claim("the kernel", at, header.image_size)?;
        self.write(at, image)?;
        Ok((format, at))
    }

    /// Loads the RAM disk, and writes the tree that tells of it. Returns the tree's address.
    fn place_tree(&mut self) -> Result<u64, ImageError> {
        self.refuse_modules("arm64 kernel")?;
        let limits = RAM_START..RAM_START + WINDOW;
        let ramdisk = match &self.config.ramdisk {
            Some(path) => {
                let (base, size) = self.place_file(Role::Ramdisk, path, limits.clone(), true)?;
                Some(base..base + size)
            }
            None => None,
        };
        // The configuration lets no NUL into a command line, which is all that can go wrong.
        let tree = self.arch.tree(&self.config.cmdline, ramdisk.as_ref());
        let tree = tree.map_err(|error| self.malformed("device tree", error.to_string()))?;
        let at = self.placement.find(tree.len() as u64, limits, true);
        let at = at.map_err(|_| self.too_small("there is no room left for the device tree".into()))?;
        self.place("the device tree", at, &tree)?;
        Ok(at)
    }
}

/// The error for what is no kernel.
fn not_a_kernel(config: &KernelConfig, image: &[u8]) -> ImageError {
    // Linux `drivers/firmware/efi/libstub/zboot-header.S`.
    if image.starts_with(b"MZ") && image.get(4..8) == Some(b"zimg") {
        return ImageError::NotAKernel {
            path: config.path.clone(),
            what: "a compressed kernel for EFI firmware".into(),
            cure: "EFI programs need firmware, which axvmm has not; give the kernel's Image, which is inside.".into(),
        };
    }
    content::not_a_kernel(&config.path, image, &WANTED)
}
