// SPDX-License-Identifier: MIT OR Apache-2.0
//! Register sets: from KVM's form to that of the axvcpu ABI and back.

use std::os::raw::c_char;

use axvcpu_uapi::client::Errno;
use axvcpu_uapi::vcpu::{Event, EVENT_EXCEPTION, EVENT_HAS_ADDRESS, EVENT_HAS_ERROR_CODE, EVENT_SOFTWARE_INTERRUPT};
use axvcpu_uapi::x86::{
    self, Control, CpuidEntry, Debug, DescriptorTable, Events, General, LocalApic, Msr, Segment, Segments,
};
use kvm_bindings::{
    kvm_cpuid_entry2, kvm_debugregs, kvm_dtable, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_segment,
    kvm_sregs, kvm_vcpu_events, kvm_xcrs, Msrs, KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE,
    KVM_MP_STATE_UNINITIALIZED, KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_SHADOW, KVM_X86_SHADOW_INT_STI,
};

use super::Vcpu;
use crate::hypervisor::kvm::error::{refused, Error};
use crate::hypervisor::{Registers, Result};

pub(super) fn from_cpuid(entry: &kvm_cpuid_entry2) -> CpuidEntry {
    let kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, .. } = *entry;
    // KVM's other flags are about leaves that changed from call to call, which have not existed since Linux 5.6.
    CpuidEntry { function, index, flags: flags & x86::CPUID_INDEX_SIGNIFICANT, eax, ebx, ecx, edx, reserved: 0 }
}

pub(super) fn to_cpuid(entry: &CpuidEntry) -> kvm_cpuid_entry2 {
    let CpuidEntry { function, index, flags, eax, ebx, ecx, edx, .. } = *entry;
    kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, ..kvm_cpuid_entry2::default() }
}

fn from_general(regs: &kvm_regs) -> General {
    let kvm_regs { rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags } = *regs;
    General { gpr: [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15], rip, rflags }
}

fn to_general(general: &General) -> kvm_regs {
    let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] = general.gpr;
    let General { rip, rflags, .. } = *general;
    kvm_regs { rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags }
}

/// A bit of a segment's attributes, as a number.
const fn bit(attributes: u16, index: u32) -> u8 {
    (attributes >> index & 1) as u8
}

fn from_segment(segment: &kvm_segment) -> Segment {
    let mut attributes = u16::from(segment.type_ & 0xf) | u16::from(segment.dpl & 3) << 5;
    let present = u8::from(segment.present != 0 && segment.unusable == 0);
    let bits = [(segment.s, 4), (present, 7), (segment.avl, 8), (segment.l, 9), (segment.db, 10), (segment.g, 11)];
    for (value, index) in bits {
        attributes |= u16::from(value & 1) << index;
    }
    Segment { base: segment.base, limit: segment.limit, selector: segment.selector, attributes }
}

fn to_segment(segment: &Segment) -> kvm_segment {
    let Segment { base, limit, selector, attributes } = *segment;
    let present = bit(attributes, 7);
    kvm_segment {
        base,
        limit,
        selector,
        type_: (attributes & 0xf) as u8,
        s: bit(attributes, 4),
        dpl: (attributes >> 5 & 3) as u8,
        present,
        avl: bit(attributes, 8),
        l: bit(attributes, 9),
        db: bit(attributes, 10),
        g: bit(attributes, 11),
        unusable: 1 - present,
        ..kvm_segment::default()
    }
}

fn from_table(table: &kvm_dtable) -> DescriptorTable {
    DescriptorTable { base: table.base, limit: table.limit, reserved: [0; 3] }
}

fn to_table(table: &DescriptorTable) -> kvm_dtable {
    kvm_dtable { base: table.base, limit: table.limit, padding: [0; 3] }
}

fn from_segments(sregs: &kvm_sregs) -> Segments {
    Segments {
        es: from_segment(&sregs.es),
        cs: from_segment(&sregs.cs),
        ss: from_segment(&sregs.ss),
        ds: from_segment(&sregs.ds),
        fs: from_segment(&sregs.fs),
        gs: from_segment(&sregs.gs),
        ldtr: from_segment(&sregs.ldt),
        tr: from_segment(&sregs.tr),
        gdtr: from_table(&sregs.gdt),
        idtr: from_table(&sregs.idt),
    }
}

fn with_segments(sregs: kvm_sregs, segments: &Segments) -> kvm_sregs {
    kvm_sregs {
        es: to_segment(&segments.es),
        cs: to_segment(&segments.cs),
        ss: to_segment(&segments.ss),
        ds: to_segment(&segments.ds),
        fs: to_segment(&segments.fs),
        gs: to_segment(&segments.gs),
        ldt: to_segment(&segments.ldtr),
        tr: to_segment(&segments.tr),
        gdt: to_table(&segments.gdtr),
        idt: to_table(&segments.idtr),
        ..sregs
    }
}

/// KVM's list of extended control registers has one entry, XCR0, or none without XSAVE.
fn xcr0(xcrs: &kvm_xcrs) -> u64 {
    xcrs.xcrs.iter().take(xcrs.nr_xcrs as usize).find(|xcr| xcr.xcr == 0).map_or(0, |xcr| xcr.value)
}

fn from_control(sregs: &kvm_sregs, xcr0: u64) -> Control {
    let kvm_sregs { cr0, cr2, cr3, cr4, cr8, efer, apic_base, .. } = *sregs;
    Control { cr0, cr2, cr3, cr4, cr8, efer, xcr0, apic_base }
}

fn with_control(sregs: kvm_sregs, control: &Control) -> kvm_sregs {
    let Control { cr0, cr2, cr3, cr4, cr8, efer, apic_base, .. } = *control;
    kvm_sregs { cr0, cr2, cr3, cr4, cr8, efer, apic_base, ..sregs }
}

fn from_events(events: &kvm_vcpu_events, mp_state: u32) -> Events {
    let mut result = Events {
        activity: match mp_state {
            KVM_MP_STATE_HALTED => x86::ACTIVITY_HALTED,
            KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED => x86::ACTIVITY_WAIT_FOR_SIPI,
            _ => x86::ACTIVITY_RUNNING,
        },
        ..Events::default()
    };
    let mut flag = |on: bool, flag: u32| result.flags |= if on { flag } else { 0 };
    flag(events.interrupt.shadow != 0, x86::EVENTS_INTERRUPT_SHADOW);
    flag(events.nmi.masked != 0, x86::EVENTS_NMI_MASKED);
    flag(events.nmi.pending != 0, x86::EVENTS_NMI_PENDING);
    let kvm_vcpu_events { exception, interrupt, .. } = events;
    if exception.injected != 0 {
        flag(true, x86::EVENTS_EVENT_PENDING);
        result.event = Event { kind: EVENT_EXCEPTION, vector: exception.nr.into(), ..Event::default() };
        if exception.has_error_code != 0 {
            result.event.flags = EVENT_HAS_ERROR_CODE;
            result.event.error_code = exception.error_code;
        }
    } else if interrupt.injected != 0 && interrupt.soft != 0 {
        flag(true, x86::EVENTS_EVENT_PENDING);
        result.event = Event { kind: EVENT_SOFTWARE_INTERRUPT, vector: interrupt.nr.into(), ..Event::default() };
    } else if interrupt.injected != 0 {
        flag(true, x86::EVENTS_EXTERNAL_PENDING);
        result.external_vector = interrupt.nr.into();
    }
    result
}

fn to_events(events: &Events, old: kvm_vcpu_events) -> kvm_vcpu_events {
    let has = |flag| u8::from(events.flags & flag != 0);
    let mut new = old;
    new.flags = KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW;
    new.interrupt.shadow = if has(x86::EVENTS_INTERRUPT_SHADOW) != 0 { KVM_X86_SHADOW_INT_STI as u8 } else { 0 };
    new.nmi.masked = has(x86::EVENTS_NMI_MASKED);
    new.nmi.pending = has(x86::EVENTS_NMI_PENDING);
    (new.exception.injected, new.exception.pending, new.interrupt.injected, new.interrupt.soft) = (0, 0, 0, 0);
    if has(x86::EVENTS_EXTERNAL_PENDING) != 0 {
        new.interrupt.injected = 1;
        new.interrupt.nr = events.external_vector as u8;
    }
    if has(x86::EVENTS_EVENT_PENDING) != 0 {
        queue(&mut new, &events.event);
    }
    new
}

/// Queues an exception or software interrupt for the next entry.
pub(super) fn queue(events: &mut kvm_vcpu_events, event: &Event) {
    if event.kind == EVENT_SOFTWARE_INTERRUPT {
        events.interrupt.injected = 1;
        events.interrupt.nr = event.vector as u8;
        events.interrupt.soft = 1;
    } else {
        events.exception.injected = 1;
        events.exception.nr = event.vector as u8;
        events.exception.has_error_code = u8::from(event.flags & EVENT_HAS_ERROR_CODE != 0);
        events.exception.error_code = event.error_code;
    }
}

/// The address of a page fault that an event brings.
pub(super) fn fault_address(event: &Event) -> Option<u64> {
    (event.flags & EVENT_HAS_ADDRESS != 0).then_some(event.address)
}

/// Reads or writes all of a list of registers: KVM stops at the first that it refuses, and says how many it has done.
fn all_msrs(
    entries: &[kvm_msr_entry],
    name: &'static str,
    transfer: impl FnOnce(&mut Msrs) -> std::result::Result<usize, kvm_ioctls::Error>,
) -> std::result::Result<Msrs, Error> {
    let mut msrs = Msrs::from_entries(entries).map_err(|_| Error::Ioctl { name, errno: Errno::E2BIG })?;
    if transfer(&mut msrs).map_err(refused(name))? != entries.len() {
        return Err(Error::Ioctl { name, errno: Errno::EINVAL });
    }
    Ok(msrs)
}

impl Vcpu {
    fn sregs(&self) -> std::result::Result<kvm_sregs, Error> {
        self.core.fd.get_sregs().map_err(refused("KVM_GET_SREGS"))
    }

    /// Reads, alters and writes the special registers, which KVM checks against each other.
    pub(super) fn change_sregs(&self, change: impl FnOnce(kvm_sregs) -> kvm_sregs) -> std::result::Result<(), Error> {
        self.core.fd.set_sregs(&change(self.sregs()?)).map_err(refused("KVM_SET_SREGS"))
    }

    pub(super) fn events(&self) -> std::result::Result<kvm_vcpu_events, Error> {
        self.core.fd.get_vcpu_events().map_err(refused("KVM_GET_VCPU_EVENTS"))
    }

    pub(super) fn set_events(&self, events: &kvm_vcpu_events) -> std::result::Result<(), Error> {
        self.core.fd.set_vcpu_events(events).map_err(refused("KVM_SET_VCPU_EVENTS"))
    }

    /// KVM has the local APIC's page as bytes, of which each register is the first four at its place.
    pub(super) fn local_apic(&self) -> std::result::Result<LocalApic, Error> {
        let page = self.core.fd.get_lapic().map_err(refused("KVM_GET_LAPIC"))?.regs;
        let mut set = LocalApic::default();
        for (register, bytes) in set.regs.iter_mut().zip(page.chunks_exact(16)) {
            *register = u32::from_le_bytes([bytes[0] as u8, bytes[1] as u8, bytes[2] as u8, bytes[3] as u8]);
        }
        Ok(set)
    }

    pub(super) fn set_local_apic(&self, set: &LocalApic) -> std::result::Result<(), Error> {
        let mut page = kvm_lapic_state::default();
        for (register, bytes) in set.regs.iter().zip(page.regs.chunks_exact_mut(16)) {
            for (to, from) in bytes.iter_mut().zip(register.to_le_bytes()) {
                *to = from as c_char;
            }
        }
        self.core.fd.set_lapic(&page).map_err(refused("KVM_SET_LAPIC"))
    }

    /// Reads model-specific registers.
    ///
    /// # Errors
    /// [`Error::Ioctl`]: `EINVAL` if KVM does not know one of them.
    pub fn msrs(&self, indices: &[u32]) -> std::result::Result<Vec<Msr>, Error> {
        let entries: Vec<_> = indices.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
        let mut msrs = all_msrs(&entries, "KVM_GET_MSRS", |msrs| self.core.fd.get_msrs(msrs))?;
        let from = |entry: &kvm_msr_entry| Msr { index: entry.index, reserved: 0, value: entry.data };
        Ok(msrs.as_mut_slice().iter().map(from).collect())
    }

    /// Writes model-specific registers, in order. Those before one that is refused have been written.
    ///
    /// # Errors
    /// [`Error::Ioctl`]: `EINVAL` if KVM does not know one of them, or it does not take the value.
    pub fn set_msrs(&mut self, msrs: &[Msr]) -> std::result::Result<(), Error> {
        let to = |msr: &Msr| kvm_msr_entry { index: msr.index, data: msr.value, ..Default::default() };
        let entries: Vec<_> = msrs.iter().map(to).collect();
        all_msrs(&entries, "KVM_SET_MSRS", |msrs| self.core.fd.set_msrs(msrs)).map(drop)
    }

    fn xcrs(&self) -> std::result::Result<kvm_xcrs, Error> {
        self.core.fd.get_xcrs().map_err(refused("KVM_GET_XCRS"))
    }
}

impl Registers<General> for Vcpu {
    fn get(&self) -> Result<General> {
        Ok(from_general(&self.core.fd.get_regs().map_err(refused("KVM_GET_REGS"))?))
    }
    fn set(&mut self, set: &General) -> Result<()> {
        Ok(self.core.fd.set_regs(&to_general(set)).map_err(refused("KVM_SET_REGS"))?)
    }
}

impl Registers<Segments> for Vcpu {
    fn get(&self) -> Result<Segments> {
        Ok(from_segments(&self.sregs()?))
    }
    fn set(&mut self, set: &Segments) -> Result<()> {
        Ok(self.change_sregs(|sregs| with_segments(sregs, set))?)
    }
}

impl Registers<Control> for Vcpu {
    fn get(&self) -> Result<Control> {
        Ok(from_control(&self.sregs()?, xcr0(&self.xcrs()?)))
    }
    fn set(&mut self, set: &Control) -> Result<()> {
        let mut xcrs = self.xcrs()?;
        self.change_sregs(|sregs| with_control(sregs, set))?;
        if xcr0(&xcrs) != set.xcr0 {
            xcrs.nr_xcrs = 1;
            (xcrs.xcrs[0].xcr, xcrs.xcrs[0].value) = (0, set.xcr0);
            self.core.fd.set_xcrs(&xcrs).map_err(refused("KVM_SET_XCRS"))?;
        }
        Ok(())
    }
}

impl Registers<Debug> for Vcpu {
    fn get(&self) -> Result<Debug> {
        let kvm_debugregs { db, dr6, dr7, .. } = self.core.fd.get_debug_regs().map_err(refused("KVM_GET_DEBUGREGS"))?;
        Ok(Debug { dr: db, dr6, dr7 })
    }
    fn set(&mut self, set: &Debug) -> Result<()> {
        let registers = kvm_debugregs { db: set.dr, dr6: set.dr6, dr7: set.dr7, ..kvm_debugregs::default() };
        Ok(self.core.fd.set_debug_regs(&registers).map_err(refused("KVM_SET_DEBUGREGS"))?)
    }
}

impl Registers<LocalApic> for Vcpu {
    fn get(&self) -> Result<LocalApic> {
        Ok(self.local_apic()?)
    }
    fn set(&mut self, set: &LocalApic) -> Result<()> {
        Ok(self.set_local_apic(set)?)
    }
}

impl Registers<Events> for Vcpu {
    fn get(&self) -> Result<Events> {
        let mp_state = self.core.fd.get_mp_state().map_err(refused("KVM_GET_MP_STATE"))?.mp_state;
        Ok(from_events(&self.events()?, mp_state))
    }
    fn set(&mut self, set: &Events) -> Result<()> {
        let old = self.events()?;
        let activity = Registers::<Events>::get(self)?.activity;
        self.set_events(&to_events(set, old))?;
        if set.activity != activity {
            let mp_state = match set.activity {
                x86::ACTIVITY_HALTED => KVM_MP_STATE_HALTED,
                x86::ACTIVITY_WAIT_FOR_SIPI => KVM_MP_STATE_INIT_RECEIVED,
                _ => KVM_MP_STATE_RUNNABLE,
            };
            self.core.fd.set_mp_state(kvm_mp_state { mp_state }).map_err(refused("KVM_SET_MP_STATE"))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn general_registers_keep_their_names() {
        let mut general = General { rip: 100, rflags: 2, ..General::default() };
        for (i, gpr) in general.gpr.iter_mut().enumerate() {
            *gpr = i as u64;
        }
        let regs = to_general(&general);
        assert_eq!((regs.rax, regs.rcx, regs.rdx, regs.rbx, regs.rsp), (0, 1, 2, 3, 4));
        assert_eq!((regs.rbp, regs.rsi, regs.rdi, regs.r8, regs.r15), (5, 6, 7, 8, 15));
        assert_eq!(from_general(&regs), general);
    }

    #[test]
    fn segments_keep_every_attribute() {
        for attributes in 0..1 << 12 {
            let segment = Segment { base: 0x1234, limit: 0xf_ffff, selector: 0x10, attributes };
            assert_eq!(from_segment(&to_segment(&segment)), segment, "{attributes:#x}");
        }
        let long = to_segment(&Segment { base: 0, limit: u32::MAX, selector: 0x10, attributes: 0xa9b });
        assert_eq!((long.type_, long.s, long.dpl, long.present, long.l, long.db, long.g), (0xb, 1, 0, 1, 1, 0, 1));
        let null = to_segment(&Segment::default());
        assert_eq!((null.present, null.unusable), (0, 1));
        let unusable = kvm_segment { present: 1, unusable: 1, ..kvm_segment::default() };
        assert_eq!(from_segment(&unusable).attributes & 0x80, 0, "present bits of unusable segments mean nothing");
    }

    #[test]
    fn control_and_segments_leave_each_other_alone() {
        let control = Control { cr0: 1, cr2: 2, cr3: 3, cr4: 4, cr8: 5, efer: 6, xcr0: 7, apic_base: 8 };
        let segments = Segments { cs: Segment { attributes: 0x9b, ..Segment::default() }, ..Segments::default() };
        let sregs = with_segments(with_control(kvm_sregs::default(), &control), &segments);
        assert_eq!((from_control(&sregs, 7), from_segments(&sregs)), (control, segments));
    }

    #[test]
    fn events_survive() {
        let exception =
            Event { kind: EVENT_EXCEPTION, vector: 14, error_code: 2, flags: EVENT_HAS_ERROR_CODE, ..Event::default() };
        let flags = [x86::EVENTS_INTERRUPT_SHADOW, x86::EVENTS_NMI_MASKED, x86::EVENTS_NMI_PENDING];
        for flags in (0..8).map(|i| (0..3).filter(|b| i >> b & 1 != 0).fold(0, |all, b| all | flags[b])) {
            let none = Events { flags, ..Events::default() };
            let external =
                Events { flags: flags | x86::EVENTS_EXTERNAL_PENDING, external_vector: 0x20, ..Events::default() };
            let pending = Events { flags: flags | x86::EVENTS_EVENT_PENDING, event: exception, ..Events::default() };
            for events in [none, external, pending] {
                let kvm = to_events(&events, kvm_vcpu_events::default());
                assert_eq!(from_events(&kvm, KVM_MP_STATE_RUNNABLE), events);
            }
        }
        assert_eq!(from_events(&kvm_vcpu_events::default(), KVM_MP_STATE_HALTED).activity, x86::ACTIVITY_HALTED);
    }

    #[test]
    fn cpuid_keeps_its_index() {
        let entry = CpuidEntry { function: 4, index: 2, flags: 1, eax: 3, ebx: 4, ecx: 5, edx: 6, reserved: 0 };
        assert_eq!(from_cpuid(&to_cpuid(&entry)), entry);
    }
}
