// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! Entries against values written out by hand from the manuals.

use super::*;

fn leaf(addr: u64, perms: Permissions, memory_type: MemoryType) -> Leaf {
    Leaf::new(hpa(addr), perms, memory_type)
}

fn assert_leaf<F: Format>(leaf: Leaf, size: PageSize, entry: u64) {
    assert_eq!(F::encode_leaf(leaf, size), entry, "{leaf:?} {size:?}: {:#x}", F::encode_leaf(leaf, size));
    assert_eq!(F::decode(entry, size.level()), Entry::Leaf(leaf), "{entry:#x}");
}

#[test]
fn npt_leaves() {
    // P | U/S = 5, R/W = 2, PWT | PCD = 0x18, A = 0x20, D = 0x40, PS = 0x80, NX = bit 63.
    assert_leaf::<Npt>(leaf(0x1234_5000, RWX, WB), K4, 0x1234_5007);
    assert_leaf::<Npt>(leaf(0x1234_5000, RX, WB), K4, 0x1234_5005);
    assert_leaf::<Npt>(leaf(0x1234_5000, RW, WB), K4, 0x8000_0000_1234_5007);
    assert_leaf::<Npt>(leaf(0x1234_5000, R, WB), K4, 0x8000_0000_1234_5005);
    assert_leaf::<Npt>(leaf(0xfee0_0000, RW, UC), K4, 0x8000_0000_fee0_001f);
    assert_leaf::<Npt>(leaf(0x20_0000, RWX, WB), M2, 0x20_0087);
    assert_leaf::<Npt>(leaf(0x4000_0000, RX, UC), G1, 0x4000_009d);
    assert_leaf::<Npt>(leaf(0x000f_ffff_ffff_f000, R, WB), K4, 0x800f_ffff_ffff_f005);
    assert_leaf::<Npt>(Leaf { accessed: true, ..leaf(0x1000, RWX, WB) }, K4, 0x1027);
    assert_leaf::<Npt>(Leaf { accessed: true, dirty: true, ..leaf(0x20_0000, RWX, WB) }, M2, 0x20_00e7);
}

#[test]
fn ept_leaves() {
    // R = 1, W = 2, X = 4, type WB = 0x30, ignore PAT = 0x40, large = 0x80, A = 0x100, D = 0x200.
    assert_leaf::<Ept>(leaf(0x1234_5000, RWX, WB), K4, 0x1234_5077);
    assert_leaf::<Ept>(leaf(0x1234_5000, RX, WB), K4, 0x1234_5075);
    assert_leaf::<Ept>(leaf(0x1234_5000, RW, WB), K4, 0x1234_5073);
    assert_leaf::<Ept>(leaf(0x1234_5000, R, WB), K4, 0x1234_5071);
    assert_leaf::<Ept>(leaf(0xfee0_0000, RW, UC), K4, 0xfee0_0003);
    assert_leaf::<Ept>(leaf(0x20_0000, RWX, WB), M2, 0x20_00f7);
    assert_leaf::<Ept>(leaf(0x4000_0000, RX, UC), G1, 0x4000_0085);
    assert_leaf::<Ept>(leaf(0x000f_ffff_ffff_f000, R, WB), K4, 0x000f_ffff_ffff_f071);
    assert_leaf::<Ept>(Leaf { accessed: true, ..leaf(0x1000, RWX, WB) }, K4, 0x1177);
    assert_leaf::<Ept>(Leaf { accessed: true, dirty: true, ..leaf(0x20_0000, RWX, WB) }, M2, 0x20_03f7);
}

#[test]
fn stage2_leaves() {
    // Valid = 1, page (or table) = 2, MemAttr WB = 0x3c, nGnRE = 4, read = 0x40, write = 0x80, SH = 0x300, AF = 0x400,
    // XN = bit 54, software's accessed and dirty = bits 55 and 56.
    assert_leaf::<Stage2>(leaf(0x1234_5000, RWX, WB), K4, 0x1234_57ff);
    assert_leaf::<Stage2>(leaf(0x1234_5000, RX, WB), K4, 0x1234_577f);
    assert_leaf::<Stage2>(leaf(0x1234_5000, RW, WB), K4, 0x0040_0000_1234_57ff);
    assert_leaf::<Stage2>(leaf(0x0900_0000, RW, UC), K4, 0x0040_0000_0900_07c7);
    assert_leaf::<Stage2>(leaf(0x20_0000, RWX, WB), M2, 0x20_07fd);
    assert_leaf::<Stage2>(leaf(0x4000_0000, RX, WB), G1, 0x4000_077d);
    assert_leaf::<Stage2>(leaf(0x0000_ffff_ffff_f000, R, WB), K4, 0x0040_ffff_ffff_f77f);
    assert_leaf::<Stage2>(Leaf { accessed: true, dirty: true, ..leaf(0x1000, RWX, WB) }, K4, 0x0180_0000_0000_17ff);
    // Address bits 51:50 take the place of the shareability.
    assert_leaf::<Stage2Lpa2>(leaf(0x1234_5000, RWX, WB), K4, 0x1234_54ff);
    assert_leaf::<Stage2Lpa2>(leaf(0x000d_ffff_ffff_f000, RWX, WB), K4, 0x0001_ffff_ffff_f7ff);
    assert_leaf::<Stage2Lpa2>(leaf(0x000b_0000_0020_0000, RX, WB), M2, 0x0003_0000_0020_067d);
}

#[test]
fn what_is_withheld_is_noted_where_the_hardware_does_not_look() {
    let leaf = Leaf { withheld: true, ..leaf(0x20_0000, RW, WB) };
    assert_eq!(leaf.rights(), RWX);
    // Bit 9 and NX; bit 11 without X; bit 57 and XN.
    assert_leaf::<Npt>(leaf, M2, 0x8000_0000_0020_0287);
    assert_leaf::<Ept>(leaf, M2, 0x20_08f3);
    assert_leaf::<Stage2>(leaf, M2, 0x0240_0000_0020_07fd);
    assert_leaf::<Stage2Lpa2>(leaf, M2, 0x0240_0000_0020_04fd);
}

#[test]
fn stage2_tables_and_levels() {
    assert_eq!(Stage2::encode_table(hpa(0xabc_d000)), 0xabc_d003);
    assert_eq!(Stage2Lpa2::encode_table(hpa(0x000e_0000_0abc_d000)), 0x0002_0000_0abc_d303);
    for number in 2..=5 {
        assert_eq!(Stage2::decode(0xabc_d003, Level(number)), Entry::Table(hpa(0xabc_d000)));
        assert_eq!(Stage2Lpa2::decode(0xabc_d103, Level(number)), Entry::Table(hpa(0x0004_0000_0abc_d000)));
        assert_eq!(Stage2::decode(!1, Level(number)), Entry::Empty);
    }
    // Levels and log2 of the root's tables, as VTCR_EL2.SL0 and T0SZ have them with the 4 KiB granule (Arm ARM D8.2.2):
    // start level 1 up to 43 bits, then level 0; concatenated where a table alone spans less.
    let shape = |bits| IpaBits::new(bits).map(|bits| (Levels::Ipa(bits).count(), Levels::Ipa(bits).root_order()));
    for (bits, levels, order) in [(32, 2, 2), (36, 3, 0), (39, 3, 0), (40, 3, 1), (42, 3, 3), (43, 3, 4), (44, 4, 0)] {
        assert_eq!(shape(bits), Some((levels, order)), "{bits} bits");
    }
    assert_eq!((shape(48), shape(52)), (Some((4, 0)), Some((4, 4))));
    assert_eq!((shape(31), shape(53)), (None, None));
}

#[test]
fn tables_restrict_nothing() {
    assert_eq!(Npt::encode_table(hpa(0xabc_d000)), 0xabc_d007);
    assert_eq!(Ept::encode_table(hpa(0xabc_d000)), 0xabc_d007);
    for number in 2..=5 {
        assert_eq!(Npt::decode(0xabc_d007, Level(number)), Entry::Table(hpa(0xabc_d000)));
        assert_eq!(Ept::decode(0xabc_d007, Level(number)), Entry::Table(hpa(0xabc_d000)));
    }
}

#[test]
fn what_is_not_present_is_empty_whatever_else_is_set() {
    for number in 1..=5 {
        for entry in [0, !1] {
            assert_eq!(Npt::decode(entry, Level(number)), Entry::Empty);
        }
        for entry in [0, !7] {
            assert_eq!(Ept::decode(entry, Level(number)), Entry::Empty);
        }
    }
}

#[test]
fn bits_that_the_hardware_owns_or_ignores_do_not_reach_the_address() {
    // Accessed in a table entry; software bits, protection key and NX around the address.
    assert_eq!(Npt::decode(0x7ff0_0000_0000_1e27, Level(2)), Entry::Table(hpa(0x1000)));
    assert_eq!(Ept::decode(0x7ff0_0000_0000_1d07, Level(2)), Entry::Table(hpa(0x1000)));
    // The PAT bit of a large NPT leaf is bit 12.
    assert_eq!(Npt::decode(0x20_1087, Level(2)), Entry::Leaf(leaf(0x20_0000, RWX, WB)));
    // Level 1 has leaves only, whether bit 7 is set or not.
    assert!(matches!(Npt::decode(0x1087, Level(1)), Entry::Leaf(_)));
    assert!(matches!(Ept::decode(0x10f7, Level(1)), Entry::Leaf(_)));
}

#[test]
fn sizes_and_levels_agree() {
    let expected = [(K4, 1, 4096), (M2, 2, 0x20_0000), (G1, 3, 0x4000_0000)];
    for (size, level, bytes) in expected {
        assert_eq!((size.level().number(), size.bytes()), (level, bytes));
        assert_eq!(size.level().page_size(), Some(size));
    }
    assert_eq!(Level(4).page_size(), None);
    assert_eq!([1, 2, 3, 4, 5].map(|n| Level(n).shift()), [12, 21, 30, 39, 48]);
    // GPA bits 11:0 offset, 20:12 level 1, 29:21 level 2, 38:30 level 3, 47:39 level 4, 51:48 level 5.
    let addr = (0xf << 48) | (0x155 << 39) | (0x0aa << 30) | (0x1ff << 21) | (0x001 << 12) | 0xfff;
    assert_eq!([1, 2, 3, 4, 5].map(|n| Level(n).index(addr)), [0x001, 0x1ff, 0x0aa, 0x155, 0xf]);
}

#[test]
fn permissions_are_a_set_of_the_three_abi_bits() {
    assert_eq!(Permissions::from_bits(5), Some(RX));
    assert_eq!(Permissions::from_bits(8), None);
    assert_eq!((RX.bits(), RW.bits()), (5, 3));
    assert_eq!(RX.intersection(RW), R);
    assert!(RWX.contains(RX) && !RX.contains(RW));
    assert_eq!(std::format!("{RX:?}"), "r-x");
}
