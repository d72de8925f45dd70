// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The CPUID table of one vCPU: loading with validation, answering, and questions about features.

use axvcpu_uapi::x86::{CpuidEntry, CPUID_INDEX_SIGNIFICANT};
use vcpu_core::{AxError, AxResult, AxVCpuHal};

use super::policy::{address_widths, host_leaf, rules, xsave_size, SUPPORTED_XCR0};
use super::{Caps, CpuidResult, HostCpuid, Vendor, ZERO};
use crate::frame::{Framed, FRAME};

/// Entries in a table, at most: one frame full.
pub const MAX_ENTRIES: usize = FRAME / size_of::<CpuidEntry>();
/// As many leaves of a range are found without a search.
const NEAR: usize = 36;

/// CR4.OSXSAVE.
const CR4_OSXSAVE: u64 = 1 << 18;
/// CR4.PKE.
const CR4_PKE: u64 = 1 << 22;

/// What answers depend on besides the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dynamic {
    /// CR4: OSXSAVE and OSPKE show in the feature bits.
    pub cr4: u64,
    /// XCR0: gives the size of the XSAVE area.
    pub xcr0: u64,
    /// The local APIC is enabled in IA32_APIC_BASE: otherwise its feature bit is clear.
    pub apic_enabled: bool,
    /// APIC id.
    pub apic_id: u32,
}

/// One of the four result registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Register {
    Ebx,
    Ecx,
    Edx,
}

/// A feature bit that the backends' register policy asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Feature {
    function: u32,
    register: Register,
    bit: u32,
}

macro_rules! features {
    ($($name:ident = $function:literal, $register:ident, $bit:literal, $doc:literal;)+) => {
        impl Feature {
            $(#[doc = $doc] pub const $name: Self = Self { function: $function, register: Register::$register, bit: $bit };)+
        }
    };
}

features! {
    VME = 1, Edx, 1, "CR4.VME and CR4.PVI.";
    DE = 1, Edx, 2, "CR4.DE.";
    PSE = 1, Edx, 3, "CR4.PSE.";
    TSC = 1, Edx, 4, "CR4.TSD.";
    PAE = 1, Edx, 6, "CR4.PAE.";
    MCE = 1, Edx, 7, "CR4.MCE.";
    SEP = 1, Edx, 11, "SYSENTER and its MSRs.";
    MTRR = 1, Edx, 12, "The MTRRs.";
    PGE = 1, Edx, 13, "CR4.PGE.";
    MCA = 1, Edx, 14, "The machine-check MSRs.";
    PAT = 1, Edx, 16, "IA32_PAT.";
    FXSR = 1, Edx, 24, "CR4.OSFXSR.";
    SSE = 1, Edx, 25, "CR4.OSXMMEXCPT.";
    PCID = 1, Ecx, 17, "CR4.PCIDE.";
    X2APIC = 1, Ecx, 21, "x2APIC mode.";
    TSC_DEADLINE = 1, Ecx, 24, "IA32_TSC_DEADLINE.";
    XSAVE = 1, Ecx, 26, "CR4.OSXSAVE and XCR0.";
    FSGSBASE = 7, Ebx, 0, "CR4.FSGSBASE.";
    SMEP = 7, Ebx, 7, "CR4.SMEP.";
    INVPCID = 7, Ebx, 10, "INVPCID.";
    SMAP = 7, Ebx, 20, "CR4.SMAP.";
    UMIP = 7, Ecx, 2, "CR4.UMIP.";
    PKU = 7, Ecx, 3, "CR4.PKE.";
    LA57 = 7, Ecx, 16, "CR4.LA57.";
    RDPID = 7, Ecx, 22, "RDPID, which reads TSC_AUX.";
    SPEC_CTRL = 7, Edx, 26, "SPEC_CTRL and PRED_CMD, as Intel tells it.";
    STIBP = 7, Edx, 27, "SPEC_CTRL.STIBP, as Intel tells it.";
    ARCH_CAPABILITIES = 7, Edx, 29, "ARCH_CAPABILITIES.";
    SSBD = 7, Edx, 31, "SPEC_CTRL.SSBD, as Intel tells it.";
    SYSCALL = 0x8000_0001, Edx, 11, "EFER.SCE.";
    NX = 0x8000_0001, Edx, 20, "EFER.NXE.";
    RDTSCP = 0x8000_0001, Edx, 27, "RDTSCP and TSC_AUX.";
    LM = 0x8000_0001, Edx, 29, "EFER.LME.";
    AMD_IBPB = 0x8000_0008, Ebx, 12, "PRED_CMD, as AMD tells it.";
    AMD_IBRS = 0x8000_0008, Ebx, 14, "SPEC_CTRL.IBRS, as AMD tells it.";
    AMD_STIBP = 0x8000_0008, Ebx, 15, "SPEC_CTRL.STIBP, as AMD tells it.";
    AMD_SSBD = 0x8000_0008, Ebx, 24, "SPEC_CTRL.SSBD, as AMD tells it.";
    AMD_PSFD = 0x8000_0008, Ebx, 28, "SPEC_CTRL.PSFD, as AMD tells it.";
}

/// `value` with its bit number `bit` set or clear.
#[inline]
const fn flag(value: u32, bit: u32, set: bool) -> u32 {
    if set {
        value | (1 << bit)
    } else {
        value & !(1 << bit)
    }
}

/// A vCPU's CPUID table, in a frame of its own.
pub struct CpuidTable<H: AxVCpuHal> {
    /// The first `count` are in use, in the order of leaf and sub-leaf.
    entries: Framed<[CpuidEntry; MAX_ENTRIES], H>,
    count: usize,
    /// The position behind the first entry of each of the leaves from 0, and of those from 0x8000_0000; 0 for none.
    first: [[u8; NEAR]; 2],
    /// Leaf 0.
    basic: CpuidResult,
    /// The last extended leaf.
    last_extended: u32,
}

impl<H: AxVCpuHal> CpuidTable<H> {
    /// Loads a table of `count` entries, which `read` gives one by one, and checks it against what `host` and `caps` allow.
    ///
    /// # Errors
    /// - [`AxError::LimitReached`] for more than [`MAX_ENTRIES`] entries, [`AxError::NoMemory`].
    /// - [`AxError::InvalidInput`] if an entry has unknown flags, a reserved field, or an index without
    ///   [`CPUID_INDEX_SIGNIFICANT`]; if two entries answer the same question; or if a guest cannot have what one says: features
    ///   that the hardware lacks or that are not switched, leaves that are not offered (all zeros are fine), wider addresses,
    ///   other XSAVE layouts.
    /// - What `read` fails with.
    pub fn load(
        count: usize,
        mut read: impl FnMut(usize) -> AxResult<CpuidEntry>,
        host: HostCpuid<'_>,
        caps: &Caps,
    ) -> AxResult<Self> {
        if count > MAX_ENTRIES {
            return Err(AxError::LimitReached);
        }
        let mut table =
            Self { entries: Framed::zeroed()?, count: 0, first: [[0; NEAR]; 2], basic: ZERO, last_extended: 0 };
        for position in 0..count {
            let entry = read(position)?;
            if !is_well_formed(&entry) || table.find(entry.function, entry.index).is_some() {
                return Err(AxError::InvalidInput);
            }
            // An entry for every index excludes all that are for one index.
            let for_all = entry.flags & CPUID_INDEX_SIGNIFICANT == 0;
            if for_all && table.used().iter().any(|other| other.function == entry.function) {
                return Err(AxError::InvalidInput);
            }
            if !is_allowed(&entry, host, caps) {
                return Err(AxError::InvalidInput);
            }
            table.insert(&entry);
        }
        table.basic = table.raw(0, 0);
        table.last_extended = table.raw(0x8000_0000, 0).eax;
        Ok(table)
    }

    fn insert(&mut self, entry: &CpuidEntry) {
        let at = self.used().partition_point(|other| key(other) < key(entry));
        self.count = self.count.saturating_add(1);
        if let Some(tail) = self.entries.get_mut(at..self.count) {
            tail.rotate_right(1);
            if let Some(first) = tail.first_mut() {
                *first = *entry;
            }
        }
        self.note_leaves();
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether there is no entry.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    fn used(&self) -> &[CpuidEntry] {
        self.entries.get(..self.count).unwrap_or_default()
    }

    /// The entries, in the order of leaf and sub-leaf.
    pub fn entries(&self) -> impl Iterator<Item = CpuidEntry> + '_ {
        self.used().iter().copied()
    }

    /// CPUID 1 EAX: family, model and stepping; 0 if there is no such leaf.
    pub fn signature(&self) -> u32 {
        self.find(1, 0).map_or(0, |entry| entry.eax)
    }

    /// The entry for a leaf and sub-leaf.
    #[inline]
    fn find(&self, function: u32, index: u32) -> Option<&CpuidEntry> {
        let mut position = self.first_of(function)?;
        loop {
            let entry =
                self.entries.get(position).filter(|entry| position < self.count && entry.function == function)?;
            if entry.flags & CPUID_INDEX_SIGNIFICANT == 0 || entry.index == index {
                return Some(entry);
            }
            position = position.wrapping_add(1);
        }
    }

    /// Where the entries of a leaf begin, if it has any.
    #[inline]
    fn first_of(&self, function: u32) -> Option<usize> {
        let [basic, extended] = &self.first;
        let range = if function >> 31 != 0 { extended } else { basic };
        match range.get((function & 0x7fff_ffff) as usize) {
            Some(&position) => usize::from(position).checked_sub(1),
            None => Some(self.used().partition_point(|entry| entry.function < function)),
        }
    }

    /// Notes where the leaves begin.
    fn note_leaves(&mut self) {
        self.first = [[0; NEAR]; 2];
        for (position, entry) in (1u8..).zip(self.entries.iter().take(self.count)) {
            let [basic, extended] = &mut self.first;
            let range = match entry.function >> 30 {
                0 => basic,
                2 => extended,
                _ => continue,
            };
            if let Some(first @ 0) = range.get_mut((entry.function & 0x3fff_ffff) as usize) {
                *first = position;
            }
        }
    }

    /// The entry for a leaf and sub-leaf as a result; zeros if there is none.
    #[inline]
    fn raw(&self, function: u32, index: u32) -> CpuidResult {
        self.find(function, index).map_or(ZERO, result)
    }

    /// Whether the guest has a feature.
    pub fn has(&self, feature: Feature) -> bool {
        let leaf = self.raw(feature.function, 0);
        let register = match feature.register {
            Register::Ebx => leaf.ebx,
            Register::Ecx => leaf.ecx,
            Register::Edx => leaf.edx,
        };
        register.wrapping_shr(feature.bit) & 1 != 0
    }

    /// Bits that the guest may set in XCR0: those of leaf 0xd; zero without XSAVE.
    pub fn xcr0(&self) -> u64 {
        if !self.has(Feature::XSAVE) {
            return 0;
        }
        let leaf = self.raw(0xd, 0);
        (u64::from(leaf.edx) << 32) | u64::from(leaf.eax)
    }

    /// Width of a guest physical address, in bits: 36 where leaf 0x80000008 does not say (SDM vol. 3 section 4.1.4).
    pub fn phys_bits(&self) -> u32 {
        match self.raw(0x8000_0008, 0).eax & 0xff {
            0 => 36,
            bits => bits,
        }
    }

    /// Bits that the guest may set in CR4, from its features. (CR4.PCE, which needs no feature, is among them.)
    pub fn cr4_bits(&self) -> u64 {
        [
            (Feature::VME, (1 << 0) | (1 << 1)),
            (Feature::TSC, 1 << 2),
            (Feature::DE, 1 << 3),
            (Feature::PSE, 1 << 4),
            (Feature::PAE, 1 << 5),
            (Feature::MCE, 1 << 6),
            (Feature::PGE, 1 << 7),
            (Feature::FXSR, 1 << 9),
            (Feature::SSE, 1 << 10),
            (Feature::UMIP, 1 << 11),
            (Feature::LA57, 1 << 12),
            (Feature::FSGSBASE, 1 << 16),
            (Feature::PCID, 1 << 17),
            (Feature::XSAVE, CR4_OSXSAVE),
            (Feature::SMEP, 1 << 20),
            (Feature::SMAP, 1 << 21),
            (Feature::PKU, CR4_PKE),
        ]
        .into_iter()
        .fold(1 << 8, |bits, (feature, bit)| if self.has(feature) { bits | bit } else { bits })
    }

    /// Bits that the guest may set in EFER, from its features: SCE, LME with LMA, NXE.
    pub fn efer_bits(&self) -> u64 {
        [(Feature::SYSCALL, 1 << 0), (Feature::LM, (1 << 8) | (1 << 10)), (Feature::NX, 1 << 11)]
            .into_iter()
            .fold(0, |bits, (feature, bit)| if self.has(feature) { bits | bit } else { bits })
    }

    /// What the guest's CPUID instruction gives for `function` in EAX and `index` in ECX.
    #[inline(always)] // Where it is inlined the answer needs no memory.
    pub fn lookup(&self, function: u32, index: u32, dynamic: &Dynamic) -> CpuidResult {
        // The leaf that is asked for most often, and that every table has.
        if function != 1 || self.basic.eax == 0 {
            return self.lookup_rarer(function, index, dynamic);
        }
        let mut leaf = self.raw(1, index);
        leaf.ebx = leaf.ebx & 0x00ff_ffff | (dynamic.apic_id << 24);
        let osxsave = (leaf.ecx >> 26) & 1 != 0 && dynamic.cr4 & CR4_OSXSAVE != 0;
        leaf.ecx = flag(leaf.ecx, 27, osxsave);
        leaf.edx = flag(leaf.edx, 9, (leaf.edx >> 9) & 1 != 0 && dynamic.apic_enabled);
        leaf
    }

    #[inline(never)]
    fn lookup_rarer(&self, function: u32, index: u32, dynamic: &Dynamic) -> CpuidResult {
        let Some(function) = self.in_range(function) else { return ZERO };
        let mut leaf = self.raw(function, index);
        match (function, index) {
            (7, 0) => {
                let ospke = (leaf.ecx >> 3) & 1 != 0 && dynamic.cr4 & CR4_PKE != 0;
                leaf.ecx = flag(leaf.ecx, 4, ospke);
            }
            // Every sub-leaf gives the id and its own number, also past the last (SDM vol. 2A, CPUID leaf 0bh).
            (0xb, _) if self.find(0xb, 0).is_some() => {
                leaf.ecx = leaf.ecx & !0xff | index & 0xff;
                leaf.edx = dynamic.apic_id;
            }
            (0xd, 0) if leaf.eax != 0 => {
                let component = |index| {
                    let component = self.raw(0xd, index);
                    (component.eax, component.ebx)
                };
                leaf.ebx = xsave_size(dynamic.xcr0, component);
                leaf.ecx = xsave_size(self.xcr0(), component);
            }
            // With XSAVEC, the size of the compacted format for what is enabled.
            (0xd, 1) => leaf.ebx = if leaf.eax & (1 << 1) != 0 { self.compacted_size(dynamic.xcr0) } else { 0 },
            (0x8000_0001, _) if Vendor::of(&self.basic) == Vendor::Amd => {
                leaf.edx = flag(leaf.edx, 9, (leaf.edx >> 9) & 1 != 0 && dynamic.apic_enabled);
            }
            (0x8000_001e, _) if self.find(0x8000_001e, 0).is_some() => leaf.eax = dynamic.apic_id,
            _ => {}
        }
        leaf
    }

    /// The leaf that answers for `function`: itself if it is in its range, otherwise none on AMD, and on Intel the last basic
    /// leaf (SDM vol. 2A, CPUID).
    fn in_range(&self, function: u32) -> Option<u32> {
        let last = match function {
            0..=0x3fff_ffff => self.basic.eax,
            // Hypervisors stack their ranges 0x100 apart.
            0x4000_0000..=0x4fff_ffff => self.raw(function & !0xff, 0).eax,
            0x8000_0000..=0x8000_ffff => self.last_extended,
            _ => self.raw(function & 0xffff_0000, 0).eax,
        };
        if function <= last {
            Some(function)
        } else if Vendor::of(&self.basic) == Vendor::Intel {
            Some(self.basic.eax)
        } else {
            None
        }
    }

    /// Size of an XSAVE area in the compacted format (SDM vol. 1 section 13.4.3).
    fn compacted_size(&self, xcr0: u64) -> u32 {
        (2..64).filter(|index| (xcr0 >> index) & 1 != 0).fold(576, |end: u32, index| {
            let component = self.raw(0xd, index);
            let aligned = component.ecx & (1 << 1) != 0;
            let start = if aligned { end.checked_next_multiple_of(64).unwrap_or(end) } else { end };
            start.saturating_add(component.eax)
        })
    }
}

/// Orders entries by leaf and sub-leaf.
fn key(entry: &CpuidEntry) -> u64 {
    u64::from(entry.function) << 32 | u64::from(entry.index)
}

fn result(entry: &CpuidEntry) -> CpuidResult {
    CpuidResult { eax: entry.eax, ebx: entry.ebx, ecx: entry.ecx, edx: entry.edx }
}

/// Whether the fields beside the answer are as the ABI wants them.
fn is_well_formed(entry: &CpuidEntry) -> bool {
    entry.reserved == 0
        && entry.flags & !CPUID_INDEX_SIGNIFICANT == 0
        && (entry.flags & CPUID_INDEX_SIGNIFICANT != 0 || entry.index == 0)
}

/// Whether a guest may get this entry's answer.
fn is_allowed(entry: &CpuidEntry, host: HostCpuid<'_>, caps: &Caps) -> bool {
    let answer = [entry.eax, entry.ebx, entry.ecx, entry.edx];
    let Some(rules) = rules(entry.function, entry.index, caps, host) else {
        return answer == [0; 4];
    };
    let hardware = host_leaf(entry.function, entry.index, host);
    let hardware = [hardware.eax, hardware.ebx, hardware.ecx, hardware.edx];
    let bits = rules.iter().zip(answer).zip(hardware).all(|((rule, answer), hardware)| rule.allows(answer, hardware));
    bits && match (entry.function, entry.index) {
        // One entry for every index would answer for the components as well.
        (0xd, _) if entry.flags & CPUID_INDEX_SIGNIFICANT == 0 => answer == [0; 4],
        (0xd, 0) => is_xcr0_mask((u64::from(entry.edx) << 32) | u64::from(entry.eax)),
        // Where a component lies is the hardware's affair; it may be left out.
        (0xd, 2..) => answer == hardware || answer == [0; 4],
        (0x8000_0008, _) => address_widths(entry.eax, caps, host),
        _ => true,
    }
}

/// Whether these components can be offered together: x87 always, AVX with SSE, AVX-512 whole and with AVX. Or none at all.
fn is_xcr0_mask(mask: u64) -> bool {
    let has = |bits: u64| mask & bits == bits;
    let avx512 = mask & 0xe0;
    mask == 0 || (has(1) && mask & !SUPPORTED_XCR0 == 0 && (has(1 << 1) || !has(1 << 2)) && (avx512 == 0 || has(0xe6)))
}
