// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! A set of interrupt vectors: the form of ISR, TMR and IRR.

/// A set of the vectors 0 to 255.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VectorSet {
    /// Vector `64 * i + b` is bit `b` of word `i`.
    words: [u64; 4],
}

/// Word and bit of a vector. The word is below 4, whatever the vector.
const fn place(vector: u8) -> (usize, u64) {
    ((vector >> 6) as usize, 1 << (vector & 63))
}

impl VectorSet {
    /// The empty set.
    pub const EMPTY: Self = Self { words: [0; 4] };

    /// Whether `vector` is in the set.
    pub fn contains(&self, vector: u8) -> bool {
        let (word, bit) = place(vector);
        self.words.get(word).is_some_and(|w| w & bit != 0)
    }

    /// Adds `vector`.
    pub fn insert(&mut self, vector: u8) {
        self.set(vector, true);
    }

    /// Takes `vector` out.
    pub fn remove(&mut self, vector: u8) {
        self.set(vector, false);
    }

    /// Adds `vector` or takes it out.
    pub fn set(&mut self, vector: u8, member: bool) {
        let (word, bit) = place(vector);
        if let Some(w) = self.words.get_mut(word) {
            *w = if member { *w | bit } else { *w & !bit };
        }
    }

    /// The highest vector: the one of highest priority.
    pub fn highest(&self) -> Option<u8> {
        let (index, word) = self.words.iter().enumerate().rev().find(|(_, word)| **word != 0)?;
        // The word is not zero, so it has 0 to 63 leading zeros, and 63 ^ n is 63 - n. With index <= 3 the sum is below 256.
        Some((index as u32 * 64 + (63 ^ word.leading_zeros())) as u8)
    }

    /// The 32-bit register that holds vectors `32 * index` and up; zero beyond the eighth.
    pub fn register(&self, index: usize) -> u32 {
        self.words.get(index / 2).map_or(0, |w| (w >> (32 * (index % 2))) as u32)
    }

    /// Sets the 32-bit register that holds vectors `32 * index` and up; nothing beyond the eighth.
    pub fn set_register(&mut self, index: usize, value: u32) {
        if let Some(w) = self.words.get_mut(index / 2) {
            let shift = 32 * (index % 2);
            *w = *w & !(0xffff_ffff << shift) | (u64::from(value) << shift);
        }
    }

    /// Adds the vectors `64 * index + b` of each bit `b` of `added`; with `levels` saying which of them are level-triggered,
    /// `tmr` follows.
    pub(super) fn merge(&mut self, index: usize, added: u64, levels: u64, tmr: &mut Self) {
        if let (Some(irr), Some(tmr)) = (self.words.get_mut(index), tmr.words.get_mut(index)) {
            *irr |= added;
            *tmr = *tmr & !added | levels & added;
        }
    }

    /// Whether the set is empty.
    pub fn is_empty(&self) -> bool {
        self.words == [0; 4]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(if cfg!(miri) { 4 } else { 256 }) })]
        #[test]
        fn behaves_like_a_set(operations in proptest::collection::vec((any::<u8>(), any::<bool>()), 0..64)) {
            let (mut set, mut model) = (VectorSet::EMPTY, BTreeSet::new());
            for (vector, member) in operations {
                set.set(vector, member);
                if member { model.insert(vector); } else { model.remove(&vector); }
                prop_assert_eq!(set.highest(), model.last().copied());
                prop_assert_eq!(set.is_empty(), model.is_empty());
            }
            for vector in 0..=255u8 {
                prop_assert_eq!(set.contains(vector), model.contains(&vector));
                let register = set.register(usize::from(vector / 32));
                prop_assert_eq!((register >> (vector % 32)) & 1 == 1, model.contains(&vector));
            }
            let mut copy = VectorSet::EMPTY;
            for index in 0..8 { copy.set_register(index, set.register(index)); }
            prop_assert_eq!(copy, set);
        }
    }

    #[test]
    fn registers_beyond_the_eighth_do_not_exist() {
        let mut set = VectorSet::EMPTY;
        set.set_register(8, u32::MAX);
        assert!(set.is_empty());
        assert_eq!(set.register(8), 0);
    }
}
