// SPDX-License-Identifier: GPL-2.0-only
//! Frames for nested page tables: allocated before the lock is taken, freed after the TLBs have been flushed.

use core::sync::atomic::{AtomicU64, Ordering};

use kernel::prelude::*;
use vcpu_core::{
    npt::{TableMemory, MAX_TABLES_PER_MAP},
    HostPhysAddr,
};

use crate::ffi;

/// Frames that one fault can need: tables, and one of the dirty log.
const STOCK: usize = MAX_TABLES_PER_MAP + 1;

/// Zeroed frames in stock: enough for one fault, when they have just been filled up.
pub(crate) struct Spare {
    frames: [Option<HostPhysAddr>; STOCK],
}

impl Spare {
    /// No frames: for operations that allocate none.
    pub(crate) const fn empty() -> Self {
        Self { frames: [None; STOCK] }
    }

    /// Fills the stock. May sleep.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub(crate) fn fill(&mut self) -> Result {
        for frame in self.frames.iter_mut().filter(|frame| frame.is_none()) {
            *frame = Some(ffi::alloc_pages(0).ok_or(ENOMEM)?);
        }
        Ok(())
    }
}

impl Drop for Spare {
    fn drop(&mut self) {
        for frame in self.frames.iter_mut().filter_map(Option::take) {
            // SAFETY: The frame came from `alloc_pages(0)` and has not been handed out.
            unsafe { ffi::free_pages(frame, 0) };
        }
    }
}

/// Frames that no table refers to any more but that a CPU may still be walking: a chain through their first words.
///
/// The link is page-aligned, so as a table entry it reads as "not present" in every format.
#[derive(Default)]
pub(crate) struct Retired {
    head: Option<HostPhysAddr>,
}

impl Retired {
    fn push(&mut self, frame: HostPhysAddr) {
        let link = self.head.map_or(0, HostPhysAddr::as_u64);
        entry(frame, 0).store(link, Ordering::Relaxed);
        self.head = Some(frame);
    }

    /// Frees them.
    ///
    /// # Safety
    /// No CPU walks the tables that they belonged to, by a TLB flush since they were retired.
    pub(crate) unsafe fn release(&mut self) {
        while let Some(frame) = self.head.take() {
            let next = entry(frame, 0).load(Ordering::Relaxed);
            self.head = (next != 0).then(|| HostPhysAddr::new(next));
            // SAFETY: The frame came from `alloc_pages(0)` by way of `Spare`, and nothing uses it by the caller's promise.
            unsafe { ffi::free_pages(frame, 0) };
        }
    }
}

/// One entry of a table.
#[inline]
fn entry<'a>(table: HostPhysAddr, index: usize) -> &'a AtomicU64 {
    // SAFETY: `table` is a frame of ours that lives as long as the tables do, or is retired; the index is masked to the 512
    // entries of a frame. Hardware may write accessed and dirty bits at any time, which atomics allow for.
    unsafe { AtomicU64::from_ptr(ffi::phys_to_virt(table).cast::<u64>().add(index & 511)) }
}

/// Loads one entry of a table.
#[inline]
pub(crate) fn load(table: HostPhysAddr, index: usize) -> u64 {
    entry(table, index).load(Ordering::Acquire)
}

/// What the engine gets.
pub(crate) struct Memory<'a> {
    pub(crate) spare: &'a mut Spare,
    pub(crate) retired: &'a mut Retired,
}

impl TableMemory for Memory<'_> {
    fn alloc(&mut self) -> Option<HostPhysAddr> {
        self.spare.frames.iter_mut().find_map(Option::take)
    }

    fn alloc_root(&mut self, order: u32) -> Option<HostPhysAddr> {
        if order == 0 {
            self.alloc()
        } else {
            ffi::alloc_single_pages(order)
        }
    }

    fn free(&mut self, table: HostPhysAddr) {
        self.retired.push(table);
    }

    fn give_back(&mut self, frame: HostPhysAddr) {
        match self.spare.frames.iter_mut().find(|slot| slot.is_none()) {
            Some(slot) => *slot = Some(frame),
            // It came from there, so there is room; if there were none, it would be freed with the rest.
            None => self.free(frame),
        }
    }

    #[inline]
    fn read(&self, table: HostPhysAddr, index: usize) -> u64 {
        load(table, index)
    }

    #[inline]
    fn write(&mut self, table: HostPhysAddr, index: usize, value: u64) {
        entry(table, index).store(value, Ordering::Release);
    }
}
