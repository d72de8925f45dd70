// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The window: everything of the host's and the guest's state that is switched once between bind and unbind, because the
//! host does not need its own while it only looks at exits. Beside the FPU (`window.rs` of the crate) that is debug registers,
//! TSC_AUX, XSS, DEBUGCTL, CR2 and PAT; and SVM itself is on.

use vcpu_core::AxResult;
use x86::msr;

use super::Svm;
use crate::cpu;
use crate::hal::X86Hal;
use crate::msr::TSC_AUX;
use crate::regs::DR7_ENABLES;
use crate::state::Guest;

const XSS: u32 = 0xda0;
const DEBUGCTL: u32 = 0x1d9;

/// The host's state during a window.
#[derive(Clone, Copy, Default)]
pub(super) struct HostState {
    xss: u64,
    cr2: u64,
    pat: u64,
    tsc_aux: u64,
    debugctl: u64,
}

impl<H: X86Hal> Svm<H> {
    /// Takes the CPU.
    pub(super) fn open_window(&mut self, guest: &mut Guest<H>) -> AxResult {
        let frame = &mut *self.regs.frame;
        // SAFETY: Preemption is off, so the record is this CPU's, and nobody else uses it until it is on again.
        let per_cpu = unsafe { H::per_cpu().as_mut() };
        self.local.cpu = per_cpu.cpu();
        guest.open_window(&mut frame.common, per_cpu);
        let enabled = per_cpu.svm().and_then(|svm| {
            svm.enable()?;
            Ok(svm.host_vmcb())
        });
        frame.host_vmcb = match enabled {
            Ok(host_vmcb) => host_vmcb,
            Err(error) => {
                guest.close_window();
                return Err(error);
            }
        };
        self.local.has_asid = false;
        let caps = &guest.caps;
        let host = &mut self.local.host;
        // SAFETY: Kernel context. MSRs that not every CPU has are only touched where CPUID has them. What is changed is put back by
        // `close_window`, and until then the caller runs nothing on this CPU that needs it: see `AxArchVCpu::bind`. EFER.SVME
        // has just been set, and the VMCB for the host's state is a frame.
        unsafe {
            cpu::vmsave(frame.host_vmcb);
            host.cr2 = cpu::cr2();
            guest.debug.open();
            host.pat = cpu::rdmsr(msr::IA32_PAT);
            host.debugctl = cpu::rdmsr(DEBUGCTL);
            if host.debugctl != 0 {
                cpu::wrmsr(DEBUGCTL, 0);
            }
            if caps.tsc_aux {
                host.tsc_aux = cpu::rdmsr(TSC_AUX);
                cpu::wrmsr(TSC_AUX, guest.msrs.tsc_aux);
            }
            // Guests can execute XSAVES whatever their CPUID says, and no intercept exists: with XSS zero it finds nothing.
            host.xss = if caps.xsaves { cpu::rdmsr(XSS) } else { 0 };
            if host.xss != 0 {
                cpu::wrmsr(XSS, 0);
            }
        }
        if self.regs.vmcb.dr7() & DR7_ENABLES != 0 {
            self.load_breakpoints(guest);
        }
        Ok(())
    }

    /// Loads DR0 to DR3, which most guests never touch.
    pub(super) fn load_breakpoints(&mut self, guest: &mut Guest<H>) {
        // SAFETY: Kernel context, in a window.
        unsafe { guest.debug.load() };
        self.regs.vmcb.set_intercept_dr(0);
    }

    /// Gives the CPU back.
    pub(super) fn close_window(&mut self, guest: &mut Guest<H>) -> AxResult {
        let host = self.local.host;
        // SAFETY: Kernel context, on the CPU and in the window of `open_window`, whose values these are.
        unsafe {
            if host.xss != 0 {
                cpu::wrmsr(XSS, host.xss);
            }
            if guest.caps.tsc_aux {
                cpu::wrmsr(TSC_AUX, host.tsc_aux);
            }
            if host.debugctl != 0 {
                cpu::wrmsr(DEBUGCTL, host.debugctl);
            }
            if cpu::rdmsr(msr::IA32_PAT) != host.pat {
                cpu::wrmsr(msr::IA32_PAT, host.pat);
            }
            guest.debug.close();
            cpu::set_cr2(host.cr2);
        }
        self.regs.vmcb.set_intercept_dr(u32::MAX);
        // SAFETY: As in `open_window`.
        let result = unsafe { H::per_cpu().as_mut() }.svm().map(|svm| svm.disable());
        guest.close_window();
        result
    }
}
