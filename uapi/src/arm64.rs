// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! Register sets of AArch64.

use crate::layout::abi_struct;

abi_struct! {
    /// General registers, in the order of Linux' `struct user_pt_regs`.
    pub struct General: 272 {
        /// X0 to X30.
        pub x: [u64; 31],
        /// SP_EL0.
        pub sp_el0: u64,
        /// Program counter.
        pub pc: u64,
        /// Processor state, in the format of SPSR_EL2. Only AArch64 at EL0 and EL1.
        pub pstate: u64,
    }
}

/// [`General::pstate`]: EL0.
pub const PSTATE_EL0: u64 = 0b0000;
/// [`General::pstate`]: EL1 with SP_EL0.
pub const PSTATE_EL1T: u64 = 0b0100;
/// [`General::pstate`]: EL1 with SP_EL1.
pub const PSTATE_EL1H: u64 = 0b0101;
/// [`General::pstate`]: the mode's field, with bit 4 set for AArch32, which is not offered.
pub const PSTATE_MODE: u64 = 0b1_1111;
/// [`General::pstate`]: debug exceptions, SError, IRQ and FIQ are masked.
pub const PSTATE_DAIF: u64 = 0b1111 << 6;

abi_struct! {
    /// EL1's system registers, and those of EL0 that software owns.
    pub struct System: 216 {
        /// SP_EL1.
        pub sp_el1: u64,
        /// ELR_EL1.
        pub elr_el1: u64,
        /// SPSR_EL1.
        pub spsr_el1: u64,
        /// SCTLR_EL1.
        pub sctlr_el1: u64,
        /// CPACR_EL1.
        pub cpacr_el1: u64,
        /// TTBR0_EL1.
        pub ttbr0_el1: u64,
        /// TTBR1_EL1.
        pub ttbr1_el1: u64,
        /// TCR_EL1.
        pub tcr_el1: u64,
        /// ESR_EL1.
        pub esr_el1: u64,
        /// AFSR0_EL1.
        pub afsr0_el1: u64,
        /// AFSR1_EL1.
        pub afsr1_el1: u64,
        /// FAR_EL1.
        pub far_el1: u64,
        /// PAR_EL1.
        pub par_el1: u64,
        /// MAIR_EL1.
        pub mair_el1: u64,
        /// AMAIR_EL1.
        pub amair_el1: u64,
        /// VBAR_EL1.
        pub vbar_el1: u64,
        /// CONTEXTIDR_EL1.
        pub contextidr_el1: u64,
        /// TPIDR_EL0.
        pub tpidr_el0: u64,
        /// TPIDRRO_EL0.
        pub tpidrro_el0: u64,
        /// TPIDR_EL1.
        pub tpidr_el1: u64,
        /// CSSELR_EL1.
        pub csselr_el1: u64,
        /// CNTKCTL_EL1.
        pub cntkctl_el1: u64,
        /// CNTV_CTL_EL0 without its status bit.
        pub cntv_ctl_el0: u64,
        /// CNTV_CVAL_EL0.
        pub cntv_cval_el0: u64,
        /// MDSCR_EL1: kept, but without effect, as no debug exception is offered.
        pub mdscr_el1: u64,
        /// MPIDR_EL1. It cannot be changed: what is set must be what was read.
        pub mpidr_el1: u64,
        /// Zero.
        pub reserved: u64,
    }
}

abi_struct! {
    /// SIMD and floating-point registers.
    pub struct Fp: 528 {
        /// V0 to V31, the lower half of each first.
        pub v: [u64; 64],
        /// FPSR.
        pub fpsr: u64,
        /// FPCR.
        pub fpcr: u64,
    }
}

/// Size of a GIC's distributor, in bytes of guest physical address space.
pub const GIC_DISTRIBUTOR_SIZE: u64 = 0x1_0000;
/// Size of a GIC's redistributor for one vCPU, in bytes of guest physical address space: its frame of control registers, then
/// that of SGIs and PPIs.
pub const GIC_REDISTRIBUTOR_SIZE: u64 = 0x2_0000;
/// Number of INTIDs of a GIC: 16 SGIs, 16 PPIs, and SPIs from 32 on.
pub const GIC_INTIDS: u32 = 256;
/// The PPI of the virtual timer, CNTV.
pub const GIC_TIMER_PPI: u32 = 27;
/// Offset of GICD_SETSPI_NSR from the distributor's address. A message to it, whose data is the INTID of an SPI, asserts
/// a level-triggered interrupt, or makes an edge-triggered one pending.
pub const GIC_SET_SPI: u64 = 0x40;
/// Offset of GICD_CLRSPI_NSR. A message to it takes that back.
pub const GIC_CLEAR_SPI: u64 = 0x48;

abi_struct! {
    /// `CREATE_GIC`: a GICv3 (Arm IHI 0069) with one security state, affinity routing, SPIs by message, and no LPIs.
    pub struct Gic: 24 {
        /// Guest physical address of the distributor, a multiple of 64 KiB: [`GIC_DISTRIBUTOR_SIZE`] bytes.
        pub distributor: u64,
        /// Guest physical address of the redistributor of vCPU 0, a multiple of 64 KiB; those of the others follow, each
        /// [`GIC_REDISTRIBUTOR_SIZE`] bytes.
        pub redistributors: u64,
        /// Number of redistributors, from 1 to [`crate::system::SystemInfo::max_vcpus`]: of vCPUs 0 to `cpus` - 1. The last one
        /// says in GICR_TYPER that it is.
        pub cpus: u32,
        /// No flag is defined: zero.
        pub flags: u32,
    }
}

/// The number of a system register in [`SysRegRead`](crate::exit::AxVCpuExitReason::SysRegRead) and
/// [`SysRegWrite`](crate::exit::AxVCpuExitReason::SysRegWrite): the fields of MRS and MSR as in the instruction, op0 in
/// bits 15:14, op1 in 13:11, CRn in 10:7, CRm in 6:3, op2 in 2:0.
pub const fn system_register(op0: u64, op1: u64, crn: u64, crm: u64, op2: u64) -> u64 {
    (op0 & 3) << 14 | (op1 & 7) << 11 | (crn & 15) << 7 | (crm & 15) << 3 | (op2 & 7)
}

#[cfg(test)]
mod tests {
    #[test]
    fn register_numbers_are_those_of_the_instruction() {
        // MRS X0, MIDR_EL1 is 0xd5380000, of which bits 20:5 are 0xc000 with op0 = 3.
        assert_eq!(super::system_register(3, 0, 0, 0, 0), 0xd538_0000 >> 5 & 0xffff);
        // MRS X0, CNTVCT_EL0 is 0xd53be040.
        assert_eq!(super::system_register(3, 3, 14, 0, 2), 0xd53b_e040 >> 5 & 0xffff);
    }
}
