// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! Which register values are valid: for the register sets that userspace loads, and for the writes of the guest that exit.
//! The rules are those of the architecture (APM vol. 2 chapters 3, 4, 5 and 13 and section 15.5.1), narrowed to what the vCPU's
//! CPUID offers. What passes here, the hardware accepts at VM entry.

use axvcpu_uapi::x86::{Control, Debug, General, Segment, Segments};
use vcpu_core::{AxError, AxResult, AxVCpuHal};

use super::{cr0, cr4, efer, rflags, segment, xcr0, DR6_FIXED, DR6_VOLATILE, DR7_FIXED};
use crate::cpuid::CpuidTable;
use crate::fault::{GeneralProtection, GuestResult};

/// Bits of DR7 that must be zero: 11, 12, 14, 15 and the upper half.
const DR7_RESERVED: u64 = !0xffff_27ff;

/// What a vCPU's registers can hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Width of a guest physical address.
    pub(crate) phys_bits: u32,
    /// Bits that CR4 may have.
    pub(crate) cr4: u64,
    /// Bits that EFER may have, LMA included.
    pub(crate) efer: u64,
    /// Bits that XCR0 may have; 0 without XSAVE.
    pub(crate) xcr0: u64,
}

impl Limits {
    /// The limits of a vCPU with this CPUID table, which has been checked against the host, on a CPU that offers `xcr0`.
    pub(crate) fn new<H: AxVCpuHal>(cpuid: &CpuidTable<H>, xcr0: u64) -> Self {
        Self { phys_bits: cpuid.phys_bits(), cr4: cpuid.cr4_bits(), efer: cpuid.efer_bits(), xcr0: cpuid.xcr0() & xcr0 }
    }

    /// Whether `address` is canonical in the widest paging mode that the vCPU has.
    pub(crate) fn canonical(&self, address: u64) -> bool {
        let unused = if self.cr4 & cr4::LA57 != 0 { 64 - 57 } else { 64 - 48 };
        ((address << unused) as i64 >> unused) as u64 == address
    }

    /// Whether XCR0 may be `value`.
    pub(crate) fn xcr0_valid(&self, value: u64) -> bool {
        value & !self.xcr0 == 0
            && value & xcr0::X87 != 0
            && (value & xcr0::AVX == 0 || value & xcr0::SSE != 0)
            && (value & xcr0::AVX512 == 0 || value & (xcr0::AVX512 | xcr0::AVX) == xcr0::AVX512 | xcr0::AVX)
    }

    /// Whether CR3 may be `value`.
    pub(crate) fn cr3_valid(&self, value: u64) -> bool {
        value.checked_shr(self.phys_bits).is_none_or(|beyond| beyond == 0)
    }

    /// What MOV to CR0 checks (APM vol. 2 section 3.1.1 and 14.6, and volume 3, MOV CRn); gives CR0 and EFER as they are then.
    pub(crate) fn check_cr0_write(
        &self,
        old: u64,
        new: u64,
        cr4: u64,
        efer: u64,
        code: u16,
    ) -> GuestResult<(u64, u64)> {
        let (was_paging, paging) = (old & cr0::PG != 0, new & cr0::PG != 0);
        let long_mode_next = paging && efer & efer::LME != 0;
        let long_code = code & segment::L != 0;
        let bad = new >> 32 != 0
            || new & (cr0::NW | cr0::CD) == cr0::NW
            || (paging && new & cr0::PE == 0)
            // Long mode is entered with PAE, from code that is not 64-bit code, and left from code that is not either.
            || (long_mode_next && !was_paging && (cr4 & cr4::PAE == 0 || long_code))
            || (was_paging && !paging && (cr4 & cr4::PCIDE != 0 || (efer & efer::LMA != 0 && long_code)));
        if bad {
            return Err(GeneralProtection);
        }
        let efer = if long_mode_next { efer | efer::LMA } else { efer & !efer::LMA };
        // ET is one, and the other undefined bits are not stored.
        Ok((new & cr0::DEFINED | cr0::ET, efer))
    }

    /// What MOV to CR4 checks (APM vol. 2 section 3.1.3, and volume 3, MOV CRn).
    pub(crate) fn check_cr4_write(&self, old: u64, new: u64, cr3: u64, efer: u64) -> GuestResult {
        let long_mode = efer & efer::LMA != 0;
        let changed = old ^ new;
        let bad = new & !self.cr4 != 0
            || (long_mode && (new & cr4::PAE == 0 || changed & cr4::LA57 != 0))
            || (changed & new & cr4::PCIDE != 0 && (!long_mode || cr3 & 0xfff != 0));
        if bad {
            return Err(GeneralProtection);
        }
        Ok(())
    }

    /// What WRMSR to EFER checks; gives the new value with LMA as it was.
    pub(crate) fn check_efer_write(&self, old: u64, new: u64, cr0: u64) -> GuestResult<u64> {
        // LMA is read-only; Linux and others write back what they have read.
        let new = new & !efer::LMA | old & efer::LMA;
        if new & !self.efer != 0 || ((old ^ new) & efer::LME != 0 && cr0 & cr0::PG != 0) {
            return Err(GeneralProtection);
        }
        Ok(new)
    }

    /// Checks a general register set, and gives RFLAGS with its fixed bit.
    ///
    /// # Errors
    /// [`AxError::InvalidRegister`].
    pub(crate) fn check_general(&self, general: &General) -> AxResult<u64> {
        if general.rflags & !rflags::DEFINED != 0 || !self.canonical(general.rip) {
            return Err(AxError::InvalidRegister);
        }
        Ok(general.rflags | rflags::FIXED)
    }

    /// Checks control registers. `code` is the attributes of CS that go with them. Does not look at `apic_base`.
    ///
    /// # Errors
    /// [`AxError::InvalidRegister`].
    pub(crate) fn check_control(&self, c: &Control, code: u16) -> AxResult {
        let paging = c.cr0 & cr0::PG != 0;
        let long_mode = c.efer & efer::LMA != 0;
        let bad = c.cr0 & !cr0::DEFINED != 0
            || c.cr0 & (cr0::NW | cr0::CD) == cr0::NW
            || (paging && c.cr0 & cr0::PE == 0)
            || !self.cr3_valid(c.cr3)
            || c.cr4 & !self.cr4 != 0
            || c.efer & !self.efer != 0
            || long_mode != (paging && c.efer & efer::LME != 0)
            || (long_mode && c.cr4 & cr4::PAE == 0)
            || (!long_mode && c.cr4 & cr4::PCIDE != 0)
            || (long_mode && code_is_ambiguous(code))
            || c.cr8 > 15
            || !(self.xcr0_valid(c.xcr0) || (self.xcr0 == 0 && c.xcr0 == xcr0::X87));
        if bad {
            return Err(AxError::InvalidRegister);
        }
        Ok(())
    }

    /// Checks segments that go with `efer`.
    ///
    /// # Errors
    /// [`AxError::InvalidRegister`].
    pub(crate) fn check_segments(&self, s: &Segments, efer: u64) -> AxResult {
        let all = [&s.es, &s.cs, &s.ss, &s.ds, &s.fs, &s.gs, &s.ldtr, &s.tr];
        let bad = all.into_iter().any(|segment| !segment_consistent(segment))
            || [s.fs.base, s.gs.base, s.ldtr.base, s.tr.base, s.gdtr.base, s.idtr.base]
                .into_iter()
                .any(|base| !self.canonical(base))
            // The others have 32-bit bases in every mode.
            || [s.es.base, s.cs.base, s.ss.base, s.ds.base].into_iter().any(|base| base >> 32 != 0)
            || (efer & efer::LMA != 0 && code_is_ambiguous(s.cs.attributes))
            // A CPU always has a task register: a busy TSS, in long mode too of either kind until LTR.
            || s.tr.attributes & (segment::P | segment::S) != segment::P
            || !matches!(s.tr.attributes & segment::TYPE, 3 | 11)
            || (s.ldtr.attributes & segment::P != 0 && s.ldtr.attributes & (segment::S | segment::TYPE) != 2);
        if bad {
            return Err(AxError::InvalidRegister);
        }
        Ok(())
    }
}

/// L and D together mean nothing, and VMRUN refuses them.
fn code_is_ambiguous(code: u16) -> bool {
    code & (segment::L | segment::DB) == segment::L | segment::DB
}

/// Whether the attributes are such as a descriptor can have, and fit the limit.
fn segment_consistent(s: &Segment) -> bool {
    if s.attributes & !segment::DEFINED != 0 {
        return false;
    }
    if s.attributes & segment::P == 0 {
        return true;
    }
    // A limit in pages ends with a page, one in bytes has 20 bits.
    let pages = s.limit & 0xfff == 0xfff;
    let bytes = s.limit >> 20 == 0;
    if s.attributes & segment::G != 0 {
        pages
    } else {
        bytes
    }
}

/// Checks debug registers, and gives them with their fixed bits.
///
/// # Errors
/// [`AxError::InvalidRegister`].
pub(crate) fn check_debug(debug: &Debug) -> AxResult<Debug> {
    if debug.dr6 & !(DR6_FIXED | DR6_VOLATILE) != 0 || debug.dr7 & DR7_RESERVED != 0 {
        return Err(AxError::InvalidRegister);
    }
    Ok(Debug { dr: debug.dr, dr6: debug.dr6 | DR6_FIXED, dr7: debug.dr7 | DR7_FIXED })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A vCPU with every feature.
    fn limits() -> Limits {
        Limits { phys_bits: 48, cr4: 0x77_1fff, efer: 0xd01, xcr0: xcr0::OFFERED }
    }

    fn real_mode() -> Control {
        Control { cr0: cr0::ET, xcr0: 1, ..Control::default() }
    }

    fn long_mode() -> Control {
        Control {
            cr0: cr0::PE | cr0::PG | cr0::ET,
            cr3: 0x1000,
            cr4: cr4::PAE,
            efer: efer::LME | efer::LMA,
            xcr0: 7,
            ..Control::default()
        }
    }

    const CODE16: Segment = Segment { base: 0, limit: 0xffff, selector: 0, attributes: 0x9b };

    fn flat() -> Segments {
        let data = Segment { base: 0, limit: !0, selector: 0x10, attributes: 0xc93 };
        Segments {
            es: data,
            cs: Segment { selector: 8, attributes: 0xa9b, ..data },
            ss: data,
            ds: data,
            fs: data,
            gs: data,
            ldtr: Segment::default(),
            tr: Segment { base: 0, limit: 0x67, selector: 0x18, attributes: 0x8b },
            ..Segments::default()
        }
    }

    #[test]
    fn good_control_registers_pass() {
        for good in [
            real_mode(),
            long_mode(),
            Control { cr0: cr0::PE | cr0::PG | cr0::ET, xcr0: 1, ..Control::default() },
            Control { cr4: cr4::PAE | cr4::PCIDE | cr4::LA57, ..long_mode() },
            Control { efer: efer::LME | efer::NXE | efer::SCE, ..real_mode() },
            Control { cr0: cr0::CD | cr0::NW | cr0::ET, ..real_mode() },
            Control { cr8: 15, xcr0: 0x2e7, ..real_mode() },
            Control { cr3: 0xffff_ffff_f000, cr2: !0, ..real_mode() },
        ] {
            assert_eq!(limits().check_control(&good, CODE16.attributes), Ok(()), "{good:x?}");
        }
    }

    #[test]
    fn bad_control_registers_are_refused() {
        for (why, bad) in [
            ("CR0 upper half", Control { cr0: 1 << 32, ..real_mode() }),
            ("CR0 reserved bit", Control { cr0: 1 << 6, ..real_mode() }),
            ("NW without CD", Control { cr0: cr0::NW, ..real_mode() }),
            ("PG without PE", Control { cr0: cr0::PG, ..real_mode() }),
            ("CR3 beyond the address width", Control { cr3: 1 << 48, ..real_mode() }),
            ("CR4.VMXE", Control { cr4: 1 << 13, ..real_mode() }),
            ("CR4.CET", Control { cr4: 1 << 23, ..real_mode() }),
            ("CR4 upper half", Control { cr4: 1 << 32, ..real_mode() }),
            ("EFER.SVME", Control { efer: efer::SVME, ..real_mode() }),
            ("EFER.LMSLE", Control { efer: 1 << 13, ..real_mode() }),
            ("LMA without paging", Control { efer: efer::LME | efer::LMA, ..real_mode() }),
            ("LMA without LME", Control { efer: efer::LMA, ..long_mode() }),
            ("LME and paging without LMA", Control { efer: efer::LME, ..long_mode() }),
            ("long mode without PAE", Control { cr4: 0, ..long_mode() }),
            ("PCIDE outside of long mode", Control { cr4: cr4::PCIDE, ..real_mode() }),
            ("CR8", Control { cr8: 16, ..real_mode() }),
            ("XCR0 without x87", Control { xcr0: 2, ..real_mode() }),
            ("XCR0 AVX without SSE", Control { xcr0: 5, ..real_mode() }),
            ("XCR0 with part of AVX-512", Control { xcr0: 0x27, ..real_mode() }),
            ("XCR0 AVX-512 without AVX", Control { xcr0: 0xe3, ..real_mode() }),
            ("XCR0 AMX", Control { xcr0: 0x6_0007, ..real_mode() }),
        ] {
            assert_eq!(limits().check_control(&bad, CODE16.attributes), Err(AxError::InvalidRegister), "{why}");
        }
        let both = Segment { attributes: 0xe9b, ..CODE16 };
        assert_eq!(
            limits().check_control(&long_mode(), both.attributes),
            Err(AxError::InvalidRegister),
            "CS.L and CS.D"
        );
        assert_eq!(limits().check_control(&real_mode(), both.attributes), Ok(()));
    }

    #[test]
    fn good_segments_pass_and_bad_ones_are_refused() {
        let check = |s: &Segments, lma: bool| limits().check_segments(s, if lma { efer::LMA } else { 0 });
        assert_eq!(check(&flat(), true), Ok(()));
        let mut real = Segments { tr: Segment { limit: 0xffff, attributes: 0x83, ..flat().tr }, ..flat() };
        for s in [&mut real.es, &mut real.cs, &mut real.ss, &mut real.ds, &mut real.fs, &mut real.gs] {
            *s = Segment { attributes: if s.attributes & 8 != 0 { 0x9b } else { 0x93 }, ..CODE16 };
        }
        real.cs = Segment { base: 0xffff_0000, selector: 0xf000, ..real.cs };
        assert_eq!(check(&real, false), Ok(()));
        type Change = fn(&mut Segments);
        let changes: [(&str, Change); 12] = [
            ("undefined attribute", |s| s.ds.attributes |= 1 << 12),
            ("L and D", |s| s.cs.attributes |= segment::DB),
            ("no TSS", |s| s.tr.attributes = 0),
            ("TSS not busy", |s| s.tr.attributes = 0x89),
            ("TSS is a code segment", |s| s.tr.attributes = 0x9b),
            ("LDT is a data segment", |s| s.ldtr.attributes = 0x93),
            ("FS base not canonical", |s| s.fs.base = 1 << 62),
            ("GDT base not canonical", |s| s.gdtr.base = 1 << 63),
            ("CS base beyond 4 GiB", |s| s.cs.base = 1 << 32),
            ("limit in pages that ends inside of one", |s| s.ds.limit = 0x1234_5678),
            ("limit in bytes beyond 1 MiB", |s| s.ds.attributes &= !segment::G),
            ("TSS limit in pages", |s| s.tr.attributes |= segment::G),
        ];
        for (why, change) in changes {
            let mut bad = flat();
            change(&mut bad);
            assert_eq!(check(&bad, true), Err(AxError::InvalidRegister), "{why}");
        }
    }

    #[test]
    fn general_and_debug_registers_are_checked_and_completed() {
        let l = limits();
        let general = |rip, rflags| General { rip, rflags, ..General::default() };
        assert_eq!(l.check_general(&general(0x1000, 0)), Ok(2));
        assert_eq!(l.check_general(&general(!0, 0x3f_7fd7)), Ok(0x3f_7fd7));
        for (rip, flags) in [(0, 1 << 3), (0, 1 << 5), (0, 1 << 15), (0, 1 << 22), (0, 1 << 63), (1 << 57, 0)] {
            assert_eq!(l.check_general(&general(rip, flags)), Err(AxError::InvalidRegister), "{rip:#x} {flags:#x}");
        }
        let no_la57 = Limits { cr4: cr4::PAE, ..l };
        assert!(no_la57.check_general(&general(1 << 47, 0)).is_err() && l.check_general(&general(1 << 47, 0)).is_ok());

        let debug = |dr6, dr7| Debug { dr: [!0; 4], dr6, dr7 };
        assert_eq!(check_debug(&debug(0, 0)), Ok(debug(0xffff_0ff0, 0x400)));
        assert_eq!(check_debug(&debug(0xffff_effe | 1, 0xffff_27ff)), Ok(debug(0xffff_efff, 0xffff_27ff)));
        for (dr6, dr7) in [(1 << 12, 0), (1 << 32, 0), (0, 1 << 11), (0, 1 << 14), (0, 1 << 32)] {
            assert_eq!(check_debug(&debug(dr6, dr7)), Err(AxError::InvalidRegister), "{dr6:#x} {dr7:#x}");
        }
    }

    #[test]
    fn cr0_writes_of_the_guest() {
        let l = limits();
        let (pe, pg, et) = (cr0::PE, cr0::PG, cr0::ET);
        let (lme, lma) = (efer::LME, efer::LMA);
        let code64 = Segment { attributes: 0xa9b, ..CODE16 };
        type Case = (&'static str, u64, u64, u64, u64, Segment, GuestResult<(u64, u64)>);
        const GP: GuestResult<(u64, u64)> = Err(GeneralProtection);
        let cases: [Case; 13] = [
            ("protected mode", et, pe, 0, 0, CODE16, Ok((pe | et, 0))),
            ("legacy paging", pe | et, pe | pg, 0, 0, CODE16, Ok((pe | pg | et, 0))),
            ("undefined bits are dropped", et, pe | 1 << 6, 0, 0, CODE16, Ok((pe | et, 0))),
            ("into long mode", pe, pe | pg, cr4::PAE, lme, CODE16, Ok((pe | pg | et, lme | lma))),
            ("out of long mode", pe | pg, pe, cr4::PAE, lme | lma, CODE16, Ok((pe | et, lme))),
            (
                "within long mode",
                pe | pg,
                pe | pg | cr0::WP,
                cr4::PAE,
                lme | lma,
                code64,
                Ok((pe | pg | et | cr0::WP, lme | lma)),
            ),
            ("paging without protection", et, pg, 0, 0, CODE16, GP),
            ("NW without CD", et, cr0::NW, 0, 0, CODE16, GP),
            ("upper half", et, 1 << 32, 0, 0, CODE16, GP),
            ("long mode without PAE", pe, pe | pg, 0, lme, CODE16, GP),
            ("long mode from 64-bit code", pe, pe | pg, cr4::PAE, lme, code64, GP),
            ("out of long mode from 64-bit code", pe | pg, pe, cr4::PAE, lme | lma, code64, GP),
            ("no paging with PCIDs", pe | pg, pe, cr4::PAE | cr4::PCIDE, lme | lma, CODE16, GP),
        ];
        for (why, old, new, cr4, efer, cs, expected) in cases {
            assert_eq!(l.check_cr0_write(old, new, cr4, efer, cs.attributes), expected, "{why}");
        }
    }

    #[test]
    fn cr4_writes_of_the_guest() {
        let l = limits();
        let lma = efer::LMA | efer::LME;
        for (old, new, cr3, efer, ok) in [
            (0, cr4::PAE, 0, 0, true),
            (cr4::PAE, 0, 0, 0, true),
            (cr4::PAE, 0, 0, lma, false),
            (cr4::PAE, cr4::PAE | cr4::LA57, 0, lma, false),
            (cr4::PAE, cr4::PAE | cr4::LA57, 0, 0, true),
            (cr4::PAE, cr4::PAE | cr4::PCIDE, 0x1000, lma, true),
            (cr4::PAE, cr4::PAE | cr4::PCIDE, 0x1001, lma, false),
            (cr4::PAE | cr4::PCIDE, cr4::PAE | cr4::PCIDE | cr4::PGE, 0x1001, lma, true),
            (0, cr4::PCIDE, 0, 0, false),
            (0, 1 << 13, 0, 0, false),
            (0, 1 << 33, 0, 0, false),
        ] {
            assert_eq!(l.check_cr4_write(old, new, cr3, efer).is_ok(), ok, "{old:#x} -> {new:#x}");
        }
    }

    #[test]
    fn efer_writes_of_the_guest() {
        let l = limits();
        assert_eq!(l.check_efer_write(0, efer::LME | efer::NXE, 0), Ok(efer::LME | efer::NXE));
        assert_eq!(l.check_efer_write(0, efer::LMA, 0), Ok(0), "LMA cannot be written");
        let on = efer::LME | efer::LMA;
        assert_eq!(l.check_efer_write(on, efer::LME | efer::SCE, cr0::PG), Ok(on | efer::SCE));
        assert_eq!(l.check_efer_write(on, 0, cr0::PG), Err(GeneralProtection), "LME while paging");
        assert_eq!(l.check_efer_write(0, efer::SVME, 0), Err(GeneralProtection));
    }
}
