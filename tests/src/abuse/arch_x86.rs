// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the cases of all architectures need to know of x86.

use crate::code;
use crate::harness::{CaseResult, Stop};
use crate::machine::{Machine, Mode};
use axvcpu_uapi::addr::GuestPhysAddr;
use axvcpu_uapi::client::{System, Vcpu, Vm};
use axvcpu_uapi::x86::{CpuidEntry, General, Segments};

/// The interrupt controllers that messages go to are the vCPUs' own.
pub(super) fn interrupt_controller(_vm: &Vm) -> CaseResult {
    Ok(())
}

/// A CPUID table that vCPUs can be set up with.
pub(super) fn cpuid(system: &System) -> Result<Vec<CpuidEntry>, Stop> {
    Ok(system.supported_cpuid()?)
}

/// An address for interrupt messages.
pub(super) const MSI: u64 = 0xfee0_0000;
/// Data of a message.
pub(super) const MSI_DATA: u32 = 0x40;
/// Data of a message that asserts a level.
pub(super) const MSI_LEVEL: u32 = 0xc040;
/// Addresses that no message goes to.
pub(super) const NOT_MSI: [u64; 5] = [0, 0x1000, 0xfed0_0000, 0xfef0_0000, 0xfee0_0000 | (1 << 32)];
/// IOEVENTFD's flag for writes of which the kernel knows width and value: those to ports.
pub(super) const KNOWN_WRITES: u32 = axvcpu_uapi::vm::IOEVENTFD_PORT;
/// Where no vCPU can start.
pub(super) const BAD_ENTRIES: [u64; 4] = [1 << 32, 1 << 52, 1 << 63, u64::MAX];
/// The last page that a process can have anything at.
pub(super) const LAST_USER_PAGE: u64 = 0x7fff_ffff_f000;
/// The register set of general registers, and its size.
pub(super) const GENERAL: (u32, u32) = (1, 144);
/// Sizes of register sets, and others.
pub(super) const SET_LENGTHS: [u64; 12] = [144, 160, 64, 48, 16, 2048, 56, 256, 0, 1, 832, 576];
/// Numbers of register sets: the first, and how many are worth trying.
pub(super) const SETS: (u64, u64) = (0, 10);

/// General registers that no vCPU can have.
pub(super) fn forbidden() -> General {
    General { rflags: 1 << 63, ..General::default() }
}

/// Where the vCPU is about to execute.
pub(super) fn position(vcpu: &Vcpu) -> Result<u64, Stop> {
    let segments: Segments = vcpu.get()?;
    let general: General = vcpu.get()?;
    Ok(segments.cs.base + general.rip)
}

/// Code that stores to guest physical address 0x5000 for ever.
pub(super) const STORES: &[u8] = &[0xa3, 0x00, 0x50, 0xeb, 0xfe];

/// Has the vCPU go on at `addr`.
pub(super) fn go_to(vcpu: &mut Vcpu, addr: GuestPhysAddr) -> CaseResult {
    let mut general: General = vcpu.get()?;
    let segments: Segments = vcpu.get()?;
    general.rip = addr.as_u64() - segments.cs.base;
    Ok(vcpu.set(&general)?)
}

/// A guest runs as ever.
pub(super) fn guest_runs() -> CaseResult {
    let mut m = Machine::new(Mode::Long, code!(afterwards, 64, "mov al, 0x5a", "out 0x80, al", "hlt"))?;
    m.expect_out(0x80, axvcpu_uapi::exit::AccessWidth::Byte, 0x5a)?;
    m.expect_halt()
}
