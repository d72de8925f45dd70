// SPDX-License-Identifier: MIT OR Apache-2.0
//! Time for devices: what they ask the time of, and how they hear that it has come.

/// Time as a device sees it: nanoseconds, monotonic.
pub trait Clock: Send {
    /// Now.
    fn now(&self) -> u64;
    /// Has [`Timed::expire`] called at `deadline`, and at no other time any more; never, if `None`.
    fn arm(&self, deadline: Option<u64>);
}

/// A device that waits for a time.
pub trait Timed: Send {
    /// The time has come that [`Clock::arm`] was given.
    fn expire(&mut self);
}
