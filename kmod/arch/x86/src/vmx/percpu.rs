// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! What VMX wants on each CPU: a VMXON region, VPIDs, and a place for a copy of the GDT.

use vcpu_core::{AxError, AxResult, AxVCpuHal};

use super::capabilities::VmxCapabilities;
use super::instructions::{self, Table};
use super::vpid::VpidAllocator;
use crate::frame::Frames;

/// The part of a CPU's record that VMX uses.
pub(crate) struct VmxCpu<H: AxVCpuHal> {
    /// For VMXON. Its contents are the CPU's own affair.
    region: Frames<H>,
    /// A copy of the GDT, in which LTR may mark the TSS busy: the host's own is mapped read-only.
    gdt: Frames<H>,
    pub(super) vpids: VpidAllocator,
}

impl<H: AxVCpuHal> VmxCpu<H> {
    /// Makes it. May sleep.
    ///
    /// # Errors
    /// [`AxError::NoMemory`].
    pub(crate) fn new(caps: &VmxCapabilities) -> AxResult<Self> {
        let mut region = Frames::new(0)?;
        super::write_revision(&mut region, caps.revision);
        Ok(Self { region, gdt: Frames::new(0)?, vpids: VpidAllocator::new() })
    }

    /// Physical address of the VMXON region.
    pub(super) fn region(&self) -> u64 {
        self.region.phys().as_u64()
    }

    /// The CPU goes offline, or the record goes: what the CPU has cached is no more.
    pub(crate) fn retire(&mut self) {
        self.vpids.invalidate();
    }

    /// Loads TR with `selector` of the host's GDT, to have the limit of the TSS again that an exit has cut.
    ///
    /// # Errors
    /// [`AxError::HardwareLost`] if the selector is none of the GDT's: TR stays then as it is.
    ///
    /// # Safety
    /// At CPL 0 with interrupts off. `host` is the host's GDT and `selector` what it had in TR.
    pub(super) unsafe fn reload_tr(&mut self, host: &Table, selector: u16) -> AxResult {
        /// Descriptor type bit 1: busy.
        const BUSY: u8 = 2;
        let copy = self.gdt.bytes_mut();
        let length = (usize::from(host.limit) + 1).min(copy.len());
        let descriptor = usize::from(selector & !7);
        // SAFETY: The host's GDT has `limit + 1` bytes, and the copy at least `length`; the two are different memory.
        unsafe { core::ptr::copy_nonoverlapping(host.base as *const u8, copy.as_mut_ptr(), length) };
        // A TSS descriptor has 16 bytes.
        if descriptor + 16 > length {
            return Err(AxError::HardwareLost);
        }
        if let Some(kind) = copy.get_mut(descriptor + 5) {
            *kind &= !BUSY;
        }
        let table = Table { limit: host.limit, base: copy.as_ptr() as u64 };
        // SAFETY: By the caller's promise, and the copy has all descriptors of the host's GDT that fit a frame, CS, SS and the TSS
        // among them. The host's own is back right away.
        unsafe {
            instructions::load_gdtr(&table);
            instructions::load_tr(selector);
            instructions::load_gdtr(host);
        }
        Ok(())
    }
}
