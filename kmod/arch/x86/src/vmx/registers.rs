// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! A vCPU's registers as VMX keeps them: in the VMCS, with a copy in memory. Of each group of registers the newest value is in the
//! VMCS alone ([`State::stale`]: a guest has run since), in the copy alone ([`State::dirty`]: it has been set since), or in both.
//!
//! The VMCS can be reached in a window only, and only with interrupts off, the copy any time. Before register sets are read or
//! set outside of a window, [`Backend::synchronize`](crate::backend::Backend::synchronize) completes the copy.

use axvcpu_uapi::x86::{DescriptorTable, Segment, Segments, RSP};
use vcpu_core::AxResult;
use x86::msr;

use super::capabilities::{Fixed, VmxCapabilities};
use super::fields::{self, Field};
use super::switch::Frame;
use super::transfer::read_segments;
use super::vmcs::{attributes, Vmcs};
use crate::cpu;
use crate::frame::Framed;
use crate::hal::X86Hal;
use crate::msr::PAT_RESET;
use crate::regs::{cr0, cr4, efer, privilege, rflags, segment, DR6_FIXED, DR7_FIXED};
use crate::state::Registers;

/// CR4.VMXE: fixed to one, hidden from the guest.
pub(super) const CR4_VMXE: u64 = 1 << 13;
/// CR4.MCE is the host's, always: without it a machine check in the guest shuts the CPU down.
pub(super) const CR4_MCE: u64 = 1 << 6;
/// Bits of CR0 that the guest changes without an exit. The CPU ignores NW and CD at entries.
pub(super) const CR0_GUEST: u64 = cr0::MP | cr0::EM | cr0::TS;

/// Interruptibility (SDM vol. 3 section 25.4.2): blocking by STI, by MOV SS.
pub(super) const BLOCKING_SHADOW: u32 = 3;
/// Blocking by STI.
const BLOCKING_STI: u32 = 1;
/// Blocking of virtual NMIs.
pub(super) const BLOCKING_NMI: u32 = 1 << 3;

/// Type bit 0 of code and data segments, which usable ones have set.
const ACCESSED: u16 = 1;

/// Groups of registers.
pub(super) mod group {
    pub(in super::super) const RIP: u32 = 1 << 0;
    pub(in super::super) const RSP: u32 = 1 << 1;
    pub(in super::super) const RFLAGS: u32 = 1 << 2;
    /// The bits of CR0 that the guest changes without an exit.
    pub(in super::super) const CR0: u32 = 1 << 3;
    /// CR0, CR4 and EFER.
    pub(in super::super) const CONTROL: u32 = 1 << 4;
    pub(in super::super) const CR3: u32 = 1 << 5;
    pub(in super::super) const SHADOW: u32 = 1 << 6;
    /// The attributes of CS and SS.
    pub(in super::super) const RIGHTS: u32 = 1 << 7;
    pub(in super::super) const SEGMENTS: u32 = 1 << 8;
    pub(in super::super) const DR7: u32 = 1 << 9;
    pub(in super::super) const SYSENTER: u32 = 1 << 10;
    pub(in super::super) const PAT: u32 = 1 << 11;
    pub(in super::super) const TSC: u32 = 1 << 12;
    /// [`SYSCALL_MSRS`](super::SYSCALL_MSRS), in the CPU rather than in the VMCS.
    pub(in super::super) const SYSCALL: u32 = 1 << 13;
    pub(in super::super) const ALL: u32 = (1 << 14) - 1;
    /// What the guest may have changed that an exit leaves in the VMCS. DR7 too, if the guest has debug registers.
    pub(in super::super) const GUEST: u32 = RSP | CR0 | CR3 | RIGHTS | SEGMENTS | SYSENTER;
    /// Of these, what may be asked for after any window without warning.
    pub(in super::super) const ALWAYS: u32 = RSP | RIGHTS;
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
    pub(super) rip: u64,
    pub(super) rflags: u64,
    pub(super) cr0: u64,
    pub(super) cr2: u64,
    pub(super) cr3: u64,
    pub(super) cr4: u64,
    pub(super) efer: u64,
    /// Blocking by STI or MOV SS.
    pub(super) interruptibility: u32,
    pub(super) segments: Segments,
    dr6: u64,
    pub(super) dr7: u64,
    pub(super) pat: u64,
    pub(super) sysenter: [u64; 3],
    /// [`SYSCALL_MSRS`], which the window switches if the guest can use them.
    pub(super) syscall: [u64; 4],
    /// Which the window switches.
    pub(super) kernel_gs_base: u64,
    pub(super) tsc_offset: u64,
    /// Groups whose newest value is in the copy alone: the next entry writes them.
    pub(super) dirty: u32,
    /// Groups whose newest value is in the VMCS alone. None is dirty too.
    pub(super) stale: u32,
    /// The interruptibility state that the VMCS holds.
    pub(super) hardware_interruptibility: u64,
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
    pub(super) entry_controls: u32,
}

/// MSRs in [`State::syscall`], in its order.
pub(super) const SYSCALL_MSRS: [u32; 4] = [msr::IA32_STAR, msr::IA32_LSTAR, msr::IA32_CSTAR, msr::IA32_FMASK];

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
            syscall: [0; 4],
            kernel_gs_base: 0,
            tsc_offset: 0,
            dirty: group::ALL,
            stale: 0,
            hardware_interruptibility: u64::MAX,
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

    /// The current VMCS, if it has the newest value of something in `group`.
    #[inline]
    fn newest(&self, group: u32) -> Option<Vmcs> {
        // SAFETY: Interrupts are off in the inner window, in which our VMCS is current.
        (self.state.stale & group != 0 && self.state.live).then(|| unsafe { Vmcs::current() })
    }

    /// All of `group` has been set.
    #[inline]
    fn set(&mut self, group: u32) {
        self.state.dirty |= group;
        self.state.stale &= !group;
    }
}

impl<H: X86Hal> Registers for VmxRegisters<H> {
    fn gpr(&self, register: usize) -> u64 {
        if register == RSP {
            if let Some(vmcs) = self.newest(group::RSP) {
                return vmcs.read(Field::GuestRsp);
            }
        }
        self.frame.gpr.get(register).copied().unwrap_or(0)
    }

    #[inline]
    fn each_gpr(&self, mut show: impl FnMut(usize, u64)) {
        for (register, &value) in self.frame.gpr.iter().enumerate() {
            show(register, value);
        }
    }

    fn set_gpr(&mut self, register: usize, value: u64) {
        if let Some(slot) = self.frame.gpr.get_mut(register) {
            *slot = value;
        }
        if register == RSP {
            self.set(group::RSP);
        }
    }

    fn rip(&self) -> u64 {
        self.state.rip
    }

    fn set_rip(&mut self, value: u64) {
        self.state.rip = value;
        self.state.dirty |= group::RIP;
    }

    fn rflags(&self) -> u64 {
        self.state.rflags
    }

    fn set_rflags(&mut self, value: u64) {
        if self.state.rflags != value {
            self.state.rflags = value;
            self.state.dirty |= group::RFLAGS;
        }
    }

    fn cr0(&self) -> u64 {
        match self.newest(group::CR0) {
            Some(vmcs) => self.state.cr0 & !CR0_GUEST | vmcs.read(Field::GuestCr0) & CR0_GUEST,
            None => self.state.cr0,
        }
    }

    fn set_cr0(&mut self, value: u64) {
        self.state.cr0 = value;
        self.set(group::CONTROL | group::CR0);
        self.paging_changed();
    }

    fn cr3(&self) -> u64 {
        self.newest(group::CR3).map_or(self.state.cr3, |vmcs| vmcs.read(Field::GuestCr3))
    }

    fn cr4(&self) -> u64 {
        self.state.cr4
    }

    fn set_cr4(&mut self, value: u64) {
        self.state.cr4 = value;
        // CR0 goes with it to the VMCS.
        self.set_cr0(self.cr0());
    }

    fn efer(&self) -> u64 {
        self.state.efer
    }

    fn set_efer(&mut self, value: u64) {
        self.state.efer = value;
        // CR0 goes with it to the VMCS.
        self.set_cr0(self.cr0());
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
        self.set(group::CR3);
        self.paging_changed();
    }

    fn segments(&self) -> Segments {
        self.newest(group::SEGMENTS).map_or(self.state.segments, |vmcs| read_segments(&vmcs))
    }

    fn set_segments(&mut self, segments: &Segments) {
        let state = &mut *self.state;
        state.segments = *segments;
        let s = &mut state.segments;
        for segment in [&mut s.es, &mut s.cs, &mut s.ss, &mut s.ds, &mut s.fs, &mut s.gs] {
            segment.attributes = accessed(segment.attributes);
        }
        self.set(group::SEGMENTS | group::RIGHTS);
    }

    fn code(&self) -> u16 {
        let copy = self.state.segments.cs.attributes;
        self.newest(group::RIGHTS).map_or(copy, |vmcs| attributes(vmcs.read(fields::CS.rights) as u32))
    }

    fn cpl(&self) -> u8 {
        let copy = self.state.segments.ss.attributes;
        privilege(self.newest(group::RIGHTS).map_or(copy, |vmcs| attributes(vmcs.read(fields::SS.rights) as u32)))
    }

    fn dr6(&self) -> u64 {
        self.state.dr6
    }

    fn set_dr6(&mut self, value: u64) {
        self.state.dr6 = value;
    }

    fn dr7(&self) -> u64 {
        self.newest(group::DR7).map_or(self.state.dr7, |vmcs| vmcs.read(Field::GuestDr7))
    }

    fn set_dr7(&mut self, value: u64) {
        self.state.dr7 = value;
        self.set(group::DR7);
    }

    fn shadow(&self) -> bool {
        self.state.interruptibility & BLOCKING_SHADOW != 0
    }

    fn set_shadow(&mut self, shadow: bool) {
        if self.shadow() != shadow {
            self.state.interruptibility = if shadow { BLOCKING_STI } else { 0 };
            self.state.dirty |= group::SHADOW;
        }
    }

    fn pat(&self) -> u64 {
        self.state.pat
    }

    fn set_pat(&mut self, value: u64) {
        self.state.pat = value;
        self.state.dirty |= group::PAT;
        // Cached translations carry the old memory types.
        self.state.flush = true;
    }

    fn set_tsc_offset(&mut self, value: u64) {
        self.state.tsc_offset = value;
        self.state.dirty |= group::TSC;
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
            msr::IA32_KERNEL_GSBASE => state.kernel_gs_base,
            _ => {
                let place = SYSCALL_MSRS.iter().position(|&msr| msr == index)?;
                state.syscall.get(place).copied()?
            }
        })
    }

    /// The guest itself writes these without an exit, but for [`SYSCALL_MSRS`], so this is userspace, outside of a window.
    fn set_direct_msr(&mut self, index: u32, value: u64) -> bool {
        let state = &mut *self.state;
        let [cs, esp, eip] = &mut state.sysenter;
        let (slot, group) = match index {
            msr::IA32_SYSENTER_CS => (cs, group::SYSENTER),
            msr::IA32_SYSENTER_ESP => (esp, group::SYSENTER),
            msr::IA32_SYSENTER_EIP => (eip, group::SYSENTER),
            msr::IA32_FS_BASE => (&mut state.segments.fs.base, group::SEGMENTS),
            msr::IA32_GS_BASE => (&mut state.segments.gs.base, group::SEGMENTS),
            msr::IA32_KERNEL_GSBASE => (&mut state.kernel_gs_base, 0),
            _ => {
                let place = SYSCALL_MSRS.iter().position(|&msr| msr == index);
                match place.and_then(|place| state.syscall.get_mut(place)) {
                    Some(slot) => (slot, group::SYSCALL),
                    None => return false,
                }
            }
        };
        *slot = value;
        self.set(group);
        true
    }

    fn spec_ctrl(&self) -> u64 {
        self.frame.spec_ctrl()
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
        for index in SYSCALL_MSRS.into_iter().chain([0x174, 0x175, 0x176, 0xc000_0100, 0xc000_0101, 0xc000_0102]) {
            assert!(regs.set_direct_msr(index, u64::from(index)));
            assert_eq!(regs.direct_msr(index), Some(index.into()));
        }
        assert!(!regs.set_direct_msr(0x10, 0) && regs.direct_msr(0x10).is_none());
        assert_eq!(regs.segments().gs.base, 0xc000_0101);
    }
}
