// SPDX-License-Identifier: MIT OR Apache-2.0
//! Memory of the process, of whatever kind, for a guest: what the host does with it is done by the cases.

use crate::harness::{CaseResult, Stop};
use crate::machine::Machine;
use axvcpu_uapi::addr::GuestPhysAddr;
use axvcpu_uapi::client::{Backing, Permissions, Slot};
use nix::sys::mman::{madvise, mmap, mmap_anonymous, munmap, MapFlags, MmapAdvise, ProtFlags};
use std::ffi::c_void;
use std::fs;
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

/// Where the memory under test is for the guest.
pub(super) const BASE: u64 = 0x100_0000;
pub(super) const PAGE: usize = 0x1000;
pub(super) const LARGE: usize = 2 << 20;

/// A mapping of the process, of whatever kind.
pub(super) struct Mapping {
    pub(super) start: NonNull<u8>,
    pub(super) size: usize,
}

// SAFETY: The mapping belongs to the process, not to a thread, and its bytes are accessed atomically.
unsafe impl Send for Mapping {}
// SAFETY: As above.
unsafe impl Sync for Mapping {}
// SAFETY: The range stays mapped as long as the value; only guests and the atomic accesses below use it. Where a test takes
// pages or rights away, the guest loses them with the process, which is what is tested.
unsafe impl Backing for Mapping {
    fn start(&self) -> NonNull<u8> {
        self.start
    }
    fn size(&self) -> usize {
        self.size
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: Mapped by one of the functions below, and slots hold the value, so nothing uses it any more. It cannot fail.
        let _ = unsafe { munmap(self.start.cast(), self.size) };
    }
}

pub(super) const BOTH: ProtFlags = ProtFlags::PROT_READ.union(ProtFlags::PROT_WRITE);

impl Mapping {
    /// Anonymous memory, private or shared with children.
    pub(super) fn anonymous(size: usize, flags: MapFlags) -> Result<Self, Stop> {
        let length = NonZeroUsize::new(size).ok_or(Stop::Fail("no size".into()))?;
        // SAFETY: A new mapping at an address of the kernel's choice disturbs no existing memory.
        let start = unsafe { mmap_anonymous(None, length, BOTH, flags) }?;
        Ok(Self { start: start.cast(), size })
    }

    /// One huge page, if the host has one to give when it is first touched.
    pub(super) fn huge_page() -> Result<Self, Stop> {
        let whole = std::mem::ManuallyDrop::new(Self::anonymous(2 * LARGE, MapFlags::MAP_PRIVATE)?);
        let before = whole.start.as_ptr().align_offset(LARGE);
        let parts = [(0, before), (before, LARGE), (before + LARGE, LARGE - before)];
        // SAFETY: Inside the mapping, which is given up in favour of its parts.
        let [_, page, _] = parts.map(|(offset, size)| Self { start: unsafe { whole.start.add(offset) }, size });
        page.advise(0, LARGE, MmapAdvise::MADV_HUGEPAGE)?;
        Ok(page)
    }

    /// Of a file, shared or private.
    pub(super) fn file(file: &fs::File, size: usize, flags: MapFlags) -> Result<Self, Stop> {
        let length = NonZeroUsize::new(size).ok_or(Stop::Fail("no size".into()))?;
        // SAFETY: As above.
        let start = unsafe { mmap(None, length, BOTH, flags, file, 0) }?;
        Ok(Self { start: start.cast(), size })
    }

    /// The word at an offset.
    fn word(&self, offset: usize) -> &AtomicU64 {
        assert!(offset % 8 == 0 && offset < self.size);
        // SAFETY: Inside the mapping, aligned, and accessed atomically only.
        unsafe { AtomicU64::from_ptr(self.start.as_ptr().add(offset).cast()) }
    }

    pub(super) fn get(&self, offset: usize) -> u64 {
        self.word(offset).load(Ordering::Relaxed)
    }

    pub(super) fn set(&self, offset: usize, value: u64) {
        self.word(offset).store(value, Ordering::Relaxed);
    }

    pub(super) fn address(&self, offset: usize) -> NonNull<c_void> {
        assert!(offset < self.size);
        // SAFETY: Inside the mapping.
        unsafe { self.start.add(offset) }.cast()
    }

    pub(super) fn advise(&self, offset: usize, size: usize, advice: MmapAdvise) -> CaseResult {
        // SAFETY: Inside the mapping; the advice may drop its content, which the callers know.
        Ok(unsafe { madvise(self.address(offset), size, advice) }?)
    }

    /// Has everything written to swap.
    pub(super) fn page_out(&self) -> CaseResult {
        self.advise(0, self.size, MmapAdvise::MADV_PAGEOUT)
    }
}

/// Maps all of it into the machine at [`BASE`].
pub(super) fn map(m: &Machine, mapping: Mapping) -> Result<(Arc<Mapping>, Slot<Mapping>), Stop> {
    let mapping = Arc::new(mapping);
    let slot = m.space.map_all(GuestPhysAddr::new(BASE), Arc::clone(&mapping), Permissions::RWX)?;
    Ok((mapping, slot))
}
