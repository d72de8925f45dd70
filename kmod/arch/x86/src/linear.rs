// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! Reads guest memory by linear address: through the guest's own page tables (APM vol. 2 chapter 5) and whatever is behind a
//! guest physical address. For fetching an intercepted instruction that the CPU has just fetched itself, so permissions are
//! not checked again, and accessed bits not set.

use crate::regs::{cr0, cr4, efer};

/// Guest physical memory.
pub(crate) trait GuestMemory {
    /// Reads from `gpa` to fill `buffer`, which does not run over the end of a page. False if nothing is mapped there.
    fn read(&self, gpa: u64, buffer: &mut [u8]) -> bool;
}

/// Registers that decide how linear addresses are translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Paging {
    pub(crate) cr0: u64,
    pub(crate) cr3: u64,
    pub(crate) cr4: u64,
    pub(crate) efer: u64,
}

const PRESENT: u64 = 1 << 0;
const LARGE: u64 = 1 << 7;
/// Physical address in a 64-bit entry.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
const PAGE: u64 = 4096;
/// Log2 of what one entry spans at each level of 64-bit tables, from the fifth down.
const SHIFTS: [u32; 5] = [48, 39, 30, 21, 12];

impl Paging {
    /// The guest physical address of `linear`, or `None` if it is not mapped.
    pub(crate) fn translate(&self, memory: &impl GuestMemory, linear: u64) -> Option<u64> {
        if self.cr0 & cr0::PG == 0 {
            return Some(linear & 0xffff_ffff);
        }
        if self.cr4 & cr4::PAE == 0 {
            return self.two_levels(memory, linear & 0xffff_ffff);
        }
        if self.efer & efer::LMA == 0 {
            // Four page-directory pointers, 32 bytes aligned, without a size bit.
            let linear = linear & 0xffff_ffff;
            let entry = entry64(memory, (self.cr3 & 0xffff_ffe0) + (linear >> 30) * 8)?;
            return long(memory, entry & ADDRESS, &SHIFTS[3..], linear);
        }
        let (shifts, sign) =
            if self.cr4 & cr4::LA57 != 0 { (&SHIFTS[..], 1u64 << 56) } else { (&SHIFTS[1..], 1 << 47) };
        // Canonical: all bits from the sign bit on are alike.
        let upper = linear & sign.wrapping_neg();
        if upper != 0 && upper != sign.wrapping_neg() {
            return None;
        }
        long(memory, self.cr3 & ADDRESS, shifts, linear)
    }

    /// Legacy paging: 32-bit entries, two levels.
    fn two_levels(&self, memory: &impl GuestMemory, linear: u64) -> Option<u64> {
        let directory = entry32(memory, (self.cr3 & 0xffff_f000) + (linear >> 22) * 4)?;
        if directory & LARGE != 0 && self.cr4 & cr4::PSE != 0 {
            // PSE-36: bits 20:13 of the entry are bits 39:32 of the address.
            let high = directory >> 13 & 0xff;
            return Some(high << 32 | directory & 0xffc0_0000 | linear & 0x3f_ffff);
        }
        let entry = entry32(memory, (directory & 0xffff_f000) + (linear >> 12 & 0x3ff) * 4)?;
        Some(entry & 0xffff_f000 | linear & (PAGE - 1))
    }

    /// Reads from `linear` to fill as much of `buffer` as is mapped, and tells how much that is. `wrap` is the mask of a
    /// linear address: it wraps at 4 GiB outside of 64-bit code.
    pub(crate) fn read(&self, memory: &impl GuestMemory, linear: u64, wrap: u64, buffer: &mut [u8]) -> usize {
        let mut done = 0usize;
        while let Some(rest) = buffer.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let address = linear.wrapping_add(done as u64) & wrap;
            let in_page = (PAGE - (address & (PAGE - 1))) as usize;
            let count = rest.len().min(in_page);
            let (Some(gpa), Some(part)) = (self.translate(memory, address), rest.get_mut(..count)) else { break };
            if !memory.read(gpa, part) {
                break;
            }
            done = done.saturating_add(count);
        }
        done
    }
}

/// Walks 64-bit tables from `table` on, whose index fields start at the bits `shifts`, from the top.
fn long(memory: &impl GuestMemory, table: u64, shifts: &[u32], linear: u64) -> Option<u64> {
    let mut table = table;
    for &shift in shifts {
        let index = linear.wrapping_shr(shift) & 0x1ff;
        let entry = entry64(memory, table + index * 8)?;
        if shift == 12 || (shift <= 30 && entry & LARGE != 0) {
            let offset = 1u64.wrapping_shl(shift).wrapping_sub(1);
            return Some(entry & ADDRESS & !offset | linear & offset);
        }
        table = entry & ADDRESS;
    }
    None
}

/// A present 64-bit entry.
fn entry64(memory: &impl GuestMemory, gpa: u64) -> Option<u64> {
    let mut bytes = [0; 8];
    if !memory.read(gpa, &mut bytes) {
        return None;
    }
    Some(u64::from_le_bytes(bytes)).filter(|entry| entry & PRESENT != 0)
}

/// A present 32-bit entry.
fn entry32(memory: &impl GuestMemory, gpa: u64) -> Option<u64> {
    let mut bytes = [0; 4];
    if !memory.read(gpa, &mut bytes) {
        return None;
    }
    Some(u64::from(u32::from_le_bytes(bytes))).filter(|entry| entry & PRESENT != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    /// Pages by guest physical address.
    #[derive(Default)]
    struct Memory(BTreeMap<u64, [u8; 4096]>);

    impl Memory {
        fn put(&mut self, gpa: u64, bytes: &[u8]) {
            let page = self.0.entry(gpa & !0xfff).or_insert([0; 4096]);
            let at = (gpa & 0xfff) as usize;
            page[at..at + bytes.len()].copy_from_slice(bytes);
        }
        fn put64(&mut self, gpa: u64, value: u64) {
            self.put(gpa, &value.to_le_bytes());
        }
        fn put32(&mut self, gpa: u64, value: u32) {
            self.put(gpa, &value.to_le_bytes());
        }
    }

    impl GuestMemory for Memory {
        fn read(&self, gpa: u64, buffer: &mut [u8]) -> bool {
            let at = (gpa & 0xfff) as usize;
            let Some(page) = self.0.get(&(gpa & !0xfff)) else { return false };
            buffer.copy_from_slice(&page[at..at + buffer.len()]);
            true
        }
    }

    fn paging(cr3: u64, cr4: u64, efer: u64) -> Paging {
        Paging { cr0: cr0::PG | cr0::PE, cr3, cr4, efer }
    }

    #[test]
    fn without_paging_linear_is_physical() {
        let off = Paging { cr0: 0, ..paging(0x1000, 0, 0) };
        assert_eq!(off.translate(&Memory::default(), 0x1_0000_7c00), Some(0x7c00));
    }

    #[test]
    fn two_level_tables() {
        let mut m = Memory::default();
        m.put32(0x1000 + 4, 0x2001); // 4 MiB up: a table
        m.put32(0x2000 + 4 * 3, 0x0abc_d001);
        m.put32(0x1000 + 8, 0x0040_0000 | 0x2_2000 | 0x81); // 8 MiB up: a large page with PSE-36 bits 0x11
        let pse = paging(0x1018, cr4::PSE, 0);
        assert_eq!(pse.translate(&m, 0x0040_3123), Some(0x0abc_d123));
        assert_eq!(pse.translate(&m, 0x0081_2345), Some(0x11_0041_2345));
        assert_eq!(pse.translate(&m, 0x0040_4000), None, "entry not present");
        assert_eq!(pse.translate(&m, 0x00c0_0000), None, "directory entry not present");
        m.put32(0x0042_2000 + 4 * 0x12, 0x7001);
        assert_eq!(
            paging(0x1000, 0, 0).translate(&m, 0x0081_2345),
            Some(0x7345),
            "the size bit means nothing without PSE"
        );
    }

    #[test]
    fn pae_tables() {
        let mut m = Memory::default();
        m.put64(0x1020 + 8 * 3, 0x2001); // third gigabyte; the pointer table is only 32-byte aligned
        m.put64(0x2000 + 8 * 5, 0x3001);
        m.put64(0x3000 + 8 * 7, 0x8000_0012_3456_7001); // NX set
        m.put64(0x2000 + 8 * 6, 0x4_0060_0081); // 2 MiB
        let pae = paging(0x1020, cr4::PAE, 0);
        assert_eq!(pae.translate(&m, 0xc0a0_7fff), Some(0x12_3456_7fff));
        assert_eq!(pae.translate(&m, 0xc0c1_2345), Some(0x4_0061_2345));
        assert_eq!(pae.translate(&m, 0x0000_0000), None);
    }

    #[test]
    fn four_and_five_levels() {
        let mut m = Memory::default();
        let linear = 0xffff_8123_4567_89abu64;
        let index = |level: u32| linear >> (3 + 9 * level) & 0x1ff;
        m.put64(0x5000 + index(5) * 8, 0x1001);
        m.put64(0x1000 + index(4) * 8, 0x2001);
        m.put64(0x2000 + index(3) * 8, 0x3001);
        m.put64(0x3000 + index(2) * 8, 0x4001);
        m.put64(0x4000 + index(1) * 8, 0x000f_f000_0000_7001);
        let lma = efer::LMA | efer::LME;
        assert_eq!(paging(0x1000 | 0x18, cr4::PAE, lma).translate(&m, linear), Some(0xf_f000_0000_79ab));
        assert_eq!(paging(0x5000, cr4::PAE | cr4::LA57, lma).translate(&m, linear), Some(0xf_f000_0000_79ab));
        assert_eq!(paging(0x1000, cr4::PAE, lma).translate(&m, linear & !(1 << 63)), None, "not canonical");
        m.put64(0x3000 + index(2) * 8, 0x4020_0081);
        assert_eq!(paging(0x1000, cr4::PAE, lma).translate(&m, linear), Some(0x4020_0000 | linear & 0x1f_ffff));
        m.put64(0x2000 + index(3) * 8, 0x8000_0081);
        assert_eq!(paging(0x1000, cr4::PAE, lma).translate(&m, linear), Some(0x8000_0000 | linear & 0x3fff_ffff));
        m.put64(0x1000 + index(4) * 8, 0x2000);
        assert_eq!(paging(0x1000, cr4::PAE, lma).translate(&m, linear), None);
    }

    #[test]
    fn reads_cross_pages_and_stop_where_nothing_is_mapped() {
        let mut m = Memory::default();
        let off = Paging { cr0: 0, ..paging(0, 0, 0) };
        m.put(0x1ffe, &[1, 2]);
        m.put(0x2000, &[3, 4, 5]);
        let mut buffer = [0; 15];
        assert_eq!(off.read(&m, 0x1ffe, u64::MAX, &mut buffer), 15);
        assert_eq!(buffer[..5], [1, 2, 3, 4, 5]);
        assert_eq!(off.read(&m, 0x2ffe, u64::MAX, &mut buffer), 2);
        assert_eq!(off.read(&m, 0x5000, u64::MAX, &mut buffer), 0);
        m.put(0xffff_fffe, &[8, 9]);
        m.put(0, &[7]);
        assert_eq!(off.read(&m, 0xffff_fffe, 0xffff_ffff, &mut buffer[..3]), 3);
        assert_eq!(buffer[..3], [8, 9, 7], "32-bit code wraps");
    }
}
