// SPDX-License-Identifier: GPL-2.0-only
//! The part of a VM that is x86's own: interrupt messages between its local APICs, and when its clocks started.

use axvcpu_uapi::{ioctl, vm as abi_vm};
use kernel::{prelude::*, sync::Arc};
use vcpu_core::AxResult;
use x86_vcpu::{
    apic::{Message, Notice},
    pvclock::TimeBase,
};

use super::ffi;
use crate::{abi, shared::Shared, vm::Vm};

/// When the VM's paravirtual clocks started.
pub(crate) type VmState = TimeBase;

/// The state of a new VM.
pub(crate) fn new_vm() -> VmState {
    TimeBase::new(x86_vcpu::read_tsc(), ffi::tsc_khz(), ffi::tsc_stable())
}

/// An ioctl of a VM that only x86 has.
///
/// # Errors
/// `ENOTTY` for an unknown number, and those of each.
pub(crate) fn vm_ioctl(vm: &Vm, cmd: u32, arg: usize) -> Result<isize> {
    match cmd {
        ioctl::SIGNAL_MSI => vm.signal_msi(abi::read(arg)?),
        _ => Err(ENOTTY),
    }
}

/// The interrupt message of `data` to `address`.
///
/// # Errors
/// As [`Message::from_msi`].
pub(crate) fn message(_vm: &Vm, address: u64, data: u32) -> AxResult<Message> {
    Message::from_msi(address, data)
}

impl Vm {
    /// Delivers an interrupt message to the vCPUs it addresses. `sender` is the APIC id of the vCPU that sends it, if one
    /// does. From any context. Returns whether any vCPU accepted it.
    pub(crate) fn route(&self, message: &Message, sender: Option<u32>) -> bool {
        let notify = |vcpu: &Arc<Shared>, notice| match notice {
            Notice::Look => vcpu.notify(),
            Notice::Posted => vcpu.notify_by(ffi::notify_posted),
            Notice::Nothing => {}
        };
        message.route(sender, self.vcpus(), |vcpu| &vcpu.mailbox, notify) > 0
    }

    fn signal_msi(&self, arg: abi_vm::Msi) -> Result<isize> {
        abi::must_be_zero(&[arg.flags.into()])?;
        let message = Message::from_msi(arg.address, arg.data).map_err(|_| EINVAL)?;
        Ok(self.route(&message, None).into())
    }
}
