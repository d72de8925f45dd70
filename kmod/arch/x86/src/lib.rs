// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! x86-64 vCPUs.
#![no_std]

#[cfg(test)]
extern crate std;

pub mod apic;
pub mod fault;
pub mod mtrr;
pub mod pvclock;
