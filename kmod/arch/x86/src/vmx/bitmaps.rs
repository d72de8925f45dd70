// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The MSR bitmap (SDM vol. 3 section 25.6.9): every access exits, but for MSRs that are switched between host and guest anyway,
//! for those of the x2APIC while the CPU virtualizes them, and for SPEC_CTRL once the guest has used it.
//!
//! There are no I/O bitmaps: the control that makes every port access exit needs none, and covers accesses that wrap around
//! the end of the port space too.

use vcpu_core::{AxResult, AxVCpuHal, HostPhysAddr};
use x86::msr;

use crate::apic::{reg, X2APIC_FIRST};
use crate::frame::Frames;
use crate::msr::SPEC_CTRL;

/// MSRs that the guest reads and writes directly: the VMCS or the window switches them, and hardware checks the values. Not those
/// of SYSCALL, which guests write once: the CPU has them only while a guest can use them.
const DIRECT: [u32; 6] = [
    msr::IA32_SYSENTER_CS,
    msr::IA32_SYSENTER_ESP,
    msr::IA32_SYSENTER_EIP,
    msr::IA32_FS_BASE,
    msr::IA32_GS_BASE,
    msr::IA32_KERNEL_GSBASE,
];

/// Registers of the x2APIC, by their place in the page, that the CPU reads for the guest. Not those that fault, nor the current
/// count, which nobody keeps up to date, nor the interrupt command, whose halves the page has in different places than the CPU.
fn x2apic_reads() -> impl Iterator<Item = u16> {
    [reg::ID, reg::VERSION, reg::TPR, reg::PPR, reg::LDR, reg::SVR, reg::INITIAL_COUNT, reg::DIVIDE]
        .into_iter()
        .chain((reg::ISR..=reg::ESR).step_by(16))
        .chain((reg::LVT_TIMER..=reg::LVT_ERROR).step_by(16))
}

/// Registers of the x2APIC whose writes the CPU always carries out for the guest (SDM vol. 3 section 30.5), besides
/// [`virtualize_self_ipi`](MsrBitmap::virtualize_self_ipi).
const X2APIC_WRITES: [u16; 2] = [reg::TPR, reg::EOI];

/// The bitmap: 1 KiB each for reads of low and high MSRs, then for writes of both.
pub(crate) struct MsrBitmap<H: AxVCpuHal> {
    frame: Frames<H>,
}

impl<H: AxVCpuHal> MsrBitmap<H> {
    /// Makes it. May sleep.
    ///
    /// # Errors
    /// [`AxError::NoMemory`](vcpu_core::AxError::NoMemory).
    pub(crate) fn new() -> AxResult<Self> {
        let mut this = Self { frame: Frames::new(0)? };
        this.frame.bytes_mut().fill(0xff);
        for index in DIRECT {
            this.set(index, false, false);
            this.set(index, true, false);
        }
        Ok(this)
    }

    /// Lets accesses to MSR `index` exit, or not.
    fn set(&mut self, index: u32, write: bool, exits: bool) {
        let byte = position(index, write).and_then(|(byte, bit)| Some((self.frame.bytes_mut().get_mut(byte)?, bit)));
        if let Some((byte, bit)) = byte {
            *byte = *byte & !(1 << bit) | u8::from(exits) << bit;
        }
    }

    /// Leaves the registers of the x2APIC that the CPU virtualizes to it, or has all of them exit.
    pub(crate) fn virtualize_x2apic(&mut self, virtualized: bool) {
        for offset in x2apic_reads() {
            self.set(X2APIC_FIRST + u32::from(offset / 16), false, !virtualized);
        }
        for offset in X2APIC_WRITES {
            self.set(X2APIC_FIRST + u32::from(offset / 16), true, !virtualized);
        }
    }

    /// Leaves the x2APIC's interrupts to the CPU itself to it, or has them exit.
    pub(crate) fn virtualize_self_ipi(&mut self, virtualized: bool) {
        self.set(X2APIC_FIRST + u32::from(reg::SELF_IPI / 16), true, !virtualized);
    }

    /// Leaves SPEC_CTRL to the guest from now on. Whoever does it reads at each exit what the guest has made of it.
    pub(crate) fn leave_spec_ctrl(&mut self) {
        self.set(SPEC_CTRL, false, false);
        self.set(SPEC_CTRL, true, false);
    }

    /// Its address, for the VMCS.
    pub(crate) fn phys(&self) -> HostPhysAddr {
        self.frame.phys()
    }
}

/// Byte and bit for a read or write of MSR `index`. `None` for an MSR outside of the two ranges, which always exits.
fn position(index: u32, write: bool) -> Option<(usize, u32)> {
    let base = match index & !0x1fff {
        0 => 0,
        0xc000_0000 => 0x400,
        _ => return None,
    };
    let low = index & 0x1fff;
    let base = if write { base + 0x800 } else { base };
    Some((base + (low / 8) as usize, low % 8))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TestHal;
    use std::collections::BTreeSet;

    #[test]
    fn positions_are_those_of_the_manual() {
        for (index, write, expected) in [
            (0, false, Some((0, 0))),
            (0x174, false, Some((0x2e, 4))),
            (0x1fff, false, Some((0x3ff, 7))),
            (0xc000_0080, false, Some((0x410, 0))),
            (0x10, true, Some((0x802, 0))),
            (0xc000_0102, true, Some((0xc20, 2))),
            (0xc000_1fff, true, Some((0xfff, 7))),
            (0x2000, false, None),
            (0xc001_0000, false, None),
            (u32::MAX, true, None),
        ] {
            assert_eq!(position(index, write), expected, "{index:#x}");
        }
    }

    /// The accesses that do not exit: MSR, and whether it is a write.
    fn direct(bitmap: &MsrBitmap<TestHal>) -> BTreeSet<(u32, bool)> {
        let accesses = (0u32..0x2000).chain(0xc000_0000..0xc000_2000).flat_map(|index| [(index, false), (index, true)]);
        let exits = |index, write| {
            let (byte, bit) = position(index, write).unwrap();
            bitmap.frame.bytes()[byte] >> bit & 1 != 0
        };
        accesses.filter(|&(index, write)| !exits(index, write)).collect()
    }

    #[test]
    fn only_the_switched_msrs_are_direct() {
        let bitmap = MsrBitmap::new().unwrap();
        assert_eq!(direct(&bitmap), DIRECT.into_iter().flat_map(|index| [(index, false), (index, true)]).collect());
    }

    #[test]
    fn spec_ctrl_is_left_to_the_guest_when_asked() {
        let mut bitmap = MsrBitmap::new().unwrap();
        let closed = direct(&bitmap);
        bitmap.leave_spec_ctrl();
        let opened: BTreeSet<_> = direct(&bitmap).difference(&closed).copied().collect();
        assert_eq!(opened, BTreeSet::from([(0x48, false), (0x48, true)]));
    }

    #[test]
    fn the_x2apic_is_open_while_it_is_virtualized() {
        let mut bitmap = MsrBitmap::new().unwrap();
        let closed = direct(&bitmap);
        bitmap.virtualize_x2apic(true);
        let opened: BTreeSet<_> = direct(&bitmap).difference(&closed).copied().collect();
        let reads = [0x802, 0x803, 0x808, 0x80a, 0x80d, 0x80f, 0x838, 0x83e]
            .into_iter()
            .chain(0x810..=0x828)
            .chain(0x832..=0x837);
        let expected = reads.map(|index| (index, false)).chain([(0x808, true), (0x80b, true)]);
        assert_eq!(opened, expected.collect());
        let without = direct(&bitmap);
        bitmap.virtualize_self_ipi(true);
        let opened: BTreeSet<_> = direct(&bitmap).difference(&without).copied().collect();
        assert_eq!(opened, BTreeSet::from([(0x83f, true)]));
        bitmap.virtualize_self_ipi(false);
        bitmap.virtualize_x2apic(false);
        assert_eq!(direct(&bitmap), closed);
    }
}
