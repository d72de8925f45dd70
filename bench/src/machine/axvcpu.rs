// SPDX-License-Identifier: MIT OR Apache-2.0
//! What machines of axvcpu have in common on all architectures: all but their vCPUs.

use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::sync::Arc;

use axvcpu_uapi::addr::GuestPhysAddr;
use axvcpu_uapi::client::{AddressSpace, IoAddress, IoPattern, Memory, Permissions, Slot, Vm};
use vmm_sys_util::eventfd::EventFd;

use super::{take, Cpu, Machine, Plan, Result};
use crate::arch::guest::{RAM_SIZE, VECTOR};

/// `fd` as the client library wants it.
fn borrow(fd: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: The descriptor is open as long as `fd`, from which the result is borrowed.
    unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) }
}

/// A machine with vCPUs of type `C`.
pub(crate) struct AxMachine<C> {
    pub(crate) cpus: Vec<Option<C>>,
    _ram: Slot<Memory>,
    other: Option<Slot<Memory>>,
    pub(crate) space: AddressSpace,
    pub(crate) vm: Vm,
    /// The address of the interrupt message whose data is [`VECTOR`].
    message: u64,
}

impl<C> AxMachine<C> {
    /// `vm` with the RAM of `plan`, and no vCPUs yet; a message with [`VECTOR`] is written to `message`.
    ///
    /// # Errors
    /// What axvcpu says.
    pub(crate) fn new(vm: Vm, plan: &Plan, message: u64) -> Result<Self> {
        let space = vm.create_address_space()?;
        let ram = space.map(GuestPhysAddr::new(0), Arc::clone(&plan.ram), 0, RAM_SIZE, Permissions::RWX)?;
        Ok(Self { cpus: Vec::new(), _ram: ram, other: None, space, vm, message })
    }
}

impl<C: Cpu + 'static> Machine for AxMachine<C> {
    fn take_cpu(&mut self, id: u32) -> Result<Box<dyn Cpu>> {
        take(&mut self.cpus, id)
    }

    fn signal(&self) -> Result<()> {
        Ok(self.vm.signal_msi(self.message, VECTOR.into())?)
    }

    fn attach_irqfd(&self, fd: &EventFd) -> Result<()> {
        Ok(self.vm.attach_interrupt(borrow(fd), self.message, VECTOR.into(), None)?)
    }

    fn attach_ioeventfd(&self, fd: &EventFd, at: IoAddress) -> Result<()> {
        if self.vm.attach_io(borrow(fd), IoPattern::any(at))? {
            Ok(())
        } else {
            Err("the kernel leaves it to userspace".into())
        }
    }

    fn map_anew(&mut self, at: u64, memory: &Arc<Memory>, offset: usize, size: usize) -> Result<()> {
        if let Some(slot) = self.other.take() {
            slot.unmap()?;
        }
        let slot = self.space.map(GuestPhysAddr::new(at), Arc::clone(memory), offset, size, Permissions::RWX)?;
        self.other = Some(slot);
        Ok(())
    }
}
