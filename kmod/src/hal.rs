// SPDX-License-Identifier: GPL-2.0-only
//! The host as the core and the backends see it.

use core::ptr::NonNull;

use kernel::bindings;
use vcpu_core::{AxVCpuHal, HostPhysAddr};
use x86_vcpu::{Mitigations, PermissionMaps, X86Hal, X86PerCpu};

use crate::{backends, ffi, percpu};

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
    fn cpu_id() -> usize {
        kernel::cpu::CpuId::current().as_u32() as usize
    }

    fn fpu_begin() {
        // SAFETY: Process context, and not nested: the caller is the vCPU's window, of which a thread has one at a time.
        unsafe { bindings::kernel_fpu_begin_mask(0) }
    }

    fn fpu_end() {
        // SAFETY: Pairs with `fpu_begin`.
        unsafe { bindings::kernel_fpu_end() }
    }
}

impl X86Hal for Host {
    fn per_cpu() -> NonNull<X86PerCpu<Self>> {
        percpu::current()
    }

    fn maps() -> &'static PermissionMaps<Self> {
        backends::maps()
    }

    fn tsc_khz() -> u32 {
        ffi::tsc_khz()
    }

    fn mitigations() -> Mitigations {
        let host = ffi::Mitigations::of_host();
        Mitigations {
            clear_buffers: host.clear_buffers(),
            refill_rsb: host.refill_rsb(),
            untrain_returns: host.untrain_returns(),
            barrier_at_exit: host.barrier_at_exit(),
            // Linux' own decision about vCPU switches is not to be seen by modules: always.
            branch_barrier: true,
        }
    }
}
