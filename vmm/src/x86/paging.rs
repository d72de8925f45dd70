// SPDX-License-Identifier: MIT OR Apache-2.0
//! The guest page-table walker: linear address in, guest physical address or page-fault error code out.
//!
//! Owns every paging mode a guest can be in: none, 32-bit two-level with 4 MiB pages, PAE, four and five
//! levels. It reads and updates tables only through [`GuestMemory`] and knows nothing of devices or
//! instructions. The rules are those of AMD APM volume 2 chapter 5 and Intel SDM volume 3A chapter 5
//! ("Paging"; chapter 4 in editions before 2023).
//!
//! Not modelled: protection keys (CR4.PKE, CR4.PKS) and shadow-stack pages (CR4.CET). A guest that uses them is
//! checked against the remaining rules.

use axvcpu_uapi::addr::{GuestPhysAddr, GuestVirtAddr};

#[cfg(test)]
mod tests;

/// Control-register and EFER bits that paging depends on (APM volume 2, sections 3.1.1 to 3.1.7).
pub mod bits {
    /// CR0.PE: protected mode.
    pub const CR0_PE: u64 = 1 << 0;
    /// CR0.WP: supervisor writes honour read-only pages.
    pub const CR0_WP: u64 = 1 << 16;
    /// CR0.PG: paging on.
    pub const CR0_PG: u64 = 1 << 31;
    /// CR4.PSE: 4 MiB pages in 32-bit paging.
    pub const CR4_PSE: u64 = 1 << 4;
    /// CR4.PAE: 64-bit entries.
    pub const CR4_PAE: u64 = 1 << 5;
    /// CR4.LA57: five levels.
    pub const CR4_LA57: u64 = 1 << 12;
    /// CR4.SMEP: no supervisor fetch from user pages.
    pub const CR4_SMEP: u64 = 1 << 20;
    /// CR4.SMAP: no supervisor data access to user pages unless RFLAGS.AC is set.
    pub const CR4_SMAP: u64 = 1 << 21;
    /// EFER.LMA: long mode active.
    pub const EFER_LMA: u64 = 1 << 10;
    /// EFER.NXE: bit 63 of an entry is no-execute instead of reserved.
    pub const EFER_NXE: u64 = 1 << 11;
}

/// Page-fault error code bits (APM volume 2, section 8.4.2).
pub mod fault {
    /// The page was present; the fault is a protection violation.
    pub const PRESENT: u32 = 1 << 0;
    /// The access was a write.
    pub const WRITE: u32 = 1 << 1;
    /// The access came from CPL 3.
    pub const USER: u32 = 1 << 2;
    /// A reserved bit was set in a present entry.
    pub const RESERVED: u32 = 1 << 3;
    /// The access was an instruction fetch (reported only while NX or SMEP is on).
    pub const FETCH: u32 = 1 << 4;
}

/// Guest RAM as the walker and the emulator see it.
///
/// An address without RAM behind it reads as all ones, which is what the bus of a PC returns: a walk through
/// such a table then ends in a page fault or in more all-ones addresses, as on hardware.
pub trait GuestMemory {
    /// Why an access failed on the host's side; the guest never sees it.
    type Error;

    /// Reads `data.len()` bytes at `at`. A naturally aligned read of 2, 4 or 8 bytes must be a single access:
    /// page-table entries are read so while other vCPUs change them.
    ///
    /// # Errors
    /// The memory cannot be read by the host.
    fn read(&mut self, at: GuestPhysAddr, data: &mut [u8]) -> Result<(), Self::Error>;

    /// Atomically replaces the `width` bytes at `at` (1, 2, 4 or 8, naturally aligned, little endian) by `new` if
    /// they equal `old`, and says whether it did. Without RAM at `at` it does nothing and answers `true`.
    ///
    /// # Errors
    /// The memory cannot be accessed by the host.
    fn compare_exchange(&mut self, at: GuestPhysAddr, width: usize, old: u64, new: u64) -> Result<bool, Self::Error>;
}

/// What a translation is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Data read.
    Read,
    /// Data write, or a read that the same instruction will follow by a write.
    Write,
    /// Instruction fetch.
    Execute,
}

/// The processor state that decides how addresses translate.
#[derive(Clone, Copy, Debug)]
pub struct PagingState {
    /// CR0.
    pub cr0: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// EFER.
    pub efer: u64,
    /// Current privilege level, 0 to 3.
    pub cpl: u8,
    /// RFLAGS.AC, which lifts SMAP.
    pub ac: bool,
    /// Physical address width told to the guest by CPUID 8000_0008h EAX bits 7:0, 32 to 52.
    pub phys_bits: u8,
    /// Whether CPUID tells the guest of 1 GiB pages; without them the size bit of a PDPTE is reserved.
    pub gib_pages: bool,
}

/// Where a linear address leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// The physical address of the very byte asked for.
    pub gpa: GuestPhysAddr,
    /// Size in bytes of the page it lies in: 4 KiB, 2 MiB, 4 MiB or 1 GiB; 4 KiB while paging is off.
    pub page_size: u64,
}

/// Why a walk gave no address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WalkError<E> {
    /// The guest gets #PF with this error code.
    PageFault {
        /// Bits of [`fault`].
        code: u32,
    },
    /// The tables could not be read or updated.
    Memory(E),
}

impl<E> From<E> for WalkError<E> {
    fn from(error: E) -> Self {
        WalkError::Memory(error)
    }
}

const P: u64 = 1 << 0;
const RW: u64 = 1 << 1;
const US: u64 = 1 << 2;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
const PS: u64 = 1 << 7;
const NX: u64 = 1 << 63;

/// One of the four table formats (APM volume 2, figures 5-2 to 5-24).
#[derive(Clone, Copy, PartialEq, Eq)]
enum Format {
    Legacy32,
    Pae,
    Long,
}

/// An entry met on the way, remembered so that its accessed and dirty bits can be set once the walk succeeded.
#[derive(Clone, Copy, Debug)]
struct Visited {
    at: GuestPhysAddr,
    entry: u64,
}

impl Visited {
    const NONE: Self = Self { at: GuestPhysAddr::new(0), entry: 0 };
}

/// At most five levels.
const MAX_LEVELS: usize = 5;

/// The entries that a walk went by, but for PAE's PDPTEs.
#[derive(Clone, Copy, Debug)]
pub struct Path {
    visited: [Visited; MAX_LEVELS],
    depth: usize,
    entry_bytes: usize,
}

impl Path {
    const EMPTY: Self = Self { visited: [Visited::NONE; MAX_LEVELS], depth: 0, entry_bytes: 8 };

    /// Whether all of its entries are as the walk has left them: another one, by the same processor state for the same
    /// address and access, would then go by them again and change nothing. Not to be asked of PAE paging.
    ///
    /// # Errors
    /// The tables could not be read.
    pub fn holds<M: GuestMemory>(&self, memory: &mut M) -> Result<bool, M::Error> {
        for step in self.visited.iter().take(self.depth) {
            if read_entry(memory, step.at, self.entry_bytes)? != step.entry {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// Translates `linear` for `access`, setting accessed and dirty bits as the processor would.
///
/// Nothing is changed when the walk ends in a fault. The caller has checked that the address is canonical;
/// outside long mode only its low 32 bits count.
///
/// # Errors
/// [`WalkError::PageFault`] with the error code the guest is to get, or [`WalkError::Memory`] if `memory` failed.
pub fn translate<M: GuestMemory>(
    state: &PagingState,
    memory: &mut M,
    linear: GuestVirtAddr,
    access: Access,
) -> Result<Translation, WalkError<M::Error>> {
    trace(state, memory, linear, access).map(|(translation, _)| translation)
}

/// [`translate`], with the way: there is none while paging is off.
///
/// # Errors
/// As for [`translate`].
pub fn trace<M: GuestMemory>(
    state: &PagingState,
    memory: &mut M,
    linear: GuestVirtAddr,
    access: Access,
) -> Result<(Translation, Path), WalkError<M::Error>> {
    let mut path = Path::EMPTY;
    if state.cr0 & bits::CR0_PG == 0 {
        let gpa = GuestPhysAddr::new(linear.as_u64() & 0xffff_ffff);
        return Ok((Translation { gpa, page_size: 4096 }, path));
    }
    // Another vCPU may change an entry between our read and our update of its A/D bits; the processor then walks
    // again, and so do we. Each round means that somebody else made progress.
    loop {
        if let Some(translation) = walk(state, memory, linear, access, &mut path)? {
            return Ok((translation, path));
        }
    }
}

/// One walk; `None` if an entry changed under it.
fn walk<M: GuestMemory>(
    state: &PagingState,
    memory: &mut M,
    linear: GuestVirtAddr,
    access: Access,
    path: &mut Path,
) -> Result<Option<Translation>, WalkError<M::Error>> {
    let (format, mut level) = match () {
        () if state.cr4 & bits::CR4_PAE == 0 => (Format::Legacy32, 2),
        () if state.efer & bits::EFER_LMA == 0 => (Format::Pae, 3),
        () if state.cr4 & bits::CR4_LA57 == 0 => (Format::Long, 4),
        () => (Format::Long, 5),
    };
    let linear = if format == Format::Long { linear.as_u64() } else { linear.as_u64() & 0xffff_ffff };
    let (entry_bytes, index_bits) = if format == Format::Legacy32 { (4, 10) } else { (8, 9) };
    let mut table = match format {
        Format::Legacy32 => state.cr3 & 0xffff_f000,
        Format::Pae => state.cr3 & 0xffff_ffe0,
        Format::Long => state.cr3 & address_mask(state),
    };

    path.depth = 0;
    path.entry_bytes = entry_bytes;
    let mut allowed = RW | US;
    let mut no_execute = false;
    loop {
        let shift = 12 + index_bits * (level - 1);
        let index = (linear >> shift) & ((1 << index_bits) - 1);
        let at = GuestPhysAddr::new(table + index * entry_bytes as u64);
        let entry = read_entry(memory, at, entry_bytes)?;
        if entry & P == 0 {
            return Err(page_fault(state, access, 0));
        }
        let leaf = level == 1 || is_large(state, format, level, entry);
        if entry & reserved_bits(state, format, level, leaf) != 0 {
            return Err(page_fault(state, access, fault::PRESENT | fault::RESERVED));
        }
        // PAE's PDPTEs carry neither permissions nor an accessed bit.
        if !(format == Format::Pae && level == 3) {
            allowed &= entry;
            no_execute |= format != Format::Legacy32 && entry & NX != 0;
            if let Some(slot) = path.visited.get_mut(path.depth) {
                *slot = Visited { at, entry };
                path.depth += 1;
            }
        }
        if !leaf {
            table = if format == Format::Legacy32 { entry & 0xffff_f000 } else { entry & address_mask(state) };
            level -= 1;
            continue;
        }

        if !permitted(state, access, allowed, no_execute) {
            return Err(page_fault(state, access, fault::PRESENT));
        }
        let depth = path.depth;
        for (i, step) in path.visited.iter_mut().take(depth).enumerate() {
            let dirty = if i + 1 == depth && access == Access::Write { D } else { 0 };
            let new = step.entry | A | dirty;
            if new != step.entry && !memory.compare_exchange(step.at, entry_bytes, step.entry, new)? {
                return Ok(None);
            }
            step.entry = new;
        }
        let page_size = 1u64 << shift;
        let frame = if format == Format::Legacy32 && level == 2 {
            // PSE-36: bits 20:13 of the entry are bits 39:32 of the address.
            (entry & 0xffc0_0000) | ((entry >> 13) & 0xff) << 32
        } else if format == Format::Legacy32 {
            entry & 0xffff_f000
        } else {
            entry & address_mask(state)
        };
        let gpa = GuestPhysAddr::new((frame & !(page_size - 1)) | (linear & (page_size - 1)));
        return Ok(Some(Translation { gpa, page_size }));
    }
}

fn read_entry<M: GuestMemory>(memory: &mut M, at: GuestPhysAddr, bytes: usize) -> Result<u64, M::Error> {
    if bytes == 4 {
        let mut raw = [0; 4];
        memory.read(at, &mut raw)?;
        Ok(u32::from_le_bytes(raw).into())
    } else {
        let mut raw = [0; 8];
        memory.read(at, &mut raw)?;
        Ok(u64::from_le_bytes(raw))
    }
}

/// The address field of a 64-bit entry: bits 51:12 as far as the physical width reaches.
fn address_mask(state: &PagingState) -> u64 {
    let width = u32::from(state.phys_bits.clamp(32, 52));
    ((1 << width) - 1) & !0xfff
}

/// Whether a present entry above level 1 maps a page itself.
fn is_large(state: &PagingState, format: Format, level: u32, entry: u64) -> bool {
    entry & PS != 0
        && match (format, level) {
            (Format::Legacy32, 2) => state.cr4 & bits::CR4_PSE != 0,
            (Format::Pae | Format::Long, 2) => true,
            (Format::Long, 3) => state.gib_pages,
            _ => false,
        }
}

/// The bits that must be zero in a present entry (SDM volume 3A, section 5.6 "reserved bits", tables 5-4 to 5-20).
fn reserved_bits(state: &PagingState, format: Format, level: u32, leaf: bool) -> u64 {
    if format == Format::Legacy32 {
        // Of a 4 MiB entry's extended address, bits 20:13, only those within the physical width exist; 21 never does.
        if level == 2 && leaf {
            let width = u32::from(state.phys_bits.clamp(32, 40));
            return range(width - 19, 21);
        }
        return 0;
    }
    let beyond_width = range(u32::from(state.phys_bits.clamp(32, 52)), 51);
    if format == Format::Pae && level == 3 {
        return beyond_width | range(52, 63) | range(5, 8) | range(1, 2);
    }
    let no_execute = if state.efer & bits::EFER_NXE == 0 { NX } else { 0 };
    let software = if format == Format::Pae { range(52, 62) } else { 0 };
    let size = match (level, leaf) {
        (3, true) => range(13, 29),
        (2, true) => range(13, 20),
        // The size bit of an entry that cannot be large; level 1's bit 7 is PAT.
        (3, false) if !state.gib_pages => PS,
        (4.., _) => PS,
        _ => 0,
    };
    beyond_width | no_execute | software | size
}

/// A mask of bits `low..=high`; empty if `low` is above `high`.
fn range(low: u32, high: u32) -> u64 {
    if low > high {
        0
    } else {
        (u64::MAX >> (63 - high)) & (u64::MAX << low)
    }
}

/// APM volume 2, section 5.6: the rights of all levels together against the access.
fn permitted(state: &PagingState, access: Access, allowed: u64, no_execute: bool) -> bool {
    let user_page = allowed & US != 0;
    let writable = allowed & RW != 0;
    if access == Access::Execute && no_execute {
        return false;
    }
    if state.cpl == 3 {
        return user_page && (access != Access::Write || writable);
    }
    if user_page {
        let barred = match access {
            Access::Execute => state.cr4 & bits::CR4_SMEP != 0,
            Access::Read | Access::Write => state.cr4 & bits::CR4_SMAP != 0 && !state.ac,
        };
        if barred {
            return false;
        }
    }
    access != Access::Write || writable || state.cr0 & bits::CR0_WP == 0
}

fn page_fault<E>(state: &PagingState, access: Access, cause: u32) -> WalkError<E> {
    let mut code = cause;
    if access == Access::Write {
        code |= fault::WRITE;
    }
    if state.cpl == 3 {
        code |= fault::USER;
    }
    let fetch_told =
        state.cr4 & bits::CR4_SMEP != 0 || (state.cr4 & bits::CR4_PAE != 0 && state.efer & bits::EFER_NXE != 0);
    if access == Access::Execute && fetch_told {
        code |= fault::FETCH;
    }
    WalkError::PageFault { code }
}
