// SPDX-License-Identifier: MIT OR Apache-2.0
//! A virtual machine monitor for `/dev/axvcpu` and KVM, as a library: the program `axvmm` is a thin layer over it.
//!
//! Pieces that other monitors may want on their own:
//! - [`emulate`] and [`paging`]: executes single guest instructions for MMIO and string I/O;
//! - [`device`]: a device bus and the devices of a small PC;
//! - [`image`], [`boot`], [`acpi`]: loads kernels of four formats and says how to start them;
//! - [`hypervisor`]: what all this needs of a hypervisor, as a small trait;
//! - [`config`]: the configuration file, with errors that point at the place.
//!
//! [`vm`] puts them together and runs a VM.

pub mod acpi;
pub mod affinity;
pub mod boot;
pub mod config;
pub mod control;
pub mod cpuid;
pub mod device;
pub mod doctor;
pub mod emulate;
pub mod error;
pub mod events;
pub mod exit;
pub mod hypervisor;
pub mod image;
pub mod layout;
pub mod machine;
pub mod memory;
pub mod paging;
pub mod sandbox;
pub mod stats;
pub mod terminal;
pub mod threads;
pub mod vcpu;
pub mod vm;
