// SPDX-License-Identifier: GPL-2.0-only
//! What the backend keeps for each physical CPU: one record per CPU, made when the CPU comes online and kept until the
//! module goes.
//!
//! The virtualization extension itself is on only while a vCPU is bound, with preemption off, so a CPU that goes offline
//! or to sleep never has it on; all there is to undo is what a register remembers of our pages.

use core::{
    ptr::{self, NonNull},
    sync::atomic::{AtomicPtr, Ordering},
};

use kernel::{alloc::KVVec, bindings, cpu, prelude::*};
use vcpu_core::AxArchPerCpu;

use crate::{abi, arch::PerCpu as Record, ffi};

/// The records by CPU number, while [`PerCpu`] exists; otherwise null.
static TABLE: AtomicPtr<AtomicPtr<Record>> = AtomicPtr::new(ptr::null_mut());

/// The records of all CPUs.
///
/// # Invariants
/// `TABLE` points to the elements of `table`, one for each possible CPU. An element of an online CPU is not null.
pub(crate) struct PerCpu {
    table: KVVec<AtomicPtr<Record>>,
    hotplug_state: i32,
}

impl PerCpu {
    /// Makes the records of the CPUs that are online, and of others when they come. The CPU has a backend.
    ///
    /// # Errors
    /// `ENOMEM`, `ENOSPC` (no hotplug state is left).
    pub(crate) fn new() -> Result<Self> {
        let count = cpu::nr_cpu_ids() as usize;
        let mut table = KVVec::with_capacity(count, GFP_KERNEL)?;
        for _ in 0..count {
            table.push(AtomicPtr::new(ptr::null_mut()), GFP_KERNEL)?;
        }
        TABLE.store(table.as_mut_ptr(), Ordering::Release);
        // INVARIANT: From here on the hotplug callback makes a record before any user task can run on a new CPU, and the
        // set-up call makes those of the CPUs that are online. If it fails it takes nothing down, and `drop` does.
        let mut this = Self { table, hotplug_state: 0 };
        // SAFETY: The callback is valid until the state is removed in `drop`.
        let state = unsafe {
            bindings::__cpuhp_setup_state(
                bindings::cpuhp_state_CPUHP_AP_ONLINE_DYN,
                c"axvcpu:online".as_ptr().cast(),
                true,
                Some(online),
                Some(offline),
                false,
            )
        };
        if state < 0 {
            return Err(Error::from_errno(state));
        }
        this.hotplug_state = state;
        Ok(this)
    }
}

impl Drop for PerCpu {
    fn drop(&mut self) {
        if self.hotplug_state != 0 {
            // SAFETY: The state was set up by `new`, and is removed once. Calls `offline` for every CPU that is online.
            unsafe { bindings::__cpuhp_remove_state(self.hotplug_state, true) };
        }
        TABLE.store(ptr::null_mut(), Ordering::Release);
        for slot in self.table.iter() {
            let record = slot.swap(ptr::null_mut(), Ordering::AcqRel);
            if !record.is_null() {
                // SAFETY: The pointer came from `KBox::into_raw` in `online`. No vCPU exists any more, as each holds the
                // module through its file, so nobody uses the record.
                drop(unsafe { KBox::from_raw(record) });
            }
        }
    }
}

/// A CPU comes online: called on it, in its hotplug thread, before user tasks can run there.
extern "C" fn online(cpu: u32) -> c_int {
    let table = TABLE.load(Ordering::Acquire);
    if table.is_null() {
        return EINVAL.to_errno();
    }
    // SAFETY: The table has an element for each possible CPU and lives until the hotplug state has been removed.
    let slot = unsafe { &*table.add(cpu as usize) };
    if !slot.load(Ordering::Acquire).is_null() {
        return 0; // It was online before.
    }
    let record = match Record::new(cpu as usize) {
        Ok(record) => record,
        Err(error) => return abi::errno(error).to_errno(),
    };
    match KBox::new(record, GFP_KERNEL) {
        Ok(record) => {
            slot.store(KBox::into_raw(record), Ordering::Release);
            0
        }
        Err(_) => ENOMEM.to_errno(),
    }
}

/// A CPU goes offline, or the module goes: called on it, in its hotplug thread, when user tasks have left it.
extern "C" fn offline(_cpu: u32) -> c_int {
    let pinned = ffi::PreemptOff::new();
    // SAFETY: The CPU is online, so it has a record. Nobody else uses it: vCPUs are bound in user tasks only, and either
    // there are none here any more or the module goes and there are none at all.
    unsafe { current().as_mut() }.retire();
    drop(pinned);
    0
}

/// The record of the current CPU. Preemption is off, and a vCPU exists.
#[inline]
pub(crate) fn current() -> NonNull<Record> {
    let cpu = cpu::CpuId::current().as_u32() as usize;
    // SAFETY: A vCPU exists, so the module does and with it the table; it has an element for each possible CPU.
    let record = unsafe { (*TABLE.load(Ordering::Acquire).add(cpu)).load(Ordering::Acquire) };
    // SAFETY: This CPU is online, as it executes a user task, so its record has been made.
    unsafe { NonNull::new_unchecked(record) }
}
