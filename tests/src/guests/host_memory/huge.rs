// SPDX-License-Identifier: MIT OR Apache-2.0
//! Guest memory in huge pages, which are mapped as one, and which the host takes away or splits.

use super::mapping::{map, Mapping, BASE, LARGE, PAGE};
use super::writer;
use crate::harness::{CaseResult, Stop};
use crate::machine::{Machine, Mode};
use crate::{ensure, ensure_eq};
use axvcpu_uapi::addr::GuestPhysAddr;
use axvcpu_uapi::client::Permissions;
use nix::sys::mman::{mprotect, MapFlags, MmapAdvise, ProtFlags};
use std::sync::Arc;

pub(super) fn huge() -> CaseResult {
    let mut m = Machine::new(Mode::Long, writer())?;
    let memory = match Mapping::anonymous(LARGE, MapFlags::MAP_PRIVATE | MapFlags::MAP_HUGETLB) {
        Ok(memory) => memory,
        Err(_) => return Err(Stop::Skip("the host has no reserved huge pages".into())),
    };
    let before = m.vm.stats()?.pages_2m;
    let (memory, slot) = map(&m, memory)?;
    m.expect_marks(&[0x80, 0x80])?;
    ensure_eq!(m.vm.stats()?.pages_2m, before + 1, "large leaves");
    ensure_eq!(memory.get(0), 0x11, "the program's view");
    // The page goes back to the reserve, and another one comes.
    memory.advise(0, LARGE, MmapAdvise::MADV_DONTNEED)?;
    ensure_eq!(m.vm.stats()?.pages_2m, before, "large leaves after the page has gone");
    m.expect_mark(0x80)?;
    ensure_eq!(m.vcpu.general().gpr[0], 0, "what the guest reads of a fresh page");
    drop(slot);
    Ok(())
}

/// The host splits a huge page when the rights of a part of it change: the guest's leaf goes, and small ones come.
pub(super) fn split() -> CaseResult {
    let mut m = Machine::new(Mode::Long, writer())?;
    let memory = Mapping::anonymous(2 * LARGE, MapFlags::MAP_PRIVATE)?;
    let start = memory.start.as_ptr() as usize;
    let offset = start.next_multiple_of(LARGE) - start;
    memory.advise(0, memory.size, MmapAdvise::MADV_HUGEPAGE)?;
    memory.set(offset, 3);
    memory.set(offset + 5 * PAGE, 5);
    let memory = Arc::new(memory);
    let at = GuestPhysAddr::new(BASE);
    let slot = m.space.map(at, Arc::clone(&memory), offset, LARGE, Permissions::RWX)?;
    m.expect_mark(0x80)?;
    let stats = m.vm.stats()?;
    if stats.pages_2m == 0 {
        return Err(Stop::Skip("the host gave no huge page".into()));
    }
    // SAFETY: The page belongs to the test, and the program only reads it.
    unsafe { mprotect(memory.address(offset + 5 * PAGE), PAGE, ProtFlags::PROT_READ) }?;
    ensure_eq!(m.vm.stats()?.pages_2m, stats.pages_2m - 1, "large leaves after the host has split its page");
    m.expect_marks(&[0x80, 0x80])?;
    let now = m.vm.stats()?;
    ensure_eq!(now.pages_2m, stats.pages_2m - 1, "large leaves after the guest has come back");
    ensure!(now.pages_4k > stats.pages_4k, "no small leaf has come in its place");
    ensure_eq!([memory.get(offset), memory.get(offset + 5 * PAGE)], [0x11, 5], "the program's view");
    drop(slot);
    Ok(())
}
