// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! Tests of the engine, and the memory they run in: [`Frames`] refuses double frees and uses after a free, fails when told to,
//! and shows every store to an observer.

mod encoding;
mod engine;
mod model;

use std::boxed::Box;
use std::vec::Vec;

use super::*;

/// Where frames come from: far from every page that the tests map, so that a table taken for a page is noticed.
const FIRST_FRAME: u64 = 0x000f_0000_0000_0000;

type Observer = Box<dyn FnMut(&Frames)>;

#[derive(Default)]
pub(crate) struct Frames {
    /// Every frame ever allocated, `None` once freed: an address is given once only, so that a stale one never seems good.
    frames: Vec<Option<Box<[u64; ENTRIES]>>>,
    /// How many more allocations succeed; `None` for all.
    budget: Option<usize>,
    /// Frames that were not used after all.
    given_back: usize,
    observer: Option<Observer>,
}

impl Frames {
    fn live(&self) -> impl Iterator<Item = u64> + '_ {
        let live = self.frames.iter().enumerate().filter(|(_, frame)| frame.is_some());
        live.map(|(number, _)| FIRST_FRAME + number as u64 * FRAME_SIZE)
    }

    pub(crate) fn live_count(&self) -> u64 {
        self.live().count() as u64
    }

    fn number(table: HostPhysAddr) -> usize {
        usize::try_from(table.as_u64().wrapping_sub(FIRST_FRAME) / FRAME_SIZE).unwrap()
    }

    fn frame(&self, table: HostPhysAddr) -> &[u64; ENTRIES] {
        let frame = self.frames.get(Self::number(table)).and_then(Option::as_ref);
        frame.unwrap_or_else(|| panic!("{table:?} is used, but not allocated"))
    }

    fn observe(&mut self) {
        if let Some(mut observer) = self.observer.take() {
            observer(self);
            self.observer = Some(observer);
        }
    }
}

impl TableMemory for Frames {
    fn alloc(&mut self) -> Option<HostPhysAddr> {
        match &mut self.budget {
            Some(0) => return None,
            Some(left) => *left -= 1,
            None => {}
        }
        let addr = FIRST_FRAME + self.frames.len() as u64 * FRAME_SIZE;
        self.frames.push(Some(Box::new([0; ENTRIES])));
        Some(HostPhysAddr::new(addr))
    }

    fn alloc_root(&mut self, order: u32) -> Option<HostPhysAddr> {
        // Frames at the beginning are aligned to whatever is asked for.
        assert!(order == 0 || self.frames.is_empty());
        let first = self.alloc()?;
        for _ in 1..1 << order {
            self.alloc()?;
        }
        Some(first)
    }

    fn free(&mut self, table: HostPhysAddr) {
        let frame = self.frames.get_mut(Self::number(table)).and_then(Option::take);
        assert!(frame.is_some(), "{table:?} is freed, but not allocated");
        self.observe();
    }

    fn give_back(&mut self, frame: HostPhysAddr) {
        assert_eq!(self.frame(frame), &[0; ENTRIES]);
        self.frames[Self::number(frame)] = None;
        self.given_back += 1;
    }

    fn read(&self, table: HostPhysAddr, index: usize) -> u64 {
        self.frame(table)[index]
    }

    fn write(&mut self, table: HostPhysAddr, index: usize, entry: u64) {
        let frame = self.frames.get_mut(Self::number(table)).and_then(Option::as_mut);
        frame.unwrap_or_else(|| panic!("{table:?} is written, but not allocated"))[index] = entry;
        self.observe();
    }
}

/// What a walk of everything under a root finds.
#[derive(Debug, Default, PartialEq, Eq)]
struct Census {
    leaves: Vec<(u64, Mapping)>,
    tables: Vec<u64>,
    empty_tables: usize,
    /// Tables of the root that have been visited.
    roots: u64,
}

impl Census {
    fn take<F: Format>(table: &NestedPageTable<F>, mem: &Frames) -> Self {
        let mut census = Self::default();
        let top = table.levels().top();
        for number in 0..1u64 << table.levels().root_order() {
            let root = HostPhysAddr::new(table.root().as_u64() + number * FRAME_SIZE);
            census.roots += 1;
            census.visit::<F>(root, top, number << (top.shift() + 9), mem);
        }
        census
    }

    fn visit<F: Format>(&mut self, table: HostPhysAddr, level: Level, first: u64, mem: &Frames) {
        self.tables.push(table.as_u64());
        let mut empty = true;
        for (index, &raw) in mem.frame(table).iter().enumerate() {
            if raw == 0 {
                continue;
            }
            let gpa = first + ((index as u64) << level.shift());
            // What the format does not write, the hardware may take amiss: reserved bits above all.
            let meant = match F::decode(raw, level) {
                Entry::Empty => 0,
                Entry::Table(next) => {
                    self.visit::<F>(next, Level(level.0 - 1), gpa, mem);
                    F::encode_table(next)
                }
                Entry::Leaf(leaf) => {
                    let size = level.page_size().unwrap();
                    self.leaves.push((gpa, Mapping::new(leaf, size, gpa)));
                    F::encode_leaf(leaf, size)
                }
            };
            assert_eq!(raw, meant, "{gpa:#x}");
            empty = false;
        }
        let root = (0..self.roots).any(|number| self.tables[0] + number * FRAME_SIZE == table.as_u64());
        self.empty_tables += usize::from(empty && !root);
    }
}

/// Asserts the invariants of the table and of the memory that it alone uses.
#[track_caller]
fn assert_sound<F: Format>(table: &NestedPageTable<F>, mem: &Frames) -> Census {
    let census = Census::take(table, mem);
    assert_eq!(census.empty_tables, 0, "an empty table is still linked");
    let mut tables = census.tables.clone();
    tables.sort_unstable();
    assert!(tables.iter().copied().eq(mem.live()), "a table is linked twice, or leaked");
    assert_eq!(table.table_count(), census.tables.len() as u64, "table count");
    let mut leaves = LeafCount::default();
    for (_, leaf) in &census.leaves {
        leaves.add(leaf.size, 1);
    }
    assert_eq!(table.leaf_count(), leaves, "leaf count");
    assert_code_is_small(&census, table.has_small_code());
    if cfg!(miri) {
        // The iterator starts at the root for every entry: too slow there, and covered by the tests of its own.
        return census;
    }
    let listed = table.leaves(GuestPhysAddr::new(0), u64::MAX, mem).map(|(gpa, leaf)| (gpa.as_u64(), leaf));
    assert!(listed.eq(census.leaves.iter().copied()), "iteration misses or invents a leaf");
    census
}

/// Asserts that code is in small leaves only, if it should be, and that nothing is withheld without need.
#[track_caller]
fn assert_code_is_small(census: &Census, small_code: bool) {
    for (at, leaf) in &census.leaves {
        let large = leaf.size > PageSize::Size4K;
        let executable = leaf.perms.contains(Permissions::EXECUTE);
        assert!(!(small_code && large && executable), "{at:#x} can be executed through a leaf of {:?}", leaf.size);
        assert!(!leaf.withheld || (small_code && large), "{at:#x}: execution is withheld for no reason");
    }
}

const K4: PageSize = PageSize::Size4K;
const M2: PageSize = PageSize::Size2M;
const G1: PageSize = PageSize::Size1G;
const RW: Permissions = Permissions::READ.union(Permissions::WRITE);
const RX: Permissions = Permissions::READ.union(Permissions::EXECUTE);
const RWX: Permissions = Permissions::ALL;
const R: Permissions = Permissions::READ;
const WB: MemoryType = MemoryType::WriteBack;
const UC: MemoryType = MemoryType::Uncacheable;

fn gpa(addr: u64) -> GuestPhysAddr {
    GuestPhysAddr::new(addr)
}

fn hpa(addr: u64) -> HostPhysAddr {
    HostPhysAddr::new(addr)
}
