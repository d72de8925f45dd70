// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The MSRs that the kernel handles, as operating systems need them on AMD's and on Intel's CPUs: one list for both, whatever the
//! vendor. Default deny: what is not listed here exits to userspace, which answers or refuses.
//!
//! Registers that the hardware switches by itself (FS base, STAR, SYSENTER, ...) never exit; they are in
//! [`Registers::direct_msr`].

use x86::msr;

use crate::apic::{self, Effect, MSR_APIC_BASE, MSR_TSC_DEADLINE};
use crate::arch_capabilities::{self, ARCH_CAPABILITIES};
use crate::caps::Capabilities;
use crate::cpuid::{CpuidTable, Feature};
use crate::fault::{GeneralProtection, GuestResult};
use crate::hal::X86Hal;
use crate::mtrr::{is_valid_pat, Mtrr};
use crate::pvclock::PvClock;
use crate::regs::{cr0, cr4};
use crate::state::{Guest, Registers};

const TSC: u32 = msr::IA32_TIME_STAMP_COUNTER;
const PAT: u32 = msr::IA32_PAT;
const EFER: u32 = msr::IA32_EFER;
/// TSC_AUX.
pub(crate) const TSC_AUX: u32 = 0xc000_0103;
const TSC_ADJUST: u32 = 0x3b;
/// SPEC_CTRL.
pub(crate) const SPEC_CTRL: u32 = 0x48;
/// PRED_CMD.
pub(crate) const PRED_CMD: u32 = 0x49;
/// PRED_CMD.IBPB.
pub(crate) const PRED_CMD_IBPB: u64 = 1;
/// FLUSH_CMD (SDM vol. 4, IA32_FLUSH_CMD).
pub(crate) const FLUSH_CMD: u32 = 0x10b;
/// FLUSH_CMD.L1D_FLUSH.
pub(crate) const FLUSH_CMD_L1D: u64 = 1;
const P5_MC_ADDR: u32 = 0x0;
const P5_MC_TYPE: u32 = 0x1;
const PLATFORM_ID: u32 = 0x17;
const EBL_CR_POWERON: u32 = 0x2a;
const SMI_COUNT: u32 = 0x34;
const FEATURE_CONTROL: u32 = 0x3a;
const UCODE_WRITE: u32 = 0x79;
const PMC_FIRST: u32 = 0xc1;
const PMC_LAST: u32 = 0xc8;
const FSB_FREQ: u32 = 0xcd;
const PLATFORM_INFO: u32 = 0xce;
const PKG_CST_CONFIG: u32 = 0xe2;
const MISC_FEATURES_ENABLES: u32 = 0x140;
const PERFEVTSEL_FIRST: u32 = 0x186;
const PERFEVTSEL_LAST: u32 = 0x18d;
const PERF_STATUS: u32 = 0x198;
const THERM2_CTL: u32 = 0x19d;
const TEMPERATURE_TARGET: u32 = 0x1a2;
const LBR_SELECT: u32 = 0x1c8;
const LASTBRANCH_TOS: u32 = 0x1c9;
const FIXED_CTR_FIRST: u32 = 0x309;
const FIXED_CTR_LAST: u32 = 0x30b;
const FIXED_CTR_CTRL: u32 = 0x38d;
const PERF_GLOBAL_OVF_CTRL: u32 = 0x390;
const RAPL_POWER_UNIT: u32 = 0x606;
const PKG_ENERGY_STATUS: u32 = 0x611;
const DRAM_ENERGY_STATUS: u32 = 0x619;
const PP0_ENERGY_STATUS: u32 = 0x639;
const PP1_ENERGY_STATUS: u32 = 0x641;
const PATCH_LEVEL: u32 = 0x8b;
const MCG_CAP: u32 = 0x179;
const MCG_STATUS: u32 = 0x17a;
/// MISC_ENABLE.
pub(crate) const MISC_ENABLE: u32 = 0x1a0;
const DEBUGCTL: u32 = 0x1d9;
const LAST_BRANCH_FIRST: u32 = 0x1db;
const LAST_INT_LAST: u32 = 0x1de;
const PERF_LEGACY_FIRST: u32 = 0xc001_0000;
const PERF_LEGACY_LAST: u32 = 0xc001_0007;
const PERF_CORE_FIRST: u32 = 0xc001_0200;
const PERF_CORE_LAST: u32 = 0xc001_020b;
const SYSCFG: u32 = 0xc001_0010;
const HWCR: u32 = 0xc001_0015;
const TOP_MEM: u32 = 0xc001_001a;
const TOP_MEM2: u32 = 0xc001_001d;
const NB_CFG: u32 = 0xc001_001f;
const PATCH_LOADER: u32 = 0xc001_0020;
const INT_PENDING: u32 = 0xc001_0055;
const MMIO_CONF_BASE: u32 = 0xc001_0058;
const TSEG_ADDR: u32 = 0xc001_0112;
const TSEG_MASK: u32 = 0xc001_0113;
const VM_CR: u32 = 0xc001_0114;
const OSVW_ID_LENGTH: u32 = 0xc001_0140;
const OSVW_STATUS: u32 = 0xc001_0141;
const DC_CFG: u32 = 0xc001_1022;
const TW_CFG: u32 = 0xc001_1023;
const DE_CFG: u32 = 0xc001_1029;
const BU_CFG2: u32 = 0xc001_102a;

/// PAT after reset (APM vol. 2 section 7.8.2).
pub(crate) const PAT_RESET: u64 = 0x0007_0406_0007_0406;
/// A microcode level that no erratum check takes for an old one of its family.
const PATCH_LEVEL_VALUE: u64 = 0x0100_0065;
/// HWCR.McStatusWrEn.
const HWCR_MC_STATUS_WRITE: u64 = 1 << 18;
/// HWCR.TscFreqSel: the TSC runs at a constant rate. Linux complains without it.
const HWCR_TSC_FREQ_SEL: u64 = 1 << 24;
/// HWCR bits that guests set for errata of the cache and for hardware that is not there: written in vain, as under KVM.
const HWCR_IGNORED: u64 = 1 << 3 | 1 << 6 | 1 << 8;
/// MISC_ENABLE: fast strings (SDM vol. 4).
pub(crate) const MISC_ENABLE_FAST_STRING: u64 = 1;
/// IA32_FEATURE_CONTROL.LOCK, and nothing else: guests have no VMX.
const FEATURE_CONTROL_LOCKED: u64 = 1;
/// VM_CR.LOCK and SVMDIS: guests have no SVM.
const VM_CR_DISABLED: u64 = 1 << 3 | 1 << 4;
/// DE_CFG: LFENCE is serializing.
const DE_CFG_LFENCE: u64 = 1 << 1;
/// MCG_STATUS: RIPV, EIPV, MCIP.
const MCG_STATUS_BITS: u64 = 7;
/// DEBUGCTL: LBR and BTF, accepted in vain.
const DEBUGCTL_IGNORED: u64 = 3;

/// Who answers an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access<T> {
    /// It is done.
    Done(T),
    /// #GP(0).
    Fault,
    /// Userspace.
    User,
}

impl<T> From<GuestResult<T>> for Access<T> {
    fn from(result: GuestResult<T>) -> Self {
        match result {
            Ok(value) => Self::Done(value),
            Err(GeneralProtection) => Self::Fault,
        }
    }
}

/// What a write has set off outside of the registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Written {
    /// Nothing.
    Quiet,
    /// Something of the local APIC's.
    Apic(Effect),
    /// A barrier is to be executed on the host CPU.
    BranchBarrier,
}

/// Values of MSRs that have no better place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Msrs {
    pub(crate) tsc_aux: u64,
    tsc_adjust: u64,
    hwcr: u64,
    misc_enable: u64,
    mcg_status: u64,
    /// The end of an interrupt that userspace is to be told of.
    pub(crate) interrupt_end: Option<u8>,
}

impl Msrs {
    /// After reset, on a CPU with `caps`.
    pub(crate) const fn new(caps: &Capabilities) -> Self {
        Self {
            tsc_aux: 0,
            tsc_adjust: 0,
            hwcr: HWCR_TSC_FREQ_SEL,
            // What is off for the host is off for the guest, whatever it writes there, and it had better know.
            misc_enable: if caps.fast_strings { MISC_ENABLE_FAST_STRING } else { 0 },
            mcg_status: 0,
            interrupt_end: None,
        }
    }
}

/// Registers that read as a constant, and whose writes do nothing.
fn constant(index: u32) -> Option<u64> {
    Some(match index {
        PATCH_LEVEL => PATCH_LEVEL_VALUE,
        VM_CR => VM_CR_DISABLED,
        PLATFORM_ID | EBL_CR_POWERON | SYSCFG | TOP_MEM | TOP_MEM2 | NB_CFG | PATCH_LOADER | INT_PENDING
        | MMIO_CONF_BASE => 0,
        TSEG_ADDR | TSEG_MASK | DC_CFG | TW_CFG | BU_CFG2 | OSVW_ID_LENGTH | OSVW_STATUS => 0,
        LAST_BRANCH_FIRST..=LAST_INT_LAST | LBR_SELECT | LASTBRANCH_TOS => 0,
        // No performance counters: they count nothing.
        PERF_LEGACY_FIRST..=PERF_LEGACY_LAST | PERF_CORE_FIRST..=PERF_CORE_LAST => 0,
        PMC_FIRST..=PMC_LAST | PERFEVTSEL_FIRST..=PERFEVTSEL_LAST => 0,
        FIXED_CTR_FIRST..=FIXED_CTR_LAST | FIXED_CTR_CTRL..=PERF_GLOBAL_OVF_CTRL => 0,
        // Intel's, which systems read without asking: no machine check of a Pentium's, no SMI, no microcode to load, nothing to
        // configure, frequencies, temperatures and energy unknown.
        FEATURE_CONTROL => FEATURE_CONTROL_LOCKED,
        P5_MC_ADDR | P5_MC_TYPE | SMI_COUNT | UCODE_WRITE | FSB_FREQ | PLATFORM_INFO | PKG_CST_CONFIG => 0,
        MISC_FEATURES_ENABLES | PERF_STATUS..=THERM2_CTL | TEMPERATURE_TARGET => 0,
        RAPL_POWER_UNIT | PKG_ENERGY_STATUS | DRAM_ENERGY_STATUS | PP0_ENERGY_STATUS | PP1_ENERGY_STATUS => 0,
        _ => return None,
    })
}

/// What a write that sets off nothing comes to.
fn quiet(result: GuestResult) -> Access<Written> {
    result.map(|()| Written::Quiet).into()
}

/// Which MSRs the guest's CPUID gives it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Offered {
    /// TSC_AUX.
    pub(crate) tsc_aux: bool,
    tsc_adjust: bool,
    /// Bits of SPEC_CTRL that the guest can set; without any, it does not exist.
    spec_ctrl: u64,
    /// PRED_CMD.
    branch_barrier: bool,
    /// What ARCH_CAPABILITIES reads as.
    arch_capabilities: Option<u64>,
    /// The paravirtual clock, by its old numbers and its new ones (KVM_FEATURE_CLOCKSOURCE and CLOCKSOURCE2).
    clocks: [bool; 2],
}

impl Offered {
    /// By this table, on a CPU with `caps`.
    pub(crate) fn new<H: X86Hal>(cpuid: &CpuidTable<H>, caps: &Capabilities) -> Self {
        let any = |features: &[Feature]| features.iter().any(|&feature| cpuid.has(feature));
        let bit = |features: &[Feature], bit: u32| u64::from(any(features)) << bit;
        let spec_ctrl = bit(&[Feature::SPEC_CTRL, Feature::AMD_IBRS], 0)
            | bit(&[Feature::STIBP, Feature::AMD_STIBP], 1)
            | bit(&[Feature::SSBD, Feature::AMD_SSBD], 2)
            | bit(&[Feature::AMD_PSFD], 7);
        let clock = |bit: u32| cpuid.entries().any(|entry| entry.function == 0x4000_0001 && entry.eax >> bit & 1 != 0);
        Self {
            tsc_aux: caps.tsc_aux && any(&[Feature::RDTSCP, Feature::RDPID]),
            // CPUID Fn0000_0007_EBX bit 1, which no table is allowed to have at present.
            tsc_adjust: cpuid.entries().any(|entry| entry.function == 7 && entry.index == 0 && entry.ebx >> 1 & 1 != 0),
            spec_ctrl: spec_ctrl & caps.spec_ctrl_bits,
            branch_barrier: caps.branch_barrier && any(&[Feature::SPEC_CTRL, Feature::AMD_IBPB]),
            arch_capabilities: arch_capabilities::for_guest(caps, spec_ctrl & 1 != 0)
                .filter(|_| cpuid.has(Feature::ARCH_CAPABILITIES)),
            clocks: [clock(0), clock(3)],
        }
    }

    fn clock(&self, index: u32) -> bool {
        let [old, new] = self.clocks;
        if index < 0x100 {
            old
        } else {
            new
        }
    }
}

impl<H: X86Hal> Guest<H> {
    /// RDMSR of `index`.
    pub(crate) fn read_msr(&mut self, regs: &impl Registers, index: u32) -> Access<u64> {
        if apic::owns_msr(index) {
            return self.with_lapic(|lapic, clock| lapic.read_msr(index, clock)).map_or(Access::User, Access::from);
        }
        match index {
            MSR_APIC_BASE if self.lapic().is_some() => Access::Done(self.apic_base()),
            TSC => Access::Done(self.tsc()),
            PAT => Access::Done(regs.pat()),
            EFER => Access::Done(regs.efer()),
            TSC_AUX if self.offered.tsc_aux => Access::Done(self.msrs.tsc_aux),
            TSC_ADJUST if self.offered.tsc_adjust => Access::Done(self.msrs.tsc_adjust),
            SPEC_CTRL if self.offered.spec_ctrl != 0 => Access::Done(regs.spec_ctrl() & self.offered.spec_ctrl),
            ARCH_CAPABILITIES => self.offered.arch_capabilities.map_or(Access::User, Access::Done),
            // Write-only.
            PRED_CMD if self.offered.branch_barrier => Access::Fault,
            // No banks: nothing is ever reported.
            MCG_CAP => Access::Done(0),
            MCG_STATUS => Access::Done(self.msrs.mcg_status),
            MISC_ENABLE => Access::Done(self.msrs.misc_enable),
            DEBUGCTL => Access::Done(0),
            HWCR => Access::Done(self.msrs.hwcr),
            DE_CFG => Access::Done(DE_CFG_LFENCE),
            _ => self.read_listed_msr(regs, index),
        }
    }

    /// RDMSR of `index`, which is in one of the lists, if we have it.
    #[inline(never)]
    fn read_listed_msr(&mut self, regs: &impl Registers, index: u32) -> Access<u64> {
        if let Some(value) = regs.direct_msr(index).or_else(|| constant(index)) {
            return Access::Done(value);
        }
        if Mtrr::owns_msr(index) {
            return self.mtrr.read(index).into();
        }
        if PvClock::owns_msr(index) && self.offered.clock(index) {
            return self.clock.read(index).into();
        }
        Access::User
    }

    /// WRMSR of `value` to `index`.
    #[inline]
    pub(crate) fn write_msr(&mut self, regs: &mut impl Registers, index: u32, value: u64) -> Access<Written> {
        // First, since guests write them at each interrupt.
        if apic::owns_msr(index) {
            if index == MSR_TSC_DEADLINE && self.postpone(value) {
                return Access::Done(Written::Apic(Effect::None));
            }
            return self
                .with_lapic(|lapic, clock| lapic.write_msr(index, value, clock))
                .map_or(Access::User, |result| Access::from(result.map(Written::Apic)));
        }
        self.write_other_msr(regs, index, value)
    }

    /// WRMSR of `value` to `index`, which is none of the local APIC's.
    #[inline(never)]
    fn write_other_msr(&mut self, regs: &mut impl Registers, index: u32, value: u64) -> Access<Written> {
        let only = |bits: u64| if value & !bits == 0 { Ok(()) } else { Err(GeneralProtection) };
        match index {
            MSR_APIC_BASE if self.lapic().is_some() => {
                self.lapic_mut().map_or(Access::User, |lapic| quiet(lapic.set_base(value)))
            }
            TSC => {
                let delta = value.wrapping_sub(self.tsc());
                self.move_tsc(regs, delta);
                Access::Done(Written::Quiet)
            }
            TSC_ADJUST if self.offered.tsc_adjust => {
                self.move_tsc(regs, value.wrapping_sub(self.msrs.tsc_adjust));
                Access::Done(Written::Quiet)
            }
            PAT => quiet(if is_valid_pat(value) {
                regs.set_pat(value);
                Ok(())
            } else {
                Err(GeneralProtection)
            }),
            EFER => quiet(self.limits.check_efer_write(regs.efer(), value, regs.cr0()).map(|value| {
                // NXE changes what page tables mean.
                if value != regs.efer() {
                    regs.flush_tlb();
                }
                regs.set_efer(value);
            })),
            TSC_AUX if self.offered.tsc_aux => quiet(only(0xffff_ffff).map(|()| self.msrs.tsc_aux = value)),
            SPEC_CTRL if self.offered.spec_ctrl != 0 => {
                quiet(only(self.offered.spec_ctrl).map(|()| regs.set_spec_ctrl(value)))
            }
            PRED_CMD if self.offered.branch_barrier => Access::from(only(PRED_CMD_IBPB).map(|()| match value {
                0 => Written::Quiet,
                _ => Written::BranchBarrier,
            })),
            // Read-only.
            ARCH_CAPABILITIES if self.offered.arch_capabilities.is_some() => Access::Fault,
            MCG_STATUS => quiet(only(MCG_STATUS_BITS).map(|()| self.msrs.mcg_status = value)),
            MISC_ENABLE => quiet(only(MISC_ENABLE_FAST_STRING).map(|()| self.msrs.misc_enable = value)),
            DEBUGCTL => quiet(only(DEBUGCTL_IGNORED)),
            HWCR => {
                let kept = HWCR_MC_STATUS_WRITE | HWCR_TSC_FREQ_SEL;
                quiet(only(kept | HWCR_IGNORED).map(|()| self.msrs.hwcr = value & kept))
            }
            DE_CFG => quiet(only(DE_CFG_LFENCE)),
            _ => self.write_listed_msr(regs, index, value),
        }
    }

    /// WRMSR of `value` to `index`, which is in one of the lists, if we have it.
    #[inline(never)]
    fn write_listed_msr(&mut self, regs: &mut impl Registers, index: u32, value: u64) -> Access<Written> {
        if regs.direct_msr(index).is_some() {
            return if self.is_valid_direct(index, value) && regs.set_direct_msr(index, value) {
                Access::Done(Written::Quiet)
            } else {
                Access::Fault
            };
        }
        // Locked.
        if (index == VM_CR && value & !VM_CR_DISABLED != 0)
            || (index == FEATURE_CONTROL && value != FEATURE_CONTROL_LOCKED)
        {
            return Access::Fault;
        }
        if constant(index).is_some() {
            return Access::Done(Written::Quiet);
        }
        let phys_bits = self.limits.phys_bits;
        if Mtrr::owns_msr(index) {
            return quiet(self.mtrr.write(index, value, phys_bits));
        }
        if PvClock::owns_msr(index) && self.offered.clock(index) {
            return quiet(self.clock.write(index, value, phys_bits));
        }
        Access::User
    }

    /// Whether `index`, a direct MSR, may hold `value`: addresses must be canonical, and the flag mask has 32 bits. A backend may
    /// write the value to the CPU.
    fn is_valid_direct(&self, index: u32, value: u64) -> bool {
        match index {
            msr::IA32_STAR | msr::IA32_SYSENTER_CS => true,
            msr::IA32_FMASK => value >> 32 == 0,
            _ => self.limits.canonical(value),
        }
    }

    /// Moves the guest's TSC by `delta`.
    fn move_tsc(&mut self, regs: &mut impl Registers, delta: u64) {
        self.msrs.tsc_adjust = self.msrs.tsc_adjust.wrapping_add(delta);
        self.set_tsc_offset(regs, self.tsc_offset.wrapping_add(delta));
    }

    /// Whether a write of `index` is for guests only: from userspace it would do something rather than set something.
    pub(crate) fn is_command(index: u32) -> bool {
        index == PRED_CMD || (0x800..=0x8ff).contains(&index)
    }

    /// MOV to CR0: whether it is allowed; then it is done.
    pub(crate) fn write_cr0(&mut self, regs: &mut impl Registers, value: u64) -> GuestResult {
        let old = regs.cr0();
        let (cr0, efer) = self.limits.check_cr0_write(old, value, regs.cr4(), regs.efer(), regs.code())?;
        if (old ^ cr0) & cr0::TRANSLATION != 0 {
            regs.flush_tlb();
        }
        regs.set_cr0(cr0);
        regs.set_efer(efer);
        Ok(())
    }

    /// MOV to CR4: whether it is allowed; then it is done.
    pub(crate) fn write_cr4(&mut self, regs: &mut impl Registers, value: u64) -> GuestResult {
        let old = regs.cr4();
        self.limits.check_cr4_write(old, value, regs.cr3(), regs.efer())?;
        if (old ^ value) & cr4::TRANSLATION != 0 {
            regs.flush_tlb();
        }
        regs.set_cr4(value);
        Ok(())
    }
}

const _: () = assert!(MSR_TSC_DEADLINE == 0x6e0 && PAT == 0x277 && TSC == 0x10 && EFER == 0xc000_0080);
