// SPDX-License-Identifier: MIT OR Apache-2.0
//! Calls in the wrong state, in every order: each has its errno, and none of them harms the vCPU.

use super::{arch, Objects, CALLS};
use crate::harness::{Case, CaseResult};
use crate::{ensure_eq, raw, table};
use axvcpu_uapi::client::Errno;
#[cfg(target_arch = "x86_64")]
use axvcpu_uapi::vcpu::Event;
use axvcpu_uapi::vcpu::{Entry, EptRoot, Gpr, RegisterSet, Setup};
use axvcpu_uapi::{ioctl, AbiStruct};
use std::os::fd::{AsFd, AsRawFd};

pub(super) fn cases() -> Vec<Case> {
    table! {
        "order/before-setup" => before_setup;
        "order/setup-steps" => steps;
        "order/once-only" => once;
        "order/wrong-objects-for-set-ept-root" => wrong_objects;
        "order/every-call-on-every-wrong-file" => wrong_files;
        #[cfg(target_arch = "x86_64")]
        "order/event-slots" => event_slots;
    }
}

fn before_setup() -> CaseResult {
    let mut objects = Objects::new()?;
    let mut general = [0u64; 64];
    let (set, len) = arch::GENERAL;
    let set = RegisterSet { set, len, addr: general.as_mut_ptr() as u64 };
    for stage in 0..3 {
        let vcpu = objects.vcpu.as_fd();
        let bad = Err(Errno::EBADFD);
        ensure_eq!(raw::none(vcpu, ioctl::RUN), bad, "RUN at stage {stage}");
        ensure_eq!(raw::plain(vcpu, ioctl::GET_REGS, set), bad, "GET_REGS at stage {stage}");
        ensure_eq!(raw::plain(vcpu, ioctl::SET_REGS, set), bad, "SET_REGS at stage {stage}");
        ensure_eq!(raw::plain(vcpu, ioctl::SET_GPR, Gpr::ZERO), bad, "SET_GPR at stage {stage}");
        #[cfg(target_arch = "x86_64")]
        ensure_eq!(raw::plain(vcpu, ioctl::INJECT, Event { kind: 2, ..Event::ZERO }), bad, "INJECT at stage {stage}");
        #[cfg(target_arch = "x86_64")]
        ensure_eq!(
            raw::plain(vcpu, ioctl::APIC_ACCESS, axvcpu_uapi::vcpu::ApicAccess::ZERO),
            bad,
            "APIC_ACCESS at stage {stage}"
        );
        // These are legal at any time.
        objects.vcpu.kicker().kick()?;
        ensure_eq!(objects.vcpu.stats()?.state, 0, "state at stage {stage}");
        match stage {
            0 => objects.vcpu.set_entry(axvcpu_uapi::addr::GuestPhysAddr::new(0x1000))?,
            1 => objects.vcpu.set_ept_root(&objects.space)?,
            _ => objects.vcpu.setup(axvcpu_uapi::client::Apic::None, &arch::cpuid(&objects.system)?)?,
        }
    }
    ensure_eq!(objects.vcpu.stats()?.state, 1, "state after SETUP");
    Ok(())
}

/// SETUP wants both of the others, in either order.
fn steps() -> CaseResult {
    let setup = |objects: &Objects| raw::plain(objects.vcpu.as_fd(), ioctl::SETUP, Setup::ZERO);
    let entry = |objects: &Objects| raw::plain(objects.vcpu.as_fd(), ioctl::SET_ENTRY, Entry { guest_addr: 0 });
    let root = |objects: &Objects| {
        let root = EptRoot { aspace_fd: objects.space.as_fd().as_raw_fd(), reserved: 0 };
        raw::plain(objects.vcpu.as_fd(), ioctl::SET_EPT_ROOT, root)
    };
    for entry_first in [true, false] {
        let objects = Objects::new()?;
        ensure_eq!(setup(&objects), Err(Errno::ENODATA), "SETUP of a fresh vCPU");
        ensure_eq!(if entry_first { entry(&objects) } else { root(&objects) }, Ok(0), "first step");
        ensure_eq!(setup(&objects), Err(Errno::ENODATA), "SETUP after one step");
        ensure_eq!(if entry_first { root(&objects) } else { entry(&objects) }, Ok(0), "second step");
        ensure_eq!(setup(&objects), Ok(0), "SETUP after both steps");
    }
    Ok(())
}

fn once() -> CaseResult {
    let mut objects = Objects::new()?;
    objects.set_up()?;
    let vcpu = objects.vcpu.as_fd();
    let root = EptRoot { aspace_fd: objects.space.as_fd().as_raw_fd(), reserved: 0 };
    for _ in 0..2 {
        let bad = Err(Errno::EEXIST);
        ensure_eq!(raw::plain(vcpu, ioctl::SET_ENTRY, Entry { guest_addr: 0x2000 }), bad, "SET_ENTRY again");
        ensure_eq!(raw::plain(vcpu, ioctl::SET_EPT_ROOT, root), bad, "SET_EPT_ROOT again");
        ensure_eq!(raw::plain(vcpu, ioctl::SETUP, Setup::ZERO), bad, "SETUP again");
    }
    // It still starts where it was told first.
    ensure_eq!(arch::position(&objects.vcpu)?, 0x1000, "entry point");
    Ok(())
}

fn wrong_objects() -> CaseResult {
    let mut objects = Objects::new()?;
    let other = Objects::new()?;
    let null = std::fs::File::open("/dev/null")?;
    let (socket, _peer) = std::os::unix::net::UnixStream::pair()?;
    // The clone is closed at the end of the statement; tests run one at a time, so its number stays free.
    let closed = null.try_clone()?.as_raw_fd();
    for (what, aspace_fd, errno) in [
        ("no file", -1, Errno::EBADF),
        ("the lowest number", i32::MIN, Errno::EBADF),
        ("the highest number", i32::MAX, Errno::EBADF),
        ("a file that was closed", closed, Errno::EBADF),
        ("/dev/null", null.as_raw_fd(), Errno::EINVAL),
        ("a socket", socket.as_raw_fd(), Errno::EINVAL),
        ("the device", objects.system.as_fd().as_raw_fd(), Errno::EINVAL),
        ("the VM", objects.vm.as_fd().as_raw_fd(), Errno::EINVAL),
        ("the vCPU itself", objects.vcpu.as_fd().as_raw_fd(), Errno::EINVAL),
        ("an address space of another VM", other.space.as_fd().as_raw_fd(), Errno::EINVAL),
    ] {
        let result = raw::plain(objects.vcpu.as_fd(), ioctl::SET_EPT_ROOT, EptRoot { aspace_fd, reserved: 0 });
        ensure_eq!(result, Err(errno), "{what} as address space");
    }
    objects.set_up()
}

fn wrong_files() -> CaseResult {
    let mut objects = Objects::new()?;
    let null = std::fs::File::open("/dev/null")?;
    let mut buffer = [0u8; 4096];
    for call in CALLS {
        for kind in [super::Kind::System, super::Kind::Vm, super::Kind::AddressSpace, super::Kind::Vcpu] {
            if kind != call.kind {
                // SAFETY: the buffer is longer than any structure of the ABI.
                let result = unsafe { raw::ioctl(objects.fd(kind), call.request, buffer.as_mut_ptr() as usize) };
                ensure_eq!(result, Err(Errno::ENOTTY), "{} on {kind:?}", call.name);
            }
        }
        // SAFETY: as above.
        let result = unsafe { raw::ioctl(null.as_fd(), call.request, buffer.as_mut_ptr() as usize) };
        ensure_eq!(result, Err(Errno::ENOTTY), "{} on /dev/null", call.name);
    }
    objects.set_up()
}

/// One event of a kind waits at a time; SET_REGS can take it away again.
#[cfg(target_arch = "x86_64")]
fn event_slots() -> CaseResult {
    let (mut objects, _slot) = Objects::ready()?;
    for kind in [0, 3, 4] {
        let event = Event { kind, vector: 16, ..Event::ZERO };
        objects.vcpu.inject(&event)?;
        let again = raw::plain(objects.vcpu.as_fd(), ioctl::INJECT, event);
        ensure_eq!(again, Err(Errno::EAGAIN), "a second event of kind {kind}");
        objects.vcpu.set(&axvcpu_uapi::x86::Events::ZERO)?;
        objects.vcpu.inject(&event)?;
        objects.vcpu.set(&axvcpu_uapi::x86::Events::ZERO)?;
    }
    Ok(())
}
