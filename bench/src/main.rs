// SPDX-License-Identifier: MIT OR Apache-2.0
//! `axvcpu-bench`: measures under one hypervisor (`exits`, `boot`), tells about the host (`facts`), or makes
//! tables of it all (`report`).
//! scripts/bench calls it.
//!
//! Results are lines of `bench`, a hypervisor, a row and samples, on standard output once everything has been measured:
//! writing them in between would be measured too.

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
mod ways;
mod work;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use machine::Hypervisor;
use measure::Effort;
use rows::Row;

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
        Command::Exits { hypervisor, quick, only } => exits(hypervisor, Effort::new(quick), &only),
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

fn exits(hypervisor: Hypervisor, effort: Effort, only: &[Row]) -> machine::Result<ExitCode> {
    let device = hypervisor.open()?;
    let mut lines = Vec::new();
    for &row in Row::ALL.iter().filter(|row| only.is_empty() || only.contains(row)) {
        match arch::cases::measure(row, &*device, effort) {
            None => {}
            Some(Ok(samples)) => lines.push(report::line(hypervisor, row, &samples)),
            Some(Err(error)) => lines.push(report::failure(hypervisor, row, &error.to_string())),
        }
    }
    for line in lines {
        println!("{line}");
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
