// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! Instructions of the host CPU, and the registers that `aarch64-cpu` does not have. All of the crate's privileged
//! instructions are here, but for the world switch (`switch.rs`); nothing in this file decides anything.
//!
//! Registers that not every CPU has are named by their encoding, so that the assembler does not refuse them.

use core::arch::asm;

/// Declares registers by the name or encoding that the assembler knows: `NAME = "encoding"`.
macro_rules! registers {
    ($($(#[$meta:meta])* $name:ident = $encoding:literal;)*) => {
        $(
            $(#[$meta])*
            pub(crate) struct $name;

            #[allow(dead_code)] // Some are only read, some only written.
            impl $name {
                /// Reads it.
                ///
                /// # Safety
                /// At EL2, on a CPU that has it.
                #[inline]
                pub(crate) unsafe fn get(self) -> u64 {
                    let value;
                    // SAFETY: The caller's promise; none of these changes anything by being read.
                    unsafe { asm!(concat!("mrs {}, ", $encoding), out(reg) value, options(nostack, preserves_flags)) };
                    value
                }

                /// Writes it. A context synchronisation is the caller's affair.
                ///
                /// # Safety
                /// At EL2, on a CPU that has it, and the caller answers for what the value does to the host.
                #[inline]
                pub(crate) unsafe fn set(self, value: u64) {
                    // SAFETY: The caller's promise.
                    unsafe { asm!(concat!("msr ", $encoding, ", {}"), in(reg) value, options(nostack, preserves_flags)) };
                }
            }
        )*
    };
}

registers! {
    // EL1's registers from EL2 with HCR_EL2.E2H set (Arm ARM D8.10, "Virtualization Host Extensions").
    /// SCTLR_EL12.
    SctlrEl12 = "S3_5_C1_C0_0";
    /// CPACR_EL12.
    CpacrEl12 = "S3_5_C1_C0_2";
    /// TTBR0_EL12.
    Ttbr0El12 = "S3_5_C2_C0_0";
    /// TTBR1_EL12.
    Ttbr1El12 = "S3_5_C2_C0_1";
    /// TCR_EL12.
    TcrEl12 = "S3_5_C2_C0_2";
    /// SPSR_EL12.
    SpsrEl12 = "S3_5_C4_C0_0";
    /// ELR_EL12.
    ElrEl12 = "S3_5_C4_C0_1";
    /// AFSR0_EL12.
    Afsr0El12 = "S3_5_C5_C1_0";
    /// AFSR1_EL12.
    Afsr1El12 = "S3_5_C5_C1_1";
    /// ESR_EL12.
    EsrEl12 = "S3_5_C5_C2_0";
    /// FAR_EL12.
    FarEl12 = "S3_5_C6_C0_0";
    /// MAIR_EL12.
    MairEl12 = "S3_5_C10_C2_0";
    /// AMAIR_EL12.
    AmairEl12 = "S3_5_C10_C3_0";
    /// VBAR_EL12.
    VbarEl12 = "S3_5_C12_C0_0";
    /// CONTEXTIDR_EL12.
    ContextidrEl12 = "S3_5_C13_C0_1";
    /// CNTKCTL_EL12.
    CntkctlEl12 = "S3_5_C14_C1_0";
    /// CNTV_CTL_EL02.
    CntvCtlEl02 = "S3_5_C14_C3_1";
    /// CNTV_CVAL_EL02.
    CntvCvalEl02 = "S3_5_C14_C3_2";

    /// SP_EL1.
    SpEl1 = "sp_el1";
    /// TPIDR_EL1.
    TpidrEl1 = "tpidr_el1";
    /// PAR_EL1.
    ParEl1 = "par_el1";
    /// CSSELR_EL1.
    CsselrEl1 = "csselr_el1";
    /// HSTR_EL2.
    HstrEl2 = "hstr_el2";
    /// VPIDR_EL2.
    VpidrEl2 = "vpidr_el2";
    /// HCRX_EL2 (FEAT_HCX).
    HcrxEl2 = "S3_4_C1_C2_2";
    /// HFGRTR_EL2 (FEAT_FGT).
    HfgrtrEl2 = "S3_4_C1_C1_4";
    /// HFGWTR_EL2 (FEAT_FGT).
    HfgwtrEl2 = "S3_4_C1_C1_5";
    /// HFGITR_EL2 (FEAT_FGT).
    HfgitrEl2 = "S3_4_C1_C1_6";
    /// HDFGRTR_EL2 (FEAT_FGT).
    HdfgrtrEl2 = "S3_4_C3_C1_4";
    /// HDFGWTR_EL2 (FEAT_FGT).
    HdfgwtrEl2 = "S3_4_C3_C1_5";
    /// HFGRTR2_EL2 (FEAT_FGT2).
    Hfgrtr2El2 = "S3_4_C3_C1_2";
    /// HFGWTR2_EL2 (FEAT_FGT2).
    Hfgwtr2El2 = "S3_4_C3_C1_3";
    /// HFGITR2_EL2 (FEAT_FGT2).
    Hfgitr2El2 = "S3_4_C3_C1_7";
    /// HDFGRTR2_EL2 (FEAT_FGT2).
    Hdfgrtr2El2 = "S3_4_C3_C1_0";
    /// HDFGWTR2_EL2 (FEAT_FGT2).
    Hdfgwtr2El2 = "S3_4_C3_C1_1";
    /// MPAM2_EL2 (FEAT_MPAM).
    Mpam2El2 = "S3_4_C10_C5_0";
    /// ICC_SRE_EL2 (GICv3).
    IccSreEl2 = "S3_4_C12_C9_5";
    /// ICC_SRE_EL1 (GICv3).
    IccSreEl1 = "S3_0_C12_C12_5";
    /// ICC_PMR_EL1 (GICv3).
    IccPmrEl1 = "S3_0_C4_C6_0";
    /// ICH_HCR_EL2 (GICv3).
    IchHcrEl2 = "S3_4_C12_C11_0";
    /// ICH_VTR_EL2 (GICv3).
    IchVtrEl2 = "S3_4_C12_C11_1";
    /// ICH_VMCR_EL2 (GICv3).
    IchVmcrEl2 = "S3_4_C12_C11_7";
    /// ICH_AP0R0_EL2 (GICv3, 5 bits of preemption or more).
    IchAp0R0El2 = "S3_4_C12_C8_0";
    /// ICH_AP0R1_EL2 (GICv3, 6 bits).
    IchAp0R1El2 = "S3_4_C12_C8_1";
    /// ICH_AP0R2_EL2 (GICv3, 7 bits).
    IchAp0R2El2 = "S3_4_C12_C8_2";
    /// ICH_AP0R3_EL2 (GICv3, 7 bits).
    IchAp0R3El2 = "S3_4_C12_C8_3";
    /// ICH_AP1R0_EL2 (GICv3, 5 bits of preemption or more).
    IchAp1R0El2 = "S3_4_C12_C9_0";
    /// ICH_AP1R1_EL2 (GICv3, 6 bits).
    IchAp1R1El2 = "S3_4_C12_C9_1";
    /// ICH_AP1R2_EL2 (GICv3, 7 bits).
    IchAp1R2El2 = "S3_4_C12_C9_2";
    /// ICH_AP1R3_EL2 (GICv3, 7 bits).
    IchAp1R3El2 = "S3_4_C12_C9_3";
    /// ICH_LR0_EL2 (GICv3).
    IchLr0El2 = "S3_4_C12_C12_0";
    /// ICH_LR1_EL2 (GICv3).
    IchLr1El2 = "S3_4_C12_C12_1";
    /// ICH_LR2_EL2 (GICv3).
    IchLr2El2 = "S3_4_C12_C12_2";
    /// ICH_LR3_EL2 (GICv3).
    IchLr3El2 = "S3_4_C12_C12_3";
    /// ICH_LR4_EL2 (GICv3).
    IchLr4El2 = "S3_4_C12_C12_4";
    /// ICH_LR5_EL2 (GICv3).
    IchLr5El2 = "S3_4_C12_C12_5";
    /// ICH_LR6_EL2 (GICv3).
    IchLr6El2 = "S3_4_C12_C12_6";
    /// ICH_LR7_EL2 (GICv3).
    IchLr7El2 = "S3_4_C12_C12_7";
    /// ICH_LR8_EL2 (GICv3).
    IchLr8El2 = "S3_4_C12_C13_0";
    /// ICH_LR9_EL2 (GICv3).
    IchLr9El2 = "S3_4_C12_C13_1";
    /// ICH_LR10_EL2 (GICv3).
    IchLr10El2 = "S3_4_C12_C13_2";
    /// ICH_LR11_EL2 (GICv3).
    IchLr11El2 = "S3_4_C12_C13_3";
    /// ICH_LR12_EL2 (GICv3).
    IchLr12El2 = "S3_4_C12_C13_4";
    /// ICH_LR13_EL2 (GICv3).
    IchLr13El2 = "S3_4_C12_C13_5";
    /// ICH_LR14_EL2 (GICv3).
    IchLr14El2 = "S3_4_C12_C13_6";
    /// ICH_LR15_EL2 (GICv3).
    IchLr15El2 = "S3_4_C12_C13_7";

    // Parts of the processor state.
    /// PAN (FEAT_PAN).
    Pan = "S3_0_C4_C2_3";
    /// UAO (FEAT_UAO).
    Uao = "S3_0_C4_C2_4";
    /// DIT (FEAT_DIT).
    Dit = "S3_3_C4_C2_5";
    /// SSBS (FEAT_SSBS2).
    Ssbs = "S3_3_C4_C2_6";
    /// TCO (FEAT_MTE).
    Tco = "S3_3_C4_C2_7";

    /// ID_AA64PFR0_EL1.
    IdPfr0 = "S3_0_C0_C4_0";
    /// ID_AA64PFR1_EL1.
    IdPfr1 = "S3_0_C0_C4_1";
    /// ID_AA64DFR0_EL1.
    IdDfr0 = "S3_0_C0_C5_0";
    /// ID_AA64ISAR0_EL1.
    IdIsar0 = "S3_0_C0_C6_0";
    /// ID_AA64ISAR1_EL1.
    IdIsar1 = "S3_0_C0_C6_1";
    /// ID_AA64ISAR2_EL1.
    IdIsar2 = "S3_0_C0_C6_2";
    /// ID_AA64MMFR0_EL1.
    IdMmfr0 = "S3_0_C0_C7_0";
    /// ID_AA64MMFR1_EL1.
    IdMmfr1 = "S3_0_C0_C7_1";
    /// ID_AA64MMFR2_EL1.
    IdMmfr2 = "S3_0_C0_C7_2";
}

/// The ID register at CRm and op2, 0 for one that says nothing to us. The CPU is at EL1 or above.
pub(crate) fn id_register(crm: u64, op2: u64) -> u64 {
    // SAFETY: Every CPU of AArch64 has the whole space of ID registers, readable from EL1 on.
    unsafe {
        match (crm, op2) {
            (4, 0) => IdPfr0.get(),
            (4, 1) => IdPfr1.get(),
            (5, 0) => IdDfr0.get(),
            (6, 0) => IdIsar0.get(),
            (6, 1) => IdIsar1.get(),
            (6, 2) => IdIsar2.get(),
            (7, 0) => IdMmfr0.get(),
            (7, 1) => IdMmfr1.get(),
            (7, 2) => IdMmfr2.get(),
            _ => 0,
        }
    }
}

/// Context synchronisation: what was written to system registers holds from here on.
#[inline]
pub(crate) fn isb() {
    // SAFETY: A barrier.
    unsafe { asm!("isb", options(nostack, preserves_flags)) };
}

/// Waits until earlier stores, table entries among them, are seen by the walks of all CPUs.
#[inline]
pub fn barrier_for_tables() {
    // SAFETY: A barrier.
    unsafe { asm!("dsb ishst", options(nostack, preserves_flags)) };
}

/// Masks debug exceptions, SError, IRQ and FIQ, and returns how they were.
///
/// # Safety
/// At EL1 or above; [`restore_exceptions`] follows.
#[inline]
pub(crate) unsafe fn mask_exceptions() -> u64 {
    let daif;
    // SAFETY: The caller's promise.
    unsafe { asm!("mrs {}, daif", "msr daifset, #15", out(reg) daif, options(nostack, preserves_flags)) };
    daif
}

/// Sets the masks as they were.
///
/// # Safety
/// Pairs with [`mask_exceptions`].
#[inline]
pub(crate) unsafe fn restore_exceptions(daif: u64) {
    // SAFETY: The caller's promise.
    unsafe { asm!("msr daif, {}", in(reg) daif, options(nostack, preserves_flags)) };
}

/// Drops all translations, of both stages, of the VMID in VTTBR_EL2 from this CPU's TLB.
///
/// # Safety
/// At EL2 with VTTBR_EL2 loaded and HCR_EL2.TGE clear, both synchronised.
#[inline]
pub(crate) unsafe fn flush_guest_tlb() {
    // SAFETY: The caller's promise. The barrier before makes the walks see what was stored to the tables, the ones behind
    // wait for the invalidation.
    unsafe { asm!("dsb nshst", "tlbi vmalls12e1", "dsb nsh", "isb", options(nostack, preserves_flags)) };
}

/// The guest physical page of a guest virtual address, by EL1's stage 1 as it is loaded. `None` if it has no translation.
///
/// # Safety
/// At EL2 with the guest's EL1 registers loaded, HCR_EL2.TGE clear, and PAR_EL1 the caller's to change.
pub(crate) unsafe fn translate(addr: u64, write: bool) -> Option<u64> {
    // SAFETY: The caller's promise; address translation faults are reported in PAR_EL1.
    let par = unsafe {
        if write {
            asm!("at s1e1w, {}", in(reg) addr, options(nostack, preserves_flags));
        } else {
            asm!("at s1e1r, {}", in(reg) addr, options(nostack, preserves_flags));
        }
        isb();
        ParEl1.get()
    };
    // PAR_EL1.F, and the address in bits 51:12.
    (par & 1 == 0).then_some(par & 0x000f_ffff_ffff_f000)
}

/// Cleans and invalidates the data caches for `size` bytes at `addr`, down to main memory, and drops what instruction caches
/// hold of them: a guest may access them with its caches off, and may fetch from them.
///
/// # Safety
/// The range is mapped memory of the kernel's.
pub unsafe fn clean_and_invalidate(addr: *const u8, size: usize) {
    let ctr: u64;
    // SAFETY: CTR_EL0 is readable from EL1 on.
    unsafe { asm!("mrs {}, ctr_el0", out(reg) ctr, options(nomem, nostack, preserves_flags)) };
    // DminLine (bits 19:16): log2 of the words of the smallest line of any data cache.
    let line = 4usize << (ctr >> 16 & 15);
    let mut at = addr as usize & !line.wrapping_sub(1);
    let end = (addr as usize).wrapping_add(size);
    while at < end {
        // SAFETY: Cache maintenance of mapped memory changes no contents.
        unsafe { asm!("dc civac, {}", in(reg) at, options(nostack, preserves_flags)) };
        at = at.wrapping_add(line);
    }
    // SAFETY: Barriers and the invalidation of instruction caches, of all CPUs.
    unsafe { asm!("dsb ish", "ic ialluis", "dsb ish", "isb", options(nostack, preserves_flags)) };
}
