// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! What SVM keeps for each CPU: the pages that it wants, and the ASIDs.
//!
//! EFER.SVME is set only inside of a window, so that another hypervisor can be loaded at any time. What happens between two
//! windows is found out from VM_HSAVE_PA: we leave our page in it, everybody else who uses SVM writes another one (KVM does at
//! its load, and zero when it goes). If it has changed, all our ASIDs may have been used by others.

use vcpu_core::{AxError, AxResult, AxVCpuHal};

use super::asid::AsidAllocator;
use crate::cpu;
use crate::frame::Frames;
use crate::regs::efer;

/// EFER.
const MSR_EFER: u32 = 0xc000_0080;
/// VM_HSAVE_PA (APM vol. 2 section 15.30.4).
const MSR_VM_HSAVE_PA: u32 = 0xc001_0117;

/// The part of a CPU's record that SVM uses.
pub(crate) struct SvmCpu<H: AxVCpuHal> {
    enabled: bool,
    /// Where VMRUN keeps the host's state. Its contents are the CPU's own affair.
    host_save: Frames<H>,
    /// A VMCB for VMSAVE and VMLOAD of the host's state.
    host_vmcb: Frames<H>,
    pub(super) asids: AsidAllocator,
}

impl<H: AxVCpuHal> SvmCpu<H> {
    /// Makes it, for a CPU with `asids` ASIDs. May sleep.
    ///
    /// # Errors
    /// [`AxError::NoMemory`].
    pub(crate) fn new(asids: u32) -> AxResult<Self> {
        Ok(Self {
            enabled: false,
            host_save: Frames::new(0)?,
            host_vmcb: Frames::new(0)?,
            asids: AsidAllocator::new(asids),
        })
    }

    /// Physical address of the VMCB for the host's state.
    pub(super) fn host_vmcb(&self) -> u64 {
        self.host_vmcb.phys().as_u64()
    }

    /// Whether SVM is on, by us.
    pub(crate) fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// Sets EFER.SVME and VM_HSAVE_PA. Kernel context, on this CPU.
    ///
    /// # Errors
    /// [`AxError::HardwareBusy`]: somebody else has SVM on.
    pub(crate) fn enable(&mut self) -> AxResult {
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

    /// Clears EFER.SVME. VM_HSAVE_PA means nothing without it and stays, as a mark (see the module's description). Kernel
    /// context, on the CPU of [`enable`](Self::enable).
    pub(crate) fn disable(&mut self) {
        self.enabled = false;
        // SAFETY: Kernel context; SVME is ours, set by `enable` on this CPU.
        unsafe {
            cpu::with_interrupts_off(|| {
                let old = cpu::rdmsr(MSR_EFER);
                cpu::wrmsr(MSR_EFER, old & !efer::SVME);
            });
        }
    }

    /// The CPU goes offline, or the record goes: the CPU is to forget our page.
    pub(crate) fn retire(&mut self) {
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
