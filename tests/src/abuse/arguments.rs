// SPDX-License-Identifier: MIT OR Apache-2.0
//! Arguments that are wrong in themselves: numbers, sizes, pointers, reserved fields, flags, values.

use super::{arch, Kind, Objects, CALLS};
use crate::harness::{Case, CaseResult};
use crate::{ensure_eq, raw, table};
use axvcpu_uapi::aspace::{MapRegion, ProtectRange, MEM_READ};
use axvcpu_uapi::client::{Errno, Memory};
use axvcpu_uapi::system::CreateVm;
use axvcpu_uapi::vcpu::{Entry, EptRoot, Gpr, RegisterSet, Setup};
use axvcpu_uapi::vm::{CreateAddressSpace, CreateVcpu, Msi};
use axvcpu_uapi::{ioctl, AbiStruct};
#[cfg(target_arch = "x86_64")]
use axvcpu_uapi::{
    system::CpuidTable,
    vcpu::{ApicAccess, Event, MAX_MSRS},
    x86::{CpuidEntry, Msr},
};
use std::os::fd::{AsFd, AsRawFd};

pub(super) fn cases() -> Vec<Case> {
    table! {
        "arguments/unknown-numbers" => unknown;
        "arguments/wrong-sizes-and-directions" => sizes;
        "arguments/bad-pointers" => pointers;
        "arguments/read-only-results" => read_only;
        "arguments/reserved-fields-and-flags" => reserved;
        "arguments/register-set-buffers" => register_buffers;
        "arguments/values" => values;
        "arguments/run-page-requests" => requests;
        #[cfg(target_arch = "x86_64")]
        "arguments/cpuid-table-buffers" => cpuid_buffers;
        #[cfg(target_arch = "x86_64")]
        "arguments/setup-cpuid-arrays" => setup_arrays;
    }
}

const KINDS: [Kind; 4] = [Kind::System, Kind::Vm, Kind::AddressSpace, Kind::Vcpu];

/// Every number of our type that is not in the ABI, on every kind of file, and the same numbers under other types.
fn unknown() -> CaseResult {
    let objects = Objects::new()?;
    let mut buffer = [0u8; 4096];
    for kind in KINDS {
        for nr in 0..=0xffu32 {
            for request in [0xa700 | nr, 0x4008_a700 | nr, 0x8100_a700 | nr, 0xc010_a700 | nr, 0xae00 | nr] {
                if CALLS.iter().any(|call| call.request == request && call.kind == kind) {
                    continue;
                }
                // SAFETY: nobody handles the number; if somebody did, the buffer is as large as any size above.
                let result = unsafe { raw::ioctl(objects.fd(kind), request, buffer.as_mut_ptr() as usize) };
                ensure_eq!(result, Err(Errno::ENOTTY), "ioctl {request:#x} on {kind:?}");
            }
        }
    }
    Ok(())
}

/// The number with another size or direction is another number.
fn sizes() -> CaseResult {
    let mut objects = Objects::new()?;
    let mut buffer = [0u8; 1 << 14];
    for call in CALLS {
        let size = (call.request >> 16) & 0x3fff;
        let mut others: Vec<u32> = [0, 1, size.wrapping_sub(1), size + 1, size + 8, size.wrapping_sub(8), 0x3fff]
            .into_iter()
            .filter(|other| *other != size && *other < 1 << 14)
            .map(|other| call.request & !(0x3fff << 16) | (other << 16))
            .collect();
        others.extend([1 << 30, 2 << 30, 3 << 30].map(|bits| call.request ^ bits));
        for request in others {
            // SAFETY: the buffer is as long as a size can be.
            let result = unsafe { raw::ioctl(objects.fd(call.kind), request, buffer.as_mut_ptr() as usize) };
            ensure_eq!(result, Err(Errno::ENOTTY), "{} as {request:#x}", call.name);
        }
    }
    objects.set_up()
}

/// Addresses that no structure is at: null, unmapped, kernel, and one whose end is not mapped.
fn pointers() -> CaseResult {
    let (objects, _slot) = Objects::ready()?;
    let memory = Memory::anonymous(0x2000)?;
    let start = axvcpu_uapi::client::Backing::start(&memory).as_ptr() as usize;
    // SAFETY: the second page belongs to `memory`, which is not used but for its address.
    unsafe {
        let page = std::ptr::NonNull::new_unchecked((start + 0x1000) as *mut _);
        nix::sys::mman::mprotect(page, 0x1000, nix::sys::mman::ProtFlags::PROT_NONE)?;
    }
    for call in CALLS.iter().filter(|call| call.request >> 16 != 0) {
        for address in
            [0, 8, start + 0x1000, start + 0xffc, 0x7fff_ffff_f000, 1 << 47, 1 << 63, usize::MAX - 0xfff, usize::MAX]
        {
            // SAFETY: nothing is mapped writable at the address, or too little of it is, in a buffer that is free to be
            // overwritten.
            let result = unsafe { raw::ioctl(objects.fd(call.kind), call.request, address) };
            ensure_eq!(result, Err(Errno::EFAULT), "{} at {address:#x}", call.name);
        }
    }
    Ok(())
}

/// A result that cannot be stored is EFAULT, and creates nothing.
fn read_only() -> CaseResult {
    let (objects, _slot) = Objects::ready()?;
    let memory = Memory::anonymous(0x1000)?;
    let start = axvcpu_uapi::client::Backing::start(&memory);
    // SAFETY: the page belongs to `memory`, which is not written any more.
    unsafe { nix::sys::mman::mprotect(start.cast(), 0x1000, nix::sys::mman::ProtFlags::PROT_READ) }?;
    for call in CALLS.iter().filter(|call| call.request >> 31 == 1) {
        if [ioctl::APIC_ACCESS, ioctl::READ_DIRTY_LOG].contains(&call.request) {
            continue; // This vCPU has no APIC, and the page asks for no pages, which comes first.
        }
        // SAFETY: the kernel cannot write to the page.
        let result = unsafe { raw::ioctl(objects.fd(call.kind), call.request, start.as_ptr() as usize) };
        ensure_eq!(result, Err(Errno::EFAULT), "{} with a result in read-only memory", call.name);
    }
    let addr = start.as_ptr() as u64;
    let (set, len) = arch::GENERAL;
    let result = raw::plain(objects.vcpu.as_fd(), ioctl::GET_REGS, RegisterSet { set, len, addr });
    ensure_eq!(result, Err(Errno::EFAULT), "GET_REGS into read-only memory");
    Ok(())
}

fn reserved() -> CaseResult {
    let mut objects = Objects::new()?;
    let bad = Err(Errno::EINVAL);
    for flags in [1, 1 << 31, u32::MAX] {
        let (system, vm, space) = (objects.system.as_fd(), objects.vm.as_fd(), objects.space.as_fd());
        let vcpu = objects.vcpu.as_fd();
        ensure_eq!(raw::plain(system, ioctl::CREATE_VM, CreateVm { flags, reserved: 0 }), bad, "CREATE_VM flags");
        ensure_eq!(
            raw::plain(system, ioctl::CREATE_VM, CreateVm { flags: 0, reserved: flags }),
            bad,
            "CREATE_VM reserved"
        );
        let argument = CreateAddressSpace { flags, reserved: 0 };
        ensure_eq!(raw::plain(vm, ioctl::CREATE_ADDRESS_SPACE, argument), bad, "CREATE_ADDRESS_SPACE flags");
        let argument = CreateAddressSpace { flags: 0, reserved: flags };
        ensure_eq!(raw::plain(vm, ioctl::CREATE_ADDRESS_SPACE, argument), bad, "CREATE_ADDRESS_SPACE reserved");
        ensure_eq!(raw::plain(vm, ioctl::CREATE_VCPU, CreateVcpu { id: 5, flags }), bad, "CREATE_VCPU flags");
        let argument = Msi { address: arch::MSI, data: arch::MSI_DATA, flags };
        ensure_eq!(raw::plain(vm, ioctl::SIGNAL_MSI, argument), bad, "SIGNAL_MSI flags");
        let region = MapRegion { guest_addr: 0, size: 0x1000, user_addr: 0x10000, flags: MEM_READ, reserved: flags };
        ensure_eq!(raw::plain(space, ioctl::MAP, region), bad, "MAP reserved");
        let range = ProtectRange { guest_addr: 0, size: 0x1000, flags: MEM_READ, reserved: flags };
        ensure_eq!(raw::plain(space, ioctl::PROTECT, range), bad, "PROTECT reserved");
        let root = EptRoot { aspace_fd: space.as_raw_fd(), reserved: flags };
        ensure_eq!(raw::plain(vcpu, ioctl::SET_EPT_ROOT, root), bad, "SET_EPT_ROOT reserved");
    }
    for flags in [0, 2, 8, 9, 1 << 31, MEM_READ | 16] {
        let region = MapRegion { guest_addr: 0, size: 0x1000, user_addr: 0x10000, flags, reserved: 0 };
        ensure_eq!(raw::plain(objects.space.as_fd(), ioctl::MAP, region), bad, "MAP with rights {flags:#x}");
        let range = ProtectRange { guest_addr: 0, size: 0x1000, flags, reserved: 0 };
        ensure_eq!(raw::plain(objects.space.as_fd(), ioctl::PROTECT, range), bad, "PROTECT with rights {flags:#x}");
    }
    // SETUP's checks come before its effects: the vCPU can be set up afterwards.
    raw::plain(objects.vcpu.as_fd(), ioctl::SET_ENTRY, Entry { guest_addr: 0x1000 })?;
    let root = EptRoot { aspace_fd: objects.space.as_fd().as_raw_fd(), reserved: 0 };
    raw::plain(objects.vcpu.as_fd(), ioctl::SET_EPT_ROOT, root)?;
    for setup in [
        Setup { flags: 2, ..Setup::ZERO },
        Setup { flags: 1 << 31, ..Setup::ZERO },
        Setup { reserved: [0, 0, 0, 0, 0, 1], ..Setup::ZERO },
        Setup { reserved: [u64::MAX, 0, 0, 0, 0, 0], ..Setup::ZERO },
    ] {
        ensure_eq!(raw::plain(objects.vcpu.as_fd(), ioctl::SETUP, setup), bad, "SETUP {setup:?}");
    }
    objects.vcpu.setup(axvcpu_uapi::client::Apic::InKernel, &arch::cpuid(&objects.system)?)?;
    let vcpu = objects.vcpu.as_fd();
    ensure_eq!(raw::plain(vcpu, ioctl::SET_GPR, Gpr { reg: 0, reserved: 1, value: 0 }), bad, "SET_GPR reserved");
    #[cfg(target_arch = "x86_64")]
    for access in [
        ApicAccess { offset: 0x30, reserved: 1, ..ApicAccess::ZERO },
        ApicAccess { offset: 0x30, flags: 2, ..ApicAccess::ZERO },
        ApicAccess { offset: 0x30, flags: u32::MAX, ..ApicAccess::ZERO },
    ] {
        ensure_eq!(raw::plain(vcpu, ioctl::APIC_ACCESS, access), bad, "APIC_ACCESS {access:?}");
    }
    #[cfg(target_arch = "x86_64")]
    let event = Event { kind: 3, vector: 6, flags: 4, ..Event::ZERO };
    #[cfg(target_arch = "x86_64")]
    ensure_eq!(raw::plain(vcpu, ioctl::INJECT, event), bad, "INJECT flags");
    Ok(())
}

#[cfg(target_arch = "x86_64")]
fn cpuid_buffers() -> CaseResult {
    let objects = Objects::new()?;
    let system = objects.system.as_fd();
    let full = objects.system.supported_cpuid()?;
    let mut buffer = vec![CpuidEntry::ZERO; full.len()];
    for capacity in [0, 1, full.len() as u32 - 1] {
        let mut table = CpuidTable { entries_addr: buffer.as_mut_ptr() as u64, capacity, count: 0 };
        // SAFETY: the buffer has room for more than `capacity` entries.
        let result = unsafe { raw::ioctl(system, ioctl::SUPPORTED_CPUID, &raw mut table as usize) };
        ensure_eq!(result, Err(Errno::E2BIG), "capacity {capacity}");
        ensure_eq!(table.count as usize, full.len(), "count with capacity {capacity}");
        ensure_eq!(
            buffer[capacity as usize..],
            vec![CpuidEntry::ZERO; full.len() - capacity as usize],
            "what is beyond"
        );
    }
    for entries_addr in [0, 1 << 63, u64::MAX, u64::MAX - 31] {
        let table = CpuidTable { entries_addr, capacity: u32::MAX, count: 0 };
        ensure_eq!(
            raw::plain(system, ioctl::SUPPORTED_CPUID, table),
            Err(Errno::EFAULT),
            "entries at {entries_addr:#x}"
        );
    }
    Ok(())
}

#[cfg(target_arch = "x86_64")]
fn setup_arrays() -> CaseResult {
    let objects = Objects::new()?;
    let vcpu = objects.vcpu.as_fd();
    raw::plain(vcpu, ioctl::SET_ENTRY, Entry { guest_addr: 0x1000 })?;
    let root = EptRoot { aspace_fd: objects.space.as_fd().as_raw_fd(), reserved: 0 };
    raw::plain(vcpu, ioctl::SET_EPT_ROOT, root)?;
    let max = objects.system.info()?.max_cpuid_entries;
    let entries = vec![CpuidEntry::ZERO; max as usize + 1];
    for (cpuid_count, cpuid_addr, errno) in [
        (max + 1, entries.as_ptr() as u64, Errno::EINVAL),
        (u32::MAX, entries.as_ptr() as u64, Errno::EINVAL),
        (1, 0, Errno::EFAULT),
        (2, 1 << 63, Errno::EFAULT),
        (2, u64::MAX - 31, Errno::EFAULT),
    ] {
        let setup = Setup { cpuid_count, cpuid_addr, ..Setup::ZERO };
        ensure_eq!(raw::plain(vcpu, ioctl::SETUP, setup), Err(errno), "{cpuid_count} entries at {cpuid_addr:#x}");
    }
    for bad in [
        CpuidEntry { reserved: 1, ..CpuidEntry::ZERO },
        CpuidEntry { flags: 2, ..CpuidEntry::ZERO },
        CpuidEntry { flags: u32::MAX, ..CpuidEntry::ZERO },
    ] {
        let setup = Setup { cpuid_count: 1, cpuid_addr: &raw const bad as u64, ..Setup::ZERO };
        ensure_eq!(raw::plain(vcpu, ioctl::SETUP, setup), Err(Errno::EINVAL), "{bad:?}");
    }
    // An empty table is a table.
    raw::plain(vcpu, ioctl::SETUP, Setup::ZERO)?;
    Ok(())
}

fn register_buffers() -> CaseResult {
    let (objects, _slot) = Objects::ready()?;
    let vcpu = objects.vcpu.as_fd();
    let mut buffer = vec![0u8; 1 << 20];
    let addr = buffer.as_mut_ptr() as u64;
    #[cfg(target_arch = "x86_64")]
    let sets = [(1, 144), (2, 160), (3, 64), (4, 48), (6, objects.system.info()?.xsave_size), (7, 56)];
    #[cfg(target_arch = "aarch64")]
    let sets = [(16, 272), (17, 216), (18, 528)];
    for (set, size) in sets {
        for request in [ioctl::GET_REGS, ioctl::SET_REGS] {
            for len in [0, 1, size - 1, size + 1, 2 * size, 1 << 20, u32::MAX] {
                let result = raw::plain(vcpu, request, RegisterSet { set, len, addr });
                ensure_eq!(result, Err(Errno::EINVAL), "set {set} with {len} bytes, ioctl {request:#x}");
            }
            for addr in [0, 1 << 63, u64::MAX - 7, u64::MAX] {
                let result = raw::plain(vcpu, request, RegisterSet { set, len: size, addr });
                ensure_eq!(result, Err(Errno::EFAULT), "set {set} at {addr:#x}, ioctl {request:#x}");
            }
        }
    }
    for set in [0, 9, 10, 19, 1 << 31, u32::MAX] {
        for request in [ioctl::GET_REGS, ioctl::SET_REGS] {
            let result = raw::plain(vcpu, request, RegisterSet { set, len: 144, addr });
            ensure_eq!(result, Err(Errno::EINVAL), "set {set}, ioctl {request:#x}");
        }
    }
    #[cfg(target_arch = "x86_64")]
    for len in [0, 1, 15, 17, 16 * (MAX_MSRS + 1), 1 << 20, u32::MAX] {
        for request in [ioctl::GET_REGS, ioctl::SET_REGS] {
            let result = raw::plain(vcpu, request, RegisterSet { set: 5, len, addr });
            ensure_eq!(result, Err(Errno::EINVAL), "MSRs of {len} bytes, ioctl {request:#x}");
        }
    }
    #[cfg(target_arch = "x86_64")]
    for request in [ioctl::GET_REGS, ioctl::SET_REGS] {
        let mut msr = Msr { index: 0xc000_0102, reserved: 7, value: 0 };
        let bad = RegisterSet { set: 5, len: 16, addr: &raw mut msr as u64 };
        ensure_eq!(raw::plain(vcpu, request, bad), Err(Errno::EINVAL), "reserved field of an MSR, ioctl {request:#x}");
    }
    Ok(())
}

fn values() -> CaseResult {
    let objects = Objects::new()?;
    let info = objects.system.info()?;
    let (vm, vcpu) = (objects.vm.as_fd(), objects.vcpu.as_fd());
    for id in [info.max_vcpus, info.max_vcpus + 1, 0x8000_0000, u32::MAX] {
        let result = raw::plain(vm, ioctl::CREATE_VCPU, CreateVcpu { id, flags: 0 });
        ensure_eq!(result, Err(Errno::EINVAL), "vCPU {id}");
    }
    ensure_eq!(raw::plain(vm, ioctl::CREATE_VCPU, CreateVcpu { id: 0, flags: 0 }), Err(Errno::EEXIST), "vCPU 0 again");
    for guest_addr in arch::BAD_ENTRIES {
        let result = raw::plain(vcpu, ioctl::SET_ENTRY, Entry { guest_addr });
        ensure_eq!(result, Err(Errno::EINVAL), "entry point {guest_addr:#x}");
    }
    for address in arch::NOT_MSI {
        let result = raw::plain(vm, ioctl::SIGNAL_MSI, Msi { address, data: arch::MSI_DATA, flags: 0 });
        ensure_eq!(result, Err(Errno::EINVAL), "message to {address:#x}");
    }
    Ok(())
}

/// The kernel trusts nothing in the run page: unknown request and reply bits are refused, garbage elsewhere is not
/// looked at.
fn requests() -> CaseResult {
    let (mut objects, _slot) = Objects::ready()?;
    let length = std::num::NonZeroUsize::MIN.saturating_add(4095);
    use nix::sys::mman::{mmap, munmap, MapFlags, ProtFlags};
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice disturbs no existing memory.
    let page = unsafe { mmap(None, length, protection, MapFlags::MAP_SHARED, objects.vcpu.as_fd(), 0) }?;
    let run: *mut axvcpu_uapi::run::RunPage = page.as_ptr().cast();
    // SAFETY: the page is mapped and shared with the kernel, hence volatile; no reference to it exists.
    let (set_request, set_reply) = unsafe {
        (
            move |value: u32| (&raw mut (*run).request).write_volatile(value),
            move |value: u32| (&raw mut (*run).reply).write_volatile(value),
        )
    };
    for bad in [4, 1 << 31, u32::MAX] {
        set_request(bad);
        ensure_eq!(raw::none(objects.vcpu.as_fd(), ioctl::RUN), Err(Errno::EINVAL), "RUN with request {bad:#x}");
        set_request(0);
        set_reply(bad);
        ensure_eq!(raw::none(objects.vcpu.as_fd(), ioctl::RUN), Err(Errno::EINVAL), "RUN with reply {bad:#x}");
        set_reply(0);
    }
    // Garbage everywhere else, and flags that the architecture forbids only when they are asked to be loaded.
    let words = std::mem::offset_of!(axvcpu_uapi::run::RunPage, request);
    for offset in (0..4096).step_by(8).filter(|offset| *offset != words) {
        // SAFETY: inside the page, aligned; the request and reply words are left alone.
        unsafe { page.as_ptr().cast::<u64>().add(offset / 8).write_volatile(0xdead_beef_dead_beef) };
    }
    objects.vcpu.kicker().kick()?;
    let exit = objects.vcpu.run()?;
    ensure_eq!(exit.reason, axvcpu_uapi::exit::AxVCpuExitReason::Interrupted, "exit after a kick");
    objects.vcpu.set_general(&arch::forbidden());
    ensure_eq!(
        raw::none(objects.vcpu.as_fd(), ioctl::RUN),
        Err(Errno::EINVAL),
        "RUN that loads flags that the architecture forbids"
    );
    // SAFETY: mapped above, and not used any more.
    unsafe { munmap(page, 4096) }?;
    Ok(())
}
