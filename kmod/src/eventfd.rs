// SPDX-License-Identifier: GPL-2.0-only
//! Eventfds: [`EventFd`], to be signalled, and [`Listener`], which is told of each signal.
//!
//! Both hold the eventfd itself, not a file, so a program can close its descriptors at any time. A signal takes the
//! eventfd's own lock, with interrupts off; a listener is called under it, from any context.

use core::{marker::PhantomPinned, ptr::NonNull};

use kernel::{bindings, container_of, error::from_err_ptr, fs::LocalFile, prelude::*, types::Opaque};

use crate::ffi;

/// What a wake-up tells (`include/uapi/linux/eventpoll.h`): there is something to read.
const POLL_IN: usize = 1 << 0;
/// What a wake-up tells: the last file has been closed.
const POLL_HANGUP: usize = 1 << 4;

/// An eventfd.
///
/// # Invariants
/// The pointer is valid, and this object owns one reference.
pub(crate) struct EventFd(NonNull<bindings::eventfd_ctx>);

// SAFETY: An eventfd is made to be used from several contexts at once.
unsafe impl Send for EventFd {}
// SAFETY: As above.
unsafe impl Sync for EventFd {}

/// The open file `fd` of the current process.
///
/// # Errors
/// `EBADF`.
pub(crate) fn file(fd: i32) -> Result<kernel::sync::aref::ARef<LocalFile>> {
    Ok(LocalFile::fget(u32::try_from(fd).map_err(|_| EBADF)?)?)
}

impl EventFd {
    /// The eventfd that `file` is.
    ///
    /// # Errors
    /// `EINVAL` if it is another kind of file.
    pub(crate) fn of(file: &LocalFile) -> Result<Self> {
        // SAFETY: The file is open as long as the caller has it.
        let context = from_err_ptr(unsafe { bindings::eventfd_ctx_fileget(file.as_ptr()) })?;
        // INVARIANT: The call gave a reference.
        Ok(Self(NonNull::new(context).ok_or(EINVAL)?))
    }

    /// The eventfd with the descriptor `fd` of the current process.
    ///
    /// # Errors
    /// `EBADF`, and those of [`of`](Self::of).
    pub(crate) fn get(fd: i32) -> Result<Self> {
        Self::of(&*file(fd)?)
    }

    /// Whether both are the same eventfd.
    pub(crate) fn is(&self, other: &Self) -> bool {
        self.0 == other.0
    }

    /// Adds one to its count and wakes whoever waits. From any context, but not from a [`Signalled::signalled`], since
    /// eventfds do not nest.
    pub(crate) fn signal(&self) {
        // SAFETY: Valid by the type invariant. The callers are vCPU threads outside of any other call on an eventfd.
        unsafe { bindings::eventfd_signal_mask(self.0.as_ptr(), 0) }
    }
}

impl Drop for EventFd {
    fn drop(&mut self) {
        // SAFETY: We own the reference by the type invariant.
        unsafe { bindings::eventfd_ctx_put(self.0.as_ptr()) }
    }
}

/// Who wants to know.
pub(crate) trait Signalled: Send + Sync + 'static {
    /// The eventfd was signalled, once or more. Interrupts are off, and the eventfd is locked.
    fn signalled(&self);

    /// Its last file was closed: no program can signal it any more. Interrupts are off, and the eventfd is locked.
    fn closed(&self);
}

/// A listener on an eventfd, which takes the eventfd's count away, as a reader would.
///
/// # Invariants
/// `wait` is in the queue of `event` while the object exists.
#[pin_data(PinnedDrop)]
pub(crate) struct Listener<T: Signalled> {
    #[pin]
    wait: Opaque<bindings::wait_queue_entry>,
    event: EventFd,
    target: *const T,
    #[pin]
    _pin: PhantomPinned,
}

// SAFETY: The entry is taken out of the queue from whatever thread drops it, and the target may be shared.
unsafe impl<T: Signalled> Send for Listener<T> {}
// SAFETY: As above.
unsafe impl<T: Signalled> Sync for Listener<T> {}

impl<T: Signalled> Listener<T> {
    /// Listens to the eventfd that `file` is. Signals from before count.
    ///
    /// # Errors
    /// Those of [`EventFd::of`].
    ///
    /// # Safety
    /// `target` is valid from now until the listener has been dropped.
    pub(crate) unsafe fn new<'a>(file: &'a LocalFile, target: *const T) -> impl PinInit<Self, Error> + 'a {
        try_pin_init!(Self {
            event: EventFd::of(file)?,
            target,
            _pin: PhantomPinned,
            wait <- Opaque::ffi_init(move |slot: *mut bindings::wait_queue_entry| {
                // SAFETY: The slot is pinned and stays until `drop`; the file is an eventfd, or `of` had failed. The callback
                // reads `target` and `event` only, which are initialised.
                unsafe { ffi::listen(file.as_ptr(), slot, Self::wake) }
            }),
        })
    }

    /// The eventfd.
    pub(crate) fn event(&self) -> &EventFd {
        &self.event
    }

    /// The callback of the wait queue. `key` holds poll flags; 0 at the first call, which looks for signals from before.
    unsafe extern "C" fn wake(
        wait: *mut bindings::wait_queue_entry,
        _mode: c_uint,
        _flags: c_int,
        key: *mut core::ffi::c_void,
    ) -> c_int {
        let events = key as usize;
        // SAFETY: The core passes an entry of a queue, which is the field of a live listener.
        let this = unsafe { &*container_of!(Opaque::cast_from(wait), Self, wait) };
        let mut count = 0;
        // SAFETY: The eventfd is valid by its type's invariant, and locked by the caller.
        unsafe { bindings::eventfd_ctx_do_read(this.event.0.as_ptr(), &mut count) };
        // SAFETY: The target outlives the listener by the contract of `new`.
        let target = unsafe { &*this.target };
        if count != 0 || events & POLL_IN != 0 {
            target.signalled();
        }
        if events & POLL_HANGUP != 0 {
            target.closed();
        }
        0
    }
}

#[pinned_drop]
impl<T: Signalled> PinnedDrop for Listener<T> {
    fn drop(self: Pin<&mut Self>) {
        let mut count = 0;
        // SAFETY: The entry is in the eventfd's queue by the type invariant. Under the queue's lock, so no call is under way
        // afterwards. What was signalled since the last call has been told by that call, so the count is of no interest.
        unsafe { bindings::eventfd_ctx_remove_wait_queue(self.event.0.as_ptr(), self.wait.get(), &mut count) };
    }
}
