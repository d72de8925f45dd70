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

use super::capabilities::{ept_pointer, Fixed};
use super::fields::Field;
use super::instructions::{self, Selectors, Table};
use super::registers::{Vmcs, CR4_VMXE, SYSCALL_MSRS};
use super::{Vmx, EXCEPTIONS, PAUSE_GAP, PAUSE_WINDOW, TURN_MS};
use crate::cpu;
use crate::cpuid::Feature;
use crate::hal::X86Hal;
use crate::msr::TSC_AUX;
use crate::regs::DR7_ENABLES;
use crate::state::{Guest, Registers};
use crate::switch::LAUNCHED;

const DEBUGCTL: u32 = 0x1d9;
/// VMPTRST: no VMCS is current.
const NONE: u64 = u64::MAX;

/// The host's state during the inner window.
#[derive(Clone, Copy, Default)]
pub(super) struct Inner {
    cr4: u64,
    /// The VMCS that was current, if VMX was on.
    previous: Option<u64>,
    gdtr: Table,
    idtr: Table,
    selectors: Selectors,
    fs_base: u64,
    syscall: [u64; 5],
    tsc_aux: u64,
    debugctl: u64,
    cr2: u64,
}

impl<H: X86Hal> Vmx<H> {
    /// Opens the inner window. Interrupts are off, and stay off until `close_inner`.
    ///
    /// # Errors
    /// [`AxError::HardwareLost`], with everything as it was.
    pub(super) fn open_inner(&mut self, guest: &mut Guest<H>) -> AxResult {
        // SAFETY: The vCPU is bound: preemption is off, so the record is this CPU's and nobody else uses it meanwhile.
        let region = unsafe { H::per_cpu().as_mut() }.vmx()?.region();
        let own = self.vmcs.phys().as_u64();
        let inner = &mut self.local.inner;
        // SAFETY: Kernel context with interrupts off. CR4 gets VMXE only, which VMX asks for; the region begins with the
        // revision and is this CPU's own. A VMCS that is current and not ours is put back in `close_inner`.
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
        let saved = self.save_host(guest);
        if saved.is_err() {
            self.close_vmx();
        }
        saved?;
        self.load_guest(guest);
        // VMCLEAR has reset it.
        self.regs.frame.flags &= !LAUNCHED;
        self.regs.state.live = true;
        Ok(())
    }

    /// Saves the host's state, and writes it and, the first time, the controls to the VMCS.
    fn save_host(&mut self, guest: &mut Guest<H>) -> AxResult {
        // SAFETY: Interrupts are off in the inner window, and `open_inner` has made our VMCS current.
        let mut vmcs = unsafe { Vmcs::current() };
        if !self.local.initialised {
            self.write_controls(guest, &mut vmcs);
        }
        let caps = &guest.caps;
        let inner = &mut self.local.inner;
        // SAFETY: Kernel context; all of these MSRs exist on a CPU with VMX, but for TSC_AUX.
        unsafe {
            (inner.gdtr, inner.idtr) = instructions::descriptor_tables();
            inner.selectors = instructions::selectors();
            inner.fs_base = cpu::rdmsr(msr::IA32_FS_BASE);
            for (slot, index) in inner.syscall.iter_mut().zip(SYSCALL_MSRS) {
                *slot = cpu::rdmsr(index);
            }
            if caps.tsc_aux {
                inner.tsc_aux = cpu::rdmsr(TSC_AUX);
            }
            inner.debugctl = cpu::rdmsr(DEBUGCTL);
            inner.cr2 = cpu::cr2();
            let (cr0, cr3) = instructions::cr0_cr3();
            vmcs.write(Field::HostCr0, cr0);
            vmcs.write(Field::HostCr3, cr3);
            vmcs.write(Field::HostCr4, inner.cr4 | CR4_VMXE);
            vmcs.write(Field::HostGsBase, cpu::rdmsr(msr::IA32_GS_BASE));
            vmcs.write(Field::HostSysenterCs, cpu::rdmsr(msr::IA32_SYSENTER_CS));
            vmcs.write(Field::HostSysenterEsp, cpu::rdmsr(msr::IA32_SYSENTER_ESP));
            vmcs.write(Field::HostSysenterEip, cpu::rdmsr(msr::IA32_SYSENTER_EIP));
            vmcs.write(Field::HostPat, cpu::rdmsr(msr::IA32_PAT));
            vmcs.write(Field::HostEfer, cpu::rdmsr(msr::IA32_EFER));
        }
        vmcs.write(Field::HostFsBase, inner.fs_base);
        let selectors = inner.selectors;
        vmcs.write(Field::HostCsSelector, selectors.cs.into());
        vmcs.write(Field::HostSsSelector, selectors.ss.into());
        vmcs.write(Field::HostTrSelector, selectors.tr.into());
        // The user's, which may be such as the CPU refuses here: `close_inner` loads them.
        for field in [Field::HostDsSelector, Field::HostEsSelector, Field::HostFsSelector, Field::HostGsSelector] {
            vmcs.write(field, 0);
        }
        vmcs.write(Field::HostGdtrBase, inner.gdtr.base);
        vmcs.write(Field::HostIdtrBase, inner.idtr.base);
        // SAFETY: The host's GDT has a 16-byte descriptor of the TSS that TR refers to.
        let tss = unsafe { tss_base(&inner.gdtr, selectors.tr) };
        vmcs.write(Field::HostTrBase, tss);
        vmcs.finish()?;
        self.local.initialised = true;
        Ok(())
    }

    /// Loads the guest's state that the VMCS does not switch.
    fn load_guest(&mut self, guest: &mut Guest<H>) {
        let state = &self.regs.state;
        // SAFETY: Kernel context; the guest's values have been checked when they were set, or come from the CPU itself.
        // Breakpoints are disabled as long as those of host and guest are mixed.
        unsafe {
            guest.debug.open();
            for (&value, index) in state.syscall.iter().zip(SYSCALL_MSRS) {
                cpu::wrmsr(index, value);
            }
            if guest.caps.tsc_aux {
                cpu::wrmsr(TSC_AUX, guest.msrs.tsc_aux);
            }
            cpu::set_cr2(state.cr2);
            if self.regs.dr7() & DR7_ENABLES != 0 {
                guest.debug.load();
            }
        }
    }

    /// Closes the inner window: everything of the host's is as it was, and interrupts can go on.
    pub(super) fn close_inner(&mut self, guest: &mut Guest<H>) -> AxResult {
        if !self.regs.state.live {
            return Ok(());
        }
        // SAFETY: Interrupts are off in the inner window, in which our VMCS is current.
        let mut vmcs = unsafe { Vmcs::current() };
        self.regs.read_window(&mut vmcs);
        let read = vmcs.finish();
        self.regs.state.live = false;
        self.close_vmx();
        let inner = &mut self.local.inner;
        let state = &mut *self.regs.state;
        // SAFETY: Kernel context, on the CPU and in the window of `open_inner`, whose values these are.
        let loaded = unsafe {
            state.cr2 = cpu::cr2();
            for ((slot, index), &host) in state.syscall.iter_mut().zip(SYSCALL_MSRS).zip(&inner.syscall) {
                *slot = cpu::rdmsr(index);
                if *slot != host {
                    cpu::wrmsr(index, host);
                }
            }
            if guest.caps.tsc_aux {
                cpu::wrmsr(TSC_AUX, inner.tsc_aux);
            }
            guest.debug.close();
            cpu::set_cr2(inner.cr2);
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
                let [_, _, _, _, kernel_gs_base] = inner.syscall;
                instructions::load_gs_selector(selectors.gs);
                cpu::wrmsr(msr::IA32_KERNEL_GSBASE, kernel_gs_base);
            }
            loaded
        };
        read.and(loaded)
    }

    /// Gives our VMCS up, and VMX back as `open_inner` found it. What fails here has been switched off by somebody else.
    fn close_vmx(&mut self) {
        let own = self.vmcs.phys().as_u64();
        let inner = &self.local.inner;
        // SAFETY: Kernel context with interrupts off since `open_inner`; the VMCS is ours, the previous one was current before,
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
        vmcs.write(Field::ControlExit, caps.exit.into());
        vmcs.write(Field::ControlEntry, caps.entry.into());
        vmcs.write(Field::ControlExceptionBitmap, EXCEPTIONS.into());
        vmcs.write(Field::ControlMsrBitmap, self.bitmap.phys().as_u64());
        vmcs.write(Field::ControlEptPointer, ept_pointer(guest.root.as_u64(), guest.caps.npt_levels));
        if caps.has_timer() {
            let ticks = u64::from(H::tsc_khz()).saturating_mul(TURN_MS) >> caps.timer_shift;
            vmcs.write(Field::GuestPreemptionTimer, ticks.clamp(1, u32::MAX.into()));
        }
        if caps.has_pause_loop() {
            vmcs.write(Field::ControlPauseGap, PAUSE_GAP);
            vmcs.write(Field::ControlPauseWindow, PAUSE_WINDOW);
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

/// Base of the TSS that `selector` refers to in `gdt`.
///
/// # Safety
/// `gdt` is the host's, and has a 16-byte descriptor there.
unsafe fn tss_base(gdt: &Table, selector: u16) -> u64 {
    let at = gdt.base as *const u8;
    // SAFETY: The caller's promise.
    let [low, high] = unsafe { at.add(usize::from(selector & !7)).cast::<[u64; 2]>().read_unaligned() };
    base_of_descriptor(low, high)
}

/// The base in the two halves of a system descriptor of 64-bit mode (SDM vol. 3 figure 8-4).
const fn base_of_descriptor(low: u64, high: u64) -> u64 {
    low >> 16 & 0xff_ffff | low >> 56 << 24 | high << 32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bases_are_put_together_from_four_pieces() {
        assert_eq!(base_of_descriptor(0x7800_8b45_6000_0067, 0xffff_fe12), 0xffff_fe12_7845_6000);
    }
}
