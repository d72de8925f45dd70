// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The architecture-independent core of axvcpu: the trait [`AxArchVCpu`] that every CPU virtualization backend implements,
//! [`AxVCpu`], which enforces the rules of that trait, and the nested-page-table engine ([`npt`]).
//!
//! Nothing here knows a kernel or an architecture. Frames, time and the FPU come from outside through [`AxVCpuHal`], so all
//! of it runs in ordinary tests and under Miri.
#![no_std]
#![forbid(unsafe_code)]

#[cfg(test)]
extern crate std;

mod addr;
mod arch;
pub mod changes;
pub mod dirty;
mod error;
mod hal;
pub mod npt;
pub mod regions;
mod vcpu;

pub use addr::HostPhysAddr;
pub use arch::{AxArchPerCpu, AxArchVCpu};
pub use axvcpu_uapi::addr::{GuestPhysAddr, GuestVirtAddr};
pub use axvcpu_uapi::exit::{AccessFlags, AccessWidth, AxVCpuExitReason};
pub use error::{AxError, AxResult, Errno};
pub use hal::AxVCpuHal;
pub use vcpu::{AxVCpu, SchedulingRecord, VCpuState};
