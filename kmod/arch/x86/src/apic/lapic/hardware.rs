// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! What a CPU that works on the registers' page itself must know beside the page, and what it leaves to us (SDM vol. 3,
//! chapter 30).

use vcpu_core::{AxVCpuHal, HostPhysAddr};

use super::super::reg;
use super::access::ICR_MYSELF;
use super::{Clock, Effect, Lapic, Set};

impl<H: AxVCpuHal> Lapic<H> {
    /// Address of the registers' page. It stays the same.
    pub(crate) fn page(&self) -> HostPhysAddr {
        self.registers.phys()
    }

    /// Whether anybody but the hardware has changed the sets of vectors since this was asked last: then what follows from them
    /// is to be told anew.
    pub(crate) fn take_changed(&mut self) -> bool {
        core::mem::take(&mut self.changed)
    }

    /// The highest vector requested, and the highest in service; zero for none.
    pub(crate) fn interrupt_status(&self) -> (u8, u8) {
        let registers = &*self.registers;
        (registers.highest(Set::Requested).unwrap_or(0), registers.highest(Set::InService).unwrap_or(0))
    }

    /// The vectors whose end must be reported: vector `64 * i + b` is bit `b` of word `i`.
    pub(crate) fn level_vectors(&self) -> [u64; 4] {
        self.registers.words(Set::Level)
    }

    /// The priority class that the task priority must sink below for another interrupt to be delivered; zero for none.
    pub(crate) fn held_class(&self) -> u8 {
        let class = self.highest_request().unwrap_or(0) >> 4;
        if class <= self.cr8() {
            class
        } else {
            0
        }
    }

    /// The hardware has ended `vector`, as the guest told it to.
    pub(crate) fn ended_by_hardware(&self, vector: u8) -> Effect {
        self.ended(vector)
    }

    /// The hardware has stored what the guest wrote to the register at `offset`, and leaves it to us to carry it out.
    pub(crate) fn written_by_hardware(&mut self, offset: u16, clock: &dyn Fn() -> Clock) -> Effect {
        let value = self.registers.get(offset);
        match offset {
            reg::SELF_IPI => self.send(value & 0xff | ICR_MYSELF, 0),
            _ => self.write(offset, value, clock).unwrap_or(Effect::None),
        }
    }
}
