// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! How deep the tables are, how many stand at the top, and how much an entry of each level spans.

use super::{ENTRIES, PHYS_LIMIT};
use crate::HostPhysAddr;

/// Number of table levels, and of tables at the top.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Levels {
    /// 48-bit guest physical addresses.
    Four,
    /// 52-bit guest physical addresses (the format has 57).
    Five,
    /// As AArch64's stage 2 has them for guest physical ("intermediate") addresses of that width.
    Ipa(IpaBits),
}

/// Width of an intermediate physical address, 32 to 52 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct IpaBits(u8);

impl IpaBits {
    /// The width, if it is 32 to 52 bits.
    pub const fn new(bits: u32) -> Option<Self> {
        if bits >= 32 && bits <= 52 {
            Some(Self(bits as u8))
        } else {
            None
        }
    }

    /// The width in bits.
    pub const fn get(self) -> u32 {
        self.0 as u32
    }
}

impl Levels {
    /// 2 to 5.
    #[inline]
    pub const fn count(self) -> u8 {
        match self {
            Self::Four => 4,
            Self::Five => 5,
            // As few as possible: up to 16 tables side by side stand in for one level more, with 4 bits of the address
            // (Arm ARM D8.2.2, "Concatenated translation tables"). 32 to 34 bits take 2 levels, 44 to 52 take 4.
            Self::Ipa(bits) => (bits.0 - 8) / 9,
        }
    }

    /// First guest physical address that cannot be mapped.
    #[inline]
    pub const fn limit(self) -> u64 {
        match self {
            Self::Four => 1 << 48,
            Self::Five => PHYS_LIMIT,
            Self::Ipa(bits) => 1 << bits.0,
        }
    }

    /// How many tables the root has side by side, as log2: 0, but for [`Ipa`](Self::Ipa) up to 4.
    pub const fn root_order(self) -> u32 {
        match self {
            Self::Four | Self::Five => 0,
            Self::Ipa(bits) => (bits.0 as u32).saturating_sub(self.top().shift() + 9),
        }
    }

    #[inline]
    pub(super) const fn top(self) -> Level {
        Level(self.count())
    }

    /// Which of the tables of `root` translates `gpa`, which is below the limit.
    #[inline]
    pub(super) const fn root_table(self, root: HostPhysAddr, gpa: u64) -> HostPhysAddr {
        // Aligned to their size together, so the number fills zero bits. Five levels span more than any address.
        HostPhysAddr::new(root.as_u64() | ((gpa >> (self.top().shift() + 9)) << 12))
    }
}

/// Level of a table: 1 holds 4 KiB leaves, the root has 2 to 5. (AArch64 counts the other way, from 3 for the leaves.)
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Level(pub(super) u8);

impl Level {
    /// The level that has leaves only.
    pub(super) const LEAVES: Self = Self(1);

    /// The number, 1 to 5.
    #[inline]
    pub const fn number(self) -> u8 {
        self.0
    }

    /// The size of the page that a leaf of this level maps, if there can be one.
    #[inline]
    pub const fn page_size(self) -> Option<PageSize> {
        match self.0 {
            1 => Some(PageSize::Size4K),
            2 => Some(PageSize::Size2M),
            3 => Some(PageSize::Size1G),
            _ => None,
        }
    }

    /// Log2 of the bytes that one entry spans: 12, 21, 30, 39 or 48.
    #[inline]
    pub(super) const fn shift(self) -> u32 {
        // At most 3 + 9 * 5: a level is 1 to 5.
        3 + 9 * self.0 as u32
    }

    /// The bytes that one entry spans.
    #[inline]
    pub(super) const fn span(self) -> u64 {
        1 << self.shift()
    }

    /// The index of `gpa`'s entry.
    #[inline]
    pub(super) const fn index(self, gpa: u64) -> usize {
        // The mask fits any usize.
        ((gpa >> self.shift()) & (ENTRIES as u64 - 1)) as usize
    }

    #[inline]
    pub(super) const fn below(self) -> Option<Self> {
        match self.0 {
            0 | 1 => None,
            n => Some(Self(n - 1)),
        }
    }
}

/// Size of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PageSize {
    /// 4 KiB.
    Size4K,
    /// 2 MiB.
    Size2M,
    /// 1 GiB.
    Size1G,
}

impl PageSize {
    /// All sizes, smallest first.
    pub const ALL: [Self; 3] = [Self::Size4K, Self::Size2M, Self::Size1G];

    /// The size in bytes.
    #[inline]
    pub const fn bytes(self) -> u64 {
        self.level().span()
    }

    /// The level of a leaf of this size.
    #[inline]
    pub const fn level(self) -> Level {
        match self {
            Self::Size4K => Level(1),
            Self::Size2M => Level(2),
            Self::Size1G => Level(3),
        }
    }
}
