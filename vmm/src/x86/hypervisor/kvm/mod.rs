// SPDX-License-Identifier: MIT OR Apache-2.0
//! KVM on x86.
//!
//! The interrupt chip is split (`KVM_CAP_SPLIT_IRQCHIP`): KVM emulates the local APICs, and I/O APIC, 8259s and 8254 are
//! the same devices as ever. KVM decodes accesses to device memory itself, so their exits are `MmioRead` and `MmioWrite`
//! and the instruction emulator is not used.
//!
//! | file | owns |
//! |---|---|
//! | `ioctls.rs` | the requests that a running VM makes |
//! | `registers.rs` | register sets in KVM's form and in ours |
//! | `run_page.rs` | what the run page holds on x86 only |
//! | `vcpu.rs` | vCPUs: exits, events |
//! | this file | the VM: capabilities, CPUID, interrupt messages |

use std::path::Path;
use std::sync::Arc;

use axvcpu_uapi::addr::GuestPhysAddr;
use axvcpu_uapi::client::{Apic, Backing, Errno};
use axvcpu_uapi::vm::VmStats;
use axvcpu_uapi::x86::CpuidEntry;
use kvm_bindings::{
    kvm_enable_cap, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_msi,
    kvm_irq_routing_msi__bindgen_ty_1, kvm_msi, CpuId, KvmIrqRouting, KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X2APIC_API,
    KVM_CAP_X86_USER_SPACE_MSR, KVM_IRQ_ROUTING_MSI, KVM_MAX_CPUID_ENTRIES, KVM_MSR_EXIT_REASON_UNKNOWN,
    KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK, KVM_X2APIC_API_USE_32BIT_IDS,
};
use kvm_ioctls::{Cap, Kvm, VmFd};

use super::X86Vm;
use crate::hypervisor::kvm::error::{refused, Error};
use crate::hypervisor::kvm::{open, stats, Needed, Slots};
use crate::hypervisor::{self, Limits, Result, Stats};
use crate::memory::Ram;
use crate::sandbox::Ioctls;
use crate::x86::cpuid::paging_features;
use crate::x86::device::ioapic::{Message, PINS};
use crate::x86::device::irq::MessageSink;
use crate::x86::layout;

mod ioctls;
mod registers;
mod run_page;
mod vcpu;

pub use vcpu::Vcpu;

/// What it must be able to do.
pub(crate) const NEEDED: &[Needed] = &[
    (Cap::SplitIrqchip, "the split interrupt chip (KVM_CAP_SPLIT_IRQCHIP)", "4.4"),
    (Cap::X2ApicApi, "32-bit APIC ids (KVM_CAP_X2APIC_API)", "4.8"),
    (Cap::X86UserSpaceMsr, "exits for unknown MSRs (KVM_CAP_X86_USER_SPACE_MSR)", "5.10"),
];

/// What to do where the device is missing.
pub(crate) const MISSING_CURE: &str =
    "Load it: modprobe kvm_amd or modprobe kvm_intel. The kernel's log says why it may refuse.";

/// CPUID 1 ECX: the local APIC's timer has a TSC-deadline mode. KVM leaves it out of its list, since it depends on where
/// the local APIC is.
const LEAF1_ECX_TSC_DEADLINE: u32 = 1 << 24;

/// A VM of KVM.
#[derive(Debug)]
pub struct Vm {
    kvm: Kvm,
    slots: Arc<Slots>,
    apic: Apic,
}

impl hypervisor::Vm for Vm {
    type Vcpu = Vcpu;

    const IOCTLS: Ioctls = ioctls::IOCTLS;

    fn create(device: &Path) -> std::result::Result<Self, crate::error::Error> {
        Ok(Self::with_apic(device, Apic::InKernel).map_err(hypervisor::Error::from)?)
    }

    fn limits(&self) -> Limits {
        let phys_bits = self.supported().map_or(36, |table| paging_features(&table).phys_bits);
        Limits { vcpus: self.kvm.get_max_vcpus() as u32, guest_phys_bits: phys_bits.into() }
    }

    fn map(&mut self, ram: &Ram) -> Result<()> {
        Ok(self.slots.map(ram)?)
    }

    fn stats(&self) -> Option<Stats<VmStats>> {
        stats::read(&self.slots.vm).map(Stats::Kvm)
    }
}

impl X86Vm for Vm {
    fn supported_cpuid(&self) -> Result<Vec<CpuidEntry>> {
        Ok(self.supported()?)
    }

    fn create_vcpu(&mut self, id: u32, entry: GuestPhysAddr, cpuid: &[CpuidEntry]) -> Result<Vcpu> {
        Ok(Vcpu::new(&self.slots, self.apic, id, entry, cpuid)?)
    }

    fn messages(&self) -> Box<dyn MessageSink> {
        Box::new(Messages(Arc::clone(&self.slots)))
    }
}

impl Vm {
    /// Creates a VM whose local APICs are where `apic` says.
    ///
    /// # Errors
    /// Those of [`open`], [`Error::CreateVm`] and [`Error::Ioctl`].
    pub fn with_apic(device: &Path, apic: Apic) -> std::result::Result<Self, Error> {
        let kvm = open(device)?;
        let vm = kvm.create_vm().map_err(|error| Error::CreateVm(Errno::from_raw(error.errno())))?;
        // Pages that Intel CPUs without unrestricted guests run real mode with; no memory of the guest is there.
        vm.set_tss_address(layout::KVM_TSS as usize).map_err(refused("KVM_SET_TSS_ADDR"))?;
        vm.set_identity_map_address(layout::KVM_IDENTITY_MAP).map_err(refused("KVM_SET_IDENTITY_MAP_ADDR"))?;
        if apic == Apic::InKernel {
            enable(&vm, KVM_CAP_SPLIT_IRQCHIP, PINS as u64)?;
            enable(
                &vm,
                KVM_CAP_X2APIC_API,
                (KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK).into(),
            )?;
        }
        enable(&vm, KVM_CAP_X86_USER_SPACE_MSR, KVM_MSR_EXIT_REASON_UNKNOWN.into())?;
        Ok(Self { kvm, slots: Slots::new(vm), apic })
    }

    /// Maps `size` bytes of `memory` from `offset` on at guest physical address `at`, all multiples of 4096, to be read,
    /// written and executed. The memory is kept until the VM and its vCPUs are gone.
    ///
    /// # Errors
    /// [`Error::Ioctl`]: `EINVAL` for numbers that are not such multiples or a part that is not in the memory, `EEXIST`
    /// where there is memory already.
    pub fn map_part(
        &self,
        at: GuestPhysAddr,
        memory: Arc<dyn Backing>,
        offset: usize,
        size: usize,
    ) -> std::result::Result<(), Error> {
        self.slots.map_part(at, memory, offset, size)
    }

    fn supported(&self) -> std::result::Result<Vec<CpuidEntry>, Error> {
        let name = "KVM_GET_SUPPORTED_CPUID";
        let table: CpuId = self.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(refused(name))?;
        let deadline = self.apic == Apic::InKernel && self.kvm.check_extension(Cap::TscDeadlineTimer);
        let mut table: Vec<CpuidEntry> = table.as_slice().iter().map(registers::from_cpuid).collect();
        for entry in table.iter_mut().filter(|entry| entry.function == 1 && deadline) {
            entry.ecx |= LEAF1_ECX_TSC_DEADLINE;
        }
        Ok(table)
    }
}

/// Enables a capability that takes one argument.
fn enable(vm: &VmFd, cap: u32, argument: u64) -> std::result::Result<(), Error> {
    let cap = kvm_enable_cap { cap, args: [argument, 0, 0, 0], ..kvm_enable_cap::default() };
    vm.enable_cap(&cap).map_err(refused("KVM_ENABLE_CAP"))
}

/// Delivers messages to the local APICs of a VM.
struct Messages(Arc<Slots>);

/// The halves of a message's address.
fn halves(address: u64) -> (u32, u32) {
    (address as u32, (address >> 32) as u32)
}

impl MessageSink for Messages {
    fn send(&self, message: Message) {
        let (address_lo, address_hi) = halves(message.address);
        let msi = kvm_msi { address_lo, address_hi, data: message.data, ..kvm_msi::default() };
        if let Err(error) = self.0.vm.signal_msi(msi) {
            // A guest can program messages that no CPU takes; hardware drops those as well.
            tracing::debug!(?message, %error, "interrupt message refused");
        }
    }

    /// KVM reports the end of those interrupts only that it finds in its routing table, at one of the I/O APIC's pins.
    fn level_triggered(&self, pins: &[Option<Message>; PINS]) {
        let routes: Vec<kvm_irq_routing_entry> =
            (0..).zip(pins).filter_map(|(gsi, message)| message.as_ref().map(|message| route(gsi, message))).collect();
        // 24 entries are far below the table's limit.
        let Ok(table) = KvmIrqRouting::from_entries(&routes) else { return };
        if let Err(error) = self.0.vm.set_gsi_routing(&table) {
            tracing::warn!(%error, "KVM does not learn of level-triggered interrupts");
        }
    }
}

/// A message in KVM's routing table.
fn route(gsi: u32, message: &Message) -> kvm_irq_routing_entry {
    let (address_lo, address_hi) = halves(message.address);
    let msi = kvm_irq_routing_msi {
        address_lo,
        address_hi,
        data: message.data,
        __bindgen_anon_1: kvm_irq_routing_msi__bindgen_ty_1 { pad: 0 },
    };
    kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        u: kvm_irq_routing_entry__bindgen_ty_1 { msi },
        ..kvm_irq_routing_entry::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn routes_carry_the_whole_message() {
        let route = route(9, &Message { address: 0x1_0000_fee0_300c, data: 0xc031 });
        // SAFETY: the entry was made with this variant.
        let msi = unsafe { route.u.msi };
        assert_eq!((route.gsi, route.type_, msi.data), (9, KVM_IRQ_ROUTING_MSI, 0xc031));
        assert_eq!((msi.address_lo, msi.address_hi), (0xfee0_300c, 0x1_0000));
    }
}
