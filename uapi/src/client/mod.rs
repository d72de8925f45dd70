// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! Safe handles over `/dev/axvcpu`: what a virtual machine monitor embeds.
//!
//! [`System`] is the device, [`Vm`] a virtual machine, [`AddressSpace`] its guest physical memory (the EPT root), and
//! [`Vcpu`] a virtual CPU with its run page. A [`Slot`] is a piece of memory mapped into an address space: it keeps the
//! memory alive and unmaps it when it is dropped, so the guest can never reach memory that the program has given back.
//! A [`Kicker`] makes a running vCPU return, from any thread. Each handle owns a file descriptor; they may be dropped
//! in any order.
//!
//! Handles belong to the process that created the VM. After `fork` the child's copies fail with `EXDEV`.
//!
//! ```no_run
//! use axvcpu_uapi::addr::GuestPhysAddr;
//! use axvcpu_uapi::client::{Apic, Memory, Permissions, System};
//! use axvcpu_uapi::exit::AxVCpuExitReason;
//! use std::sync::Arc;
//!
//! let system = System::open()?;
//! let vm = system.create_vm()?;
//! let memory = Arc::new(Memory::anonymous(0x1000)?);
//! memory.write(0, &[0xb0, 0x2a, 0xe6, 0x80, 0xf4])?; // mov al, 42; out 0x80, al; hlt
//! let space = vm.create_address_space()?;
//! let _slot = space.map_all(GuestPhysAddr::new(0x1000), memory, Permissions::RWX)?;
//! let mut vcpu = vm.create_vcpu(0)?;
//! vcpu.set_entry(GuestPhysAddr::new(0x1000))?;
//! vcpu.set_ept_root(&space)?;
//! vcpu.setup(Apic::None, &system.supported_cpuid()?)?;
//! loop {
//!     match vcpu.run()?.reason {
//!         AxVCpuExitReason::IoWrite { port, data, .. } => println!("port {port:#x}: {data}"),
//!         AxVCpuExitReason::Halt => break,
//!         other => panic!("unexpected exit: {other:?}"),
//!     }
//! }
//! # Ok::<(), axvcpu_uapi::client::Error>(())
//! ```

mod aspace;
mod error;
mod eventfd;
mod memory;
mod run_page;
mod sys;
mod system;
mod vcpu;
mod vm;

pub use aspace::{AddressSpace, Permissions, Slot};
pub use error::{Error, Result};
pub use eventfd::{IoAddress, IoPattern};
pub use memory::{Backing, Memory};
pub use nix::errno::Errno;
pub use run_page::{Brief, Exit, Snapshot};
pub use system::System;
pub use vcpu::{Apic, Kicker, RegisterSet, Vcpu};
pub use vm::Vm;

/// The general registers of the architecture that the program is built for.
#[cfg(target_arch = "aarch64")]
pub(crate) use crate::arm64::General;
/// The general registers of the architecture that the program is built for.
#[cfg(not(target_arch = "aarch64"))]
pub(crate) use crate::x86::General;
