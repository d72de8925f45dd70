// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! What each physical CPU keeps: its backend's part, and which vCPU ran last.

use vcpu_core::{AxArchPerCpu, AxError, AxResult};

use crate::caps::{self, Backend, Capabilities};
use crate::hal::X86Hal;
use crate::mitigations::Mitigations;
use crate::svm::SvmCpu;
use crate::switch::Frame;
use crate::vmx::VmxCpu;

/// The record of one CPU.
pub struct X86PerCpu<H: X86Hal> {
    cpu: usize,
    /// What is to be done on it against speculative execution attacks.
    pub(crate) mitigations: Mitigations,
    /// [`Frame::flags_for`] them.
    pub(crate) flags: u32,
    hardware: Hardware<H>,
    /// Identity of the vCPU that was bound last; 0 for none.
    pub(crate) last_vcpu: u64,
    /// The vector of an interrupt that an exit has acknowledged, until the host has it.
    pub(crate) host_interrupt: Option<u8>,
}

/// The backend's part.
enum Hardware<H: X86Hal> {
    Svm(SvmCpu<H>),
    /// VMX is switched on and off by the vCPU's inner window.
    Vmx(VmxCpu<H>),
}

impl<H: X86Hal> X86PerCpu<H> {
    /// The CPU's number.
    pub(crate) fn cpu(&self) -> usize {
        self.cpu
    }

    /// What SVM keeps.
    ///
    /// # Errors
    /// [`AxError::NoHardware`] on a CPU without SVM.
    pub(crate) fn svm(&mut self) -> AxResult<&mut SvmCpu<H>> {
        match &mut self.hardware {
            Hardware::Svm(svm) => Ok(svm),
            Hardware::Vmx(_) => Err(AxError::NoHardware),
        }
    }

    /// What VMX keeps.
    ///
    /// # Errors
    /// [`AxError::NoHardware`] on a CPU without VMX.
    pub(crate) fn vmx(&mut self) -> AxResult<&mut VmxCpu<H>> {
        match &mut self.hardware {
            Hardware::Vmx(vmx) => Ok(vmx),
            Hardware::Svm(_) => Err(AxError::NoHardware),
        }
    }

    /// Makes the CPU forget this record, before it is dropped: at unload and when the CPU goes offline. To be called on that
    /// CPU with preemption off, outside of a window.
    pub fn retire(&mut self) {
        self.last_vcpu = 0;
        match &mut self.hardware {
            Hardware::Svm(svm) => svm.retire(),
            Hardware::Vmx(vmx) => vmx.retire(),
        }
    }
}

impl<H: X86Hal> AxArchPerCpu for X86PerCpu<H> {
    fn new(cpu_id: usize) -> AxResult<Self> {
        let mitigations = H::mitigations();
        let hardware = match caps::detect()? {
            Backend::Svm => Hardware::Svm(SvmCpu::new(Capabilities::host().asids)?),
            Backend::Vmx => {
                let vmx = caps::vmx().map_err(|_| AxError::Unsupported)?;
                Hardware::Vmx(VmxCpu::new(&vmx, mitigations.flush_l1d, Capabilities::host().flush_l1d)?)
            }
        };
        let flags = Frame::flags_for(&Capabilities::host(), &mitigations);
        Ok(Self { cpu: cpu_id, mitigations, flags, hardware, last_vcpu: 0, host_interrupt: None })
    }

    fn is_enabled(&self) -> bool {
        match &self.hardware {
            Hardware::Svm(svm) => svm.is_enabled(),
            Hardware::Vmx(_) => false,
        }
    }

    fn hardware_enable(&mut self) -> AxResult {
        self.svm().map_err(|_| AxError::Unsupported)?.enable()
    }

    fn hardware_disable(&mut self) -> AxResult {
        self.svm().map_err(|_| AxError::Unsupported)?.disable();
        Ok(())
    }
}
