// SPDX-License-Identifier: MIT OR Apache-2.0
//! A vCPU's thread on AArch64: PSCI, and accesses that nobody has decoded.

use std::sync::Arc;

use axvcpu_uapi::arm64::{General, System};
use axvcpu_uapi::client::Exit;
use axvcpu_uapi::exit::{AccessFlags, AxVCpuExitReason};

use super::hypervisor::Arm64Vcpu;
use super::power::{self, answer, Power, Turn, AFFINITY_INFO};
use super::{boot, state};
use crate::control::Stop;
use crate::exit::ExitCode;
use crate::hypervisor::{Kick, Result};
use crate::stats::UserExit;
use crate::vcpu::Runner;

/// What a vCPU's thread keeps.
#[derive(Default)]
pub struct Local(Option<Started>);

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
        vcpus.iter().map(|vcpu| Ok(Self(Some(Started { power: Arc::clone(&power), reset: vcpu.get()? })))).collect()
    }

    /// A handle that makes the vCPU return that `kick` makes return while it runs.
    #[must_use]
    pub fn kicker(&self, kick: Box<dyn Kick>) -> Box<dyn Kick> {
        match &self.0 {
            Some(started) => Box::new(power::Kicker { vcpu: kick, power: Arc::clone(&started.power) }),
            None => kick,
        }
    }
}

impl<V: Arm64Vcpu> Runner<V> {
    /// Before the guest runs on. Says whether it may.
    pub(crate) fn before_entry(&mut self) -> std::result::Result<bool, Stop> {
        let Some(started) = &self.local.0 else { return Ok(true) };
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
        match (exit.reason, &self.local.0) {
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
            (AxVCpuExitReason::NestedPageFault { addr, access_flags }, _) => {
                let what = if access_flags.contains(AccessFlags::EXECUTE) {
                    format!("it runs into {addr}, where there is no memory")
                } else {
                    format!(
                        "it accesses {addr}, where there is no memory, by an instruction that the hardware does not decode \
                         (a pair of registers, a vector register, or an address that it changes)"
                    )
                };
                return Err(self.give_up(ExitCode::CannotContinue, &what));
            }
            (ref other, _) => return Err(self.unhandled(other)),
        }
        Ok(())
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
