// SPDX-License-Identifier: GPL-2.0-only
//! What the AArch64 backend asks of Linux.

use arm_vcpu::ArmHal;

use crate::hal::Host;

mod raw {
    extern "C" {
        pub(super) fn axvcpu_timer_intid() -> u32;
        pub(super) fn axvcpu_hold_timer_irq(hold: bool);
    }
}

impl ArmHal for Host {
    fn timer_interrupt() -> Option<u32> {
        // SAFETY: No precondition: what it returns was found out at the module's load.
        Some(unsafe { raw::axvcpu_timer_intid() }).filter(|intid| *intid != 0)
    }

    fn hold_timer_interrupt(hold: bool) {
        // SAFETY: Interrupts are off by the trait's contract, so this stays on its CPU, whose interrupt it is; and the interrupt is
        // known, or `timer_interrupt` would not have told of it.
        unsafe { raw::axvcpu_hold_timer_irq(hold) }
    }
}
