// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The nested-page-table engine: guest physical to host physical translation, in the format that the hardware walks.
//!
//! [`NestedPageTable`] changes the tables, [`walk`] reads them, a [`Format`] gives the bits, and [`TableMemory`] the frames.
//! There is no lock, no allocator and no TLB in here: changes take `&mut`, and what the caller has to flush is in the
//! results.
//!
//! # While hardware walks
//! Hardware and [`walk`] may read the tables at any time. Each entry changes by one 64-bit store. A new table is filled before
//! the store that links it, and a table is unlinked before it is freed; since a CPU may still hold a pointer to it,
//! [`TableMemory::free`] must not let it be reused before the TLB flush. The engine rewrites entries in place without an
//! empty one in between, as x86 allows and AArch64 does not always: there the caller first drops what it would replace by
//! another page or size, and flushes (Arm ARM D8.16.1, "Using break-before-make").
//!
//! The CPU sets accessed and dirty bits in live entries. One that it sets while the engine rewrites the same entry may be
//! lost, so the bits are hints; what must not be missed is found by taking the write permission away
//! ([`NestedPageTable::restrict`]).

mod either;
mod format;
mod iter;
mod mapping;
mod shape;
mod table;
#[cfg(test)]
pub(crate) mod tests;

pub use either::EitherTable;
pub use format::{Entry, Ept, Format, Leaf, Npt, Stage2, Stage2Lpa2};
pub use iter::Leaves;
pub use mapping::{Flush, LeafCount, Mapping, MemoryType, Permissions};
pub use shape::{IpaBits, Level, Levels, PageSize};
pub use table::NestedPageTable;

use crate::{AxError, AxResult, GuestPhysAddr, HostPhysAddr};

/// Bytes of a frame, which holds one table.
pub const FRAME_SIZE: u64 = 4096;

/// Entries of a table.
pub const ENTRIES: usize = 512;

/// The most frames that one [`NestedPageTable::map`] can need: the levels below a root of level 5.
pub const MAX_TABLES_PER_MAP: usize = 4;

/// First address beyond what the formats can express: physical addresses have at most 52 bits.
const PHYS_LIMIT: u64 = 1 << 52;

/// Frames for tables. `table` is always an address that [`alloc`](Self::alloc) gave, `index` below [`ENTRIES`].
pub trait TableMemory {
    /// A zeroed frame, a multiple of [`FRAME_SIZE`] below 2^52.
    fn alloc(&mut self) -> Option<HostPhysAddr>;

    /// `1 << order` zeroed frames side by side, aligned to their size together, each of which is freed by itself: for a
    /// root of several tables ([`Levels::root_order`]).
    fn alloc_root(&mut self, order: u32) -> Option<HostPhysAddr> {
        if order == 0 {
            self.alloc()
        } else {
            None
        }
    }

    /// Takes a frame back. No table points to it any more, but a CPU may still walk it: whatever the call that freed it
    /// returns, an error included, the frame must not be reused until the TLBs have been flushed.
    fn free(&mut self, table: HostPhysAddr);

    /// Takes a frame back that has not become a table: nobody knows of it, and it is still zeroed.
    fn give_back(&mut self, frame: HostPhysAddr);

    /// Entry `index` of `table`, by one 64-bit load.
    fn read(&self, table: HostPhysAddr, index: usize) -> u64;

    /// Sets entry `index` of `table`, by one 64-bit store that no earlier store may pass (release).
    fn write(&mut self, table: HostPhysAddr, index: usize, entry: u64);
}

/// Translates `gpa` with the tables under `root`, which have `levels` levels, as the hardware would, or tells by `None` that
/// it is not mapped. `read(table, index)` loads one entry (one 64-bit load, acquire).
///
/// Needs no lock, provided that no table under `root` is reused meanwhile: see [`TableMemory::free`].
#[inline]
pub fn walk<F: Format>(
    root: HostPhysAddr,
    levels: Levels,
    read: impl Fn(HostPhysAddr, usize) -> u64,
    gpa: GuestPhysAddr,
) -> Option<Mapping> {
    let gpa = gpa.as_u64();
    if gpa >= levels.limit() {
        return None;
    }
    descend::<F>(root, levels, read, gpa, Level::LEAVES).mapping(gpa)
}

/// An entry and where it is.
#[derive(Clone, Copy, Debug)]
struct Slot {
    table: HostPhysAddr,
    level: Level,
    index: usize,
    entry: Entry,
}

impl Slot {
    #[inline]
    fn mapping(self, gpa: u64) -> Option<Mapping> {
        match (self.entry, self.level.page_size()) {
            (Entry::Leaf(leaf), Some(size)) => Some(Mapping::new(leaf, size, gpa)),
            _ => None,
        }
    }
}

/// Follows the tables towards `gpa`, which is below the limit, down to the first entry that is not a table, or to level
/// `lowest`. So the entry found is a table only at level `lowest`, and never at level 1.
#[inline]
fn descend<F: Format>(
    root: HostPhysAddr,
    levels: Levels,
    read: impl Fn(HostPhysAddr, usize) -> u64,
    gpa: u64,
    lowest: Level,
) -> Slot {
    let mut table = levels.root_table(root, gpa);
    let mut level = levels.top();
    loop {
        let index = level.index(gpa);
        let entry = F::decode(read(table, index), level);
        match (entry, level.below()) {
            (Entry::Table(next), Some(below)) if level > lowest => {
                table = next;
                level = below;
            }
            _ => return Slot { table, level, index, entry },
        }
    }
}

/// A range of guest physical addresses within the limit, both ends multiples of 4096. Empty unless `start` is below `end`.
#[derive(Clone, Copy, Debug)]
struct Span {
    start: u64,
    end: u64,
}

impl Span {
    fn exact(gpa: GuestPhysAddr, size: u64, levels: Levels) -> AxResult<Self> {
        let end = gpa.checked_add(size).ok_or(AxError::InvalidInput)?;
        if size == 0
            || end.as_u64() > levels.limit()
            || !gpa.is_aligned(FRAME_SIZE)
            || !GuestPhysAddr::new(size).is_aligned(FRAME_SIZE)
        {
            return Err(AxError::InvalidInput);
        }
        Ok(Self { start: gpa.as_u64(), end: end.as_u64() })
    }

    /// The pages that hold at least one byte of the range and that can be mapped.
    fn covering(gpa: GuestPhysAddr, size: u64, levels: Levels) -> Self {
        if size == 0 {
            return Self { start: 0, end: 0 };
        }
        let start = gpa.align_down(FRAME_SIZE).as_u64();
        let end = gpa.as_u64().saturating_add(size).min(levels.limit());
        // The limit is a multiple of 4096, so rounding up cannot pass it.
        Self { start, end: end.wrapping_add(FRAME_SIZE - 1) & !(FRAME_SIZE - 1) }
    }
}
