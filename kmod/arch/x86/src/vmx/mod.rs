// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The Intel VMX backend (SDM vol. 3, chapters 24 to 31), with extended page tables and unrestricted guests.
//!
//! [`fields`] names the fields of a VMCS, [`capabilities`] says what the CPU can do, [`instructions`] executes; [`registers`] is
//! a vCPU's state between VMCS and memory, [`bitmaps`] the MSRs that do not exit, [`vpid`] the identifiers of translations,
//! [`percpu`] what a CPU keeps, [`window`] the state switched around entries, [`switch`] the world switch, [`exit`] what exits mean,
//! [`check`] why an entry was refused; this file is the vCPU and its entry into the guest.

mod bitmaps;
pub(crate) mod capabilities;
mod check;
mod exit;
mod fields;
mod instructions;
mod percpu;
mod registers;
mod switch;
mod vpid;
mod window;

use core::sync::atomic::{AtomicU64, Ordering};

use axvcpu_uapi::vcpu::ExitKind;
use axvcpu_uapi::x86::{self as uapi, Control, Debug, General, LocalApic, Segments};
use vcpu_core::npt::Ept;
use vcpu_core::{AccessFlags, AxArchVCpu, AxError, AxResult, AxVCpuExitReason, AxVCpuHal, GuestPhysAddr, HostPhysAddr};

use crate::apic::{Config, Effect, Lapic, Mailbox, TimerUpdate};
use crate::caps::Capabilities;
use crate::cpu;
use crate::cpuid::Feature;
use crate::events::{Activity, Injection};
use crate::frame::{Framed, Frames};
use crate::hal::X86Hal;
use crate::linear::GuestMemory;
use crate::msr::{Access, Written};
use crate::nested::NestedMemory;
use crate::pvclock::{ClockUpdate, TimeBase};
use crate::regs::{check_debug, cr0, rflags, virtual_8086_in_long_mode, Limits, DR7_GD};
use crate::state::{Guest, Pending, Registers, Reply};
use crate::vcpu::{InsnInfo, X86CreateConfig, X86SetupConfig};

use bitmaps::MsrBitmap;
use capabilities::{ept_pointer, primary, VmxCapabilities};
use check::GuestState;
use fields::Field;
use instructions::Scope;
pub(crate) use percpu::VmxCpu;
use registers::{Vmcs, VmxRegisters};
use vpid::Assignment;
use window::{Inner, Outer};

/// Intercepted exceptions: #DB and #AC, because a guest could have the CPU deliver them for ever, and #MC, which is the host's.
const EXCEPTIONS: u32 = 1 << 1 | 1 << 17 | 1 << 18;
/// PAUSEs of a loop are at most so many cycles apart.
const PAUSE_GAP: u64 = 128;
/// A loop of PAUSEs exits after so many cycles.
const PAUSE_WINDOW: u64 = 4096;
/// The host gets its turn after so many milliseconds at the latest. It is the host's timer that matters, by its interrupt; but
/// a guest with interrupts off never exits for one on an emulator (Bochs 3.0).
const TURN_MS: u64 = 10;

/// The last identity given to a vCPU. 0 is none.
static IDENTITIES: AtomicU64 = AtomicU64::new(0);

/// Writes the revision to the start of a VMXON region or VMCS (SDM vol. 3 section 25.2).
fn write_revision<H: AxVCpuHal>(region: &mut Frames<H>, revision: u32) {
    if let Some(word) = region.bytes_mut().first_chunk_mut() {
        *word = revision.to_le_bytes();
    }
}

/// What only this backend keeps of a vCPU.
struct Local {
    /// Unique in the system, for ever.
    identity: u64,
    entry: u64,
    root: HostPhysAddr,
    bound: bool,
    /// The inner window is open.
    inside: bool,
    /// The VMCS has been cleared and its constant fields are written.
    initialised: bool,
    /// The CPU it is bound to.
    cpu: usize,
    vpid: Assignment,
    outer: Outer,
    inner: Inner,
    /// What the last entry injected, and the length of the instruction that it was given.
    injected: Option<Injection>,
    injected_length: u8,
    /// The next RIP of the last exit, if it was INS or OUTS; otherwise 0.
    string_next: u64,
    exit_kind: ExitKind,
    injections: u64,
    tlb_flushes: u64,
}

/// A vCPU on Intel VMX.
pub struct VmxVCpu<H: X86Hal> {
    guest: Framed<Guest<H>, H>,
    regs: VmxRegisters<H>,
    local: Framed<Local, H>,
    vmcs: Frames<H>,
    bitmap: MsrBitmap<H>,
    caps: VmxCapabilities,
}

impl<H: X86Hal> AxArchVCpu for VmxVCpu<H> {
    type CreateConfig = X86CreateConfig;
    type SetupConfig = X86SetupConfig<H>;

    fn new(config: X86CreateConfig) -> AxResult<Self> {
        Self::with_capabilities(config, Capabilities::host(), crate::caps::vmx().map_err(|_| AxError::Unsupported)?)
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
        self.regs.set_tsc_offset(guest.tsc_offset);
        guest.cpuid = Some(cpuid);
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
        let result = self.enter();
        if result.is_err() {
            // The caller cannot reach the vCPU any more, so nobody else closes it.
            let _ = self.close_inner();
        }
        result
    }

    fn bind(&mut self) -> AxResult {
        if self.guest.cpuid.is_none() {
            return Err(AxError::NotSetUp);
        }
        self.open_outer();
        self.local.bound = true;
        Ok(())
    }

    fn unbind(&mut self) -> AxResult {
        if !self.local.bound {
            return Err(AxError::NotBound);
        }
        self.local.bound = false;
        self.close_outer();
        Ok(())
    }

    fn set_gpr(&mut self, reg: usize, val: usize) {
        self.regs.set_gpr(reg, val as u64);
    }
}

impl<H: X86Hal> VmxVCpu<H> {
    fn with_capabilities(config: X86CreateConfig, caps: Capabilities, vmx: VmxCapabilities) -> AxResult<Self> {
        let mut vmcs = Frames::new(0)?;
        write_revision(&mut vmcs, vmx.revision);
        Ok(Self {
            guest: Framed::new(Guest::new(config.vcpu_id, caps)?)?,
            regs: VmxRegisters::new(&vmx)?,
            local: Framed::new(Local {
                identity: IDENTITIES.fetch_add(1, Ordering::Relaxed).wrapping_add(1),
                entry: 0,
                root: HostPhysAddr::new(0),
                bound: false,
                inside: false,
                initialised: false,
                cpu: 0,
                vpid: Assignment::default(),
                outer: Outer::default(),
                inner: Inner::default(),
                injected: None,
                injected_length: 0,
                string_next: 0,
                exit_kind: ExitKind::Other,
                injections: 0,
                tlb_flushes: 0,
            })?,
            vmcs,
            bitmap: MsrBitmap::new()?,
            caps: vmx,
        })
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
        if self.local.inside {
            // SAFETY: Kernel context, in the inner window, which has the guest's registers loaded, all of them zero now.
            // Breakpoints are disabled outside of the guest.
            unsafe {
                cpu::set_cr2(0);
                if self.breakpoints_loaded() {
                    cpu::set_breakpoints([0; 4]);
                }
            }
        }
    }

    /// INIT: the boot processor starts at the reset vector, the others wait for a start-up IPI.
    fn init(&mut self) {
        self.reset(0xffff_0000, 0xf000, 0xfff0);
        let boot_processor = self.guest.vcpu_id == 0;
        self.guest.events.reset(if boot_processor { Activity::Running } else { Activity::WaitForSipi });
        self.guest.set_cr8(0);
        self.guest.pending = Pending::None;
    }

    /// One entry and its exit.
    fn enter(&mut self) -> AxResult<AxVCpuExitReason> {
        if !self.local.inside {
            self.open_inner()?;
        }
        self.local.string_next = 0;
        if let Some(exit) = self.load_pdptes()? {
            return Ok(exit);
        }
        self.prepare_entry()?;
        self.regs.frame.result = switch::EXITED;
        // SAFETY: The inner window is open: interrupts are off, and our VMCS is current; `prepare_entry` has completed it.
        match unsafe { switch::enter(self.regs.frame.as_ptr()) } {
            switch::EXITED => self.handle_exit(),
            switch::REFUSED => self.refused(),
            _ => Err(AxError::HardwareLost),
        }
    }

    /// Loads the upper level of PAE paging into the VMCS, which for the guest's own writes of CR3 the CPU does itself. An exit
    /// if the guest's memory must be mapped first.
    fn load_pdptes(&mut self) -> AxResult<Option<AxVCpuExitReason>> {
        const FIELDS: [Field; 4] = [Field::GuestPdpte0, Field::GuestPdpte1, Field::GuestPdpte2, Field::GuestPdpte3];
        if !self.regs.state.pdptes_stale {
            return Ok(None);
        }
        let base = self.regs.cr3() & 0xffff_ffe0;
        let mut table = [0; 32];
        // SAFETY: The root is the module's extended page table of `npt_levels` levels (`set_ept_root`), interrupts are off until
        // `run` returns, and the object is gone by then.
        let memory = unsafe { NestedMemory::<H, Ept>::new(self.local.root, self.guest.caps.npt_levels) };
        if !memory.read(base, &mut table) {
            self.local.exit_kind = ExitKind::PageFault;
            return Ok(Some(AxVCpuExitReason::NestedPageFault {
                addr: GuestPhysAddr::new(base),
                access_flags: AccessFlags::READ.union(AccessFlags::PAGE_WALK),
            }));
        }
        let phys_bits = self.guest.limits.phys_bits;
        let beyond = |value: u64| value.checked_shr(phys_bits).unwrap_or(0) != 0;
        // SAFETY: Interrupts are off in the inner window, in which our VMCS is current.
        let mut vmcs = unsafe { Vmcs::current() };
        for (entry, field) in table.chunks_exact(8).zip(FIELDS) {
            let entry = entry.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
            // With reserved bits set, MOV to the control register that made us look should have raised #GP. It is complete,
            // so an entry that translates nothing has to do: the guest faults when it uses it.
            vmcs.write(field, if check::pdpte_valid(entry, beyond) { entry } else { 0 });
        }
        self.regs.state.pdptes_stale = false;
        vmcs.finish().map(|()| None)
    }

    /// Chooses what the next entry injects and which exits it asks for, and a VPID; completes the VMCS.
    fn prepare_entry(&mut self) -> AxResult {
        let situation = self.guest.situation(&self.regs);
        let apic = self.guest.apic_vector();
        let accepts_pic = self.guest.accepts_pic_interrupt();
        let plan = self.guest.events.plan(situation, apic, accepts_pic);
        if plan.acknowledge {
            if let Some(lapic) = &mut self.guest.lapic {
                lapic.acknowledge();
            }
        }
        if let Some(address) = plan.address {
            // SAFETY: Kernel context, in the inner window, which has CR2 for the guest.
            unsafe { cpu::set_cr2(address) };
        }
        if plan.inject.is_some_and(Injection::is_fault) {
            self.regs.set_rflags(self.regs.rflags() | rflags::RF);
        }
        // SAFETY: Interrupts are off in the inner window, in which our VMCS is current.
        let mut vmcs = unsafe { Vmcs::current() };
        self.local.injected_length = 0;
        let mut information = 0;
        if let Some(event) = plan.inject {
            let event = exit::encode_event(event, self.regs.cr0() & cr0::PE != 0);
            information = event.info;
            vmcs.write(Field::ControlEntryErrorCode, event.error_code.into());
            if event.software {
                // RIP is behind the instruction already.
                if !self.caps.zero_length {
                    self.local.injected_length = 1;
                    self.regs.set_rip(self.regs.rip().wrapping_sub(1));
                }
                vmcs.write(Field::ControlEntryInstructionLength, self.local.injected_length.into());
            }
            self.local.injections = self.local.injections.wrapping_add(1);
        }
        vmcs.write(Field::ControlEntryInterruption, information.into());
        self.local.injected = plan.inject;
        let mut controls = self.caps.primary;
        if plan.interrupt_window {
            controls |= primary::INTERRUPT_WINDOW;
        }
        if plan.nmi_window {
            controls |= primary::NMI_WINDOW;
        }
        if self.breakpoints_loaded() {
            controls &= !primary::MOV_DR;
            // SAFETY: Kernel context, in the inner window, which has DR6 for the guest.
            unsafe { cpu::set_dr6(self.regs.dr6()) };
        }
        vmcs.write(Field::ControlPrimary, controls.into());
        let nmi_blocked = self.guest.events.nmi_masked() && plan.inject != Some(Injection::Nmi);
        self.regs.write_back(&mut vmcs, nmi_blocked);
        if plan.inject == Some(Injection::DEBUG) {
            // Delivering #DB clears DR7.GD (SDM vol. 3 section 18.2.4); an injected one does not do it by itself.
            let dr7 = vmcs.read(Field::GuestDr7);
            vmcs.write(Field::GuestDr7, dr7 & !DR7_GD);
        }
        self.choose_vpid(&mut vmcs)?;
        vmcs.finish()
    }

    fn choose_vpid(&mut self, vmcs: &mut Vmcs) -> AxResult {
        // SAFETY: The vCPU is bound: preemption is off, so the record is this CPU's and nobody else uses it meanwhile.
        let per_cpu = unsafe { H::per_cpu().as_mut() }.vmx_mut().ok_or(AxError::NoHardware)?;
        let flush = core::mem::take(&mut self.regs.state.flush);
        let local = &mut *self.local;
        let entry = per_cpu.vpids.enter(local.cpu, &mut local.vpid);
        if !entry.fresh && !flush {
            return Ok(());
        }
        local.tlb_flushes = local.tlb_flushes.wrapping_add(1);
        let scope = |single| if single { Scope::Single } else { Scope::All };
        let pointer = ept_pointer(local.root.as_u64(), self.guest.caps.npt_levels);
        // SAFETY: In VMX operation, by `open_inner`. Flushing more than needed costs time only.
        unsafe {
            if entry.fresh && self.caps.has_vpid() {
                vmcs.write(Field::ControlVpid, entry.vpid.into());
                instructions::invvpid(scope(self.caps.invvpid_single), entry.vpid.into())
                    .map_err(|_| AxError::HardwareLost)?;
            }
            // Also what is cached without a linear address, and under whatever VPID: the table may be where another one was.
            instructions::invept(scope(self.caps.invept_single), pointer).map_err(|_| AxError::HardwareLost)
        }
    }

    /// The event that was to be injected is still to be delivered.
    fn undo_injection(&mut self) {
        let injected = self.local.injected.take();
        self.guest.events.undo(injected);
        self.regs.set_rip(self.regs.rip().wrapping_add(self.local.injected_length.into()));
    }

    /// VMLAUNCH or VMRESUME has failed for a reason that lies in our controls.
    #[cold]
    fn refused(&mut self) -> AxResult<AxVCpuExitReason> {
        self.undo_injection();
        self.local.exit_kind = ExitKind::Other;
        // SAFETY: Interrupts are off in the inner window, in which our VMCS is current.
        let mut vmcs = unsafe { Vmcs::current() };
        let error = vmcs.read(Field::ExitInstructionError);
        vmcs.finish()?;
        Ok(AxVCpuExitReason::FailEntry { hardware_entry_failure_reason: error })
    }

    /// The CPU has found the guest's state invalid, or a machine check came. The state is as before the entry.
    #[cold]
    fn invalid_state(&mut self, reason: u32, qualification: u64) -> AxVCpuExitReason {
        let injects_interrupt = matches!(self.local.injected, Some(Injection::External(_)));
        let interruptibility = self.regs.interruptibility(self.guest.events.nmi_masked());
        // SAFETY: Interrupts are off in the inner window, in which our VMCS is current.
        let mut vmcs = unsafe { Vmcs::current() };
        self.regs.read_window(&mut vmcs);
        let pdptes = self.regs.uses_pdptes().then(|| {
            [Field::GuestPdpte0, Field::GuestPdpte1, Field::GuestPdpte2, Field::GuestPdpte3]
                .map(|field| vmcs.read(field))
        });
        let (hardware_cr0, hardware_cr4) = self.regs.hardware_controls();
        let (cr0_fixed, cr4_fixed) = self.fixed();
        let segments = self.regs.segments();
        let state = GuestState {
            cr0: hardware_cr0,
            cr3: self.regs.cr3(),
            cr4: hardware_cr4,
            efer: self.regs.efer(),
            dr7: self.regs.dr7(),
            rip: self.regs.rip(),
            rflags: self.regs.rflags(),
            interruptibility,
            segments: &segments,
            injects_interrupt,
            pdptes,
            phys_bits: self.guest.caps.guest_phys_bits,
            // CPUID 7: the CPU has five-level paging.
            linear_bits: if cpu::cpuid(7, 0).ecx >> 16 & 1 != 0 { 57 } else { 48 },
        };
        let field = state.first_fault(cr0_fixed, cr4_fixed).map_or(0, Field::encoding);
        self.undo_injection();
        self.local.exit_kind = ExitKind::Other;
        if exit::Exit::decode(reason) == exit::Exit::EntryMachineCheck {
            // SAFETY: Kernel context with the host's IDT: FRED hosts have no VMX backend.
            unsafe { cpu::raise_machine_check() };
            return AxVCpuExitReason::MachineCheck;
        }
        AxVCpuExitReason::InvalidGuestState { reason: reason.into(), qualification, field }
    }

    /// Ends what [`run`](AxArchVCpu::run) has begun on this CPU: after this, interrupts can go on. See `window.rs`.
    ///
    /// # Errors
    /// [`AxError::HardwareLost`].
    pub fn leave(&mut self) -> AxResult {
        self.close_inner()
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
            cr2: self.regs.state.cr2,
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
        self.regs.set_control(control.cr0 | cr0::ET, control.cr2, control.cr3, control.cr4, control.efer);
        Ok(())
    }

    /// Debug registers. Not while bound.
    pub fn debug(&self) -> Debug {
        Debug { dr: self.guest.breakpoints, dr6: self.regs.dr6(), dr7: self.regs.dr7() }
    }

    /// Sets debug registers. Not while bound.
    ///
    /// # Errors
    /// [`AxError::InvalidRegister`].
    pub fn set_debug(&mut self, debug: &Debug) -> AxResult {
        let debug = check_debug(debug)?;
        self.guest.breakpoints = debug.dr;
        self.regs.set_dr6(debug.dr6);
        self.regs.set_dr7(debug.dr7);
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
        // At EPT violations the CPU tells neither bytes nor a length that can be relied on.
        InsnInfo { next_rip: self.local.string_next, ..InsnInfo::default() }
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

    /// TLB flushes, fresh VPIDs included.
    pub fn tlb_flushes(&self) -> u64 {
        self.local.tlb_flushes
    }
}
