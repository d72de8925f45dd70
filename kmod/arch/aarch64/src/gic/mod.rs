// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! A GICv3 for guests (Arm IHI 0069, "GIC architecture specification").
//!
//! All of it is here, distributor and redistributors as well as the vCPUs' interfaces, and so in the kernel. Interrupts
//! between vCPUs, those of the timer and those of eventfds find their vCPU in contexts where no program can be asked, and a
//! list register cannot be filled without knowing what the distributor thinks of the interrupt. A program that had the
//! distributor would have to be called for each of them. To the program it is one object of the VM's, which it creates and
//! sends messages to.
//!
//! | file | owns |
//! |---|---|
//! | `bank.rs` | the state of 32 interrupts |
//! | `distributor.rs` | all interrupts of a VM: who gets which, SGIs, messages |
//! | `registers.rs` | the registers of distributor and redistributors as a guest sees them |
//! | `interface.rs` | a vCPU's list registers: what goes in, and what comes back |
//! | `hardware.rs` | moving them between memory and the CPU |
//! | this file | the memory that the distributor is in |
//!
//! There are no locks. State is in atomics, a bit or a byte for each interrupt; everything but the list registers may be
//! looked at and changed by anybody at any time. Two rules make that enough:
//! - An SPI is in the list registers of one vCPU at most: its *holder*, which has put its name into a cell by compare and
//!   exchange, and takes it out when the interrupt is neither active nor in a list register any more.
//! - Whoever changes something for which a vCPU may have to refill its list registers tells it so afterwards (`wake`). A
//!   holder that lets go of an interrupt looks at it once more after that, and tells whom it is now for.

mod bank;
mod distributor;
#[cfg(target_arch = "aarch64")]
pub(crate) mod hardware;
mod interface;
mod registers;

pub use distributor::{Distributor, Layout, INTIDS, MAX_CPUS};
pub use interface::{Interface, Notices};
pub use registers::Access;

use core::marker::PhantomData;
use core::ops::Deref;
use core::ptr::NonNull;

use vcpu_core::{AxError, AxResult, AxVCpuHal, HostPhysAddr};

/// log2 of the frames that a [`Distributor`] takes.
const ORDER: u32 = 1;

const _: () = assert!(size_of::<Distributor>() <= 4096 << ORDER, "the distributor does not fit its frames");

/// A VM's interrupt controller, in frames of the host's.
///
/// # Invariants
/// `state` points to frames that came from `H::alloc_frames(ORDER)`, hold a [`Distributor`], and are this object's alone.
pub struct Gic<H: AxVCpuHal> {
    state: NonNull<Distributor>,
    phys: HostPhysAddr,
    hal: PhantomData<fn() -> H>,
}

// SAFETY: What it owns, a `Distributor`, may be sent and shared: it is made of atomics and of what never changes.
unsafe impl<H: AxVCpuHal> Send for Gic<H> {}
// SAFETY: As above.
unsafe impl<H: AxVCpuHal> Sync for Gic<H> {}

impl<H: AxVCpuHal> Gic<H> {
    /// A controller after its reset.
    ///
    /// # Errors
    /// [`AxError::NoMemory`].
    pub fn new(layout: Layout) -> AxResult<Self> {
        let phys = H::alloc_frames(ORDER).ok_or(AxError::NoMemory)?;
        let state = NonNull::new(H::phys_to_virt(phys).cast::<Distributor>()).ok_or(AxError::NoMemory)?;
        // SAFETY: The frames are new, and all zero, as they come, is a `Distributor`: integers and atomics only.
        unsafe { (*state.as_ptr()).reset(layout) };
        // INVARIANT: As above.
        Ok(Self { state, phys, hal: PhantomData })
    }
}

impl<H: AxVCpuHal> Deref for Gic<H> {
    type Target = Distributor;

    fn deref(&self) -> &Distributor {
        // SAFETY: The type invariant; nobody has an exclusive reference, as there is no way to one.
        unsafe { self.state.as_ref() }
    }
}

impl<H: AxVCpuHal> Drop for Gic<H> {
    fn drop(&mut self) {
        H::free_frames(self.phys, ORDER);
    }
}
