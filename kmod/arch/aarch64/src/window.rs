// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! What is loaded into the CPU for a stretch of entries with interrupts off, and what of the host's is put back behind it.
//!
//! KVM is built into the kernel and hands out every VMID without asking us. It leaves nothing live between the stretches of its
//! own vCPUs, but entries of its guests may be in the TLB. So all our guests have one and the same VMID, of which this CPU's
//! TLB is cleared on both edges: neither can a guest of ours meet a translation of KVM's, nor the other way round, nor
//! can two of ours meet each other's. TLBs are not shared between CPUs, as VTTBR_EL2.CnP is clear.
//!
//! EL1's registers (under their _EL12 names), SP_EL1 and TPIDR_EL1 mean nothing to a host at EL2; VTTBR_EL2 and VTCR_EL2 are not
//! looked at while HCR_EL2.TGE is set. They stay as the guest left them. KVM loads all of them for each vCPU.

use aarch64_cpu::registers::{
    Readable, Writeable, CNTHCTL_EL2, CNTVOFF_EL2, CPTR_EL2, HCR_EL2, MDCR_EL2, MDSCR_EL1, MIDR_EL1, TPIDRRO_EL0,
    TPIDR_EL0, VBAR_EL2, VMPIDR_EL2, VTCR_EL2, VTTBR_EL2,
};
use axvcpu_uapi::arm64::{Fp, System};

use crate::caps::Capabilities;
use crate::cpu::{self, *};
use crate::switch;
use crate::timer::{self, Timer};

/// The VMID of all our guests.
const VMID: u8 = 0xff;

/// HCR_EL2 while a guest is loaded (Arm ARM D24.2.60), but for E2H, which is the host's.
const HCR_GUEST: u64 = {
    const VM: u64 = 1 << 0;
    /// Set/way cache maintenance by invalidation cleans too; walks to device memory fault.
    const SWIO_PTW: u64 = 1 << 1 | 1 << 2;
    /// IRQ, FIQ and SError come to EL2.
    const FMO_IMO_AMO: u64 = 7 << 3;
    /// Maintenance that a guest means for its CPU reaches wherever it has run: broadcast in the inner shareable domain.
    const FB_BSU: u64 = 1 << 9 | 1 << 10;
    const TWI: u64 = 1 << 13;
    const TWE: u64 = 1 << 14;
    /// ID registers of group 1 and 3, and GMID_EL1.
    const TID1_TID3_TID5: u64 = 1 << 16 | 1 << 18 | 1 << 58;
    const TSC: u64 = 1 << 19;
    /// What is the implementation's own, and ACTLR_EL1.
    const TIDCP_TACR: u64 = 1 << 20 | 1 << 21;
    /// Cache maintenance by set and way.
    const TSW: u64 = 1 << 22;
    /// EL1 is AArch64.
    const RW: u64 = 1 << 31;
    /// LORegions and error records.
    const TLOR_TERR: u64 = 1 << 35 | 1 << 36;
    // Clear, so that it traps or is undefined: pointer authentication (APK, API), SCXTNUM (EnSCXT), MTE (ATA).
    VM | SWIO_PTW | FMO_IMO_AMO | FB_BSU | TWI | TWE | TID1_TID3_TID5 | TSC | TIDCP_TACR | TSW | RW | TLOR_TERR
};

/// HCR_EL2.E2H.
const HCR_E2H: u64 = 1 << 34;

/// CPTR_EL2 with E2H: SIMD and floating point allowed (FPEN, bits 21:20), SVE (ZEN), SME (SMEN), trace (TTA) and POR_EL0 (E0POE)
/// trapped.
const CPTR_GUEST: u64 = 3 << 20 | 1 << 28;
/// CPTR_EL2.TAM, with FEAT_AMUv1: the activity monitors are trapped.
const CPTR_TAM: u64 = 1 << 30;

/// MDCR_EL2: number of counters and their enable bit, which stay the host's.
const MDCR_HOST: u64 = 0x1f | 1 << 7;
/// MDCR_EL2: PMU (TPMCR, TPM), debug (TDA, TDOSA, TDRA), profiling (TPMS) and trace (TTRF) trapped. Profiling and trace buffers
/// (E2PB, E2TB) belong to EL2.
const MDCR_GUEST: u64 = 1 << 5 | 1 << 6 | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 14 | 1 << 19;

/// CNTHCTL_EL2 with E2H: EL1PCTEN and EL1PTEN, which let a guest at the physical counter and timer.
const CNTHCTL_PHYSICAL: u64 = 3 << 10;

/// HSTR_EL2: AArch32 is not offered, so all that EL0 could reach by it is trapped.
const HSTR_GUEST: u64 = 1 << 15;

/// ICC_SRE_EL2.Enable: EL1 may access ICC_SRE_EL1. Where that register is constant, so is the bit.
const ICC_SRE_ENABLE: u64 = 1 << 3;
/// ICH_HCR_EL2: the guest's accesses to its CPU interface are trapped: common registers, groups 0 and 1.
const ICH_HCR_TRAP: u64 = 1 << 10 | 1 << 11 | 1 << 12;

/// ICC_PMR_EL1 that lets every interrupt of Linux through. With pseudo-NMIs (`irqchip.gicv3_pseudo_nmi`), interrupts are off by
/// this register, where it would keep them from ending the guest's turn; otherwise Linux leaves it at this.
const ALL_PRIORITIES: u64 = 0xf0;

/// What the host has in the registers that a window changes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct HostState {
    daif: u64,
    pub(crate) hcr: u64,
    pub(crate) vbar: u64,
    cptr: u64,
    mdcr: u64,
    mdscr: u64,
    cnthctl: u64,
    cntvoff: u64,
    tpidr_el0: u64,
    tpidrro_el0: u64,
    par: u64,
    csselr: u64,
    hstr: u64,
    hcrx: u64,
    fgt: [u64; 5],
    fgt2: [u64; 5],
    mpam2: u64,
    icc_sre: u64,
    ich_hcr: u64,
    icc_pmr: u64,
    pstate: [u64; 5],
    /// The guest's timer was loaded with a mask that is not the guest's.
    timer_masked: bool,
}

/// What a window is about, beside the registers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Setting {
    /// VTTBR_EL2 but for the VMID.
    pub(crate) root: vcpu_core::HostPhysAddr,
    /// The host's counter when the guest's is 0.
    pub(crate) counter_origin: u64,
}

/// How often the counter counts in a second.
#[inline]
pub(crate) fn counter_hertz() -> u64 {
    aarch64_cpu::registers::CNTFRQ_EL0.get()
}

/// The host's counter.
#[inline]
pub fn counter() -> u64 {
    aarch64_cpu::registers::CNTPCT_EL0.get()
}

/// Loads the guest. Until [`leave`] the CPU's exceptions are masked, and nothing may be done that needs interrupts, the FPU,
/// or user memory.
///
/// With `mask_timer` the guest's timer gets a mask that is not the guest's: an interrupt that is due would end the guest's turn
/// as soon as it begins.
///
/// # Safety
/// At EL2 on a CPU of these capabilities, preemption and interrupts off, and the FPU lent to us.
pub(crate) unsafe fn load(
    caps: &Capabilities,
    setting: &Setting,
    system: &System,
    fp: &Fp,
    host: &mut HostState,
    mask_timer: bool,
) {
    // SAFETY: The caller's promise, for every access below: the registers are there by the capabilities asked, and `leave`
    // puts the host's values back before anything of the host's can depend on them.
    unsafe {
        host.daif = cpu::mask_exceptions();
        host.hcr = HCR_EL2.get();
        host.vbar = VBAR_EL2.get();
        host.cptr = CPTR_EL2.get();
        host.mdcr = MDCR_EL2.get();
        host.mdscr = MDSCR_EL1.get();
        host.cnthctl = CNTHCTL_EL2.get();
        host.cntvoff = CNTVOFF_EL2.get();
        host.tpidr_el0 = TPIDR_EL0.get();
        host.tpidrro_el0 = TPIDRRO_EL0.get();
        host.par = ParEl1.get();
        host.csselr = CsselrEl1.get();
        host.hstr = HstrEl2.get();
        host.icc_sre = IccSreEl2.get();
        host.ich_hcr = IchHcrEl2.get();
        host.icc_pmr = IccPmrEl1.get();
        host.pstate = processor_state(caps);

        SctlrEl12.set(system.sctlr_el1);
        CpacrEl12.set(system.cpacr_el1);
        Ttbr0El12.set(system.ttbr0_el1);
        Ttbr1El12.set(system.ttbr1_el1);
        TcrEl12.set(system.tcr_el1);
        EsrEl12.set(system.esr_el1);
        Afsr0El12.set(system.afsr0_el1);
        Afsr1El12.set(system.afsr1_el1);
        FarEl12.set(system.far_el1);
        MairEl12.set(system.mair_el1);
        AmairEl12.set(system.amair_el1);
        VbarEl12.set(system.vbar_el1);
        ContextidrEl12.set(system.contextidr_el1);
        CntkctlEl12.set(system.cntkctl_el1);
        ElrEl12.set(system.elr_el1);
        SpsrEl12.set(system.spsr_el1);
        SpEl1.set(system.sp_el1);
        TpidrEl1.set(system.tpidr_el1);
        TPIDR_EL0.set(system.tpidr_el0);
        TPIDRRO_EL0.set(system.tpidrro_el0);
        ParEl1.set(system.par_el1);
        CsselrEl1.set(system.csselr_el1);
        VpidrEl2.set(MIDR_EL1.get());
        VMPIDR_EL2.set(system.mpidr_el1);

        CNTVOFF_EL2.set(setting.counter_origin);
        CntvCvalEl02.set(system.cntv_cval_el0);
        host.timer_masked = mask_timer;
        CntvCtlEl02.set(system.cntv_ctl_el0 | if host.timer_masked { timer::IMASK } else { 0 });

        VTCR_EL2.set(caps.shape.vtcr());
        VTTBR_EL2.set(caps.shape.vttbr(setting.root, VMID));
        MDCR_EL2.set(host.mdcr & MDCR_HOST | MDCR_GUEST);
        MDSCR_EL1.set(0);
        CNTHCTL_EL2.set(host.cnthctl & !CNTHCTL_PHYSICAL);
        HstrEl2.set(HSTR_GUEST);
        IccSreEl2.set(host.icc_sre & !ICC_SRE_ENABLE);
        IchHcrEl2.set(ICH_HCR_TRAP);
        if host.icc_pmr != ALL_PRIORITIES {
            IccPmrEl1.set(ALL_PRIORITIES);
        }
        load_optional_traps(caps, host);
        CPTR_EL2.set(CPTR_GUEST | if caps.amu { CPTR_TAM } else { 0 });
        cpu::isb();
        switch::load_fp(fp);
        HCR_EL2.set(host.hcr & HCR_E2H | HCR_GUEST);
        cpu::isb();
        cpu::flush_guest_tlb();
    }
}

/// Saves the guest, puts the host back, and unmasks exceptions as they were. VBAR_EL2 and the processor state are the host's since the
/// last exit.
///
/// # Safety
/// On the CPU and after the [`load`] that filled `host`.
pub(crate) unsafe fn leave(caps: &Capabilities, system: &mut System, fp: &mut Fp, host: &HostState) {
    // SAFETY: The caller's promise: these are the registers that `load` has written, with the host's values.
    unsafe {
        // While its VMID is loaded.
        cpu::flush_guest_tlb();

        system.sctlr_el1 = SctlrEl12.get();
        system.cpacr_el1 = CpacrEl12.get();
        system.ttbr0_el1 = Ttbr0El12.get();
        system.ttbr1_el1 = Ttbr1El12.get();
        system.tcr_el1 = TcrEl12.get();
        system.esr_el1 = EsrEl12.get();
        system.afsr0_el1 = Afsr0El12.get();
        system.afsr1_el1 = Afsr1El12.get();
        system.far_el1 = FarEl12.get();
        system.mair_el1 = MairEl12.get();
        system.amair_el1 = AmairEl12.get();
        system.vbar_el1 = VbarEl12.get();
        system.contextidr_el1 = ContextidrEl12.get();
        system.cntkctl_el1 = CntkctlEl12.get();
        system.elr_el1 = ElrEl12.get();
        system.spsr_el1 = SpsrEl12.get();
        system.sp_el1 = SpEl1.get();
        system.tpidr_el1 = TpidrEl1.get();
        system.tpidr_el0 = TPIDR_EL0.get();
        system.tpidrro_el0 = TPIDRRO_EL0.get();
        system.par_el1 = ParEl1.get();
        system.csselr_el1 = CsselrEl1.get();

        // The timer must not fire for nobody: its interrupt is KVM's.
        let timer = timer_loaded(host);
        CntvCtlEl02.set(0);
        system.cntv_cval_el0 = timer.compare;
        system.cntv_ctl_el0 = timer.control;

        switch::save_fp(fp);
        HCR_EL2.set(host.hcr);
        cpu::isb();
        CPTR_EL2.set(host.cptr);
        MDCR_EL2.set(host.mdcr);
        MDSCR_EL1.set(host.mdscr);
        CNTHCTL_EL2.set(host.cnthctl);
        CNTVOFF_EL2.set(host.cntvoff);
        TPIDR_EL0.set(host.tpidr_el0);
        TPIDRRO_EL0.set(host.tpidrro_el0);
        ParEl1.set(host.par);
        CsselrEl1.set(host.csselr);
        HstrEl2.set(host.hstr);
        IchHcrEl2.set(host.ich_hcr);
        IccSreEl2.set(host.icc_sre);
        if host.icc_pmr != ALL_PRIORITIES {
            IccPmrEl1.set(host.icc_pmr);
        }
        leave_optional_traps(caps, host);
        cpu::isb();
        cpu::restore_exceptions(host.daif);
    }
}

/// Puts the parts of the processor state back that an exception to EL2 takes from the guest, or leaves as the guest had them.
/// Right after an exit.
///
/// # Safety
/// On the CPU of the [`load`] that filled `host`.
#[inline]
pub(crate) unsafe fn restore_processor_state(caps: &Capabilities, host: &HostState) {
    let [pan, uao, dit, ssbs, tco] = host.pstate;
    // SAFETY: Each is written only where it is, with what was read from it.
    unsafe {
        if caps.pan {
            Pan.set(pan);
        }
        if caps.uao {
            Uao.set(uao);
        }
        if caps.dit {
            Dit.set(dit);
        }
        if caps.ssbs {
            Ssbs.set(ssbs);
        }
        if caps.mte {
            Tco.set(tco);
        }
    }
}

/// The timer of a guest that is not loaded.
#[inline]
pub(crate) fn timer_of(system: &System) -> Timer {
    Timer { control: system.cntv_ctl_el0, compare: system.cntv_cval_el0 }
}

/// The timer of the guest that is loaded.
///
/// # Safety
/// Between [`load`], which filled `host`, and [`leave`].
#[inline]
pub(crate) unsafe fn timer_loaded(host: &HostState) -> Timer {
    // SAFETY: The caller's promise: the registers are the guest's.
    let (control, compare) = unsafe { (CntvCtlEl02.get() & (timer::ENABLE | timer::IMASK), CntvCvalEl02.get()) };
    Timer { control: if host.timer_masked { control & !timer::IMASK } else { control }, compare }
}

unsafe fn processor_state(caps: &Capabilities) -> [u64; 5] {
    // SAFETY: Each is read only where it is.
    unsafe {
        [
            if caps.pan { Pan.get() } else { 0 },
            if caps.uao { Uao.get() } else { 0 },
            if caps.dit { Dit.get() } else { 0 },
            if caps.ssbs { Ssbs.get() } else { 0 },
            if caps.mte { Tco.get() } else { 0 },
        ]
    }
}

/// Traps of features that not every CPU has. Zero means: none of the features that need an "enable", and no fine-grained trap
/// but for what is newer than the trap's own register (bits that trap when clear).
unsafe fn load_optional_traps(caps: &Capabilities, host: &mut HostState) {
    // SAFETY: Each register is touched only where it is.
    unsafe {
        if caps.hcx {
            host.hcrx = HcrxEl2.get();
            HcrxEl2.set(0);
        }
        if caps.fgt >= 1 {
            host.fgt = [HfgrtrEl2.get(), HfgwtrEl2.get(), HfgitrEl2.get(), HdfgrtrEl2.get(), HdfgwtrEl2.get()];
            set_fgt(&[0; 5]);
        }
        if caps.fgt >= 2 {
            host.fgt2 = [Hfgrtr2El2.get(), Hfgwtr2El2.get(), Hfgitr2El2.get(), Hdfgrtr2El2.get(), Hdfgwtr2El2.get()];
            set_fgt2(&[0; 5]);
        }
        if caps.mpam {
            host.mpam2 = Mpam2El2.get();
            // TRAPMPAM1EL1 and TRAPMPAM0EL1.
            Mpam2El2.set(host.mpam2 | 3 << 48);
        }
    }
}

unsafe fn leave_optional_traps(caps: &Capabilities, host: &HostState) {
    // SAFETY: Each register is touched only where it is.
    unsafe {
        if caps.hcx {
            HcrxEl2.set(host.hcrx);
        }
        if caps.fgt >= 1 {
            set_fgt(&host.fgt);
        }
        if caps.fgt >= 2 {
            set_fgt2(&host.fgt2);
        }
        if caps.mpam {
            Mpam2El2.set(host.mpam2);
        }
    }
}

unsafe fn set_fgt([a, b, c, d, e]: &[u64; 5]) {
    // SAFETY: The caller's: the CPU has FEAT_FGT.
    unsafe {
        HfgrtrEl2.set(*a);
        HfgwtrEl2.set(*b);
        HfgitrEl2.set(*c);
        HdfgrtrEl2.set(*d);
        HdfgwtrEl2.set(*e);
    }
}

unsafe fn set_fgt2([a, b, c, d, e]: &[u64; 5]) {
    // SAFETY: The caller's: the CPU has FEAT_FGT2.
    unsafe {
        Hfgrtr2El2.set(*a);
        Hfgwtr2El2.set(*b);
        Hfgitr2El2.set(*c);
        Hdfgrtr2El2.set(*d);
        Hdfgwtr2El2.set(*e);
    }
}
