// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the cases with an interrupt controller share: machines whose interrupts have a handler, and waiting for what a vCPU does.

use crate::harness::{self, CaseResult, Stop};
use crate::machine::{Machine, VECTORS};
use axvcpu_uapi::client::Kicker;
use axvcpu_uapi::exit::AxVCpuExitReason as Exit;
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// The vector of synchronous exceptions from EL1 with SP_EL1.
pub(super) const SYNCHRONOUS: u64 = VECTORS + 0x200;
/// The vector of IRQs from EL1 with SP_EL1.
pub(super) const IRQ: u64 = VECTORS + 0x280;
/// The vector of FIQs from there.
pub(super) const FIQ: u64 = VECTORS + 0x300;

/// A machine with a GIC that is about to run `code`, whose IRQs `handler` takes.
pub(super) fn machine(code: &[u8], handler: &[u8]) -> Result<Machine, Stop> {
    let machine = Machine::with_gic(code)?;
    machine.write(IRQ, handler)?;
    Ok(machine)
}

/// The guest, which spins or sleeps, is not interrupted.
pub(super) fn nothing_comes(m: &mut Machine) -> CaseResult {
    let kicker = m.vcpu.kicker();
    let thread = thread::spawn(move || {
        thread::sleep(Duration::from_millis(30));
        kicker.kick()
    });
    m.expect(Exit::Interrupted)?;
    Ok(join(thread)??)
}

/// Waits until a vCPU sleeps in the kernel, and then does something.
pub(super) fn when_asleep(
    kicker: Kicker,
    then: impl FnOnce() -> CaseResult + Send + 'static,
) -> JoinHandle<CaseResult> {
    thread::spawn(move || {
        // State 4: blocked.
        harness::wait_until("the vCPU to sleep", || Ok(kicker.stats()?.state == 4))?;
        then()
    })
}

/// What a thread came to.
pub(super) fn join<T>(thread: JoinHandle<T>) -> Result<T, Stop> {
    harness::joined(thread.join())
}
