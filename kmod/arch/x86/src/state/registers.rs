// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The registers that a backend's hardware structure holds, as the rest of the crate sees them.

use axvcpu_uapi::x86::Segments;

use crate::regs::{efer, segment};

/// Registers that live in the backend's hardware structure.
pub(crate) trait Registers {
    /// A general register, by number; 0 for a number that is none.
    fn gpr(&self, register: usize) -> u64;
    fn set_gpr(&mut self, register: usize, value: u64);
    /// Shows all of them, some twice: the second time counts.
    fn each_gpr(&self, show: impl FnMut(usize, u64));
    fn rip(&self) -> u64;
    fn set_rip(&mut self, value: u64);
    fn rflags(&self) -> u64;
    fn set_rflags(&mut self, value: u64);
    fn cr0(&self) -> u64;
    fn set_cr0(&mut self, value: u64);
    fn cr2(&self) -> u64;
    fn set_cr2(&mut self, value: u64);
    fn cr3(&self) -> u64;
    fn set_cr3(&mut self, value: u64);
    fn cr4(&self) -> u64;
    fn set_cr4(&mut self, value: u64);
    /// EFER as the guest sees it.
    fn efer(&self) -> u64;
    fn set_efer(&mut self, value: u64);
    fn segments(&self) -> Segments;
    /// Sets all segments; the CPL becomes the DPL of SS.
    fn set_segments(&mut self, segments: &Segments);
    /// Attributes of CS.
    fn code(&self) -> u16;
    fn cpl(&self) -> u8;
    fn dr6(&self) -> u64;
    fn set_dr6(&mut self, value: u64);
    fn dr7(&self) -> u64;
    fn set_dr7(&mut self, value: u64);
    /// The interrupt shadow of STI and MOV SS.
    fn shadow(&self) -> bool;
    fn set_shadow(&mut self, shadow: bool);
    /// PAT.
    fn pat(&self) -> u64;
    fn set_pat(&mut self, value: u64);
    /// What the hardware adds to the host's TSC.
    fn set_tsc_offset(&mut self, value: u64);
    /// An MSR that the guest reads and writes directly, if `index` is one.
    fn direct_msr(&self, index: u32) -> Option<u64>;
    /// Sets it; false if `index` is none.
    fn set_direct_msr(&mut self, index: u32, value: u64) -> bool;
    /// SPEC_CTRL.
    fn spec_ctrl(&self) -> u64;
    fn set_spec_ctrl(&mut self, value: u64);
    /// Nothing cached of the guest's translations is to be used again.
    fn flush_tlb(&mut self);
}

/// Whether the vCPU executes 64-bit code.
pub(crate) fn is_long_code(regs: &impl Registers) -> bool {
    regs.efer() & efer::LMA != 0 && regs.code() & segment::L != 0
}
