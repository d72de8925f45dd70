// SPDX-License-Identifier: MIT OR Apache-2.0
//! Who runs the vCPU, where, and how others make it stop.

use crate::harness::{self, Case, CaseResult, Hypervisor, Stop};
use crate::machine::{Machine, Mode, CODE, DATA};
use crate::pin::{pin, Allowed};
use crate::{code, ensure, ensure_eq, raw, table};
use axvcpu_uapi::client::{Errno, Memory};
use axvcpu_uapi::exit::AxVCpuExitReason::Interrupted;
use axvcpu_uapi::ioctl;
use axvcpu_uapi::vcpu::{Entry, EptRoot, Event, Gpr, RegisterSet, Setup};
use nix::sys::signal::{sigaction, SaFlags, SigAction, SigHandler, SigSet, Signal};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::mpsc::channel;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

pub(super) fn cases() -> Vec<Case> {
    table! {
        "kick/before-the-run" => before;
        "kick/while-running" => during;
        "kick/while-exits-follow-each-other" => during_exits;
        "kick/after-the-run-is-not-lost" => after;
        "kick/many-count-once" => many;
        "kick/storm" => storm [differs];
        "kick/signal" => signal;
        "threads/run-from-another" => another;
        "threads/second-concurrent-run-is-refused" => concurrent [abi];
        "threads/registers-are-refused-while-running" => registers [abi];
        "threads/moved-between-cpus" => moved;
        "threads/two-vcpus-at-once" => two [abi];
        "threads/counters" => counters [abi];
    }
}

/// Counts for ever.
fn spinner() -> &'static [u8] {
    code!(spinner, 64, "2: inc rax", "mov [0x20000], rax", "jmp 2b")
}

/// Waits until the spinner has got further than `last`.
fn wait_for_spinner(ram: &Memory, last: u64) -> CaseResult {
    harness::wait_until("the guest to run", || Ok(ram.read_u64(DATA as usize)? > last))
}

fn before() -> CaseResult {
    let mut m = Machine::new(Mode::Long, code!(before, 64, "out 0x80, al", "hlt"))?;
    m.vcpu.kicker().kick()?;
    m.expect(Interrupted)?;
    ensure_eq!(m.vcpu.general().rip, CODE, "RIP: nothing has run");
    m.expect_mark(0x80)?;
    m.expect_halt()
}

fn during() -> CaseResult {
    kicked(spinner(), 0)
}

/// The module may handle such exits without looking up.
fn during_exits() -> CaseResult {
    kicked(
        code!(during_exits, 64, "2: inc r8", "mov [0x20000], r8", "mov eax, 1", "xor ecx, ecx", "cpuid", "jmp 2b"),
        8,
    )
}

/// Code that counts in `register`, and at [`DATA`], ends its runs with a kick, and goes on.
fn kicked(code: &[u8], register: usize) -> CaseResult {
    let mut m = Machine::new(Mode::Long, code)?;
    let mut last = 0;
    for _ in 0..5 {
        let (kicker, ram) = (m.vcpu.kicker(), Arc::clone(&m.ram));
        let kick = thread::spawn(move || -> CaseResult {
            wait_for_spinner(&ram, last)?;
            thread::sleep(Duration::from_millis(10));
            Ok(kicker.kick()?)
        });
        m.expect(Interrupted)?;
        harness::joined(kick.join())??;
        let count = m.vcpu.general().gpr[register];
        ensure!(count > last, "the guest did not run: {count} after {last}");
        last = count;
    }
    Ok(())
}

fn after() -> CaseResult {
    let mut m = Machine::new(Mode::Long, code!(after, 64, "out 0x80, al", "out 0x81, al", "hlt"))?;
    m.expect_mark(0x80)?;
    m.vcpu.kicker().kick()?;
    thread::sleep(Duration::from_millis(5));
    m.expect(Interrupted)?;
    m.expect_mark(0x81)?;
    m.expect_halt()
}

fn many() -> CaseResult {
    let mut m = Machine::new(Mode::Long, code!(many, 64, "out 0x80, al", "hlt"))?;
    let kicker = m.vcpu.kicker();
    for _ in 0..1000 {
        kicker.clone().kick()?;
    }
    m.expect(Interrupted)?;
    m.expect_mark(0x80)?;
    m.expect_halt()
}

/// Kicks from two threads as fast as they go: every one of many runs still comes back, and guest instructions are
/// neither lost nor repeated.
fn storm() -> CaseResult {
    let code = code!(storm, 64, "2: inc rax", "out 0x80, eax", "jmp 2b");
    let mut m = Machine::new(Mode::Long, code)?;
    let stop = std::sync::atomic::AtomicBool::new(false);
    let kicker = m.vcpu.kicker();
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !stop.load(std::sync::atomic::Ordering::Relaxed) && kicker.kick().is_ok() {
                    std::hint::spin_loop();
                }
            });
        }
        let result = (|| {
            let (mut count, mut kicks) = (0, 0);
            while count < 300 {
                use axvcpu_uapi::exit::AxVCpuExitReason::IoWrite;
                match m.run()?.reason {
                    Interrupted => kicks += 1,
                    IoWrite { port: 0x80, data, .. } => {
                        count += 1;
                        ensure_eq!(data, count, "the guest's count");
                    }
                    other => return Err(Stop::Fail(format!("exit: {other:?}"))),
                }
            }
            ensure!(kicks > 0, "no kick got through");
            Ok(())
        })();
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        result
    })
}

extern "C" fn ignore(_: i32) {}

fn signal() -> CaseResult {
    let action = SigAction::new(SigHandler::Handler(ignore), SaFlags::empty(), SigSet::empty());
    // SAFETY: the handler does nothing, so it is async-signal-safe.
    let old = unsafe { sigaction(Signal::SIGUSR1, &action) }?;
    let mut m = Machine::new(Mode::Long, spinner())?;
    let (target, ram) = (nix::sys::pthread::pthread_self(), Arc::clone(&m.ram));
    let sender = thread::spawn(move || -> CaseResult {
        wait_for_spinner(&ram, 0)?;
        Ok(nix::sys::pthread::pthread_kill(target, Signal::SIGUSR1)?)
    });
    m.expect(Interrupted)?;
    harness::joined(sender.join())??;
    // SAFETY: this is the handler that was there before.
    unsafe { sigaction(Signal::SIGUSR1, &old) }?;
    Ok(())
}

fn another() -> CaseResult {
    let code = code!(another, 64, "2: inc rax", "out 0x80, al", "jmp 2b");
    let mut m = Machine::new(Mode::Long, code)?;
    for i in 1..=5 {
        // The machine moves into the thread, and back out.
        let thread = thread::spawn(move || -> Result<_, Stop> {
            m.expect_out(0x80, axvcpu_uapi::exit::AccessWidth::Byte, i)?;
            Ok(m)
        });
        m = harness::joined(thread.join())??;
    }
    Ok(())
}

/// Runs the guest in a thread and, meanwhile, `test` on the vCPU's file descriptor.
fn while_running(test: impl FnOnce(BorrowedFd<'_>) -> CaseResult) -> CaseResult {
    let mut m = Machine::new(Mode::Long, spinner())?;
    let kicker = m.vcpu.kicker();
    let fd = m.vcpu.as_fd().try_clone_to_owned()?;
    let runner = thread::spawn(move || m.expect(Interrupted).map(drop));
    harness::wait_until("the guest to run", || Ok(kicker.stats()?.state == 3))?;
    let result = test(fd.as_fd());
    kicker.kick()?;
    harness::joined(runner.join())??;
    result
}

fn concurrent() -> CaseResult {
    while_running(|vcpu| {
        for _ in 0..10 {
            ensure_eq!(raw::none(vcpu, ioctl::RUN), Err(Errno::EALREADY), "a second RUN");
        }
        Ok(())
    })
}

fn registers() -> CaseResult {
    while_running(|vcpu| {
        let mut general = axvcpu_uapi::x86::General::default();
        let set = RegisterSet { set: 1, len: 144, addr: (&raw mut general) as u64 };
        let root = EptRoot { aspace_fd: 0, reserved: 0 };
        for (what, result) in [
            ("SET_ENTRY", raw::plain(vcpu, ioctl::SET_ENTRY, Entry::default())),
            ("SET_EPT_ROOT", raw::plain(vcpu, ioctl::SET_EPT_ROOT, root)),
            ("SETUP", raw::plain(vcpu, ioctl::SETUP, Setup::default())),
            ("SET_GPR", raw::plain(vcpu, ioctl::SET_GPR, Gpr::default())),
            ("GET_REGS", raw::plain(vcpu, ioctl::GET_REGS, set)),
            ("SET_REGS", raw::plain(vcpu, ioctl::SET_REGS, set)),
            ("INJECT", raw::plain(vcpu, ioctl::INJECT, Event { kind: 2, ..Event::default() })),
            ("APIC_ACCESS", raw::plain(vcpu, ioctl::APIC_ACCESS, axvcpu_uapi::vcpu::ApicAccess::default())),
        ] {
            ensure_eq!(result, Err(Errno::EALREADY), "{what} while running");
        }
        Ok(())
    })
}

/// The thread changes its CPU between runs, and, by another thread's doing, in the middle of them.
fn moved() -> CaseResult {
    let allowed = Allowed::several()?;
    let cpus = allowed.cpus.clone();
    let code = code!(
        moved,
        64,
        "mov rbx, 0x1122334455667788",
        "movq xmm5, rbx",
        "2: mov ecx, 100000",
        "3: dec ecx",
        "jnz 3b",
        "movq rdx, xmm5",
        "cmp rdx, rbx",
        "jne 4f",
        "inc rax",
        "out 0x80, eax",
        "jmp 2b",
        "4: out 0x81, al",
        "hlt",
    );
    let mut m = Machine::new(Mode::Long, code)?;
    let tid = nix::unistd::gettid();
    let (stop, stopped) = channel::<()>();
    let mover = thread::spawn(move || -> CaseResult {
        for cpu in cpus.iter().cycle() {
            pin(tid, *cpu)?;
            if stopped.recv_timeout(Duration::from_millis(3)) != Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                break;
            }
        }
        Ok(())
    });
    let result = (1..=200).try_for_each(|i| m.expect_out(0x80, axvcpu_uapi::exit::AccessWidth::Dword, i).map(drop));
    drop(stop);
    harness::joined(mover.join())??;
    drop(allowed);
    result?;
    if harness::hypervisor() == Hypervisor::Axvcpu {
        let migrations = m.vcpu.stats()?.migrations;
        ensure!(migrations > 2, "the vCPU moved {migrations} times");
    }
    Ok(())
}

/// Two vCPUs of one VM pass a counter to and fro through their memory.
fn two() -> CaseResult {
    let code = code!(
        two,
        64,
        "mov esi, 200",
        "2: mov eax, [0x20000]",
        "and eax, 1",
        "cmp eax, ebx",
        "jne 4f",
        "lock inc dword ptr [0x20000]",
        "dec esi",
        "jnz 2b",
        "hlt",
        "4: pause",
        "jmp 2b",
    );
    let mut m = Machine::new(Mode::Long, code)?;
    let mut second = m.add_vcpu(1)?;
    let mut general: axvcpu_uapi::x86::General = m.vcpu.get()?;
    general.gpr[3] = 1;
    second.set(&general)?;
    let thread = thread::spawn(move || -> Result<_, Stop> { Ok(second.run()?.reason) });
    m.expect_halt()?;
    ensure_eq!(harness::joined(thread.join())??, axvcpu_uapi::exit::AxVCpuExitReason::Halt, "exit of the second vCPU");
    ensure_eq!(m.read_u64(crate::machine::DATA)? as u32, 400, "the counter");
    Ok(())
}

fn counters() -> CaseResult {
    let code = code!(counters, 64, "xor eax, eax", "cpuid", "xor eax, eax", "cpuid", "out 0x80, al", "hlt");
    let mut m = Machine::new(Mode::Long, code)?;
    let fresh = m.vcpu.stats()?;
    ensure_eq!((fresh.runs, fresh.entries, fresh.state), (0, 0, 1), "runs, entries and state of a fresh vCPU");
    ensure_eq!(fresh.last_cpu, u32::MAX, "CPU of a fresh vCPU");
    m.expect_mark(0x80)?;
    m.expect_halt()?;
    let stats = m.vcpu.stats()?;
    use axvcpu_uapi::vcpu::ExitKind;
    let exits = |kind: ExitKind| stats.exits[kind as usize];
    ensure_eq!((stats.runs, stats.user_exits), (2, 2), "runs and exits that the program saw");
    ensure_eq!((exits(ExitKind::PortIo), exits(ExitKind::Halt)), (1, 1), "port I/O and HLT exits");
    ensure_eq!(exits(ExitKind::Cpuid), 2, "CPUID exits");
    let sum: u64 = stats.exits.iter().sum();
    ensure!(stats.entries >= sum && sum >= 4, "{} entries, {sum} exits", stats.entries);
    ensure!(stats.windows >= 2 && stats.run_ns > 0, "{} windows, {} ns", stats.windows, stats.run_ns);
    ensure!(stats.last_cpu < 4096, "last CPU {}", stats.last_cpu);
    Ok(())
}
