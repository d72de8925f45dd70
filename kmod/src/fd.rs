// SPDX-License-Identifier: GPL-2.0-only
//! Objects behind anonymous file descriptors: VMs, address spaces and vCPUs.
//!
//! A file holds one reference of the object's `Arc`; other objects may hold more, so descriptors can be closed in any
//! order. The operations name the module as their owner, so it cannot be unloaded while a descriptor is open.

use core::marker::PhantomData;

use kernel::{
    bindings,
    fs::LocalFile,
    prelude::*,
    seq_file::SeqFile,
    sync::{Arc, ArcBorrow},
    types::{ForeignOwnable, Opaque},
};

use crate::ffi;

/// An object that a file descriptor stands for.
pub(crate) trait FdObject: Sized + Send + Sync + 'static {
    /// What `/proc/PID/fd` shows.
    const NAME: &'static CStr;

    /// The one instance of this type's file operations, whose address identifies the type.
    fn operations() -> &'static FileOperations<Self>;

    /// An ioctl.
    fn ioctl(this: ArcBorrow<'_, Self>, cmd: u32, arg: usize) -> Result<isize>;

    /// mmap. `vma` is being set up.
    fn mmap(_this: ArcBorrow<'_, Self>, _vma: &kernel::mm::virt::VmaNew) -> Result {
        Err(ENODEV)
    }

    /// What `/proc/PID/fdinfo` shows.
    fn show(&self, to: &SeqFile);
}

/// The file operations for objects of type `T`.
#[repr(transparent)]
pub(crate) struct FileOperations<T>(bindings::file_operations, PhantomData<fn(T)>);

// SAFETY: A table of function pointers that is never written.
unsafe impl<T> Sync for FileOperations<T> {}

#[allow(improper_ctypes)] // Only its address is used.
extern "C" {
    /// The module itself, as the kernel's loader sees it.
    static __this_module: Opaque<bindings::module>;
}

/// File operations that do nothing but keep the module loaded while a file has them.
pub(crate) const fn operations_of_this_module() -> bindings::file_operations {
    // SAFETY: All zero is a table without operations.
    let mut table: bindings::file_operations = unsafe { core::mem::MaybeUninit::zeroed().assume_init() };
    table.owner = core::ptr::addr_of!(__this_module).cast_mut().cast();
    table
}

impl<T: FdObject> FileOperations<T> {
    /// The table. To be placed in a static.
    pub(crate) const fn new() -> Self {
        let mut table = operations_of_this_module();
        table.release = Some(Self::release);
        table.unlocked_ioctl = Some(Self::ioctl);
        table.compat_ioctl = Some(Self::ioctl);
        table.mmap = Some(Self::mmap);
        table.show_fdinfo = Some(Self::show_fdinfo);
        Self(table, PhantomData)
    }

    /// # Safety
    /// `file` has these operations and is not being released.
    unsafe fn object<'a>(file: *mut bindings::file) -> ArcBorrow<'a, T> {
        // SAFETY: The private data is the `Arc` that `install` turned into a pointer, which the file owns until `release`.
        unsafe { Arc::<T>::borrow((*file).private_data) }
    }

    unsafe extern "C" fn release(_inode: *mut bindings::inode, file: *mut bindings::file) -> c_int {
        // SAFETY: The file is released once, and with it the reference that `install` put there.
        drop(unsafe { Arc::<T>::from_foreign((*file).private_data) });
        0
    }

    unsafe extern "C" fn ioctl(file: *mut bindings::file, cmd: c_uint, arg: c_ulong) -> c_long {
        // SAFETY: The VFS calls this on an open file of ours.
        match T::ioctl(unsafe { Self::object(file) }, cmd, arg) {
            Ok(value) => value as c_long,
            Err(error) => error.to_errno() as c_long,
        }
    }

    unsafe extern "C" fn mmap(file: *mut bindings::file, vma: *mut bindings::vm_area_struct) -> c_int {
        // SAFETY: The VFS passes a VMA that is undergoing set-up, and nobody else uses it meanwhile.
        let vma = unsafe { kernel::mm::virt::VmaNew::from_raw(vma) };
        // SAFETY: The VFS calls this on an open file of ours.
        match T::mmap(unsafe { Self::object(file) }, vma) {
            Ok(()) => 0,
            Err(error) => error.to_errno(),
        }
    }

    unsafe extern "C" fn show_fdinfo(to: *mut bindings::seq_file, file: *mut bindings::file) {
        // SAFETY: procfs passes a valid `seq_file` that is ours for the call.
        let to = unsafe { SeqFile::from_raw(to) };
        // SAFETY: procfs holds a reference to the file, which is one of ours.
        let object = unsafe { Self::object(file) };
        object.show(to);
    }
}

/// Gives the current process a file descriptor for `object`.
///
/// # Errors
/// `EMFILE`, `ENFILE`, `ENOMEM`.
pub(crate) fn install<T: FdObject>(object: Arc<T>) -> Result<isize> {
    let private = object.into_foreign();
    // SAFETY: The operations are those for `T`, and `private` is an `Arc<T>` that the file takes over.
    let fd = unsafe { ffi::anon_fd(T::NAME, &T::operations().0, private) };
    if fd.is_err() {
        // SAFETY: Without a file the reference is still ours.
        drop(unsafe { Arc::<T>::from_foreign(private) });
    }
    Ok(fd? as isize)
}

/// The object behind file descriptor `fd` of the current process.
///
/// # Errors
/// `EBADF` if it is no open file, `EINVAL` if the file is something else.
pub(crate) fn lookup<T: FdObject>(fd: i32) -> Result<Arc<T>> {
    let file = LocalFile::fget(u32::try_from(fd).map_err(|_| EBADF)?)?;
    let raw = file.as_ptr();
    // SAFETY: `file` keeps the structure alive, and `f_op` never changes after open.
    if !core::ptr::eq(unsafe { (*raw).f_op }, &T::operations().0) {
        return Err(EINVAL);
    }
    // SAFETY: The operations are those for `T`, and `file` keeps it open for the duration of the borrow.
    let object = unsafe { FileOperations::<T>::object(raw) };
    Ok(object.into())
}
