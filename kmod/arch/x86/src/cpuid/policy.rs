// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! Which CPUID bits a guest may have: from the hardware, by emulation, or at the VMM's discretion.
//!
//! Bits are those of the SDM (vol. 2A, CPUID) and the APM (vol. 3 appendix E). The KVM leaves are documented in Linux
//! `Documentation/virt/kvm/x86/cpuid.rst`, the timing leaf is the common one of VMware and others.

use axvcpu_uapi::x86::{CpuidEntry, CPUID_INDEX_SIGNIFICANT};

use super::{Caps, CpuidResult, HostCpuid, Vendor, ZERO};

const SSE: u64 = 1 << 1;
const AVX: u64 = 1 << 2;
const AVX512: u64 = 0x7 << 5;
const PKRU: u64 = 1 << 9;

/// Components of the extended state that a guest can have: x87, SSE, AVX, the three of AVX-512, PKRU. Not MPX (gone from
/// hardware), not AMX (needs XFD), and none of XSS.
pub const SUPPORTED_XCR0: u64 = 1 | SSE | AVX | AVX512 | PKRU;

/// The last basic leaf offered: extended state. What comes after is performance monitoring, resource control, tracing, SGX
/// and frequencies, which the paravirtual clock tells better.
const MAX_BASIC: u32 = 0xd;
/// The last extended leaf offered on Intel.
const MAX_EXTENDED_INTEL: u32 = 0x8000_0008;
/// The last extended leaf offered on AMD.
const MAX_EXTENDED_AMD: u32 = 0x8000_0021;
/// The last leaf of the hypervisor's range.
const MAX_HYPERVISOR: u32 = 0x4000_0010;

/// Frequency of the APIC timer's counter before division, in kHz: see `apic::timer`.
const APIC_BUS_KHZ: u32 = 1_000_000;

/// What may be in one register of one leaf.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Rule {
    /// Bits offered if the host has them.
    host: u32,
    /// Bits offered in any case: emulated.
    own: u32,
    /// Bits that say nothing about what hardware must do: anything goes.
    free: u32,
}

impl Rule {
    /// Zero.
    const NONE: Self = Self { host: 0, own: 0, free: 0 };
    /// Information from the host, which the VMM may replace.
    const INFORMATION: Self = Self { host: u32::MAX, own: 0, free: u32::MAX };

    /// Features of the host.
    const fn features(host: u32) -> Self {
        Self { host, own: 0, free: 0 }
    }

    /// A value of our own, which the VMM may replace.
    const fn ours(own: u32) -> Self {
        Self { host: 0, own, free: u32::MAX }
    }

    /// What is offered, the host having `host`.
    const fn offer(self, host: u32) -> u32 {
        host & self.host | self.own
    }

    /// Whether a guest may get `value`, the host having `host`.
    pub(super) const fn allows(self, value: u32, host: u32) -> bool {
        value & !self.free & !self.offer(host) == 0
    }
}

/// The rules of a leaf: EAX, EBX, ECX, EDX.
pub(super) type Rules = [Rule; 4];

const fn bit(index: u32) -> u32 {
    1 << index
}

/// Leaf 1 ECX. All but XSAVE itself are instructions on registers that XSAVE covers.
const LEAF_1_ECX: u32 = bit(0) // SSE3
    | bit(1) // PCLMULQDQ
    | bit(9) // SSSE3
    | bit(13) // CMPXCHG16B
    | bit(17) // PCID: part of CR3 and CR4, which the VMCB holds
    | bit(19) // SSE4.1
    | bit(20) // SSE4.2
    | bit(22) // MOVBE
    | bit(23) // POPCNT
    | bit(25) // AES
    | bit(26) // XSAVE: XCR0 is switched
    | bit(30); // RDRAND
/// Leaf 1 ECX: instructions on YMM registers.
const LEAF_1_ECX_AVX: u32 = bit(12) // FMA
    | bit(28) // AVX
    | bit(29); // F16C
/// Leaf 1 ECX: emulated.
const LEAF_1_ECX_OWN: u32 = bit(21) // x2APIC
    | bit(24) // the APIC timer's TSC-deadline mode
    | bit(31); // a hypervisor is present
/// Leaf 1 ECX: set by CR4.OSXSAVE when the guest looks.
const LEAF_1_ECX_DYNAMIC: u32 = bit(27);
/// Leaf 1 EDX. Left out: debug store, thermal control, processor serial number, everything that needs MSRs of its own.
const LEAF_1_EDX: u32 = bit(0) // x87
    | bit(1) // virtual-8086 mode extensions
    | bit(2) // I/O breakpoints: CR4.DE
    | bit(3) // 4 MiB pages
    | bit(4) // TSC
    | bit(5) // RDMSR and WRMSR
    | bit(6) // PAE
    | bit(7) // machine-check exception: CR4.MCE; no bank is ever reported
    | bit(8) // CMPXCHG8B
    | bit(11) // SYSENTER: its MSRs are switched by VMLOAD and VMSAVE
    | bit(12) // MTRRs: kept, see `mtrr`
    | bit(13) // global pages
    | bit(14) // machine-check architecture, with zero banks
    | bit(15) // CMOV
    | bit(16) // PAT: the VMCB has the guest's
    | bit(17) // PSE-36
    | bit(19) // CLFLUSH
    | bit(23) // MMX
    | bit(24) // FXSAVE
    | bit(25) // SSE
    | bit(26); // SSE2
/// Leaf 1 EDX: the local APIC is emulated.
const LEAF_1_EDX_OWN: u32 = bit(9);
/// Leaf 1 EDX: more than one logical processor in the package: topology.
const LEAF_1_EDX_TOPOLOGY: u32 = bit(28);

/// Leaf 6 EAX: the APIC timer never stops.
const LEAF_6_EAX_OWN: u32 = bit(2);

/// Leaf 7.0 EBX. Left out: TSC_ADJUST (would have to move the TSC offset), SGX, TSX, resource control, MPX, tracing.
const LEAF_7_EBX: u32 = bit(0) // FSGSBASE: FS and GS bases are switched by VMLOAD and VMSAVE
    | bit(3) // BMI1
    | bit(6) // x87 data pointer updated on exceptions only: a property of the CPU
    | bit(7) // SMEP
    | bit(8) // BMI2
    | bit(9) // fast REP MOVSB
    | bit(10) // INVPCID
    | bit(13) // x87 CS and DS are not saved: a property of the CPU
    | bit(18) // RDSEED
    | bit(19) // ADX
    | bit(20) // SMAP
    | bit(23) // CLFLUSHOPT
    | bit(24) // CLWB
    | bit(29); // SHA
/// Leaf 7.0 EBX: instructions on YMM registers.
const LEAF_7_EBX_AVX: u32 = bit(5); // AVX2
/// Leaf 7.0 EBX: instructions on ZMM and mask registers.
const LEAF_7_EBX_AVX512: u32 = bit(16) // F
    | bit(17) // DQ
    | bit(21) // IFMA
    | bit(28) // CD
    | bit(30) // BW
    | bit(31); // VL
/// Leaf 7.0 ECX. Left out: WAITPKG and ENQCMD (MSRs), CET, key locker, PKS, bus lock detection.
const LEAF_7_ECX: u32 = bit(2) // UMIP: a bit of CR4
    | bit(8) // GFNI
    | bit(16) // five-level paging: a bit of CR4, independent of the nested table
    | bit(22) // RDPID: TSC_AUX is switched
    | bit(25) // CLDEMOTE
    | bit(27) // MOVDIRI
    | bit(28); // MOVDIR64B
/// Leaf 7.0 ECX: instructions on YMM registers.
const LEAF_7_ECX_AVX: u32 = bit(9) // VAES
    | bit(10); // VPCLMULQDQ
/// Leaf 7.0 ECX: instructions on ZMM registers.
const LEAF_7_ECX_AVX512: u32 = bit(1) // VBMI
    | bit(6) // VBMI2
    | bit(11) // VNNI
    | bit(12) // BITALG
    | bit(14); // VPOPCNTDQ
/// Leaf 7.0 ECX: protection keys, if PKRU is part of XCR0.
const LEAF_7_ECX_PKRU: u32 = bit(3);
/// Leaf 7.0 ECX: set by CR4.PKE when the guest looks.
const LEAF_7_ECX_DYNAMIC: u32 = bit(4);
/// Leaf 7.0 EDX. Left out: AMX, TSX, hybrid, PCONFIG, flush commands and CORE_CAPABILITIES (MSRs).
const LEAF_7_EDX: u32 = bit(4) // fast short REP MOVSB
    | bit(10) // VERW clears buffers
    | bit(14) // SERIALIZE
    | bit(29); // ARCH_CAPABILITIES, the part of it that says what the CPU is like
/// Leaf 7.0 EDX: instructions on ZMM registers.
const LEAF_7_EDX_AVX512: u32 = bit(8) // VP2INTERSECT
    | bit(23); // FP16
/// Leaf 7.0 EDX: the MSRs SPEC_CTRL and PRED_CMD.
const LEAF_7_EDX_SPECULATION: u32 = bit(26) // IBRS and IBPB
    | bit(27) // STIBP
    | bit(31); // SSBD

/// Leaf 7.1 EAX. Left out: LAM (bits of CR3 and CR4), FRED, LKGS, WRMSRNS.
const LEAF_7_1_EAX: u32 = bit(7) // CMPccXADD
    | bit(10) // fast zero-length REP MOVSB
    | bit(11) // fast short REP STOSB
    | bit(12); // fast short REP CMPSB and SCASB
/// Leaf 7.1 EAX: instructions on YMM registers.
const LEAF_7_1_EAX_AVX: u32 = bit(4) // AVX-VNNI
    | bit(23); // AVX-IFMA
/// Leaf 7.1 EAX: instructions on ZMM registers.
const LEAF_7_1_EAX_AVX512: u32 = bit(5); // BF16
/// Leaf 7.1 EDX: instructions on YMM registers.
const LEAF_7_1_EDX_AVX: u32 = bit(4) // AVX-VNNI-INT8
    | bit(5); // AVX-NE-CONVERT

/// Leaf 0xd.1 EAX: XSAVEOPT, XSAVEC, XGETBV with ECX 1. Not XSAVES, whose XSS is not switched, and not XFD.
const LEAF_D_1_EAX: u32 = bit(0) | bit(1) | bit(2);

/// Leaf 0x80000001 ECX. Left out: SVM, extended APIC space, OS visible workarounds, IBS, SKINIT, watchdog, LWP, performance
/// counters, breakpoint extensions, MONITORX.
const LEAF_8_1_ECX: u32 = bit(0) // LAHF in 64-bit mode
    | bit(4) // LOCK MOV CR0 is MOV CR8
    | bit(5) // LZCNT
    | bit(6) // SSE4A
    | bit(7) // misaligned SSE
    | bit(8) // PREFETCHW
    | bit(21) // TBM
    | bit(22); // topology extensions: leaves 0x8000001d and 0x8000001e
/// Leaf 0x80000001 ECX: instructions on YMM registers.
const LEAF_8_1_ECX_AVX: u32 = bit(11) // XOP
    | bit(16); // FMA4
/// Leaf 0x80000001 ECX: more than one core, in the old way: topology.
const LEAF_8_1_ECX_TOPOLOGY: u32 = bit(1);
/// Leaf 0x80000001 EDX beyond what AMD repeats of leaf 1. Left out: FFXSR (a bit of EFER for no use).
const LEAF_8_1_EDX: u32 = bit(11) // SYSCALL: its MSRs are switched by VMLOAD and VMSAVE
    | bit(20) // NX
    | bit(22) // AMD's MMX extensions
    | bit(26) // 1 GiB pages
    | bit(27) // RDTSCP: TSC_AUX is switched
    | bit(29) // long mode
    | bit(30) // 3DNow! extensions
    | bit(31); // 3DNow!
/// Leaf 0x80000001 EDX: bits that AMD repeats of leaf 1 EDX.
const LEAF_8_1_EDX_REPEATED: u32 = 0x0183_f3ff;

/// Leaf 0x80000007 EDX: the TSC ticks at one rate in all power states.
const LEAF_8_7_EDX: u32 = bit(8);

/// Leaf 0x80000008 EBX. Left out: RDPRU, INVLPGB, interruptible WBINVD.
const LEAF_8_8_EBX: u32 = bit(0) // CLZERO
    | bit(2) // x87 error pointers are always restored
    | bit(9) // WBNOINVD
    | bit(26) // not affected by speculative store bypass
    | bit(29); // not affected by branch type confusion
/// Leaf 0x80000008 EBX: the MSRs SPEC_CTRL and PRED_CMD.
const LEAF_8_8_EBX_SPECULATION: u32 = bit(12) // IBPB
    | bit(14) // IBRS
    | bit(15) // STIBP
    | bit(16) // IBRS may stay on
    | bit(17) // STIBP may stay on
    | bit(18) // IBRS is preferred to retpolines
    | bit(19) // IBRS gives same mode protection
    | bit(24) // SSBD
    | bit(28); // PSFD

/// Leaf 0x80000021 EAX: properties of the CPU. Left out: automatic IBRS (a bit of EFER), prefetch control, CPUID faulting, selective
/// branch predictor barriers.
const LEAF_8_21_EAX: u32 = bit(0) // no nested data breakpoints
    | bit(2) // LFENCE always serialises
    | bit(6) // null selectors clear the base
    | bit(10) // fast short REP STOSB
    | bit(11) // fast short REP CMPSB
    | bit(29) // not affected by speculative return stack overflow
    | bit(30); // the same between user and kernel

/// Leaf 0x40000001 EAX (Linux `arch/x86/include/uapi/asm/kvm_para.h`). Left out: everything that needs more from the host:
/// asynchronous page faults, steal time, EOI and spinlock assistance, IPI and TLB flush hypercalls.
const KVM_FEATURES: u32 = bit(0) // clock, by the old MSRs
    | bit(1) // port I/O needs no delays
    | bit(3) // clock
    | bit(15) // MSI addresses have 15 destination bits
    | bit(24); // the clock's flag for agreeing clocks can be relied on

/// "KVMKVMKVM", as EBX, ECX, EDX.
const KVM_SIGNATURE: [u32; 3] = [0x4b4d_564b, 0x564b_4d56, 0x4d];

/// `mask` if `condition`.
const fn when(condition: bool, mask: u32) -> u32 {
    if condition {
        mask
    } else {
        0
    }
}

/// The rules of a leaf and sub-leaf; `None` for leaves that no guest gets.
pub(super) fn rules(function: u32, index: u32, caps: &Caps, host: HostCpuid<'_>) -> Option<Rules> {
    use Rule as R;
    let xcr0 = caps.xcr0 & SUPPORTED_XCR0;
    let avx = xcr0 & (SSE | AVX) == SSE | AVX;
    let avx512 = avx && xcr0 & AVX512 == AVX512;
    let pkru = xcr0 & PKRU != 0;
    let vendor = Vendor::of(&host(0, 0));
    Some(match (function, index) {
        (0, _) => [R::ours(MAX_BASIC), R::INFORMATION, R::INFORMATION, R::INFORMATION],
        (1, _) => {
            let ecx = LEAF_1_ECX | when(avx, LEAF_1_ECX_AVX);
            [
                R::INFORMATION,
                // CLFLUSH size from the host; one processor, whose APIC id is filled in when the guest looks.
                R { host: 0xff00, own: 1 << 16, free: u32::MAX },
                R { host: ecx, own: LEAF_1_ECX_OWN, free: LEAF_1_ECX_DYNAMIC },
                R { host: LEAF_1_EDX, own: LEAF_1_EDX_OWN, free: LEAF_1_EDX_TOPOLOGY },
            ]
        }
        (2, _) if vendor == Vendor::Intel => [R::INFORMATION; 4],
        // Bits 31:14 say how many share the cache: nobody but this processor, until the VMM says otherwise.
        (4, _) if vendor == Vendor::Intel => {
            [R { host: 0x3fff, own: 0, free: u32::MAX }, R::INFORMATION, R::INFORMATION, R::INFORMATION]
        }
        (6, _) => [R { host: 0, own: LEAF_6_EAX_OWN, free: 0 }, R::NONE, R::NONE, R::NONE],
        (7, 0) => {
            let ebx = LEAF_7_EBX | when(avx, LEAF_7_EBX_AVX) | when(avx512, LEAF_7_EBX_AVX512);
            let ecx =
                LEAF_7_ECX | when(avx, LEAF_7_ECX_AVX) | when(avx512, LEAF_7_ECX_AVX512) | when(pkru, LEAF_7_ECX_PKRU);
            let edx =
                LEAF_7_EDX | when(avx512, LEAF_7_EDX_AVX512) | when(caps.speculation_control, LEAF_7_EDX_SPECULATION);
            [
                // The number of sub-leaves; those we do not know are refused one by one.
                R { host: 1, own: 0, free: 1 },
                R::features(ebx),
                R { host: ecx, own: 0, free: LEAF_7_ECX_DYNAMIC },
                R::features(edx),
            ]
        }
        (7, 1) => {
            let eax = LEAF_7_1_EAX | when(avx, LEAF_7_1_EAX_AVX) | when(avx512, LEAF_7_1_EAX_AVX512);
            [R::features(eax), R::NONE, R::NONE, R::features(when(avx, LEAF_7_1_EDX_AVX))]
        }
        // Topology: one thread in one core, until the VMM says otherwise.
        (0xb, 0) => [R::ours(0), R::ours(1), R::ours(1 << 8), R::ours(0)],
        (0xb, 1) => [R::ours(0), R::ours(1), R::ours((2 << 8) | 1), R::ours(0)],
        (0xb, _) => [R::ours(0); 4],
        // Sizes are computed when the guest looks; for the components the host's are the only right ones.
        (0xd, 0) => [R::features(xcr0 as u32), R::INFORMATION, R::INFORMATION, R::features((xcr0 >> 32) as u32)],
        (0xd, 1) => [R::features(LEAF_D_1_EAX), R::INFORMATION, R::NONE, R::NONE],
        (0xd, 2..=63) if (xcr0 >> index) & 1 != 0 => {
            [R::features(u32::MAX), R::features(u32::MAX), R::features(bit(1)), R::NONE]
        }

        (0x4000_0000, _) => {
            [R::ours(MAX_HYPERVISOR), R::ours(KVM_SIGNATURE[0]), R::ours(KVM_SIGNATURE[1]), R::ours(KVM_SIGNATURE[2])]
        }
        (0x4000_0001, _) => [R::ours(KVM_FEATURES), R::ours(0), R::ours(0), R::ours(0)],
        (0x4000_0010, _) => [R::ours(caps.tsc_khz), R::ours(APIC_BUS_KHZ), R::ours(0), R::ours(0)],
        // What a VMM presents as a hypervisor is between it and its guest.
        (0x4000_0000..=0x4fff_ffff, _) => [R::ours(0); 4],

        (0x8000_0000, _) => [
            R { host: 0, own: max_extended(vendor, host), free: u32::MAX },
            R::INFORMATION,
            R::INFORMATION,
            R::INFORMATION,
        ],
        (0x8000_0001, _) => {
            let ecx = LEAF_8_1_ECX | when(avx, LEAF_8_1_ECX_AVX);
            let (repeated, apic) = match vendor {
                Vendor::Amd => (LEAF_1_EDX & LEAF_8_1_EDX_REPEATED, LEAF_1_EDX_OWN),
                Vendor::Intel => (0, 0),
            };
            [
                R::INFORMATION,
                R::INFORMATION,
                R { host: ecx, own: 0, free: LEAF_8_1_ECX_TOPOLOGY },
                R { host: LEAF_8_1_EDX | repeated, own: apic, free: 0 },
            ]
        }
        // The processor's name; caches and TLBs.
        (0x8000_0002..=0x8000_0006, _) => [R::INFORMATION; 4],
        (0x8000_0007, _) => [R::NONE, R::NONE, R::NONE, R::features(LEAF_8_7_EDX)],
        (0x8000_0008, _) => {
            let ebx = LEAF_8_8_EBX | when(caps.speculation_control, LEAF_8_8_EBX_SPECULATION);
            // EAX is checked as numbers, by `address_widths`. ECX is topology: one core.
            [R { host: 0xff00, own: caps.phys_bits & 0xff, free: u32::MAX }, R::features(ebx), R::ours(0), R::NONE]
        }
        // TLBs for 1 GiB pages; which SSE and AVX operations are fast.
        (0x8000_0019 | 0x8000_001a, _) if vendor == Vendor::Amd => [R::INFORMATION; 4],
        // Caches, as in leaf 4.
        (0x8000_001d, _) if vendor == Vendor::Amd => {
            [R { host: 0x3fff, own: 0, free: u32::MAX }, R::INFORMATION, R::INFORMATION, R::INFORMATION]
        }
        // Topology: core 0 of one, in node 0 of one.
        (0x8000_001e, _) if vendor == Vendor::Amd => [R::ours(0), R::ours(0), R::ours(0), R::NONE],
        (0x8000_0021, _) if vendor == Vendor::Amd => [R::features(LEAF_8_21_EAX), R::NONE, R::NONE, R::NONE],
        _ => return None,
    })
}

/// The last extended leaf offered.
fn max_extended(vendor: Vendor, host: HostCpuid<'_>) -> u32 {
    let limit = match vendor {
        Vendor::Amd => MAX_EXTENDED_AMD,
        Vendor::Intel => MAX_EXTENDED_INTEL,
    };
    host(0x8000_0000, 0).eax.clamp(MAX_EXTENDED_INTEL, limit)
}

/// The host's answer, or zeros if it does not have the leaf. (Intel processors answer with another leaf's data then.)
pub(super) fn host_leaf(function: u32, index: u32, host: HostCpuid<'_>) -> CpuidResult {
    let exists = match function {
        0..=0x3fff_ffff => function <= host(0, 0).eax,
        // The host may be a guest itself; nothing of its hypervisor is ours to give.
        0x4000_0000..=0x7fff_ffff => false,
        _ => function <= host(0x8000_0000, 0).eax,
    };
    let exists = exists && !(function == 7 && index > host(7, 0).eax);
    if exists {
        host(function, index)
    } else {
        ZERO
    }
}

/// The sub-leaves of `function` that are listed one by one, or `None` if it answers the same for all.
fn sub_leaves(function: u32) -> Option<core::ops::Range<u32>> {
    match function {
        4 | 0x8000_001d => Some(0..8),
        7 | 0xb => Some(0..2),
        0xd => Some(0..64),
        _ => None,
    }
}

/// The table of everything that a guest may be given on this host, in ascending order within each range: a template for a
/// single processor. `write` gets the entries one after the other.
pub fn supported(host: HostCpuid<'_>, caps: &Caps, write: &mut dyn FnMut(CpuidEntry)) {
    let extended = max_extended(Vendor::of(&host(0, 0)), host);
    let hypervisor = [0x4000_0000, 0x4000_0001, 0x4000_0010];
    for function in (0..=MAX_BASIC).chain(hypervisor).chain(0x8000_0000..=extended) {
        let flags = if sub_leaves(function).is_some() { CPUID_INDEX_SIGNIFICANT } else { 0 };
        for index in sub_leaves(function).unwrap_or(0..1) {
            let Some([eax, ebx, ecx, edx]) = rules(function, index, caps, host) else { continue };
            let hardware = host_leaf(function, index, host);
            // The list of caches ends with a cache of type 0.
            if matches!(function, 4 | 0x8000_001d) && hardware.eax & 0x1f == 0 {
                break;
            }
            let mut entry = CpuidEntry {
                function,
                index,
                flags,
                eax: eax.offer(hardware.eax),
                ebx: ebx.offer(hardware.ebx),
                ecx: ecx.offer(hardware.ecx),
                edx: edx.offer(hardware.edx),
                reserved: 0,
            };
            if (function, index) == (0xd, 0) {
                entry.ecx = xsave_size(caps.xcr0 & SUPPORTED_XCR0, |component| {
                    let component = host_leaf(0xd, component, host);
                    (component.eax, component.ebx)
                });
                entry.ebx = entry.ecx;
            }
            write(entry);
        }
    }
}

/// Size of an XSAVE area in the standard format for the components of `xcr0`; `component` gives size and offset of one.
pub(super) fn xsave_size(xcr0: u64, component: impl Fn(u32) -> (u32, u32)) -> u32 {
    // x87 and SSE state and the header are always there (SDM vol. 1 section 13.4).
    (2..64).filter(|index| (xcr0 >> index) & 1 != 0).fold(576, |end, index| {
        let (size, offset) = component(index);
        end.max(size.saturating_add(offset))
    })
}

/// Whether EAX of leaf 0x80000008 may be `eax`: no wider physical address than there is, and a linear address of a width that
/// paging has, 57 bits only with five-level paging.
pub(super) fn address_widths(eax: u32, caps: &Caps, host: HostCpuid<'_>) -> bool {
    let five_levels = host_leaf(7, 0, host).ecx & bit(16) != 0;
    let (physical, linear) = (eax & 0xff, (eax >> 8) & 0xff);
    (32..=caps.phys_bits).contains(&physical)
        && (linear == 48 || linear == 32 || linear == 57 && five_levels)
        && eax >> 24 == 0
}
