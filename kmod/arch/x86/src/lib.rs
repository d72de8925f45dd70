// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! x86-64 vCPUs: register sets and what they may hold, local APIC, CPUID and MSR policy, events, FPU, and the hardware
//! backends. [`X86VCpu`] is what the module uses; it implements [`AxArchVCpu`](vcpu_core::AxArchVCpu).
//!
//! Nothing here knows a kernel: frames, time, the FPU and per-CPU storage come through [`X86Hal`]. What does not execute
//! privileged instructions runs in ordinary tests and under Miri. What does is in `cpu.rs` and `vmx/instructions.rs` (single
//! instructions), `switch.rs`, `svm/switch.rs` and `vmx/switch.rs` (the world switches), and `host_interrupt.rs`.
//!
//! - `backend` says what a virtualization extension does, in the architecture's terms: `svm` does it on AMD, `vmx` on Intel.
//! - `vcpu` is all that is the same for both: `state` the vCPU but for its registers, `turn` its turns and `exit` what is done about
//!   the end of one, `window` and `debug` what is switched between host and guest beside the backend's control block; `msr`, `arch_capabilities`,
//!   `regs`, `events`, `fpu`, `length`, `linear` and the public modules belong to it.
#![no_std]

#[cfg(test)]
extern crate std;

pub mod apic;
mod arch_capabilities;
mod backend;
mod caps;
mod cpu;
pub mod cpuid;
mod debug;
mod events;
mod exit;
pub mod fault;
mod fpu;
mod frame;
mod hal;
mod host_interrupt;
mod length;
mod linear;
mod mitigations;
mod msr;
pub mod mtrr;
mod nested;
mod percpu;
pub mod pvclock;
mod regs;
mod state;
mod svm;
mod switch;
mod table;
#[cfg(test)]
mod testing;
mod turn;
mod vcpu;
mod vmx;
mod window;

pub use caps::{detect, extension, in_use, missing_feature, read_tsc, Backend, Capabilities};
pub use exit::Reply;
pub use hal::X86Hal;
pub use host_interrupt::HostInterrupt;
pub use mitigations::{HostFlags, L1dFlush, Mitigations};
pub use percpu::X86PerCpu;
pub use svm::PermissionMaps;
pub use table::{new_table, NestedTable};
pub use turn::{PageFault, Turns};
pub use vcpu::{load_cpuid, supported_cpuid, InsnInfo, X86CreateConfig, X86SetupConfig, X86VCpu};
