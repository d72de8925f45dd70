// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The Intel VMX backend (SDM vol. 3, chapters 24 to 31), with extended page tables and unrestricted guests.
//!
//! [`fields`] names the fields of a VMCS, [`capabilities`] says what the CPU can do, [`instructions`] executes; [`registers`] is
//! a vCPU's state between VMCS and memory, [`bitmaps`] the MSRs that do not exit, [`vpid`] the identifiers of translations,
//! [`virtual_apic`] what the CPU does for the local APIC, [`timer`] for its timer, [`percpu`] what a CPU keeps, [`l1d`] how its
//! L1 data cache is flushed, [`window`] the state switched around entries, [`switch`] the world switch, [`exit`] what exits mean,
//! [`check`] why an entry was refused; this file is the entry into the guest.

mod bitmaps;
pub(crate) mod capabilities;
mod check;
mod decode;
mod exit;
mod fields;
mod instructions;
mod l1d;
mod percpu;
mod registers;
mod switch;
mod timer;
mod transfer;
mod virtual_apic;
mod vmcs;
mod vpid;
mod window;

use vcpu_core::npt::Ept;
use vcpu_core::{AccessFlags, AxError, AxResult, AxVCpuHal, GuestPhysAddr};

use crate::backend::{Backend, Exit, Exited, Frequent, Refusal};
use crate::caps;
use crate::cpu;
use crate::events::{Injection, Plan};
use crate::frame::{Framed, Frames};
use crate::hal::X86Hal;
use crate::linear::GuestMemory;
use crate::nested::NestedMemory;
use crate::regs::cr0;
use crate::state::{Guest, Registers};
use crate::vcpu::InsnInfo;

use bitmaps::MsrBitmap;
use capabilities::{ept_pointer, primary, ApicSupport, VmxCapabilities};
use check::GuestState;
use fields::Field;
use instructions::Scope;
pub(crate) use percpu::VmxCpu;
use registers::{group, VmxRegisters};
use virtual_apic::VirtualApic;
use vmcs::Vmcs;
use vpid::Assignment;
use window::Inner;

/// Intercepted exceptions: #DB and #AC, because a guest could have the CPU deliver them for ever, and #MC, which is the host's.
const EXCEPTIONS: u32 = 1 << 1 | 1 << 17 | 1 << 18;
/// PAUSEs of a loop are at most so many cycles apart.
const PAUSE_GAP: u64 = 128;
/// A loop of PAUSEs exits after so many cycles.
const PAUSE_WINDOW: u64 = 4096;

/// Writes the revision to the start of a VMXON region or VMCS (SDM vol. 3 section 25.2).
fn write_revision<H: AxVCpuHal>(region: &mut Frames<H>, revision: u32) {
    if let Some(word) = region.bytes_mut().first_chunk_mut() {
        *word = revision.to_le_bytes();
    }
}

/// What a vCPU keeps besides its registers.
#[derive(Default)]
struct Local {
    /// The VMCS has been cleared and its constant fields are written.
    initialised: bool,
    /// The CPU it is bound to.
    cpu: usize,
    vpid: Assignment,
    /// A VPID has been chosen in this window. Nobody else takes one meanwhile.
    has_vpid: bool,
    /// The L1 data cache is to be flushed before the next entry.
    flush_l1d: bool,
    virtual_apic: VirtualApic,
    inner: Inner,
    /// What the VMCS has as primary controls.
    primary: u64,
    /// And for the preemption timer.
    timer: u64,
    /// The exit's user will want to see all registers.
    shown: bool,
    /// The length of the instruction that the last entry's event was given.
    injected_length: u8,
    /// The next RIP of the last exit, if it was INS or OUTS; otherwise 0.
    string_next: u64,
}

/// What Intel VMX is for a vCPU.
pub(crate) struct Vmx<H: X86Hal> {
    regs: VmxRegisters<H>,
    local: Framed<Local, H>,
    vmcs: Frames<H>,
    bitmap: MsrBitmap<H>,
    caps: VmxCapabilities,
}

impl<H: X86Hal> Backend<H> for Vmx<H> {
    type Registers = VmxRegisters<H>;
    type Format = Ept;

    #[inline]
    fn regs(&self) -> &VmxRegisters<H> {
        &self.regs
    }

    #[inline]
    fn regs_mut(&mut self) -> &mut VmxRegisters<H> {
        &mut self.regs
    }

    /// The VMCS cannot be reached yet: its controls are written in the first window.
    fn setup(&mut self, guest: &Guest<H>) {
        self.local.virtual_apic = VirtualApic::new(self.caps.apic, guest);
    }

    fn open(&mut self, guest: &mut Guest<H>) -> AxResult {
        // SAFETY: Preemption is off, so the record is this CPU's, and nobody else uses it until it is on again.
        let per_cpu = unsafe { H::per_cpu().as_mut() };
        self.local.cpu = per_cpu.cpu();
        guest.open_window(&mut self.regs.frame, per_cpu);
        Ok(())
    }

    fn close(&mut self, guest: &mut Guest<H>) -> AxResult {
        guest.close_window();
        Ok(())
    }

    fn ready(&mut self, guest: &mut Guest<H>) -> AxResult<Option<Exit>> {
        if !self.regs.state.live {
            self.open_inner(guest)?;
        }
        self.local.string_next = 0;
        self.load_pdptes(guest)
    }

    fn prepare(&mut self, guest: &mut Guest<H>, plan: &Plan) -> AxResult<bool> {
        self.prepare_entry(guest, plan)?;
        // The CPU takes what is injected out of the VMCS by itself.
        let length_restored = self.local.injected_length == 0;
        Ok(!plan.has_wish() && length_restored && !guest.events.nmi_masked() && !guest.debug.loaded())
    }

    #[inline]
    fn enter(&mut self) -> AxResult {
        self.regs.frame.result = switch::EXITED;
        if self.local.flush_l1d {
            // SAFETY: Kernel context, in the inner window: the record is this CPU's, and nobody else uses it meanwhile; and
            // `open_inner` has asked whether it is wanted.
            self.local.flush_l1d = unsafe { H::per_cpu().as_mut().vmx()?.l1d.flush() };
        }
        // SAFETY: The inner window is open: interrupts are off, and our VMCS is current; `prepare_entry` has completed it.
        match unsafe { switch::enter(self.regs.frame.as_ptr()) } {
            switch::EXITED | switch::REFUSED => Ok(()),
            _ => Err(AxError::HardwareLost),
        }
    }

    #[inline]
    fn frequent(&mut self, guest: &mut Guest<H>) -> Option<Frequent> {
        self.frequent_exit(guest)
    }

    #[inline]
    fn again(&mut self, guest: &Guest<H>) -> AxResult {
        // SAFETY: Interrupts are off in the inner window, in which our VMCS is current.
        let mut vmcs = unsafe { Vmcs::current() };
        self.regs.write_back(&mut vmcs, false);
        self.set_timer(guest, &mut vmcs);
        vmcs.finish()
    }

    fn decode(&mut self, guest: &mut Guest<H>, plan: &Plan) -> AxResult {
        if self.regs.frame.result == switch::REFUSED {
            guest.exited = self.refused()?;
        } else {
            self.decode_exit(guest, plan);
        }
        Ok(())
    }

    fn show_all(&mut self) {
        self.local.shown = true;
    }

    fn delivers_interrupts(&self, guest: &Guest<H>) -> bool {
        guest.lapic().is_some_and(|lapic| self.local.virtual_apic.delivers(lapic.mode()))
    }

    fn takes_posted_interrupts(&self) -> bool {
        self.local.virtual_apic.takes_posted_interrupts()
    }

    fn watches_deadline(&self) -> bool {
        self.caps.has_timer()
    }

    fn leave(&mut self, guest: &mut Guest<H>) -> AxResult {
        self.close_inner(guest)
    }

    fn forget(&mut self) {}

    fn synchronize(&mut self) -> AxResult {
        self.complete_copy()
    }

    fn insn_info(&self, _guest: &Guest<H>) -> InsnInfo {
        // At EPT violations the CPU tells neither bytes nor a length that can be relied on.
        InsnInfo { next_rip: self.local.string_next, ..InsnInfo::default() }
    }
}

impl<H: X86Hal> Vmx<H> {
    /// Makes it. May sleep.
    ///
    /// # Errors
    /// [`AxError::NoMemory`].
    pub(crate) fn new() -> AxResult<Self> {
        let caps = Self::capabilities()?;
        let mut vmcs = Frames::new(0)?;
        write_revision(&mut vmcs, caps.revision);
        Ok(Self {
            regs: VmxRegisters::new(&caps)?,
            local: Framed::new(Local::default())?,
            vmcs,
            bitmap: MsrBitmap::new()?,
            caps,
        })
    }

    /// What is used of the CPU's.
    fn capabilities() -> AxResult<VmxCapabilities> {
        let mut caps = caps::vmx().map_err(|_| AxError::Unsupported)?;
        if H::notification_vector().is_none() {
            caps.apic = caps.apic.min(ApicSupport::Delivery);
        }
        caps.apic = caps.apic.min(ApicSupport::steps(H::apic_steps()));
        Ok(caps)
    }

    /// Whether vCPUs with a local APIC can have interrupts posted to them on this CPU.
    pub(crate) fn takes_posted_interrupts_here() -> bool {
        Self::capabilities().is_ok_and(|caps| caps.apic >= ApicSupport::Posted)
    }

    /// Loads the upper level of PAE paging into the VMCS, which for the guest's own writes of CR3 the CPU does itself. An exit
    /// if the guest's memory must be mapped first.
    fn load_pdptes(&mut self, guest: &Guest<H>) -> AxResult<Option<Exit>> {
        const FIELDS: [Field; 4] = [Field::GuestPdpte0, Field::GuestPdpte1, Field::GuestPdpte2, Field::GuestPdpte3];
        if !self.regs.state.pdptes_stale {
            return Ok(None);
        }
        let base = self.regs.cr3() & 0xffff_ffe0;
        let mut table = [0; 32];
        // SAFETY: The root is the module's extended page table of `npt_levels` levels (`set_ept_root`), interrupts are off until
        // `run` returns, and the object is gone by then.
        let memory = unsafe { NestedMemory::<H, Ept>::new(guest.root, guest.caps.npt_levels) };
        if !memory.read(base, &mut table) {
            return Ok(Some(Exit::PageFault {
                addr: GuestPhysAddr::new(base),
                access: AccessFlags::READ.union(AccessFlags::PAGE_WALK),
            }));
        }
        let phys_bits = guest.limits.phys_bits;
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

    /// Completes the VMCS: what is injected, which exits come, and the VPID.
    fn prepare_entry(&mut self, guest: &mut Guest<H>, plan: &Plan) -> AxResult {
        // SAFETY: Interrupts are off in the inner window, in which our VMCS is current.
        let mut vmcs = unsafe { Vmcs::current() };
        self.local.injected_length = 0;
        // Each exit leaves the field invalid, as it was when the VMCS was made.
        if let Some(event) = plan.inject {
            let event = decode::encode_event(event, self.regs.cr0() & cr0::PE != 0);
            vmcs.write(Field::ControlEntryInterruption, event.info.into());
            vmcs.write(Field::ControlEntryErrorCode, event.error_code.into());
            if event.software {
                // RIP is behind the instruction already.
                if !self.caps.zero_length {
                    self.local.injected_length = 1;
                    self.regs.set_rip(self.regs.rip().wrapping_sub(1));
                }
                vmcs.write(Field::ControlEntryInstructionLength, self.local.injected_length.into());
            }
        }
        let mut controls = self.local.virtual_apic.primary(self.caps.primary);
        if plan.interrupt_window {
            controls |= primary::INTERRUPT_WINDOW;
        }
        if plan.nmi_window {
            controls |= primary::NMI_WINDOW;
        }
        if guest.debug.loaded() {
            controls &= !primary::MOV_DR;
            // SAFETY: Kernel context, in the inner window, which has DR6 for the guest.
            unsafe { cpu::set_dr6(self.regs.dr6()) };
        }
        vmcs.update(Field::ControlPrimary, &mut self.local.primary, controls.into());
        let nmi_blocked = guest.events.nmi_masked() && plan.inject != Some(Injection::Nmi);
        self.regs.write_back(&mut vmcs, nmi_blocked);
        if self.regs.state.dirty & group::SYSCALL != 0 {
            self.load_syscall();
        }
        if let Some(lapic) = guest.lapic_for_hardware() {
            self.local.virtual_apic.before_entry(&mut vmcs, lapic, &mut self.bitmap);
        }
        self.choose_vpid(guest, &mut vmcs)?;
        self.set_timer(guest, &mut vmcs);
        vmcs.finish()
    }

    /// Has the entry end when the local APIC's timer is due.
    #[inline]
    fn set_timer(&mut self, guest: &Guest<H>, vmcs: &mut Vmcs) {
        if self.caps.has_timer() {
            let value = guest.deadline().map_or(timer::UNUSED, |deadline| {
                let now = cpu::rdtsc();
                let ticks = deadline.saturating_sub(now.wrapping_add(guest.tsc_offset));
                timer::value(now, ticks, self.caps.timer_shift)
            });
            vmcs.update(Field::GuestPreemptionTimer, &mut self.local.timer, value.into());
        }
    }

    fn choose_vpid(&mut self, guest: &mut Guest<H>, vmcs: &mut Vmcs) -> AxResult {
        let flush = core::mem::take(&mut self.regs.state.flush);
        if core::mem::replace(&mut self.local.has_vpid, true) && !flush {
            return Ok(());
        }
        // SAFETY: The vCPU is bound: preemption is off, so the record is this CPU's and nobody else uses it meanwhile.
        let per_cpu = unsafe { H::per_cpu().as_mut() }.vmx()?;
        let local = &mut *self.local;
        let entry = per_cpu.vpids.enter(local.cpu, &mut local.vpid);
        if !entry.fresh && !flush {
            return Ok(());
        }
        guest.tlb_flushes = guest.tlb_flushes.wrapping_add(1);
        let scope = |single| if single { Scope::Single } else { Scope::All };
        let pointer = ept_pointer(guest.root.as_u64(), guest.caps.npt_levels);
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

    /// RIP as the guest is to see it, if the last entry's event was given an instruction that does not exist.
    fn undo_injected_length(&mut self) {
        let length = core::mem::take(&mut self.local.injected_length);
        if length != 0 {
            self.regs.set_rip(self.regs.rip().wrapping_add(length.into()));
        }
    }

    /// VMLAUNCH or VMRESUME has failed for a reason that lies in our controls.
    #[cold]
    fn refused(&mut self) -> AxResult<Exited> {
        self.undo_injected_length();
        // SAFETY: Interrupts are off in the inner window, in which our VMCS is current.
        let mut vmcs = unsafe { Vmcs::current() };
        let error = vmcs.read(Field::ExitInstructionError);
        vmcs.write(Field::ControlEntryInterruption, 0);
        vmcs.finish()?;
        let exit = Exit::NotEntered(Refusal::Controls(error));
        Ok(Exited { exit, interrupted: None })
    }

    /// The CPU has found the guest's state invalid, or a machine check came. The state is as before the entry.
    #[cold]
    fn invalid_state(&mut self, guest: &Guest<H>, plan: &Plan, reason: u32, qualification: u64) -> Exited {
        let injects_interrupt = matches!(plan.inject, Some(Injection::External(_)));
        let interruptibility = self.regs.interruptibility(guest.events.nmi_masked());
        // SAFETY: Interrupts are off in the inner window, in which our VMCS is current.
        let mut vmcs = unsafe { Vmcs::current() };
        vmcs.write(Field::ControlEntryInterruption, 0);
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
            phys_bits: guest.caps.guest_phys_bits,
            // CPUID 7: the CPU has five-level paging.
            linear_bits: if cpu::cpuid(7, 0).ecx >> 16 & 1 != 0 { 57 } else { 48 },
        };
        let field = state.first_fault(cr0_fixed, cr4_fixed).map_or(0, Field::encoding);
        self.undo_injected_length();
        let refusal = if decode::Code::decode(reason) == decode::Code::EntryMachineCheck {
            // SAFETY: Kernel context with the host's IDT: FRED hosts have no VMX backend.
            unsafe { cpu::raise_machine_check() };
            Refusal::MachineCheck
        } else {
            Refusal::State { reason: reason.into(), qualification, field }
        };
        Exited { exit: Exit::NotEntered(refusal), interrupted: None }
    }
}
