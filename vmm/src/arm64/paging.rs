// SPDX-License-Identifier: MIT OR Apache-2.0
//! The walker of a guest's stage 1: virtual address in, guest physical address out (Arm ARM D8.2, "Translation process").
//!
//! It knows the three granules with 48-bit and, where a guest has switched it on (TCR_EL1.DS, and IPS with 64 KiB pages),
//! 52-bit addresses. What the tables allow is told with the address, for whom the CPU has not looked at it already.

use axvcpu_uapi::addr::{GuestPhysAddr, GuestVirtAddr};
use axvcpu_uapi::arm64::System;

/// SCTLR_EL1.M: the MMU is on.
const SCTLR_M: u64 = 1 << 0;
/// TCR_EL1.DS: 52-bit addresses with granules of 4 and 16 KiB.
const TCR_DS: u64 = 1 << 59;
/// TCR_EL1.IPS of 52-bit addresses.
const IPS_52: u64 = 0b110;
/// Which half of the address space a virtual address is in, also where its highest byte is a tag.
const HALF_BIT: u32 = 55;
/// The bits of an address that TTBR0_EL1 and a descriptor with 48-bit addresses may have.
const ADDRESS_48: u64 = (1 << 48) - 1;

/// Why an address cannot be accessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The guest's tables end before it.
    #[error("{at} is not mapped by the guest's page tables")]
    Unmapped {
        /// The virtual address.
        at: GuestVirtAddr,
        /// The level at which they end.
        level: i8,
    },
    /// Its entry has the access flag clear.
    #[error("the access flag is clear in the guest's page tables for {at}")]
    NotAccessed {
        /// The virtual address.
        at: GuestVirtAddr,
        /// The entry's level.
        level: i8,
    },
    /// They do not allow this access.
    #[error("the guest's page tables do not allow the access to {at}")]
    Denied {
        /// The virtual address.
        at: GuestVirtAddr,
        /// The entry's level.
        level: i8,
    },
    /// A table is no memory.
    #[error("the guest's page tables for {at} lie at {table}, where there is no memory")]
    NoTable {
        /// The virtual address.
        at: GuestVirtAddr,
        /// The entry's.
        table: GuestPhysAddr,
    },
}

impl Fault {
    /// Where, and by which fault status code (ESR_EL1.DFSC, Arm ARM D24.2.37), the CPU reports it to the guest. A table that
    /// is no memory is no fault of this stage.
    #[must_use]
    pub fn status(&self) -> Option<(GuestVirtAddr, u64)> {
        match *self {
            Self::Unmapped { at, level: -1 } => Some((at, 0b10_1011)),
            Self::Unmapped { at, level } => Some((at, 0b00_0100 | level as u64)),
            Self::NotAccessed { at, level } => Some((at, 0b00_1000 | level as u64)),
            Self::Denied { at, level } => Some((at, 0b00_1100 | level as u64)),
            Self::NoTable { .. } => None,
        }
    }
}

/// How an address is to be accessed, as far as it may be refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Manner {
    /// A write.
    pub write: bool,
    /// With the rights of EL0.
    pub unprivileged: bool,
    /// PSTATE.PAN: what EL0 may access, EL1 may not.
    pub pan: bool,
}

/// Where an address leads, and what the tables say of accesses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// The guest physical address.
    pub addr: GuestPhysAddr,
    at: GuestVirtAddr,
    /// The level of the entry.
    level: i8,
    accessed: bool,
    writable: bool,
    /// Whether EL0 may access it.
    user: bool,
    /// Whether PSTATE.PAN concerns it.
    guarded: bool,
}

impl Translation {
    /// Whether the address may be accessed so. Entries that the CPU would mark as accessed or as written by itself
    /// (TCR_EL1.HA, HD) count as what they are without that: to a guest a fault there is nothing new.
    ///
    /// # Errors
    /// [`Fault::NotAccessed`], [`Fault::Denied`].
    pub fn check(&self, manner: Manner) -> Result<(), Fault> {
        let Self { at, level, .. } = *self;
        let allowed = if manner.unprivileged { self.user } else { !(manner.pan && self.guarded) };
        match (self.accessed, allowed && (self.writable || !manner.write)) {
            (false, _) => Err(Fault::NotAccessed { at, level }),
            (true, false) => Err(Fault::Denied { at, level }),
            (true, true) => Ok(()),
        }
    }
}

/// Bits of a descriptor: EL0 has access, writes are refused, it has been accessed, EL0 cannot execute it.
const USER: u64 = 1 << 6;
const READ_ONLY: u64 = 1 << 7;
const ACCESSED: u64 = 1 << 10;
const USER_EXECUTE_NEVER: u64 = 1 << 54;
/// Bits of a table's descriptor, for all that is behind it: EL0 cannot execute, EL0 has no access, writes are refused.
const TABLE_USER_EXECUTE_NEVER: u64 = 1 << 60;
const TABLE_NO_USER: u64 = 1 << 61;
const TABLE_READ_ONLY: u64 = 1 << 62;
/// SCTLR_EL1.EPAN: PSTATE.PAN concerns also what EL0 may execute only.
const SCTLR_EPAN: u64 = 1 << 57;

/// The registers by which a guest's addresses are translated.
#[derive(Clone, Copy, Debug)]
pub struct Stage1 {
    on: bool,
    epan: bool,
    tcr: u64,
    ttbr: [u64; 2],
}

/// One half of the address space.
struct Half {
    /// Bits of an offset in a page.
    granule: u32,
    /// Bits of a virtual address that are translated.
    input: u32,
    /// Whether the highest byte is a tag.
    tagged: bool,
    /// Whether descriptors have 52-bit addresses.
    wide: bool,
    /// Whether a table's descriptor says nothing of accesses.
    flat: bool,
}

impl Stage1 {
    /// Of a vCPU with these registers.
    #[must_use]
    pub fn new(system: &System) -> Self {
        let System { sctlr_el1, tcr_el1, ttbr0_el1, ttbr1_el1, .. } = *system;
        let (on, epan) = (sctlr_el1 & SCTLR_M != 0, sctlr_el1 & SCTLR_EPAN != 0);
        Self { on, epan, tcr: tcr_el1, ttbr: [ttbr0_el1, ttbr1_el1] }
    }

    /// Translates `at`. `read` reads an entry of a table, if there is memory.
    ///
    /// # Errors
    /// [`Fault::Unmapped`], [`Fault::NoTable`].
    pub fn translate(
        &self,
        at: GuestVirtAddr,
        read: impl Fn(GuestPhysAddr) -> Option<u64>,
    ) -> Result<Translation, Fault> {
        let address = at.as_u64();
        if !self.on {
            let addr = GuestPhysAddr::new(address & ((1 << HALF_BIT) - 1));
            return Ok(Translation { addr, at, level: 0, accessed: true, writable: true, user: true, guarded: false });
        }
        let high = address >> HALF_BIT & 1;
        let half = self.half(high == 1).ok_or(Fault::Unmapped { at, level: 0 })?;
        // All bits above those that are translated are those of the half, tags aside.
        let top = if half.tagged { 56 } else { 64 };
        let extended = if high == 1 { u64::MAX } else { 0 };
        if (address ^ extended) & mask(top) & !mask(half.input) != 0 {
            return Err(Fault::Unmapped { at, level: 0 });
        }
        let stride = half.granule - 3;
        let levels = (half.input - half.granule).div_ceil(stride);
        let mut table = half.root(self.ttbr[high as usize]);
        let mut limits = 0;
        for remaining in (0..levels).rev() {
            let (shift, level) = (half.granule + remaining * stride, 3 - remaining as i8);
            // The first table may be a part of a page.
            let bits = stride.min(half.input - shift);
            let entry = GuestPhysAddr::new(table | (address >> shift & mask(bits)) << 3);
            let entry = read(entry).ok_or(Fault::NoTable { at, table: entry })?;
            // Bit 1 tells tables from blocks, and is set in an entry for a page.
            match (entry & 0b11, remaining) {
                (0b11, 0) | (0b01, 1..) => {
                    let page = half.output(entry) & !mask(shift);
                    let user = entry & USER != 0 && limits & TABLE_NO_USER == 0;
                    let user_executes = entry & USER_EXECUTE_NEVER == 0 && limits & TABLE_USER_EXECUTE_NEVER == 0;
                    return Ok(Translation {
                        addr: GuestPhysAddr::new(page | address & mask(shift)),
                        at,
                        level,
                        accessed: entry & ACCESSED != 0,
                        writable: entry & READ_ONLY == 0 && limits & TABLE_READ_ONLY == 0,
                        user,
                        guarded: user || self.epan && user_executes,
                    });
                }
                (0b11, _) => {
                    table = half.output(entry) & !mask(half.granule);
                    limits |= if half.flat { 0 } else { entry };
                }
                _ => return Err(Fault::Unmapped { at, level }),
            }
        }
        Err(Fault::Unmapped { at, level: 3 })
    }

    /// What TCR_EL1 says of a half, if it is translated at all. (HPD0, HPD1: tables limit nothing.)
    fn half(&self, high: bool) -> Option<Half> {
        let field = |lower: u32, upper: u32, bits: u32| (self.tcr >> if high { upper } else { lower }) & mask(bits);
        // EPDn: no walks.
        if field(7, 23, 1) != 0 {
            return None;
        }
        let granule = match (high, field(14, 30, 2)) {
            (false, 0b00) | (true, 0b10) => 12,
            (false, 0b10) | (true, 0b01) => 14,
            (false, 0b01) | (true, 0b11) => 16,
            _ => return None,
        };
        let ds = self.tcr & TCR_DS != 0;
        let most = if ds || granule == 16 { 52 } else { 48 };
        // TnSZ, which the CPU takes for its least or greatest value if it is beyond (Arm ARM D8.2.5).
        let input = (64 - field(0, 16, 6) as u32).clamp(16.max(granule + 1), most);
        let wide = if granule == 16 { self.tcr >> 32 & 0b111 == IPS_52 } else { ds };
        Some(Half { granule, input, tagged: field(37, 38, 1) != 0, wide, flat: field(41, 42, 1) != 0 })
    }
}

impl Half {
    /// The first table's address in a TTBR: 52-bit addresses have their highest bits in 5:2 (Arm ARM D24.2.190). It is aligned
    /// to the table's size.
    fn root(&self, ttbr: u64) -> u64 {
        let stride = self.granule - 3;
        let below = (self.input - self.granule - 1) / stride * stride + self.granule;
        let aligned = if self.wide { 6 } else { 0 }.max(self.input - below + 3);
        let high = if self.wide { (ttbr >> 2 & 0xf) << 48 } else { 0 };
        ttbr & ADDRESS_48 & !mask(aligned) | high
    }

    /// A descriptor's address (Arm ARM D8.3.1): with 52 bits the highest are in 15:12, or in 9:8 under 49:48.
    fn output(&self, entry: u64) -> u64 {
        let low = entry & ADDRESS_48 & !mask(self.granule);
        match (self.wide, self.granule) {
            (false, _) => low,
            (true, 16) => low | (entry >> 12 & 0xf) << 48,
            (true, _) => low | entry & (0b11 << 48) | (entry >> 8 & 0b11) << 50,
        }
    }
}

/// That many low bits.
const fn mask(bits: u32) -> u64 {
    match 1u64.checked_shl(bits) {
        Some(bit) => bit - 1,
        None => u64::MAX,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    /// Entries by address.
    type Tables = HashMap<u64, u64>;

    fn stage1(tcr_el1: u64, ttbr: [u64; 2]) -> Stage1 {
        let [ttbr0_el1, ttbr1_el1] = ttbr;
        Stage1::new(&System { sctlr_el1: SCTLR_M, tcr_el1, ttbr0_el1, ttbr1_el1, ..System::default() })
    }

    fn walk(stage1: &Stage1, tables: &Tables, at: u64) -> Result<u64, Fault> {
        let read = |at: GuestPhysAddr| tables.get(&at.as_u64()).copied();
        stage1.translate(GuestVirtAddr::new(at), read).map(|translation| translation.addr.as_u64())
    }

    #[test]
    fn without_a_mmu_addresses_are_what_they_are() {
        let stage1 = Stage1::new(&System::default());
        assert_eq!(walk(&stage1, &Tables::new(), 0x900_0010), Ok(0x900_0010));
    }

    /// TG0 and TG1 of a granule.
    fn granules(granule: u64) -> (u64, u64) {
        match granule {
            12 => (0b00 << 14, 0b10 << 30),
            14 => (0b10 << 14, 0b01 << 30),
            _ => (0b01 << 14, 0b11 << 30),
        }
    }

    #[test]
    fn every_granule_and_width_in_both_halves() {
        for (granule, inputs) in [(12, 25..=48), (14, 25..=48), (16, 25..=48)] {
            for input in inputs {
                let (tg0, tg1) = granules(granule);
                let size = (64 - input) | (64 - input) << 16;
                let stage1 = stage1(size | tg0 | tg1, [0x1_0000 | 1, 0x2_0000 | 0xabcd << 48]);
                let at = 0x5a5a_5a5a_5a5a & ((1 << input) - 1);
                for (root, address) in [(0x1_0000, at), (0x2_0000, at | !((1 << input) - 1))] {
                    // Each level's index in the address, the last one first.
                    let mut indices = Vec::new();
                    let (mut shift, stride) = (granule, granule - 3);
                    while shift < input {
                        indices.push(at >> shift & ((1 << stride.min(input - shift)) - 1));
                        shift += stride;
                    }
                    let (mut tables, mut table) = (Tables::new(), root);
                    for (level, index) in indices.iter().enumerate().rev() {
                        let next = 0x10_0000 * (level as u64 + 1);
                        // Attributes around the address.
                        tables.insert(table + 8 * index, next | 3 | 0x7fc | 0xfff << 52);
                        table = next;
                    }
                    let expected = 0x10_0000 | at & ((1 << granule) - 1);
                    assert_eq!(walk(&stage1, &tables, address), Ok(expected), "{granule} {input} {address:#x}");
                    // One bit more than is translated.
                    if input < 48 {
                        let beyond = address ^ 1 << input;
                        let unmapped = Fault::Unmapped { at: GuestVirtAddr::new(beyond), level: 0 };
                        assert_eq!(walk(&stage1, &tables, beyond), Err(unmapped));
                    }
                }
            }
        }
    }

    /// TCR_EL1: 39-bit addresses below, 4 KiB granule, nothing above (EPD1).
    const SMALL: u64 = 25 | 1 << 23;

    #[test]
    fn blocks_end_the_walk() {
        let tables = Tables::from([(0x1008, 0x8000_0000 | 1), (0x1010, 0x2003), (0x2008, 0x4020_0000 | 1)]);
        let stage1 = stage1(SMALL, [0x1000, 0]);
        assert_eq!(walk(&stage1, &tables, 0x7fff_ffff), Ok(0xbfff_ffff));
        assert_eq!(walk(&stage1, &tables, 0x8020_1234), Ok(0x4020_1234));
    }

    #[test]
    fn what_is_not_mapped() {
        // At the last level an entry without bit 1 is reserved.
        let tables =
            Tables::from([(0x1000, 0x2003), (0x1008, 0x9_9003), (0x1010, 0), (0x2000, 0x3003), (0x3000, 0x4001)]);
        let below = stage1(SMALL, [0x1000, 0]);
        let unmapped = |at, level| Err(Fault::Unmapped { at: GuestVirtAddr::new(at), level });
        assert_eq!(walk(&below, &tables, 0), unmapped(0, 3));
        assert_eq!(walk(&below, &tables, 0x8000_0000), unmapped(0x8000_0000, 1));
        let (at, table) = (GuestVirtAddr::new(0x4000_0000), GuestPhysAddr::new(0x9_9000));
        assert_eq!(walk(&below, &tables, 0x4000_0000), Err(Fault::NoTable { at, table }));
        assert_eq!(walk(&below, &tables, 1 << 39), unmapped(1 << 39, 0));
        assert_eq!(walk(&below, &tables, u64::MAX), unmapped(u64::MAX, 0), "EPD1");
        // A tag is a part of the address unless TBI0 says otherwise.
        let tables = Tables::from([(0x1000, 0x4000_0001)]);
        let tag = 0x5a << 56;
        assert_eq!(walk(&below, &tables, tag | 5), unmapped(tag | 5, 0));
        assert_eq!(walk(&stage1(SMALL | 1 << 37, [0x1000, 0]), &tables, tag | 5), Ok(0x4000_0005));
    }

    #[test]
    fn what_tables_and_pages_allow() {
        // Reads and writes of EL1, reads and writes of EL0, reads of EL1 with PAN: as letters.
        let manners = [(false, false, 'r'), (true, false, 'w'), (false, true, 'u'), (true, true, 'v')];
        let allowed = |stage1: &Stage1, tables: &Tables| -> String {
            let read = |at: GuestPhysAddr| tables.get(&at.as_u64()).copied();
            let translation = stage1.translate(GuestVirtAddr::new(0x1000), read).unwrap();
            let manner = |(write, unprivileged, letter)| (Manner { write, unprivileged, pan: false }, letter);
            let pan = (Manner { write: false, unprivileged: false, pan: true }, 'p');
            let all = manners.map(manner).into_iter().chain([pan]);
            all.filter(|(manner, _)| translation.check(*manner).is_ok()).map(|(_, letter)| letter).collect()
        };
        let page = 0x9000 | ACCESSED | 3;
        let (small, flat) = (stage1(SMALL, [0x1000, 0]), stage1(SMALL | 1 << 41, [0x1000, 0]));
        let epan = Stage1 { epan: true, ..small };
        for (entry, table, by, expected) in [
            (page, 0, small, "rwp"),
            (page | USER, 0, small, "rwuv"),
            (page | READ_ONLY, 0, small, "rp"),
            (page | READ_ONLY | USER, 0, small, "ru"),
            (page & !ACCESSED | USER, 0, small, ""),
            // From a table, unless they are not looked at.
            (page | USER, TABLE_READ_ONLY, small, "ru"),
            (page | USER, TABLE_NO_USER, small, "rwp"),
            (page | USER, TABLE_NO_USER | TABLE_READ_ONLY, small, "rp"),
            (page | USER, TABLE_NO_USER | TABLE_READ_ONLY, flat, "rwuv"),
            // What EL0 may execute is guarded, too, if the guest wants that.
            (page, 0, epan, "rw"),
            (page | USER_EXECUTE_NEVER, 0, epan, "rwp"),
            (page, TABLE_USER_EXECUTE_NEVER, epan, "rwp"),
        ] {
            for level in [0x1000, 0x2000] {
                let mut tables = Tables::from([(0x1000, 0x2003), (0x2000, 0x3003), (0x3008, entry)]);
                *tables.get_mut(&level).unwrap() |= table;
                assert_eq!(allowed(&by, &tables), expected, "{entry:#x} behind {table:#x}");
            }
        }
    }

    #[test]
    fn faults_have_the_status_codes_of_the_architecture() {
        let at = GuestVirtAddr::new(0x1000);
        for (fault, code) in [
            (Fault::Unmapped { at, level: -1 }, 0x2b),
            (Fault::Unmapped { at, level: 0 }, 0x04),
            (Fault::Unmapped { at, level: 3 }, 0x07),
            (Fault::NotAccessed { at, level: 2 }, 0x0a),
            (Fault::Denied { at, level: 3 }, 0x0f),
        ] {
            assert_eq!(fault.status(), Some((at, code)), "{fault:?}");
        }
        assert_eq!(Fault::NoTable { at, table: GuestPhysAddr::new(0) }.status(), None);
    }

    #[test]
    fn wide_addresses() {
        // 4 KiB pages with 52-bit addresses: five levels, and the root's high bits in the TTBR's low ones.
        let table = |number: u64| 0xa_0000_0000_0000 | number << 12;
        // Bits 49:12, and 51:50 in 9:8.
        let entry = |address: u64| address & ((1 << 50) - 1) | address >> 50 << 8 | 3;
        let at = 0x8_1234_5678_9abc_u64;
        let mut tables = Tables::new();
        for level in 0..5 {
            let next = if level == 0 { 0xf_edcb_a987_6000 } else { table(level) };
            tables.insert(table(level + 1) | (at >> (12 + 9 * level) & 0x1ff) << 3, entry(next));
        }
        let ttbr = table(5) & ADDRESS_48 | table(5) >> 48 << 2;
        // The first table of 52-bit addresses has 16 entries.
        let wide = stage1(12 | TCR_DS | 1 << 23, [ttbr, 0]);
        assert_eq!(walk(&wide, &tables, at), Ok(0xf_edcb_a987_6abc));
        // 64 KiB pages: bits 51:48 in 15:12.
        let (tables, tcr) =
            (Tables::from([(0x1_0000, 0x2_0003), (0x2_0000, 0x3_0003), (0x3_0008, 0x5_f003)]), 12 | 1 << 14);
        let wide = stage1(tcr | IPS_52 << 32 | 1 << 23, [0x1_0000, 0]);
        assert_eq!(walk(&wide, &tables, 0x1_abcd), Ok(0xf_0000_0005_abcd));
        let narrow = stage1(tcr | 0b101 << 32 | 1 << 23, [0x1_0000, 0]);
        assert_eq!(walk(&narrow, &tables, 0x1_abcd), Ok(0x5_abcd));
    }
}
