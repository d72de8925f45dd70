// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! Memory that can be given to a guest: [`Memory`], and [`Backing`] for memory that others allocate.
//!
//! Guests write their memory at any moment, so no Rust reference to its bytes is ever formed. Accesses here are relaxed
//! atomic ones, which may tear between bytes (as on any machine) but are never undefined behaviour.
#![allow(unsafe_code)]

use super::error::{Error, Result};
use nix::errno::Errno;
use nix::sys::memfd::{memfd_create, MFdFlags};
use nix::sys::mman::{madvise, mmap, mmap_anonymous, munmap, MapFlags, MmapAdvise, ProtFlags};
use std::ffi::{c_void, CStr};
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, AtomicU8, Ordering};
use std::sync::Arc;

/// Memory that may be mapped into an address space.
///
/// Implement it for the region type of a memory library, for example a newtype around an `Arc` of vm-memory's
/// `GuestRegionMmap`.
///
/// # Safety
/// For as long as the value exists, wherever it is moved:
/// - [`start`](Self::start) and [`size`](Self::size) keep answering the same, and that range is mapped readable and (if
///   it is ever mapped into a guest with write access) writable memory of this process;
/// - nothing but memory handed to guests lies in it: no Rust object, stack, heap or code; and no reference to its bytes
///   exists, since a guest may change them at any time.
pub unsafe trait Backing: Send + Sync + 'static {
    /// Address of the first byte.
    fn start(&self) -> NonNull<u8>;
    /// Length in bytes.
    fn size(&self) -> usize;
}

// SAFETY: the `Arc` keeps its content alive and unmoved, and the content makes the promises.
unsafe impl<B: Backing> Backing for Arc<B> {
    fn start(&self) -> NonNull<u8> {
        B::start(self)
    }
    fn size(&self) -> usize {
        B::size(self)
    }
}

/// A range of memory for guests, readable and writable by the program at the same time.
#[derive(Debug)]
pub struct Memory {
    start: NonNull<u8>,
    size: usize,
    owned: bool,
    file: Option<OwnedFd>,
}

// SAFETY: the memory belongs to the process, not to a thread, and every access is atomic.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

// SAFETY: `start` and `size` never change, `Drop` is what unmaps the range, constructors map it (or have the caller's
// promise of the same), and this file forms no references but to atomics.
unsafe impl Backing for Memory {
    fn start(&self) -> NonNull<u8> {
        self.start
    }
    fn size(&self) -> usize {
        self.size
    }
}

const PROTECTION: ProtFlags = ProtFlags::PROT_READ.union(ProtFlags::PROT_WRITE);

impl Memory {
    /// Allocates `size` bytes of anonymous memory, all zero. Pages are provided when they are first used.
    ///
    /// # Errors
    /// [`Error::AllocateMemory`]; `size` 0 is `EINVAL`.
    pub fn anonymous(size: usize) -> Result<Self> {
        let fail = |errno| Error::AllocateMemory { size, errno };
        let length = NonZeroUsize::new(size).ok_or(fail(Errno::EINVAL))?;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice disturbs no existing memory.
        let start = unsafe { mmap_anonymous(None, length, PROTECTION, flags) }.map_err(fail)?;
        Ok(Self { start: start.cast(), size, owned: true, file: None })
    }

    /// Allocates `size` bytes of shared memory, all zero, with a file descriptor ([`file`](Self::file)) through which
    /// other processes can map it. `name` shows up in `/proc/*/maps`.
    ///
    /// # Errors
    /// [`Error::AllocateMemory`]; `size` 0 is `EINVAL`.
    pub fn memfd(name: &CStr, size: usize) -> Result<Self> {
        let fail = |errno| Error::AllocateMemory { size, errno };
        let length = NonZeroUsize::new(size).ok_or(fail(Errno::EINVAL))?;
        let file = memfd_create(name, MFdFlags::MFD_CLOEXEC).map_err(fail)?;
        let file_size = i64::try_from(size).map_err(|_| fail(Errno::EFBIG))?;
        nix::unistd::ftruncate(&file, file_size).map_err(fail)?;
        // SAFETY: a new mapping at an address of the kernel's choice disturbs no existing memory. The file is ours;
        // others who get it may write it, which the atomic accesses allow for.
        let start = unsafe { mmap(None, length, PROTECTION, MapFlags::MAP_SHARED, &file, 0) }.map_err(fail)?;
        Ok(Self { start: start.cast(), size, owned: true, file: Some(file) })
    }

    /// Takes memory that somebody else allocated, and frees.
    ///
    /// # Safety
    /// `start..start + size` keeps the promises of [`Backing`] until this value is gone, which a [`Slot`](super::Slot)
    /// may delay.
    pub const unsafe fn from_raw(start: NonNull<u8>, size: usize) -> Self {
        Self { start, size, owned: false, file: None }
    }

    /// The file behind memory made with [`memfd`](Self::memfd).
    pub fn file(&self) -> Option<BorrowedFd<'_>> {
        self.file.as_ref().map(AsFd::as_fd)
    }

    fn check(&self, offset: usize, size: usize) -> Result<NonNull<u8>> {
        match offset.checked_add(size) {
            // SAFETY: `offset` is at most the size of the range, so the sum is inside it or one past its end.
            Some(end) if end <= self.size => Ok(unsafe { self.start.add(offset) }),
            _ => Err(Error::OutOfBounds { offset, size, memory_size: self.size }),
        }
    }

    /// Copies `buffer.len()` bytes at `offset` into `buffer`.
    ///
    /// # Errors
    /// [`Error::OutOfBounds`]; nothing is copied then.
    pub fn read(&self, offset: usize, buffer: &mut [u8]) -> Result<()> {
        let from = self.check(offset, buffer.len())?;
        for (i, byte) in buffer.iter_mut().enumerate() {
            // SAFETY: `check` found the whole range inside the mapping, which lives as long as `self`; no reference to
            // it exists, and every concurrent access by this process is atomic too.
            *byte = unsafe { AtomicU8::from_ptr(from.add(i).as_ptr()) }.load(Ordering::Relaxed);
        }
        Ok(())
    }

    /// Copies `data` to `offset`.
    ///
    /// # Errors
    /// [`Error::OutOfBounds`]; nothing is copied then.
    pub fn write(&self, offset: usize, data: &[u8]) -> Result<()> {
        let to = self.check(offset, data.len())?;
        for (i, byte) in data.iter().enumerate() {
            // SAFETY: as in `read`.
            unsafe { AtomicU8::from_ptr(to.add(i).as_ptr()) }.store(*byte, Ordering::Relaxed);
        }
        Ok(())
    }

    /// The little-endian 64-bit word at `offset`, in one access if `offset` is a multiple of 8 (and the memory starts
    /// at one).
    ///
    /// # Errors
    /// [`Error::OutOfBounds`].
    pub fn read_u64(&self, offset: usize) -> Result<u64> {
        let from = self.check(offset, 8)?.cast::<u64>();
        if from.is_aligned() {
            // SAFETY: as in `read`, and aligned.
            return Ok(u64::from_le(unsafe { AtomicU64::from_ptr(from.as_ptr()) }.load(Ordering::Relaxed)));
        }
        let mut bytes = [0; 8];
        self.read(offset, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Stores the little-endian 64-bit word at `offset`, in one access if `offset` is a multiple of 8 (and the memory
    /// starts at one).
    ///
    /// # Errors
    /// [`Error::OutOfBounds`].
    pub fn write_u64(&self, offset: usize, value: u64) -> Result<()> {
        let to = self.check(offset, 8)?.cast::<u64>();
        if to.is_aligned() {
            // SAFETY: as in `read`, and aligned.
            unsafe { AtomicU64::from_ptr(to.as_ptr()) }.store(value.to_le(), Ordering::Relaxed);
            return Ok(());
        }
        self.write(offset, &value.to_le_bytes())
    }

    /// Gives pages back to the system (`MADV_DONTNEED`). Anonymous memory reads as zero afterwards, shared memory keeps
    /// its content. `offset` must be a multiple of the page size. Legal while a guest uses the memory.
    ///
    /// # Errors
    /// [`Error::OutOfBounds`] or [`Error::AdviseMemory`].
    pub fn discard(&self, offset: usize, size: usize) -> Result<()> {
        self.advise(offset, size, MmapAdvise::MADV_DONTNEED)
    }

    /// Asks for transparent huge pages, which let the module map the guest by 2 MiB leaves.
    ///
    /// # Errors
    /// [`Error::AdviseMemory`], for example where the host has no transparent huge pages.
    pub fn prefer_huge_pages(&self) -> Result<()> {
        self.advise(0, self.size, MmapAdvise::MADV_HUGEPAGE)
    }

    fn advise(&self, offset: usize, size: usize, advice: MmapAdvise) -> Result<()> {
        let start = self.check(offset, size)?.cast::<c_void>();
        // SAFETY: the range is inside the mapping, and neither advice used here unmaps it or makes it inaccessible;
        // memory handed to guests may change its content at any time anyway.
        unsafe { madvise(start, size, advice) }.map_err(Error::AdviseMemory)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.owned {
            // SAFETY: this value mapped the range and is its only owner; mappings into guests hold an `Arc` of it, so
            // none is left. The call can fail only for a range that was never mapped, so there is nothing to report.
            let _ = unsafe { munmap(self.start.cast(), self.size) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accesses_stay_inside() {
        let memory = Memory::anonymous(0x1000).unwrap();
        memory.write(0xffe, &[1, 2]).unwrap();
        let mut back = [0; 2];
        memory.read(0xffe, &mut back).unwrap();
        assert_eq!(back, [1, 2]);
        for (offset, size) in [(0xfff, 2), (0x1001, 0), (usize::MAX, 2), (0, 0x1001)] {
            let wanted = Error::OutOfBounds { offset, size, memory_size: 0x1000 };
            assert_eq!(memory.read(offset, &mut std::vec![0; size]), Err(wanted.clone()));
            assert_eq!(memory.discard(offset, size), Err(wanted));
        }
        assert_eq!(memory.read(0x1000, &mut []), Ok(()));
    }

    #[test]
    fn words_are_little_endian_aligned_or_not() {
        let memory = Memory::memfd(c"test", 0x1000).unwrap();
        memory.write_u64(8, 0x0102_0304_0506_0708).unwrap();
        memory.write_u64(21, 0x1112_1314_1516_1718).unwrap();
        let mut bytes = [0; 8];
        memory.read(8, &mut bytes).unwrap();
        assert_eq!(bytes, [8, 7, 6, 5, 4, 3, 2, 1]);
        assert_eq!(memory.read_u64(8), Ok(0x0102_0304_0506_0708));
        assert_eq!(memory.read_u64(21), Ok(0x1112_1314_1516_1718));
        assert!(memory.file().is_some());
    }

    #[test]
    fn discarded_pages_read_as_zero_in_anonymous_memory_only() {
        for (memory, kept) in [(Memory::anonymous(0x2000).unwrap(), 0), (Memory::memfd(c"test", 0x2000).unwrap(), 7)] {
            memory.write_u64(0x1000, 7).unwrap();
            memory.discard(0x1000, 0x1000).unwrap();
            assert_eq!(memory.read_u64(0x1000), Ok(kept));
        }
    }

    #[test]
    fn no_empty_memory() {
        assert_eq!(Memory::anonymous(0).unwrap_err(), Error::AllocateMemory { size: 0, errno: Errno::EINVAL });
    }
}
