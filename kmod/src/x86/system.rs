// SPDX-License-Identifier: GPL-2.0-only
//! What `/dev/axvcpu` tells of an x86 CPU.

use axvcpu_uapi::{
    ioctl,
    system::{
        CpuidTable, SystemInfo, ARCH_X86_64, BACKEND_NONE, BACKEND_SVM, BACKEND_VMX, FEATURE_DECODE_ASSISTS, FEATURE_DIRTY_LOG,
        FEATURE_EVENTFD, FEATURE_HUGE_2M, FEATURE_IN_KERNEL_APIC, FEATURE_NEXT_RIP, FEATURE_PV_CLOCK, STATUS_DISABLED_BY_FIRMWARE,
        STATUS_IN_USE, STATUS_READY, STATUS_TOO_OLD, STATUS_UNSUPPORTED,
    },
    x86::CpuidEntry,
};
use kernel::prelude::*;
use vcpu_core::{AxError, AxResult};
use x86_vcpu::{Backend, Capabilities};

use super::{ffi, vcpu::MAX_CPUID_ENTRIES};
use crate::abi;

/// An ioctl of the device that only x86 has.
///
/// # Errors
/// `ENOTTY` for an unknown number, and those of each.
pub(crate) fn system_ioctl(cmd: u32, arg: usize) -> Result<isize> {
    match cmd {
        ioctl::SUPPORTED_CPUID => supported_cpuid(arg),
        _ => Err(ENOTTY),
    }
}

/// Whether vCPUs can run now.
///
/// # Errors
/// Why not.
pub(crate) fn usable() -> AxResult {
    x86_vcpu::detect()?;
    if x86_vcpu::in_use() {
        return Err(AxError::HardwareBusy);
    }
    Ok(())
}

/// Adds what there is to say of the CPU and its backend.
pub(crate) fn describe(info: SystemInfo) -> SystemInfo {
    let (backend, status) = match x86_vcpu::detect() {
        Ok(_) if x86_vcpu::in_use() => (backend_number(), STATUS_IN_USE),
        Ok(_) => (backend_number(), STATUS_READY),
        Err(AxError::DisabledByFirmware) => (backend_number(), STATUS_DISABLED_BY_FIRMWARE),
        Err(AxError::Unsupported) => (backend_number(), STATUS_TOO_OLD),
        Err(_) => (BACKEND_NONE, STATUS_UNSUPPORTED),
    };
    let info = SystemInfo {
        arch: ARCH_X86_64,
        backend,
        status,
        max_cpuid_entries: MAX_CPUID_ENTRIES,
        tsc_khz: ffi::tsc_khz(),
        ..info
    };
    if matches!(status, STATUS_READY | STATUS_IN_USE) {
        describe_backend(info)
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
fn describe_backend(info: SystemInfo) -> SystemInfo {
    let caps = Capabilities::host();
    let mut features = FEATURE_IN_KERNEL_APIC | FEATURE_HUGE_2M | FEATURE_PV_CLOCK | FEATURE_EVENTFD | FEATURE_DIRTY_LOG;
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
