// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! x86-64 vCPUs.
#![no_std]

#[cfg(test)]
extern crate std;

pub mod apic;
pub mod cpuid;
pub mod fault;
mod frame;
pub mod mtrr;
pub mod pvclock;
