// SPDX-License-Identifier: MIT OR Apache-2.0
//! Signals that interrupt the guest: an edge each, or a level that is sampled again when the guest has handled it.

use super::{enabling_code, machine};
use crate::eventfd::{count, eventfd};
use crate::guests::x2apic::MSI;
use crate::harness::{self, Case, CaseResult, Stop};
use crate::{ensure, ensure_eq, table};
use axvcpu_uapi::client::{Errno, Error};
use axvcpu_uapi::exit::AxVCpuExitReason;
use axvcpu_uapi::x86::LocalApic;
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
        "eventfds/closed-while-attached" => closed [abi], in 30;
        "eventfds/attached-and-detached-under-load" => storm [abi];
    }
}

/// Data of a message: level-triggered, asserted.
const LEVEL: u32 = 0xc000;

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
