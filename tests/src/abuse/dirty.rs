// SPDX-License-Identifier: MIT OR Apache-2.0
//! The dirty log: bad ranges, bad buffers, calls without a log, and logs that come and go under everything.

use super::Objects;
use crate::harness::{Case, CaseResult, Stop};
use crate::machine::{Machine, Mode};
use crate::{code, ensure_eq, raw, table};
use axvcpu_uapi::addr::GuestPhysAddr;
use axvcpu_uapi::aspace::{DirtyLogRead, Range, DIRTY_LOG_GRANULE};
use axvcpu_uapi::client::{Backing, Errno, Memory};
use axvcpu_uapi::ioctl::{READ_DIRTY_LOG, START_DIRTY_LOG, STOP_DIRTY_LOG};
use axvcpu_uapi::AbiStruct;
use nix::sys::mman::{mprotect, ProtFlags};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

pub(super) fn cases() -> Vec<Case> {
    table! {
        "dirty-log/ranges" => ranges;
        "dirty-log/without-a-log" => without;
        "dirty-log/buffers" => buffers;
        "dirty-log/started-and-stopped-under-load" => load, in 60;
    }
}

const GRANULE: u64 = DIRTY_LOG_GRANULE;

fn ranges() -> CaseResult {
    let objects = Objects::new()?;
    let space = objects.space.as_fd();
    let limit = 1u64 << objects.system.info()?.guest_phys_bits;
    let start = |guest_addr, size| raw::plain(space, START_DIRTY_LOG, Range { guest_addr, size });
    for (what, guest_addr, size) in [
        ("nothing", 0, 0),
        ("a page", 0, 0x1000),
        ("half a granule", 0, GRANULE / 2),
        ("an address inside a granule", 0x1000, GRANULE),
        ("a range beyond the guest's addresses", limit, GRANULE),
        ("a range that ends there", limit - GRANULE, 2 * GRANULE),
        ("a range that wraps", u64::MAX - GRANULE + 1, 2 * GRANULE),
        ("everything", 0, u64::MAX),
    ] {
        ensure_eq!(start(guest_addr, size), Err(Errno::EINVAL), "{what}");
    }
    if limit > 8 << 40 {
        ensure_eq!(start(0, (8 << 40) + GRANULE), Err(Errno::ENOSPC), "more than 8 TiB");
    }
    ensure_eq!(start(limit - GRANULE, GRANULE), Ok(0), "the last granule");
    ensure_eq!(start(0, GRANULE), Err(Errno::EEXIST), "a second log");
    ensure_eq!(raw::none(space, STOP_DIRTY_LOG), Ok(0), "stopping");
    ensure_eq!(start(2 * GRANULE, 4 * GRANULE), Ok(0), "another log");
    let mut words = [u64::MAX; 8];
    for (what, guest_addr, size, expected) in [
        ("nothing", 2 * GRANULE, 0, Err(Errno::EINVAL)),
        ("a page", 2 * GRANULE, 0x1000, Err(Errno::EINVAL)),
        ("an address inside a granule", 2 * GRANULE + 0x1000, GRANULE, Err(Errno::EINVAL)),
        ("what is before the log", GRANULE, GRANULE, Err(Errno::EINVAL)),
        ("what begins before the log", GRANULE, 2 * GRANULE, Err(Errno::EINVAL)),
        ("what ends behind the log", 5 * GRANULE, 2 * GRANULE, Err(Errno::EINVAL)),
        ("what is behind the log", 6 * GRANULE, GRANULE, Err(Errno::EINVAL)),
        ("what wraps", 2 * GRANULE, u64::MAX - GRANULE + 1, Err(Errno::EINVAL)),
        ("all of it", 2 * GRANULE, 4 * GRANULE, Ok(0)),
    ] {
        let bitmap_addr = words.as_mut_ptr() as u64;
        let read = DirtyLogRead { guest_addr, size, bitmap_addr, pages: u64::MAX };
        ensure_eq!(raw::plain(space, READ_DIRTY_LOG, read), expected, "reading {what}");
    }
    ensure_eq!(words, [0, 0, 0, 0, u64::MAX, u64::MAX, u64::MAX, u64::MAX], "words after all of it was read");
    Ok(())
}

fn without() -> CaseResult {
    let objects = Objects::new()?;
    let space = objects.space.as_fd();
    let mut word = 0u64;
    let read = DirtyLogRead { guest_addr: 0, size: GRANULE, bitmap_addr: &raw mut word as u64, pages: 0 };
    for round in 0..2 {
        ensure_eq!(raw::plain(space, READ_DIRTY_LOG, read), Err(Errno::ENOENT), "reading in round {round}");
        ensure_eq!(raw::none(space, STOP_DIRTY_LOG), Err(Errno::ENOENT), "stopping in round {round}");
        raw::plain(space, START_DIRTY_LOG, Range { guest_addr: 0, size: GRANULE })?;
        ensure_eq!(raw::plain(space, READ_DIRTY_LOG, read), Ok(0), "reading in round {round}");
        raw::none(space, STOP_DIRTY_LOG)?;
    }
    Ok(())
}

/// What cannot be stored stays in the log.
fn buffers() -> CaseResult {
    let code = code!(buffers, 64, "mov ebx, 0x100000", "mov [rbx], rax", "out 0x80, al", "hlt");
    let mut m = Machine::new(Mode::Long, code)?;
    let size = 4 << 20;
    m.space.start_dirty_log(GuestPhysAddr::new(0), size)?;
    m.expect_mark(0x80)?;
    let memory = Memory::anonymous(0x1000)?;
    let start = memory.start();
    // SAFETY: the page belongs to `memory`, which is not written by the program meanwhile.
    unsafe { mprotect(start.cast(), 0x1000, ProtFlags::PROT_READ) }?;
    for bitmap_addr in [0, 8, start.as_ptr() as u64, 1 << 47, 1 << 63, u64::MAX - 64, u64::MAX] {
        let read = DirtyLogRead { guest_addr: 0, size, bitmap_addr, ..DirtyLogRead::ZERO };
        let result = raw::plain(m.space.as_fd(), READ_DIRTY_LOG, read);
        ensure_eq!(result, Err(Errno::EFAULT), "a bitmap at {bitmap_addr:#x}");
    }
    let mut words = [0; 16];
    m.space.read_dirty_log(GuestPhysAddr::new(0), &mut words)?;
    ensure_eq!(words[4] & 1, 1, "the page that the guest has written");
    Ok(())
}

/// Logs start and stop, are read and fail to be read, while the guest writes and slots come and go.
fn load() -> CaseResult {
    let code = code!(
        load,
        64,
        "2: mov ebx, 0x100000",
        "mov ecx, 0x200",
        "3: inc qword ptr [rbx + 8]",
        "add rbx, 0x1000",
        "dec ecx",
        "jnz 3b",
        "out 0x80, al",
        "jmp 2b",
    );
    let mut m = Machine::new(Mode::Long, code)?;
    let (space, ram) = (m.space.clone(), std::sync::Arc::clone(&m.ram));
    let stop = AtomicBool::new(false);
    thread::scope(|scope| -> CaseResult {
        let workers = [0, 1].map(|worker| {
            let (space, ram, stop) = (&space, &ram, &stop);
            scope.spawn(move || -> CaseResult {
                let mut round = 0u64;
                while !stop.load(Ordering::Relaxed) {
                    round += 1;
                    let mut words = [0u64; 16];
                    // Each refusal is one of the other thread's making.
                    let results = [
                        space.start_dirty_log(GuestPhysAddr::new(GRANULE * (round % 4)), 12 * GRANULE).err(),
                        space.read_dirty_log(GuestPhysAddr::new(4 * GRANULE), &mut words[..8]).err(),
                        if worker == 0 { space.stop_dirty_log().err() } else { None },
                    ];
                    for error in results.iter().flatten() {
                        let known = [Errno::EEXIST, Errno::ENOENT, Errno::EINVAL];
                        if !error.errno().is_some_and(|errno| known.contains(&errno)) {
                            return Err(error.clone().into());
                        }
                    }
                    // The guest is to get somewhere in between.
                    thread::sleep(Duration::from_millis(2));
                    if round % 8 == 0 {
                        ram.discard(0x18_0000, 0x1_0000)?;
                    }
                }
                Ok(())
            })
        });
        let result = (0..20).try_for_each(|_| m.expect_mark(0x80).map(drop));
        stop.store(true, Ordering::Relaxed);
        for worker in workers {
            worker.join().map_err(|_| Stop::Fail("the thread panicked".into()))??;
        }
        result
    })
}
