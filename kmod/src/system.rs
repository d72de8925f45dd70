// SPDX-License-Identifier: GPL-2.0-only
//! `/dev/axvcpu`: what the module and the CPU can do, and the creation of VMs.

use axvcpu_uapi::{
    ioctl,
    run::RunPage,
    system::{CreateVm, SystemInfo},
    ABI_VERSION,
};
use kernel::prelude::*;

use crate::{abi, arch, aspace, fd, irqfd, vm, vm::Vm};

/// An ioctl of the device, which has no state.
///
/// # Errors
/// `ENOTTY` for an unknown number, and those of each.
pub(crate) fn ioctl(cmd: u32, arg: usize) -> Result<isize> {
    match cmd {
        ioctl::INFO => abi::write(arg, info()).map(|()| 0),
        ioctl::CREATE_VM => create_vm(abi::read(arg)?),
        _ => arch::system_ioctl(cmd, arg),
    }
}

fn info() -> SystemInfo {
    arch::describe(SystemInfo {
        abi_version: ABI_VERSION,
        max_vcpus: vm::MAX_VCPUS as u32,
        max_address_spaces: vm::MAX_ADDRESS_SPACES,
        max_regions: aspace::MAX_REGIONS as u32,
        run_page_size: core::mem::size_of::<RunPage>() as u32,
        vms: vm::count(),
        max_eventfds: irqfd::MAX_EVENTFDS as u32,
        ..SystemInfo::default()
    })
}

fn create_vm(arg: CreateVm) -> Result<isize> {
    abi::must_be_zero(&[arg.flags.into(), arg.reserved.into()])?;
    arch::usable().map_err(abi::errno)?;
    fd::install(Vm::new()?)
}
