// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The registers of distributor and redistributors, as a guest sees them (IHI 0069 sections 12.9 to 12.11): one security
//! state, affinity routing always on, SPIs by message, no LPIs, no extended ranges. What is reserved reads as zero and ignores
//! writes.

use core::sync::atomic::{AtomicU32, Ordering::SeqCst};

use axvcpu_uapi::arm64::{GIC_CLEAR_SPI, GIC_DISTRIBUTOR_SIZE, GIC_REDISTRIBUTOR_SIZE, GIC_SET_SPI};
use axvcpu_uapi::exit::AccessWidth;

use super::bank::{assign, bits, Bank};
use super::distributor::{Distributor, CONTROL_GROUPS, FIRST_SPI, INTIDS, SPI_BANKS};

/// An access of a guest's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// A read.
    Read,
    /// A write of this value.
    Write(u64),
}

/// `GICD_CTLR`: affinity routing is on, and there is one security state: both constant.
const CONTROL_CONSTANT: u32 = 1 << 4 | 1 << 6;
/// `GICD_TYPER`: the number of banks less one (bits 4:0), messages make SPIs (MBIS), INTIDs of 10 bits (IDbits), and no routing
/// to any one vCPU (No1N).
const TYPER: u32 = SPI_BANKS as u32 | 1 << 16 | 9 << 19 | 1 << 25;
/// `GICD_PIDR2` and `GICR_PIDR2`: a GICv3.
const PIDR2: u32 = 3 << 4;
const PIDR2_OFFSET: u64 = 0xffe8;

/// Where the frame of SGIs and PPIs starts in a redistributor.
const SGI_FRAME: u64 = 0x1_0000;

/// What an address is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Distributor(u64),
    /// The redistributor of a vCPU.
    Redistributor(usize, u64),
}

/// The registers that there are for each bank, from offset 0x80 on, with 32 words each.
#[derive(Clone, Copy)]
enum Kind {
    Group,
    Enabled { set: bool },
    Pending { set: bool },
    Active { set: bool },
}

impl Kind {
    fn at(offset: u64) -> Option<Self> {
        Some(match offset & !0x7f {
            0x080 => Self::Group,
            0x100 => Self::Enabled { set: true },
            0x180 => Self::Enabled { set: false },
            0x200 => Self::Pending { set: true },
            0x280 => Self::Pending { set: false },
            0x300 => Self::Active { set: true },
            0x380 => Self::Active { set: false },
            _ => return None,
        })
    }

    fn read(self, bank: &Bank) -> u32 {
        match self {
            Self::Group => bank.group.load(SeqCst),
            Self::Enabled { .. } => bank.enabled.load(SeqCst),
            Self::Pending { .. } => bank.pending(),
            Self::Active { .. } => bank.active.load(SeqCst),
        }
    }

    /// Writes, and returns the interrupts that may have changed.
    fn write(self, bank: &Bank, value: u32) -> u32 {
        match self {
            Self::Group => return bank.group.swap(value, SeqCst) ^ value,
            Self::Enabled { set } => assign(&bank.enabled, value, set),
            Self::Pending { set } => assign(&bank.latch, value, set),
            Self::Active { set: true } => bank.activate(value),
            Self::Active { set: false } => _ = bank.deactivate(value),
        }
        value
    }
}

/// `GICD_ICFGR`: two bits for each of 16 interrupts, of which the upper one says edge.
fn read_config(edge: u32, upper: bool) -> u32 {
    let half = if upper { edge >> 16 } else { edge & 0xffff };
    bits(half).fold(0, |word, bit| word | 2 << (2 * bit))
}

/// The edges that a write of `value` makes of `edge`.
fn write_config(edge: u32, upper: bool, value: u32) -> u32 {
    let half = (0..16).fold(0, |half, bit| half | (value >> (2 * bit + 1) & 1) << bit);
    if upper {
        edge & 0xffff | half << 16
    } else {
        edge & 0xffff_0000 | half
    }
}

impl Distributor {
    #[inline]
    fn place(&self, addr: u64) -> Option<Place> {
        let offset = addr.wrapping_sub(self.layout.distributor);
        if offset < GIC_DISTRIBUTOR_SIZE {
            return Some(Place::Distributor(offset));
        }
        let offset = addr.wrapping_sub(self.layout.redistributors);
        let cpu = (offset / GIC_REDISTRIBUTOR_SIZE) as usize;
        (cpu < self.cpus()).then_some(Place::Redistributor(cpu, offset % GIC_REDISTRIBUTOR_SIZE))
    }

    /// Whether there are registers at `addr`.
    #[inline]
    pub fn covers(&self, addr: u64) -> bool {
        self.place(addr).is_some()
    }

    /// Whether what is read at `addr` depends on what is in list registers: pending and active interrupts.
    pub fn shows_states(&self, addr: u64) -> bool {
        let offset = match self.place(addr) {
            Some(Place::Distributor(offset)) => Some(offset),
            Some(Place::Redistributor(_, offset)) => offset.checked_sub(SGI_FRAME),
            None => None,
        };
        matches!(offset.and_then(Kind::at), Some(Kind::Pending { .. } | Kind::Active { .. }))
    }

    /// Carries out the access to `addr` by a guest, and returns what a read gives (0 for a write), or `None` if there are no
    /// registers. The vCPUs that must look at their interrupts again are given to `wake`; the one that makes the access has put
    /// back what is in its list registers before, but for a read of what does not [show states](Self::shows_states).
    ///
    /// Words can be accessed as words, pairs of them as double words, and priorities as bytes. An access of another kind is
    /// ignored.
    pub fn access(&self, addr: u64, width: AccessWidth, access: Access, mut wake: impl FnMut(usize)) -> Option<u64> {
        let place = self.place(addr)?;
        let size = width.size() as u64;
        if addr & size.wrapping_sub(1) != 0 {
            return Some(0);
        }
        Some(match width {
            AccessWidth::Byte => self.byte(place, access, &mut wake).into(),
            AccessWidth::Word => 0,
            AccessWidth::Dword => self.word(place, access, &mut wake).into(),
            AccessWidth::Qword => {
                let (low, high) = match access {
                    Access::Read => (Access::Read, Access::Read),
                    Access::Write(value) => (Access::Write(value & 0xffff_ffff), Access::Write(value >> 32)),
                };
                let upper = match place {
                    Place::Distributor(offset) => Place::Distributor(offset | 4),
                    Place::Redistributor(cpu, offset) => Place::Redistributor(cpu, offset | 4),
                };
                u64::from(self.word(place, low, &mut wake)) | u64::from(self.word(upper, high, &mut wake)) << 32
            }
        })
    }

    fn word(&self, place: Place, access: Access, wake: &mut impl FnMut(usize)) -> u32 {
        match place {
            Place::Distributor(offset @ 0x400..=0x7ff) => self.priorities(None, offset & 0x3ff, access, wake),
            Place::Redistributor(cpu, offset @ 0x1_0400..=0x1_041f) => {
                self.priorities(Some(cpu), offset & 0x1f, access, wake)
            }
            Place::Distributor(offset) => self.distributor_word(offset, access, wake),
            Place::Redistributor(cpu, offset) => self.redistributor_word(cpu, offset, access, wake),
        }
    }

    fn distributor_word(&self, offset: u64, access: Access, wake: &mut impl FnMut(usize)) -> u32 {
        let index = (offset & 0x7f) as usize / 4;
        match (offset, access) {
            (0x000, Access::Read) => self.groups() | CONTROL_CONSTANT,
            (0x000, Access::Write(value)) => {
                self.control.store(value as u32 & CONTROL_GROUPS, SeqCst);
                (0..self.cpus()).for_each(wake);
                0
            }
            (0x004, Access::Read) => TYPER,
            (GIC_SET_SPI | GIC_CLEAR_SPI, Access::Write(value)) => {
                self.signal((value & 0x3ff) as usize, offset == GIC_SET_SPI, wake);
                0
            }
            (0x080..=0x3ff, _) => {
                // Bank 0 is the redistributors'.
                let Some(index) = index.checked_sub(1) else { return 0 };
                let (Some(bank), Some(kind)) = (self.spis.get(index), Kind::at(offset)) else { return 0 };
                match access {
                    Access::Read => kind.read(bank),
                    Access::Write(value) => {
                        let changed = kind.write(bank, value as u32);
                        self.changed(index, changed, wake);
                        0
                    }
                }
            }
            (0xc00..=0xcff, _) => {
                let word = (offset & 0xff) as usize / 4;
                let Some(index) = (word / 2).checked_sub(1) else { return 0 };
                let Some(bank) = self.spis.get(index) else { return 0 };
                match access {
                    Access::Read => read_config(bank.edge.load(SeqCst), word % 2 == 1),
                    Access::Write(value) => {
                        let edge = bank.edge.load(SeqCst);
                        let new = write_config(edge, word % 2 == 1, value as u32);
                        bank.edge.store(new, SeqCst);
                        self.changed(index, edge ^ new, wake);
                        0
                    }
                }
            }
            (0x6000..=0x7fff, _) => self.route(offset, access, wake),
            (PIDR2_OFFSET, Access::Read) => PIDR2,
            _ => 0,
        }
    }

    /// GICD_IROUTER: only its lower half, as Aff3 is always 0. The routing mode is always to the one vCPU named.
    fn route(&self, offset: u64, access: Access, wake: &mut impl FnMut(usize)) -> u32 {
        let intid = (offset & 0x1fff) as usize / 8;
        let cell = intid.checked_sub(FIRST_SPI).and_then(|index| self.routes.get(index));
        let (Some(cell), 0) = (cell, offset & 4) else { return 0 };
        match access {
            Access::Read => cell.load(SeqCst),
            Access::Write(value) => {
                cell.store(value as u32 & 0xff_ffff, SeqCst);
                self.changed(intid / 32 - 1, 1 << (intid % 32), wake);
                0
            }
        }
    }

    fn redistributor_word(&self, cpu: usize, offset: u64, access: Access, wake: &mut impl FnMut(usize)) -> u32 {
        if offset < SGI_FRAME {
            // GICR_WAKER is always awake, and GICR_CTLR has nothing to switch on.
            return match (offset, access) {
                (0x008, Access::Read) => (cpu as u32) << 8 | u32::from(cpu + 1 == self.cpus()) << 4,
                (0x00c, Access::Read) => Self::affinity_of(cpu) as u32,
                (PIDR2_OFFSET, Access::Read) => PIDR2,
                _ => 0,
            };
        }
        let Some(bank) = self.private(cpu) else { return 0 };
        match (offset - SGI_FRAME, access) {
            (offset @ 0x080..=0x3ff, _) if offset & 0x7f == 0 => match (Kind::at(offset), access) {
                (Some(kind), Access::Read) => kind.read(bank),
                (Some(kind), Access::Write(value)) => {
                    kind.write(bank, value as u32);
                    wake(cpu);
                    0
                }
                (None, _) => 0,
            },
            // SGIs are always edge-triggered.
            (0xc00, Access::Read) => read_config(bank.edge.load(SeqCst), false),
            (0xc04, Access::Read) => read_config(bank.edge.load(SeqCst), true),
            (0xc04, Access::Write(value)) => {
                update(&bank.edge, |edge| write_config(edge, true, value as u32));
                wake(cpu);
                0
            }
            (PIDR2_OFFSET, Access::Read) => PIDR2,
            _ => 0,
        }
    }

    /// The priority of interrupt `intid`: of vCPU `cpu`, or, if there is none, of the distributor.
    fn priority_of(&self, cpu: Option<usize>, intid: usize) -> Option<(&Bank, usize)> {
        let bank = match cpu {
            Some(cpu) => self.private(cpu),
            None => self.spis.get((intid / 32).checked_sub(1)?),
        };
        Some((bank?, intid % 32))
    }

    /// Four priorities from `intid` on.
    fn priorities(&self, cpu: Option<usize>, intid: u64, access: Access, wake: &mut impl FnMut(usize)) -> u32 {
        (0..4).fold(0, |word, byte| {
            let access = match access {
                Access::Read => Access::Read,
                Access::Write(value) => Access::Write(value >> (8 * byte) & 0xff),
            };
            word | u32::from(self.one_priority(cpu, (intid + byte) as usize, access, wake)) << (8 * byte)
        })
    }

    fn one_priority(&self, cpu: Option<usize>, intid: usize, access: Access, wake: &mut impl FnMut(usize)) -> u8 {
        let Some((bank, index)) = self.priority_of(cpu, intid) else { return 0 };
        match access {
            Access::Read => bank.priority(index),
            Access::Write(value) => {
                bank.set_priority(index, value as u8);
                match cpu {
                    Some(cpu) => wake(cpu),
                    None => self.changed(intid / 32 - 1, 1 << index, wake),
                }
                0
            }
        }
    }

    /// An access to a byte: only priorities have that.
    fn byte(&self, place: Place, access: Access, wake: &mut impl FnMut(usize)) -> u8 {
        match place {
            Place::Distributor(offset @ 0x400..=0x7ff) => {
                let intid = (offset & 0x3ff) as usize;
                if intid < INTIDS {
                    self.one_priority(None, intid, access, wake)
                } else {
                    0
                }
            }
            Place::Redistributor(cpu, offset @ 0x1_0400..=0x1_041f) => {
                self.one_priority(Some(cpu), (offset & 0x1f) as usize, access, wake)
            }
            _ => 0,
        }
    }
}

/// Replaces a word by what `change` makes of it.
fn update(word: &AtomicU32, change: impl Fn(u32) -> u32) {
    // The closure always gives a value, so this cannot fail.
    let _ = word.fetch_update(SeqCst, SeqCst, |old| Some(change(old)));
}

#[cfg(test)]
mod tests {
    use super::super::distributor::tests::{new, LAYOUT};
    use super::*;
    use std::vec;
    use std::vec::Vec;

    const GICD: u64 = LAYOUT.distributor;
    const GICR: u64 = LAYOUT.redistributors;

    fn read(gic: &Distributor, addr: u64, width: AccessWidth) -> u64 {
        gic.access(addr, width, Access::Read, |_| unreachable!("a read wakes nobody")).unwrap()
    }

    fn read32(gic: &Distributor, addr: u64) -> u64 {
        read(gic, addr, AccessWidth::Dword)
    }

    fn write(gic: &Distributor, addr: u64, width: AccessWidth, value: u64) -> Vec<usize> {
        let mut woken = vec![];
        assert_eq!(gic.access(addr, width, Access::Write(value), |cpu| woken.push(cpu)), Some(0));
        woken
    }

    fn write32(gic: &Distributor, addr: u64, value: u64) -> Vec<usize> {
        write(gic, addr, AccessWidth::Dword, value)
    }

    #[test]
    fn only_its_own_addresses() {
        let gic = new();
        let end = GICR + 20 * GIC_REDISTRIBUTOR_SIZE;
        for (addr, covered) in [
            (GICD - 1, false),
            (GICD, true),
            (GICD + 0xffff, true),
            (GICD + 0x1_0000, false),
            (GICR - 1, false),
            (GICR, true),
            (end - 1, true),
            (end, false),
            (0, false),
            (u64::MAX, false),
        ] {
            assert_eq!(gic.covers(addr), covered, "{addr:#x}");
        }
        assert_eq!(gic.access(end, AccessWidth::Dword, Access::Read, |_| ()), None);
    }

    #[test]
    fn it_says_what_it_is() {
        let gic = new();
        assert_eq!(read32(&gic, GICD) & 0x50, 0x50, "ARE and DS");
        let typer = read32(&gic, GICD + 4);
        assert_eq!(32 * ((typer & 31) + 1), 256, "INTIDs");
        assert_eq!(typer >> 17 & 1, 0, "no LPIs");
        assert_eq!((read32(&gic, GICD + 0xffe8) >> 4 & 15, read32(&gic, GICR + 0xffe8) >> 4 & 15), (3, 3));
        let typer = |cpu: u64| read(&gic, GICR + cpu * GIC_REDISTRIBUTOR_SIZE + 8, AccessWidth::Qword);
        assert_eq!(typer(0), 0);
        assert_eq!(typer(18), 0x102 << 32 | 18 << 8);
        assert_eq!(typer(19), 0x103 << 32 | 19 << 8 | 1 << 4, "the last");
        // Software clears ProcessorSleep and waits for ChildrenAsleep to be clear.
        write32(&gic, GICR + 0x14, 0);
        assert_eq!(read32(&gic, GICR + 0x14) & 6, 0);
    }

    #[test]
    fn control_keeps_the_groups() {
        let gic = new();
        assert_eq!(write32(&gic, GICD, 0xffff_ffff).len(), 20, "everybody looks");
        assert_eq!(read32(&gic, GICD), 0x53);
        write32(&gic, GICD, 0);
        assert_eq!(read32(&gic, GICD), 0x50);
    }

    #[test]
    fn banks_are_set_and_cleared() {
        let gic = new();
        for base in [GICD + 4, GICD + 7 * 4, GICR + 3 * GIC_REDISTRIBUTOR_SIZE + SGI_FRAME] {
            write32(&gic, base + 0x80, 0x1234_5678);
            assert_eq!(read32(&gic, base + 0x80), 0x1234_5678);
            for set in [0x100, 0x200, 0x300] {
                write32(&gic, base + set, 0xf0f0);
                write32(&gic, base + set + 0x80, 0x80);
                assert_eq!((read32(&gic, base + set), read32(&gic, base + set + 0x80)), (0xf070, 0xf070));
            }
        }
        // Bank 0 of the distributor, banks beyond the last, and those of a redistributor are not there.
        for nothing in [GICD + 0x100, GICD + 0x120, GICD + 0x17c, GICR + SGI_FRAME + 0x104] {
            write32(&gic, nothing, 0xffff);
            assert_eq!(read32(&gic, nothing), 0, "{nothing:#x}");
        }
    }

    #[test]
    fn priorities_are_bytes_of_five_bits() {
        let gic = new();
        for base in [GICD + 0x400 + 32, GICD + 0x400 + 252, GICR + SGI_FRAME + 0x400] {
            write32(&gic, base, 0xff_a7_40_08);
            assert_eq!(read32(&gic, base), 0xf8_a0_40_08);
            write(&gic, base + 1, AccessWidth::Byte, 0xff);
            assert_eq!(read32(&gic, base), 0xf8_a0_f8_08);
            assert_eq!(read(&gic, base + 2, AccessWidth::Byte), 0xa0);
        }
        for nothing in [GICD + 0x400, GICD + 0x400 + 256, GICD + 0x7fc, GICR + SGI_FRAME + 0x420] {
            write32(&gic, nothing, 0xffff_ffff);
            assert_eq!(read32(&gic, nothing), 0, "{nothing:#x}");
        }
    }

    #[test]
    fn configuration_is_two_bits_of_which_one_counts() {
        let gic = new();
        write32(&gic, GICD + 0xc08, 0b1011);
        assert_eq!(read32(&gic, GICD + 0xc08), 0b1010);
        write32(&gic, GICD + 0xc0c, 0x8000_0000);
        assert_eq!(gic.spis[0].edge.load(SeqCst), 0x8000_0003);
        let sgis = GICR + SGI_FRAME + 0xc00;
        write32(&gic, sgis, 0);
        assert_eq!(read32(&gic, sgis), 0xaaaa_aaaa, "SGIs are edges");
        write32(&gic, sgis + 4, 2 << 22);
        assert_eq!(read32(&gic, sgis + 4), 2 << 22);
        assert_eq!(gic.private(0).unwrap().edge.load(SeqCst), 1 << 27 | 0xffff);
    }

    #[test]
    fn routes_name_a_vcpu() {
        let gic = new();
        let route = GICD + 0x6000 + 8 * 40;
        assert_eq!(gic.target(40), Some(0));
        write(&gic, route, AccessWidth::Qword, 0x8000_0102);
        assert_eq!(read(&gic, route, AccessWidth::Qword), 0x102, "no routing to any one");
        assert_eq!(gic.target(40), Some(18));
        write(&gic, route, AccessWidth::Qword, 0x50);
        assert_eq!(gic.target(40), None);
        // The private ones, and those beyond the last, have none.
        for nothing in [GICD + 0x6000, GICD + 0x6000 + 8 * 256, GICD + 0x7ff8] {
            write(&gic, nothing, AccessWidth::Qword, 1);
            assert_eq!(read(&gic, nothing, AccessWidth::Qword), 0);
        }
    }

    #[test]
    fn who_gets_a_pending_interrupt_is_told_of_changes() {
        let gic = new();
        assert_eq!(write32(&gic, GICD + 0x104, 1 << 8), [], "nothing is pending");
        assert_eq!(write32(&gic, GICD + 0x204, 1 << 8), [0]);
        assert_eq!(write(&gic, GICD + 0x6000 + 8 * 40, AccessWidth::Qword, 3), [3]);
        assert_eq!(write(&gic, GICD + 0x400 + 40, AccessWidth::Byte, 0x80), [3]);
        assert!(gic.hold(3, 40));
        assert_eq!(write32(&gic, GICD + 0x284, 1 << 8), [3], "the holder has it in its list registers");
        assert_eq!(write32(&gic, GICD + 0x40, 40), [3], "a message of the guest's own");
        assert_eq!(write32(&gic, GICR + 2 * GIC_REDISTRIBUTOR_SIZE + SGI_FRAME + 0x200, 1), [2]);
    }

    #[test]
    #[cfg_attr(miri, ignore = "hours, of code that has nothing unsafe")]
    fn every_access_to_every_address_is_harmless() {
        let gic = new();
        for width in [AccessWidth::Byte, AccessWidth::Word, AccessWidth::Dword, AccessWidth::Qword] {
            for base in [GICD, GICR, GICR + 19 * GIC_REDISTRIBUTOR_SIZE, GICR + SGI_FRAME] {
                for offset in 0..0x1_0000 {
                    for access in [Access::Write(u64::MAX), Access::Read, Access::Write(0)] {
                        assert!(gic.access(base + offset, width, access, |cpu| assert!(cpu < 20)).is_some());
                    }
                }
            }
        }
    }
}
