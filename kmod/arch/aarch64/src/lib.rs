// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! AArch64 vCPUs on a host kernel that runs at EL2 (VHE).
//!
//! Nothing here knows a kernel: frames, time and the FPU come through [`AxVCpuHal`](vcpu_core::AxVCpuHal).
//!
//! - What an exit means and what a guest is told of the CPU is plain logic, which every machine can test: `syndrome`,
//!   `exit`, `sysreg`, `id`, `psci`, `exception`, `stage2`, `timer`, `history`, and `gic` but for its hardware.
//! - What executes privileged instructions exists on AArch64 only: `cpu` (single instructions and registers), `switch` (the
//!   world switch), `window` (what is loaded for a stretch of entries), and around them `caps`, `interrupts` and `vcpu`.
#![no_std]

#[cfg(test)]
extern crate std;

pub mod exception;
pub mod exit;
pub mod frame;
pub mod gic;
mod hal;
pub mod history;
pub mod id;
pub mod psci;
pub mod stage2;
pub mod syndrome;
pub mod sysreg;
pub mod timer;

#[cfg(target_arch = "aarch64")]
mod caps;
#[cfg(target_arch = "aarch64")]
mod cpu;
#[cfg(target_arch = "aarch64")]
mod interrupts;
#[cfg(target_arch = "aarch64")]
mod switch;
#[cfg(target_arch = "aarch64")]
mod vcpu;
#[cfg(target_arch = "aarch64")]
mod window;

#[cfg(target_arch = "aarch64")]
pub use caps::{counter_khz, detect, missing_feature, Capabilities};
#[cfg(target_arch = "aarch64")]
pub use cpu::{barrier_for_tables, clean_and_invalidate};
pub use hal::ArmHal;
#[cfg(target_arch = "aarch64")]
pub use interrupts::{Mailbox, TimerUpdate};
pub use stage2::NestedTable;
#[cfg(target_arch = "aarch64")]
pub use vcpu::{ArmCreateConfig, ArmPerCpu, ArmSetupConfig, ArmVCpu, Reply};
#[cfg(target_arch = "aarch64")]
pub use window::counter;
