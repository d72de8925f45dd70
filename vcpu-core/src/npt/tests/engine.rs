// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! One behaviour each. The property tests in `model` show that all of it holds together.

use core::cell::RefCell;
use std::rc::Rc;
use std::vec;

use super::*;

type Table = NestedPageTable<Npt>;

fn four() -> (Table, Frames) {
    let mut mem = Frames::default();
    (Table::new(Levels::Four, &mut mem).unwrap(), mem)
}

/// As the hardware does when the guest touches a page.
pub(super) fn touch<F: Format>(table: &NestedPageTable<F>, mem: &mut Frames, addr: u64, write: bool) {
    let slot = descend::<F>(table.root(), table.levels(), |t, i| mem.read(t, i), addr, Level::LEAVES);
    let Entry::Leaf(leaf) = slot.entry else { panic!("{addr:#x} is not mapped") };
    let leaf = Leaf { accessed: true, dirty: leaf.dirty | write, ..leaf };
    mem.write(slot.table, slot.index, F::encode_leaf(leaf, slot.level.page_size().unwrap()));
}

#[test]
fn a_first_page_needs_a_table_for_each_level_below_the_root() {
    for (levels, tables) in [(Levels::Four, [3, 2, 1]), (Levels::Five, [4, 3, 2])] {
        for (size, expected) in PageSize::ALL.into_iter().zip(tables) {
            let mut mem = Frames::default();
            let mut table = Table::new(levels, &mut mem).unwrap();
            assert_eq!(table.tables_needed(gpa(0), size, &mem), expected);
            assert_eq!(table.map(gpa(0), hpa(0), size, RWX, WB, &mut mem), Ok(Flush::NotNeeded));
            assert_eq!(table.table_count(), expected as u64 + 1);
            assert_sound(&table, &mem);
            table.free_all(&mut mem);
            assert_eq!(mem.live_count(), 0);
        }
    }
}

#[test]
fn a_walk_translates_offsets_and_ends_where_nothing_is_mapped() {
    let (mut table, mut mem) = four();
    let _ = table.map(gpa(0x4000_0000), hpa(0x8000_0000), M2, RX, WB, &mut mem).unwrap();
    let read = |t, i| mem.read(t, i);
    let found = walk::<Npt>(table.root(), Levels::Four, read, gpa(0x4012_3456)).unwrap();
    assert_eq!((found.hpa, found.size, found.perms, found.memory_type), (hpa(0x8012_3456), M2, RX, WB));
    assert_eq!(found, table.query(gpa(0x4012_3456), &mem).unwrap());
    for unmapped in [0, 0x3fff_ffff, 0x4020_0000, 1 << 47, 1 << 48, (1 << 48) + 0x4000_0000, u64::MAX] {
        assert_eq!(walk::<Npt>(table.root(), Levels::Four, read, gpa(unmapped)), None, "{unmapped:#x}");
    }
}

#[test]
fn the_ends_of_the_address_space_can_be_mapped_and_nothing_beyond() {
    for (levels, limit) in [(Levels::Four, 1u64 << 48), (Levels::Five, 1 << 52)] {
        let mut mem = Frames::default();
        let mut table = NestedPageTable::<Ept>::new(levels, &mut mem).unwrap();
        let last = limit - G1.bytes();
        assert!(table.map(gpa(last), hpa((1 << 52) - G1.bytes()), G1, RWX, WB, &mut mem).is_ok());
        assert_eq!(table.map(gpa(limit), hpa(0), K4, RWX, WB, &mut mem), Err(AxError::InvalidInput));
        assert_eq!(table.map(gpa(0), hpa(1 << 52), K4, RWX, WB, &mut mem), Err(AxError::InvalidInput));
        assert_eq!(table.map(gpa(0), hpa(!0xfff), K4, RWX, WB, &mut mem), Err(AxError::InvalidInput));
        assert_eq!(table.query(gpa(limit - 1), &mem).unwrap().hpa, hpa((1 << 52) - 1));
        assert_eq!(table.query(gpa(limit), &mem), None);
        assert_eq!(table.tables_needed(gpa(limit), K4, &mem), 0);
        assert_eq!(table.split(gpa(limit), K4, &mut mem), Err(AxError::NotMapped));
        assert_eq!(table.merge(gpa(limit), M2, &mut mem), Flush::NotNeeded);
        // The last page alone: its end is the limit itself.
        assert_eq!(table.unmap(gpa(limit - 4096), 4096, &mut mem).unwrap().of(K4), 1);
        assert_eq!(table.unmap(gpa(limit - 4096), 8192, &mut mem), Err(AxError::InvalidInput));
        assert_eq!(table.unmap(gpa(!0xfff), 4096, &mut mem), Err(AxError::InvalidInput));
        assert_sound(&table, &mem);
    }
}

#[test]
fn malformed_arguments_are_refused() {
    let (mut table, mut mem) = four();
    for (size, addr, to) in
        [(K4, 0x800, 0x1000), (K4, 0x1000, 0x800), (M2, 0x1000, 0), (M2, 0, 0x1000), (G1, 0, 0x20_0000)]
    {
        assert_eq!(table.map(gpa(addr), hpa(to), size, RWX, WB, &mut mem), Err(AxError::InvalidInput));
    }
    for perms in [Permissions::NONE, Permissions::WRITE, Permissions::EXECUTE] {
        assert_eq!(table.map(gpa(0), hpa(0), K4, perms, WB, &mut mem), Err(AxError::InvalidInput));
        assert_eq!(table.protect(gpa(0), 4096, perms, &mut mem), Err(AxError::InvalidInput));
    }
    for (addr, size) in [(0, 0), (0, 1), (1, 4096), (0x1000, 0x1800), (0x1000, !0xfff), (0, 1 << 49)] {
        assert_eq!(table.unmap(gpa(addr), size, &mut mem), Err(AxError::InvalidInput), "{addr:#x} {size:#x}");
        assert_eq!(table.protect(gpa(addr), size, RWX, &mut mem), Err(AxError::InvalidInput));
        assert_eq!(table.restrict(gpa(addr), size, RWX, &mut mem), Err(AxError::InvalidInput));
    }
    assert_eq!(mem.live_count(), 1);
}

#[test]
fn mapping_what_is_there_changes_nothing_and_asks_for_no_flush() {
    let (mut table, mut mem) = four();
    let _ = table.map(gpa(0), hpa(0x4000_0000), M2, RWX, WB, &mut mem).unwrap();
    touch(&table, &mut mem, 0, true);
    let before = Census::take(&table, &mem);
    mem.budget = Some(0);
    assert_eq!(table.map(gpa(0), hpa(0x4000_0000), M2, RWX, WB, &mut mem), Ok(Flush::NotNeeded));
    assert_eq!(table.map(gpa(0x5000), hpa(0x4000_5000), K4, RWX, WB, &mut mem), Ok(Flush::NotNeeded));
    assert_eq!(Census::take(&table, &mem), before);
}

#[test]
fn a_flush_is_asked_for_exactly_when_something_is_taken_away() {
    let (mut table, mut mem) = four();
    let mut map =
        |to: u64, size, perms, memory_type| table.map(gpa(0), hpa(to), size, perms, memory_type, &mut mem).unwrap();
    assert_eq!(map(0, K4, R, WB), Flush::NotNeeded);
    assert_eq!(map(0, K4, RWX, WB), Flush::NotNeeded, "permissions added");
    assert_eq!(map(0, K4, RX, WB), Flush::Needed, "a permission lost");
    assert_eq!(map(0x1000, K4, RX, WB), Flush::Needed, "another page");
    assert_eq!(map(0x1000, K4, RX, UC), Flush::Needed, "another memory type");
    assert_eq!(map(0, M2, RWX, WB), Flush::Needed, "a table replaced by a leaf");
    assert_eq!(map(0, K4, RX, WB), Flush::Needed, "a leaf split");

    let (mut table, mut mem) = four();
    let _ = table.map(gpa(0), hpa(0), M2, RX, WB, &mut mem).unwrap();
    assert_eq!(table.protect(gpa(0), M2.bytes(), RWX, &mut mem), Ok(Flush::NotNeeded), "permissions added");
    assert_eq!(table.restrict(gpa(0), M2.bytes(), RWX, &mut mem), Ok(Flush::NotNeeded), "nothing changed");
    assert_eq!(table.restrict(gpa(0), M2.bytes(), RX, &mut mem), Ok(Flush::Needed), "write permission lost");
    assert_eq!(table.protect(gpa(0), 4096, RWX, &mut mem), Ok(Flush::Needed), "a leaf split");
    assert_eq!(table.protect(gpa(M2.bytes()), 4096, R, &mut mem), Ok(Flush::NotNeeded), "nothing there");
}

#[test]
fn a_large_page_over_small_ones_frees_their_tables() {
    let (mut table, mut mem) = four();
    for page in [0, 1, 600, 0x3_ffff] {
        let _ = table.map(gpa(page << 12), hpa(page << 12), K4, RWX, WB, &mut mem).unwrap();
    }
    let _ = table.map(gpa(0x60_0000), hpa(0), M2, RWX, WB, &mut mem).unwrap();
    assert_eq!((mem.live_count(), table.leaf_count().of(K4)), (6, 4));
    mem.budget = Some(0);
    assert_eq!(table.map(gpa(0), hpa(0x4000_0000), G1, RWX, WB, &mut mem), Ok(Flush::Needed));
    assert_eq!(table.leaf_count(), LeafCount { size_1g: 1, ..LeafCount::default() });
    assert_eq!(mem.live_count(), 2);
    assert_sound(&table, &mem);
}

#[test]
fn a_small_page_in_a_large_one_leaves_the_rest_as_it_was() {
    let (mut table, mut mem) = four();
    let _ = table.map(gpa(0), hpa(0x4000_0000), G1, RX, UC, &mut mem).unwrap();
    touch(&table, &mut mem, 0, true);
    assert_eq!(table.tables_needed(gpa(0x20_3000), K4, &mem), 2);
    assert_eq!(table.map(gpa(0x20_3000), hpa(0x9000), K4, RWX, WB, &mut mem), Ok(Flush::Needed));
    assert_eq!(table.leaf_count(), LeafCount { size_4k: 512, size_2m: 511, size_1g: 0 });
    for addr in [0u64, 0x1f_ffff, 0x20_2fff, 0x20_4000, 0x3f_ffff, 0x40_0000, 0x3fff_ffff] {
        let found = table.query(gpa(addr), &mem).unwrap();
        assert_eq!((found.hpa, found.perms, found.memory_type), (hpa(0x4000_0000 + addr), RX, UC), "{addr:#x}");
        assert!(found.accessed && found.dirty, "{addr:#x}: the parts inherit what is known of the whole");
    }
    let found = table.query(gpa(0x20_3abc), &mem).unwrap();
    assert_eq!((found.hpa, found.perms, found.memory_type), (hpa(0x9abc), RWX, WB));
    assert!(!found.accessed && !found.dirty);
    assert_eq!(table.leaf_count().bytes(), G1.bytes());
    assert_sound(&table, &mem);
}

#[test]
fn unmap_is_exact_and_zap_takes_whole_leaves() {
    let (mut table, mut mem) = four();
    let _ = table.map(gpa(0), hpa(0), M2, RWX, WB, &mut mem).unwrap();
    let _ = table.map(gpa(M2.bytes()), hpa(M2.bytes()), M2, RWX, WB, &mut mem).unwrap();
    // From the last page of the first to the first page of the second.
    let dropped = table.unmap(gpa(M2.bytes() - 4096), 8192, &mut mem).unwrap();
    assert_eq!(dropped, LeafCount { size_4k: 2, ..LeafCount::default() });
    assert_eq!(table.leaf_count(), LeafCount { size_4k: 1022, ..LeafCount::default() });
    assert!(table.query(gpa(M2.bytes() - 4097), &mem).is_some());
    assert!(table.query(gpa(M2.bytes() + 4096), &mem).is_some());
    assert_eq!(table.query(gpa(M2.bytes() - 1), &mem), None);
    assert_eq!(table.query(gpa(M2.bytes()), &mem), None);

    let (mut table, mut mem) = four();
    let _ = table.map(gpa(0), hpa(0), M2, RWX, WB, &mut mem).unwrap();
    let _ = table.map(gpa(M2.bytes()), hpa(M2.bytes()), K4, RWX, WB, &mut mem).unwrap();
    mem.budget = Some(0);
    // Not even aligned: the last byte of the one and the first of the other.
    assert_eq!(table.zap(gpa(M2.bytes() - 1), 2, &mut mem), LeafCount { size_4k: 1, size_2m: 1, size_1g: 0 });
    assert_eq!(mem.live_count(), 1, "only the root is left");
    assert!(table.zap(gpa(0), u64::MAX, &mut mem).is_empty());
    assert!(table.zap(gpa(u64::MAX), 1, &mut mem).is_empty());
    let _ = table.map(gpa(0), hpa(0), M2, RWX, WB, &mut mem).unwrap_err();
    mem.budget = None;
    let _ = table.map(gpa(0), hpa(0), M2, RWX, WB, &mut mem).unwrap();
    assert!(table.zap(gpa(0x1800), 0, &mut mem).is_empty(), "no byte, no page");
}

#[test]
fn a_split_goes_no_further_than_it_must() {
    let (mut table, mut mem) = four();
    let _ = table.map(gpa(0), hpa(0), G1, RWX, WB, &mut mem).unwrap();
    assert_eq!(
        table.unmap(gpa(0x20_0000), 0x40_0000, &mut mem).unwrap(),
        LeafCount { size_2m: 2, ..LeafCount::default() }
    );
    assert_eq!(table.leaf_count(), LeafCount { size_2m: 510, ..LeafCount::default() });
    assert_eq!(table.protect(gpa(0), 0x20_0000, R, &mut mem), Ok(Flush::Needed));
    assert_eq!(table.leaf_count(), LeafCount { size_2m: 510, ..LeafCount::default() });
}

#[test]
fn tables_are_freed_as_soon_as_they_are_empty() {
    let (mut table, mut mem) = four();
    let far = 1 << 40;
    for addr in [0, 0x1000, far] {
        let _ = table.map(gpa(addr), hpa(0), K4, RWX, WB, &mut mem).unwrap();
    }
    assert_eq!(table.table_count(), 7);
    assert_eq!(table.zap(gpa(0), 4096, &mut mem).of(K4), 1);
    assert_eq!(table.table_count(), 7);
    assert_eq!(table.zap(gpa(0x1000), 4096, &mut mem).of(K4), 1);
    assert_eq!(table.table_count(), 4);
    assert_eq!(table.unmap(gpa(far), 4096, &mut mem).unwrap().of(K4), 1);
    assert_eq!(table.table_count(), 1);
    assert_sound(&table, &mem);
}

#[test]
fn protect_sets_and_restrict_only_takes() {
    let (mut table, mut mem) = four();
    for (addr, perms) in [(0, R), (0x1000, RW), (0x2000, RWX)] {
        let _ = table.map(gpa(addr), hpa(addr), K4, perms, WB, &mut mem).unwrap();
    }
    let perms = |table: &Table, mem: &Frames| [0, 0x1000, 0x2000].map(|a| table.query(gpa(a), mem).unwrap().perms);
    assert_eq!(table.restrict(gpa(0), 0x3000, RX, &mut mem), Ok(Flush::Needed));
    assert_eq!(perms(&table, &mem), [R, R, RX]);
    assert_eq!(table.protect(gpa(0x1000), 0x2000, RW, &mut mem), Ok(Flush::Needed));
    assert_eq!(perms(&table, &mem), [R, RW, RW]);
}

#[test]
fn protect_splits_only_what_changes() {
    let (mut table, mut mem) = four();
    let _ = table.map(gpa(0), hpa(0), M2, RX, WB, &mut mem).unwrap();
    mem.budget = Some(0);
    assert_eq!(table.protect(gpa(0x1000), 4096, RX, &mut mem), Ok(Flush::NotNeeded));
    assert_eq!(table.restrict(gpa(0x1000), 4096, RWX, &mut mem), Ok(Flush::NotNeeded));
    assert_eq!(table.leaf_count().of(M2), 1);
    assert_eq!(table.protect(gpa(0x1000), 4096, R, &mut mem), Err(AxError::NoMemory));
    mem.budget = None;
    assert_eq!(table.protect(gpa(0x1000), 4096, R, &mut mem), Ok(Flush::Needed));
    assert_eq!(table.leaf_count(), LeafCount { size_4k: 512, ..LeafCount::default() });
    let perms = [0, 0x1000, 0x2000].map(|a| table.query(gpa(a), &mem).unwrap().perms);
    assert_eq!(perms, [RX, R, RX]);
}

#[test]
fn a_call_that_runs_out_of_frames_changes_nothing() {
    // Both ends of the range need two tables each: fail at each of the four.
    for budget in 0..4 {
        let (mut table, mut mem) = four();
        let _ = table.map(gpa(0), hpa(0), G1, RWX, WB, &mut mem).unwrap();
        let _ = table.map(gpa(G1.bytes()), hpa(G1.bytes()), G1, RX, WB, &mut mem).unwrap();
        let before = assert_sound(&table, &mem);
        mem.budget = Some(budget);
        let (start, size) = (gpa(G1.bytes() - 4096), 8192);
        assert_eq!(table.unmap(start, size, &mut mem), Err(AxError::NoMemory));
        assert_eq!(assert_sound(&table, &mem), before);
        mem.budget = Some(budget);
        assert_eq!(table.protect(start, size, R, &mut mem), Err(AxError::NoMemory));
        assert_eq!(assert_sound(&table, &mem), before);
        mem.budget = Some(4);
        assert!(table.unmap(start, size, &mut mem).is_ok());
        assert_sound(&table, &mem);
    }
    for budget in 0..4 {
        let mut mem = Frames::default();
        let mut table = Table::new(Levels::Five, &mut mem).unwrap();
        mem.budget = Some(budget);
        assert_eq!(table.map(gpa(0), hpa(0), K4, RWX, WB, &mut mem), Err(AxError::NoMemory));
        assert_eq!((mem.live_count(), mem.given_back), (1, budget));
        assert_sound(&table, &mem);
    }
    let mut mem = Frames { budget: Some(0), ..Frames::default() };
    assert_eq!(Table::new(Levels::Four, &mut mem).err(), Some(AxError::NoMemory));
}

#[test]
fn split_and_merge_are_inverse() {
    let (mut table, mut mem) = four();
    let _ = table.map(gpa(0), hpa(0x4000_0000), G1, RX, WB, &mut mem).unwrap();
    let whole = assert_sound(&table, &mem);
    assert_eq!(table.split(gpa(0x32_3456), M2, &mut mem), Ok(Flush::Needed));
    assert_sound(&table, &mem);
    assert_eq!(table.split(gpa(0x12_3456), K4, &mut mem), Ok(Flush::Needed));
    assert_eq!(table.split(gpa(0x12_3456), M2, &mut mem), Ok(Flush::NotNeeded));
    assert_eq!(table.leaf_count(), LeafCount { size_4k: 512, size_2m: 511, size_1g: 0 });
    assert_eq!(table.merge(gpa(0), G1, &mut mem), Flush::NotNeeded, "one part is still in small pages");
    assert_eq!(table.merge(gpa(0x20_0000), M2, &mut mem), Flush::NotNeeded, "not split");
    mem.budget = Some(0);
    assert_eq!(table.merge(gpa(0x1f_ffff), M2, &mut mem), Flush::Needed);
    assert_eq!(table.merge(gpa(0x3fff_ffff), G1, &mut mem), Flush::Needed);
    assert_eq!(table.merge(gpa(0), G1, &mut mem), Flush::NotNeeded);
    assert_eq!(table.merge(gpa(0), K4, &mut mem), Flush::NotNeeded);
    assert_eq!(assert_sound(&table, &mem), whole);
    assert_eq!(table.split(gpa(G1.bytes()), K4, &mut mem), Err(AxError::NotMapped));
    assert_eq!(table.split(gpa(0), M2, &mut mem), Err(AxError::NoMemory));
    assert_eq!(assert_sound(&table, &mem), whole);
}

/// A table with code in small leaves only, and a frame of 2 MiB in it that may be executed.
fn small_code() -> (Table, Frames) {
    let (table, mut mem) = four();
    let mut table = table.with_small_code();
    assert_eq!(table.map(gpa(0), hpa(0x4000_0000), M2, RWX, WB, &mut mem), Ok(Flush::NotNeeded));
    (table, mem)
}

fn query(table: &Table, mem: &Frames, at: u64) -> (PageSize, Permissions, bool) {
    let found = table.query(gpa(at), mem).unwrap();
    assert_eq!(found.hpa, hpa(0x4000_0000 + at));
    (found.size, found.perms, found.withheld)
}

#[test]
fn a_large_leaf_withholds_execution_and_its_parts_give_it() {
    let (mut table, mut mem) = small_code();
    assert_eq!(query(&table, &mem, 0x5000), (M2, RW, true));
    // Again, or with permissions that go and come: it stays withheld.
    assert_eq!(table.map(gpa(0), hpa(0x4000_0000), M2, RWX, WB, &mut mem), Ok(Flush::NotNeeded));
    assert_eq!(table.restrict(gpa(0), M2.bytes(), RX, &mut mem), Ok(Flush::Needed), "write permission lost");
    assert_eq!(query(&table, &mem, 0x5000), (M2, R, true));
    assert_eq!(table.protect(gpa(0), M2.bytes(), RWX, &mut mem), Ok(Flush::NotNeeded));
    assert_eq!(query(&table, &mem, 0x5000), (M2, RW, true));
    assert_eq!(table.split(gpa(0x5000), K4, &mut mem), Ok(Flush::Needed));
    for page in [0, 0x5000, 0x1f_f000] {
        assert_eq!(query(&table, &mem, page), (K4, RWX, false));
    }
    assert_eq!(table.merge(gpa(0), M2, &mut mem), Flush::Needed);
    assert_eq!(query(&table, &mem, 0x5000), (M2, RW, true));
    assert_sound(&table, &mem);
}

#[test]
fn a_small_page_mapped_for_execution_splits_a_large_leaf_that_withholds_it() {
    let (mut table, mut mem) = small_code();
    // Otherwise the same translation: without this the guest would fault for ever.
    assert_eq!(table.map(gpa(0x5000), hpa(0x4000_5000), K4, RWX, WB, &mut mem), Ok(Flush::Needed));
    assert_eq!(query(&table, &mem, 0x5000), (K4, RWX, false));
    assert_eq!(query(&table, &mem, 0x6000), (K4, RWX, false));
    // What is not allowed is not withheld, and comes with no part.
    let (mut table, mut mem) = small_code();
    assert_eq!(table.protect(gpa(0), M2.bytes(), RW, &mut mem), Ok(Flush::NotNeeded), "what it had not is not lost");
    assert_eq!(query(&table, &mem, 0), (M2, RW, false));
    assert_eq!(table.split(gpa(0), K4, &mut mem), Ok(Flush::Needed));
    assert_eq!(query(&table, &mem, 0), (K4, RW, false));
    // Half of the way is not enough.
    let (mut table, mut mem) = four();
    table = table.with_small_code();
    let _ = table.map(gpa(0), hpa(0x4000_0000), G1, RX, WB, &mut mem).unwrap();
    assert_eq!(table.split(gpa(0), M2, &mut mem), Ok(Flush::Needed));
    assert_eq!(query(&table, &mem, 0x20_0000), (M2, R, true));
    assert_sound(&table, &mem);
}

#[test]
#[cfg_attr(miri, ignore = "walks at each of thousands of stores: minutes under Miri, and nothing here is unsafe")]
fn no_large_leaf_can_be_executed_at_any_moment() {
    let (mut table, mut mem) = small_code();
    let root = table.root();
    mem.observer = Some(Box::new(move |mem| {
        let mut census = Census::default();
        census.visit::<Npt>(root, Levels::Four.top(), 0, mem);
        assert_code_is_small(&census, true);
    }));
    let _ = table.split(gpa(0), K4, &mut mem).unwrap();
    let _ = table.merge(gpa(0), M2, &mut mem);
    let _ = table.map(gpa(0), hpa(0), G1, RX, WB, &mut mem).unwrap();
    let _ = table.protect(gpa(0x1000), 0x20_0000, RWX, &mut mem).unwrap();
    mem.budget = Some(1);
    assert_eq!(table.unmap(gpa(0x40_1000), 0x20_0000, &mut mem), Err(AxError::NoMemory));
    mem.budget = None;
    touch(&table, &mut mem, 0x80_0000, true);
    assert!(table.clear_accessed(gpa(0x80_0000), 1, &mut mem));
    mem.observer = None;
    assert_sound(&table, &mem);
}

#[test]
fn merge_refuses_what_is_not_one_page() {
    let full = |skew: u64| {
        let (mut table, mut mem) = four();
        for page in 0..512 {
            let _ = table.map(gpa(page << 12), hpa((page << 12) + skew), K4, RWX, WB, &mut mem).unwrap();
        }
        (table, mem)
    };
    let (mut table, mut mem) = full(0x1000);
    assert_eq!(table.merge(gpa(0), M2, &mut mem), Flush::NotNeeded, "host address not aligned");
    let (mut table, mut mem) = full(0);
    for page in 0..512 {
        // Every other host page twice: what an OR of addresses would take for contiguous.
        let _ = table.map(gpa(page << 12), hpa((page << 12) | 0x1000), K4, RWX, WB, &mut mem).unwrap();
    }
    assert_eq!(table.merge(gpa(0), M2, &mut mem), Flush::NotNeeded, "two guest pages on one host page");
    for page in [0u64, 1, 300, 511] {
        let (mut table, mut mem) = full(0);
        let at = page << 12;
        let _ = table.map(gpa(at), hpa(at), K4, RX, WB, &mut mem).unwrap();
        assert_eq!(table.merge(gpa(0), M2, &mut mem), Flush::NotNeeded, "other permissions at {page}");
        let _ = table.map(gpa(at), hpa(at), K4, RWX, UC, &mut mem).unwrap();
        assert_eq!(table.merge(gpa(0), M2, &mut mem), Flush::NotNeeded, "other memory type at {page}");
        let _ = table.map(gpa(at), hpa(at + M2.bytes()), K4, RWX, WB, &mut mem).unwrap();
        assert_eq!(table.merge(gpa(0), M2, &mut mem), Flush::NotNeeded, "not contiguous at {page}");
        assert_eq!(table.zap(gpa(at), 1, &mut mem).of(K4), 1);
        assert_eq!(table.merge(gpa(0), M2, &mut mem), Flush::NotNeeded, "a hole at {page}");
        let _ = table.map(gpa(at), hpa(at), K4, RWX, WB, &mut mem).unwrap();
        touch(&table, &mut mem, 0x7000, true);
        assert_eq!(table.merge(gpa(0), M2, &mut mem), Flush::Needed);
        let found = table.query(gpa(0), &mem).unwrap();
        assert!(found.accessed && found.dirty, "the whole knows what its parts knew");
        assert_sound(&table, &mem);
    }
}

fn accessed_and_dirty<F: Format>() {
    let mut mem = Frames::default();
    let mut table = NestedPageTable::<F>::new(Levels::Four, &mut mem).unwrap();
    let _ = table.map(gpa(0), hpa(0), K4, RX, WB, &mut mem).unwrap();
    let _ = table.map(gpa(0x1000), hpa(0x1000), K4, RWX, WB, &mut mem).unwrap();
    let bits = |table: &NestedPageTable<F>, mem: &Frames, addr| {
        let found = table.query(gpa(addr), mem).unwrap();
        (found.accessed, found.dirty)
    };
    assert!(!table.clear_accessed(gpa(0), 0x2000, &mut mem));
    touch(&table, &mut mem, 0, false);
    touch(&table, &mut mem, 0x1000, true);
    assert_eq!((bits(&table, &mem, 0), bits(&table, &mem, 0x1000)), ((true, false), (true, true)));
    let _ = table.restrict(gpa(0), 0x2000, RX, &mut mem).unwrap();
    assert_eq!(bits(&table, &mem, 0x1000), (true, true), "permissions leave them");
    assert!(table.clear_accessed(gpa(0x1fff), 1, &mut mem));
    assert!(!table.clear_accessed(gpa(0x1fff), 1, &mut mem));
    assert_eq!((bits(&table, &mem, 0), bits(&table, &mem, 0x1000)), ((true, false), (false, true)));
    touch(&table, &mut mem, 0x1000, true);
    let _ = table.map(gpa(0x1000), hpa(0x1000), K4, RWX, WB, &mut mem).unwrap();
    assert_eq!(bits(&table, &mem, 0x1000), (true, true), "the same page again leaves them");
    let _ = table.map(gpa(0x1000), hpa(0x5000), K4, RWX, WB, &mut mem).unwrap();
    assert_eq!(bits(&table, &mem, 0x1000), (false, false), "another page begins anew");
}

#[test]
fn accessed_and_dirty_bits_follow_the_page() {
    accessed_and_dirty::<Npt>();
    accessed_and_dirty::<Ept>();
}

#[test]
fn iteration_begins_with_the_leaf_around_the_start() {
    let (mut table, mut mem) = four();
    for (addr, size) in [(0, M2), (0x40_0000, K4), (0x40_2000, K4), (G1.bytes(), G1)] {
        let _ = table.map(gpa(addr), hpa(addr), size, RWX, WB, &mut mem).unwrap();
    }
    let list = |from: u64, size: u64| -> Vec<_> {
        table.leaves(gpa(from), size, &mem).map(|(at, leaf)| (at.as_u64(), leaf.size)).collect()
    };
    assert_eq!(list(0x1f_ffff, 0x20_1002), vec![(0, M2), (0x40_0000, K4)]);
    assert_eq!(list(0x40_1000, u64::MAX), vec![(0x40_2000, K4), (G1.bytes(), G1)]);
    assert_eq!(list(G1.bytes() * 2 - 1, 1), vec![(G1.bytes(), G1)]);
    assert_eq!(list(0x40_1000, 0x1000), vec![]);
}

/// Runs `change` and asserts that, whatever store of it the hardware has seen, each of `probes` translates as before or as
/// after, and that it never goes back.
fn assert_each_store_is_a_whole_step(
    prepare: impl FnOnce(&mut Table, &mut Frames),
    change: impl FnOnce(&mut Table, &mut Frames),
    probes: &'static [u64],
) {
    let (mut table, mut mem) = four();
    prepare(&mut table, &mut mem);
    let root = table.root();
    let look = move |mem: &Frames| -> Vec<_> {
        let walk = |&p: &u64| walk::<Npt>(root, Levels::Four, |t, i| mem.read(t, i), gpa(p));
        probes.iter().map(|p| walk(p).map(|m| (m.hpa, m.perms, m.memory_type))).collect()
    };
    let seen = Rc::new(RefCell::new(vec![look(&mem)]));
    let log = seen.clone();
    mem.observer = Some(Box::new(move |mem| log.borrow_mut().push(look(mem))));
    change(&mut table, &mut mem);
    mem.observer = None;
    let seen = seen.borrow();
    assert!(seen.len() > 1, "nothing was stored");
    for (probe, addr) in probes.iter().enumerate() {
        let mut steps: Vec<_> = seen.iter().map(|all| all[probe]).collect();
        steps.dedup();
        assert!(steps.len() <= 2, "{addr:#x} goes through {steps:x?}");
    }
    assert_sound(&table, &mem);
}

#[test]
#[cfg_attr(miri, ignore = "walks at each of thousands of stores: minutes under Miri, and nothing here is unsafe")]
fn the_hardware_sees_the_old_or_the_new_at_every_moment() {
    const PROBES: &[u64] = &[0, 0x1000, 0x2000, 0x1f_f000, 0x20_0000, 0x20_1000, 0x40_0000, 0x3fff_f000, 0x4000_0000];
    let large = |table: &mut Table, mem: &mut Frames| {
        let _ = table.map(gpa(0), hpa(0x8000_0000), G1, RWX, WB, mem).unwrap();
    };
    // A walk that meets a freed table panics, so frees are covered as well.
    assert_each_store_is_a_whole_step(|_, _| {}, large, PROBES);
    assert_each_store_is_a_whole_step(
        large,
        |t, m| {
            let _ = t.map(gpa(0x1000), hpa(0), K4, RX, WB, m).unwrap();
        },
        PROBES,
    );
    assert_each_store_is_a_whole_step(large, |t, m| assert!(t.unmap(gpa(0x1000), 0x20_0000, m).is_ok()), PROBES);
    assert_each_store_is_a_whole_step(large, |t, m| assert!(t.protect(gpa(0x1000), 0x20_0000, R, m).is_ok()), PROBES);
    assert_each_store_is_a_whole_step(
        large,
        |t, m| {
            m.budget = Some(2);
            assert_eq!(t.unmap(gpa(0x1000), 0x20_0000, m), Err(AxError::NoMemory));
        },
        PROBES,
    );
    let split = |t: &mut Table, m: &mut Frames| {
        large(t, m);
        let _ = t.split(gpa(0), K4, m).unwrap();
    };
    assert_each_store_is_a_whole_step(split, |t, m| assert!(t.merge(gpa(0), M2, m).is_needed()), PROBES);
    assert_each_store_is_a_whole_step(
        split,
        |t, m| {
            let _ = t.map(gpa(0), hpa(0), G1, RX, UC, m).unwrap();
        },
        PROBES,
    );
    assert_each_store_is_a_whole_step(split, |t, m| assert_eq!(t.zap(gpa(0), u64::MAX, m).of(M2), 511), PROBES);
}
