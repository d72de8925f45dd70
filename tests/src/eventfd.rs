// SPDX-License-Identifier: MIT OR Apache-2.0
//! Eventfds for tests: none blocks.

use crate::harness::Stop;
use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

/// A new one, not signalled.
///
/// # Errors
/// If no descriptor is left.
pub fn eventfd() -> Result<EventFd, Stop> {
    Ok(EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?)
}

/// Takes the count of an eventfd: 0 if it was not signalled.
///
/// # Errors
/// What reading reports.
pub fn count(event: &EventFd) -> Result<u64, Stop> {
    match event.read() {
        Ok(count) => Ok(count),
        Err(Errno::EAGAIN) => Ok(0),
        Err(errno) => Err(errno.into()),
    }
}
