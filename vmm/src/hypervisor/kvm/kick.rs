// SPDX-License-Identifier: MIT OR Apache-2.0
//! How other threads make `KVM_RUN` return: a byte of the run page that the next call looks at, and a signal that ends the
//! present one. The byte makes the kick sticky; the signal's handler does nothing.

use std::cell::Cell;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Once};

use nix::libc;

use super::run_page::ImmediateExit;

/// The handle; the vCPU has one itself.
#[derive(Clone, Debug)]
pub(super) struct Kicker {
    flag: ImmediateExit,
    /// The thread that the vCPU runs on; 0 before it first runs.
    thread: Arc<AtomicI32>,
}

/// The signal: a real-time one, which nobody gives a meaning of its own.
fn signal() -> libc::c_int {
    libc::SIGRTMIN()
}

extern "C" fn handler(_signal: libc::c_int) {}

impl Kicker {
    /// For a vCPU that has not run yet.
    pub(super) fn new(flag: ImmediateExit) -> Self {
        Self { flag, thread: Arc::default() }
    }

    /// The run that the kicks so far were to end has ended.
    pub(super) fn taken(&self) {
        self.flag.clear();
    }

    /// Tells kickers that it is the calling thread that runs the vCPU, and lets the signal through to it. To be called
    /// before each run: it costs next to nothing while the thread stays the same.
    pub(super) fn adopt(&self) {
        thread_local! {
            static ID: Cell<i32> = const { Cell::new(0) };
        }
        let id = ID.with(|id| {
            if id.get() == 0 {
                id.set(prepare_thread());
            }
            id.get()
        });
        if self.thread.load(Ordering::Relaxed) != id {
            // Before KVM looks at the byte: a kicker sets the byte first and then looks for the thread, so one of the two
            // sees the other.
            self.thread.store(id, Ordering::SeqCst);
        }
    }
}

/// Makes the calling thread one that the signal interrupts, and returns its id.
fn prepare_thread() -> i32 {
    static HANDLER: Once = Once::new();
    HANDLER.call_once(|| {
        // SAFETY: a zeroed `sigaction` is valid: no flags, an empty mask.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = handler as extern "C" fn(libc::c_int) as libc::sighandler_t;
        // So that other system calls of the thread go on.
        action.sa_flags = libc::SA_RESTART;
        // SAFETY: the handler does nothing, so it may run anywhere; the arguments are a valid signal number, a valid
        // structure, and no place for the old one. It cannot fail with those.
        unsafe { libc::sigaction(signal(), &raw const action, std::ptr::null_mut()) };
    });
    // SAFETY: the set is initialised by `sigemptyset` before it is used, and all pointers are to it. None of the calls
    // can fail with a valid signal number.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, signal());
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, std::ptr::null_mut());
    }
    nix::unistd::gettid().as_raw()
}

impl crate::hypervisor::Kick for Kicker {
    fn kick(&self) {
        self.flag.set();
        let thread = self.thread.load(Ordering::SeqCst);
        if thread != 0 {
            // SAFETY: tgkill takes three numbers. The thread may have ended and its number may belong to another thread
            // of this process by now; the handler does no harm to that one.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, signal()) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::Kick as _;
    use std::sync::mpsc::channel;

    #[test]
    fn a_kicked_thread_leaves_a_blocking_call() {
        let kicker = Kicker::new(ImmediateExit::nowhere());
        let (sender, receiver) = channel();
        let own = kicker.clone();
        let waiter = std::thread::spawn(move || {
            own.adopt();
            sender.send(()).unwrap();
            // A call that SA_RESTART does not resume, as KVM_RUN (signal(7)).
            nix::poll::poll(&mut [], nix::poll::PollTimeout::NONE)
        });
        receiver.recv().unwrap();
        while !waiter.is_finished() {
            kicker.kick();
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        assert_eq!(waiter.join().unwrap(), Err(nix::errno::Errno::EINTR));
    }
}
