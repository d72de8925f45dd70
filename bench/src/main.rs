// SPDX-License-Identifier: MIT OR Apache-2.0
//! `axvcpu-bench`: measures under one hypervisor (`exits`, `boot`), tells about the host (`facts`), or makes
//! tables of it all (`report`).
//! scripts/bench calls it.
//!
//! Results are lines of `bench`, a hypervisor, a row and samples, on standard output once everything has been measured:
//! writing them in between would be measured too. Each row is measured by a process of its own: one that hangs or crashes
//! is a line of `failed`, and the others are what they would be without it.

#[cfg(target_arch = "aarch64")]
#[path = "arm64/mod.rs"]
mod arch;
#[cfg(target_arch = "x86_64")]
#[path = "x86/mod.rs"]
mod arch;
mod boot;
mod facts;
mod group;
mod machine;
mod measure;
mod report;
mod rows;
mod watchdog;
mod ways;
mod work;

use std::path::{Path, PathBuf};
use std::process::{Command as Process, ExitCode, Stdio};

use clap::{Parser, Subcommand};

use machine::Hypervisor;
use measure::Effort;
use rows::Row;
use watchdog::Watchdog;

/// Measures axvcpu and KVM in instructions of the host. Only meaningful on a CPU whose counter counts them:
/// see scripts/bench.
#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Measures exits and wake-ups.
    Exits {
        /// Whose.
        hypervisor: Hypervisor,
        /// Fewer and shorter samples.
        #[arg(long)]
        quick: bool,
        /// These rows only.
        #[arg(long, value_delimiter = ',')]
        only: Vec<Row>,
    },
    /// Measures one row in this process.
    #[command(hide = true)]
    Row {
        /// Whose.
        hypervisor: Hypervisor,
        /// Which.
        row: Row,
        /// Fewer and shorter samples.
        #[arg(long)]
        quick: bool,
    },
    /// Boots a Linux guest.
    Boot {
        /// Under which.
        hypervisor: Hypervisor,
        /// Its configuration.
        #[arg(default_value = "/lab/vm.toml")]
        config: PathBuf,
    },
    /// Tells what of the host matters: kernel, CPU, mitigations.
    Facts,
    /// Makes a table of the output of the others.
    Report {
        /// Outputs, each of one lab.
        files: Vec<PathBuf>,
        /// Exit with status 1 if a target is missed.
        #[arg(long)]
        strict: bool,
    },
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Exits { hypervisor, quick, only } => exits(hypervisor, quick, &only),
        Command::Row { hypervisor, row: which, quick } => row(hypervisor, which, Effort::new(quick)),
        Command::Boot { hypervisor, config } => boot(hypervisor, &config),
        Command::Facts => facts::print(),
        Command::Report { files, strict } => report::print(&files, strict),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("axvcpu-bench: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Has each row measured by a process of its own, and prints what they print when all are done.
fn exits(hypervisor: Hypervisor, quick: bool, only: &[Row]) -> machine::Result<ExitCode> {
    let mut results = String::new();
    for &row in Row::ALL.iter().filter(|row| only.is_empty() || only.contains(row)) {
        match row_apart(hypervisor, row, quick) {
            Ok(text) => results += &text,
            Err(error) => results += &(report::failure(hypervisor, row, &error.to_string()) + "\n"),
        }
    }
    print!("{results}");
    Ok(ExitCode::SUCCESS)
}

/// What a process says that measures `row`.
fn row_apart(hypervisor: Hypervisor, row: Row, quick: bool) -> machine::Result<String> {
    let mut process = Process::new("/proc/self/exe");
    process.args(["row", &report::key(hypervisor), &report::key(row)]).args(quick.then_some("--quick"));
    let child = process.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let watchdog = Watchdog::new(&child, watchdog::ROW)?;
    let output = child.wait_with_output();
    watchdog.end()?;
    let output = output?;
    if output.status.success() {
        return Ok(String::from_utf8(output.stdout)?);
    }
    let last_words = String::from_utf8_lossy(&output.stderr);
    Err(format!("{}: {}", output.status, last_words.lines().last().unwrap_or("nothing said")).into())
}

/// Measures one row here.
fn row(hypervisor: Hypervisor, row: Row, effort: Effort) -> machine::Result<ExitCode> {
    match arch::cases::measure(row, &*hypervisor.open()?, effort) {
        None => {}
        Some(Ok(samples)) => println!("{}", report::line(hypervisor, row, &samples)),
        Some(Err(error)) => println!("{}", report::failure(hypervisor, row, &error.to_string())),
    }
    Ok(ExitCode::SUCCESS)
}

fn boot(hypervisor: Hypervisor, config: &Path) -> machine::Result<ExitCode> {
    match boot::measure(hypervisor, config) {
        Ok(rows) => {
            for (row, value) in rows {
                println!("{}", report::line(hypervisor, row, &[value]));
            }
        }
        Err(error) => println!("{}", report::failure(hypervisor, Row::Boot, &error.to_string())),
    }
    Ok(ExitCode::SUCCESS)
}
