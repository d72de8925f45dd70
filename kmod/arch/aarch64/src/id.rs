// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The ID registers that a guest sees. A field is there only if this table lets it through, and then with at most the value
//! that is known to need nothing more of the world switch (Arm ARM D24.2, each register's section).

use axvcpu_uapi::arm64::system_register;

/// The ID registers of AArch64 that say something: op0 3, op1 0, CRn 0, and CRm and op2 as here.
const KNOWN: [(u64, u64); 9] = [PFR0, PFR1, DFR0, ISAR0, ISAR1, ISAR2, MMFR0, MMFR1, MMFR2];
const PFR0: (u64, u64) = (4, 0);
const PFR1: (u64, u64) = (4, 1);
const DFR0: (u64, u64) = (5, 0);
const ISAR0: (u64, u64) = (6, 0);
const ISAR1: (u64, u64) = (6, 1);
const ISAR2: (u64, u64) = (6, 2);
const MMFR0: (u64, u64) = (7, 0);
const MMFR1: (u64, u64) = (7, 1);
const MMFR2: (u64, u64) = (7, 2);

/// ID_AA64PFR0_EL1.GIC.
const PFR0_GIC: u32 = 24;

/// How a field of four bits gets its value.
#[derive(Clone, Copy)]
enum Field {
    /// The host's, but at most this.
    UpTo(u64),
    /// The host's, where 15 means "not there" and nothing else is above 1.
    Signed,
    /// This, whatever the host has.
    Fixed(u64),
}
use Field::{Fixed, Signed, UpTo};

/// What is let through: register, lowest bit of the field, value. Every other field is 0: not there.
const FIELDS: &[((u64, u64), u32, Field)] = &[
    // AArch64 only, at EL0 and EL1; no EL2 and EL3.
    (PFR0, 0, Fixed(1)),
    (PFR0, 4, Fixed(1)),
    (PFR0, 16, Signed),  // FP
    (PFR0, 20, Signed),  // AdvSIMD
    (PFR0, 48, UpTo(1)), // DIT
    (PFR0, 56, UpTo(1)), // CSV2: no SCXTNUM registers
    (PFR0, 60, UpTo(1)), // CSV3
    (PFR1, 0, UpTo(1)),  // BT
    (PFR1, 4, UpTo(2)),  // SSBS
    // Armv8 debug with the least number of breakpoints (2) and watchpoints (2) that there can be. They are trapped and
    // do nothing. No PMU, no trace, no profiling.
    (DFR0, 0, Fixed(6)),
    (DFR0, 12, Fixed(1)),
    (DFR0, 20, Fixed(1)),
    (ISAR0, 4, UpTo(2)),  // AES
    (ISAR0, 8, UpTo(1)),  // SHA1
    (ISAR0, 12, UpTo(2)), // SHA2
    (ISAR0, 16, UpTo(1)), // CRC32
    (ISAR0, 20, UpTo(3)), // Atomic
    (ISAR0, 28, UpTo(1)), // RDM
    (ISAR0, 32, UpTo(1)), // SHA3
    (ISAR0, 36, UpTo(1)), // SM3
    (ISAR0, 40, UpTo(1)), // SM4
    (ISAR0, 44, UpTo(1)), // DP
    (ISAR0, 48, UpTo(1)), // FHM
    (ISAR0, 52, UpTo(2)), // TS
    (ISAR0, 56, UpTo(2)), // TLB
    (ISAR0, 60, UpTo(1)), // RNDR
    // Pointer authentication (bits 11:4, 31:24) is hidden: its keys are the host's.
    (ISAR1, 0, UpTo(2)),  // DPB
    (ISAR1, 12, UpTo(1)), // JSCVT
    (ISAR1, 16, UpTo(1)), // FCMA
    (ISAR1, 20, UpTo(3)), // LRCPC
    (ISAR1, 32, UpTo(1)), // FRINTTS
    (ISAR1, 36, UpTo(1)), // SB
    (ISAR1, 40, UpTo(1)), // SPECRES
    (ISAR1, 44, UpTo(1)), // BF16
    (ISAR1, 48, UpTo(1)), // DGH
    (ISAR1, 52, UpTo(1)), // I8MM
    (ISAR2, 4, UpTo(1)),  // RPRES
    (ISAR2, 52, UpTo(1)), // CSSC
    (MMFR0, 4, UpTo(2)),  // ASIDBits
    (MMFR0, 8, UpTo(1)),  // BigEnd
    (MMFR0, 16, UpTo(1)), // BigEndEL0
    (MMFR0, 20, UpTo(1)), // TGran16, without 52-bit addresses
    (MMFR0, 24, Signed),  // TGran64
    (MMFR0, 28, Signed),  // TGran4
    (MMFR1, 0, UpTo(2)),  // HAFDBS
    (MMFR1, 12, UpTo(2)), // HPDS
    (MMFR1, 20, UpTo(3)), // PAN
    (MMFR1, 28, UpTo(1)), // XNX
    (MMFR1, 36, UpTo(1)), // ETS
    (MMFR1, 48, UpTo(2)), // nTLBPA
    (MMFR2, 0, UpTo(1)),  // CnP
    (MMFR2, 4, UpTo(1)),  // UAO
    (MMFR2, 8, UpTo(1)),  // LSM
    (MMFR2, 16, UpTo(1)), // VARange
    (MMFR2, 20, UpTo(1)), // CCIDX, which the cache size registers follow
    (MMFR2, 28, UpTo(1)), // ST
    (MMFR2, 32, UpTo(1)), // AT
    (MMFR2, 52, UpTo(2)), // BBM
    (MMFR2, 60, UpTo(1)), // E0PD
];

/// The registers as a guest sees them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IdRegisters {
    values: [u64; KNOWN.len()],
}

/// CRm and op2 of each element of [`IdRegisters::values`].
fn position(crm: u64, op2: u64) -> Option<usize> {
    KNOWN.iter().position(|register| *register == (crm, op2))
}

impl IdRegisters {
    /// What a guest may see of a host whose registers `read(crm, op2)` gives, with addresses of `pa_range` (the encoding of
    /// ID_AA64MMFR0_EL1.PARange).
    pub fn new(read: impl Fn(u64, u64) -> u64, pa_range: u64) -> Self {
        let mut this = Self::default();
        for ((crm, op2), shift, field) in FIELDS {
            let host = read(*crm, *op2) >> shift & 15;
            let value = match field {
                UpTo(most) => host.min(*most),
                Signed if host == 15 => 15,
                Signed => host.min(1),
                Fixed(value) => *value,
            };
            if let Some(slot) = position(*crm, *op2).and_then(|index| this.values.get_mut(index)) {
                *slot |= value << shift;
            }
        }
        if let Some(slot) = position(MMFR0.0, MMFR0.1).and_then(|index| this.values.get_mut(index)) {
            *slot |= pa_range & 15;
            // TGran4 with 52-bit addresses is beyond what the address range says here, unless that is 52 bits.
            if pa_range < 6 && *slot >> 28 & 15 == 1 {
                *slot &= !(15 << 28);
            }
        }
        this
    }

    /// The value of the ID register `register` ([`system_register`]), if it is one: op0 3, op1 0, CRn 0, CRm 1 to 7. Those that
    /// say nothing are 0, as the space reserved for later ones is (Arm ARM D24.2, "reserved, RAZ").
    pub fn get(&self, register: u64) -> Option<u64> {
        let (crm, op2) = (register >> 3 & 15, register & 7);
        if register & !0x7f != system_register(3, 0, 0, 0, 0) || !(1..=7).contains(&crm) {
            return None;
        }
        Some(position(crm, op2).and_then(|index| self.values.get(index)).copied().unwrap_or(0))
    }

    /// The guest has the system registers of a GICv3, from now on.
    pub fn show_gic(&mut self) {
        if let Some(slot) = position(PFR0.0, PFR0.1).and_then(|index| self.values.get_mut(index)) {
            *slot = *slot & !(15 << PFR0_GIC) | 1 << PFR0_GIC;
        }
    }

    /// The guest has the system registers of a GICv3.
    pub fn gic(&self) -> bool {
        self.get(system_register(3, 0, 0, PFR0.0, PFR0.1)).is_some_and(|value| value >> PFR0_GIC & 15 != 0)
    }

    /// The guest has FEAT_PAN.
    pub fn pan(&self) -> bool {
        self.get(system_register(3, 0, 0, MMFR1.0, MMFR1.1)).is_some_and(|value| value >> 20 & 15 != 0)
    }

    /// The guest has FEAT_SSBS.
    pub fn ssbs(&self) -> bool {
        self.get(system_register(3, 0, 0, PFR1.0, PFR1.1)).is_some_and(|value| value >> 4 & 15 != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn get(registers: &IdRegisters, (crm, op2): (u64, u64)) -> u64 {
        registers.get(system_register(3, 0, 0, crm, op2)).unwrap()
    }

    #[test]
    fn a_host_that_has_everything_shows_only_what_is_known() {
        // Every field 7, which is more than any feature has now.
        let ids = IdRegisters::new(|_, _| 0x7777_7777_7777_7777, 5);
        assert_eq!(get(&ids, PFR0), 0x1101_0000_0011_0011, "neither SVE, RAS, AMU, MPAM, GIC nor EL2");
        assert_eq!(get(&ids, PFR1), 0x21, "neither MTE nor SME");
        assert_eq!(get(&ids, DFR0), 0x10_1006);
        assert_eq!(get(&ids, ISAR1) & 0xff00_0ff0, 0, "no pointer authentication");
        assert_eq!(get(&ids, MMFR0) & 15, 5);
        assert_eq!(get(&ids, MMFR0) >> 28 & 15, 0, "no 52-bit pages in 48 bits");
        assert_eq!(get(&IdRegisters::new(|_, _| 0x7777_7777_7777_7777, 6), MMFR0) >> 28 & 15, 1);
        for unknown in [(4, 2), (4, 4), (4, 5), (5, 1), (6, 3), (7, 3), (7, 4), (1, 0), (2, 7)] {
            assert_eq!(get(&ids, unknown), 0);
        }
    }

    #[test]
    fn a_host_that_has_nothing_shows_nothing_but_the_fixed() {
        let ids = IdRegisters::new(|crm, op2| if (crm, op2) == PFR0 { 0xff << 16 } else { 0 }, 2);
        assert_eq!(get(&ids, PFR0), 0x00ff_0011, "no floating point");
        assert_eq!((get(&ids, PFR1), get(&ids, MMFR1), get(&ids, MMFR0)), (0, 0, 2));
        assert!(!ids.pan() && !ids.ssbs());
    }

    #[test]
    fn a_gic_shows_when_there_is_one() {
        let mut ids = IdRegisters::new(|_, _| 0x7777_7777_7777_7777, 5);
        assert!(!ids.gic());
        let before = get(&ids, PFR0);
        ids.show_gic();
        assert!(ids.gic());
        assert_eq!(get(&ids, PFR0) ^ before, 1 << 24);
    }

    #[test]
    fn other_registers_are_none_of_them() {
        let ids = IdRegisters::default();
        assert_eq!(ids.get(system_register(3, 0, 0, 0, 0)), None, "MIDR_EL1");
        assert_eq!(ids.get(system_register(3, 0, 0, 8, 0)), None);
        assert_eq!(ids.get(system_register(3, 1, 0, 4, 0)), None);
        assert_eq!(ids.get(system_register(3, 0, 1, 4, 0)), None);
    }
}
