// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! Reads guest memory through the nested page table, in the short time after an exit in which the module guarantees that no
//! mapping is taken away: interrupts are off, and whoever takes one away waits until they are on again.

use core::marker::PhantomData;
use core::sync::atomic::{AtomicU64, AtomicU8, Ordering};

use vcpu_core::npt::{self, Format, Levels, Permissions};
use vcpu_core::{AxVCpuHal, GuestPhysAddr, HostPhysAddr};

use crate::linear::GuestMemory;

/// The memory behind a nested page table.
///
/// # Invariants
/// `root` is a table of `levels` levels in the format `F`, whose tables and pages stay as long as this object.
pub(crate) struct NestedMemory<H: AxVCpuHal, F: Format> {
    root: HostPhysAddr,
    levels: Levels,
    hal: PhantomData<(H, F)>,
}

impl<H: AxVCpuHal, F: Format> NestedMemory<H, F> {
    /// # Safety
    /// As the invariant says. The object must not outlive the stretch with interrupts off.
    pub(crate) unsafe fn new(root: HostPhysAddr, levels: Levels) -> Self {
        // INVARIANT: The caller's promise.
        Self { root, levels, hal: PhantomData }
    }
}

impl<H: AxVCpuHal, F: Format> GuestMemory for NestedMemory<H, F> {
    fn read(&self, gpa: u64, buffer: &mut [u8]) -> bool {
        let read_entry = |table: HostPhysAddr, index: usize| {
            // SAFETY: By the type invariant `table` is a live table of 512 entries, and the walk's index is below that. Others
            // change entries at the same time, so the load is atomic.
            unsafe { AtomicU64::from_ptr(H::phys_to_virt(table).cast::<u64>().add(index & 511)) }
                .load(Ordering::Acquire)
        };
        let Some(mapping) = npt::walk::<F>(self.root, self.levels, read_entry, GuestPhysAddr::new(gpa)) else {
            return false;
        };
        if !mapping.perms.contains(Permissions::READ) {
            return false;
        }
        let from = H::phys_to_virt(mapping.hpa);
        for (offset, byte) in buffer.iter_mut().enumerate() {
            // SAFETY: The page is mapped, so it stays (type invariant); the caller's buffer does not run over its end. Other
            // vCPUs may write it at the same time, so each byte is loaded atomically.
            *byte = unsafe { AtomicU8::from_ptr(from.add(offset)) }.load(Ordering::Relaxed);
        }
        true
    }
}
