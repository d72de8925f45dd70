// SPDX-License-Identifier: GPL-2.0-only
//! Moving ABI structures between the caller's memory and ours, and turning errors into errnos.

use axvcpu_uapi::{vcpu::RegisterSet, AbiStruct};
use kernel::{
    prelude::*,
    transmute::{AsBytes, FromBytes},
    uaccess::{UserPtr, UserSlice},
};
use vcpu_core::AxError;

/// An ABI structure as bytes.
#[repr(transparent)]
struct Wire<T>(T);

// SAFETY: `AbiStruct` is sealed and implemented for structures of integers only, for which every bit pattern is valid.
unsafe impl<T: AbiStruct> FromBytes for Wire<T> {}
// SAFETY: `AbiStruct` is sealed and its implementer asserts that there is no padding.
unsafe impl<T: AbiStruct> AsBytes for Wire<T> {}

/// Reads a structure of the caller's.
///
/// # Errors
/// `EFAULT`.
pub(crate) fn read<T: AbiStruct>(addr: usize) -> Result<T> {
    Ok(UserSlice::new(UserPtr::from_addr(addr), T::SIZE).reader().read::<Wire<T>>()?.0)
}

/// Writes a structure to the caller.
///
/// # Errors
/// `EFAULT`.
pub(crate) fn write<T: AbiStruct>(addr: usize, value: T) -> Result {
    UserSlice::new(UserPtr::from_addr(addr), T::SIZE).writer().write(&Wire(value))
}

/// Writes words to the caller's memory at `addr`.
///
/// # Errors
/// `EFAULT`; a first part may have been written.
pub(crate) fn write_words(addr: u64, words: &[u64]) -> Result {
    let addr = usize::try_from(addr).map_err(|_| EFAULT)?;
    // SAFETY: Integers have no padding, and bytes no alignment.
    let bytes = unsafe { core::slice::from_raw_parts(words.as_ptr().cast::<u8>(), core::mem::size_of_val(words)) };
    UserSlice::new(UserPtr::from_addr(addr), bytes.len()).writer().write_slice(bytes)
}

/// The address of element `index` of an array of `T` at `base` in the caller's memory.
///
/// # Errors
/// `EFAULT` if it is beyond the address space.
#[cfg(CONFIG_X86_64)] // Arrays are CPUID's and MSRs'.
pub(crate) fn element<T: AbiStruct>(base: u64, index: usize) -> Result<usize> {
    let addr = index.checked_mul(T::SIZE).and_then(|offset| offset.checked_add(usize::try_from(base).ok()?));
    addr.ok_or(EFAULT)
}

/// Gives the caller a register set of fixed size.
///
/// # Errors
/// `EINVAL` if the caller's buffer has another size, `EFAULT`.
pub(crate) fn put_set<T: AbiStruct>(arg: &RegisterSet, addr: usize, value: T) -> Result {
    check_len::<T>(arg)?;
    write(addr, value)
}

/// Takes a register set of fixed size from the caller.
///
/// # Errors
/// As [`put_set`].
pub(crate) fn take_set<T: AbiStruct>(arg: &RegisterSet, addr: usize) -> Result<T> {
    check_len::<T>(arg)?;
    read(addr)
}

fn check_len<T: AbiStruct>(arg: &RegisterSet) -> Result {
    if arg.len as usize == T::SIZE {
        Ok(())
    } else {
        Err(EINVAL)
    }
}

/// Refuses reserved fields and flags that are not zero.
///
/// # Errors
/// `EINVAL`.
pub(crate) fn must_be_zero(fields: &[u64]) -> Result {
    if fields.iter().all(|field| *field == 0) {
        Ok(())
    } else {
        Err(EINVAL)
    }
}

/// The errno of an error of the core.
pub(crate) fn errno(error: AxError) -> Error {
    Error::from_errno(-error.errno())
}

/// `EXDEV`: the object belongs to another process (address space) than the caller's.
pub(crate) fn other_process() -> Error {
    Error::from_errno(-(kernel::bindings::EXDEV as i32))
}

/// `EOPNOTSUPP`: what is asked for does not exist here. (The `kernel` crate has no constant for it before Linux 7.3.)
pub(crate) fn not_supported() -> Error {
    Error::from_errno(-(kernel::bindings::EOPNOTSUPP as i32))
}
