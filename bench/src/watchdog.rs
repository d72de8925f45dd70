// SPDX-License-Identifier: MIT OR Apache-2.0
//! Ends a process that does not come to its end, so that one row that hangs does not cost the others. Until then nothing
//! runs that would be measured: one thread sleeps.
//!
//! The limits are ticks, not seconds: an emulated CPU may need a minute for one of its seconds, and what a busy machine
//! takes longer for is the same number of instructions.

use std::process::Child;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;

use crate::arch;
use crate::machine::Result;

/// Ticks that a row may take: three times what the longest does, in which 200 VMs of KVM come and go.
pub(crate) const ROW: u64 = 600 * arch::KVM_LIFE;
/// Ticks that a guest may take from its start to its end: five times what it does.
pub(crate) const GUEST: u64 = 12_000_000_000;

/// Waits for the end of one process.
pub(crate) struct Watchdog {
    limit: u64,
    ended: Sender<()>,
    thread: JoinHandle<bool>,
}

impl Watchdog {
    /// Watches `child`, which has `limit` ticks.
    ///
    /// # Errors
    /// If the host does not tell the rate of its counter.
    pub(crate) fn new(child: &Child, limit: u64) -> Result<Self> {
        let pid = Pid::from_raw(child.id().try_into()?);
        let patience = Duration::from_secs_f64(limit as f64 / arch::frequency()?);
        let (ended, end) = mpsc::channel();
        let thread = thread::spawn(move || {
            let late = end.recv_timeout(patience) == Err(RecvTimeoutError::Timeout);
            // If it has just ended, its number is not soon another process's.
            late && kill(pid, Signal::SIGKILL).is_ok()
        });
        Ok(Self { limit, ended, thread })
    }

    /// Stops watching. To be called as soon as the process has been waited for.
    ///
    /// # Errors
    /// If the process had to be ended.
    pub(crate) fn end(self) -> Result<()> {
        // Nobody listens any more if it was late.
        let _ = self.ended.send(());
        match self.thread.join() {
            Ok(false) => Ok(()),
            Ok(true) => Err(format!("not at its end after {} million ticks", self.limit / 1_000_000).into()),
            Err(_) => Err("the watchdog panicked".into()),
        }
    }
}
