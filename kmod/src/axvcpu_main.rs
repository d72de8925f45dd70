// SPDX-License-Identifier: GPL-2.0-only
//! The kernel module: `/dev/axvcpu`.
//!
//! What is where: `device` and `system` the device, `vm`, `aspace` and `vcpu` the objects behind file descriptors (`fd`), `run` the loop
//! that runs a guest, `irqfd` and `ioeventfd` what eventfds (`eventfd`) do in a VM, `shared` what threads and interrupts may
//! touch of a vCPU at any time, `timer` its time, `notifier` and `tables` what an address space is made of, `published`
//! tables that are read without a lock, `percpu` and `hal` the host as the backends see it, `ffi` the calls into
//! C. What only one architecture has is in `arch`: `x86/` or `arm64/`. The backends themselves are the crates `x86_vcpu`
//! and `arm_vcpu`, the rules of the trait and the page tables `vcpu_core`, the structures of the ABI `axvcpu_uapi`.
//!
//! Locks, outermost first: `Vm::creation`, `Irqfds::list`, `IoEventfds::changes`, `Vcpu::inner` (never two of these),
//! `AddressSpace::state`. The kernel's lock of an eventfd is innermost: under it interrupts are routed, which takes none.

use kernel::prelude::*;

mod abi;
#[cfg(CONFIG_X86_64)]
#[path = "x86/mod.rs"]
mod arch;
#[cfg(CONFIG_ARM64)]
#[path = "arm64/mod.rs"]
mod arch;
mod aspace;
mod device;
mod eventfd;
mod fd;
mod ffi;
mod hal;
mod ioeventfd;
mod irqfd;
mod notifier;
mod percpu;
mod published;
mod run;
mod runpage;
mod shared;
mod system;
mod tables;
mod timer;
mod vcpu;
mod vm;

module! {
    type: Axvcpu,
    name: "axvcpu",
    authors: ["The axvcpu developers"],
    description: "CPU virtualization through AxArchVCpu backends",
    license: "GPL",
}

#[pin_data]
struct Axvcpu {
    // First, so that nobody can open the device any more when the rest goes.
    #[pin]
    device: device::Device,
    backends: Option<arch::Backends>,
}

impl kernel::InPlaceModule for Axvcpu {
    fn init(_module: &'static ThisModule) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            backends: arch::Backends::new()?,
            device <- device::Device::register(),
        })
    }
}
