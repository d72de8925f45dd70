// SPDX-License-Identifier: MIT OR Apache-2.0
//! Machines of KVM: local APICs in the kernel and no other device, as axvcpu has it.

use std::sync::Arc;

use axvcpu_uapi::client::{IoAddress, Memory};
use axvcpu_uapi::x86::{self, Control, General, Segments};
use kvm_bindings::{
    kvm_enable_cap, kvm_irq_routing_entry, kvm_mp_state, kvm_msi, kvm_regs, kvm_segment, kvm_sregs, CpuId,
    KvmIrqRouting, KVM_CAP_EXIT_HYPERCALL, KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X86_USER_SPACE_MSR, KVM_IRQ_ROUTING_MSI,
    KVM_MAX_CPUID_ENTRIES, KVM_MP_STATE_RUNNABLE, KVM_MSR_EXIT_REASON_UNKNOWN,
};
use kvm_ioctls::{IoEventAddress, Kvm, NoDatamatch, VcpuExit, VcpuFd, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::guest::{self, DONE, VECTOR};
use crate::machine::kvm::{interrupted, Slots};
use crate::machine::{take, Cpu, Factory, Machine, Plan, Result};

/// Address of an interrupt message to APIC id 0.
const MESSAGE: u32 = 0xfee0_0000;
/// The hypercall that KVM passes to userspace, if asked to: KVM_HC_MAP_GPA_RANGE of linux/kvm_para.h.
const HYPERCALL_TO_USER: u64 = 12;
/// Global system interrupts that are left to userspace: the least that KVM takes.
const USER_PINS: u64 = 24;
/// The interrupt that irqfds use.
const IRQFD_GSI: u32 = 24;

pub(crate) struct Device {
    kvm: Kvm,
    cpuid: CpuId,
}

impl Device {
    pub(crate) fn open() -> Result<Self> {
        let kvm = Kvm::new()?;
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
        Ok(Self { kvm, cpuid })
    }
}

impl Factory for Device {
    fn create(&self, plan: &Plan) -> Result<Box<dyn Machine>> {
        let vm = Arc::new(self.kvm.create_vm()?);
        // What axvcpu does without being asked.
        enable(&vm, KVM_CAP_X86_USER_SPACE_MSR, KVM_MSR_EXIT_REASON_UNKNOWN.into())?;
        enable(&vm, KVM_CAP_EXIT_HYPERCALL, 1 << HYPERCALL_TO_USER)?;
        if plan.apic {
            enable(&vm, KVM_CAP_SPLIT_IRQCHIP, USER_PINS)?;
        }
        let mut machine = KvmMachine { cpus: Vec::new(), slots: Slots::new(vm, &plan.ram)? };
        for id in 0..plan.cpus {
            let vcpu = machine.slots.vm.create_vcpu(id.into())?;
            let mut cpuid = self.cpuid.clone();
            for entry in cpuid.as_mut_slice() {
                match entry.function {
                    1 => entry.ebx = entry.ebx & 0x00ff_ffff | id << 24,
                    0xb | 0x1f => entry.edx = id,
                    _ => {}
                }
            }
            vcpu.set_cpuid2(&cpuid)?;
            vcpu.set_sregs(&sregs(vcpu.get_sregs()?))?;
            if plan.apic {
                vcpu.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE })?;
            }
            machine.cpus.push(Some(KvmCpu { id, vcpu, _ram: Arc::clone(&plan.ram) }));
        }
        Ok(Box::new(machine))
    }
}

/// Switches a capability on.
fn enable(vm: &VmFd, cap: u32, arg: u64) -> Result<()> {
    let mut request = kvm_enable_cap { cap, ..kvm_enable_cap::default() };
    request.args[0] = arg;
    vm.enable_cap(&request).map_err(|error| format!("KVM refuses capability {cap}: {error}").into())
}

struct KvmMachine {
    cpus: Vec<Option<KvmCpu>>,
    slots: Slots,
}

impl Machine for KvmMachine {
    fn take_cpu(&mut self, id: u32) -> Result<Box<dyn Cpu>> {
        take(&mut self.cpus, id)
    }

    fn signal(&self) -> Result<()> {
        let message = kvm_msi { address_lo: MESSAGE, data: VECTOR.into(), ..kvm_msi::default() };
        match self.slots.vm.signal_msi(message)? {
            1 => Ok(()),
            other => Err(format!("KVM delivered a message to {other} vCPUs").into()),
        }
    }

    fn attach_irqfd(&self, fd: &EventFd) -> Result<()> {
        let mut entry =
            kvm_irq_routing_entry { gsi: IRQFD_GSI, type_: KVM_IRQ_ROUTING_MSI, ..kvm_irq_routing_entry::default() };
        entry.u.msi.address_lo = MESSAGE;
        entry.u.msi.data = VECTOR.into();
        let routing = KvmIrqRouting::from_entries(&[entry]).map_err(|error| format!("{error:?}"))?;
        self.slots.vm.set_gsi_routing(&routing)?;
        Ok(self.slots.vm.register_irqfd(fd, IRQFD_GSI)?)
    }

    fn attach_ioeventfd(&self, fd: &EventFd, at: IoAddress) -> Result<()> {
        let at = match at {
            IoAddress::Port(port) => IoEventAddress::Pio(port.into()),
            IoAddress::Memory(address) => IoEventAddress::Mmio(address),
        };
        Ok(self.slots.vm.register_ioevent(fd, &at, NoDatamatch)?)
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
        Ok(self.vcpu.set_regs(&regs(&guest::general(self.id, turns)))?)
    }

    fn run(&mut self) -> Result<()> {
        loop {
            match self.vcpu.run() {
                Ok(VcpuExit::IoOut(DONE, _)) => return Ok(()),
                Ok(VcpuExit::IoOut(..) | VcpuExit::MmioWrite(..)) => {}
                Ok(VcpuExit::IoIn(_, data) | VcpuExit::MmioRead(_, data)) => data.fill(0),
                Ok(VcpuExit::Hypercall(exit)) => *exit.ret = 0,
                Ok(VcpuExit::X86Rdmsr(exit)) => *exit.error = 1,
                Ok(VcpuExit::X86Wrmsr(exit)) => *exit.error = 1,
                Ok(other) => return Err(format!("an exit that no loop has: {other:x?}").into()),
                Err(error) if interrupted(error) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn count(&self) -> Result<u64> {
        Ok(self.vcpu.get_regs()?.r14)
    }
}

fn regs(general: &General) -> kvm_regs {
    let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] = general.gpr;
    let (rip, rflags) = (general.rip, general.rflags);
    kvm_regs { rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags }
}

/// The special registers of [`guest`], over what the vCPU has of the rest.
fn sregs(old: kvm_sregs) -> kvm_sregs {
    let Control { cr0, cr3, cr4, efer, .. } = guest::control(Control::default());
    let Segments { es, cs, ss, ds, fs, gs, ldtr, tr, gdtr, idtr } = guest::segments();
    let mut new = kvm_sregs { cr0, cr3, cr4, efer, ..old };
    (new.es, new.cs, new.ss, new.ds) = (segment(es), segment(cs), segment(ss), segment(ds));
    (new.fs, new.gs, new.ldt, new.tr) = (segment(fs), segment(gs), segment(ldtr), segment(tr));
    (new.gdt.base, new.gdt.limit) = (gdtr.base, gdtr.limit);
    (new.idt.base, new.idt.limit) = (idtr.base, idtr.limit);
    new
}

fn segment(segment: x86::Segment) -> kvm_segment {
    let x86::Segment { base, limit, selector, attributes } = segment;
    let bit = |bit: u32| (attributes >> bit & 1) as u8;
    kvm_segment {
        base,
        limit,
        selector,
        type_: (attributes & 15) as u8,
        s: bit(4),
        dpl: (attributes >> 5 & 3) as u8,
        present: bit(7),
        avl: bit(8),
        l: bit(9),
        db: bit(10),
        g: bit(11),
        unusable: 1 - bit(7),
        padding: 0,
    }
}
