// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! [`X86VCpu`]: a vCPU of whichever backend the CPU has, as the module uses it.

use axvcpu_uapi::vcpu::{Event, ExitKind};
use axvcpu_uapi::x86::{Control, CpuidEntry, Debug, Events, General, LocalApic, Segments};
use vcpu_core::{AxArchVCpu, AxResult, AxVCpuExitReason, GuestPhysAddr, HostPhysAddr};

use crate::apic::{Mailbox, TimerUpdate};
use crate::caps::{detect, Backend, Capabilities};
use crate::cpu;
use crate::cpuid::{self, CpuidTable};
use crate::hal::X86Hal;
use crate::pvclock::{ClockUpdate, TimeBase};
use crate::state::Reply;
use crate::svm::SvmVCpu;
use crate::vmx::VmxVCpu;

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
pub enum X86VCpu<H: X86Hal> {
    /// On AMD SVM.
    Svm(SvmVCpu<H>),
    /// On Intel VMX.
    Vmx(VmxVCpu<H>),
}

macro_rules! on {
    ($self:ident, $vcpu:ident => $body:expr) => {
        match $self {
            X86VCpu::Svm($vcpu) => $body,
            X86VCpu::Vmx($vcpu) => $body,
        }
    };
}

impl<H: X86Hal> AxArchVCpu for X86VCpu<H> {
    type CreateConfig = X86CreateConfig;
    type SetupConfig = X86SetupConfig<H>;

    fn new(config: X86CreateConfig) -> AxResult<Self> {
        match detect()? {
            Backend::Svm => SvmVCpu::new(config).map(Self::Svm),
            Backend::Vmx => VmxVCpu::new(config).map(Self::Vmx),
        }
    }

    fn set_entry(&mut self, entry: GuestPhysAddr) -> AxResult {
        on!(self, vcpu => vcpu.set_entry(entry))
    }

    fn set_ept_root(&mut self, ept_root: HostPhysAddr) -> AxResult {
        on!(self, vcpu => vcpu.set_ept_root(ept_root))
    }

    fn setup(&mut self, config: X86SetupConfig<H>) -> AxResult {
        on!(self, vcpu => vcpu.setup(config))
    }

    #[inline]
    fn run(&mut self) -> AxResult<AxVCpuExitReason> {
        on!(self, vcpu => vcpu.run())
    }

    fn bind(&mut self) -> AxResult {
        on!(self, vcpu => vcpu.bind())
    }

    fn unbind(&mut self) -> AxResult {
        on!(self, vcpu => vcpu.unbind())
    }

    fn set_gpr(&mut self, reg: usize, val: usize) {
        on!(self, vcpu => vcpu.set_gpr(reg, val));
    }
}

/// What the module needs beyond the trait. Register sets are read and set while the vCPU is not bound, except for
/// [`general`](Self::general), [`interrupt_window_open`](Self::interrupt_window_open), [`interrupts_enabled`](Self::interrupts_enabled)
/// and [`user_mode`](Self::user_mode), which can be asked any time.
impl<H: X86Hal> X86VCpu<H> {
    /// General registers.
    pub fn general(&self) -> General {
        on!(self, vcpu => vcpu.general())
    }

    /// Sets general registers. What the last exit left open still gets its answer by [`complete`](Self::complete).
    ///
    /// # Errors
    /// [`AxError::InvalidRegister`](vcpu_core::AxError::InvalidRegister), with nothing changed; as for all sets.
    pub fn set_general(&mut self, general: &General) -> AxResult {
        on!(self, vcpu => vcpu.set_general(general))
    }

    /// Segments.
    pub fn segments(&self) -> Segments {
        on!(self, vcpu => vcpu.segments())
    }

    /// Sets segments. The CPL becomes the DPL of SS.
    ///
    /// # Errors
    /// [`AxError::InvalidRegister`](vcpu_core::AxError::InvalidRegister).
    pub fn set_segments(&mut self, segments: &Segments) -> AxResult {
        on!(self, vcpu => vcpu.set_segments(segments))
    }

    /// Control registers.
    pub fn control(&self) -> Control {
        on!(self, vcpu => vcpu.control())
    }

    /// Sets control registers.
    ///
    /// # Errors
    /// [`AxError::InvalidRegister`](vcpu_core::AxError::InvalidRegister).
    pub fn set_control(&mut self, control: &Control) -> AxResult {
        on!(self, vcpu => vcpu.set_control(control))
    }

    /// Debug registers.
    pub fn debug(&self) -> Debug {
        on!(self, vcpu => vcpu.debug())
    }

    /// Sets debug registers.
    ///
    /// # Errors
    /// [`AxError::InvalidRegister`](vcpu_core::AxError::InvalidRegister).
    pub fn set_debug(&mut self, debug: &Debug) -> AxResult {
        on!(self, vcpu => vcpu.set_debug(debug))
    }

    /// An MSR.
    ///
    /// # Errors
    /// [`AxError::InvalidInput`](vcpu_core::AxError::InvalidInput) for one that the kernel does not keep.
    pub fn msr(&mut self, index: u32) -> AxResult<u64> {
        on!(self, vcpu => vcpu.msr(index))
    }

    /// Sets an MSR, under the rules that hold for the guest.
    ///
    /// # Errors
    /// [`AxError::InvalidInput`](vcpu_core::AxError::InvalidInput) for one that the kernel does not keep,
    /// [`AxError::InvalidRegister`](vcpu_core::AxError::InvalidRegister) for a bad value.
    pub fn set_msr(&mut self, index: u32, value: u64) -> AxResult {
        on!(self, vcpu => vcpu.set_msr(index, value))
    }

    /// Copies the XSAVE area out: [`Capabilities::xsave_size`](crate::Capabilities::xsave_size) bytes.
    ///
    /// # Errors
    /// [`AxError::InvalidInput`](vcpu_core::AxError::InvalidInput) for a buffer of another size.
    pub fn xsave_to(&self, buffer: &mut [u8]) -> AxResult {
        on!(self, vcpu => vcpu.xsave_to(buffer))
    }

    /// Replaces the XSAVE area.
    ///
    /// # Errors
    /// As [`xsave_to`](Self::xsave_to), and [`AxError::InvalidRegister`](vcpu_core::AxError::InvalidRegister).
    pub fn xsave_from(&mut self, buffer: &[u8]) -> AxResult {
        on!(self, vcpu => vcpu.xsave_from(buffer))
    }

    /// Events and activity.
    pub fn events(&self) -> Events {
        on!(self, vcpu => vcpu.events())
    }

    /// Sets events and activity.
    ///
    /// # Errors
    /// [`AxError::InvalidInput`](vcpu_core::AxError::InvalidInput).
    pub fn set_events(&mut self, events: &Events) -> AxResult {
        on!(self, vcpu => vcpu.set_events(events))
    }

    /// The local APIC's registers.
    ///
    /// # Errors
    /// [`AxError::Unsupported`](vcpu_core::AxError::Unsupported) if it is not emulated here.
    pub fn local_apic(&mut self) -> AxResult<LocalApic> {
        on!(self, vcpu => vcpu.local_apic())
    }

    /// Sets the local APIC's registers.
    ///
    /// # Errors
    /// As [`local_apic`](Self::local_apic), and [`AxError::InvalidRegister`](vcpu_core::AxError::InvalidRegister).
    pub fn set_local_apic(&mut self, state: &LocalApic) -> AxResult {
        on!(self, vcpu => vcpu.set_local_apic(state))
    }

    /// Queues an event for the guest.
    ///
    /// # Errors
    /// [`AxError::EventPending`](vcpu_core::AxError::EventPending) if one of that kind waits,
    /// [`AxError::InvalidInput`](vcpu_core::AxError::InvalidInput) for one that does not exist.
    pub fn inject(&mut self, event: &Event) -> AxResult {
        on!(self, vcpu => vcpu.inject(event))
    }

    /// Finishes what the last exit left open; nothing if it left nothing.
    pub fn complete(&mut self, reply: Reply) {
        on!(self, vcpu => vcpu.complete(reply));
    }

    /// Takes what was posted to the vCPU, and publishes who it is. To be called right before [`run`](AxArchVCpu::run), with
    /// interrupts off, so that nothing posted earlier is missed.
    pub fn prepare(&mut self, mailbox: &Mailbox) {
        on!(self, vcpu => vcpu.prepare(mailbox));
    }

    /// Whether there is something to run for: false for a vCPU that is halted or waits for a start-up IPI, with nothing to
    /// change that.
    pub fn runnable(&mut self, mailbox: &Mailbox) -> bool {
        on!(self, vcpu => vcpu.runnable(mailbox))
    }

    /// To be called before interrupts go on after [`run`](AxArchVCpu::run), on the same CPU: what a backend may have switched on
    /// only while they are off is switched off. Nothing if there is nothing. When `run` fails it does so by itself.
    ///
    /// # Errors
    /// [`AxError::HardwareLost`](vcpu_core::AxError::HardwareLost): the CPU is as it was before, the vCPU may not be.
    pub fn leave(&mut self) -> AxResult {
        match self {
            Self::Svm(_) => Ok(()),
            Self::Vmx(vcpu) => vcpu.leave(),
        }
    }

    /// Has everything flushed before the next entry that the CPU has cached of the guest's translations.
    pub fn flush_tlb(&mut self) {
        on!(self, vcpu => vcpu.flush_tlb());
    }

    /// The last exit's instruction, as far as the CPU has told it.
    pub fn insn_info(&self) -> InsnInfo {
        on!(self, vcpu => vcpu.insn_info())
    }

    /// Whether an external interrupt that userspace injects now would be delivered at once.
    pub fn interrupt_window_open(&self) -> bool {
        on!(self, vcpu => vcpu.interrupt_window_open())
    }

    /// Whether the guest has interrupts enabled (RFLAGS.IF).
    pub fn interrupts_enabled(&self) -> bool {
        on!(self, vcpu => vcpu.interrupts_enabled())
    }

    /// Asks for an exit [`InterruptWindow`](AxVCpuExitReason::InterruptWindow) whenever the window is open, until revoked.
    pub fn request_interrupt_window(&mut self, wanted: bool) {
        on!(self, vcpu => vcpu.request_interrupt_window(wanted));
    }

    /// Whether the guest's CPL is 3.
    pub fn user_mode(&self) -> bool {
        on!(self, vcpu => vcpu.user_mode())
    }

    /// The vCPU's APIC id.
    pub fn apic_id(&self) -> u32 {
        on!(self, vcpu => vcpu.apic_id())
    }

    /// What the host's timer is to do for the local APIC's. Its expiry is posted to the mailbox.
    pub fn timer_update(&mut self) -> TimerUpdate {
        on!(self, vcpu => vcpu.timer_update())
    }

    /// Whether [`clock_update`](Self::clock_update) has something: then the window is to be left, since the guest expects its
    /// clock when the write of the clock's MSR is over.
    pub fn clock_due(&self) -> bool {
        on!(self, vcpu => vcpu.clock_due())
    }

    /// The next structure of the paravirtual clock that is to be written to guest memory; see
    /// [`PvClock::take_update`](crate::pvclock::PvClock::take_update).
    pub fn clock_update(&mut self, base: &TimeBase, wall_ns: impl FnOnce() -> u64) -> Option<ClockUpdate> {
        on!(self, vcpu => vcpu.clock_update(base, wall_ns))
    }

    /// Carries out an access to the xAPIC page: a write of `write`, or a read. Afterwards look for
    /// [`take_ipi`](Self::take_ipi) and [`timer_update`](Self::timer_update); the end of a level-triggered interrupt comes as
    /// the exit of the next run.
    ///
    /// # Errors
    /// [`AxError::Unsupported`](vcpu_core::AxError::Unsupported) if the local APIC is not emulated here,
    /// [`AxError::InvalidInput`](vcpu_core::AxError::InvalidInput) for an offset beyond the page.
    pub fn apic_access(&mut self, offset: u32, write: Option<u32>) -> AxResult<u32> {
        on!(self, vcpu => vcpu.apic_access(offset, write))
    }

    /// The interrupt command that an access to the xAPIC page has left: destination in the x2APIC format, and the low half.
    pub fn take_ipi(&mut self) -> Option<(u64, u64)> {
        on!(self, vcpu => vcpu.take_ipi())
    }

    /// What kind the last exit was, for statistics.
    pub fn exit_kind(&self) -> ExitKind {
        on!(self, vcpu => vcpu.exit_kind())
    }

    /// Events injected since the vCPU was made.
    pub fn injections(&self) -> u64 {
        on!(self, vcpu => vcpu.injections())
    }

    /// TLB flushes asked of the CPU since the vCPU was made.
    pub fn tlb_flushes(&self) -> u64 {
        on!(self, vcpu => vcpu.tlb_flushes())
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
