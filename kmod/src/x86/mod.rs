// SPDX-License-Identifier: GPL-2.0-only
//! What is x86's own of the module, under the names by which the rest uses it.

mod backends;
mod clock;
mod exits;
mod ffi;
mod hal;
pub(crate) mod regs;
mod system;
mod ticks;
mod vcpu;
mod vm;

use axvcpu_uapi::{exit::AxVCpuExitReason as Exit, run};
use vcpu_core::{
    npt::{PageSize, TableMemory},
    AxResult, HostPhysAddr,
};
use x86_vcpu::{Capabilities, X86Hal, X86PerCpu, X86VCpu};

pub(crate) use exits::{enter, in_window, show_all};
pub(crate) use backends::Backends;
pub(crate) use system::{describe, system_ioctl, usable};
pub(crate) use ticks::{ticks, ticks_to_ns};
pub(crate) use vcpu::{create_config, vcpu_ioctl, GENERAL_REGISTERS};
pub(crate) use vm::{message, new_vm, vm_ioctl, VmState};
pub(crate) use x86_vcpu::{
    apic::{Message, TimerUpdate},
    NestedTable, Reply,
};

use crate::hal::Host;

/// The backend of a vCPU.
pub(crate) type VCpu = X86VCpu<Host>;

/// What anybody may post to a vCPU.
pub(crate) type Mailbox = x86_vcpu::apic::Mailbox<Host>;

/// What the backends keep for each physical CPU.
pub(crate) type PerCpu = X86PerCpu<Host>;

/// An empty nested page table, and the first guest physical address that it cannot map.
///
/// # Errors
/// `NoMemory`, or that there is no backend.
pub(crate) fn new_table(memory: &mut impl TableMemory) -> AxResult<(NestedTable, u64)> {
    let caps = Capabilities::host();
    let small_code = Host::mitigations().small_code;
    let table = x86_vcpu::new_table(x86_vcpu::detect()?, caps.npt_levels, small_code, memory)?;
    Ok((table, 1u64.checked_shl(caps.guest_phys_bits).unwrap_or(0).min(caps.npt_levels.limit())))
}

/// What the run page may ask for.
pub(crate) const REQUESTS: u32 = run::REQUEST_LOAD_GENERAL | run::REQUEST_INTERRUPT_WINDOW;

/// Makes an exit for a nested page fault one for an access to what is no memory: it stays what it is, as userspace decodes it.
#[inline]
pub(crate) fn not_memory(_vcpu: &mut VCpu, _exit: &mut Exit) {}

/// Whether a table entry may not be replaced by another translation without being empty, and flushed, in between.
pub(crate) const BREAK_BEFORE_MAKE: bool = false;

/// Readies memory for a guest that it is about to be mapped for: caches are coherent here.
pub(crate) fn prepare_memory(_addr: HostPhysAddr, _size: u64) {}

/// The largest page that is mapped with interrupts off.
pub(crate) const LARGEST_IN_PLACE: PageSize = PageSize::Size2M;

/// Makes what was stored to tables seen by their walks, before TLBs are flushed: it is already.
pub(crate) fn tables_changed() {}

/// The mailbox of a new vCPU. May sleep.
///
/// # Errors
/// `NoMemory`.
pub(crate) fn new_mailbox() -> AxResult<Mailbox> {
    VCpu::new_mailbox()
}

/// Whether there are ports.
pub(crate) const HAS_PORTS: bool = true;

/// Whether width and value of a store to what is no memory are known without decoding the instruction.
pub(crate) const KNOWS_STORES: bool = false;
