// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the cases need of the host: its numbers, swap, and a control group.

use crate::harness::{CaseResult, Stop};
use std::fs;

/// A number in a file of procfs, sysfs or a control group: the one behind `key`, or the first.
pub(super) fn number(path: &str, key: &str) -> Result<u64, Stop> {
    let text = fs::read_to_string(path).map_err(|error| Stop::Fail(format!("{path}: {error}")))?;
    let line = text.lines().find_map(|line| line.strip_prefix(key));
    let word = line.and_then(|line| line.split_whitespace().next());
    word.and_then(|word| word.parse().ok()).ok_or(Stop::Fail(format!("{path} does not tell {key}")))
}

pub(super) fn needs_swap() -> CaseResult {
    if fs::read_to_string("/proc/swaps").map_or(0, |text| text.lines().count()) < 2 {
        return Err(Stop::Skip("the host has no swap".into()));
    }
    Ok(())
}

/// A control group of its own, in which this process is as long as the value lives.
pub(super) struct Group;

impl Group {
    const ROOT: &str = "/sys/fs/cgroup";
    const PATH: &str = "/sys/fs/cgroup/axvcpu-test";

    pub(super) fn enter() -> Result<Self, Stop> {
        if !fs::read_to_string(format!("{}/cgroup.subtree_control", Self::ROOT)).is_ok_and(|all| all.contains("memory"))
        {
            return Err(Stop::Skip("there are no control groups for memory".into()));
        }
        fs::create_dir(Self::PATH)?;
        let group = Self;
        fs::write(format!("{}/cgroup.procs", Self::PATH), std::process::id().to_string())?;
        Ok(group)
    }

    pub(super) fn file(name: &str) -> String {
        format!("{}/{name}", Self::PATH)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // What fails here shows as a failure of the next test that wants a group.
        let _ = fs::write(format!("{}/cgroup.procs", Self::ROOT), std::process::id().to_string());
        let _ = fs::remove_dir(Self::PATH);
    }
}
