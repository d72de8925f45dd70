// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the host does with guest memory under a running guest: swapping, freeing, moving, sharing, truncating, merging. What
//! needs a host prepared for it (swap, a control group, huge pages, KSM) is skipped elsewhere; see
//! scripts/lab/test-memory.sh. The same on every architecture: what the guests run is in `programs`.

mod files;
mod host;
mod huge;
mod mapping;

use super::programs;
use crate::harness::{self, Case, CaseResult, Stop};
use crate::machine::Machine;
use crate::{ensure, ensure_eq, raw, table};
use axvcpu_uapi::aspace::{MapRegion, Range, MEM_READ, MEM_WRITE};
use axvcpu_uapi::exit::AxVCpuExitReason::Interrupted;
use axvcpu_uapi::ioctl;
use host::{needs_swap, number, Group};
use mapping::{map, Mapping, BASE, BOTH, LARGE, PAGE};
use nix::libc;
use nix::sys::mman::{mprotect, mremap, MRemapFlags, MapFlags, MmapAdvise, ProtFlags};
use std::fs;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

pub(super) fn cases() -> Vec<Case> {
    table! {
        "host-memory/swapped-under-pressure" => pressure [abi], in 90;
        "host-memory/paged-out-while-the-guest-writes" => paged_out [abi], in 60;
        "host-memory/freed-lazily" => freed [abi];
        "host-memory/moved" => moved [abi];
        "host-memory/forked-and-written-on-both-sides" => forked [abi];
        "host-memory/protected-again-and-again" => protected [abi];
        "host-memory/shared-file" => files::shared_file [abi];
        "host-memory/private-file" => files::private_file [abi];
        "host-memory/truncated-file" => files::truncated [abi];
        "host-memory/reserved-huge-pages" => huge::huge [abi];
        "host-memory/transparent-huge-page-split-by-the-host" => huge::split [abi];
        "host-memory/huge-page-executed" => huge::executed [abi];
        "host-memory/huge-page-not-to-be-executed" => huge::not_executable [abi];
        "host-memory/huge-page-executed-and-protected-again-and-again" => huge::executed_and_protected [abi];
        "host-memory/merged-and-written" => merged [abi], in 60;
        "host-memory/accounted-to-the-control-group" => accounted [abi], in 60;
    }
}

/// What is done less often where a page takes milliseconds to swap: on a slow host, and on an emulated one where all CPUs
/// stop for each TLB invalidation of one. 1 elsewhere.
fn share() -> usize {
    if harness::patience() > 1 || cfg!(target_arch = "aarch64") {
        4
    } else {
        1
    }
}

/// One pass of the guest over `pages` pages: each must hold `old`, or zero if that is allowed, and then gets `new`.
fn sweep(m: &mut Machine, pages: usize, old: u64, new: u64, or_zero: bool) -> CaseResult {
    programs::start_sweep(m, pages, old, new, or_zero)?;
    programs::marked(m).map_err(|stop| stop.context(format_args!("looking for {old}")))
}

/// A guest larger than what its control group may have: it goes over its memory again and again, out to swap and back, and
/// finds in each page what it has left there.
fn pressure() -> CaseResult {
    let size = (48 << 20) / share();
    needs_swap()?;
    let mut m = programs::machine(programs::sweeper())?;
    let (memory, slot) = map(&m, Mapping::anonymous(size, MapFlags::MAP_PRIVATE)?)?;
    let _group = Group::enter()?;
    fs::write(Group::file("memory.high"), (size / 2).to_string())?;
    let mut swapped = 0;
    for pass in 0..4 {
        sweep(&mut m, size / PAGE, pass, pass + 1, false)?;
        swapped = swapped.max(number(&Group::file("memory.swap.current"), "")?);
    }
    for page in 0..size / PAGE {
        ensure_eq!(memory.get(page * PAGE + 16), 4, "the program's view of page {page}");
    }
    println!("# {} MiB of {} were in swap", swapped >> 20, size >> 20);
    ensure!(swapped >= size as u64 / 6, "only {swapped} bytes were swapped out");
    ensure!(m.vm.stats()?.invalidations > size as u64 >> 16, "invalidations: {:?}", m.vm.stats()?);
    drop(slot);
    Ok(())
}

/// Runs the scribbler while `disturb` is called over and over, then compares what it has counted with the memory.
fn disturbed(
    m: &mut Machine,
    memory: &Mapping,
    times: u64,
    tolerate: bool,
    disturb: impl Fn() -> CaseResult + Sync,
) -> CaseResult {
    programs::start_scribbling(&mut m.vcpu, BASE, 512, 1, 0)?;
    let (stop, done) = (AtomicBool::new(false), AtomicU64::new(0));
    let result = thread::scope(|scope| -> CaseResult {
        let disturber = scope.spawn(|| -> CaseResult {
            while !stop.load(Ordering::Relaxed) {
                disturb()?;
                // Pauses of several lengths: a fault whose page is looked up anew starts over if the memory changes meanwhile, and on
                // CPUs that an emulator runs in turns two threads that wait for the same lock can stay in step for minutes.
                thread::sleep(Duration::from_micros(done.fetch_add(1, Ordering::Relaxed) % 8 * 50));
            }
            Ok(())
        });
        let result: CaseResult = (|| {
            let mut rounds = 0;
            while rounds < 40 / share() || done.load(Ordering::Relaxed) < times {
                ensure!(!disturber.is_finished(), "the disturbing thread has ended");
                match m.run() {
                    Ok(exit) if programs::is_mark(&exit.reason) => rounds += 1,
                    Ok(exit) if exit.reason == Interrupted => {}
                    Ok(exit) => return Err(Stop::Fail(format!("exit {:x?}", exit.reason))),
                    // Not allowed just now.
                    Err(Stop::Fail(why)) if tolerate && why.contains("EFAULT") => thread::yield_now(),
                    Err(stop) => return Err(stop),
                }
            }
            Ok(())
        })();
        stop.store(true, Ordering::Relaxed);
        disturber.join().map_err(|_| Stop::Fail("the thread panicked".into()))??;
        result
    });
    result?;
    let sum: u64 = (0..512).map(|page| memory.get(page * PAGE)).sum();
    ensure_eq!(sum, programs::written(&m.vcpu), "increments that are in memory, of those that the guest has made");
    Ok(())
}

fn paged_out() -> CaseResult {
    needs_swap()?;
    let mut m = programs::machine(programs::scribbler())?;
    let (memory, slot) = map(&m, Mapping::anonymous(LARGE, MapFlags::MAP_PRIVATE)?)?;
    disturbed(&mut m, &memory, 20 / share() as u64, false, || memory.page_out())?;
    ensure!(m.vm.stats()?.invalidations > 0, "nothing was ever paged out");
    drop(slot);
    Ok(())
}

/// After MADV_FREE a page holds what it held, or zeros; and once it has been written it stays.
fn freed() -> CaseResult {
    const PAGES: usize = 256;
    needs_swap()?;
    let mut m = programs::machine(programs::sweeper())?;
    let (memory, slot) = map(&m, Mapping::anonymous(PAGES * PAGE, MapFlags::MAP_PRIVATE)?)?;
    sweep(&mut m, PAGES, 0, 1, false)?;
    memory.advise(0, memory.size, MmapAdvise::MADV_FREE)?;
    memory.page_out()?;
    let gone = (0..PAGES).filter(|page| memory.get(page * PAGE + 16) == 0).count();
    ensure!(gone > 0, "no page was ever freed");
    sweep(&mut m, PAGES, 1, 2, true)?;
    memory.advise(0, memory.size, MmapAdvise::MADV_FREE)?;
    // Written after it was freed, by a vCPU that could write all of it before.
    sweep(&mut m, PAGES, 2, 3, true)?;
    memory.page_out()?;
    sweep(&mut m, PAGES, 3, 4, false)?;
    drop(slot);
    Ok(())
}

/// Memory that is moved in the process is gone for the guest, and is there again when the new place is mapped.
fn moved() -> CaseResult {
    let mut m = programs::machine(programs::keeper())?;
    let mapping = Mapping::anonymous(4 * PAGE, MapFlags::MAP_PRIVATE)?;
    let region = |at: NonNull<u8>| MapRegion {
        guest_addr: BASE,
        size: 4 * PAGE as u64,
        user_addr: at.as_ptr() as u64,
        flags: MEM_READ | MEM_WRITE,
        reserved: 0,
    };
    raw::plain(m.space.as_fd(), ioctl::MAP, region(mapping.start))?;
    programs::marked(&mut m)?;
    // The new place is one that is free: a mapping that is replaced.
    let target = Mapping::anonymous(4 * PAGE, MapFlags::MAP_PRIVATE)?;
    let flags = MRemapFlags::MREMAP_MAYMOVE | MRemapFlags::MREMAP_FIXED;
    // SAFETY: Both ranges are ours, and nothing but the guest uses them.
    let new = unsafe { mremap(mapping.address(0), mapping.size, target.size, flags, Some(target.address(0))) }?;
    ensure_eq!(new.as_ptr() as usize, target.start.as_ptr() as usize, "new place");
    std::mem::forget(mapping);
    match m.run() {
        Err(Stop::Fail(why)) if why.contains("EFAULT") => {}
        other => return Err(Stop::Fail(format!("a read of memory that was moved gave {other:x?}"))),
    }
    raw::plain(m.space.as_fd(), ioctl::UNMAP, Range { guest_addr: BASE, size: 4 * PAGE as u64 })?;
    raw::plain(m.space.as_fd(), ioctl::MAP, region(target.start))?;
    programs::marked(&mut m)?;
    ensure_eq!(programs::value(&m.vcpu), 77, "the word at the new place");
    ensure_eq!(target.get(0), 77, "the program's view of it");
    Ok(())
}

/// After fork, the guest's writes are the parent's and the child's are its own, whoever writes first.
fn forked() -> CaseResult {
    let mut m = programs::machine(programs::pair())?;
    let (memory, slot) = map(&m, Mapping::anonymous(2 * PAGE, MapFlags::MAP_PRIVATE)?)?;
    let control = Mapping::anonymous(PAGE, MapFlags::MAP_SHARED)?;
    memory.set(PAGE, 5);
    programs::marked_twice(&mut m)?;
    // SAFETY: the child makes atomic accesses and leaves by `_exit`.
    let child = match unsafe { nix::unistd::fork() }? {
        nix::unistd::ForkResult::Child => {
            let wait = |value| {
                while control.get(0) != value {
                    std::hint::spin_loop();
                    // SAFETY: no argument.
                    unsafe { libc::sched_yield() };
                }
            };
            // What the guest had written before; written here first.
            let first = memory.get(0) == 1 && memory.get(PAGE) == 5;
            memory.set(PAGE, 6);
            control.set(0, 1);
            // The guest has written meanwhile, in the page that it has and in this one's.
            wait(2);
            let second = memory.get(0) == 1 && memory.get(PAGE) == 6;
            memory.set(0, 100);
            control.set(0, 3);
            wait(4);
            let third = memory.get(0) == 100;
            // SAFETY: ends the process.
            unsafe { libc::_exit(i32::from(!(first && second && third))) }
        }
        nix::unistd::ForkResult::Parent { child } => child,
    };
    let wait = |value| harness::wait_until("the child", || Ok(control.get(0) == value));
    let result: CaseResult = (|| {
        wait(1)?;
        programs::marked_twice(&mut m)?;
        ensure_eq!(programs::value(&m.vcpu), 5, "what the guest reads of a page that the child has written");
        ensure_eq!(memory.get(0), 2, "the program's view of the guest's write");
        control.set(0, 2);
        wait(3)?;
        programs::marked_twice(&mut m)?;
        ensure_eq!(memory.get(0), 3, "the word that guest and child have written");
        control.set(0, 4);
        Ok(())
    })();
    if result.is_err() {
        nix::sys::signal::kill(child, nix::sys::signal::Signal::SIGKILL)?;
    }
    let status = nix::sys::wait::waitpid(child, None)?;
    result?;
    ensure!(matches!(status, nix::sys::wait::WaitStatus::Exited(_, 0)), "the child saw the guest's writes: {status:?}");
    drop(slot);
    Ok(())
}

/// The right to write comes and goes under a guest that writes: it is refused meanwhile, and loses no write.
fn protected() -> CaseResult {
    let mut m = programs::machine(programs::scribbler())?;
    let (memory, slot) = map(&m, Mapping::anonymous(LARGE, MapFlags::MAP_PRIVATE)?)?;
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

/// Equal pages that the kernel has merged part again when the guest writes one.
fn merged() -> CaseResult {
    const PAGES: usize = 64;
    let run = "/sys/kernel/mm/ksm/run";
    if fs::write("/sys/kernel/mm/ksm/sleep_millisecs", "1").is_err() || fs::write(run, "1").is_err() {
        return Err(Stop::Skip("the kernel does not merge pages (KSM)".into()));
    }
    let result = (|| {
        let mut m = programs::machine(programs::sweeper())?;
        let (memory, slot) = map(&m, Mapping::anonymous(PAGES * PAGE, MapFlags::MAP_PRIVATE)?)?;
        sweep(&mut m, PAGES, 0, 0x5a, false)?;
        memory.advise(0, memory.size, MmapAdvise::MADV_MERGEABLE)?;
        let sharing = || number("/sys/kernel/mm/ksm/pages_sharing", "");
        harness::wait_until("pages to be merged", || {
            thread::sleep(Duration::from_millis(20));
            Ok(sharing()? >= PAGES as u64 / 2)
        })?;
        // Read while they are shared, then written: the first half only.
        sweep(&mut m, PAGES, 0x5a, 0x5a, false)?;
        harness::wait_until("pages to be merged again", || {
            thread::sleep(Duration::from_millis(20));
            Ok(sharing()? >= PAGES as u64 / 2)
        })?;
        sweep(&mut m, PAGES / 2, 0x5a, 0x5b, false)?;
        for page in 0..PAGES {
            let expected = if page < PAGES / 2 { 0x5b } else { 0x5a };
            ensure_eq!(memory.get(page * PAGE + 16), expected, "page {page}");
        }
        ensure!(m.vm.stats()?.invalidations > 0, "nothing was ever merged under the guest");
        drop(slot);
        Ok(())
    })();
    fs::write(run, "2")?;
    result
}

/// What the module allocates for a VM counts for the control group of who made it, and is given back.
fn accounted() -> CaseResult {
    const SIZE: usize = 64 << 20;
    let mut m = programs::machine(programs::sweeper())?;
    let _group = Group::enter()?;
    // The kernel sums these numbers up every two seconds.
    let kernel = || {
        thread::sleep(Duration::from_millis(2500));
        number(&Group::file("memory.stat"), "kernel ")
    };
    // Or later, if it is busy: what is to be more by `least` bytes is read a few times.
    let more = |before: u64, least: u64| -> Result<u64, Stop> {
        let mut more = 0;
        for _ in 0..5 {
            more = kernel()?.saturating_sub(before);
            if more >= least {
                break;
            }
        }
        Ok(more)
    };
    let memory = Mapping::anonymous(SIZE, MapFlags::MAP_PRIVATE)?;
    memory.advise(0, SIZE, MmapAdvise::MADV_NOHUGEPAGE)?;
    let (memory, slot) = map(&m, memory)?;
    for page in 0..SIZE / PAGE {
        memory.set(page * PAGE + 16, 0);
    }
    let before = kernel()?;
    sweep(&mut m, SIZE / PAGE, 0, 1, false)?;
    let tables = m.vm.stats()?.table_pages;
    let least = (SIZE / LARGE) as u64 * PAGE as u64;
    let charged = more(before, least)?;
    println!("# {} MiB in small pages: {tables} pages of tables, {} KiB in the group", SIZE >> 20, charged >> 10);
    ensure!(tables >= (SIZE / LARGE) as u64, "{tables} pages of tables");
    ensure!(charged >= least, "the group has {charged} bytes more for the tables");
    // Each vCPU, and an address space: what is to be expected, and not more.
    let before = kernel()?;
    let vm = m.system.create_vm()?;
    let space = vm.create_address_space()?;
    let vcpus = (0..8).map(|id| vm.create_vcpu(id)).collect::<Result<Vec<_>, _>>()?;
    let objects = more(before, 64 << 10)?;
    println!("# a VM with an address space and 8 vCPUs: {} KiB in the group", objects >> 10);
    ensure!((64 << 10..2 << 20).contains(&objects), "the group has {objects} bytes more for a VM with 8 vCPUs");
    drop((vcpus, space, vm, slot));
    harness::wait_until("the memory to be given back", || Ok(kernel()? <= before))?;
    Ok(())
}
