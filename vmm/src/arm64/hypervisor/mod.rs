// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the machine needs of a hypervisor on AArch64 beyond what it needs everywhere: a GICv3, and registers.
//!
//! | file | hypervisor |
//! |---|---|
//! | `axvcpu.rs` | the module axvcpu |
//! | `kvm/` | KVM |

use std::sync::Arc;

use axvcpu_uapi::arm64::{Fp, General, System};

use super::boot::Start;
use crate::device::line::Lines;
use crate::hypervisor::{Registers, Result, Vcpu, Vm};

pub mod axvcpu;
pub mod kvm;

/// A virtual machine whose interrupt controller, timers and system registers the hypervisor emulates.
pub trait Arm64Vm: Vm<Vcpu: Arm64Vcpu> {
    /// Whether the hypervisor starts and stops vCPUs itself when the guest asks for it by PSCI. If not, that is an exit.
    const STARTS_VCPUS: bool;

    /// Its interrupt lines, by INTID.
    type Lines: Lines + 'static;

    /// Creates the interrupt controller and `count` vCPUs, of which the first begins as `start` says: once, when the VM
    /// has its memory. The others do not run before they are started by PSCI.
    ///
    /// # Errors
    /// What the hypervisor reports.
    fn create_vcpus(&mut self, count: u32, start: &Start) -> Result<Vec<Self::Vcpu>>;

    /// The lines of shared peripheral interrupts, by INTID.
    fn lines(&self) -> Arc<Self::Lines>;
}

/// A virtual CPU with its part of the interrupt controller.
pub trait Arm64Vcpu: Vcpu + Registers<General> + Registers<System> + Registers<Fp> {
    /// ESR_EL2 of the last exit, if the hypervisor tells it.
    fn syndrome(&self) -> Option<u64>;
}
