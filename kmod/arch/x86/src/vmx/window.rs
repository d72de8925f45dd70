// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The two windows of a vCPU on VMX.
//!
//! The outer one lies between bind and unbind, with preemption off, and has the guest's FPU state, XCR0 and PKRU loaded: see
//! `window.rs` of the crate.
//!
//! The inner one lies inside it, from the first entry to [`leave`](crate::backend::Backend::leave), with interrupts off throughout. It has
//! VMX in use, our VMCS current, and all other state switched. There are two kinds of it, told apart by CR4.VMXE:
//!
//! - Clear: nobody uses VMX here. VMXE is set, VMX switched on, and both undone at the end. Linux keeps a copy of CR4 that
//!   a module cannot change, and would clear VMXE, which raises #GP in VMX operation; so no interrupt may come between.
//! - Set: another hypervisor is in VMX operation. It is used as it is, and the VMCS that was current is made so again at the
//!   end. MSRs may hold that hypervisor's guest's values (Linux' user-return MSRs), so what the window found is what it restores;
//!   and the interrupts that make the hypervisor change them come before or after.

use vcpu_core::{AxError, AxResult};
use x86::msr;

use super::capabilities::{ept_pointer, exit, Fixed};
use super::fields::Field;
use super::instructions::{self, Selectors, Table};
use super::registers::{group, CR4_VMXE, SYSCALL_MSRS};
use super::vmcs::Vmcs;
use super::{timer, Vmx, EXCEPTIONS, PAUSE_GAP, PAUSE_WINDOW};
use crate::cpu;
use crate::cpuid::Feature;
use crate::hal::X86Hal;
use crate::msr::TSC_AUX;
use crate::regs::{efer, DR7_ENABLES};
use crate::state::Guest;
use crate::switch::LAUNCHED;

const DEBUGCTL: u32 = 0x1d9;
/// VMPTRST: no VMCS is current.
const NONE: u64 = u64::MAX;

/// The fields of the host's state that can differ from one window to the next, or from one CPU to another.
const HOST_FIELDS: [Field; 16] = [
    Field::HostCr3,
    Field::HostCr0,
    Field::HostCr4,
    Field::HostFsBase,
    Field::HostEfer,
    Field::HostGsBase,
    Field::HostTrBase,
    Field::HostGdtrBase,
    Field::HostIdtrBase,
    Field::HostSysenterCs,
    Field::HostSysenterEsp,
    Field::HostSysenterEip,
    Field::HostPat,
    Field::HostCsSelector,
    Field::HostSsSelector,
    Field::HostTrSelector,
];

/// The host's state during the inner window.
#[derive(Clone, Copy)]
pub(super) struct Inner {
    cr4: u64,
    /// The VMCS that was current, if VMX was on.
    previous: Option<u64>,
    gdtr: Table,
    idtr: Table,
    selectors: Selectors,
    fs_base: u64,
    kernel_gs_base: u64,
    /// [`SYSCALL_MSRS`], once the guest's are in the CPU.
    syscall: Option<[u64; 4]>,
    tsc_aux: u64,
    debugctl: u64,
    cr2: u64,
    /// What the VMCS has in [`HOST_FIELDS`].
    fields: [u64; HOST_FIELDS.len()],
}

impl Default for Inner {
    fn default() -> Self {
        Self {
            cr4: 0,
            previous: None,
            gdtr: Table::default(),
            idtr: Table::default(),
            selectors: Selectors::default(),
            fs_base: 0,
            kernel_gs_base: 0,
            syscall: None,
            tsc_aux: 0,
            debugctl: 0,
            cr2: 0,
            // Not a value of any of them.
            fields: [u64::MAX; HOST_FIELDS.len()],
        }
    }
}

impl<H: X86Hal> Vmx<H> {
    /// Makes VMX usable and our VMCS current. Interrupts are off, and stay off until [`close_vmx`](Self::close_vmx).
    ///
    /// # Errors
    /// [`AxError::HardwareLost`], with everything as it was.
    fn open_vmx(&mut self) -> AxResult {
        // SAFETY: Interrupts are off, so the record is this CPU's and nobody else uses it meanwhile.
        let per_cpu = unsafe { H::per_cpu().as_mut() }.vmx()?;
        let region = per_cpu.region();
        // The host may have had anything in the cache since the last window.
        self.local.flush_l1d = per_cpu.l1d.is_wanted();
        let own = self.vmcs.phys().as_u64();
        let inner = &mut self.local.inner;
        // SAFETY: Kernel context with interrupts off. CR4 gets VMXE only, which VMX asks for; the region begins with the
        // revision and is this CPU's own. A VMCS that is current and not ours is put back in `close_vmx`.
        unsafe {
            inner.cr4 = cpu::cr4();
            inner.previous = if inner.cr4 & CR4_VMXE != 0 {
                Some(instructions::vmptrst().map_err(|_| AxError::HardwareLost)?)
            } else {
                instructions::set_cr4(inner.cr4 | CR4_VMXE);
                if instructions::vmxon(region).is_err() {
                    instructions::set_cr4(inner.cr4);
                    return Err(AxError::HardwareLost);
                }
                None
            };
            // The VMCS is active nowhere: it was cleared when it was made, as `setup` runs, or at the end of the last window.
            let cleared = self.local.initialised || instructions::vmclear(own).is_ok();
            if !cleared || instructions::vmptrld(own).is_err() {
                self.close_vmx();
                return Err(AxError::HardwareLost);
            }
        }
        self.regs.state.live = true;
        Ok(())
    }

    /// Opens the inner window. Interrupts are off, and stay off until `close_inner`.
    ///
    /// # Errors
    /// [`AxError::HardwareLost`], with everything as it was.
    pub(super) fn open_inner(&mut self, guest: &mut Guest<H>) -> AxResult {
        self.open_vmx()?;
        if let Err(error) = self.save_host(guest) {
            self.close_vmx();
            return Err(error);
        }
        self.load_guest(guest);
        // VMCLEAR has reset it.
        self.regs.frame.flags &= !LAUNCHED;
        self.local.has_vpid = false;
        Ok(())
    }

    /// Saves the host's state, and writes to the VMCS what of it is new and, the first time, the controls.
    fn save_host(&mut self, guest: &mut Guest<H>) -> AxResult {
        // SAFETY: Interrupts are off in the inner window, and `open_vmx` has made our VMCS current.
        let mut vmcs = unsafe { Vmcs::current() };
        if !self.local.initialised {
            self.write_controls(guest, &mut vmcs);
        }
        let switches_tsc_aux = guest.offered.tsc_aux;
        let inner = &mut self.local.inner;
        // SAFETY: Kernel context with interrupts off, so the record is this CPU's and nobody else uses it meanwhile; all of these
        // MSRs exist on a CPU with VMX, TSC_AUX if the guest has it. The tables and selectors are the host's.
        let (fields, constants) = unsafe {
            (inner.gdtr, inner.idtr) = instructions::descriptor_tables();
            inner.selectors = instructions::selectors();
            inner.fs_base = cpu::rdmsr(msr::IA32_FS_BASE);
            inner.kernel_gs_base = cpu::rdmsr(msr::IA32_KERNEL_GSBASE);
            inner.syscall = None;
            if switches_tsc_aux {
                inner.tsc_aux = cpu::rdmsr(TSC_AUX);
            }
            inner.debugctl = cpu::rdmsr(DEBUGCTL);
            inner.cr2 = cpu::cr2();
            let constants = H::per_cpu().as_mut().vmx()?.constants(&inner.gdtr, inner.selectors.tr);
            (instructions::cr0_cr3(), constants)
        };
        let (cr0, cr3) = fields;
        let selectors = &inner.selectors;
        let values = [
            cr3,
            cr0,
            inner.cr4 | CR4_VMXE,
            inner.fs_base,
            // SAFETY: Kernel context. Not one of the constants: another hypervisor may have left its guest's NXE or SCE.
            unsafe { cpu::rdmsr(msr::IA32_EFER) },
            constants.gs_base,
            constants.tss,
            inner.gdtr.base,
            inner.idtr.base,
            constants.sysenter_cs,
            constants.sysenter_esp,
            constants.sysenter_eip,
            constants.pat,
            selectors.cs.into(),
            selectors.ss.into(),
            selectors.tr.into(),
        ];
        for ((field, last), value) in HOST_FIELDS.into_iter().zip(&mut inner.fields).zip(values) {
            vmcs.update(field, last, value);
        }
        vmcs.finish()?;
        self.local.initialised = true;
        Ok(())
    }

    /// Loads the guest's state that the VMCS does not switch.
    fn load_guest(&mut self, guest: &mut Guest<H>) {
        if self.regs.frame.wants_direct_spec_ctrl() {
            self.bitmap.leave_spec_ctrl();
            self.regs.frame.direct_spec_ctrl();
        }
        let state = &mut self.regs.state;
        // The system call MSRs are the host's still: see `load_syscall`.
        state.dirty |= group::SYSCALL;
        // SAFETY: Kernel context; the guest's values have been checked when they were set, or come from the CPU itself.
        // Breakpoints are disabled as long as those of host and guest are mixed.
        unsafe {
            guest.debug.open();
            cpu::wrmsr(msr::IA32_KERNEL_GSBASE, state.kernel_gs_base);
            if guest.offered.tsc_aux {
                cpu::wrmsr(TSC_AUX, guest.msrs.tsc_aux);
            }
            cpu::set_cr2(state.cr2);
            if state.dr7 & DR7_ENABLES != 0 {
                guest.debug.load();
            }
        }
    }

    /// Loads the MSRs of SYSCALL, if the guest has switched SYSCALL on. Otherwise it cannot see what is in them: accesses exit.
    pub(super) fn load_syscall(&mut self) {
        let state = &mut self.regs.state;
        if state.efer & efer::SCE == 0 {
            return;
        }
        state.dirty &= !group::SYSCALL;
        let inner = &mut self.local.inner;
        // SAFETY: Kernel context, in the inner window, at whose end the host's values are put back; the guest's have been checked
        // when they were set.
        unsafe {
            inner.syscall.get_or_insert_with(|| SYSCALL_MSRS.map(|index| cpu::rdmsr(index)));
            for (index, value) in SYSCALL_MSRS.into_iter().zip(state.syscall) {
                cpu::wrmsr(index, value);
            }
        }
    }

    /// Closes the inner window: everything of the host's is as it was, and interrupts can go on.
    pub(super) fn close_inner(&mut self, guest: &mut Guest<H>) -> AxResult {
        if !self.regs.state.live {
            return Ok(());
        }
        // SAFETY: Interrupts are off in the inner window, in which our VMCS is current.
        let vmcs = unsafe { Vmcs::current() };
        let shown = core::mem::take(&mut self.local.shown);
        let debug = if guest.debug.loaded() { group::DR7 } else { 0 };
        self.regs.read_back(&vmcs, if shown { group::ALL } else { group::ALWAYS | debug });
        self.close_vmx();
        let inner = &mut self.local.inner;
        let state = &mut *self.regs.state;
        // SAFETY: Kernel context, on the CPU and in the window of `open_inner`, whose values these are.
        unsafe {
            state.cr2 = cpu::cr2();
            cpu::set_cr2(inner.cr2);
            state.kernel_gs_base = cpu::rdmsr(msr::IA32_KERNEL_GSBASE);
            if state.kernel_gs_base != inner.kernel_gs_base {
                cpu::wrmsr(msr::IA32_KERNEL_GSBASE, inner.kernel_gs_base);
            }
            if let Some(host) = inner.syscall.take() {
                for ((index, host), guest) in SYSCALL_MSRS.into_iter().zip(host).zip(state.syscall) {
                    if guest != host {
                        cpu::wrmsr(index, host);
                    }
                }
            }
            if guest.offered.tsc_aux && guest.msrs.tsc_aux != inner.tsc_aux {
                cpu::wrmsr(TSC_AUX, inner.tsc_aux);
            }
            guest.debug.close();
            // An exit clears it.
            if inner.debugctl != 0 {
                cpu::wrmsr(DEBUGCTL, inner.debugctl);
            }
            // An exit sets the limits to 64 KiB, cuts the TSS, and loads null selectors.
            instructions::load_gdtr(&inner.gdtr);
            instructions::load_idtr(&inner.idtr);
            let selectors = inner.selectors;
            let loaded = H::per_cpu().as_mut().vmx().and_then(|cpu| cpu.reload_tr(&inner.gdtr, selectors.tr));
            if selectors.ldt != 0 {
                instructions::load_ldtr(selectors.ldt);
            }
            if selectors.ds | selectors.es | selectors.fs != 0 {
                instructions::load_data_selectors(selectors.ds, selectors.es, selectors.fs);
                cpu::wrmsr(msr::IA32_FS_BASE, inner.fs_base);
            }
            if selectors.gs != 0 {
                instructions::load_gs_selector(selectors.gs);
                cpu::wrmsr(msr::IA32_KERNEL_GSBASE, inner.kernel_gs_base);
            }
            loaded
        }
    }

    /// Completes the copy of the registers, outside of a window. Kernel context.
    ///
    /// # Errors
    /// [`AxError::HardwareLost`].
    pub(super) fn complete_copy(&mut self) -> AxResult {
        if self.regs.state.stale == 0 {
            return Ok(());
        }
        // SAFETY: Kernel context; what `open_vmx` does is undone before interrupts go on, and no guest is entered between.
        unsafe {
            cpu::with_interrupts_off(|| {
                self.open_vmx()?;
                self.regs.read_back(&Vmcs::current(), group::ALL);
                self.close_vmx();
                Ok(())
            })
        }
    }

    /// Gives our VMCS up, and VMX back as `open_vmx` found it. What fails here has been switched off by somebody else.
    fn close_vmx(&mut self) {
        self.regs.state.live = false;
        let own = self.vmcs.phys().as_u64();
        let inner = &self.local.inner;
        // SAFETY: Kernel context with interrupts off since `open_vmx`; the VMCS is ours, the previous one was current before,
        // and VMX is switched off only if we have switched it on.
        unsafe {
            // Cleared, the VMCS is in memory, to be used on any CPU.
            let _ = instructions::vmclear(own);
            match inner.previous {
                None => {
                    let _ = instructions::vmxoff();
                    instructions::set_cr4(inner.cr4);
                }
                Some(NONE) => {}
                // Ours, left by a window that was torn down: then none was.
                Some(previous) if previous == own => {}
                Some(previous) => {
                    let _ = instructions::vmptrld(previous);
                }
            }
        }
    }

    /// Writes the fields that stay as they are, once.
    fn write_controls(&mut self, guest: &Guest<H>, vmcs: &mut Vmcs) {
        let caps = self.caps;
        let has = |feature| guest.cpuid.as_ref().is_some_and(|table| table.has(feature));
        vmcs.write(Field::ControlPin, caps.pin.into());
        vmcs.write(Field::ControlPrimary, caps.primary.into());
        let secondary = caps.secondary_for(has(Feature::RDTSCP), has(Feature::INVPCID));
        vmcs.write(Field::ControlSecondary, secondary.into());
        self.local.virtual_apic.write_constants(vmcs, guest, (caps.pin, secondary));
        // Posted interrupts need it; otherwise the host's interrupts stay where they are until it can take them by itself.
        let acknowledge = if self.local.virtual_apic.takes_posted_interrupts() { exit::ACKNOWLEDGE } else { 0 };
        vmcs.write(Field::ControlExit, (caps.exit | acknowledge).into());
        vmcs.write(Field::ControlEntry, caps.entry.into());
        vmcs.write(Field::ControlExceptionBitmap, EXCEPTIONS.into());
        vmcs.write(Field::ControlMsrBitmap, self.bitmap.phys().as_u64());
        vmcs.write(Field::ControlEptPointer, ept_pointer(guest.root.as_u64(), guest.caps.npt_levels));
        if caps.has_timer() {
            self.local.timer = timer::UNUSED.into();
            vmcs.write(Field::GuestPreemptionTimer, self.local.timer);
        }
        if caps.has_pause_loop() {
            vmcs.write(Field::ControlPauseGap, PAUSE_GAP);
            vmcs.write(Field::ControlPauseWindow, PAUSE_WINDOW);
        }
        if caps.has_encls() {
            vmcs.write(Field::ControlEnclsBitmap, u64::MAX);
        }
        if caps.has_enclv() {
            vmcs.write(Field::ControlEnclvBitmap, u64::MAX);
        }
        for field in [
            Field::ControlPageFaultMask,
            Field::ControlPageFaultMatch,
            Field::ControlCr3TargetCount,
            Field::ControlExitMsrStoreCount,
            Field::ControlExitMsrLoadCount,
            Field::ControlEntryMsrLoadCount,
            Field::ControlEntryInterruption,
            Field::GuestDebugctl,
            Field::GuestActivity,
            Field::GuestPendingDebug,
            // The user's, which may be such as the CPU refuses here: `close_inner` loads them.
            Field::HostDsSelector,
            Field::HostEsSelector,
            Field::HostFsSelector,
            Field::HostGsSelector,
        ] {
            vmcs.write(field, 0);
        }
        vmcs.write(Field::GuestLinkPointer, u64::MAX);
    }

    /// What VMX fixes of CR0 and CR4.
    pub(super) fn fixed(&self) -> (Fixed, Fixed) {
        (self.caps.cr0, self.caps.cr4)
    }
}
