// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! Entries against values written out by hand from the manuals.

use super::*;

fn leaf(addr: u64, perms: Permissions, memory_type: MemoryType) -> Leaf {
    Leaf { hpa: hpa(addr), perms, memory_type, accessed: false, dirty: false }
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
