// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! What the backend asks of the kernel beyond what every backend does.

use vcpu_core::AxVCpuHal;

/// Services of an AArch64 host.
pub trait ArmHal: AxVCpuHal {
    /// The INTID of the virtual timer's interrupt at this host's interrupt controller, if
    /// [`hold_timer_interrupt`](Self::hold_timer_interrupt) can be used.
    fn timer_interrupt() -> Option<u32>;

    /// Makes the current CPU's virtual timer interrupt active at the interrupt controller, so that it does not come again before
    /// it is deactivated, or inactive. Interrupts are off.
    fn hold_timer_interrupt(hold: bool);
}
