// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! x86-64 vCPUs: register sets and what they may hold, local APIC, CPUID and MSR policy, events, FPU, and the hardware
//! backends. [`X86VCpu`] is what the module uses; it implements [`AxArchVCpu`](vcpu_core::AxArchVCpu).
//!
//! Nothing here knows a kernel: frames, time, the FPU and per-CPU storage come through [`X86Hal`]. What does not execute
//! privileged instructions runs in ordinary tests and under Miri. What does is in `cpu.rs` and `vmx/instructions.rs` (single
//! instructions), `svm/switch.rs` and `vmx/switch.rs` (the world switches).
//!
//! - `state` is the part of a vCPU that is the same for all backends, over `state::Registers`, which a backend implements;
//!   `msr`, `regs`, `events`, `fpu`, `length` and `linear` belong to it, and the public modules.
//! - `svm` is the backend for AMD, `vmx` the one for Intel.
#![no_std]

#[cfg(test)]
extern crate std;

pub mod apic;
mod caps;
mod cpu;
pub mod cpuid;
mod events;
pub mod fault;
mod fpu;
mod frame;
mod hal;
mod length;
mod linear;
mod msr;
pub mod mtrr;
mod nested;
mod percpu;
pub mod pvclock;
mod regs;
mod state;
mod svm;
mod table;
#[cfg(test)]
mod testing;
mod vcpu;
mod vmx;

pub use caps::{branch_barrier, detect, extension, in_use, missing_feature, read_tsc, Backend, Capabilities};
pub use hal::{Mitigations, X86Hal};
pub use percpu::X86PerCpu;
pub use state::Reply;
pub use svm::{PermissionMaps, SvmVCpu};
pub use table::NestedTable;
pub use vcpu::{load_cpuid, supported_cpuid, InsnInfo, X86CreateConfig, X86SetupConfig, X86VCpu};
pub use vmx::VmxVCpu;
