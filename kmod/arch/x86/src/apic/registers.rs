// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The local APIC's registers as the hardware lays them out: a page with a 32-bit register at each multiple of 16 bytes. It is
//! the xAPIC's own page (SDM vol. 3 table 12-1), and so a CPU that virtualizes the APIC can work on it: Intel's virtual-APIC
//! page (SDM vol. 3 section 30.1), AMD's AVIC backing page (APM vol. 2 section 15.29.3).
//!
//! Bytes only, no rules. While the vCPU executes guest code the hardware may change them; nobody looks at them then.

use super::reg;

/// Words of the page.
const WORDS: usize = 1024;
/// Words from one register to the next.
const STRIDE: usize = 4;

/// One of the three sets of vectors, each of them eight registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum Set {
    /// ISR: in service.
    InService = reg::ISR,
    /// TMR: the latest request was level-triggered.
    Level = reg::TMR,
    /// IRR: requested.
    Requested = reg::IRR,
}

/// The page.
#[repr(C, align(4096))]
pub(crate) struct Registers {
    words: [u32; WORDS],
}

/// Register of a set, and bit in it, of a vector.
const fn place(vector: u8) -> (usize, u32) {
    ((vector >> 5) as usize, 1 << (vector & 31))
}

impl Registers {
    /// The register at byte `offset`. Offsets beyond the page read as zero.
    #[inline]
    pub(super) fn get(&self, offset: u16) -> u32 {
        self.words.get(usize::from(offset / 4)).copied().unwrap_or(0)
    }

    /// Sets the register at byte `offset`.
    #[inline]
    pub(super) fn set(&mut self, offset: u16, value: u32) {
        if let Some(word) = self.words.get_mut(usize::from(offset / 4)) {
            *word = value;
        }
    }

    /// Every register is zero.
    pub(super) fn clear(&mut self) {
        self.words.fill(0);
    }

    /// The eight registers of `set`, of which the first word of each four counts.
    #[inline]
    fn registers(&self, set: Set) -> impl DoubleEndedIterator<Item = u32> + ExactSizeIterator + '_ {
        let first = usize::from(set as u16 / 4);
        self.words.get(first..first + 8 * STRIDE).unwrap_or(&[]).chunks_exact(STRIDE).map(|register| match register {
            [value, ..] => *value,
            [] => 0,
        })
    }

    fn register_mut(&mut self, set: Set, index: usize) -> Option<&mut u32> {
        self.words.get_mut(usize::from(set as u16 / 4) + STRIDE * index)
    }

    /// Whether `vector` is in `set`.
    pub(super) fn contains(&self, set: Set, vector: u8) -> bool {
        let (index, bit) = place(vector);
        self.registers(set).nth(index).is_some_and(|register| register & bit != 0)
    }

    /// Adds `vector` to `set`.
    pub(super) fn insert(&mut self, set: Set, vector: u8) {
        let (index, bit) = place(vector);
        if let Some(register) = self.register_mut(set, index) {
            *register |= bit;
        }
    }

    /// Takes `vector` out of `set`.
    pub(super) fn remove(&mut self, set: Set, vector: u8) {
        let (index, bit) = place(vector);
        if let Some(register) = self.register_mut(set, index) {
            *register &= !bit;
        }
    }

    /// The highest vector of `set`: the one of highest priority.
    #[inline]
    pub(super) fn highest(&self, set: Set) -> Option<u8> {
        // Asked at each entry, mostly of empty sets: a block of known length, which needs no checks.
        let block: &[u32; 8 * STRIDE] = self.words.get(usize::from(set as u16 / 4)..)?.first_chunk()?;
        let mut index = 8u32;
        for register in [block[28], block[24], block[20], block[16], block[12], block[8], block[4], block[0]] {
            index = index.wrapping_sub(1);
            if register != 0 {
                // The register is not zero, so it has 0 to 31 leading zeros, and 31 ^ n is 31 - n. With index <= 7 the sum is below
                // 256.
                return Some((index * 32 + (31 ^ register.leading_zeros())) as u8);
            }
        }
        None
    }

    /// All of `set`: vector `64 * i + b` is bit `b` of word `i`.
    pub(super) fn words(&self, set: Set) -> [u64; 4] {
        let mut words = [0; 4];
        for (index, register) in self.registers(set).enumerate() {
            if let Some(word) = words.get_mut(index / 2) {
                *word |= u64::from(register) << (32 * (index % 2));
            }
        }
        words
    }

    /// Requests the vectors `64 * index + b` for each bit `b` of `added`, of which those in `levels` are level-triggered.
    pub(super) fn request(&mut self, index: usize, added: u64, levels: u64) {
        for (half, shift) in [(0, 0), (1, 32)] {
            let (added, levels) = ((added >> shift) as u32, (levels >> shift) as u32);
            if added == 0 {
                continue;
            }
            if let Some(requested) = self.register_mut(Set::Requested, 2 * index + half) {
                *requested |= added;
            }
            if let Some(level) = self.register_mut(Set::Level, 2 * index + half) {
                *level = *level & !added | levels & added;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::Framed;
    use crate::testing::TestHal;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn page() -> Framed<Registers, TestHal> {
        Framed::zeroed().unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(if cfg!(miri) { 4 } else { 256 }) })]
        #[test]
        fn sets_behave_like_sets(operations in proptest::collection::vec((any::<u8>(), any::<bool>()), 0..64)) {
            let (mut page, mut model) = (page(), BTreeSet::new());
            for (vector, member) in operations {
                if member {
                    page.insert(Set::Requested, vector);
                    model.insert(vector);
                } else {
                    page.remove(Set::Requested, vector);
                    model.remove(&vector);
                }
                prop_assert_eq!(page.highest(Set::Requested), model.last().copied());
            }
            for vector in 0..=255u8 {
                prop_assert_eq!(page.contains(Set::Requested, vector), model.contains(&vector));
                let register = page.get(reg::IRR + 16 * u16::from(vector / 32));
                prop_assert_eq!((register >> (vector % 32)) & 1 == 1, model.contains(&vector));
            }
            let words = page.words(Set::Requested);
            prop_assert!((0..=255u8).all(|vector| words[usize::from(vector / 64)] >> (vector % 64) & 1 == u64::from(model.contains(&vector))));
            prop_assert_eq!((page.highest(Set::InService), page.highest(Set::Level)), (None, None));
        }
    }

    #[test]
    fn the_layout_is_the_manuals() {
        let mut page = page();
        page.insert(Set::InService, 0xff);
        page.insert(Set::Level, 0x20);
        page.insert(Set::Requested, 0x41);
        assert_eq!((page.get(0x170), page.get(0x190), page.get(0x220)), (1 << 31, 1, 2));
        page.set(reg::TPR, 0x50);
        assert_eq!(page.words[0x20], 0x50);
        page.set(0x1000, 1);
        assert_eq!(page.get(0x1000), 0, "beyond the page");
        assert_eq!((size_of::<Registers>(), align_of::<Registers>()), (4096, 4096));
    }

    #[test]
    fn requests_bring_their_trigger_mode() {
        let mut page = page();
        page.request(1, 1 << 1 | 1 << 40, 1 << 40 | 1 << 2);
        assert!(page.contains(Set::Requested, 0x41) && page.contains(Set::Requested, 0x68));
        assert!(!page.contains(Set::Level, 0x41) && page.contains(Set::Level, 0x68));
        assert!(!page.contains(Set::Level, 0x42), "was not requested");
        page.request(1, 1 << 40, 0);
        assert!(!page.contains(Set::Level, 0x68));
        page.request(4, u64::MAX, u64::MAX);
        assert_eq!(page.highest(Set::Requested), Some(0x68), "there are four words");
    }
}
