// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The vCPU state machine: [`AxVCpu`] wraps a backend, lets a call through only where [`AxArchVCpu`] allows it, and keeps the
//! scheduling record.
//!
//! ```text
//!            setup          bind           run
//!  Created ---------> Free ------> Ready <-----> Running
//!                    ^   ^  unbind   |              |
//!               wake |   +-----------+              | the backend reports an error
//!                    v block                        v
//!                  Blocked                        Failed (still to be unbound)
//! ```
//!
//! No locks: every change takes `&mut self`. What orders threads (a mutex, a file descriptor) is the owner's.

use core::fmt;
use core::marker::PhantomData;
use core::sync::atomic::{AtomicBool, Ordering};

use crate::{AxArchVCpu, AxError, AxResult, AxVCpuExitReason, AxVCpuHal, GuestPhysAddr, HostPhysAddr};

/// Where a vCPU is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum VCpuState {
    /// Made, not set up yet.
    Created,
    /// Set up; on no CPU.
    Free,
    /// Bound to a CPU, outside the guest.
    Ready,
    /// In the guest.
    Running,
    /// Asleep until an event arrives, on no CPU.
    Blocked,
    /// The backend has given it up. It can be inspected, unbound and dropped, nothing else.
    Failed,
}

/// Where and for how long a vCPU ran. Times are in nanoseconds of the host's clock for lengths of time
/// ([`AxVCpuHal::ticks`]); a period that has not ended yet is not in them. Counters wrap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SchedulingRecord {
    /// The CPU that the vCPU is bound to.
    pub bound_cpu: Option<usize>,
    /// The CPU that it was bound to last, the present one included.
    pub last_cpu: Option<usize>,
    /// When it was unbound last: when it ran last, if it is not bound.
    pub last_run_ns: Option<u64>,
    /// Time spent bound.
    pub run_ns: u64,
    /// Time spent [`Free`](VCpuState::Free): it could have run and did not.
    pub wait_ns: u64,
    /// Time spent [`Blocked`](VCpuState::Blocked): it had nothing to do.
    pub halt_ns: u64,
    /// How often it was bound.
    pub windows: u64,
    /// How often the guest was entered.
    pub entries: u64,
    /// How often it was bound to another CPU than the time before.
    pub migrations: u64,
    /// The next [`run`](AxVCpu::run) will return without entering the guest.
    pub exit_requested: bool,
}

/// How long a vCPU was in its states, in the host's ticks.
#[derive(Clone, Copy, Debug, Default)]
struct Spent {
    bound: u64,
    free: u64,
    blocked: u64,
}

/// A virtual CPU: the backend `A` under the rules of its trait, on the host `H`.
///
/// A call that the state does not allow is refused with an error of its own, before the backend hears of it, and changes
/// nothing. An error that the backend returns leaves the state as it was too, but for [`run`](Self::run), whose errors
/// are fatal by contract, and for [`unbind`](Self::unbind), which always unbinds.
///
/// # Invariants
/// `record.bound_cpu` is `Some` exactly in `Ready` and `Running`, and in `Failed` until [`unbind`](Self::unbind).
pub struct AxVCpu<A: AxArchVCpu, H: AxVCpuHal> {
    arch: A,
    state: VCpuState,
    entry_set: bool,
    ept_root_set: bool,
    /// Start of the period that the present state began, in ticks, see [`Self::lap`].
    since: u64,
    spent: Spent,
    /// But for its times, which [`record`](Self::record) fills in.
    record: SchedulingRecord,
    /// [`SchedulingRecord::last_run_ns`], in ticks.
    last_run: Option<u64>,
    /// Why the last run came back.
    exit: AxVCpuExitReason,
    exit_request: AtomicBool,
    host: PhantomData<fn() -> H>,
}

impl<A: AxArchVCpu, H: AxVCpuHal> AxVCpu<A, H> {
    /// Creates a vCPU, [`Created`](VCpuState::Created).
    ///
    /// # Errors
    /// The backend's.
    pub fn new(config: A::CreateConfig) -> AxResult<Self> {
        Ok(Self {
            arch: A::new(config)?,
            state: VCpuState::Created,
            entry_set: false,
            ept_root_set: false,
            since: 0,
            spent: Spent::default(),
            record: SchedulingRecord::default(),
            last_run: None,
            exit: AxVCpuExitReason::Nothing,
            exit_request: AtomicBool::new(false),
            host: PhantomData,
        })
    }

    /// Sets the address of the first instruction.
    ///
    /// # Errors
    /// - [`AxError::EntryAlreadySet`]: done before.
    /// - [`AxError::AlreadySetUp`], [`AxError::Running`], [`AxError::Failed`]: too late.
    /// - The backend's; the address is then not set.
    pub fn set_entry(&mut self, entry: GuestPhysAddr) -> AxResult {
        self.require_created()?;
        if self.entry_set {
            return Err(AxError::EntryAlreadySet);
        }
        self.arch.set_entry(entry)?;
        self.entry_set = true;
        Ok(())
    }

    /// Sets the root of the nested page table.
    ///
    /// # Errors
    /// - [`AxError::EptRootAlreadySet`]: done before.
    /// - [`AxError::AlreadySetUp`], [`AxError::Running`], [`AxError::Failed`]: too late.
    /// - The backend's; the root is then not set.
    pub fn set_ept_root(&mut self, ept_root: HostPhysAddr) -> AxResult {
        self.require_created()?;
        if self.ept_root_set {
            return Err(AxError::EptRootAlreadySet);
        }
        self.arch.set_ept_root(ept_root)?;
        self.ept_root_set = true;
        Ok(())
    }

    /// Completes the vCPU: [`Created`](VCpuState::Created) to [`Free`](VCpuState::Free).
    ///
    /// # Errors
    /// - [`AxError::EntryNotSet`], [`AxError::EptRootNotSet`]: too early.
    /// - [`AxError::AlreadySetUp`], [`AxError::Running`], [`AxError::Failed`]: too late.
    /// - The backend's; another configuration may be tried then.
    pub fn setup(&mut self, config: A::SetupConfig) -> AxResult {
        self.require_created()?;
        if !self.entry_set {
            return Err(AxError::EntryNotSet);
        }
        if !self.ept_root_set {
            return Err(AxError::EptRootNotSet);
        }
        self.arch.setup(config)?;
        self.since = H::ticks();
        self.state = VCpuState::Free;
        Ok(())
    }

    /// Loads the vCPU onto the current CPU: [`Free`](VCpuState::Free) to [`Ready`](VCpuState::Ready). Preemption must be
    /// off from before this call until after [`unbind`](Self::unbind).
    ///
    /// # Errors
    /// - [`AxError::AlreadyBound`], [`AxError::Running`]: it is on a CPU.
    /// - [`AxError::NotSetUp`], [`AxError::Blocked`], [`AxError::Failed`]: it cannot run.
    /// - The backend's; the vCPU is then on no CPU.
    pub fn bind(&mut self) -> AxResult {
        self.require_free()?;
        self.arch.bind()?;
        let cpu = H::cpu_id();
        let waited = self.lap();
        self.spent.free = self.spent.free.wrapping_add(waited);
        let record = &mut self.record;
        record.windows = record.windows.wrapping_add(1);
        if record.last_cpu.is_some_and(|last| last != cpu) {
            record.migrations = record.migrations.wrapping_add(1);
        }
        record.last_cpu = Some(cpu);
        record.bound_cpu = Some(cpu);
        self.state = VCpuState::Ready;
        Ok(())
    }

    /// Takes the vCPU off its CPU: [`Ready`](VCpuState::Ready) to [`Free`](VCpuState::Free). A
    /// [`Failed`](VCpuState::Failed) vCPU must be unbound too, and stays failed.
    ///
    /// # Errors
    /// - [`AxError::NotBound`], [`AxError::NotSetUp`]: it is on no CPU.
    /// - [`AxError::Running`]: it is in the guest.
    /// - [`AxError::WrongCpu`]: it is on another CPU than the current one, and stays there.
    /// - The backend's; the vCPU has been taken off the CPU nevertheless.
    pub fn unbind(&mut self) -> AxResult {
        match self.state {
            VCpuState::Ready | VCpuState::Failed => {}
            VCpuState::Created => return Err(AxError::NotSetUp),
            VCpuState::Free | VCpuState::Blocked => return Err(AxError::NotBound),
            VCpuState::Running => return Err(AxError::Running),
        }
        self.require_this_cpu()?;
        let result = self.arch.unbind();
        let ran = self.lap();
        self.spent.bound = self.spent.bound.wrapping_add(ran);
        self.last_run = Some(self.since);
        self.record.bound_cpu = None;
        if self.state == VCpuState::Ready {
            self.state = VCpuState::Free;
        }
        result
    }

    /// Enters the guest once and tells why it came back. With an exit request pending
    /// ([`request_exit`](Self::request_exit)) the guest is not entered: the request is taken and
    /// [`AxVCpuExitReason::Interrupted`] returned.
    ///
    /// # Errors
    /// - [`AxError::NotBound`], [`AxError::WrongCpu`]: it is not bound to the current CPU.
    /// - [`AxError::NotSetUp`], [`AxError::Blocked`], [`AxError::Running`], [`AxError::Failed`]: it cannot run.
    /// - The backend's; the vCPU is then [`Failed`](VCpuState::Failed), and still bound.
    #[inline]
    pub fn run(&mut self) -> AxResult<AxVCpuExitReason> {
        self.run_by(|arch, _, exit| arch.run().map(|reason| *exit = reason))?;
        Ok(self.exit)
    }

    /// As [`run`](Self::run), but the backend is entered by `enter`: by its [`run`](AxArchVCpu::run), or by something that does
    /// the same several times. It adds the entries beyond the first to the number that it is given, and puts the reason into the
    /// place that it is given, where it stays: see [`exit`](Self::exit). It is too large to be handed on at each exit.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    #[inline]
    pub fn run_by(&mut self, enter: impl FnOnce(&mut A, &mut u64, &mut AxVCpuExitReason) -> AxResult) -> AxResult {
        if self.state != VCpuState::Ready {
            return Err(self.why_not_ready());
        }
        self.require_this_cpu()?;
        if self.exit_request.load(Ordering::Relaxed) && self.take_exit_request() {
            self.exit = AxVCpuExitReason::Interrupted;
            return Ok(());
        }
        self.record.entries = self.record.entries.wrapping_add(1);
        // A backend that never comes back (it panics in a test) leaves the vCPU in `Running`, where every call is refused.
        self.state = VCpuState::Running;
        let result = enter(&mut self.arch, &mut self.record.entries, &mut self.exit);
        self.state = if result.is_ok() { VCpuState::Ready } else { VCpuState::Failed };
        result
    }

    /// Why the last run came back; [`Nothing`](AxVCpuExitReason::Nothing) before the first.
    #[inline]
    pub fn exit(&self) -> &AxVCpuExitReason {
        &self.exit
    }

    /// Has `amend` say what the last exit is, now that more is known of it.
    ///
    /// # Errors
    /// As [`arch_mut`](Self::arch_mut).
    #[inline]
    pub fn amend_exit(&mut self, amend: impl FnOnce(&mut A, &mut AxVCpuExitReason)) -> AxResult {
        self.arch_mut()?;
        amend(&mut self.arch, &mut self.exit);
        Ok(())
    }

    /// The last exit has been dealt with: from now on it is [`Nothing`](AxVCpuExitReason::Nothing).
    #[inline]
    pub fn settle(&mut self) {
        self.exit = AxVCpuExitReason::Nothing;
    }

    /// Puts the vCPU to sleep: [`Free`](VCpuState::Free) to [`Blocked`](VCpuState::Blocked). It is the owner who lets the
    /// thread sleep, and who calls [`wake`](Self::wake) when it goes on.
    ///
    /// # Errors
    /// - [`AxError::AlreadyBound`], [`AxError::Running`]: it is on a CPU, which it must leave first.
    /// - [`AxError::NotSetUp`], [`AxError::Blocked`], [`AxError::Failed`]: it cannot sleep.
    pub fn block(&mut self) -> AxResult {
        self.require_free()?;
        let waited = self.lap();
        self.spent.free = self.spent.free.wrapping_add(waited);
        self.state = VCpuState::Blocked;
        Ok(())
    }

    /// Ends the sleep: [`Blocked`](VCpuState::Blocked) to [`Free`](VCpuState::Free). Returns whether there was one; in any
    /// other state nothing happens, since a wake-up may well come too late.
    pub fn wake(&mut self) -> bool {
        if self.state != VCpuState::Blocked {
            return false;
        }
        let slept = self.lap();
        self.spent.blocked = self.spent.blocked.wrapping_add(slept);
        self.state = VCpuState::Free;
        true
    }

    /// Sets general register `reg`, in the hardware's encoding. The backend ignores a number that it does not know.
    ///
    /// # Errors
    /// As [`arch_mut`](Self::arch_mut).
    pub fn set_gpr(&mut self, reg: usize, val: usize) -> AxResult {
        self.arch_mut()?.set_gpr(reg, val);
        Ok(())
    }

    /// Asks for the next [`run`](Self::run) not to enter the guest. Sticky: it holds until `run` or
    /// [`take_exit_request`](Self::take_exit_request) takes it, whatever happens in between. Asking twice is asking once.
    pub fn request_exit(&self) {
        self.exit_request.store(true, Ordering::Release);
    }

    /// Takes the pending exit request. Returns whether there was one.
    pub fn take_exit_request(&self) -> bool {
        self.exit_request.swap(false, Ordering::Acquire)
    }

    /// The state.
    #[inline]
    pub fn state(&self) -> VCpuState {
        self.state
    }

    /// Whether the vCPU is on a CPU and [`unbind`](Self::unbind) is due.
    #[inline]
    pub fn is_bound(&self) -> bool {
        self.record.bound_cpu.is_some()
    }

    /// The scheduling record, as it is now.
    #[inline]
    pub fn record(&self) -> SchedulingRecord {
        SchedulingRecord {
            exit_requested: self.exit_request.load(Ordering::Relaxed),
            last_run_ns: self.last_run.map(H::ticks_to_ns),
            run_ns: H::ticks_to_ns(self.spent.bound),
            wait_ns: H::ticks_to_ns(self.spent.free),
            halt_ns: H::ticks_to_ns(self.spent.blocked),
            ..self.record
        }
    }

    /// The backend, to look at. A failed vCPU can be looked at too.
    ///
    /// # Errors
    /// - [`AxError::NotSetUp`]: there is nothing to see yet.
    /// - [`AxError::Running`]: its state is in the hardware.
    #[inline]
    pub fn arch(&self) -> AxResult<&A> {
        match self.state {
            VCpuState::Free | VCpuState::Ready | VCpuState::Blocked | VCpuState::Failed => Ok(&self.arch),
            VCpuState::Created => Err(AxError::NotSetUp),
            VCpuState::Running => Err(AxError::Running),
        }
    }

    /// The backend, for what it offers beyond [`AxArchVCpu`]. The methods of that trait must be called on `self` only,
    /// which keeps track of them.
    ///
    /// # Errors
    /// - [`AxError::NotSetUp`]: its registers have no values yet.
    /// - [`AxError::Running`]: its state is in the hardware.
    /// - [`AxError::Failed`]: its state is of no use any more.
    #[inline]
    pub fn arch_mut(&mut self) -> AxResult<&mut A> {
        match self.state {
            VCpuState::Free | VCpuState::Ready | VCpuState::Blocked => Ok(&mut self.arch),
            VCpuState::Created => Err(AxError::NotSetUp),
            VCpuState::Running => Err(AxError::Running),
            VCpuState::Failed => Err(AxError::Failed),
        }
    }

    fn require_created(&self) -> AxResult {
        match self.state {
            VCpuState::Created => Ok(()),
            VCpuState::Free | VCpuState::Ready | VCpuState::Blocked => Err(AxError::AlreadySetUp),
            VCpuState::Running => Err(AxError::Running),
            VCpuState::Failed => Err(AxError::Failed),
        }
    }

    fn require_free(&self) -> AxResult {
        match self.state {
            VCpuState::Free => Ok(()),
            VCpuState::Created => Err(AxError::NotSetUp),
            VCpuState::Ready => Err(AxError::AlreadyBound),
            VCpuState::Running => Err(AxError::Running),
            VCpuState::Blocked => Err(AxError::Blocked),
            VCpuState::Failed => Err(AxError::Failed),
        }
    }

    /// The error of a `run` outside [`VCpuState::Ready`].
    #[cold]
    fn why_not_ready(&self) -> AxError {
        match self.state {
            VCpuState::Created => AxError::NotSetUp,
            VCpuState::Free | VCpuState::Ready => AxError::NotBound,
            VCpuState::Running => AxError::Running,
            VCpuState::Blocked => AxError::Blocked,
            VCpuState::Failed => AxError::Failed,
        }
    }

    #[inline]
    fn require_this_cpu(&self) -> AxResult {
        match self.record.bound_cpu {
            Some(cpu) if cpu == H::cpu_id() => Ok(()),
            Some(_) => Err(AxError::WrongCpu),
            None => Err(AxError::NotBound),
        }
    }

    /// Ends the present period and begins the next. Returns the length of the ended one. CPUs' clocks may differ by a
    /// little after a migration: a period that would be negative counts as empty.
    #[inline]
    fn lap(&mut self) -> u64 {
        let now = H::ticks();
        let length = now.saturating_sub(self.since);
        self.since = now;
        length
    }
}

/// State and record, not the backend: it may be large.
impl<A: AxArchVCpu, H: AxVCpuHal> fmt::Debug for AxVCpu<A, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AxVCpu")
            .field("state", &self.state)
            .field("entry_set", &self.entry_set)
            .field("ept_root_set", &self.ept_root_set)
            .field("record", &self.record())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
