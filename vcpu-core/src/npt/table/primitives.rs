// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! What changes of the tables are made of.
//!
//! Two primitives do the work. `place` puts one entry at one address and makes the tables that it needs, filled from the
//! large leaf that they replace, bottom-up, so that one store shows all of it to the hardware. `sweep` visits the entries of
//! a range, and frees the tables that it leaves empty.

use super::NestedPageTable;
use crate::npt::{
    descend, Entry, Flush, Format, Leaf, LeafCount, Level, PageSize, Permissions, Slot, Span, TableMemory, ENTRIES,
    MAX_TABLES_PER_MAP,
};
use crate::{AxError, AxResult, GuestPhysAddr, HostPhysAddr};

/// What `sweep` does with a leaf.
pub(super) enum Action {
    Keep,
    Drop,
    Set(Leaf),
}

impl<F: Format> NestedPageTable<F> {
    /// `leaf` as it may be at `size`: with the right to execute withheld, or not.
    #[inline]
    pub(super) fn fitted(&self, leaf: Leaf, size: PageSize) -> Leaf {
        let rights = leaf.rights();
        let withheld = self.small_code && size != PageSize::Size4K && rights.contains(Permissions::EXECUTE);
        Leaf { perms: if withheld { rights.without(Permissions::EXECUTE) } else { rights }, withheld, ..leaf }
    }

    /// The entry for `leaf`. Every leaf that is written comes from here.
    #[inline]
    fn entry_of(&self, leaf: Leaf, size: PageSize) -> u64 {
        F::encode_leaf(self.fitted(leaf, size), size)
    }

    #[inline]
    pub(super) fn slot<M: TableMemory>(&self, gpa: u64, lowest: Level, mem: &M) -> Slot {
        descend::<F>(self.root, self.levels, |table, index| mem.read(table, index), gpa, lowest)
    }

    /// Puts `leaf` of `size` at `gpa`, below or in `slot`, which is what [`Self::slot`] has found on the way to it. Either all
    /// happens or, without frames, nothing.
    #[inline]
    pub(super) fn place<M: TableMemory>(
        &mut self,
        slot: Slot,
        gpa: u64,
        leaf: Leaf,
        size: PageSize,
        mem: &mut M,
    ) -> AxResult {
        let entry = if slot.level == size.level() {
            self.entry_of(leaf, size)
        } else {
            self.place_below(slot, gpa, leaf, size, mem)?
        };
        // One store shows all of it.
        mem.write(slot.table, slot.index, entry);
        self.leaves.add(size, 1);
        match (slot.entry, slot.level.page_size(), slot.level.below()) {
            (Entry::Leaf(_), Some(old_size), _) => self.leaves.sub(old_size, 1),
            (Entry::Table(old), _, Some(below)) => self.release(old, below, mem),
            _ => {}
        }
        Ok(())
    }

    /// The tables that `leaf` of `size` at `gpa` needs below `slot`: gives the entry that points to the first of them.
    fn place_below<M: TableMemory>(
        &mut self,
        slot: Slot,
        gpa: u64,
        leaf: Leaf,
        size: PageSize,
        mem: &mut M,
    ) -> AxResult<u64> {
        let missing = usize::from(slot.level.number().saturating_sub(size.level().number()));
        let mut frames = [None; MAX_TABLES_PER_MAP];
        for frame in frames.iter_mut().take(missing) {
            *frame = mem.alloc();
            if frame.is_none() {
                frames.iter().flatten().for_each(|&unused| mem.give_back(unused));
                return Err(AxError::NoMemory);
            }
        }

        // From the bottom: each table gets its entry for `gpa`, and around it the pieces of the large leaf, if that is what
        // the tables replace.
        let mut entry = self.entry_of(leaf, size);
        let mut level = size.level();
        for &table in frames.iter().flatten() {
            if let (Entry::Leaf(large), Some(piece_size)) = (slot.entry, level.page_size()) {
                let mut at = gpa & !(level.span() * ENTRIES as u64 - 1);
                for index in 0..ENTRIES {
                    if index != level.index(gpa) {
                        mem.write(table, index, self.entry_of(piece(large, slot.level, at), piece_size));
                    }
                    at = at.wrapping_add(level.span());
                }
                self.leaves.add(piece_size, ENTRIES as u64 - 1);
            }
            mem.write(table, level.index(gpa), entry);
            entry = F::encode_table(table);
            self.tables = self.tables.wrapping_add(1);
            level = Level(level.0.wrapping_add(1));
        }
        Ok(entry)
    }

    /// Splits the leaves that reach across the ends of `span`, if they are `affected`, as far as needed: all or, without
    /// frames, none. Returns whether there were any.
    pub(super) fn cut<M: TableMemory>(
        &mut self,
        span: Span,
        affected: impl Fn(Leaf) -> bool,
        mem: &mut M,
    ) -> AxResult<bool> {
        let start = self.split_at(span.start, &affected, mem)?;
        match self.split_at(span.end, &affected, mem) {
            Ok(end) => Ok(start.is_some() || end.is_some()),
            Err(error) => {
                if let Some((slot, large, size)) = start {
                    self.fold(slot, large, size, mem);
                }
                Err(error)
            }
        }
    }

    /// Makes `at` a boundary between leaves, unless the leaf there is not `affected`. Returns the leaf that was split, and
    /// where it was.
    fn split_at<M: TableMemory>(
        &mut self,
        at: u64,
        affected: impl Fn(Leaf) -> bool,
        mem: &mut M,
    ) -> AxResult<Option<(Slot, Leaf, PageSize)>> {
        if at >= self.levels.limit() {
            return Ok(None);
        }
        let slot = self.slot(at, Level::LEAVES, mem);
        let (Entry::Leaf(large), Some(large_size)) = (slot.entry, slot.level.page_size()) else { return Ok(None) };
        if at & (large_size.bytes() - 1) == 0 || !affected(large) {
            return Ok(None);
        }
        let size = if at & (PageSize::Size2M.bytes() - 1) == 0 { PageSize::Size2M } else { PageSize::Size4K };
        self.place(slot, at, piece(large, slot.level, at), size, mem)?;
        Ok(Some((slot, large, large_size)))
    }

    /// Puts `leaf` of `size` into the entry at `slot` and frees the tables below.
    pub(super) fn fold<M: TableMemory>(&mut self, slot: Slot, leaf: Leaf, size: PageSize, mem: &mut M) {
        let old = F::decode(mem.read(slot.table, slot.index), slot.level);
        mem.write(slot.table, slot.index, self.entry_of(leaf, size));
        self.leaves.add(size, 1);
        if let (Entry::Table(table), Some(below)) = (old, slot.level.below()) {
            self.release(table, below, mem);
        }
    }

    pub(super) fn drop_leaves<M: TableMemory>(&mut self, span: Span, mem: &mut M) -> LeafCount {
        let mut dropped = LeafCount::default();
        self.sweep(span, mem, |_, size| {
            dropped.add(size, 1);
            Action::Drop
        });
        dropped
    }

    pub(super) fn change_permissions<M: TableMemory>(
        &mut self,
        gpa: GuestPhysAddr,
        size: u64,
        perms: Permissions,
        new: impl Fn(Permissions) -> Permissions,
        mem: &mut M,
    ) -> AxResult<Flush> {
        let span = Span::exact(gpa, size, self.levels)?;
        if !perms.contains(Permissions::READ) {
            return Err(AxError::InvalidInput);
        }
        // A leaf that keeps its permissions need not be split.
        let split = self.cut(span, |leaf| new(leaf.rights()) != leaf.rights(), mem)?;
        let mut lost = false;
        self.sweep(span, mem, |leaf, _| {
            let perms = new(leaf.rights());
            if perms == leaf.rights() {
                return Action::Keep;
            }
            // A right that is withheld is none that a CPU could know of, and as it was, so it stays.
            lost |= !perms.contains(leaf.perms);
            Action::Set(Leaf { perms, withheld: false, ..leaf })
        });
        Ok(Flush::needed_if(lost || split))
    }

    /// Calls `decide` for each leaf that intersects `span`, does what it says, and frees the tables that become empty.
    pub(super) fn sweep<M: TableMemory>(
        &mut self,
        span: Span,
        mem: &mut M,
        mut decide: impl FnMut(Leaf, PageSize) -> Action,
    ) {
        let mut gpa = span.start;
        while gpa < span.end {
            let Slot { table, level, index: first, .. } = self.slot(gpa, Level::LEAVES, mem);
            let mut in_table = gpa;
            let mut dropped = false;
            // The rest of the table, up to an entry that leads further down.
            for index in first..ENTRIES {
                if gpa >= span.end {
                    break;
                }
                match (F::decode(mem.read(table, index), level), level.page_size()) {
                    (Entry::Leaf(leaf), Some(size)) => match decide(leaf, size) {
                        Action::Keep => {}
                        Action::Set(leaf) => mem.write(table, index, self.entry_of(leaf, size)),
                        Action::Drop => {
                            mem.write(table, index, 0);
                            self.leaves.sub(size, 1);
                            dropped = true;
                        }
                    },
                    (Entry::Table(_), _) => break,
                    _ => {}
                }
                in_table = gpa;
                gpa = (gpa & !(level.span() - 1)).saturating_add(level.span());
            }
            if dropped {
                self.prune(in_table, mem);
            }
        }
    }

    /// Frees the empty tables on the way to `gpa`, lowest first. The root stays.
    fn prune<M: TableMemory>(&mut self, gpa: u64, mem: &mut M) {
        let mut slot = self.slot(gpa, Level::LEAVES, mem);
        while slot.level < self.levels.top() && is_empty::<F, M>(slot.table, slot.level, mem) {
            let parent = self.slot(gpa, Level(slot.level.0.wrapping_add(1)), mem);
            mem.write(parent.table, parent.index, 0);
            mem.free(slot.table);
            self.tables = self.tables.wrapping_sub(1);
            slot = parent;
        }
    }

    /// Frees an unlinked table of level 1 or 2 and what is below it.
    fn release<M: TableMemory>(&mut self, table: HostPhysAddr, level: Level, mem: &mut M) {
        for index in 0..ENTRIES {
            match (F::decode(mem.read(table, index), level), level.page_size()) {
                (Entry::Leaf(_), Some(size)) => self.leaves.sub(size, 1),
                (Entry::Table(lowest), _) => {
                    let leaves = decoded::<F, M>(lowest, Level::LEAVES, mem).filter(|e| *e != Entry::Empty).count();
                    self.leaves.sub(PageSize::Size4K, leaves as u64);
                    mem.free(lowest);
                    self.tables = self.tables.wrapping_sub(1);
                }
                _ => {}
            }
        }
        mem.free(table);
        self.tables = self.tables.wrapping_sub(1);
    }
}

/// Whether two leaves differ in nothing but what the CPU has noted in them.
pub(super) fn same_translation(a: Leaf, b: Leaf) -> bool {
    a.hpa == b.hpa && a.perms == b.perms && a.withheld == b.withheld && a.memory_type == b.memory_type
}

/// The part of `large`, a leaf of `level`, that begins at `gpa`.
pub(super) fn piece(large: Leaf, level: Level, gpa: u64) -> Leaf {
    // The leaf is aligned to its size, so the offset fills zero bits.
    Leaf { hpa: HostPhysAddr::new(large.hpa.as_u64() | (gpa & (level.span() - 1))), ..large }
}

/// The leaf of `size` that `entries`, those of a table of level `below`, are the parts of.
pub(super) fn whole(mut entries: impl Iterator<Item = Entry>, size: PageSize, below: Level) -> Option<Leaf> {
    let Some(Entry::Leaf(mut whole)) = entries.next() else { return None };
    if !whole.hpa.is_aligned(size.bytes()) {
        return None;
    }
    let mut offset = 0u64;
    for entry in entries {
        let Entry::Leaf(part) = entry else { return None };
        offset = offset.wrapping_add(below.span());
        if !same_translation(part, Leaf { hpa: HostPhysAddr::new(whole.hpa.as_u64() | offset), ..whole }) {
            return None;
        }
        whole.accessed |= part.accessed;
        whole.dirty |= part.dirty;
    }
    Some(whole)
}

pub(super) fn decoded<F: Format, M: TableMemory>(
    table: HostPhysAddr,
    level: Level,
    mem: &M,
) -> impl Iterator<Item = Entry> + '_ {
    (0..ENTRIES).map(move |index| F::decode(mem.read(table, index), level))
}

fn is_empty<F: Format, M: TableMemory>(table: HostPhysAddr, level: Level, mem: &M) -> bool {
    decoded::<F, M>(table, level, mem).all(|entry| entry == Entry::Empty)
}
