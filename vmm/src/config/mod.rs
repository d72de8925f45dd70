// SPDX-License-Identifier: MIT OR Apache-2.0
//! The configuration of a VM: what vm.toml(5) describes, read, checked and with every path made usable.
//!
//! `raw.rs` says what the file looks like; `check.rs` turns it into [`VmConfig`], which holds only what makes sense, or
//! into a [`ConfigError`] that points at the offending place. Nothing but the configuration file itself is read here:
//! whether the kernel exists is for [`crate::image`] to find out.

use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;

mod check;
mod diagnostic;
mod raw;
mod size;
#[cfg(test)]
mod tests;

pub use diagnostic::{ConfigError, Problem};
pub use size::Bytes;

/// The longest command line of a module or kernel, in bytes: one page, shared by all boot protocols. A kernel may have
/// a lower limit of its own.
pub const MAX_CMDLINE: usize = 4095;

/// A checked configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmConfig {
    /// A number that identifies the VM in logs.
    pub id: u32,
    /// A name that identifies the VM in logs.
    pub name: String,
    /// What carries the VM.
    pub hypervisor: Hypervisor,
    /// One entry per vCPU: the host CPUs its thread may use, as a bit mask; `None` for all.
    pub vcpus: Vec<Option<u64>>,
    /// Guest RAM, ascending, not overlapping, in multiples of 4 KiB.
    pub memory: Vec<MemoryRegion>,
    /// What to boot.
    pub kernel: KernelConfig,
    /// Devices that can be chosen.
    pub devices: DeviceConfig,
}

/// What carries the VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Hypervisor {
    /// The module axvcpu.
    #[default]
    Axvcpu,
    /// Linux' KVM.
    Kvm,
}

impl Hypervisor {
    /// Its name for people.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Axvcpu => "axvcpu",
            Self::Kvm => "KVM",
        }
    }
}

/// A range of guest RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryRegion {
    /// First guest physical address.
    pub base: u64,
    /// Size in bytes.
    pub size: u64,
}

impl MemoryRegion {
    /// The address behind the last byte.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.base + self.size
    }
}

/// What to boot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelConfig {
    /// The kernel image.
    pub path: PathBuf,
    /// The initial RAM disk.
    pub ramdisk: Option<PathBuf>,
    /// The kernel's command line, without a terminating NUL.
    pub cmdline: String,
    /// Where a raw binary starts.
    pub entry_point: Option<u64>,
    /// Where a raw binary is loaded; its entry point if `None`.
    pub load_addr: Option<u64>,
    /// The mode in which a raw binary starts.
    pub entry_mode: EntryMode,
    /// Multiboot or PVH modules.
    pub modules: Vec<ModuleConfig>,
}

/// A boot module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModuleConfig {
    /// Its file.
    pub path: PathBuf,
    /// Its command line, without a terminating NUL.
    pub cmdline: String,
}

/// CPU mode at the first instruction of a raw binary.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EntryMode {
    /// 16-bit real mode.
    #[default]
    Real,
    /// 32-bit protected mode, flat segments, paging off.
    Protected,
    /// 64-bit mode, the first 4 GiB mapped one to one.
    Long,
}

/// Devices that can be chosen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceConfig {
    /// Where COM1 leads.
    pub serial: SerialConfig,
    /// Port of the debug exit device.
    pub debug_exit: Option<u16>,
    /// Port of the debug console.
    pub debug_console: Option<u16>,
}

/// Where the serial port COM1 leads.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum SerialConfig {
    /// To standard input and output.
    #[default]
    Stdio,
    /// There is none.
    Off,
    /// Output is appended to a file; there is no input.
    File(PathBuf),
}

impl VmConfig {
    /// Reads and checks the file at `path`. Relative paths in it count from its own folder.
    ///
    /// # Errors
    /// The first problem found.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let unreadable = |message: String| ConfigError::new(Problem::Unreadable, path, message);
        if path.is_dir() {
            return Err(unreadable("this is a directory, not a configuration file".into())
                .cure("Name the file itself: axvmm --config DIRECTORY/vm.toml"));
        }
        let bytes = fs::read(path).map_err(|error| {
            unreadable(format!("cannot read the configuration: {}", crate::error::describe_io(&error)))
                .cure("--config takes the path of a vm.toml; see vm.toml(5)")
        })?;
        let text = String::from_utf8(bytes)
            .map_err(|_| unreadable("the file is not UTF-8 text, so it is no configuration".into()))?;
        Self::parse(path, &text)
    }

    /// Checks the configuration `text`. `path` is named in errors, and its folder is where relative paths start.
    ///
    /// # Errors
    /// The first problem found.
    pub fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        if let Err(error) = toml::de::DeTable::parse(text) {
            return Err(located(Problem::Syntax, path, text, &error));
        }
        let file: raw::File =
            toml::from_str(text).map_err(|error| located(class_of(error.message()), path, text, &error))?;
        check::Checker { path, text, folder: path.parent().unwrap_or(Path::new("")) }.check(file)
    }

    /// Bytes of guest RAM.
    #[must_use]
    pub fn memory_size(&self) -> u64 {
        self.memory.iter().map(|region| region.size).sum()
    }
}

/// The class of a deserializer's message; serde has no other way to tell.
fn class_of(message: &str) -> Problem {
    if message.starts_with("unknown field") {
        Problem::UnknownKey
    } else {
        Problem::Type
    }
}

fn located(problem: Problem, path: &Path, text: &str, error: &toml::de::Error) -> ConfigError {
    let message = match problem {
        Problem::Syntax => format!("not valid TOML: {}", error.message()),
        Problem::UnknownKey => error.message().replacen("unknown field", "unknown key", 1),
        _ => error.message().replacen("missing field", "missing key", 1),
    };
    let result = ConfigError::new(problem, path, message.replace('\n', "; "));
    match error.span() {
        Some(span) => result.at(text, span),
        None => result,
    }
}
