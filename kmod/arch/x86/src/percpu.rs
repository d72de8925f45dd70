// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! What each physical CPU keeps: the pages that SVM wants and its ASIDs, or what VMX wants, and which vCPU ran last.
//!
//! EFER.SVME is set only inside of a window, so that another hypervisor can be loaded at any time. What happens between two
//! windows is found out from VM_HSAVE_PA: we leave our page in it, everybody else who uses SVM writes another one (KVM does at
//! its load, and zero when it goes). If it has changed, all our ASIDs may have been used by others.

use vcpu_core::{AxArchPerCpu, AxError, AxResult};

use crate::caps::{self, Backend, Capabilities};
use crate::cpu;
use crate::frame::Frames;
use crate::hal::X86Hal;
use crate::regs::efer;
use crate::svm::AsidAllocator;
use crate::vmx::VmxCpu;

/// EFER.
const MSR_EFER: u32 = 0xc000_0080;
/// VM_HSAVE_PA (APM vol. 2 section 15.30.4).
const MSR_VM_HSAVE_PA: u32 = 0xc001_0117;

/// The record of one CPU.
pub struct X86PerCpu<H: X86Hal> {
    cpu: usize,
    enabled: bool,
    /// On a CPU with VMX, which is switched on and off by the vCPU's inner window; the SVM part is not used then.
    vmx: Option<VmxCpu<H>>,
    /// Where VMRUN keeps the host's state. Its contents are the CPU's own affair.
    host_save: Frames<H>,
    /// A VMCB for VMSAVE and VMLOAD of the host's state.
    host_vmcb: Frames<H>,
    pub(crate) asids: AsidAllocator,
    /// Identity of the vCPU that was bound last; 0 for none.
    pub(crate) last_vcpu: u64,
}

impl<H: X86Hal> X86PerCpu<H> {
    /// The CPU's number.
    pub(crate) fn cpu(&self) -> usize {
        self.cpu
    }

    /// Physical address of the VMCB for the host's state.
    pub(crate) fn host_vmcb(&self) -> u64 {
        self.host_vmcb.phys().as_u64()
    }

    /// The part that VMX uses, if the CPU has VMX.
    pub(crate) fn vmx(&self) -> Option<&VmxCpu<H>> {
        self.vmx.as_ref()
    }

    /// The part that VMX uses, to be changed.
    pub(crate) fn vmx_mut(&mut self) -> Option<&mut VmxCpu<H>> {
        self.vmx.as_mut()
    }

    /// Makes the CPU forget this record, before it is dropped: at unload and when the CPU goes offline. To be called on that
    /// CPU with preemption off, outside of a window.
    pub fn retire(&mut self) {
        self.last_vcpu = 0;
        if let Some(vmx) = &mut self.vmx {
            vmx.retire();
            return;
        }
        let own = self.host_save.phys().as_u64();
        // SAFETY: Kernel context.
        unsafe {
            cpu::with_interrupts_off(|| {
                let old = cpu::rdmsr(MSR_EFER);
                // Only if nobody else owns SVM here; then the register is not ours either.
                if old & efer::SVME == 0 {
                    // SAFETY: The CPU has SVM, and nobody uses it: interrupts are off, so nobody can start to.
                    cpu::wrmsr(MSR_EFER, old | efer::SVME);
                    if cpu::rdmsr(MSR_VM_HSAVE_PA) == own {
                        cpu::wrmsr(MSR_VM_HSAVE_PA, 0);
                    }
                    cpu::wrmsr(MSR_EFER, old);
                }
            });
        }
        self.asids.invalidate();
    }
}

impl<H: X86Hal> AxArchPerCpu for X86PerCpu<H> {
    fn new(cpu_id: usize) -> AxResult<Self> {
        let vmx = match caps::detect()? {
            Backend::Svm => None,
            Backend::Vmx => Some(VmxCpu::new(&caps::vmx().map_err(|_| AxError::Unsupported)?)?),
        };
        Ok(Self {
            cpu: cpu_id,
            enabled: false,
            vmx,
            host_save: Frames::new(0)?,
            host_vmcb: Frames::new(0)?,
            asids: AsidAllocator::new(Capabilities::host().asids),
            last_vcpu: 0,
        })
    }

    fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// Sets EFER.SVME and VM_HSAVE_PA.
    fn hardware_enable(&mut self) -> AxResult {
        if self.vmx.is_some() {
            return Err(AxError::Unsupported);
        }
        let own = self.host_save.phys().as_u64();
        // SAFETY: Kernel context; the closure touches only MSRs that every CPU with SVM has, and takes SVM only where
        // nobody has it. With interrupts off, nobody else on this CPU can decide the same at the same time.
        let foreign = unsafe {
            cpu::with_interrupts_off(|| {
                let old = cpu::rdmsr(MSR_EFER);
                if old & efer::SVME != 0 {
                    return Err(AxError::HardwareBusy);
                }
                cpu::wrmsr(MSR_EFER, old | efer::SVME);
                let foreign = cpu::rdmsr(MSR_VM_HSAVE_PA) != own;
                if foreign {
                    cpu::wrmsr(MSR_VM_HSAVE_PA, own);
                }
                Ok(foreign)
            })?
        };
        if foreign {
            self.asids.invalidate();
        }
        self.enabled = true;
        Ok(())
    }

    /// Clears EFER.SVME. VM_HSAVE_PA means nothing without it and stays, as a mark (see the module's description).
    fn hardware_disable(&mut self) -> AxResult {
        self.enabled = false;
        // SAFETY: Kernel context; SVME is ours, set by `hardware_enable` on this CPU.
        unsafe {
            cpu::with_interrupts_off(|| {
                let old = cpu::rdmsr(MSR_EFER);
                cpu::wrmsr(MSR_EFER, old & !efer::SVME);
            });
        }
        Ok(())
    }
}
