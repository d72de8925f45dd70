// SPDX-License-Identifier: MIT OR Apache-2.0
//! The module axvcpu on x86: CPUID, interrupt messages, events and extended state, through the client of its ABI.

use axvcpu_uapi::addr::GuestPhysAddr;
use axvcpu_uapi::client::{self, Apic, Brief, Errno, Snapshot, System};
use axvcpu_uapi::ioctl;
use axvcpu_uapi::system::{self, SystemInfo};
use axvcpu_uapi::vcpu::{Event, EVENT_EXTERNAL_INTERRUPT};
use axvcpu_uapi::x86::{CpuidEntry, General};

use super::{X86Vcpu, X86Vm};
use crate::hypervisor::axvcpu::Vm;
use crate::hypervisor::Result;
use crate::sandbox::Ioctls;
use crate::x86::device::ioapic::Message;
use crate::x86::device::irq::MessageSink;

/// What the module calls this architecture.
pub const ARCH: u32 = system::ARCH_X86_64;

/// What to do about a CPU whose extension is too old.
pub const TOO_OLD_CURE: &str = "A newer CPU with nested paging is needed (AMD since 2007, Intel since 2008).";

/// What it is asked for while the guest runs, and at the end.
pub const IOCTLS: Ioctls = Ioctls {
    vcpu: &[ioctl::RUN, ioctl::SET_GPR, ioctl::GET_REGS, ioctl::SET_REGS, ioctl::INJECT, ioctl::APIC_ACCESS],
    any: &[ioctl::KICK, ioctl::SIGNAL_MSI, ioctl::VM_STATS, ioctl::VCPU_STATS, ioctl::UNMAP],
};

/// What a module lacks that every VM here needs.
#[must_use]
pub fn lacks(info: &SystemInfo) -> Option<&'static str> {
    (info.features & system::FEATURE_IN_KERNEL_APIC == 0).then_some("the module has no in-kernel local APIC")
}

/// What a VM keeps: the CPUID leaves that its guest may be given.
#[derive(Debug)]
pub struct VmState(Vec<CpuidEntry>);

impl VmState {
    /// For a new VM.
    ///
    /// # Errors
    /// What the module reports.
    pub fn new(system: &System, _vm: &client::Vm) -> Result<Self> {
        Ok(Self(system.supported_cpuid()?))
    }
}

impl X86Vm for Vm {
    fn supported_cpuid(&self) -> Result<Vec<CpuidEntry>> {
        Ok(self.arch.0.clone())
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
}

impl MessageSink for client::Vm {
    fn send(&self, message: Message) {
        if let Err(error) = self.signal_msi(message.address, message.data) {
            // A guest can program messages that no CPU takes; hardware drops those as well.
            tracing::debug!(?message, %error, "interrupt message refused");
        }
    }
}

impl X86Vcpu for client::Vcpu {
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

    fn brief(&self) -> Option<Brief> {
        client::Vcpu::brief(self)
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
}
