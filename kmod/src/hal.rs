// SPDX-License-Identifier: GPL-2.0-only
//! The host as the core sees it. What the backends ask for beyond that is in `arch`.

use kernel::bindings;
use vcpu_core::{AxVCpuHal, HostPhysAddr};

use crate::{arch, ffi};

/// Linux.
pub(crate) enum Host {}

impl AxVCpuHal for Host {
    fn alloc_frames(order: u32) -> Option<HostPhysAddr> {
        ffi::alloc_pages(order)
    }

    fn free_frames(addr: HostPhysAddr, order: u32) {
        // SAFETY: By the trait's contract the frames came from `alloc_frames` with this order, and are no longer used.
        unsafe { ffi::free_pages(addr, order) }
    }

    #[inline]
    fn phys_to_virt(addr: HostPhysAddr) -> *mut u8 {
        ffi::phys_to_virt(addr)
    }

    fn now_ns() -> u64 {
        // SAFETY: Callable from any context.
        unsafe { bindings::ktime_get_mono_fast_ns() }
    }

    #[inline]
    fn ticks() -> u64 {
        arch::ticks().unwrap_or_else(Self::now_ns)
    }

    #[inline]
    fn ticks_to_ns(ticks: u64) -> u64 {
        arch::ticks_to_ns(ticks)
    }

    #[inline]
    fn cpu_id() -> usize {
        kernel::cpu::CpuId::current().as_u32() as usize
    }

    fn fpu_begin() {
        // SAFETY: Process context, and not nested: the caller is the vCPU's window, of which a thread has one at a time.
        unsafe { ffi::fpu_begin() }
    }

    fn fpu_end() {
        // SAFETY: Pairs with `fpu_begin`.
        unsafe { ffi::fpu_end() }
    }
}
