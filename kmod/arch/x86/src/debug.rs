// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The debug registers that no control block holds: the guest's DR0 to DR3, and what of the host's makes room for them in a
//! window. Most guests never touch them, so they are loaded when a guest does.

use crate::cpu;
use crate::regs::{DR7_ENABLES, DR7_FIXED};

/// DR0 to DR3 of a vCPU, and the host's debug registers in a window.
#[derive(Debug, Default)]
pub(crate) struct DebugRegisters {
    /// The guest's, while they are not in the CPU.
    guest: [u64; 4],
    /// The host's, while the guest's are in the CPU.
    host: Option<[u64; 4]>,
    host_dr6: u64,
    host_dr7: u64,
}

impl DebugRegisters {
    /// The guest's DR0 to DR3, outside of a window.
    pub(crate) fn get(&self) -> [u64; 4] {
        self.guest
    }

    /// Sets the guest's DR0 to DR3, at any time.
    pub(crate) fn set(&mut self, breakpoints: [u64; 4]) {
        self.guest = breakpoints;
        if self.loaded() {
            // SAFETY: They are in the CPU, so this is a window, in which breakpoints are enabled in the guest only.
            unsafe { cpu::set_breakpoints(breakpoints) };
        }
    }

    /// Whether the guest's DR0 to DR3 are in the CPU.
    pub(crate) fn loaded(&self) -> bool {
        self.host.is_some()
    }

    /// Begins a window: saves what of the host's every exit destroys, and disables its breakpoints.
    ///
    /// # Safety
    /// At CPL 0. Until [`close`](Self::close) on the same CPU the host does without breakpoints.
    pub(crate) unsafe fn open(&mut self) {
        self.host = None;
        // SAFETY: The caller's promise.
        unsafe {
            (self.host_dr6, self.host_dr7) = cpu::debug_status_control();
            if self.host_dr7 & DR7_ENABLES != 0 {
                cpu::set_dr7(DR7_FIXED);
            }
        }
    }

    /// Loads the guest's DR0 to DR3, if they are not loaded yet.
    ///
    /// # Safety
    /// At CPL 0, in a window.
    pub(crate) unsafe fn load(&mut self) {
        if self.loaded() {
            return;
        }
        // SAFETY: The caller's promise. DR7 has no breakpoint enabled: `open` has seen to it, and so does every exit.
        unsafe {
            self.host = Some(cpu::breakpoints());
            cpu::set_breakpoints(self.guest);
        }
    }

    /// Ends a window.
    ///
    /// # Safety
    /// At CPL 0, on the CPU of [`open`](Self::open).
    pub(crate) unsafe fn close(&mut self) {
        // SAFETY: The caller's promise; the values are the host's own.
        unsafe {
            if let Some(host) = self.host.take() {
                self.guest = cpu::breakpoints();
                cpu::set_breakpoints(host);
            }
            cpu::set_dr6(self.host_dr6);
            cpu::set_dr7(self.host_dr7);
        }
    }
}
