// SPDX-License-Identifier: GPL-2.0-only
//! The host timer behind a vCPU's timer: when it expires it posts and wakes, nothing more.
//!
//! Locks: none of ours; the kernel's of the CPU whose timer it is.

use kernel::{
    impl_has_hr_timer,
    prelude::*,
    sync::{Arc, ArcBorrow},
    time::{
        hrtimer::{
            ArcHrTimerHandle, HrTimer, HrTimerCallback, HrTimerCallbackContext, HrTimerPointer, HrTimerRestart,
            RelativeMode,
        },
        Delta, Monotonic,
    },
};

use crate::shared::Shared;

#[pin_data]
struct Inner {
    #[pin]
    timer: HrTimer<Self>,
    vcpu: Arc<Shared>,
}

impl HrTimerCallback for Inner {
    type Pointer<'a> = Arc<Self>;

    fn run(this: ArcBorrow<'_, Self>, _context: HrTimerCallbackContext<'_, Self>) -> HrTimerRestart {
        this.vcpu.mailbox.post_timer();
        this.vcpu.notify();
        HrTimerRestart::NoRestart
    }
}

impl_has_hr_timer! {
    impl HasHrTimer<Self> for Inner {
        mode: RelativeMode<Monotonic>, field: self.timer
    }
}

/// A vCPU's timer.
pub(crate) struct Timer {
    inner: Arc<Inner>,
    /// There while the timer may be running; dropping it cancels.
    armed: Option<ArcHrTimerHandle<Inner>>,
}

impl Timer {
    /// A stopped timer for `vcpu`.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub(crate) fn new(vcpu: Arc<Shared>) -> Result<Self> {
        let inner = Arc::pin_init(pin_init!(Inner { timer <- HrTimer::new(), vcpu }), GFP_KERNEL_ACCOUNT)?;
        Ok(Self { inner, armed: None })
    }

    /// Lets it expire `delay_ns` nanoseconds from now, instead of when it would have before.
    pub(crate) fn arm(&mut self, delay_ns: u64) {
        self.cancel();
        let delay = Delta::from_nanos(i64::try_from(delay_ns).unwrap_or(i64::MAX));
        self.armed = Some(self.inner.clone().start(delay));
    }

    /// Stops it. When this returns no expiry is under way.
    pub(crate) fn cancel(&mut self) {
        self.armed = None;
    }
}
