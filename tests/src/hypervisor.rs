// SPDX-License-Identifier: MIT OR Apache-2.0
//! What carries the machine of the cases: the module, or KVM for comparison, through axvmm's own layer over it.
//!
//! Everything here has the module's names and manners. What only the module has ([`OnlyAxvcpu`], and methods that say so)
//! is for cases marked `[abi]`, which KVM never sees; a case without the mark that uses it fails on KVM.

use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use crate::harness;
use axvcpu_uapi::addr::GuestPhysAddr;
use axvcpu_uapi::client::{self, Apic, Exit, RegisterSet, Snapshot};
use axvcpu_uapi::exit::AxVCpuExitReason::{InterruptWindow, Interrupted, IoWrite, MmioWrite};
use axvcpu_uapi::run::STATE_INTERRUPT_WINDOW_OPEN;
use axvcpu_uapi::vcpu::{Event, ExitKind, VcpuStats, EVENT_EXTERNAL_INTERRUPT};
use axvcpu_uapi::x86::{CpuidEntry, General, Msr};
use axvmm::hypervisor::{self, kvm, Kick, Registers, Stats, Vcpu as _};
use axvmm::x86::device::ioapic::Message;
use axvmm::x86::device::irq::MessageSink;
use axvmm::x86::hypervisor::{X86Vcpu as _, X86Vm as _};
use std::sync::Arc;

/// Something of the module's own.
#[derive(Clone, Debug)]
pub struct OnlyAxvcpu<T>(pub Option<T>);

/// What a case says that wants something of the module's own from KVM.
const UNMARKED: &str = "this case uses what only axvcpu has: mark it [abi]";

impl<T> Deref for OnlyAxvcpu<T> {
    type Target = T;
    fn deref(&self) -> &T {
        self.0.as_ref().expect(UNMARKED)
    }
}

/// A result of KVM's. No case is about its errors, so each is a failure.
fn kvm<T, E: std::fmt::Display>(result: Result<T, E>) -> T {
    result.unwrap_or_else(|error| panic!("{error}"))
}

/// Creates a VM of KVM's and the boot processor, which is about to start at `entry`; `parts` of the memory are where they
/// are in it.
///
/// # Errors
/// What KVM reports.
pub fn kvm_machine(
    apic: Apic,
    ram: &Arc<client::Memory>,
    parts: [(usize, usize); 2],
    entry: GuestPhysAddr,
    cpuid: &[CpuidEntry],
) -> hypervisor::Result<(kvm::Vm, Vcpu)> {
    let mut vm = kvm::Vm::with_apic(Path::new(kvm::DEVICE_PATH), apic)?;
    for (start, end) in parts {
        let memory: Arc<client::Memory> = Arc::clone(ram);
        vm.map_part(GuestPhysAddr::new(start as u64), memory, start, end - start)?;
    }
    let vcpu = vm.create_vcpu(0, entry, cpuid)?;
    Ok((vm, vcpu.into()))
}

/// The device.
#[derive(Debug)]
pub enum System {
    /// The module's.
    Axvcpu(client::System),
    /// KVM's, which is opened anew for each VM.
    Kvm,
}

impl System {
    /// The CPUID leaves that a guest may be given.
    ///
    /// # Errors
    /// What the module reports.
    pub fn supported_cpuid(&self) -> client::Result<Vec<CpuidEntry>> {
        match self {
            Self::Axvcpu(system) => system.supported_cpuid(),
            Self::Kvm => {
                let vm = kvm(kvm::Vm::with_apic(Path::new(kvm::DEVICE_PATH), Apic::InKernel));
                Ok(kvm(vm.supported_cpuid()))
            }
        }
    }
}

impl System {
    /// The bits that a guest may set in XCR0: leaf 0xd, index 0.
    ///
    /// # Errors
    /// What the module reports.
    pub fn xcr0_supported(&self) -> client::Result<u64> {
        let table = self.supported_cpuid()?;
        let entry = table.iter().find(|entry| entry.function == 0xd && entry.index == 0);
        Ok(entry.map_or(0, |entry| u64::from(entry.edx) << 32 | u64::from(entry.eax)))
    }
}

impl Deref for System {
    type Target = client::System;
    fn deref(&self) -> &client::System {
        match self {
            Self::Axvcpu(system) => system,
            Self::Kvm => panic!("{UNMARKED}"),
        }
    }
}

/// Delivers messages to the local APICs, from any thread.
#[derive(Clone)]
pub struct Messages(Arc<dyn MessageSink>);

impl Messages {
    /// Of a VM of the module's.
    pub fn of_axvcpu(vm: &client::Vm) -> Self {
        Self(Arc::new(vm.clone()))
    }

    /// Of a VM of KVM's.
    pub fn of_kvm(vm: &kvm::Vm) -> Self {
        Self(Arc::from(vm.messages()))
    }

    /// Delivers a message.
    pub fn signal_msi(&self, address: u64, data: u32) {
        self.0.send(Message { address, data });
    }

    /// Tells which pins of the I/O APIC are level-triggered: here the first, with this message.
    pub fn level_triggered(&self, address: u64, data: u32) {
        let mut pins = [None; axvmm::x86::device::ioapic::PINS];
        pins[0] = Some(Message { address, data });
        self.0.level_triggered(&pins);
    }
}

/// A vCPU of KVM's with the manners of the module's.
#[derive(Debug)]
pub struct KvmVcpu {
    vcpu: kvm::Vcpu,
    /// An external interrupt that waits for its window: the module queues one itself.
    waiting: Option<u8>,
    /// Whether the case wants to see windows.
    window: bool,
    /// An exit that came when the one before was completed.
    next: Option<Exit>,
}

impl KvmVcpu {
    fn run(&mut self) -> Exit {
        if let Some(exit) = self.next.take() {
            return exit;
        }
        let exit = loop {
            if let Some(vector) = self.waiting {
                if kvm(self.vcpu.interrupt(vector)) {
                    self.waiting = None;
                }
            }
            self.vcpu.request_interrupt_window(self.window || self.waiting.is_some());
            let exit = kvm(self.vcpu.run());
            if exit.reason != InterruptWindow || self.window {
                break exit;
            }
        };
        match exit.reason {
            IoWrite { .. } | MmioWrite { .. } => self.complete(exit),
            _ => exit,
        }
    }

    /// The module completes output before it reports it, KVM when it runs the next time; a run that ends before the
    /// guest's next instruction makes them equal.
    fn complete(&mut self, exit: Exit) -> Exit {
        self.vcpu.kicker().kick();
        let after = kvm(self.vcpu.run());
        if after.reason != Interrupted {
            self.next = Some(after);
            return exit;
        }
        Exit::new(exit.reason, if after.interrupt_window_open() { STATE_INTERRUPT_WINDOW_OPEN } else { 0 })
    }

    fn inject(&mut self, event: &Event) {
        if event.kind == EVENT_EXTERNAL_INTERRUPT {
            assert_eq!(self.waiting, None, "one interrupt waits at a time");
            self.waiting = Some(event.vector as u8);
        } else {
            kvm(self.vcpu.inject(event));
        }
    }
}

/// A register set that both have.
pub trait Set: RegisterSet {
    /// Reads it from a vCPU of KVM's.
    ///
    /// # Errors
    /// What KVM reports.
    fn of_kvm(vcpu: &kvm::Vcpu) -> hypervisor::Result<Self>;

    /// Writes it into one.
    ///
    /// # Errors
    /// What KVM reports.
    fn to_kvm(&self, vcpu: &mut kvm::Vcpu) -> hypervisor::Result<()>;
}

impl<S: RegisterSet> Set for S
where
    kvm::Vcpu: Registers<S>,
{
    fn of_kvm(vcpu: &kvm::Vcpu) -> hypervisor::Result<S> {
        vcpu.get()
    }
    fn to_kvm(&self, vcpu: &mut kvm::Vcpu) -> hypervisor::Result<()> {
        vcpu.set(self)
    }
}

/// A vCPU.
#[derive(Debug)]
pub enum Vcpu {
    /// Of the module's.
    Axvcpu(client::Vcpu),
    /// Of KVM's.
    Kvm(Box<KvmVcpu>),
}

impl From<kvm::Vcpu> for Vcpu {
    fn from(vcpu: kvm::Vcpu) -> Self {
        Self::Kvm(Box::new(KvmVcpu { vcpu, waiting: None, window: false, next: None }))
    }
}

/// The same on both: the module's result as it is, KVM's if it is one.
macro_rules! on {
    ($vcpu:expr, $v:ident => $axvcpu:expr, $k:ident => $kvm:expr) => {
        match $vcpu {
            Vcpu::Axvcpu($v) => $axvcpu,
            Vcpu::Kvm($k) => Ok($kvm),
        }
    };
}

/// As the methods of the module's handle ([`client::Vcpu`]), with its errors.
#[allow(clippy::missing_errors_doc)]
impl Vcpu {
    /// Runs to the next exit.
    pub fn run(&mut self) -> client::Result<Exit> {
        on!(self, v => v.run(), k => k.run())
    }

    /// Reads a register set.
    pub fn get<S: Set>(&self) -> client::Result<S> {
        on!(self, v => v.get(), k => kvm(S::of_kvm(&k.vcpu)))
    }

    /// Writes a register set.
    pub fn set<S: Set>(&mut self, set: &S) -> client::Result<()> {
        on!(self, v => v.set(set), k => kvm(set.to_kvm(&mut k.vcpu)))
    }

    /// The general registers at the last exit, as changed since.
    pub fn general(&self) -> General {
        match self {
            Self::Axvcpu(vcpu) => vcpu.general(),
            Self::Kvm(vcpu) => kvm(vcpu.vcpu.general()),
        }
    }

    /// Changes the general registers.
    pub fn set_general(&mut self, general: &General) {
        match self {
            Self::Axvcpu(vcpu) => vcpu.set_general(general),
            Self::Kvm(vcpu) => kvm(vcpu.vcpu.set_general(general)),
        }
    }

    /// Reads, changes and writes the general registers.
    pub fn modify_general(&mut self, change: impl FnOnce(&mut General)) {
        let mut general = self.general();
        change(&mut general);
        self.set_general(&general);
    }

    /// Sets one general register.
    pub fn set_gpr(&mut self, reg: u32, value: u64) -> client::Result<()> {
        if let Self::Axvcpu(vcpu) = self {
            return vcpu.set_gpr(reg, value);
        }
        self.modify_general(|general| general.gpr[reg as usize] = value);
        Ok(())
    }

    /// Answers the last exit.
    pub fn reply(&mut self, value: u64) {
        match self {
            Self::Axvcpu(vcpu) => vcpu.reply(value),
            Self::Kvm(vcpu) => vcpu.vcpu.reply(value),
        }
    }

    /// Answers the last exit with a fault.
    pub fn reply_fault(&mut self) {
        match self {
            Self::Axvcpu(vcpu) => vcpu.reply_fault(),
            Self::Kvm(vcpu) => vcpu.vcpu.reply_fault(),
        }
    }

    /// Asks for window exits.
    pub fn request_interrupt_window(&mut self, on: bool) {
        match self {
            Self::Axvcpu(vcpu) => vcpu.request_interrupt_window(on),
            Self::Kvm(vcpu) => vcpu.window = on,
        }
    }

    /// Queues an event.
    pub fn inject(&mut self, event: &Event) -> client::Result<()> {
        on!(self, v => v.inject(event), k => k.inject(event))
    }

    /// Reads model-specific registers.
    pub fn msrs(&self, indices: &[u32]) -> client::Result<Vec<Msr>> {
        on!(self, v => v.msrs(indices), k => kvm(k.vcpu.msrs(indices)))
    }

    /// Writes model-specific registers.
    pub fn set_msrs(&mut self, msrs: &[Msr]) -> client::Result<()> {
        on!(self, v => v.set_msrs(msrs), k => kvm(k.vcpu.set_msrs(msrs)))
    }

    /// Reads the extended state.
    pub fn xsave(&self) -> client::Result<Vec<u8>> {
        on!(self, v => v.xsave(), k => kvm(k.vcpu.xsave()))
    }

    /// Writes the extended state.
    pub fn set_xsave(&mut self, area: &[u8]) -> client::Result<()> {
        on!(self, v => v.set_xsave(area), k => kvm(k.vcpu.set_xsave(area)))
    }

    /// Carries out a decoded access to the xAPIC page. KVM decodes those itself; there it reads and writes the state.
    pub fn apic_access(&mut self, offset: u32, write: Option<u32>) -> client::Result<u32> {
        on!(self, v => v.apic_access(offset, write), k => {
            let mut apic: axvcpu_uapi::x86::LocalApic = kvm(Registers::get(&k.vcpu));
            let register = &mut apic.regs[offset as usize / 16];
            if let Some(value) = write {
                *register = value;
                kvm(Registers::set(&mut k.vcpu, &apic));
            }
            write.unwrap_or(apic.regs[offset as usize / 16])
        })
    }

    /// A handle for kicks.
    pub fn kicker(&self) -> Kicker {
        match self {
            Self::Axvcpu(vcpu) => Kicker::Axvcpu(vcpu.kicker()),
            Self::Kvm(vcpu) => Kicker::Kvm(Arc::from(vcpu.vcpu.kicker())),
        }
    }

    /// The module's: the state at an exit that wants decoding.
    pub fn snapshot(&self) -> Option<Snapshot> {
        self.axvcpu().snapshot()
    }

    /// Exits of a kind, as far as they are counted.
    pub fn exits(&self, kind: ExitKind) -> client::Result<Option<u64>> {
        on!(self, v => Ok(Some(v.stats()?.exits[kind as usize])), k => match (kind, k.vcpu.stats()) {
            (ExitKind::Halt, Some(Stats::Kvm(counters))) => {
                counters.iter().find(|(name, _)| name == "halt_exits").map(|(_, count)| *count)
            }
            _ => None,
        })
    }

    /// The module's: counters.
    pub fn stats(&self) -> client::Result<VcpuStats> {
        self.axvcpu().stats()
    }

    fn axvcpu(&self) -> &client::Vcpu {
        match self {
            Self::Axvcpu(vcpu) => vcpu,
            Self::Kvm(_) => panic!("{UNMARKED}"),
        }
    }
}

impl AsFd for Vcpu {
    /// The module's.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.axvcpu().as_fd()
    }
}

/// Makes a vCPU return.
#[derive(Clone)]
pub enum Kicker {
    /// Of the module's.
    Axvcpu(client::Kicker),
    /// Of KVM's.
    Kvm(Arc<dyn Kick>),
}

#[allow(clippy::missing_errors_doc)]
impl Kicker {
    /// Kicks.
    pub fn kick(&self) -> client::Result<()> {
        match self {
            Self::Axvcpu(kicker) => kicker.kick(),
            Self::Kvm(kicker) => {
                kicker.kick();
                Ok(())
            }
        }
    }

    /// The module's: counters.
    pub fn stats(&self) -> client::Result<VcpuStats> {
        match self {
            Self::Axvcpu(kicker) => kicker.stats(),
            Self::Kvm(_) => panic!("{UNMARKED}"),
        }
    }
}

impl harness::Kick for Kicker {
    fn kick(&self) {
        let _ = Kicker::kick(self);
    }
}

impl From<hypervisor::Error> for harness::Stop {
    fn from(error: hypervisor::Error) -> Self {
        Self::Fail(error.to_string())
    }
}
