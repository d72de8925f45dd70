// SPDX-License-Identifier: GPL-2.0-only
//! Tables that vCPUs read on their exit paths without a lock, while others replace them as a whole (RCU).
//!
//! Locks: none here; a table's owner has one under which it is replaced, in process context, since that waits for readers.

use core::{
    ptr,
    sync::atomic::{AtomicPtr, Ordering},
};

use kernel::{bindings, prelude::*};

use crate::ffi::IrqOff;

/// A table that never changes once it can be seen.
///
/// # Invariants
/// `table` is null, for an empty table, or came from `KBox::into_raw` and is owned by this object.
pub(crate) struct Published<T> {
    table: AtomicPtr<KVVec<T>>,
}

// SAFETY: It owns elements that may be sent and shared, and hands out shared references only.
unsafe impl<T: Send + Sync> Send for Published<T> {}
// SAFETY: As above.
unsafe impl<T: Send + Sync> Sync for Published<T> {}

impl<T> Published<T> {
    /// An empty table.
    pub(crate) const fn new() -> Self {
        // INVARIANT: Null.
        Self { table: AtomicPtr::new(ptr::null_mut()) }
    }

    /// The table. It stays while interrupts are off: a grace period waits for that.
    #[inline]
    pub(crate) fn read<'a>(&'a self, _irq_off: &'a IrqOff) -> &'a [T] {
        // SAFETY: By the type invariant; and `replace` frees it only after a grace period, which does not end before
        // interrupts are on again here (Documentation/RCU/whatisRCU.rst, section 5: `synchronize_rcu` waits for stretches
        // with interrupts off too).
        unsafe { self.table.load(Ordering::Acquire).as_ref() }.map_or(&[], |table| table)
    }

    /// The table, for those who keep others from replacing it.
    ///
    /// # Safety
    /// Nobody calls [`replace`](Self::replace) while the result is used.
    pub(crate) unsafe fn current(&self) -> &[T] {
        // SAFETY: By the type invariant and the caller's promise.
        unsafe { self.table.load(Ordering::Acquire).as_ref() }.map_or(&[], |table| table)
    }

    /// Shows `new` from now on, and drops the old table when nobody reads it any more. May sleep.
    ///
    /// # Errors
    /// `ENOMEM`; nothing has changed then.
    ///
    /// # Safety
    /// One call at a time.
    pub(crate) unsafe fn replace(&self, new: KVVec<T>) -> Result {
        let new = if new.is_empty() { ptr::null_mut() } else { KBox::into_raw(KBox::new(new, GFP_KERNEL_ACCOUNT)?) };
        // INVARIANT: Null, or from `into_raw`.
        let old = self.table.swap(new, Ordering::AcqRel);
        if !old.is_null() {
            // SAFETY: Process context that may sleep. Expedited, since a program attaches hundreds in a row.
            unsafe { bindings::synchronize_rcu_expedited() };
            // SAFETY: By the type invariant; it cannot be reached any more, and those who had have left.
            drop(unsafe { KBox::from_raw(old) });
        }
        Ok(())
    }
}

impl<T> Drop for Published<T> {
    fn drop(&mut self) {
        let table = *self.table.get_mut();
        if !table.is_null() {
            // SAFETY: By the type invariant, and nobody has a reference to the object any more.
            drop(unsafe { KBox::from_raw(table) });
        }
    }
}
