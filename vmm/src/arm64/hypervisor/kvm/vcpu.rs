// SPDX-License-Identifier: MIT OR Apache-2.0
//! A vCPU of KVM on AArch64: how it starts, and exits that only AArch64 has.

use std::sync::Arc;

use axvcpu_uapi::addr::GuestPhysAddr;
use axvcpu_uapi::client::Exit;
use axvcpu_uapi::exit::{AccessFlags, AxVCpuExitReason};
use axvcpu_uapi::vcpu::VcpuStats;
use kvm_bindings::{kvm_vcpu_init, KVM_ARM_VCPU_POWER_OFF, KVM_ARM_VCPU_PSCI_0_2, KVM_EXIT_ARM_NISV};

use crate::arm64::boot::Start;
use crate::arm64::hypervisor::Arm64Vcpu;
use crate::hypervisor::kvm::error::{refused, Error};
use crate::hypervisor::kvm::run_page::{get, RunPage};
use crate::hypervisor::kvm::vcpu::{Came, Core};
use crate::hypervisor::kvm::{stats, Slots};
use crate::hypervisor::{self, Kick, Result, Stats};

/// ESR_EL2 bit 6 of a data abort: it was a write (WnR).
const ISS_WRITE: u64 = 1 << 6;

/// A vCPU.
#[derive(Debug)]
pub struct Vcpu {
    // Before `slots`, which holds the guest's memory.
    pub(super) core: Core,
    _slots: Arc<Slots>,
}

impl Vcpu {
    /// Creates vCPU `id`, which begins as `start` says, or else waits to be started by PSCI.
    ///
    /// # Errors
    /// [`Error::Ioctl`].
    pub(super) fn new(slots: &Arc<Slots>, id: u32, start: Option<&Start>) -> std::result::Result<Self, Error> {
        let core = Core::new(&slots.vm, id)?;
        let mut init = kvm_vcpu_init::default();
        slots.vm.get_preferred_target(&mut init).map_err(refused("KVM_ARM_PREFERRED_TARGET"))?;
        init.features[0] |= 1 << KVM_ARM_VCPU_PSCI_0_2;
        if start.is_none() {
            init.features[0] |= 1 << KVM_ARM_VCPU_POWER_OFF;
        }
        core.fd.vcpu_init(&init).map_err(refused("KVM_ARM_VCPU_INIT"))?;
        let vcpu = Self { core, _slots: Arc::clone(slots) };
        if let Some(start) = start {
            vcpu.set_general(&start.general())?;
        }
        Ok(vcpu)
    }
}

/// Exits that only AArch64 has.
fn exit(page: &mut RunPage, reason: u32) -> Option<Came> {
    (reason == KVM_EXIT_ARM_NISV).then(|| {
        let abort = get!(page, __bindgen_anon_1.arm_nisv);
        let access_flags = if abort.esr_iss & ISS_WRITE != 0 { AccessFlags::WRITE } else { AccessFlags::READ };
        Came::Exit(AxVCpuExitReason::NestedPageFault { addr: GuestPhysAddr::new(abort.fault_ipa), access_flags })
    })
}

impl hypervisor::Vcpu for Vcpu {
    fn run(&mut self) -> Result<Exit> {
        Ok(Exit::new(self.core.run(exit)?, 0))
    }

    fn kicker(&self) -> Box<dyn Kick> {
        self.core.kicker()
    }

    fn reply(&mut self, value: u64) {
        let _ = self.core.reply(value);
    }

    fn reply_fault(&mut self) {
        // KVM answers accesses to system registers itself.
    }

    fn stats(&self) -> Option<Stats<VcpuStats>> {
        stats::read(&self.core.fd).map(Stats::Kvm)
    }
}

impl Arm64Vcpu for Vcpu {
    fn syndrome(&self) -> Option<u64> {
        None
    }
}
