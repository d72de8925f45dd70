// SPDX-License-Identifier: MIT OR Apache-2.0
//! KVM on AArch64. The interrupt controller (a virtual GICv3), the timers and PSCI are KVM's; accesses to device memory
//! come decoded as far as the hardware decodes them.
//!
//! | file | owns |
//! |---|---|
//! | `ioctls.rs` | the requests that a running VM makes |
//! | `registers.rs` | register sets, one register at a time |
//! | `vcpu.rs` | vCPUs: how they start, exits that only AArch64 has |
//! | this file | the VM and its interrupt controller |

use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;

use axvcpu_uapi::client::Errno;
use axvcpu_uapi::vm::VmStats;
use kvm_bindings::{
    kvm_create_device, kvm_device_attr, kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3, kvm_enable_cap,
    KVM_ARM_IRQ_TYPE_SHIFT, KVM_ARM_IRQ_TYPE_SPI, KVM_CAP_ARM_NISV_TO_USER, KVM_DEV_ARM_VGIC_CTRL_INIT,
    KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_GRP_NR_IRQS, KVM_VGIC_V3_ADDR_TYPE_DIST,
    KVM_VGIC_V3_ADDR_TYPE_REDIST_REGION,
};
use kvm_ioctls::{Cap, DeviceFd, Kvm, VmFd};

use super::Arm64Vm;
use crate::arm64::boot::Start;
use crate::arm64::layout::{DISTRIBUTOR, INTIDS, REDISTRIBUTORS};
use crate::device::line::Lines;
use crate::hypervisor::kvm::error::{refused, Error};
use crate::hypervisor::kvm::{open, stats, Needed, Slots};
use crate::hypervisor::{self, Limits, Result, Stats};
use crate::memory::Ram;
use crate::sandbox::Ioctls;

mod ioctls;
mod registers;
mod vcpu;

pub use vcpu::Vcpu;

/// What it must be able to do.
pub(crate) const NEEDED: &[Needed] = &[(Cap::ArmPsci02, "PSCI 0.2 (KVM_CAP_ARM_PSCI_0_2)", "3.16")];

/// What to do where the device is missing.
pub(crate) const MISSING_CURE: &str =
    "It is a part of the kernel that needs to be started at EL2: the kernel's log says why it is off (lines with \"kvm\").";

/// Width of guest physical addresses where the host does not tell (KVM_CAP_ARM_VM_IPA_SIZE, since Linux 4.20).
const DEFAULT_IPA_BITS: u32 = 40;

mod ioctl {
    //! What kvm-ioctls does not wrap on AArch64.
    use kvm_bindings::{kvm_enable_cap, KVMIO};

    nix::ioctl_write_ptr!(enable_cap, KVMIO, 0xa3, kvm_enable_cap);
}

/// A VM of KVM.
#[derive(Debug)]
pub struct Vm {
    kvm: Kvm,
    slots: Arc<Slots>,
    ipa_bits: u32,
    /// The interrupt controller, once there is one.
    gic: Option<DeviceFd>,
}

impl hypervisor::Vm for Vm {
    type Vcpu = Vcpu;

    const IOCTLS: Ioctls = ioctls::IOCTLS;

    fn create(device: &Path) -> std::result::Result<Self, crate::error::Error> {
        Ok(Self::new(device).map_err(hypervisor::Error::from)?)
    }

    fn limits(&self) -> Limits {
        Limits { vcpus: self.kvm.get_max_vcpus() as u32, guest_phys_bits: self.ipa_bits }
    }

    fn map(&mut self, ram: &Ram) -> Result<()> {
        Ok(self.slots.map(ram)?)
    }

    fn stats(&self) -> Option<Stats<VmStats>> {
        stats::read(&self.slots.vm).map(Stats::Kvm)
    }
}

impl Arm64Vm for Vm {
    const STARTS_VCPUS: bool = true;
    type Lines = Spis;

    fn create_vcpus(&mut self, count: u32, start: &Start) -> Result<Vec<Vcpu>> {
        let gic = create_gic(&self.slots.vm, count)?;
        let create = |id| Vcpu::new(&self.slots, id, (id == 0).then_some(start));
        let vcpus = (0..count).map(create).collect::<std::result::Result<_, Error>>()?;
        set_gic(&gic, KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_CTRL_INIT.into(), None)?;
        self.gic = Some(gic);
        Ok(vcpus)
    }

    fn lines(&self) -> Arc<Spis> {
        Arc::new(Spis(Arc::clone(&self.slots)))
    }
}

impl Vm {
    fn new(device: &Path) -> std::result::Result<Self, Error> {
        let kvm = open(device)?;
        let ipa_bits = u32::try_from(kvm.get_host_ipa_limit()).ok().filter(|bits| *bits > 0);
        let created = match ipa_bits {
            Some(bits) => kvm.create_vm_with_ipa_size(bits),
            None => kvm.create_vm(),
        };
        let vm = created.map_err(|error| Error::CreateVm(Errno::from_raw(error.errno())))?;
        let cap = kvm_enable_cap { cap: KVM_CAP_ARM_NISV_TO_USER, ..kvm_enable_cap::default() };
        // SAFETY: the file descriptor is a VM's, and KVM reads a structure of the type that the request wants.
        if let Err(errno) = unsafe { ioctl::enable_cap(vm.as_raw_fd(), &raw const cap) } {
            // Only what is said of an access that cannot be decoded depends on it.
            tracing::info!(%errno, "KVM does not show accesses that the hardware has not decoded");
        }
        Ok(Self { kvm, slots: Slots::new(vm), ipa_bits: ipa_bits.unwrap_or(DEFAULT_IPA_BITS), gic: None })
    }
}

/// Creates the interrupt controller for `cpus` vCPUs, which are created next.
fn create_gic(vm: &VmFd, cpus: u32) -> std::result::Result<DeviceFd, Error> {
    let mut device =
        kvm_create_device { type_: kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3, ..kvm_create_device::default() };
    let gic = vm.create_device(&mut device).map_err(|error| match Errno::from_raw(error.errno()) {
        Errno::ENODEV => Error::NoGicV3,
        errno => Error::Ioctl { name: "KVM_CREATE_DEVICE", errno },
    })?;
    // The number of redistributors in the upper bits, the region's number 0 in the lowest.
    let redistributors = u64::from(cpus) << 52 | REDISTRIBUTORS;
    set_gic(&gic, KVM_DEV_ARM_VGIC_GRP_NR_IRQS, 0, Some(&INTIDS.into()))?;
    set_gic(&gic, KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_VGIC_V3_ADDR_TYPE_DIST.into(), Some(&DISTRIBUTOR))?;
    set_gic(&gic, KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_VGIC_V3_ADDR_TYPE_REDIST_REGION.into(), Some(&redistributors))?;
    Ok(gic)
}

/// Sets an attribute of the interrupt controller. Those of 32 bits are read from the lower half.
fn set_gic(gic: &DeviceFd, group: u32, attr: u64, value: Option<&u64>) -> std::result::Result<(), Error> {
    let addr = value.map_or(0, |value| std::ptr::from_ref(value) as u64);
    let attribute = kvm_device_attr { group, attr, addr, flags: 0 };
    gic.set_device_attr(&attribute).map_err(refused("KVM_SET_DEVICE_ATTR"))
}

/// Shared peripheral interrupts.
pub struct Spis(Arc<Slots>);

impl Lines for Spis {
    fn set(&self, number: u32, level: bool) {
        let line = KVM_ARM_IRQ_TYPE_SPI << KVM_ARM_IRQ_TYPE_SHIFT | number;
        if let Err(error) = self.0.vm.set_irq_line(line, level) {
            tracing::warn!(number, level, %error, "interrupt lost");
        }
    }
}
