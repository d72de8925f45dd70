// SPDX-License-Identifier: MIT OR Apache-2.0
//! Files: what mmap allows, and descriptors closed in every order while the guest runs.

use super::Objects;
use crate::harness::{self, Case, CaseResult, Stop};
use crate::machine::spin;
use crate::{ensure, ensure_eq, raw, table};
use axvcpu_uapi::addr::GuestPhysAddr;
use axvcpu_uapi::aspace::{MapRegion, MEM_EXECUTE, MEM_READ, MEM_WRITE};
use axvcpu_uapi::client::{Apic, Errno, Memory};
use axvcpu_uapi::ioctl;
use axvcpu_uapi::vcpu::VcpuStats;
use axvcpu_uapi::AbiStruct;
use nix::fcntl::{fcntl, FcntlArg, FdFlag};
use nix::sys::mman::{mmap, mprotect, munmap, MapFlags, ProtFlags};
use nix::sys::pthread::{pthread_kill, pthread_self};
use nix::sys::signal::{sigaction, SaFlags, SigAction, SigHandler, SigSet, Signal};
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::mpsc::channel;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

pub(super) fn cases() -> Vec<Case> {
    table! {
        "files/mmap-sizes-offsets-and-protections" => mappings;
        "files/mmap-of-other-files" => other_mappings;
        "files/run-page-outlives-its-vcpu" => page_outlives;
        "files/closed-on-exec" => close_on_exec;
        "files/closed-in-every-order" => closed_idle;
        "files/closed-in-every-order-while-running" => closed_running, in 120;
        "files/read-write-and-seek" => plain_io;
    }
}

/// Maps `size` bytes of a file, and unmaps them again.
fn try_map(fd: BorrowedFd<'_>, size: usize, offset: i64, protection: ProtFlags, flags: MapFlags) -> Result<(), Errno> {
    let length = NonZeroUsize::new(size).ok_or(Errno::EINVAL)?;
    // SAFETY: a new mapping at an address of the kernel's choice disturbs no existing memory, and it is removed unused.
    unsafe {
        let page = mmap(None, length, protection, flags, fd, offset)?;
        munmap(page, size)
    }
}

const READ: ProtFlags = ProtFlags::PROT_READ;
const BOTH: ProtFlags = ProtFlags::PROT_READ.union(ProtFlags::PROT_WRITE);

fn mappings() -> CaseResult {
    let objects = Objects::new()?;
    let vcpu = objects.vcpu.as_fd();
    let (shared, private) = (MapFlags::MAP_SHARED, MapFlags::MAP_PRIVATE);
    let bad = Err(Errno::EINVAL);
    for size in [0x2000, 0x10000, 1 << 30] {
        ensure_eq!(try_map(vcpu, size, 0, BOTH, shared), bad, "mmap of {size:#x} bytes");
    }
    for offset in [0x1000, 0x10000, 1 << 40, i64::MAX & !0xfff] {
        ensure!(try_map(vcpu, 0x1000, offset, BOTH, shared).is_err(), "mmap at offset {offset:#x}");
    }
    ensure_eq!(try_map(vcpu, 0x1000, 0x1000, BOTH, shared), bad, "mmap at offset 0x1000");
    ensure_eq!(try_map(vcpu, 0x1000, 0, BOTH, private), bad, "private mmap");
    ensure_eq!(try_map(vcpu, 0x1000, 0, READ | ProtFlags::PROT_EXEC, shared), Err(Errno::EPERM), "executable mmap");
    ensure_eq!(try_map(vcpu, 0x1000, 0, BOTH, shared), Ok(()), "mmap as it should be");
    ensure_eq!(try_map(vcpu, 0x1000, 0, READ, shared), Ok(()), "read-only mmap");
    let length = NonZeroUsize::MIN.saturating_add(4095);
    // SAFETY: as in `try_map`; the second mapping is refused, or removed with the first.
    unsafe {
        let page = mmap(None, length, BOTH, shared, vcpu, 0)?;
        ensure_eq!(mprotect(page, 4096, READ | ProtFlags::PROT_EXEC), Err(Errno::EACCES), "making the page executable");
        let grown = nix::sys::mman::mremap(page, 4096, 8192, nix::sys::mman::MRemapFlags::MREMAP_MAYMOVE, None);
        ensure_eq!(grown.map(drop), Err(Errno::EFAULT), "growing the page");
        munmap(page, 4096)?;
    }
    Ok(())
}

fn other_mappings() -> CaseResult {
    let objects = Objects::new()?;
    for (what, fd) in [
        ("the device", objects.system.as_fd()),
        ("a VM", objects.vm.as_fd()),
        ("an address space", objects.space.as_fd()),
    ] {
        let result = try_map(fd, 0x1000, 0, BOTH, MapFlags::MAP_SHARED);
        ensure_eq!(result, Err(Errno::ENODEV), "mmap of {what}");
    }
    Ok(())
}

/// The page stays the process's as long as it is mapped, whatever becomes of the vCPU.
fn page_outlives() -> CaseResult {
    let objects = Objects::new()?;
    let length = NonZeroUsize::MIN.saturating_add(4095);
    // SAFETY: a new mapping at an address of the kernel's choice disturbs no existing memory.
    let page = unsafe { mmap(None, length, BOTH, MapFlags::MAP_SHARED, objects.vcpu.as_fd(), 0) }?;
    drop(objects);
    for word in 0..512 {
        // SAFETY: inside the page, aligned, and still mapped.
        unsafe {
            let at = page.as_ptr().cast::<u64>().add(word);
            at.write_volatile(word as u64);
            ensure_eq!(at.read_volatile(), word as u64, "word {word}");
        }
    }
    // SAFETY: mapped above, and not used any more.
    unsafe { munmap(page, 4096) }?;
    Ok(())
}

fn close_on_exec() -> CaseResult {
    let objects = Objects::new()?;
    for (what, fd) in
        [("VM", objects.vm.as_fd()), ("address space", objects.space.as_fd()), ("vCPU", objects.vcpu.as_fd())]
    {
        let flags = FdFlag::from_bits_truncate(fcntl(fd, FcntlArg::F_GETFD)?);
        ensure!(flags.contains(FdFlag::FD_CLOEXEC), "the descriptor of the {what} would survive exec");
    }
    Ok(())
}

/// All orders of four things.
pub(super) fn orders() -> Vec<[usize; 4]> {
    let mut orders = Vec::new();
    for code in 0..256 {
        let order = [code & 3, (code >> 2) & 3, (code >> 4) & 3, code >> 6];
        if (0..4).all(|thing| order.contains(&thing)) {
            orders.push(order);
        }
    }
    orders
}

/// Descriptors of the device, a VM, an address space and a vCPU that is ready to spin; nothing else refers to the
/// objects.
pub(super) fn bare(memory: &Memory) -> Result<[Option<OwnedFd>; 4], Stop> {
    let mut objects = Objects::new()?;
    let region = MapRegion {
        guest_addr: 0x1000,
        size: 0x1000,
        user_addr: axvcpu_uapi::client::Backing::start(memory).as_ptr() as u64,
        flags: MEM_READ | MEM_WRITE | MEM_EXECUTE,
        reserved: 0,
    };
    raw::plain(objects.space.as_fd(), ioctl::MAP, region)?;
    objects.vcpu.set_entry(GuestPhysAddr::new(0x1000))?;
    objects.vcpu.set_ept_root(&objects.space)?;
    objects.vcpu.setup(Apic::InKernel, &super::arch::cpuid(&objects.system)?)?;
    let fds = [objects.system.as_fd(), objects.vm.as_fd(), objects.space.as_fd(), objects.vcpu.as_fd()];
    let [system, vm, space, vcpu] = fds.map(|fd| fd.try_clone_to_owned());
    Ok([Some(system?), Some(vm?), Some(space?), Some(vcpu?)])
}

fn vms() -> Result<u32, Stop> {
    Ok(crate::machine::open_axvcpu()?.info()?.vms)
}

fn closed_idle() -> CaseResult {
    let before = vms()?;
    let memory = Memory::anonymous(0x1000)?;
    memory.write(0, spin())?;
    ensure_eq!(orders().len(), 24, "orders of four things");
    for order in orders() {
        let mut fds = bare(&memory)?;
        for index in order {
            drop(fds[index].take());
        }
        ensure_eq!(vms()?, before, "VMs after {order:?} was closed");
    }
    Ok(())
}

extern "C" fn ignore(_: i32) {}

/// The vCPU runs on when its descriptor and all others are closed; a signal ends it, and everything is gone.
fn closed_running() -> CaseResult {
    let before = vms()?;
    let memory = Arc::new(Memory::anonymous(0x1000)?);
    memory.write(0, spin())?;
    let action = SigAction::new(SigHandler::Handler(ignore), SaFlags::empty(), SigSet::empty());
    // SAFETY: the handler does nothing, so it is async-signal-safe.
    let old = unsafe { sigaction(Signal::SIGUSR1, &action) }?;
    for order in orders() {
        let mut fds = bare(&memory)?;
        let number = fds[3].as_ref().ok_or(Errno::EBADF)?.as_raw_fd();
        let (sender, receiver) = channel();
        let runner = thread::spawn(move || {
            // The receiver waits for it.
            let _ = sender.send(pthread_self());
            // SAFETY: the descriptor is closed only when the call is under way, and then the call holds the file.
            raw::none(unsafe { BorrowedFd::borrow_raw(number) }, ioctl::RUN)
        });
        let target = receiver.recv().map_err(|error| Stop::Fail(error.to_string()))?;
        harness::wait_until("the guest to run", || {
            let mut stats = VcpuStats::ZERO;
            let vcpu = fds[3].as_ref().ok_or(Errno::EBADF)?;
            // SAFETY: the result goes to `stats`.
            unsafe { raw::ioctl(vcpu.as_fd(), ioctl::VCPU_STATS, &raw mut stats as usize) }?;
            Ok(stats.state == 3)
        })?;
        for index in order {
            drop(fds[index].take());
            thread::sleep(Duration::from_millis(1));
        }
        ensure!(!runner.is_finished(), "RUN ended when {order:?} was closed");
        while !runner.is_finished() {
            pthread_kill(target, Signal::SIGUSR1)?;
            harness::check_time()?;
            thread::sleep(Duration::from_millis(1));
        }
        let result = runner.join().map_err(|_| Stop::Fail("the thread panicked".into()))?;
        ensure_eq!(result, Err(Errno::EINTR), "RUN that a signal ended");
        // The last reference may be dropped a moment after the call.
        harness::wait_until("the VM to go", || Ok(vms()? == before))?;
    }
    // SAFETY: this is the handler that was there before.
    unsafe { sigaction(Signal::SIGUSR1, &old) }?;
    Ok(())
}

fn plain_io() -> CaseResult {
    let objects = Objects::new()?;
    let mut buffer = [0; 16];
    for fd in [objects.system.as_fd(), objects.vm.as_fd(), objects.space.as_fd(), objects.vcpu.as_fd()] {
        ensure!(nix::unistd::read(fd, &mut buffer).is_err(), "a file can be read");
        ensure!(nix::unistd::write(fd, &buffer).is_err(), "a file can be written");
    }
    Ok(())
}
