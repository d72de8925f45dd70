// SPDX-License-Identifier: MIT OR Apache-2.0
//! The vCPUs' threads: how they start, and how their end is waited for.
//!
//! A thread ends by itself soon after the VM has been asked to stop, unless it writes to a pipe that nobody reads. That is
//! waited for, since it may be the guest's last words, until a signal says that it has taken long enough.

use std::sync::mpsc::{channel, Receiver, Sender, TryRecvError};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crate::affinity;
use crate::arch::VcpuOps;
use crate::control::{Control, Stop};
use crate::error::Error;
use crate::events::Signals;
use crate::sandbox::{Sandbox, Thread};
use crate::vcpu::Runner;

/// How long the threads may take to end when a signal or the user ends the VM.
const PATIENCE: Duration = Duration::from_secs(1);

/// The threads of a VM, and where their vCPUs come back.
pub struct Threads<V> {
    control: Arc<Control>,
    sandbox: Arc<Sandbox>,
    sender: Sender<(usize, V)>,
    ended: Receiver<(usize, V)>,
    started: usize,
}

/// What a thread does at its end, however that comes.
struct End<V> {
    control: Arc<Control>,
    /// There until the end.
    sender: Option<Sender<(usize, V)>>,
}

impl<V> Drop for End<V> {
    fn drop(&mut self) {
        if thread::panicking() {
            // So that the others do not wait for it.
            self.control.stop(Stop::Failed(Error::host("go on", "a vCPU's thread panicked; this is a bug in axvmm")));
        }
        // Whoever wakes up must see that this thread sends nothing any more.
        self.sender = None;
        self.control.wake();
    }
}

impl<V: VcpuOps> Threads<V> {
    /// None yet. Each will enter the sandbox.
    #[must_use]
    pub fn new(control: &Arc<Control>, sandbox: &Arc<Sandbox>) -> Self {
        let (sender, ended) = channel();
        Self { control: Arc::clone(control), sandbox: Arc::clone(sandbox), sender, ended, started: 0 }
    }

    /// Starts the thread of the next vCPU, on the host CPUs in the set if there is one.
    ///
    /// # Errors
    /// [`Error::Host`] if the host has no thread left. The VM is stopped then.
    pub fn start(&mut self, runner: Runner<V>, cpus: Option<u64>) -> Result<(), Error> {
        let id = self.started;
        let end = End { control: Arc::clone(&self.control), sender: Some(self.sender.clone()) };
        let sandbox = Arc::clone(&self.sandbox);
        let body = move || {
            let placed = cpus.map_or(Ok(()), |cpus| affinity::restrict(id as u32, cpus));
            if let Err(error) = placed.and_then(|()| sandbox.enter(Thread::Vcpu)) {
                end.control.stop(Stop::Failed(error));
            }
            let vcpu = runner.run();
            if let Some(sender) = &end.sender {
                // Nobody listens any more if waiting took too long.
                let _ = sender.send((id, vcpu));
            }
        };
        match thread::Builder::new().name(format!("vcpu{id}")).spawn(body) {
            Ok(_) => {
                self.started += 1;
                Ok(())
            }
            Err(error) => {
                self.control.stop(Stop::Quit);
                Err(Error::host(format!("start a thread for vCPU {id}"), crate::error::describe_io(&error)))
            }
        }
    }

    /// Waits for the threads to end, in a `hurry` for a moment only, and from the first signal on, too. Gives the vCPUs back in
    /// the order of their numbers, `None` for one whose thread panicked or is still busy; it ends with the process.
    pub fn finish(self, mut hurry: bool, signals: &Signals) -> Vec<Option<V>> {
        drop(self.sender);
        let mut vcpus: Vec<Option<V>> = (0..self.started).map(|_| None).collect();
        let mut deadline = Instant::now() + PATIENCE;
        loop {
            match self.ended.try_recv() {
                Ok((id, vcpu)) => {
                    if let Some(place) = vcpus.get_mut(id) {
                        *place = Some(vcpu);
                    }
                }
                Err(TryRecvError::Disconnected) => return vcpus,
                Err(TryRecvError::Empty) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if hurry && left.is_zero() {
                        return vcpus;
                    }
                    match signals.wait(&self.control, hurry.then_some(left)) {
                        Ok(true) if !hurry => (hurry, deadline) = (true, Instant::now() + PATIENCE),
                        Ok(_) => {}
                        Err(error) => {
                            tracing::warn!(%error, "not waiting for the vCPUs' threads");
                            return vcpus;
                        }
                    }
                }
            }
        }
    }
}
