// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! A vCPU's registers as VMX keeps them: a copy in memory, of which entries write to the VMCS what has changed, and to which
//! exits and the end of a window bring back what the guest can have changed.
//!
//! The VMCS can be reached in a window only, and only with interrupts off, the copy any time.

use axvcpu_uapi::x86::{DescriptorTable, Segment, Segments, RSP};
use vcpu_core::AxResult;
use x86::msr;

use super::capabilities::{entry, Fixed, VmxCapabilities};
use super::fields::{self, Field, SegmentFields};
use super::instructions;
use super::switch::Frame;
use crate::cpu;
use crate::frame::Framed;
use crate::hal::X86Hal;
use crate::msr::PAT_RESET;
use crate::regs::{cr0, cr4, efer, rflags, segment, DR6_FIXED, DR7_FIXED};
use crate::state::Registers;

/// CR4.VMXE: fixed to one, hidden from the guest.
pub(super) const CR4_VMXE: u64 = 1 << 13;
/// CR4.MCE is the host's, always: without it a machine check in the guest shuts the CPU down.
pub(super) const CR4_MCE: u64 = 1 << 6;
/// Bits of CR0 that the guest changes without an exit. The CPU ignores NW and CD at entries.
const CR0_GUEST: u64 = cr0::MP | cr0::EM | cr0::TS;

/// Interruptibility (SDM vol. 3 section 25.4.2): blocking by STI, by MOV SS.
pub(super) const BLOCKING_SHADOW: u32 = 3;
/// Blocking by STI.
const BLOCKING_STI: u32 = 1;
/// Blocking of virtual NMIs.
pub(super) const BLOCKING_NMI: u32 = 1 << 3;
/// Pending debug exceptions: single step.
const PENDING_BS: u64 = 1 << 14;

/// Access rights: the segment is unusable (SDM vol. 3 section 25.4.1).
const UNUSABLE: u32 = 1 << 16;
/// Type bit 0 of code and data segments, which usable ones have set.
const ACCESSED: u16 = 1;

/// A busy 32-bit or 64-bit TSS.
const BUSY_TSS: u16 = 11;

/// Groups of registers that the next entry writes.
mod dirty {
    pub(super) const RIP: u32 = 1 << 0;
    pub(super) const RSP: u32 = 1 << 1;
    pub(super) const RFLAGS: u32 = 1 << 2;
    pub(super) const CONTROL: u32 = 1 << 3;
    pub(super) const CR3: u32 = 1 << 4;
    pub(super) const SHADOW: u32 = 1 << 5;
    pub(super) const SEGMENTS: u32 = 1 << 6;
    pub(super) const DR7: u32 = 1 << 7;
    pub(super) const SYSENTER: u32 = 1 << 8;
    pub(super) const PAT: u32 = 1 << 9;
    pub(super) const TSC: u32 = 1 << 10;
    pub(super) const ALL: u32 = (1 << 11) - 1;
}

/// Access to the current VMCS. A failure is kept until [`finish`](Self::finish); reads give 0 then.
pub(super) struct Vmcs {
    failed: bool,
}

impl Vmcs {
    /// # Safety
    /// At CPL 0, interrupts are off as long as the object exists, and the current VMCS is the vCPU's that the caller works on.
    #[inline]
    pub(super) unsafe fn current() -> Self {
        Self { failed: false }
    }

    #[inline]
    pub(super) fn read(&mut self, field: Field) -> u64 {
        // SAFETY: By the promise of `current`.
        unsafe { instructions::vmread(field.encoding()) }.unwrap_or_else(|_| {
            self.failed = true;
            0
        })
    }

    #[inline]
    pub(super) fn write(&mut self, field: Field, value: u64) {
        // SAFETY: By the promise of `current`.
        if unsafe { instructions::vmwrite(field.encoding(), value) }.is_err() {
            self.failed = true;
        }
    }

    /// Whether everything has worked.
    ///
    /// # Errors
    /// [`AxError::HardwareLost`](vcpu_core::AxError::HardwareLost).
    pub(super) fn finish(self) -> AxResult {
        if self.failed {
            return Err(vcpu_core::AxError::HardwareLost);
        }
        Ok(())
    }
}

/// Attributes in the format of the ABI as access rights.
pub(super) const fn rights(attributes: u16) -> u32 {
    let a = attributes as u32;
    let unusable = if attributes & segment::P == 0 { UNUSABLE } else { 0 };
    a & 0xff | (a & 0xf00) << 4 | unusable
}

/// Access rights as attributes in the format of the ABI, where P tells whether a segment can be used.
pub(super) const fn attributes(rights: u32) -> u16 {
    let a = (rights & 0xff | rights >> 4 & 0xf00) as u16;
    if rights & UNUSABLE != 0 {
        a & !segment::P
    } else {
        a
    }
}

/// Sets the accessed bit of a code or data segment that can be used: the hardware wants it, and a descriptor that is loaded
/// has it.
const fn accessed(attributes: u16) -> u16 {
    if attributes & segment::P != 0 && attributes & segment::S != 0 {
        attributes | ACCESSED
    } else {
        attributes
    }
}

const EMPTY: Segment = Segment { base: 0, limit: 0, selector: 0, attributes: 0 };
const NO_TABLE: DescriptorTable = DescriptorTable { base: 0, limit: 0, reserved: [0; 3] };

/// The copy.
pub(super) struct State {
    rip: u64,
    rflags: u64,
    cr0: u64,
    pub(super) cr2: u64,
    cr3: u64,
    cr4: u64,
    efer: u64,
    interruptibility: u32,
    segments: Segments,
    dr6: u64,
    dr7: u64,
    pat: u64,
    sysenter: [u64; 3],
    /// STAR, LSTAR, CSTAR, SFMASK, KERNEL_GS_BASE, which the window switches.
    pub(super) syscall: [u64; 5],
    tsc_offset: u64,
    dirty: u32,
    /// The VMCS's page-directory-pointer-table entries are not those of CR3.
    pub(super) pdptes_stale: bool,
    /// The guest's translations are to be flushed.
    pub(super) flush: bool,
    /// The inner window is open: our VMCS is current, and CR2 is the guest's.
    pub(super) live: bool,
}

/// The copy, the general registers, and what the CPU fixes.
pub(crate) struct VmxRegisters<H: X86Hal> {
    pub(super) frame: Framed<Frame, H>,
    pub(super) state: Framed<State, H>,
    fixed: (Fixed, Fixed),
    entry_controls: u32,
}

/// MSRs in [`State::syscall`], in its order.
pub(super) const SYSCALL_MSRS: [u32; 5] =
    [msr::IA32_STAR, msr::IA32_LSTAR, msr::IA32_CSTAR, msr::IA32_FMASK, msr::IA32_KERNEL_GSBASE];

impl<H: X86Hal> VmxRegisters<H> {
    pub(super) fn new(caps: &VmxCapabilities) -> AxResult<Self> {
        let state = State {
            rip: 0,
            rflags: rflags::FIXED,
            cr0: 0,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            efer: 0,
            interruptibility: 0,
            segments: Segments {
                es: EMPTY,
                cs: EMPTY,
                ss: EMPTY,
                ds: EMPTY,
                fs: EMPTY,
                gs: EMPTY,
                ldtr: EMPTY,
                tr: EMPTY,
                gdtr: NO_TABLE,
                idtr: NO_TABLE,
            },
            dr6: DR6_FIXED,
            dr7: DR7_FIXED,
            pat: PAT_RESET,
            sysenter: [0; 3],
            syscall: [0; 5],
            tsc_offset: 0,
            dirty: dirty::ALL,
            pdptes_stale: false,
            flush: true,
            live: false,
        };
        Ok(Self {
            frame: Framed::new(Frame::new())?,
            state: Framed::new(state)?,
            fixed: (caps.cr0, caps.cr4),
            entry_controls: caps.entry,
        })
    }

    /// Whether the guest uses PAE paging outside of long mode, whose upper level is registers.
    pub(super) fn uses_pdptes(&self) -> bool {
        let state = &self.state;
        state.cr0 & cr0::PG != 0 && state.cr4 & cr4::PAE != 0 && state.efer & efer::LMA == 0
    }

    fn paging_changed(&mut self) {
        self.state.pdptes_stale = self.uses_pdptes();
    }

    /// CR0 and CR4 as the CPU is to have them.
    pub(super) fn hardware_controls(&self) -> (u64, u64) {
        let (cr0_fixed, cr4_fixed) = self.fixed;
        let cr0 = self.state.cr0 & !(cr0::CD | cr0::NW) & cr0_fixed.allowed | cr0_fixed.ones;
        let cr4 = self.state.cr4 & cr4_fixed.allowed | cr4_fixed.ones | CR4_MCE;
        (cr0, cr4)
    }

    /// What the entry finds of the interruptibility state: `nmi` blocks virtual NMIs.
    pub(super) fn interruptibility(&self, nmi: bool) -> u32 {
        self.state.interruptibility & BLOCKING_SHADOW | if nmi { BLOCKING_NMI } else { 0 }
    }

    /// Writes what has changed to the VMCS.
    pub(super) fn write_back(&mut self, vmcs: &mut Vmcs, nmi_blocked: bool) {
        let (hardware_cr0, hardware_cr4) = self.hardware_controls();
        let interruptibility = self.interruptibility(nmi_blocked);
        let rsp = self.frame.gpr.get(RSP).copied().unwrap_or(0);
        let entry_controls = self.entry_controls;
        let state = &mut *self.state;
        let changed = core::mem::take(&mut state.dirty);
        let is = |group| changed & group != 0;
        if is(dirty::RIP) {
            vmcs.write(Field::GuestRip, state.rip);
        }
        if is(dirty::RSP) {
            vmcs.write(Field::GuestRsp, rsp);
        }
        if is(dirty::RFLAGS) {
            vmcs.write(Field::GuestRflags, state.rflags);
        }
        if is(dirty::CONTROL) {
            vmcs.write(Field::GuestCr0, hardware_cr0);
            vmcs.write(Field::ControlCr0Shadow, state.cr0);
            vmcs.write(Field::ControlCr0Mask, !CR0_GUEST);
            vmcs.write(Field::GuestCr4, hardware_cr4);
            vmcs.write(Field::ControlCr4Shadow, state.cr4);
            vmcs.write(Field::ControlCr4Mask, !0);
            vmcs.write(Field::GuestEfer, state.efer);
            let long = state.efer & efer::LMA != 0;
            vmcs.write(Field::ControlEntry, (entry_controls | if long { entry::IA32E } else { 0 }).into());
        }
        if is(dirty::CR3) {
            vmcs.write(Field::GuestCr3, state.cr3);
        }
        if is(dirty::SEGMENTS) {
            let s = &state.segments;
            for (to, segment) in segment_fields(s) {
                vmcs.write(to.selector, segment.selector.into());
                vmcs.write(to.limit, segment.limit.into());
                vmcs.write(to.rights, rights(segment.attributes).into());
                vmcs.write(to.base, segment.base);
            }
            vmcs.write(Field::GuestGdtrBase, s.gdtr.base);
            vmcs.write(Field::GuestGdtrLimit, s.gdtr.limit.into());
            vmcs.write(Field::GuestIdtrBase, s.idtr.base);
            vmcs.write(Field::GuestIdtrLimit, s.idtr.limit.into());
        }
        if is(dirty::CONTROL | dirty::SEGMENTS) && state.efer & efer::LMA != 0 {
            // Userspace may have given a 16-bit one, which a CPU in long mode can have in TR only by an entry.
            let tr = vmcs.read(fields::TR.rights);
            vmcs.write(fields::TR.rights, tr & !u64::from(segment::TYPE) | u64::from(BUSY_TSS));
        }
        if is(dirty::DR7) {
            vmcs.write(Field::GuestDr7, state.dr7);
        }
        if is(dirty::SYSENTER) {
            let [cs, esp, eip] = state.sysenter;
            vmcs.write(Field::GuestSysenterCs, cs);
            vmcs.write(Field::GuestSysenterEsp, esp);
            vmcs.write(Field::GuestSysenterEip, eip);
        }
        if is(dirty::PAT) {
            vmcs.write(Field::GuestPat, state.pat);
        }
        if is(dirty::TSC) {
            vmcs.write(Field::ControlTscOffset, state.tsc_offset);
        }
        vmcs.write(Field::GuestInterruptibility, interruptibility.into());
        if interruptibility & BLOCKING_SHADOW != 0 || is(dirty::SHADOW) {
            // In a shadow the trap of a single step waits (SDM vol. 3 section 27.3.1.5); elsewhere it has been delivered.
            let step = state.rflags & rflags::TF != 0 && interruptibility & BLOCKING_SHADOW != 0;
            let pending = vmcs.read(Field::GuestPendingDebug) & !PENDING_BS;
            vmcs.write(Field::GuestPendingDebug, pending | if step { PENDING_BS } else { 0 });
        }
    }

    /// Reads what any exit may have changed and what dealing with it needs. Gives the interruptibility state.
    pub(super) fn read_exit(&mut self, vmcs: &mut Vmcs) -> u32 {
        let rsp = vmcs.read(Field::GuestRsp);
        if let Some(slot) = self.frame.gpr.get_mut(RSP) {
            *slot = rsp;
        }
        let state = &mut *self.state;
        state.rip = vmcs.read(Field::GuestRip);
        state.rflags = vmcs.read(Field::GuestRflags);
        state.cr0 = state.cr0 & !CR0_GUEST | vmcs.read(Field::GuestCr0) & CR0_GUEST;
        state.cr3 = vmcs.read(Field::GuestCr3);
        let interruptibility = vmcs.read(Field::GuestInterruptibility) as u32;
        state.interruptibility = interruptibility & BLOCKING_SHADOW;
        state.segments.cs.attributes = attributes(vmcs.read(fields::CS.rights) as u32);
        state.segments.ss.attributes = attributes(vmcs.read(fields::SS.rights) as u32);
        interruptibility
    }

    /// Reads what the guest may have changed since the window was opened, at its end. Nothing that waits to be written is
    /// overwritten.
    pub(super) fn read_window(&mut self, vmcs: &mut Vmcs) {
        let state = &mut *self.state;
        let changed = state.dirty;
        if changed & dirty::SEGMENTS == 0 {
            let s = &mut state.segments;
            for (from, segment) in segment_fields_mut(s) {
                segment.selector = vmcs.read(from.selector) as u16;
                segment.limit = vmcs.read(from.limit) as u32;
                segment.attributes = attributes(vmcs.read(from.rights) as u32);
                segment.base = vmcs.read(from.base);
            }
            s.gdtr.base = vmcs.read(Field::GuestGdtrBase);
            s.gdtr.limit = vmcs.read(Field::GuestGdtrLimit) as u16;
            s.idtr.base = vmcs.read(Field::GuestIdtrBase);
            s.idtr.limit = vmcs.read(Field::GuestIdtrLimit) as u16;
        }
        if changed & dirty::DR7 == 0 {
            state.dr7 = vmcs.read(Field::GuestDr7);
        }
        if changed & dirty::SYSENTER == 0 {
            state.sysenter = [
                vmcs.read(Field::GuestSysenterCs),
                vmcs.read(Field::GuestSysenterEsp),
                vmcs.read(Field::GuestSysenterEip),
            ];
        }
    }
}

fn segment_fields(s: &Segments) -> [(SegmentFields, &Segment); 8] {
    [
        (fields::ES, &s.es),
        (fields::CS, &s.cs),
        (fields::SS, &s.ss),
        (fields::DS, &s.ds),
        (fields::FS, &s.fs),
        (fields::GS, &s.gs),
        (fields::LDTR, &s.ldtr),
        (fields::TR, &s.tr),
    ]
}

fn segment_fields_mut(s: &mut Segments) -> [(SegmentFields, &mut Segment); 8] {
    [
        (fields::ES, &mut s.es),
        (fields::CS, &mut s.cs),
        (fields::SS, &mut s.ss),
        (fields::DS, &mut s.ds),
        (fields::FS, &mut s.fs),
        (fields::GS, &mut s.gs),
        (fields::LDTR, &mut s.ldtr),
        (fields::TR, &mut s.tr),
    ]
}

impl<H: X86Hal> Registers for VmxRegisters<H> {
    fn gpr(&self, register: usize) -> u64 {
        self.frame.gpr.get(register).copied().unwrap_or(0)
    }

    fn set_gpr(&mut self, register: usize, value: u64) {
        if let Some(slot) = self.frame.gpr.get_mut(register) {
            *slot = value;
        }
        if register == RSP {
            self.state.dirty |= dirty::RSP;
        }
    }

    fn rip(&self) -> u64 {
        self.state.rip
    }

    fn set_rip(&mut self, value: u64) {
        self.state.rip = value;
        self.state.dirty |= dirty::RIP;
    }

    fn rflags(&self) -> u64 {
        self.state.rflags
    }

    fn set_rflags(&mut self, value: u64) {
        self.state.rflags = value;
        self.state.dirty |= dirty::RFLAGS;
    }

    fn cr0(&self) -> u64 {
        self.state.cr0
    }

    fn set_cr0(&mut self, value: u64) {
        self.state.cr0 = value;
        self.state.dirty |= dirty::CONTROL;
        self.paging_changed();
    }

    fn cr3(&self) -> u64 {
        self.state.cr3
    }

    fn cr4(&self) -> u64 {
        self.state.cr4
    }

    fn set_cr4(&mut self, value: u64) {
        self.state.cr4 = value;
        self.state.dirty |= dirty::CONTROL;
        self.paging_changed();
    }

    fn efer(&self) -> u64 {
        self.state.efer
    }

    fn set_efer(&mut self, value: u64) {
        self.state.efer = value;
        self.state.dirty |= dirty::CONTROL;
        self.paging_changed();
    }

    fn cr2(&self) -> u64 {
        self.state.cr2
    }

    fn set_cr2(&mut self, value: u64) {
        self.state.cr2 = value;
        if self.state.live {
            // SAFETY: Kernel context, in the inner window, which has CR2 for the guest.
            unsafe { cpu::set_cr2(value) };
        }
    }

    fn set_cr3(&mut self, value: u64) {
        self.state.cr3 = value;
        self.state.dirty |= dirty::CR3;
        self.paging_changed();
    }

    fn segments(&self) -> Segments {
        self.state.segments
    }

    fn set_segments(&mut self, segments: &Segments) {
        let state = &mut *self.state;
        state.segments = *segments;
        let s = &mut state.segments;
        for segment in [&mut s.es, &mut s.cs, &mut s.ss, &mut s.ds, &mut s.fs, &mut s.gs] {
            segment.attributes = accessed(segment.attributes);
        }
        state.dirty |= dirty::SEGMENTS;
    }

    fn cs(&self) -> Segment {
        self.state.segments.cs
    }

    fn cpl(&self) -> u8 {
        crate::regs::privilege(&self.state.segments)
    }

    fn dr6(&self) -> u64 {
        self.state.dr6
    }

    fn set_dr6(&mut self, value: u64) {
        self.state.dr6 = value;
    }

    fn dr7(&self) -> u64 {
        if self.state.live && self.state.dirty & dirty::DR7 == 0 {
            // SAFETY: Kernel context, in the inner window, in which our VMCS is current. If VMX is off, so does the next entry find.
            return unsafe { instructions::vmread(Field::GuestDr7.encoding()) }.unwrap_or(self.state.dr7);
        }
        self.state.dr7
    }

    fn set_dr7(&mut self, value: u64) {
        self.state.dr7 = value;
        self.state.dirty |= dirty::DR7;
    }

    fn shadow(&self) -> bool {
        self.state.interruptibility & BLOCKING_SHADOW != 0
    }

    fn set_shadow(&mut self, shadow: bool) {
        if self.shadow() != shadow {
            self.state.interruptibility = if shadow { BLOCKING_STI } else { 0 };
            self.state.dirty |= dirty::SHADOW;
        }
    }

    fn pat(&self) -> u64 {
        self.state.pat
    }

    fn set_pat(&mut self, value: u64) {
        self.state.pat = value;
        self.state.dirty |= dirty::PAT;
        // Cached translations carry the old memory types.
        self.state.flush = true;
    }

    fn set_tsc_offset(&mut self, value: u64) {
        self.state.tsc_offset = value;
        self.state.dirty |= dirty::TSC;
    }

    fn direct_msr(&self, index: u32) -> Option<u64> {
        let state = &self.state;
        let [cs, esp, eip] = state.sysenter;
        Some(match index {
            msr::IA32_SYSENTER_CS => cs,
            msr::IA32_SYSENTER_ESP => esp,
            msr::IA32_SYSENTER_EIP => eip,
            msr::IA32_FS_BASE => state.segments.fs.base,
            msr::IA32_GS_BASE => state.segments.gs.base,
            _ => {
                let place = SYSCALL_MSRS.iter().position(|&msr| msr == index)?;
                state.syscall.get(place).copied()?
            }
        })
    }

    /// The guest itself writes these without an exit, so this is userspace, outside of a window.
    fn set_direct_msr(&mut self, index: u32, value: u64) -> bool {
        let state = &mut *self.state;
        let [cs, esp, eip] = &mut state.sysenter;
        let (slot, group) = match index {
            msr::IA32_SYSENTER_CS => (cs, dirty::SYSENTER),
            msr::IA32_SYSENTER_ESP => (esp, dirty::SYSENTER),
            msr::IA32_SYSENTER_EIP => (eip, dirty::SYSENTER),
            msr::IA32_FS_BASE => (&mut state.segments.fs.base, dirty::SEGMENTS),
            msr::IA32_GS_BASE => (&mut state.segments.gs.base, dirty::SEGMENTS),
            _ => {
                let place = SYSCALL_MSRS.iter().position(|&msr| msr == index);
                match place.and_then(|place| state.syscall.get_mut(place)) {
                    Some(slot) => (slot, 0),
                    None => return false,
                }
            }
        };
        *slot = value;
        state.dirty |= group;
        true
    }

    fn set_spec_ctrl(&mut self, value: u64) {
        self.frame.set_spec_ctrl(value);
    }

    fn flush_tlb(&mut self) {
        self.state.flush = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TestHal;

    fn registers() -> VmxRegisters<TestHal> {
        let msrs = crate::vmx::capabilities::tests::recent();
        let mut regs = VmxRegisters::new(&VmxCapabilities::new(&msrs).unwrap()).unwrap();
        regs.set_cr0(cr0::ET);
        regs
    }

    #[test]
    fn rights_and_attributes_are_the_same_thing() {
        for (attributes_, rights_) in [(0xa9b, 0xa09b), (0xc93, 0xc093), (0x093, 0x93), (0x08b, 0x8b), (0xfff, 0xf0ff)]
        {
            assert_eq!(rights(attributes_), rights_);
            assert_eq!(attributes(rights_), attributes_);
        }
        assert_eq!(rights(0xa1b) & UNUSABLE, UNUSABLE, "not present is unusable");
        assert_eq!(attributes(0x1_0093), 0x13, "unusable is not present, with the DPL kept");
        assert_eq!(attributes(0x1_00f3) >> 5 & 3, 3);
    }

    #[test]
    fn hardware_has_what_vmx_fixes_and_the_guest_does_not_see_it() {
        let mut regs = registers();
        assert_eq!(regs.hardware_controls(), (0x30, CR4_VMXE | CR4_MCE));
        assert_eq!((regs.cr0(), regs.cr4()), (cr0::ET, 0));
        regs.set_cr0(cr0::ET | cr0::PE | cr0::PG | cr0::CD | cr0::NW);
        assert_eq!(regs.hardware_controls().0, cr0::ET | cr0::PE | cr0::PG | cr0::NE, "caching is the host's");
        assert_eq!(regs.cr0() & cr0::CD, cr0::CD);
    }

    #[test]
    fn entering_pae_paging_makes_the_upper_level_stale() {
        let mut regs = registers();
        regs.set_cr4(cr4::PAE);
        assert!(!regs.state.pdptes_stale);
        regs.set_cr0(cr0::ET | cr0::PE | cr0::PG);
        assert!(regs.state.pdptes_stale);
        regs.set_efer(efer::LME | efer::LMA);
        assert!(!regs.state.pdptes_stale, "long mode walks all levels in memory");
    }

    #[test]
    fn usable_segments_are_accessed() {
        let mut regs = registers();
        let mut segments = regs.segments();
        segments.cs.attributes = 0xa9a;
        segments.ds.attributes = 0xc92;
        segments.es.attributes = 0;
        regs.set_segments(&segments);
        let s = regs.segments();
        assert_eq!((s.cs.attributes, s.ds.attributes, s.es.attributes), (0xa9b, 0xc93, 0));
    }

    #[test]
    fn direct_msrs_are_kept() {
        let mut regs = registers();
        for index in SYSCALL_MSRS.into_iter().chain([0x174, 0x175, 0x176, 0xc000_0100, 0xc000_0101]) {
            assert!(regs.set_direct_msr(index, u64::from(index)));
            assert_eq!(regs.direct_msr(index), Some(index.into()));
        }
        assert!(!regs.set_direct_msr(0x10, 0) && regs.direct_msr(0x10).is_none());
        assert_eq!(regs.segments().gs.base, 0xc000_0101);
    }
}
