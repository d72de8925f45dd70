// SPDX-License-Identifier: MIT OR Apache-2.0
//! A vCPU of KVM: runs it, and turns what comes back into the exits of the axvcpu ABI.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use axvcpu_uapi::addr::GuestPhysAddr;
use axvcpu_uapi::client::{Apic, Errno, Exit, Snapshot};
use axvcpu_uapi::exit::AxVCpuExitReason;
use axvcpu_uapi::run::STATE_INTERRUPT_WINDOW_OPEN;
use axvcpu_uapi::vcpu::{Event, VcpuStats, EVENT_EXTERNAL_INTERRUPT, EVENT_NMI};
use axvcpu_uapi::x86::{CpuidEntry, General, Msr};
use kvm_bindings::{kvm_interrupt, kvm_sregs, kvm_xsave, CpuId};
use kvm_ioctls::VcpuFd;

use super::error::{refused, Error};
use super::kick::Kicker;
use super::registers::{self, fault_address, to_cpuid};
use super::run_page::RunPage;
use super::stats;
use super::transfer::Transfer;
use super::Shared;
use crate::hypervisor::{self, Kick, Registers, Result, Stats};

/// `IA32_MTRR_DEF_TYPE`, and what firmware leaves there for a guest that has none: enabled (bit 11), everything write-back.
const MTRR_DEF_TYPE: Msr = Msr { index: 0x2ff, reserved: 0, value: 1 << 11 | 6 };

mod ioctl {
    //! What kvm-ioctls does not wrap.
    use kvm_bindings::{kvm_interrupt, KVMIO};

    nix::ioctl_write_ptr!(interrupt, KVMIO, 0x86, kvm_interrupt);
}

/// What the last exit wants answered.
#[derive(Debug)]
enum Question {
    /// Nothing.
    None,
    /// The next part of an access.
    Access(Transfer),
    /// A system register.
    Msr,
}

/// A vCPU.
#[derive(Debug)]
pub struct Vcpu {
    // Before `shared`, which holds the guest's memory.
    pub(super) fd: VcpuFd,
    page: RunPage,
    question: Question,
    kicker: Kicker,
    shared: Arc<Shared>,
}

impl Vcpu {
    /// Creates vCPU `id`. If that is the boot processor, it starts in real mode at `entry`.
    pub(super) fn new(
        shared: &Arc<Shared>,
        id: u32,
        entry: GuestPhysAddr,
        cpuid: &[CpuidEntry],
    ) -> std::result::Result<Self, Error> {
        let fd = shared.vm.create_vcpu(id.into()).map_err(refused("KVM_CREATE_VCPU"))?;
        let entries: Vec<_> = cpuid.iter().map(to_cpuid).collect();
        let too_many = |_| Error::Ioctl { name: "KVM_SET_CPUID2", errno: Errno::E2BIG };
        fd.set_cpuid2(&CpuId::from_entries(&entries).map_err(too_many)?).map_err(refused("KVM_SET_CPUID2"))?;
        // SAFETY: `fd` stays open until the end of the function.
        let page = RunPage::map(unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) }, shared.vm.run_size())?;
        let kicker = Kicker::new(page.immediate_exit());
        let mut vcpu = Self { fd, page, question: Question::None, kicker, shared: Arc::clone(shared) };
        vcpu.set_msrs(&[MTRR_DEF_TYPE])?;
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
        let mut regs = self.fd.get_regs().map_err(refused("KVM_GET_REGS"))?;
        regs.rip = entry & 0xffff;
        self.fd.set_regs(&regs).map_err(refused("KVM_SET_REGS"))
    }

    /// The boot processor's APIC is enabled, as firmware leaves it: the spurious-interrupt vector register.
    fn enable_apic(&mut self) -> std::result::Result<(), Error> {
        if self.shared.apic == Apic::None {
            return Ok(());
        }
        let mut apic = self.local_apic()?;
        apic.regs[0xf] = 0x1ff;
        self.set_local_apic(&apic)
    }

    fn exit(&self, reason: AxVCpuExitReason) -> Exit {
        Exit::new(reason, if self.page.ready_for_interrupt() { STATE_INTERRUPT_WINDOW_OPEN } else { 0 })
    }

    /// The next part of the access that the last exit was part of.
    fn next_part(&self) -> Option<AxVCpuExitReason> {
        let Question::Access(access) = &self.question else { return None };
        let (offset, width) = access.part()?;
        Some(access.exit(width, self.page.read(offset, width)))
    }

    /// What `KVM_RUN` came back with.
    fn reason(&mut self) -> AxVCpuExitReason {
        use kvm_bindings::*;
        let reason = self.page.exit_reason();
        match reason {
            KVM_EXIT_IO | KVM_EXIT_MMIO => {
                let access = if reason == KVM_EXIT_IO { self.page.port_io() } else { self.page.mmio() };
                if let Some(access) = access {
                    self.question = Question::Access(access);
                    if let Some(part) = self.next_part() {
                        return part;
                    }
                }
                AxVCpuExitReason::Unknown { code: reason.into(), info1: 0, info2: 0 }
            }
            KVM_EXIT_X86_RDMSR | KVM_EXIT_X86_WRMSR => {
                self.question = Question::Msr;
                // Not refused unless the caller says so.
                let exit = self.page.msr(reason == KVM_EXIT_X86_WRMSR);
                self.page.answer_msr(0, false);
                exit
            }
            KVM_EXIT_HLT => AxVCpuExitReason::Halt,
            KVM_EXIT_INTR => AxVCpuExitReason::Interrupted,
            KVM_EXIT_IRQ_WINDOW_OPEN => AxVCpuExitReason::InterruptWindow,
            KVM_EXIT_IOAPIC_EOI => AxVCpuExitReason::InterruptEnd { vector: Some(self.page.eoi_vector()) },
            KVM_EXIT_SHUTDOWN => AxVCpuExitReason::TripleFault,
            KVM_EXIT_FAIL_ENTRY => {
                AxVCpuExitReason::FailEntry { hardware_entry_failure_reason: self.page.entry_failure() }
            }
            KVM_EXIT_SYSTEM_EVENT => match self.page.system_event() {
                KVM_SYSTEM_EVENT_SHUTDOWN => AxVCpuExitReason::SystemDown,
                KVM_SYSTEM_EVENT_RESET => AxVCpuExitReason::SystemReset,
                event => AxVCpuExitReason::Unknown { code: reason.into(), info1: event.into(), info2: 0 },
            },
            KVM_EXIT_INTERNAL_ERROR => match self.page.internal_error() {
                // KVM's emulator does not know the instruction.
                (KVM_INTERNAL_ERROR_EMULATION, _) => AxVCpuExitReason::UnsupportedInstruction { code: reason.into() },
                (error, data) => AxVCpuExitReason::Unknown { code: reason.into(), info1: error.into(), info2: data },
            },
            other => AxVCpuExitReason::Unknown { code: other.into(), info1: 0, info2: 0 },
        }
    }
}

impl hypervisor::Vcpu for Vcpu {
    fn run(&mut self) -> Result<Exit> {
        if let Question::Access(access) = &mut self.question {
            access.advance();
            if let Some(part) = self.next_part() {
                return Ok(self.exit(part));
            }
        }
        self.question = Question::None;
        self.kicker.adopt();
        let result = self.fd.run().map(drop);
        let reason = match result.map_err(|error| Errno::from_raw(error.errno())) {
            Ok(()) => self.reason(),
            Err(Errno::EINTR) => {
                self.kicker.taken();
                AxVCpuExitReason::Interrupted
            }
            // It waits for INIT and SIPI, and one of the two came.
            Err(Errno::EAGAIN) => AxVCpuExitReason::Nothing,
            Err(errno) => return Err(Error::Ioctl { name: "KVM_RUN", errno }.into()),
        };
        Ok(self.exit(reason))
    }

    fn kicker(&self) -> Box<dyn Kick> {
        Box::new(self.kicker.clone())
    }

    fn reply(&mut self, value: u64) {
        match &self.question {
            Question::Access(access) => {
                if let Some((offset, width)) = access.part() {
                    self.page.write(offset, width, value);
                }
            }
            Question::Msr => self.page.answer_msr(value, false),
            Question::None => {}
        }
    }

    fn reply_fault(&mut self) {
        if let Question::Msr = self.question {
            self.page.answer_msr(0, true);
        }
    }

    fn request_interrupt_window(&mut self, on: bool) {
        self.page.request_interrupt_window(on);
    }

    fn interrupt(&mut self, vector: u8) -> Result<bool> {
        // Without a local APIC KVM queues whatever comes, over what is queued already.
        if self.shared.apic == Apic::None && !self.page.ready_for_interrupt() {
            return Ok(false);
        }
        let interrupt = kvm_interrupt { irq: vector.into() };
        // SAFETY: the file descriptor is a vCPU's, and KVM reads a structure of the type that the request wants.
        match unsafe { ioctl::interrupt(self.fd.as_raw_fd(), &raw const interrupt) } {
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
            EVENT_NMI => self.fd.nmi().map_err(refused("KVM_NMI"))?,
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
        let area = self.fd.get_xsave().map_err(refused("KVM_GET_XSAVE"))?;
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
        unsafe { self.fd.set_xsave(&xsave) }.map_err(refused("KVM_SET_XSAVE"))?;
        Ok(())
    }

    fn apic_access(&mut self, _offset: u32, _write: Option<u32>) -> Result<Option<u32>> {
        // KVM decodes the guest's accesses to its local APIC itself.
        Ok(None)
    }

    fn stats(&self) -> Option<Stats<VcpuStats>> {
        stats::read(&self.fd).map(Stats::Kvm)
    }
}
