// SPDX-License-Identifier: MIT OR Apache-2.0
//! What this program needs of a hypervisor: [`Vm`], [`Vcpu`] and [`Kick`]; and the hypervisors that have it.
//!
//! The vocabulary is that of the axvcpu ABI: its register sets, its events and its exits, each an owned value. Devices,
//! loaders and the run loop know nothing else, so a guest meets the same machine on every hypervisor. The run loop is
//! compiled for each of them; nothing is looked up at run time on its way. What only one architecture's CPUs have is in
//! traits of its own beyond these, among the architecture's files.
//!
//! | file | hypervisor |
//! |---|---|
//! | `axvcpu.rs` | the module axvcpu, through the client of its ABI |
//! | `kvm/` | KVM, through kvm-ioctls |

use std::path::Path;

use axvcpu_uapi::client::{self, Errno, Exit};
use axvcpu_uapi::vcpu::VcpuStats;
use axvcpu_uapi::vm::VmStats;

use crate::exit::ExitCode;
use crate::memory::Ram;
use crate::sandbox::Ioctls;

pub mod axvcpu;
pub mod kvm;

/// What a hypervisor refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The module axvcpu.
    #[error("{0}")]
    Axvcpu(#[from] client::Error),
    /// KVM.
    #[error("{0}")]
    Kvm(#[from] kvm::Error),
}

/// A result of a hypervisor.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// The exit code that tells this cause from others.
    #[must_use]
    pub fn exit_code(&self) -> ExitCode {
        let error = match self {
            Self::Axvcpu(error) => error,
            Self::Kvm(error) => return error.exit_code(),
        };
        match (error, error.errno()) {
            (client::Error::Open { .. }, Some(Errno::EACCES | Errno::EPERM)) => ExitCode::NoPermission,
            (client::Error::Open { .. }, _) => ExitCode::NoDevice,
            (client::Error::AbiVersion { .. } | client::Error::RunPageSize { .. }, _)
            | (client::Error::NotAxvcpu { .. }, _) => ExitCode::AbiMismatch,
            (_, Some(Errno::EBUSY)) => ExitCode::InUse,
            (_, Some(Errno::ENODEV)) => ExitCode::NoVirtualization,
            (_, Some(Errno::ENOMEM | Errno::ENOSPC | Errno::EMFILE | Errno::ENFILE)) => ExitCode::NoResources,
            _ => ExitCode::HostError,
        }
    }
}

/// What a hypervisor has counted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stats<T> {
    /// The module axvcpu, in the form of its ABI.
    Axvcpu(T),
    /// KVM, by its own names.
    Kvm(Vec<(String, u64)>),
}

/// What a hypervisor can do at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// vCPUs of one VM. Their ids are below it.
    pub vcpus: u32,
    /// Width of a guest physical address in bits.
    pub guest_phys_bits: u32,
}

/// A virtual machine whose interrupt controllers next to the CPUs the hypervisor emulates; every other device is ours.
///
/// vCPUs may outlive it, and keep the guest's memory alive as long as they need it.
pub trait Vm: Sized {
    /// Its virtual CPUs.
    type Vcpu: Vcpu;

    /// The ioctls that are behind the methods of vCPUs, interrupt messages, and `stats`, and behind dropping
    /// all of them: what the program may ask for while the guest runs and when it has ended.
    const IOCTLS: Ioctls;

    /// Creates one with the hypervisor behind the device node `device`.
    ///
    /// # Errors
    /// Why that hypervisor cannot run a VM here and now.
    fn create(device: &Path) -> std::result::Result<Self, crate::error::Error>;

    /// What it can do at most.
    fn limits(&self) -> Limits;

    /// Gives the guest its RAM: once, before the first vCPU.
    ///
    /// # Errors
    /// What the hypervisor reports.
    fn map(&mut self, ram: &Ram) -> Result<()>;

    /// Counters since it was created, as far as the hypervisor keeps them.
    fn stats(&self) -> Option<Stats<VmStats>>;
}

/// Reads and writes one of a vCPU's register sets, while it does not run.
pub trait Registers<S> {
    /// Reads the set.
    ///
    /// # Errors
    /// What the hypervisor reports.
    fn get(&self) -> Result<S>;

    /// Writes the set. One that is refused leaves the vCPU as it was.
    ///
    /// # Errors
    /// What the hypervisor reports: values that the architecture forbids, above all.
    fn set(&mut self, set: &S) -> Result<()>;
}

/// A virtual CPU. One thread uses it; everyone else has a [`Kick`].
pub trait Vcpu: Send + 'static {
    /// Runs the guest until an exit that the caller must handle, first carrying out what was asked for since the last
    /// one. A kick or a signal ends it with `Interrupted`.
    ///
    /// # Errors
    /// What the hypervisor reports; the vCPU is unharmed.
    fn run(&mut self) -> Result<Exit>;

    /// A handle with which any thread can make [`run`](Self::run) return.
    fn kicker(&self) -> Box<dyn Kick>;

    /// Answers the last exit, a read or a hypercall, with `value`.
    fn reply(&mut self, value: u64);

    /// Answers the last exit, an access to a system register, with the exception that the CPU raises for one it has not.
    fn reply_fault(&mut self);

    /// Counters since it was created, as far as the hypervisor keeps them.
    fn stats(&self) -> Option<Stats<VcpuStats>>;
}

/// Makes a vCPU's [`run`](Vcpu::run) return, from any thread. It may outlive the vCPU.
pub trait Kick: Send + Sync {
    /// Makes the current run, or else the next, return `Interrupted`. Kicks do not add up.
    fn kick(&self);
}
