// SPDX-License-Identifier: GPL-2.0-only
//! The part of a vCPU that any thread and any interrupt may touch at any time: posted events, kicks, where it runs, and
//! its counters. Everything else of a vCPU is behind its mutex.
//!
//! Two handshakes, both of the store-then-load kind and therefore with sequentially consistent accesses or fences:
//! - a poster first posts (mailbox, kick, address-space generation) and then looks whether the vCPU is in the guest; the
//!   vCPU first says that it is in the guest and then looks for posts. One of them sees the other.
//! - a vCPU that goes to sleep first says so (in the scheduler's state) and then looks for posts; the poster first posts
//!   and then wakes.
//!
//! Locks: none of ours. Waking takes the run queue of the thread that sleeps.

use core::sync::atomic::{fence, AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};

use axvcpu_uapi::vcpu::{ExitKind, VcpuStats};
use kernel::prelude::*;
use vcpu_core::VCpuState;

use crate::{
    abi,
    arch::{self, Mailbox},
    ffi::{self, IrqOff, WaitPoint, Worker},
};

/// `cpu` of a vCPU that is in no guest.
const OUTSIDE: u32 = u32::MAX;

/// The shared part of a vCPU.
pub(crate) struct Shared {
    /// Number in the VM.
    pub(crate) id: u32,
    /// Interrupts and other events for it.
    pub(crate) mailbox: Mailbox,
    /// A kick that no `RUN` has taken yet.
    kick: AtomicBool,
    /// The CPU in whose guest mode it is, or `OUTSIDE`. Set and cleared with interrupts off.
    cpu: AtomicU32,
    /// Identity of the address space it runs in.
    aspace: AtomicUsize,
    /// Where it sleeps in `HLT`.
    wait: WaitPoint,
    /// The thread inside of `RUN`.
    pub(crate) worker: Worker,
    /// Left the guest last because it spun.
    spins: AtomicBool,
    pub(crate) stats: Stats,
}

/// Counters. One thread at a time writes them: the one that holds the vCPU's mutex.
#[derive(Default)]
pub(crate) struct Stats {
    pub(crate) runs: AtomicU64,
    pub(crate) user_exits: AtomicU64,
    pub(crate) windows: AtomicU64,
    pub(crate) entries: AtomicU64,
    pub(crate) injections: AtomicU64,
    pub(crate) tlb_flushes: AtomicU64,
    pub(crate) migrations: AtomicU64,
    pub(crate) run_ns: AtomicU64,
    pub(crate) halt_ns: AtomicU64,
    pub(crate) last_cpu: AtomicU32,
    state: AtomicU32,
    exits: [AtomicU64; ExitKind::COUNT],
}

impl Stats {
    /// Counts one exit.
    #[inline]
    pub(crate) fn count_exit(&self, kind: ExitKind) {
        if let Some(counter) = self.exits.get(kind as usize) {
            bump(counter);
        }
    }

    /// Tells the state. A vCPU counts as running all through `RUN`, but for its sleep.
    pub(crate) fn set_state(&self, state: VCpuState) {
        self.state.store(state as u32, Ordering::Relaxed);
    }

    /// The ABI's form.
    pub(crate) fn snapshot(&self) -> VcpuStats {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let mut exits = [0; ExitKind::COUNT];
        for (to, from) in exits.iter_mut().zip(&self.exits) {
            *to = get(from);
        }
        VcpuStats {
            runs: get(&self.runs),
            windows: get(&self.windows),
            entries: get(&self.entries),
            user_exits: get(&self.user_exits),
            injections: get(&self.injections),
            tlb_flushes: get(&self.tlb_flushes),
            migrations: get(&self.migrations),
            run_ns: get(&self.run_ns),
            halt_ns: get(&self.halt_ns),
            last_cpu: self.last_cpu.load(Ordering::Relaxed),
            state: self.state.load(Ordering::Relaxed),
            exits,
            ..VcpuStats::default()
        }
    }
}

/// What a vCPU without a CPU would do with one, best first.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Need {
    /// Take events that wait for it: others may wait for its answer.
    Events,
    /// Go on with what it did, maybe with a lock held.
    Work,
    /// Go on spinning, unless its turn has come.
    Spin,
}

impl Need {
    /// All, best first.
    pub(crate) const ALL: [Self; 3] = [Self::Events, Self::Work, Self::Spin];
}

/// Adds one to a counter that only the current thread writes: no locked instruction.
#[inline]
pub(crate) fn bump(counter: &AtomicU64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
}

impl Shared {
    /// The shared part of vCPU `id`.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub(crate) fn new(id: u32) -> Result<Self> {
        let stats = Stats { last_cpu: AtomicU32::new(u32::MAX), ..Stats::default() };
        Ok(Self {
            id,
            mailbox: arch::new_mailbox().map_err(abi::errno)?,
            kick: AtomicBool::new(false),
            cpu: AtomicU32::new(OUTSIDE),
            aspace: AtomicUsize::new(0),
            wait: WaitPoint::new(),
            worker: Worker::new(),
            spins: AtomicBool::new(false),
            stats,
        })
    }

    /// Makes the current or else the next `RUN` return. From any context.
    pub(crate) fn kick(&self) {
        self.kick.store(true, Ordering::SeqCst);
        self.notify();
    }

    /// Whether a kick waits.
    #[inline]
    pub(crate) fn kick_pending(&self) -> bool {
        self.kick.load(Ordering::SeqCst)
    }

    /// Takes the kick that waits, if one does.
    pub(crate) fn take_kick(&self) -> bool {
        self.kick.load(Ordering::Relaxed) && self.kick.swap(false, Ordering::SeqCst)
    }

    /// Makes the vCPU look at what was posted: out of the guest or out of its sleep. From any context.
    pub(crate) fn notify(&self) {
        self.notify_by(ffi::send_ipi);
    }

    /// Wakes the vCPU if it sleeps, and calls `tell` with its CPU if it is in the guest. From any context.
    pub(crate) fn notify_by(&self, tell: impl FnOnce(i32)) {
        self.wait.wake();
        fence(Ordering::SeqCst); // Posts are not all sequentially consistent themselves.
        let cpu = self.cpu.load(Ordering::SeqCst);
        if cpu != OUTSIDE {
            tell(cpu as i32);
        }
    }

    /// Sleeps until something is posted or a kick comes.
    ///
    /// # Errors
    /// `EINTR` if a signal waits.
    pub(crate) fn sleep(&self) -> Result {
        unsafe extern "C" fn ready(data: *const core::ffi::c_void) -> bool {
            // SAFETY: `sleep` passes itself, which outlives the call.
            let this = unsafe { &*data.cast::<Shared>() };
            this.kick_pending() || this.mailbox.pending()
        }
        self.wait.wait(self, ready)
    }

    /// Remembers whether the guest spun when it left last.
    #[inline]
    pub(crate) fn set_spins(&self, spins: bool) {
        if self.spins.load(Ordering::Relaxed) != spins {
            self.spins.store(spins, Ordering::Relaxed);
        }
    }

    /// How much it would help somebody who waits for this vCPU if it got a CPU: `None` if it has one, or has nothing to run
    /// for. A guess, for the choice of whom to yield to.
    pub(crate) fn need(&self) -> Option<Need> {
        if self.cpu.load(Ordering::Relaxed) != OUTSIDE {
            return None;
        }
        if self.mailbox.pending() {
            return Some(Need::Events);
        }
        if self.stats.state.load(Ordering::Relaxed) == VCpuState::Blocked as u32 {
            return None;
        }
        Some(if self.spins.load(Ordering::Relaxed) { Need::Spin } else { Need::Work })
    }

    /// Says that the vCPU runs in the address space `aspace` from now on.
    pub(crate) fn set_aspace(&self, aspace: usize) {
        self.aspace.store(aspace, Ordering::SeqCst);
    }

    /// Says that the vCPU is in the guest on `cpu`, from before it looks for posts until the guard goes. Interrupts stay
    /// off as long, so whoever interrupts this CPU and waits knows that the vCPU has left.
    pub(crate) fn enter<'a>(&'a self, cpu: usize, _irq_off: &'a IrqOff) -> InGuest<'a> {
        self.cpu.store(cpu as u32, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        InGuest(self)
    }

    /// If the vCPU is in the guest in the address space `aspace`: makes it leave and waits until it has.
    /// Returns whether it was. Interrupts are on.
    pub(crate) fn expel(&self, aspace: usize) -> bool {
        if self.aspace.load(Ordering::SeqCst) != aspace {
            return false;
        }
        let cpu = self.cpu.load(Ordering::SeqCst);
        if cpu == OUTSIDE {
            return false;
        }
        ffi::interrupt_and_wait(cpu as i32);
        true
    }
}

/// Proof that the vCPU is marked as in the guest.
pub(crate) struct InGuest<'a>(&'a Shared);

impl Drop for InGuest<'_> {
    fn drop(&mut self) {
        self.0.cpu.store(OUTSIDE, Ordering::SeqCst);
    }
}
