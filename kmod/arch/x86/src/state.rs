// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The part of a vCPU that is the same whatever the backend: [`Guest`]; and the part that the backend's hardware structure
//! holds, as the rest of the crate sees it: [`Registers`].

use axvcpu_uapi::x86::Segment;
use vcpu_core::{AxError, AxResult, AxVCpuExitReason};

use crate::apic::{Clock, Effect, Lapic, Mailbox, Mode};
use crate::caps::Capabilities;
use crate::cpu;
use crate::cpuid::{CpuidTable, Dynamic};
use crate::events::{Activity, Events, Injection, Situation};
use crate::fpu::Fpu;
use crate::hal::X86Hal;
use crate::msr::Msrs;
use crate::mtrr::Mtrr;
use crate::pvclock::PvClock;
use crate::regs::{rflags, segment, xcr0, Limits, DR6_BS};

/// IA32_APIC_BASE of a vCPU whose local APIC is userspace's.
const APIC_BASE_RESET: u64 = 0xfee0_0800;
/// IA32_APIC_BASE: boot processor.
const APIC_BASE_BSP: u64 = 1 << 8;

/// Whether userspace's local APIC can have this IA32_APIC_BASE: no reserved bits, and x2APIC mode only when enabled.
fn apic_base_valid(value: u64) -> bool {
    const EXTD: u64 = 1 << 10;
    const EN: u64 = 1 << 11;
    let reserved = !(0x000f_ffff_ffff_f000 | APIC_BASE_BSP | EXTD | EN);
    value & reserved == 0 && value & (EXTD | EN) != EXTD
}

/// Registers that live in the backend's hardware structure.
pub(crate) trait Registers {
    /// A general register, by number; 0 for a number that is none.
    fn gpr(&self, register: usize) -> u64;
    fn set_gpr(&mut self, register: usize, value: u64);
    fn rip(&self) -> u64;
    fn set_rip(&mut self, value: u64);
    fn rflags(&self) -> u64;
    fn set_rflags(&mut self, value: u64);
    fn cr0(&self) -> u64;
    fn set_cr0(&mut self, value: u64);
    fn cr3(&self) -> u64;
    fn cr4(&self) -> u64;
    fn set_cr4(&mut self, value: u64);
    /// EFER as the guest sees it.
    fn efer(&self) -> u64;
    fn set_efer(&mut self, value: u64);
    fn cs(&self) -> Segment;
    fn cpl(&self) -> u8;
    fn dr6(&self) -> u64;
    fn set_dr6(&mut self, value: u64);
    /// The interrupt shadow of STI and MOV SS.
    fn shadow(&self) -> bool;
    fn set_shadow(&mut self, shadow: bool);
    /// PAT.
    fn pat(&self) -> u64;
    fn set_pat(&mut self, value: u64);
    /// What the hardware adds to the host's TSC.
    fn set_tsc_offset(&mut self, value: u64);
    /// An MSR that the guest reads and writes directly, if `index` is one.
    fn direct_msr(&self, index: u32) -> Option<u64>;
    /// Sets it; false if `index` is none.
    fn set_direct_msr(&mut self, index: u32, value: u64) -> bool;
    /// SPEC_CTRL has changed.
    fn set_spec_ctrl(&mut self, value: u64);
    /// Nothing cached of the guest's translations is to be used again.
    fn flush_tlb(&mut self);
}

/// Whether the vCPU executes 64-bit code.
pub(crate) fn is_long_code(regs: &impl Registers) -> bool {
    regs.efer() & crate::regs::efer::LMA != 0 && regs.cs().attributes & segment::L != 0
}

/// What an exit to userspace has left open, to be finished with its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pending {
    /// Nothing.
    None,
    /// IN: the value goes to the low `bytes` of RAX.
    Input { bytes: usize },
    /// RDMSR at `rip`: the value goes to EDX:EAX, or #GP.
    MsrRead { rip: u64 },
    /// WRMSR at `rip`: done, or #GP.
    MsrWrite { rip: u64 },
    /// A hypercall: the value goes to RAX.
    Hypercall,
}

/// An answer from userspace.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reply {
    /// The value read, or the hypercall's result.
    pub value: u64,
    /// Refuse an access to a system register: the guest gets #GP(0).
    pub fault: bool,
}

/// A vCPU, but for the registers that the hardware structure holds.
pub(crate) struct Guest<H: X86Hal> {
    pub(crate) caps: Capabilities,
    pub(crate) vcpu_id: u32,
    /// `None` until it is set up.
    pub(crate) cpuid: Option<CpuidTable<H>>,
    pub(crate) limits: Limits,
    /// `None` if the local APIC is userspace's.
    pub(crate) lapic: Option<Lapic<H>>,
    /// CR8 and IA32_APIC_BASE without a local APIC here.
    cr8: u8,
    apic_base: u64,
    pub(crate) events: Events,
    pub(crate) msrs: Msrs,
    pub(crate) mtrr: Mtrr,
    pub(crate) clock: PvClock,
    pub(crate) fpu: Fpu<H>,
    pub(crate) xcr0: u64,
    /// DR0 to DR3, while they are not in the CPU.
    pub(crate) breakpoints: [u64; 4],
    /// What is added to the host's TSC.
    pub(crate) tsc_offset: u64,
    pub(crate) pending: Pending,
    /// An interrupt command that an access to the xAPIC page has left, for [`take_ipi`](Self::take_ipi).
    ipi: Option<u64>,
}

impl<H: X86Hal> Guest<H> {
    pub(crate) fn new(vcpu_id: u32, caps: Capabilities) -> AxResult<Self> {
        Ok(Self {
            caps,
            vcpu_id,
            cpuid: None,
            limits: Limits { phys_bits: 36, cr4: 0, efer: 0, xcr0: 0 },
            lapic: None,
            cr8: 0,
            apic_base: APIC_BASE_RESET | if vcpu_id == 0 { APIC_BASE_BSP } else { 0 },
            events: Events::new(),
            msrs: Msrs::new(),
            mtrr: Mtrr::new(),
            clock: PvClock::new(),
            fpu: Fpu::new(&caps)?,
            xcr0: xcr0::X87,
            breakpoints: [0; 4],
            tsc_offset: 0,
            pending: Pending::None,
            ipi: None,
        })
    }

    // --- Clocks and the local APIC ---

    /// The guest's TSC.
    pub(crate) fn tsc(&self) -> u64 {
        cpu::rdtsc().wrapping_add(self.tsc_offset)
    }

    /// Calls `f` with the local APIC and a reader of the clocks.
    pub(crate) fn with_lapic<T>(&mut self, f: impl FnOnce(&mut Lapic<H>, &dyn Fn() -> Clock) -> T) -> Option<T> {
        let offset = self.tsc_offset;
        let clock = || Clock { now_ns: H::now_ns(), tsc: cpu::rdtsc().wrapping_add(offset), tsc_khz: H::tsc_khz() };
        self.lapic.as_mut().map(|lapic| f(lapic, &clock))
    }

    /// Moves the guest's TSC.
    pub(crate) fn set_tsc_offset(&mut self, regs: &mut impl Registers, offset: u64) {
        self.tsc_offset = offset;
        regs.set_tsc_offset(offset);
        self.clock.tsc_changed();
        self.with_lapic(|lapic, clock| lapic.tsc_changed(clock));
    }

    pub(crate) fn cr8(&self) -> u8 {
        self.lapic.as_ref().map_or(self.cr8, Lapic::cr8)
    }

    pub(crate) fn set_cr8(&mut self, cr8: u8) {
        match &mut self.lapic {
            Some(lapic) => lapic.set_cr8(cr8),
            None => self.cr8 = cr8 & 0xf,
        }
    }

    pub(crate) fn apic_base(&self) -> u64 {
        self.lapic.as_ref().map_or(self.apic_base, Lapic::base)
    }

    /// Sets IA32_APIC_BASE from userspace.
    pub(crate) fn restore_apic_base(&mut self, value: u64) -> AxResult {
        match &mut self.lapic {
            Some(lapic) => lapic.restore_base(value),
            None if apic_base_valid(value) => {
                self.apic_base = value;
                Ok(())
            }
            None => Err(AxError::InvalidRegister),
        }
    }

    pub(crate) fn apic_id(&self) -> u32 {
        self.lapic.as_ref().map_or(self.vcpu_id, Lapic::id)
    }

    /// The interrupt that the local APIC would deliver.
    pub(crate) fn apic_vector(&self) -> Option<u8> {
        self.lapic.as_ref().and_then(Lapic::pending_vector)
    }

    /// Whether the CPU takes interrupts of userspace's 8259.
    pub(crate) fn accepts_pic_interrupt(&self) -> bool {
        self.lapic.as_ref().is_none_or(Lapic::accepts_pic_interrupt)
    }

    /// An access to the xAPIC page.
    pub(crate) fn apic_access(&mut self, offset: u32, write: Option<u32>) -> AxResult<u32> {
        let offset = u16::try_from(offset).ok().filter(|offset| *offset < 4096).ok_or(AxError::InvalidInput)?;
        let (value, effect) = self
            .with_lapic(|lapic, clock| match write {
                Some(value) => (0, lapic.write_page(offset, value, clock)),
                None => (lapic.read_page(offset, clock), Effect::None),
            })
            .ok_or(AxError::Unsupported)?;
        match effect {
            Effect::Ipi(command) => self.ipi = Some(command),
            // Reported as the exit of a later run: see `take_end`.
            Effect::InterruptEnd(vector) => self.msrs.interrupt_end = Some(vector),
            Effect::None => {}
        }
        Ok(value)
    }

    /// The interrupt command that the last access to the xAPIC page has left: destination, and the low half.
    pub(crate) fn take_ipi(&mut self) -> Option<(u64, u64)> {
        self.ipi.take().map(|command| (command >> 32, command & 0xffff_ffff))
    }

    /// The end of a level-triggered interrupt that an access to the xAPIC page brought, as an exit.
    pub(crate) fn take_end(&mut self) -> Option<AxVCpuExitReason> {
        self.msrs.interrupt_end.take().map(|vector| AxVCpuExitReason::InterruptEnd { vector: Some(vector) })
    }

    // --- Events ---

    pub(crate) fn situation(&self, regs: &impl Registers) -> Situation {
        Situation { interrupts_enabled: regs.rflags() & rflags::IF != 0, shadow: regs.shadow() }
    }

    /// Takes what was posted. True if the vCPU must be put into the state after INIT; then, or if it already waits, the vector
    /// of a start-up IPI comes with it.
    pub(crate) fn collect(&mut self, mailbox: &Mailbox) -> (bool, Option<u8>) {
        let posted = match self.with_lapic(|lapic, clock| lapic.collect(mailbox, clock)) {
            Some(posted) => posted,
            None => mailbox.take(|_, _, _| {}),
        };
        self.events.post_nmis(posted.nmis);
        if let Some(lapic) = &self.lapic {
            mailbox.publish(lapic.identity());
        }
        (posted.init, posted.sipi)
    }

    /// Ends HLT if there is reason to, and tells whether the vCPU executes instructions.
    pub(crate) fn update_activity(&mut self, regs: &impl Registers) -> bool {
        if self.events.activity() == Activity::Halted
            && self.events.wakes(self.situation(regs), self.apic_vector().is_some())
        {
            self.events.set_activity(Activity::Running);
        }
        self.events.activity() == Activity::Running
    }

    pub(crate) fn window_open(&self, regs: &impl Registers) -> bool {
        self.accepts_pic_interrupt() && self.events.window_open(self.situation(regs))
    }

    // --- Instructions ---

    /// Goes on behind an instruction that has been executed for the guest.
    pub(crate) fn advance(&mut self, regs: &mut impl Registers, next_rip: u64) {
        // Outside of 64-bit code the instruction pointer has 32 bits.
        regs.set_rip(if is_long_code(regs) { next_rip } else { next_rip & 0xffff_ffff });
        regs.set_shadow(false);
        let flags = regs.rflags();
        regs.set_rflags(flags & !rflags::RF);
        if flags & rflags::TF != 0 {
            regs.set_dr6(regs.dr6() | DR6_BS);
            self.events.raise_trap();
        }
    }

    /// #GP(0) at the current instruction.
    pub(crate) fn general_protection(&mut self) {
        self.events.raise(Injection::GENERAL_PROTECTION);
    }

    /// #UD at the current instruction.
    pub(crate) fn undefined(&mut self) {
        self.events.raise(Injection::UNDEFINED);
    }

    /// Answers CPUID.
    pub(crate) fn cpuid(&mut self, regs: &mut impl Registers) {
        use axvcpu_uapi::x86::{RAX, RBX, RCX, RDX};
        let dynamic = Dynamic {
            cr4: regs.cr4(),
            xcr0: self.xcr0,
            apic_enabled: self
                .lapic
                .as_ref()
                .map_or(self.apic_base & 1 << 11 != 0, |lapic| lapic.mode() != Mode::Disabled),
            apic_id: self.apic_id(),
        };
        let Some(table) = &self.cpuid else { return };
        let answer = table.lookup(regs.gpr(RAX) as u32, regs.gpr(RCX) as u32, &dynamic);
        regs.set_gpr(RAX, answer.eax.into());
        regs.set_gpr(RBX, answer.ebx.into());
        regs.set_gpr(RCX, answer.ecx.into());
        regs.set_gpr(RDX, answer.edx.into());
    }

    /// XSETBV: whether XCR0 has a new value; otherwise #GP is due.
    pub(crate) fn xsetbv(&mut self, regs: &impl Registers) -> bool {
        use axvcpu_uapi::x86::{RAX, RCX, RDX};
        let value = regs.gpr(RDX) << 32 | regs.gpr(RAX) & 0xffff_ffff;
        let valid = regs.cpl() == 0 && regs.gpr(RCX) as u32 == 0 && self.limits.xcr0_valid(value);
        if valid {
            self.xcr0 = value;
        }
        valid
    }

    /// Finishes what the last exit left open.
    pub(crate) fn complete(&mut self, regs: &mut impl Registers, reply: Reply) {
        use axvcpu_uapi::x86::{RAX, RDX};
        match core::mem::replace(&mut self.pending, Pending::None) {
            Pending::None => {}
            Pending::Input { bytes } => {
                let old = regs.gpr(RAX);
                regs.set_gpr(RAX, merge(old, reply.value, bytes));
            }
            Pending::MsrRead { rip } | Pending::MsrWrite { rip } if reply.fault => {
                // The access has not happened: back to the instruction, and no trap for having completed it.
                regs.set_rip(rip);
                self.events.cancel_trap();
                self.general_protection();
            }
            Pending::MsrRead { .. } => {
                regs.set_gpr(RAX, reply.value & 0xffff_ffff);
                regs.set_gpr(RDX, reply.value >> 32);
            }
            Pending::MsrWrite { .. } => {}
            Pending::Hypercall => regs.set_gpr(RAX, reply.value),
        }
    }
}

/// `old` with its low `bytes` replaced, as an instruction of that operand size writes a register: 4 bytes clear the upper half.
fn merge(old: u64, value: u64, bytes: usize) -> u64 {
    match bytes {
        1 => old & !0xff | value & 0xff,
        2 => old & !0xffff | value & 0xffff,
        _ => value & 0xffff_ffff,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn apic_bases() {
        for good in [0xfee0_0000, 0xfee0_0800, 0xfee0_0900, 0xfee0_0d00, 0xf_ffff_f000] {
            assert!(apic_base_valid(good), "{good:#x}");
        }
        for bad in [0xfee0_0801, 0xfee0_0400, 0xfee0_0a00, 1 << 52] {
            assert!(!apic_base_valid(bad), "{bad:#x}");
        }
    }

    #[test]
    fn input_replaces_as_much_of_rax_as_the_instruction_does() {
        let old = 0x1122_3344_5566_7788;
        assert_eq!(merge(old, !0, 1), 0x1122_3344_5566_77ff);
        assert_eq!(merge(old, !0, 2), 0x1122_3344_5566_ffff);
        assert_eq!(merge(old, 0xaaaa_bbbb_cccc_dddd, 4), 0xcccc_dddd);
    }
}
