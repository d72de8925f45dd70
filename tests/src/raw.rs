// SPDX-License-Identifier: MIT OR Apache-2.0
//! ioctls as no sensible program would make them: any number, any argument.

use axvcpu_uapi::client::Errno;
use axvcpu_uapi::AbiStruct;
use nix::libc;
use std::os::fd::{AsRawFd, BorrowedFd};

/// An ioctl with a number and a value that need not be an address.
///
/// # Errors
/// The errno of the call.
///
/// # Safety
/// If the kernel follows `argument` for this request, what it stores (there, and at addresses in the structure there)
/// goes to memory that the caller may write, or faults.
pub unsafe fn ioctl(fd: BorrowedFd<'_>, request: u32, argument: usize) -> Result<i32, Errno> {
    // SAFETY: the caller's promise is what the call needs.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), request as _, argument) })
}

/// An ioctl without argument.
///
/// # Errors
/// The errno of the call.
pub fn none(fd: BorrowedFd<'_>, request: u32) -> Result<i32, Errno> {
    assert_eq!(request >> 16, 0, "the request has an argument");
    // SAFETY: the number says that the kernel follows no address.
    unsafe { ioctl(fd, request, 0) }
}

/// An ioctl with a structure, whose addresses (if it has any) are those of memory that may be overwritten.
///
/// # Errors
/// The errno of the call.
pub fn plain<T: AbiStruct>(fd: BorrowedFd<'_>, request: u32, mut argument: T) -> Result<i32, Errno> {
    assert_eq!((request >> 16) as usize & 0x3fff, T::SIZE, "the request takes another structure");
    // SAFETY: the structure is ours and as long as the number says. The tests put addresses of their own buffers, or
    // ones that nothing is mapped at, into it.
    unsafe { ioctl(fd, request, &raw mut argument as usize) }
}
