// SPDX-License-Identifier: MIT OR Apache-2.0
//! Machines of KVM: with a GICv3 in the kernel and no other device, as axvcpu has it.

use std::sync::Arc;

use axvcpu_uapi::arm64::system_register;
use axvcpu_uapi::client::{IoAddress, Memory};
use kvm_bindings::{
    kvm_create_device, kvm_device_attr, kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3, kvm_smccc_filter,
    kvm_smccc_filter_action_KVM_SMCCC_FILTER_FWD_TO_USER, kvm_vcpu_init, KVM_ARM_IRQ_TYPE_SHIFT, KVM_ARM_IRQ_TYPE_SPI,
    KVM_ARM_VCPU_PSCI_0_2, KVM_ARM_VM_SMCCC_CTRL, KVM_ARM_VM_SMCCC_FILTER, KVM_DEV_ARM_VGIC_CTRL_INIT,
    KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_GRP_NR_IRQS, KVM_REG_ARM64,
    KVM_REG_ARM64_SYSREG, KVM_REG_ARM_CORE, KVM_REG_SIZE_U64, KVM_VGIC_V3_ADDR_TYPE_DIST,
    KVM_VGIC_V3_ADDR_TYPE_REDIST_REGION,
};
use kvm_ioctls::{DeviceFd, IoEventAddress, Kvm, NoDatamatch, VcpuExit, VcpuFd, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::guest::{self, CODE, DONE, GICD, GICR, PSTATE, VECTOR, VECTORS};
use crate::machine::kvm::{interrupted, Slots};
use crate::machine::{take, Cpu, Factory, Machine, Plan, Result};

/// The hypercall that KVM passes to userspace, if asked to: an OEM's.
const HYPERCALL_TO_USER: u32 = 0xc300_0000;
/// INTIDs of the interrupt controller.
const INTIDS: u32 = 64;
/// The first SPI, which KVM's interrupt numbers for irqfds begin with.
const FIRST_SPI: u32 = 32;

/// A core register by its place in `struct user_pt_regs`, of 64 bits each (KVM API, section 4.68).
const fn core(index: usize) -> u64 {
    KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM_CORE as u64 | 2 * index as u64
}

const PC: u64 = core(32);
const PROCESSOR_STATE: u64 = core(33);
const VBAR_EL1: u64 = KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM64_SYSREG as u64 | system_register(3, 0, 12, 0, 0);

pub(crate) struct Device {
    kvm: Kvm,
}

impl Device {
    pub(crate) fn open() -> Result<Self> {
        Ok(Self { kvm: Kvm::new()? })
    }
}

impl Factory for Device {
    fn create(&self, plan: &Plan) -> Result<Box<dyn Machine>> {
        let vm = Arc::new(self.kvm.create_vm()?);
        pass_hypercall(&vm)?;
        let gic = create_gic(&vm, plan.cpus)?;
        let mut machine = KvmMachine { cpus: Vec::new(), _gic: gic, slots: Slots::new(vm, &plan.ram)? };
        for id in 0..plan.cpus {
            let vcpu = machine.slots.vm.create_vcpu(id.into())?;
            let mut init = kvm_vcpu_init::default();
            machine.slots.vm.get_preferred_target(&mut init)?;
            init.features[0] |= 1 << KVM_ARM_VCPU_PSCI_0_2;
            vcpu.vcpu_init(&init)?;
            vcpu.set_one_reg(VBAR_EL1, &VECTORS.to_le_bytes())?;
            machine.cpus.push(Some(KvmCpu { id, vcpu, _ram: Arc::clone(&plan.ram) }));
        }
        set_gic(&machine._gic, KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_CTRL_INIT, None)?;
        Ok(Box::new(machine))
    }
}

/// Has [`HYPERCALL_TO_USER`] go to userspace, as axvcpu does without being asked.
fn pass_hypercall(vm: &VmFd) -> Result<()> {
    let filter = kvm_smccc_filter {
        base: HYPERCALL_TO_USER,
        nr_functions: 1,
        action: kvm_smccc_filter_action_KVM_SMCCC_FILTER_FWD_TO_USER as u8,
        ..kvm_smccc_filter::default()
    };
    let attribute = kvm_device_attr {
        group: KVM_ARM_VM_SMCCC_CTRL,
        attr: KVM_ARM_VM_SMCCC_FILTER.into(),
        addr: std::ptr::from_ref(&filter) as u64,
        flags: 0,
    };
    vm.set_device_attr(&attribute).map_err(|error| format!("KVM does not pass hypercalls on: {error}").into())
}

fn create_gic(vm: &VmFd, cpus: u32) -> Result<DeviceFd> {
    let mut device =
        kvm_create_device { type_: kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3, ..kvm_create_device::default() };
    let gic = vm.create_device(&mut device)?;
    // The number of redistributors in the upper bits, the region's number 0 in the lowest.
    let redistributors = u64::from(cpus) << 52 | GICR;
    set_gic(&gic, KVM_DEV_ARM_VGIC_GRP_NR_IRQS, 0, Some(&INTIDS.into()))?;
    set_gic(&gic, KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_VGIC_V3_ADDR_TYPE_DIST, Some(&GICD))?;
    set_gic(&gic, KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_VGIC_V3_ADDR_TYPE_REDIST_REGION, Some(&redistributors))?;
    Ok(gic)
}

fn set_gic(gic: &DeviceFd, group: u32, attr: u32, value: Option<&u64>) -> Result<()> {
    let addr = value.map_or(0, |value| std::ptr::from_ref(value) as u64);
    Ok(gic.set_device_attr(&kvm_device_attr { group, attr: attr.into(), addr, flags: 0 })?)
}

struct KvmMachine {
    cpus: Vec<Option<KvmCpu>>,
    _gic: DeviceFd,
    slots: Slots,
}

impl Machine for KvmMachine {
    fn take_cpu(&mut self, id: u32) -> Result<Box<dyn Cpu>> {
        take(&mut self.cpus, id)
    }

    fn signal(&self) -> Result<()> {
        let line = KVM_ARM_IRQ_TYPE_SPI << KVM_ARM_IRQ_TYPE_SHIFT | u32::from(VECTOR);
        Ok(self.slots.vm.set_irq_line(line, true)?)
    }

    fn attach_irqfd(&self, fd: &EventFd) -> Result<()> {
        Ok(self.slots.vm.register_irqfd(fd, u32::from(VECTOR) - FIRST_SPI)?)
    }

    fn attach_ioeventfd(&self, fd: &EventFd, at: IoAddress) -> Result<()> {
        let IoAddress::Memory(address) = at else { return Err("there are no ports".into()) };
        Ok(self.slots.vm.register_ioevent(fd, &IoEventAddress::Mmio(address), NoDatamatch)?)
    }

    fn map_anew(&mut self, at: u64, memory: &Arc<Memory>, offset: usize, size: usize) -> Result<()> {
        self.slots.map_anew(at, memory, offset, size)
    }
}

struct KvmCpu {
    id: u32,
    vcpu: VcpuFd,
    _ram: Arc<Memory>,
}

impl Cpu for KvmCpu {
    fn start(&mut self, turns: u64) -> Result<()> {
        // The store that ended the last loop is completed by the next run, which would skip the first instruction.
        self.vcpu.set_kvm_immediate_exit(1);
        let result = self.vcpu.run().map(drop);
        self.vcpu.set_kvm_immediate_exit(0);
        match result {
            Err(error) if !interrupted(error) => return Err(error.into()),
            _ => {}
        }
        for (number, value) in guest::general(self.id, turns) {
            self.vcpu.set_one_reg(core(number), &value.to_le_bytes())?;
        }
        self.vcpu.set_one_reg(PROCESSOR_STATE, &PSTATE.to_le_bytes())?;
        self.vcpu.set_one_reg(PC, &CODE.to_le_bytes())?;
        Ok(())
    }

    fn run(&mut self) -> Result<()> {
        loop {
            match self.vcpu.run() {
                Ok(VcpuExit::MmioWrite(DONE, _)) => return Ok(()),
                Ok(VcpuExit::MmioWrite(..)) => {}
                Ok(VcpuExit::MmioRead(_, data)) => data.fill(0),
                // The answer is in X0, as it is anywhere but on x86.
                Ok(VcpuExit::Hypercall(_)) => _ = self.vcpu.set_one_reg(core(0), &[0; 8])?,
                Ok(other) => return Err(format!("an exit that no loop has: {other:x?}").into()),
                Err(error) if interrupted(error) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn count(&self) -> Result<u64> {
        let mut bytes = [0; 8];
        self.vcpu.get_one_reg(core(14), &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }
}
