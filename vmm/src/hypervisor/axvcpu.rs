// SPDX-License-Identifier: MIT OR Apache-2.0
//! The module axvcpu as a hypervisor: a thin layer over the client of its ABI.

use std::path::Path;

use axvcpu_uapi::addr::GuestPhysAddr;
use axvcpu_uapi::client::{self, AddressSpace, Apic, Errno, Exit, RegisterSet, Slot, Snapshot, System};
use axvcpu_uapi::system::{self, SystemInfo};
use axvcpu_uapi::vcpu::{Event, VcpuStats, EVENT_EXTERNAL_INTERRUPT};
use axvcpu_uapi::vm::VmStats;
use axvcpu_uapi::x86::{CpuidEntry, General};

use super::{Kick, Limits, Registers, Result, Stats, Vcpu};
use crate::device::ioapic::Message;
use crate::device::irq::MessageSink;
use crate::error::Error;
use crate::memory::{Ram, RamRegion};

/// Opens the device and makes sure that it can run a VM.
///
/// # Errors
/// [`Error::Hypervisor`], [`Error::NotReady`] or [`Error::Unsuitable`].
pub fn open(device: &Path) -> std::result::Result<(System, SystemInfo), Error> {
    let system = System::open_path(device).map_err(super::Error::from)?;
    let info = system.info().map_err(super::Error::from)?;
    if let Some((reason, cure)) = not_ready(info.status) {
        return Err(Error::NotReady { status: info.status, reason, cure });
    }
    if info.arch != system::ARCH_X86_64 {
        return Err(Error::Unsuitable("the module is for another architecture than this axvmm".into()));
    }
    if info.features & system::FEATURE_IN_KERNEL_APIC == 0 {
        return Err(Error::Unsuitable("the module has no in-kernel local APIC; install a newer one".into()));
    }
    Ok((system, info))
}

/// What a status other than ready means, and the cure.
#[must_use]
pub fn not_ready(status: u32) -> Option<(&'static str, &'static str)> {
    Some(match status {
        system::STATUS_READY => return None,
        system::STATUS_IN_USE => (
            "another hypervisor, normally KVM, holds the CPU's virtualization extension",
            "End its virtual machines and unload it: modprobe -r kvm_amd kvm_intel\n\
             Or let it carry the guest: hypervisor = \"kvm\" in [base] of the configuration.",
        ),
        system::STATUS_DISABLED_BY_FIRMWARE => (
            "the firmware has switched virtualization off",
            "Enable it (\"SVM\", \"AMD-V\" or \"VT-x\") in the firmware's setup.",
        ),
        system::STATUS_TOO_OLD => (
            "the CPU's virtualization extension lacks nested paging",
            "A newer CPU is needed (AMD since 2007, Intel since 2008).",
        ),
        _ => (
            "the CPU has no virtualization extension that the module knows",
            "Within a virtual machine, enable nested virtualization outside.",
        ),
    })
}

/// A VM of the module with one address space.
#[derive(Debug)]
pub struct Vm {
    vm: client::Vm,
    space: AddressSpace,
    limits: Limits,
    supported: Vec<CpuidEntry>,
    slots: Vec<Slot<RamRegion>>,
}

impl super::Vm for Vm {
    type Vcpu = client::Vcpu;

    fn create(device: &Path) -> std::result::Result<Self, Error> {
        let (system, info) = open(device)?;
        let limits = Limits { vcpus: info.max_vcpus, guest_phys_bits: info.guest_phys_bits };
        Ok(Self::new(&system, limits)?)
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn supported_cpuid(&self) -> Result<Vec<CpuidEntry>> {
        Ok(self.supported.clone())
    }

    fn map(&mut self, ram: &Ram) -> Result<()> {
        self.slots = ram.map(&self.space)?;
        Ok(())
    }

    fn create_vcpu(&mut self, id: u32, entry: GuestPhysAddr, cpuid: &[CpuidEntry]) -> Result<client::Vcpu> {
        let mut vcpu = self.vm.create_vcpu(id)?;
        vcpu.set_entry(entry)?;
        vcpu.set_ept_root(&self.space)?;
        vcpu.setup(Apic::InKernel, cpuid)?;
        Ok(vcpu)
    }

    fn messages(&self) -> Box<dyn MessageSink> {
        Box::new(self.vm.clone())
    }

    fn stats(&self) -> Option<Stats<VmStats>> {
        self.vm.stats().ok().map(Stats::Axvcpu)
    }
}

impl Vm {
    fn new(system: &System, limits: Limits) -> Result<Self> {
        let supported = system.supported_cpuid()?;
        let vm = system.create_vm()?;
        let space = vm.create_address_space()?;
        Ok(Self { vm, space, limits, supported, slots: Vec::new() })
    }
}

impl MessageSink for client::Vm {
    fn send(&self, message: Message) {
        if let Err(error) = self.signal_msi(message.address, message.data) {
            // A guest can program messages that no CPU takes; hardware drops those as well.
            tracing::debug!(?message, %error, "interrupt message refused");
        }
    }
}

impl<S: RegisterSet> Registers<S> for client::Vcpu {
    fn get(&self) -> Result<S> {
        Ok(client::Vcpu::get(self)?)
    }
    fn set(&mut self, set: &S) -> Result<()> {
        Ok(client::Vcpu::set(self, set)?)
    }
}

impl Vcpu for client::Vcpu {
    fn run(&mut self) -> Result<Exit> {
        Ok(client::Vcpu::run(self)?)
    }

    fn kicker(&self) -> Box<dyn Kick> {
        Box::new(client::Vcpu::kicker(self))
    }

    fn reply(&mut self, value: u64) {
        client::Vcpu::reply(self, value);
    }

    fn reply_fault(&mut self) {
        client::Vcpu::reply_fault(self);
    }

    fn request_interrupt_window(&mut self, on: bool) {
        client::Vcpu::request_interrupt_window(self, on);
    }

    fn interrupt(&mut self, vector: u8) -> Result<bool> {
        let event = Event { kind: EVENT_EXTERNAL_INTERRUPT, vector: vector.into(), ..Event::default() };
        match client::Vcpu::inject(self, &event) {
            Ok(()) => Ok(true),
            // One injected earlier has not been delivered yet.
            Err(client::Error::Inject(Errno::EAGAIN)) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    fn inject(&mut self, event: &Event) -> Result<()> {
        Ok(client::Vcpu::inject(self, event)?)
    }

    fn general(&self) -> Result<General> {
        Ok(client::Vcpu::general(self))
    }

    fn set_general(&mut self, general: &General) -> Result<()> {
        client::Vcpu::set_general(self, general);
        Ok(())
    }

    fn snapshot(&self) -> Option<Snapshot> {
        client::Vcpu::snapshot(self)
    }

    fn xsave(&self) -> Result<Vec<u8>> {
        Ok(client::Vcpu::xsave(self)?)
    }

    fn set_xsave(&mut self, area: &[u8]) -> Result<()> {
        Ok(client::Vcpu::set_xsave(self, area)?)
    }

    fn apic_access(&mut self, offset: u32, write: Option<u32>) -> Result<Option<u32>> {
        match client::Vcpu::apic_access(self, offset, write) {
            Ok(value) => Ok(Some(value)),
            Err(client::Error::ApicAccess(Errno::EINVAL)) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn stats(&self) -> Option<Stats<VcpuStats>> {
        client::Vcpu::stats(self).ok().map(Stats::Axvcpu)
    }
}

impl Kick for client::Kicker {
    fn kick(&self) {
        // It fails only in a process that has no business with this vCPU, a child after fork.
        let _ = client::Kicker::kick(self);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit::ExitCode;

    #[test]
    fn every_status_but_ready_is_explained() {
        assert!(not_ready(system::STATUS_READY).is_none());
        let code = |status| {
            let (reason, cure) = not_ready(status).unwrap();
            Error::NotReady { status, reason, cure }.exit_code()
        };
        assert_eq!(code(system::STATUS_IN_USE), ExitCode::InUse);
        assert_eq!(code(system::STATUS_DISABLED_BY_FIRMWARE), ExitCode::FirmwareDisabled);
        assert_eq!(code(system::STATUS_UNSUPPORTED), ExitCode::NoVirtualization);
        assert_eq!(code(system::STATUS_TOO_OLD), ExitCode::NoVirtualization);
        assert_eq!(code(99), ExitCode::NoVirtualization);
    }

    #[test]
    fn devices_that_are_none() {
        let code = |path: &str| open(Path::new(path)).map(|_| ()).unwrap_err().exit_code();
        assert_eq!(code("/nonexistent"), ExitCode::NoDevice);
        assert_eq!(code("/dev/null"), ExitCode::AbiMismatch);
    }
}
