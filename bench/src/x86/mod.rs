// SPDX-License-Identifier: MIT OR Apache-2.0
//! What is x86's own.
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

use std::fs;

use crate::machine::Result;

/// Fields of /proc/cpuinfo that tell the CPU's model, and what to say before each.
pub(crate) const CPU_NAME: &[(&str, &str)] = &[("", "model name")];
/// The field with its features.
pub(crate) const FEATURES: &str = "flags";
/// Those on which a hypervisor's own barriers depend.
pub(crate) const BARRIER_FEATURES: &[&str] =
    &["ibrs", "ibpb", "stibp", "ssbd", "arch_capabilities", "md_clear", "flush_l1d", "nrip_save"];

/// Ticks for which a VM of KVM's comes and goes, most of them idle: more than in any of the labs.
pub(crate) const KVM_LIFE: u64 = 13_000_000;

/// The time-stamp counter.
#[inline]
pub(crate) fn ticks() -> u64 {
    // SAFETY: Every x86-64 CPU has RDTSC, and Linux lets user mode execute it.
    #[allow(unused_unsafe)]
    unsafe {
        std::arch::x86_64::_rdtsc()
    }
}

/// Its ticks per second, as the kernel has found them to be.
///
/// # Errors
/// If the kernel does not tell.
pub(crate) fn frequency() -> Result<f64> {
    // The only place where Linux tells user mode.
    let text = fs::read_to_string("/proc/cpuinfo")?;
    let line = text.lines().find(|line| line.starts_with("cpu MHz"));
    let mhz = line.and_then(|line| line.split(':').nth(1)?.trim().parse::<f64>().ok());
    Ok(mhz.ok_or("/proc/cpuinfo has no frequency")? * 1e6)
}
