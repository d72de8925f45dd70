// SPDX-License-Identifier: GPL-2.0-only
//! What is x86's own of the module, under the names by which the rest uses it.

mod backends;
mod clock;
mod ffi;
mod hal;
pub(crate) mod regs;
mod run;
mod system;
mod vcpu;
mod vm;

use vcpu_core::{npt::TableMemory, AxResult};
use x86_vcpu::{Capabilities, X86PerCpu, X86VCpu};

pub(crate) use backends::Backends;
pub(crate) use system::{describe, system_ioctl, usable};
pub(crate) use vcpu::{create_config, vcpu_ioctl, GENERAL_REGISTERS};
pub(crate) use vm::{new_vm, vm_ioctl, VmState};
pub(crate) use x86_vcpu::{
    apic::{Mailbox, TimerUpdate},
    NestedTable, Reply,
};

use crate::hal::Host;

/// The backend of a vCPU.
pub(crate) type VCpu = X86VCpu<Host>;

/// What the backends keep for each physical CPU.
pub(crate) type PerCpu = X86PerCpu<Host>;

/// An empty nested page table, and the first guest physical address that it cannot map.
///
/// # Errors
/// `NoMemory`, or that there is no backend.
pub(crate) fn new_table(memory: &mut impl TableMemory) -> AxResult<(NestedTable, u64)> {
    let caps = Capabilities::host();
    let table = NestedTable::new(x86_vcpu::detect()?, caps.npt_levels, memory)?;
    Ok((table, 1u64.checked_shl(caps.guest_phys_bits).unwrap_or(0).min(caps.npt_levels.limit())))
}
