// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! [`X86VCpu`]: a vCPU of whichever backend the CPU has, as the module uses it. What it consists of is in `state.rs`, how it
//! runs in `exit.rs`; this file is the interface.

use axvcpu_uapi::vcpu::{Event, ExitKind};
use axvcpu_uapi::x86::{Control, CpuidEntry, Debug, Events, General, LocalApic, Segments, EVENTS_INTERRUPT_SHADOW};
use vcpu_core::{AxArchVCpu, AxError, AxResult, AxVCpuExitReason, GuestPhysAddr, HostPhysAddr};

use crate::apic::{Mailbox, TimerUpdate};
use crate::backend::Backend as _;
use crate::caps::{detect, Backend, Capabilities};
use crate::cpu;
use crate::cpuid::{self, CpuidTable};
use crate::events::Activity;
use crate::exit::Reply;
use crate::frame::Framed;
use crate::hal::X86Hal;
use crate::msr::Access;
use crate::pvclock::{ClockUpdate, TimeBase};
use crate::regs::{check_debug, cr0, rflags, virtual_8086_in_long_mode};
use crate::state::{Guest, Registers};
use crate::svm::Svm;
use crate::turn::{Once, Turns};
use crate::vmx::Vmx;

/// What [`AxArchVCpu::new`] needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct X86CreateConfig {
    /// The vCPU's number, its initial APIC id. 0 is the boot processor.
    pub vcpu_id: u32,
}

/// What [`AxArchVCpu::setup`] needs.
pub struct X86SetupConfig<H: X86Hal> {
    /// CPUID.
    pub cpuid: CpuidTable<H>,
    /// Emulate the local APIC.
    pub in_kernel_apic: bool,
    /// The host's TSC when the guest's is 0: the same for all vCPUs of a VM, so that their TSCs agree.
    pub tsc_origin: u64,
    /// [`Mailbox::descriptor`] of the vCPU's mailbox, which lives as long as the vCPU.
    pub posted: Option<HostPhysAddr>,
}

/// The instruction of an exit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InsnInfo {
    /// Its bytes, and bytes behind it.
    pub bytes: [u8; 16],
    /// How many are valid: 0 if the CPU gave none.
    pub len: u8,
    /// Where the next one starts; 0 if the CPU did not tell.
    pub next_rip: u64,
}

/// A vCPU. Small: what is big lives in frames.
pub struct X86VCpu<H: X86Hal> {
    guest: Framed<Guest<H>, H>,
    hardware: Hardware<H>,
}

/// The backend's part.
enum Hardware<H: X86Hal> {
    /// On AMD SVM.
    Svm(Svm<H>),
    /// On Intel VMX.
    Vmx(Vmx<H>),
}

macro_rules! on {
    ($hardware:expr, $hw:ident => $body:expr) => {
        match $hardware {
            Hardware::Svm($hw) => $body,
            Hardware::Vmx($hw) => $body,
        }
    };
}

impl<H: X86Hal> AxArchVCpu for X86VCpu<H> {
    type CreateConfig = X86CreateConfig;
    type SetupConfig = X86SetupConfig<H>;

    fn new(config: X86CreateConfig) -> AxResult<Self> {
        let backend = detect()?;
        let caps = Capabilities::host();
        Ok(Self {
            guest: Framed::new(Guest::new(config.vcpu_id, caps)?)?,
            hardware: match backend {
                Backend::Svm => Hardware::Svm(Svm::new(&caps)?),
                Backend::Vmx => Hardware::Vmx(Vmx::new()?),
            },
        })
    }

    fn set_entry(&mut self, entry: GuestPhysAddr) -> AxResult {
        if entry.as_u64() >> 32 != 0 {
            return Err(AxError::InvalidInput);
        }
        self.guest.entry = entry.as_u64();
        Ok(())
    }

    fn set_ept_root(&mut self, ept_root: HostPhysAddr) -> AxResult {
        if !ept_root.is_aligned(4096) || ept_root.as_u64() == 0 {
            return Err(AxError::InvalidInput);
        }
        self.guest.root = ept_root;
        Ok(())
    }

    fn setup(&mut self, config: X86SetupConfig<H>) -> AxResult {
        on!(&mut self.hardware, hw => self.guest.setup(hw, config))
    }

    #[inline]
    fn run(&mut self) -> AxResult<AxVCpuExitReason> {
        let mut exit = AxVCpuExitReason::Nothing;
        self.run_while(&mut exit, &mut Once)?;
        Ok(exit)
    }

    fn bind(&mut self) -> AxResult {
        if self.guest.cpuid.is_none() {
            return Err(AxError::NotSetUp);
        }
        on!(&mut self.hardware, hw => hw.open(&mut self.guest))?;
        self.guest.bound = true;
        Ok(())
    }

    fn unbind(&mut self) -> AxResult {
        if !self.guest.bound {
            return Err(AxError::NotBound);
        }
        self.guest.bound = false;
        on!(&mut self.hardware, hw => hw.close(&mut self.guest))
    }

    fn set_gpr(&mut self, reg: usize, val: usize) {
        on!(&mut self.hardware, hw => hw.regs_mut().set_gpr(reg, val as u64));
    }
}

/// What the module needs beyond the trait. Register sets are read and set while the vCPU is not bound, after
/// [`synchronize`](Self::synchronize) or an exit that says why in the run page; except for [`general`](Self::general), [`interrupt_window_open`](Self::interrupt_window_open), [`interrupts_enabled`](Self::interrupts_enabled)
/// and [`user_mode`](Self::user_mode), which can be asked any time.
impl<H: X86Hal> X86VCpu<H> {
    /// A mailbox for a vCPU on this CPU, on which [`detect`] has succeeded. May sleep.
    ///
    /// # Errors
    /// [`AxError::NoMemory`].
    pub fn new_mailbox() -> AxResult<Mailbox<H>> {
        if detect() == Ok(Backend::Vmx) && Vmx::<H>::takes_posted_interrupts_here() {
            Mailbox::with_descriptor()
        } else {
            Ok(Mailbox::new())
        }
    }

    // --- Register sets ---

    /// Makes [`segments`](Self::segments), [`control`](Self::control) and [`msr`](Self::msr) current, and their setters possible: a
    /// backend may have left in the CPU's control block what nobody has asked for. Nothing if there is nothing.
    ///
    /// # Errors
    /// [`AxError::HardwareLost`].
    pub fn synchronize(&mut self) -> AxResult {
        on!(&mut self.hardware, hw => hw.synchronize())
    }

    /// General registers.
    #[inline]
    pub fn general(&self) -> General {
        let mut gpr = [0; 16];
        let (rip, rflags) = self.each_gpr(|register, value| {
            if let Some(slot) = gpr.get_mut(register) {
                *slot = value;
            }
        });
        General { gpr, rip, rflags }
    }

    /// Shows all general registers to `show`, some of them twice, of which the second time counts. Gives RIP and RFLAGS.
    #[inline]
    pub fn each_gpr(&self, show: impl FnMut(usize, u64)) -> (u64, u64) {
        on!(&self.hardware, hw => {
            let regs = hw.regs();
            regs.each_gpr(show);
            (regs.rip(), regs.rflags())
        })
    }

    /// Sets general registers. What the last exit left open still gets its answer by [`complete`](Self::complete).
    ///
    /// # Errors
    /// [`AxError::InvalidRegister`], with nothing changed; as for all sets.
    pub fn set_general(&mut self, general: &General) -> AxResult {
        let flags = self.guest.limits.check_general(general)?;
        on!(&mut self.hardware, hw => {
            let regs = hw.regs_mut();
            if virtual_8086_in_long_mode(flags, regs.efer()) {
                return Err(AxError::InvalidRegister);
            }
            for (register, &value) in general.gpr.iter().enumerate() {
                regs.set_gpr(register, value);
            }
            regs.set_rip(general.rip);
            regs.set_rflags(flags);
        });
        Ok(())
    }

    /// Segments.
    pub fn segments(&self) -> Segments {
        on!(&self.hardware, hw => hw.regs().segments())
    }

    /// Sets segments. The CPL becomes the DPL of SS.
    ///
    /// # Errors
    /// [`AxError::InvalidRegister`]; [`AxError::InvalidInput`] for reserved fields that are not zero.
    pub fn set_segments(&mut self, segments: &Segments) -> AxResult {
        if [segments.gdtr.reserved, segments.idtr.reserved] != [[0; 3]; 2] {
            return Err(AxError::InvalidInput);
        }
        on!(&mut self.hardware, hw => {
            let regs = hw.regs_mut();
            self.guest.limits.check_segments(segments, regs.efer())?;
            regs.set_segments(segments);
        });
        Ok(())
    }

    /// Control registers.
    pub fn control(&self) -> Control {
        on!(&self.hardware, hw => {
            let regs = hw.regs();
            Control {
                cr0: regs.cr0(),
                cr2: regs.cr2(),
                cr3: regs.cr3(),
                cr4: regs.cr4(),
                cr8: self.guest.cr8().into(),
                efer: regs.efer(),
                xcr0: self.guest.xcr0,
                apic_base: self.guest.apic_base(),
            }
        })
    }

    /// Sets control registers.
    ///
    /// # Errors
    /// [`AxError::InvalidRegister`].
    pub fn set_control(&mut self, control: &Control) -> AxResult {
        let guest = &mut *self.guest;
        on!(&mut self.hardware, hw => {
            let regs = hw.regs_mut();
            guest.limits.check_control(control, regs.code())?;
            if virtual_8086_in_long_mode(regs.rflags(), control.efer) {
                return Err(AxError::InvalidRegister);
            }
            // The last that can be refused.
            guest.restore_apic_base(control.apic_base)?;
            guest.set_cr8(control.cr8 as u8);
            guest.xcr0 = control.xcr0;
            regs.set_cr0(control.cr0 | cr0::ET);
            regs.set_cr2(control.cr2);
            regs.set_cr3(control.cr3);
            regs.set_cr4(control.cr4);
            regs.set_efer(control.efer);
            regs.flush_tlb();
        });
        Ok(())
    }

    /// Debug registers.
    pub fn debug(&self) -> Debug {
        let (dr6, dr7) = on!(&self.hardware, hw => (hw.regs().dr6(), hw.regs().dr7()));
        Debug { dr: self.guest.debug.get(), dr6, dr7 }
    }

    /// Sets debug registers.
    ///
    /// # Errors
    /// [`AxError::InvalidRegister`].
    pub fn set_debug(&mut self, debug: &Debug) -> AxResult {
        let debug = check_debug(debug)?;
        self.guest.debug.set(debug.dr);
        on!(&mut self.hardware, hw => {
            hw.regs_mut().set_dr6(debug.dr6);
            hw.regs_mut().set_dr7(debug.dr7);
        });
        Ok(())
    }

    /// An MSR.
    ///
    /// # Errors
    /// [`AxError::InvalidInput`] for one that the kernel does not keep, or that cannot be read.
    pub fn msr(&mut self, index: u32) -> AxResult<u64> {
        match on!(&mut self.hardware, hw => self.guest.read_msr(hw.regs(), index)) {
            Access::Done(value) => Ok(value),
            Access::Fault | Access::User => Err(AxError::InvalidInput),
        }
    }

    /// Sets an MSR, under the rules that hold for the guest.
    ///
    /// # Errors
    /// [`AxError::InvalidInput`] for one that the kernel does not keep, [`AxError::InvalidRegister`] for a value that the guest
    /// could not write.
    pub fn set_msr(&mut self, index: u32, value: u64) -> AxResult {
        if Guest::<H>::is_command(index) {
            return Err(AxError::InvalidInput);
        }
        match on!(&mut self.hardware, hw => self.guest.write_msr(hw.regs_mut(), index, value)) {
            // What writes set off beyond the register are commands, refused above.
            Access::Done(_) => Ok(()),
            Access::Fault => Err(AxError::InvalidRegister),
            Access::User => Err(AxError::InvalidInput),
        }
    }

    /// Copies the XSAVE area out: [`Capabilities::xsave_size`] bytes.
    ///
    /// # Errors
    /// [`AxError::InvalidInput`] for a buffer of another size.
    pub fn xsave_to(&self, buffer: &mut [u8]) -> AxResult {
        self.guest.fpu.copy_to(buffer)
    }

    /// Replaces the XSAVE area.
    ///
    /// # Errors
    /// As [`xsave_to`](Self::xsave_to), and [`AxError::InvalidRegister`] for contents that the CPU would refuse.
    pub fn xsave_from(&mut self, buffer: &[u8]) -> AxResult {
        self.guest.fpu.copy_from(buffer)
    }

    /// Size of the XSAVE area, in bytes.
    pub fn xsave_size(&self) -> u32 {
        self.guest.caps.xsave_size
    }

    /// Events and activity.
    pub fn events(&self) -> Events {
        self.guest.events.state(on!(&self.hardware, hw => hw.regs().shadow()))
    }

    /// Sets events and activity.
    ///
    /// # Errors
    /// [`AxError::InvalidInput`].
    pub fn set_events(&mut self, events: &Events) -> AxResult {
        on!(&mut self.hardware, hw => {
            self.guest.events.set_state(events, hw.regs().cr0() & cr0::PE != 0)?;
            hw.regs_mut().set_shadow(events.flags & EVENTS_INTERRUPT_SHADOW != 0);
            hw.forget();
        });
        Ok(())
    }

    /// The local APIC's registers.
    ///
    /// # Errors
    /// [`AxError::Unsupported`] if it is not emulated here.
    pub fn local_apic(&mut self) -> AxResult<LocalApic> {
        self.guest.with_lapic(|lapic, clock| lapic.state(clock)).ok_or(AxError::Unsupported)
    }

    /// Sets the local APIC's registers.
    ///
    /// # Errors
    /// As [`local_apic`](Self::local_apic), and [`AxError::InvalidRegister`].
    pub fn set_local_apic(&mut self, state: &LocalApic) -> AxResult {
        self.guest.with_lapic(|lapic, clock| lapic.set_state(state, clock)).ok_or(AxError::Unsupported)?
    }

    // --- Running ---

    /// Queues an event for the guest.
    ///
    /// # Errors
    /// [`AxError::EventPending`] if one of that kind waits, [`AxError::InvalidInput`] for one that does not exist.
    pub fn inject(&mut self, event: &Event) -> AxResult {
        let protected_mode = on!(&self.hardware, hw => hw.regs().cr0()) & cr0::PE != 0;
        self.guest.events.inject(event, protected_mode)
    }

    /// Finishes what the last exit left open; nothing if it left nothing.
    pub fn complete(&mut self, reply: Reply) {
        on!(&mut self.hardware, hw => self.guest.complete(hw.regs_mut(), reply));
    }

    /// Takes what was posted to the vCPU, and publishes who it is. Tells whether there is something to run for: false for a vCPU that
    /// is halted or waits for a start-up IPI, with nothing to change that. To be called right before [`run`](AxArchVCpu::run),
    /// with interrupts off, so that nothing posted earlier is missed.
    #[inline(always)] // Mostly it finds nothing to do.
    pub fn prepare(&mut self, mailbox: &Mailbox<H>) -> bool {
        on!(&mut self.hardware, hw => self.guest.prepare(hw, mailbox))
    }

    /// Whether the guest executes instructions: it is not halted, and does not wait for a start-up IPI.
    #[inline]
    pub fn is_executing(&self) -> bool {
        self.guest.events.activity() == Activity::Running
    }

    /// As [`run`](AxArchVCpu::run), and again as long as the exit is one that is over here, or by what `turns` has done about it, has
    /// changed nothing that anybody else looks at (who the local APIC is, the guest's clock), and `turns` agrees. Why it came back is
    /// put into `exit`; if that is [`Nothing`](AxVCpuExitReason::Nothing), the exit was of [`exit_kind`](Self::exit_kind).
    ///
    /// # Errors
    /// As [`run`](AxArchVCpu::run).
    #[inline]
    pub fn run_while(&mut self, exit: &mut AxVCpuExitReason, turns: &mut impl Turns) -> AxResult {
        on!(&mut self.hardware, hw => self.guest.run_while(hw, exit, turns))
    }

    /// To be called before interrupts go on after [`run`](AxArchVCpu::run), on the same CPU: what a backend may have switched on
    /// only while they are off is switched off. Nothing if there is nothing. When `run` fails it does so by itself.
    ///
    /// # Errors
    /// [`AxError::HardwareLost`]: the CPU is as it was before, the vCPU may not be.
    #[inline]
    pub fn leave(&mut self) -> AxResult {
        on!(&mut self.hardware, hw => hw.leave(&mut self.guest))
    }

    /// Has everything flushed before the next entry that the CPU has cached of the guest's translations. To be called before the
    /// next entry if the nested page table has lost one.
    #[inline]
    pub fn flush_tlb(&mut self) {
        self.guest.store = None;
        on!(&mut self.hardware, hw => hw.regs_mut().flush_tlb());
    }

    /// The last exit's instruction, as far as the CPU has told it.
    pub fn insn_info(&self) -> InsnInfo {
        on!(&self.hardware, hw => hw.insn_info(&self.guest))
    }

    /// Whether an external interrupt that userspace injects now would be delivered at once.
    pub fn interrupt_window_open(&self) -> bool {
        on!(&self.hardware, hw => self.guest.window_open(hw.regs()))
    }

    /// Whether the guest has interrupts enabled (RFLAGS.IF).
    pub fn interrupts_enabled(&self) -> bool {
        on!(&self.hardware, hw => hw.regs().rflags()) & rflags::IF != 0
    }

    /// Asks for an exit [`InterruptWindow`](AxVCpuExitReason::InterruptWindow) whenever the window is open, until revoked.
    pub fn request_interrupt_window(&mut self, wanted: bool) {
        self.guest.events.request_window(wanted);
    }

    /// Whether the guest's CPL is 3.
    pub fn user_mode(&self) -> bool {
        on!(&self.hardware, hw => hw.regs().cpl()) == 3
    }

    /// Whether the mailbox may [post to the hardware](Mailbox::post_to_hardware). Known when it is set up.
    pub fn takes_posted_interrupts(&self) -> bool {
        on!(&self.hardware, hw => hw.takes_posted_interrupts())
    }

    /// The vCPU's APIC id.
    pub fn apic_id(&self) -> u32 {
        self.guest.apic_id()
    }

    /// What the host's timer is to do for the local APIC's. Its expiry is posted to the mailbox. For a vCPU that has something to
    /// run for, it may be nothing, since the hardware ends the guest's turn in time.
    #[inline]
    pub fn timer_update(&mut self) -> TimerUpdate {
        on!(&self.hardware, hw => self.guest.timer_update(hw.watches_deadline()))
    }

    /// Whether [`clock_update`](Self::clock_update) has something: then the window is to be left, since the guest expects its
    /// clock when the write of the clock's MSR is over.
    #[inline]
    pub fn clock_due(&self) -> bool {
        self.guest.clock.is_due()
    }

    /// The next structure of the paravirtual clock that is to be written to guest memory; see
    /// [`PvClock::take_update`](crate::pvclock::PvClock::take_update).
    pub fn clock_update(&mut self, base: &TimeBase, wall_ns: impl FnOnce() -> u64) -> Option<ClockUpdate> {
        let offset = self.guest.tsc_offset;
        self.guest.clock.take_update(base, offset, wall_ns)
    }

    /// Carries out an access to the xAPIC page: a write of `write`, or a read. Afterwards look for
    /// [`take_ipi`](Self::take_ipi) and [`timer_update`](Self::timer_update); the end of a level-triggered interrupt comes as
    /// the exit of the next run.
    ///
    /// # Errors
    /// [`AxError::Unsupported`] if the local APIC is not emulated here, [`AxError::InvalidInput`] for an offset beyond the page.
    pub fn apic_access(&mut self, offset: u32, write: Option<u32>) -> AxResult<u32> {
        self.guest.apic_access(offset, write)
    }

    /// The interrupt command that an access to the xAPIC page has left: destination in the x2APIC format, and the low half.
    pub fn take_ipi(&mut self) -> Option<(u64, u64)> {
        self.guest.take_ipi()
    }

    /// What kind the last exit was, for statistics.
    #[inline]
    pub fn exit_kind(&self) -> ExitKind {
        self.guest.exit_kind
    }

    /// Events injected since the vCPU was made.
    pub fn injections(&self) -> u64 {
        self.guest.injections
    }

    /// TLB flushes asked of the CPU since the vCPU was made, fresh identifiers of translations included.
    pub fn tlb_flushes(&self) -> u64 {
        self.guest.tlb_flushes
    }
}

/// What the backend adds to the decision which CPUID bits a guest can have.
fn cpuid_caps(tsc_khz: u32) -> cpuid::Caps {
    let caps = Capabilities::host();
    cpuid::Caps { xcr0: caps.xcr0, phys_bits: caps.guest_phys_bits, tsc_khz, speculation_control: caps.spec_ctrl }
}

fn host_cpuid(leaf: u32, index: u32) -> cpuid::CpuidResult {
    let cpu::Cpuid { eax, ebx, ecx, edx } = cpu::cpuid(leaf, index);
    cpuid::CpuidResult { eax, ebx, ecx, edx }
}

/// The CPUID entries that a guest can have on this CPU, on which [`detect`] has succeeded: a template for one processor.
/// `tsc_khz` is the TSC's frequency.
pub fn supported_cpuid(tsc_khz: u32, mut write: impl FnMut(CpuidEntry)) {
    cpuid::supported(&host_cpuid, &cpuid_caps(tsc_khz), &mut write);
}

/// Loads the CPUID table of a vCPU from `count` entries, which `read` gives one by one.
///
/// # Errors
/// See [`CpuidTable::load`].
pub fn load_cpuid<H: X86Hal>(count: usize, read: impl FnMut(usize) -> AxResult<CpuidEntry>) -> AxResult<CpuidTable<H>> {
    CpuidTable::load(count, read, &host_cpuid, &cpuid_caps(H::tsc_khz()))
}
