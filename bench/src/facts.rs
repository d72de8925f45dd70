// SPDX-License-Identifier: MIT OR Apache-2.0
//! What of the host matters for the figures: kernel, CPU, and what is done against speculative execution attacks.

use std::fs;
use std::process::ExitCode;

use crate::arch;
use crate::machine::Result;
use crate::report;

/// What the kernel knows of each weakness of the CPU, and what it does.
const WEAKNESSES: &str = "/sys/devices/system/cpu/vulnerabilities";

/// Prints them.
///
/// # Errors
/// If the host does not say.
pub(crate) fn print() -> Result<ExitCode> {
    let fact = |key: &str, value: &str| println!("{}", report::fact(key, value.trim()));
    fact("kernel", &fs::read_to_string("/proc/sys/kernel/osrelease")?);
    let cpu = fs::read_to_string("/proc/cpuinfo")?;
    let field = |name: &str| {
        let line = cpu.lines().find(|line| line.split(':').next().is_some_and(|key| key.trim() == name));
        line.and_then(|line| line.split_once(':')).map_or("", |(_, value)| value.trim())
    };
    let cpu_name: Vec<String> = arch::CPU_NAME.iter().map(|(word, name)| format!("{word}{}", field(name))).collect();
    fact("CPU", &cpu_name.join(", "));
    let flags: Vec<&str> = field(arch::FEATURES).split(' ').collect();
    let found: Vec<&str> = arch::BARRIER_FEATURES.iter().copied().filter(|flag| flags.contains(flag)).collect();
    fact("CPU has", &if found.is_empty() { "none of them".to_owned() } else { found.join(" ") });
    fact("command line", &fs::read_to_string("/proc/cmdline")?);
    let mut files: Vec<_> = fs::read_dir(WEAKNESSES)?.collect::<std::io::Result<_>>()?;
    files.sort_by_key(fs::DirEntry::file_name);
    for file in files {
        let text = fs::read_to_string(file.path())?;
        if text.trim() != "Not affected" {
            fact(&format!("vulnerability {}", file.file_name().to_string_lossy()), &text);
        }
    }
    Ok(ExitCode::SUCCESS)
}
