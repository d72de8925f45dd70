// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! Frames of the host as owned objects: [`Frames`] is raw memory for the hardware, [`Framed`] a value that lives in frames,
//! so that a vCPU handed about on the kernel's small stack is only a few words.

use core::marker::PhantomData;
use core::ops::{Deref, DerefMut};

use vcpu_core::{AxError, AxResult, AxVCpuHal, HostPhysAddr};

/// Bytes of a frame.
pub(crate) const FRAME: usize = 4096;

/// `1 << order` contiguous frames, zeroed when allocated, freed when dropped.
///
/// # Invariants
/// `addr` came from `H::alloc_frames(order)` and has not been freed; `ptr` is where the host sees it; `size` is the block's size
/// in bytes.
pub(crate) struct Frames<H: AxVCpuHal> {
    addr: HostPhysAddr,
    /// Kept, as finding it is not free and the world switch's surroundings live in frames.
    ptr: *mut u8,
    order: u32,
    size: usize,
    hal: PhantomData<fn() -> H>,
}

// SAFETY: The frames are owned, and bytes; where they are seen is the same for all threads.
unsafe impl<H: AxVCpuHal> Send for Frames<H> {}
// SAFETY: As above; they are changed through `&mut` only.
unsafe impl<H: AxVCpuHal> Sync for Frames<H> {}

impl<H: AxVCpuHal> Frames<H> {
    /// Allocates. May sleep.
    ///
    /// # Errors
    /// [`AxError::NoMemory`].
    pub(crate) fn new(order: u32) -> AxResult<Self> {
        let size = FRAME.checked_shl(order).ok_or(AxError::NoMemory)?;
        let addr = H::alloc_frames(order).ok_or(AxError::NoMemory)?;
        // INVARIANT: allocated here.
        Ok(Self { addr, ptr: H::phys_to_virt(addr), order, size, hal: PhantomData })
    }

    /// The least order whose block holds `bytes`.
    pub(crate) const fn order_for(bytes: usize) -> u32 {
        let mut order = 0;
        while FRAME << order < bytes {
            order += 1;
        }
        order
    }

    /// Address for the hardware.
    pub(crate) fn phys(&self) -> HostPhysAddr {
        self.addr
    }

    /// Address for the host, valid while `self` lives.
    #[inline]
    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.ptr
    }

    /// The frames as bytes.
    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: By the type invariant the frames are ours alone, initialised (zeroed when allocated), and live as long as
        // `self`, which is borrowed; hardware writes to them only through a pointer, inside the window of `&mut self`.
        unsafe { core::slice::from_raw_parts(self.as_ptr(), self.size) }
    }

    /// The frames as bytes, to be changed.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: As in `bytes`, and `self` is borrowed mutably.
        unsafe { core::slice::from_raw_parts_mut(self.as_ptr(), self.size) }
    }
}

impl<H: AxVCpuHal> Drop for Frames<H> {
    fn drop(&mut self) {
        H::free_frames(self.addr, self.order);
    }
}

/// Types of which zeroed memory is a value.
///
/// # Safety
/// All bytes zero is a valid value of the type.
pub(crate) unsafe trait Zeroable {}

// SAFETY: Integers only.
unsafe impl Zeroable for crate::apic::Registers {}
// SAFETY: As above.
unsafe impl Zeroable for crate::svm::Vmcb {}
// SAFETY: As above.
unsafe impl<const N: usize> Zeroable for [axvcpu_uapi::x86::CpuidEntry; N] {}
// SAFETY: As above.
unsafe impl Zeroable for crate::apic::Descriptor {}

/// A `T` in frames of its own.
///
/// # Invariants
/// The frames hold an initialised `T` at their start.
pub(crate) struct Framed<T, H: AxVCpuHal> {
    frames: Frames<H>,
    value: PhantomData<T>,
}

impl<T, H: AxVCpuHal> Framed<T, H> {
    /// Moves `value` into frames. May sleep.
    ///
    /// # Errors
    /// [`AxError::NoMemory`].
    pub(crate) fn new(value: T) -> AxResult<Self> {
        const { assert!(align_of::<T>() <= FRAME) };
        let frames = Frames::new(const { Frames::<H>::order_for(size_of::<T>()) })?;
        // SAFETY: The block is large enough and frame-aligned, by the two constants above; nothing refers to it yet.
        unsafe { frames.as_ptr().cast::<T>().write(value) };
        // INVARIANT: written just now.
        Ok(Self { frames, value: PhantomData })
    }

    /// A zeroed value, made in place: nothing of its size on the stack. May sleep.
    ///
    /// # Errors
    /// [`AxError::NoMemory`].
    pub(crate) fn zeroed() -> AxResult<Self>
    where
        T: Zeroable,
    {
        const { assert!(align_of::<T>() <= FRAME) };
        // INVARIANT: The block is large enough and frame-aligned, and zeroed, which is a value of the type.
        Ok(Self { frames: Frames::new(const { Frames::<H>::order_for(size_of::<T>()) })?, value: PhantomData })
    }

    /// Address for the hardware.
    pub(crate) fn phys(&self) -> HostPhysAddr {
        self.frames.phys()
    }

    /// Address for the world switch, valid while `self` lives.
    pub(crate) fn as_ptr(&mut self) -> *mut T {
        self.frames.as_ptr().cast()
    }
}

impl<T, H: AxVCpuHal> Deref for Framed<T, H> {
    type Target = T;
    #[inline]
    fn deref(&self) -> &T {
        // SAFETY: By the type invariant a `T` is there, and it is borrowed as `self` is.
        unsafe { &*self.frames.as_ptr().cast::<T>() }
    }
}

impl<T, H: AxVCpuHal> DerefMut for Framed<T, H> {
    #[inline]
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: As in `deref`, and `self` is borrowed mutably.
        unsafe { &mut *self.frames.as_ptr().cast::<T>() }
    }
}

impl<T, H: AxVCpuHal> Drop for Framed<T, H> {
    fn drop(&mut self) {
        // SAFETY: The value is initialised by the type invariant and not used again; the frames are freed after it.
        unsafe { self.frames.as_ptr().cast::<T>().drop_in_place() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TestHal;
    use std::rc::Rc;

    #[test]
    fn values_live_in_aligned_frames_and_are_dropped_once() {
        let shared = Rc::new(());
        let framed = Framed::<_, TestHal>::new((Rc::clone(&shared), [7u8; 5000])).unwrap();
        assert!(framed.phys().is_aligned(4096));
        assert_eq!((Rc::strong_count(&shared), framed.1[4999]), (2, 7));
        drop(framed);
        assert_eq!(Rc::strong_count(&shared), 1);
    }

    #[test]
    fn orders_are_the_least_that_fit() {
        for (bytes, order) in [(0, 0), (1, 0), (4096, 0), (4097, 1), (8192, 1), (8193, 2), (12288, 2)] {
            assert_eq!(Frames::<TestHal>::order_for(bytes), order, "{bytes}");
        }
    }

    #[test]
    fn frames_start_zeroed() {
        let mut frames = Frames::<TestHal>::new(1).unwrap();
        assert_eq!(frames.bytes().len(), 8192);
        assert!(frames.bytes().iter().all(|&b| b == 0));
        frames.bytes_mut().fill(0xff);
        assert!(frames.bytes().iter().all(|&b| b == 0xff));
    }
}
