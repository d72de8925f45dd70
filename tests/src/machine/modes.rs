// SPDX-License-Identifier: MIT OR Apache-2.0
//! How the machine comes into the mode that its code starts in: control registers, segments, descriptor tables, page tables
//! (APM vol. 2 chapters 4, 5 and 14), and interrupt vectors in that mode's form.

use super::{Machine, CODE, GDT, IDT, STACK, TABLES, TSS};
use crate::harness::CaseResult;
use axvcpu_uapi::x86::{Control, DescriptorTable, General, Segment, Segments, RSP};

/// Selector of the flat 32-bit code segment.
pub const CODE32: u16 = 0x08;
/// Selector of the flat data segment.
pub const FLAT: u16 = 0x10;
/// Selector of the 64-bit code segment.
pub const CODE64: u16 = 0x18;
/// Selector of the task state segment.
pub const TASK: u16 = 0x20;
/// Selector of the 64-bit code segment of user mode.
pub const USER_CODE: u16 = 0x33;
/// Selector of the data segment of user mode.
pub const USER_DATA: u16 = 0x3b;

/// CR0: protection enable.
pub const CR0_PE: u64 = 1 << 0;
/// CR0: monitor coprocessor.
pub const CR0_MP: u64 = 1 << 1;
/// CR0: extension type, always set.
pub const CR0_ET: u64 = 1 << 4;
/// CR0: numeric error.
pub const CR0_NE: u64 = 1 << 5;
/// CR0: write protect.
pub const CR0_WP: u64 = 1 << 16;
/// CR0: not write-through.
pub const CR0_NW: u64 = 1 << 29;
/// CR0: cache disable.
pub const CR0_CD: u64 = 1 << 30;
/// CR0: paging.
pub const CR0_PG: u64 = 1 << 31;
/// CR4: physical address extension.
pub const CR4_PAE: u64 = 1 << 5;
/// CR4: FXSAVE and SSE.
pub const CR4_OSFXSR: u64 = 1 << 9;
/// CR4: SIMD exceptions.
pub const CR4_OSXMMEXCPT: u64 = 1 << 10;
/// CR4: XSAVE and XCR0.
pub const CR4_OSXSAVE: u64 = 1 << 18;
/// EFER: SYSCALL.
pub const EFER_SCE: u64 = 1 << 0;
/// EFER: long mode enable.
pub const EFER_LME: u64 = 1 << 8;
/// EFER: long mode active.
pub const EFER_LMA: u64 = 1 << 10;
/// EFER: no-execute pages.
pub const EFER_NXE: u64 = 1 << 11;
/// RFLAGS: the bit that is always set.
pub const FLAGS: u64 = 1 << 1;
/// RFLAGS: interrupts enabled.
pub const FLAGS_IF: u64 = 1 << 9;

/// The mode in which the code starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// 16-bit real mode, segments based at 0.
    Real,
    /// 32-bit protected mode with flat segments, without paging.
    Protected,
    /// 64-bit mode, SSE enabled.
    Long,
}

impl Machine {
    /// Brings tables and registers into the state that the mode starts with.
    pub(super) fn enter(&mut self) -> CaseResult {
        self.write_tables()?;
        let mut control: Control = self.vcpu.get()?;
        let mut segments: Segments = self.vcpu.get()?;
        if self.mode != Mode::Real {
            control.cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_NE;
            segments = flat_segments(segments, self.mode);
        }
        if self.mode == Mode::Long {
            control.cr0 |= CR0_PG | CR0_WP;
            control.cr3 = TABLES;
            control.cr4 = CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT;
            control.efer = EFER_LME | EFER_LMA | EFER_NXE | EFER_SCE;
        }
        self.vcpu.set(&control)?;
        self.vcpu.set(&segments)?;
        let mut general: General = self.vcpu.get()?;
        general.gpr[RSP] = STACK;
        if self.mode != Mode::Real {
            general.rip = CODE;
        }
        self.vcpu.set(&general)?;
        Ok(())
    }

    fn write_tables(&mut self) -> CaseResult {
        // Descriptors as in APM vol. 2 section 4.7: null, code32, data, code64, TSS (two words), user code64, user
        // data.
        let descriptors = [
            0,
            0x00cf_9b00_0000_ffff,
            0x00cf_9300_0000_ffff,
            0x00af_9b00_0000_ffff,
            0x0000_8b00_0000_0067 | (TSS << 16),
            0,
            0x00af_fb00_0000_ffff,
            0x00cf_f300_0000_ffff,
        ];
        for (i, descriptor) in descriptors.into_iter().enumerate() {
            self.write_u64(GDT + 8 * i as u64, descriptor)?;
        }
        // RSP0 of the 64-bit TSS; no I/O permission map.
        self.write(TSS + 4, &STACK.to_le_bytes())?;
        self.write(TSS + 0x66, &0x68u16.to_le_bytes())?;
        // PML4 and page-directory-pointer table with one entry each, and a page directory of 2 MiB pages (bits P, RW,
        // US, PS).
        self.write_u64(TABLES, (TABLES + 0x1000) | 7)?;
        self.write_u64(TABLES + 0x1000, (TABLES + 0x2000) | 7)?;
        for i in 0..512 {
            self.write_u64(TABLES + 0x2000 + 8 * i, (i << 21) | 0x87)?;
        }
        Ok(())
    }

    /// Directs an interrupt or exception vector to `handler`, in the form of the machine's mode.
    ///
    /// # Errors
    /// None that a correct vector could cause.
    pub fn vector(&self, vector: u8, handler: u64) -> CaseResult {
        let vector = u64::from(vector);
        // Present interrupt gates of DPL 0: offset 15:0, selector, type and flags, offset 31:16.
        let gate = |selector: u16| {
            handler & 0xffff | (u64::from(selector) << 16) | (0x8e00 << 32) | (((handler >> 16) & 0xffff) << 48)
        };
        match self.mode {
            Mode::Real => self.write(4 * vector, &(handler as u32).to_le_bytes()),
            Mode::Protected => self.write_u64(IDT + 8 * vector, gate(CODE32)),
            Mode::Long => {
                self.write_u64(IDT + 16 * vector, gate(CODE64))?;
                self.write_u64(IDT + 16 * vector + 8, handler >> 32)
            }
        }
    }
}

/// A segment register for a segment of the whole address space.
pub const fn flat_segment(selector: u16, attributes: u16) -> Segment {
    Segment { base: 0, limit: 0xffff_ffff, selector, attributes }
}

/// The segments of protected or long mode.
fn flat_segments(mut segments: Segments, mode: Mode) -> Segments {
    let data = flat_segment(FLAT, 0xc93);
    segments.cs = if mode == Mode::Long { flat_segment(CODE64, 0xa9b) } else { flat_segment(CODE32, 0xc9b) };
    (segments.ds, segments.es, segments.fs, segments.gs, segments.ss) = (data, data, data, data, data);
    segments.tr = Segment { base: TSS, limit: 0x67, selector: TASK, attributes: 0x8b };
    segments.ldtr = Segment { base: 0, limit: 0, selector: 0, attributes: 0 };
    segments.gdtr = DescriptorTable { base: GDT, limit: 0x3f, ..DescriptorTable::default() };
    segments.idtr = DescriptorTable { base: IDT, limit: 0xfff, ..DescriptorTable::default() };
    segments
}
