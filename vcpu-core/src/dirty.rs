// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The dirty log: which pages of a range of guest memory have been written since they were last asked for.
//!
//! A page that is clean in the log is mapped without write permission, by a leaf of its own size; a write faults, and the
//! fault marks it and gives the permission. So the log and the nested page table go together, and what they promise is
//! promised by the two functions here that a fault and a reader call: [`DirtyLog::admit`] says how a page may be mapped, and
//! [`DirtyLog::take`] clears bits and takes the permission away again. Both are called under the address space's lock, and the
//! TLBs must be flushed before a reader relies on what it has taken: until then a CPU may write by a translation that it
//! has cached, which is all right as the page has been reported, and its content is read after the flush.
//!
//! Bits are kept in frames of 32768, one for 128 MiB of guest memory, made when a page there is first written.

use core::ops::Range;

use crate::{
    npt::{Flush, PageSize, Permissions, TableMemory, ENTRIES, FRAME_SIZE},
    AxError, AxResult, GuestPhysAddr, HostPhysAddr,
};

/// Pages per word.
const WORD: u64 = 64;
/// Pages per frame.
const FRAME: u64 = ENTRIES as u64 * WORD;

/// Guest bytes per word of the log: ranges are multiples of it.
pub const GRANULE: u64 = WORD * FRAME_SIZE;

/// The log of a range of guest physical memory. `S` holds a place for each frame.
pub struct DirtyLog<S> {
    start: u64,
    end: u64,
    frames: S,
    /// Places of `frames` that are taken.
    used: u64,
}

/// Some words of the log, taken out: see [`DirtyLog::take`].
pub struct Taken {
    /// Pages that were dirty.
    pub pages: u64,
    /// Whether TLBs must be flushed before the pages are read.
    pub flush: Flush,
}

/// How many places for frames the log of `size` bytes at `start` needs.
pub const fn frames_for(size: u64) -> u64 {
    size.div_ceil(FRAME * FRAME_SIZE)
}

impl<S: core::ops::DerefMut<Target = [Option<HostPhysAddr>]>> DirtyLog<S> {
    /// A log in which every page is clean; `frames` has [`frames_for`] places, all empty.
    ///
    /// # Errors
    /// [`AxError::InvalidInput`]: the range is empty, wraps, or is not in multiples of [`GRANULE`]; or there are too few places.
    pub fn new(start: GuestPhysAddr, size: u64, frames: S) -> AxResult<Self> {
        let end = start.checked_add(size).ok_or(AxError::InvalidInput)?.as_u64();
        if size == 0
            || !start.is_aligned(GRANULE)
            || !GuestPhysAddr::new(size).is_aligned(GRANULE)
            || (frames.len() as u64) < frames_for(size)
        {
            return Err(AxError::InvalidInput);
        }
        Ok(Self { start: start.as_u64(), end, frames, used: 0 })
    }

    /// The range, as guest physical addresses.
    pub fn range(&self) -> Range<u64> {
        self.start..self.end
    }

    /// Whether the page at `addr` is logged.
    #[inline]
    pub fn covers(&self, addr: GuestPhysAddr) -> bool {
        self.range().contains(&addr.as_u64())
    }

    /// Frames in use.
    pub fn frame_count(&self) -> u64 {
        self.used
    }

    /// Where the bit of the page at `addr`, which is logged, is: place of the frame, word in it, bit.
    fn position(&self, addr: u64) -> (usize, usize, u64) {
        let page = addr.wrapping_sub(self.start) / FRAME_SIZE;
        let word = (page / WORD) as usize;
        (word / ENTRIES, word % ENTRIES, 1 << (page % WORD))
    }

    /// A fault on the page at `addr` is about to map it, or the host to write it: how it may be mapped. For a write (`write`)
    /// the page is marked; otherwise the permission to write is taken out of `perms`. A page that is not logged may be mapped
    /// as it is.
    ///
    /// # Errors
    /// [`AxError::NoMemory`]: no frame for the bit; the page must not be mapped for writing.
    pub fn admit<M: TableMemory>(
        &mut self,
        addr: GuestPhysAddr,
        write: bool,
        perms: Permissions,
        mem: &mut M,
    ) -> AxResult<Permissions> {
        if !self.covers(addr) {
            return Ok(perms);
        }
        if !write {
            return Ok(perms.intersection(Permissions::READ.union(Permissions::EXECUTE)));
        }
        let (place, word, bit) = self.position(addr.as_u64());
        let slot = self.frames.get_mut(place).ok_or(AxError::InvalidInput)?;
        let frame = match *slot {
            Some(frame) => frame,
            None => {
                let frame = mem.alloc().ok_or(AxError::NoMemory)?;
                self.used = self.used.wrapping_add(1);
                *slot.insert(frame)
            }
        };
        mem.write(frame, word, mem.read(frame, word) | bit);
        Ok(perms)
    }

    /// Whether a page of `size` at `addr`, a multiple of that, holds anything that is logged: then it must be mapped in pages of
    /// 4 KiB.
    pub fn touches(&self, addr: GuestPhysAddr, size: PageSize) -> bool {
        let last = addr.as_u64().saturating_add(size.bytes().wrapping_sub(1));
        addr.as_u64() < self.end && last >= self.start
    }

    /// Takes the words of the pages from `addr` on, which is logged and a multiple of [`GRANULE`], as many as `to` has room for
    /// or as there are in the frame, clears them, and takes the write permission of the pages away by `restrict`, which is the
    /// table's [`restrict`](crate::npt::NestedPageTable::restrict). Returns how many words that were, and what was in them.
    ///
    /// # Errors
    /// [`AxError::InvalidInput`]: `addr` is not logged, or not aligned.
    pub fn take<M: TableMemory>(
        &mut self,
        addr: GuestPhysAddr,
        to: &mut [u64],
        mem: &mut M,
        mut restrict: impl FnMut(GuestPhysAddr, u64, Permissions, &mut M) -> AxResult<Flush>,
    ) -> AxResult<(usize, Taken)> {
        if !self.covers(addr) || !addr.is_aligned(GRANULE) {
            return Err(AxError::InvalidInput);
        }
        let (place, first, _) = self.position(addr.as_u64());
        let left = self.end.wrapping_sub(addr.as_u64()) / GRANULE;
        let count = to.len().min(ENTRIES.saturating_sub(first)).min(usize::try_from(left).unwrap_or(usize::MAX));
        let mut taken = Taken { pages: 0, flush: Flush::NotNeeded };
        let frame = self.frames.get(place).copied().flatten();
        let mut at = addr;
        for (slot, word) in to.iter_mut().zip(first..).take(count) {
            *slot = frame.map_or(0, |frame| mem.read(frame, word));
            if let (Some(frame), true) = (frame, *slot != 0) {
                mem.write(frame, word, 0);
                taken.pages = taken.pages.wrapping_add(u64::from(slot.count_ones()));
                // Every leaf there that can be written is of a dirty page, and is no larger than that: nothing is split.
                let read_only = Permissions::READ.union(Permissions::EXECUTE);
                if restrict(at, GRANULE, read_only, mem)?.is_needed() {
                    taken.flush = Flush::Needed;
                }
            }
            at = GuestPhysAddr::new(at.as_u64().wrapping_add(GRANULE));
        }
        Ok((count, taken))
    }

    /// Puts back what [`take`](Self::take) took from `addr` on, since nobody has seen it: the pages are dirty, although they
    /// cannot be written now.
    pub fn put_back<M: TableMemory>(&mut self, addr: GuestPhysAddr, words: &[u64], mem: &mut M) {
        let (place, first, _) = self.position(addr.as_u64());
        // Only what had a frame had bits, and frames stay.
        if let Some(frame) = self.frames.get(place).copied().flatten() {
            for (&taken, word) in words.iter().zip(first..ENTRIES) {
                mem.write(frame, word, mem.read(frame, word) | taken);
            }
        }
    }

    /// Ends the log: gives its frames back, and the places, which are empty then.
    pub fn finish<M: TableMemory>(mut self, mem: &mut M) -> S {
        for frame in self.frames.iter_mut().filter_map(Option::take) {
            mem.free(frame);
        }
        self.frames
    }
}

#[cfg(test)]
mod tests;
