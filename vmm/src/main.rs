// SPDX-License-Identifier: MIT OR Apache-2.0
//! The program `axvmm`: command line, messages and exit status over the library.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode as Status;

use axvmm::config::{Bytes, Hypervisor, VmConfig};
use axvmm::control::Stop;
use axvmm::error::Error;
use axvmm::exit::ExitCode;
use axvmm::vm::{self, Options};
use axvmm::{doctor, terminal};
use clap::error::ErrorKind;
use clap::{Args, Parser, Subcommand};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{fmt, Layer as _};

/// Runs a virtual machine described by a TOML file, using /dev/axvcpu or KVM
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "Ctrl-A x ends the VM, Ctrl-A h shows help. The manual is axvmm(1), the file format vm.toml(5)."
)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    run: RunArgs,
    /// What carries the VM, whatever the configuration says
    #[arg(long, global = true, value_name = "NAME")]
    hypervisor: Option<Hypervisor>,
    /// The hypervisor's device node, if it is not /dev/axvcpu or /dev/kvm
    #[arg(long, global = true, value_name = "PATH")]
    device: Option<PathBuf>,
    /// What to log to standard error: error, warn, info, debug, trace, or a filter such as axvmm::vcpu=trace
    #[arg(long, global = true, value_name = "FILTER", env = "AXVMM_LOG", default_value = "warn")]
    log: String,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the VM; what `axvmm --config FILE` does
    Run(RunArgs),
    /// Check the configuration and everything it names, without running it
    Check {
        /// The configuration file
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
    },
    /// Find out whether this host can run VMs, and what to do if not
    Doctor,
}

#[derive(Args, Debug)]
struct RunArgs {
    /// The configuration file
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Show counters when the VM has ended
    #[arg(long)]
    stats: bool,
    /// Keep access to the file system and every system call while the guest runs
    #[arg(long)]
    no_sandbox: bool,
}

fn main() -> Status {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return match error.kind() {
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => ExitCode::Shutdown,
                _ => ExitCode::Usage,
            }
            .into_status();
        }
    };
    let Ok(filter) = cli.log.parse::<Targets>() else {
        return complain(ExitCode::Usage, &format!("{:?} is no log filter: try warn, info, debug or trace", cli.log));
    };
    let messages = fmt::layer().with_writer(std::io::stderr).with_ansi(false).with_filter(filter);
    tracing_subscriber::registry().with(messages).init();
    match cli.command {
        None if cli.run.config.is_none() => complain(
            ExitCode::Usage,
            "which VM? Name its configuration: axvmm --config vm.toml (axvmm --help shows all there is)",
        ),
        None => run(&cli.run, cli.hypervisor, cli.device),
        Some(Command::Run(args)) => run(&args, cli.hypervisor, cli.device),
        Some(Command::Check { config }) => check(&config, cli.hypervisor),
        Some(Command::Doctor) => examine(cli.hypervisor.unwrap_or_default(), cli.device.as_deref()),
    }
}

trait IntoStatus {
    fn into_status(self) -> Status;
}

impl IntoStatus for ExitCode {
    fn into_status(self) -> Status {
        Status::from(u8::from(self))
    }
}

fn complain(code: ExitCode, message: &str) -> Status {
    eprintln!("axvmm: {message}");
    code.into_status()
}

fn fail(error: &Error) -> Status {
    complain(error.exit_code(), &error.to_string())
}

fn run(args: &RunArgs, hypervisor: Option<Hypervisor>, device: Option<PathBuf>) -> Status {
    let Some(path) = &args.config else {
        return complain(ExitCode::Usage, "which VM? Name its configuration: axvmm run --config vm.toml");
    };
    let config = match VmConfig::load(path) {
        Ok(config) => config,
        Err(error) => return fail(&error.into()),
    };
    let options = Options { hypervisor, device, stats: args.stats, sandbox: !args.no_sandbox };
    let ended = match vm::run(&config, &options) {
        Ok(ended) => ended,
        Err(error) => {
            terminal::restore();
            return fail(&error);
        }
    };
    if let Some(stats) = &ended.stats {
        eprint!("{stats}");
    }
    if !ended.reason.is_quiet() {
        eprintln!("axvmm: {}: {}", config.name, ended.reason);
    }
    if let Stop::Signal(signal) = ended.reason {
        // So that the parent learns that it was this signal.
        let _ = nix::sys::signal::SigSet::from(signal).thread_unblock();
        let _ = nix::sys::signal::raise(signal);
    }
    Status::from(ended.reason.status())
}

fn check(path: &Path, hypervisor: Option<Hypervisor>) -> Status {
    let result = VmConfig::load(path).map_err(Error::from).and_then(|config| {
        let (_, loaded) = vm::prepare(&config)?;
        Ok((config, loaded))
    });
    match result {
        Ok((config, loaded)) => {
            let text = format!(
                "{}: good\n  name    {}\n  on      {}\n  CPUs    {}\n  memory  {}\n  kernel  {} ({}), starts at {:#x}\n",
                path.display(),
                config.name,
                hypervisor.unwrap_or(config.hypervisor).name(),
                config.vcpus.len(),
                Bytes(config.memory_size()),
                config.kernel.path.display(),
                loaded.format,
                loaded.start.entry,
            );
            // Nobody may be listening.
            let _ = std::io::stdout().write_all(text.as_bytes());
            ExitCode::Shutdown.into_status()
        }
        Err(error) => fail(&error),
    }
}

fn examine(hypervisor: Hypervisor, device: Option<&Path>) -> Status {
    let findings = doctor::examine(hypervisor, device);
    let lines: Vec<String> = findings.iter().map(ToString::to_string).collect();
    let text = lines.join("\n") + "\n";
    let _ = std::io::stdout().write_all(text.as_bytes());
    doctor::exit_code(&findings).into_status()
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn run_is_what_no_command_does() {
        let plain = Cli::parse_from(["axvmm", "--config", "a", "--stats", "--device", "/d"]);
        assert!(plain.command.is_none() && plain.run.stats);
        assert_eq!(
            (plain.run.config.as_deref(), plain.device.as_deref()),
            (Some(Path::new("a")), Some(Path::new("/d")))
        );
        assert_eq!(plain.hypervisor, None);
        let run = Cli::parse_from(["axvmm", "run", "--config", "a", "--hypervisor", "kvm"]);
        assert_eq!(run.hypervisor, Some(Hypervisor::Kvm));
        assert!(matches!(run.command, Some(Command::Run(args)) if args.config.as_deref() == Some(Path::new("a"))));
    }
}
