// SPDX-License-Identifier: MIT OR Apache-2.0
//! Stopping a running VM: anyone may ask, the first reason counts, and every thread hears of it.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock};

use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::Signal;

use crate::device::lock;
use crate::error::Error;
use crate::exit::ExitCode;
use crate::hypervisor::Kick;

/// Why a VM stopped.
#[derive(Debug)]
#[non_exhaustive]
pub enum Stop {
    /// The guest switched itself off.
    Shutdown,
    /// The guest asked for a reset, by the way named.
    Reset(&'static str),
    /// The guest wrote this value to the debug exit port.
    DebugExit(u32),
    /// Triple fault; the CPU's state for people.
    TripleFault(String),
    /// All CPUs are halted, and nothing can wake them.
    Halted,
    /// The user pressed the escape key.
    Quit,
    /// A signal asked the program to end.
    Signal(Signal),
    /// A vCPU cannot go on: the code, what happened, and the CPU's state for people.
    CannotContinue(ExitCode, String),
    /// The host failed.
    Failed(Error),
}

impl Stop {
    /// The program's exit status.
    #[must_use]
    pub fn status(&self) -> u8 {
        match self {
            Self::Shutdown => ExitCode::Shutdown.into(),
            Self::Reset(_) => ExitCode::Reset.into(),
            // The documented answer of the device; a status has 8 bits.
            Self::DebugExit(value) => (value << 1 | 1) as u8,
            Self::TripleFault(_) => ExitCode::TripleFault.into(),
            Self::Halted => ExitCode::Halted.into(),
            Self::Quit => ExitCode::Quit.into(),
            // What shells show for a program that a signal ended.
            Self::Signal(signal) => 128 + *signal as u8,
            Self::CannotContinue(code, _) => (*code).into(),
            Self::Failed(error) => error.exit_code().into(),
        }
    }

    /// Whether this is the ordinary end of a VM, which needs no comment.
    #[must_use]
    pub fn is_quiet(&self) -> bool {
        matches!(self, Self::Shutdown | Self::DebugExit(_) | Self::Signal(_))
    }
}

impl fmt::Display for Stop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shutdown => f.write_str("the guest switched itself off"),
            Self::Reset(how) => write!(f, "the guest asked for a reset ({how})"),
            Self::DebugExit(value) => write!(f, "the guest ended with {value:#x} on the debug exit port"),
            Self::TripleFault(state) => write!(f, "the guest crashed with a triple fault\n{state}"),
            Self::Halted => f.write_str("the guest halted with interrupts off: nothing can wake it"),
            Self::Quit => f.write_str("ended by the escape key"),
            Self::Signal(signal) => write!(f, "ended by {signal}"),
            Self::CannotContinue(_, what) => f.write_str(what),
            Self::Failed(error) => error.fmt(f),
        }
    }
}

/// The one place where a VM is stopped. Its locks are the innermost: nothing else is locked under them.
pub struct Control {
    reason: Mutex<Option<Stop>>,
    stopping: AtomicBool,
    shows_state: AtomicBool,
    wake: EventFd,
    kickers: OnceLock<Vec<Box<dyn Kick>>>,
}

impl Control {
    /// For a VM that is being built.
    ///
    /// # Errors
    /// [`Error::Host`] if the host has no event file descriptor left.
    pub fn new() -> Result<Self, Error> {
        let wake = EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)
            .map_err(|errno| Error::host("create an event file descriptor", errno.desc()))?;
        Ok(Self {
            reason: Mutex::new(None),
            stopping: AtomicBool::new(false),
            shows_state: AtomicBool::new(false),
            wake,
            kickers: OnceLock::new(),
        })
    }

    /// Tells which vCPUs there are, in the order of their numbers; once, before the first runs.
    pub fn set_kickers(&self, kickers: Vec<Box<dyn Kick>>) {
        let _ = self.kickers.set(kickers);
    }

    /// Asks the VM to stop. If somebody asked before, that reason stays.
    pub fn stop(&self, reason: Stop) {
        self.shows_state.fetch_or(matches!(reason, Stop::Signal(Signal::SIGQUIT)), Ordering::Release);
        lock(&self.reason).get_or_insert(reason);
        self.stopping.store(true, Ordering::Release);
        // A kick is sticky: a vCPU that was about to enter the guest returns at once, and then sees the flag.
        for kicker in self.kickers.get().into_iter().flatten() {
            kicker.kick();
        }
        self.wake();
    }

    /// Makes the event loop look around.
    pub fn wake(&self) {
        // It can only fail if the counter is at its limit, and then the loop is awake.
        let _ = self.wake.write(1);
    }

    /// What [`wake`](Self::wake) makes readable.
    pub fn wake_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// Makes [`wake_fd`](Self::wake_fd) unreadable until the next call of [`wake`](Self::wake).
    pub fn clear_wake(&self) {
        let _ = self.wake.read();
    }

    /// Makes vCPU `index` leave the guest, so that it looks at what the devices want of it.
    pub fn kick(&self, index: usize) {
        if let Some(kicker) = self.kickers.get().and_then(|kickers| kickers.get(index)) {
            kicker.kick();
        }
    }

    /// Whether the VM has been asked to stop.
    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// Whether the VM stops because of SIGQUIT, at which every vCPU shows its state.
    pub fn shows_state(&self) -> bool {
        self.shows_state.load(Ordering::Acquire)
    }

    /// The reason, once the VM has stopped.
    pub fn take_reason(&self) -> Option<Stop> {
        lock(&self.reason).take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_reason_counts() {
        let control = Control::new().unwrap();
        assert!(!control.is_stopping() && control.take_reason().is_none());
        control.stop(Stop::DebugExit(16));
        control.stop(Stop::Shutdown);
        assert!(control.is_stopping());
        assert!(matches!(control.take_reason(), Some(Stop::DebugExit(16))));
    }

    #[test]
    fn statuses() {
        assert_eq!(Stop::Shutdown.status(), 0);
        assert_eq!(Stop::DebugExit(0).status(), 1);
        assert_eq!(Stop::DebugExit(16).status(), 33);
        assert_eq!(Stop::DebugExit(0x8000_0080).status(), 1, "32 bits go in, 8 come out");
        assert_eq!(Stop::Signal(Signal::SIGTERM).status(), 143);
        assert_eq!(Stop::Reset("x").status(), 4);
    }
}
