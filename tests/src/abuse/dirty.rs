// SPDX-License-Identifier: MIT OR Apache-2.0
//! The dirty log: bad ranges, bad buffers, calls without a log, and logs that come and go under everything.

#[cfg(target_arch = "x86_64")]
mod with_guests;

use super::Objects;
use crate::harness::{Case, CaseResult};
use crate::{ensure_eq, raw, table};
use axvcpu_uapi::aspace::{DirtyLogRead, Range, DIRTY_LOG_GRANULE};
use axvcpu_uapi::client::Errno;
use axvcpu_uapi::ioctl::{READ_DIRTY_LOG, START_DIRTY_LOG, STOP_DIRTY_LOG};
use std::os::fd::AsFd;

pub(super) fn cases() -> Vec<Case> {
    table! {
        "dirty-log/ranges" => ranges;
        "dirty-log/without-a-log" => without;
        #[cfg(target_arch = "x86_64")]
        "dirty-log/buffers" => with_guests::buffers;
        #[cfg(target_arch = "x86_64")]
        "dirty-log/started-and-stopped-under-load" => with_guests::load, in 60;
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
