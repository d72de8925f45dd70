// SPDX-License-Identifier: MIT OR Apache-2.0
//! A vCPU's thread on AArch64: PSCI, and accesses that the hardware has not decoded.

use std::sync::Arc;

use axvcpu_uapi::addr::GuestPhysAddr;
use axvcpu_uapi::arm64::{General, System};
use axvcpu_uapi::client::Exit;
use axvcpu_uapi::exit::{AccessFlags, AxVCpuExitReason};

use super::emulate::{self, Fault, Memory};
use super::hypervisor::Arm64Vcpu;
use super::layout::INTERRUPT_CONTROLLER;
use super::machine::Machine;
use super::power::{self, answer, Power, Turn, AFFINITY_INFO};
use super::{boot, state};
use crate::control::Stop;
use crate::exit::ExitCode;
use crate::hypervisor::{Kick, Result};
use crate::stats::UserExit;
use crate::vcpu::Runner;

/// How often one after the other an access that is not decoded may be gone when it is looked at.
const PATIENCE: u32 = 1000;

/// What a vCPU's thread keeps.
#[derive(Default)]
pub struct Local {
    started: Option<Started>,
    /// Accesses that were gone when they were looked at, since the last that was not.
    gone: u32,
}

/// What it takes to start a vCPU, where the hypervisor leaves that to us.
struct Started {
    power: Arc<Power>,
    /// The system registers of a CPU that has just been reset.
    reset: System,
}

impl Local {
    /// For the threads of `vcpus`, which have just been set up and which we start.
    ///
    /// # Errors
    /// What the hypervisor reports.
    pub fn for_all<V: Arm64Vcpu>(vcpus: &[V]) -> Result<Vec<Self>> {
        let power = Power::new(vcpus.len());
        let local =
            |vcpu: &V| Ok(Self { started: Some(Started { power: Arc::clone(&power), reset: vcpu.get()? }), gone: 0 });
        vcpus.iter().map(local).collect()
    }

    /// A handle that makes the vCPU return that `kick` makes return while it runs.
    #[must_use]
    pub fn kicker(&self, kick: Box<dyn Kick>) -> Box<dyn Kick> {
        match &self.started {
            Some(started) => Box::new(power::Kicker { vcpu: kick, power: Arc::clone(&started.power) }),
            None => kick,
        }
    }
}

impl<V: Arm64Vcpu> Runner<V> {
    /// Before the guest runs on. Says whether it may.
    pub(crate) fn before_entry(&mut self) -> std::result::Result<bool, Stop> {
        let Some(started) = &self.local.started else { return Ok(true) };
        match started.power.wait(self.id as usize, || self.machine.control.is_stopping()) {
            Turn::GoesOn => Ok(true),
            Turn::Stops => Ok(false),
            Turn::Starts { entry, arg } => {
                self.vcpu.set(&started.reset)?;
                self.vcpu.set(&boot::general(entry, arg))?;
                Ok(true)
            }
        }
    }

    /// After it has left, before the exit is handled.
    pub(crate) fn after_exit(&mut self, _exit: &Exit) -> std::result::Result<(), Stop> {
        Ok(())
    }

    /// Handles an exit that only AArch64 has.
    pub(crate) fn handle_own(&mut self, exit: &Exit) -> std::result::Result<(), Stop> {
        match (exit.reason, &self.local.started) {
            (AxVCpuExitReason::CpuUp { target_cpu, entry_point, arg }, Some(started)) => {
                self.count(UserExit::Power);
                let at = entry_point.as_u64();
                let possible = at % 4 == 0 && self.machine.ram.contains(&(at..at.saturating_add(4)));
                let answer = started.power.on(target_cpu, entry_point, arg, possible);
                tracing::debug!(target_cpu, %entry_point, answer, "CPU_ON");
                self.vcpu.reply(answer as u64);
            }
            (AxVCpuExitReason::CpuDown { .. }, Some(started)) => {
                self.count(UserExit::Power);
                if started.power.off(self.id as usize) {
                    return Err(Stop::Halted);
                }
            }
            (AxVCpuExitReason::Hypercall { nr, args: [target, level, ..] }, Some(started))
                if AFFINITY_INFO.contains(&nr) =>
            {
                self.count(UserExit::Power);
                self.vcpu.reply(started.power.info(target, level) as u64);
            }
            (AxVCpuExitReason::Hypercall { nr, args }, _) => {
                self.count(UserExit::Hypercall);
                tracing::debug!("unknown hypercall {nr:#x} {args:x?}");
                self.vcpu.reply(answer::NOT_SUPPORTED as u64);
            }
            (AxVCpuExitReason::SysRegRead { addr, reg }, _) => {
                self.count(UserExit::MsrRead);
                tracing::debug!("unknown system register {addr:#x} read into X{reg}: undefined");
                self.vcpu.reply_fault();
            }
            (AxVCpuExitReason::SysRegWrite { addr, value }, _) => {
                self.count(UserExit::MsrWrite);
                tracing::debug!("unknown system register {addr:#x} written with {value:#x}: undefined");
                self.vcpu.reply_fault();
            }
            // It waits for an interrupt, and may do so by running on.
            (AxVCpuExitReason::Halt, _) => self.count(UserExit::Halt),
            (AxVCpuExitReason::SystemReset, _) => return Err(Stop::Reset("by PSCI")),
            (AxVCpuExitReason::NestedPageFault { addr, access_flags }, _) => self.undecoded(addr, access_flags)?,
            (ref other, _) => return Err(self.unhandled(other)),
        }
        Ok(())
    }

    /// An access to what is no memory, of which the hardware tells no more than the address.
    fn undecoded(&mut self, addr: GuestPhysAddr, flags: AccessFlags) -> std::result::Result<(), Stop> {
        let what = if flags.contains(AccessFlags::PAGE_WALK) {
            format!("its page tables lead to {addr}, where there is no memory")
        } else if flags.contains(AccessFlags::EXECUTE) {
            format!("it runs into {addr}, where there is no memory")
        } else if INTERRUPT_CONTROLLER.contains(&addr.as_u64()) {
            // No hypervisor takes single accesses to it from us.
            format!(
                "it accesses the interrupt controller, at {addr}, by an instruction that the hardware does not decode"
            )
        } else {
            self.count(UserExit::Mmio);
            let fault = Fault { addr, write: flags.contains(AccessFlags::WRITE) };
            match emulate::step(&mut self.vcpu, &mut Board(&self.machine), fault, zero_block()) {
                Ok(()) => {
                    self.local.gone = 0;
                    return Ok(());
                }
                // Another vCPU has changed the instruction or the tables. The CPU will find what is there now.
                Err(error) if error.may_pass() && self.local.gone < PATIENCE => {
                    self.local.gone += 1;
                    return Ok(());
                }
                Err(emulate::Error::Registers(error)) => return Err(error.into()),
                Err(error) => format!("it accesses {addr}, where there is no memory: {error}"),
            }
        };
        Err(self.give_up(ExitCode::CannotContinue, &what))
    }

    /// The vCPU's state for people.
    pub(crate) fn describe(&mut self) -> String {
        match (self.vcpu.get(), self.vcpu.get()) {
            (Ok(general), Ok(system)) => state::registers(self.id, &general, &system, self.vcpu.syndrome()),
            (Err::<General, _>(error), _) | (_, Err::<System, _>(error)) => {
                format!("vCPU {}: its registers cannot be read ({error})", self.id)
            }
        }
    }
}

/// The machine as the emulator sees it.
struct Board<'a>(&'a Machine);

impl Memory for Board<'_> {
    fn ram_read(&self, at: GuestPhysAddr, data: &mut [u8]) -> bool {
        self.0.ram.read(at, data).is_ok()
    }

    fn ram_write(&mut self, at: GuestPhysAddr, data: &[u8]) -> bool {
        self.0.ram.write_atomically(at, data).is_ok()
    }

    fn device_read(&mut self, at: GuestPhysAddr, data: &mut [u8]) {
        self.0.mmio.read(at.as_u64(), data);
    }

    fn device_write(&mut self, at: GuestPhysAddr, data: &[u8]) {
        self.0.mmio.write(at.as_u64(), data);
    }
}

/// The size of the block that DC ZVA zeroes, in bytes, if it may be used: DCZID_EL0, which is the same for guests.
#[must_use]
pub fn zero_block() -> Option<u64> {
    let dczid: u64;
    // SAFETY: reads a register that EL0 can always read (Arm ARM D24.2.35), and does nothing else.
    unsafe { std::arch::asm!("mrs {}, dczid_el0", out(reg) dczid, options(nomem, nostack, preserves_flags)) };
    // DZP forbids it; BS is the logarithm of the number of words.
    (dczid & 0b1_0000 == 0).then_some(4 << (dczid & 0b1111))
}
