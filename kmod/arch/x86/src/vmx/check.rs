// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! Our own check of the guest state that an entry was refused for (SDM vol. 3 section 27.3.1), to name the field at fault. The
//! CPU tells only that there is one.
//!
//! Only what can be wrong here is checked: fields that are constants in this backend are not.

use axvcpu_uapi::x86::{Segment, Segments};

use super::capabilities::Fixed;
use super::fields::{self, Field, SegmentFields};
use super::registers::BLOCKING_SHADOW;
use crate::regs::{cr0, cr4, efer, rflags, segment};

/// What is checked.
pub(super) struct GuestState<'a> {
    /// CR0 and CR4 as in the VMCS.
    pub(super) cr0: u64,
    pub(super) cr3: u64,
    pub(super) cr4: u64,
    pub(super) efer: u64,
    pub(super) dr7: u64,
    pub(super) rip: u64,
    pub(super) rflags: u64,
    pub(super) interruptibility: u32,
    pub(super) segments: &'a Segments,
    /// External interrupts need RFLAGS.IF, and no shadow.
    pub(super) injects_interrupt: bool,
    /// The four entries, with PAE paging outside of long mode.
    pub(super) pdptes: Option<[u64; 4]>,
    /// Width of a physical address.
    pub(super) phys_bits: u32,
    /// Width of a linear address.
    pub(super) linear_bits: u32,
}

impl GuestState<'_> {
    fn canonical(&self, address: u64) -> bool {
        let unused = 64u32.saturating_sub(self.linear_bits);
        ((address << unused) as i64 >> unused) as u64 == address
    }

    /// The first field that breaks a rule.
    pub(super) fn first_fault(&self, cr0_fixed: Fixed, cr4_fixed: Fixed) -> Option<Field> {
        let long = self.efer & efer::LMA != 0;
        let beyond = |value: u64| value.checked_shr(self.phys_bits).unwrap_or(0) != 0;
        let fixed = |value: u64, fixed: Fixed| value & fixed.ones == fixed.ones && value & !fixed.allowed == 0;
        let paging = self.cr0 & cr0::PG != 0;
        // Section 27.3.1.1: control registers, debug registers and MSRs.
        let controls = [
            (fixed(self.cr0, cr0_fixed) && (!paging || self.cr0 & cr0::PE != 0), Field::GuestCr0),
            (!long || paging, Field::GuestCr0),
            (fixed(self.cr4, cr4_fixed), Field::GuestCr4),
            (!long || self.cr4 & cr4::PAE != 0, Field::GuestCr4),
            (long || self.cr4 & cr4::PCIDE == 0, Field::GuestCr4),
            (!beyond(self.cr3), Field::GuestCr3),
            (self.dr7 >> 32 == 0, Field::GuestDr7),
            (!paging || (self.efer & efer::LME != 0) == long, Field::GuestEfer),
        ];
        if let Some(&(_, field)) = controls.iter().find(|(good, _)| !good) {
            return Some(field);
        }
        self.segment_fault(long).or_else(|| self.flow_fault(long)).or_else(|| self.pdpte_fault(beyond))
    }

    /// Sections 27.3.1.2 and 27.3.1.3: segments and descriptor tables.
    fn segment_fault(&self, long: bool) -> Option<Field> {
        let s = self.segments;
        let virtual_8086 = self.rflags & rflags::VM != 0;
        let ordinary = [
            (fields::CS, &s.cs),
            (fields::SS, &s.ss),
            (fields::DS, &s.ds),
            (fields::ES, &s.es),
            (fields::FS, &s.fs),
            (fields::GS, &s.gs),
        ];
        for (names, register) in ordinary {
            let fault =
                if virtual_8086 { virtual_8086_fault(names, register) } else { self.fault_of(names, register, long) };
            if fault.is_some() {
                return fault;
            }
        }
        let tr_type = s.tr.attributes & segment::TYPE;
        let tr_good = s.tr.attributes & (segment::P | segment::S) == segment::P
            && (tr_type == 11 || (tr_type == 3 && !long))
            && granular(&s.tr);
        let ldtr_good = !present(&s.ldtr)
            || (s.ldtr.attributes & (segment::S | segment::TYPE) == 2
                && granular(&s.ldtr)
                && s.ldtr.selector & 4 == 0
                && self.canonical(s.ldtr.base));
        [
            (tr_good, Field::GuestTrRights),
            (s.tr.selector & 4 == 0, Field::GuestTrSelector),
            (self.canonical(s.tr.base), Field::GuestTrBase),
            (ldtr_good, Field::GuestLdtrRights),
            (self.canonical(s.gdtr.base), Field::GuestGdtrBase),
            (self.canonical(s.idtr.base), Field::GuestIdtrBase),
        ]
        .into_iter()
        .find_map(|(good, field)| (!good).then_some(field))
    }

    /// A code, stack or data segment outside of virtual-8086 mode.
    fn fault_of(&self, names: SegmentFields, register: &Segment, long: bool) -> Option<Field> {
        let code = names == fields::CS;
        let kind = register.attributes & segment::TYPE;
        let dpl = |register: &Segment| register.attributes >> segment::DPL_SHIFT & 3;
        let base_good = if names == fields::FS || names == fields::GS {
            self.canonical(register.base)
        } else {
            (!code && !present(register)) || register.base >> 32 == 0
        };
        if !base_good {
            return Some(names.base);
        }
        let stack = &self.segments.ss;
        let good = if code {
            // Type 3, a data segment, is what real mode may leave in CS.
            let type_good = match kind {
                3 => dpl(register) == 0,
                9 | 11 => dpl(register) == dpl(stack),
                13 | 15 => dpl(register) <= dpl(stack),
                _ => false,
            };
            let both = segment::L | segment::DB;
            type_good && present(register) && !(long && register.attributes & both == both)
        } else if names == fields::SS {
            let flat = self.cr0 & cr0::PE == 0 || self.segments.cs.attributes & segment::TYPE == 3;
            (!present(register) || matches!(kind, 3 | 7)) && (!flat || dpl(register) == 0)
        } else {
            // Accessed, and readable if code.
            !present(register) || (kind & 1 != 0 && (kind & 8 == 0 || kind & 2 != 0))
        };
        let ordinary = !present(register) || (register.attributes & segment::S != 0 && granular(register));
        (!(good && ordinary)).then_some(names.rights)
    }

    /// Sections 27.3.1.4 and 27.3.1.5: RIP, RFLAGS and interruptibility.
    fn flow_fault(&self, long: bool) -> Option<Field> {
        let long_code = long && self.segments.cs.attributes & segment::L != 0;
        let rip_good = if long_code { self.canonical(self.rip) } else { self.rip >> 32 == 0 };
        let flags = self.rflags;
        let vm_good = flags & rflags::VM == 0 || (!long && self.cr0 & cr0::PE != 0);
        let flags_good = flags & !rflags::DEFINED == 0
            && flags & rflags::FIXED != 0
            && vm_good
            && (!self.injects_interrupt || flags & rflags::IF != 0);
        let shadow = self.interruptibility & BLOCKING_SHADOW;
        let shadow_good = shadow != BLOCKING_SHADOW
            && (shadow & 1 == 0 || flags & rflags::IF != 0)
            && !(self.injects_interrupt && shadow != 0);
        [(rip_good, Field::GuestRip), (flags_good, Field::GuestRflags), (shadow_good, Field::GuestInterruptibility)]
            .into_iter()
            .find_map(|(good, field)| (!good).then_some(field))
    }

    /// Section 27.3.1.6: the entries of PAE paging.
    fn pdpte_fault(&self, beyond: impl Fn(u64) -> bool) -> Option<Field> {
        let names = [Field::GuestPdpte0, Field::GuestPdpte1, Field::GuestPdpte2, Field::GuestPdpte3];
        let pdptes = self.pdptes?;
        pdptes.iter().zip(names).find_map(|(&entry, name)| (!pdpte_valid(entry, &beyond)).then_some(name))
    }
}

/// Whether a page-directory-pointer-table entry of PAE paging has no reserved bit set (SDM vol. 3 table 5-9).
pub(super) fn pdpte_valid(entry: u64, beyond: impl Fn(u64) -> bool) -> bool {
    entry & 1 == 0 || (entry & 0x1e6 == 0 && !beyond(entry))
}

fn present(register: &Segment) -> bool {
    register.attributes & segment::P != 0
}

/// Whether the limit fits the granularity.
fn granular(register: &Segment) -> bool {
    if register.attributes & segment::G != 0 {
        register.limit & 0xfff == 0xfff
    } else {
        register.limit >> 20 == 0
    }
}

fn virtual_8086_fault(names: SegmentFields, register: &Segment) -> Option<Field> {
    [
        (register.base == u64::from(register.selector) << 4, names.base),
        (register.limit == 0xffff, names.limit),
        (register.attributes == 0xf3, names.rights),
    ]
    .into_iter()
    .find_map(|(good, field)| (!good).then_some(field))
}

#[cfg(test)]
mod tests {
    use super::*;
    use axvcpu_uapi::x86::DescriptorTable;

    const CR0: Fixed = Fixed { ones: 0x20, allowed: 0xffff_ffff };
    const CR4: Fixed = Fixed { ones: 0x2000, allowed: 0x77_2fff };

    fn segment(attributes: u16, limit: u32) -> Segment {
        Segment { base: 0, limit, selector: 0, attributes }
    }

    fn real_mode() -> Segments {
        let table = DescriptorTable { base: 0, limit: 0xffff, reserved: [0; 3] };
        let data = segment(0x93, 0xffff);
        Segments {
            es: data,
            cs: segment(0x9b, 0xffff),
            ss: data,
            ds: data,
            fs: data,
            gs: data,
            ldtr: segment(0x82, 0xffff),
            tr: segment(0x83, 0xffff),
            gdtr: table,
            idtr: table,
        }
    }

    fn long_mode() -> Segments {
        let data = segment(0xc93, 0xffff_ffff);
        Segments {
            es: data,
            cs: segment(0xa9b, 0xffff_ffff),
            ss: data,
            ds: data,
            fs: segment(0, 0),
            tr: segment(0x8b, 0x67),
            ..real_mode()
        }
    }

    fn state(segments: &Segments, long: bool) -> GuestState<'_> {
        GuestState {
            cr0: if long { 0x8000_0031 } else { 0x30 },
            cr3: 0x1000,
            cr4: if long { 0x2020 } else { 0x2000 },
            efer: if long { 0x500 } else { 0 },
            dr7: 0x400,
            rip: 0x1000,
            rflags: 2,
            interruptibility: 0,
            segments,
            injects_interrupt: false,
            pdptes: None,
            phys_bits: 39,
            linear_bits: 48,
        }
    }

    #[test]
    fn good_states_have_no_fault() {
        assert_eq!(state(&real_mode(), false).first_fault(CR0, CR4), None);
        assert_eq!(state(&long_mode(), true).first_fault(CR0, CR4), None);
    }

    #[test]
    fn each_fault_is_named() {
        type Change = fn(&mut GuestState<'_>);
        let cases: [(Change, Field); 17] = [
            (|s| s.cr0 &= !0x20, Field::GuestCr0),
            (|s| s.cr0 &= !1, Field::GuestCr0),
            (|s| s.cr0 &= !(1 << 31), Field::GuestCr0),
            (|s| s.cr4 &= !0x2000, Field::GuestCr4),
            (|s| s.cr4 |= 1 << 12, Field::GuestCr4),
            (|s| s.cr4 &= !0x20, Field::GuestCr4),
            (|s| s.cr3 = 1 << 39, Field::GuestCr3),
            (|s| s.dr7 = 1 << 32, Field::GuestDr7),
            (|s| s.efer &= !0x100, Field::GuestEfer),
            (|s| s.rip = 1 << 47, Field::GuestRip),
            (|s| s.rflags = 0, Field::GuestRflags),
            (|s| s.rflags |= 1 << 17, Field::GuestEsRights),
            (|s| s.rflags |= 1 << 22, Field::GuestRflags),
            (|s| s.injects_interrupt = true, Field::GuestRflags),
            (|s| s.interruptibility = 1, Field::GuestInterruptibility),
            (|s| s.interruptibility = 3, Field::GuestInterruptibility),
            (|s| s.pdptes = Some([0, 0, 2 | 1, 0]), Field::GuestPdpte2),
        ];
        let segments = long_mode();
        for (index, (change, field)) in cases.into_iter().enumerate() {
            let mut state = state(&segments, true);
            change(&mut state);
            let found = state.first_fault(CR0, CR4);
            // Virtual-8086 mode is found at the first segment that is none of its.
            let expected = if field == Field::GuestEsRights { Field::GuestCsLimit } else { field };
            assert_eq!(found, Some(expected), "case {index}");
        }
    }

    #[test]
    fn segments_are_checked_one_by_one() {
        type Change = fn(&mut Segments);
        let cases: [(Change, Field); 14] = [
            (|s| s.cs.attributes = 0x93 | 0xa00 & !8, Field::GuestCsRights),
            (|s| s.cs.attributes |= 0x400, Field::GuestCsRights),
            (|s| s.cs.attributes &= !0x80, Field::GuestCsRights),
            (|s| s.cs.base = 1 << 32, Field::GuestCsBase),
            (|s| s.ss.attributes = 0xc91, Field::GuestSsRights),
            (|s| s.ds.attributes = 0xc92, Field::GuestDsRights),
            (|s| s.es.limit = 0x12_3000, Field::GuestEsRights),
            (|s| s.gs.base = 1 << 47, Field::GuestGsBase),
            (|s| s.tr.attributes = 0x83, Field::GuestTrRights),
            (|s| s.tr.selector = 4, Field::GuestTrSelector),
            (|s| s.tr.base = 1 << 60, Field::GuestTrBase),
            (|s| s.ldtr.attributes = 0x8b, Field::GuestLdtrRights),
            (|s| s.gdtr.base = 1 << 60, Field::GuestGdtrBase),
            (|s| s.idtr.base = 1 << 60, Field::GuestIdtrBase),
        ];
        for (index, (change, field)) in cases.into_iter().enumerate() {
            let mut segments = long_mode();
            change(&mut segments);
            if index == 0 {
                segments.cs.attributes = 0xa91;
            }
            assert_eq!(state(&segments, true).first_fault(CR0, CR4), Some(field), "case {index}");
        }
    }

    #[test]
    fn an_unusable_stack_segment_is_fine() {
        let mut segments = long_mode();
        segments.ss = segment(0, 0);
        assert_eq!(state(&segments, true).first_fault(CR0, CR4), None);
    }
}
