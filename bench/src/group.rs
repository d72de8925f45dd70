// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the kernel's memory on behalf of this process is.

use std::fs;
use std::path::Path;

use nix::mount::{mount, MsFlags};

use crate::machine::Result;

/// A control group of this process's, version 2.
pub(crate) struct Group;

impl Group {
    const ROOT: &str = "/sys/fs/cgroup";
    const PATH: &str = "/sys/fs/cgroup/axvcpu-bench";

    /// Mounts the file system if need be, makes a group and moves this process there.
    ///
    /// # Errors
    /// If the kernel has no such groups, or nobody may make one.
    pub(crate) fn enter() -> Result<Self> {
        if !Path::new(Self::ROOT).join("cgroup.procs").exists() {
            let none: Option<&str> = None;
            mount(none, Self::ROOT, Some("cgroup2"), MsFlags::empty(), none)?;
        }
        fs::write(Path::new(Self::ROOT).join("cgroup.subtree_control"), "+memory")?;
        fs::create_dir_all(Self::PATH)?;
        fs::write(Path::new(Self::PATH).join("cgroup.procs"), "0")?;
        Ok(Self)
    }

    /// What the kernel uses on behalf of the group: slab, page tables (nested ones too), whole pages, per-CPU memory.
    ///
    /// # Errors
    /// If the kernel does not tell.
    pub(crate) fn kernel_bytes(&self) -> Result<u64> {
        let text = fs::read_to_string(Path::new(Self::PATH).join("memory.stat"))?;
        let figure = text.lines().find_map(|line| line.strip_prefix("kernel ")).ok_or("memory.stat has no 'kernel'")?;
        Ok(figure.parse()?)
    }
}
