// SPDX-License-Identifier: MIT OR Apache-2.0
//! The dirty log: it tells each page that the guest has written, once, and loses none. The same on every architecture:
//! what the guests run is in `programs`.

use super::programs;
use crate::harness::{self, Case, CaseResult, Stop};
use crate::machine::Machine;
use crate::random::{seed, Random};
use crate::{ensure, ensure_eq, table};
use axvcpu_uapi::addr::GuestPhysAddr;
use axvcpu_uapi::aspace::DIRTY_LOG_GRANULE;
use axvcpu_uapi::client::{AddressSpace, Backing, Errno, Error, Memory, Permissions, Slot};
use axvcpu_uapi::exit::AxVCpuExitReason;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Arc;
use std::thread;

pub(super) fn cases() -> Vec<Case> {
    table! {
        "dirty-log/tells-each-written-page-once" => once [abi];
        "dirty-log/survives-the-mapping" => survives [abi];
        "dirty-log/large-pages-split-and-come-back" => large [abi];
        "dirty-log/needs-little-memory" => memory [abi];
        "dirty-log/no-write-is-lost" => small_pages [abi], in 120;
        "dirty-log/no-write-is-lost-in-large-pages" => large_pages [abi], in 120;
    }
}

/// Where the logged memory is.
pub(super) const BASE: u64 = 0x100_0000;
const LARGE: usize = 2 << 20;

pub(super) fn gpa(addr: u64) -> GuestPhysAddr {
    GuestPhysAddr::new(addr)
}

/// Memory at [`BASE`], in huge pages where the host has them.
pub(super) fn map(m: &Machine, size: usize, huge: bool) -> Result<Slot<Memory>, Stop> {
    let memory = Arc::new(Memory::anonymous(size + LARGE)?);
    if huge {
        memory.prefer_huge_pages()?;
    }
    let start = memory.start().as_ptr() as usize;
    let aligned = start.next_multiple_of(LARGE) - start;
    Ok(m.space.map(gpa(BASE), memory, aligned, size, Permissions::RWX)?)
}

/// The dirty pages of `words` granules at [`BASE`], by number.
pub(super) fn read(space: &AddressSpace, words: usize) -> Result<Vec<u64>, Stop> {
    let mut bitmap = vec![u64::MAX; words];
    let count = space.read_dirty_log(gpa(BASE), &mut bitmap)?;
    let pages: Vec<u64> = (0..words as u64 * 64).filter(|i| bitmap[(i / 64) as usize] >> (i % 64) & 1 != 0).collect();
    ensure_eq!(pages.len() as u64, count, "pages that the call has counted");
    Ok(pages)
}

fn write_at(m: &mut Machine, page: u64) -> CaseResult {
    programs::start_writing(m, BASE + page * 0x1000)?;
    programs::marked(m)
}

fn once() -> CaseResult {
    let mut m = programs::machine(programs::incrementer())?;
    let slot = map(&m, 6 << 20, false)?;
    let space = m.space.clone();
    ensure_eq!(read(&space, 1).is_err(), true, "reading without a log");
    ensure_eq!(space.stop_dirty_log(), Err(Error::StopDirtyLog(Errno::ENOENT)), "stopping without a log");
    // The second lies in no large page that the end of the log cuts.
    write_at(&mut m, 3)?;
    write_at(&mut m, 700)?;
    space.start_dirty_log(gpa(BASE), 6 << 20)?;
    let again = space.start_dirty_log(gpa(0), DIRTY_LOG_GRANULE);
    ensure!(matches!(again, Err(Error::StartDirtyLog { errno: Errno::EEXIST, .. })), "a second log: {again:?}");
    ensure_eq!(read(&space, 24)?, [0; 0], "pages written before the log was started");
    for page in [3, 63, 64, 500, 700, 1023] {
        write_at(&mut m, page)?;
        write_at(&mut m, page)?;
    }
    ensure_eq!(read(&space, 24)?, [3, 63, 64, 500, 700, 1023], "pages written");
    ensure_eq!(read(&space, 24)?, [0; 0], "pages written since");
    // Written, and logged again, although the CPU knew the page as writable.
    write_at(&mut m, 64)?;
    ensure_eq!(read(&space, 1)?, [0; 0], "pages of the first granule");
    ensure_eq!(read(&space, 2)?, [64], "pages of the first two");
    space.stop_dirty_log()?;
    write_at(&mut m, 5)?;
    space.start_dirty_log(gpa(BASE), 6 << 20)?;
    ensure_eq!(read(&space, 24)?, [0; 0], "pages written between two logs");
    drop(slot);
    Ok(())
}

/// What was written stays in the log when the memory goes away, and what comes into its place is logged as well.
fn survives() -> CaseResult {
    let mut m = programs::machine(programs::incrementer())?;
    let slot = map(&m, 1 << 20, false)?;
    let space = m.space.clone();
    space.start_dirty_log(gpa(BASE), 1 << 20)?;
    write_at(&mut m, 7)?;
    write_at(&mut m, 8)?;
    slot.memory().discard(slot.offset() + 0x7000, 0x1000)?;
    ensure_eq!(read(&space, 4)?, [7, 8], "pages written, of which one was discarded");
    write_at(&mut m, 7)?;
    slot.protect(Permissions::R)?;
    slot.protect(Permissions::RW)?;
    write_at(&mut m, 9)?;
    drop(slot);
    let slot = map(&m, 1 << 20, false)?;
    ensure_eq!(read(&space, 4)?, [7, 9], "pages written, of a slot that was protected and removed");
    write_at(&mut m, 1)?;
    ensure_eq!(read(&space, 4)?, [1], "pages written in another slot");
    drop(slot);
    Ok(())
}

fn large() -> CaseResult {
    let mut m = programs::machine(programs::incrementer())?;
    let slot = map(&m, 4 * LARGE, true)?;
    slot.memory().write_u64(slot.offset(), 0)?;
    write_at(&mut m, 0)?;
    if m.vm.stats()?.pages_2m == 0 {
        return Err(Stop::Skip("the host gave no huge page".into()));
    }
    for page in [512, 1024, 1536] {
        write_at(&mut m, page)?;
    }
    // All four, and perhaps what the code is in.
    let all = m.vm.stats()?.pages_2m;
    ensure!(all >= 4, "only {all} large leaves");
    // From the middle of the first large page to the middle of the last.
    let start = BASE + LARGE as u64 / 2;
    let before = m.vm.stats()?.pages_4k;
    m.space.start_dirty_log(gpa(start), 3 * LARGE as u64)?;
    for page in [256, 511, 512, 1700, 1792, 2047, 0] {
        write_at(&mut m, page)?;
    }
    ensure_eq!(m.vm.stats()?.pages_2m, all - 3, "large leaves: that of the third page, which was not written");
    let mut bitmap = [0; 24];
    m.space.read_dirty_log(gpa(start), &mut bitmap)?;
    let dirty: Vec<usize> = (0..24 * 64).filter(|i| bitmap[i / 64] >> (i % 64) & 1 != 0).map(|i| i + 256).collect();
    ensure_eq!(dirty, [256, 511, 512, 1700], "pages written");
    m.space.stop_dirty_log()?;
    ensure_eq!(m.vm.stats()?.pages_4k, before + 3, "small leaves at the log's end: those outside of it");
    for page in [256, 700, 1300, 1700] {
        write_at(&mut m, page)?;
    }
    ensure_eq!(m.vm.stats()?.pages_2m, all, "large leaves after the log");
    ensure_eq!(m.vm.stats()?.log_pages, 0, "pages of the log after it");
    drop(slot);
    Ok(())
}

/// A log of a TiB takes a page for each 128 MiB in which something was written, and gives it back.
fn memory() -> CaseResult {
    let mut m = programs::machine(programs::incrementer())?;
    let slot = map(&m, 4 << 20, false)?;
    m.space.start_dirty_log(gpa(0), 1 << 40)?;
    ensure_eq!(m.vm.stats()?.log_pages, 0, "pages of a log in which nothing is");
    write_at(&mut m, 0)?;
    write_at(&mut m, 1)?;
    ensure_eq!(m.vm.stats()?.log_pages, 1, "pages of the log");
    let mut bitmap = vec![0; 1 << 20];
    m.space.read_dirty_log(gpa(1 << 38), &mut bitmap)?;
    ensure!(bitmap.iter().all(|word| *word == 0), "pages written where nothing is");
    m.space.stop_dirty_log()?;
    ensure_eq!(m.vm.stats()?.log_pages, 0, "pages of the log when it is over");
    drop(slot);
    Ok(())
}

/// Pages that the guest below writes.
const PAGES: usize = 1024;

fn small_pages() -> CaseResult {
    scribble(false)
}

fn large_pages() -> CaseResult {
    scribble(true)
}

/// Three vCPUs write random pages while the log is read and cleared all the time and the pages that it tells are copied. When
/// the vCPUs have stopped and the log has been read once more the copy is the memory.
fn scribble(huge: bool) -> CaseResult {
    let mut m = programs::machine(programs::scribbler())?;
    let slot = map(&m, PAGES * 0x1000, huge)?;
    let mut random = Random::new(seed()?);
    let mut vcpus = vec![programs::another(&mut m, 1)?, programs::another(&mut m, 2)?];
    vcpus.push(m.vcpu);
    for (index, vcpu) in (0u64..).zip(&mut vcpus) {
        programs::start_scribbling(vcpu, BASE, PAGES as u64, random.word() | 1, 8 * index)?;
    }
    let words = |page: usize| -> Result<[u64; 3], Stop> {
        let at = slot.offset() + page * 0x1000;
        Ok([slot.memory().read_u64(at)?, slot.memory().read_u64(at + 8)?, slot.memory().read_u64(at + 16)?])
    };
    let mut copy = vec![[0; 3]; PAGES];
    m.space.start_dirty_log(gpa(BASE), (PAGES * 0x1000) as u64)?;
    let (stop, rounds) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| -> CaseResult {
        let run = |mut vcpu: programs::Vcpu| -> Result<u64, Stop> {
            loop {
                harness::check_time()?;
                match programs::run(&mut vcpu)?.reason {
                    reason if programs::is_mark(&reason) && stop.load(Ordering::Relaxed) => {
                        return Ok(programs::written(&vcpu));
                    }
                    reason if programs::is_mark(&reason) => rounds.fetch_add(1, Ordering::Relaxed),
                    AxVCpuExitReason::Interrupted => continue,
                    other => return Err(Stop::Fail(format!("exit {other:x?} {}", programs::describe(&vcpu)?))),
                };
            }
        };
        let runners: Vec<_> = vcpus.into_iter().map(|vcpu| scope.spawn(move || run(vcpu))).collect();
        let mut take = || -> Result<usize, Stop> {
            let dirty = read(&m.space, PAGES / 64)?;
            for &page in &dirty {
                copy[page as usize] = words(page as usize)?;
            }
            Ok(dirty.len())
        };
        let (mut reads, mut told) = (0, 0);
        let reading: CaseResult = (|| {
            // A busy host may let the reader have all of the time at first.
            while reads < 40 || rounds.load(Ordering::Relaxed) < 60 || told <= PAGES {
                harness::check_time()?;
                told += take()?;
                reads += 1;
            }
            Ok(())
        })();
        stop.store(true, Ordering::Relaxed);
        let mut written = 0;
        for runner in runners {
            written += harness::joined(runner.join())??;
        }
        reading?;
        take()?;
        let mut sum = 0;
        for (page, copy) in copy.iter().enumerate() {
            let now = words(page)?;
            ensure_eq!(*copy, now, "page {page}: the copy against the memory");
            sum += now.iter().sum::<u64>();
        }
        ensure_eq!(sum, written, "writes that arrived in memory");
        Ok(())
    })
}
