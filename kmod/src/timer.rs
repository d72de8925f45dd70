// SPDX-License-Identifier: GPL-2.0-only
//! The host timer behind a vCPU's timer: when it expires it posts and wakes, nothing more.
//!
//! The kernel's own Rust interface to high-resolution timers can move one that runs only by cancelling it first; the C function
//! moves it in place, which a guest asks for at each of its ticks.
//!
//! Locks: none of ours; the kernel's of the CPU whose timer it is.

use kernel::{bindings, prelude::*, sync::Arc, types::Opaque};

use crate::shared::Shared;

/// What the C side knows: the timer, at the start, and whom it is for.
///
/// # Invariants
/// `timer` has been set up, with [`expired`] for its callback.
#[repr(C)]
#[pin_data]
struct Inner {
    #[pin]
    timer: Opaque<bindings::hrtimer>,
    vcpu: Arc<Shared>,
}

/// A vCPU's timer.
pub(crate) struct Timer(Pin<KBox<Inner>>);

// SAFETY: A timer is made to be used from any context; the C side has a lock for it.
unsafe impl Send for Timer {}

/// The callback, in interrupt context.
///
/// # Safety
/// `timer` is that of an [`Inner`].
unsafe extern "C" fn expired(timer: *mut bindings::hrtimer) -> bindings::hrtimer_restart {
    // SAFETY: By the caller's promise, and the timer is the first field; `Inner` is not freed before the timer has been cancelled,
    // which waits for this function.
    let this = unsafe { &*timer.cast::<Inner>() };
    this.vcpu.mailbox.post_timer();
    this.vcpu.notify();
    // SAFETY: A number, whatever bindgen makes of the enumeration in this kernel; 0 is HRTIMER_NORESTART.
    unsafe { core::mem::zeroed() }
}

impl Timer {
    /// A stopped timer for `vcpu`.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub(crate) fn new(vcpu: Arc<Shared>) -> Result<Self> {
        let inner = KBox::pin_init(
            pin_init!(Inner {
                // INVARIANT: Set up here.
                timer <- Opaque::ffi_init(|timer| {
                    // SAFETY: `timer` is memory for one, which stays where it is and needs no initial value.
                    unsafe {
                        bindings::hrtimer_setup(
                            timer,
                            Some(expired),
                            bindings::CLOCK_MONOTONIC as bindings::clockid_t,
                            bindings::hrtimer_mode_HRTIMER_MODE_ABS,
                        );
                    }
                }),
                vcpu,
            }),
            GFP_KERNEL_ACCOUNT,
        )?;
        Ok(Self(inner))
    }

    /// Lets it expire at `at_ns` of the monotonic clock, in nanoseconds, instead of when it would have before. An earlier expiry may
    /// be under way.
    pub(crate) fn arm(&mut self, at_ns: u64) {
        let at = i64::try_from(at_ns).unwrap_or(i64::MAX);
        // SAFETY: By the invariant it has been set up; whether it runs does not matter.
        unsafe {
            bindings::hrtimer_start_range_ns(self.0.timer.get(), at, 0, bindings::hrtimer_mode_HRTIMER_MODE_ABS);
        }
    }

    /// Stops it. When this returns no expiry is under way.
    pub(crate) fn cancel(&mut self) {
        // SAFETY: By the invariant it has been set up. The callback waits for nobody.
        unsafe { bindings::hrtimer_cancel(self.0.timer.get()) };
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        self.cancel();
    }
}
