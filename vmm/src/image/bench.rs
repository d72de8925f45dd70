// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the tests of both architectures' loaders load from.

use std::fs;
use std::path::PathBuf;

use crate::config::{EntryMode, KernelConfig, MemoryRegion};

/// A folder with files, the kernel configuration that names them, and the guest's memory.
pub(crate) struct Bench {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) config: KernelConfig,
    pub(crate) memory: Vec<MemoryRegion>,
}

impl Bench {
    /// With a kernel only.
    pub(crate) fn new(kernel: &[u8], entry_mode: EntryMode, memory: Vec<MemoryRegion>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let config = KernelConfig {
            path: folder.path().join("kernel"),
            ramdisk: None,
            cmdline: String::new(),
            entry_point: None,
            load_addr: None,
            entry_mode,
            modules: vec![],
        };
        let bench = Self { folder, config, memory };
        bench.file("kernel", kernel);
        bench
    }

    /// Writes a file and gives its path.
    pub(crate) fn file(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.folder.path().join(name);
        fs::write(&path, content).unwrap();
        path
    }
}
