// SPDX-License-Identifier: MIT OR Apache-2.0
//! A whole guest: axvmm from its start to the first words of the guest's userspace, and what axvmm is then.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use nix::time::{clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;

use crate::arch;
use crate::machine::{Hypervisor, Result};
use crate::rows::Row;
use crate::watchdog::{Watchdog, GUEST};

/// What the guest's init says first (scripts/lab/guest-init).
const FIRST_WORDS: &str = "Linux guest ";
/// Memory of the guest: mappings of that size are its own.
const MEMORY: u64 = 256 << 20;
/// Where debugfs counts KVM's exits.
const KVM_EXITS: &str = "/sys/kernel/debug/kvm/exits";

/// Boots the guest that `config` describes, once, and gives the rows that come from it.
///
/// # Errors
/// If it does not come to its userspace, or the host does not tell what is asked.
pub(crate) fn measure(hypervisor: Hypervisor, config: &Path) -> Result<Vec<(Row, f64)>> {
    let variant = std::env::temp_dir().join("axvcpu-bench.toml");
    fs::write(&variant, configuration(&fs::read_to_string(config)?, hypervisor))?;
    let exits_before = if hypervisor == Hypervisor::Kvm { kvm_exits()? } else { 0 };
    let mut axvmm = Command::new("axvmm")
        .arg("--config")
        .arg(&variant)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let watchdog = Watchdog::new(&axvmm, GUEST)?;
    let rows = watch(hypervisor, &mut axvmm);
    // It powers itself off, but after an error it may not.
    if rows.is_err() {
        axvmm.kill()?;
    }
    let status = axvmm.wait()?;
    watchdog.end()?;
    let (work, exits, resident) = rows?;
    if !status.success() {
        return Err(format!("axvmm ended with {status}").into());
    }
    let exits = exits.saturating_sub(exits_before);
    Ok(vec![(Row::Boot, work), (Row::BootExits, exits as f64), (Row::Resident, resident as f64)])
}

/// The configuration of the lab's guest with another command line, hypervisor and memory size. A guest that panics is to end,
/// not to spin for ever.
fn configuration(text: &str, hypervisor: Hypervisor) -> String {
    let mut lines = Vec::new();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("cmdline = \"") {
            lines.push(format!("cmdline = \"lab=report panic=-1 {rest}"));
        } else if line.starts_with("memory = ") {
            lines.push(format!("memory = {MEMORY}"));
        } else {
            lines.push(line.to_owned());
        }
        if line == "[base]" {
            lines.push(format!("hypervisor = \"{}\"", hypervisor.name().to_lowercase()));
        }
    }
    lines.join("\n") + "\n"
}

/// Waits for the guest's first words. Gives the ticks that axvmm and its guest have had the CPU, exits, and axvmm's resident
/// KiB.
fn watch(hypervisor: Hypervisor, axvmm: &mut Child) -> Result<(f64, u64, u64)> {
    let pid = axvmm.id();
    let mut output = BufReader::new(axvmm.stdout.take().ok_or("axvmm has no output")?);
    let mut line = Vec::new();
    loop {
        line.clear();
        if output.read_until(b'\n', &mut line)? == 0 {
            return Err("the guest did not come to its userspace".into());
        }
        if String::from_utf8_lossy(&line).contains(FIRST_WORDS) {
            break;
        }
    }
    let work = cpu_ticks(pid)?;
    let exits = match hypervisor {
        Hypervisor::Axvcpu => own_entries(pid)?,
        Hypervisor::Kvm => kvm_exits()?,
    };
    let resident = resident(pid)?;
    // What it says further is not looked at, but must be taken.
    std::io::copy(&mut output, &mut std::io::sink())?;
    Ok((work, exits, resident))
}

/// The time for which process `pid` has had the CPU, all its threads together, in user mode, kernel and guest, in ticks.
fn cpu_ticks(pid: u32) -> Result<f64> {
    let time = clock_gettime(clock_getcpuclockid(Pid::from_raw(pid.try_into()?))?)?;
    let seconds = time.tv_sec() as f64 + time.tv_nsec() as f64 * 1e-9;
    Ok(seconds * arch::frequency()?)
}

/// Exits of all guests of KVM so far.
fn kvm_exits() -> Result<u64> {
    Ok(fs::read_to_string(KVM_EXITS).map_err(|error| format!("{KVM_EXITS}: {error}"))?.trim().parse()?)
}

/// Entries of axvcpu's vCPUs that process `pid` has: each has had its exit.
fn own_entries(pid: u32) -> Result<u64> {
    let mut sum = 0;
    for file in fs::read_dir(format!("/proc/{pid}/fdinfo"))? {
        let text = fs::read_to_string(file?.path()).unwrap_or_default();
        if let Some(entries) = text.lines().find_map(|line| line.strip_prefix("entries:")) {
            sum += entries.trim().parse::<u64>()?;
        }
    }
    Ok(sum)
}

/// KiB of process `pid` in memory, but for mappings of the guest's size.
fn resident(pid: u32) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let figure = |line: &str, name: &str| {
        line.strip_prefix(name).and_then(|rest| rest.split_whitespace().next()).and_then(|figure| figure.parse().ok())
    };
    let (mut size, mut sum) = (0u64, 0u64);
    for line in text.lines() {
        size = figure(line, "Size:").unwrap_or(size);
        if let Some(resident) = figure(line, "Rss:").filter(|_| size < MEMORY >> 10) {
            sum += resident;
        }
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_is_changed_in_three_places() {
        let text = "[base]\nid = 1\n[kernel]\ncmdline = \"quiet\"\nmemory = \"64M\"\n";
        let expected =
            "[base]\nhypervisor = \"kvm\"\nid = 1\n[kernel]\ncmdline = \"lab=report panic=-1 quiet\"\nmemory = 268435456\n";
        assert_eq!(configuration(text, Hypervisor::Kvm), expected);
    }
}
