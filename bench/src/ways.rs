// SPDX-License-Identifier: MIT OR Apache-2.0
//! The ways to measure: loops of exits, sleepers that are woken, page faults, whole lives. What the guests do is each
//! architecture's affair (`x86/cases.rs`, `arm64/cases.rs`).

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::thread;

use axvcpu_uapi::client::{IoAddress, Memory};
use nix::sys::mman::{madvise, MmapAdvise};
use vmm_sys_util::eventfd::{EventFd, EFD_NONBLOCK};

use crate::arch::guest::{self, HUGE, RAM_SIZE, SMALL};
use crate::group::Group;
use crate::machine::{Cpu, Factory, Machine, Plan, Result};
use crate::measure::{self, ticks, Effort};
use crate::work::{Loop, Spinning};

/// Turns of a loop of exits.
const EXITS: u64 = 3_000;
/// Wake-ups of a sleeper.
const WAKES: u64 = 500;
/// Interrupts of the timer.
const TIMERS: u64 = 200;
/// VMs in a row.
const LIVES: u64 = 10;
/// VMs at a time.
const CROWD: usize = 48;

/// What a fault of the nested page table maps.
pub(crate) struct Pages {
    /// Guest physical address of the first.
    at: u64,
    /// Size of each.
    size: usize,
    /// How many are touched.
    count: u64,
}

/// Pages of 4 KiB.
pub(crate) const SMALL_PAGES: Pages = Pages { at: SMALL, size: 4 << 10, count: 1024 };
/// Pages of 2 MiB.
pub(crate) const HUGE_PAGES: Pages = Pages { at: HUGE, size: HUGE_SIZE, count: 16 };

const HUGE_SIZE: usize = 2 << 20;

/// A machine with its RAM.
struct Lab {
    machine: Box<dyn Machine>,
    ram: Arc<Memory>,
}

impl Lab {
    fn new(device: &dyn Factory, cpus: u32, apic: bool) -> Result<Self> {
        let ram = Arc::new(Memory::anonymous(RAM_SIZE)?);
        guest::prepare(&ram)?;
        let machine = device.create(&Plan { cpus, apic, ram: Arc::clone(&ram) })?;
        Ok(Self { machine, ram })
    }

    fn load(&self, code: &[u8]) -> Result<()> {
        Ok(self.ram.write(guest::CODE as usize, code)?)
    }
}

/// Ticks of `turns` turns of the loaded loop.
fn time(cpu: &mut dyn Cpu, turns: u64) -> Result<f64> {
    cpu.start(turns)?;
    let start = ticks();
    cpu.run()?;
    Ok(ticks().wrapping_sub(start) as f64)
}

/// Ticks per turn beyond those of the guest's own instructions.
pub(crate) fn exits(device: &dyn Factory, effort: Effort, apic: bool, work: &Loop) -> Result<Vec<f64>> {
    let mut lab = Lab::new(device, 1, apic)?;
    let mut cpu = lab.machine.take_cpu(0)?;
    let turns = effort.turns(EXITS);
    lab.load(&work.empty())?;
    let empty = measure::samples(effort, || time(&mut *cpu, turns))?;
    let empty = measure::median(&empty).ok_or("no samples")?;
    lab.load(&work.code())?;
    measure::samples(effort, || Ok((time(&mut *cpu, turns)? - empty) / turns as f64))
}

/// The timer fires while the guest spins, and the guest counts how long.
pub(crate) fn spinning(device: &dyn Factory, effort: Effort, work: &Spinning) -> Result<Vec<f64>> {
    let mut lab = Lab::new(device, 1, true)?;
    let mut cpu = lab.machine.take_cpu(0)?;
    let turns = effort.turns(TIMERS);
    lab.load(&work.code)?;
    measure::samples(effort, || {
        let total = time(&mut *cpu, turns)?;
        let guest = work.spin * cpu.count()? + work.fixed * turns;
        Ok((total - guest as f64) / turns as f64)
    })
}

/// Sends the signal that wakes vCPU 0.
pub(crate) type Waker<'a> = Box<dyn Fn() -> Result<()> + 'a>;

/// vCPU 0 sleeps, as `sleeper` has it, on a thread that is more urgent than this one, on the same CPU: each signal returns
/// only when the guest has handled it and sleeps again.
fn wake(
    device: &dyn Factory,
    effort: Effort,
    sleeper: &Loop,
    attach: impl for<'a> FnOnce(&'a dyn Machine) -> Result<Waker<'a>>,
) -> Result<Vec<f64>> {
    let mut lab = Lab::new(device, 1, true)?;
    lab.load(&sleeper.code())?;
    let mut cpu = lab.machine.take_cpu(0)?;
    let waker = attach(&*lab.machine)?;
    let turns = effort.turns(WAKES);
    measure::samples(effort, || with_sleeper(&mut *cpu, turns, &*waker))
}

/// As [`wake`], by a message from userspace.
pub(crate) fn wake_by_message(device: &dyn Factory, effort: Effort, sleeper: &Loop) -> Result<Vec<f64>> {
    wake(device, effort, sleeper, |machine| Ok(Box::new(move || machine.signal())))
}

/// As [`wake`], by an irqfd.
pub(crate) fn wake_by_irqfd(device: &dyn Factory, effort: Effort, sleeper: &Loop) -> Result<Vec<f64>> {
    wake(device, effort, sleeper, |machine| {
        let fd = EventFd::new(EFD_NONBLOCK)?;
        machine.attach_irqfd(&fd)?;
        Ok(Box::new(move || Ok(fd.write(1)?)))
    })
}

/// Ticks per wake-up.
fn with_sleeper(cpu: &mut dyn Cpu, turns: u64, waker: &dyn Fn() -> Result<()>) -> Result<f64> {
    cpu.start(turns)?;
    asleep(cpu, || {
        let start = ticks();
        for _ in 0..turns {
            waker()?;
        }
        Ok(ticks().wrapping_sub(start) as f64 / turns as f64)
    })
}

/// Runs `cpu` on a thread of real-time priority until its loop ends, which `f` brings about.
fn asleep(cpu: &mut dyn Cpu, f: impl FnOnce() -> Result<f64>) -> Result<f64> {
    let started = AtomicBool::new(false);
    thread::scope(|scope| {
        let sleeper = scope.spawn(|| {
            make_urgent()?;
            started.store(true, Ordering::Release);
            cpu.run()
        });
        // This thread comes to run again when the other one sleeps.
        while !started.load(Ordering::Acquire) && !sleeper.is_finished() {
            thread::yield_now();
        }
        let result = f();
        sleeper.join().map_err(|_| "the vCPU's thread panicked")??;
        result
    })
}

/// Gives the calling thread the priority to run whenever it can.
fn make_urgent() -> Result<()> {
    let parameters = nix::libc::sched_param { sched_priority: 1 };
    // SAFETY: The structure is valid; only the calling thread is concerned.
    let status = unsafe { nix::libc::sched_setscheduler(0, nix::libc::SCHED_FIFO, &parameters) };
    nix::errno::Errno::result(status).map_err(|error| format!("no real-time priority: {error}"))?;
    Ok(())
}

/// vCPU 1 sleeps as in [`wake`], and vCPU 0 wakes it. Both execute `code`, as often as the loop's counter says.
pub(crate) fn ipi(device: &dyn Factory, effort: Effort, code: &[u8]) -> Result<Vec<f64>> {
    let mut lab = Lab::new(device, 2, true)?;
    lab.load(code)?;
    let (mut first, mut second) = (lab.machine.take_cpu(0)?, lab.machine.take_cpu(1)?);
    let turns = effort.turns(WAKES);
    measure::samples(effort, || {
        second.start(turns)?;
        asleep(&mut *second, || Ok(time(&mut *first, turns)? / turns as f64))
    })
}

/// The guest writes to `at` again and again by `work`.
pub(crate) fn ioeventfd(device: &dyn Factory, effort: Effort, at: IoAddress, work: &Loop) -> Result<Vec<f64>> {
    let mut lab = Lab::new(device, 1, false)?;
    let fd = EventFd::new(EFD_NONBLOCK)?;
    lab.machine.attach_ioeventfd(&fd, at)?;
    let mut cpu = lab.machine.take_cpu(0)?;
    let turns = effort.turns(EXITS);
    lab.load(&work.empty())?;
    let empty = measure::samples(effort, || time(&mut *cpu, turns))?;
    let empty = measure::median(&empty).ok_or("no samples")?;
    lab.load(&work.code())?;
    let samples = measure::samples(effort, || Ok((time(&mut *cpu, turns)? - empty) / turns as f64))?;
    // One sample more was taken to warm up.
    let (seen, expected) = (fd.read()?, turns * (effort.samples as u64 + 1));
    if seen != expected {
        return Err(format!("the eventfd counted {seen} of {expected}").into());
    }
    Ok(samples)
}

/// The guest touches `pages`, one after the other, which the host has and the nested page table has not.
pub(crate) fn faults(device: &dyn Factory, effort: Effort, pages: &Pages, work: &Loop) -> Result<Vec<f64>> {
    let mut lab = Lab::new(device, 1, false)?;
    let mut cpu = lab.machine.take_cpu(0)?;
    let &Pages { at, size, count } = pages;
    let length = count as usize * size;
    let memory = Arc::new(Memory::anonymous(length + HUGE_SIZE)?);
    let offset = populate(&memory, size)?;
    lab.load(&work.empty())?;
    let empty = measure::samples(effort, || time(&mut *cpu, count))?;
    let empty = measure::median(&empty).ok_or("no samples")?;
    measure::samples(effort, || {
        lab.machine.map_anew(at, &memory, offset, length)?;
        // KVM forgets all of its nested page table where memory is taken away: what is not to be measured, the loop's own
        // pages, comes back before.
        lab.load(&work.empty())?;
        time(&mut *cpu, count)?;
        lab.load(&work.code())?;
        Ok((time(&mut *cpu, count)? - empty) / count as f64)
    })
}

/// Has the host provide all of `memory` by pages of `size`, and returns the offset of the first one of 2 MiB.
fn populate(memory: &Memory, size: usize) -> Result<usize> {
    use axvcpu_uapi::client::Backing;
    let (start, length) = (memory.start(), memory.size());
    let advice = if size == HUGE_SIZE { MmapAdvise::MADV_HUGEPAGE } else { MmapAdvise::MADV_NOHUGEPAGE };
    // SAFETY: The range is the memory's own, and the advice changes how it is provided only.
    unsafe { madvise(start.cast(), length, advice)? };
    for page in (0..length).step_by(4096) {
        memory.write(page, &[1])?;
    }
    Ok(start.as_ptr().align_offset(HUGE_SIZE))
}

/// VMs that are made, run `nothing`, and are gone, one after the other.
pub(crate) fn lives(device: &dyn Factory, effort: Effort, nothing: &Loop) -> Result<Vec<f64>> {
    let ram = Arc::new(Memory::anonymous(RAM_SIZE)?);
    guest::prepare(&ram)?;
    ram.write(guest::CODE as usize, &nothing.code())?;
    let turns = effort.turns(LIVES);
    measure::samples(effort, || {
        let start = ticks();
        for _ in 0..turns {
            drop(live(device, &ram)?);
        }
        Ok(ticks().wrapping_sub(start) as f64 / turns as f64)
    })
}

/// A VM that has lived.
fn live(device: &dyn Factory, ram: &Arc<Memory>) -> Result<(Box<dyn Cpu>, Box<dyn Machine>)> {
    let mut machine = device.create(&Plan { cpus: 1, apic: true, ram: Arc::clone(ram) })?;
    let mut cpu = machine.take_cpu(0)?;
    cpu.start(1)?;
    cpu.run()?;
    Ok((cpu, machine))
}

/// What a control group with this process alone is charged more while some VMs live, per VM.
pub(crate) fn kernel_memory(device: &dyn Factory, nothing: &Loop) -> Result<Vec<f64>> {
    let ram = Arc::new(Memory::anonymous(RAM_SIZE)?);
    guest::prepare(&ram)?;
    ram.write(guest::CODE as usize, &nothing.code())?;
    let group = Group::enter()?;
    let once = Effort { samples: 3, divisor: 1 };
    measure::samples(once, || {
        let mut crowd = Vec::with_capacity(CROWD);
        let before = group.kernel_bytes()?;
        for _ in 0..CROWD {
            crowd.push(live(device, &ram)?);
        }
        Ok((group.kernel_bytes()? as f64 - before as f64) / CROWD as f64)
    })
}
