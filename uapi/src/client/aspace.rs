// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! [`AddressSpace`], the guest physical memory of a VM, and [`Slot`], one mapping in it.
#![allow(unsafe_code)]

use super::error::{Error, Result};
use super::memory::Backing;
use super::sys;
use crate::addr::GuestPhysAddr;
use crate::aspace::{
    DirtyLogRead, MapRegion, ProtectRange, Range, DIRTY_LOG_GRANULE, MEM_EXECUTE, MEM_READ, MEM_WRITE,
};
use crate::ioctl;
use nix::errno::Errno;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

/// What a guest may do with mapped memory. Reading is always allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Permissions(u32);

impl Permissions {
    /// Read only.
    pub const R: Self = Self(MEM_READ);
    /// Read and write.
    pub const RW: Self = Self(MEM_READ | MEM_WRITE);
    /// Read and execute.
    pub const RX: Self = Self(MEM_READ | MEM_EXECUTE);
    /// Read, write and execute: ordinary memory.
    pub const RWX: Self = Self(MEM_READ | MEM_WRITE | MEM_EXECUTE);

    /// The `MEM_*` bits.
    pub const fn bits(self) -> u32 {
        self.0
    }
}

/// Guest physical memory: a set of [`Slot`]s. Cloning gives another handle of the same address space.
#[derive(Clone, Debug)]
pub struct AddressSpace {
    fd: Arc<OwnedFd>,
}

impl AddressSpace {
    pub(super) fn new(fd: OwnedFd) -> Self {
        Self { fd: Arc::new(fd) }
    }

    /// Maps `size` bytes of `memory`, from `offset` on, at `guest_addr`. Sizes, addresses and the memory's own address
    /// plus `offset` must be multiples of 4096. Where guest and host address agree modulo 2 MiB, the module can use
    /// large pages.
    ///
    /// # Errors
    /// [`Error::OutOfBounds`], or [`Error::Map`]: `EEXIST` if the range overlaps a mapped one, `EINVAL` if it is not
    /// aligned, empty or too high, `ENOSPC` if the address space has too many regions.
    pub fn map<B: Backing>(
        &self,
        guest_addr: GuestPhysAddr,
        memory: Arc<B>,
        offset: usize,
        size: usize,
        permissions: Permissions,
    ) -> Result<Slot<B>> {
        let memory_size = memory.size();
        if offset.checked_add(size).is_none_or(|end| end > memory_size) {
            return Err(Error::OutOfBounds { offset, size, memory_size });
        }
        let mut region = MapRegion {
            guest_addr: guest_addr.as_u64(),
            size: size as u64,
            user_addr: (memory.start().as_ptr() as usize + offset) as u64,
            flags: permissions.bits(),
            reserved: 0,
        };
        // SAFETY: the range was checked to lie inside `memory`, which promises that a guest may own those bytes for as
        // long as the value exists; the slot keeps it until the range is unmapped again.
        unsafe { sys::with(self.fd.as_fd(), ioctl::MAP, &mut region) }.map_err(|errno| Error::Map {
            guest_addr: region.guest_addr,
            size: region.size,
            errno,
        })?;
        Ok(Slot { space: self.clone(), memory: ManuallyDrop::new(memory), guest_addr, offset, size })
    }

    /// Maps all of `memory` at `guest_addr`.
    ///
    /// # Errors
    /// As [`map`](Self::map).
    pub fn map_all<B: Backing>(
        &self,
        guest_addr: GuestPhysAddr,
        memory: Arc<B>,
        permissions: Permissions,
    ) -> Result<Slot<B>> {
        let size = memory.size();
        self.map(guest_addr, memory, 0, size, permissions)
    }
}

impl AddressSpace {
    /// Starts to log which pages of `size` bytes at `guest_addr` the guest writes. Both are multiples of
    /// [`DIRTY_LOG_GRANULE`]; what is mapped in the range may change meanwhile. Writes by the program itself are not logged.
    ///
    /// # Errors
    /// [`Error::StartDirtyLog`]: `EEXIST` if a log is there already, `EINVAL` for a bad range, `ENOSPC` for one that is too
    /// large.
    pub fn start_dirty_log(&self, guest_addr: GuestPhysAddr, size: u64) -> Result<()> {
        let mut range = Range { guest_addr: guest_addr.as_u64(), size };
        // SAFETY: the structure holds no address of this process.
        unsafe { sys::with(self.fd.as_fd(), ioctl::START_DIRTY_LOG, &mut range) }
            .map_err(|errno| Error::StartDirtyLog { guest_addr: range.guest_addr, size, errno })?;
        Ok(())
    }

    /// Reads and clears the log of 64 pages for each word of `bitmap`, from `guest_addr` on, which is a multiple of
    /// [`DIRTY_LOG_GRANULE`]. Bit `i` of a word tells of its page `i`: written since the log was started or last read. The
    /// pages' content, read after this, includes every write that was told. Returns the number of bits that are set.
    ///
    /// # Errors
    /// [`Error::ReadDirtyLog`]: `ENOENT` if there is no log, `EINVAL` if not all of the range is in it.
    pub fn read_dirty_log(&self, guest_addr: GuestPhysAddr, bitmap: &mut [u64]) -> Result<u64> {
        let size = bitmap.len() as u64 * DIRTY_LOG_GRANULE;
        let mut read =
            DirtyLogRead { guest_addr: guest_addr.as_u64(), size, bitmap_addr: bitmap.as_mut_ptr() as u64, pages: 0 };
        // SAFETY: the kernel stores one word for each granule of the size, as many as `bitmap` has.
        unsafe { sys::with(self.fd.as_fd(), ioctl::READ_DIRTY_LOG, &mut read) }.map_err(Error::ReadDirtyLog)?;
        Ok(read.pages)
    }

    /// Stops logging, and forgets what was not read.
    ///
    /// # Errors
    /// [`Error::StopDirtyLog`]: `ENOENT` if there is no log.
    pub fn stop_dirty_log(&self) -> Result<()> {
        sys::none(self.fd.as_fd(), ioctl::STOP_DIRTY_LOG).map_err(Error::StopDirtyLog)?;
        Ok(())
    }
}

impl AsFd for AddressSpace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A range of memory mapped into an address space. It holds the memory, and unmaps it when dropped.
///
/// If the kernel refuses to unmap, the memory is leaked: a leak is better than a guest with access to memory that the
/// program uses for something else. It refuses only in a forked child, or if the range was changed through the raw file
/// descriptor.
#[must_use = "dropping a slot unmaps its memory from the guest"]
#[derive(Debug)]
pub struct Slot<B: Backing> {
    space: AddressSpace,
    memory: ManuallyDrop<Arc<B>>,
    guest_addr: GuestPhysAddr,
    offset: usize,
    size: usize,
}

impl<B: Backing> Slot<B> {
    /// First guest physical address.
    pub fn guest_addr(&self) -> GuestPhysAddr {
        self.guest_addr
    }

    /// Length in bytes.
    pub fn size(&self) -> usize {
        self.size
    }

    /// The memory, of which the slot is the part that begins at [`offset`](Self::offset).
    pub fn memory(&self) -> &Arc<B> {
        &self.memory
    }

    /// Offset of the slot's first byte in its memory.
    pub fn offset(&self) -> usize {
        self.offset
    }

    /// Changes what the guest may do. When this returns no CPU uses the old rights any more.
    ///
    /// # Errors
    /// [`Error::Protect`].
    pub fn protect(&self, permissions: Permissions) -> Result<()> {
        let (guest_addr, size) = (self.guest_addr.as_u64(), self.size as u64);
        let mut range = ProtectRange { guest_addr, size, flags: permissions.bits(), reserved: 0 };
        // SAFETY: the structure holds no address of this process. The memory behind the range may be written by a
        // guest, as its `Backing` promises.
        unsafe { sys::with(self.space.as_fd(), ioctl::PROTECT, &mut range) }.map_err(|errno| Error::Protect {
            guest_addr,
            size,
            errno,
        })?;
        Ok(())
    }

    /// Unmaps the memory and gives it back. When this returns no CPU reaches it any more.
    ///
    /// # Errors
    /// [`Error::Unmap`]; the memory is leaked then, see [`Slot`].
    pub fn unmap(self) -> Result<Arc<B>> {
        let mut this = ManuallyDrop::new(self);
        let unmapped = this.unmap_range();
        // SAFETY: `this` is never used or dropped again, so the handle leaves it once.
        let space = unsafe { std::ptr::read(&this.space) };
        drop(space);
        unmapped?;
        // SAFETY: as above, and the guest has no access any more.
        Ok(unsafe { ManuallyDrop::take(&mut this.memory) })
    }

    /// Splits the slot into two, which can be unmapped or protected on their own; `at` is the length of the first in
    /// bytes, a multiple of 4096.
    ///
    /// # Errors
    /// [`Error::OutOfBounds`] if one of the two would be empty, or [`Error::Unmap`] with `EINVAL` if `at` is not a
    /// multiple of 4096; the slot is dropped then.
    pub fn split(self, at: usize) -> Result<(Self, Self)> {
        if at == 0 || at >= self.size {
            return Err(Error::OutOfBounds { offset: at, size: 1, memory_size: self.size });
        }
        let invalid = Error::Unmap { guest_addr: self.guest_addr.as_u64(), size: at as u64, errno: Errno::EINVAL };
        if at % 4096 != 0 {
            return Err(invalid);
        }
        let second = Self {
            space: self.space.clone(),
            memory: ManuallyDrop::new(Arc::clone(&self.memory)),
            guest_addr: match self.guest_addr.checked_add(at as u64) {
                Some(guest_addr) => guest_addr,
                None => return Err(invalid),
            },
            offset: self.offset + at,
            size: self.size - at,
        };
        let mut first = self;
        first.size = at;
        Ok((first, second))
    }

    fn unmap_range(&mut self) -> Result<()> {
        let mut range = Range { guest_addr: self.guest_addr.as_u64(), size: self.size as u64 };
        // SAFETY: the structure holds no address of this process.
        unsafe { sys::with(self.space.as_fd(), ioctl::UNMAP, &mut range) }.map_err(|errno| Error::Unmap {
            guest_addr: range.guest_addr,
            size: range.size,
            errno,
        })?;
        Ok(())
    }
}

impl<B: Backing> Drop for Slot<B> {
    fn drop(&mut self) {
        if self.unmap_range().is_ok() {
            // SAFETY: the slot is being dropped, so nobody takes the memory from it again; the guest has no access any
            // more.
            unsafe { ManuallyDrop::drop(&mut self.memory) };
        }
    }
}
