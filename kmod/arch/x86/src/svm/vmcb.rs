// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The virtual machine control block: every field that we use, declared once, with its offset in the page (APM vol. 2
//! appendix B, tables B-1 and B-2). Fields that we leave zero (AVIC, SEV, LBR virtualization, ...) are not declared.

mod bits;
mod overwritten;

pub(crate) use bits::{int_control, intercept1, intercept2, intercept3};
pub(crate) use overwritten::HardwareState;

use axvcpu_uapi::x86::{DescriptorTable, Segment};

/// Where the state save area starts.
const SAVE: usize = 0x400;

/// The page. Little else is valid for it than what the accessors write; all zero is the right start.
#[repr(C, align(4096))]
pub(crate) struct Vmcb([u64; 512]);

/// A field's place, for the checks below.
#[cfg_attr(not(test), allow(dead_code))]
struct Field {
    name: &'static str,
    offset: usize,
    size: usize,
}

macro_rules! fields {
    ($($(#[$meta:meta])* $name:ident / $set:ident @ $offset:expr, $ty:ty;)+) => {
        // Each field has both accessors, needed or not.
        #[allow(dead_code)]
        impl Vmcb {
            $(
                $(#[$meta])*
                #[inline]
                pub(crate) fn $name(&self) -> $ty {
                    self.read::<$ty, { $offset }>()
                }
                $(#[$meta])*
                #[inline]
                pub(crate) fn $set(&mut self, value: $ty) {
                    self.write::<$ty, { $offset }>(value);
                }
            )+
        }
        // Only the checks at compile time and the tests look at it.
        #[allow(dead_code)]
        const FIELDS: &[Field] =
            &[$(Field { name: stringify!($name), offset: $offset, size: size_of::<$ty>() },)+];
    };
}

fields! {
    /// Intercepts of CR0-CR15: reads in bits 15:0, writes in bits 31:16.
    intercept_cr / set_intercept_cr @ 0x000, u32;
    /// Intercepts of DR0-DR15: reads in bits 15:0, writes in bits 31:16.
    intercept_dr / set_intercept_dr @ 0x004, u32;
    /// Intercepts of exceptions, a bit for each vector.
    intercept_exceptions / set_intercept_exceptions @ 0x008, u32;
    /// Intercepts of instructions and events, first vector: [`intercept1`].
    intercept1 / set_intercept1 @ 0x00c, u32;
    /// Intercepts of instructions, second vector: [`intercept2`].
    intercept2 / set_intercept2 @ 0x010, u32;
    /// Intercepts of instructions, third vector: [`intercept3`].
    intercept3 / set_intercept3 @ 0x014, u32;
    /// PAUSE_FILTER_THRESHOLD, in cycles.
    pause_filter_threshold / set_pause_filter_threshold @ 0x03c, u16;
    /// PAUSE_FILTER_COUNT.
    pause_filter_count / set_pause_filter_count @ 0x03e, u16;
    /// IOPM_BASE_PA.
    iopm_base / set_iopm_base @ 0x040, u64;
    /// MSRPM_BASE_PA.
    msrpm_base / set_msrpm_base @ 0x048, u64;
    /// TSC_OFFSET: added to the host's time-stamp counter.
    tsc_offset / set_tsc_offset @ 0x050, u64;
    /// The guest's ASID.
    asid / set_asid @ 0x058, u32;
    /// TLB_CONTROL.
    tlb_control / set_tlb_control @ 0x05c, u8;
    /// V_TPR and the other virtual interrupt controls: [`int_control`].
    int_control / set_int_control @ 0x060, u32;
    /// V_INTR_VECTOR.
    int_vector / set_int_vector @ 0x064, u8;
    /// Bit 0: the guest is in an interrupt shadow.
    interrupt_shadow / set_interrupt_shadow @ 0x068, u64;
    /// EXITCODE.
    exit_code / set_exit_code @ 0x070, u64;
    /// EXITINFO1.
    exit_info1 / set_exit_info1 @ 0x078, u64;
    /// EXITINFO2.
    exit_info2 / set_exit_info2 @ 0x080, u64;
    /// EXITINTINFO: the event whose delivery the exit interrupted, in the format of EVENTINJ.
    exit_int_info / set_exit_int_info @ 0x088, u64;
    /// Bit 0, NP_ENABLE: nested paging.
    nested_control / set_nested_control @ 0x090, u64;
    /// EVENTINJ: the event to be injected.
    event_injection / set_event_injection @ 0x0a8, u64;
    /// N_CR3: root of the nested page table.
    nested_cr3 / set_nested_cr3 @ 0x0b0, u64;
    /// VMCB clean bits: what the CPU may take from its cache.
    clean / set_clean @ 0x0c0, u32;
    /// nRIP: the instruction after the intercepted one, if the CPU has NRIP save.
    next_rip / set_next_rip @ 0x0c8, u64;
    /// Number of instruction bytes that follow, if the CPU has decode assists.
    fetched_count / set_fetched_count @ 0x0d0, u8;

    /// CPL.
    cpl / set_cpl @ SAVE + 0x0cb, u8;
    /// EFER, with SVME set.
    efer / set_efer @ SAVE + 0x0d0, u64;
    /// CR4.
    cr4 / set_cr4 @ SAVE + 0x148, u64;
    /// CR3.
    cr3 / set_cr3 @ SAVE + 0x150, u64;
    /// CR0.
    cr0 / set_cr0 @ SAVE + 0x158, u64;
    /// DR7.
    dr7 / set_dr7 @ SAVE + 0x160, u64;
    /// DR6.
    dr6 / set_dr6 @ SAVE + 0x168, u64;
    /// RFLAGS.
    rflags / set_rflags @ SAVE + 0x170, u64;
    /// RIP.
    rip / set_rip @ SAVE + 0x178, u64;
    /// RSP.
    rsp / set_rsp @ SAVE + 0x1d8, u64;
    /// RAX.
    rax / set_rax @ SAVE + 0x1f8, u64;
    /// STAR (VMLOAD, VMSAVE).
    star / set_star @ SAVE + 0x200, u64;
    /// LSTAR (VMLOAD, VMSAVE).
    lstar / set_lstar @ SAVE + 0x208, u64;
    /// CSTAR (VMLOAD, VMSAVE).
    cstar / set_cstar @ SAVE + 0x210, u64;
    /// SFMASK (VMLOAD, VMSAVE).
    sfmask / set_sfmask @ SAVE + 0x218, u64;
    /// KernelGSBase (VMLOAD, VMSAVE).
    kernel_gs_base / set_kernel_gs_base @ SAVE + 0x220, u64;
    /// SYSENTER_CS (VMLOAD, VMSAVE).
    sysenter_cs / set_sysenter_cs @ SAVE + 0x228, u64;
    /// SYSENTER_ESP (VMLOAD, VMSAVE).
    sysenter_esp / set_sysenter_esp @ SAVE + 0x230, u64;
    /// SYSENTER_EIP (VMLOAD, VMSAVE).
    sysenter_eip / set_sysenter_eip @ SAVE + 0x238, u64;
    /// CR2.
    cr2 / set_cr2 @ SAVE + 0x240, u64;
    /// G_PAT: the guest's PAT, under nested paging.
    g_pat / set_g_pat @ SAVE + 0x268, u64;
    /// SPEC_CTRL, if the CPU virtualizes it.
    spec_ctrl / set_spec_ctrl @ SAVE + 0x2e0, u64;
}

/// Offset of the instruction bytes behind [`Vmcb::fetched_count`].
const FETCHED_BYTES: usize = 0x0d1;
/// How many there can be.
pub(crate) const FETCHED_MAX: usize = 15;

/// Segment registers, by offset. 16 bytes each: selector, attributes, limit, base.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub(crate) enum SegmentRegister {
    /// ES.
    Es = SAVE,
    /// CS.
    Cs = SAVE + 0x10,
    /// SS.
    Ss = SAVE + 0x20,
    /// DS.
    Ds = SAVE + 0x30,
    /// FS (VMLOAD, VMSAVE).
    Fs = SAVE + 0x40,
    /// GS (VMLOAD, VMSAVE).
    Gs = SAVE + 0x50,
    /// LDTR (VMLOAD, VMSAVE).
    Ldtr = SAVE + 0x70,
    /// TR (VMLOAD, VMSAVE).
    Tr = SAVE + 0x90,
}

/// Descriptor-table registers, by offset. Of the 16 bytes only limit and base count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub(crate) enum TableRegister {
    /// GDTR.
    Gdtr = SAVE + 0x60,
    /// IDTR.
    Idtr = SAVE + 0x80,
}

impl Vmcb {
    /// A VMCB that is all zero.
    #[cfg(test)]
    pub(crate) const fn new() -> Self {
        Self([0; 512])
    }

    #[inline]
    fn read<T: Copy, const OFFSET: usize>(&self) -> T {
        const { assert!(OFFSET + size_of::<T>() <= size_of::<Self>() && OFFSET % align_of::<T>() == 0) };
        // SAFETY: Inside of the page and aligned, as just asserted; only integers are read (see `fields!`), for which all
        // bytes are valid.
        unsafe { self.0.as_ptr().byte_add(OFFSET).cast::<T>().read() }
    }

    #[inline]
    fn write<T: Copy, const OFFSET: usize>(&mut self, value: T) {
        const { assert!(OFFSET + size_of::<T>() <= size_of::<Self>() && OFFSET % align_of::<T>() == 0) };
        // SAFETY: As in `read`; `self` is borrowed mutably.
        unsafe { self.0.as_mut_ptr().byte_add(OFFSET).cast::<T>().write(value) }
    }

    /// The two words at `offset`, a multiple of 8.
    #[inline]
    fn pair(&self, offset: usize) -> [u64; 2] {
        match self.0.get(offset / 8..offset / 8 + 2) {
            Some(&[low, high]) => [low, high],
            _ => [0; 2], // Not reached: the offsets are those of the two enums above.
        }
    }

    #[inline]
    fn set_pair(&mut self, offset: usize, value: [u64; 2]) {
        if let Some(words) = self.0.get_mut(offset / 8..offset / 8 + 2) {
            words.copy_from_slice(&value);
        }
    }

    /// A segment register.
    #[inline]
    pub(crate) fn segment(&self, register: SegmentRegister) -> Segment {
        let [low, base] = self.pair(register as usize);
        Segment { base, limit: (low >> 32) as u32, selector: low as u16, attributes: (low >> 16) as u16 }
    }

    /// Sets a segment register.
    #[inline]
    pub(crate) fn set_segment(&mut self, register: SegmentRegister, value: &Segment) {
        let low = u64::from(value.selector) | u64::from(value.attributes) << 16 | u64::from(value.limit) << 32;
        self.set_pair(register as usize, [low, value.base]);
    }

    /// A descriptor-table register.
    #[inline]
    pub(crate) fn table(&self, register: TableRegister) -> DescriptorTable {
        let [low, base] = self.pair(register as usize);
        DescriptorTable { base, limit: (low >> 32) as u16, reserved: [0; 3] }
    }

    /// Sets a descriptor-table register.
    #[inline]
    pub(crate) fn set_table(&mut self, register: TableRegister, value: &DescriptorTable) {
        self.set_pair(register as usize, [u64::from(value.limit) << 32, value.base]);
    }

    /// The instruction bytes that the CPU fetched, and their number.
    pub(crate) fn fetched(&self) -> ([u8; 16], u8) {
        let mut bytes = [0; 16];
        let [low, high] = self.pair(FETCHED_BYTES - 1);
        // The count comes first.
        let words = (u128::from(high) << 64 | u128::from(low)) >> 8;
        bytes.copy_from_slice(&words.to_le_bytes());
        (bytes, self.fetched_count().min(FETCHED_MAX as u8))
    }
}

// No two fields overlap, and none leaves its area.
const _: () = {
    let mut i = 0;
    while i < FIELDS.len() {
        let field = &FIELDS[i];
        assert!(field.offset % field.size == 0);
        assert!(field.offset + field.size <= 0xd1 || field.offset >= SAVE + 0xa0);
        assert!(field.offset + field.size <= SAVE + 0x2e8);
        if i > 0 {
            assert!(FIELDS[i - 1].offset + FIELDS[i - 1].size <= field.offset);
        }
        i += 1;
    }
};

#[cfg(test)]
mod tests {
    use super::*;

    /// Appendix B of the manual, typed in a second time: offset and size of each field.
    const MANUAL: &[(&str, usize, usize)] = &[
        ("intercept_cr", 0x00, 4),
        ("intercept_dr", 0x04, 4),
        ("intercept_exceptions", 0x08, 4),
        ("intercept1", 0x0c, 4),
        ("intercept2", 0x10, 4),
        ("intercept3", 0x14, 4),
        ("pause_filter_threshold", 0x3c, 2),
        ("pause_filter_count", 0x3e, 2),
        ("iopm_base", 0x40, 8),
        ("msrpm_base", 0x48, 8),
        ("tsc_offset", 0x50, 8),
        ("asid", 0x58, 4),
        ("tlb_control", 0x5c, 1),
        ("int_control", 0x60, 4),
        ("int_vector", 0x64, 1),
        ("interrupt_shadow", 0x68, 8),
        ("exit_code", 0x70, 8),
        ("exit_info1", 0x78, 8),
        ("exit_info2", 0x80, 8),
        ("exit_int_info", 0x88, 8),
        ("nested_control", 0x90, 8),
        ("event_injection", 0xa8, 8),
        ("nested_cr3", 0xb0, 8),
        ("clean", 0xc0, 4),
        ("next_rip", 0xc8, 8),
        ("fetched_count", 0xd0, 1),
        ("cpl", 0x4cb, 1),
        ("efer", 0x4d0, 8),
        ("cr4", 0x548, 8),
        ("cr3", 0x550, 8),
        ("cr0", 0x558, 8),
        ("dr7", 0x560, 8),
        ("dr6", 0x568, 8),
        ("rflags", 0x570, 8),
        ("rip", 0x578, 8),
        ("rsp", 0x5d8, 8),
        ("rax", 0x5f8, 8),
        ("star", 0x600, 8),
        ("lstar", 0x608, 8),
        ("cstar", 0x610, 8),
        ("sfmask", 0x618, 8),
        ("kernel_gs_base", 0x620, 8),
        ("sysenter_cs", 0x628, 8),
        ("sysenter_esp", 0x630, 8),
        ("sysenter_eip", 0x638, 8),
        ("cr2", 0x640, 8),
        ("g_pat", 0x668, 8),
        ("spec_ctrl", 0x6e0, 8),
    ];

    #[test]
    fn offsets_are_those_of_appendix_b() {
        let declared: std::vec::Vec<_> = FIELDS.iter().map(|f| (f.name, f.offset, f.size)).collect();
        assert_eq!(declared, MANUAL);
    }

    fn byte(vmcb: &Vmcb, offset: usize) -> u8 {
        vmcb.0[offset / 8].to_le_bytes()[offset % 8]
    }

    #[test]
    fn accessors_touch_their_bytes_only() {
        let mut vmcb = Vmcb::new();
        vmcb.set_asid(0xa1a2_a3a4);
        vmcb.set_tlb_control(0x3);
        vmcb.set_cpl(0x2);
        vmcb.set_spec_ctrl(0x1122_3344_5566_7788);
        for (offset, expected) in [
            (0x57, 0),
            (0x58, 0xa4),
            (0x5b, 0xa1),
            (0x5c, 3),
            (0x5d, 0),
            (0x4ca, 0),
            (0x4cb, 2),
            (0x4cc, 0),
            (0x6e0, 0x88),
            (0x6e7, 0x11),
            (0x6e8, 0),
        ] {
            assert_eq!(byte(&vmcb, offset), expected, "{offset:#x}");
        }
    }

    #[test]
    fn segments_have_the_layout_of_table_b_2() {
        let mut vmcb = Vmcb::new();
        let cs = Segment { base: 0x1111_2222_3333_4444, limit: 0xaabb_ccdd, selector: 0x1234, attributes: 0x0a9b };
        vmcb.set_segment(SegmentRegister::Cs, &cs);
        assert_eq!(vmcb.0[0x410 / 8], 0xaabb_ccdd_0a9b_1234);
        assert_eq!(vmcb.0[0x418 / 8], 0x1111_2222_3333_4444);
        assert_eq!(vmcb.segment(SegmentRegister::Cs), cs);
        for (register, offset) in [
            (SegmentRegister::Es, 0x400),
            (SegmentRegister::Ss, 0x420),
            (SegmentRegister::Ds, 0x430),
            (SegmentRegister::Fs, 0x440),
            (SegmentRegister::Gs, 0x450),
            (SegmentRegister::Ldtr, 0x470),
            (SegmentRegister::Tr, 0x490),
        ] {
            assert_eq!(register as usize, offset);
        }
        let idtr = DescriptorTable { base: 0x5000, limit: 0x3ff, reserved: [0; 3] };
        vmcb.set_table(TableRegister::Idtr, &idtr);
        assert_eq!(vmcb.0[0x480 / 8], 0x3ff << 32);
        assert_eq!(vmcb.table(TableRegister::Idtr), idtr);
        assert_eq!(TableRegister::Gdtr as usize, 0x460);
    }

    #[test]
    fn fetched_bytes_follow_their_count() {
        let mut vmcb = Vmcb::new();
        vmcb.0[0xd0 / 8] = 0x0706_0504_0302_0103;
        vmcb.0[0xd8 / 8] = 0x0f0e_0d0c_0b0a_0908;
        assert_eq!(vmcb.fetched(), ([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0], 3));
        vmcb.set_fetched_count(0xff);
        assert_eq!(vmcb.fetched().1, 15);
    }
}
