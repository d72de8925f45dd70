// SPDX-License-Identifier: MIT OR Apache-2.0
//! The module's limits, and the process's: reached, refused, and given back.

use super::Objects;
use crate::harness::{Case, CaseResult};
use crate::machine::open_axvcpu;
use crate::{ensure_eq, raw, table};
use axvcpu_uapi::aspace::{MapRegion, ProtectRange, Range, MEM_READ};
use axvcpu_uapi::client::{Backing, Errno, Error, Memory};
use axvcpu_uapi::ioctl;
use nix::sys::resource::{getrlimit, setrlimit, Resource};
use std::os::fd::AsFd;

pub(super) fn cases() -> Vec<Case> {
    table! {
        "limits/address-spaces" => address_spaces;
        "limits/vcpus" => vcpus;
        "limits/regions" => regions;
        "limits/many-vms" => vms;
        "limits/file-descriptors" => descriptors;
    }
}

fn address_spaces() -> CaseResult {
    let system = open_axvcpu()?;
    let vm = system.create_vm()?;
    let max = system.info()?.max_address_spaces;
    for round in 0..2 {
        let mut spaces = Vec::new();
        for _ in 0..max {
            spaces.push(vm.create_address_space()?);
        }
        ensure_eq!(vm.stats()?.address_spaces, max, "address spaces in round {round}");
        let full = vm.create_address_space().map(drop);
        ensure_eq!(full, Err(Error::CreateAddressSpace(Errno::ENOSPC)), "one more in round {round}");
        spaces.pop();
        spaces.push(vm.create_address_space()?);
    }
    ensure_eq!(vm.stats()?.address_spaces, 0, "address spaces when all are closed");
    Ok(())
}

/// As many vCPUs as INFO says. A number is used once in the life of a VM.
fn vcpus() -> CaseResult {
    let system = open_axvcpu()?;
    let vm = system.create_vm()?;
    let max = system.info()?.max_vcpus;
    let mut vcpus = Vec::new();
    for id in (0..max).rev() {
        vcpus.push(vm.create_vcpu(id)?);
    }
    ensure_eq!(vm.stats()?.vcpus, max, "vCPUs");
    drop(vcpus);
    ensure_eq!(vm.stats()?.vcpus, 0, "vCPUs when all are closed");
    let again = vm.create_vcpu(3).map(drop);
    ensure_eq!(again, Err(Error::CreateVcpu { id: 3, errno: Errno::EEXIST }), "a number that was used before");
    Ok(())
}

fn regions() -> CaseResult {
    let objects = Objects::new()?;
    let space = objects.space.as_fd();
    let max = u64::from(objects.system.info()?.max_regions);
    let memory = Memory::anonymous(0x3000)?;
    let user_addr = memory.start().as_ptr() as u64;
    // Every other page, so that no two can be joined; the first is three pages long.
    let map = |i: u64| {
        let size = if i == 0 { 0x3000 } else { 0x1000 };
        raw::plain(
            space,
            ioctl::MAP,
            MapRegion { guest_addr: i * 0x4000, size, user_addr, flags: MEM_READ, reserved: 0 },
        )
    };
    for i in 0..max {
        ensure_eq!(map(i), Ok(0), "region {i}");
    }
    let full = Err(Errno::ENOSPC);
    ensure_eq!(map(max), full, "one region more");
    // What would split a region needs one more, too.
    let middle = Range { guest_addr: 0x1000, size: 0x1000 };
    ensure_eq!(raw::plain(space, ioctl::UNMAP, middle), full, "UNMAP of the middle of a region");
    let protect = ProtectRange { guest_addr: 0x1000, size: 0x1000, flags: 7, reserved: 0 };
    ensure_eq!(raw::plain(space, ioctl::PROTECT, protect), full, "PROTECT of the middle of a region");
    let last = Range { guest_addr: (max - 1) * 0x4000, size: 0x1000 };
    ensure_eq!(raw::plain(space, ioctl::UNMAP, last), Ok(0), "UNMAP of a whole region");
    ensure_eq!(raw::plain(space, ioctl::UNMAP, middle), Ok(0), "UNMAP of the middle of a region when there is room");
    ensure_eq!(map(max), full, "one region more, now that one is split");
    Ok(())
}

fn vms() -> CaseResult {
    let system = open_axvcpu()?;
    let before = system.info()?.vms;
    let mut vms = Vec::new();
    for _ in 0..100 {
        let vm = system.create_vm()?;
        let space = vm.create_address_space()?;
        let vcpu = vm.create_vcpu(0)?;
        vms.push((vm, space, vcpu));
    }
    ensure_eq!(system.info()?.vms, before + 100, "VMs");
    drop(vms);
    ensure_eq!(system.info()?.vms, before, "VMs when all are closed");
    Ok(())
}

/// Without a free descriptor nothing is created, and nothing is leaked.
fn descriptors() -> CaseResult {
    let objects = Objects::new()?;
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    // No number above those in use is left.
    setrlimit(Resource::RLIMIT_NOFILE, 3, hard)?;
    let vm = objects.system.create_vm().map(drop);
    let space = objects.vm.create_address_space().map(drop);
    let vcpu = objects.vm.create_vcpu(1).map(drop);
    setrlimit(Resource::RLIMIT_NOFILE, soft, hard)?;
    ensure_eq!(vm, Err(Error::CreateVm(Errno::EMFILE)), "CREATE_VM");
    ensure_eq!(space, Err(Error::CreateAddressSpace(Errno::EMFILE)), "CREATE_ADDRESS_SPACE");
    ensure_eq!(vcpu, Err(Error::CreateVcpu { id: 1, errno: Errno::EMFILE }), "CREATE_VCPU");
    let stats = objects.vm.stats()?;
    ensure_eq!((stats.vcpus, stats.address_spaces), (1, 1), "vCPUs and address spaces");
    objects.vm.create_vcpu(1)?;
    Ok(())
}
