// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! A vCPU's part in its VM's GIC: when list registers are filled and folded, its timer's interrupt, and its waiting.
//!
//! List registers stay in the CPU from one entry to the next as long as nobody has posted anything; when the guest is
//! left for more than an exit (`leave`), or looks at the GIC's registers, they are folded, and the distributor knows all.
//!
//! The timer runs in hardware while the guest does. Its physical interrupt, like the GIC's maintenance interrupt, belongs to
//! KVM, if to anybody; all that is used of either is that the guest is left when it comes. Where KVM has switched it off,
//! nothing comes. So the host's timer is armed for the guest's, whether the guest sleeps or runs, and maintenance is done at
//! the latest with the next interrupt of the host's.
//!
//! As long as the guest has been told that the timer asks, its physical interrupt must not end the guest's turn again. It is
//! made active at the host's interrupt controller, as KVM does, and becomes inactive when the guest deactivates its own. Where
//! we cannot do that, the timer is masked, which the guest can see, and confuse with a mask of its own.

use core::ops::Deref;
use core::sync::atomic::{AtomicBool, Ordering};

use crate::gic::{hardware, Distributor, Gic, Interface, Notices};
use crate::hal::ArmHal;
use crate::timer::Timer;
use axvcpu_uapi::arm64::GIC_TIMER_PPI;

/// What others post to a vCPU: that there is something to look at.
#[derive(Debug, Default)]
pub struct Mailbox {
    attention: AtomicBool,
    timer: AtomicBool,
}

impl Mailbox {
    /// An empty one.
    pub const fn new() -> Self {
        Self { attention: AtomicBool::new(false), timer: AtomicBool::new(false) }
    }

    /// The vCPU must look at its interrupts. From any context; who posts notifies.
    pub fn post(&self) {
        self.attention.store(true, Ordering::SeqCst);
    }

    /// The host timer expired.
    pub fn post_timer(&self) {
        self.timer.store(true, Ordering::SeqCst);
    }

    /// Whether something waits.
    #[inline]
    pub fn pending(&self) -> bool {
        self.attention.load(Ordering::SeqCst) || self.timer.load(Ordering::SeqCst)
    }

    #[inline]
    fn take(flag: &AtomicBool) -> bool {
        flag.load(Ordering::Relaxed) && flag.swap(false, Ordering::SeqCst)
    }
}

/// What the host timer must do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TimerUpdate {
    /// Nothing.
    Unchanged,
    /// Stop.
    Cancel,
    /// Expire at this time of the host's monotonic clock, in nanoseconds.
    Arm(u64),
}

/// The part.
pub(crate) struct Interrupts<G> {
    gic: G,
    cpu: usize,
    shape: hardware::Shape,
    /// Something was posted since list registers were filled.
    stale: bool,
    /// The guest has executed WFI.
    waits: bool,
    /// What the distributor was told last of the timer's line.
    timer_line: bool,
    /// The timer's physical interrupt was made active for the guest that is loaded.
    timer_held: bool,
    /// What the host timer is armed for.
    armed: Option<u64>,
    notices: Notices,
}

impl<G> Interrupts<G> {
    /// The guest waits for an interrupt.
    pub(crate) fn wait(&mut self) {
        self.waits = true;
    }

    /// It does not any more, since somebody sets its registers.
    pub(crate) fn end_wait(&mut self) {
        self.waits = false;
    }

    /// Whether something must be [told](Self::tell).
    pub(crate) fn has_notices(&self) -> bool {
        !self.notices.is_empty()
    }

    /// What the host timer must do for the guest's, which is `timer` when its counter stands at `now`.
    pub(crate) fn timer_update<H: ArmHal>(&mut self, timer: Timer, now: u64, hertz: u64) -> TimerUpdate {
        // It may have become due since the line was set: then nobody knows yet.
        let known = self.timer_line && timer.is_due(now);
        let wanted = (timer.is_armed() && !known).then_some(timer.compare);
        if wanted == self.armed {
            return TimerUpdate::Unchanged;
        }
        self.armed = wanted;
        match wanted {
            None => TimerUpdate::Cancel,
            Some(_) => TimerUpdate::Arm(H::now_ns().saturating_add(timer.delay_ns(now, hertz))),
        }
    }
}

impl<H: ArmHal, G: Deref<Target = Gic<H>>> Interrupts<G> {
    /// The part of vCPU `cpu`, with the interface's registers as after a reset.
    ///
    /// # Safety
    /// At EL2 on a CPU with GICv3 system registers.
    pub(crate) unsafe fn new(gic: G, cpu: usize, interface: &mut Interface) -> Self {
        // SAFETY: The caller's promise.
        let shape = unsafe { hardware::Shape::host() };
        interface.preemption_bits = shape.preemption_bits;
        interface.timer = H::timer_interrupt().unwrap_or(0);
        Self {
            gic,
            cpu,
            shape,
            stale: false,
            waits: false,
            timer_line: false,
            timer_held: false,
            armed: None,
            notices: Notices::default(),
        }
    }

    fn gic(&self) -> &Distributor {
        &self.gic
    }

    fn set_timer_line(&mut self, high: bool) {
        self.timer_line = high;
        self.gic().set_private_line(self.cpu, GIC_TIMER_PPI as usize, high);
    }

    /// Takes what was posted, and tells whether there is something to run for. `due` is whether the timer of a vCPU that is not
    /// loaded asks for its interrupt.
    pub(crate) fn prepare(&mut self, mailbox: &Mailbox, interface: &Interface, due: impl FnOnce() -> bool) -> bool {
        if Mailbox::take(&mailbox.timer) {
            // It must be armed again if it was too early.
            self.armed = None;
            self.stale = true;
        }
        if Mailbox::take(&mailbox.attention) {
            self.stale = true;
        }
        if self.waits {
            // A guest that waits has been left since.
            self.set_timer_line(due());
            self.waits = !interface.wants(self.gic(), self.cpu);
        }
        !self.waits
    }

    /// The guest is about to be loaded, and its timer asks for its interrupt if it is `due`: keeps the physical interrupt from
    /// coming for what the guest knows. Whether that is done; otherwise the timer must be masked.
    pub(crate) fn hold_timer(&mut self, interface: &Interface, due: bool) -> bool {
        let can = interface.timer != 0;
        if can && (due || self.gic().is_private_active(self.cpu, GIC_TIMER_PPI as usize)) {
            H::hold_timer_interrupt(true);
            self.timer_held = true;
        }
        can
    }

    /// The guest has been left, and its timer is off; or it has deactivated its timer's interrupt.
    pub(crate) fn release_timer(&mut self) {
        if core::mem::take(&mut self.timer_held) {
            H::hold_timer_interrupt(false);
        }
    }

    /// Loads the interface. `due` is whether the timer asks for its interrupt.
    ///
    /// # Safety
    /// At EL2 on a CPU with GICv3 system registers, exceptions masked. [`leave`](Self::leave) follows on it.
    pub(crate) unsafe fn load(&mut self, interface: &mut Interface, due: bool) {
        self.set_timer_line(due);
        self.stale = false;
        interface.fill(&self.gic, self.cpu, self.shape.lists, &mut self.notices);
        // SAFETY: The caller's promise; all CPUs are of one shape, or Linux would not have started them with one driver.
        unsafe { hardware::load(interface, self.shape) };
    }

    /// Fills the list registers anew if something was posted, and returns whether it did. `due` is whether the timer asks for its
    /// interrupt.
    ///
    /// # Safety
    /// Between [`load`](Self::load) and [`leave`](Self::leave).
    pub(crate) unsafe fn refresh(&mut self, interface: &mut Interface, due: impl FnOnce() -> bool) -> bool {
        let stale = core::mem::take(&mut self.stale);
        if stale {
            self.set_timer_line(due());
            // SAFETY: The caller's promise.
            unsafe { hardware::save_lists(interface) };
            interface.fold(&self.gic, self.cpu, &mut self.notices);
            interface.fill(&self.gic, self.cpu, self.shape.lists, &mut self.notices);
            // SAFETY: As above.
            unsafe { hardware::load_lists(interface, self.shape) };
        }
        stale
    }

    /// Saves the interface, and tells the distributor all that is in it.
    ///
    /// # Safety
    /// After [`load`](Self::load), on the same CPU.
    pub(crate) unsafe fn leave(&mut self, interface: &mut Interface) {
        // SAFETY: The caller's promise.
        unsafe { hardware::save(interface, self.shape) };
        interface.fold(&self.gic, self.cpu, &mut self.notices);
    }

    /// The guest on this vCPU is about to look at the distributor, or deactivates an interrupt: tells the distributor all
    /// that is in the list registers, to be filled again before the next entry.
    ///
    /// # Safety
    /// Between [`load`](Self::load) and [`leave`](Self::leave).
    pub(crate) unsafe fn tell_all(&mut self, interface: &mut Interface) -> &Distributor {
        self.stale = true;
        // SAFETY: The caller's promise.
        unsafe { hardware::save_lists(interface) };
        interface.fold(&self.gic, self.cpu, &mut self.notices);
        &self.gic
    }

    /// ICC_DIR_EL1, trapped.
    ///
    /// # Safety
    /// As [`tell_all`](Self::tell_all).
    pub(crate) unsafe fn deactivate(&mut self, interface: &mut Interface, value: u64) {
        // SAFETY: The caller's promise.
        unsafe {
            self.tell_all(interface);
            // For the mode, which is in there.
            interface.vmcr = crate::cpu::IchVmcrEl2.get();
        }
        interface.deactivate(&self.gic, self.cpu, value, &mut self.notices);
        // The CPU would have deactivated the physical interrupt with its own, and would be interrupted again.
        if value == u64::from(GIC_TIMER_PPI) {
            self.release_timer();
        }
    }

    /// Tells by `end` which SPIs have ended, which sets their lines anew, and returns the vCPUs that must look at their interrupts
    /// then, as bits.
    pub(crate) fn tell(&mut self, interface: &mut Interface, end: impl FnMut(u8)) -> u64 {
        let told = core::mem::take(&mut self.notices);
        told.ended().for_each(end);
        interface.told(&self.gic, self.cpu, &told, &mut self.notices);
        self.stale = true;
        told.wake | core::mem::take(&mut self.notices.wake)
    }

    /// The distributor, as far as it knows without the list registers.
    pub(crate) fn without_lists(&self) -> &Distributor {
        &self.gic
    }

    /// Whether the GIC has registers at `addr`.
    pub(crate) fn covers(&self, addr: u64) -> bool {
        self.gic().covers(addr)
    }
}
