// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! What VMX wants on each CPU: a VMXON region, VPIDs, a copy of the GDT, a way to flush the L1 data cache, and what of the
//! host's state never changes.

use vcpu_core::{AxError, AxResult, AxVCpuHal};
use x86::msr;

use super::capabilities::VmxCapabilities;
use super::instructions::{self, Table};
use super::l1d::L1d;
use super::vpid::VpidAllocator;
use crate::cpu;
use crate::frame::Frames;
use crate::mitigations::L1dFlush;

/// The part of a CPU's record that VMX uses.
pub(crate) struct VmxCpu<H: AxVCpuHal> {
    /// For VMXON. Its contents are the CPU's own affair.
    region: Frames<H>,
    /// A copy of the GDT, in which LTR may mark the TSS busy: the host's own is mapped read-only.
    gdt: Frames<H>,
    /// The GDT that it is a copy of.
    copied: Option<Table>,
    constants: Option<Constants>,
    pub(super) vpids: VpidAllocator,
    pub(super) l1d: L1d<H>,
}

/// What Linux gives a CPU when it comes up and never changes. Other hypervisors put it back at each exit: the VMCS does it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Constants {
    pub(super) sysenter_cs: u64,
    pub(super) sysenter_esp: u64,
    pub(super) sysenter_eip: u64,
    pub(super) pat: u64,
    pub(super) gs_base: u64,
    /// Base of the TSS.
    pub(super) tss: u64,
}

impl<H: AxVCpuHal> VmxCpu<H> {
    /// Makes it, for a CPU that has IA32_FLUSH_CMD if `has_flush_command`. May sleep.
    ///
    /// # Errors
    /// [`AxError::NoMemory`].
    pub(crate) fn new(caps: &VmxCapabilities, flush_l1d: L1dFlush, has_flush_command: bool) -> AxResult<Self> {
        let mut region = Frames::new(0)?;
        super::write_revision(&mut region, caps.revision);
        Ok(Self {
            region,
            gdt: Frames::new(0)?,
            copied: None,
            constants: None,
            vpids: VpidAllocator::new(),
            l1d: L1d::new(flush_l1d, has_flush_command)?,
        })
    }

    /// Physical address of the VMXON region.
    pub(super) fn region(&self) -> u64 {
        self.region.phys().as_u64()
    }

    /// The CPU goes offline, or the record goes: what the CPU has cached is no more.
    pub(crate) fn retire(&mut self) {
        self.vpids.invalidate();
        self.copied = None;
        self.constants = None;
    }

    /// What of the host's state is the same in every window on this CPU.
    ///
    /// # Safety
    /// At CPL 0 on this CPU, with interrupts off. `gdt` is the host's GDT and `tr` what it has in TR.
    pub(super) unsafe fn constants(&mut self, gdt: &Table, tr: u16) -> Constants {
        if let Some(constants) = self.constants {
            return constants;
        }
        // SAFETY: The caller's promise; a CPU with VMX has these MSRs, and TR refers to a TSS's descriptor of 16 bytes.
        let constants = unsafe {
            Constants {
                sysenter_cs: cpu::rdmsr(msr::IA32_SYSENTER_CS),
                sysenter_esp: cpu::rdmsr(msr::IA32_SYSENTER_ESP),
                sysenter_eip: cpu::rdmsr(msr::IA32_SYSENTER_EIP),
                pat: cpu::rdmsr(msr::IA32_PAT),
                gs_base: cpu::rdmsr(msr::IA32_GS_BASE),
                tss: tss_base(gdt, tr),
            }
        };
        self.constants = Some(constants);
        constants
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
        if self.copied != Some(*host) {
            let length = (usize::from(host.limit) + 1).min(copy.len());
            // SAFETY: The host's GDT has `limit + 1` bytes, and the copy at least `length`; the two are different memory.
            unsafe { core::ptr::copy_nonoverlapping(host.base as *const u8, copy.as_mut_ptr(), length) };
            self.copied = Some(*host);
        }
        // A TSS descriptor has 16 bytes, all within the GDT.
        let descriptor = usize::from(selector & !7);
        if descriptor + 16 > usize::from(host.limit) + 1 {
            return Err(AxError::HardwareLost);
        }
        // LTR wants it available, and marks it busy.
        if let Some(kind) = copy.get_mut(descriptor + 5) {
            *kind &= !BUSY;
        }
        let table = Table { limit: host.limit, base: copy.as_ptr() as u64 };
        // SAFETY: By the caller's promise. The copy has the host's descriptors of CS and SS and of the TSS, none of which ever
        // changes on a CPU; the others, which may since have changed, nobody loads before the host's own GDT is back.
        unsafe {
            instructions::load_gdtr(&table);
            instructions::load_tr(selector);
            instructions::load_gdtr(host);
        }
        Ok(())
    }
}

/// Base of the TSS that `selector` refers to in `gdt`.
///
/// # Safety
/// `gdt` is the host's, and has a 16-byte descriptor there.
unsafe fn tss_base(gdt: &Table, selector: u16) -> u64 {
    let at = gdt.base as *const u8;
    // SAFETY: The caller's promise.
    let [low, high] = unsafe { at.add(usize::from(selector & !7)).cast::<[u64; 2]>().read_unaligned() };
    base_of_descriptor(low, high)
}

/// The base in the two halves of a system descriptor of 64-bit mode (SDM vol. 3 figure 8-4).
const fn base_of_descriptor(low: u64, high: u64) -> u64 {
    low >> 16 & 0xff_ffff | low >> 56 << 24 | high << 32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bases_are_put_together_from_four_pieces() {
        assert_eq!(base_of_descriptor(0x7800_8b45_6000_0067, 0xffff_fe12), 0xffff_fe12_7845_6000);
    }
}
