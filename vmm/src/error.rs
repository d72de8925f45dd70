// SPDX-License-Identifier: MIT OR Apache-2.0
//! Why a VM could not be started or run, and the exit code of each cause.
//!
//! Modules have error types of their own; this one gathers them for the program's edge.

use std::io;

use axvcpu_uapi::client::Errno;

use crate::config::{ConfigError, Problem};
use crate::exit::ExitCode;
use crate::hypervisor;
use crate::image::ImageError;

/// Anything that keeps a VM from starting, or the program from going on with it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The configuration.
    #[error("{0}")]
    Config(#[from] ConfigError),
    /// The kernel or another file that the guest is given.
    #[error("{0}")]
    Image(#[from] ImageError),
    /// The hypervisor.
    #[error("{0}")]
    Hypervisor(#[from] hypervisor::Error),
    /// The module cannot run vCPUs now.
    #[error("{reason}\n{cure}")]
    NotReady {
        /// `STATUS_*` of the module.
        status: u32,
        /// What is the matter.
        reason: &'static str,
        /// What to do about it.
        cure: &'static str,
    },
    /// The hypervisor lacks something that this program or the guest needs.
    #[error("{0}")]
    Unsuitable(String),
    /// Guest memory could not be allocated.
    #[error("cannot allocate {size} of guest memory: {reason}\nGive the guest less memory, or raise the limit (ulimit -v, the control group's memory.max).")]
    Memory {
        /// How much was asked for.
        size: crate::config::Bytes,
        /// Why not.
        reason: String,
    },
    /// A vCPU's thread cannot have a host CPU of its `phys_cpu_sets` entry.
    #[error("vCPU {vcpu} cannot run on host CPU {cpu}: {reason}\nChange its entry in phys_cpu_sets.")]
    Affinity {
        /// The vCPU.
        vcpu: u32,
        /// The host CPU.
        cpu: usize,
        /// Why not.
        reason: String,
    },
    /// Something the host refused, in words of its own.
    #[error("cannot {action}: {reason}")]
    Host {
        /// What was tried.
        action: String,
        /// Why it failed.
        reason: String,
    },
}

impl Error {
    /// The host refused to do `action`.
    pub fn host(action: impl Into<String>, reason: impl std::fmt::Display) -> Self {
        Self::Host { action: action.into(), reason: reason.to_string() }
    }

    /// The exit code that tells this cause from others.
    #[must_use]
    pub fn exit_code(&self) -> ExitCode {
        use axvcpu_uapi::system;
        match self {
            Self::Config(error) => match error.problem {
                Problem::Unreadable => ExitCode::ConfigUnreadable,
                Problem::Syntax => ExitCode::ConfigSyntax,
                Problem::UnknownKey => ExitCode::ConfigUnknownKey,
                Problem::Type => ExitCode::ConfigType,
                Problem::Value => ExitCode::ConfigValue,
                Problem::MemoryTooSmall => ExitCode::MemoryTooSmall,
                Problem::MemoryOverlap => ExitCode::MemoryOverlap,
                Problem::Unsupported => ExitCode::ConfigUnsupported,
            },
            Self::Image(error) => error.exit_code(),
            Self::Hypervisor(error) => error.exit_code(),
            Self::NotReady { status, .. } => match *status {
                system::STATUS_IN_USE => ExitCode::InUse,
                system::STATUS_DISABLED_BY_FIRMWARE => ExitCode::FirmwareDisabled,
                _ => ExitCode::NoVirtualization,
            },
            Self::Unsuitable(_) => ExitCode::AbiMismatch,
            Self::Memory { .. } => ExitCode::NoResources,
            Self::Affinity { .. } => ExitCode::ConfigUnsupported,
            Self::Host { .. } => ExitCode::HostError,
        }
    }
}

/// An I/O error in plain words, without the number that the standard library appends.
#[must_use]
pub fn describe_io(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => "there is no such file".into(),
        io::ErrorKind::PermissionDenied => "permission denied; make it readable for this user".into(),
        _ => match error.raw_os_error() {
            Some(number) => Errno::from_raw(number).desc().to_lowercase(),
            None => error.to_string(),
        },
    }
}
