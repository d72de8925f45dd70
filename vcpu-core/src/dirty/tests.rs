// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The log against what the guest really writes: vCPUs with TLBs of their own, a host that takes pages away, and a reader that
//! copies what the log tells. After every round of a quiet guest the copy is the memory.

use std::collections::BTreeMap;
use std::vec;
use std::vec::Vec;

use proptest::prelude::*;
use proptest::test_runner::TestCaseResult;

use super::*;
use crate::npt::tests::Frames;
use crate::npt::{Ept, Format, Levels, MemoryType, NestedPageTable, Npt};

const RX: Permissions = Permissions::READ.union(Permissions::EXECUTE);
const RW: Permissions = Permissions::READ.union(Permissions::WRITE);
const MIB2: u64 = 2 << 20;
const VCPUS: usize = 3;
/// Guest memory: 8 MiB, at a host address that allows large pages.
const MEMORY: u64 = 8 << 20;
const HOST: u64 = 0x4000_0000;

/// The guest, the host, and the reader of the log.
struct World<F> {
    mem: Frames,
    table: NestedPageTable<F>,
    log: Option<DirtyLog<Vec<Option<HostPhysAddr>>>>,
    /// What each vCPU has cached: page to what it may do.
    tlbs: [BTreeMap<u64, Permissions>; VCPUS],
    /// Content of each page: how often it was written.
    pages: Vec<u32>,
    /// The reader's copy, of the pages of the log.
    copy: BTreeMap<u64, u32>,
}

fn gpa(page: u64) -> GuestPhysAddr {
    GuestPhysAddr::new(page * FRAME_SIZE)
}

fn take<F: Format>(
    log: &mut DirtyLog<Vec<Option<HostPhysAddr>>>,
    addr: GuestPhysAddr,
    to: &mut [u64],
    table: &mut NestedPageTable<F>,
    mem: &mut Frames,
) -> (usize, Taken) {
    log.take(addr, to, mem, |at, size, perms, mem| table.restrict(at, size, perms, mem)).unwrap()
}

impl<F: Format> World<F> {
    fn new(small_code: bool) -> Self {
        let mut mem = Frames::default();
        let table = NestedPageTable::new(Levels::Four, &mut mem).unwrap();
        let table = if small_code { table.with_small_code() } else { table };
        let pages = vec![0; (MEMORY / FRAME_SIZE) as usize];
        Self { mem, table, log: None, tlbs: Default::default(), pages, copy: BTreeMap::new() }
    }

    fn flush(&mut self) {
        self.tlbs = Default::default();
    }

    fn flush_if(&mut self, flush: Flush) {
        if flush.is_needed() {
            self.flush();
        }
    }

    /// A fault, as the module resolves it: by a large page if `large` and the log allow it, otherwise by a small one; and a large
    /// one that cannot be executed is split.
    fn fault(&mut self, page: u64, wanted: Permissions, large: bool) {
        let write = wanted.contains(Permissions::WRITE);
        let around = gpa(page).align_down(MIB2);
        let (perms, size) = match &mut self.log {
            Some(log) => {
                let large = large && !log.touches(around, PageSize::Size2M);
                let perms = log.admit(gpa(page), write, Permissions::ALL, &mut self.mem).unwrap();
                (perms, if large { PageSize::Size2M } else { PageSize::Size4K })
            }
            None => (Permissions::ALL, if large { PageSize::Size2M } else { PageSize::Size4K }),
        };
        let at = gpa(page).align_down(size.bytes());
        let host = HostPhysAddr::new(HOST + at.as_u64());
        let mut flush = self.table.map(at, host, size, perms, MemoryType::WriteBack, &mut self.mem).unwrap();
        if wanted.contains(Permissions::EXECUTE) && self.table.has_small_code() {
            flush = flush.or(self.table.split(at, PageSize::Size4K, &mut self.mem).unwrap());
        }
        self.flush_if(flush);
    }

    /// An access by a vCPU, with as many faults as it takes.
    fn access(&mut self, vcpu: usize, page: u64, wanted: Permissions, large: bool) {
        for _ in 0..3 {
            if self.tlbs[vcpu].get(&page).is_some_and(|perms| perms.contains(wanted)) {
                if wanted.contains(Permissions::WRITE) {
                    self.pages[page as usize] += 1;
                }
                return;
            }
            match self.table.query(gpa(page), &self.mem) {
                Some(mapping) if mapping.perms.contains(wanted) => {
                    assert_eq!(mapping.hpa.as_u64(), HOST + gpa(page).as_u64());
                    self.tlbs[vcpu].insert(page, mapping.perms);
                }
                _ => self.fault(page, wanted, large),
            }
        }
        panic!("page {page} still faults");
    }

    fn start(&mut self, granule: u64, granules: u64) {
        let (start, size) = (GuestPhysAddr::new(granule * GRANULE), granules * GRANULE);
        let log = DirtyLog::new(start, size, vec![None; frames_for(size) as usize]).unwrap();
        let range = log.range();
        self.log = Some(log);
        // As the module does it: large leaves across the ends go, the rest loses its write permission.
        for end in [range.start, range.end - 1] {
            let _ = self.table.zap(GuestPhysAddr::new(end), 1, &mut self.mem);
        }
        self.table.restrict(start, size, RX, &mut self.mem).map(|flush| self.flush_if(flush)).unwrap();
        self.flush();
        self.copy = (range.start / FRAME_SIZE..range.end / FRAME_SIZE).map(|p| (p, self.pages[p as usize])).collect();
    }

    /// Reads and clears all of the log in steps of `words`, while vCPU 0 goes on writing `meanwhile` before the flush.
    fn read(&mut self, words: usize, meanwhile: &[u64]) {
        let Some(mut log) = self.log.take() else { return };
        let (mut at, mut dirty, mut writes) = (log.range().start, Vec::new(), meanwhile.iter());
        while at < log.range().end {
            let mut buffer = vec![0; words];
            let (count, taken) = take(&mut log, GuestPhysAddr::new(at), &mut buffer, &mut self.table, &mut self.mem);
            assert!(count > 0);
            let first = at / FRAME_SIZE;
            let set = (0..count as u64 * 64).filter(|i| buffer[(i / 64) as usize] >> (i % 64) & 1 != 0);
            let set: Vec<u64> = set.map(|i| first + i).collect();
            assert_eq!(taken.pages, set.len() as u64);
            dirty.extend(set);
            at += count as u64 * GRANULE;
            // The lock is free between two steps; and what was taken is still in the TLBs.
            self.log = Some(log);
            if let Some(&page) = writes.next() {
                self.access(0, page, RW, false);
            }
            log = self.log.take().unwrap();
        }
        self.log = Some(log);
        self.flush();
        for page in dirty {
            self.copy.insert(page, self.pages[page as usize]);
        }
    }

    fn stop(&mut self) {
        if let Some(log) = self.log.take() {
            let range = log.range();
            let places = log.finish(&mut self.mem);
            assert!(places.iter().all(Option::is_none));
            let _ = self.table.zap(GuestPhysAddr::new(range.start), range.end - range.start, &mut self.mem);
            self.flush();
        }
    }

    /// With the guest quiet, one more round brings the copy up to date; and nothing that the log has not told can be written.
    fn check(&mut self) -> TestCaseResult {
        self.read(512, &[]);
        for (&page, &copy) in &self.copy {
            if self.log.is_some() {
                prop_assert_eq!(copy, self.pages[page as usize], "page {}", page);
                let writable = self.table.query(gpa(page), &self.mem).map(|m| m.perms.contains(Permissions::WRITE));
                prop_assert_ne!(writable, Some(true), "page {} can be written unnoticed", page);
            }
        }
        Ok(())
    }
}

#[derive(Clone, Debug)]
enum Step {
    Access { vcpu: usize, page: u64, wanted: Permissions, large: bool },
    Zap { page: u64, pages: u64 },
    Start { granule: u64, granules: u64 },
    Read { words: usize, meanwhile: Vec<u64> },
    Stop,
}

fn step() -> impl Strategy<Value = Step> {
    // Some pages are hit again and again.
    let page = || prop_oneof![0u64..2048, 60u64..70, 500u64..520];
    prop_oneof![
        12 => (0..VCPUS, page(), prop::sample::select(&[RW, RW, Permissions::READ, RX][..]), any::<bool>())
            .prop_map(|(vcpu, page, wanted, large)| Step::Access { vcpu, page, wanted, large }),
        2 => (page(), 1u64..600).prop_map(|(page, pages)| Step::Zap { page, pages }),
        1 => (0u64..24, 1u64..8).prop_map(|(granule, granules)| Step::Start { granule, granules }),
        3 => (1usize..5, prop::collection::vec(page(), 0..6)).prop_map(|(words, meanwhile)| Step::Read { words, meanwhile }),
        1 => Just(Step::Stop),
    ]
}

fn run<F: Format>(small_code: bool, steps: Vec<Step>) -> TestCaseResult {
    let mut world = World::<F>::new(small_code);
    world.start(1, 20);
    for step in steps {
        match step {
            Step::Access { vcpu, page, wanted, large } => world.access(vcpu, page, wanted, large),
            Step::Zap { page, pages } => {
                let _ = world.table.zap(gpa(page), pages * FRAME_SIZE, &mut world.mem);
                world.flush();
            }
            Step::Start { granule, granules } => {
                world.stop();
                world.start(granule, granules);
            }
            Step::Read { words, meanwhile } => {
                world.read(words, &meanwhile);
            }
            Step::Stop => world.stop(),
        }
    }
    world.check()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 2 } else { 200 }))]

    #[test]
    fn no_write_is_lost_in_nested_page_tables(small_code in any::<bool>(), steps in prop::collection::vec(step(), 1..80)) {
        run::<Npt>(small_code, steps)?;
    }

    #[test]
    fn no_write_is_lost_in_extended_page_tables(small_code in any::<bool>(), steps in prop::collection::vec(step(), 1..80)) {
        run::<Ept>(small_code, steps)?;
    }
}

#[test]
fn bad_ranges_are_refused() {
    let new = |start, size, places| DirtyLog::new(GuestPhysAddr::new(start), size, vec![None; places]).map(drop);
    assert_eq!(new(0, GRANULE, 1), Ok(()));
    for (start, size, places) in
        [(0, 0, 1), (FRAME_SIZE, GRANULE, 1), (0, FRAME_SIZE, 1), (0, GRANULE, 0), (0, (128 << 20) + GRANULE, 1)]
    {
        assert_eq!(new(start, size, places), Err(AxError::InvalidInput), "{start:#x} {size:#x} {places}");
    }
    assert_eq!(new(0u64.wrapping_sub(GRANULE), 2 * GRANULE, 1), Err(AxError::InvalidInput), "wraps");
}

#[test]
fn memory_is_used_for_what_is_written_only() {
    let mut mem = Frames::default();
    let size = 1u64 << 40;
    let mut log = DirtyLog::new(GuestPhysAddr::new(0), size, vec![None; frames_for(size) as usize]).unwrap();
    assert_eq!(log.frame_count(), 0);
    for addr in [0, FRAME_SIZE, 127 << 20, 128 << 20, size - FRAME_SIZE] {
        let admit = |log: &mut DirtyLog<_>, write, mem: &mut Frames| {
            log.admit(GuestPhysAddr::new(addr), write, Permissions::ALL, mem).unwrap()
        };
        assert_eq!(admit(&mut log, false, &mut mem), RX);
        assert_eq!(admit(&mut log, true, &mut mem), Permissions::ALL);
    }
    assert_eq!(log.frame_count(), 3);
    assert_eq!(log.admit(GuestPhysAddr::new(size), false, Permissions::ALL, &mut mem), Ok(Permissions::ALL));
    log.finish(&mut mem);
    assert_eq!(mem.live_count(), 0);
}

#[test]
fn what_is_put_back_is_told_again() {
    let mut world = World::<Npt>::new(false);
    world.start(0, 4);
    world.access(0, 70, RW, false);
    let mut log = world.log.take().unwrap();
    let mut words = [0; 4];
    let start = GuestPhysAddr::new(0);
    let (count, taken) = take(&mut log, start, &mut words, &mut world.table, &mut world.mem);
    assert_eq!((count, taken.pages, words), (4, 1, [0, 1 << 6, 0, 0]));
    assert!(taken.flush.is_needed());
    log.put_back(start, &words, &mut world.mem);
    let (_, again) = take(&mut log, start, &mut words, &mut world.table, &mut world.mem);
    assert_eq!((again.pages, words), (1, [0, 1 << 6, 0, 0]));
    assert!(!again.flush.is_needed(), "the page could not be written");
    assert_eq!(take(&mut log, start, &mut words, &mut world.table, &mut world.mem).1.pages, 0);
}
