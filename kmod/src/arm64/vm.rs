// SPDX-License-Identifier: GPL-2.0-only
//! The part of a VM that is AArch64's own: when its counter started, and its interrupt controller.

use arm_vcpu::{gic::Layout, Capabilities};
use axvcpu_uapi::{arm64 as abi_arm64, ioctl, vm as abi_vm};
use kernel::{
    prelude::*,
    sync::{Arc, SetOnce},
};
use vcpu_core::{AxError, AxResult};

use super::Gic;
use crate::{abi, vm::Vm};

/// What a VM keeps.
pub(crate) struct VmState {
    /// The host's counter when the guest's was 0.
    pub(crate) counter_origin: u64,
    /// The interrupt controller, as soon as there is one.
    pub(crate) gic: SetOnce<Arc<Gic>>,
}

/// The state of a new VM.
pub(crate) fn new_vm() -> VmState {
    VmState { counter_origin: arm_vcpu::counter(), gic: SetOnce::new() }
}

/// An ioctl of a VM that AArch64 does in its own way.
///
/// # Errors
/// `ENOTTY` for an unknown number, and those of each.
pub(crate) fn vm_ioctl(vm: &Vm, cmd: u32, arg: usize) -> Result<isize> {
    match cmd {
        ioctl::CREATE_GIC => vm.create_gic(&abi::read(arg)?),
        ioctl::SIGNAL_MSI => vm.signal_msi(abi::read(arg)?),
        _ => Err(ENOTTY),
    }
}

/// A message to the interrupt controller: one that sets or clears an SPI.
pub(crate) struct Message {
    /// The SPI's INTID.
    pub(crate) vector: u8,
    /// Whether its end is told: it can be, if the guest says that the SPI is level-triggered.
    pub(crate) level: bool,
}

/// The message of `data` to `address`.
///
/// # Errors
/// `Unsupported` if there is no interrupt controller, `InvalidInput` if it is no message of its.
pub(crate) fn message(vm: &Vm, address: u64, data: u32) -> AxResult<Message> {
    let gic = vm.arch().gic.as_ref().ok_or(AxError::Unsupported)?;
    let (intid, set) = gic.message(address, data).ok_or(AxError::InvalidInput)?;
    Ok(Message { vector: u8::try_from(intid).map_err(|_| AxError::InvalidInput)?, level: set })
}

impl Vm {
    fn create_gic(&self, arg: &abi_arm64::Gic) -> Result<isize> {
        let limit = Capabilities::host().map_err(abi::errno)?.shape.levels().limit();
        let layout = Layout::new(arg, limit).map_err(abi::errno)?;
        if self.arch().gic.as_ref().is_some() {
            return Err(EEXIST);
        }
        let gic = Arc::new(Gic::new(layout).map_err(abi::errno)?, GFP_KERNEL_ACCOUNT)?;
        if self.arch().gic.populate(gic) {
            Ok(0)
        } else {
            Err(EEXIST)
        }
    }

    fn signal_msi(&self, arg: abi_vm::Msi) -> Result<isize> {
        abi::must_be_zero(&[arg.flags.into()])?;
        let message = message(self, arg.address, arg.data).map_err(abi::errno)?;
        Ok(self.route(&message, None).into())
    }

    /// Delivers a message. From any context. Returns whether the interrupt controller took it.
    pub(crate) fn route(&self, message: &Message, _sender: Option<u32>) -> bool {
        self.set_spi(message.vector, message.level)
    }

    /// Sets or clears an SPI. From any context.
    pub(crate) fn set_spi(&self, intid: u8, set: bool) -> bool {
        let gic = self.arch().gic.as_ref();
        gic.is_some_and(|gic| gic.signal(intid.into(), set, |cpu| self.wake(cpu)))
    }

    /// vCPU `cpu` must look at its interrupts. From any context.
    pub(crate) fn wake(&self, cpu: usize) {
        if let Some(vcpu) = self.vcpus().find(|vcpu| vcpu.id as usize == cpu) {
            vcpu.mailbox.post();
            vcpu.notify();
        }
    }
}
