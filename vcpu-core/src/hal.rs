// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! What the core and the backends ask of the kernel they run in.

use crate::HostPhysAddr;

/// Services of the host. All functions are static: a backend is generic over the type.
///
/// Frames are 4096 bytes, aligned to their size; blocks of `1 << order` frames are contiguous and aligned to their size.
pub trait AxVCpuHal: Sized + 'static {
    /// Allocates `1 << order` zeroed frames, accounted to the caller's memory cgroup. May sleep.
    fn alloc_frames(order: u32) -> Option<HostPhysAddr>;

    /// Frees what [`alloc_frames`](Self::alloc_frames) gave, with the same `order`.
    fn free_frames(addr: HostPhysAddr, order: u32);

    /// Where the host sees the frames at `addr`, which [`alloc_frames`](Self::alloc_frames) gave. Valid until they are freed.
    fn phys_to_virt(addr: HostPhysAddr) -> *mut u8;

    /// Nanoseconds of the host's monotonic clock.
    fn now_ns() -> u64;

    /// A clock that takes little to read, for lengths of time: it goes on evenly, from anywhere, and those of different CPUs differ by
    /// little.
    #[inline]
    fn ticks() -> u64 {
        Self::now_ns()
    }

    /// The nanoseconds of a number of [`ticks`](Self::ticks).
    #[inline]
    fn ticks_to_ns(ticks: u64) -> u64 {
        ticks
    }

    /// Index of the current CPU. Meaningful while preemption is off.
    fn cpu_id() -> usize;

    /// Saves the current user's FPU state and lends the FPU to the caller, with preemption and softirqs off, until
    /// [`fpu_end`](Self::fpu_end). Not nested.
    fn fpu_begin();

    /// Gives the FPU back. The registers' contents are lost.
    fn fpu_end();
}
