// SPDX-License-Identifier: MIT OR Apache-2.0
//! How each row is measured: loops of exits, sleepers that are woken, page faults.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::thread;

use axvcpu_tests::code;
use axvcpu_uapi::client::{IoAddress, Memory};
use nix::mount::{mount, MsFlags};
use nix::sys::mman::{madvise, MmapAdvise};
use vmm_sys_util::eventfd::{EventFd, EFD_NONBLOCK};

use crate::guest::{self, Loop, FAULT_INSTRUCTIONS, HUGE, INTERRUPT_INSTRUCTIONS, RAM_SIZE, SMALL};
use crate::machine::{Cpu, Factory, Machine, Plan, Result};
use crate::measure::{self, ticks, Effort};
use crate::rows::Row;

/// Turns of a loop of exits.
const EXITS: u64 = 3_000;
/// Wake-ups of a sleeper.
const WAKES: u64 = 500;
/// Interrupts of the timer.
const TIMERS: u64 = 200;
/// Pages of 4 KiB that are touched.
const SMALL_PAGES: u64 = 1024;
/// Pages of 2 MiB that are touched.
const HUGE_PAGES: u64 = 16;
/// VMs in a row.
const LIVES: u64 = 10;
/// VMs at a time.
const CROWD: usize = 48;

/// Where the loops of MMIO go: no memory.
const MMIO: u64 = 0x3000_0000;

const SMALL_SIZE: usize = 4 << 10;
const HUGE_SIZE: usize = 2 << 20;

/// Measures a row; `None` if it is none of these.
pub(crate) fn measure(row: Row, device: &dyn Factory, effort: Effort) -> Option<Result<Vec<f64>>> {
    Some(match row {
        Row::Cpuid => exits(device, effort, false, &cpuid()),
        Row::MsrRead => exits(device, effort, true, &msr_read()),
        Row::MsrRefused => exits(device, effort, true, &msr_refused()),
        Row::SelfIpi => exits(device, effort, true, &self_ipi()),
        Row::Eoi => exits(device, effort, true, &eoi()),
        Row::DeadlineArm => exits(device, effort, true, &deadline_arm()),
        Row::Deadline => deadline(device, effort),
        Row::HltWake => wake(device, effort, |machine| Ok(Box::new(move || machine.signal()))),
        Row::Irqfd => wake(device, effort, |machine| {
            let fd = EventFd::new(EFD_NONBLOCK)?;
            machine.attach_irqfd(&fd)?;
            Ok(Box::new(move || Ok(fd.write(1)?)))
        }),
        Row::Ipi => ipi(device, effort),
        Row::Ioeventfd => ioeventfd(device, effort, IoAddress::Port(0x80), &out()),
        Row::IoeventfdMmio => ioeventfd(device, effort, IoAddress::Memory(MMIO), &mmio_write()),
        Row::Fault4k => faults(device, effort, SMALL, SMALL_SIZE, SMALL_PAGES),
        Row::Fault2m => faults(device, effort, HUGE, HUGE_SIZE, HUGE_PAGES),
        Row::Out => exits(device, effort, false, &out()),
        Row::In => exits(device, effort, false, &input()),
        Row::MmioWrite => exits(device, effort, false, &mmio_write()),
        Row::MmioRead => exits(device, effort, false, &mmio_read()),
        Row::Hypercall => exits(device, effort, false, &hypercall()),
        Row::MsrUser => exits(device, effort, false, &msr_user()),
        Row::Life => lives(device, effort),
        Row::KernelMemory => kernel_memory(device),
        Row::Boot | Row::BootExits | Row::Resident => return None,
    })
}

// --- Loops ---

/// Code that switches the local APIC on, in x2APIC mode, and more behind it.
macro_rules! x2apic {
    ($name:ident, $($line:literal),* $(,)?) => {
        code!(
            $name, 64,
            "mov ecx, 0x1b", "rdmsr", "or eax, 0xc00", "wrmsr",
            "mov ecx, 0x80f", "mov eax, 0x1ff", "xor edx, edx", "wrmsr",
            $($line),*
        )
    };
}

fn cpuid() -> Loop {
    Loop { before: &[], body: code!(cpuid, 64, "mov eax, 1", "xor ecx, ecx", "cpuid"), instructions: 3 }
}

fn msr_read() -> Loop {
    Loop { before: code!(msr_read_before, 64, "mov ecx, 0x1b"), body: code!(msr_read, 64, "rdmsr"), instructions: 1 }
}

/// IA32_APIC_BASE has no bit 0.
fn msr_refused() -> Loop {
    Loop {
        before: code!(msr_refused_before, 64, "mov ecx, 0x1b", "mov eax, 1", "xor edx, edx"),
        body: code!(msr_refused, 64, "wrmsr"),
        instructions: 1 + FAULT_INSTRUCTIONS,
    }
}

fn self_ipi() -> Loop {
    Loop {
        before: x2apic!(self_ipi_before, "sti"),
        body: code!(self_ipi, 64, "mov ecx, 0x83f", "mov eax, 0x40", "xor edx, edx", "wrmsr"),
        instructions: 4 + INTERRUPT_INSTRUCTIONS,
    }
}

fn eoi() -> Loop {
    Loop {
        before: x2apic!(eoi_before, "mov ecx, 0x80b", "xor eax, eax"),
        body: code!(eoi, 64, "wrmsr"),
        instructions: 1,
    }
}

/// A deadline that is never reached, and another one each time.
fn deadline_arm() -> Loop {
    Loop {
        before: x2apic!(
            deadline_arm_before,
            "mov ecx, 0x832",
            "mov eax, 0x40040",
            "wrmsr",
            "mov ecx, 0x6e0",
            "mov edx, 0x1000000",
            "xor eax, eax",
        ),
        body: code!(deadline_arm, 64, "wrmsr", "inc eax"),
        instructions: 2,
    }
}

fn out() -> Loop {
    Loop { before: &[], body: code!(out, 64, "out 0x80, al"), instructions: 1 }
}

fn input() -> Loop {
    Loop { before: &[], body: code!(input, 64, "in al, 0x80"), instructions: 1 }
}

fn mmio_write() -> Loop {
    Loop {
        before: code!(mmio_write_before, 64, "mov edi, 0x30000000"),
        body: code!(mmio_write, 64, "mov [rdi], eax"),
        instructions: 1,
    }
}

fn mmio_read() -> Loop {
    Loop {
        before: code!(mmio_read_before, 64, "mov edi, 0x30000000"),
        body: code!(mmio_read, 64, "mov eax, [rdi]"),
        instructions: 1,
    }
}

/// The hypercall that KVM leaves to userspace: about no page at address 0.
fn hypercall() -> Loop {
    const BEFORE: &[u8] = &[];
    let vendor_is_intel = std::fs::read_to_string("/proc/cpuinfo").is_ok_and(|text| text.contains("GenuineIntel"));
    // 16 bytes of page number 1: KVM wants a range that is not empty.
    if vendor_is_intel {
        Loop { before: BEFORE, body: hypercall_intel(), instructions: 5 }
    } else {
        Loop { before: BEFORE, body: hypercall_amd(), instructions: 5 }
    }
}

fn hypercall_intel() -> &'static [u8] {
    code!(hypercall_intel, 64, "mov eax, 12", "mov ebx, 0x1000", "mov ecx, 1", "xor edx, edx", "vmcall")
}

fn hypercall_amd() -> &'static [u8] {
    code!(hypercall_amd, 64, "mov eax, 12", "mov ebx, 0x1000", "mov ecx, 1", "xor edx, edx", "vmmcall")
}

/// An MSR that nobody knows.
fn msr_user() -> Loop {
    Loop {
        before: code!(msr_user_before, 64, "mov ecx, 0x12345678"),
        body: code!(msr_user, 64, "rdmsr"),
        instructions: 1 + FAULT_INSTRUCTIONS,
    }
}

// --- Ways to measure ---

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
fn exits(device: &dyn Factory, effort: Effort, apic: bool, work: &Loop) -> Result<Vec<f64>> {
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
fn deadline(device: &dyn Factory, effort: Effort) -> Result<Vec<f64>> {
    /// Instructions of a turn without the spinning.
    const FIXED: u64 = 9 + INTERRUPT_INSTRUCTIONS as u64;
    let mut lab = Lab::new(device, 1, true)?;
    let mut cpu = lab.machine.take_cpu(0)?;
    let turns = effort.turns(TIMERS);
    // R13 counts turns of the inner loop, of three instructions. R14 is the handler's; both are told by their sum, in
    // which R14 is `turns`.
    let work = Loop {
        before: x2apic!(deadline_before, "mov ecx, 0x832", "mov eax, 0x40040", "wrmsr", "xor r13d, r13d", "sti"),
        body: code!(
            deadline,
            64,
            "rdtsc",
            "shl rdx, 32",
            "lea rax, [rax + rdx + 100000]",
            "mov rdx, rax",
            "shr rdx, 32",
            "mov ecx, 0x6e0",
            "mov r12, r14",
            "wrmsr",
            "2: inc r13",
            "cmp r12, r14",
            "je 2b",
            "nop",
        ),
        instructions: 0,
    };
    let mut code = work.code();
    // The sum, before the OUT at the end.
    let end = code.len() - 2;
    code.splice(end..end, code!(deadline_after, 64, "mov r14, r13").iter().copied());
    lab.load(&code)?;
    measure::samples(effort, || {
        let total = time(&mut *cpu, turns)?;
        let spins = cpu.r14()?;
        let guest = 3 * spins + (FIXED + 2) * turns;
        Ok((total - guest as f64) / turns as f64)
    })
}

/// Sends the signal that wakes vCPU 0.
type Waker<'a> = Box<dyn Fn() -> Result<()> + 'a>;

/// vCPU 0 sleeps in HLT on a thread that is more urgent than this one, on the same CPU: each signal returns only when the
/// guest has handled it and sleeps again.
fn wake(
    device: &dyn Factory,
    effort: Effort,
    attach: impl for<'a> FnOnce(&'a dyn Machine) -> Result<Waker<'a>>,
) -> Result<Vec<f64>> {
    let mut lab = Lab::new(device, 1, true)?;
    let sleeper = Loop { before: x2apic!(wake_before,), body: sleep_body(), instructions: 0 };
    lab.load(&sleeper.code())?;
    let mut cpu = lab.machine.take_cpu(0)?;
    let waker = attach(&*lab.machine)?;
    let turns = effort.turns(WAKES);
    measure::samples(effort, || with_sleeper(&mut *cpu, turns, &*waker))
}

fn sleep_body() -> &'static [u8] {
    code!(sleeper, 64, "sti", "hlt", "cli")
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

/// vCPU 1 sleeps as in [`wake`], and vCPU 0 wakes it.
fn ipi(device: &dyn Factory, effort: Effort) -> Result<Vec<f64>> {
    let mut lab = Lab::new(device, 2, true)?;
    // Both execute the same code: they part by their APIC id.
    let code = x2apic!(
        ipi,
        "mov ecx, 0x802",
        "rdmsr",
        "test eax, eax",
        "jz 3f",
        "2: sti",
        "hlt",
        "cli",
        "dec r15",
        "jnz 2b",
        "out 0xf4, al",
        "3: mov ecx, 0x830",
        "mov eax, 0x40",
        "mov edx, 1",
        "4: wrmsr",
        "dec r15",
        "jnz 4b",
        "out 0xf4, al",
    );
    lab.load(code)?;
    let (mut first, mut second) = (lab.machine.take_cpu(0)?, lab.machine.take_cpu(1)?);
    let turns = effort.turns(WAKES);
    measure::samples(effort, || {
        second.start(turns)?;
        asleep(&mut *second, || Ok(time(&mut *first, turns)? / turns as f64))
    })
}

/// The guest writes to `at` again and again by `work`.
fn ioeventfd(device: &dyn Factory, effort: Effort, at: IoAddress, work: &Loop) -> Result<Vec<f64>> {
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

/// The guest touches `pages` pages of `size` bytes, which the host has and the nested page table has not.
fn faults(device: &dyn Factory, effort: Effort, at: u64, size: usize, pages: u64) -> Result<Vec<f64>> {
    let mut lab = Lab::new(device, 1, false)?;
    let mut cpu = lab.machine.take_cpu(0)?;
    let (before, body) = if size == HUGE_SIZE {
        (code!(huge_before, 64, "mov edi, 0x10000000"), code!(huge, 64, "mov [rdi], al", "add rdi, 0x200000"))
    } else {
        (code!(small_before, 64, "mov edi, 0x08000000"), code!(small, 64, "mov [rdi], al", "add rdi, 0x1000"))
    };
    let work = Loop { before, body, instructions: 2 };
    let length = pages as usize * size;
    let memory = Arc::new(Memory::anonymous(length + HUGE_SIZE)?);
    let offset = populate(&memory, size)?;
    lab.load(&work.empty())?;
    let empty = measure::samples(effort, || time(&mut *cpu, pages))?;
    let empty = measure::median(&empty).ok_or("no samples")?;
    lab.load(&work.code())?;
    measure::samples(effort, || {
        lab.machine.map_anew(at, &memory, offset, length)?;
        Ok((time(&mut *cpu, pages)? - empty) / pages as f64)
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

fn lives(device: &dyn Factory, effort: Effort) -> Result<Vec<f64>> {
    let ram = Arc::new(Memory::anonymous(RAM_SIZE)?);
    guest::prepare(&ram)?;
    ram.write(guest::CODE as usize, &out().empty())?;
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
fn kernel_memory(device: &dyn Factory) -> Result<Vec<f64>> {
    let ram = Arc::new(Memory::anonymous(RAM_SIZE)?);
    guest::prepare(&ram)?;
    ram.write(guest::CODE as usize, &out().empty())?;
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

/// A control group of this process's, version 2.
struct Group;

impl Group {
    const ROOT: &str = "/sys/fs/cgroup";
    const PATH: &str = "/sys/fs/cgroup/axvcpu-bench";

    /// Mounts the file system if need be, makes a group and moves this process there.
    fn enter() -> Result<Self> {
        if !Path::new(Self::ROOT).join("cgroup.procs").exists() {
            let none: Option<&str> = None;
            mount(none, Self::ROOT, Some("cgroup2"), MsFlags::empty(), none)?;
        }
        fs::write(Path::new(Self::ROOT).join("cgroup.subtree_control"), "+memory")?;
        fs::create_dir_all(Self::PATH)?;
        fs::write(Path::new(Self::PATH).join("cgroup.procs"), "0")?;
        Ok(Self)
    }

    /// What the kernel uses on behalf of the group: slab, page tables (nested ones too), whole pages, per-CPU memory.
    fn kernel_bytes(&self) -> Result<u64> {
        let text = fs::read_to_string(Path::new(Self::PATH).join("memory.stat"))?;
        let figure = text.lines().find_map(|line| line.strip_prefix("kernel ")).ok_or("memory.stat has no 'kernel'")?;
        Ok(figure.parse()?)
    }
}
