// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The part of the window between bind and unbind that is the same for all backends: the FPU with XCR0 and PKRU, and the
//! barrier against what another vCPU, or the host's user, could learn or steer by branch predictions.

use crate::cpu;
use crate::hal::X86Hal;
use crate::msr::{PRED_CMD, PRED_CMD_IBPB};
use crate::percpu::X86PerCpu;
use crate::state::Guest;
use crate::switch;

/// The host's state during a window.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct HostState {
    xcr0: u64,
    pkru: u32,
    /// Barrier at the end of the window.
    barrier: bool,
}

impl<H: X86Hal> Guest<H> {
    /// Opens the window: loads the guest's FPU state, and sets `frame`'s flags. `per_cpu` is the CPU's record. Preemption is off
    /// until [`close_window`](Self::close_window).
    #[inline]
    pub(crate) fn open_window(&mut self, frame: &mut switch::Frame, per_cpu: &mut X86PerCpu<H>) {
        H::fpu_begin();
        let mitigations = &per_cpu.mitigations;
        let caps = &self.caps;
        let host = &mut self.host;
        host.barrier = caps.branch_barrier && mitigations.barrier_before_user;
        // SAFETY: Kernel context. What not every CPU has is only touched where CPUID, and for PKRU CR4, has it. What is changed
        // is put back by `close_window`, and until then the caller runs nothing on this CPU that needs it.
        unsafe {
            if caps.branch_barrier && mitigations.branch_barrier && per_cpu.last_vcpu != self.identity {
                cpu::wrmsr(PRED_CMD, PRED_CMD_IBPB);
            }
            if caps.protection_keys {
                host.pkru = cpu::pkru();
            }
            host.xcr0 = cpu::xcr0();
            self.fpu.load();
            if self.xcr0 != host.xcr0 {
                cpu::set_xcr0(self.xcr0);
            }
            frame.open(caps, per_cpu.flags);
        }
        per_cpu.last_vcpu = self.identity;
    }

    /// Closes the window.
    #[inline]
    pub(crate) fn close_window(&mut self) {
        let host = self.host;
        // SAFETY: Kernel context, on the CPU and in the window of `open_window`, whose values these are.
        unsafe {
            if self.xcr0 != host.xcr0 {
                cpu::set_xcr0(host.xcr0);
            }
            self.fpu.save();
            if self.caps.protection_keys {
                cpu::set_pkru(host.pkru);
            }
            if host.barrier {
                // Preemption may let another task's user code run here at once, so there is no later place for it.
                cpu::wrmsr(PRED_CMD, PRED_CMD_IBPB);
            }
        }
        H::fpu_end();
    }
}
