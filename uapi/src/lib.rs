// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The axvcpu ABI: the one contract between `axvcpu.ko` and the programs that use `/dev/axvcpu`.
//!
//! Everything here is plain data with a fixed layout, the same bytes on every architecture: argument structures
//! ([`system`], [`vm`], [`aspace`], [`vcpu`]), the [`run`] page that a vCPU shares with its thread, [`exit`] reasons, and
//! the register sets of each architecture ([`x86`], [`arm64`]). The feature `client` adds safe handles (module `client`).
//!
//! Rules that hold for every structure:
//! - its size is part of the ioctl number, so a caller built against another layout gets `ENOTTY`, not a misreading;
//! - reserved fields and unknown flag bits must be zero, otherwise `EINVAL`;
//! - integers are in the machine's (little-endian) order, and there is no implicit padding.
//!
//! The prose form of this contract is the manual page axvcpu(4).
#![no_std]
#![deny(unsafe_code)]
#![cfg_attr(not(feature = "client"), forbid(unsafe_code))]

#[cfg(any(test, feature = "client"))]
extern crate std;

pub mod addr;
pub mod arm64;
pub mod aspace;
#[cfg(feature = "client")]
pub mod client;
pub mod exit;
pub mod ioctl;
mod layout;
pub mod run;
pub mod system;
pub mod vcpu;
pub mod vm;
pub mod x86;

pub use layout::AbiStruct;

/// Version of the ABI described by this crate. It changes only when an existing structure or meaning changes
/// incompatibly; additions are announced by feature bits in [`system::SystemInfo::features`].
pub const ABI_VERSION: u32 = 1;

/// Path of the device node.
pub const DEVICE_PATH: &str = "/dev/axvcpu";
