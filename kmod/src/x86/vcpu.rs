// SPDX-License-Identifier: GPL-2.0-only
//! The ioctls of a vCPU that x86 does in its own way, or has alone: `SETUP` with CPUID, `INJECT`, and the local APIC.

use axvcpu_uapi::{
    ioctl,
    vcpu::{self as abi_vcpu, ApicAccess, Event, Setup},
    x86::CpuidEntry,
};
use kernel::prelude::*;
use vcpu_core::AxError;
use x86_vcpu::{X86CreateConfig, X86SetupConfig};

use super::VmState;
use crate::{
    abi,
    hal::Host,
    vcpu::{Inner, Vcpu},
};

/// CPUID entries per vCPU.
pub(crate) const MAX_CPUID_ENTRIES: u32 = x86_vcpu::cpuid::MAX_ENTRIES as u32;

/// Registers that `SET_GPR` knows.
pub(crate) const GENERAL_REGISTERS: u32 = 16;

/// What the backend must know of vCPU `id` to create it.
pub(crate) fn create_config(_vm: &VmState, id: u32) -> X86CreateConfig {
    X86CreateConfig { vcpu_id: id }
}

/// An ioctl of a vCPU that only x86 has.
///
/// # Errors
/// `ENOTTY` for an unknown number, and those of each.
pub(crate) fn vcpu_ioctl(vcpu: &Vcpu, inner: &mut Inner, cmd: u32, arg: usize) -> Result<isize> {
    match cmd {
        ioctl::INJECT => Vcpu::inject(inner, abi::read(arg)?),
        ioctl::APIC_ACCESS => {
            let result = Vcpu::apic_access(inner, arg);
            vcpu.after_apic(inner);
            result
        }
        _ => Err(ENOTTY),
    }
}

impl Vcpu {
    /// `SETUP`.
    ///
    /// # Errors
    /// `EINVAL`, `EFAULT`, `ENOMEM`, and those of the state machine.
    pub(crate) fn setup(&self, inner: &mut Inner, arg: Setup) -> Result<isize> {
        abi::must_be_zero(&arg.reserved)?;
        if arg.flags & !abi_vcpu::SETUP_IN_KERNEL_APIC != 0 || arg.cpuid_count > MAX_CPUID_ENTRIES {
            return Err(EINVAL);
        }
        let in_kernel_apic = arg.flags & abi_vcpu::SETUP_IN_KERNEL_APIC != 0;
        let read = |index| {
            let addr = abi::element::<CpuidEntry>(arg.cpuid_addr, index);
            addr.and_then(abi::read::<CpuidEntry>).map_err(|_| AxError::BadAddress)
        };
        let cpuid = x86_vcpu::load_cpuid::<Host>(arg.cpuid_count as usize, read).map_err(abi::errno)?;
        let tsc_origin = self.vm.arch().host_tsc;
        let posted = self.shared.mailbox.descriptor();
        inner.vcpu.setup(X86SetupConfig { cpuid, in_kernel_apic, tsc_origin, posted }).map_err(abi::errno)?;
        inner.in_kernel_apic = in_kernel_apic;
        if inner.vcpu.arch().map_err(abi::errno)?.takes_posted_interrupts() {
            self.shared.mailbox.post_to_hardware();
        }
        // Publishes who the vCPU is: INIT and start-up messages may come before its first `RUN`.
        inner.vcpu.arch_mut().map_err(abi::errno)?.prepare(&self.shared.mailbox);
        self.publish(inner);
        Ok(0)
    }

    fn apic_access(inner: &mut Inner, addr: usize) -> Result<isize> {
        let mut arg: ApicAccess = abi::read(addr)?;
        abi::must_be_zero(&[arg.reserved.into()])?;
        if arg.flags & !abi_vcpu::APIC_WRITE != 0 || arg.offset >= 4096 {
            return Err(EINVAL);
        }
        let write = (arg.flags & abi_vcpu::APIC_WRITE != 0).then_some(arg.value);
        let arch = inner.vcpu.arch_mut().map_err(abi::errno)?;
        arg.value = arch.apic_access(arg.offset, write).map_err(abi::errno)?;
        abi::write(addr, arg)?;
        Ok(0)
    }

    fn inject(inner: &mut Inner, event: Event) -> Result<isize> {
        inner.vcpu.arch_mut().map_err(abi::errno)?.inject(&event).map_err(abi::errno)?;
        Ok(0)
    }
}
