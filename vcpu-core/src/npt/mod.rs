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
mod table;
#[cfg(test)]
pub(crate) mod tests;

use core::fmt;

pub use either::EitherTable;
pub use format::{Entry, Ept, Format, Leaf, Npt, Stage2, Stage2Lpa2};
pub use iter::Leaves;
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

    /// Entry `index` of `table`, by one 64-bit load.
    fn read(&self, table: HostPhysAddr, index: usize) -> u64;

    /// Sets entry `index` of `table`, by one 64-bit store that no earlier store may pass (release).
    fn write(&mut self, table: HostPhysAddr, index: usize, entry: u64);
}

/// Number of table levels, and of tables at the top.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Levels {
    /// 48-bit guest physical addresses.
    Four,
    /// 52-bit guest physical addresses (the format has 57).
    Five,
    /// As AArch64's stage 2 has them for guest physical ("intermediate") addresses of that width.
    Ipa(IpaBits),
}

/// Width of an intermediate physical address, 32 to 52 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct IpaBits(u8);

impl IpaBits {
    /// The width, if it is 32 to 52 bits.
    pub const fn new(bits: u32) -> Option<Self> {
        if bits >= 32 && bits <= 52 {
            Some(Self(bits as u8))
        } else {
            None
        }
    }

    /// The width in bits.
    pub const fn get(self) -> u32 {
        self.0 as u32
    }
}

impl Levels {
    /// 2 to 5.
    #[inline]
    pub const fn count(self) -> u8 {
        match self {
            Self::Four => 4,
            Self::Five => 5,
            // As few as possible: up to 16 tables side by side stand in for one level more, with 4 bits of the address
            // (Arm ARM D8.2.2, "Concatenated translation tables"). 32 to 34 bits take 2 levels, 44 to 52 take 4.
            Self::Ipa(bits) => (bits.0 - 8) / 9,
        }
    }

    /// First guest physical address that cannot be mapped.
    #[inline]
    pub const fn limit(self) -> u64 {
        match self {
            Self::Four => 1 << 48,
            Self::Five => PHYS_LIMIT,
            Self::Ipa(bits) => 1 << bits.0,
        }
    }

    /// How many tables the root has side by side, as log2: 0, but for [`Ipa`](Self::Ipa) up to 4.
    pub const fn root_order(self) -> u32 {
        match self {
            Self::Four | Self::Five => 0,
            Self::Ipa(bits) => (bits.0 as u32).saturating_sub(self.top().shift() + 9),
        }
    }

    #[inline]
    const fn top(self) -> Level {
        Level(self.count())
    }

    /// Which of the tables of `root` translates `gpa`, which is below the limit.
    #[inline]
    const fn root_table(self, root: HostPhysAddr, gpa: u64) -> HostPhysAddr {
        // Aligned to their size together, so the number fills zero bits. Five levels span more than any address.
        HostPhysAddr::new(root.as_u64() | ((gpa >> (self.top().shift() + 9)) << 12))
    }
}

/// Level of a table: 1 holds 4 KiB leaves, the root has 2 to 5. (AArch64 counts the other way, from 3 for the leaves.)
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Level(u8);

impl Level {
    /// The level that has leaves only.
    const LEAVES: Self = Self(1);

    /// The number, 1 to 5.
    #[inline]
    pub const fn number(self) -> u8 {
        self.0
    }

    /// The size of the page that a leaf of this level maps, if there can be one.
    #[inline]
    pub const fn page_size(self) -> Option<PageSize> {
        match self.0 {
            1 => Some(PageSize::Size4K),
            2 => Some(PageSize::Size2M),
            3 => Some(PageSize::Size1G),
            _ => None,
        }
    }

    /// Log2 of the bytes that one entry spans: 12, 21, 30, 39 or 48.
    #[inline]
    const fn shift(self) -> u32 {
        // At most 3 + 9 * 5: a level is 1 to 5.
        3 + 9 * self.0 as u32
    }

    /// The bytes that one entry spans.
    #[inline]
    const fn span(self) -> u64 {
        1 << self.shift()
    }

    /// The index of `gpa`'s entry.
    #[inline]
    const fn index(self, gpa: u64) -> usize {
        // The mask fits any usize.
        ((gpa >> self.shift()) & (ENTRIES as u64 - 1)) as usize
    }

    #[inline]
    const fn below(self) -> Option<Self> {
        match self.0 {
            0 | 1 => None,
            n => Some(Self(n - 1)),
        }
    }
}

/// Size of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PageSize {
    /// 4 KiB.
    Size4K,
    /// 2 MiB.
    Size2M,
    /// 1 GiB.
    Size1G,
}

impl PageSize {
    /// All sizes, smallest first.
    pub const ALL: [Self; 3] = [Self::Size4K, Self::Size2M, Self::Size1G];

    /// The size in bytes.
    #[inline]
    pub const fn bytes(self) -> u64 {
        self.level().span()
    }

    /// The level of a leaf of this size.
    #[inline]
    pub const fn level(self) -> Level {
        match self {
            Self::Size4K => Level(1),
            Self::Size2M => Level(2),
            Self::Size1G => Level(3),
        }
    }
}

/// What a guest may do with a page: a set of [`READ`](Self::READ), [`WRITE`](Self::WRITE) and [`EXECUTE`](Self::EXECUTE).
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Permissions(u8);

impl Permissions {
    /// Nothing.
    pub const NONE: Self = Self(0);
    /// Data reads.
    pub const READ: Self = Self(1 << 0);
    /// Data writes.
    pub const WRITE: Self = Self(1 << 1);
    /// Instruction fetches.
    pub const EXECUTE: Self = Self(1 << 2);
    /// Everything.
    pub const ALL: Self = Self(7);

    /// The set as a bit mask: bit 0 read, bit 1 write, bit 2 execute, as `MEM_*` of the ABI.
    pub const fn bits(self) -> u32 {
        self.0 as u32
    }

    /// The set of a bit mask, or `None` if it has unknown bits.
    pub const fn from_bits(bits: u32) -> Option<Self> {
        if bits & !7 == 0 {
            Some(Self(bits as u8))
        } else {
            None
        }
    }

    /// Whether all of `other` is in the set.
    #[inline]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// What is in either set.
    #[must_use]
    #[inline]
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// What is in both sets.
    #[must_use]
    #[inline]
    pub const fn intersection(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// What is in this set and not in `other`.
    #[must_use]
    #[inline]
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }
}

impl fmt::Debug for Permissions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (perm, letter) in [(Self::READ, "r"), (Self::WRITE, "w"), (Self::EXECUTE, "x")] {
            f.write_str(if self.contains(perm) { letter } else { "-" })?;
        }
        Ok(())
    }
}

/// How the CPU caches a page. Only the two types that mean the same under every host PAT.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MemoryType {
    /// Memory.
    WriteBack,
    /// Device registers.
    Uncacheable,
}

/// The translation of one guest physical address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// What the address translates to, its offset in the page included.
    pub hpa: HostPhysAddr,
    /// Size of the page around it: `hpa.align_down(size.bytes())` is the page's first address.
    pub size: PageSize,
    /// What the guest may do.
    pub perms: Permissions,
    /// It may execute the page as well, but not through a leaf of this size:
    /// [`split`](NestedPageTable::split) gives the permission. See [`NestedPageTable::with_small_code`].
    pub withheld: bool,
    /// How it is cached.
    pub memory_type: MemoryType,
    /// The CPU has accessed the page. A hint, see the [module](self).
    pub accessed: bool,
    /// The CPU has written the page. A hint, see the [module](self).
    pub dirty: bool,
}

impl Mapping {
    #[inline]
    fn new(leaf: Leaf, size: PageSize, gpa: u64) -> Self {
        Self {
            // The page is aligned to its size, so the offset fills zero bits.
            hpa: HostPhysAddr::new(leaf.hpa.as_u64() | (gpa & (size.bytes() - 1))),
            size,
            perms: leaf.perms,
            withheld: leaf.withheld,
            memory_type: leaf.memory_type,
            accessed: leaf.accessed,
            dirty: leaf.dirty,
        }
    }
}

/// A number of leaves of each size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LeafCount {
    /// Leaves of 4 KiB.
    pub size_4k: u64,
    /// Leaves of 2 MiB.
    pub size_2m: u64,
    /// Leaves of 1 GiB.
    pub size_1g: u64,
}

impl LeafCount {
    /// Whether there are none.
    pub const fn is_empty(self) -> bool {
        self.size_4k | self.size_2m | self.size_1g == 0
    }

    /// The leaves of one size.
    pub const fn of(self, size: PageSize) -> u64 {
        match size {
            PageSize::Size4K => self.size_4k,
            PageSize::Size2M => self.size_2m,
            PageSize::Size1G => self.size_1g,
        }
    }

    /// The bytes that they map together.
    #[inline]
    pub const fn bytes(self) -> u64 {
        // Below 2^52: leaves do not overlap, and that is where addresses end.
        (self.size_4k << 12).wrapping_add(self.size_2m << 21).wrapping_add(self.size_1g << 30)
    }

    fn slot(&mut self, size: PageSize) -> &mut u64 {
        match size {
            PageSize::Size4K => &mut self.size_4k,
            PageSize::Size2M => &mut self.size_2m,
            PageSize::Size1G => &mut self.size_1g,
        }
    }

    fn add(&mut self, size: PageSize, leaves: u64) {
        let slot = self.slot(size);
        *slot = slot.wrapping_add(leaves);
    }

    fn sub(&mut self, size: PageSize, leaves: u64) {
        let slot = self.slot(size);
        *slot = slot.wrapping_sub(leaves);
    }
}

/// Whether CPUs may hold a translation that is no longer right, or one of another size than the tables say (which not all of
/// them bear), so that their TLBs must be flushed before the caller relies on the change.
#[must_use]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flush {
    /// No: nothing was taken away. A CPU that still knows the old state at worst faults once more.
    NotNeeded,
    /// Yes.
    Needed,
}

impl Flush {
    /// Whether it is [`Needed`](Self::Needed).
    pub const fn is_needed(self) -> bool {
        matches!(self, Self::Needed)
    }

    /// What two changes need together.
    pub const fn or(self, other: Self) -> Self {
        Self::needed_if(self.is_needed() || other.is_needed())
    }

    const fn needed_if(needed: bool) -> Self {
        if needed {
            Self::Needed
        } else {
            Self::NotNeeded
        }
    }
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
