// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! What the host offers: whether its kernel runs at EL2 on a CPU that we know how to use, and what the guests can be given.

use aarch64_cpu::registers::{CurrentEL, Readable, CNTFRQ_EL0};
use vcpu_core::AxError;

use crate::cpu;
use crate::id::IdRegisters;
use crate::stage2::Shape;

/// What the CPU has.
#[derive(Clone, Copy, Debug)]
pub struct Capabilities {
    /// The tables of stage 2.
    pub shape: Shape,
    /// What guests see of it.
    pub ids: IdRegisters,
    /// FEAT_HCX: HCRX_EL2.
    pub(crate) hcx: bool,
    /// FEAT_FGT: the fine-grained traps, and 2 with FEAT_FGT2.
    pub(crate) fgt: u64,
    /// FEAT_MPAM.
    pub(crate) mpam: bool,
    /// FEAT_AMUv1.
    pub(crate) amu: bool,
    pub(crate) pan: bool,
    pub(crate) uao: bool,
    pub(crate) dit: bool,
    /// The register form of PSTATE.SSBS.
    pub(crate) ssbs: bool,
    /// PSTATE.TCO.
    pub(crate) mte: bool,
}

/// Whether vCPUs can run.
///
/// # Errors
/// - [`AxError::NoHardware`]: the kernel does not run at EL2.
/// - [`AxError::Unsupported`]: something is missing; see [`missing_feature`].
pub fn detect() -> Result<(), AxError> {
    if !at_el2() {
        return Err(AxError::NoHardware);
    }
    match missing_feature() {
        None => Ok(()),
        Some(_) => Err(AxError::Unsupported),
    }
}

/// Whether this kernel runs at EL2. Nothing of EL2 may be touched otherwise.
fn at_el2() -> bool {
    CurrentEL.read(CurrentEL::EL) == 2
}

/// What [`detect`] has found wanting, for people.
pub fn missing_feature() -> Option<&'static str> {
    if !at_el2() {
        return Some(
            "a kernel that runs at EL2 (it was started at EL1, has left EL2 by kvm-arm.mode, or the CPU has no Virtualization \
             Host Extensions)",
        );
    }
    // ID_AA64PFR0_EL1.GIC, bits 27:24.
    if cpu::id_register(4, 0) >> 24 & 15 == 0 {
        return Some("a GICv3 or later (its interrupt controller has no system register interface)");
    }
    // SAFETY: The CPU has the register, and we are at EL2. SRE: the system registers are in use.
    if unsafe { cpu::IccSreEl1.get() } & 1 == 0 {
        return Some("a GICv3 or later in use (its interrupt controller is driven as a GICv2)");
    }
    if Shape::widest(cpu::id_register(7, 0)).is_none() {
        return Some("4 KiB pages at stage 2");
    }
    None
}

impl Capabilities {
    /// What the current CPU has.
    ///
    /// # Errors
    /// As [`detect`].
    pub fn host() -> Result<Self, AxError> {
        detect()?;
        let field = |crm, op2, shift: u32| cpu::id_register(crm, op2) >> shift & 15;
        let shape = Shape::widest(cpu::id_register(7, 0)).ok_or(AxError::Unsupported)?;
        Ok(Self {
            shape,
            ids: IdRegisters::new(cpu::id_register, shape.pa_range()),
            hcx: field(7, 1, 40) != 0,
            fgt: field(7, 0, 56),
            mpam: field(4, 0, 40) != 0 || field(4, 1, 16) != 0,
            amu: field(4, 0, 44) != 0,
            pan: field(7, 1, 20) != 0,
            uao: field(7, 2, 4) != 0,
            dit: field(4, 0, 48) != 0,
            ssbs: field(4, 1, 4) >= 2,
            mte: field(4, 1, 8) != 0,
        })
    }
}

/// Frequency of the counter, in kHz.
pub fn counter_khz() -> u32 {
    u32::try_from(CNTFRQ_EL0.get() / 1000).unwrap_or(u32::MAX)
}
