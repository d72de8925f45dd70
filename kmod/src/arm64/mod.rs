// SPDX-License-Identifier: GPL-2.0-only
//! What is AArch64's own of the module, under the names by which the rest uses it.

mod backends;
mod exits;
mod hal;
pub(crate) mod regs;
mod system;
mod vcpu;
mod vm;

use arm_vcpu::{ArmPerCpu, ArmVCpu, Capabilities};
use axvcpu_uapi::{exit::AxVCpuExitReason as Exit, run};
use vcpu_core::{
    npt::{PageSize, TableMemory},
    AxError, AxResult, HostPhysAddr,
};

pub(crate) use exits::{enter, in_window, show_all};
pub(crate) use arm_vcpu::{barrier_for_tables as tables_changed, Mailbox, NestedTable, Reply, TimerUpdate};
pub(crate) use backends::Backends;
pub(crate) use system::{describe, system_ioctl, usable};
pub(crate) use vcpu::{create_config, vcpu_ioctl, GENERAL_REGISTERS};
pub(crate) use vm::{message, new_vm, vm_ioctl, Message, VmState};

use kernel::sync::Arc;

use crate::{ffi, hal::Host};

/// A VM's interrupt controller.
pub(crate) type Gic = arm_vcpu::gic::Gic<Host>;

/// Whether vCPUs can run: on a kernel with pages of 4 KiB, as guests' memory is mapped page by page.
///
/// # Errors
/// As [`arm_vcpu::detect`].
pub(crate) fn detect() -> AxResult {
    if kernel::page::PAGE_SIZE != 4096 {
        return Err(AxError::Unsupported);
    }
    arm_vcpu::detect()
}

/// What [`detect`] has found wanting, for people.
pub(crate) fn missing_feature() -> Option<&'static str> {
    if kernel::page::PAGE_SIZE != 4096 {
        return Some("a kernel with pages of 4 KiB (it has been built for larger ones)");
    }
    arm_vcpu::missing_feature()
}

/// The backend of a vCPU.
pub(crate) type VCpu = ArmVCpu<Host, Arc<Gic>>;

/// What the backend keeps for each physical CPU.
pub(crate) type PerCpu = ArmPerCpu;

/// An empty nested page table, and the first guest physical address that it cannot map.
///
/// # Errors
/// `NoMemory`, or that there is no backend.
pub(crate) fn new_table(memory: &mut impl TableMemory) -> AxResult<(NestedTable, u64)> {
    let shape = Capabilities::host()?.shape;
    Ok((shape.new_table(memory)?, shape.levels().limit()))
}

/// What the run page may ask for.
pub(crate) const REQUESTS: u32 = run::REQUEST_LOAD_GENERAL;

/// Makes an exit for a nested page fault one for an access to what is no memory, decoded where the hardware has done so.
#[inline]
pub(crate) fn not_memory(vcpu: &mut VCpu, exit: &mut Exit) {
    vcpu.not_memory(exit);
}

/// Whether a table entry may not be replaced by another translation without being empty, and flushed, in between
/// (Arm ARM D8.16.1).
pub(crate) const BREAK_BEFORE_MAKE: bool = true;

/// Readies memory at `addr` for a guest that it is about to be mapped for. The guest may look at it with its caches off, past
/// what ours hold of it, and may run what the host has written there as data.
pub(crate) fn prepare_memory(addr: HostPhysAddr, size: u64) {
    // SAFETY: The caller has a reference to the host's page or pages there, so the direct map shows them.
    unsafe { arm_vcpu::clean_and_invalidate(ffi::phys_to_virt(addr), size as usize) };
}

/// The largest page that is mapped with interrupts off: [`prepare_memory`] takes its time with larger ones.
pub(crate) const LARGEST_IN_PLACE: PageSize = PageSize::Size4K;

/// The mailbox of a new vCPU.
///
/// # Errors
/// None.
pub(crate) fn new_mailbox() -> AxResult<Mailbox> {
    Ok(Mailbox::new())
}

/// A clock that takes less to read than the monotonic one: there is none.
#[inline]
pub(crate) fn ticks() -> Option<u64> {
    None
}

/// The nanoseconds of the monotonic clock's ticks.
#[inline]
pub(crate) fn ticks_to_ns(ticks: u64) -> u64 {
    ticks
}

/// Whether there are ports.
pub(crate) const HAS_PORTS: bool = false;

/// Whether width and value of a store to what is no memory are known without decoding the instruction.
pub(crate) const KNOWS_STORES: bool = true;
