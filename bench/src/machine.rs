// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the measurements need of a hypervisor, so that they are the same for both.

use std::sync::Arc;

use axvcpu_uapi::client::{IoAddress, Memory};
use vmm_sys_util::eventfd::EventFd;

use crate::arch;

pub(crate) mod axvcpu;
pub(crate) mod kvm;

/// Why a measurement could not be made: a sentence.
pub(crate) type Error = Box<dyn std::error::Error + Send + Sync>;
/// A result of a measurement.
pub(crate) type Result<T> = std::result::Result<T, Error>;

/// A hypervisor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub(crate) enum Hypervisor {
    /// `/dev/axvcpu`.
    Axvcpu,
    /// `/dev/kvm`.
    Kvm,
}

/// A guest to be made.
pub(crate) struct Plan {
    /// Virtual CPUs: 1 or 2.
    pub(crate) cpus: u32,
    /// Whether local APICs are emulated, in the kernel. A GIC always is.
    #[cfg_attr(target_arch = "aarch64", expect(dead_code))]
    pub(crate) apic: bool,
    /// The RAM at address 0.
    pub(crate) ram: Arc<Memory>,
}

/// A virtual machine.
pub(crate) trait Machine {
    /// Takes vCPU `id`, once.
    ///
    /// # Errors
    /// If it is gone.
    fn take_cpu(&mut self, id: u32) -> Result<Box<dyn Cpu>>;

    /// Sends [`VECTOR`](crate::arch::guest::VECTOR) to vCPU 0, as a device does with a message.
    ///
    /// # Errors
    /// What the hypervisor says.
    fn signal(&self) -> Result<()>;

    /// Has writes to `fd` send [`VECTOR`](crate::arch::guest::VECTOR) to vCPU 0.
    ///
    /// # Errors
    /// What the hypervisor says.
    fn attach_irqfd(&self, fd: &EventFd) -> Result<()>;

    /// Has writes to `at` add to `fd`, in the kernel.
    ///
    /// # Errors
    /// What the hypervisor says, or that it cannot.
    fn attach_ioeventfd(&self, fd: &EventFd, at: IoAddress) -> Result<()>;

    /// Maps `size` bytes of `memory` from `offset` at the guest physical address `at`, in place of what it mapped before,
    /// so that nothing of them is in the nested page table.
    ///
    /// # Errors
    /// What the hypervisor says.
    fn map_anew(&mut self, at: u64, memory: &Arc<Memory>, offset: usize, size: usize) -> Result<()>;
}

/// Takes vCPU `id` out of `cpus`.
///
/// # Errors
/// If it is gone.
pub(crate) fn take<C: Cpu + 'static>(cpus: &mut [Option<C>], id: u32) -> Result<Box<dyn Cpu>> {
    let cpu = cpus.get_mut(id as usize).and_then(Option::take).ok_or("no such vCPU")?;
    Ok(Box::new(cpu))
}

/// A virtual CPU.
pub(crate) trait Cpu: Send {
    /// Prepares for `turns` turns of the loop.
    ///
    /// # Errors
    /// What the hypervisor says.
    fn start(&mut self, turns: u64) -> Result<()>;

    /// Runs to the end of the loop, and answers exits.
    ///
    /// # Errors
    /// What the hypervisor says, or an exit that no loop has.
    fn run(&mut self) -> Result<()>;

    /// What the guest has counted: R14, or X14.
    ///
    /// # Errors
    /// What the hypervisor says.
    fn count(&self) -> Result<u64>;
}

impl Hypervisor {
    /// Its name.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Axvcpu => "axvcpu",
            Self::Kvm => "KVM",
        }
    }

    /// Opens its device, which makes any number of machines.
    ///
    /// # Errors
    /// If it cannot run guests here.
    pub(crate) fn open(self) -> Result<Box<dyn Factory>> {
        Ok(match self {
            Self::Axvcpu => Box::new(arch::axvcpu::Device::open()?),
            Self::Kvm => Box::new(arch::kvm::Device::open()?),
        })
    }
}

/// An open device.
pub(crate) trait Factory {
    /// Makes a machine, with memory prepared ([`guest::prepare`](crate::arch::guest::prepare)) and all vCPUs ready to
    /// [`start`](Cpu::start).
    ///
    /// # Errors
    /// What the hypervisor says.
    fn create(&self, plan: &Plan) -> Result<Box<dyn Machine>>;
}
