// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! Arguments of the ioctls of an address space (the EPT root).
//!
//! An address space is a set of regions, each a range of guest physical addresses backed by a range of the creator's
//! virtual memory. Nothing is pinned: pages are looked up when the guest touches them and forgotten when the host
//! takes them away, so the memory behaves as any other memory of the process.

use crate::layout::abi_struct;

/// The guest may read the range. Required.
pub const MEM_READ: u32 = 1 << 0;
/// The guest may write the range.
pub const MEM_WRITE: u32 = 1 << 1;
/// The guest may fetch instructions from the range.
pub const MEM_EXECUTE: u32 = 1 << 2;

abi_struct! {
    /// `MAP`. All addresses and sizes are multiples of 4096 bytes; the range must not overlap a mapped one.
    pub struct MapRegion: 32 {
        /// First guest physical address.
        pub guest_addr: u64,
        /// Length in bytes, not zero.
        pub size: u64,
        /// First virtual address in the caller's memory.
        pub user_addr: u64,
        /// `MEM_*`.
        pub flags: u32,
        /// Zero.
        pub reserved: u32,
    }
}

abi_struct! {
    /// `UNMAP`: a range of guest physical addresses, all of it mapped. Regions that it cuts are split.
    ///
    /// `START_DIRTY_LOG`: a range of guest physical addresses, mapped or not, in multiples of [`DIRTY_LOG_GRANULE`].
    pub struct Range: 16 {
        /// First guest physical address, a multiple of 4096.
        pub guest_addr: u64,
        /// Length in bytes, a multiple of 4096, not zero.
        pub size: u64,
    }
}

abi_struct! {
    /// `PROTECT`: new access rights for a range, all of it mapped. Regions that it cuts are split.
    pub struct ProtectRange: 24 {
        /// First guest physical address, a multiple of 4096.
        pub guest_addr: u64,
        /// Length in bytes, a multiple of 4096, not zero.
        pub size: u64,
        /// `MEM_*`.
        pub flags: u32,
        /// Zero.
        pub reserved: u32,
    }
}

/// Ranges of the dirty log begin and end at multiples of this many bytes: 64 pages, a word of the bitmap.
pub const DIRTY_LOG_GRANULE: u64 = 64 * 4096;

abi_struct! {
    /// `READ_DIRTY_LOG`: which pages of a range, which is in the log, were written since the log was started or last read.
    pub struct DirtyLogRead: 32 {
        /// First guest physical address, a multiple of [`DIRTY_LOG_GRANULE`].
        pub guest_addr: u64,
        /// Length in bytes, a multiple of [`DIRTY_LOG_GRANULE`], not zero.
        pub size: u64,
        /// Address of an array of 64-bit words in the caller's memory: bit `i % 64` of word `i / 64` tells of page `i`.
        pub bitmap_addr: u64,
        /// Out: pages that were written.
        pub pages: u64,
    }
}
