// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The window: everything of the host's and the guest's state that is switched once between bind and unbind, because the
//! host does not need its own while it only looks at exits: FPU, XCR0, XSS, PKRU, debug registers, TSC_AUX, DEBUGCTL, CR2, PAT.

use vcpu_core::{AxArchPerCpu, AxResult};
use x86::msr;

use super::switch::{BARRIER_AT_EXIT, CLEAR_BUFFERS, REFILL_RSB, SWITCH_SPEC_CTRL, UNTRAIN_RETURNS};
use super::SvmVCpu;
use crate::cpu;
use crate::hal::X86Hal;
use crate::msr::{PRED_CMD, PRED_CMD_IBPB, SPEC_CTRL};
use crate::regs::{DR7_ENABLES, DR7_FIXED};

const TSC_AUX: u32 = 0xc000_0103;
const XSS: u32 = 0xda0;
const DEBUGCTL: u32 = 0x1d9;

/// The host's state during a window.
#[derive(Clone, Copy, Default)]
pub(super) struct HostState {
    xcr0: u64,
    xss: u64,
    pkru: u32,
    cr2: u64,
    dr6: u64,
    dr7: u64,
    /// DR0 to DR3, saved when the guest's are loaded.
    breakpoints: Option<[u64; 4]>,
    pat: u64,
    tsc_aux: u64,
    debugctl: u64,
}

impl<H: X86Hal> SvmVCpu<H> {
    /// Takes the CPU.
    pub(super) fn open_window(&mut self) -> AxResult {
        H::fpu_begin();
        // SAFETY: Preemption is off, so the record is this CPU's, and nobody else uses it until it is on again.
        let per_cpu = unsafe { H::per_cpu().as_mut() };
        if let Err(error) = per_cpu.hardware_enable() {
            H::fpu_end();
            return Err(error);
        }
        let mitigations = H::mitigations();
        let caps = self.guest.caps;
        let identity = self.local.identity;
        let host = &mut self.local.host;
        // SAFETY: Kernel context. MSRs that not every CPU has are only touched where CPUID has them, PKRU where CR4 has it
        // enabled. What is changed is put back by `close_window`, and until then the caller runs nothing on this CPU that
        // needs it: see `AxArchVCpu::bind`. EFER.SVME has just been set, and the VMCB for the host's state is a frame.
        unsafe {
            cpu::vmsave(per_cpu.host_vmcb());
            host.cr2 = cpu::cr2();
            (host.dr6, host.dr7) = cpu::debug_status_control();
            host.breakpoints = None;
            if host.dr7 & DR7_ENABLES != 0 {
                cpu::set_dr7(DR7_FIXED);
            }
            host.pat = cpu::rdmsr(msr::IA32_PAT);
            host.debugctl = cpu::rdmsr(DEBUGCTL);
            if host.debugctl != 0 {
                cpu::wrmsr(DEBUGCTL, 0);
            }
            if caps.tsc_aux {
                host.tsc_aux = cpu::rdmsr(TSC_AUX);
                cpu::wrmsr(TSC_AUX, self.guest.msrs.tsc_aux);
            }
            // Guests can execute XSAVES whatever their CPUID says, and no intercept exists: with XSS zero it finds nothing.
            host.xss = if caps.xsaves { cpu::rdmsr(XSS) } else { 0 };
            if host.xss != 0 {
                cpu::wrmsr(XSS, 0);
            }
            if caps.branch_barrier && mitigations.branch_barrier && per_cpu.last_vcpu != identity {
                cpu::wrmsr(PRED_CMD, PRED_CMD_IBPB);
            }
            if caps.protection_keys {
                host.pkru = cpu::pkru();
            }
            host.xcr0 = cpu::xcr0();
            self.guest.fpu.load();
            if self.guest.xcr0 != host.xcr0 {
                cpu::set_xcr0(self.guest.xcr0);
            }
        }
        per_cpu.last_vcpu = identity;
        let frame = &mut self.regs.frame;
        frame.host_vmcb = per_cpu.host_vmcb();
        frame.flags = 0;
        if caps.spec_ctrl && !caps.virtual_spec_ctrl {
            // SAFETY: Kernel context, and the CPU has it.
            frame.host_spec_ctrl = unsafe { cpu::rdmsr(SPEC_CTRL) };
            if frame.host_spec_ctrl != frame.guest_spec_ctrl {
                frame.flags |= SWITCH_SPEC_CTRL;
            }
        }
        if mitigations.refill_rsb {
            frame.flags |= REFILL_RSB;
        }
        if mitigations.clear_buffers {
            frame.flags |= CLEAR_BUFFERS;
        }
        if mitigations.untrain_returns {
            frame.flags |= UNTRAIN_RETURNS;
        }
        if caps.branch_barrier && mitigations.barrier_at_exit {
            frame.flags |= BARRIER_AT_EXIT;
        }
        self.local.cpu = per_cpu.cpu();
        if self.regs.vmcb.dr7() & DR7_ENABLES != 0 {
            self.load_breakpoints();
        }
        Ok(())
    }

    /// Loads DR0 to DR3, which most guests never touch.
    pub(super) fn load_breakpoints(&mut self) {
        if self.local.host.breakpoints.is_some() {
            return;
        }
        // SAFETY: Kernel context, in a window, so DR7 has no breakpoint enabled: `open_window` has seen to it, and so does
        // every exit.
        unsafe {
            self.local.host.breakpoints = Some(cpu::breakpoints());
            cpu::set_breakpoints(self.guest.breakpoints);
        }
        self.regs.vmcb.set_intercept_dr(0);
    }

    /// Gives the CPU back.
    pub(super) fn close_window(&mut self) -> AxResult {
        let caps = self.guest.caps;
        let host = &mut self.local.host;
        // SAFETY: Kernel context, on the CPU and in the window of `open_window`, whose values these are.
        unsafe {
            if self.guest.xcr0 != host.xcr0 {
                cpu::set_xcr0(host.xcr0);
            }
            self.guest.fpu.save();
            if caps.protection_keys {
                cpu::set_pkru(host.pkru);
            }
            if host.xss != 0 {
                cpu::wrmsr(XSS, host.xss);
            }
            if caps.tsc_aux {
                cpu::wrmsr(TSC_AUX, host.tsc_aux);
            }
            if host.debugctl != 0 {
                cpu::wrmsr(DEBUGCTL, host.debugctl);
            }
            if cpu::rdmsr(msr::IA32_PAT) != host.pat {
                cpu::wrmsr(msr::IA32_PAT, host.pat);
            }
            if let Some(breakpoints) = host.breakpoints.take() {
                self.guest.breakpoints = cpu::breakpoints();
                cpu::set_breakpoints(breakpoints);
                self.regs.vmcb.set_intercept_dr(u32::MAX);
            }
            cpu::set_dr6(host.dr6);
            cpu::set_dr7(host.dr7);
            cpu::set_cr2(host.cr2);
        }
        // SAFETY: As in `open_window`.
        let result = unsafe { H::per_cpu().as_mut() }.hardware_disable();
        H::fpu_end();
        result
    }
}
