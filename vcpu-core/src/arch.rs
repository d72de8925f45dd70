// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The trait that a CPU virtualization backend implements, as the ArceOS hypervisor defines it.

use crate::{AxResult, AxVCpuExitReason, GuestPhysAddr, HostPhysAddr};

/// One virtual CPU of one architecture.
///
/// [`AxVCpu`](crate::AxVCpu) wraps an implementation and makes sure that the methods are called in the order each documents,
/// so a backend may rely on it.
pub trait AxArchVCpu: Sized {
    /// What [`new`](Self::new) needs.
    type CreateConfig;
    /// What [`setup`](Self::setup) needs.
    type SetupConfig;

    /// Creates a vCPU.
    ///
    /// # Errors
    /// [`AxError::NoMemory`](crate::AxError::NoMemory), or what the configuration makes impossible.
    fn new(config: Self::CreateConfig) -> AxResult<Self>;

    /// Sets the address of the first instruction. Called once, before [`setup`](Self::setup).
    ///
    /// # Errors
    /// If the architecture cannot start there.
    fn set_entry(&mut self, entry: GuestPhysAddr) -> AxResult;

    /// Sets the root of the nested page table. Called once, before [`setup`](Self::setup).
    ///
    /// # Errors
    /// If the hardware cannot use such a root.
    fn set_ept_root(&mut self, ept_root: HostPhysAddr) -> AxResult;

    /// Completes the vCPU. Called once, after [`set_entry`](Self::set_entry) and [`set_ept_root`](Self::set_ept_root).
    ///
    /// # Errors
    /// What the configuration makes impossible; the vCPU can then be set up again with another one.
    fn setup(&mut self, config: Self::SetupConfig) -> AxResult;

    /// Enters the guest and returns at the next VM exit. Exits that the backend has handled itself come back as
    /// [`AxVCpuExitReason::Nothing`], so that the caller's check whether it must stop stands between any two entries.
    ///
    /// Called on a bound vCPU with host interrupts disabled; returns with them disabled.
    ///
    /// # Errors
    /// Only for a vCPU that can never run again. A refused entry is an exit reason.
    fn run(&mut self) -> AxResult<AxVCpuExitReason>;

    /// Loads the vCPU's state onto the current physical CPU. The caller has disabled preemption until
    /// [`unbind`](Self::unbind).
    ///
    /// # Errors
    /// [`AxError::HardwareBusy`](crate::AxError::HardwareBusy) if another hypervisor owns this CPU. Nothing is loaded then.
    fn bind(&mut self) -> AxResult;

    /// Takes the vCPU's state off the current physical CPU and restores the host's.
    ///
    /// # Errors
    /// None that leaves the state on the CPU.
    fn unbind(&mut self) -> AxResult;

    /// Sets general register `reg` (in the hardware's encoding). An unknown register number is ignored;
    /// check it before the call.
    fn set_gpr(&mut self, reg: usize, val: usize);
}

/// What a backend keeps for each physical CPU.
pub trait AxArchPerCpu: Sized {
    /// Makes the record of one CPU.
    ///
    /// # Errors
    /// [`AxError::NoMemory`](crate::AxError::NoMemory).
    fn new(cpu_id: usize) -> AxResult<Self>;

    /// Whether the virtualization extension is switched on, on the current CPU, by us.
    fn is_enabled(&self) -> bool;

    /// Switches the extension on, on the current CPU. Preemption is off.
    ///
    /// # Errors
    /// [`AxError::HardwareBusy`](crate::AxError::HardwareBusy) if another hypervisor has switched it on.
    fn hardware_enable(&mut self) -> AxResult;

    /// Switches it off again, leaving the CPU as it was found.
    ///
    /// # Errors
    /// None that leaves it switched on.
    fn hardware_disable(&mut self) -> AxResult;
}
