// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! [`Vm`]: a virtual machine.
#![allow(unsafe_code)]

use super::aspace::AddressSpace;
use super::error::{Error, Result};
use super::eventfd::IoEvents;
use super::sys;
use super::vcpu::Vcpu;
use crate::arm64::Gic;
use crate::ioctl;
use crate::layout::AbiStruct;
use crate::vm::{CreateAddressSpace, CreateVcpu, Msi, VmStats};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

/// A virtual machine. Cloning gives another handle of the same machine; its calls are legal from any thread.
#[derive(Clone, Debug)]
pub struct Vm {
    fd: Arc<OwnedFd>,
    io_events: Arc<IoEvents>,
    xsave_size: usize,
}

impl Vm {
    pub(super) fn new(fd: OwnedFd, xsave_size: usize) -> Self {
        Self { fd: Arc::new(fd), io_events: Arc::default(), xsave_size }
    }

    pub(super) fn io_events(&self) -> &IoEvents {
        &self.io_events
    }

    /// Creates an empty address space.
    ///
    /// # Errors
    /// [`Error::CreateAddressSpace`].
    pub fn create_address_space(&self) -> Result<AddressSpace> {
        // SAFETY: the structure holds no address, and the call returns a new file descriptor.
        let fd = unsafe { sys::create(self.as_fd(), ioctl::CREATE_ADDRESS_SPACE, &mut CreateAddressSpace::default()) };
        Ok(AddressSpace::new(fd.map_err(Error::CreateAddressSpace)?))
    }

    /// Creates vCPU number `id`. On x86 that is its local APIC id, and 0 is the boot processor.
    ///
    /// # Errors
    /// [`Error::CreateVcpu`]: `EEXIST` for a number in use, `EINVAL` for one that is too large. [`Error::MapRunPage`].
    pub fn create_vcpu(&self, id: u32) -> Result<Vcpu> {
        // SAFETY: the structure holds no address, and the call returns a new file descriptor.
        let fd = unsafe { sys::create(self.as_fd(), ioctl::CREATE_VCPU, &mut CreateVcpu { id, flags: 0 }) };
        Vcpu::new(fd.map_err(|errno| Error::CreateVcpu { id, errno })?, self.xsave_size)
    }

    /// Creates the VM's interrupt controller (AArch64): once, before the set-up of vCPUs that take part in it.
    ///
    /// # Errors
    /// [`Error::CreateGic`]: `EEXIST` the second time, `EINVAL` for a place or a number that is not possible.
    pub fn create_gic(&self, gic: Gic) -> Result<()> {
        let mut gic = gic;
        // SAFETY: the structure holds no address of this process.
        unsafe { sys::with(self.as_fd(), ioctl::CREATE_GIC, &mut gic) }.map_err(Error::CreateGic)?;
        Ok(())
    }

    /// Delivers a message-signalled interrupt to the in-kernel interrupt controllers. Does not wait for the guest.
    ///
    /// # Errors
    /// [`Error::SignalMsi`].
    pub fn signal_msi(&self, address: u64, data: u32) -> Result<()> {
        // SAFETY: the structure holds no address of this process.
        unsafe { sys::with(self.as_fd(), ioctl::SIGNAL_MSI, &mut Msi { address, data, flags: 0 }) }
            .map_err(Error::SignalMsi)?;
        Ok(())
    }

    /// Counters since the VM was created.
    ///
    /// # Errors
    /// [`Error::VmStats`].
    pub fn stats(&self) -> Result<VmStats> {
        let mut stats = VmStats::ZERO;
        // SAFETY: the structure holds no address.
        unsafe { sys::with(self.as_fd(), ioctl::VM_STATS, &mut stats) }.map_err(Error::VmStats)?;
        Ok(stats)
    }
}

impl AsFd for Vm {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
