// SPDX-License-Identifier: MIT OR Apache-2.0
//! A vCPU's thread: runs the guest, and does what each exit asks for. Here are the loop and the exits that mean the same on
//! every architecture, with a counter for each; what others mean, the architecture's own part knows ([`crate::arch`]).

use std::sync::Arc;

use axvcpu_uapi::client::Exit;
use axvcpu_uapi::exit::AxVCpuExitReason;

use crate::arch::{Local, Machine, VcpuOps};
use crate::control::Stop;
use crate::error::Error;
use crate::exit::ExitCode;
use crate::hypervisor;
use crate::stats::{Counters, UserExit};

/// A vCPU with all that its thread needs.
pub struct Runner<V> {
    pub(crate) vcpu: V,
    pub(crate) id: u32,
    pub(crate) machine: Arc<Machine>,
    counters: Arc<Counters>,
    /// What the architecture's part keeps.
    pub(crate) local: Local,
}

impl From<hypervisor::Error> for Stop {
    fn from(error: hypervisor::Error) -> Self {
        Self::Failed(Error::Hypervisor(error))
    }
}

impl<V: VcpuOps> Runner<V> {
    /// For a vCPU that has been set up.
    #[must_use]
    pub fn new(vcpu: V, id: u32, machine: &Arc<Machine>, counters: &Arc<Counters>, local: Local) -> Self {
        Self { vcpu, id, machine: Arc::clone(machine), counters: Arc::clone(counters), local }
    }

    /// Runs until the VM stops, and stops it if this vCPU cannot go on. The vCPU comes back, for its statistics.
    pub fn run(mut self) -> V {
        while !self.machine.control.is_stopping() {
            if let Err(reason) = self.step() {
                self.machine.control.stop(reason);
                break;
            }
        }
        if self.machine.control.shows_state() {
            eprintln!("{}", self.describe());
        }
        self.vcpu
    }

    fn step(&mut self) -> Result<(), Stop> {
        if !self.before_entry()? {
            return Ok(());
        }
        let exit = self.vcpu.run()?;
        self.after_exit(&exit)?;
        self.handle(&exit)
    }

    /// Counts an exit.
    pub(crate) fn count(&self, kind: UserExit) {
        self.counters.count(kind);
    }

    fn handle(&mut self, exit: &Exit) -> Result<(), Stop> {
        match exit.reason {
            AxVCpuExitReason::MmioRead { addr, width, .. } => {
                self.count(UserExit::Mmio);
                let mut data = [0; 8];
                self.machine.mmio.read(addr.as_u64(), &mut data[..width.size()]);
                let value = u64::from_le_bytes(data) & width.mask();
                tracing::trace!(%addr, "device memory ({} bytes) reads {value:#x}", width.size());
                self.vcpu.reply(value);
            }
            AxVCpuExitReason::MmioWrite { addr, width, data } => {
                self.count(UserExit::Mmio);
                tracing::trace!(%addr, "device memory ({} bytes) written with {data:#x}", width.size());
                self.machine.mmio.write(addr.as_u64(), &data.to_le_bytes()[..width.size()]);
            }
            AxVCpuExitReason::Interrupted => self.count(UserExit::Interrupted),
            AxVCpuExitReason::Nothing
            | AxVCpuExitReason::ExternalInterrupt { .. }
            | AxVCpuExitReason::PreemptionTimer => self.count(UserExit::Other),
            AxVCpuExitReason::SystemDown => return Err(Stop::Shutdown),
            AxVCpuExitReason::FailEntry { hardware_entry_failure_reason: code } => {
                let what = format!("the CPU refused to enter the guest: hardware code {code:#x}");
                return Err(self.give_up(ExitCode::EntryFailed, &what));
            }
            AxVCpuExitReason::InvalidGuestState { reason, qualification, field } => {
                let what = format!(
                    "the CPU found the guest's state inconsistent: reason {reason:#x}, qualification {qualification:#x}, \
                     our own check says {field:#x} (see axvcpu(4))"
                );
                return Err(self.give_up(ExitCode::EntryFailed, &what));
            }
            AxVCpuExitReason::UnsupportedInstruction { code } => {
                let what =
                    format!("the guest executed an instruction that is not offered to guests (exit code {code:#x})");
                return Err(self.give_up(ExitCode::CannotContinue, &what));
            }
            AxVCpuExitReason::MachineCheck => {
                return Err(self
                    .give_up(ExitCode::HostError, "the host's hardware reported a machine check while the guest ran"));
            }
            AxVCpuExitReason::Unknown { code, info1, info2 } => {
                let what =
                    format!("an exit that nobody understands: code {code:#x}, information {info1:#x} and {info2:#x}");
                return Err(self.give_up(ExitCode::CannotContinue, &what));
            }
            _ => return self.handle_own(exit),
        }
        Ok(())
    }

    /// For an exit that nobody handles.
    pub(crate) fn unhandled(&mut self, reason: &AxVCpuExitReason) -> Stop {
        let what = format!("an exit that this program does not handle: {reason:?}");
        self.give_up(ExitCode::CannotContinue, &what)
    }

    /// Why this vCPU cannot go on, with its state for people.
    pub(crate) fn give_up(&mut self, code: ExitCode, what: &str) -> Stop {
        Stop::CannotContinue(code, format!("the guest cannot go on: {what}\n{}", self.describe()))
    }
}
