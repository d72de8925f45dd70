// SPDX-License-Identifier: MIT OR Apache-2.0
//! The configuration file as it is written: field names and types, nothing checked beyond them.
//!
//! `Spanned` remembers where a value stood, for those values that a later check may find fault with.

use std::path::PathBuf;

use serde::Deserialize;
use toml::Spanned;

use super::size::Size;
use super::{EntryMode, Hypervisor};

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct File {
    #[serde(default)]
    pub(super) base: Base,
    pub(super) kernel: Kernel,
    #[serde(default)]
    pub(super) devices: Devices,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Base {
    #[serde(default)]
    pub(super) id: u32,
    pub(super) name: Option<Spanned<String>>,
    #[serde(default)]
    pub(super) hypervisor: Hypervisor,
    pub(super) cpu_num: Option<Spanned<u32>>,
    pub(super) phys_cpu_sets: Option<Spanned<Vec<u64>>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Kernel {
    pub(super) kernel_path: Spanned<PathBuf>,
    pub(super) ramdisk_path: Option<Spanned<PathBuf>>,
    #[serde(default)]
    pub(super) cmdline: Option<Spanned<String>>,
    pub(super) entry_point: Option<Spanned<Size>>,
    pub(super) kernel_load_addr: Option<Spanned<Size>>,
    pub(super) entry_mode: Option<Spanned<EntryMode>>,
    #[serde(default)]
    pub(super) modules: Vec<Module>,
    pub(super) memory: Option<Spanned<Size>>,
    pub(super) memory_regions: Option<Spanned<Vec<Spanned<Region>>>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Module {
    pub(super) path: Spanned<PathBuf>,
    pub(super) cmdline: Option<Spanned<String>>,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Region {
    pub(super) base: Size,
    pub(super) size: Size,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Devices {
    pub(super) serial: Option<Serial>,
    pub(super) debug_exit: Option<Spanned<PortDevice>>,
    pub(super) debug_console: Option<Spanned<PortDevice>>,
}

/// `"stdio"`, `"off"` or `{ file = "PATH" }`.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Serial {
    Stdio,
    Off,
    File(PathBuf),
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PortDevice {
    pub(super) port: Option<Spanned<u16>>,
}
