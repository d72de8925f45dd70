// SPDX-License-Identifier: MIT OR Apache-2.0
//! A vCPU of KVM on x86: how it starts, exits that only x86 has, interrupts, events.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use axvcpu_uapi::addr::GuestPhysAddr;
use axvcpu_uapi::client::{Apic, Errno, Exit, Snapshot};
use axvcpu_uapi::exit::AxVCpuExitReason;
use axvcpu_uapi::run::STATE_INTERRUPT_WINDOW_OPEN;
use axvcpu_uapi::vcpu::{Event, VcpuStats, EVENT_EXTERNAL_INTERRUPT, EVENT_NMI};
use axvcpu_uapi::x86::{CpuidEntry, General, Msr};
use kvm_bindings::{kvm_interrupt, kvm_sregs, kvm_xsave, CpuId};
use kvm_bindings::{KVM_EXIT_HLT, KVM_EXIT_IO, KVM_EXIT_IOAPIC_EOI, KVM_EXIT_IRQ_WINDOW_OPEN, KVM_EXIT_SHUTDOWN};
use kvm_bindings::{KVM_EXIT_X86_RDMSR, KVM_EXIT_X86_WRMSR};

use super::registers::{self, fault_address, to_cpuid};
use crate::hypervisor::kvm::error::{refused, Error};
use crate::hypervisor::kvm::run_page::RunPage;
use crate::hypervisor::kvm::vcpu::{Came, Core};
use crate::hypervisor::kvm::{stats, Slots};
use crate::hypervisor::{self, Kick, Registers, Result, Stats};
use crate::x86::hypervisor::X86Vcpu;

/// `IA32_MTRR_DEF_TYPE`, and what firmware leaves there for a guest that has none: enabled (bit 11), everything write-back.
const MTRR_DEF_TYPE: Msr = Msr { index: 0x2ff, reserved: 0, value: 1 << 11 | 6 };

/// `IA32_MISC_ENABLE`.
const MISC_ENABLE: u32 = 0x1a0;
/// `IA32_MISC_ENABLE`: fast strings. Firmware leaves it set; KVM starts with it clear, and Linux then does without REP MOVS and
/// REP STOS.
const FAST_STRINGS: u64 = 1;

mod ioctl {
    //! What kvm-ioctls does not wrap.
    use kvm_bindings::{kvm_interrupt, KVMIO};

    nix::ioctl_write_ptr!(interrupt, KVMIO, 0x86, kvm_interrupt);
}

/// A vCPU.
#[derive(Debug)]
pub struct Vcpu {
    // Before `slots`, which holds the guest's memory.
    pub(super) core: Core,
    /// Whether the last exit was about an MSR.
    msr: bool,
    apic: Apic,
    _slots: Arc<Slots>,
}

impl Vcpu {
    /// Creates vCPU `id`. If that is the boot processor, it starts in real mode at `entry`.
    pub(super) fn new(
        slots: &Arc<Slots>,
        apic: Apic,
        id: u32,
        entry: GuestPhysAddr,
        cpuid: &[CpuidEntry],
    ) -> std::result::Result<Self, Error> {
        let core = Core::new(&slots.vm, id)?;
        let entries: Vec<_> = cpuid.iter().map(to_cpuid).collect();
        let too_many = |_| Error::Ioctl { name: "KVM_SET_CPUID2", errno: Errno::E2BIG };
        core.fd.set_cpuid2(&CpuId::from_entries(&entries).map_err(too_many)?).map_err(refused("KVM_SET_CPUID2"))?;
        let mut vcpu = Self { core, msr: false, apic, _slots: Arc::clone(slots) };
        vcpu.set_msrs(&[MTRR_DEF_TYPE])?;
        if has_fast_strings(cpuid) {
            let mut enabled = vcpu.msrs(&[MISC_ENABLE])?;
            for msr in &mut enabled {
                msr.value |= FAST_STRINGS;
            }
            vcpu.set_msrs(&enabled)?;
        }
        if id == 0 {
            vcpu.set_entry(entry.as_u64())?;
            vcpu.enable_apic()?;
        }
        Ok(vcpu)
    }

    /// Starts in real mode with a code segment based at the address's upper bits.
    fn set_entry(&self, entry: u64) -> std::result::Result<(), Error> {
        self.change_sregs(|mut sregs: kvm_sregs| {
            sregs.cs.base = entry & 0xffff_0000;
            sregs.cs.selector = (entry >> 4) as u16 & 0xf000;
            sregs
        })?;
        let mut regs = self.core.fd.get_regs().map_err(refused("KVM_GET_REGS"))?;
        regs.rip = entry & 0xffff;
        self.core.fd.set_regs(&regs).map_err(refused("KVM_SET_REGS"))
    }

    /// The boot processor's APIC is enabled, as firmware leaves it: the spurious-interrupt vector register.
    fn enable_apic(&mut self) -> std::result::Result<(), Error> {
        if self.apic == Apic::None {
            return Ok(());
        }
        let mut apic = self.local_apic()?;
        apic.regs[0xf] = 0x1ff;
        self.set_local_apic(&apic)
    }
}

/// Whether REP MOVSB and REP STOSB are fast (CPUID 7, EBX bit 9): KVM leaves that out where the host's firmware has switched fast
/// strings off.
fn has_fast_strings(cpuid: &[CpuidEntry]) -> bool {
    cpuid.iter().any(|entry| (entry.function, entry.index) == (7, 0) && entry.ebx >> 9 & 1 != 0)
}

/// Exits that only x86 has.
fn exit(page: &mut RunPage, reason: u32) -> Option<Came> {
    Some(match reason {
        KVM_EXIT_IO => Came::Access(page.port_io()),
        KVM_EXIT_X86_RDMSR | KVM_EXIT_X86_WRMSR => {
            // Not refused unless the caller says so.
            let exit = page.msr(reason == KVM_EXIT_X86_WRMSR);
            page.answer_msr(0, false);
            Came::Exit(exit)
        }
        KVM_EXIT_HLT => Came::Exit(AxVCpuExitReason::Halt),
        KVM_EXIT_IRQ_WINDOW_OPEN => Came::Exit(AxVCpuExitReason::InterruptWindow),
        KVM_EXIT_IOAPIC_EOI => Came::Exit(AxVCpuExitReason::InterruptEnd { vector: Some(page.eoi_vector()) }),
        KVM_EXIT_SHUTDOWN => Came::Exit(AxVCpuExitReason::TripleFault),
        _ => return None,
    })
}

impl hypervisor::Vcpu for Vcpu {
    fn run(&mut self) -> Result<Exit> {
        let reason = self.core.run(exit)?;
        self.msr = matches!(reason, AxVCpuExitReason::SysRegRead { .. } | AxVCpuExitReason::SysRegWrite { .. });
        let state = if self.core.page.ready_for_interrupt() { STATE_INTERRUPT_WINDOW_OPEN } else { 0 };
        Ok(Exit::new(reason, state))
    }

    fn kicker(&self) -> Box<dyn Kick> {
        self.core.kicker()
    }

    fn reply(&mut self, value: u64) {
        if !self.core.reply(value) && self.msr {
            self.core.page.answer_msr(value, false);
        }
    }

    fn reply_fault(&mut self) {
        if self.msr {
            self.core.page.answer_msr(0, true);
        }
    }

    fn stats(&self) -> Option<Stats<VcpuStats>> {
        stats::read(&self.core.fd).map(Stats::Kvm)
    }
}

impl X86Vcpu for Vcpu {
    fn request_interrupt_window(&mut self, on: bool) {
        self.core.page.request_interrupt_window(on);
    }

    fn interrupt(&mut self, vector: u8) -> Result<bool> {
        // Without a local APIC KVM queues whatever comes, over what is queued already.
        if self.apic == Apic::None && !self.core.page.ready_for_interrupt() {
            return Ok(false);
        }
        let interrupt = kvm_interrupt { irq: vector.into() };
        // SAFETY: the file descriptor is a vCPU's, and KVM reads a structure of the type that the request wants.
        match unsafe { ioctl::interrupt(self.core.fd.as_raw_fd(), &raw const interrupt) } {
            Ok(_) => Ok(true),
            Err(Errno::EEXIST) => Ok(false),
            Err(errno) => Err(Error::Ioctl { name: "KVM_INTERRUPT", errno }.into()),
        }
    }

    fn inject(&mut self, event: &Event) -> Result<()> {
        match event.kind {
            EVENT_EXTERNAL_INTERRUPT => {
                let taken = self.interrupt(event.vector as u8)?;
                let errno = Errno::EAGAIN;
                return if taken { Ok(()) } else { Err(Error::Ioctl { name: "KVM_INTERRUPT", errno }.into()) };
            }
            EVENT_NMI => self.core.fd.nmi().map_err(refused("KVM_NMI"))?,
            _ => {
                let mut events = self.events()?;
                registers::queue(&mut events, event);
                self.set_events(&events)?;
                if let Some(cr2) = fault_address(event) {
                    self.change_sregs(|sregs| kvm_sregs { cr2, ..sregs })?;
                }
            }
        }
        Ok(())
    }

    fn general(&self) -> Result<General> {
        Registers::get(self)
    }

    fn set_general(&mut self, general: &General) -> Result<()> {
        Registers::set(self, general)
    }

    fn snapshot(&self) -> Option<Snapshot> {
        // No exit of KVM's wants an instruction decoded.
        None
    }

    fn xsave(&self) -> Result<Vec<u8>> {
        let area = self.core.fd.get_xsave().map_err(refused("KVM_GET_XSAVE"))?;
        Ok(area.region.iter().flat_map(|word| word.to_le_bytes()).collect())
    }

    fn set_xsave(&mut self, area: &[u8]) -> Result<()> {
        let mut xsave = kvm_xsave::default();
        if area.len() != size_of_val(&xsave.region) {
            return Err(Error::Ioctl { name: "KVM_SET_XSAVE", errno: Errno::EINVAL }.into());
        }
        for (word, bytes) in xsave.region.iter_mut().zip(area.chunks_exact(4)) {
            *word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        }
        // SAFETY: KVM reads more than the structure only for a process that has asked for features which are granted on
        // demand (AMX), and this one never does.
        unsafe { self.core.fd.set_xsave(&xsave) }.map_err(refused("KVM_SET_XSAVE"))?;
        Ok(())
    }

    fn apic_access(&mut self, _offset: u32, _write: Option<u32>) -> Result<Option<u32>> {
        // KVM decodes the guest's accesses to its local APIC itself.
        Ok(None)
    }
}
