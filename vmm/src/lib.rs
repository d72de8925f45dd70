// SPDX-License-Identifier: MIT OR Apache-2.0
//! A virtual machine monitor for `/dev/axvcpu` and KVM, as a library: the program `axvmm` is a thin layer over it.
//!
//! Pieces that other monitors may want on their own:
//! - [`device`]: a device bus and a serial port; the other devices of a small PC are in `x86::device`;
//! - [`image`]: what loading kernels has in common; the formats and how to start them are the architectures';
//! - [`hypervisor`]: what all this needs of a hypervisor, as a small trait;
//! - [`config`]: the configuration file, with errors that point at the place;
//! - `x86::emulate` and `x86::paging`: executes single guest instructions for MMIO and string I/O.
//!
//! [`vm`] puts them together and runs a VM. What only one architecture has is in `x86/` or `arm64/`; the one that the program
//! is built for is [`arch`], under whose names the rest uses it.

#[cfg(any(target_arch = "aarch64", test))]
pub mod arm64;
#[cfg(target_arch = "x86_64")]
pub mod x86;

#[cfg(target_arch = "aarch64")]
pub use arm64 as arch;
#[cfg(target_arch = "x86_64")]
pub use x86 as arch;

pub mod affinity;
pub mod config;
pub mod control;
pub mod device;
pub mod doctor;
pub mod error;
pub mod events;
pub mod exit;
pub mod hypervisor;
pub mod image;
pub mod memory;
pub mod sandbox;
pub mod stats;
pub mod terminal;
pub mod threads;
pub mod vcpu;
pub mod vm;
