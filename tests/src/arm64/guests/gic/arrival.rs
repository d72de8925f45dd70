// SPDX-License-Identifier: MIT OR Apache-2.0
//! How interrupts arrive: at a guest that runs or sleeps, of a level or an edge, by message or eventfd, and wherever the vCPU is.

use super::{clear, expect, machine, ready, set, sleeping, told_code, EDGE_40, END, IPRIORITYR10, READY};
use crate::eventfd::eventfd;
use crate::guests::interrupts::{join, nothing_comes, when_asleep};
use crate::harness::{Case, CaseResult};
use crate::machine::GICD;
use crate::pin::{pin, Allowed, SELF};
use crate::{ensure, ensure_eq, table};
use axvcpu_uapi::arm64::GIC_SET_SPI;
use axvcpu_uapi::client::{Errno, Error};
use std::os::fd::AsFd;
use std::thread;
use std::time::Duration;

/// The cases.
pub(super) fn cases() -> Vec<Case> {
    table! {
        "gic/spi-interrupts-a-running-guest" => running;
        "gic/spi-wakes-a-waiting-guest" => waiting;
        "gic/masked-interrupt-ends-wfi" => masked_wfi;
        "gic/level-stays-until-it-is-cleared" => level;
        "gic/edge-comes-once" => edge;
        "gic/eventfd" => eventfd_edge;
        "gic/eventfd-resampled" => eventfd_level;
        "gic/moves-with-the-vcpu" => moves;
    }
}

fn running() -> CaseResult {
    let mut m = ready(&[])?;
    for round in 0..20 {
        let vm = m.vm.clone();
        let thread = thread::spawn(move || {
            thread::sleep(Duration::from_millis(3));
            vm.signal_msi(GICD + GIC_SET_SPI, 40)
        });
        expect(&mut m, 40, &format!("round {round}"))?;
        join(thread)??;
        clear(&m, 40)?;
        expect(&mut m, END, "its end")?;
    }
    Ok(())
}

fn waiting() -> CaseResult {
    let mut m = machine(sleeping(), &[])?;
    for _ in 0..5 {
        let vm = m.vm.clone();
        let thread = when_asleep(m.vcpu.kicker(), move || Ok(vm.signal_msi(GICD + GIC_SET_SPI, 40)?));
        expect(&mut m, 40, "the interrupt first")?;
        join(thread)??;
        clear(&m, 40)?;
        expect(&mut m, END, "its end")?;
        expect(&mut m, READY, "then WFI ends")?;
    }
    Ok(())
}

fn masked_wfi() -> CaseResult {
    let code = told_code!(masked_wfi, "wfi", "mrs x1, icc_hppir1_el1", "mrs x2, isr_el1", "mov x0, #9", "hvc #0");
    let mut m = machine(code, &[])?;
    let vm = m.vm.clone();
    let thread = when_asleep(m.vcpu.kicker(), move || Ok(vm.signal_msi(GICD + GIC_SET_SPI, 40)?));
    let [nr, highest, status, ..] = m.expect_call()?;
    join(thread)??;
    ensure_eq!((nr, highest, status), (9, 40, 1 << 7), "pending, but not taken");
    Ok(())
}

fn level() -> CaseResult {
    let mut m = ready(&[])?;
    set(&m, 40)?;
    for round in 0..5 {
        expect(&mut m, 40, &format!("round {round}"))?;
        expect(&mut m, END, "its end, with the line up")?;
    }
    clear(&m, 40)?;
    nothing_comes(&mut m)
}

fn edge() -> CaseResult {
    let mut m = ready(&[EDGE_40])?;
    set(&m, 40)?;
    set(&m, 40)?;
    expect(&mut m, 40, "both as one")?;
    // While it is active, another one waits.
    set(&m, 40)?;
    expect(&mut m, END, "the first one's end")?;
    expect(&mut m, 40, "the next")?;
    expect(&mut m, END, "its end")?;
    nothing_comes(&mut m)
}

fn eventfd_edge() -> CaseResult {
    let mut m = machine(sleeping(), &[EDGE_40])?;
    let event = eventfd()?;
    let bad = m.vm.attach_interrupt(&event, GICD, 40, None);
    ensure_eq!(bad, Err(Error::AttachInterrupt(Errno::EINVAL)), "no message");
    m.vm.attach_interrupt(&event, GICD + GIC_SET_SPI, 40, None)?;
    for _ in 0..5 {
        let signal = event.as_fd().try_clone_to_owned()?;
        let thread = when_asleep(m.vcpu.kicker(), move || {
            nix::unistd::write(signal, &1u64.to_ne_bytes())?;
            Ok(())
        });
        expect(&mut m, 40, "the eventfd's interrupt")?;
        join(thread)??;
        expect(&mut m, END, "its end")?;
        expect(&mut m, READY, "then WFI ends")?;
    }
    Ok(())
}

fn eventfd_level() -> CaseResult {
    let mut m = ready(&[])?;
    let (event, resample) = (eventfd()?, eventfd()?);
    m.vm.attach_interrupt(&event, GICD + GIC_SET_SPI, 40, Some(resample.as_fd()))?;
    event.write(1)?;
    for round in 0..4 {
        expect(&mut m, 40, &format!("round {round}"))?;
        ensure_eq!(resample.read().err(), Some(nix::errno::Errno::EAGAIN), "not before its end");
        expect(&mut m, END, "its end")?;
        // The end is told with the maintenance interrupt, at the latest.
        nothing_comes(&mut m)?;
        ensure_eq!(resample.read()?, 1, "resampled");
        event.write(1)?;
    }
    Ok(())
}

fn moves() -> CaseResult {
    // An active interrupt goes with the vCPU, and so does the one that waits, 41 of lower priority.
    let allowed = Allowed::several()?;
    let mut m = ready(&[(IPRIORITYR10, 0x8000)])?;
    set(&m, 41)?;
    for cpu in allowed.cpus.iter().cycle().take(40) {
        set(&m, 40)?;
        expect(&mut m, 40, "acknowledged on one CPU")?;
        pin(SELF, *cpu)?;
        clear(&m, 40)?;
        expect(&mut m, END, "ended on another")?;
        expect(&mut m, 41, "the other one")?;
        expect(&mut m, END, "and its end")?;
    }
    ensure!(m.vcpu.stats()?.migrations >= 10, "it has not moved");
    Ok(())
}
