// SPDX-License-Identifier: MIT OR Apache-2.0
//! Machines of axvcpu: with a GICv3 in the kernel and no other device.

use axvcpu_uapi::addr::GuestPhysAddr;
use axvcpu_uapi::arm64::{General, Gic, System as Registers, GIC_SET_SPI};
use axvcpu_uapi::client::{Apic, System, Vcpu};
use axvcpu_uapi::exit::AxVCpuExitReason as Reason;

use super::guest::{self, CODE, DONE, GICD, GICR, PSTATE, VECTORS};
use crate::machine::axvcpu::AxMachine;
use crate::machine::{Cpu, Factory, Machine, Plan, Result};

pub(crate) struct Device {
    system: System,
}

impl Device {
    pub(crate) fn open() -> Result<Self> {
        Ok(Self { system: System::open()? })
    }
}

impl Factory for Device {
    fn create(&self, plan: &Plan) -> Result<Box<dyn Machine>> {
        let vm = self.system.create_vm()?;
        vm.create_gic(Gic { distributor: GICD, redistributors: GICR, cpus: plan.cpus, flags: 0 })?;
        let mut machine = AxMachine::new(vm, plan, GICD + GIC_SET_SPI)?;
        for id in 0..plan.cpus {
            let mut vcpu = machine.vm.create_vcpu(id)?;
            vcpu.set_entry(GuestPhysAddr::new(CODE))?;
            vcpu.set_ept_root(&machine.space)?;
            vcpu.setup(Apic::InKernel, &[])?;
            let registers: Registers = vcpu.get()?;
            vcpu.set(&Registers { vbar_el1: VECTORS, ..registers })?;
            machine.cpus.push(Some(AxCpu { id, vcpu }));
        }
        Ok(Box::new(machine))
    }
}

struct AxCpu {
    id: u32,
    vcpu: Vcpu,
}

impl Cpu for AxCpu {
    fn start(&mut self, turns: u64) -> Result<()> {
        let mut general = General { pc: CODE, pstate: PSTATE, ..General::default() };
        for (number, value) in guest::general(self.id, turns) {
            general.x[number] = value;
        }
        Ok(self.vcpu.set(&general)?)
    }

    fn run(&mut self) -> Result<()> {
        loop {
            match self.vcpu.run()?.reason {
                Reason::MmioWrite { addr, .. } if addr.as_u64() == DONE => return Ok(()),
                Reason::MmioWrite { .. } | Reason::Interrupted => {}
                Reason::MmioRead { .. } | Reason::Hypercall { .. } => self.vcpu.reply(0),
                other => {
                    let at = self.vcpu.general().pc;
                    return Err(format!("an exit that no loop has, at {at:#x}: {other:x?}").into());
                }
            }
        }
    }

    fn count(&self) -> Result<u64> {
        Ok(self.vcpu.general().x[14])
    }
}
