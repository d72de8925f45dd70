// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! Random sequences of calls against a plain map of pages.
//!
//! After every call the tables are walked entry by entry and compared with the model over the whole address space, counts,
//! links and frames are checked, and what the call said about flushes is compared with what the difference of the two
//! states demands. Allocations fail at random.

use std::collections::BTreeMap;

use proptest::prelude::*;
use proptest::test_runner::TestCaseResult;

use super::*;

/// What the model knows of a page: the distance of its host address from its guest address, and its attributes. Permissions
/// are those of the page, of which a large leaf may withhold one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Page {
    delta: u64,
    perms: Permissions,
    memory_type: MemoryType,
}

/// A map of 4 KiB pages, stored as runs: first guest address to (address after the last, what all pages of the run
/// have). Runs do not overlap.
#[derive(Clone, Debug, Default)]
struct Model(BTreeMap<u64, (u64, Page)>);

impl Model {
    /// Makes `at` the border of two runs.
    fn cut(&mut self, at: u64) {
        if let Some((&start, &(end, page))) = self.0.range(..at).next_back() {
            if end > at {
                self.0.insert(start, (at, page));
                self.0.insert(at, (end, page));
            }
        }
    }

    fn remove(&mut self, start: u64, end: u64) {
        self.cut(start);
        self.cut(end);
        self.0.retain(|&first, _| first < start || first >= end);
    }

    fn insert(&mut self, start: u64, end: u64, page: Page) {
        self.remove(start, end);
        self.0.insert(start, (end, page));
    }

    fn set_permissions(&mut self, start: u64, end: u64, new: impl Fn(Permissions) -> Permissions) {
        self.cut(start);
        self.cut(end);
        for (_, (_, page)) in self.0.range_mut(start..end) {
            page.perms = new(page.perms);
        }
    }

    fn get(&self, addr: u64) -> Option<Page> {
        self.0.range(..=addr).next_back().filter(|(_, (end, _))| *end > addr).map(|(_, (_, page))| *page)
    }

    fn is_empty(&self, start: u64, end: u64) -> bool {
        self.get(start).is_none() && self.0.range(start..end).next().is_none()
    }

    /// The runs, as long as they can be.
    fn runs(&self) -> Vec<(u64, u64, Page)> {
        joined(self.0.iter().map(|(&start, &(end, page))| (start, end, page)))
    }

    /// Whether a page that `self` maps is not mapped by `later`, or elsewhere, or with fewer permissions.
    fn is_lost_in(&self, later: &Self) -> bool {
        let mut borders: Vec<u64> =
            [self, later].iter().flat_map(|m| m.0.iter()).flat_map(|(s, (e, _))| [*s, *e]).collect();
        borders.sort_unstable();
        // Between two borders all pages are alike in both.
        borders.iter().any(|&at| match (self.get(at), later.get(at)) {
            (Some(old), Some(new)) => {
                old.delta != new.delta || old.memory_type != new.memory_type || !new.perms.contains(old.perms)
            }
            (old, _) => old.is_some(),
        })
    }
}

fn joined(runs: impl Iterator<Item = (u64, u64, Page)>) -> Vec<(u64, u64, Page)> {
    let mut out: Vec<(u64, u64, Page)> = Vec::new();
    for run in runs {
        match out.last_mut() {
            Some(last) if last.1 == run.0 && last.2 == run.2 => last.1 = run.1,
            _ => out.push(run),
        }
    }
    out
}

/// What a census has found, with the permissions that `perms` makes of each leaf.
fn runs_of(census: &Census, perms: impl Fn(&Mapping) -> Permissions) -> Vec<(u64, u64, Page)> {
    joined(census.leaves.iter().map(|(start, leaf)| {
        let page = Page { delta: leaf.hpa.as_u64() - start, perms: perms(leaf), memory_type: leaf.memory_type };
        (*start, start + leaf.size.bytes(), page)
    }))
}

/// What the hardware does with what a census has found.
fn hardware(census: &Census) -> Model {
    Model(runs_of(census, |leaf| leaf.perms).into_iter().map(|(start, end, page)| (start, (end, page))).collect())
}

fn rights(leaf: &Mapping) -> Permissions {
    if leaf.withheld {
        leaf.perms.union(Permissions::EXECUTE)
    } else {
        leaf.perms
    }
}

fn sizes(census: &Census) -> Vec<(u64, PageSize)> {
    census.leaves.iter().map(|(start, leaf)| (*start, leaf.size)).collect()
}

#[derive(Clone, Debug)]
enum Op {
    Map {
        addr: u64,
        size: PageSize,
        delta: u64,
        perms: Permissions,
        memory_type: MemoryType,
    },
    MapEmpty {
        addr: u64,
        size: PageSize,
        perms: Permissions,
    },
    Unmap {
        start: u64,
        end: u64,
    },
    Zap {
        start: u64,
        end: u64,
    },
    Protect {
        start: u64,
        end: u64,
        perms: Permissions,
    },
    Restrict {
        start: u64,
        end: u64,
        perms: Permissions,
    },
    Split {
        addr: u64,
        size: PageSize,
    },
    Merge {
        addr: u64,
        size: PageSize,
    },
    /// The guest touches a page.
    Touch {
        addr: u64,
        write: bool,
    },
}

/// Addresses that meet often, at the borders of every level: gigabytes at both sides of a level 4 entry's border and at the ends
/// of the address space, and in them the first and last entries of level 2 and of level 1.
fn address(levels: Levels) -> BoxedStrategy<u64> {
    let gigabytes: Vec<u64> = [0, 1, 511, 512, (levels.limit() >> 30) - 1].into();
    let entry = prop_oneof![4 => 0u64..3, 2 => 510u64..512, 1 => 0u64..512];
    (proptest::sample::select(gigabytes), entry.clone(), entry)
        .prop_map(|(gigabyte, large, small)| (gigabyte << 30) | (large << 21) | (small << 12))
        .boxed()
}

/// A range of at most a few gigabytes: of some pages, between two addresses, or of a whole entry.
fn range(levels: Levels) -> BoxedStrategy<(u64, u64)> {
    let limit = levels.limit();
    prop_oneof![
        (address(levels), 1u64..4).prop_map(move |(start, pages)| (start, (start + pages * 4096).min(limit))),
        (address(levels), address(levels)).prop_map(|(a, b)| (a.min(b), a.max(b) + 4096)),
        (address(levels), page_size()).prop_map(|(addr, size)| {
            let start = addr & !(size.bytes() - 1);
            (start, start + size.bytes())
        }),
    ]
    .boxed()
}

fn page_size() -> impl Strategy<Value = PageSize> {
    prop_oneof![4 => Just(K4), 3 => Just(M2), 2 => Just(G1)]
}

fn permissions() -> impl Strategy<Value = Permissions> {
    proptest::sample::select(&[R, RX, RW, RWX, RWX, RWX][..])
}

fn operation(levels: Levels) -> BoxedStrategy<Op> {
    // Few distances, so that neighbours are often contiguous; the last one fits 4 KiB pages only.
    let delta = prop_oneof![6 => Just(0u64), 2 => Just(1u64 << 40), 1 => Just(0x1000u64)];
    let memory_type = prop_oneof![9 => Just(WB), 1 => Just(UC)];
    prop_oneof![
        10 => (address(levels), page_size(), delta, permissions(), memory_type).prop_map(
            |(addr, size, delta, perms, memory_type)| {
                let size = if delta & (size.bytes() - 1) == 0 { size } else { K4 };
                // Host addresses end at 2^52.
                let delta = if addr + delta < PHYS_LIMIT - G1.bytes() { delta } else { 0 };
                Op::Map { addr: addr & !(size.bytes() - 1), size, delta, perms, memory_type }
            }
        ),
        4 => (address(levels), page_size(), permissions())
            .prop_map(|(addr, size, perms)| Op::MapEmpty { addr: addr & !(size.bytes() - 1), size, perms }),
        4 => range(levels).prop_map(|(start, end)| Op::Unmap { start, end }),
        2 => range(levels).prop_map(|(start, end)| Op::Zap { start, end }),
        4 => (range(levels), permissions()).prop_map(|((start, end), perms)| Op::Protect { start, end, perms }),
        3 => (range(levels), permissions()).prop_map(|((start, end), perms)| Op::Restrict { start, end, perms }),
        2 => (address(levels), page_size()).prop_map(|(addr, size)| Op::Split { addr, size }),
        4 => (address(levels), page_size()).prop_map(|(addr, size)| Op::Merge { addr, size }),
        2 => (address(levels), any::<bool>()).prop_map(|(addr, write)| Op::Touch { addr, write }),
    ]
    // Value trees of nested unions are large; on the heap they do not fill the stack of a test's thread.
    .boxed()
}

/// One call, and how many frames it may allocate.
type Step = (Op, Option<usize>);

fn steps(levels: Levels) -> impl Strategy<Value = Vec<Step>> {
    let budget = prop_oneof![3 => Just(None), 2 => (0usize..5).prop_map(Some)];
    proptest::collection::vec((operation(levels), budget), 1..if cfg!(miri) { 4 } else { 40 })
}

struct Pair<F: Format> {
    table: NestedPageTable<F>,
    mem: Frames,
    model: Model,
    census: Census,
}

impl<F: Format> Pair<F> {
    fn new(levels: Levels, small_code: bool) -> Self {
        let mut mem = Frames::default();
        let table = NestedPageTable::new(levels, &mut mem).unwrap();
        let table = if small_code { table.with_small_code() } else { table };
        let census = assert_sound(&table, &mem);
        Self { table, mem, model: Model::default(), census }
    }

    fn step(&mut self, op: &Op, budget: Option<usize>) -> TestCaseResult {
        let frames = self.mem.live_count();
        self.mem.budget = budget;
        // What the call says: whether a flush is needed, or an error.
        let said = self.apply(op);
        self.mem.budget = None;

        let census = assert_sound(&self.table, &self.mem);
        prop_assert_eq!(runs_of(&census, rights), self.model.runs());
        let lost = hardware(&self.census).is_lost_in(&hardware(&census));

        match said {
            Err(error) => {
                prop_assert_eq!(error, AxError::NoMemory);
                prop_assert_eq!(&census, &self.census, "a failed call has changed something");
                prop_assert_eq!(self.mem.live_count(), frames);
            }
            Ok(Flush::NotNeeded) => {
                prop_assert!(!lost, "a flush was not asked for");
                // Nor may a leaf have given way to leaves of another size.
                for (start, leaf) in &self.census.leaves {
                    let now = self.table.query(gpa(*start), &self.mem);
                    prop_assert_eq!(now.map(|now| now.size), Some(leaf.size));
                }
            }
            Ok(Flush::Needed) => {
                prop_assert!(lost || sizes(&census) != sizes(&self.census), "a flush for nothing");
            }
        }
        self.check_dirty(op, &census)?;
        self.census = census;
        Ok(())
    }

    /// A dirty page stays dirty for as long as it is mapped, and no page becomes so by itself.
    fn check_dirty(&self, op: &Op, now: &Census) -> TestCaseResult {
        if let Op::Touch { .. } = op {
            return Ok(());
        }
        let dirty = |census: &Census| -> Vec<(u64, u64, u64)> {
            let dirty = census.leaves.iter().filter(|(_, leaf)| leaf.dirty);
            dirty.map(|(at, leaf)| (*at, at + leaf.size.bytes(), leaf.hpa.as_u64() - at)).collect()
        };
        let (old, new) = (dirty(&self.census), dirty(now));
        for (start, end, delta) in &old {
            for (at, leaf) in self.table.leaves(gpa(*start), end - start, &self.mem) {
                // A page mapped again by the very call that dropped it, as part of a larger one, begins anew.
                let mapped_anew = matches!(op, Op::Map { .. }) && leaf.size.bytes() > end - start;
                let same_page = leaf.hpa.as_u64() - at.as_u64() == *delta;
                prop_assert!(leaf.dirty || !same_page || mapped_anew, "{:?} is no longer dirty", at);
            }
        }
        for (start, end, _) in &new {
            prop_assert!(old.iter().any(|(s, e, _)| s < end && start < e), "{start:#x} is dirty for no reason");
        }
        Ok(())
    }

    fn apply(&mut self, op: &Op) -> AxResult<Flush> {
        let Self { table, mem, model, census } = self;
        let span = |start: u64, end: u64| (gpa(start), end - start);
        match *op {
            Op::Map { addr, size, delta, perms, memory_type } => {
                let needed = table.tables_needed(gpa(addr), size, mem);
                let page = Page { delta, perms, memory_type };
                let withheld = table.has_small_code() && size > K4 && perms.contains(Permissions::EXECUTE);
                let known = table.query(gpa(addr), mem).is_some_and(|m| {
                    m.size >= size
                        && (m.hpa, rights(&m), m.memory_type) == (hpa(addr + delta), perms, memory_type)
                        && m.withheld == withheld
                });
                let enough = mem.budget.is_none_or(|budget| budget >= needed);
                let frames = mem.live_count();
                let said = table.map(gpa(addr), hpa(addr + delta), size, perms, memory_type, mem);
                assert_eq!(said.is_ok(), known || enough, "{needed} tables were needed");
                if said.is_ok() && !known {
                    model.insert(addr, addr + size.bytes(), page);
                    let now = table.query(gpa(addr), mem).map(|m| (m.size, m.withheld));
                    assert_eq!(now, Some((size, withheld)));
                    assert!(mem.live_count() <= frames + needed as u64);
                }
                said
            }
            Op::MapEmpty { addr, size, perms } => {
                let empty = model.is_empty(addr, addr + size.bytes());
                if table.map_empty(gpa(addr), hpa(addr), size, perms, WB, mem)? {
                    assert!(empty);
                    model.insert(addr, addr + size.bytes(), Page { delta: 0, perms, memory_type: WB });
                } else {
                    assert!(!empty);
                }
                Ok(Flush::NotNeeded)
            }
            Op::Unmap { start, end } => {
                let (at, size) = span(start, end);
                let dropped = table.unmap(at, size, mem)?;
                assert_eq!(dropped.is_empty(), model.is_empty(start, end));
                model.remove(start, end);
                Ok(Flush::needed_if(!dropped.is_empty()))
            }
            Op::Zap { start, end } => {
                mem.budget = Some(0);
                let (at, size) = span(start, end);
                // Not even aligned: a byte at each end is enough.
                let dropped = table.zap(gpa(at.as_u64() + 4095), size - 4095, mem);
                let mut expected = LeafCount::default();
                for (first, leaf) in &census.leaves {
                    let last = first + leaf.size.bytes();
                    if *first < end && start < last {
                        expected.add(leaf.size, 1);
                        model.remove(*first, last);
                    }
                }
                assert_eq!(dropped, expected);
                Ok(Flush::needed_if(!dropped.is_empty()))
            }
            Op::Protect { start, end, perms } => {
                let (at, size) = span(start, end);
                let flush = table.protect(at, size, perms, mem)?;
                model.set_permissions(start, end, |_| perms);
                Ok(flush)
            }
            Op::Restrict { start, end, perms } => {
                let (at, size) = span(start, end);
                let flush = table.restrict(at, size, perms, mem)?;
                model.set_permissions(start, end, |old| old.intersection(perms));
                Ok(flush)
            }
            Op::Split { addr, size } => match table.split(gpa(addr), size, mem) {
                Err(AxError::NotMapped) => {
                    assert_eq!(table.query(gpa(addr), mem), None);
                    Ok(Flush::NotNeeded)
                }
                said => {
                    let now = table.query(gpa(addr), mem);
                    assert!(said.is_err() || now.is_none_or(|m| m.size <= size && !(m.withheld && size == K4)));
                    said
                }
            },
            Op::Merge { addr, size } => {
                mem.budget = Some(0);
                let said = table.merge(gpa(addr), size, mem);
                if said.is_needed() {
                    assert_eq!(table.query(gpa(addr), mem).map(|m| m.size), Some(size));
                }
                Ok(said)
            }
            Op::Touch { addr, write } => {
                if table.query(gpa(addr), mem).is_some() {
                    super::engine::touch(table, mem, addr, write);
                }
                Ok(Flush::NotNeeded)
            }
        }
    }
}

fn ipa(bits: u32) -> Levels {
    Levels::Ipa(IpaBits::new(bits).unwrap())
}

fn run<F: Format>(levels: Levels, small_code: bool, steps: &[Step]) -> TestCaseResult {
    let mut pair = Pair::<F>::new(levels, small_code);
    for (op, budget) in steps {
        pair.step(op, *budget)?;
    }
    pair.table.free_all(&mut pair.mem);
    prop_assert_eq!(pair.mem.live_count(), 0, "frames leaked");
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: if cfg!(miri) { 1 } else { 96 },
        // Files cannot be written under Miri's isolation; a failure prints its steps.
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn npt_of_4_levels_is_a_map_of_pages(small_code in any::<bool>(), steps in steps(Levels::Four)) {
        run::<Npt>(Levels::Four, small_code, &steps)?;
    }

    #[test]
    fn npt_of_5_levels_is_a_map_of_pages(small_code in any::<bool>(), steps in steps(Levels::Five)) {
        run::<Npt>(Levels::Five, small_code, &steps)?;
    }

    #[test]
    fn ept_of_4_levels_is_a_map_of_pages(small_code in any::<bool>(), steps in steps(Levels::Four)) {
        run::<Ept>(Levels::Four, small_code, &steps)?;
    }

    #[test]
    fn stage2_of_40_bits_is_a_map_of_pages(small_code in any::<bool>(), steps in steps(ipa(40))) {
        run::<Stage2Lpa2>(ipa(40), small_code, &steps)?;
    }

    #[test]
    fn stage2_of_52_bits_is_a_map_of_pages(small_code in any::<bool>(), steps in steps(ipa(52))) {
        run::<Stage2Lpa2>(ipa(52), small_code, &steps)?;
    }

    #[test]
    fn ept_of_5_levels_is_a_map_of_pages(small_code in any::<bool>(), steps in steps(Levels::Five)) {
        run::<Ept>(Levels::Five, small_code, &steps)?;
    }
}
