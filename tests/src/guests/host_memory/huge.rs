// SPDX-License-Identifier: MIT OR Apache-2.0
//! Guest memory in huge pages, which are mapped as one, and which the host takes away or splits.

use super::disturbed;
use super::mapping::{map, Mapping, BASE, BOTH, LARGE, PAGE};
use crate::guests::programs::{self, GO_BACK};
use crate::harness::{CaseResult, Stop};
use crate::{ensure, ensure_eq};
use axvcpu_uapi::addr::GuestPhysAddr;
use axvcpu_uapi::client::Permissions;
use axvcpu_uapi::exit::{AccessFlags, AxVCpuExitReason::NestedPageFault};
use nix::sys::mman::{mprotect, MapFlags, MmapAdvise, ProtFlags};
use std::fs;
use std::sync::Arc;

pub(super) fn huge() -> CaseResult {
    let mut m = programs::machine(programs::writer())?;
    let memory = match Mapping::anonymous(LARGE, MapFlags::MAP_PRIVATE | MapFlags::MAP_HUGETLB) {
        Ok(memory) => memory,
        Err(_) => return Err(Stop::Skip("the host has no reserved huge pages".into())),
    };
    let before = m.vm.stats()?.pages_2m;
    let (memory, slot) = map(&m, memory)?;
    programs::marked_twice(&mut m)?;
    // The machine's own memory may be in huge pages, too.
    let large = m.vm.stats()?.pages_2m;
    ensure!(large > before, "{large} large leaves, as before");
    ensure_eq!(memory.get(0), 0x11, "the program's view");
    // The page goes back to the reserve, and another one comes.
    memory.advise(0, LARGE, MmapAdvise::MADV_DONTNEED)?;
    ensure_eq!(m.vm.stats()?.pages_2m, large - 1, "large leaves after the page has gone");
    programs::marked(&mut m)?;
    ensure_eq!(programs::value(&m.vcpu), 0, "what the guest reads of a fresh page");
    drop(slot);
    Ok(())
}

/// The host splits a huge page when the rights of a part of it change: the guest's leaf goes, and small ones come.
pub(super) fn split() -> CaseResult {
    let mut m = programs::machine(programs::writer())?;
    let memory = Mapping::huge_page()?;
    memory.set(0, 3);
    memory.set(5 * PAGE, 5);
    let (memory, slot) = map(&m, memory)?;
    programs::marked(&mut m)?;
    let stats = m.vm.stats()?;
    if stats.pages_2m == 0 {
        return Err(Stop::Skip("the host gave no huge page".into()));
    }
    // SAFETY: The page belongs to the test, and the program only reads it.
    unsafe { mprotect(memory.address(5 * PAGE), PAGE, ProtFlags::PROT_READ) }?;
    ensure_eq!(m.vm.stats()?.pages_2m, stats.pages_2m - 1, "large leaves after the host has split its page");
    programs::marked_twice(&mut m)?;
    let now = m.vm.stats()?;
    ensure_eq!(now.pages_2m, stats.pages_2m - 1, "large leaves after the guest has come back");
    ensure!(now.pages_4k > stats.pages_4k, "no small leaf has come in its place");
    ensure_eq!([memory.get(0), memory.get(5 * PAGE)], [0x11, 5], "the program's view");
    drop(slot);
    Ok(())
}

/// Whether the kernel takes the CPU for one that must not fetch instructions through large leaves.
fn multihit() -> Result<bool, Stop> {
    match fs::read_to_string("/sys/devices/system/cpu/vulnerabilities/itlb_multihit") {
        Ok(state) => Ok(state.trim() != "Not affected"),
        Err(_) => Err(Stop::Skip("the kernel does not say whether the CPU has iTLB multihit".into())),
    }
}

/// Where the CPU must not fetch instructions through large leaves, one stays large while it is only written, and is split,
/// once and all of it, when it is executed from. Elsewhere it stays large.
pub(super) fn executed() -> CaseResult {
    let multihit = multihit()?;
    let mut m = programs::machine(programs::visitor())?;
    let memory = Mapping::huge_page()?;
    memory.set(3 * PAGE, GO_BACK);
    memory.set(511 * PAGE, GO_BACK);
    let (memory, slot) = map(&m, memory)?;
    let before = m.vm.stats()?;
    programs::marked(&mut m)?;
    let written = m.vm.stats()?;
    if written.pages_2m == before.pages_2m {
        return Err(Stop::Skip("the host gave no huge page".into()));
    }
    programs::marked(&mut m)?;
    let executed = m.vm.stats()?;
    let split = u64::from(multihit);
    ensure_eq!(executed.pages_2m, written.pages_2m - split, "large leaves after code was executed there");
    ensure_eq!(executed.pages_4k, written.pages_4k + 512 * split, "small leaves");
    ensure_eq!(executed.faults, written.faults + split, "faults");
    programs::marked(&mut m)?;
    ensure_eq!(m.vm.stats()?.faults, executed.faults, "faults after more code and data in the same page");
    ensure_eq!([memory.get(0), memory.get(256 * PAGE)], [5, BASE], "the program's view");
    drop(slot);
    Ok(())
}

/// Memory that the program does not let the guest execute is not executed, in large pages neither, and stays large.
pub(super) fn not_executable() -> CaseResult {
    let mut m = programs::machine(programs::visitor())?;
    let memory = Mapping::huge_page()?;
    memory.set(3 * PAGE, GO_BACK);
    let rights = Permissions::RW;
    let slot = m.space.map_all(GuestPhysAddr::new(BASE), Arc::new(memory), rights)?;
    programs::marked(&mut m)?;
    let written = m.vm.stats()?;
    for _ in 0..2 {
        let exit = m.run()?;
        let expected = GuestPhysAddr::new(BASE + 3 * PAGE as u64);
        ensure!(
            matches!(exit.reason, NestedPageFault { addr, access_flags }
                if addr == expected && access_flags.contains(AccessFlags::EXECUTE)),
            "exit {:x?}",
            exit.reason
        );
    }
    let now = m.vm.stats()?;
    ensure_eq!((now.pages_2m, now.pages_4k), (written.pages_2m, written.pages_4k), "leaves");
    drop(slot);
    Ok(())
}

/// A guest executes from a huge page and writes all over it, while the host takes the right to write away and gives it back: its
/// leaves go, come large or small, are split, and get more rights, over and over.
pub(super) fn executed_and_protected() -> CaseResult {
    let mut m = programs::machine(programs::visit_for_good())?;
    let memory = Mapping::huge_page()?;
    for (index, word) in programs::scribbler().chunks(8).enumerate() {
        let mut bytes = [0x90; 8];
        bytes[..word.len()].copy_from_slice(word);
        memory.set(7 * PAGE + 0x800 + 8 * index, u64::from_le_bytes(bytes));
    }
    let (memory, slot) = map(&m, memory)?;
    disturbed(&mut m, &memory, 100, true, || {
        for protection in [ProtFlags::PROT_READ, BOTH] {
            // SAFETY: The range belongs to the test, and is not written by the program meanwhile.
            unsafe { mprotect(memory.address(0), memory.size, protection) }?;
        }
        Ok(())
    })?;
    drop(slot);
    Ok(())
}
