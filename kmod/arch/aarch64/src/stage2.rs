// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! Stage 2: which shape of tables a CPU can walk, what VTCR_EL2 says of it, and the table in that shape.

use vcpu_core::npt::{EitherTable, IpaBits, Levels, Stage2, Stage2Lpa2, TableMemory};
use vcpu_core::{AxResult, HostPhysAddr};

/// A nested page table: [`Stage2`] for addresses of up to 48 bits, [`Stage2Lpa2`] for 52.
pub type NestedTable = EitherTable<Stage2, Stage2Lpa2>;

/// The shape of stage 2 tables: the width of the guest's addresses, and the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    ipa: IpaBits,
    /// ID_AA64MMFR0_EL1.PARange.
    pa_range: u64,
    lpa2: bool,
}

impl Shape {
    /// The widest that the CPU whose ID_AA64MMFR0_EL1 is `mmfr0` can walk with the 4 KiB granule, or `None` if it does not
    /// have that granule at stage 2.
    pub fn widest(mmfr0: u64) -> Option<Self> {
        let pa_range = (mmfr0 & 15).min(6);
        // TGran4_2 (bits 43:40): 0 as TGran4 (bits 31:28) says for stage 1, 1 not there, 2 there, 3 with 52 bits.
        // TGran4: 0 there, 1 with 52 bits, 15 not there.
        let lpa2 = match (mmfr0 >> 40 & 15, mmfr0 >> 28 & 15) {
            (0, 15) | (1, _) => return None,
            (0, stage1) => stage1 == 1,
            (stage2, _) => stage2 >= 3,
        };
        let bits = match pa_range {
            0 => 32,
            1 => 36,
            2 => 40,
            3 => 42,
            4 => 44,
            5 => 48,
            _ if lpa2 => 52,
            _ => 48,
        };
        // FEAT_LPA2's format holds all that the other one does, but is only needed for its width.
        Some(Self {
            ipa: IpaBits::new(bits)?,
            pa_range: if bits == 48 { pa_range.min(5) } else { pa_range },
            lpa2: bits == 52,
        })
    }

    /// An empty table of this shape.
    ///
    /// # Errors
    /// As [`NestedPageTable::new`](vcpu_core::npt::NestedPageTable::new).
    pub fn new_table(self, memory: &mut impl TableMemory) -> AxResult<NestedTable> {
        if self.lpa2 {
            EitherTable::new_b(self.levels(), memory)
        } else {
            EitherTable::new_a(self.levels(), memory)
        }
    }

    /// The shape of the tables.
    pub const fn levels(self) -> Levels {
        Levels::Ipa(self.ipa)
    }

    /// Width of a guest physical address, in bits.
    pub const fn bits(self) -> u32 {
        self.ipa.get()
    }

    /// ID_AA64MMFR0_EL1.PARange, for the guest.
    pub const fn pa_range(self) -> u64 {
        self.pa_range
    }

    /// VTCR_EL2 (Arm ARM D24.2.191).
    pub const fn vtcr(self) -> u64 {
        // T0SZ; walks inner and outer write-back, inner shareable; 4 KiB granule; VMIDs of 8 bits; bit 31 is RES1.
        let t0sz = 64 - self.ipa.get() as u64;
        // SL0: the walk starts at level 2 for 0, 1 for 1, 0 for 2: this is the engine's number of levels less two.
        let sl0 = self.levels().count() as u64 - 2;
        t0sz | sl0 << 6 | 1 << 8 | 1 << 10 | 3 << 12 | self.pa_range << 16 | 1 << 31 | (self.lpa2 as u64) << 32
    }

    /// VTTBR_EL2 for the tables at `root`: the address and a VMID of 8 bits.
    pub const fn vttbr(self, root: HostPhysAddr, vmid: u8) -> u64 {
        let root = root.as_u64();
        // With 52-bit addresses bits 51:48 of the root lie in bits 5:2 (D24.2.192).
        let baddr = if self.lpa2 { root & 0xffff_ffff_ffc0 | root >> 46 & 0x3c } else { root & 0xffff_ffff_fffe };
        (vmid as u64) << 48 | baddr
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_widest_shape_of_a_cpu() {
        // Neoverse N1 (48 bits), Cortex-A76 as QEMU has it (40 bits), QEMU's max (52 bits, FEAT_LPA2 at both stages).
        let shape = |mmfr0| Shape::widest(mmfr0).map(|shape| (shape.bits(), shape.lpa2, shape.pa_range()));
        assert_eq!(shape(0x0000_0000_0010_1125), Some((48, false, 5)));
        assert_eq!(shape(0x0000_0000_0010_1122), Some((40, false, 2)));
        assert_eq!(shape(0x0000_0320_1010_1126), Some((52, true, 6)));
        assert_eq!(shape(0x0000_0000_1010_1126), Some((52, true, 6)), "as stage 1 says");
        assert_eq!(shape(0x0000_0220_0010_1126), Some((48, false, 5)), "52 bits for larger granules only");
        assert_eq!(shape(0x0000_0120_0010_1125), None);
        assert_eq!(shape(0x0000_0000_f010_1125), None);
    }

    #[test]
    fn vtcr_says_how_to_walk() {
        // 48 bits: T0SZ 16, SL0 2. 40 bits: T0SZ 24, SL0 1. 52 bits: T0SZ 12, SL0 2, DS.
        let vtcr = |mmfr0| Shape::widest(mmfr0).map(Shape::vtcr);
        assert_eq!(vtcr(5), Some(0x8005_3590));
        assert_eq!(vtcr(2), Some(0x8002_3558));
        assert_eq!(vtcr(0x1000_0006), Some(0x1_8006_358c));
    }

    #[test]
    fn vttbr_holds_wide_roots() {
        let narrow = Shape::widest(5).unwrap();
        assert_eq!(narrow.vttbr(HostPhysAddr::new(0x1234_5000), 0xff), 0x00ff_0000_1234_5000);
        let wide = Shape::widest(0x1000_0006).unwrap();
        assert_eq!(wide.vttbr(HostPhysAddr::new(0x000a_0000_1234_0000), 1), 0x0001_0000_1234_0028);
    }
}
