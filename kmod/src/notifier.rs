// SPDX-License-Identifier: GPL-2.0-only
//! MMU notifiers: the host's memory management tells us before it takes pages of a process away or changes their rights.

use kernel::{bindings, container_of, mm::Mm, prelude::*, sync::aref::ARef, types::Opaque};

/// Who wants to know.
pub(crate) trait Invalidate: Send + Sync + 'static {
    /// The host virtual range `start..end` is about to change. When this returns no CPU may use a translation of it
    /// and none may be made until [`end`](Self::end).
    fn begin(&self, start: u64, end: u64);

    /// The change that [`begin`](Self::begin) announced is done.
    fn end(&self, start: u64, end: u64);
}

/// A registration with one address space of the host.
///
/// # Invariants
/// `notifier` is registered with `mm` while the object exists.
#[pin_data(PinnedDrop)]
pub(crate) struct Notifier<T: Invalidate> {
    #[pin]
    notifier: Opaque<bindings::mmu_notifier>,
    mm: ARef<Mm>,
    target: *const T,
}

// SAFETY: The notifier is unregistered from whatever thread drops it, and the target may be shared.
unsafe impl<T: Invalidate> Send for Notifier<T> {}
// SAFETY: As above.
unsafe impl<T: Invalidate> Sync for Notifier<T> {}

struct Operations<T>(core::marker::PhantomData<T>);

impl<T: Invalidate> Operations<T> {
    const TABLE: bindings::mmu_notifier_ops = {
        // SAFETY: All zero is a table without operations.
        let mut table: bindings::mmu_notifier_ops = unsafe { core::mem::MaybeUninit::zeroed().assume_init() };
        table.release = Some(Self::release);
        table.invalidate_range_start = Some(Self::start);
        table.invalidate_range_end = Some(Self::end);
        table
    };

    /// # Safety
    /// `notifier` is the field of a live `Notifier<T>`.
    unsafe fn target<'a>(notifier: *mut bindings::mmu_notifier) -> &'a T {
        // SAFETY: `Opaque` is transparent, and the caller vouches for the container.
        let this = unsafe { &*container_of!(Opaque::cast_from(notifier), Notifier<T>, notifier) };
        // SAFETY: The target outlives the registration by the contract of `Notifier::new`.
        unsafe { &*this.target }
    }

    unsafe extern "C" fn start(
        notifier: *mut bindings::mmu_notifier,
        range: *const bindings::mmu_notifier_range,
    ) -> c_int {
        // SAFETY: The core calls this with a registered notifier and a valid range.
        let (target, range) = unsafe { (Self::target(notifier), &*range) };
        target.begin(range.start as u64, range.end as u64);
        0
    }

    unsafe extern "C" fn end(notifier: *mut bindings::mmu_notifier, range: *const bindings::mmu_notifier_range) {
        // SAFETY: The core calls this with a registered notifier and a valid range.
        let (target, range) = unsafe { (Self::target(notifier), &*range) };
        target.end(range.start as u64, range.end as u64);
    }

    /// The process exits: everything goes.
    unsafe extern "C" fn release(notifier: *mut bindings::mmu_notifier, _mm: *mut bindings::mm_struct) {
        // SAFETY: The core calls this with a registered notifier.
        let target = unsafe { Self::target(notifier) };
        target.begin(0, u64::MAX);
        target.end(0, u64::MAX);
    }
}

impl<T: Invalidate> Notifier<T> {
    /// Registers with the current process, whose address space `mm` is.
    ///
    /// # Errors
    /// `ENOMEM`, `EINTR`.
    ///
    /// # Safety
    /// `target` is valid from now until the notifier has been dropped.
    pub(crate) unsafe fn new(mm: ARef<Mm>, target: *const T) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            target,
            notifier <- Opaque::try_ffi_init(|slot: *mut bindings::mmu_notifier| {
                // SAFETY: `slot` is ours to initialise; all zero but the operations is what registering expects.
                unsafe {
                    slot.write(core::mem::zeroed());
                    (*slot).ops = &Operations::<T>::TABLE;
                }
                // SAFETY: The notifier is pinned and stays until `drop`; the current process has a reference to its mm.
                // Callbacks read `target` and `notifier` only, which are initialised.
                kernel::error::to_result(unsafe { bindings::mmu_notifier_register(slot, mm.as_raw()) })
            }),
            mm,
        })
    }
}

#[pinned_drop]
impl<T: Invalidate> PinnedDrop for Notifier<T> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: Registered by the type invariant, with an mm that we hold a reference to. Waits for callbacks under way.
        unsafe { bindings::mmu_notifier_unregister(self.notifier.get(), self.mm.as_raw()) }
    }
}
