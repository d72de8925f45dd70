// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The trap frame: what the world switch moves between memory and the CPU at each entry and exit. The offsets are those that
//! `switch.rs` uses, by name.

use axvcpu_uapi::arm64::General;

/// The frame.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TrapFrame {
    /// X0 to X30, SP_EL0, PC (ELR_EL2) and processor state (SPSR_EL2) of the guest.
    pub general: General,
    /// Why the guest was left: which of the vectors for exceptions from a lower level, 0 synchronous, 1 IRQ, 2 FIQ, 3
    /// SError; 4 more if it was in AArch32.
    pub vector: u64,
    /// ESR_EL2 at the exit.
    pub esr: u64,
    /// FAR_EL2 at the exit.
    pub far: u64,
    /// HPFAR_EL2 at the exit.
    pub hpfar: u64,
    /// The vectors that are the CPU's while the guest runs.
    pub vectors: u64,
    /// The branches that those vectors overwrite the guest's history by.
    pub branches: u64,
    /// The host's VBAR_EL2, to be put back.
    pub host_vbar: u64,
    /// The host's HCR_EL2, for the case that the world switch itself faults.
    pub host_hcr: u64,
}

impl TrapFrame {
    /// All zero.
    pub const ZERO: Self = Self {
        general: <General as axvcpu_uapi::AbiStruct>::ZERO,
        vector: 0,
        esr: 0,
        far: 0,
        hpfar: 0,
        vectors: 0,
        branches: 0,
        host_vbar: 0,
        host_hcr: 0,
    };

    /// Register `number` as instructions name it: 31 is the zero register.
    #[must_use]
    #[inline]
    pub fn register(&self, number: usize) -> u64 {
        self.general.x.get(number).copied().unwrap_or(0)
    }

    /// Sets register `number`; what goes to the zero register is lost.
    #[inline]
    pub fn set_register(&mut self, number: usize, value: u64) {
        if let Some(register) = self.general.x.get_mut(number) {
            *register = value;
        }
    }

    /// Goes on behind the present instruction.
    #[inline]
    pub fn skip(&mut self) {
        // All instructions of AArch64 are 4 bytes long.
        self.general.pc = self.general.pc.wrapping_add(4);
    }
}
