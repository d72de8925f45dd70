// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! CPUID: what a guest may be given ([`supported`]), the table that a vCPU answers from ([`CpuidTable`]), and the feature bits
//! that its register policy asks for ([`Feature`]).
//!
//! The policy is default deny, leaf by leaf and bit by bit, in `policy`: a bit is offered if the hardware has it and everything
//! that it lets a guest see or change is switched by the backends, or if the module emulates it.
#![forbid(unsafe_code)]

mod policy;
mod table;

pub use core::arch::x86_64::CpuidResult;
pub use policy::{supported, SUPPORTED_XCR0};
pub use table::{CpuidTable, Dynamic, Feature, MAX_ENTRIES};

/// Reads a leaf and sub-leaf of the host's CPUID.
pub type HostCpuid<'a> = &'a dyn Fn(u32, u32) -> CpuidResult;

/// What the backend and the host add to the decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caps {
    /// Bits that a guest may set in XCR0; at most [`SUPPORTED_XCR0`] of it counts.
    pub xcr0: u64,
    /// Width of a guest physical address, in bits.
    pub phys_bits: u32,
    /// Frequency of the guest's TSC, in kHz; 0 if unknown.
    pub tsc_khz: u32,
    /// The backend switches SPEC_CTRL and lets the guest use it and PRED_CMD.
    pub speculation_control: bool,
}

/// No feature, no data.
const ZERO: CpuidResult = CpuidResult { eax: 0, ebx: 0, ecx: 0, edx: 0 };

/// The vendor that leaf 0 names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Vendor {
    /// AMD, and Hygon, which follows it.
    Amd,
    /// Everybody else.
    Intel,
}

impl Vendor {
    fn of(leaf0: &CpuidResult) -> Self {
        // "AuthenticAMD" and "HygonGenuine", in the order EBX, EDX, ECX.
        match (leaf0.ebx, leaf0.edx, leaf0.ecx) {
            (0x6874_7541, 0x6974_6e65, 0x444d_4163) | (0x6f67_7948, 0x6e65_476e, 0x656e_6975) => Self::Amd,
            _ => Self::Intel,
        }
    }
}

#[cfg(test)]
mod tests;
