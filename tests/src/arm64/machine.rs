// SPDX-License-Identifier: MIT OR Apache-2.0
//! A small virtual machine to test with: 4 MiB of RAM, one vCPU at EL1 with its MMU off.
//!
//! | guest physical | content |
//! |---|---|
//! | [`RAM`] | start of the RAM |
//! | [`CODE`] | the code under test, up to a page |
//! | [`VECTORS`] | EL1's exception vectors: each one is `HVC` |
//! | [`STACK`] | SP_EL1, with a page below it |
//! | [`TABLES`] | free for page tables |
//! | [`DATA`] | free for the case, up to the end of the RAM |
//! | [`HOLE`] | not memory, as everything below the RAM |
//! | [`GICD`], [`GICR`] | distributor and four redistributors, of a machine that has them |

use crate::harness::{self, CaseResult, Stop};
use crate::{ensure, ensure_eq};
use axvcpu_uapi::addr::GuestPhysAddr;
use axvcpu_uapi::arm64::{General, Gic, System as Registers, PSTATE_DAIF, PSTATE_EL1H};
use axvcpu_uapi::client::{AddressSpace, Apic, Exit, Memory, Permissions, Slot, System, Vcpu, Vm};
use axvcpu_uapi::exit::AxVCpuExitReason;
use axvcpu_uapi::system::{ARCH_AARCH64, BACKEND_NONE, STATUS_READY, STATUS_TOO_OLD};
use std::sync::Arc;

/// Size of the RAM, in bytes.
pub const RAM_SIZE: usize = 4 << 20;
/// Start of the RAM.
pub const RAM: u64 = 0x4000_0000;
/// Where the code starts.
pub const CODE: u64 = RAM + 0x1000;
/// The exception vectors.
pub const VECTORS: u64 = RAM + 0x8000;
/// SP_EL1.
pub const STACK: u64 = RAM + 0x1_0000;
/// Page tables.
pub const TABLES: u64 = RAM + 0x2_0000;
/// Free memory.
pub const DATA: u64 = RAM + 0x10_0000;
/// Not memory.
pub const HOLE: u64 = 0x0900_0000;

/// The GIC's distributor.
pub const GICD: u64 = 0x0800_0000;
/// The GIC's redistributors.
pub const GICR: u64 = 0x080a_0000;

/// Code for a machine with a GIC. It starts with the address of the distributor in X20, that of the vCPU's SGIs and PPIs in X21,
/// group 1 on, and all interrupts up to 63 in it, enabled and of the best priority; the priority mask is 0xf0. X9 is
/// lost.
#[macro_export]
macro_rules! gic_code {
    ($name:ident, $($line:literal),+ $(,)?) => {
        $crate::code!(
            $name,
            "movz x20, #0x0800, lsl #16",
            "movz x21, #0x080b, lsl #16",
            "mrs x9, mpidr_el1",
            "and x9, x9, #15",
            "add x21, x21, x9, lsl #17",
            "mov w9, #2",
            "str w9, [x20]",
            "mov w9, #-1",
            "str w9, [x21, #0x80]",
            "str w9, [x21, #0x100]",
            "str w9, [x20, #0x84]",
            "str w9, [x20, #0x104]",
            "mov x9, #0xf0",
            "msr icc_pmr_el1, x9",
            "mov x9, #1",
            "msr icc_igrpen1_el1, x9",
            "isb",
            $($line),+
        )
    };
}

/// The machine.
pub struct Machine {
    /// The device.
    pub system: System,
    /// The virtual machine.
    pub vm: Vm,
    /// Its address space.
    pub space: AddressSpace,
    /// The RAM.
    pub ram: Arc<Memory>,
    /// The RAM's mapping.
    pub slots: Vec<Slot<Memory>>,
    /// The vCPU.
    pub vcpu: Vcpu,
}

/// Opens the device; without hardware that could run anything, the case is skipped.
///
/// # Errors
/// A failure, or the reason to skip.
pub fn open() -> Result<System, Stop> {
    let system = System::open()?;
    let info = system.info()?;
    ensure_eq!(info.arch, ARCH_AARCH64, "architecture");
    if info.backend == BACKEND_NONE {
        return Err(Stop::Skip("the host kernel does not run at EL2".into()));
    }
    if info.status == STATUS_TOO_OLD {
        return Err(Stop::Skip("the host lacks something that the module needs".into()));
    }
    ensure_eq!(info.status, STATUS_READY, "status of the module");
    Ok(system)
}

/// The same, under the name that it has where there is another hypervisor to choose.
///
/// # Errors
/// As [`open`].
pub fn open_axvcpu() -> Result<System, Stop> {
    open()
}

/// Code that does nothing for ever: a branch to itself.
pub const fn spin() -> &'static [u8] {
    &[0x00, 0x00, 0x00, 0x14]
}

impl Machine {
    /// A machine that is about to run `code`.
    ///
    /// # Errors
    /// What a handle reports.
    pub fn new(code: &[u8]) -> Result<Self, Stop> {
        Self::with(code, Apic::None)
    }

    /// A machine with a GIC that is about to run `code`, a [`gic_code!`](crate::gic_code).
    ///
    /// # Errors
    /// What a handle reports.
    pub fn with_gic(code: &[u8]) -> Result<Self, Stop> {
        Self::with(code, Apic::InKernel)
    }

    fn with(code: &[u8], apic: Apic) -> Result<Self, Stop> {
        let system = open()?;
        let vm = system.create_vm()?;
        if apic == Apic::InKernel {
            vm.create_gic(Gic { distributor: GICD, redistributors: GICR, cpus: 4, flags: 0 })?;
        }
        let space = vm.create_address_space()?;
        let ram = Arc::new(Memory::anonymous(RAM_SIZE)?);
        let slots = vec![space.map_all(GuestPhysAddr::new(RAM), Arc::clone(&ram), Permissions::RWX)?];
        let vcpu = Self::vcpu_of(&vm, &space, 0, apic)?;
        let machine = Self { system, vm, space, ram, slots, vcpu };
        machine.write(CODE, code)?;
        // Each vector: HVC with the vector's number.
        for number in 0..16u64 {
            let hvc = 0xd400_0002 | (number as u32) << 5;
            machine.write(VECTORS + 0x80 * number, &hvc.to_le_bytes())?;
        }
        Ok(machine)
    }

    /// vCPU `id` of a machine, at [`CODE`].
    ///
    /// # Errors
    /// What a handle reports.
    pub fn vcpu_of(vm: &Vm, space: &AddressSpace, id: u32, apic: Apic) -> Result<Vcpu, Stop> {
        let mut vcpu = vm.create_vcpu(id)?;
        harness::watch(vcpu.kicker());
        vcpu.set_entry(GuestPhysAddr::new(CODE))?;
        vcpu.set_ept_root(space)?;
        vcpu.setup(apic, &[])?;
        let mut registers: Registers = vcpu.get()?;
        registers.sp_el1 = STACK;
        registers.vbar_el1 = VECTORS;
        registers.cpacr_el1 = 3 << 20; // SIMD and floating point
        vcpu.set(&registers)?;
        let general: General = vcpu.get()?;
        ensure_eq!((general.pc, general.pstate), (CODE, PSTATE_EL1H | PSTATE_DAIF), "where it starts");
        Ok(vcpu)
    }

    /// Copies `data` into the RAM.
    ///
    /// # Errors
    /// If it does not fit.
    pub fn write(&self, at: u64, data: &[u8]) -> CaseResult {
        Ok(self.ram.write((at - RAM) as usize, data)?)
    }

    /// Stores a word in the RAM.
    ///
    /// # Errors
    /// If it does not fit.
    pub fn write_u64(&self, at: u64, value: u64) -> CaseResult {
        Ok(self.ram.write_u64((at - RAM) as usize, value)?)
    }

    /// Reads a word of the RAM.
    ///
    /// # Errors
    /// If it lies outside.
    pub fn read_u64(&self, at: u64) -> Result<u64, Stop> {
        Ok(self.ram.read_u64((at - RAM) as usize)?)
    }

    /// Changes general registers.
    ///
    /// # Errors
    /// What the module refuses.
    pub fn modify(&mut self, change: impl FnOnce(&mut General)) -> CaseResult {
        let mut general: General = self.vcpu.get()?;
        change(&mut general);
        Ok(self.vcpu.set(&general)?)
    }

    /// EL1's registers.
    ///
    /// # Errors
    /// What the module refuses.
    pub fn registers(&self) -> Result<Registers, Stop> {
        Ok(self.vcpu.get()?)
    }

    /// Runs to the next exit that means something.
    ///
    /// # Errors
    /// What `RUN` reports, or that the time is up.
    pub fn run(&mut self) -> Result<Exit, Stop> {
        harness::check_time()?;
        let exit = self.vcpu.run()?;
        if exit.reason == AxVCpuExitReason::Interrupted {
            harness::check_time()?;
        }
        Ok(exit)
    }

    /// Runs to the next exit, which must be `reason`.
    ///
    /// # Errors
    /// If it is another, with the guest's registers.
    pub fn expect(&mut self, reason: AxVCpuExitReason) -> CaseResult {
        let exit = self.run()?;
        if exit.reason == reason {
            return Ok(());
        }
        Err(self.surprised(&format!("{reason:x?}"), &exit.reason))
    }

    /// Runs to the next exit, which must be a hypercall, and returns X0 to X6.
    ///
    /// # Errors
    /// If it is another, with the guest's registers.
    pub fn expect_call(&mut self) -> Result<[u64; 7], Stop> {
        match self.run()?.reason {
            AxVCpuExitReason::Hypercall { nr, args: [a, b, c, d, e, f] } => Ok([nr, a, b, c, d, e, f]),
            other => Err(self.surprised("a hypercall", &other)),
        }
    }

    /// Runs to the `HVC` of exception vector `number` (4: synchronous, from EL1 with SP_EL1; 8: synchronous, from EL0), and
    /// returns EL1's registers.
    ///
    /// # Errors
    /// If something else happens.
    pub fn expect_exception(&mut self, number: u64) -> Result<Registers, Stop> {
        self.expect_call()?;
        let pc = self.vcpu.general().pc;
        ensure!(pc == VECTORS + 0x80 * number + 4, "vector {number}: the PC is at {pc:#x}");
        self.registers()
    }

    fn surprised(&self, expected: &str, found: &AxVCpuExitReason) -> Stop {
        let General { x, pc, pstate, .. } = self.vcpu.general();
        let (esr, far) = self.vcpu.syndrome();
        let mut line = format!(
            "expected exit {expected}, found {found:x?}, with pc={pc:x} pstate={pstate:x} esr={esr:x} far={far:x}"
        );
        for (number, value) in x.iter().enumerate() {
            line += &format!(" x{number}={value:x}");
        }
        Stop::Fail(line)
    }
}
