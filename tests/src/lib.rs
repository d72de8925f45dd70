// SPDX-License-Identifier: MIT OR Apache-2.0
//! Tests that need the real thing: `axvcpu.ko` loaded, a CPU with a virtualization extension, and `/dev/axvcpu`.
//!
//! Three programs share this crate. `axvcpu-guests` runs a table of small assembled guests, one behaviour each, on
//! whatever backend the module chose, or on KVM ([`guests`], [`hypervisor`]). `axvcpu-abuse` calls every ioctl in every
//! wrong way that its author could think of and compares the errno with axvcpu(4) ([`abuse`]). `axvcpu-load` runs in a
//! Linux guest and keeps its CPUs busy with each other ([`load`]). All print one line for each case ([`harness`]) and
//! need nothing but themselves, so they can be linked statically and dropped into an initramfs.

pub mod abuse;
pub mod code;
#[cfg(target_arch = "x86_64")]
pub mod cpus;
pub mod eventfd;
#[cfg(target_arch = "x86_64")]
pub mod flaws;
#[cfg(target_arch = "x86_64")]
pub mod guests;
#[cfg(target_arch = "aarch64")]
#[path = "arm64/guests/mod.rs"]
pub mod guests;
pub mod harness;
#[cfg(target_arch = "x86_64")]
pub mod hypervisor;
pub mod load;
#[cfg(target_arch = "x86_64")]
pub mod machine;
#[cfg(target_arch = "aarch64")]
#[path = "arm64/machine.rs"]
pub mod machine;
#[cfg(target_arch = "x86_64")]
pub mod peer;
pub mod pin;
pub mod random;
pub mod raw;
