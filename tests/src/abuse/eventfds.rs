// SPDX-License-Identifier: MIT OR Apache-2.0
//! IRQFD and IOEVENTFD: every wrong argument and file, and descriptors closed in every order, a vCPU running or not.

use super::arch::{KNOWN_WRITES, MSI, MSI_DATA, MSI_LEVEL, NOT_MSI};
use super::files::{bare, orders};
use super::Objects;
use crate::eventfd::eventfd;
use crate::harness::{self, Case, CaseResult, Stop};
use crate::machine::{open_axvcpu, spin};
use crate::{ensure_eq, raw, table};
use axvcpu_uapi::client::{Errno, Memory};
use axvcpu_uapi::ioctl::{self, IOEVENTFD, IRQFD};
use axvcpu_uapi::vcpu::VcpuStats;
use axvcpu_uapi::vm::{
    IoEventfd, Irqfd, IOEVENTFD_DATAMATCH, IOEVENTFD_DETACH, IOEVENTFD_PORT, IRQFD_DETACH, IRQFD_RESAMPLE,
};
use axvcpu_uapi::AbiStruct;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::thread;

pub(super) fn cases() -> Vec<Case> {
    table! {
        "eventfds/irqfd-arguments" => irqfd;
        "eventfds/ioeventfd-arguments" => ioeventfd;
        "eventfds/wrong-files" => wrong_files;
        "eventfds/limits" => limits;
        "eventfds/closed-in-every-order" => closed;
    }
}

fn irqfd() -> CaseResult {
    let objects = Objects::new()?;
    let event = eventfd()?;
    let fd = event.as_fd().as_raw_fd();
    let call = |argument| raw::plain(objects.vm.as_fd(), IRQFD, argument);
    let good = Irqfd { fd, resample_fd: 0, address: MSI, data: MSI_DATA, flags: 0 };
    let level = Irqfd { resample_fd: fd, data: MSI_LEVEL, flags: IRQFD_RESAMPLE, ..good };
    let detach = Irqfd { fd, flags: IRQFD_DETACH, ..Irqfd::default() };
    for (what, argument) in [
        ("an unknown flag", Irqfd { flags: 4, ..good }),
        ("all flags", Irqfd { flags: u32::MAX, ..good }),
        ("both flags", Irqfd { flags: IRQFD_DETACH | IRQFD_RESAMPLE, ..detach }),
        ("a second eventfd without its flag", Irqfd { resample_fd: fd, ..good }),
        ("no second eventfd, but -1", Irqfd { resample_fd: -1, ..good }),
        ("no message's address", Irqfd { address: NOT_MSI[1], ..good }),
        #[cfg(target_arch = "x86_64")]
        ("a start-up message", Irqfd { data: 0x640, ..good }),
        #[cfg(target_arch = "aarch64")]
        ("no SPI", Irqfd { data: 31, ..good }),
        #[cfg(target_arch = "x86_64")]
        ("resampling of an edge", Irqfd { data: 0x40, ..level }),
        #[cfg(target_arch = "aarch64")]
        ("resampling of what clears", Irqfd { address: MSI + 8, ..level }),
        ("detaching with an address", Irqfd { address: MSI, ..detach }),
        ("detaching with data", Irqfd { data: 1, ..detach }),
        ("detaching with a second eventfd", Irqfd { resample_fd: fd, ..detach }),
    ] {
        ensure_eq!(call(argument), Err(Errno::EINVAL), "{what}");
    }
    ensure_eq!(call(detach), Err(Errno::ENOENT), "detaching what is not attached");
    ensure_eq!(call(good), Ok(0), "attaching");
    ensure_eq!(call(good), Err(Errno::EEXIST), "attaching again");
    ensure_eq!(call(level), Err(Errno::EEXIST), "attaching again in another way");
    ensure_eq!(call(detach), Ok(0), "detaching");
    ensure_eq!(call(level), Ok(0), "attaching with itself as the second");
    event.write(1)?;
    ensure_eq!(call(detach), Ok(0), "detaching with itself as the second");
    Ok(())
}

fn ioeventfd() -> CaseResult {
    let objects = Objects::new()?;
    let event = eventfd()?;
    let fd = event.as_fd().as_raw_fd();
    let call = |argument| raw::plain(objects.vm.as_fd(), IOEVENTFD, argument);
    let memory = IoEventfd { address: 0xa_0000, data: 0, fd, width: 0, flags: 0, reserved: 0 };
    let byte = IoEventfd { address: 0x510, width: 1, flags: KNOWN_WRITES, ..memory };
    let value = IoEventfd { data: 7, flags: KNOWN_WRITES | IOEVENTFD_DATAMATCH, ..byte };
    let port = IoEventfd { flags: IOEVENTFD_PORT, ..byte };
    let detach = |argument: IoEventfd| IoEventfd { fd: -1, flags: argument.flags | IOEVENTFD_DETACH, ..argument };
    for (what, argument) in [
        ("an unknown flag", IoEventfd { flags: 8, ..memory }),
        ("all flags", IoEventfd { flags: u32::MAX, ..memory }),
        ("a reserved field", IoEventfd { reserved: 1, ..memory }),
        ("a width that there is not", IoEventfd { width: 3, ..byte }),
        ("a width that is too large", IoEventfd { width: 16, ..memory }),
        ("a port of 8 bytes", IoEventfd { width: 8, ..port }),
        ("a port that is none", IoEventfd { address: 0x1_0000, ..port }),
        #[cfg(target_arch = "aarch64")]
        ("a port, where there are none", port),
        ("a port that ends beyond the last", IoEventfd { address: 0xffff, width: 2, ..port }),
        ("an address that ends beyond the last", IoEventfd { address: u64::MAX, width: 8, ..memory }),
        ("a value without its flag", IoEventfd { data: 1, ..byte }),
        ("a value of any width", IoEventfd { width: 0, ..value }),
        ("a value that does not fit", IoEventfd { data: 0x100, ..value }),
        ("detaching with an eventfd", IoEventfd { flags: KNOWN_WRITES | IOEVENTFD_DETACH, ..byte }),
    ] {
        ensure_eq!(call(argument), Err(Errno::EINVAL), "{what}");
    }
    #[cfg(target_arch = "x86_64")]
    for (what, argument) in [
        ("an address and a width", IoEventfd { width: 4, ..memory }),
        ("an address and a value", IoEventfd { width: 4, data: 7, flags: IOEVENTFD_DATAMATCH, ..memory }),
    ] {
        ensure_eq!(call(argument), Err(Errno::EOPNOTSUPP), "{what}");
    }
    for good in [memory, byte, IoEventfd { address: 0xffff, ..byte }, IoEventfd { address: u64::MAX, ..memory }] {
        ensure_eq!(call(detach(good)), Err(Errno::ENOENT), "detaching what is not attached");
        ensure_eq!(call(good), Ok(0), "attaching");
        ensure_eq!(call(good), Err(Errno::EEXIST), "attaching again");
    }
    ensure_eq!(call(value), Err(Errno::EEXIST), "a value where any is attached");
    ensure_eq!(call(IoEventfd { width: 0, ..byte }), Err(Errno::EEXIST), "any width where one is attached");
    ensure_eq!(call(IoEventfd { width: 2, ..byte }), Ok(0), "another width");
    ensure_eq!(call(detach(byte)), Ok(0), "detaching");
    ensure_eq!(call(value), Ok(0), "a value where none is attached");
    ensure_eq!(call(IoEventfd { data: 8, ..value }), Ok(0), "another value");
    ensure_eq!(call(detach(IoEventfd { data: 9, ..value })), Err(Errno::ENOENT), "detaching a third value");
    Ok(())
}

fn wrong_files() -> CaseResult {
    let objects = Objects::new()?;
    let event = eventfd()?;
    let fd = event.as_fd().as_raw_fd();
    let null = std::fs::File::open("/dev/null")?;
    let closed = null.try_clone()?.as_raw_fd();
    for (what, wrong, errno) in [
        ("no file", -1, Errno::EBADF),
        ("the lowest number", i32::MIN, Errno::EBADF),
        ("the highest number", i32::MAX, Errno::EBADF),
        ("a file that was closed", closed, Errno::EBADF),
        ("/dev/null", null.as_raw_fd(), Errno::EINVAL),
        ("the device", objects.system.as_fd().as_raw_fd(), Errno::EINVAL),
        ("the VM itself", objects.vm.as_fd().as_raw_fd(), Errno::EINVAL),
        ("a vCPU", objects.vcpu.as_fd().as_raw_fd(), Errno::EINVAL),
    ] {
        let vm = objects.vm.as_fd();
        let interrupt = Irqfd { fd: wrong, resample_fd: 0, address: MSI, data: MSI_DATA, flags: 0 };
        ensure_eq!(raw::plain(vm, IRQFD, interrupt), Err(errno), "{what} to interrupt");
        let detach = Irqfd { fd: wrong, flags: IRQFD_DETACH, ..Irqfd::default() };
        ensure_eq!(raw::plain(vm, IRQFD, detach), Err(errno), "{what} to detach");
        let level = Irqfd { fd, resample_fd: wrong, address: MSI, data: MSI_LEVEL, flags: IRQFD_RESAMPLE };
        ensure_eq!(raw::plain(vm, IRQFD, level), Err(errno), "{what} for the end");
        let write = IoEventfd { address: 0x510, fd: wrong, flags: KNOWN_WRITES, ..IoEventfd::default() };
        ensure_eq!(raw::plain(vm, IOEVENTFD, write), Err(errno), "{what} for the guest to signal");
    }
    Ok(())
}

/// As many as INFO says, given back by detaching.
fn limits() -> CaseResult {
    let objects = Objects::new()?;
    let vm = objects.vm.as_fd();
    let max = u64::from(objects.system.info()?.max_eventfds);
    let event = eventfd()?;
    let at = |address| IoEventfd { address, fd: event.as_fd().as_raw_fd(), ..IoEventfd::default() };
    for round in 0..2 {
        for i in 0..max {
            ensure_eq!(raw::plain(vm, IOEVENTFD, at(i * 8)), Ok(0), "number {i} in round {round}");
        }
        ensure_eq!(raw::plain(vm, IOEVENTFD, at(max * 8)), Err(Errno::ENOSPC), "one more in round {round}");
        for i in 0..max {
            let argument = IoEventfd { fd: -1, flags: IOEVENTFD_DETACH, ..at(i * 8) };
            ensure_eq!(raw::plain(vm, IOEVENTFD, argument), Ok(0), "detaching number {i} in round {round}");
        }
    }
    Ok(())
}

/// Eventfds, VM and vCPU closed in every order, the vCPU running or not, signalled before each.
fn closed() -> CaseResult {
    let before = open_axvcpu()?.info()?.vms;
    let memory = Memory::anonymous(0x1000)?;
    memory.write(0, spin())?;
    for order in orders() {
        for running in [false, true] {
            let [_, vm, _, vcpu] = bare(&memory)?;
            let (vm, vcpu) = (vm.ok_or(Errno::EBADF)?, vcpu.ok_or(Errno::EBADF)?);
            let (event, resample) = (eventfd()?, eventfd()?);
            let numbers = [event.as_fd().as_raw_fd(), resample.as_fd().as_raw_fd()];
            let level =
                Irqfd { fd: numbers[0], resample_fd: numbers[1], address: MSI, data: MSI_LEVEL, flags: IRQFD_RESAMPLE };
            raw::plain(vm.as_fd(), IRQFD, level)?;
            let output = IoEventfd { address: 0x80, fd: numbers[0], flags: KNOWN_WRITES, ..IoEventfd::default() };
            raw::plain(vm.as_fd(), IOEVENTFD, output)?;
            let signal = event.as_fd().try_clone_to_owned()?;
            // The thread's descriptor of the vCPU is the last.
            let own = vcpu.try_clone()?;
            let runner = running.then(|| thread::spawn(move || raw::none(own.as_fd(), ioctl::RUN)));
            let kick = vcpu.try_clone()?;
            if running {
                harness::wait_until("the guest to run", || {
                    let mut stats = VcpuStats::ZERO;
                    // SAFETY: the result goes to `stats`.
                    unsafe { raw::ioctl(kick.as_fd(), ioctl::VCPU_STATS, &raw mut stats as usize) }?;
                    Ok(stats.state == 3)
                })?;
            }
            let mut things = [Some(OwnedFd::from(event)), Some(OwnedFd::from(resample)), Some(vm), Some(vcpu)];
            for index in order {
                nix::unistd::write(&signal, &1u64.to_ne_bytes())?;
                drop(things[index].take());
            }
            drop(signal);
            if let Some(runner) = runner {
                raw::none(kick.as_fd(), ioctl::KICK)?;
                runner.join().map_err(|_| Stop::Fail("the thread panicked".into()))??;
            }
            drop(kick);
            harness::wait_until("the VM to go", || Ok(open_axvcpu()?.info()?.vms == before))?;
        }
    }
    Ok(())
}
