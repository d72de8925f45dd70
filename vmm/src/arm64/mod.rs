// SPDX-License-Identifier: MIT OR Apache-2.0
//! What is AArch64's own of the monitor, and under the names below what the rest uses of it: a small board with a device
//! tree.
//!
//! Its serial port is the same 16550 as on x86, at a memory address, rather than a PL011: one device with its tests is
//! enough, both are served by every kernel, and the console has the same name on both architectures.
//!
//! What can be tested without the CPU is compiled for tests on every machine.

pub mod boot;
pub mod device;
pub mod emulate;
pub mod fdt;
pub mod image;
pub mod layout;
pub mod paging;
pub mod power;
mod state;

#[cfg(target_arch = "aarch64")]
mod board;
#[cfg(target_arch = "aarch64")]
pub mod doctor;
#[cfg(target_arch = "aarch64")]
pub mod hypervisor;
#[cfg(target_arch = "aarch64")]
pub mod machine;
#[cfg(target_arch = "aarch64")]
pub mod vcpu;

#[cfg(target_arch = "aarch64")]
pub use {
    board::{create_vcpus, load, HAS_MODES, HAS_PORTS, NAME},
    hypervisor::{axvcpu, kvm, Arm64Vcpu as VcpuOps, Arm64Vm as VmOps},
    image::Loaded,
    machine::Machine,
    vcpu::Local,
};
