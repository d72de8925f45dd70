// SPDX-License-Identifier: MIT OR Apache-2.0
//! What is AArch64's own.
//!
//! | file | owns |
//! |---|---|
//! | `cases.rs` | what the guest of each row does |
//! | `guest.rs` | what all guests have in common |
//! | `axvcpu.rs`, `kvm.rs` | machines of the two hypervisors |
//! | this file | the counter, and what `/proc/cpuinfo` calls things |

pub(crate) mod axvcpu;
pub(crate) mod cases;
pub(crate) mod guest;
pub(crate) mod kvm;

pub(crate) use guest::{assemble, NOP};

use std::arch::asm;

use crate::machine::Result;

/// Fields of /proc/cpuinfo that tell the CPU's model, and what to say before each.
pub(crate) const CPU_NAME: &[(&str, &str)] =
    &[("implementer ", "CPU implementer"), ("part ", "CPU part"), ("r", "CPU variant"), ("p", "CPU revision")];
/// The field with its features.
pub(crate) const FEATURES: &str = "Features";
/// Those on which a hypervisor's own barriers depend.
pub(crate) const BARRIER_FEATURES: &[&str] = &["ssbs", "sb", "dit", "bti", "paca", "sve", "mte"];

/// Ticks for which a VM of KVM's comes and goes, most of them idle.
pub(crate) const KVM_LIFE: u64 = 107_000_000;

/// The virtual counter, which is as far as the host's physical one.
#[inline]
pub(crate) fn ticks() -> u64 {
    let counter;
    // SAFETY: Linux lets user mode read it; the barrier keeps the read from coming early.
    unsafe { asm!("isb", "mrs {}, cntvct_el0", out(reg) counter, options(nostack, preserves_flags)) };
    counter
}

/// Its ticks per second. scripts/bench has them be as many as instructions.
///
/// # Errors
/// None.
pub(crate) fn frequency() -> Result<f64> {
    let hertz: u64;
    // SAFETY: User mode may always read it.
    unsafe { asm!("mrs {}, cntfrq_el0", out(reg) hertz, options(nomem, nostack, preserves_flags)) };
    Ok(hertz as f64)
}
