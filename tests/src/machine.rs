// SPDX-License-Identifier: MIT OR Apache-2.0
//! A small virtual machine to test with: 4 MiB of RAM with a hole, one vCPU, and code in real, protected or long mode.
//!
//! | guest physical | content |
//! |---|---|
//! | 0 | interrupt vectors of real mode |
//! | [`GDT`] | global descriptor table, and behind it a TSS ([`TSS`]) |
//! | [`CODE`] | the code under test, up to a page |
//! | [`IDT`] | interrupt descriptor table of protected and long mode |
//! | up to [`STACK`] | stack |
//! | [`TABLES`] | page tables of long mode: the first GiB, identical, by 2 MiB pages that user mode may use too |
//! | [`DATA`] | free for the case, up to the hole |
//! | [`HOLE`] | 128 KiB that are not memory: the place for MMIO, reachable from real mode |
//! | [`HIGH`] | free for the case, up to [`RAM_SIZE`] |
//!
//! The first GiB of long mode includes addresses beyond the RAM, which are not memory either.

mod modes;

use crate::harness::{self, CaseResult, Hypervisor, Stop};
use crate::hypervisor::{self, Messages, OnlyAxvcpu, System, Vcpu};
use crate::{ensure, ensure_eq};
use axvcpu_uapi::addr::GuestPhysAddr;
use axvcpu_uapi::client::{self, AddressSpace, Apic, Exit, Memory, Permissions, Slot, Vm};
use axvcpu_uapi::exit::{AccessFlags, AccessWidth, AxVCpuExitReason};
use axvcpu_uapi::vcpu::Event;
use axvcpu_uapi::x86::{Control, CpuidEntry, General, Segments};
use axvmm::hypervisor::kvm;
use axvmm::x86::hypervisor::X86Vm as _;
pub use modes::*;
use std::sync::Arc;

/// Size of the RAM, in bytes.
pub const RAM_SIZE: usize = 4 << 20;
/// The global descriptor table.
pub const GDT: u64 = 0x800;
/// The task state segment.
pub const TSS: u64 = 0xa00;
/// Where the code starts.
pub const CODE: u64 = 0x1000;
/// The interrupt descriptor table.
pub const IDT: u64 = 0x2000;
/// Initial stack pointer; the stack's page is below.
pub const STACK: u64 = 0x9000;
/// Page tables.
pub const TABLES: u64 = 0x1_0000;
/// Free memory.
pub const DATA: u64 = 0x2_0000;
/// Not memory.
pub const HOLE: u64 = 0xa_0000;
/// End of what is not memory.
pub const HOLE_END: u64 = 0xc_0000;
/// Free memory above the first MiB.
pub const HIGH: u64 = 0x10_0000;

/// The machine.
pub struct Machine {
    /// The device.
    pub system: System,
    /// The virtual machine.
    pub vm: OnlyAxvcpu<Vm>,
    /// Its address space.
    pub space: OnlyAxvcpu<AddressSpace>,
    kvm: Option<kvm::Vm>,
    /// Delivers messages to its local APICs.
    pub messages: Messages,
    /// The RAM, at guest physical address 0 but for the hole.
    pub ram: Arc<Memory>,
    /// The RAM's mappings, below and above the hole; none on KVM, which keeps them itself.
    pub slots: Vec<Slot<Memory>>,
    /// The vCPU.
    pub vcpu: Vcpu,
    mode: Mode,
}

/// Opens the device; without hardware that could run anything, the case is skipped.
///
/// # Errors
/// A failure, or the reason to skip.
pub fn open() -> Result<System, Stop> {
    match harness::hypervisor() {
        Hypervisor::Axvcpu => open_axvcpu().map(System::Axvcpu),
        Hypervisor::Kvm => Ok(System::Kvm),
    }
}

/// Opens the module's device, likewise.
///
/// # Errors
/// A failure, or the reason to skip.
pub fn open_axvcpu() -> Result<client::System, Stop> {
    let system = client::System::open()?;
    let info = system.info()?;
    ensure_eq!(info.arch, axvcpu_uapi::system::ARCH_X86_64, "architecture");
    if info.backend == axvcpu_uapi::system::BACKEND_NONE {
        return Err(Stop::Skip("this CPU has no virtualization extension".into()));
    }
    ensure_eq!(info.status, axvcpu_uapi::system::STATUS_READY, "status of the module");
    Ok(system)
}

/// Real-mode code that does nothing for ever.
pub const fn spin() -> &'static [u8] {
    &[0xeb, 0xfe]
}

impl Machine {
    /// A machine without in-kernel APIC that is about to run `code`.
    ///
    /// # Errors
    /// What a handle reports.
    pub fn new(mode: Mode, code: &[u8]) -> Result<Self, Stop> {
        Self::with(mode, code, Apic::None)
    }

    /// A machine that is about to run `code`, with the CPUID table that the module supports.
    ///
    /// # Errors
    /// What a handle reports.
    pub fn with(mode: Mode, code: &[u8], apic: Apic) -> Result<Self, Stop> {
        let system = open()?;
        let cpuid = system.supported_cpuid()?;
        Self::build(system, mode, code, apic, &cpuid)
    }

    /// A machine that is about to run `code`, with the given CPUID table.
    ///
    /// # Errors
    /// What a handle reports.
    pub fn build(system: System, mode: Mode, code: &[u8], apic: Apic, cpuid: &[CpuidEntry]) -> Result<Self, Stop> {
        let ram = Arc::new(Memory::anonymous(RAM_SIZE)?);
        let parts = [(0, HOLE as usize), (HOLE_END as usize, RAM_SIZE)];
        let mut slots = Vec::new();
        let (vm, space, kvm, messages, vcpu) = match &system {
            System::Axvcpu(system) => {
                let vm = system.create_vm()?;
                let space = vm.create_address_space()?;
                for (start, end) in parts {
                    let at = GuestPhysAddr::new(start as u64);
                    slots.push(space.map(at, Arc::clone(&ram), start, end - start, Permissions::RWX)?);
                }
                let mut vcpu = vm.create_vcpu(0)?;
                vcpu.set_entry(GuestPhysAddr::new(CODE))?;
                vcpu.set_ept_root(&space)?;
                vcpu.setup(apic, cpuid)?;
                let messages = Messages::of_axvcpu(&vm);
                (Some(vm), Some(space), None, messages, Vcpu::Axvcpu(vcpu))
            }
            System::Kvm => {
                let (vm, vcpu) = hypervisor::kvm_machine(apic, &ram, parts, GuestPhysAddr::new(CODE), cpuid)?;
                let messages = Messages::of_kvm(&vm);
                (None, None, Some(vm), messages, vcpu)
            }
        };
        harness::watch(vcpu.kicker());
        let (vm, space) = (OnlyAxvcpu(vm), OnlyAxvcpu(space));
        let mut machine = Self { system, vm, space, kvm, messages, ram, slots, vcpu, mode };
        machine.write(CODE, code)?;
        machine.enter()?;
        Ok(machine)
    }

    /// Another vCPU of the machine, without in-kernel APIC, in the state that the first one is in.
    ///
    /// # Errors
    /// What a handle reports.
    pub fn add_vcpu(&mut self, id: u32) -> Result<Vcpu, Stop> {
        let cpuid = self.system.supported_cpuid()?;
        let mut vcpu = self.create_vcpu(id, Apic::None, &cpuid)?;
        vcpu.set(&self.vcpu.get::<Control>()?)?;
        vcpu.set(&self.vcpu.get::<Segments>()?)?;
        vcpu.set(&self.vcpu.get::<General>()?)?;
        Ok(vcpu)
    }

    /// Creates another vCPU on the same memory, which would start at address 0 in real mode.
    ///
    /// # Errors
    /// What a handle reports.
    pub fn create_vcpu(&mut self, id: u32, apic: Apic, cpuid: &[CpuidEntry]) -> Result<Vcpu, Stop> {
        let entry = GuestPhysAddr::new(0);
        let vcpu = match &mut self.kvm {
            Some(vm) => vm.create_vcpu(id, entry, cpuid)?.into(),
            None => {
                let mut vcpu = self.vm.create_vcpu(id)?;
                vcpu.set_entry(entry)?;
                vcpu.set_ept_root(&self.space)?;
                vcpu.setup(apic, cpuid)?;
                Vcpu::Axvcpu(vcpu)
            }
        };
        harness::watch(vcpu.kicker());
        Ok(vcpu)
    }

    /// Copies `data` into the RAM.
    ///
    /// # Errors
    /// If it does not fit.
    pub fn write(&self, at: u64, data: &[u8]) -> CaseResult {
        Ok(self.ram.write(at as usize, data)?)
    }

    /// Stores a word in the RAM.
    ///
    /// # Errors
    /// If it does not fit.
    pub fn write_u64(&self, at: u64, value: u64) -> CaseResult {
        Ok(self.ram.write_u64(at as usize, value)?)
    }

    /// Reads bytes of the RAM.
    ///
    /// # Errors
    /// If they lie outside.
    pub fn read<const N: usize>(&self, at: u64) -> Result<[u8; N], Stop> {
        let mut bytes = [0; N];
        self.ram.read(at as usize, &mut bytes)?;
        Ok(bytes)
    }

    /// Reads a word of the RAM.
    ///
    /// # Errors
    /// If it lies outside.
    pub fn read_u64(&self, at: u64) -> Result<u64, Stop> {
        Ok(self.ram.read_u64(at as usize)?)
    }

    /// Changes general registers: through the run page after the first run, by ioctl before it.
    ///
    /// # Errors
    /// What the module refuses.
    pub fn modify(&mut self, change: impl FnOnce(&mut General)) -> CaseResult {
        let mut general: General = self.vcpu.get()?;
        change(&mut general);
        Ok(self.vcpu.set(&general)?)
    }

    /// Sets RFLAGS.IF or clears it.
    ///
    /// # Errors
    /// What the module refuses.
    pub fn interrupts(&mut self, enabled: bool) -> CaseResult {
        self.modify(|general| {
            general.rflags = if enabled { general.rflags | FLAGS_IF } else { general.rflags & !FLAGS_IF };
        })
    }

    /// Runs to the next exit that means something.
    ///
    /// # Errors
    /// What `RUN` reports, or that the time is up.
    pub fn run(&mut self) -> Result<Exit, Stop> {
        loop {
            harness::check_time()?;
            let exit = self.vcpu.run()?;
            match exit.reason {
                AxVCpuExitReason::Nothing
                | AxVCpuExitReason::ExternalInterrupt { .. }
                | AxVCpuExitReason::PreemptionTimer => {}
                AxVCpuExitReason::Interrupted => {
                    harness::check_time()?;
                    return Ok(exit);
                }
                _ => return Ok(exit),
            }
        }
    }

    /// Runs to the next exit, which must be `reason`.
    ///
    /// # Errors
    /// If it is another, with the guest's registers.
    pub fn expect(&mut self, reason: AxVCpuExitReason) -> Result<Exit, Stop> {
        let exit = self.run()?;
        if exit.reason == reason {
            return Ok(exit);
        }
        Err(Stop::Fail(format!("expected exit {reason:x?}, found {:x?}, with {}", exit.reason, self.registers())))
    }

    /// The general registers on one line.
    fn registers(&self) -> String {
        let General { gpr, rip, rflags } = self.vcpu.general();
        let names = [
            "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
            "r15",
        ];
        let mut line = format!("rip={rip:x} rflags={rflags:x}");
        for (name, value) in names.iter().zip(gpr) {
            line += &format!(" {name}={value:x}");
        }
        line
    }

    /// Expects port output.
    ///
    /// # Errors
    /// If the next exit is another.
    pub fn expect_out(&mut self, port: u16, width: AccessWidth, data: u64) -> Result<Exit, Stop> {
        self.expect(AxVCpuExitReason::IoWrite { port, width, data })
    }

    /// Expects `OUT port, AL` with any value, and returns it with the exit: how guests announce where they are.
    ///
    /// # Errors
    /// If the next exit is another.
    pub fn expect_mark(&mut self, port: u16) -> Result<(u64, Exit), Stop> {
        let exit = self.run()?;
        match exit.reason {
            AxVCpuExitReason::IoWrite { port: found, data, .. } if found == port => Ok((data, exit)),
            other => Err(Stop::Fail(format!("expected OUT {port:#x}, found {other:x?}, with {}", self.registers()))),
        }
    }

    /// Expects these marks, one after the other.
    ///
    /// # Errors
    /// At the first exit that is another.
    pub fn expect_marks(&mut self, ports: &[u16]) -> CaseResult {
        ports.iter().try_for_each(|port| self.expect_mark(*port).map(drop))
    }

    /// Expects `OUT port, EAX` and returns the value.
    ///
    /// # Errors
    /// If the next exit is another.
    pub fn expect_word(&mut self, port: u16) -> Result<u64, Stop> {
        let exit = self.run()?;
        match exit.reason {
            AxVCpuExitReason::IoWrite { port: found, width: AccessWidth::Dword, data } if found == port => Ok(data),
            other => {
                Err(Stop::Fail(format!("expected OUT {port:#x}, EAX, found {other:x?}, with {}", self.registers())))
            }
        }
    }

    /// Expects `IN EAX, port` and answers it.
    ///
    /// # Errors
    /// If the next exit is another.
    pub fn feed_word(&mut self, port: u16, value: u32) -> CaseResult {
        self.expect(AxVCpuExitReason::IoRead { port, width: AccessWidth::Dword })?;
        self.vcpu.reply(value.into());
        Ok(())
    }

    /// Expects HLT as an exit.
    ///
    /// # Errors
    /// If the next exit is another.
    pub fn expect_halt(&mut self) -> CaseResult {
        self.expect(AxVCpuExitReason::Halt).map(drop)
    }

    /// Expects an access to `at`, which is not memory or does not allow it, with all of `flags`; and checks what comes
    /// with such an exit: instruction bytes, if any, and the snapshot.
    ///
    /// # Errors
    /// If the next exit is another, or lacks something.
    pub fn expect_fault(&mut self, at: u64, flags: AccessFlags) -> Result<Exit, Stop> {
        let exit = self.run()?;
        let AxVCpuExitReason::NestedPageFault { addr, access_flags } = exit.reason else {
            return Err(Stop::Fail(format!(
                "expected a fault at {at:#x}, found {:x?}, with {}",
                exit.reason,
                self.registers()
            )));
        };
        ensure_eq!(addr.as_u64(), at, "faulting address");
        ensure!(access_flags.contains(flags), "access flags: found {access_flags:?}, expected {flags:?}");
        let snapshot = self.vcpu.snapshot().ok_or(Stop::Fail("a fault without snapshot".into()))?;
        ensure_eq!(snapshot.control, self.vcpu.get::<Control>()?, "control registers of the snapshot");
        ensure_eq!(snapshot.segments, self.vcpu.get::<Segments>()?, "segments of the snapshot");
        ensure_eq!(self.vcpu.general(), self.vcpu.get::<General>()?, "general registers of the run page");
        Ok(exit)
    }

    /// Steps over the instruction at RIP, which is `length` bytes long, after changing registers as it would have.
    pub fn step_over(&mut self, length: u64, effect: impl FnOnce(&mut General)) {
        self.vcpu.modify_general(|general| {
            effect(general);
            general.rip += length;
        });
    }

    /// Queues an event.
    ///
    /// # Errors
    /// What the module refuses.
    pub fn inject(&mut self, kind: u32, vector: u8) -> CaseResult {
        Ok(self.vcpu.inject(&Event { kind, vector: vector.into(), ..Event::default() })?)
    }
}
