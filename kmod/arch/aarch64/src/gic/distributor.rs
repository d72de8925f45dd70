// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! [`Distributor`]: all interrupts of a VM, the private ones of its vCPUs among them; who gets an SPI, SGIs, and messages.

use core::sync::atomic::{AtomicU32, AtomicU8, Ordering::SeqCst};

use axvcpu_uapi::arm64 as abi;
use vcpu_core::{AxError, AxResult};

use super::bank::{assign, bits, Bank};

/// Number of INTIDs.
pub const INTIDS: usize = abi::GIC_INTIDS as usize;
/// vCPUs, at most.
pub const MAX_CPUS: usize = 64;
/// INTIDs of SPIs start here; SGIs and PPIs are below.
pub(super) const FIRST_SPI: usize = 32;
/// Banks of SPIs.
pub(super) const SPI_BANKS: usize = INTIDS / 32 - 1;
const SPIS: usize = INTIDS - FIRST_SPI;

/// `GICD_CTLR`: the bits that software may set: EnableGrp0 and EnableGrp1, with one security state.
pub(super) const CONTROL_GROUPS: u32 = 3;

/// Where the registers are, and for how many vCPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Guest physical address of the distributor.
    pub(super) distributor: u64,
    /// Guest physical address of vCPU 0's redistributor.
    pub(super) redistributors: u64,
    /// Redistributors.
    pub(super) cpus: usize,
}

impl Layout {
    /// What the program asks for, in a guest whose physical addresses end at `limit`.
    ///
    /// # Errors
    /// [`AxError::InvalidInput`] if it is not possible.
    pub fn new(gic: &abi::Gic, limit: u64) -> AxResult<Self> {
        const ALIGNED: u64 = 0xffff;
        let cpus = gic.cpus as usize;
        if gic.flags != 0 || cpus == 0 || cpus > MAX_CPUS || (gic.distributor | gic.redistributors) & ALIGNED != 0 {
            return Err(AxError::InvalidInput);
        }
        let end =
            |start: u64, size: u64| start.checked_add(size).filter(|end| *end <= limit).ok_or(AxError::InvalidInput);
        let distributor_end = end(gic.distributor, abi::GIC_DISTRIBUTOR_SIZE)?;
        let redistributors_end = end(gic.redistributors, abi::GIC_REDISTRIBUTOR_SIZE.wrapping_mul(gic.cpus.into()))?;
        if gic.distributor < redistributors_end && gic.redistributors < distributor_end {
            return Err(AxError::InvalidInput);
        }
        Ok(Self { distributor: gic.distributor, redistributors: gic.redistributors, cpus })
    }
}

/// All interrupts of a VM.
#[repr(C)]
#[derive(Debug)]
pub struct Distributor {
    pub(super) layout: Layout,
    pub(super) control: AtomicU32,
    pub(super) spis: [Bank; SPI_BANKS],
    /// GICD_IROUTER of each SPI, of which Aff3 is always 0.
    pub(super) routes: [AtomicU32; SPIS],
    /// Number of the vCPU that has the SPI in its list registers or active, plus one; or 0.
    holders: [AtomicU8; SPIS],
    private: [Bank; MAX_CPUS],
}

impl Distributor {
    /// Makes it, from all zero, what it is after a reset.
    pub(super) fn reset(&mut self, layout: Layout) {
        self.layout = layout;
        for bank in &mut self.private {
            // SGIs are edge-triggered.
            *bank.edge.get_mut() = 0xffff;
        }
    }

    /// vCPUs that it is for.
    #[inline]
    pub fn cpus(&self) -> usize {
        self.layout.cpus
    }

    /// Groups that are forwarded to the CPU interfaces, as bits.
    #[inline]
    pub(super) fn groups(&self) -> u32 {
        self.control.load(SeqCst) & CONTROL_GROUPS
    }

    /// SGIs and PPIs of a vCPU.
    #[inline]
    pub(super) fn private(&self, cpu: usize) -> Option<&Bank> {
        self.private.get(cpu)
    }

    /// The bank that vCPU `cpu` sees interrupt `intid` in, and the interrupt's bit.
    pub(super) fn find(&self, cpu: usize, intid: usize) -> Option<(&Bank, u32)> {
        let bank = match (intid / 32).checked_sub(1) {
            None => self.private(cpu),
            Some(index) => self.spis.get(index),
        };
        Some((bank?, 1 << (intid % 32)))
    }

    /// The vCPU with the affinity in the form of GICD_IROUTER and ICC_SGI1R (Aff3 in bits 39:32, Aff2 in 23:16, Aff1 in 15:8,
    /// Aff0 in 7:0).
    pub(super) fn cpu_of(&self, affinity: u64) -> Option<usize> {
        let cpu = (affinity >> 8 & 0xff) as usize * 16 + (affinity & 15) as usize;
        (affinity & 0xff_00ff_00f0 == 0 && cpu < self.cpus()).then_some(cpu)
    }

    /// The affinity of a vCPU: Aff1 and Aff0.
    pub(super) const fn affinity_of(cpu: usize) -> u64 {
        (cpu as u64 >> 4) << 8 | cpu as u64 & 15
    }

    /// The vCPU that SPI `intid` is routed to.
    pub(super) fn target(&self, intid: usize) -> Option<usize> {
        let route = self.routes.get(intid.checked_sub(FIRST_SPI)?)?;
        self.cpu_of(route.load(SeqCst).into())
    }

    fn holder_cell(&self, intid: usize) -> Option<&AtomicU8> {
        self.holders.get(intid.checked_sub(FIRST_SPI)?)
    }

    /// The vCPU that holds SPI `intid`.
    pub(super) fn holder(&self, intid: usize) -> Option<usize> {
        usize::from(self.holder_cell(intid)?.load(SeqCst)).checked_sub(1)
    }

    /// vCPU `cpu` wants to hold SPI `intid`, which is routed to it. Whether it does.
    pub(super) fn hold(&self, cpu: usize, intid: usize) -> bool {
        let name = (cpu as u8).wrapping_add(1);
        self.target(intid) == Some(cpu)
            && self.holder_cell(intid).is_some_and(|cell| cell.compare_exchange(0, name, SeqCst, SeqCst).is_ok())
    }

    /// The holder of SPI `intid` lets go of it.
    pub(super) fn let_go(&self, intid: usize) {
        if let Some(cell) = self.holder_cell(intid) {
            cell.store(0, SeqCst);
        }
    }

    /// Tells who must look at the interrupts `changed` of SPI bank `index`.
    pub(super) fn changed(&self, index: usize, changed: u32, wake: &mut impl FnMut(usize)) {
        let Some(bank) = self.spis.get(index) else { return };
        let live = bank.pending() | bank.active.load(SeqCst);
        for bit in bits(changed) {
            let intid = FIRST_SPI + 32 * index + bit;
            let who = match self.holder(intid) {
                None if live >> bit & 1 != 0 => self.target(intid),
                holder => holder,
            };
            if let Some(cpu) = who {
                wake(cpu);
            }
        }
    }

    /// Whether a message of `data` to `address` is one for an SPI: then which, and whether it is to be set or cleared.
    pub fn message(&self, address: u64, data: u32) -> Option<(usize, bool)> {
        let intid = data as usize;
        let set = match address.checked_sub(self.layout.distributor)? {
            abi::GIC_SET_SPI => true,
            abi::GIC_CLEAR_SPI => false,
            _ => return None,
        };
        (FIRST_SPI..INTIDS).contains(&intid).then_some((intid, set))
    }

    /// A message for SPI `intid`: the line goes up or down, and with it an edge comes or is taken back. Whether there is
    /// such an SPI.
    pub fn signal(&self, intid: usize, set: bool, mut wake: impl FnMut(usize)) -> bool {
        let Some(index) = (intid / 32).checked_sub(1) else { return false };
        let Some(bank) = self.spis.get(index) else { return false };
        let bit = 1 << (intid % 32);
        if bank.edge.load(SeqCst) & bit != 0 {
            assign(&bank.latch, bit, set);
        } else {
            assign(&bank.line, bit, set);
        }
        if set {
            self.changed(index, bit, &mut wake);
        }
        true
    }

    /// The line of a private interrupt of vCPU `cpu`, by the vCPU's own thread.
    #[inline]
    pub fn set_private_line(&self, cpu: usize, intid: usize, high: bool) {
        if let (true, Some(bank)) = (intid < FIRST_SPI, self.private(cpu)) {
            let bit = 1 << intid;
            if (bank.line.load(SeqCst) & bit != 0) != high {
                assign(&bank.line, bit, high);
            }
        }
    }

    /// Whether a private interrupt of vCPU `cpu` is active.
    #[inline]
    pub fn is_private_active(&self, cpu: usize, intid: usize) -> bool {
        self.private(cpu).is_some_and(|bank| intid < FIRST_SPI && bank.active.load(SeqCst) >> intid & 1 != 0)
    }

    /// vCPU `sender` writes `value` to ICC_SGI1R_EL1 or, for `group` 0, to one of its siblings (IHI 0069 section 12.2.14): an
    /// SGI for those of the targets that have it in this group.
    pub fn send_sgi(&self, sender: usize, value: u64, group: u32, mut wake: impl FnMut(usize)) {
        let bit = 1u32 << (value >> 24 & 15);
        let to = |cpu: usize| {
            let Some(bank) = self.private(cpu) else { return };
            if (bank.group.load(SeqCst) & bit != 0) == (group == 1) {
                bank.latch.fetch_or(bit, SeqCst);
                wake(cpu);
            }
        };
        // IRM: all but the sender.
        if value >> 40 & 1 != 0 {
            (0..self.cpus()).filter(|cpu| *cpu != sender).for_each(to);
            return;
        }
        // Aff3 is in bits 55:48, Aff2 in 39:32, Aff1 in 23:16; the range selector (47:44) is beyond what GICD_TYPER.RSS says
        // is there.
        let affinity = (value >> 48 & 0xff) << 32 | (value >> 32 & 0xff) << 16 | (value >> 16 & 0xff) << 8;
        if value >> 44 & 15 == 0 {
            bits(value as u32 & 0xffff).filter_map(|aff0| self.cpu_of(affinity | aff0 as u64)).for_each(to);
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::boxed::Box;
    use std::vec;
    use std::vec::Vec;

    pub(in super::super) const LAYOUT: Layout =
        Layout { distributor: 0x800_0000, redistributors: 0x80a_0000, cpus: 20 };

    pub(in super::super) fn new() -> Box<Distributor> {
        let mut this = Box::new(Distributor {
            layout: LAYOUT,
            control: AtomicU32::new(0),
            spis: core::array::from_fn(|_| Bank::default()),
            routes: core::array::from_fn(|_| AtomicU32::new(0)),
            holders: core::array::from_fn(|_| AtomicU8::new(0)),
            private: core::array::from_fn(|_| Bank::default()),
        });
        this.reset(LAYOUT);
        this
    }

    #[test]
    fn layouts_that_are_not_possible_are_refused() {
        let good = abi::Gic { distributor: 0x800_0000, redistributors: 0x80a_0000, cpus: 2, flags: 0 };
        assert_eq!(Layout::new(&good, 1 << 40).map(|layout| layout.cpus), Ok(2));
        for bad in [
            abi::Gic { flags: 1, ..good },
            abi::Gic { cpus: 0, ..good },
            abi::Gic { cpus: 65, ..good },
            abi::Gic { distributor: 0x800_1000, ..good },
            abi::Gic { redistributors: 0x80a_1000, ..good },
            abi::Gic { redistributors: 0x800_0000, ..good },
            abi::Gic { redistributors: 0x7fe_0000, ..good }, // that of vCPU 1 is where the distributor is
            abi::Gic { distributor: 0x80d_0000, ..good },
            abi::Gic { distributor: 1 << 40, ..good },
            abi::Gic { redistributors: (1 << 40) - 0x2_0000, ..good },
            abi::Gic { distributor: !0xffff, ..good },
        ] {
            assert_eq!(Layout::new(&bad, 1 << 40), Err(AxError::InvalidInput), "{bad:x?}");
        }
        let below = abi::Gic { redistributors: 0x7fc_0000, ..good };
        assert!(Layout::new(&below, 1 << 40).is_ok());
    }

    #[test]
    fn affinities_name_vcpus() {
        let gic = new();
        for cpu in 0..20 {
            assert_eq!(gic.cpu_of(Distributor::affinity_of(cpu)), Some(cpu));
        }
        for nobody in [0x104, 0x10, 0x1_0000, 1 << 32, 0x200] {
            assert_eq!(gic.cpu_of(nobody), None, "{nobody:#x}");
        }
    }

    fn sgi(gic: &Distributor, sender: usize, value: u64, group: u32) -> Vec<usize> {
        let mut woken = vec![];
        gic.send_sgi(sender, value, group, |cpu| woken.push(cpu));
        woken
    }

    #[test]
    fn sgis_reach_whom_they_name() {
        let gic = new();
        for cpu in 0..20 {
            gic.private(cpu).unwrap().group.store(u32::MAX, SeqCst);
        }
        assert_eq!(sgi(&gic, 0, 0b1010 | 5 << 24, 1), [1, 3]);
        assert_eq!(gic.private(3).unwrap().pending(), 1 << 5);
        assert_eq!(sgi(&gic, 0, 0b1111_0011 | 1 << 16, 1), [16, 17], "Aff1 is 1, and there are 20 vCPUs");
        assert_eq!(sgi(&gic, 2, 1 << 40, 1).len(), 19, "all but the sender");
        assert_eq!(gic.private(2).unwrap().pending(), 0);
        for nobody in [1 | 1 << 32, 1 | 1 << 48, 1 | 1 << 44, 0] {
            assert!(sgi(&gic, 0, nobody, 1).is_empty(), "{nobody:#x}");
        }
        // The other group's registers do not make interrupts of this group.
        assert!(sgi(&gic, 0, 1, 0).is_empty());
        gic.private(0).unwrap().group.store(0, SeqCst);
        assert_eq!(sgi(&gic, 0, 1, 0), [0]);
        assert!(sgi(&gic, 0, 1, 1).is_empty());
    }

    #[test]
    fn messages_are_those_of_the_two_registers() {
        let gic = new();
        assert_eq!(gic.message(0x800_0040, 32), Some((32, true)));
        assert_eq!(gic.message(0x800_0048, 255), Some((255, false)));
        for (address, data) in [(0x800_0040, 31), (0x800_0040, 256), (0x800_0050, 32), (0x40, 32), (0x800_0000, 40)] {
            assert_eq!(gic.message(address, data), None, "{address:#x} {data}");
        }
    }

    #[test]
    fn lines_stay_and_edges_are_taken() {
        let gic = new();
        let bank = &gic.spis[0];
        let mut woken = vec![];
        assert!(gic.signal(33, true, |cpu| woken.push(cpu)));
        assert_eq!((bank.pending(), &woken[..]), (2, &[0][..]));
        gic.signal(33, false, |_| unreachable!());
        assert_eq!(bank.pending(), 0);
        bank.edge.store(2, SeqCst);
        gic.routes[1].store(0x101, SeqCst);
        gic.signal(33, true, |cpu| woken.push(cpu));
        assert_eq!((bank.latch.load(SeqCst), &woken[..]), (2, &[0, 17][..]));
        assert!(!gic.signal(31, true, |_| unreachable!()));
        assert!(!gic.signal(256, true, |_| unreachable!()));
    }

    #[test]
    fn an_spi_has_one_holder_and_changes_are_told_to_it() {
        let gic = new();
        assert!(gic.hold(0, 40) && !gic.hold(0, 40));
        gic.routes[8].store(1, SeqCst);
        assert!(!gic.hold(1, 40), "it is held");
        let mut woken = vec![];
        gic.signal(40, true, |cpu| woken.push(cpu));
        gic.let_go(40);
        assert!(!gic.hold(0, 40), "it is routed elsewhere");
        gic.signal(40, true, |cpu| woken.push(cpu));
        assert_eq!(woken, [0, 1]);
        assert!(gic.hold(1, 40));
    }
}
