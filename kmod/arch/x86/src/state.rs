// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The part of a vCPU that is the same whatever the backend: [`Guest`]; and the part that the backend's hardware structure
//! holds, as the rest of the crate sees it: [`Registers`].

use core::sync::atomic::{AtomicU64, Ordering};

use axvcpu_uapi::vcpu::ExitKind;
use axvcpu_uapi::x86::{DescriptorTable, Segment, Segments, RDX};
use vcpu_core::{AxError, AxResult, AxVCpuExitReason, HostPhysAddr};

use crate::apic::{Clock, Config, Effect, Lapic, Mailbox, TimerUpdate, Watch};
use crate::backend::{Backend, Exited};
use crate::caps::Capabilities;
use crate::cpu;
use crate::cpuid::{CpuidTable, Feature};
use crate::debug::DebugRegisters;
use crate::events::{Activity, Events, Situation};
use crate::exit::Pending;
use crate::fpu::Fpu;
use crate::hal::X86Hal;
use crate::msr::{Msrs, Offered};
use crate::mtrr::Mtrr;
use crate::pvclock::PvClock;
use crate::regs::{cr0, rflags, segment, xcr0, Limits, DR6_FIXED, DR7_FIXED};
use crate::vcpu::X86SetupConfig;
use crate::window::HostState;

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
    /// Shows all of them, some twice: the second time counts.
    fn each_gpr(&self, show: impl FnMut(usize, u64));
    fn rip(&self) -> u64;
    fn set_rip(&mut self, value: u64);
    fn rflags(&self) -> u64;
    fn set_rflags(&mut self, value: u64);
    fn cr0(&self) -> u64;
    fn set_cr0(&mut self, value: u64);
    fn cr2(&self) -> u64;
    fn set_cr2(&mut self, value: u64);
    fn cr3(&self) -> u64;
    fn set_cr3(&mut self, value: u64);
    fn cr4(&self) -> u64;
    fn set_cr4(&mut self, value: u64);
    /// EFER as the guest sees it.
    fn efer(&self) -> u64;
    fn set_efer(&mut self, value: u64);
    fn segments(&self) -> Segments;
    /// Sets all segments; the CPL becomes the DPL of SS.
    fn set_segments(&mut self, segments: &Segments);
    /// Attributes of CS.
    fn code(&self) -> u16;
    fn cpl(&self) -> u8;
    fn dr6(&self) -> u64;
    fn set_dr6(&mut self, value: u64);
    fn dr7(&self) -> u64;
    fn set_dr7(&mut self, value: u64);
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
    regs.efer() & crate::regs::efer::LMA != 0 && regs.code() & segment::L != 0
}

/// What the local APIC has for an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ApicView {
    /// The interrupt that it would deliver.
    pub(crate) vector: Option<u8>,
    /// An interrupt waits for the task priority to fall.
    pub(crate) blocked_by_priority: bool,
    /// It lets interrupts of userspace's 8259 through.
    pub(crate) accepts_pic: bool,
    /// The task priority, as in CR8.
    pub(crate) cr8: u8,
}

/// The last identity given to a vCPU. 0 is none.
static IDENTITIES: AtomicU64 = AtomicU64::new(0);

/// Segments after reset, with CS based at `code_base`. The TSS is a 32-bit one: with a 16-bit one in TR some CPUs refuse to enter
/// long mode (SDM vol. 2, MOV to control registers), and start-up code may do so before it loads TR.
fn segments_at_reset(code_base: u64, selector: u16) -> Segments {
    /// Attributes of a present, accessed, writable data segment.
    const DATA16: u16 = 0x93;
    /// Attributes of a present, accessed, readable code segment.
    const CODE16: u16 = 0x9b;
    /// Attributes of a present LDT.
    const LDT: u16 = 0x82;
    /// Attributes of a present, busy 32-bit TSS.
    const TSS32: u16 = 0x8b;
    let flat = Segment { base: 0, limit: 0xffff, selector: 0, attributes: DATA16 };
    let table = DescriptorTable { base: 0, limit: 0xffff, reserved: [0; 3] };
    Segments {
        es: flat,
        cs: Segment { base: code_base, selector, attributes: CODE16, ..flat },
        ss: flat,
        ds: flat,
        fs: flat,
        gs: flat,
        ldtr: Segment { attributes: LDT, ..flat },
        tr: Segment { attributes: TSS32, ..flat },
        gdtr: table,
        idtr: table,
    }
}

/// A vCPU, but for the registers that the hardware structure holds.
pub(crate) struct Guest<H: X86Hal> {
    pub(crate) caps: Capabilities,
    pub(crate) vcpu_id: u32,
    /// Unique in the system, for ever.
    pub(crate) identity: u64,
    /// Where it starts: below 4 GiB.
    pub(crate) entry: u64,
    /// The nested page table, of [`Capabilities::npt_levels`] levels.
    pub(crate) root: HostPhysAddr,
    /// It has a CPU, until it is unbound.
    pub(crate) bound: bool,
    /// `None` until it is set up.
    pub(crate) cpuid: Option<CpuidTable<H>>,
    pub(crate) limits: Limits,
    /// `None` if the local APIC is userspace's.
    lapic: Option<Lapic<H>>,
    /// What entries ask of it, until something changes there.
    apic_view: Option<ApicView>,
    /// Others know who the local APIC is.
    published: bool,
    /// The posted-interrupt descriptor, if its address is known.
    pub(crate) posted: Option<HostPhysAddr>,
    /// CR8 and IA32_APIC_BASE without a local APIC here.
    cr8: u8,
    apic_base: u64,
    pub(crate) events: Events,
    pub(crate) msrs: Msrs,
    pub(crate) offered: Offered,
    pub(crate) mtrr: Mtrr,
    pub(crate) clock: PvClock,
    pub(crate) fpu: Fpu<H>,
    pub(crate) xcr0: u64,
    pub(crate) debug: DebugRegisters,
    /// The host's FPU state in a window.
    pub(crate) host: HostState,
    /// What is added to the host's TSC.
    pub(crate) tsc_offset: u64,
    pub(crate) pending: Pending,
    /// An interrupt command that an access to the xAPIC page has left, for [`take_ipi`](Self::take_ipi).
    ipi: Option<u64>,
    /// How the last entry ended.
    pub(crate) exited: Exited,
    /// Of the last exit.
    pub(crate) exit_kind: ExitKind,
    /// The last exit is over, and nothing has changed by it that anybody but the vCPU looks at: not its local APIC, not its
    /// clocks. [`run_while`](Self::run_while) may go on.
    pub(crate) private: bool,
    /// Events injected.
    pub(crate) injections: u64,
    /// TLB flushes asked of the CPU, fresh identifiers of translations included.
    pub(crate) tlb_flushes: u64,
}

impl<H: X86Hal> Guest<H> {
    pub(crate) fn new(vcpu_id: u32, caps: Capabilities) -> AxResult<Self> {
        Ok(Self {
            caps,
            vcpu_id,
            identity: IDENTITIES.fetch_add(1, Ordering::Relaxed).wrapping_add(1),
            entry: 0,
            root: HostPhysAddr::new(0),
            bound: false,
            cpuid: None,
            limits: Limits { phys_bits: 36, cr4: 0, efer: 0, xcr0: 0 },
            lapic: None,
            apic_view: None,
            published: false,
            posted: None,
            cr8: 0,
            apic_base: APIC_BASE_RESET | if vcpu_id == 0 { APIC_BASE_BSP } else { 0 },
            events: Events::new(),
            msrs: Msrs::new(),
            offered: Offered::default(),
            mtrr: Mtrr::new(),
            clock: PvClock::new(),
            fpu: Fpu::new(&caps)?,
            xcr0: xcr0::X87,
            debug: DebugRegisters::default(),
            host: HostState::default(),
            tsc_offset: 0,
            pending: Pending::None,
            ipi: None,
            exited: Exited::NEVER,
            exit_kind: ExitKind::Other,
            private: false,
            injections: 0,
            tlb_flushes: 0,
        })
    }

    // --- Life ---

    /// Completes the vCPU. May sleep.
    ///
    /// # Errors
    /// [`AxError::NoMemory`].
    pub(crate) fn setup(&mut self, hw: &mut impl Backend<H>, config: X86SetupConfig<H>) -> AxResult {
        let X86SetupConfig { cpuid, in_kernel_apic, tsc_origin, posted } = config;
        self.limits = Limits::new(&cpuid, self.caps.xcr0);
        self.offered = Offered::new(&cpuid, &self.caps);
        self.lapic = match in_kernel_apic {
            true => Some(Lapic::new(Config {
                id: self.vcpu_id,
                boot_processor: self.vcpu_id == 0,
                x2apic: cpuid.has(Feature::X2APIC),
                tsc_deadline: cpuid.has(Feature::TSC_DEADLINE),
            })?),
            false => None,
        };
        self.tsc_offset = tsc_origin.wrapping_neg();
        hw.regs_mut().set_tsc_offset(self.tsc_offset);
        self.posted = posted;
        self.cpuid = Some(cpuid);
        hw.setup(self);
        let entry = self.entry;
        self.reset(hw, entry & 0xffff_0000, (entry >> 4) as u16 & 0xf000, entry & 0xffff);
        let waits = in_kernel_apic && self.vcpu_id != 0;
        self.events.reset(if waits { Activity::WaitForSipi } else { Activity::Running });
        Ok(())
    }

    /// Registers as after reset or INIT (APM vol. 2 table 14-1, SDM vol. 3 table 10-1), about to execute at `code_base + rip` in
    /// real mode. Caches are on after reset, as firmware leaves them.
    fn reset(&mut self, hw: &mut impl Backend<H>, code_base: u64, selector: u16, rip: u64) {
        let signature = self.cpuid.as_ref().map_or(0, CpuidTable::signature);
        let regs = hw.regs_mut();
        regs.set_segments(&segments_at_reset(code_base, selector));
        // INIT keeps CD and NW as they are.
        regs.set_cr0(cr0::ET | regs.cr0() & (cr0::CD | cr0::NW));
        regs.set_cr2(0);
        regs.set_cr3(0);
        regs.set_cr4(0);
        regs.set_efer(0);
        regs.set_dr6(DR6_FIXED);
        regs.set_dr7(DR7_FIXED);
        regs.set_rflags(rflags::FIXED);
        regs.set_rip(rip);
        regs.set_shadow(false);
        for register in 0..16 {
            regs.set_gpr(register, 0);
        }
        regs.set_gpr(RDX, signature.into());
        regs.flush_tlb();
        self.debug.set([0; 4]);
        hw.forget();
    }

    /// INIT: the boot processor starts at the reset vector, the others wait for a start-up IPI.
    fn init(&mut self, hw: &mut impl Backend<H>) {
        self.reset(hw, 0xffff_0000, 0xf000, 0xfff0);
        let boot_processor = self.vcpu_id == 0;
        self.events.reset(if boot_processor { Activity::Running } else { Activity::WaitForSipi });
        self.set_cr8(0);
        self.pending = Pending::None;
    }

    /// Takes what was posted. Whether there is something to run for.
    #[inline]
    pub(crate) fn prepare(&mut self, hw: &mut impl Backend<H>, mailbox: &Mailbox<H>) -> bool {
        if mailbox.pending() || !self.published {
            self.take_mail(hw, mailbox);
        }
        self.events.activity() == Activity::Running
            || self.update_activity(hw.regs())
            || self.msrs.interrupt_end.is_some()
            || mailbox.pending()
    }

    #[inline(never)]
    fn take_mail(&mut self, hw: &mut impl Backend<H>, mailbox: &Mailbox<H>) {
        let (init, sipi) = self.collect(mailbox);
        if init {
            self.init(hw);
        }
        if let Some(vector) = sipi.filter(|_| self.events.activity() == Activity::WaitForSipi) {
            self.reset(hw, u64::from(vector) << 12, u16::from(vector) << 8, 0);
            self.events.set_activity(Activity::Running);
        }
    }

    // --- Clocks and the local APIC ---

    /// The guest's TSC.
    pub(crate) fn tsc(&self) -> u64 {
        cpu::rdtsc().wrapping_add(self.tsc_offset)
    }

    /// Calls `f` with the local APIC and a reader of the clocks.
    #[inline]
    pub(crate) fn with_lapic<T>(&mut self, f: impl FnOnce(&mut Lapic<H>, &dyn Fn() -> Clock) -> T) -> Option<T> {
        let offset = self.tsc_offset;
        let clock = || Clock { now_ns: H::now_ns(), tsc: cpu::rdtsc().wrapping_add(offset), tsc_khz: H::tsc_khz() };
        self.lapic_mut().map(|lapic| f(lapic, &clock))
    }

    /// The local APIC, if it is here.
    pub(crate) fn lapic(&self) -> Option<&Lapic<H>> {
        self.lapic.as_ref()
    }

    /// The local APIC, to be changed.
    pub(crate) fn lapic_mut(&mut self) -> Option<&mut Lapic<H>> {
        self.apic_view = None;
        self.published = false;
        self.lapic.as_mut()
    }

    /// The local APIC, for the hardware to be told of it, which changes nothing.
    #[inline]
    pub(crate) fn lapic_for_hardware(&mut self) -> Option<&mut Lapic<H>> {
        self.lapic.as_mut()
    }

    /// The hardware has changed, or may have, what entries ask of the local APIC.
    #[inline]
    pub(crate) fn apic_changed(&mut self) {
        self.apic_view = None;
    }

    /// What the local APIC has for an entry.
    #[inline]
    pub(crate) fn apic_view(&mut self) -> ApicView {
        match self.apic_view {
            Some(view) => view,
            None => self.look_at_apic(),
        }
    }

    fn look_at_apic(&mut self) -> ApicView {
        let vector = self.apic_vector();
        let view = ApicView {
            vector,
            blocked_by_priority: vector.is_none()
                && self.lapic().is_some_and(|lapic| lapic.highest_request().is_some()),
            accepts_pic: self.accepts_pic_interrupt(),
            cr8: self.cr8(),
        };
        self.apic_view = Some(view);
        view
    }

    /// What the host's timer is to do for the local APIC's. `watched` is [`Backend::watches_deadline`]. A vCPU that sleeps makes no
    /// entries that could wait for anything.
    #[inline]
    pub(crate) fn timer_update(&mut self, watched: bool) -> TimerUpdate {
        let watch = match self.events.activity() {
            Activity::Running if watched => Watch::Entries,
            Activity::Running => Watch::Exits,
            _ => Watch::Nobody,
        };
        // Not `lapic_mut`: it changes nothing of what entries ask.
        self.lapic.as_mut().map_or(TimerUpdate::Unchanged, |lapic| lapic.timer_update(watch))
    }

    /// The guest's TSC that the local APIC's timer waits for, in TSC-deadline mode.
    #[inline]
    pub(crate) fn deadline(&self) -> Option<u64> {
        self.lapic().and_then(Lapic::deadline)
    }

    /// Has the local APIC's timer expire if the deadline has been reached. Whether it has.
    pub(crate) fn deadline_reached(&mut self) -> bool {
        let reached = self.deadline().is_some_and(|deadline| deadline <= self.tsc());
        if reached {
            self.with_lapic(|lapic, clock| lapic.look_at_timer(clock));
        }
        reached
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
        if cr8 == self.cr8() {
            return;
        }
        match self.lapic_mut() {
            Some(lapic) => lapic.set_cr8(cr8),
            None => self.cr8 = cr8 & 0xf,
        }
    }

    pub(crate) fn apic_base(&self) -> u64 {
        self.lapic.as_ref().map_or(self.apic_base, Lapic::base)
    }

    /// Sets IA32_APIC_BASE from userspace.
    pub(crate) fn restore_apic_base(&mut self, value: u64) -> AxResult {
        match self.lapic_mut() {
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
    fn apic_vector(&self) -> Option<u8> {
        self.lapic.as_ref().and_then(Lapic::pending_vector)
    }

    /// Whether the CPU takes interrupts of userspace's 8259.
    fn accepts_pic_interrupt(&self) -> bool {
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
    fn collect(&mut self, mailbox: &Mailbox<H>) -> (bool, Option<u8>) {
        let posted = match self.with_lapic(|lapic, clock| lapic.collect(mailbox, clock)) {
            Some(posted) => posted,
            None => mailbox.take(|_, _, _| {}),
        };
        self.events.post_nmis(posted.nmis);
        self.published = true;
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
}
