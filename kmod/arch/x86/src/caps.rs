// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! What the host CPU offers: whether there is a backend for it, and what that backend can use (APM vol. 3 appendix E;
//! for VMX see `vmx/capabilities.rs`).

use vcpu_core::npt::Levels;
use vcpu_core::AxError;

use crate::arch_capabilities::ARCH_CAPABILITIES;
use crate::cpu::{self, Cpuid};
use crate::msr::{MISC_ENABLE, MISC_ENABLE_FAST_STRING};
use crate::regs::{cr4, efer, xcr0};
use crate::vmx::capabilities::{Missing, Msrs, VmxCapabilities};

/// VM_CR (APM vol. 2 section 15.30.1).
const MSR_VM_CR: u32 = 0xc001_0114;
/// VM_CR.SVMDIS: the firmware has locked SVM off.
const VM_CR_SVMDIS: u64 = 1 << 4;
/// EFER.
const MSR_EFER: u32 = 0xc000_0080;
/// CR4.FRED.
const CR4_FRED: u64 = 1 << 32;

/// The virtualization extension that vCPUs run on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// AMD Secure Virtual Machine.
    Svm,
    /// Intel Virtual Machine Extensions.
    Vmx,
}

/// CPUID 1: VMX.
const VMX: u32 = 1 << 5;
/// IA32_FEATURE_CONTROL (SDM vol. 3 section 24.7).
const MSR_FEATURE_CONTROL: u32 = 0x3a;
/// IA32_FEATURE_CONTROL: locked, VMX outside of SMX.
const FEATURE_CONTROL_VMX: u64 = 1 << 0 | 1 << 2;

/// The virtualization extension of the current CPU, whether it can be used or not.
pub fn extension() -> Option<Backend> {
    if cpu::cpuid(1, 0).ecx & VMX != 0 {
        return Some(Backend::Vmx);
    }
    let svm = cpu::cpuid(0x8000_0000, 0).eax >= 0x8000_000a && cpu::cpuid(0x8000_0001, 0).ecx >> 2 & 1 != 0;
    svm.then_some(Backend::Svm)
}

/// Finds the backend for the current CPU. Kernel context.
///
/// # Errors
/// - [`AxError::NoHardware`]: no extension that we know.
/// - [`AxError::DisabledByFirmware`].
/// - [`AxError::Unsupported`]: the extension lacks something, or the host does not use XSAVE; see [`missing_feature`].
pub fn detect() -> Result<Backend, AxError> {
    let backend = extension().ok_or(AxError::NoHardware)?;
    // SAFETY: Kernel context, and a CPU with the extension has the register that can lock it.
    let disabled = unsafe {
        match backend {
            Backend::Svm => cpu::rdmsr(MSR_VM_CR) & VM_CR_SVMDIS != 0,
            Backend::Vmx => cpu::rdmsr(MSR_FEATURE_CONTROL) & FEATURE_CONTROL_VMX != FEATURE_CONTROL_VMX,
        }
    };
    if disabled {
        return Err(AxError::DisabledByFirmware);
    }
    match missing_feature() {
        None => Ok(backend),
        Some(_) => Err(AxError::Unsupported),
    }
}

/// What VMX can do on the current CPU, which has it. Kernel context.
///
/// # Errors
/// What the CPU lacks.
pub(crate) fn vmx() -> Result<VmxCapabilities, Missing> {
    // SAFETY: Kernel context, and a CPU with VMX has the MSRs that `read` asks for.
    VmxCapabilities::new(&Msrs::read(cpu::cpuid(1, 0).eax, |index| unsafe { cpu::rdmsr(index) }))
}

/// What [`detect`] has found wanting when it says [`AxError::Unsupported`], for people. Kernel context.
pub fn missing_feature() -> Option<&'static str> {
    // SAFETY: Kernel context.
    let host_cr4 = unsafe { cpu::cr4() };
    if host_cr4 & cr4::OSXSAVE == 0 {
        return Some("XSAVE, in use by the host");
    }
    match extension()? {
        Backend::Svm => (cpu::cpuid(0x8000_000a, 0).edx & 1 == 0).then_some("nested paging"),
        // Machine checks and NMIs are handed to the host through its IDT.
        Backend::Vmx if host_cr4 & CR4_FRED != 0 => Some("event delivery by IDT (the host uses FRED)"),
        Backend::Vmx => vmx().err().map(|Missing(name)| name),
    }
}

/// Whether another hypervisor has the extension to itself, on the current CPU, just now. VMX can be shared. Kernel context,
/// outside of a window of ours.
pub fn in_use() -> bool {
    if extension() == Some(Backend::Vmx) {
        return false;
    }
    // SAFETY: Kernel context; every x86-64 CPU has EFER.
    unsafe { cpu::rdmsr(MSR_EFER) & efer::SVME != 0 }
}

/// The host's time-stamp counter.
pub fn read_tsc() -> u64 {
    cpu::rdtsc()
}

/// Whether a CPU with `cpuid` has ARCH_CAPABILITIES (SDM vol. 2A, CPUID, leaf 7).
fn has_arch_capabilities(cpuid: impl Fn(u32, u32) -> Cpuid) -> bool {
    cpuid(0, 0).eax >= 7 && cpuid(7, 0).edx >> 29 & 1 != 0
}

/// What the CPU can do for guests. All CPUs of a machine are taken to be alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// NRIP save: the address of the next instruction at exits.
    pub next_rip: bool,
    /// Decode assists: instruction bytes at page faults, register numbers at control register accesses.
    pub decode_assists: bool,
    /// One ASID can be flushed.
    pub flush_by_asid: bool,
    /// Intercepts of PAUSE can be limited to loops: PAUSE filter count.
    pub pause_filter: bool,
    /// And to tight ones: PAUSE filter threshold.
    pub pause_threshold: bool,
    /// Number of ASIDs, the host's 0 included.
    pub asids: u32,
    /// Width of a guest physical address.
    pub guest_phys_bits: u32,
    /// Levels of the nested page table.
    pub npt_levels: Levels,
    /// XCR0 bits that guests can use.
    pub xcr0: u64,
    /// Size of the XSAVE area with all of them, standard format.
    pub xsave_size: u32,
    /// MXCSR bits that exist.
    pub(crate) mxcsr_mask: u32,
    /// The CPU does not save x87 pointers without a pending exception.
    pub(crate) leaks_x87_pointers: bool,
    /// SPEC_CTRL exists.
    pub(crate) spec_ctrl: bool,
    /// Bits of SPEC_CTRL that exist.
    pub(crate) spec_ctrl_bits: u64,
    /// SPEC_CTRL is virtualized by the hardware.
    pub(crate) virtual_spec_ctrl: bool,
    /// What ARCH_CAPABILITIES says, if it exists.
    pub(crate) arch_capabilities: Option<u64>,
    /// REP MOVS and REP STOS are fast: not where firmware has switched that off, which MISC_ENABLE tells.
    pub(crate) fast_strings: bool,
    /// PRED_CMD has an indirect branch prediction barrier.
    pub branch_barrier: bool,
    /// FLUSH_CMD can flush the L1 data cache.
    pub(crate) flush_l1d: bool,
    /// TSC_AUX exists.
    pub(crate) tsc_aux: bool,
    /// The host uses protection keys (CR4.PKE).
    pub(crate) protection_keys: bool,
    /// XSAVES exists, and with it XSS.
    pub(crate) xsaves: bool,
    /// Exceptions are delivered by FRED, not by an IDT.
    pub(crate) fred: bool,
}

impl Capabilities {
    /// Of the current CPU, on which [`detect`] has succeeded. Kernel context.
    pub fn host() -> Self {
        // SAFETY: Kernel context.
        let host_cr4 = unsafe { cpu::cr4() };
        // SAFETY: `detect` has made sure that CR4.OSXSAVE is set.
        let host_xcr0 = unsafe { cpu::xcr0() };
        // SAFETY: Kernel context, and CPUID says that the MSR exists.
        let arch_capabilities = has_arch_capabilities(cpu::cpuid).then(|| unsafe { cpu::rdmsr(ARCH_CAPABILITIES) });
        let caps = Self {
            fred: host_cr4 & CR4_FRED != 0,
            arch_capabilities,
            ..Self::from_cpuid(cpu::cpuid, host_cr4, host_xcr0)
        };
        if extension() == Some(Backend::Vmx) {
            // SAFETY: Kernel context, and every CPU with VMX has the MSR.
            let fast_strings = unsafe { cpu::rdmsr(MISC_ENABLE) } & MISC_ENABLE_FAST_STRING != 0;
            let caps = Self { fast_strings, ..caps };
            caps.on_vmx(vmx().map_or(Levels::Four, |vmx| vmx.levels(cpu::cpuid(0x8000_0008, 0).eax & 0xff)))
        } else {
            caps
        }
    }

    /// The same with what does not come from CPUID on VMX: an extended page table of `levels`, whatever the host's paging, and
    /// instruction lengths at exits. SVM's leaf means nothing there: beyond the last leaf Intel's CPUs answer with another one.
    fn on_vmx(self, levels: Levels) -> Self {
        Self {
            next_rip: true,
            virtual_spec_ctrl: false,
            npt_levels: levels,
            guest_phys_bits: self.guest_phys_bits.min(levels.limit().trailing_zeros()),
            ..self
        }
    }

    /// Nothing at all.
    #[cfg(test)]
    pub(crate) const fn none() -> Self {
        Self {
            next_rip: false,
            decode_assists: false,
            flush_by_asid: false,
            pause_filter: false,
            pause_threshold: false,
            asids: 0,
            guest_phys_bits: 36,
            npt_levels: Levels::Four,
            xcr0: 0,
            xsave_size: 576,
            mxcsr_mask: 0xffbf,
            leaks_x87_pointers: true,
            spec_ctrl: false,
            spec_ctrl_bits: 0,
            virtual_spec_ctrl: false,
            arch_capabilities: None,
            fast_strings: true,
            branch_barrier: false,
            flush_l1d: false,
            tsc_aux: false,
            protection_keys: false,
            xsaves: false,
            fred: false,
        }
    }

    fn from_cpuid(cpuid: impl Fn(u32, u32) -> Cpuid, host_cr4: u64, host_xcr0: u64) -> Self {
        let bit = |word: u32, bit: u32| word >> bit & 1 != 0;
        let svm = cpuid(0x8000_000a, 0);
        let extended = cpuid(0x8000_0001, 0);
        let sizes = cpuid(0x8000_0008, 0);
        let structured = cpuid(7, 0);
        // The nested table is walked in the host's mode: five levels if the host has them.
        let npt_levels = if host_cr4 & cr4::LA57 != 0 { Levels::Five } else { Levels::Four };
        let level_bits = if host_cr4 & cr4::LA57 != 0 { 52 } else { 48 };
        let protection_keys = host_cr4 & cr4::PKE != 0;
        let mut mask = host_xcr0 & xcr0::OFFERED;
        if !protection_keys {
            mask &= !xcr0::PKRU;
        }
        // Bits 0 and 1 are the legacy area and the header; the others say where they lie.
        let xsave_size = (2..=9)
            .filter(|component| mask >> component & 1 != 0)
            .map(|component| cpuid(0xd, component))
            .fold(576, |size, place| size.max(place.eax.saturating_add(place.ebx)));
        let (ibrs, stibp, ssbd) = (bit(sizes.ebx, 14), bit(sizes.ebx, 15), bit(sizes.ebx, 24));
        let (intel_spec, intel_stibp, intel_ssbd) =
            (bit(structured.edx, 26), bit(structured.edx, 27), bit(structured.edx, 31));
        let spec_ctrl_bits = u64::from(ibrs || intel_spec)
            | u64::from(stibp || intel_stibp) << 1
            | u64::from(ssbd || intel_ssbd) << 2
            // PSFD.
            | u64::from(bit(sizes.ebx, 28)) << 7;
        Self {
            next_rip: bit(svm.edx, 3),
            decode_assists: bit(svm.edx, 7),
            flush_by_asid: bit(svm.edx, 6),
            pause_filter: bit(svm.edx, 10),
            pause_threshold: bit(svm.edx, 12),
            asids: svm.ebx,
            guest_phys_bits: (sizes.eax & 0xff).clamp(32, level_bits),
            npt_levels,
            xcr0: mask,
            xsave_size,
            // MXCSR.DAZ (bit 6) exists on every CPU with SVM, MM (bit 17) where misaligned SSE does.
            mxcsr_mask: 0xffff | u32::from(bit(extended.ecx, 7)) << 17,
            leaks_x87_pointers: !bit(sizes.ebx, 2),
            spec_ctrl: spec_ctrl_bits != 0,
            spec_ctrl_bits,
            virtual_spec_ctrl: bit(svm.edx, 20),
            arch_capabilities: None,
            fast_strings: true,
            branch_barrier: bit(sizes.ebx, 12) || intel_spec,
            flush_l1d: bit(structured.edx, 28),
            tsc_aux: bit(extended.edx, 27) || bit(structured.ecx, 22),
            protection_keys,
            xsaves: bit(cpuid(0xd, 1).eax, 3),
            fred: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The leaves of QEMU's EPYC model that matter here.
    fn epyc(leaf: u32, index: u32) -> Cpuid {
        match (leaf, index) {
            (0x8000_000a, _) => Cpuid { eax: 1, ebx: 16, ecx: 0, edx: 1 },
            (0x8000_0008, _) => Cpuid { eax: 0x3030, ..Cpuid::default() },
            (0x8000_0001, _) => Cpuid { ecx: 0x0040_03f7, edx: 0x2fd3_fbff, ..Cpuid::default() },
            (0xd, 2) => Cpuid { eax: 256, ebx: 576, ..Cpuid::default() },
            (0xd, 9) => Cpuid { eax: 8, ebx: 2688, ..Cpuid::default() },
            _ => Cpuid::default(),
        }
    }

    #[test]
    fn an_emulated_epyc_has_nested_paging_and_little_else() {
        let caps = Capabilities::from_cpuid(epyc, 0, 7);
        let expected = Capabilities {
            asids: 16,
            guest_phys_bits: 48,
            xcr0: 7,
            xsave_size: 832,
            mxcsr_mask: 0x2_ffff,
            tsc_aux: true,
            ..Capabilities::none()
        };
        assert_eq!(caps, expected);
    }

    #[test]
    fn host_paging_decides_the_levels() {
        let caps = Capabilities::from_cpuid(epyc, cr4::LA57, 7);
        assert_eq!((caps.npt_levels, caps.guest_phys_bits), (Levels::Five, 48));
    }

    #[test]
    fn vmx_decides_the_levels_whatever_the_host_has() {
        let host = Capabilities { guest_phys_bits: 52, npt_levels: Levels::Five, ..Capabilities::none() };
        let caps = host.on_vmx(Levels::Four);
        assert_eq!((caps.npt_levels, caps.guest_phys_bits, caps.next_rip), (Levels::Four, 48, true));
        assert_eq!(host.on_vmx(Levels::Five).guest_phys_bits, 52);
        assert_eq!(Capabilities::none().on_vmx(Levels::Five).guest_phys_bits, 36);
        let caps = Capabilities { virtual_spec_ctrl: true, ..host }.on_vmx(Levels::Four);
        assert!(!caps.virtual_spec_ctrl, "nothing but our code switches SPEC_CTRL");
    }

    #[test]
    fn arch_capabilities_are_asked_for_where_leaf_7_has_them() {
        let has = |last: u32, edx: u32| {
            has_arch_capabilities(|leaf, _| match leaf {
                0 => Cpuid { eax: last, ..Cpuid::default() },
                7 => Cpuid { edx, ..Cpuid::default() },
                _ => Cpuid::default(),
            })
        };
        assert!(has(7, 1 << 29) && has(0x1b, u32::MAX));
        assert!(!has(7, !(1 << 29)) && !has(6, u32::MAX), "another leaf answers for one that is not there");
    }

    #[test]
    fn components_that_the_host_does_not_use_are_not_offered() {
        assert_eq!(Capabilities::from_cpuid(epyc, 0, 3).xsave_size, 576);
        assert_eq!(Capabilities::from_cpuid(epyc, 0, 0x207).xcr0, 7, "PKRU needs CR4.PKE");
        let keys = Capabilities::from_cpuid(epyc, cr4::PKE, 0x207);
        assert_eq!((keys.xcr0, keys.xsave_size), (0x207, 2696));
        assert_eq!(Capabilities::from_cpuid(epyc, 0, 0x6_0007).xcr0, 7, "no AMX");
    }

    #[test]
    fn features_are_where_the_manual_has_them() {
        let with = |edx: u32| {
            Capabilities::from_cpuid(
                move |l, i| if l == 0x8000_000a { Cpuid { edx, ..epyc(l, i) } } else { epyc(l, i) },
                0,
                7,
            )
        };
        assert!(with(1 << 3).next_rip && with(1 << 7).decode_assists && with(1 << 6).flush_by_asid);
        assert!(with(1 << 10).pause_filter && with(1 << 12).pause_threshold && with(1 << 20).virtual_spec_ctrl);
    }
}
