// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! [`ArmVCpu`]: a vCPU, as the module uses it.
//!
//! Where its registers are: in memory, but for the EL1, EL0 and SIMD registers of a vCPU that is *loaded*, which is from its
//! first entry after interrupts went off to [`leave`](ArmVCpu::leave). Register sets are read and set while it is not.
//!
//! What its exits come to is in `vcpu/exits.rs`.

mod exits;

use core::marker::PhantomData;
use core::ops::Deref;
use core::ptr::NonNull;

use axvcpu_uapi::arm64::{Fp, General, System, PSTATE_DAIF, PSTATE_EL0, PSTATE_EL1H, PSTATE_EL1T, PSTATE_MODE};
use axvcpu_uapi::vcpu::ExitKind;
use vcpu_core::{AxArchPerCpu, AxArchVCpu, AxError, AxResult, AxVCpuExitReason as Exit};
use vcpu_core::{GuestPhysAddr, HostPhysAddr};

use crate::caps::Capabilities;
use crate::cpu;
use crate::exception::{Environment, Exception};
use crate::frame::TrapFrame;
use crate::gic::{Gic, Interface};
use crate::hal::ArmHal;
use crate::history;
use crate::interrupts::{Interrupts, Mailbox, TimerUpdate};
use crate::switch;
use crate::window::{self, HostState, Setting};
use exits::Open;

pub use exits::Reply;

/// What [`AxArchVCpu::new`] needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ArmCreateConfig {
    /// The vCPU's number.
    pub vcpu_id: u32,
    /// The host's counter when the guest's is 0: the same for all vCPUs of a VM.
    pub counter_origin: u64,
}

/// What [`AxArchVCpu::setup`] needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ArmSetupConfig<G> {
    /// The VM's interrupt controller, if the vCPU takes part in it.
    pub gic: Option<G>,
}

/// The registers, in a frame of the host's.
#[repr(C)]
struct State {
    frame: TrapFrame,
    system: System,
    fp: Fp,
    interface: Interface,
    host: HostState,
}

const _: () = assert!(size_of::<State>() <= 4096, "the state is more than a frame");

/// What the backend keeps for each physical CPU: nothing, since all that the hardware needs is switched with each window.
pub struct ArmPerCpu;

impl ArmPerCpu {
    /// The CPU goes offline, or the module goes.
    pub fn retire(&mut self) {}
}

impl AxArchPerCpu for ArmPerCpu {
    fn new(_cpu_id: usize) -> AxResult<Self> {
        history::cpu_comes();
        Ok(Self)
    }

    /// EL2 is where the host is.
    fn is_enabled(&self) -> bool {
        true
    }

    fn hardware_enable(&mut self) -> AxResult {
        Ok(())
    }

    fn hardware_disable(&mut self) -> AxResult {
        Ok(())
    }
}

/// A vCPU.
///
/// # Invariants
/// `state` points to a frame that came from `H::alloc_frames(0)`, holds a [`State`], and is this object's alone.
pub struct ArmVCpu<H: ArmHal, G> {
    state: NonNull<State>,
    phys: HostPhysAddr,
    caps: Capabilities,
    setting: Setting,
    entry: u64,
    /// Between the first entry of a stretch with interrupts off and `leave`.
    loaded: bool,
    /// Translations went away.
    flush: bool,
    /// An exception that the guest takes before it goes on.
    exception: Option<Exception>,
    open: Open,
    /// The vCPU's part in its VM's interrupt controller, if there is one.
    interrupts: Option<Interrupts<G>>,
    vcpu_id: u32,
    /// The address of the instruction that the last exit was about.
    at: u64,
    kind: ExitKind,
    injections: u64,
    tlb_flushes: u64,
    hal: PhantomData<fn() -> H>,
}

// SAFETY: The state is this object's alone.
unsafe impl<H: ArmHal, G: Send> Send for ArmVCpu<H, G> {}
// SAFETY: Shared references only read.
unsafe impl<H: ArmHal, G: Sync> Sync for ArmVCpu<H, G> {}

/// Bits of the processor state that can be set: NZCV, DIT, UAO, PAN, SS, IL, SSBS, BTYPE, DAIF and the mode.
const PSTATE_KNOWN: u64 =
    0xf << 28 | 1 << 24 | 1 << 23 | 1 << 22 | 3 << 20 | 1 << 12 | 3 << 10 | PSTATE_DAIF | PSTATE_MODE;

/// SCTLR_EL1 at reset: the bits that were always 1 (Arm ARM D24.2.118; Linux: `INIT_SCTLR_EL1_MMU_OFF`), MMU and caches off.
const SCTLR_RESET: u64 = 0x30d0_0800;

impl<H: ArmHal, G: Deref<Target = Gic<H>>> ArmVCpu<H, G> {
    fn state(&self) -> &State {
        // SAFETY: The type invariant; the borrow is as long as that of `self`.
        unsafe { self.state.as_ref() }
    }

    fn state_mut(&mut self) -> &mut State {
        // SAFETY: As above.
        unsafe { self.state.as_mut() }
    }

    /// General registers. May be asked at any time. Of the processor state they have what can be set: the CPU adds bits of
    /// features that the guest does not have (TCO at every exception, with FEAT_MTE).
    pub fn general(&self) -> General {
        let general = self.state().frame.general;
        General { pstate: general.pstate & PSTATE_KNOWN, ..general }
    }

    /// General registers as the CPU left them, and the processor state as [`general`](Self::general) has it.
    #[inline]
    pub fn general_as_left(&self) -> (&General, u64) {
        let general = &self.state().frame.general;
        (general, general.pstate & PSTATE_KNOWN)
    }

    /// Sets general registers.
    ///
    /// # Errors
    /// [`AxError::InvalidRegister`] for a processor state that is not one of AArch64 at EL0 or EL1.
    pub fn set_general(&mut self, general: &General) -> AxResult {
        let mode = general.pstate & PSTATE_MODE;
        if general.pstate & !PSTATE_KNOWN != 0 || !matches!(mode, PSTATE_EL0 | PSTATE_EL1T | PSTATE_EL1H) {
            return Err(AxError::InvalidRegister);
        }
        self.state_mut().frame.general = *general;
        // WFI may end at any time.
        if let Some(interrupts) = &mut self.interrupts {
            interrupts.end_wait();
        }
        Ok(())
    }

    /// EL1's system registers.
    pub fn system(&self) -> System {
        self.state().system
    }

    /// Sets EL1's system registers.
    ///
    /// # Errors
    /// [`AxError::InvalidRegister`] for another MPIDR_EL1, a timer control with unknown bits, or a reserved field that is not 0.
    pub fn set_system(&mut self, system: &System) -> AxResult {
        if system.mpidr_el1 != self.state().system.mpidr_el1 || system.cntv_ctl_el0 & !3 != 0 || system.reserved != 0 {
            return Err(AxError::InvalidRegister);
        }
        self.state_mut().system = *system;
        Ok(())
    }

    /// SIMD and floating-point registers.
    pub fn fp(&self) -> &Fp {
        &self.state().fp
    }

    /// Sets the SIMD and floating-point registers.
    ///
    /// # Errors
    /// [`AxError::InvalidRegister`] for bits beyond 31:0 in FPSR or FPCR.
    pub fn set_fp(&mut self, fp: &Fp) -> AxResult {
        if (fp.fpsr | fp.fpcr) >> 32 != 0 {
            return Err(AxError::InvalidRegister);
        }
        self.state_mut().fp = *fp;
        Ok(())
    }

    /// ESR_EL2 and FAR_EL2 of the last exit.
    pub fn syndrome(&self) -> (u64, u64) {
        let frame = &self.state().frame;
        (frame.esr, frame.far)
    }

    /// Has the guest's TLB entries dropped before the next entry.
    pub fn flush_tlb(&mut self) {
        self.flush = true;
    }

    /// Takes the guest's state off the CPU, if it is there. Interrupts are still off.
    ///
    /// # Errors
    /// None.
    pub fn leave(&mut self) -> AxResult {
        if self.loaded {
            self.loaded = false;
            // SAFETY: The type invariant.
            let State { system, fp, interface, host, .. } = unsafe { self.state.as_mut() };
            // SAFETY: `load` was called on this CPU, as interrupts have been off since.
            unsafe {
                if let Some(interrupts) = &mut self.interrupts {
                    interrupts.leave(interface);
                }
                window::leave(&self.caps, system, fp, host);
            }
            if let Some(interrupts) = &mut self.interrupts {
                interrupts.release_timer();
            }
        }
        Ok(())
    }

    /// The kind of the last exit, for the counters.
    pub fn exit_kind(&self) -> ExitKind {
        self.kind
    }

    /// Exceptions injected.
    pub fn injections(&self) -> u64 {
        self.injections
    }

    /// TLB flushes.
    pub fn tlb_flushes(&self) -> u64 {
        self.tlb_flushes
    }

    /// Takes what was posted to the vCPU, and tells whether there is something to run for. Without an interrupt controller in
    /// the kernel there always is, as a guest that waits is userspace's affair.
    pub fn prepare(&mut self, mailbox: &Mailbox) -> bool {
        let now = self.counter();
        let Some(interrupts) = &mut self.interrupts else { return true };
        // SAFETY: The type invariant.
        let State { system, interface, .. } = unsafe { self.state.as_ref() };
        interrupts.prepare(mailbox, interface, || window::timer_of(system).is_due(now))
    }

    /// Whether the guest executes instructions, as far as that is known without [`prepare`](Self::prepare): not if it may wait in
    /// the kernel.
    pub fn is_executing(&self) -> bool {
        self.interrupts.is_none()
    }

    /// Whether something that the kernel knows of can end the wait of a guest that waits in the kernel: WFI ends with an
    /// interrupt that is masked, too.
    pub fn interrupts_enabled(&self) -> bool {
        self.interrupts.is_some()
    }

    /// An interrupt window is nothing that userspace can ask for here.
    pub fn request_interrupt_window(&mut self, _wanted: bool) {}

    /// What the host timer must do.
    pub fn timer_update(&mut self) -> TimerUpdate {
        let now = self.counter();
        let Some(interrupts) = &mut self.interrupts else { return TimerUpdate::Unchanged };
        // SAFETY: The type invariant.
        let State { system, host, .. } = unsafe { self.state.as_ref() };
        // SAFETY: The guest is loaded.
        let timer = if self.loaded { unsafe { window::timer_loaded(host) } } else { window::timer_of(system) };
        interrupts.timer_update::<H>(timer, now, window::counter_hertz())
    }

    /// Where the guest's counter stands.
    fn counter(&self) -> u64 {
        window::counter().wrapping_sub(self.setting.counter_origin)
    }

    /// Tells others of this vCPU's interrupts, if there is anything: by `end` the SPIs that have ended, which sets their lines anew.
    /// Returns the vCPUs that must look at their interrupts then, as bits.
    #[inline]
    pub fn tell(&mut self, end: impl FnMut(u8)) -> u64 {
        let Some(interrupts) = self.interrupts.as_mut().filter(|interrupts| interrupts.has_notices()) else { return 0 };
        // SAFETY: The type invariant.
        interrupts.tell(unsafe { &mut self.state.as_mut().interface }, end)
    }

    /// Whether nobody else must be told of the last exit, if it was [`Nothing`](Exit::Nothing): neither other vCPUs nor the scheduler.
    #[inline]
    pub fn concerns_nobody(&self) -> bool {
        self.kind != ExitKind::Pause && !self.interrupts.as_ref().is_some_and(Interrupts::has_notices)
    }

    /// Whether a clock in guest memory is to be written: there is none.
    pub fn clock_due(&self) -> bool {
        false
    }

    fn load(&mut self) {
        let (caps, setting) = (&self.caps, &self.setting);
        // SAFETY: The type invariant.
        let State { frame, system, fp, interface, host } = unsafe { self.state.as_mut() };
        let due = window::timer_of(system).is_due(window::counter().wrapping_sub(setting.counter_origin));
        let held = self.interrupts.as_mut().is_some_and(|interrupts| interrupts.hold_timer(interface, due));
        // SAFETY: The module calls `run` at EL2 (or there would be no vCPU) with interrupts off and the FPU lent by `bind`.
        unsafe {
            window::load(caps, setting, system, fp, host, due && !held);
            if let Some(interrupts) = &mut self.interrupts {
                interrupts.load(interface, due);
            }
        }
        frame.branches = history::branches();
        frame.vectors = switch::vectors(frame.branches);
        frame.host_hcr = host.hcr;
        frame.host_vbar = host.vbar;
        self.loaded = true;
        self.flush = false;
        self.tlb_flushes = self.tlb_flushes.wrapping_add(1);
    }

    /// [`run`](AxArchVCpu::run), which puts the reason for which it came back into its place: it is too large to be handed on. The
    /// guest is not entered if the list registers have shown something that must be [told](Self::tell).
    ///
    /// # Errors
    /// None.
    #[inline]
    pub fn run_into(&mut self, exit: &mut Exit) -> AxResult {
        let mut filled = !self.loaded;
        if filled {
            self.load();
        }
        if core::mem::take(&mut self.flush) {
            // SAFETY: The guest is loaded.
            unsafe { cpu::flush_guest_tlb() };
            self.tlb_flushes = self.tlb_flushes.wrapping_add(1);
        }
        if let Some(exception) = self.exception.take() {
            self.inject(exception);
        }
        let origin = self.setting.counter_origin;
        if let Some(interrupts) = &mut self.interrupts {
            // SAFETY: The type invariant, and the guest is loaded.
            unsafe {
                let State { interface, host, .. } = self.state.as_mut();
                let now = || window::counter().wrapping_sub(origin);
                filled |= interrupts.refresh(interface, || window::timer_loaded(host).is_due(now()));
            }
            // Others must not wait for that until the guest leaves next.
            if filled && interrupts.has_notices() {
                (self.kind, *exit) = (ExitKind::HostInterrupt, Exit::Nothing);
                return Ok(());
            }
        }
        // SAFETY: The type invariant.
        let State { frame, host, .. } = unsafe { self.state.as_mut() };
        // SAFETY: The guest is loaded, so exceptions are masked and the frame has the host's values.
        unsafe {
            switch::enter(frame);
            window::restore_processor_state(&self.caps, host);
        }
        *exit = Exit::Nothing;
        self.handle(exit);
        Ok(())
    }

    /// Lets the guest take the exception that waits. It is loaded.
    fn inject(&mut self, exception: Exception) {
        let (pan, ssbs) = (self.caps.ids.pan(), self.caps.ids.ssbs());
        // SAFETY: The guest is loaded, so EL1's registers are its own.
        let environment = unsafe { Environment { vbar: cpu::VbarEl12.get(), sctlr: cpu::SctlrEl12.get(), pan, ssbs } };
        let taken = exception.take(&mut self.state_mut().frame.general, &environment);
        // SAFETY: As above.
        unsafe {
            cpu::ElrEl12.set(taken.elr);
            cpu::SpsrEl12.set(taken.spsr);
            cpu::EsrEl12.set(taken.esr);
            if let Some(far) = taken.far {
                cpu::FarEl12.set(far);
            }
        }
        self.injections = self.injections.wrapping_add(1);
    }
}

impl<H: ArmHal, G: Deref<Target = Gic<H>>> AxArchVCpu for ArmVCpu<H, G> {
    type CreateConfig = ArmCreateConfig;
    type SetupConfig = ArmSetupConfig<G>;

    fn new(config: ArmCreateConfig) -> AxResult<Self> {
        let caps = Capabilities::host()?;
        let phys = H::alloc_frames(0).ok_or(AxError::NoMemory)?;
        let state = NonNull::new(H::phys_to_virt(phys).cast::<State>()).ok_or(AxError::NoMemory)?;
        // INVARIANT: All zero, as frames come, is a `State`: integers and a `bool` only.
        let mut this = Self {
            state,
            phys,
            caps,
            setting: Setting { root: HostPhysAddr::new(0), counter_origin: config.counter_origin },
            entry: 0,
            loaded: false,
            flush: false,
            exception: None,
            open: Open::Nothing,
            interrupts: None,
            vcpu_id: config.vcpu_id,
            at: 0,
            kind: ExitKind::Other,
            injections: 0,
            tlb_flushes: 0,
            hal: PhantomData,
        };
        let system = &mut this.state_mut().system;
        system.sctlr_el1 = SCTLR_RESET;
        // Bit 31 is RES1; 16 vCPUs to a value of Aff1, as a GIC's SGI registers address them.
        let id = u64::from(config.vcpu_id);
        system.mpidr_el1 = 1 << 31 | (id >> 4 & 0xff) << 8 | id & 15;
        Ok(this)
    }

    fn set_entry(&mut self, entry: GuestPhysAddr) -> AxResult {
        if !entry.is_aligned(4) {
            return Err(AxError::InvalidInput);
        }
        self.entry = entry.as_u64();
        Ok(())
    }

    fn set_ept_root(&mut self, ept_root: HostPhysAddr) -> AxResult {
        self.setting.root = ept_root;
        Ok(())
    }

    fn setup(&mut self, config: ArmSetupConfig<G>) -> AxResult {
        if let Some(gic) = config.gic {
            let cpu = self.vcpu_id as usize;
            if cpu >= gic.cpus() {
                return Err(AxError::InvalidInput);
            }
            // SAFETY: There is a vCPU, so the host is at EL2 and has the registers.
            self.interrupts = Some(unsafe { Interrupts::new(gic, cpu, &mut self.state.as_mut().interface) });
            self.caps.ids.show_gic();
        }
        let entry = self.entry;
        let general = &mut self.state_mut().frame.general;
        general.pc = entry;
        general.pstate = PSTATE_EL1H | PSTATE_DAIF;
        Ok(())
    }

    #[inline]
    fn run(&mut self) -> AxResult<Exit> {
        let mut exit = Exit::Nothing;
        self.run_into(&mut exit)?;
        Ok(exit)
    }

    fn bind(&mut self) -> AxResult {
        H::fpu_begin();
        Ok(())
    }

    fn unbind(&mut self) -> AxResult {
        let left = self.leave();
        H::fpu_end();
        left
    }

    fn set_gpr(&mut self, reg: usize, val: usize) {
        self.state_mut().frame.set_register(reg, val as u64);
    }
}

impl<H: ArmHal, G> Drop for ArmVCpu<H, G> {
    fn drop(&mut self) {
        H::free_frames(self.phys, 0);
    }
}
