// SPDX-License-Identifier: MIT OR Apache-2.0
//! Machines of axvcpu. MMIO is decoded by axvmm's emulator, as in axvmm.

use std::convert::Infallible;
use std::sync::Arc;

use axvcpu_uapi::addr::GuestPhysAddr;
use axvcpu_uapi::client::{Apic, Exit, Memory, System, Vcpu};
use axvcpu_uapi::exit::AxVCpuExitReason as Reason;
use axvcpu_uapi::x86::{CpuidEntry, Events, ACTIVITY_RUNNING};
use axvmm::x86::emulate::{self, Bus, CpuState, Fault, Outcome, Shortcuts};
use axvmm::x86::paging::GuestMemory;

use super::guest::{self, DONE, RAM_SIZE};
use crate::machine::axvcpu::AxMachine;
use crate::machine::{Cpu, Factory, Machine, Plan, Result};

/// Address of an interrupt message to APIC id 0.
const MESSAGE: u64 = 0xfee0_0000;

pub(crate) struct Device {
    system: System,
    cpuid: Vec<CpuidEntry>,
}

impl Device {
    pub(crate) fn open() -> Result<Self> {
        let system = System::open()?;
        let cpuid = system.supported_cpuid()?;
        Ok(Self { system, cpuid })
    }
}

impl Factory for Device {
    fn create(&self, plan: &Plan) -> Result<Box<dyn Machine>> {
        let vm = self.system.create_vm()?;
        let mut machine = AxMachine::new(vm, plan, MESSAGE)?;
        let apic = if plan.apic { Apic::InKernel } else { Apic::None };
        for id in 0..plan.cpus {
            let mut vcpu = machine.vm.create_vcpu(id)?;
            vcpu.set_entry(GuestPhysAddr::new(guest::CODE))?;
            vcpu.set_ept_root(&machine.space)?;
            vcpu.setup(apic, &self.cpuid)?;
            vcpu.set(&guest::control(vcpu.get()?))?;
            vcpu.set(&guest::segments())?;
            if id != 0 {
                // It does not wait for a start-up IPI.
                let events: Events = vcpu.get()?;
                vcpu.set(&Events { activity: ACTIVITY_RUNNING, ..events })?;
            }
            let cpu = AxCpu {
                id,
                vcpu,
                bus: Ram(Arc::clone(&plan.ram)),
                emulator: emulate::Config::default(),
                shortcuts: Shortcuts::new(),
            };
            machine.cpus.push(Some(cpu));
        }
        Ok(Box::new(machine))
    }
}

struct AxCpu {
    id: u32,
    vcpu: Vcpu,
    bus: Ram,
    emulator: emulate::Config,
    shortcuts: Shortcuts,
}

impl AxCpu {
    /// Carries out an access to a device.
    fn emulate(&mut self, exit: &Exit, fault: &Fault) -> Result<()> {
        let brief = self.vcpu.brief().ok_or("an exit without snapshot")?;
        let mut general = self.vcpu.general();
        if self.shortcuts.take(&mut general, &brief, fault, &mut self.bus)? {
            self.vcpu.set_general(&general);
            return Ok(());
        }
        let snapshot = self.vcpu.snapshot().ok_or("an exit without snapshot")?;
        let mut cpu = CpuState::from_registers(&general, &snapshot.segments, &snapshot.control);
        if self.shortcuts.learn(&self.emulator, &cpu, fault, &mut self.bus)?
            && self.shortcuts.take(&mut general, &brief, fault, &mut self.bus)?
        {
            self.vcpu.set_general(&general);
            return Ok(());
        }
        match emulate::step(&self.emulator, &mut cpu, &mut self.bus, exit.insn()) {
            Ok(Outcome::Retired { .. }) => {
                self.vcpu.set_general(&cpu.general());
                Ok(())
            }
            other => Err(format!("an instruction that accesses a device ends with {other:?}").into()),
        }
    }
}

impl Cpu for AxCpu {
    fn start(&mut self, turns: u64) -> Result<()> {
        Ok(self.vcpu.set(&guest::general(self.id, turns))?)
    }

    fn run(&mut self) -> Result<()> {
        loop {
            let exit = self.vcpu.run()?;
            match exit.reason {
                Reason::IoWrite { port: DONE, .. } => return Ok(()),
                Reason::IoWrite { .. } | Reason::Interrupted => {}
                Reason::IoRead { .. } | Reason::Hypercall { .. } => self.vcpu.reply(0),
                Reason::SysRegRead { .. } | Reason::SysRegWrite { .. } => self.vcpu.reply_fault(),
                Reason::NestedPageFault { addr, access_flags } => {
                    self.emulate(&exit, &Fault { addr, access: access_flags, user_mode: exit.user_mode() })?;
                }
                other => return Err(format!("an exit that no loop has: {other:x?}").into()),
            }
        }
    }

    fn count(&self) -> Result<u64> {
        Ok(self.vcpu.general().gpr[14])
    }
}

/// The RAM, and a device everywhere else that reads as zero.
struct Ram(Arc<Memory>);

impl GuestMemory for Ram {
    type Error = Infallible;

    fn read(&mut self, at: GuestPhysAddr, data: &mut [u8]) -> std::result::Result<(), Infallible> {
        let at = at.as_u64() as usize;
        let read = match <&mut [u8; 8]>::try_from(&mut *data) {
            Ok(word) => self.0.read_u64(at).map(|value| *word = value.to_le_bytes()),
            Err(_) => self.0.read(at, data),
        };
        if read.is_err() {
            data.fill(0xff);
        }
        Ok(())
    }

    fn compare_exchange(
        &mut self,
        _: GuestPhysAddr,
        _: usize,
        _: u64,
        _: u64,
    ) -> std::result::Result<bool, Infallible> {
        // Accessed and dirty bits are set from the start, and no loop locks.
        Ok(true)
    }
}

impl Bus for Ram {
    fn is_ram(&self, at: GuestPhysAddr, _write: bool) -> bool {
        at.as_u64() < RAM_SIZE as u64
    }

    fn write(&mut self, at: GuestPhysAddr, data: &[u8]) -> std::result::Result<(), Infallible> {
        let _ = self.0.write(at.as_u64() as usize, data);
        Ok(())
    }

    fn mmio_read(&mut self, _: GuestPhysAddr, data: &mut [u8]) -> std::result::Result<(), Infallible> {
        data.fill(0);
        Ok(())
    }

    fn mmio_write(&mut self, _: GuestPhysAddr, _: &[u8]) -> std::result::Result<(), Infallible> {
        Ok(())
    }

    fn xmm_read(&mut self, _: usize) -> std::result::Result<[u8; 16], Infallible> {
        Ok([0; 16])
    }

    fn xmm_write(&mut self, _: usize, _: [u8; 16]) -> std::result::Result<(), Infallible> {
        Ok(())
    }
}
