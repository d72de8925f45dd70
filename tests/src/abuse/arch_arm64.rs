// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the cases of all architectures need to know of AArch64.

use crate::harness::{CaseResult, Stop};
use crate::machine::{Machine, GICD, GICR};
use crate::{code, ensure_eq, gic_code};
use axvcpu_uapi::addr::GuestPhysAddr;
use axvcpu_uapi::arm64::{General, Gic, GIC_SET_SPI};
use axvcpu_uapi::client::{System, Vcpu, Vm};
use axvcpu_uapi::x86::CpuidEntry;

/// The interrupt controller that messages go to.
pub(super) fn interrupt_controller(vm: &Vm) -> CaseResult {
    Ok(vm.create_gic(Gic { distributor: GICD, redistributors: GICR, cpus: 4, flags: 0 })?)
}

/// There is no CPUID.
pub(super) fn cpuid(_system: &System) -> Result<Vec<CpuidEntry>, Stop> {
    Ok(Vec::new())
}

/// An address for interrupt messages.
pub(super) const MSI: u64 = GICD + GIC_SET_SPI;
/// Data of a message.
pub(super) const MSI_DATA: u32 = 0x40;
/// Data of a message that asserts a level: the guest says which do.
pub(super) const MSI_LEVEL: u32 = 0x40;
/// Addresses that no message goes to.
pub(super) const NOT_MSI: [u64; 5] = [0, GICD, GICD + 0x41, GICR + GIC_SET_SPI, MSI | (1 << 32)];
/// IOEVENTFD's flag for writes of which the kernel knows width and value: those to addresses.
pub(super) const KNOWN_WRITES: u32 = 0;
/// Where no vCPU can start.
pub(super) const BAD_ENTRIES: [u64; 4] = [1, 2, 0x1003, u64::MAX];
/// The last page that a process can have anything at, with the widest addresses that there are.
pub(super) const LAST_USER_PAGE: u64 = (1 << 52) - 0x1000;
/// The register set of general registers, and its size.
pub(super) const GENERAL: (u32, u32) = (16, 272);
/// Sizes of register sets, and others.
pub(super) const SET_LENGTHS: [u64; 8] = [272, 272, 216, 528, 0, 1, 271, 144];
/// Numbers of register sets: the first, and how many are worth trying.
pub(super) const SETS: (u64, u64) = (15, 5);

/// General registers that no vCPU can have: AArch32's.
pub(super) fn forbidden() -> General {
    General { pstate: 0x10, ..General::default() }
}

/// Where the vCPU is about to execute.
pub(super) fn position(vcpu: &Vcpu) -> Result<u64, Stop> {
    Ok(vcpu.get::<General>()?.pc)
}

/// Code that stores to guest physical address 0x5000 for ever: MOV X1, #0x5000; STR X1, [X1]; B to the store.
pub(super) const STORES: &[u8] = &[0x01, 0x00, 0x8a, 0xd2, 0x21, 0x00, 0x00, 0xf9, 0xff, 0xff, 0xff, 0x17];

/// Has the vCPU go on at `addr`.
pub(super) fn go_to(vcpu: &mut Vcpu, addr: GuestPhysAddr) -> CaseResult {
    let general: General = vcpu.get()?;
    Ok(vcpu.set(&General { pc: addr.as_u64(), ..general })?)
}

/// A guest runs as ever, and is interrupted.
pub(super) fn guest_runs() -> CaseResult {
    let mut m = Machine::with_gic(gic_code!(afterwards, "msr daifclr, #2", "mov x0, #0x5a", "hvc #0", "b ."))?;
    m.write(crate::machine::VECTORS + 0x280, code!(taken, "mrs x0, icc_iar1_el1", "hvc #1"))?;
    ensure_eq!(m.expect_call()?[0], 0x5a, "the guest's call");
    m.vm.signal_msi(MSI, 40)?;
    ensure_eq!(m.expect_call()?[0], 40, "the guest's interrupt");
    Ok(())
}
