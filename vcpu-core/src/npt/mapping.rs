// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! What a translation is, and what a change of translations comes to: leaves counted, and whether a flush is due.

use core::fmt;

use super::{Leaf, PageSize};
use crate::HostPhysAddr;

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
    /// [`split`](super::NestedPageTable::split) gives the permission. See [`with_small_code`](super::NestedPageTable::with_small_code).
    pub withheld: bool,
    /// How it is cached.
    pub memory_type: MemoryType,
    /// The CPU has accessed the page. A hint, see the [module](super).
    pub accessed: bool,
    /// The CPU has written the page. A hint, see the [module](super).
    pub dirty: bool,
}

impl Mapping {
    #[inline]
    pub(super) fn new(leaf: Leaf, size: PageSize, gpa: u64) -> Self {
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

    pub(super) fn add(&mut self, size: PageSize, leaves: u64) {
        let slot = self.slot(size);
        *slot = slot.wrapping_add(leaves);
    }

    pub(super) fn sub(&mut self, size: PageSize, leaves: u64) {
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

    pub(super) const fn needed_if(needed: bool) -> Self {
        if needed {
            Self::Needed
        } else {
            Self::NotNeeded
        }
    }
}
