// SPDX-License-Identifier: MIT OR Apache-2.0
//! What this program needs of a hypervisor: [`Vm`], [`Vcpu`] and [`Kick`]; and the hypervisors that have it.
//!
//! The vocabulary is that of the axvcpu ABI: its register sets, its events and its exits, each an owned value. Devices,
//! loaders and the run loop know nothing else, so a guest meets the same machine on every hypervisor. The run loop is
//! compiled for each of them; nothing is looked up at run time on its way.
//!
//! | file | hypervisor |
//! |---|---|
//! | `axvcpu.rs` | the module axvcpu, through the client of its ABI |
//! | `kvm/` | KVM, through kvm-ioctls |

use std::path::Path;

use axvcpu_uapi::addr::GuestPhysAddr;
use axvcpu_uapi::client::{self, Errno, Exit, Snapshot};
use axvcpu_uapi::vcpu::{Event, VcpuStats};
use axvcpu_uapi::vm::VmStats;
use axvcpu_uapi::x86::{Control, CpuidEntry, Debug, Events, General, Segments};

use crate::device::irq::MessageSink;
use crate::exit::ExitCode;
use crate::memory::Ram;

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

/// A virtual machine whose local APICs the hypervisor emulates; every other device is ours.
///
/// vCPUs may outlive it, and keep the guest's memory alive as long as they need it.
pub trait Vm: Sized {
    /// Its virtual CPUs.
    type Vcpu: Vcpu;

    /// Creates one with the hypervisor behind the device node `device`.
    ///
    /// # Errors
    /// Why that hypervisor cannot run a VM here and now.
    fn create(device: &Path) -> std::result::Result<Self, crate::error::Error>;

    /// What it can do at most.
    fn limits(&self) -> Limits;

    /// The CPUID leaves that a guest may be given, with every feature that host and hypervisor can offer.
    ///
    /// # Errors
    /// What the hypervisor reports.
    fn supported_cpuid(&self) -> Result<Vec<CpuidEntry>>;

    /// Gives the guest its RAM: once, before the first vCPU.
    ///
    /// # Errors
    /// What the hypervisor reports.
    fn map(&mut self, ram: &Ram) -> Result<()>;

    /// Creates vCPU `id`, which is its local APIC id, too. Number 0 starts in real mode at `entry`, below 4 GiB, with a
    /// code segment based at the address's upper bits; the others wait for INIT and SIPI.
    ///
    /// # Errors
    /// What the hypervisor reports.
    fn create_vcpu(&mut self, id: u32, entry: GuestPhysAddr, cpuid: &[CpuidEntry]) -> Result<Self::Vcpu>;

    /// What delivers interrupt messages to the local APICs.
    fn messages(&self) -> Box<dyn MessageSink>;

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
pub trait Vcpu:
    Registers<General> + Registers<Segments> + Registers<Control> + Registers<Debug> + Registers<Events> + Send + 'static
{
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

    /// Answers the last exit, an access to a system register, with a general protection fault.
    fn reply_fault(&mut self);

    /// Asks for (or no longer for) an `InterruptWindow` exit as soon as the guest can take an external interrupt.
    fn request_interrupt_window(&mut self, on: bool);

    /// Hands over the external interrupt `vector`, which the 8259s have acknowledged. Says whether the vCPU took it: it
    /// holds one at a time.
    ///
    /// # Errors
    /// What the hypervisor reports.
    fn interrupt(&mut self, vector: u8) -> Result<bool>;

    /// Queues an exception or another event for the next entry.
    ///
    /// # Errors
    /// What the hypervisor reports.
    fn inject(&mut self, event: &Event) -> Result<()>;

    /// The general registers at the last exit, as [`set_general`](Self::set_general) has changed them since.
    ///
    /// # Errors
    /// What the hypervisor reports.
    fn general(&self) -> Result<General>;

    /// Changes the general registers after an exit, cheaper than [`Registers::set`] where the hypervisor allows it.
    ///
    /// # Errors
    /// What the hypervisor reports.
    fn set_general(&mut self, general: &General) -> Result<()>;

    /// Control registers and segments at the last exit, if that wants an instruction decoded.
    fn snapshot(&self) -> Option<Snapshot>;

    /// The extended state (FPU, SSE, AVX, ...) in the standard format of XSAVE.
    ///
    /// # Errors
    /// What the hypervisor reports.
    fn xsave(&self) -> Result<Vec<u8>>;

    /// Writes the extended state; `area` has the length and format that [`xsave`](Self::xsave) gives.
    ///
    /// # Errors
    /// What the hypervisor reports.
    fn set_xsave(&mut self, area: &[u8]) -> Result<()>;

    /// Carries out a decoded access of the guest to its xAPIC page, at byte `offset`: a write of the given value, or a
    /// read. The value read or written, or `None` if no register is there. Hypervisors that decode such accesses
    /// themselves never see it called.
    ///
    /// # Errors
    /// What the hypervisor reports.
    fn apic_access(&mut self, offset: u32, write: Option<u32>) -> Result<Option<u32>>;

    /// Counters since it was created, as far as the hypervisor keeps them.
    fn stats(&self) -> Option<Stats<VcpuStats>>;
}

/// Makes a vCPU's [`run`](Vcpu::run) return, from any thread. It may outlive the vCPU.
pub trait Kick: Send + Sync {
    /// Makes the current run, or else the next, return `Interrupted`. Kicks do not add up.
    fn kick(&self);
}
