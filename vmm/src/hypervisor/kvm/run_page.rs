// SPDX-License-Identifier: MIT OR Apache-2.0
//! A vCPU's run page: mapped memory that KVM writes, read and written field by field (Linux
//! `Documentation/virt/kvm/api.rst`, section 5).
//!
//! This is a mapping of our own beside the one that kvm-ioctls keeps, which it lends by mutable reference: kickers write to
//! the page while the vCPU runs, and must not do so behind such a reference. Accesses are volatile, since the kernel
//! writes the page during `KVM_RUN`; the one byte that several threads use is atomic.

use std::num::NonZeroUsize;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::Arc;

use axvcpu_uapi::exit::AccessWidth;
use kvm_bindings::kvm_run;
use nix::sys::mman::{mmap, munmap, MapFlags, ProtFlags};

use super::error::Error;
use super::transfer::Transfer;

/// The mapping. [`RunPage`] uses all of it but one byte, which belongs to [`ImmediateExit`].
#[derive(Debug)]
struct Mapping {
    page: NonNull<kvm_run>,
    size: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread. `RunPage`, which is not `Sync`, and `ImmediateExit`, which
// only does atomic accesses, are all that use it, and they use different bytes.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `RunPage::map` mapped exactly this range, and the last user is gone.
        let _ = unsafe { munmap(self.page.cast(), self.size) };
    }
}

/// The page as the thread that runs the vCPU sees it.
#[derive(Debug)]
pub(crate) struct RunPage {
    mapping: Arc<Mapping>,
    /// The page is read and written without synchronisation, so the handle is not for sharing.
    not_sync: std::marker::PhantomData<std::cell::Cell<()>>,
}

/// Reads one field of the page, with `@` for the union of what the exits bring.
macro_rules! get {
    ($page:expr, $($field:tt)+) => {
        // SAFETY: the page stays mapped, aligned and at least as large as the structure for as long as `$page` exists.
        // Every bit pattern is valid: the fields are integers, and so is everything in the union.
        unsafe { std::ptr::read_volatile(&raw const (*$page.as_ptr()).$($field)+) }
    };
}
pub(crate) use get;

impl RunPage {
    /// Maps the run page, `size` bytes, of the vCPU `fd`.
    ///
    /// # Errors
    /// [`Error::MapRunPage`].
    pub(crate) fn map(fd: BorrowedFd<'_>, size: usize) -> Result<Self, Error> {
        let length = NonZeroUsize::new(size).filter(|size| size.get() >= size_of::<kvm_run>());
        let length = length.ok_or(Error::MapRunPage(nix::errno::Errno::EINVAL))?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice disturbs no existing memory.
        let page = unsafe { mmap(None, length, protection, MapFlags::MAP_SHARED, fd, 0) }.map_err(Error::MapRunPage)?;
        let mapping = Arc::new(Mapping { page: page.cast(), size });
        Ok(Self { mapping, not_sync: std::marker::PhantomData })
    }

    /// The page, for those who access its fields: mapped and aligned for as long as `self` exists.
    pub(crate) fn as_ptr(&self) -> *mut kvm_run {
        self.mapping.page.as_ptr()
    }

    /// Its size in bytes.
    pub(crate) fn size(&self) -> usize {
        self.mapping.size
    }

    /// The byte that makes `KVM_RUN` return at once.
    pub(crate) fn immediate_exit(&self) -> ImmediateExit {
        ImmediateExit(Arc::clone(&self.mapping))
    }

    /// Why `KVM_RUN` returned: a `KVM_EXIT_*`.
    pub(crate) fn exit_reason(&self) -> u32 {
        get!(self, exit_reason)
    }

    /// What `KVM_EXIT_MMIO` brings; `None` if it makes no sense.
    pub(crate) fn mmio(&self) -> Option<Transfer> {
        let mmio = get!(self, __bindgen_anon_1.mmio);
        let data = std::mem::offset_of!(kvm_run, __bindgen_anon_1.mmio.data);
        let length = usize::try_from(mmio.len).ok()?;
        (1..=8).contains(&length).then(|| Transfer::memory(mmio.phys_addr, mmio.is_write != 0, data, length))
    }

    /// The reason that `KVM_EXIT_FAIL_ENTRY` brings.
    pub(crate) fn entry_failure(&self) -> u64 {
        get!(self, __bindgen_anon_1.fail_entry.hardware_entry_failure_reason)
    }

    /// The kind of `KVM_EXIT_SYSTEM_EVENT`: a `KVM_SYSTEM_EVENT_*`.
    pub(crate) fn system_event(&self) -> u32 {
        get!(self, __bindgen_anon_1.system_event.type_)
    }

    /// What `KVM_EXIT_INTERNAL_ERROR` brings: a `KVM_INTERNAL_ERROR_*`, and the first word behind it, if there is one.
    pub(crate) fn internal_error(&self) -> (u32, u64) {
        let internal = get!(self, __bindgen_anon_1.internal);
        (internal.suberror, if internal.ndata > 0 { internal.data[0] } else { 0 })
    }

    /// Reads the `width` bytes at `offset`.
    pub(crate) fn read(&self, offset: usize, width: AccessWidth) -> u64 {
        let mut bytes = [0; 8];
        for (i, byte) in bytes.iter_mut().enumerate().take(width.size()) {
            if let Some(at) = self.byte(offset + i) {
                // SAFETY: `byte` gives addresses inside the mapping only.
                *byte = unsafe { at.read_volatile() };
            }
        }
        u64::from_le_bytes(bytes)
    }

    /// Writes the `width` bytes at `offset`.
    pub(crate) fn write(&mut self, offset: usize, width: AccessWidth, value: u64) {
        for (i, byte) in value.to_le_bytes().into_iter().enumerate().take(width.size()) {
            if let Some(at) = self.byte(offset + i) {
                // SAFETY: as in `read`; the mapping is writable, and no reference to its bytes exists.
                unsafe { at.write_volatile(byte) };
            }
        }
    }

    /// The address of the byte at `offset`, if the page has one that is not [`ImmediateExit`]'s.
    fn byte(&self, offset: usize) -> Option<*mut u8> {
        let ours = offset < self.size() && offset != std::mem::offset_of!(kvm_run, immediate_exit);
        // SAFETY: the offset is inside the mapping.
        ours.then(|| unsafe { self.mapping.page.as_ptr().cast::<u8>().add(offset) })
    }
}

/// The byte of the run page that makes `KVM_RUN` return with `EINTR` at once (`KVM_CAP_IMMEDIATE_EXIT`), for any thread.
#[derive(Clone, Debug)]
pub(crate) struct ImmediateExit(Arc<Mapping>);

impl ImmediateExit {
    fn byte(&self) -> &AtomicU8 {
        // SAFETY: the mapping lives as long as `self`, the kernel only reads the byte, and everyone in this process
        // accesses it through this type.
        unsafe { AtomicU8::from_ptr(&raw mut (*self.0.page.as_ptr()).immediate_exit) }
    }

    /// Asks for it.
    pub(crate) fn set(&self) {
        self.byte().store(1, Ordering::SeqCst);
    }

    /// Takes it back.
    pub(crate) fn clear(&self) {
        self.byte().store(0, Ordering::SeqCst);
    }
}

#[cfg(test)]
impl ImmediateExit {
    /// Of a page without a KVM behind it.
    pub(crate) fn nowhere() -> Self {
        tests::page().immediate_exit()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use nix::sys::memfd::{memfd_create, MFdFlags};
    use std::os::fd::AsFd;

    pub(crate) const SIZE: usize = 3 * 4096;

    /// A run page without a KVM behind it.
    pub(crate) fn page() -> RunPage {
        let file = memfd_create(c"run-page", MFdFlags::MFD_CLOEXEC).unwrap();
        nix::unistd::ftruncate(&file, SIZE as i64).unwrap();
        RunPage::map(file.as_fd(), SIZE).unwrap()
    }

    #[test]
    fn exits_that_make_no_sense_are_none() {
        let mut page = page();
        page.write(std::mem::offset_of!(kvm_run, __bindgen_anon_1.mmio.len), AccessWidth::Dword, 9);
        assert_eq!(page.mmio(), None);
        page.write(SIZE - 1, AccessWidth::Word, 0xaabb);
        assert_eq!(page.read(SIZE - 1, AccessWidth::Word), 0xbb, "nothing beyond the end");
    }

    #[test]
    fn kicks_reach_the_page_through_every_handle() {
        let mut page = page();
        let (one, two) = (page.immediate_exit(), page.immediate_exit());
        one.set();
        assert_eq!(get!(page, immediate_exit), 1);
        page.write(0, AccessWidth::Qword, 0);
        assert_eq!(get!(page, immediate_exit), 1, "data of exits cannot overwrite it");
        two.clear();
        assert_eq!(get!(page, immediate_exit), 0);
    }

    #[test]
    fn too_small_a_page_is_refused() {
        let file = memfd_create(c"run-page", MFdFlags::MFD_CLOEXEC).unwrap();
        assert!(RunPage::map(file.as_fd(), 64).is_err());
    }
}
