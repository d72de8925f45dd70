// SPDX-License-Identifier: MIT OR Apache-2.0
//! The module axvcpu on AArch64: its GICv3 and the start of vCPUs, through the client of its ABI.

use std::sync::Arc;

use axvcpu_uapi::arm64::{General, Gic, GIC_SET_SPI};
use axvcpu_uapi::client::{self, Apic, System};
use axvcpu_uapi::ioctl;
use axvcpu_uapi::system::{self, SystemInfo};

use super::{Arm64Vcpu, Arm64Vm};
use crate::arm64::boot::Start;
use crate::arm64::layout::{DISTRIBUTOR, REDISTRIBUTORS};
use crate::device::line::Lines;
use crate::hypervisor::axvcpu::Vm;
use crate::hypervisor::{Registers, Result};
use crate::sandbox::Ioctls;

/// What the module calls this architecture.
pub const ARCH: u32 = system::ARCH_AARCH64;

/// What to do about a CPU whose extension is too old.
pub const TOO_OLD_CURE: &str =
    "A CPU with a GICv3 interface and stage 2 translation of 4 KiB pages is needed, and a kernel \
     with pages of 4 KiB. The kernel's log says what is missing.";

/// What it is asked for while the guest runs, and at the end.
pub const IOCTLS: Ioctls = Ioctls {
    vcpu: &[ioctl::RUN, ioctl::SET_GPR, ioctl::GET_REGS, ioctl::SET_REGS],
    any: &[ioctl::KICK, ioctl::SIGNAL_MSI, ioctl::VM_STATS, ioctl::VCPU_STATS, ioctl::UNMAP],
};

/// What a module lacks that every VM here needs.
#[must_use]
pub fn lacks(info: &SystemInfo) -> Option<&'static str> {
    (info.features & system::FEATURE_IN_KERNEL_APIC == 0).then_some("the module has no interrupt controller for guests")
}

/// What a VM keeps.
#[derive(Debug)]
pub struct VmState {
    lines: Arc<Spis>,
}

impl VmState {
    /// For a new VM.
    ///
    /// # Errors
    /// None.
    pub fn new(_system: &System, vm: &client::Vm) -> Result<Self> {
        Ok(Self { lines: Arc::new(Spis(vm.clone())) })
    }
}

impl Arm64Vm for Vm {
    const STARTS_VCPUS: bool = false;
    type Lines = Spis;

    fn create_vcpus(&mut self, count: u32, start: &Start) -> Result<Vec<client::Vcpu>> {
        self.vm.create_gic(Gic { distributor: DISTRIBUTOR, redistributors: REDISTRIBUTORS, cpus: count, flags: 0 })?;
        let mut vcpus = Vec::new();
        for id in 0..count {
            let mut vcpu = self.vm.create_vcpu(id)?;
            // The others get theirs when they are started.
            vcpu.set_entry(start.entry)?;
            vcpu.set_ept_root(&self.space)?;
            vcpu.setup(Apic::InKernel, &[])?;
            if id == 0 {
                Registers::<General>::set(&mut vcpu, &start.general())?;
            }
            vcpus.push(vcpu);
        }
        Ok(vcpus)
    }

    fn lines(&self) -> Arc<Spis> {
        Arc::clone(&self.arch.lines)
    }
}

/// Shared peripheral interrupts, by messages to the distributor.
#[derive(Debug)]
pub struct Spis(client::Vm);

impl Lines for Spis {
    fn set(&self, number: u32, level: bool) {
        // The device tree calls all of them edge-triggered: a message makes one pending, and the message that lowers a
        // line would take that back before the guest has seen it (Arm IHI 0069, GICD_CLRSPI_NSR).
        if !level {
            return;
        }
        if let Err(error) = self.0.signal_msi(DISTRIBUTOR + GIC_SET_SPI, number) {
            tracing::warn!(number, %error, "interrupt lost");
        }
    }
}

impl Arm64Vcpu for client::Vcpu {
    fn syndrome(&self) -> Option<u64> {
        Some(client::Vcpu::syndrome(self).0)
    }
}
