// SPDX-License-Identifier: GPL-2.0-only
//! `RUN`: the loop between the guest and its user.
//!
//! A *window* is a stretch with the vCPU bound to the CPU, preemption off, its FPU and debug state loaded. In it interrupts are
//! off, on AArch64 from the first entry on; an external interrupt ends the guest's turn and the window, and is taken by the host
//! as soon as the host's state is back. What may sleep (signals, scheduling, page faults, `HLT`) is done
//! between windows.
//!
//! Locks: the vCPU's own mutex is held all through `RUN`. No lock of the VM is taken for a vCPU's exits:
//! - in a window none of ours is waited for: a nested page fault tries for `AddressSpace::state`, and is left for later if somebody
//!   else has it. Mailboxes and `Shared` are atomics, the VM's vCPUs are slots that are never emptied, its eventfds' tables are
//!   `published`, the backends keep what they share in each CPU's record. Of the kernel's there are the run queue of a thread that
//!   is woken, this CPU's timers, and the lock of an eventfd that is signalled.
//! - between windows `AddressSpace::state`, by a nested page fault that takes more than a look at the host's page table, and by a
//!   paravirtual clock that is due, which it is once the guest has set it up or its TSC has been set; and the scheduler's, by
//!   sleeping and yielding.
//!
//! So vCPUs of a VM wait for each other only if they fault in the same address space or signal the same eventfd.

use core::sync::atomic::Ordering;

use axvcpu_uapi::{exit::AxVCpuExitReason as Exit, run as abi_run, vcpu::ExitKind};
use kernel::prelude::*;
use vcpu_core::{AccessFlags, AxError, AxVCpuHal, GuestPhysAddr, VCpuState};

use crate::{
    abi,
    arch::{self, Reply, TimerUpdate},
    aspace::{AddressSpace, Fault},
    ffi::{self, IrqOff},
    hal::Host,
    shared::{bump, Shared},
    tables::Spare,
    timer::Timer,
    vcpu::{Inner, Vcpu},
    vm::Vm,
};

/// Entries in a row, after which interrupts are let in. On hardware one that waits ends the guest's turn at once; but an emulated
/// CPU (Bochs 3.0) takes none while the guest has its own off, and such a guest could keep the host's CPU for ever by exits that
/// are handled here.
const ENTRIES_IN_A_ROW: u32 = 256;

/// How a window ended.
enum Stop {
    /// Something waits between windows; then go on.
    Again,
    /// The guest waits in a loop, it seems for another vCPU.
    Spin,
    /// The guest did something that is not finished in the window: the vCPU's [`exit`](vcpu_core::AxVCpu::exit).
    Exit,
    /// It is a nested page fault at an address that is no memory.
    Mmio,
}

impl Vcpu {
    /// `RUN`.
    ///
    /// # Errors
    /// - `EINTR`: a signal waits. The exit is `Interrupted`.
    /// - `EFAULT`: the guest touched a region whose memory is gone. The exit is `NestedPageFault`.
    /// - `EBUSY`, `EBADFD`, `ENOTRECOVERABLE`, `EIO`, ...: [`AxError`].
    pub(crate) fn run(&self, inner: &mut Inner) -> Result<isize> {
        bump(&self.shared.stats.runs);
        self.take_requests(inner)?;
        self.shared.stats.set_state(VCpuState::Running);
        let at_work = self.shared.worker.begin();
        let result = self.run_until_exit(inner);
        drop(at_work);
        self.publish(inner);
        result.map(|()| 0)
    }

    /// Does what the caller asked for in the run page.
    fn take_requests(&self, inner: &mut Inner) -> Result {
        let request = self.page.request();
        if request & !arch::REQUESTS != 0 {
            return Err(EINVAL);
        }
        let arch = inner.vcpu.arch_mut().map_err(abi::errno)?;
        if request & abi_run::REQUEST_LOAD_GENERAL != 0 {
            arch.set_general(&self.page.general()).map_err(abi::errno)?;
            self.page.set_request(request & !abi_run::REQUEST_LOAD_GENERAL);
        }
        arch.request_interrupt_window(request & abi_run::REQUEST_INTERRUPT_WINDOW != 0);
        let reply = self.page.reply();
        if reply & !abi_run::REPLY_FAULT != 0 {
            return Err(EINVAL);
        }
        arch.complete(Reply { value: self.page.value(), fault: reply & abi_run::REPLY_FAULT != 0 });
        self.page.set_reply(0);
        Ok(())
    }

    /// Runs the guest until its user must see why it stopped, and shows it.
    fn run_until_exit(&self, inner: &mut Inner) -> Result {
        // The window looks for work before the guest is entered, so there is no need to look before it.
        let mut work = false;
        loop {
            let kicked = self.shared.take_kick();
            let arch = inner.vcpu.arch_mut().map_err(abi::errno)?;
            // Also before a kick is answered: whoever kicks finds in the register sets what was posted before.
            let runnable = !kicked && arch.is_executing() || arch.prepare(&self.shared.mailbox);
            if kicked {
                self.report(inner, &Exit::Interrupted);
                return Ok(());
            }
            if work || !runnable {
                ffi::handle_work().inspect_err(|_| self.report(inner, &Exit::Interrupted))?;
            }
            if !runnable {
                self.set_timer(inner);
                self.sleep(inner)?;
                continue;
            }
            self.update_clock(inner);
            let stop = arch::in_window(inner, |inner, irq_off| self.guest_turns(inner, irq_off))?;
            self.shared.set_spins(matches!(stop, Stop::Spin));
            work = matches!(stop, Stop::Again);
            match stop {
                Stop::Again => {}
                Stop::Spin => self.vm.yield_for(&self.shared),
                Stop::Exit => {
                    if !self.try_to_resolve(inner)? {
                        return Ok(());
                    }
                }
                Stop::Mmio => {
                    if !self.not_memory(inner)? {
                        return Ok(());
                    }
                }
            }
        }
    }

    /// Resolves the last exit if it is a nested page fault of memory. Otherwise the user is to see it, and the answer is false.
    #[inline]
    fn try_to_resolve(&self, inner: &mut Inner) -> Result<bool> {
        let Exit::NestedPageFault { addr, access_flags } = *inner.vcpu.exit() else {
            self.report(inner, inner.vcpu.exit());
            return Ok(false);
        };
        let Inner { aspace: Some(aspace), spare, .. } = inner else {
            return Err(abi::errno(AxError::NotSetUp));
        };
        match aspace.fault(addr, access_flags, spare) {
            Ok(Fault::Resolved) => {
                self.shared.stats.count_exit(ExitKind::PageFault);
                Ok(true)
            }
            Ok(Fault::NotMemory) => {
                arch::show_all(inner).map_err(abi::errno)?;
                self.not_memory(inner)
            }
            Err(error) => {
                self.report(inner, if error == EINTR { &Exit::Interrupted } else { inner.vcpu.exit() });
                Err(error)
            }
        }
    }

    /// Resolves the last exit, a nested page fault of no memory, if the backend can. Otherwise the user is to see it, and the answer
    /// is false.
    #[inline]
    fn not_memory(&self, inner: &mut Inner) -> Result<bool> {
        self.shared.stats.count_exit(ExitKind::Mmio);
        inner.vcpu.amend_exit(arch::not_memory).map_err(abi::errno)?;
        if matches!(inner.vcpu.exit(), Exit::Nothing) {
            return Ok(true);
        }
        self.report(inner, inner.vcpu.exit());
        Ok(false)
    }

    /// The user is to see `exit`.
    #[inline]
    fn report(&self, inner: &Inner, exit: &Exit) {
        bump(&self.shared.stats.user_exits);
        self.show_exit(inner, exit);
    }

    /// Sleeps until there is something for the vCPU, or its user, to do.
    fn sleep(&self, inner: &mut Inner) -> Result {
        inner.vcpu.block().map_err(abi::errno)?;
        self.shared.stats.set_state(VCpuState::Blocked);
        let result = self.shared.sleep();
        inner.vcpu.wake();
        self.shared.stats.set_state(VCpuState::Running);
        result.inspect_err(|_| self.report(inner, &Exit::Interrupted))
    }

    /// Enters the guest again and again until something must be done outside the window.
    fn guest_turns(&self, inner: &mut Inner, irq_off: &IrqOff) -> Result<Stop> {
        let cpu = Host::cpu_id();
        self.shared.stats.last_cpu.store(cpu as u32, Ordering::Relaxed);
        let in_guest = self.shared.enter(cpu, irq_off);
        let mut entries_left = ENTRIES_IN_A_ROW;
        let stop = loop {
            // From here to the entry nothing may be added that posts to ourselves: posts made before are seen below, and posts
            // made later find the vCPU marked as in the guest and interrupt it.
            if irq_off.work_pending() || self.shared.kick_pending() || entries_left == 0 {
                break Ok(Stop::Again);
            }
            let turn = self.turn(inner, irq_off, &mut entries_left);
            self.tell(inner, irq_off);
            match turn {
                Ok(None) => {}
                Ok(Some(stop)) => break Ok(stop),
                Err(error) => break Err(abi::errno(error)),
            }
        };
        // A vCPU that has failed has left by itself, and cannot be asked to.
        let left = inner.vcpu.arch_mut().map_or(Ok(()), arch::VCpu::leave).map_err(abi::errno);
        self.tell(inner, irq_off);
        drop(in_guest);
        left.and(stop)
    }

    /// Entries into the guest up to an exit that is not over in the backend, and what can be done about that right here.
    #[inline]
    fn turn(&self, inner: &mut Inner, irq_off: &IrqOff, entries_left: &mut u32) -> Result<Option<Stop>, AxError> {
        let Inner { vcpu, aspace: Some(aspace), seen_generation, spare, .. } = inner else {
            return Err(AxError::NotSetUp);
        };
        *entries_left = entries_left.wrapping_sub(1);
        let arch = vcpu.arch_mut()?;
        flush_if_moved(arch, aspace, seen_generation);
        if !arch.prepare(&self.shared.mailbox) {
            return Ok(Some(Stop::Again));
        }
        let mut between = Between {
            vm: &self.vm,
            irq_off,
            aspace,
            spare,
            timer: &mut inner.timer,
            shared: &self.shared,
            entries_left,
            generation: *seen_generation,
            is_memory: true,
        };
        let kind = arch::enter(vcpu, &mut between)?;
        let is_memory = between.is_memory;
        if !matches!(vcpu.exit(), Exit::NestedPageFault { .. }) {
            self.shared.stats.count_exit(kind);
        }
        self.set_timer(inner);
        Ok(match *inner.vcpu.exit() {
            Exit::Nothing => match kind {
                _ if inner.vcpu.arch()?.clock_due() => Some(Stop::Again),
                ExitKind::Pause => Some(Stop::Spin),
                _ => None,
            },
            Exit::ExternalInterrupt { .. } | Exit::PreemptionTimer => Some(Stop::Again),
            Exit::SendIPI { target_cpu, vector, .. } => {
                self.send_ipi(inner, target_cpu, vector);
                None
            }
            Exit::NestedPageFault { .. } => Some(if is_memory { Stop::Exit } else { Stop::Mmio }),
            Exit::InterruptEnd { vector: Some(vector) } if self.vm.irqfds.end(vector, irq_off, || ()) => None,
            // With interrupts disabled only NMI and INIT can end the halt: the user may want to know.
            Exit::Halt if inner.in_kernel_apic && inner.vcpu.arch()?.interrupts_enabled() => Some(Stop::Again),
            _ => Some(Stop::Exit),
        })
    }

    /// Lets the host timer follow the guest's.
    pub(crate) fn set_timer(&self, inner: &mut Inner) {
        let Ok(arch) = inner.vcpu.arch_mut() else { return };
        follow(&mut inner.timer, arch.timer_update());
    }

    /// Copies what others may read without the mutex.
    pub(crate) fn publish(&self, inner: &Inner) {
        let stats = &self.shared.stats;
        let record = inner.vcpu.record();
        stats.windows.store(record.windows, Ordering::Relaxed);
        stats.entries.store(record.entries, Ordering::Relaxed);
        stats.migrations.store(record.migrations, Ordering::Relaxed);
        stats.run_ns.store(record.run_ns, Ordering::Relaxed);
        stats.halt_ns.store(record.halt_ns, Ordering::Relaxed);
        stats.last_cpu.store(record.last_cpu.map_or(u32::MAX, |cpu| cpu as u32), Ordering::Relaxed);
        stats.set_state(inner.vcpu.state());
        if let Ok(arch) = inner.vcpu.arch() {
            stats.injections.store(arch.injections(), Ordering::Relaxed);
            stats.tlb_flushes.store(arch.tlb_flushes(), Ordering::Relaxed);
        }
    }
}

/// What the backend's loop of entries needs of the module between two of them. Interrupts are off, and the vCPU is marked as in the
/// guest.
pub(crate) struct Between<'a> {
    pub(crate) vm: &'a Vm,
    pub(crate) irq_off: &'a IrqOff,
    aspace: &'a AddressSpace,
    spare: &'a mut Spare,
    pub(crate) timer: &'a mut Timer,
    pub(crate) shared: &'a Shared,
    entries_left: &'a mut u32,
    /// The generation of the address space's translations that the guest was entered with.
    generation: u64,
    /// The last nested page fault may be one of memory.
    is_memory: bool,
}

impl Between<'_> {
    /// Whether the guest may be entered once more in this turn. If so, an exit of `kind` has been dealt with.
    #[inline]
    pub(crate) fn may_go_on(&mut self, kind: ExitKind) -> bool {
        let wanted = self.irq_off.work_pending() || self.shared.kick_pending() || self.shared.mailbox.pending();
        if wanted || self.aspace.generation() != self.generation || *self.entries_left == 0 {
            return false;
        }
        *self.entries_left = self.entries_left.wrapping_sub(1);
        self.shared.stats.count_exit(kind);
        true
    }

    /// Resolves a nested page fault, if that can be done right here.
    #[inline]
    pub(crate) fn fault(&mut self, addr: GuestPhysAddr, access: AccessFlags) -> Option<Fault> {
        let fault = self.aspace.fault_in_place(addr, access, self.spare, self.irq_off);
        self.is_memory = !matches!(fault, Some(Fault::NotMemory));
        fault
    }
}

/// Lets the host's timer do what the guest's asks of it.
#[inline]
pub(crate) fn follow(timer: &mut Timer, update: TimerUpdate) {
    match update {
        TimerUpdate::Unchanged => {}
        TimerUpdate::Cancel => timer.cancel(),
        TimerUpdate::Arm(at) => timer.arm(at),
    }
}

/// Has the guest's TLB flushed if translations went away since it was last. The vCPU is marked as in the guest.
#[inline]
fn flush_if_moved(arch: &mut arch::VCpu, aspace: &AddressSpace, seen: &mut u64) {
    let now = aspace.generation();
    if *seen != now {
        *seen = now;
        arch.flush_tlb();
    }
}
