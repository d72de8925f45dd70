// SPDX-License-Identifier: MIT OR Apache-2.0
//! A vCPU of KVM, as far as it is the same everywhere: runs it, and turns what comes back into the exits of the axvcpu ABI.

use std::os::fd::{AsRawFd, BorrowedFd};

use axvcpu_uapi::client::Errno;
use axvcpu_uapi::exit::AxVCpuExitReason;
use kvm_ioctls::{VcpuFd, VmFd};

use super::error::{refused, Error};
use super::kick::Kicker;
use super::run_page::RunPage;
use super::transfer::Transfer;
use crate::hypervisor::Kick;

/// What `KVM_RUN` came back with.
pub(crate) enum Came {
    /// Accesses to carry out; none if KVM's words make no sense.
    Access(Option<Transfer>),
    /// An exit.
    Exit(AxVCpuExitReason),
}

/// A vCPU's descriptor and run page.
#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) fd: VcpuFd,
    pub(crate) page: RunPage,
    /// The access that the last exit was a part of.
    access: Option<Transfer>,
    kicker: Kicker,
}

impl Core {
    /// Creates vCPU `id`.
    ///
    /// # Errors
    /// [`Error::Ioctl`] and [`Error::MapRunPage`].
    pub(crate) fn new(vm: &VmFd, id: u32) -> Result<Self, Error> {
        let fd = vm.create_vcpu(id.into()).map_err(refused("KVM_CREATE_VCPU"))?;
        // SAFETY: `fd` stays open until the end of the function.
        let page = RunPage::map(unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) }, vm.run_size())?;
        let kicker = Kicker::new(page.immediate_exit());
        Ok(Self { fd, page, access: None, kicker })
    }

    /// A handle with which any thread can make [`run`](Self::run) return.
    pub(crate) fn kicker(&self) -> Box<dyn Kick> {
        Box::new(self.kicker.clone())
    }

    /// Runs the vCPU until an exit, or hands out the next part of an access that KVM gave in one. `others` knows exits
    /// that only this architecture has; it is given the page and a `KVM_EXIT_*`.
    ///
    /// # Errors
    /// [`Error::Ioctl`].
    pub(crate) fn run(
        &mut self,
        others: impl FnOnce(&mut RunPage, u32) -> Option<Came>,
    ) -> Result<AxVCpuExitReason, Error> {
        if let Some(access) = &mut self.access {
            access.advance();
            if let Some(part) = self.next_part() {
                return Ok(part);
            }
        }
        self.access = None;
        self.kicker.adopt();
        let result = self.fd.run().map(drop);
        match result.map_err(|error| Errno::from_raw(error.errno())) {
            Ok(()) => Ok(self.reason(others)),
            Err(Errno::EINTR) => {
                self.kicker.taken();
                Ok(AxVCpuExitReason::Interrupted)
            }
            // It waits for another to start it, and something came.
            Err(Errno::EAGAIN) => Ok(AxVCpuExitReason::Nothing),
            Err(errno) => Err(Error::Ioctl { name: "KVM_RUN", errno }),
        }
    }

    /// Answers the last exit if it was part of an access. Says whether it was.
    pub(crate) fn reply(&mut self, value: u64) -> bool {
        if let Some((offset, width)) = self.access.as_ref().and_then(Transfer::part) {
            self.page.write(offset, width, value);
        }
        self.access.is_some()
    }

    /// The next part of the access that the last exit was part of.
    fn next_part(&self) -> Option<AxVCpuExitReason> {
        let access = self.access.as_ref()?;
        let (offset, width) = access.part()?;
        Some(access.exit(width, self.page.read(offset, width)))
    }

    /// What `KVM_RUN` came back with.
    fn reason(&mut self, others: impl FnOnce(&mut RunPage, u32) -> Option<Came>) -> AxVCpuExitReason {
        use kvm_bindings::*;
        let reason = self.page.exit_reason();
        let unknown = AxVCpuExitReason::Unknown { code: reason.into(), info1: 0, info2: 0 };
        let came = match reason {
            KVM_EXIT_MMIO => Came::Access(self.page.mmio()),
            KVM_EXIT_INTR => Came::Exit(AxVCpuExitReason::Interrupted),
            KVM_EXIT_FAIL_ENTRY => {
                Came::Exit(AxVCpuExitReason::FailEntry { hardware_entry_failure_reason: self.page.entry_failure() })
            }
            KVM_EXIT_SYSTEM_EVENT => Came::Exit(match self.page.system_event() {
                KVM_SYSTEM_EVENT_SHUTDOWN => AxVCpuExitReason::SystemDown,
                KVM_SYSTEM_EVENT_RESET => AxVCpuExitReason::SystemReset,
                event => AxVCpuExitReason::Unknown { code: reason.into(), info1: event.into(), info2: 0 },
            }),
            KVM_EXIT_INTERNAL_ERROR => Came::Exit(match self.page.internal_error() {
                // KVM's emulator does not know the instruction.
                (KVM_INTERNAL_ERROR_EMULATION, _) => AxVCpuExitReason::UnsupportedInstruction { code: reason.into() },
                (error, data) => AxVCpuExitReason::Unknown { code: reason.into(), info1: error.into(), info2: data },
            }),
            other => others(&mut self.page, other).unwrap_or(Came::Exit(unknown)),
        };
        match came {
            Came::Exit(exit) => exit,
            Came::Access(access) => {
                self.access = access;
                self.next_part().unwrap_or(unknown)
            }
        }
    }
}
