// SPDX-License-Identifier: MIT OR Apache-2.0
//! Machines of axvcpu: with a GICv3 in the kernel and no other device.

use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::sync::Arc;

use axvcpu_uapi::addr::GuestPhysAddr;
use axvcpu_uapi::arm64::{General, Gic, System as Registers, GIC_SET_SPI};
use axvcpu_uapi::client::{AddressSpace, Apic, IoAddress, IoPattern, Memory, Permissions, Slot, System, Vcpu, Vm};
use axvcpu_uapi::exit::AxVCpuExitReason as Reason;
use vmm_sys_util::eventfd::EventFd;

use super::guest::{self, CODE, DONE, GICD, GICR, PSTATE, RAM_SIZE, VECTOR, VECTORS};
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
        let space = vm.create_address_space()?;
        let ram = space.map(GuestPhysAddr::new(0), Arc::clone(&plan.ram), 0, RAM_SIZE, Permissions::RWX)?;
        let mut cpus = Vec::new();
        for id in 0..plan.cpus {
            let mut vcpu = vm.create_vcpu(id)?;
            vcpu.set_entry(GuestPhysAddr::new(CODE))?;
            vcpu.set_ept_root(&space)?;
            vcpu.setup(Apic::InKernel, &[])?;
            let registers: Registers = vcpu.get()?;
            vcpu.set(&Registers { vbar_el1: VECTORS, ..registers })?;
            cpus.push(Some(AxCpu { id, vcpu }));
        }
        Ok(Box::new(AxMachine { cpus, _ram: ram, other: None, space, vm }))
    }
}

/// `fd` as the client library wants it.
fn borrow(fd: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: The descriptor is open as long as `fd`, from which the result is borrowed.
    unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) }
}

struct AxMachine {
    cpus: Vec<Option<AxCpu>>,
    _ram: Slot<Memory>,
    other: Option<Slot<Memory>>,
    space: AddressSpace,
    vm: Vm,
}

impl Machine for AxMachine {
    fn take_cpu(&mut self, id: u32) -> Result<Box<dyn Cpu>> {
        let cpu = self.cpus.get_mut(id as usize).and_then(Option::take).ok_or("no such vCPU")?;
        Ok(Box::new(cpu))
    }

    fn signal(&self) -> Result<()> {
        Ok(self.vm.signal_msi(GICD + GIC_SET_SPI, VECTOR.into())?)
    }

    fn attach_irqfd(&self, fd: &EventFd) -> Result<()> {
        Ok(self.vm.attach_interrupt(borrow(fd), GICD + GIC_SET_SPI, VECTOR.into(), None)?)
    }

    fn attach_ioeventfd(&self, fd: &EventFd, at: IoAddress) -> Result<()> {
        if self.vm.attach_io(borrow(fd), IoPattern::any(at))? {
            Ok(())
        } else {
            Err("the kernel leaves it to userspace".into())
        }
    }

    fn map_anew(&mut self, at: u64, memory: &Arc<Memory>, offset: usize, size: usize) -> Result<()> {
        if let Some(slot) = self.other.take() {
            slot.unmap()?;
        }
        let slot = self.space.map(GuestPhysAddr::new(at), Arc::clone(memory), offset, size, Permissions::RWX)?;
        self.other = Some(slot);
        Ok(())
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
