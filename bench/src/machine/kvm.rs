// SPDX-License-Identifier: MIT OR Apache-2.0
//! What machines of KVM have in common on all architectures: their memory, and calls that are interrupted.

use std::sync::Arc;

use axvcpu_uapi::client::{Backing, Memory};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;

use super::Result;
use crate::arch::guest::RAM_SIZE;

/// The memory of a VM, and with it the VM: its RAM in slot 0, and one other piece.
pub(crate) struct Slots {
    pub(crate) vm: Arc<VmFd>,
    /// What slot 1 maps.
    other: Option<(u64, Arc<Memory>)>,
    _ram: Arc<Memory>,
}

impl Slots {
    /// `vm` with `ram`, which each vCPU has to keep, too.
    ///
    /// # Errors
    /// What KVM says.
    pub(crate) fn new(vm: Arc<VmFd>, ram: &Arc<Memory>) -> Result<Self> {
        let slots = Self { vm, other: None, _ram: Arc::clone(ram) };
        slots.map(0, 0, ram, 0, RAM_SIZE)?;
        Ok(slots)
    }

    /// As [`Machine::map_anew`](super::Machine::map_anew).
    ///
    /// # Errors
    /// What KVM says.
    pub(crate) fn map_anew(&mut self, at: u64, memory: &Arc<Memory>, offset: usize, size: usize) -> Result<()> {
        if let Some((at, memory)) = self.other.take() {
            self.map(1, at, &memory, 0, 0)?;
        }
        self.map(1, at, memory, offset, size)?;
        self.other = Some((at, Arc::clone(memory)));
        Ok(())
    }

    /// Maps `size` bytes of `memory`; none to unmap.
    fn map(&self, slot: u32, at: u64, memory: &Arc<Memory>, offset: usize, size: usize) -> Result<()> {
        let region = kvm_userspace_memory_region {
            slot,
            guest_phys_addr: at,
            memory_size: size as u64,
            userspace_addr: memory.start().as_ptr() as u64 + offset as u64,
            flags: 0,
        };
        // SAFETY: The memory is for guests (`Backing`) and outlives the VM's use of it: this object keeps a reference to what
        // is mapped, each vCPU one to the RAM, which is all that a loop can use once the machine is gone.
        unsafe { self.vm.set_user_memory_region(region) }?;
        Ok(())
    }
}

/// Whether a call was interrupted.
pub(crate) fn interrupted(error: kvm_ioctls::Error) -> bool {
    error.errno() == nix::errno::Errno::EINTR as i32
}
