// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The AMD SVM backend (APM vol. 2 chapter 15), with nested paging.
//!
//! [`vmcb`] declares the control block, [`registers`] is what a vCPU keeps in it, [`permission`] the I/O and MSR maps, [`asid`]
//! the address space
//! identifiers, [`percpu`] what a CPU keeps, [`window`] the state switched at bind and unbind, [`switch`] the world switch, [`exit`]
//! what exits mean; this file is the entry into the guest.

mod asid;
mod exit;
mod percpu;
mod permission;
mod registers;
mod switch;
mod vmcb;
mod window;

use vcpu_core::npt::Npt;
use vcpu_core::{AxError, AxResult};

use crate::backend::{Backend, Exit, Frequent};
use crate::caps::Capabilities;
use crate::cpuid::Feature;
use crate::events::Plan;
use crate::frame::Framed;
use crate::hal::X86Hal;
use crate::regs::{cr0, cr4, efer, rflags, DR6_BS, DR6_VOLATILE};
use crate::state::{Guest, Registers};
use crate::vcpu::InsnInfo;

use asid::Assignment;
pub(crate) use percpu::SvmCpu;
pub use permission::PermissionMaps;
use registers::SvmRegisters;
pub(crate) use vmcb::Vmcb;
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

/// What a vCPU keeps besides its registers.
#[derive(Default)]
struct Local {
    /// The CPU it is bound to.
    cpu: usize,
    asid: Assignment,
    host: HostState,
    /// State before the entry, in case it is refused: if [`SvmRegisters::unchecked`].
    before: HardwareState,
    /// An ASID has been chosen in this window. Nobody else takes one meanwhile.
    has_asid: bool,
    /// Bits of EFER that the hardware was not shown at the last entry.
    hidden_efer: u64,
    iret: Iret,
    /// The next entry lets a write of CR0 pass: LMSW, which only the CPU can decode.
    pass_cr0: bool,
}

/// Following the IRET that ends an NMI's handler.
///
/// The intercept comes before the instruction, so when it has come, the guest must be stopped once more behind it if an NMI
/// waits: by a single step. (Should the IRET fault instead, its handler sees the step's TF in the flags that it returns to.)
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Iret {
    #[default]
    /// No NMI is in service, or its IRET has not come.
    No,
    /// The IRET at `rip` is about to be executed.
    Due { rip: u64 },
    /// It is executed in a single step. `trap` tells whether the guest has set TF itself.
    Stepped { rip: u64, trap: bool },
}

/// What AMD SVM is for a vCPU.
pub(crate) struct Svm<H: X86Hal> {
    regs: SvmRegisters<H>,
    local: Framed<Local, H>,
    maps: &'static PermissionMaps<H>,
}

impl<H: X86Hal> Backend<H> for Svm<H> {
    type Registers = SvmRegisters<H>;
    type Format = Npt;

    #[inline]
    fn regs(&self) -> &SvmRegisters<H> {
        &self.regs
    }

    #[inline]
    fn regs_mut(&mut self) -> &mut SvmRegisters<H> {
        &mut self.regs
    }

    fn setup(&mut self, guest: &Guest<H>) {
        self.write_controls(guest);
    }

    fn open(&mut self, guest: &mut Guest<H>) -> AxResult {
        self.open_window(guest)
    }

    fn close(&mut self, guest: &mut Guest<H>) -> AxResult {
        self.close_window(guest)
    }

    fn ready(&mut self, _guest: &mut Guest<H>) -> AxResult<Option<Exit>> {
        Ok(None)
    }

    fn prepare(&mut self, guest: &mut Guest<H>, plan: &Plan) -> AxResult<bool> {
        self.prepare_entry(guest, plan)
    }

    #[inline]
    fn enter(&mut self) -> AxResult {
        // SAFETY: The vCPU is bound, so `open_window` has set up this CPU and the frame, and by the trait's contract interrupts
        // are off and preemption has been since. The VMCB is complete since `setup`, without which nobody binds.
        if unsafe { switch::enter(self.regs.frame.as_ptr()) } != 0 {
            return Err(AxError::HardwareLost);
        }
        if self.regs.holds_the_host() {
            self.regs.forget_state();
            return Err(AxError::StateLost);
        }
        Ok(())
    }

    #[inline]
    fn frequent(&mut self, guest: &mut Guest<H>) -> Option<Frequent> {
        self.frequent_exit(guest)
    }

    #[inline]
    fn again(&mut self, _guest: &Guest<H>) -> AxResult {
        // What `prepare` had flushed is, and what it had injected has been delivered.
        self.regs.vmcb.set_tlb_control(asid::FLUSH_NOTHING);
        self.regs.vmcb.set_event_injection(0);
        Ok(())
    }

    fn decode(&mut self, guest: &mut Guest<H>, _plan: &Plan) -> AxResult {
        self.decode_exit(guest)
    }

    fn leave(&mut self, _guest: &mut Guest<H>) -> AxResult {
        Ok(())
    }

    fn forget(&mut self) {
        self.local.iret = Iret::No;
    }

    fn synchronize(&mut self) -> AxResult {
        Ok(())
    }

    fn insn_info(&self, guest: &Guest<H>) -> InsnInfo {
        let (bytes, len) = if guest.caps.decode_assists { self.regs.vmcb.fetched() } else { ([0; 16], 0) };
        // At page faults the CPU does not save it.
        let next_rip = if exit::is_string_io(&self.regs.vmcb) { self.regs.vmcb.exit_info2() } else { 0 };
        InsnInfo { bytes, len, next_rip }
    }
}

impl<H: X86Hal> Svm<H> {
    /// Makes it. May sleep.
    ///
    /// # Errors
    /// [`AxError::NoMemory`]; [`AxError::Unsupported`] where the module does not run on SVM.
    pub(crate) fn new(caps: &Capabilities) -> AxResult<Self> {
        let maps = H::svm_maps().ok_or(AxError::Unsupported)?;
        Ok(Self { regs: SvmRegisters::new(caps)?, local: Framed::new(Local::default())?, maps })
    }

    /// Fills the control area.
    fn write_controls(&mut self, guest: &Guest<H>) {
        let caps = guest.caps;
        let has = |feature| guest.cpuid.as_ref().is_some_and(|table| table.has(feature));
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
        vmcb.set_intercept2(INTERCEPT2 | if has(Feature::RDTSCP) { 0 } else { intercept2::RDTSCP });
        vmcb.set_intercept3(INTERCEPT3 | if has(Feature::INVPCID) { 0 } else { intercept3::INVPCID });
        vmcb.set_iopm_base(self.maps.io().as_u64());
        vmcb.set_msrpm_base(self.maps.msr().as_u64());
        vmcb.set_int_control(int_control::MASKING);
        vmcb.set_nested_control(NP_ENABLE);
        vmcb.set_nested_cr3(guest.root.as_u64());
    }

    /// Completes the control area: what is injected, which exits come, and the ASID. Whether it is good for entries to come.
    fn prepare_entry(&mut self, guest: &mut Guest<H>, plan: &Plan) -> AxResult<bool> {
        let apic = guest.apic_view();
        if guest.events.nmi_pending() {
            self.arm_iret_step();
        }
        let masked = guest.events.nmi_masked();
        let vmcb = &mut *self.regs.vmcb;
        vmcb.set_event_injection(plan.inject.map_or(0, exit::encode_event));
        // Injected software interrupts return to the next RIP where the CPU saves it, to RIP otherwise; RIP is behind already.
        vmcb.set_next_rip(vmcb.rip());
        let mut control = int_control::MASKING | u32::from(apic.cr8);
        let mut intercepts = vmcb.intercept1() & !(intercept1::VINTR | intercept1::IRET) | intercept1::CR0_SELECTIVE;
        let pass_cr0 = core::mem::take(&mut self.local.pass_cr0);
        if pass_cr0 {
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
        let follow_tpr = apic.blocked_by_priority || control & int_control::IRQ != 0;
        vmcb.set_intercept_cr(CR4_WRITE | if follow_tpr { CR8_WRITE } else { 0 });
        // Nothing is cached from the VMCB: it is the CPU's own memory traffic against a list of what has changed.
        vmcb.set_clean(0);
        self.choose_asid(guest)?;
        if self.regs.unchecked {
            self.local.before = self.regs.vmcb.hardware_state();
        }
        self.hide_long_mode_enable();
        Ok(!plan.has_wish() && !masked && !pass_cr0 && self.local.hidden_efer == 0)
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

    fn choose_asid(&mut self, guest: &mut Guest<H>) -> AxResult {
        let flush = core::mem::take(&mut self.regs.flush);
        if core::mem::replace(&mut self.local.has_asid, true) && !flush {
            self.regs.vmcb.set_tlb_control(asid::FLUSH_NOTHING);
            return Ok(());
        }
        // SAFETY: The vCPU is bound: preemption is off, so the record is this CPU's and nobody else uses it meanwhile.
        let svm = unsafe { H::per_cpu().as_mut() }.svm()?;
        let local = &mut *self.local;
        let old = local.asid;
        let entry = svm.asids.enter(local.cpu, &mut local.asid, flush, guest.caps.flush_by_asid);
        if entry.flushes() || local.asid != old {
            guest.tlb_flushes = guest.tlb_flushes.wrapping_add(1);
        }
        self.regs.vmcb.set_asid(entry.asid);
        self.regs.vmcb.set_tlb_control(entry.tlb_control);
        Ok(())
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
    fn follow_iret(&mut self, guest: &mut Guest<H>, debug_exit: bool) -> bool {
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
        guest.events.unmask_nmi();
        // IRET has loaded the guest's own flags. If the guest was stepping itself, the trap is its own.
        // Bochs' emulated CPU (3.0) intercepts #DB before it sets DR6: no cause at all is the step, too.
        let cause = self.regs.dr6() & DR6_VOLATILE;
        let ours = debug_exit && stepped == Some(false) && (cause & DR6_BS != 0 || cause == 0);
        if ours {
            self.regs.set_dr6(self.regs.dr6() & !DR6_BS);
        }
        ours
    }
}
