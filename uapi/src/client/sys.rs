// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The ioctl system call with the argument types of this ABI.
#![allow(unsafe_code)]

use crate::layout::AbiStruct;
use nix::errno::Errno;
use nix::libc;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// An ioctl without argument.
///
/// # Errors
/// The errno of the call.
#[inline]
pub(super) fn none(fd: BorrowedFd<'_>, request: u32) -> Result<i32, Errno> {
    debug_assert_eq!(request >> 16, 0, "the request has an argument");
    // SAFETY: the request number says that there is no argument, so the kernel follows no pointer; `fd` is open.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), request as _, 0usize) })
}

/// An ioctl with a structure that the kernel reads, or writes, or both.
///
/// # Errors
/// The errno of the call.
///
/// # Safety
/// Every address in `argument` that the kernel stores through is the address of memory of the stated size which the
/// caller may write, for the duration of the call or for as long as the call makes the kernel remember it.
pub(super) unsafe fn with<T: AbiStruct>(fd: BorrowedFd<'_>, request: u32, argument: &mut T) -> Result<i32, Errno> {
    assert_eq!((request >> 16) as usize & 0x3fff, T::SIZE, "the request takes another structure");
    let argument: *mut T = argument;
    // SAFETY: the request number carries the size of `T`, which is all that the kernel reads and writes here,
    // `argument` comes from an exclusive reference, and an ABI structure is valid whatever bytes are written to it.
    // What the kernel writes elsewhere is the caller's promise.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), request as _, argument) })
}

/// An ioctl that creates a file descriptor.
///
/// # Errors
/// The errno of the call.
///
/// # Safety
/// As for [`with`]; and `request`, if it succeeds, returns a new file descriptor.
pub(super) unsafe fn create<T: AbiStruct>(
    fd: BorrowedFd<'_>,
    request: u32,
    argument: &mut T,
) -> Result<OwnedFd, Errno> {
    // SAFETY: handed on from the caller.
    let new = unsafe { with(fd, request, argument) }?;
    // SAFETY: the caller vouches that the call returned a new descriptor, which nobody else owns yet.
    Ok(unsafe { OwnedFd::from_raw_fd(new) })
}
