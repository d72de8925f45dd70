// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! Entry formats: what the 64 bits of a table entry mean. [`Npt`] for AMD SVM, [`Ept`] for Intel VMX, [`Stage2`] and
//! [`Stage2Lpa2`] for AArch64.
//!
//! A format is stateless and knows nothing of tables; the engine knows nothing of bits.

use super::{Level, MemoryType, PageSize, Permissions, PHYS_LIMIT};
use crate::HostPhysAddr;

/// Translation, rights and history of one page, as a leaf entry holds them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// Host physical address, a multiple of the page's size below 2^52.
    pub hpa: HostPhysAddr,
    /// What the entry allows the guest; contains [`Permissions::READ`].
    pub perms: Permissions,
    /// The page may be executed, but [`Permissions::EXECUTE`] is not in `perms`, since only smaller leaves may have it (see
    /// [`NestedPageTable::with_small_code`](super::NestedPageTable::with_small_code)). The hardware ignores the bit.
    pub withheld: bool,
    /// How the CPU caches it.
    pub memory_type: MemoryType,
    /// Accessed through this entry since it was written.
    pub accessed: bool,
    /// Written through this entry since it was written.
    pub dirty: bool,
}

impl Leaf {
    /// A leaf that no CPU has used yet.
    #[inline]
    pub const fn new(hpa: HostPhysAddr, perms: Permissions, memory_type: MemoryType) -> Self {
        Self { hpa, perms, withheld: false, memory_type, accessed: false, dirty: false }
    }

    /// What the page allows the guest, by this leaf or by smaller ones in its place.
    #[inline]
    pub const fn rights(self) -> Permissions {
        if self.withheld {
            self.perms.union(Permissions::EXECUTE)
        } else {
            self.perms
        }
    }
}

/// A decoded entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Translates nothing. An all-zero entry is empty in every format.
    Empty,
    /// Points to a table of the level below.
    Table(HostPhysAddr),
    /// Maps a page.
    Leaf(Leaf),
}

/// An entry format. Tables are 4096 bytes, with 512 entries of 64 bits; a leaf is possible at levels 1 to 3.
pub trait Format {
    /// First host physical address that an entry cannot hold.
    const PHYS_LIMIT: u64 = PHYS_LIMIT;

    /// What `entry`, found in a table of level `level`, means.
    fn decode(entry: u64, level: Level) -> Entry;

    /// The entry that maps a page of `size`.
    fn encode_leaf(leaf: Leaf, size: PageSize) -> u64;

    /// The entry that points to `table`, a multiple of 4096 below 2^52, and restricts nothing.
    fn encode_table(table: HostPhysAddr) -> u64;
}

/// Bits 51:12, the address field of both x86 formats (APM volume 2, section 5.3.1; SDM volume 3C, "Format of an EPT
/// Page-Table Entry that Maps a 4-KByte Page"). A CPU with fewer physical address bits reserves the rest.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

const fn flag(set: bool, bit: u64) -> u64 {
    if set {
        bit
    } else {
        0
    }
}

/// AMD nested paging: the long-mode page-table format, walked as user accesses (APM volume 2, sections 5.3 and 15.25).
#[derive(Clone, Copy, Debug)]
pub enum Npt {}

impl Npt {
    /// Bit 0, P: present (APM volume 2, section 5.4.1).
    const PRESENT: u64 = 1 << 0;
    /// Bit 1, R/W: writable; the levels' bits are ANDed (section 5.4.1).
    const WRITABLE: u64 = 1 << 1;
    /// Bit 2, U/S: the nested walk counts as a user access, so every entry needs it (section 15.25.5).
    const USER: u64 = 1 << 2;
    /// Bit 3, PWT: bit 0 of the PAT index (section 7.8.2).
    const PWT: u64 = 1 << 3;
    /// Bit 4, PCD: bit 1 of the PAT index (section 7.8.2).
    const PCD: u64 = 1 << 4;
    /// Bit 5, A: accessed, set by the CPU (section 5.4.1; for nested tables, 15.25.5).
    const ACCESSED: u64 = 1 << 5;
    /// Bit 6, D: dirty, set by the CPU in leaves (section 5.4.1; for nested tables, 15.25.5).
    const DIRTY: u64 = 1 << 6;
    /// Bit 7, PS: a leaf at levels 2 and 3 (section 5.3.3). At level 1 it is bit 2 of the PAT index, which stays 0.
    const PAGE_SIZE: u64 = 1 << 7;
    /// Bit 9, free for software (section 5.4.1, "AVL"): execution is withheld.
    const WITHHELD: u64 = 1 << 9;
    /// Bit 63, NX: no instruction fetches; the levels' bits are ORed (section 5.6.1). Host EFER.NXE must be set, as
    /// it is under Linux.
    const NO_EXECUTE: u64 = 1 << 63;
    // Bit 8, G, has no meaning in nested tables (section 15.25.5); bits 11:10 and 58:52 are free for software; bits 62:59
    // are the protection key with CR4.PKE. They stay 0.
}

impl Format for Npt {
    #[inline]
    fn decode(entry: u64, level: Level) -> Entry {
        if entry & Self::PRESENT == 0 {
            return Entry::Empty;
        }
        let large = entry & Self::PAGE_SIZE != 0;
        let size = match level.page_size() {
            Some(size) if size == PageSize::Size4K || large => size,
            _ => return Entry::Table(HostPhysAddr::new(entry & ADDRESS)),
        };
        let mut perms = Permissions::READ;
        if entry & Self::WRITABLE != 0 {
            perms = perms.union(Permissions::WRITE);
        }
        if entry & Self::NO_EXECUTE == 0 {
            perms = perms.union(Permissions::EXECUTE);
        }
        Entry::Leaf(Leaf {
            // A large leaf has bit 2 of the PAT index in bit 12, below its address.
            hpa: HostPhysAddr::new(entry & ADDRESS).align_down(size.bytes()),
            perms,
            withheld: entry & Self::WITHHELD != 0,
            memory_type: if entry & (Self::PWT | Self::PCD) == 0 {
                MemoryType::WriteBack
            } else {
                MemoryType::Uncacheable
            },
            accessed: entry & Self::ACCESSED != 0,
            dirty: entry & Self::DIRTY != 0,
        })
    }

    /// The memory type is an index into the PAT that the host has when it enters the guest (APM volume 2, section
    /// 15.25.8): entry 0 is write-back and entry 3 is uncacheable, both at reset (section 7.8.1) and under Linux
    /// (`arch/x86/mm/pat/memtype.c`).
    #[inline]
    fn encode_leaf(leaf: Leaf, size: PageSize) -> u64 {
        (leaf.hpa.as_u64() & ADDRESS)
            | Self::PRESENT
            | Self::USER
            | flag(leaf.perms.contains(Permissions::WRITE), Self::WRITABLE)
            | flag(!leaf.perms.contains(Permissions::EXECUTE), Self::NO_EXECUTE)
            | flag(leaf.withheld, Self::WITHHELD)
            | flag(leaf.memory_type == MemoryType::Uncacheable, Self::PWT | Self::PCD)
            | flag(leaf.accessed, Self::ACCESSED)
            | flag(leaf.dirty, Self::DIRTY)
            | flag(size != PageSize::Size4K, Self::PAGE_SIZE)
    }

    #[inline]
    fn encode_table(table: HostPhysAddr) -> u64 {
        (table.as_u64() & ADDRESS) | Self::PRESENT | Self::WRITABLE | Self::USER
    }
}

/// Intel extended page tables (SDM volume 3C, chapter "VMX Support for Address Translation", section "The Extended
/// Page Table Mechanism"; the tables there are titled "Format of an EPT ... Entry").
#[derive(Clone, Copy, Debug)]
pub enum Ept {}

impl Ept {
    /// Bit 0: data reads. Bits 2:0 all zero mean "not present".
    const READ: u64 = 1 << 0;
    /// Bit 1: data writes. Writable without readable is a misconfiguration (section "EPT Misconfigurations").
    const WRITE: u64 = 1 << 1;
    /// Bit 2: instruction fetches (from supervisor-mode addresses only, with mode-based execute control, which stays off).
    const EXECUTE: u64 = 1 << 2;
    /// Bits 5:3 of a leaf: memory type. 0 is UC, 6 is WB (section "Memory Type Used for Translated Guest-Physical
    /// Addresses").
    const TYPE: u64 = 7 << 3;
    /// Memory type WB.
    const TYPE_WRITE_BACK: u64 = 6 << 3;
    /// Bit 6 of a leaf: ignore the guest's PAT. Set for write-back memory, which the host maps write-back too: a guest
    /// must not make an alias of another type (SDM volume 3A, "Programming the PAT").
    const IGNORE_PAT: u64 = 1 << 6;
    /// Bit 7: a leaf at levels 2 and 3. Ignored at level 1.
    const PAGE_SIZE: u64 = 1 << 7;
    /// Bit 8: accessed, set by the CPU if EPTP bit 6 is set (section "Accessed and Dirty Flags for EPT"). Ignored otherwise.
    const ACCESSED: u64 = 1 << 8;
    /// Bit 9 of a leaf: dirty, likewise.
    const DIRTY: u64 = 1 << 9;
    /// Bit 11, ignored: execution is withheld.
    const WITHHELD: u64 = 1 << 11;
    // Bit 10 allows user-mode fetches under mode-based execute control; bit 57 is "verify guest paging", 58
    // "paging-write access", 60 "supervisor shadow stack", 61 "sub-page write permissions", 63 "suppress #VE": each means
    // something only under a VM-execution control of its own. Bits 56:52, 59 and 62 are ignored. They stay 0.
}

impl Format for Ept {
    #[inline]
    fn decode(entry: u64, level: Level) -> Entry {
        if entry & (Self::READ | Self::WRITE | Self::EXECUTE) == 0 {
            return Entry::Empty;
        }
        let large = entry & Self::PAGE_SIZE != 0;
        let size = match level.page_size() {
            Some(size) if size == PageSize::Size4K || large => size,
            _ => return Entry::Table(HostPhysAddr::new(entry & ADDRESS)),
        };
        let mut perms = Permissions::NONE;
        for (bit, perm) in
            [(Self::READ, Permissions::READ), (Self::WRITE, Permissions::WRITE), (Self::EXECUTE, Permissions::EXECUTE)]
        {
            if entry & bit != 0 {
                perms = perms.union(perm);
            }
        }
        Entry::Leaf(Leaf {
            hpa: HostPhysAddr::new(entry & ADDRESS).align_down(size.bytes()),
            perms,
            withheld: entry & Self::WITHHELD != 0,
            memory_type: if entry & Self::TYPE == Self::TYPE_WRITE_BACK {
                MemoryType::WriteBack
            } else {
                MemoryType::Uncacheable
            },
            accessed: entry & Self::ACCESSED != 0,
            dirty: entry & Self::DIRTY != 0,
        })
    }

    #[inline]
    fn encode_leaf(leaf: Leaf, size: PageSize) -> u64 {
        (leaf.hpa.as_u64() & ADDRESS)
            | flag(leaf.perms.contains(Permissions::READ), Self::READ)
            | flag(leaf.perms.contains(Permissions::WRITE), Self::WRITE)
            | flag(leaf.perms.contains(Permissions::EXECUTE), Self::EXECUTE)
            | flag(leaf.withheld, Self::WITHHELD)
            // UC is type 0. With PAT not ignored, a guest may make it WC (SDM volume 3A, "Effective Memory Types").
            | flag(leaf.memory_type == MemoryType::WriteBack, Self::TYPE_WRITE_BACK | Self::IGNORE_PAT)
            | flag(leaf.accessed, Self::ACCESSED)
            | flag(leaf.dirty, Self::DIRTY)
            | flag(size != PageSize::Size4K, Self::PAGE_SIZE)
    }

    #[inline]
    fn encode_table(table: HostPhysAddr) -> u64 {
        (table.as_u64() & ADDRESS) | Self::READ | Self::WRITE | Self::EXECUTE
    }
}

/// AArch64 stage 2 with the 4 KiB granule and 48-bit addresses (Arm ARM D8.3, "Translation table descriptor formats").
#[derive(Clone, Copy, Debug)]
pub enum Stage2 {}

/// AArch64 stage 2 with the 4 KiB granule and 52-bit addresses: FEAT_LPA2, with VTCR_EL2.DS set.
#[derive(Clone, Copy, Debug)]
pub enum Stage2Lpa2 {}

/// What the two have in common. Access and dirty flags are ours: bits that the hardware ignores. The hardware's own access
/// flag is always set (without it an access faults) and its dirty state management stays off.
mod stage2 {
    use super::{flag, Entry, Leaf, Level, MemoryType, PageSize, Permissions};
    use crate::HostPhysAddr;

    /// Bit 0: valid.
    const VALID: u64 = 1 << 0;
    /// Bit 1: a table, or at the lowest level a page; clear for a block.
    const TABLE: u64 = 1 << 1;
    /// Bits 5:2, MemAttr: 0b1111 normal memory, write-back inside and outside; 0b0001 Device-nGnRE. The guest's own
    /// attributes may be stronger, never weaker (D8.6.6, "Stage 2 memory type and Cacheability attributes").
    const WRITE_BACK: u64 = 0b1111 << 2;
    const DEVICE: u64 = 0b0001 << 2;
    const MEM_ATTR: u64 = 0b1111 << 2;
    /// Bit 6, S2AP\[0\]: reads.
    const READ: u64 = 1 << 6;
    /// Bit 7, S2AP\[1\]: writes.
    const WRITE: u64 = 1 << 7;
    /// Bits 9:8, SH: inner shareable. With 52-bit addresses VTCR_EL2.SH0 says so, and bits 51:50 of the address are here.
    pub(super) const INNER_SHAREABLE: u64 = 0b11 << 8;
    /// Bit 10, AF.
    const ACCESS_FLAG: u64 = 1 << 10;
    /// Bits 54:53, XN: 0b10 forbids execution at EL1 and EL0.
    const NO_EXECUTE: u64 = 1 << 54;
    /// Bit 55, free for software: accessed.
    const ACCESSED: u64 = 1 << 55;
    /// Bit 56, free for software: dirty.
    const DIRTY: u64 = 1 << 56;
    /// Bit 57, free for software: execution is withheld.
    const WITHHELD: u64 = 1 << 57;

    pub(super) fn decode(entry: u64, level: Level, address: HostPhysAddr) -> Entry {
        if entry & VALID == 0 {
            return Entry::Empty;
        }
        let size = match level.page_size() {
            Some(size) if size == PageSize::Size4K || entry & TABLE == 0 => size,
            _ => return Entry::Table(address),
        };
        let mut perms = Permissions::NONE;
        for (set, perm) in [
            (entry & READ != 0, Permissions::READ),
            (entry & WRITE != 0, Permissions::WRITE),
            (entry & NO_EXECUTE == 0, Permissions::EXECUTE),
        ] {
            if set {
                perms = perms.union(perm);
            }
        }
        Entry::Leaf(Leaf {
            hpa: address.align_down(size.bytes()),
            perms,
            withheld: entry & WITHHELD != 0,
            memory_type: if entry & MEM_ATTR == WRITE_BACK { MemoryType::WriteBack } else { MemoryType::Uncacheable },
            accessed: entry & ACCESSED != 0,
            dirty: entry & DIRTY != 0,
        })
    }

    /// All of a leaf but its address and shareability.
    pub(super) fn encode_leaf(leaf: Leaf, size: PageSize) -> u64 {
        VALID
            | flag(size == PageSize::Size4K, TABLE)
            | if leaf.memory_type == MemoryType::WriteBack { WRITE_BACK } else { DEVICE }
            | flag(leaf.perms.contains(Permissions::READ), READ)
            | flag(leaf.perms.contains(Permissions::WRITE), WRITE)
            | ACCESS_FLAG
            | flag(!leaf.perms.contains(Permissions::EXECUTE), NO_EXECUTE)
            | flag(leaf.withheld, WITHHELD)
            | flag(leaf.accessed, ACCESSED)
            | flag(leaf.dirty, DIRTY)
    }

    /// All of a table entry but its address.
    pub(super) const TABLE_ENTRY: u64 = VALID | TABLE;
}

impl Stage2 {
    /// Bits 47:12.
    const ADDRESS: u64 = 0x0000_ffff_ffff_f000;
}

impl Format for Stage2 {
    const PHYS_LIMIT: u64 = 1 << 48;

    #[inline]
    fn decode(entry: u64, level: Level) -> Entry {
        stage2::decode(entry, level, HostPhysAddr::new(entry & Self::ADDRESS))
    }

    #[inline]
    fn encode_leaf(leaf: Leaf, size: PageSize) -> u64 {
        (leaf.hpa.as_u64() & Self::ADDRESS) | stage2::encode_leaf(leaf, size) | stage2::INNER_SHAREABLE
    }

    #[inline]
    fn encode_table(table: HostPhysAddr) -> u64 {
        (table.as_u64() & Self::ADDRESS) | stage2::TABLE_ENTRY
    }
}

impl Stage2Lpa2 {
    /// Bits 49:12 of the address, in their place.
    const LOW: u64 = 0x0003_ffff_ffff_f000;
    /// Bits 51:50 of the address lie in bits 9:8 of the entry.
    const HIGH: u64 = 0b11 << 8;
    const HIGH_SHIFT: u32 = 42;

    const fn address(entry: u64) -> HostPhysAddr {
        HostPhysAddr::new((entry & Self::LOW) | ((entry & Self::HIGH) << Self::HIGH_SHIFT))
    }

    const fn address_bits(address: HostPhysAddr) -> u64 {
        (address.as_u64() & Self::LOW) | ((address.as_u64() >> Self::HIGH_SHIFT) & Self::HIGH)
    }
}

impl Format for Stage2Lpa2 {
    #[inline]
    fn decode(entry: u64, level: Level) -> Entry {
        stage2::decode(entry, level, Self::address(entry))
    }

    #[inline]
    fn encode_leaf(leaf: Leaf, size: PageSize) -> u64 {
        Self::address_bits(leaf.hpa) | stage2::encode_leaf(leaf, size)
    }

    #[inline]
    fn encode_table(table: HostPhysAddr) -> u64 {
        Self::address_bits(table) | stage2::TABLE_ENTRY
    }
}
