// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The local APIC with the CPU's help (SDM vol. 3, chapter 30): the controls for it, and what the CPU must be told of the APIC
//! before an entry.
//!
//! The APIC's registers lie in the CPU's virtual-APIC page, so there is nothing to copy: what the CPU has done while the guest
//! ran is in the page, and what we do to the page the CPU finds there. Only what follows from the page is kept elsewhere, and is
//! written before an entry if it has changed: RVI and SVI, the vectors whose end exits, or the TPR threshold.

use vcpu_core::HostPhysAddr;

use super::bitmaps::MsrBitmap;
use super::capabilities::{pin, primary, secondary, ApicSupport};
use super::fields::Field;
use super::vmcs::Vmcs;
use crate::apic::{Lapic, Mode};
use crate::hal::X86Hal;
use crate::state::Guest;

/// Fields for the vectors whose end exits.
const EOI_EXITS: [Field; 4] =
    [Field::ControlEoiExit0, Field::ControlEoiExit1, Field::ControlEoiExit2, Field::ControlEoiExit3];

/// What a vCPU has of it.
#[derive(Default)]
pub(super) struct VirtualApic {
    support: ApicSupport,
    /// Pin-based and secondary controls, but for those that depend on the APIC's mode.
    controls: (u32, u32),
    /// The mode that the controls in the VMCS are for, if it is set.
    mode: Option<Mode>,
    /// What the VMCS has.
    eoi_exits: [u64; 4],
    threshold: u8,
}

impl VirtualApic {
    /// As much as `support` for `guest`, which has been set up.
    pub(super) fn new<H: X86Hal>(support: ApicSupport, guest: &Guest<H>) -> Self {
        let limit = match (guest.lapic(), guest.posted) {
            (None, _) => ApicSupport::None,
            (Some(_), None) => ApicSupport::Delivery,
            (Some(_), Some(_)) => ApicSupport::Posted,
        };
        Self { support: support.min(limit), ..Self::default() }
    }

    /// Writes the fields that stay as they are. `controls` are the pin-based and secondary controls without the APIC.
    pub(super) fn write_constants<H: X86Hal>(&mut self, vmcs: &mut Vmcs, guest: &Guest<H>, controls: (u32, u32)) {
        self.controls = controls;
        if let Some(lapic) = guest.lapic().filter(|_| self.support >= ApicSupport::TaskPriority) {
            vmcs.write(Field::ControlVirtualApic, lapic.page().as_u64());
            vmcs.write(Field::ControlTprThreshold, 0);
        }
        if self.support >= ApicSupport::Delivery {
            for field in EOI_EXITS {
                vmcs.write(field, 0);
            }
        }
        if self.support >= ApicSupport::Posted {
            vmcs.write(Field::ControlPostedDescriptor, guest.posted.map_or(0, HostPhysAddr::as_u64));
            vmcs.write(Field::ControlPostedVector, H::notification_vector().unwrap_or(0).into());
        }
    }

    /// Whether interrupts can be posted to the vCPU. Then exits acknowledge the host's interrupts.
    pub(super) fn takes_posted_interrupts(&self) -> bool {
        self.support >= ApicSupport::Posted
    }

    /// Whether the CPU delivers the interrupts of an APIC in `mode`.
    #[inline]
    pub(super) fn delivers(&self, mode: Mode) -> bool {
        self.support >= ApicSupport::Delivery && mode != Mode::Disabled
    }

    /// Whether the CPU has the task priority of an APIC whose interrupts we deliver: then what could be delivered depends on what the
    /// guest has done.
    #[inline]
    pub(super) fn keeps_priority_only(&self, lapic: Option<&Lapic<impl X86Hal>>) -> bool {
        self.support >= ApicSupport::TaskPriority && lapic.is_some_and(|lapic| !self.delivers(lapic.mode()))
    }

    /// The primary controls, of which `controls` has accesses to CR8 exit.
    #[inline]
    pub(super) fn primary(&self, controls: u32) -> u32 {
        if self.support >= ApicSupport::TaskPriority {
            controls & !(primary::CR8_LOAD | primary::CR8_STORE) | primary::TPR_SHADOW
        } else {
            controls
        }
    }

    /// Tells the CPU what has changed.
    #[inline]
    pub(super) fn before_entry<H: X86Hal>(&mut self, vmcs: &mut Vmcs, lapic: &mut Lapic<H>, bitmap: &mut MsrBitmap<H>) {
        let mode = lapic.mode();
        if self.support >= ApicSupport::Delivery && self.mode != Some(mode) {
            self.follow_mode(vmcs, mode, bitmap);
        }
        if self.delivers(mode) {
            if lapic.take_changed() {
                self.show_vectors(vmcs, lapic, bitmap);
            }
        } else if self.support >= ApicSupport::TaskPriority {
            let threshold = lapic.held_class();
            if threshold != self.threshold {
                self.threshold = threshold;
                vmcs.write(Field::ControlTprThreshold, threshold.into());
            }
        }
    }

    /// The APIC is in `mode` from now on.
    fn follow_mode<H: X86Hal>(&mut self, vmcs: &mut Vmcs, mode: Mode, bitmap: &mut MsrBitmap<H>) {
        self.mode = Some(mode);
        let (pin, secondary) = self.mode_controls(mode);
        vmcs.write(Field::ControlPin, pin.into());
        vmcs.write(Field::ControlSecondary, secondary.into());
        // A threshold is for the task priority without delivery, and the entry fails if it is above the task priority.
        self.threshold = 0;
        vmcs.write(Field::ControlTprThreshold, 0);
        bitmap.virtualize_x2apic(mode == Mode::X2Apic);
        bitmap.virtualize_self_ipi(self.takes_self_ipis());
    }

    /// Whether the CPU sends the guest's interrupts to itself. They are edge-triggered, but the CPU leaves the trigger mode of
    /// their vector as it was, and the vector's end would exit still (SDM vol. 3 section 30.1.5). So it does while none is
    /// level-triggered.
    fn takes_self_ipis(&self) -> bool {
        self.mode == Some(Mode::X2Apic) && self.delivers(Mode::X2Apic) && self.eoi_exits == [0; 4]
    }

    /// Pin-based and secondary controls for `mode`.
    fn mode_controls(&self, mode: Mode) -> (u32, u32) {
        let (mut pin, mut secondary) = self.controls;
        if self.delivers(mode) {
            secondary |= secondary::APIC_REGISTERS | secondary::INTERRUPT_DELIVERY;
            if mode == Mode::X2Apic {
                secondary |= secondary::X2APIC_MODE;
            }
            if self.support >= ApicSupport::Posted {
                pin |= pin::POSTED_INTERRUPTS;
            }
        }
        (pin, secondary)
    }

    /// What follows from the sets of vectors.
    fn show_vectors<H: X86Hal>(&mut self, vmcs: &mut Vmcs, lapic: &Lapic<H>, bitmap: &mut MsrBitmap<H>) {
        let (requested, in_service) = lapic.interrupt_status();
        vmcs.write(Field::GuestInterruptStatus, u64::from(in_service) << 8 | u64::from(requested));
        let levels = lapic.level_vectors();
        if levels != self.eoi_exits {
            self.eoi_exits = levels;
            for (field, vectors) in EOI_EXITS.into_iter().zip(levels) {
                vmcs.write(field, vectors);
            }
            bitmap.virtualize_self_ipi(self.takes_self_ipis());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn virtual_apic(support: ApicSupport) -> VirtualApic {
        VirtualApic { support, controls: (0x16, 0x82), ..VirtualApic::default() }
    }

    #[test]
    fn controls_follow_the_mode() {
        const DELIVERY: u32 = secondary::APIC_REGISTERS | secondary::INTERRUPT_DELIVERY;
        for (support, mode, pin, secondary) in [
            (ApicSupport::TaskPriority, Mode::X2Apic, 0, 0),
            (ApicSupport::Delivery, Mode::Disabled, 0, 0),
            (ApicSupport::Delivery, Mode::XApic, 0, DELIVERY),
            (ApicSupport::Delivery, Mode::X2Apic, 0, DELIVERY | secondary::X2APIC_MODE),
            (ApicSupport::Posted, Mode::Disabled, 0, 0),
            (ApicSupport::Posted, Mode::X2Apic, pin::POSTED_INTERRUPTS, DELIVERY | secondary::X2APIC_MODE),
        ] {
            let virtual_apic = virtual_apic(support);
            assert_eq!(virtual_apic.mode_controls(mode), (0x16 | pin, 0x82 | secondary), "{support:?} {mode:?}");
            assert_eq!(virtual_apic.delivers(mode), secondary != 0);
        }
    }

    #[test]
    fn self_ipis_exit_while_a_vector_is_level_triggered() {
        let mut apic = VirtualApic { mode: Some(Mode::X2Apic), ..virtual_apic(ApicSupport::Delivery) };
        assert!(apic.takes_self_ipis());
        apic.eoi_exits[3] = 1;
        assert!(!apic.takes_self_ipis());
        apic = VirtualApic { mode: Some(Mode::XApic), ..virtual_apic(ApicSupport::Delivery) };
        assert!(!apic.takes_self_ipis(), "the register is the x2APIC's");
        apic = VirtualApic { mode: Some(Mode::X2Apic), ..virtual_apic(ApicSupport::TaskPriority) };
        assert!(!apic.takes_self_ipis());
    }

    #[test]
    fn cr8_exits_unless_it_is_shadowed() {
        let exits = primary::HLT | primary::CR8_LOAD | primary::CR8_STORE;
        assert_eq!(virtual_apic(ApicSupport::None).primary(exits), exits);
        for support in [ApicSupport::TaskPriority, ApicSupport::Delivery, ApicSupport::Posted] {
            assert_eq!(virtual_apic(support).primary(exits), primary::HLT | primary::TPR_SHADOW);
        }
    }
}
