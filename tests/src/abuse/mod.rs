// SPDX-License-Identifier: MIT OR Apache-2.0
//! Every ioctl in every wrong way: the errno must be the one that axvcpu(4) documents, the objects must be as usable as
//! before, and the host must not mind (its kernel log is looked at by whoever runs this).

#[cfg_attr(target_arch = "aarch64", path = "arch_arm64.rs")]
#[cfg_attr(target_arch = "x86_64", path = "arch_x86.rs")]
mod arch;
mod arguments;
mod dirty;
mod eventfds;
mod files;
mod limits;
mod order;
mod processes;
mod random;
mod ranges;

pub use processes::help;

use crate::harness::{Case, Stop};
use crate::machine::{open_axvcpu, spin};
use crate::raw;
use axvcpu_uapi::addr::GuestPhysAddr;
use axvcpu_uapi::client::{AddressSpace, Apic, Memory, Permissions, Slot, System, Vcpu, Vm};
use axvcpu_uapi::vcpu::{Entry, EptRoot, Setup};
use axvcpu_uapi::{ioctl, AbiStruct};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;

/// Every case.
pub fn cases() -> Vec<Case> {
    [
        arguments::cases(),
        order::cases(),
        ranges::cases(),
        files::cases(),
        eventfds::cases(),
        dirty::cases(),
        processes::cases(),
        limits::cases(),
        random::cases(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// What a file descriptor stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    System,
    Vm,
    AddressSpace,
    Vcpu,
}

/// An ioctl of the ABI: its name, number, and the kind of file that it is for.
struct Call {
    name: &'static str,
    request: u32,
    kind: Kind,
}

/// The ABI's ioctls.
const CALLS: &[Call] = &[
    Call { name: "INFO", request: ioctl::INFO, kind: Kind::System },
    #[cfg(target_arch = "x86_64")]
    Call { name: "SUPPORTED_CPUID", request: ioctl::SUPPORTED_CPUID, kind: Kind::System },
    Call { name: "CREATE_VM", request: ioctl::CREATE_VM, kind: Kind::System },
    Call { name: "CREATE_ADDRESS_SPACE", request: ioctl::CREATE_ADDRESS_SPACE, kind: Kind::Vm },
    Call { name: "CREATE_VCPU", request: ioctl::CREATE_VCPU, kind: Kind::Vm },
    Call { name: "SIGNAL_MSI", request: ioctl::SIGNAL_MSI, kind: Kind::Vm },
    #[cfg(target_arch = "aarch64")]
    Call { name: "CREATE_GIC", request: ioctl::CREATE_GIC, kind: Kind::Vm },
    Call { name: "IRQFD", request: ioctl::IRQFD, kind: Kind::Vm },
    Call { name: "IOEVENTFD", request: ioctl::IOEVENTFD, kind: Kind::Vm },
    Call { name: "VM_STATS", request: ioctl::VM_STATS, kind: Kind::Vm },
    Call { name: "MAP", request: ioctl::MAP, kind: Kind::AddressSpace },
    Call { name: "UNMAP", request: ioctl::UNMAP, kind: Kind::AddressSpace },
    Call { name: "PROTECT", request: ioctl::PROTECT, kind: Kind::AddressSpace },
    Call { name: "START_DIRTY_LOG", request: ioctl::START_DIRTY_LOG, kind: Kind::AddressSpace },
    Call { name: "READ_DIRTY_LOG", request: ioctl::READ_DIRTY_LOG, kind: Kind::AddressSpace },
    Call { name: "STOP_DIRTY_LOG", request: ioctl::STOP_DIRTY_LOG, kind: Kind::AddressSpace },
    Call { name: "SET_ENTRY", request: ioctl::SET_ENTRY, kind: Kind::Vcpu },
    Call { name: "SET_EPT_ROOT", request: ioctl::SET_EPT_ROOT, kind: Kind::Vcpu },
    Call { name: "SETUP", request: ioctl::SETUP, kind: Kind::Vcpu },
    Call { name: "RUN", request: ioctl::RUN, kind: Kind::Vcpu },
    Call { name: "SET_GPR", request: ioctl::SET_GPR, kind: Kind::Vcpu },
    Call { name: "GET_REGS", request: ioctl::GET_REGS, kind: Kind::Vcpu },
    Call { name: "SET_REGS", request: ioctl::SET_REGS, kind: Kind::Vcpu },
    #[cfg(target_arch = "x86_64")]
    Call { name: "INJECT", request: ioctl::INJECT, kind: Kind::Vcpu },
    Call { name: "KICK", request: ioctl::KICK, kind: Kind::Vcpu },
    #[cfg(target_arch = "x86_64")]
    Call { name: "APIC_ACCESS", request: ioctl::APIC_ACCESS, kind: Kind::Vcpu },
    Call { name: "VCPU_STATS", request: ioctl::VCPU_STATS, kind: Kind::Vcpu },
];

/// One object of each kind; the vCPU is fresh.
struct Objects {
    system: System,
    vm: Vm,
    space: AddressSpace,
    vcpu: Vcpu,
}

impl Objects {
    fn new() -> Result<Self, Stop> {
        let system = open_axvcpu()?;
        let vm = system.create_vm()?;
        arch::interrupt_controller(&vm)?;
        let space = vm.create_address_space()?;
        let vcpu = vm.create_vcpu(0)?;
        Ok(Self { system, vm, space, vcpu })
    }

    /// With the vCPU set up, and a page at guest physical 0x1000 that holds a jump to itself.
    fn ready() -> Result<(Self, Slot<Memory>), Stop> {
        let mut this = Self::new()?;
        let memory = Arc::new(Memory::anonymous(0x1000)?);
        memory.write(0, spin())?;
        let slot = this.space.map_all(GuestPhysAddr::new(0x1000), memory, Permissions::RWX)?;
        this.vcpu.set_entry(GuestPhysAddr::new(0x1000))?;
        this.vcpu.set_ept_root(&this.space)?;
        this.vcpu.setup(Apic::None, &arch::cpuid(&this.system)?)?;
        crate::harness::watch(this.vcpu.kicker());
        Ok((this, slot))
    }

    fn fd(&self, kind: Kind) -> BorrowedFd<'_> {
        match kind {
            Kind::System => self.system.as_fd(),
            Kind::Vm => self.vm.as_fd(),
            Kind::AddressSpace => self.space.as_fd(),
            Kind::Vcpu => self.vcpu.as_fd(),
        }
    }

    /// Proves that a fresh vCPU has come through unharmed: it can still be set up.
    fn set_up(&mut self) -> crate::harness::CaseResult {
        raw::plain(self.vcpu.as_fd(), ioctl::SET_ENTRY, Entry { guest_addr: 0x1000 })?;
        let root = EptRoot { aspace_fd: self.space.as_fd().as_raw_fd(), reserved: 0 };
        raw::plain(self.vcpu.as_fd(), ioctl::SET_EPT_ROOT, root)?;
        let cpuid = arch::cpuid(&self.system)?;
        let cpuid_addr = if cpuid.is_empty() { 0 } else { cpuid.as_ptr() as u64 };
        let setup = Setup { cpuid_count: cpuid.len() as u32, cpuid_addr, ..Setup::ZERO };
        raw::plain(self.vcpu.as_fd(), ioctl::SETUP, setup)?;
        Ok(())
    }
}
