// SPDX-License-Identifier: MIT OR Apache-2.0
//! The dirty log while guests write: what cannot be stored, and logs that come and go under everything.

use super::GRANULE;
use crate::harness::{CaseResult, Stop};
use crate::machine::{Machine, Mode};
use crate::{code, ensure_eq, raw};
use axvcpu_uapi::addr::GuestPhysAddr;
use axvcpu_uapi::aspace::DirtyLogRead;
use axvcpu_uapi::client::{Backing, Errno, Memory};
use axvcpu_uapi::ioctl::READ_DIRTY_LOG;
use axvcpu_uapi::AbiStruct;
use nix::sys::mman::{mprotect, ProtFlags};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

/// What cannot be stored stays in the log.
pub(super) fn buffers() -> CaseResult {
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
pub(super) fn load() -> CaseResult {
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
