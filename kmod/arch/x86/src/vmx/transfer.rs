// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The way of a vCPU's registers between their copy in memory and the VMCS: entries write what has changed, exits read what
//! every exit needs, and the rest is read when somebody asks for it.

use axvcpu_uapi::x86::{DescriptorTable, Segment, Segments, RSP};

use super::capabilities::entry;
use super::fields::{self, Field, SegmentFields};
use super::registers::{group, VmxRegisters, BLOCKING_NMI, BLOCKING_SHADOW, CR0_GUEST};
use super::vmcs::{attributes, rights, Vmcs};
use crate::hal::X86Hal;
use crate::regs::{efer, rflags, segment};

/// Pending debug exceptions: single step.
const PENDING_BS: u64 = 1 << 14;
/// A busy 32-bit or 64-bit TSS.
const BUSY_TSS: u16 = 11;

impl<H: X86Hal> VmxRegisters<H> {
    /// What the entry finds of the interruptibility state: `nmi` blocks virtual NMIs.
    pub(super) fn interruptibility(&self, nmi: bool) -> u32 {
        self.state.interruptibility | if nmi { BLOCKING_NMI } else { 0 }
    }

    /// Writes what has changed to the VMCS.
    #[inline]
    pub(super) fn write_back(&mut self, vmcs: &mut Vmcs, nmi_blocked: bool) {
        const OFTEN: u32 = group::RIP | group::RSP | group::RFLAGS;
        let interruptibility = self.interruptibility(nmi_blocked);
        let rsp = self.frame.gpr.get(RSP).copied().unwrap_or(0);
        let state = &mut *self.state;
        let changed = state.dirty;
        // Those are dealt with by the window.
        state.dirty = changed & group::SYSCALL;
        if changed & group::RIP != 0 {
            vmcs.write(Field::GuestRip, state.rip);
        }
        if changed & group::RSP != 0 {
            vmcs.write(Field::GuestRsp, rsp);
        }
        if changed & group::RFLAGS != 0 {
            vmcs.write(Field::GuestRflags, state.rflags);
        }
        vmcs.update(Field::GuestInterruptibility, &mut state.hardware_interruptibility, interruptibility.into());
        if interruptibility & BLOCKING_SHADOW != 0 || changed & group::SHADOW != 0 {
            // In a shadow the trap of a single step waits (SDM vol. 3 section 27.3.1.5); elsewhere it has been delivered.
            let step = state.rflags & rflags::TF != 0 && interruptibility & BLOCKING_SHADOW != 0;
            let pending = vmcs.read(Field::GuestPendingDebug) & !PENDING_BS;
            vmcs.write(Field::GuestPendingDebug, pending | if step { PENDING_BS } else { 0 });
        }
        if changed & !(OFTEN | group::SHADOW | group::SYSCALL) != 0 {
            self.write_rarely_changed(vmcs, changed);
        }
    }

    #[cold]
    fn write_rarely_changed(&mut self, vmcs: &mut Vmcs, changed: u32) {
        let (hardware_cr0, hardware_cr4) = self.hardware_controls();
        let entry_controls = self.entry_controls;
        let state = &*self.state;
        let is = |group| changed & group != 0;
        let long = state.efer & efer::LMA != 0;
        if is(group::CONTROL) {
            vmcs.write(Field::GuestCr0, hardware_cr0);
            vmcs.write(Field::ControlCr0Shadow, state.cr0);
            vmcs.write(Field::ControlCr0Mask, !CR0_GUEST);
            vmcs.write(Field::GuestCr4, hardware_cr4);
            vmcs.write(Field::ControlCr4Shadow, state.cr4);
            vmcs.write(Field::ControlCr4Mask, !0);
            vmcs.write(Field::GuestEfer, state.efer);
            vmcs.write(Field::ControlEntry, (entry_controls | if long { entry::IA32E } else { 0 }).into());
        }
        if is(group::CR3) {
            vmcs.write(Field::GuestCr3, state.cr3);
        }
        if is(group::SEGMENTS) {
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
        if is(group::CONTROL | group::SEGMENTS) && long {
            // Userspace may have given a 16-bit one, which a CPU in long mode can have in TR only by an entry.
            let tr = vmcs.read(fields::TR.rights);
            vmcs.write(fields::TR.rights, tr & !u64::from(segment::TYPE) | u64::from(BUSY_TSS));
        }
        if is(group::DR7) {
            vmcs.write(Field::GuestDr7, state.dr7);
        }
        if is(group::SYSENTER) {
            let [cs, esp, eip] = state.sysenter;
            vmcs.write(Field::GuestSysenterCs, cs);
            vmcs.write(Field::GuestSysenterEsp, esp);
            vmcs.write(Field::GuestSysenterEip, eip);
        }
        if is(group::PAT) {
            vmcs.write(Field::GuestPat, state.pat);
        }
        if is(group::TSC) {
            vmcs.write(Field::ControlTscOffset, state.tsc_offset);
        }
    }

    /// Reads what dealing with any exit needs; the rest of what the guest may have changed is read when somebody asks. `debug`
    /// tells that the guest may have written DR7. Gives the interruptibility state.
    #[inline]
    pub(super) fn read_exit(&mut self, vmcs: &Vmcs, debug: bool) -> u32 {
        let state = &mut *self.state;
        state.rip = vmcs.read(Field::GuestRip);
        state.rflags = vmcs.read(Field::GuestRflags);
        let interruptibility = vmcs.read(Field::GuestInterruptibility);
        state.hardware_interruptibility = interruptibility;
        state.interruptibility = interruptibility as u32 & BLOCKING_SHADOW;
        state.stale = group::GUEST | if debug { group::DR7 } else { 0 };
        interruptibility as u32
    }

    /// Reads those of `groups` whose newest value is in the VMCS.
    pub(super) fn read_back(&mut self, vmcs: &Vmcs, groups: u32) {
        let wanted = self.state.stale & groups;
        let is = |group| wanted & group != 0;
        if is(group::RSP) {
            if let Some(slot) = self.frame.gpr.get_mut(RSP) {
                *slot = vmcs.read(Field::GuestRsp);
            }
        }
        let state = &mut *self.state;
        state.stale &= !groups;
        if is(group::RIGHTS) {
            state.segments.cs.attributes = attributes(vmcs.read(fields::CS.rights) as u32);
            state.segments.ss.attributes = attributes(vmcs.read(fields::SS.rights) as u32);
        }
        if is(group::CR0) {
            state.cr0 = state.cr0 & !CR0_GUEST | vmcs.read(Field::GuestCr0) & CR0_GUEST;
        }
        if is(group::CR3) {
            state.cr3 = vmcs.read(Field::GuestCr3);
        }
        if is(group::SEGMENTS) {
            state.segments = read_segments(vmcs);
        }
        if is(group::DR7) {
            state.dr7 = vmcs.read(Field::GuestDr7);
        }
        if is(group::SYSENTER) {
            state.sysenter = [Field::GuestSysenterCs, Field::GuestSysenterEsp, Field::GuestSysenterEip]
                .map(|field| vmcs.read(field));
        }
    }
}

/// The VMCS's segments.
pub(super) fn read_segments(vmcs: &Vmcs) -> Segments {
    let segment = |from: SegmentFields| Segment {
        selector: vmcs.read(from.selector) as u16,
        limit: vmcs.read(from.limit) as u32,
        attributes: attributes(vmcs.read(from.rights) as u32),
        base: vmcs.read(from.base),
    };
    let table =
        |base, limit| DescriptorTable { base: vmcs.read(base), limit: vmcs.read(limit) as u16, reserved: [0; 3] };
    Segments {
        es: segment(fields::ES),
        cs: segment(fields::CS),
        ss: segment(fields::SS),
        ds: segment(fields::DS),
        fs: segment(fields::FS),
        gs: segment(fields::GS),
        ldtr: segment(fields::LDTR),
        tr: segment(fields::TR),
        gdtr: table(Field::GuestGdtrBase, Field::GuestGdtrLimit),
        idtr: table(Field::GuestIdtrBase, Field::GuestIdtrLimit),
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
