// SPDX-License-Identifier: MIT OR Apache-2.0
//! Threads on chosen CPUs: of the host, or of the guest that the program runs in.

use crate::harness::Stop;
use nix::sched::{sched_getaffinity, sched_setaffinity, CpuSet};
use nix::unistd::Pid;

/// The calling thread, as the calls here name it.
pub const SELF: Pid = Pid::from_raw(0);

/// The CPUs that this thread may run on. It may run on all of them again when the value is dropped.
pub struct Allowed {
    set: CpuSet,
    /// Their numbers, ascending.
    pub cpus: Vec<usize>,
}

impl Allowed {
    /// What this thread is allowed now.
    ///
    /// # Errors
    /// If the kernel does not say.
    pub fn now() -> Result<Self, Stop> {
        let set = sched_getaffinity(SELF)?;
        let cpus = (0..CpuSet::count()).filter(|cpu| set.is_set(*cpu) == Ok(true)).collect();
        Ok(Self { set, cpus })
    }

    /// The same, if there is more than one.
    ///
    /// # Errors
    /// A reason to skip if not.
    pub fn several() -> Result<Self, Stop> {
        let allowed = Self::now()?;
        if allowed.cpus.len() < 2 {
            return Err(Stop::Skip("there is one CPU only".into()));
        }
        Ok(allowed)
    }
}

impl Drop for Allowed {
    fn drop(&mut self) {
        // What the thread had before, so only a CPU that went away meanwhile could make it fail.
        let _ = sched_setaffinity(SELF, &self.set);
    }
}

/// Moves a thread to `cpu`.
///
/// # Errors
/// If the kernel refuses.
pub fn pin(thread: Pid, cpu: usize) -> Result<(), Stop> {
    let mut set = CpuSet::new();
    set.set(cpu)?;
    Ok(sched_setaffinity(thread, &set)?)
}
