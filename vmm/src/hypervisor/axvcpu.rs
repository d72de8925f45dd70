// SPDX-License-Identifier: MIT OR Apache-2.0
//! The module axvcpu as a hypervisor: a thin layer over the client of its ABI. What only one architecture has of it is
//! among the architecture's files.

use std::path::Path;

use axvcpu_uapi::client::{self, AddressSpace, Exit, RegisterSet, Slot, System};
use axvcpu_uapi::system::{self, SystemInfo};
use axvcpu_uapi::vcpu::VcpuStats;
use axvcpu_uapi::vm::VmStats;

use super::{Kick, Limits, Registers, Result, Stats, Vcpu};
use crate::arch;
use crate::error::Error;
use crate::memory::{Ram, RamRegion};
use crate::sandbox::Ioctls;

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
    if info.arch != arch::axvcpu::ARCH {
        return Err(Error::Unsuitable("the module is for another architecture than this axvmm".into()));
    }
    if let Some(lack) = arch::axvcpu::lacks(&info) {
        return Err(Error::Unsuitable(format!("{lack}; install a newer one")));
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
        system::STATUS_TOO_OLD => {
            ("the CPU's virtualization extension lacks something that is needed", arch::axvcpu::TOO_OLD_CURE)
        }
        system::STATUS_HOST_NOT_AT_EL2 => (
            "the host's kernel does not run at EL2: its CPU lacks VHE, or it was started at EL1",
            "A CPU of Armv8.1 or newer is needed. Within a virtual machine, enable nested virtualization outside.",
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
    pub(crate) vm: client::Vm,
    pub(crate) space: AddressSpace,
    /// What the architecture's part keeps.
    pub(crate) arch: arch::axvcpu::VmState,
    limits: Limits,
    slots: Vec<Slot<RamRegion>>,
}

impl super::Vm for Vm {
    type Vcpu = client::Vcpu;

    const IOCTLS: Ioctls = arch::axvcpu::IOCTLS;

    fn create(device: &Path) -> std::result::Result<Self, Error> {
        let (system, info) = open(device)?;
        let limits = Limits { vcpus: info.max_vcpus, guest_phys_bits: info.guest_phys_bits };
        Ok(Self::new(&system, limits)?)
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn map(&mut self, ram: &Ram) -> Result<()> {
        self.slots = ram.map(&self.space)?;
        Ok(())
    }

    fn stats(&self) -> Option<Stats<VmStats>> {
        self.vm.stats().ok().map(Stats::Axvcpu)
    }
}

impl Vm {
    fn new(system: &System, limits: Limits) -> Result<Self> {
        let vm = system.create_vm()?;
        let arch = arch::axvcpu::VmState::new(system, &vm)?;
        let space = vm.create_address_space()?;
        Ok(Self { vm, space, arch, limits, slots: Vec::new() })
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
        assert_eq!(code(system::STATUS_HOST_NOT_AT_EL2), ExitCode::NoVirtualization);
        assert_eq!(code(99), ExitCode::NoVirtualization);
    }

    #[test]
    fn devices_that_are_none() {
        let code = |path: &str| open(Path::new(path)).map(|_| ()).unwrap_err().exit_code();
        assert_eq!(code("/nonexistent"), ExitCode::NoDevice);
        assert_eq!(code("/dev/null"), ExitCode::AbiMismatch);
    }
}
