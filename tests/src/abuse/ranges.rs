// SPDX-License-Identifier: MIT OR Apache-2.0
//! Ranges of guest memory that overlap, are not aligned, wrap, are huge, or are backed by nothing.

use super::{arch, Objects};
use crate::harness::{self, Case, CaseResult, Stop};
use crate::{ensure, ensure_eq, raw, table};
use axvcpu_uapi::addr::GuestPhysAddr;
use axvcpu_uapi::aspace::{MapRegion, ProtectRange, Range, MEM_EXECUTE, MEM_READ, MEM_WRITE};
use axvcpu_uapi::client::{Backing, Errno, Memory};
use axvcpu_uapi::exit::AxVCpuExitReason::NestedPageFault;
use axvcpu_uapi::ioctl;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

pub(super) fn cases() -> Vec<Case> {
    table! {
        "ranges/not-aligned-empty-or-wrapping" => malformed;
        "ranges/beyond-the-address-width" => width;
        "ranges/host-addresses-that-are-not-the-users" => host_addresses;
        "ranges/overlap" => overlap;
        "ranges/unmap-and-protect-what-is-not-mapped" => not_mapped;
        "ranges/split-and-joined-again" => split;
        "ranges/huge-region-of-nothing" => huge;
        "ranges/run-on-memory-that-is-gone" => gone;
        "ranges/the-vcpus-own-run-page-as-memory" => run_page;
    }
}

const RWX: u32 = MEM_READ | MEM_WRITE | MEM_EXECUTE;

fn map(space: BorrowedFd<'_>, guest_addr: u64, size: u64, user_addr: u64) -> Result<i32, Errno> {
    raw::plain(space, ioctl::MAP, MapRegion { guest_addr, size, user_addr, flags: RWX, reserved: 0 })
}
fn unmap(space: BorrowedFd<'_>, guest_addr: u64, size: u64) -> Result<i32, Errno> {
    raw::plain(space, ioctl::UNMAP, Range { guest_addr, size })
}
fn protect(space: BorrowedFd<'_>, guest_addr: u64, size: u64) -> Result<i32, Errno> {
    raw::plain(space, ioctl::PROTECT, ProtectRange { guest_addr, size, flags: MEM_READ, reserved: 0 })
}

/// Memory of the process that guests may have, at a known address.
struct Host {
    start: u64,
    _memory: Memory,
}
impl Host {
    fn new(size: usize) -> Result<Self, Stop> {
        let memory = Memory::anonymous(size)?;
        Ok(Self { start: memory.start().as_ptr() as u64, _memory: memory })
    }
}

fn malformed() -> CaseResult {
    let objects = Objects::new()?;
    let space = objects.space.as_fd();
    let host = Host::new(0x10000)?;
    let bad = Err(Errno::EINVAL);
    for (guest, size) in [
        (0, 0),
        (0x1000, 0),
        (0, 1),
        (0, 0xfff),
        (0, 0x1001),
        (1, 0x1000),
        (0x800, 0x1000),
        (0xfff, 0x1000),
        (0u64.wrapping_sub(0x1000), 0x1000),
        (0u64.wrapping_sub(0x1000), 0x2000),
        (0x1000, 0u64.wrapping_sub(0x1000)),
        (1 << 63, 1 << 63),
        (0, 1 << 63),
    ] {
        ensure_eq!(map(space, guest, size, host.start), bad, "MAP of {size:#x} at {guest:#x}");
        ensure_eq!(unmap(space, guest, size), bad, "UNMAP of {size:#x} at {guest:#x}");
        ensure_eq!(protect(space, guest, size), bad, "PROTECT of {size:#x} at {guest:#x}");
    }
    for user in [1, 0x7ff, host.start + 1, host.start + 0xfff] {
        ensure_eq!(map(space, 0, 0x1000, user), bad, "MAP of host memory at {user:#x}");
    }
    Ok(())
}

fn width() -> CaseResult {
    let objects = Objects::new()?;
    let space = objects.space.as_fd();
    let host = Host::new(0x2000)?;
    let end = 1u64 << objects.system.info()?.guest_phys_bits;
    ensure_eq!(map(space, end - 0x1000, 0x2000, host.start), Err(Errno::EINVAL), "MAP over the end");
    ensure_eq!(map(space, end, 0x1000, host.start), Err(Errno::EINVAL), "MAP at the end");
    ensure_eq!(map(space, end - 0x1000, 0x1000, host.start), Ok(0), "MAP of the last page");
    ensure_eq!(unmap(space, end - 0x1000, 0x1000), Ok(0), "UNMAP of the last page");
    Ok(())
}

fn host_addresses() -> CaseResult {
    let objects = Objects::new()?;
    let space = objects.space.as_fd();
    let bad = Err(Errno::EFAULT);
    for (user, size) in [
        (0xffff_8000_0000_0000, 0x1000),
        (0xffff_ffff_ffff_f000, 0x1000),
        (arch::LAST_USER_PAGE, 0x10_0000),
        (1 << 62, 0x1000),
    ] {
        ensure_eq!(map(space, 0, size, user), bad, "MAP of {size:#x} bytes at host address {user:#x}");
    }
    // A failed MAP leaves nothing behind.
    ensure_eq!(unmap(space, 0, 0x1000), Err(Errno::ENOENT), "UNMAP after it");
    Ok(())
}

fn overlap() -> CaseResult {
    let objects = Objects::new()?;
    let space = objects.space.as_fd();
    let host = Host::new(0x10000)?;
    ensure_eq!(map(space, 0x4000, 0x4000, host.start), Ok(0), "MAP");
    for (guest, size) in [
        (0x4000, 0x4000),
        (0x4000, 0x1000),
        (0x7000, 0x1000),
        (0x5000, 0x1000),
        (0x3000, 0x2000),
        (0x7000, 0x2000),
        (0, 0x10000),
    ] {
        let result = map(space, guest, size, host.start);
        ensure_eq!(result, Err(Errno::EEXIST), "MAP of {size:#x} at {guest:#x} over 0x4000..0x8000");
    }
    // Neighbours are welcome.
    ensure_eq!(map(space, 0x3000, 0x1000, host.start), Ok(0), "MAP below");
    ensure_eq!(map(space, 0x8000, 0x1000, host.start), Ok(0), "MAP above");
    ensure_eq!(unmap(space, 0x3000, 0x6000), Ok(0), "UNMAP of all three");
    Ok(())
}

fn not_mapped() -> CaseResult {
    let objects = Objects::new()?;
    let space = objects.space.as_fd();
    let host = Host::new(0x10000)?;
    ensure_eq!(map(space, 0x4000, 0x2000, host.start), Ok(0), "MAP");
    ensure_eq!(map(space, 0x7000, 0x1000, host.start), Ok(0), "MAP");
    for (guest, size) in
        [(0x3000, 0x1000), (0x3000, 0x2000), (0x5000, 0x2000), (0x4000, 0x4000), (0x7000, 0x2000), (0x9000, 0x1000)]
    {
        ensure_eq!(unmap(space, guest, size), Err(Errno::ENOENT), "UNMAP of {size:#x} at {guest:#x}");
        ensure_eq!(protect(space, guest, size), Err(Errno::ENOENT), "PROTECT of {size:#x} at {guest:#x}");
    }
    // All of it is still there.
    ensure_eq!(unmap(space, 0x4000, 0x2000), Ok(0), "UNMAP of the first region");
    ensure_eq!(unmap(space, 0x7000, 0x1000), Ok(0), "UNMAP of the second region");
    ensure_eq!(unmap(space, 0x4000, 0x1000), Err(Errno::ENOENT), "UNMAP once more");
    Ok(())
}

fn split() -> CaseResult {
    let objects = Objects::new()?;
    let space = objects.space.as_fd();
    let host = Host::new(0x100000)?;
    ensure_eq!(map(space, 0, 0x10_0000, host.start), Ok(0), "MAP");
    for page in (0..0x100).step_by(2) {
        ensure_eq!(protect(space, page << 12, 0x1000), Ok(0), "PROTECT of page {page}");
    }
    for page in (1..0x100).step_by(4) {
        ensure_eq!(unmap(space, page << 12, 0x1000), Ok(0), "UNMAP of page {page}");
        ensure_eq!(unmap(space, page << 12, 0x1000), Err(Errno::ENOENT), "UNMAP of page {page} again");
    }
    for page in (1..0x100).step_by(4) {
        ensure_eq!(map(space, page << 12, 0x1000, host.start + (page << 12)), Ok(0), "MAP of page {page}");
    }
    ensure_eq!(unmap(space, 0, 0x10_0000), Ok(0), "UNMAP of everything at once");
    Ok(())
}

/// A terabyte that no memory is behind costs nothing to map and to unmap, and a guest that touches it gets EFAULT.
fn huge() -> CaseResult {
    let objects = Objects::new()?;
    let space = objects.space.as_fd();
    let size = 1u64 << 38;
    ensure_eq!(map(space, 0, size, 0x1000_0000_0000), Ok(0), "MAP of 256 GiB");
    ensure_eq!(protect(space, 1 << 30, size - (2 << 30)), Ok(0), "PROTECT of most of it");
    ensure_eq!(unmap(space, 0, size), Ok(0), "UNMAP of it");
    let stats = objects.vm.stats()?;
    ensure_eq!((stats.pages_4k, stats.pages_2m), (0, 0), "pages that are mapped");
    Ok(())
}

fn gone() -> CaseResult {
    let (mut objects, slot) = Objects::ready()?;
    slot.unmap()?;
    let memory = Arc::new(Memory::anonymous(0x1000)?);
    let start = memory.start().as_ptr() as u64;
    ensure_eq!(map(objects.space.as_fd(), 0x1000, 0x1000, start), Ok(0), "MAP");
    drop(memory);
    let failed = raw::none(objects.vcpu.as_fd(), ioctl::RUN);
    ensure_eq!(failed, Err(Errno::EFAULT), "RUN on memory that the process has unmapped");
    ensure_eq!(unmap(objects.space.as_fd(), 0x1000, 0x1000), Ok(0), "UNMAP of it");
    let exit = objects.vcpu.run()?;
    ensure!(
        matches!(exit.reason, NestedPageFault { addr, .. } if addr == GuestPhysAddr::new(0x1000)),
        "exit without memory: {:?}",
        exit.reason
    );
    Ok(())
}

/// The run page, as memory of the guest, is refused or works; either way the kernel does not mind.
fn run_page() -> CaseResult {
    let (mut objects, _slot) = Objects::ready()?;
    let length = std::num::NonZeroUsize::MIN.saturating_add(4095);
    use nix::sys::mman::{mmap, munmap, MapFlags, ProtFlags};
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice disturbs no existing memory.
    let page = unsafe { mmap(None, length, protection, MapFlags::MAP_SHARED, objects.vcpu.as_fd(), 0) }?;
    ensure_eq!(map(objects.space.as_fd(), 0x5000, 0x1000, page.as_ptr() as u64), Ok(0), "MAP of the run page");
    // Stores to 0x5000: over the exit record of the page, while it runs.
    let memory = Memory::anonymous(0x1000)?;
    memory.write(0, arch::STORES)?;
    ensure_eq!(map(objects.space.as_fd(), 0x2000, 0x1000, memory.start().as_ptr() as u64), Ok(0), "MAP of code");
    arch::go_to(&mut objects.vcpu, GuestPhysAddr::new(0x2000))?;
    let kicker = objects.vcpu.kicker();
    let kick = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(30));
        kicker.kick()
    });
    let result = objects.vcpu.run().map(|exit| exit.reason);
    harness::joined(kick.join())??;
    let interrupted = Ok(axvcpu_uapi::exit::AxVCpuExitReason::Interrupted);
    let refused = Err(axvcpu_uapi::client::Error::Run(Errno::EFAULT));
    ensure!(result == interrupted || result == refused, "RUN: {result:?}");
    ensure_eq!(unmap(objects.space.as_fd(), 0x5000, 0x1000), Ok(0), "UNMAP of the run page");
    ensure_eq!(unmap(objects.space.as_fd(), 0x2000, 0x1000), Ok(0), "UNMAP of the code");
    // SAFETY: mapped above, and the guest has no access any more.
    unsafe { munmap(page, 4096) }?;
    Ok(())
}
