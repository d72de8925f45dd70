// SPDX-License-Identifier: MIT OR Apache-2.0
//! Walks through tables built by hand: each mode, each right, each fault code, accessed and dirty bits, reserved bits.

use std::collections::HashMap;
use std::convert::Infallible;

use super::*;

/// Sparse memory of 8-byte cells; what was never written reads as zero.
#[derive(Default)]
struct Tables {
    cells: HashMap<u64, u64>,
    /// Changes a cell just before the first compare-exchange, as another vCPU might.
    interference: Option<(u64, u64)>,
    exchanges: usize,
}

impl Tables {
    fn set(&mut self, at: u64, entry: u64) {
        self.cells.insert(at, entry);
    }

    fn get(&self, at: u64) -> u64 {
        self.cells.get(&at).copied().unwrap_or(0)
    }

    /// Sets a 4-byte entry.
    fn set32(&mut self, at: u64, entry: u32) {
        let shift = 8 * (at & 4);
        let cell = self.cells.entry(at & !7).or_default();
        *cell = (*cell & !(0xffff_ffff << shift)) | (u64::from(entry) << shift);
    }

    fn get32(&self, at: u64) -> u32 {
        (self.get(at & !7) >> (8 * (at & 4))) as u32
    }
}

impl GuestMemory for Tables {
    type Error = Infallible;

    fn read(&mut self, at: GuestPhysAddr, data: &mut [u8]) -> Result<(), Infallible> {
        let at = at.as_u64();
        match data.len() {
            4 => data.copy_from_slice(&self.get32(at).to_le_bytes()),
            8 => data.copy_from_slice(&self.get(at).to_le_bytes()),
            other => panic!("an entry of {other} bytes"),
        }
        Ok(())
    }

    fn compare_exchange(&mut self, at: GuestPhysAddr, width: usize, old: u64, new: u64) -> Result<bool, Infallible> {
        let at = at.as_u64();
        self.exchanges += 1;
        if let Some((at, entry)) = self.interference.take() {
            self.set(at, entry);
        }
        if width == 4 {
            let same = u64::from(self.get32(at)) == old;
            if same {
                self.set32(at, new as u32);
            }
            return Ok(same);
        }
        let same = self.get(at) == old;
        if same {
            self.set(at, new);
        }
        Ok(same)
    }
}

const ROOT: u64 = 0x1000;
const LEVEL4: u64 = 0x2000;
const LEVEL3: u64 = 0x3000;
const LEVEL2: u64 = 0x4000;
const LEVEL1: u64 = 0x5000;
const FRAME: u64 = 0x12_3456_7000;
/// Indices 1, 2, 3, 4, 5 from level 5 down, and byte 0x678.
const LINEAR: u64 = 1 << 48 | 2 << 39 | 3 << 30 | 4 << 21 | 5 << 12 | 0x678;
const ALL: u64 = P | RW | US;

fn long(levels: u32) -> PagingState {
    PagingState {
        cr0: bits::CR0_PE | bits::CR0_PG | bits::CR0_WP,
        cr3: if levels == 5 { ROOT } else { LEVEL4 },
        cr4: bits::CR4_PAE | if levels == 5 { bits::CR4_LA57 } else { 0 },
        efer: bits::EFER_LMA | bits::EFER_NXE,
        cpl: 0,
        ac: false,
        phys_bits: 40,
        gib_pages: true,
    }
}

/// Where each entry on the way to [`LINEAR`] lies, from level 1 up.
const ENTRIES: [u64; 5] = [LEVEL1 + 5 * 8, LEVEL2 + 4 * 8, LEVEL3 + 3 * 8, LEVEL4 + 2 * 8, ROOT + 8];

fn tables() -> Tables {
    let mut tables = Tables::default();
    for (at, target) in ENTRIES.into_iter().zip([FRAME, LEVEL1, LEVEL2, LEVEL3, LEVEL4]) {
        tables.set(at, target | ALL);
    }
    tables
}

fn go(state: &PagingState, tables: &mut Tables, linear: u64, access: Access) -> Result<(u64, u64), u32> {
    match translate(state, tables, GuestVirtAddr::new(linear), access) {
        Ok(found) => Ok((found.gpa.as_u64(), found.page_size)),
        Err(WalkError::PageFault { code }) => Err(code),
        Err(WalkError::Memory(error)) => match error {},
    }
}

#[test]
fn without_paging_addresses_stay() {
    let state = PagingState { cr0: bits::CR0_PE, ..long(4) };
    assert_eq!(go(&state, &mut Tables::default(), 0x8765_4321, Access::Write), Ok((0x8765_4321, 4096)));
}

#[test]
fn four_and_five_levels_reach_pages_of_each_size() {
    for levels in [4, 5] {
        let state = long(levels);
        let mut tables = tables();
        // CR3 may carry a PCID or cache bits.
        let state = PagingState { cr3: state.cr3 | 0xfff, ..state };
        assert_eq!(go(&state, &mut tables, LINEAR, Access::Read), Ok((FRAME + 0x678, 4096)));
        tables.set(ENTRIES[1], 0x12_3440_0000 | ALL | PS);
        assert_eq!(go(&state, &mut tables, LINEAR, Access::Read), Ok((0x12_3440_5678, 1 << 21)));
        tables.set(ENTRIES[2], 0x12_4000_0000 | ALL | PS);
        assert_eq!(go(&state, &mut tables, LINEAR, Access::Read), Ok((0x12_4080_5678, 1 << 30)));
    }
}

#[test]
fn pat_global_and_software_bits_are_no_address() {
    let mut tables = tables();
    let extra = 1 << 3 | 1 << 4 | 1 << 8 | 7 << 9 | 0x7ff << 52;
    tables.set(ENTRIES[0], FRAME | ALL | PS | extra);
    tables.set(ENTRIES[3], LEVEL3 | ALL | extra);
    assert_eq!(go(&long(4), &mut tables, LINEAR, Access::Read), Ok((FRAME + 0x678, 4096)));
    // Bit 12 of a large page's entry is PAT.
    tables.set(ENTRIES[1], 0x12_3440_0000 | ALL | PS | 1 << 12);
    assert_eq!(go(&long(4), &mut tables, LINEAR, Access::Read), Ok((0x12_3440_5678, 1 << 21)));
}

#[test]
fn an_entry_that_is_not_present_at_any_level() {
    for hole in ENTRIES {
        let mut tables = tables();
        // Anything may stand in an entry that is not present, reserved bits too.
        tables.set(hole, !P);
        for (access, code) in [(Access::Read, 0), (Access::Write, fault::WRITE), (Access::Execute, fault::FETCH)] {
            assert_eq!(go(&long(5), &mut tables, LINEAR, access), Err(code));
            let user = PagingState { cpl: 3, ..long(5) };
            assert_eq!(go(&user, &mut tables, LINEAR, access), Err(code | fault::USER));
        }
        assert_eq!(tables.exchanges, 0, "a faulting walk left marks");
    }
}

#[test]
fn the_fetch_bit_is_told_only_with_nx_or_smep() {
    let mut tables = tables();
    tables.set(ENTRIES[0], 0);
    let without = PagingState { efer: bits::EFER_LMA, ..long(4) };
    assert_eq!(go(&without, &mut tables, LINEAR, Access::Execute), Err(0));
    let smep = PagingState { cr4: without.cr4 | bits::CR4_SMEP, ..without };
    assert_eq!(go(&smep, &mut tables, LINEAR, Access::Execute), Err(fault::FETCH));
}

#[test]
fn rights_of_all_levels_are_combined() {
    for at in ENTRIES {
        let user = PagingState { cpl: 3, ..long(5) };
        let mut tables = tables();
        let entry = tables.get(at);

        tables.set(at, entry & !US);
        let code = fault::PRESENT | fault::USER;
        assert_eq!(go(&user, &mut tables, LINEAR, Access::Read), Err(code));
        assert_eq!(go(&user, &mut tables, LINEAR, Access::Write), Err(code | fault::WRITE));
        assert!(go(&long(5), &mut tables, LINEAR, Access::Write).is_ok());

        tables.set(at, entry & !RW);
        assert!(go(&user, &mut tables, LINEAR, Access::Read).is_ok());
        assert_eq!(go(&user, &mut tables, LINEAR, Access::Write), Err(code | fault::WRITE));
        let code = fault::PRESENT | fault::WRITE;
        assert_eq!(go(&long(5), &mut tables, LINEAR, Access::Write), Err(code), "CR0.WP set");
        let no_wp = PagingState { cr0: bits::CR0_PE | bits::CR0_PG, ..long(5) };
        assert!(go(&no_wp, &mut tables, LINEAR, Access::Write).is_ok());
        let no_wp = PagingState { cpl: 3, ..no_wp };
        assert_eq!(go(&no_wp, &mut tables, LINEAR, Access::Write), Err(code | fault::USER), "WP is for supervisors");

        tables.set(at, entry | NX);
        assert!(go(&user, &mut tables, LINEAR, Access::Write).is_ok());
        let code = fault::PRESENT | fault::FETCH;
        assert_eq!(go(&user, &mut tables, LINEAR, Access::Execute), Err(code | fault::USER));
        assert_eq!(go(&long(5), &mut tables, LINEAR, Access::Execute), Err(code));
    }
}

#[test]
fn smep_and_smap_keep_the_supervisor_off_user_pages() {
    let smep = PagingState { cr4: bits::CR4_PAE | bits::CR4_SMEP, ..long(4) };
    let smap = PagingState { cr4: bits::CR4_PAE | bits::CR4_SMAP, ..long(4) };
    let mut tables = tables();
    assert_eq!(go(&smep, &mut tables, LINEAR, Access::Execute), Err(fault::PRESENT | fault::FETCH));
    assert!(go(&smep, &mut tables, LINEAR, Access::Read).is_ok());
    assert_eq!(go(&smap, &mut tables, LINEAR, Access::Read), Err(fault::PRESENT));
    assert_eq!(go(&smap, &mut tables, LINEAR, Access::Write), Err(fault::PRESENT | fault::WRITE));
    assert!(go(&smap, &mut tables, LINEAR, Access::Execute).is_ok());
    assert!(go(&PagingState { ac: true, ..smap }, &mut tables, LINEAR, Access::Write).is_ok());
    for state in [smep, smap] {
        let user = PagingState { cpl: 3, ..state };
        assert!(go(&user, &mut tables, LINEAR, Access::Read).is_ok());
        assert!(go(&user, &mut tables, LINEAR, Access::Execute).is_ok());
        // A supervisor page is none of their business.
        let entry = tables.get(ENTRIES[2]);
        tables.set(ENTRIES[2], entry & !US);
        assert!(go(&state, &mut tables, LINEAR, Access::Execute).is_ok());
        assert!(go(&state, &mut tables, LINEAR, Access::Write).is_ok());
        tables.set(ENTRIES[2], entry);
    }
}

#[test]
fn reserved_bits_fault_at_each_level() {
    let reserved = fault::PRESENT | fault::RESERVED;
    let check = |state: &PagingState, level: usize, entry: u64, expected: bool| {
        let mut tables = tables();
        tables.set(ENTRIES[level], entry);
        let result = go(state, &mut tables, LINEAR, Access::Read);
        assert_eq!(result == Err(reserved), expected, "level {} entry {entry:#x}: {result:x?}", level + 1);
        if expected {
            assert_eq!(tables.exchanges, 0);
            let user = PagingState { cpl: 3, ..*state };
            assert_eq!(go(&user, &mut tables, LINEAR, Access::Write), Err(reserved | fault::WRITE | fault::USER));
        }
    };
    let state = long(5);
    for level in 0..5 {
        for bit in 40..52 {
            check(&state, level, LEVEL1 | ALL | 1 << bit, true);
        }
        check(&state, level, LEVEL1 | ALL | 1 << 39, false);
        check(&state, level, FRAME | ALL | NX, false);
        check(&PagingState { efer: bits::EFER_LMA, ..state }, level, FRAME | ALL | NX, true);
    }
    // The size bit where no page can be, and the low address bits of large pages.
    check(&state, 3, FRAME | ALL | PS, true);
    check(&state, 4, FRAME | ALL | PS, true);
    check(&PagingState { gib_pages: false, ..state }, 2, ALL | PS, true);
    for bit in 13..30 {
        check(&state, 2, ALL | PS | 1 << bit, true);
        check(&state, 1, ALL | PS | 1 << bit, bit < 21);
    }
}

#[test]
fn accessed_and_dirty_bits() {
    let mut tables = tables();
    go(&long(5), &mut tables, LINEAR, Access::Read).unwrap();
    for at in ENTRIES {
        assert_eq!(tables.get(at) & (A | D), A);
    }
    assert_eq!(tables.exchanges, 5);
    go(&long(5), &mut tables, LINEAR, Access::Execute).unwrap();
    assert_eq!(tables.exchanges, 5, "nothing left to set");
    go(&long(5), &mut tables, LINEAR, Access::Write).unwrap();
    assert_eq!(tables.exchanges, 6);
    assert_eq!(tables.get(ENTRIES[0]) & (A | D), A | D);
    assert!(ENTRIES[1..].iter().all(|at| tables.get(*at) & D == 0), "only leaves become dirty");
    // The leaf may be a large page.
    tables.set(ENTRIES[1], ALL | PS);
    go(&long(5), &mut tables, LINEAR, Access::Write).unwrap();
    assert_eq!(tables.get(ENTRIES[1]) & (A | D), A | D);
}

#[test]
fn an_entry_that_changes_under_the_walk_is_walked_again() {
    let mut tables = tables();
    tables.interference = Some((ENTRIES[0], 0x7_7000 | ALL));
    assert_eq!(go(&long(4), &mut tables, LINEAR, Access::Write), Ok((0x7_7678, 4096)));
    assert_eq!(tables.get(ENTRIES[0]), 0x7_7000 | ALL | A | D);
    // Gone before its dirty bit could be set: the fault is what the guest gets.
    tables.interference = Some((ENTRIES[0], 0));
    tables.set(ENTRIES[0], FRAME | ALL);
    assert_eq!(go(&long(4), &mut tables, LINEAR, Access::Write), Err(fault::WRITE));
}

#[test]
fn two_levels_with_and_without_4_mib_pages() {
    let state = PagingState { cr3: ROOT | 0x18, cr4: 0, efer: 0, ..long(4) };
    let linear = 0xffff_ffff_0000_0000 | 0x123 << 22 | 0x45 << 12 | 0x678;
    let (directory, table) = (ROOT + 0x123 * 4, LEVEL1 + 0x45 * 4);
    let mut tables = Tables::default();
    tables.set32(directory, (LEVEL1 | ALL) as u32);
    tables.set32(table, 0x8765_4000 | ALL as u32);
    assert_eq!(go(&state, &mut tables, linear, Access::Write), Ok((0x8765_4678, 4096)));
    assert_eq!((tables.get32(directory), tables.get32(table)), ((LEVEL1 | ALL | A) as u32, 0x8765_4067));

    // Bit 7 of a directory entry is ignored without CR4.PSE.
    tables.set32(directory, (LEVEL1 | ALL | PS) as u32);
    assert_eq!(go(&state, &mut tables, linear, Access::Write), Ok((0x8765_4678, 4096)));
    let pse = PagingState { cr4: bits::CR4_PSE, ..state };
    tables.set32(directory, 0x0040_0000 | (ALL | PS) as u32);
    assert_eq!(go(&pse, &mut tables, linear, Access::Write), Ok((0x0044_5678, 1 << 22)));
    assert_eq!(tables.get32(directory) & (A | D) as u32, (A | D) as u32);
    // Bits 20:13 extend the address to 40 bits; 21 is reserved, and so are those beyond the physical width.
    tables.set32(directory, 0x0040_0000 | 0xab << 13 | (ALL | PS) as u32);
    assert_eq!(go(&pse, &mut tables, linear, Access::Read), Ok((0xab_0044_5678, 1 << 22)));
    let narrow = PagingState { phys_bits: 39, ..pse };
    assert_eq!(go(&narrow, &mut tables, linear, Access::Read), Err(fault::PRESENT | fault::RESERVED));
    tables.set32(directory, 1 << 21 | (ALL | PS) as u32);
    assert_eq!(go(&pse, &mut tables, linear, Access::Read), Err(fault::PRESENT | fault::RESERVED));

    // Rights, and no no-execute even with EFER.NXE.
    tables.set32(directory, (LEVEL1 | P | RW) as u32);
    let user = PagingState { cpl: 3, efer: bits::EFER_NXE, ..state };
    assert_eq!(go(&user, &mut tables, linear, Access::Execute), Err(fault::PRESENT | fault::USER));
    tables.set32(table, 0);
    assert_eq!(go(&state, &mut tables, linear, Access::Write), Err(fault::WRITE));
}

#[test]
fn pae_has_four_bare_pointers_at_the_top() {
    // CR3 is 32-byte aligned here.
    let state = PagingState { cr3: 0x1020, efer: bits::EFER_NXE, ..long(4) };
    let linear = 0xffff_ffff_0000_0000 | 3 << 30 | 4 << 21 | 5 << 12 | 0x678;
    let pointer = 0x1020 + 3 * 8;
    let mut tables = tables();
    tables.set(pointer, LEVEL2 | P);
    assert_eq!(go(&state, &mut tables, linear, Access::Write), Ok((FRAME + 0x678, 4096)));
    let user = PagingState { cpl: 3, ..state };
    assert!(go(&user, &mut tables, linear, Access::Write).is_ok(), "pointers carry no rights");
    assert_eq!(tables.get(pointer), LEVEL2 | P, "pointers have no accessed bit");

    for bit in [1, 2, 5, 6, 7, 8, 40, 52, 63] {
        tables.set(pointer, LEVEL2 | P | 1 << bit);
        let result = go(&state, &mut tables, linear, Access::Read);
        assert_eq!(result, Err(fault::PRESENT | fault::RESERVED), "bit {bit}");
    }
    tables.set(pointer, LEVEL2 | P);
    // Bits 62:52 of the lower entries are reserved, unlike in long mode.
    tables.set(ENTRIES[0], FRAME | ALL | 1 << 52);
    assert_eq!(go(&state, &mut tables, linear, Access::Read), Err(fault::PRESENT | fault::RESERVED));
    tables.set(ENTRIES[0], FRAME | ALL | NX);
    assert_eq!(go(&state, &mut tables, linear, Access::Execute), Err(fault::PRESENT | fault::FETCH));
    tables.set(ENTRIES[1], 0x12_3440_0000 | ALL | PS);
    assert_eq!(go(&state, &mut tables, linear, Access::Read), Ok((0x12_3440_5678, 1 << 21)));
    tables.set(pointer, 0);
    assert_eq!(go(&state, &mut tables, linear, Access::Read), Err(0));
}

#[test]
fn a_failing_memory_is_not_a_page_fault() {
    struct Broken;
    impl GuestMemory for Broken {
        type Error = &'static str;
        fn read(&mut self, _: GuestPhysAddr, _: &mut [u8]) -> Result<(), Self::Error> {
            Err("gone")
        }
        fn compare_exchange(&mut self, _: GuestPhysAddr, _: usize, _: u64, _: u64) -> Result<bool, Self::Error> {
            Err("gone")
        }
    }
    let result = translate(&long(4), &mut Broken, GuestVirtAddr::new(LINEAR), Access::Read);
    assert_eq!(result, Err(WalkError::Memory("gone")));
}
