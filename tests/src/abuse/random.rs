// SPDX-License-Identifier: MIT OR Apache-2.0
//! Thousands of random calls, from a seed that is printed and can be given in `AXVCPU_SEED`. Every errno must be one
//! that axvcpu(4) documents, and afterwards a guest must run as ever.
//!
//! Addresses that the kernel may store to, or hand to the guest, are those of one buffer, or are none.

use super::{arch, Kind, CALLS};
use crate::eventfd::eventfd;
use crate::harness::{self, Case, CaseResult};
use crate::machine::open_axvcpu;
use crate::random::{seed, Random};
use crate::{ensure, raw, table};
use axvcpu_uapi::client::{Backing, Errno, Memory};
use axvcpu_uapi::ioctl;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

pub(super) fn cases() -> Vec<Case> {
    table! {
        "random/one-thread" => one_thread, in 120;
        "random/three-threads-on-the-same-files" => three_threads, in 120;
    }
}

/// Errnos that axvcpu(4) documents.
const DOCUMENTED: [Errno; 17] = [
    Errno::E2BIG,
    Errno::EAGAIN,
    Errno::EALREADY,
    Errno::EBADF,
    Errno::EBADFD,
    Errno::EEXIST,
    Errno::EFAULT,
    Errno::EINTR,
    Errno::EINVAL,
    Errno::EMFILE,
    Errno::ENODATA,
    Errno::ENOENT,
    Errno::ENOMEM,
    Errno::ENOSPC,
    Errno::ENOTRECOVERABLE,
    Errno::ENOTTY,
    Errno::EOPNOTSUPP,
];

/// The files that calls are made on; never empty, and never too many.
struct Files(Mutex<Vec<Arc<OwnedFd>>>);

impl Files {
    const MAX: usize = 24;

    fn pick(&self, random: &mut Random) -> Arc<OwnedFd> {
        let files = lock(&self.0);
        Arc::clone(&files[random.below(files.len())])
    }

    /// Adds a file, in the place of a random one (not of the device, the first) if there are many.
    fn add(&self, random: &mut Random, fd: OwnedFd) {
        let mut files = lock(&self.0);
        if files.len() < Self::MAX {
            files.push(Arc::new(fd));
        } else {
            let index = 1 + random.below(Self::MAX - 1);
            files[index] = Arc::new(fd);
        }
    }
}

/// The file that a thread is making a call on, for the thread that kicks.
type Current = Mutex<Option<Arc<OwnedFd>>>;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes `count` random calls.
fn calls(files: &Files, current: &Current, arena: &Memory, random: &mut Random, count: usize) -> CaseResult {
    const SIZE: usize = 1 << 16;
    let start = arena.start().as_ptr() as u64;
    let mut made = Vec::new();
    let eventfds = [eventfd()?, eventfd()?];
    let events = [0, 1].map(|i| eventfds[i].as_fd().as_raw_fd() as u64);
    for _ in 0..count {
        harness::check_time()?;
        let file = files.pick(random);
        *lock(current) = Some(Arc::clone(&file));
        let call = &CALLS[random.below(CALLS.len())];
        let request = if random.below(20) == 0 { call.request ^ (1 << random.below(32)) } else { call.request };
        // The argument: words of zeros, small numbers, flags, addresses, and noise.
        let mut words = [0u64; 512];
        let used = 1 + random.below(34);
        for word in &mut words[..used] {
            *word = match random.below(12) {
                0..=3 => 0,
                4 => random.word() % 16,
                5 => 0x1000 * (random.word() % 64),
                6 => 1 << random.below(64),
                7 => 0xfee0_0000 | (random.word() % 0x1000),
                8 => (random.word() % 256) | ((random.word() % 8) << 32),
                9 => random.word(),
                10 => u64::MAX - random.word() % 0x2000,
                _ => start + 0x1000 * random.below(SIZE / 0x1000) as u64,
            };
        }
        // Where the ABI has an address, only our buffer, or an address at which nothing can be.
        let address = match random.below(6) {
            0 => 0xffff_8000_0000_0000 | random.word(),
            1 => 0,
            _ => start + 0x1000 * random.below(8) as u64,
        };
        let noise = random.word();
        match call.request {
            ioctl::SUPPORTED_CPUID => {
                (words[0], words[1]) = (address, random.pick(&[0, 1, 100, 1000, u64::MAX]) & 0xffff_ffff)
            }
            ioctl::MAP => {
                words[1] = random.pick(&[0x1000, 0x2000, 0x8000, 0, 1, 1 << 40, 0x1000_0000]);
                // Large regions lie where no process has anything: nothing beyond the buffer is for the guest.
                words[2] = if words[1] > SIZE as u64 / 2 { 0x1000_0000_0000 } else { address };
                words[3] = random.pick(&[1, 3, 5, 7, 7, 7, 0, 8]);
            }
            ioctl::GET_REGS | ioctl::SET_REGS => {
                let length = random.pick(&arch::SET_LENGTHS);
                let set = arch::SETS.0 + random.word() % arch::SETS.1;
                (words[0], words[1]) = (set | (length << 32), address);
            }
            ioctl::SETUP => {
                (words[0], words[1]) = ((random.word() % 2) | (random.pick(&[0, 0, 1, 30, 1000]) << 32), address);
                if random.below(4) != 0 {
                    words[2..8].fill(0);
                }
            }
            ioctl::SET_EPT_ROOT => words[0] = random.word() % 40,
            ioctl::START_DIRTY_LOG if noise & 3 != 0 => {
                (words[0], words[1]) = (0, random.pick(&[1 << 18, 1 << 20, 1 << 40]))
            }
            ioctl::READ_DIRTY_LOG => {
                // No more words than the buffer has room for behind any of its addresses.
                (words[0], words[1]) =
                    (random.pick(&[0, 1 << 18, 1 << 19]), random.pick(&[1 << 18, 1 << 20, 1, 1 << 30]));
                words[2] = address;
            }
            ioctl::IRQFD => {
                words[0] = random.pick(&events) | random.pick(&[0, 0, events[0], events[1]]) << 32;
                words[1] = random.pick(&[0, 0, arch::MSI, arch::MSI, arch::MSI + 8, noise]);
                words[2] = random.pick(&[0, arch::MSI_DATA.into(), arch::MSI_LEVEL.into(), noise & 0xffff])
                    | (random.word() % 4) << 32;
            }
            ioctl::IOEVENTFD => {
                words[0] = random.pick(&[0x80, 0x80, 0x1000, 0xa_0000, noise]);
                words[1] = random.pick(&[0, 0, 1, noise]);
                words[2] = random.pick(&[events[0], events[1], 0xffff_ffff]) | random.pick(&[0, 0, 1, 2, 8, 5]) << 32;
                words[3] = random.word() % 9;
            }
            ioctl::CREATE_GIC if noise & 3 != 0 => {
                (words[0], words[1]) = (random.pick(&[0x800_0000, 0x80a_0000, 0x1000, noise]), 0x80a_0000);
                words[2] = random.pick(&[0, 1, 4, 64, 65]);
            }
            ioctl::SIGNAL_MSI if noise & 1 != 0 => {
                (words[0], words[1]) = (random.pick(&[arch::MSI, arch::MSI + 8]), random.word() % 260);
            }
            ioctl::CREATE_VM | ioctl::CREATE_ADDRESS_SPACE if random.below(4) != 0 => words[0] = 0,
            ioctl::CREATE_VCPU if random.below(4) != 0 => words[0] = random.word() % 8,
            _ => {}
        }
        let argument = if random.below(16) == 0 { address } else { words.as_mut_ptr() as u64 };
        // SAFETY: the words are longer than any structure of the ABI (with a flipped size bit it is another number,
        // which nobody handles), or the address is that of the buffer, or none. The addresses in the structures are
        // those of the buffer with room behind for any set, or none; where a flipped bit makes one call another of the
        // same size, they are any of the words above, none of which is an address of anything but the buffer.
        let result = unsafe { raw::ioctl(file.as_fd(), request, argument as usize) };
        match result {
            Ok(fd)
                if fd > 0 && [ioctl::CREATE_VM, ioctl::CREATE_ADDRESS_SPACE, ioctl::CREATE_VCPU].contains(&request) =>
            {
                // SAFETY: the call has made the descriptor.
                files.add(random, unsafe { OwnedFd::from_raw_fd(fd) });
            }
            Ok(_) => {}
            Err(errno) => {
                ensure!(
                    DOCUMENTED.contains(&errno),
                    "{} ({request:#x}) with {:x?} gave {errno:?}",
                    call.name,
                    &words[..8]
                );
            }
        }
        made.push(call.kind == Kind::Vcpu && result.is_ok());
        if random.below(16) == 0 {
            // With their counts full they would block, but they do not wait.
            let _ = eventfds[random.below(2)].write(1);
        }
    }
    ensure!(made.contains(&true), "no call on a vCPU ever succeeded");
    Ok(())
}

/// Random calls from several threads, and one more that kicks every vCPU all the time.
fn run(threads: usize, count: usize) -> CaseResult {
    let seed = seed()?;
    let system = open_axvcpu()?;
    let before = system.info()?.vms;
    let arena = Memory::anonymous(1 << 18)?;
    let files = Files(Mutex::new(vec![Arc::new(system.as_fd().try_clone_to_owned()?)]));
    let mut random = Random::new(seed);
    // A VM to begin with, so that the first calls find something.
    let vm = system.create_vm()?;
    for fd in [vm.as_fd(), vm.create_address_space()?.as_fd(), vm.create_vcpu(0)?.as_fd()] {
        files.add(&mut random, fd.try_clone_to_owned()?);
    }
    drop(vm);
    let stop = AtomicBool::new(false);
    let currents: Vec<Current> = (0..threads).map(|_| Mutex::new(None)).collect();
    let result = thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                for current in &currents {
                    let file = lock(current).clone();
                    if let Some(file) = file {
                        // Not every file is a vCPU; those that are not refuse.
                        let _ = raw::none(file.as_fd(), ioctl::KICK);
                    }
                }
                thread::sleep(Duration::from_millis(1));
            }
        });
        let workers: Vec<_> = (0u64..)
            .zip(&currents)
            .map(|(i, current)| {
                let mut random = Random::new(seed ^ (i << 32));
                let (files, arena) = (&files, &arena);
                scope.spawn(move || calls(files, current, arena, &mut random, count))
            })
            .collect();
        let results: Vec<CaseResult> =
            workers.into_iter().map(|worker| harness::joined(worker.join()).and_then(|result| result)).collect();
        stop.store(true, Ordering::Relaxed);
        results.into_iter().collect::<CaseResult>()
    });
    drop(currents);
    result?;
    drop(files);
    harness::wait_until("the VMs to go", || Ok(system.info()?.vms == before))?;
    arch::guest_runs()
}

fn one_thread() -> CaseResult {
    run(1, 10_000)
}

fn three_threads() -> CaseResult {
    run(3, 4_000)
}
