// SPDX-License-Identifier: MIT OR Apache-2.0
//! Eventfds that interrupt the guest, and eventfds that the guest signals, in the kernel or through the client library.

use super::x2apic::{x2apic_code, MSI};
use crate::harness::{self, Case, CaseResult, Stop};
use crate::machine::{Machine, Mode, CODE, HOLE};
use crate::{code, ensure, ensure_eq, table};
use axvcpu_uapi::client::{Apic, Errno, Error, IoAddress, IoPattern};
use axvcpu_uapi::exit::AccessWidth::{Byte, Dword, Word};
use axvcpu_uapi::exit::{AccessFlags, AxVCpuExitReason};
use axvcpu_uapi::vcpu::ExitKind;
use axvcpu_uapi::x86::LocalApic;
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

pub(super) fn cases() -> Vec<Case> {
    table! {
        "eventfds/signal-interrupts-a-running-guest" => running [abi];
        "eventfds/signal-wakes-a-halted-guest" => halted [abi];
        "eventfds/signal-from-before-counts" => before [abi];
        "eventfds/detached-signals-do-nothing" => detached [abi];
        "eventfds/level-is-sampled-again-at-the-end" => level [abi];
        "eventfds/closed-while-attached" => closed [abi];
        "eventfds/attached-and-detached-under-load" => storm [abi];
        "eventfds/port-output-by-width-and-value" => ports [abi];
        "eventfds/stores-to-an-address" => stores [abi];
        "eventfds/other-instructions-are-exits" => other_instructions [abi];
        "eventfds/widths-and-values-of-stores-by-the-library" => library [abi];
        "eventfds/guest-interrupts-itself" => round_trip [abi];
        "eventfds/table-replaced-while-the-guest-uses-it" => replaced [abi];
    }
}

/// Data of a message: level-triggered, asserted.
const LEVEL: u32 = 0xc000;

fn eventfd() -> Result<EventFd, Stop> {
    Ok(EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?)
}

/// Takes the count of an eventfd: 0 if it was not signalled.
fn count(event: &EventFd) -> Result<u64, Stop> {
    match event.read() {
        Ok(count) => Ok(count),
        Err(Errno::EAGAIN) => Ok(0),
        Err(errno) => Err(errno.into()),
    }
}

/// A machine whose APIC is enabled as soon as the code, an `enabling_code`, has run; vector 0x40 goes to CODE + 0x100.
fn machine(code: &[u8]) -> Result<Machine, Stop> {
    let m = Machine::with(Mode::Long, code, Apic::InKernel)?;
    m.vector(0x40, CODE + 0x100)?;
    Ok(m)
}

/// Code that enables the APIC itself, in x2APIC mode.
macro_rules! enabling_code {
    ($name:ident, $($line:literal),+ $(,)?) => {
        x2apic_code!($name, "write 0x80f, 0x1ff", $($line),+)
    };
}

/// Spins with interrupts on; the handler announces itself, ends the interrupt and announces that.
fn spinner() -> &'static [u8] {
    enabling_code!(spinner, "sti", "out 0x80, al", "2: jmp 2b", "watched 0x100, 0x81, 0x82",)
}

fn running() -> CaseResult {
    let mut m = machine(spinner())?;
    let event = eventfd()?;
    m.vm.attach_interrupt(&event, MSI, 0x40, None)?;
    let again = m.vm.attach_interrupt(&event, MSI, 0x41, None);
    ensure_eq!(again, Err(Error::AttachInterrupt(Errno::EEXIST)), "the same eventfd once more");
    m.expect_mark(0x80)?;
    let signaller = {
        let event = event.as_fd().try_clone_to_owned()?;
        thread::spawn(move || {
            thread::sleep(Duration::from_millis(30));
            nix::unistd::write(event, &1u64.to_ne_bytes())
        })
    };
    m.expect_mark(0x81)?;
    harness::joined(signaller.join())??;
    m.expect_mark(0x82)?;
    ensure_eq!(count(&event)?, 0, "count of the eventfd, which the kernel takes");
    Ok(())
}

fn halted() -> CaseResult {
    let code = enabling_code!(halted, "sti", "hlt", "out 0x80, al", "hlt", ".org 77b + 0x100", "out 0x81, al", "iretq");
    let mut m = machine(code)?;
    let event = eventfd()?;
    m.vm.attach_interrupt(&event, MSI, 0x40, None)?;
    let kicker = m.vcpu.kicker();
    let signaller = thread::spawn(move || -> CaseResult {
        // State 4: blocked.
        harness::wait_until("the vCPU to sleep", || Ok(kicker.stats()?.state == 4))?;
        event.write(1)?;
        Ok(())
    });
    m.expect_marks(&[0x81, 0x80])?;
    harness::joined(signaller.join())?
}

/// A signal from before attaching interrupts, once; also one from between detaching and attaching.
fn before() -> CaseResult {
    let mut m = machine(spinner())?;
    let event = eventfd()?;
    m.expect_mark(0x80)?;
    for _ in 0..2 {
        event.write(5)?;
        m.vm.attach_interrupt(&event, MSI, 0x40, None)?;
        ensure_eq!(count(&event)?, 0, "count after attaching");
        m.expect_marks(&[0x81, 0x82])?;
        m.vm.detach_interrupt(&event)?;
    }
    Ok(())
}

fn detached() -> CaseResult {
    let code = enabling_code!(
        detached,
        "sti",
        "out 0x80, al",
        "nop",
        "out 0x83, al",
        "hlt",
        ".org 77b + 0x100",
        "out 0x81, al",
        "hlt"
    );
    let mut m = machine(code)?;
    let event = eventfd()?;
    m.vm.attach_interrupt(&event, MSI, 0x40, None)?;
    m.vm.detach_interrupt(&event)?;
    ensure_eq!(m.vm.detach_interrupt(&event), Err(Error::DetachInterrupt(Errno::ENOENT)), "detaching again");
    m.expect_mark(0x80)?;
    event.write(3)?;
    m.expect_mark(0x83)?;
    ensure_eq!(count(&event)?, 3, "count, which nobody has taken");
    Ok(())
}

/// Further signals while a level-triggered interrupt is handled do nothing; its end signals the second eventfd, not the
/// program by an exit; and then a device signals again, or not.
fn level() -> CaseResult {
    let mut m = machine(spinner())?;
    let (event, resample) = (eventfd()?, eventfd()?);
    let edge = m.vm.attach_interrupt(&event, MSI, 0x40, Some(resample.as_fd()));
    ensure_eq!(edge, Err(Error::AttachInterrupt(Errno::EINVAL)), "resampling of an edge");
    m.vm.attach_interrupt(&event, MSI, LEVEL | 0x40, Some(resample.as_fd()))?;
    // An APIC that is not enabled takes nothing, so the signal does not count as being handled. (The boot processor's is enabled
    // at the start. A run, even one that is kicked at once, tells others that it no longer is.)
    m.vcpu.apic_access(0xf0, Some(0xff))?;
    m.vcpu.kicker().kick()?;
    m.expect(AxVCpuExitReason::Interrupted)?;
    event.write(1)?;
    m.expect_mark(0x80)?;
    for round in 0..3 {
        event.write(1)?;
        m.expect_mark(0x81)?;
        event.write(1)?;
        event.write(1)?;
        ensure_eq!(count(&resample)?, 0, "signals before the end, round {round}");
        m.expect_mark(0x82)?;
        ensure_eq!(count(&resample)?, 1, "signals at the end, round {round}");
        // Word 2 of IRR, of which vector 0x40 is bit 0.
        let waiting = m.vcpu.get::<LocalApic>()?.regs[0x22];
        ensure_eq!(waiting, 0, "interrupts by signals while one was handled, round {round}");
    }
    // What is sent by another way ends as an exit.
    m.vm.signal_msi(MSI, LEVEL | 0x40)?;
    m.expect_mark(0x81)?;
    m.expect(AxVCpuExitReason::InterruptEnd { vector: Some(0x40) })?;
    m.expect_mark(0x82)?;
    // And after detaching, the interrupt that is being handled too.
    event.write(1)?;
    m.expect_mark(0x81)?;
    m.vm.detach_interrupt(&event)?;
    m.expect(AxVCpuExitReason::InterruptEnd { vector: Some(0x40) })?;
    m.expect_mark(0x82)?;
    ensure_eq!(count(&resample)?, 0, "signals after detaching");
    Ok(())
}

/// Eventfds closed while they are attached give their places back.
fn closed() -> CaseResult {
    let m = machine(spinner())?;
    let max = m.system.info()?.max_eventfds as usize;
    ensure!(max >= 64, "{max} eventfds per VM");
    for round in 0..3 {
        let mut events = Vec::new();
        for _ in 0..max {
            let event = eventfd()?;
            m.vm.attach_interrupt(&event, MSI, LEVEL | 0x40, Some(event.as_fd()))?;
            events.push(event);
        }
        let one_more = m.vm.attach_interrupt(eventfd()?, MSI, 0x40, None);
        ensure_eq!(one_more, Err(Error::AttachInterrupt(Errno::ENOSPC)), "one more in round {round}");
    }
    Ok(())
}

/// Eventfds come and go, signalled by one thread and closed by another, while the guest takes their interrupts.
fn storm() -> CaseResult {
    let mut m = machine(spinner())?;
    let vm = m.vm.clone();
    let stop = AtomicBool::new(false);
    m.expect_mark(0x80)?;
    thread::scope(|scope| -> CaseResult {
        let changer = scope.spawn(|| -> CaseResult {
            let (mut round, resample) = (0, eventfd()?);
            while !stop.load(Ordering::Relaxed) {
                round += 1;
                let event = eventfd()?;
                let level = round % 2 == 0;
                let data = if level { LEVEL | 0x40 } else { 0x40 };
                vm.attach_interrupt(&event, MSI, data, level.then(|| resample.as_fd()))?;
                let other = event.as_fd().try_clone_to_owned()?;
                let signaller = scope
                    .spawn(move || (0..20).try_for_each(|_| nix::unistd::write(&other, &1u64.to_ne_bytes()).map(drop)));
                thread::yield_now();
                if round % 3 != 0 {
                    vm.detach_interrupt(&event)?;
                }
                drop(event);
                harness::joined(signaller.join())??;
            }
            Ok(())
        });
        let mut taken = 0;
        let result = loop {
            match m.run() {
                Ok(exit) => match exit.reason {
                    AxVCpuExitReason::IoWrite { port: 0x81, .. } => taken += 1,
                    AxVCpuExitReason::IoWrite { port: 0x82, .. } if taken >= 200 => break Ok(()),
                    AxVCpuExitReason::IoWrite { port: 0x82, .. } | AxVCpuExitReason::InterruptEnd { .. } => {}
                    other => break Err(Stop::Fail(format!("exit {other:x?}"))),
                },
                Err(stop) => break Err(stop),
            }
        };
        stop.store(true, Ordering::Relaxed);
        harness::joined(changer.join())??;
        result
    })
}

/// Output to one port: of any width; of a width; of a width and a value. What matches none is an exit.
fn ports() -> CaseResult {
    let code = code!(
        ports,
        64,
        "mov eax, 0x11223344",
        "mov edx, 0x510",
        "out dx, al",
        "out dx, ax",
        "out dx, eax",
        "mov edx, 0x520",
        "out dx, ax",
        "out dx, al",
        "mov edx, 0x530",
        "out dx, ax",
        "inc eax",
        "out dx, ax",
        "inc eax",
        "out dx, ax",
        "hlt",
    );
    let mut m = Machine::new(Mode::Long, code)?;
    let events = [eventfd()?, eventfd()?, eventfd()?, eventfd()?];
    let patterns = [
        IoPattern::any(IoAddress::Port(0x510)),
        IoPattern::of_width(IoAddress::Port(0x520), Word),
        IoPattern::of_value(IoAddress::Port(0x530), Word, 0x3344),
        IoPattern::of_value(IoAddress::Port(0x530), Word, 0x3346),
    ];
    for (event, pattern) in events.iter().zip(patterns) {
        ensure!(m.vm.attach_io(event, pattern)?, "the kernel leaves {pattern:?} to the library");
    }
    m.expect_out(0x520, Byte, 0x44)?;
    m.expect_out(0x530, Word, 0x3345)?;
    m.expect_halt()?;
    for (event, expected) in events.iter().zip([3, 1, 1, 1]) {
        ensure_eq!(count(event)?, expected, "count of {event:?}");
    }
    for pattern in patterns {
        m.vm.detach_io(pattern)?;
        ensure_eq!(m.vm.detach_io(pattern), Err(Error::DetachIo(Errno::ENOENT)), "detaching {pattern:?} again");
    }
    m.modify(|general| general.rip = CODE)?;
    m.expect_out(0x510, Byte, 0x44)?;
    Ok(())
}

/// Every form of MOV to an address with an eventfd is done in the kernel and goes on behind it.
fn stores() -> CaseResult {
    let code = code!(
        stores,
        64,
        "mov ebx, 0xa0010",
        "mov r12d, 0xa0010",
        "mov r13d, 0xa0010",
        "mov ecx, 2",
        "mov [rbx], al",
        "mov [rbx], ax",
        "mov [rbx], eax",
        "mov [rbx], rax",
        "mov byte ptr [rbx], 1",
        "mov word ptr [rbx], 0x1234",
        "mov dword ptr [rbx], 0x12345678",
        "mov qword ptr [rbx], 0x12345678",
        "mov [r12], eax",
        "mov [r13], eax",
        "mov [rbx + 8 * rcx - 16], r9d",
        "mov dword ptr [0xa0010], 7",
        "out 0x80, al",
        "mov [rbx + 4], eax",
        "mov eax, [rbx]",
        "mov [rbx], eax",
        "hlt",
    );
    let mut m = Machine::new(Mode::Long, code)?;
    let event = eventfd()?;
    let pattern = IoPattern::any(IoAddress::Memory(HOLE + 0x10));
    ensure!(m.vm.attach_io(&event, pattern)?, "the kernel leaves an address to the library");
    let before = m.vcpu.stats()?;
    m.expect_mark(0x80)?;
    ensure_eq!(count(&event)?, 12, "stores");
    let after = m.vcpu.stats()?;
    let mmio = ExitKind::Mmio as usize;
    ensure_eq!(after.exits[mmio] - before.exits[mmio], 12, "exits counted as MMIO");
    m.expect_fault(HOLE + 0x14, AccessFlags::WRITE)?;
    m.step_over(3, |_| ());
    m.expect_fault(HOLE + 0x10, AccessFlags::READ)?;
    m.step_over(2, |_| ());
    m.vm.detach_io(pattern)?;
    m.expect_fault(HOLE + 0x10, AccessFlags::WRITE)?;
    ensure_eq!(count(&event)?, 0, "signals by other accesses, and after detaching");
    Ok(())
}

/// Instructions that do more than store are the program's to emulate.
fn other_instructions() -> CaseResult {
    let code = code!(
        other_instructions,
        64,
        "mov ebx, 0xa0000",
        "mov edi, ebx",
        "stosd",
        "pop qword ptr [rbx]",
        "xchg [rbx], eax",
        "hlt",
    );
    let mut m = Machine::new(Mode::Long, code)?;
    let event = eventfd()?;
    m.vm.attach_io(&event, IoPattern::any(IoAddress::Memory(HOLE)))?;
    for length in [1, 2, 2] {
        let exit = m.run()?;
        ensure!(
            matches!(exit.reason, AxVCpuExitReason::NestedPageFault { addr, .. } if addr.as_u64() == HOLE),
            "exit {:x?}",
            exit.reason
        );
        m.step_over(length, |_| ());
    }
    m.expect_halt()?;
    ensure_eq!(count(&event)?, 0, "signals");
    ensure!(m.vm.notify_write(IoAddress::Memory(HOLE), Dword, 0), "the library does not know the address");
    ensure_eq!(count(&event)?, 1, "signals by the library");
    Ok(())
}

/// Where width or value matter the write is an exit, and the library finds the eventfd.
fn library() -> CaseResult {
    let code = code!(library, 64, "mov ebx, 0xa0000", "mov dword ptr [rbx], 7", "out 0x80, al", "hlt");
    let mut m = Machine::new(Mode::Long, code)?;
    let (seven, eight) = (eventfd()?, eventfd()?);
    let at = IoAddress::Memory(HOLE);
    ensure!(!m.vm.attach_io(&seven, IoPattern::of_value(at, Dword, 7))?, "the kernel does not decode values");
    ensure!(!m.vm.attach_io(&eight, IoPattern::of_value(at, Dword, 8))?, "the kernel does not decode values");
    let any = m.vm.attach_io(&eight, IoPattern::any(at));
    ensure_eq!(any, Err(Error::AttachIo(Errno::EEXIST)), "a pattern that overlaps");
    m.expect_fault(HOLE, AccessFlags::WRITE)?;
    ensure!(m.vm.notify_write(at, Dword, 7), "no eventfd found");
    m.step_over(6, |_| ());
    m.expect_mark(0x80)?;
    ensure!(!m.vm.notify_write(at, Word, 7), "an eventfd found for another width");
    ensure_eq!([count(&seven)?, count(&eight)?], [1, 0], "signals");
    m.vm.detach_io(IoPattern::of_value(at, Dword, 7))?;
    ensure!(!m.vm.notify_write(at, Dword, 7), "an eventfd found that was detached");
    Ok(())
}

/// One eventfd both ways: the guest's store interrupts the guest, and no program is involved.
fn round_trip() -> CaseResult {
    let code = enabling_code!(
        round_trip,
        "sti",
        "mov ebx, 0xa0000",
        "mov r8d, 1000",
        "2: mov r9, r10",
        "mov dword ptr [rbx], eax",
        "3: cmp r9, r10",
        "je 3b",
        "dec r8d",
        "jnz 2b",
        "out 0x80, al",
        "hlt",
        ".org 77b + 0x100",
        "inc r10",
        "eoi",
        "iretq",
    );
    let mut m = machine(code)?;
    let event = eventfd()?;
    m.vm.attach_interrupt(&event, MSI, 0x40, None)?;
    m.vm.attach_io(&event, IoPattern::any(IoAddress::Memory(HOLE)))?;
    m.expect_mark(0x80)?;
    ensure_eq!(m.vcpu.general().gpr[10], 1000, "interrupts");
    Ok(())
}

/// Attaching elsewhere does not disturb a guest that uses one.
fn replaced() -> CaseResult {
    let code = code!(
        replaced,
        64,
        "mov ebx, 0xa0000",
        "2: mov ecx, 2000",
        "3: mov [rbx], eax",
        "out 0x85, al",
        "dec ecx",
        "jnz 3b",
        "out 0x80, al",
        "jmp 2b"
    );
    let mut m = Machine::new(Mode::Long, code)?;
    let (stores, outputs) = (eventfd()?, eventfd()?);
    m.vm.attach_io(&stores, IoPattern::any(IoAddress::Memory(HOLE)))?;
    m.vm.attach_io(&outputs, IoPattern::any(IoAddress::Port(0x85)))?;
    let vm = m.vm.clone();
    let (stop, changes) = (AtomicBool::new(false), std::sync::atomic::AtomicU64::new(0));
    thread::scope(|scope| -> CaseResult {
        let changer = scope.spawn(|| -> CaseResult {
            let event = eventfd()?;
            while !stop.load(Ordering::Relaxed) {
                for address in [IoAddress::Memory(HOLE - 8), IoAddress::Memory(HOLE + 8), IoAddress::Port(0x84)] {
                    vm.attach_io(&event, IoPattern::any(address))?;
                }
                for address in [IoAddress::Memory(HOLE - 8), IoAddress::Memory(HOLE + 8), IoAddress::Port(0x84)] {
                    vm.detach_io(IoPattern::any(address))?;
                }
                changes.fetch_add(6, Ordering::Relaxed);
            }
            Ok(())
        });
        let mut rounds = 0;
        let result: CaseResult = (|| {
            // Until the two have met.
            while rounds < 5 || changes.load(Ordering::Relaxed) < 60 {
                m.expect_mark(0x80)?;
                rounds += 1;
            }
            Ok(())
        })();
        stop.store(true, Ordering::Relaxed);
        harness::joined(changer.join())??;
        result?;
        ensure_eq!([count(&stores)?, count(&outputs)?], [2000 * rounds; 2], "stores and outputs");
        Ok(())
    })
}
