// SPDX-License-Identifier: MIT OR Apache-2.0
//! Loads a kernel with all that its boot protocol passes along: what is the same for every format and architecture.
//!
//! Formats are recognised by content, by the architecture's own part of this ([`crate::arch`]), for which `elf.rs` reads
//! ELF files, `content.rs` names what is no kernel, and `placement.rs` keeps pieces from overlapping.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use axvcpu_uapi::addr::GuestPhysAddr;

use crate::config::{Bytes, KernelConfig};
use crate::error::describe_io;
use crate::exit::ExitCode;
use crate::memory::Ram;

#[cfg(test)]
pub(crate) mod bench;
pub(crate) mod content;
pub(crate) mod elf;
mod placement;

pub(crate) use placement::Placement;

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
        /// Memory of the guest that kernels can be in, in bytes.
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
    #[error("the command lines of kernel and modules have more than {} together", Bytes(*limit))]
    CmdlinesTooLong {
        /// Bytes that they may have.
        limit: u64,
    },
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
            Self::CmdlineTooLong { .. } | Self::CmdlinesTooLong { .. } => ExitCode::CmdlineTooLong,
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

/// A kernel in guest memory, ready to start in the architecture's way, `S`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loaded<S> {
    /// Its format, for people.
    pub format: &'static str,
    /// How the CPU starts.
    pub start: S,
}

/// What the loaders share: the guest's memory, what is used of it, and what the architecture's loaders add to that, `A`.
pub(crate) struct Loader<'a, A> {
    pub(crate) config: &'a KernelConfig,
    pub(crate) ram: &'a Ram,
    pub(crate) placement: Placement,
    pub(crate) arch: A,
}

impl<A> Loader<'_, A> {
    /// Loads the image as it is, for one that starts at `entry`.
    pub(crate) fn place_raw(&mut self, image: &[u8], entry: u64) -> Result<(), ImageError> {
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
        self.place("the kernel", base, image)
    }

    /// Claims memory for `data` and writes it.
    pub(crate) fn place(&mut self, what: &str, base: u64, data: &[u8]) -> Result<(), ImageError> {
        self.claim(what, base, data.len() as u64)?;
        self.write(base, data)
    }

    /// Claims memory that must be RAM.
    pub(crate) fn claim(&mut self, what: &str, base: u64, size: u64) -> Result<(), ImageError> {
        let end = base.saturating_add(size);
        if !self.ram.contains(&(base..end)) {
            return Err(self.too_small(format!("{what} wants {base:#x} to {end:#x}")));
        }
        self.placement.claim(what, base..end)
    }

    /// Writes to memory that has been claimed, or that belongs to the boot data.
    pub(crate) fn write(&self, base: u64, data: &[u8]) -> Result<(), ImageError> {
        self.ram.write(GuestPhysAddr::new(base), data).map_err(|error| self.too_small(error.to_string()))
    }

    /// Puts a file into free memory within `limits`, as high as possible with `high`, else as low; on a page boundary.
    /// Returns its address and size.
    pub(crate) fn place_file(
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

    pub(crate) fn refuse_entry_point(&self, format: &'static str) -> Result<(), ImageError> {
        match self.config.entry_point {
            Some(_) => {
                Err(self.conflict(format, "has its own entry point: remove entry_point, which is for raw binaries"))
            }
            None => Ok(()),
        }
    }

    pub(crate) fn refuse_ramdisk(&self, format: &'static str) -> Result<(), ImageError> {
        match self.config.ramdisk {
            Some(_) => Err(self.conflict(format, "takes no initial RAM disk: remove ramdisk_path")),
            None => Ok(()),
        }
    }

    pub(crate) fn refuse_modules(&self, format: &'static str) -> Result<(), ImageError> {
        if self.config.modules.is_empty() {
            return Ok(());
        }
        Err(self.conflict(format, "takes no modules: remove [[kernel.modules]]"))
    }

    pub(crate) fn conflict(&self, format: &'static str, conflict: &'static str) -> ImageError {
        ImageError::Conflict { path: self.config.path.clone(), format, conflict }
    }

    pub(crate) fn malformed(&self, format: &'static str, detail: impl Into<String>) -> ImageError {
        ImageError::Malformed { path: self.config.path.clone(), format, detail: detail.into() }
    }

    pub(crate) fn too_small(&self, detail: String) -> ImageError {
        ImageError::MemoryTooSmall { detail, memory: self.ram.first().end - self.ram.first().start }
    }
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

/// Reads the kernel image.
///
/// # Errors
/// [`ImageError::Unreadable`].
pub(crate) fn read_kernel(path: &Path) -> Result<Vec<u8>, ImageError> {
    let unreadable = |reason: String| ImageError::Unreadable { role: Role::Kernel, path: path.to_owned(), reason };
    let file = open(Role::Kernel, path)?;
    let mut image = Vec::new();
    file.take(MAX_IMAGE + 1).read_to_end(&mut image).map_err(|error| unreadable(describe_io(&error)))?;
    if image.len() as u64 > MAX_IMAGE {
        return Err(unreadable(format!("it is larger than {}, so it is no kernel", Bytes(MAX_IMAGE))));
    }
    Ok(image)
}
