// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a running VM does not need is given up, so that a guest that breaks into this program finds little to use: the file
//! system and the network (`files.rs`), and every system call that the thread does not make (`filter.rs`, `calls.rs`).
//!
//! A thread inherits the filter of the one that starts it and can only add to it, so each enters its own when it needs no
//! more than that: a vCPU's thread before its first entry into the guest, the main thread when the others have been started.

mod calls;
mod files;
mod filter;

use crate::error::Error;
pub use calls::Thread;
use filter::Filter;

/// The ioctls that a hypervisor is asked for while the guest runs, and at the end.
#[derive(Clone, Copy, Debug)]
pub struct Ioctls {
    /// By the thread of a vCPU.
    pub vcpu: &'static [u32],
    /// By any thread: interrupt messages, kicks, counters, unmapping.
    pub any: &'static [u32],
}

/// The sandbox of a VM, which its threads enter.
#[derive(Debug)]
pub struct Sandbox(Option<Filters>);

#[derive(Debug)]
struct Filters {
    vcpu: Filter,
    main: Filter,
}

impl Sandbox {
    /// One that keeps nothing from anybody.
    #[must_use]
    pub const fn open() -> Self {
        Self(None)
    }

    /// Gives up the file system and the network for this thread and those it starts later, and prepares the filters.
    ///
    /// # Errors
    /// [`Error::Host`] if the kernel refuses.
    pub fn close(ioctls: &Ioctls) -> Result<Self, Error> {
        files::give_up()?;
        let fail = |error| refused(&error);
        let vcpu = Filter::new(Thread::Vcpu, ioctls).map_err(fail)?;
        let main = Filter::new(Thread::Main, ioctls).map_err(fail)?;
        filter::explain_violations().map_err(|errno| refused(&errno.desc()))?;
        Ok(Self(Some(Filters { vcpu, main })))
    }

    /// The calling thread makes no system calls any more but those of its kind: any other ends the program with a message
    /// and the status [`Sandbox`](crate::exit::ExitCode::Sandbox).
    ///
    /// # Errors
    /// [`Error::Host`] if the kernel refuses.
    pub fn enter(&self, thread: Thread) -> Result<(), Error> {
        let Some(filters) = &self.0 else { return Ok(()) };
        let filter = match thread {
            Thread::Main => &filters.main,
            Thread::Vcpu => &filters.vcpu,
        };
        filter.enter().map_err(|error| refused(&error))
    }
}

fn refused(reason: &dyn std::fmt::Display) -> Error {
    Error::host("enter the sandbox", format!("{reason}; --no-sandbox does without"))
}
