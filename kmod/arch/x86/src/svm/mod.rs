// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The AMD SVM backend (APM vol. 2 chapter 15), with nested paging.
//!
//! [`vmcb`] declares the control block, [`registers`] is what a vCPU keeps in it, [`permission`] the I/O and MSR maps, [`asid`]
//! the address space identifiers, [`window`] the state switched at bind and unbind, [`switch`] the world switch, [`exit`]
//! what exits mean; this file is the vCPU and its entry into the guest.

mod asid;
mod exit;
mod permission;
mod registers;
mod switch;
mod vmcb;
mod window;

use core::sync::atomic::{AtomicU64, Ordering};

use axvcpu_uapi::vcpu::ExitKind;
use axvcpu_uapi::x86::{self as uapi, Control, Debug, General, LocalApic, Segments};
use vcpu_core::{AxArchVCpu, AxError, AxResult, AxVCpuExitReason, GuestPhysAddr, HostPhysAddr};

use crate::apic::{Config, Effect, Lapic, Mailbox, TimerUpdate};
use crate::caps::Capabilities;
use crate::cpuid::Feature;
use crate::events::{Activity, Injection};
use crate::frame::Framed;
use crate::hal::X86Hal;
use crate::msr::{Access, Written};
use crate::pvclock::{ClockUpdate, TimeBase};
use crate::regs::{check_debug, cr0, cr4, efer, rflags, virtual_8086_in_long_mode, Limits};
use crate::state::{Guest, Registers, Reply};
use crate::vcpu::{InsnInfo, X86CreateConfig, X86SetupConfig};

pub(crate) use asid::AsidAllocator;
use asid::Assignment;
pub use permission::PermissionMaps;
use registers::SvmRegisters;
use vmcb::{int_control, intercept1, intercept2, intercept3, HardwareState};
use window::HostState;

/// VMCB nested control: NP_ENABLE.
const NP_ENABLE: u64 = 1;
/// Intercept of writes to CR4, in [`vmcb::Vmcb::intercept_cr`].
const CR4_WRITE: u32 = 1 << (16 + 4);
/// Intercept of writes to CR8.
const CR8_WRITE: u32 = 1 << (16 + 8);
/// Intercepted exceptions: #DB and #AC, because a guest could have the CPU deliver them for ever, and #MC, which is the host's.
const EXCEPTIONS: u32 = 1 << 1 | 1 << 17 | 1 << 18;
/// PAUSE filter: as many PAUSEs in a loop exit.
const PAUSE_COUNT: u16 = 3000;
/// PAUSE filter: a loop's PAUSEs are at most so many cycles apart.
const PAUSE_THRESHOLD: u16 = 128;

/// Intercepts that are always on.
const INTERCEPT1: u32 = intercept1::INTR
    | intercept1::NMI
    | intercept1::SMI
    | intercept1::INIT
    | intercept1::CR0_SELECTIVE
    | intercept1::RDPMC
    | intercept1::CPUID
    | intercept1::RSM
    | intercept1::INVD
    | intercept1::HLT
    | intercept1::INVLPGA
    | intercept1::IOIO
    | intercept1::MSR
    | intercept1::TASK_SWITCH
    | intercept1::FERR_FREEZE
    | intercept1::SHUTDOWN;
/// Intercepts that are always on.
const INTERCEPT2: u32 = intercept2::VMRUN
    | intercept2::VMMCALL
    | intercept2::VMLOAD
    | intercept2::VMSAVE
    | intercept2::STGI
    | intercept2::CLGI
    | intercept2::SKINIT
    | intercept2::WBINVD
    | intercept2::MONITOR
    | intercept2::MWAIT
    | intercept2::MWAIT_ARMED
    | intercept2::XSETBV
    | intercept2::RDPRU;
/// Intercepts that are always on.
const INTERCEPT3: u32 = intercept3::INVLPGB | intercept3::INVLPGB_ILLEGAL | intercept3::MCOMMIT | intercept3::TLBSYNC;

/// The last identity given to a vCPU. 0 is none.
static IDENTITIES: AtomicU64 = AtomicU64::new(0);

/// What only this backend keeps of a vCPU.
struct Local {
    /// Unique in the system, for ever.
    identity: u64,
    entry: u64,
    root: HostPhysAddr,
    bound: bool,
    /// The CPU it is bound to.
    cpu: usize,
    asid: Assignment,
    host: HostState,
    /// State before the entry, in case it is refused.
    before: HardwareState,
    /// Bits of EFER that the hardware was not shown at the last entry.
    hidden_efer: u64,
    /// What the last entry injected.
    injected: Option<Injection>,
    iret: Iret,
    /// The next entry lets a write of CR0 pass: LMSW, which only the CPU can decode.
    pass_cr0: bool,
    exit_kind: ExitKind,
    injections: u64,
    tlb_flushes: u64,
}

/// Following the IRET that ends an NMI's handler.
///
/// The intercept comes before the instruction, so when it has come, the guest must be stopped once more behind it if an NMI
/// waits: by a single step. (Should the IRET fault instead, its handler sees the step's TF in the flags that it returns to.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Iret {
    /// No NMI is in service, or its IRET has not come.
    No,
    /// The IRET at `rip` is about to be executed.
    Due { rip: u64 },
    /// It is executed in a single step. `trap` tells whether the guest has set TF itself.
    Stepped { rip: u64, trap: bool },
}

/// A vCPU on AMD SVM.
pub struct SvmVCpu<H: X86Hal> {
    guest: Framed<Guest<H>, H>,
    regs: SvmRegisters<H>,
    local: Framed<Local, H>,
}

impl<H: X86Hal> AxArchVCpu for SvmVCpu<H> {
    type CreateConfig = X86CreateConfig;
    type SetupConfig = X86SetupConfig<H>;

    fn new(config: X86CreateConfig) -> AxResult<Self> {
        Self::with_capabilities(config, Capabilities::host())
    }

    fn set_entry(&mut self, entry: GuestPhysAddr) -> AxResult {
        if entry.as_u64() >> 32 != 0 {
            return Err(AxError::InvalidInput);
        }
        self.local.entry = entry.as_u64();
        Ok(())
    }

    fn set_ept_root(&mut self, ept_root: HostPhysAddr) -> AxResult {
        if !ept_root.is_aligned(4096) || ept_root.as_u64() == 0 {
            return Err(AxError::InvalidInput);
        }
        self.local.root = ept_root;
        Ok(())
    }

    fn setup(&mut self, config: X86SetupConfig<H>) -> AxResult {
        let X86SetupConfig { cpuid, in_kernel_apic, tsc_origin } = config;
        let guest = &mut *self.guest;
        guest.limits = Limits::new(&cpuid, guest.caps.xcr0);
        guest.lapic = match in_kernel_apic {
            true => Some(Lapic::new(Config {
                id: guest.vcpu_id,
                boot_processor: guest.vcpu_id == 0,
                x2apic: cpuid.has(Feature::X2APIC),
                tsc_deadline: cpuid.has(Feature::TSC_DEADLINE),
            })?),
            false => None,
        };
        guest.tsc_offset = tsc_origin.wrapping_neg();
        self.write_controls(cpuid.has(Feature::RDTSCP), cpuid.has(Feature::INVPCID));
        self.guest.cpuid = Some(cpuid);
        let entry = self.local.entry;
        self.reset(entry & 0xffff_0000, (entry >> 4) as u16 & 0xf000, entry & 0xffff);
        let waits = in_kernel_apic && self.guest.vcpu_id != 0;
        self.guest.events.reset(if waits { Activity::WaitForSipi } else { Activity::Running });
        Ok(())
    }

    fn run(&mut self) -> AxResult<AxVCpuExitReason> {
        if !self.local.bound {
            return Err(AxError::NotBound);
        }
        if let Some(end) = self.guest.take_end() {
            self.local.exit_kind = ExitKind::Other;
            return Ok(end);
        }
        if !self.guest.update_activity(&self.regs) {
            self.local.exit_kind = ExitKind::Halt;
            return Ok(AxVCpuExitReason::Halt);
        }
        if self.guest.events.window_requested() && self.guest.window_open(&self.regs) {
            self.local.exit_kind = ExitKind::Window;
            return Ok(AxVCpuExitReason::InterruptWindow);
        }
        self.prepare_entry();
        // SAFETY: The vCPU is bound, so `open_window` has set up this CPU and the frame, and by the trait's contract interrupts
        // are off and preemption has been since. The VMCB is complete since `setup`, without which nobody binds.
        let lost = unsafe { switch::enter(self.regs.frame.as_ptr()) } != 0;
        if lost {
            return Err(AxError::HardwareLost);
        }
        Ok(self.handle_exit())
    }

    fn bind(&mut self) -> AxResult {
        if self.guest.cpuid.is_none() {
            return Err(AxError::NotSetUp);
        }
        self.open_window()?;
        self.local.bound = true;
        Ok(())
    }

    fn unbind(&mut self) -> AxResult {
        if !self.local.bound {
            return Err(AxError::NotBound);
        }
        self.local.bound = false;
        self.close_window()
    }

    fn set_gpr(&mut self, reg: usize, val: usize) {
        self.regs.set_gpr(reg, val as u64);
    }
}

impl<H: X86Hal> SvmVCpu<H> {
    fn with_capabilities(config: X86CreateConfig, caps: Capabilities) -> AxResult<Self> {
        Ok(Self {
            guest: Framed::new(Guest::new(config.vcpu_id, caps)?)?,
            regs: SvmRegisters::new(&caps)?,
            local: Framed::new(Local {
                identity: IDENTITIES.fetch_add(1, Ordering::Relaxed).wrapping_add(1),
                entry: 0,
                root: HostPhysAddr::new(0),
                bound: false,
                cpu: 0,
                asid: Assignment::default(),
                host: HostState::default(),
                before: HardwareState::default(),
                hidden_efer: 0,
                injected: None,
                iret: Iret::No,
                pass_cr0: false,
                exit_kind: ExitKind::Other,
                injections: 0,
                tlb_flushes: 0,
            })?,
        })
    }

    /// Fills the control area.
    fn write_controls(&mut self, rdtscp: bool, invpcid: bool) {
        let caps = self.guest.caps;
        let maps = H::maps();
        let vmcb = &mut self.regs.vmcb;
        vmcb.set_intercept_cr(CR4_WRITE);
        // DR0 to DR3 are loaded when the guest first touches a debug register.
        vmcb.set_intercept_dr(u32::MAX);
        vmcb.set_intercept_exceptions(EXCEPTIONS);
        vmcb.set_intercept1(INTERCEPT1 | if caps.pause_filter { intercept1::PAUSE } else { 0 });
        if caps.pause_filter {
            vmcb.set_pause_filter_count(PAUSE_COUNT);
        }
        if caps.pause_threshold {
            vmcb.set_pause_filter_threshold(PAUSE_THRESHOLD);
        }
        // What the guest's CPUID lacks does not exist for it.
        vmcb.set_intercept2(INTERCEPT2 | if rdtscp { 0 } else { intercept2::RDTSCP });
        vmcb.set_intercept3(INTERCEPT3 | if invpcid { 0 } else { intercept3::INVPCID });
        vmcb.set_iopm_base(maps.io().as_u64());
        vmcb.set_msrpm_base(maps.msr().as_u64());
        vmcb.set_tsc_offset(self.guest.tsc_offset);
        vmcb.set_int_control(int_control::MASKING);
        vmcb.set_nested_control(NP_ENABLE);
        vmcb.set_nested_cr3(self.local.root.as_u64());
    }

    /// Registers as after reset or INIT, about to execute at `code_base + rip` in real mode.
    fn reset(&mut self, code_base: u64, selector: u16, rip: u64) {
        let signature = self
            .guest
            .cpuid
            .as_ref()
            .map_or(0, |table| table.entries().find(|entry| entry.function == 1).map_or(0, |entry| entry.eax));
        self.regs.reset(code_base, selector, rip, signature);
        self.guest.breakpoints = [0; 4];
        self.local.iret = Iret::No;
    }

    /// INIT: the boot processor starts at the reset vector, the others wait for a start-up IPI.
    fn init(&mut self) {
        self.reset(0xffff_0000, 0xf000, 0xfff0);
        let boot_processor = self.guest.vcpu_id == 0;
        self.guest.events.reset(if boot_processor { Activity::Running } else { Activity::WaitForSipi });
        self.guest.set_cr8(0);
        self.guest.pending = crate::state::Pending::None;
    }

    /// Chooses what the next entry injects and which exits it asks for, and an ASID.
    fn prepare_entry(&mut self) {
        let situation = self.guest.situation(&self.regs);
        let apic = self.guest.apic_vector();
        let accepts_pic = self.guest.accepts_pic_interrupt();
        let plan = self.guest.events.plan(situation, apic, accepts_pic);
        if plan.acknowledge {
            if let Some(lapic) = &mut self.guest.lapic {
                lapic.acknowledge();
            }
        }
        let blocked_by_tpr = self
            .guest
            .lapic
            .as_ref()
            .is_some_and(|lapic| lapic.highest_request().is_some() && lapic.pending_vector().is_none());
        let cr8 = self.guest.cr8();
        if self.guest.events.nmi_pending() {
            self.arm_iret_step();
        }
        let masked = self.guest.events.nmi_masked();
        let vmcb = &mut *self.regs.vmcb;
        if let Some(address) = plan.address {
            vmcb.set_cr2(address);
        }
        vmcb.set_event_injection(plan.inject.map_or(0, exit::encode_event));
        if plan.inject.is_some_and(Injection::is_fault) {
            let flags = vmcb.rflags();
            vmcb.set_rflags(flags | rflags::RF);
        }
        if plan.inject == Some(Injection::DEBUG) {
            // Delivering #DB clears DR7.GD (APM vol. 2 section 13.1.1.4); an injected one does not do it by itself.
            vmcb.set_dr7(vmcb.dr7() & !(1 << 13));
        }
        // Injected software interrupts return to the next RIP where the CPU saves it, to RIP otherwise; RIP is behind already.
        vmcb.set_next_rip(vmcb.rip());
        let mut control = int_control::MASKING | u32::from(cr8);
        let mut intercepts = vmcb.intercept1() & !(intercept1::VINTR | intercept1::IRET) | intercept1::CR0_SELECTIVE;
        if core::mem::take(&mut self.local.pass_cr0) {
            intercepts &= !intercept1::CR0_SELECTIVE;
        }
        if plan.interrupt_window || (plan.nmi_window && !masked) {
            // A virtual interrupt of the highest priority, intercepted before it is delivered. It also ends an interrupt
            // shadow, or the start of a handler, that an NMI waits for.
            control |= int_control::IRQ | int_control::PRIORITY_MAX | int_control::IGNORE_TPR;
            intercepts |= intercept1::VINTR;
        }
        if masked && self.local.iret == Iret::No {
            intercepts |= intercept1::IRET;
        }
        vmcb.set_int_control(control);
        vmcb.set_intercept1(intercepts);
        // Also while the window's interrupt waits: it needs no look at the TPR, and QEMU's emulated CPU (10.0) aborts at
        // a write of CR8 then.
        let follow_tpr = blocked_by_tpr || control & int_control::IRQ != 0;
        vmcb.set_intercept_cr(CR4_WRITE | if follow_tpr { CR8_WRITE } else { 0 });
        // Nothing is cached from the VMCB: it is the CPU's own memory traffic against a list of what has changed.
        vmcb.set_clean(0);
        if plan.inject.is_some() {
            self.local.injections = self.local.injections.wrapping_add(1);
        }
        self.local.injected = plan.inject;
        self.choose_asid();
        self.local.before = self.regs.vmcb.hardware_state();
        self.hide_long_mode_enable();
    }

    /// Keeps EFER.LME from the hardware while it means nothing: without paging, and without PAE, which paging would need. The
    /// guest cannot change any of the three without an exit, so the bit is there again when it matters.
    ///
    /// QEMU's emulated CPU (10.0) loads the host's CR0 at an exit while it still has the guest's EFER and CR4; with LME and
    /// without PAE it then drops CR0.PG, and with it the host.
    fn hide_long_mode_enable(&mut self) {
        let vmcb = &mut self.regs.vmcb;
        let value = vmcb.efer();
        let hide = value & efer::LME != 0 && vmcb.cr0() & cr0::PG == 0 && vmcb.cr4() & cr4::PAE == 0;
        self.local.hidden_efer = if hide { efer::LME } else { 0 };
        vmcb.set_efer(value & !self.local.hidden_efer);
    }

    fn choose_asid(&mut self) {
        // SAFETY: The vCPU is bound: preemption is off, so the record is this CPU's and nobody else uses it meanwhile.
        let per_cpu = unsafe { H::per_cpu().as_mut() };
        let flush = core::mem::take(&mut self.regs.flush);
        let local = &mut *self.local;
        let old = local.asid;
        let entry = per_cpu.asids.enter(local.cpu, &mut local.asid, flush, self.guest.caps.flush_by_asid);
        if entry.flushes() || local.asid != old {
            local.tlb_flushes = local.tlb_flushes.wrapping_add(1);
        }
        self.regs.vmcb.set_asid(entry.asid);
        self.regs.vmcb.set_tlb_control(entry.tlb_control);
    }

    /// An NMI waits, and the IRET of the one in service is about to be executed: step over it.
    fn arm_iret_step(&mut self) {
        if let Iret::Due { rip } = self.local.iret {
            let flags = self.regs.rflags();
            self.local.iret = Iret::Stepped { rip, trap: flags & rflags::TF != 0 };
            self.regs.set_rflags(flags | rflags::TF);
        }
    }

    /// After an exit: has the IRET been executed? Then NMIs are unmasked. True if the exit is the #DB of the step.
    fn follow_iret(&mut self, debug_exit: bool) -> bool {
        let (rip, stepped) = match self.local.iret {
            Iret::No => return false,
            Iret::Due { rip } => (rip, None),
            Iret::Stepped { rip, trap } => (rip, Some(trap)),
        };
        let done = self.regs.rip() != rip || (debug_exit && stepped.is_some());
        if !done {
            if let Some(trap) = stepped {
                // Not executed yet: the flags are the guest's again until the next entry.
                if !trap {
                    self.regs.set_rflags(self.regs.rflags() & !rflags::TF);
                }
                self.local.iret = Iret::Due { rip };
            }
            return false;
        }
        self.local.iret = Iret::No;
        self.guest.events.unmask_nmi();
        // IRET has loaded the guest's own flags. If the guest was stepping itself, the trap is its own.
        let ours = debug_exit && stepped == Some(false) && self.regs.dr6() & crate::regs::DR6_BS != 0;
        if ours {
            self.regs.set_dr6(self.regs.dr6() & !crate::regs::DR6_BS);
        }
        ours
    }

    // --- Register sets ---

    /// General registers.
    pub fn general(&self) -> General {
        let mut general = General { rip: self.regs.rip(), rflags: self.regs.rflags(), ..General::default() };
        for (register, slot) in general.gpr.iter_mut().enumerate() {
            *slot = self.regs.gpr(register);
        }
        general
    }

    /// Sets general registers. What the last exit left open still gets its answer.
    ///
    /// # Errors
    /// [`AxError::InvalidRegister`].
    pub fn set_general(&mut self, general: &General) -> AxResult {
        let flags = self.guest.limits.check_general(general)?;
        if virtual_8086_in_long_mode(flags, self.regs.efer()) {
            return Err(AxError::InvalidRegister);
        }
        for (register, &value) in general.gpr.iter().enumerate() {
            self.regs.set_gpr(register, value);
        }
        self.regs.set_rip(general.rip);
        self.regs.set_rflags(flags);
        Ok(())
    }

    /// Segments.
    pub fn segments(&self) -> Segments {
        self.regs.segments()
    }

    /// Sets segments. The CPL becomes the DPL of SS.
    ///
    /// # Errors
    /// [`AxError::InvalidRegister`].
    pub fn set_segments(&mut self, segments: &Segments) -> AxResult {
        let zero = [segments.gdtr.reserved, segments.idtr.reserved] == [[0; 3]; 2];
        if !zero {
            return Err(AxError::InvalidInput);
        }
        self.guest.limits.check_segments(segments, self.regs.efer())?;
        self.regs.set_segments(segments);
        Ok(())
    }

    /// Control registers.
    pub fn control(&self) -> Control {
        Control {
            cr0: self.regs.cr0(),
            cr2: self.regs.vmcb.cr2(),
            cr3: self.regs.cr3(),
            cr4: self.regs.cr4(),
            cr8: self.guest.cr8().into(),
            efer: self.regs.efer(),
            xcr0: self.guest.xcr0,
            apic_base: self.guest.apic_base(),
        }
    }

    /// Sets control registers.
    ///
    /// # Errors
    /// [`AxError::InvalidRegister`].
    pub fn set_control(&mut self, control: &Control) -> AxResult {
        self.guest.limits.check_control(control, &self.regs.cs())?;
        if virtual_8086_in_long_mode(self.regs.rflags(), control.efer) {
            return Err(AxError::InvalidRegister);
        }
        // The last that can be refused.
        self.guest.restore_apic_base(control.apic_base)?;
        self.guest.set_cr8(control.cr8 as u8);
        self.guest.xcr0 = control.xcr0;
        let vmcb = &mut self.regs.vmcb;
        vmcb.set_cr0(control.cr0 | cr0::ET);
        vmcb.set_cr2(control.cr2);
        vmcb.set_cr3(control.cr3);
        vmcb.set_cr4(control.cr4);
        self.regs.set_efer(control.efer);
        self.regs.flush_tlb();
        Ok(())
    }

    /// Debug registers. Not while bound.
    pub fn debug(&self) -> Debug {
        Debug { dr: self.guest.breakpoints, dr6: self.regs.dr6(), dr7: self.regs.vmcb.dr7() }
    }

    /// Sets debug registers. Not while bound.
    ///
    /// # Errors
    /// [`AxError::InvalidRegister`].
    pub fn set_debug(&mut self, debug: &Debug) -> AxResult {
        let debug = check_debug(debug)?;
        self.guest.breakpoints = debug.dr;
        self.regs.set_dr6(debug.dr6);
        self.regs.vmcb.set_dr7(debug.dr7);
        Ok(())
    }

    /// An MSR.
    ///
    /// # Errors
    /// [`AxError::InvalidInput`] for one that the kernel does not keep, or that cannot be read.
    pub fn msr(&mut self, index: u32) -> AxResult<u64> {
        match self.guest.read_msr(&self.regs, index) {
            Access::Done(value) => Ok(value),
            Access::Fault | Access::User => Err(AxError::InvalidInput),
        }
    }

    /// Sets an MSR.
    ///
    /// # Errors
    /// [`AxError::InvalidInput`] for one that the kernel does not keep, [`AxError::InvalidRegister`] for a value that the guest
    /// could not write.
    pub fn set_msr(&mut self, index: u32, value: u64) -> AxResult {
        if Guest::<H>::is_command(index) {
            return Err(AxError::InvalidInput);
        }
        match self.guest.write_msr(&mut self.regs, index, value) {
            Access::Done(Written::Quiet | Written::Apic(Effect::None)) => Ok(()),
            // Not reached: the commands are refused above.
            Access::Done(_) => Ok(()),
            Access::Fault => Err(AxError::InvalidRegister),
            Access::User => Err(AxError::InvalidInput),
        }
    }

    /// Copies the XSAVE area out. Not while bound.
    ///
    /// # Errors
    /// [`AxError::InvalidInput`] for a buffer of another size than [`Capabilities::xsave_size`].
    pub fn xsave_to(&self, buffer: &mut [u8]) -> AxResult {
        self.guest.fpu.copy_to(buffer)
    }

    /// Replaces the XSAVE area. Not while bound.
    ///
    /// # Errors
    /// As [`xsave_to`](Self::xsave_to); [`AxError::InvalidRegister`] for contents that the CPU would refuse.
    pub fn xsave_from(&mut self, buffer: &[u8]) -> AxResult {
        self.guest.fpu.copy_from(buffer)
    }

    /// Events.
    pub fn events(&self) -> uapi::Events {
        self.guest.events.state(self.regs.shadow())
    }

    /// Sets events.
    ///
    /// # Errors
    /// [`AxError::InvalidInput`].
    pub fn set_events(&mut self, events: &uapi::Events) -> AxResult {
        self.guest.events.set_state(events, self.regs.cr0() & cr0::PE != 0)?;
        self.regs.set_shadow(events.flags & uapi::EVENTS_INTERRUPT_SHADOW != 0);
        self.local.iret = Iret::No;
        Ok(())
    }

    /// The local APIC's registers.
    ///
    /// # Errors
    /// [`AxError::Unsupported`] if it is not in the kernel.
    pub fn local_apic(&mut self) -> AxResult<LocalApic> {
        self.guest.with_lapic(|lapic, clock| lapic.state(clock)).ok_or(AxError::Unsupported)
    }

    /// Sets the local APIC's registers.
    ///
    /// # Errors
    /// [`AxError::Unsupported`] if it is not in the kernel, [`AxError::InvalidRegister`].
    pub fn set_local_apic(&mut self, state: &LocalApic) -> AxResult {
        self.guest.with_lapic(|lapic, clock| lapic.set_state(state, clock)).ok_or(AxError::Unsupported)?
    }

    // --- Running ---

    /// Queues an event.
    ///
    /// # Errors
    /// [`AxError::EventPending`], [`AxError::InvalidInput`].
    pub fn inject(&mut self, event: &axvcpu_uapi::vcpu::Event) -> AxResult {
        self.guest.events.inject(event, self.regs.cr0() & cr0::PE != 0)
    }

    /// Finishes what the last exit left open.
    pub fn complete(&mut self, reply: Reply) {
        self.guest.complete(&mut self.regs, reply);
    }

    /// Takes what was posted.
    pub fn prepare(&mut self, mailbox: &Mailbox) {
        let (init, sipi) = self.guest.collect(mailbox);
        if init {
            self.init();
        }
        if let Some(vector) = sipi.filter(|_| self.guest.events.activity() == Activity::WaitForSipi) {
            self.reset(u64::from(vector) << 12, u16::from(vector) << 8, 0);
            self.guest.events.set_activity(Activity::Running);
        }
        self.guest.update_activity(&self.regs);
    }

    /// Whether there is something to run for.
    pub fn runnable(&mut self, mailbox: &Mailbox) -> bool {
        mailbox.pending() || self.guest.msrs.interrupt_end.is_some() || self.guest.update_activity(&self.regs)
    }

    /// Has the guest's translations flushed before the next entry.
    pub fn flush_tlb(&mut self) {
        self.regs.flush_tlb();
    }

    /// The last exit's instruction, as far as the CPU has told it.
    pub fn insn_info(&self) -> InsnInfo {
        let caps = &self.guest.caps;
        let (bytes, len) = if caps.decode_assists { self.regs.vmcb.fetched() } else { ([0; 16], 0) };
        // At page faults the CPU does not save it.
        let next_rip = if exit::is_string_io(&self.regs.vmcb) { self.regs.vmcb.exit_info2() } else { 0 };
        InsnInfo { bytes, len, next_rip }
    }

    /// Whether an external interrupt that userspace injects now would be delivered at once.
    pub fn interrupt_window_open(&self) -> bool {
        self.guest.window_open(&self.regs)
    }

    /// Whether RFLAGS.IF is set.
    pub fn interrupts_enabled(&self) -> bool {
        self.regs.rflags() & rflags::IF != 0
    }

    /// Asks for an exit when the interrupt window opens.
    pub fn request_interrupt_window(&mut self, wanted: bool) {
        self.guest.events.request_window(wanted);
    }

    /// Whether the CPL is 3.
    pub fn user_mode(&self) -> bool {
        self.regs.cpl() == 3
    }

    /// APIC id.
    pub fn apic_id(&self) -> u32 {
        self.guest.apic_id()
    }

    /// What the host's timer is to do.
    pub fn timer_update(&mut self) -> TimerUpdate {
        self.guest.lapic.as_mut().map_or(TimerUpdate::Unchanged, Lapic::timer_update)
    }

    /// Whether [`clock_update`](Self::clock_update) has something.
    pub fn clock_due(&self) -> bool {
        self.guest.clock.is_due()
    }

    /// The next structure of the paravirtual clock to be written to guest memory.
    pub fn clock_update(&mut self, base: &TimeBase, wall_ns: impl FnOnce() -> u64) -> Option<ClockUpdate> {
        let offset = self.guest.tsc_offset;
        self.guest.clock.take_update(base, offset, wall_ns)
    }

    /// An access to the xAPIC page.
    ///
    /// # Errors
    /// [`AxError::Unsupported`] if the local APIC is not in the kernel, [`AxError::InvalidInput`] for an offset beyond the page.
    pub fn apic_access(&mut self, offset: u32, write: Option<u32>) -> AxResult<u32> {
        self.guest.apic_access(offset, write)
    }

    /// The interrupt command that the last access to the xAPIC page has left: destination, and the low half.
    pub fn take_ipi(&mut self) -> Option<(u64, u64)> {
        self.guest.take_ipi()
    }

    /// What kind the last exit was.
    pub fn exit_kind(&self) -> ExitKind {
        self.local.exit_kind
    }

    /// Events injected.
    pub fn injections(&self) -> u64 {
        self.local.injections
    }

    /// TLB flushes, fresh ASIDs included.
    pub fn tlb_flushes(&self) -> u64 {
        self.local.tlb_flushes
    }
}
