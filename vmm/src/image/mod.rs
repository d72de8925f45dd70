// SPDX-License-Identifier: MIT OR Apache-2.0
//! Loads a kernel with all that its boot protocol passes along, and says how the CPU starts it.
//!
//! The format is recognised by content:
//!
//! | format | protocol | file |
//! |---|---|---|
//! | bzImage | Linux boot protocol, 64-bit (or 32-bit) entry | `bzimage.rs` |
//! | ELF with a PVH note | PVH start information, 32-bit entry | `pvh.rs` |
//! | ELF or flat with a multiboot 1 header | multiboot information, 32-bit entry | `multiboot.rs` |
//! | other 64-bit ELF | 64-bit entry with Linux boot parameters in RSI and a stack | `elf.rs` |
//! | anything else, given `entry_point` | none | this file |
//!
//! `content.rs` names what is none of these. `placement.rs` keeps pieces from overlapping.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use axvcpu_uapi::addr::GuestPhysAddr;

use crate::boot::{Start, StartRegisters};
use crate::config::{Bytes, EntryMode, KernelConfig};
use crate::error::describe_io;
use crate::exit::ExitCode;
use crate::layout::{self, MapEntry};
use crate::memory::Ram;

mod bzimage;
mod content;
mod elf;
mod multiboot;
mod placement;
mod pvh;
#[cfg(test)]
mod tests;

use placement::Placement;

/// The largest kernel image, in bytes: far above any real one, so that a wrong path does not fill the host's memory.
const MAX_IMAGE: u64 = 1 << 30;

/// Why a kernel cannot be booted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// A file cannot be read.
    #[error("cannot read {role} {}: {reason}", path.display())]
    Unreadable {
        /// What the file is for.
        role: Role,
        /// Its path.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The file is something else.
    #[error("{} is no kernel: it is {what}\n{cure}", path.display())]
    NotAKernel {
        /// Its path.
        path: PathBuf,
        /// What it is.
        what: String,
        /// What the user can do.
        cure: String,
    },
    /// The file is a kernel of a known format, but broken.
    #[error("{} is a damaged {format}: {detail}", path.display())]
    Malformed {
        /// Its path.
        path: PathBuf,
        /// Its format.
        format: &'static str,
        /// What is wrong.
        detail: String,
    },
    /// The kernel asks for more memory, or for memory elsewhere.
    #[error("the kernel does not fit into the guest's memory: {detail}\nGive the guest more memory: it has {}.", Bytes(*memory))]
    MemoryTooSmall {
        /// What is missing.
        detail: String,
        /// Memory of the guest from address 0 up, in bytes.
        memory: u64,
    },
    /// Two things want the same memory.
    #[error("{what} at {start:#x} to {end:#x} overlaps {other}")]
    Overlap {
        /// What was to be placed.
        what: String,
        /// Its first address.
        start: u64,
        /// The address behind it.
        end: u64,
        /// What is there.
        other: String,
    },
    /// The initial RAM disk or a module does not fit.
    #[error("{role} {} ({}) does not fit into the guest's memory: the largest space free for it has {}\nGive the guest more memory, or make the file smaller.", path.display(), Bytes(*size), Bytes(*space))]
    TooLarge {
        /// What the file is for.
        role: Role,
        /// Its path.
        path: PathBuf,
        /// Its size.
        size: u64,
        /// The space there is.
        space: u64,
    },
    /// The kernel takes no command line of that length.
    #[error("the command line has {length} bytes, and this kernel takes {limit} at most")]
    CmdlineTooLong {
        /// Its length.
        length: usize,
        /// The limit.
        limit: usize,
    },
    /// Command lines together need too much space.
    #[error("the command lines of kernel and modules have more than {} together", Bytes(layout::CMDLINES.end - layout::CMDLINES.start))]
    CmdlinesTooLong,
    /// The configuration asks for something that the format has not.
    #[error("{} is a {format}, which {conflict}", path.display())]
    Conflict {
        /// The kernel's path.
        path: PathBuf,
        /// Its format.
        format: &'static str,
        /// What does not go together.
        conflict: &'static str,
    },
}

impl ImageError {
    /// The exit code that tells this cause from others.
    #[must_use]
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::Unreadable { role: Role::Kernel, .. } => ExitCode::ImageUnreadable,
            Self::Unreadable { .. } => ExitCode::RamdiskUnreadable,
            Self::NotAKernel { .. } => ExitCode::ImageUnknown,
            Self::Malformed { .. } | Self::Overlap { .. } => ExitCode::ImageMalformed,
            Self::MemoryTooSmall { .. } => ExitCode::MemoryTooSmall,
            Self::TooLarge { .. } => ExitCode::RamdiskTooLarge,
            Self::CmdlineTooLong { .. } | Self::CmdlinesTooLong => ExitCode::CmdlineTooLong,
            Self::Conflict { .. } => ExitCode::ImageUnsupported,
        }
    }
}

/// What a file is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// `kernel_path`.
    Kernel,
    /// `ramdisk_path`.
    Ramdisk,
    /// One of `modules`.
    Module,
}

impl std::fmt::Display for Role {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Kernel => "the kernel",
            Self::Ramdisk => "the initial RAM disk",
            Self::Module => "the module",
        })
    }
}

/// A kernel in guest memory, ready to start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loaded {
    /// Its format, for people.
    pub format: &'static str,
    /// How the CPU starts.
    pub start: Start,
}

/// What the loaders share: the guest's memory, what is used of it, and what the guest is to be told.
struct Loader<'a> {
    config: &'a KernelConfig,
    ram: &'a Ram,
    map: &'a [MapEntry],
    rsdp: GuestPhysAddr,
    placement: Placement,
    /// Next free byte for a command line.
    cmdlines: u64,
}

/// Loads what `config` names into `ram`. `map` is the memory map the guest gets, `rsdp` where its ACPI tables begin.
///
/// # Errors
/// The first problem found; `ram` may then have been written in part.
pub fn load(config: &KernelConfig, ram: &Ram, map: &[MapEntry], rsdp: GuestPhysAddr) -> Result<Loaded, ImageError> {
    let image = read_kernel(&config.path)?;
    let mut loader =
        Loader { config, ram, map, rsdp, placement: Placement::new(ram), cmdlines: layout::CMDLINES.start };
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
            let elf = elf::Elf::parse(image).ok();
            if elf.as_ref().is_none_or(|elf| elf.pvh_entry().is_none()) {
                self.refuse_entry_point("multiboot kernel")?;
                return self.load_multiboot(image, &header, elf.as_ref());
            }
        }
        if image.starts_with(elf::MAGIC) {
            if let Ok(elf) = elf::Elf::parse(image) {
                if let Some(entry) = elf.pvh_entry() {
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
            _ => Err(content::not_a_kernel(&self.config.path, image)),
        }
    }

    fn load_raw(&mut self, image: &[u8], entry: u64) -> Result<Loaded, ImageError> {
        self.refuse_ramdisk("raw binary")?;
        self.refuse_modules("raw binary")?;
        if !self.config.cmdline.is_empty() {
            return Err(self.conflict("raw binary", "takes no command line"));
        }
        let base = self.config.load_addr.unwrap_or(entry);
        let end = base + image.len() as u64;
        if !(base..end).contains(&entry) {
            return Err(
                self.malformed("raw binary", format!("the entry point {entry:#x} is outside of {base:#x} to {end:#x}"))
            );
        }
        self.place("the kernel", base, image)?;
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

    /// Claims memory for `data` and writes it.
    fn place(&mut self, what: &str, base: u64, data: &[u8]) -> Result<(), ImageError> {
        self.claim(what, base, data.len() as u64)?;
        self.write(base, data)
    }

    /// Claims memory that must be RAM.
    fn claim(&mut self, what: &str, base: u64, size: u64) -> Result<(), ImageError> {
        let end = base.saturating_add(size);
        if !self.ram.contains(&(base..end)) {
            return Err(self.too_small(format!("{what} wants {base:#x} to {end:#x}")));
        }
        self.placement.claim(what, base..end)
    }

    /// Writes to memory that has been claimed, or that belongs to the boot data.
    fn write(&self, base: u64, data: &[u8]) -> Result<(), ImageError> {
        self.ram.write(GuestPhysAddr::new(base), data).map_err(|error| self.too_small(error.to_string()))
    }

    /// Stores a command line with its NUL and returns its address.
    fn place_cmdline(&mut self, text: &str) -> Result<u64, ImageError> {
        let at = self.cmdlines;
        let next = at + text.len() as u64 + 1;
        if next > layout::CMDLINES.end {
            return Err(ImageError::CmdlinesTooLong);
        }
        if at == layout::CMDLINES.start {
            self.placement.claim("the command lines", layout::CMDLINES)?;
        }
        self.write(at, text.as_bytes())?;
        self.write(next - 1, &[0])?;
        self.cmdlines = next;
        Ok(at)
    }

    /// Puts a file into free memory within `limits`, as high as possible with `high`, else as low; on a page boundary.
    /// Returns its address and size.
    fn place_file(
        &mut self,
        role: Role,
        path: &Path,
        limits: std::ops::Range<u64>,
        high: bool,
    ) -> Result<(u64, u64), ImageError> {
        use vm_memory::{Bytes as _, GuestAddress};
        let unreadable = |reason: String| ImageError::Unreadable { role, path: path.to_owned(), reason };
        let mut file = open(role, path)?;
        let size = file.metadata().map_err(|error| unreadable(describe_io(&error)))?.len();
        if size == 0 {
            return Err(unreadable("it is empty".into()));
        }
        let base = self.placement.find(size, limits, high).map_err(|space| ImageError::TooLarge {
            role,
            path: path.to_owned(),
            size,
            space,
        })?;
        self.placement.claim(&role.to_string(), base..base + size)?;
        // Fits: the placement lies in RAM, which is addressable.
        let count = usize::try_from(size).map_err(|error| unreadable(error.to_string()))?;
        self.ram
            .as_vm_memory()
            .read_exact_volatile_from(GuestAddress(base), &mut file, count)
            .map_err(|error| unreadable(format!("it changed while it was read ({error})")))?;
        Ok((base, size))
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

    fn refuse_entry_point(&self, format: &'static str) -> Result<(), ImageError> {
        match self.config.entry_point {
            Some(_) => {
                Err(self.conflict(format, "has its own entry point: remove entry_point, which is for raw binaries"))
            }
            None => Ok(()),
        }
    }

    fn refuse_ramdisk(&self, format: &'static str) -> Result<(), ImageError> {
        match self.config.ramdisk {
            Some(_) => Err(self.conflict(format, "takes no initial RAM disk: remove ramdisk_path")),
            None => Ok(()),
        }
    }

    fn refuse_modules(&self, format: &'static str) -> Result<(), ImageError> {
        if self.config.modules.is_empty() {
            return Ok(());
        }
        Err(self.conflict(format, "takes no modules: remove [[kernel.modules]]"))
    }

    fn conflict(&self, format: &'static str, conflict: &'static str) -> ImageError {
        ImageError::Conflict { path: self.config.path.clone(), format, conflict }
    }

    fn malformed(&self, format: &'static str, detail: impl Into<String>) -> ImageError {
        ImageError::Malformed { path: self.config.path.clone(), format, detail: detail.into() }
    }

    fn too_small(&self, detail: String) -> ImageError {
        ImageError::MemoryTooSmall { detail, memory: self.ram.low_end() }
    }
}

/// A module in guest memory.
struct PlacedModule {
    base: u64,
    size: u64,
    cmdline: u64,
}

/// Opens a regular file.
fn open(role: Role, path: &Path) -> Result<File, ImageError> {
    let unreadable = |reason: String| ImageError::Unreadable { role, path: path.to_owned(), reason };
    // The type is looked at before opening: to open a pipe would wait for its other end.
    let metadata = fs::metadata(path).map_err(|error| unreadable(describe_io(&error)))?;
    if metadata.is_dir() {
        return Err(unreadable("it is a directory".into()));
    }
    if !metadata.is_file() {
        return Err(unreadable("it is not a regular file".into()));
    }
    File::open(path).map_err(|error| unreadable(describe_io(&error)))
}

fn read_kernel(path: &Path) -> Result<Vec<u8>, ImageError> {
    let unreadable = |reason: String| ImageError::Unreadable { role: Role::Kernel, path: path.to_owned(), reason };
    let file = open(Role::Kernel, path)?;
    let mut image = Vec::new();
    file.take(MAX_IMAGE + 1).read_to_end(&mut image).map_err(|error| unreadable(describe_io(&error)))?;
    if image.len() as u64 > MAX_IMAGE {
        return Err(unreadable(format!("it is larger than {}, so it is no kernel", Bytes(MAX_IMAGE))));
    }
    Ok(image)
}
