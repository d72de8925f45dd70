// SPDX-License-Identifier: GPL-2.0-only
//! `/dev/axvcpu`: what the module and the CPU can do, and the creation of VMs.

use axvcpu_uapi::{
    ioctl,
    run::RunPage,
    system::{
        CpuidTable, CreateVm, SystemInfo, ARCH_X86_64, BACKEND_NONE, BACKEND_SVM, BACKEND_VMX, FEATURE_DECODE_ASSISTS,
        FEATURE_HUGE_2M, FEATURE_IN_KERNEL_APIC, FEATURE_NEXT_RIP, FEATURE_PV_CLOCK, STATUS_DISABLED_BY_FIRMWARE,
        STATUS_IN_USE, STATUS_READY, STATUS_TOO_OLD, STATUS_UNSUPPORTED,
    },
    x86::CpuidEntry,
    ABI_VERSION,
};
use kernel::prelude::*;
use vcpu_core::AxError;
use x86_vcpu::{Backend, Capabilities};

use crate::{abi, aspace, fd, ffi, vcpu, vm, vm::Vm};

/// An ioctl of the device, which has no state.
///
/// # Errors
/// `ENOTTY` for an unknown number, and those of each.
pub(crate) fn ioctl(cmd: u32, arg: usize) -> Result<isize> {
    match cmd {
        ioctl::INFO => abi::write(arg, info()).map(|()| 0),
        ioctl::SUPPORTED_CPUID => supported_cpuid(arg),
        ioctl::CREATE_VM => create_vm(abi::read(arg)?),
        _ => Err(ENOTTY),
    }
}

fn info() -> SystemInfo {
    let info = SystemInfo {
        abi_version: ABI_VERSION,
        arch: ARCH_X86_64,
        max_vcpus: vm::MAX_VCPUS as u32,
        max_address_spaces: vm::MAX_ADDRESS_SPACES,
        max_regions: aspace::MAX_REGIONS as u32,
        max_cpuid_entries: vcpu::MAX_CPUID_ENTRIES,
        run_page_size: core::mem::size_of::<RunPage>() as u32,
        tsc_khz: ffi::tsc_khz(),
        vms: vm::count(),
        ..SystemInfo::default()
    };
    let (backend, status) = match x86_vcpu::detect() {
        Ok(_) if x86_vcpu::in_use() => (backend_number(), STATUS_IN_USE),
        Ok(_) => (backend_number(), STATUS_READY),
        Err(AxError::DisabledByFirmware) => (backend_number(), STATUS_DISABLED_BY_FIRMWARE),
        Err(AxError::Unsupported) => (backend_number(), STATUS_TOO_OLD),
        Err(_) => (BACKEND_NONE, STATUS_UNSUPPORTED),
    };
    let info = SystemInfo { backend, status, ..info };
    if matches!(status, STATUS_READY | STATUS_IN_USE) {
        describe(info)
    } else {
        info
    }
}

/// The extension that the CPU has, usable or not.
fn backend_number() -> u32 {
    match x86_vcpu::extension() {
        Some(Backend::Svm) => BACKEND_SVM,
        Some(Backend::Vmx) => BACKEND_VMX,
        None => BACKEND_NONE,
    }
}

/// Adds what depends on the CPU's capabilities. It has a backend.
fn describe(info: SystemInfo) -> SystemInfo {
    let caps = Capabilities::host();
    let mut features = FEATURE_IN_KERNEL_APIC | FEATURE_HUGE_2M | FEATURE_PV_CLOCK;
    if caps.next_rip {
        features |= FEATURE_NEXT_RIP;
    }
    if caps.decode_assists {
        features |= FEATURE_DECODE_ASSISTS;
    }
    SystemInfo {
        features,
        guest_phys_bits: caps.guest_phys_bits,
        xsave_size: caps.xsave_size,
        xcr0_supported: caps.xcr0,
        ..info
    }
}

fn supported_cpuid(addr: usize) -> Result<isize> {
    let mut arg: CpuidTable = abi::read(addr)?;
    x86_vcpu::detect().map_err(abi::errno)?;
    let (base, capacity) = (arg.entries_addr, arg.capacity as usize);
    let (mut count, mut result) = (0, Ok(()));
    x86_vcpu::supported_cpuid(ffi::tsc_khz(), |entry: CpuidEntry| {
        if count < capacity && result.is_ok() {
            result = abi::element::<CpuidEntry>(base, count).and_then(|to| abi::write(to, entry));
        }
        count = count.wrapping_add(1);
    });
    result?;
    arg.count = count as u32;
    abi::write(addr, arg)?;
    if count > capacity {
        return Err(E2BIG);
    }
    Ok(0)
}

fn create_vm(arg: CreateVm) -> Result<isize> {
    abi::must_be_zero(&[arg.flags.into(), arg.reserved.into()])?;
    x86_vcpu::detect().map_err(abi::errno)?;
    if x86_vcpu::in_use() {
        return Err(abi::errno(AxError::HardwareBusy));
    }
    fd::install(Vm::new()?)
}
