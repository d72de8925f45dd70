// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! A host for the unit tests: frames from the global allocator, physical addresses equal to virtual ones.

use core::ptr::NonNull;
use std::alloc::{alloc_zeroed, dealloc, Layout};
use std::boxed::Box;
use std::sync::OnceLock;

use vcpu_core::{AxVCpuHal, HostPhysAddr};

use crate::percpu::X86PerCpu;
use crate::svm::PermissionMaps;
use crate::X86Hal;

pub(crate) struct TestHal;

fn layout(order: u32) -> Layout {
    Layout::from_size_align(4096 << order, 4096 << order).unwrap()
}

impl AxVCpuHal for TestHal {
    fn alloc_frames(order: u32) -> Option<HostPhysAddr> {
        // SAFETY: The size is not zero.
        let ptr = unsafe { alloc_zeroed(layout(order)) };
        (!ptr.is_null()).then(|| HostPhysAddr::new(ptr.expose_provenance() as u64))
    }

    fn free_frames(addr: HostPhysAddr, order: u32) {
        // SAFETY: `addr` and `order` are those of one call of `alloc_frames`.
        unsafe { dealloc(Self::phys_to_virt(addr), layout(order)) }
    }

    fn phys_to_virt(addr: HostPhysAddr) -> *mut u8 {
        core::ptr::with_exposed_provenance_mut(addr.as_u64() as usize)
    }

    fn now_ns() -> u64 {
        0
    }

    fn cpu_id() -> usize {
        0
    }

    fn fpu_begin() {}

    fn fpu_end() {}
}

impl X86Hal for TestHal {
    fn per_cpu() -> NonNull<X86PerCpu<Self>> {
        unimplemented!("tests do not execute privileged instructions")
    }

    fn svm_maps() -> Option<&'static PermissionMaps<Self>> {
        static MAPS: OnceLock<&'static PermissionMaps<TestHal>> = OnceLock::new();
        Some(MAPS.get_or_init(|| Box::leak(Box::new(PermissionMaps::new().unwrap()))))
    }

    fn tsc_khz() -> u32 {
        2_000_000
    }
}
