// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The tables and every change that can be made to them. How it is made: `primitives`.

mod primitives;

use core::marker::PhantomData;

use super::{
    Entry, Flush, Format, Leaf, LeafCount, Leaves, Levels, Mapping, MemoryType, PageSize, Permissions, Span,
    TableMemory,
};
use crate::{AxError, AxResult, GuestPhysAddr, HostPhysAddr};
use primitives::{decoded, piece, same_translation, whole, Action};

/// A nested page table of format `F`.
///
/// The value is a handle: the tables live in a [`TableMemory`], which must be the same one at every call, and they are freed
/// by [`free_all`](Self::free_all) only, not by dropping the handle.
///
/// # Invariants
/// - Each table but the root is linked exactly once, and has an entry that is not empty.
/// - The counts are those of the tables linked.
/// - With `small_code`, no leaf larger than 4 KiB has [`Permissions::EXECUTE`], whatever the moment. Without it none is withheld.
#[derive(Debug)]
pub struct NestedPageTable<F> {
    root: HostPhysAddr,
    levels: Levels,
    small_code: bool,
    leaves: LeafCount,
    tables: u64,
    format: PhantomData<fn() -> F>,
}

impl<F: Format> NestedPageTable<F> {
    /// Makes an empty table: a root.
    ///
    /// # Errors
    /// [`AxError::NoMemory`].
    pub fn new<M: TableMemory>(levels: Levels, mem: &mut M) -> AxResult<Self> {
        let root = mem.alloc_root(levels.root_order()).ok_or(AxError::NoMemory)?;
        let tables = 1 << levels.root_order();
        Ok(Self { root, levels, small_code: false, leaves: LeafCount::default(), tables, format: PhantomData })
    }

    /// The same with code in leaves of 4 KiB only, for CPUs that must not fetch instructions through a larger one. It must be
    /// empty.
    ///
    /// A larger leaf that is given [`Permissions::EXECUTE`] does not have it, and remembers that it is
    /// [`withheld`](Mapping::withheld): when the guest wants to execute, [`split`](Self::split) the leaf, whose parts have it,
    /// or map the page itself.
    #[must_use]
    pub fn with_small_code(self) -> Self {
        debug_assert!(self.leaves.is_empty());
        // INVARIANT: There is no leaf.
        Self { small_code: true, ..self }
    }

    /// Whether code is in leaves of 4 KiB only.
    pub fn has_small_code(&self) -> bool {
        self.small_code
    }

    /// The root table, or the first of them, for the hardware and for [`walk`](super::walk). It stays the same.
    #[inline]
    pub fn root(&self) -> HostPhysAddr {
        self.root
    }

    /// The number of levels.
    #[inline]
    pub fn levels(&self) -> Levels {
        self.levels
    }

    /// How many leaves there are.
    pub fn leaf_count(&self) -> LeafCount {
        self.leaves
    }

    /// How many frames are in use, the root included.
    pub fn table_count(&self) -> u64 {
        self.tables
    }

    /// How many frames [`map`](Self::map) with the same address and size could allocate now: 0 to
    /// [`MAX_TABLES_PER_MAP`](super::MAX_TABLES_PER_MAP). It allocates them all or none.
    pub fn tables_needed<M: TableMemory>(&self, gpa: GuestPhysAddr, size: PageSize, mem: &M) -> usize {
        if gpa.as_u64() >= self.levels.limit() {
            return 0;
        }
        let slot = self.slot(gpa.as_u64(), size.level(), mem);
        usize::from(slot.level.number().saturating_sub(size.level().number()))
    }

    /// Maps the page of `size` at `gpa` to `hpa`, and replaces whatever was there: a leaf is overwritten, a larger leaf is
    /// split and keeps its other parts, and smaller leaves are dropped with their tables.
    ///
    /// Mapping what is mapped already changes nothing, even if it is part of a larger leaf: of two vCPUs that fault on the same
    /// page, the second does not undo what the first has done. Adding permissions needs no flush. The accessed and
    /// dirty bits survive if the host page stays the same, except those of smaller leaves.
    ///
    /// # Errors
    /// Nothing has changed then.
    /// - [`AxError::InvalidInput`]: an address is not a multiple of the size, or too high; or `perms` lacks
    ///   [`Permissions::READ`], without which no format can be written to.
    /// - [`AxError::NoMemory`]: not all of [`tables_needed`](Self::tables_needed) could be allocated.
    pub fn map<M: TableMemory>(
        &mut self,
        gpa: GuestPhysAddr,
        hpa: HostPhysAddr,
        size: PageSize,
        perms: Permissions,
        memory_type: MemoryType,
        mem: &mut M,
    ) -> AxResult<Flush> {
        self.check(gpa, hpa, size, perms)?;
        let slot = self.slot(gpa.as_u64(), size.level(), mem);
        let wanted = Leaf::new(hpa, perms, memory_type);
        let mut leaf = self.fitted(wanted, size);
        let flush = match slot.entry {
            Entry::Empty => Flush::NotNeeded,
            Entry::Leaf(large) => {
                let old = piece(large, slot.level, gpa.as_u64());
                if same_translation(old, leaf) {
                    return Ok(Flush::NotNeeded);
                }
                if old.hpa == hpa {
                    leaf.accessed = old.accessed;
                    leaf.dirty = old.dirty;
                }
                let grown = old.hpa == hpa && old.memory_type == memory_type && leaf.perms.contains(old.perms);
                Flush::needed_if(!grown || slot.level > size.level())
            }
            Entry::Table(_) => Flush::Needed,
        };
        self.place(slot, gpa.as_u64(), leaf, size, mem)?;
        Ok(flush)
    }

    /// Maps as [`map`](Self::map) does, but only where nothing is mapped: otherwise nothing changes, and the answer is false.
    /// There is nothing to flush.
    ///
    /// # Errors
    /// As [`map`](Self::map).
    #[inline]
    pub fn map_empty<M: TableMemory>(
        &mut self,
        gpa: GuestPhysAddr,
        hpa: HostPhysAddr,
        size: PageSize,
        perms: Permissions,
        memory_type: MemoryType,
        mem: &mut M,
    ) -> AxResult<bool> {
        self.check(gpa, hpa, size, perms)?;
        let slot = self.slot(gpa.as_u64(), size.level(), mem);
        if slot.entry != Entry::Empty {
            return Ok(false);
        }
        self.place(slot, gpa.as_u64(), Leaf::new(hpa, perms, memory_type), size, mem)?;
        Ok(true)
    }

    /// Whether a page can be mapped so.
    #[inline]
    fn check(&self, gpa: GuestPhysAddr, hpa: HostPhysAddr, size: PageSize, perms: Permissions) -> AxResult {
        let hpa_end = hpa.checked_add(size.bytes()).ok_or(AxError::InvalidInput)?;
        if !gpa.is_aligned(size.bytes())
            || gpa.as_u64() >= self.levels.limit()
            || !hpa.is_aligned(size.bytes())
            || hpa_end.as_u64() > F::PHYS_LIMIT
            || !perms.contains(Permissions::READ)
        {
            return Err(AxError::InvalidInput);
        }
        Ok(())
    }

    /// Unmaps exactly the `size` bytes at `gpa`; what is not mapped there is skipped. Leaves that reach across an end of the
    /// range are split. Returns how many leaves were dropped, not counting the pieces of split ones that stay. If there
    /// are any, the TLBs must be flushed.
    ///
    /// # Errors
    /// Nothing has changed then.
    /// - [`AxError::InvalidInput`]: the range is empty, not in multiples of 4096, or too high.
    /// - [`AxError::NoMemory`]: no frames to split with.
    pub fn unmap<M: TableMemory>(&mut self, gpa: GuestPhysAddr, size: u64, mem: &mut M) -> AxResult<LeafCount> {
        let span = Span::exact(gpa, size, self.levels)?;
        self.cut(span, |_| true, mem)?;
        Ok(self.drop_leaves(span, mem))
    }

    /// Drops every leaf that has a byte in the `size` bytes at `gpa`, the whole leaf each time: for what can be mapped again on
    /// a fault. Never allocates, cannot fail, and takes any range. Returns how many leaves were dropped. If there are any,
    /// the TLBs must be flushed.
    #[must_use = "the TLBs must be flushed if anything was dropped"]
    pub fn zap<M: TableMemory>(&mut self, gpa: GuestPhysAddr, size: u64, mem: &mut M) -> LeafCount {
        self.drop_leaves(Span::covering(gpa, size, self.levels), mem)
    }

    /// Sets the permissions of what is mapped in the `size` bytes at `gpa`, exactly; what is not mapped is skipped. Leaves that
    /// reach across an end of the range are split, if they change.
    ///
    /// This gives permissions too: write permission must not be given to a host page that was looked up for reading
    /// (it may be shared, like the zero page). To only take permissions away, use [`restrict`](Self::restrict).
    ///
    /// # Errors
    /// Nothing has changed then.
    /// - [`AxError::InvalidInput`]: the range is empty, not in multiples of 4096, or too high, or `perms` lacks
    ///   [`Permissions::READ`].
    /// - [`AxError::NoMemory`]: no frames to split with.
    pub fn protect<M: TableMemory>(
        &mut self,
        gpa: GuestPhysAddr,
        size: u64,
        perms: Permissions,
        mem: &mut M,
    ) -> AxResult<Flush> {
        self.change_permissions(gpa, size, perms, |_| perms, mem)
    }

    /// Takes all permissions but `perms` away from what is mapped in the `size` bytes at `gpa`, exactly, and gives none.
    /// Otherwise as [`protect`](Self::protect).
    ///
    /// # Errors
    /// As [`protect`](Self::protect).
    pub fn restrict<M: TableMemory>(
        &mut self,
        gpa: GuestPhysAddr,
        size: u64,
        perms: Permissions,
        mem: &mut M,
    ) -> AxResult<Flush> {
        self.change_permissions(gpa, size, perms, |old| old.intersection(perms), mem)
    }

    /// Splits the leaf around `gpa` until the page around `gpa` has `size`. Does nothing if leaves there are not larger.
    /// Translations do not change, and permissions only in that what was [`withheld`](Mapping::withheld) no longer is.
    ///
    /// # Errors
    /// Nothing has changed then.
    /// - [`AxError::NotMapped`]: there is no leaf.
    /// - [`AxError::NoMemory`]: no frame for the tables.
    pub fn split<M: TableMemory>(&mut self, gpa: GuestPhysAddr, size: PageSize, mem: &mut M) -> AxResult<Flush> {
        if gpa.as_u64() >= self.levels.limit() {
            return Err(AxError::NotMapped);
        }
        let gpa = gpa.align_down(size.bytes()).as_u64();
        let slot = self.slot(gpa, size.level(), mem);
        match slot.entry {
            Entry::Empty => Err(AxError::NotMapped),
            Entry::Leaf(large) if slot.level > size.level() => {
                self.place(slot, gpa, piece(large, slot.level, gpa), size, mem)?;
                Ok(Flush::Needed)
            }
            Entry::Leaf(_) | Entry::Table(_) => Ok(Flush::NotNeeded),
        }
    }

    /// Replaces the 512 leaves of the next smaller size around `gpa` by one of `size` (2 MiB or 1 GiB) and frees their table, if
    /// they are all there, contiguous in host memory, aligned to `size`, and equal in permissions and memory type.
    /// Otherwise does nothing. Translations do not change, and permissions only in that one may now be
    /// [`withheld`](Mapping::withheld).
    ///
    /// Returns [`Flush::Needed`] if it has merged.
    pub fn merge<M: TableMemory>(&mut self, gpa: GuestPhysAddr, size: PageSize, mem: &mut M) -> Flush {
        if gpa.as_u64() >= self.levels.limit() {
            return Flush::NotNeeded;
        }
        let gpa = gpa.align_down(size.bytes()).as_u64();
        let slot = self.slot(gpa, size.level(), mem);
        let (Entry::Table(table), Some(below)) = (slot.entry, slot.level.below()) else {
            return Flush::NotNeeded;
        };
        let Some(leaf) = whole(decoded::<F, M>(table, below, mem), size, below) else {
            return Flush::NotNeeded;
        };
        self.fold(slot, leaf, size, mem);
        Flush::Needed
    }

    /// What `gpa` translates to.
    pub fn query<M: TableMemory>(&self, gpa: GuestPhysAddr, mem: &M) -> Option<Mapping> {
        super::walk::<F>(self.root, self.levels, |table, index| mem.read(table, index), gpa)
    }

    /// The leaves that intersect the `size` bytes at `gpa`.
    pub fn leaves<'a, M: TableMemory>(&self, gpa: GuestPhysAddr, size: u64, mem: &'a M) -> Leaves<'a, F, M> {
        Leaves::new(self.root, self.levels, Span::covering(gpa, size, self.levels), mem)
    }

    /// Clears the accessed bits in the `size` bytes at `gpa`, and tells whether one was set. Of a leaf that reaches
    /// across an end of the range, the bit counts as well. A CPU that has the translation cached sets the bit again
    /// only after a TLB flush; without one, the answer of the next call errs towards "not accessed".
    pub fn clear_accessed<M: TableMemory>(&mut self, gpa: GuestPhysAddr, size: u64, mem: &mut M) -> bool {
        let mut accessed = false;
        self.sweep(Span::covering(gpa, size, self.levels), mem, |leaf, _| {
            if !leaf.accessed {
                return Action::Keep;
            }
            accessed = true;
            Action::Set(Leaf { accessed: false, ..leaf })
        });
        accessed
    }

    /// Frees all tables, the root included. The hardware must not use the root any more.
    pub fn free_all<M: TableMemory>(mut self, mem: &mut M) {
        let everything = Span { start: 0, end: self.levels.limit() };
        self.drop_leaves(everything, mem);
        for number in 0..1u64 << self.levels.root_order() {
            mem.free(HostPhysAddr::new(self.root.as_u64() | (number << 12)));
        }
    }
}
