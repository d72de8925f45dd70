// SPDX-License-Identifier: MIT OR Apache-2.0
//! Executes one load or store of a guest that reaches device memory, where the hardware does not say what it does: pairs,
//! vector registers, addresses that change, and the zeroing of a block (Arm ARM D24.2.40, "ISS encoding for an exception from a
//! Data Abort", ISV). Nothing here knows what runs the guest; any VMM can use it.
//!
//! - All of the access is translated before the first byte is moved, and registers change when all has been moved.
//! - Memory is accessed in the pieces in which the architecture has it, of 8 bytes at most: each register of a pair, each half
//!   of a vector register, each element of a structure. A piece that crosses into another page is moved byte by byte.
//! - The CPU has let the access through to one page of devices only. What else it touches must be allowed by the guest's own
//!   tables; if it is not, the guest takes the data abort that the CPU would have made.
//! - What it cannot do is an error that names the instruction, never a guess.
//!
//! | file | owns |
//! |---|---|
//! | `decode.rs` | what an instruction's word means |
//! | `abort.rs` | the data abort |
//! | `mod.rs` | the way there (through the guest's page tables) and back, and the registers |

use axvcpu_uapi::addr::{GuestPhysAddr, GuestVirtAddr};
use axvcpu_uapi::arm64::{Fp, General, System, PSTATE_EL0, PSTATE_MODE};

use crate::arm64::paging::{self, Manner, Stage1};
use crate::hypervisor::{self, Registers};

mod abort;
mod decode;
#[cfg(test)]
mod tests;

pub use decode::{decode, Access, Base, Extend, Offset, Piece, Place, Refused};

/// SCTLR_EL1.E0E and EE: data is big-endian at EL0, at EL1.
const SCTLR_E0E: u64 = 1 << 24;
const SCTLR_EE: u64 = 1 << 25;
/// PSTATE.SP: EL1 uses SP_EL1.
const PSTATE_SP: u64 = 1 << 0;
/// PSTATE.UAO: unprivileged loads and stores are as others.
const PSTATE_UAO: u64 = 1 << 23;
/// PSTATE.BTYPE and SS: what the instruction before leaves for the next one.
const PSTATE_ONCE: u64 = 0b11 << 10 | 1 << 21;
/// Within so much, addresses that follow each other do so after translation, whatever the granule.
const PAGE: u64 = 4096;

/// Guest memory and devices, supplied by the VMM.
pub trait Memory {
    /// Copies from RAM. Says whether there is RAM. A naturally aligned read of 2, 4 or 8 bytes should be a single one, as
    /// other vCPUs expect it.
    fn ram_read(&self, at: GuestPhysAddr, data: &mut [u8]) -> bool;

    /// Copies to RAM, likewise.
    fn ram_write(&mut self, at: GuestPhysAddr, data: &[u8]) -> bool;

    /// Reads 1, 2, 4 or 8 bytes, little endian, from what is no RAM; the address need not be aligned.
    fn device_read(&mut self, at: GuestPhysAddr, data: &mut [u8]);

    /// Writes 1, 2, 4 or 8 bytes to what is no RAM.
    fn device_write(&mut self, at: GuestPhysAddr, data: &[u8]);
}

/// What the hypervisor tells of the access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// An address in the page that it reached.
    pub addr: GuestPhysAddr,
    /// Whether it was a write.
    pub write: bool,
}

/// Why an access was not carried out. The guest is as it was, unless its registers could not be written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The hypervisor gives or takes no registers.
    #[error("{0}")]
    Registers(#[from] hypervisor::Error),
    /// The guest's page tables do not lead to the instruction, or are no memory.
    #[error("{0}")]
    Address(#[from] paging::Fault),
    /// The instruction is in no memory.
    #[error("the instruction at {0} is not in memory")]
    Fetch(GuestVirtAddr),
    /// The instruction is none that is emulated.
    #[error("the instruction {word:#010x} at {pc} is not emulated: {why}")]
    Instruction {
        /// Where it is.
        pc: GuestVirtAddr,
        /// Its word.
        word: u32,
        /// The reason.
        why: Refused,
    },
    /// Data is big-endian.
    #[error("the guest accesses data as a big-endian CPU does, which is not emulated")]
    BigEndian,
    /// The instruction that is there now does something else.
    #[error(
        "the instruction {word:#010x} at {pc} accesses something else: the guest has changed it or its page tables"
    )]
    Elsewhere {
        /// Where it is.
        pc: GuestVirtAddr,
        /// Its word.
        word: u32,
    },
}

impl Error {
    /// Whether it may be because the guest has changed the instruction or its page tables since it left: if it executes the
    /// instruction once more, that may be over.
    #[must_use]
    pub fn may_pass(&self) -> bool {
        matches!(self, Self::Address(_) | Self::Fetch(_) | Self::Elsewhere { .. })
    }
}

/// Carries out the load or store at which the vCPU has left the guest with `fault`, and lets the guest go on behind it, or with
/// the data abort that it takes. `zero_block` is the size of the block in bytes that DC ZVA zeroes, if the guest may use it
/// (DCZID_EL0).
///
/// # Errors
/// [`Error`].
pub fn step<V>(vcpu: &mut V, memory: &mut impl Memory, fault: Fault, zero_block: Option<u64>) -> Result<(), Error>
where
    V: Registers<General> + Registers<System> + Registers<Fp>,
{
    let (mut general, mut system): (General, System) = (vcpu.get()?, vcpu.get()?);
    let stage1 = Stage1::new(&system);
    let pc = GuestVirtAddr::new(general.pc);
    let word = fetch(&stage1, memory, pc)?;
    let access = decode(word, zero_block).map_err(|why| Error::Instruction { pc, word, why })?;
    let el0 = general.pstate & PSTATE_MODE == PSTATE_EL0;
    if system.sctlr_el1 & if el0 { SCTLR_E0E } else { SCTLR_EE } != 0 {
        return Err(Error::BigEndian);
    }

    let mut stack_pointer = if el0 || general.pstate & PSTATE_SP == 0 { general.sp_el0 } else { system.sp_el1 };
    let base = match access.base {
        Base::Register(31) => stack_pointer,
        Base::Register(reg) => x(&general, reg),
        Base::Pc => general.pc,
        Base::Block(reg, size) => x(&general, reg) & !(size - 1),
    };
    let start = base.wrapping_add(distance(&general, access.offset));
    let unprivileged = el0 || access.unprivileged && general.pstate & PSTATE_UAO == 0;
    let manner = Manner { write: access.store, unprivileged, pan: general.pstate & abort::PSTATE_PAN != 0 };
    let lookup = |at: GuestVirtAddr| {
        let translation = stage1.translate(at, |at| entry(memory, at))?;
        if !same_page(translation.addr, fault.addr) {
            translation.check(manner)?;
        }
        Ok(translation.addr)
    };
    let parts = match parts(lookup, &access, start) {
        Ok(parts) => parts,
        Err(refused) => {
            let (at, status) = refused.status().ok_or(refused)?;
            abort::take(&mut general, &mut system, at, status, access.store);
            vcpu.set(&system)?;
            return Ok(vcpu.set(&general)?);
        }
    };
    if access.store != fault.write || !parts.iter().any(|part| same_page(part.at, fault.addr)) {
        return Err(Error::Elsewhere { pc, word });
    }

    let vector = |piece: &Piece| matches!(piece.place, Place::Vector { .. });
    let mut fp: Option<Fp> = if access.pieces.iter().any(vector) { Some(vcpu.get()?) } else { None };
    // What changes the base register may be a register that is loaded.
    let writeback = access.writeback.map(|by| base.wrapping_add(distance(&general, by)));
    if access.store {
        store(&access, &parts, memory, &general, fp.as_ref());
    } else {
        load(&access, &parts, memory, &mut general, fp.as_mut());
    }

    if let (Some(fp), false) = (&fp, access.store) {
        vcpu.set(fp)?;
    }
    match (access.base, writeback) {
        (Base::Register(31), Some(new)) => stack_pointer = new,
        (Base::Register(reg), Some(new)) => set_x(&mut general, reg, new),
        _ => {}
    }
    if el0 || general.pstate & PSTATE_SP == 0 {
        general.sp_el0 = stack_pointer;
    } else if stack_pointer != system.sp_el1 {
        vcpu.set(&System { sp_el1: stack_pointer, ..system })?;
    }
    general.pc = general.pc.wrapping_add(4);
    general.pstate &= !PSTATE_ONCE;
    Ok(vcpu.set(&general)?)
}

/// A general register, 31 being zero.
fn x(general: &General, reg: u8) -> u64 {
    general.x.get(usize::from(reg)).copied().unwrap_or(0)
}

fn set_x(general: &mut General, reg: u8, value: u64) {
    if let Some(x) = general.x.get_mut(usize::from(reg)) {
        *x = value;
    }
}

/// A distance in bytes, modulo 2^64.
fn distance(general: &General, offset: Offset) -> u64 {
    match offset {
        Offset::Fixed(bytes) => bytes as u64,
        Offset::Register { reg, bits: 32, signed, shift } => {
            let low = x(general, reg) as u32;
            (if signed { low as i32 as u64 } else { u64::from(low) }) << shift
        }
        Offset::Register { reg, shift, .. } => x(general, reg) << shift,
    }
}

/// An entry of the guest's page tables.
fn entry(memory: &impl Memory, at: GuestPhysAddr) -> Option<u64> {
    let mut entry = [0; 8];
    memory.ram_read(at, &mut entry).then_some(u64::from_le_bytes(entry))
}

fn fetch(stage1: &Stage1, memory: &impl Memory, pc: GuestVirtAddr) -> Result<u32, Error> {
    let at = stage1.translate(pc, |at| entry(memory, at))?.addr;
    let mut word = [0; 4];
    if !memory.ram_read(at, &mut word) {
        return Err(Error::Fetch(pc));
    }
    Ok(u32::from_le_bytes(word))
}

/// A part of a piece that lies in one page.
struct Part {
    /// Index of the piece.
    piece: usize,
    /// Its first byte in the piece.
    from: usize,
    /// Its bytes: 1, 2, 4 or 8.
    size: usize,
    at: GuestPhysAddr,
}

/// Whether two addresses are in the same page.
fn same_page(a: GuestPhysAddr, b: GuestPhysAddr) -> bool {
    a.as_u64() / PAGE == b.as_u64() / PAGE
}

/// The parts of an access that begins at `start`, each translated by `lookup`, which is asked once for each page.
fn parts(
    lookup: impl Fn(GuestVirtAddr) -> Result<GuestPhysAddr, paging::Fault>,
    access: &Access,
    start: u64,
) -> Result<Vec<Part>, paging::Fault> {
    let mut parts = Vec::with_capacity(access.pieces.len());
    let mut page: Option<(u64, u64)> = None;
    let mut translate = |address: u64| {
        let within = address % PAGE;
        let physical = match page {
            Some((virtual_page, physical)) if virtual_page == address - within => physical,
            _ => {
                let physical = lookup(GuestVirtAddr::new(address))?.as_u64() & !(PAGE - 1);
                page = Some((address - within, physical));
                physical
            }
        };
        Ok(GuestPhysAddr::new(physical + within))
    };
    for (piece, &Piece { offset, size, .. }) in access.pieces.iter().enumerate() {
        let (address, size) = (start.wrapping_add(offset), usize::from(size));
        if address % PAGE + size as u64 <= PAGE {
            parts.push(Part { piece, from: 0, size, at: translate(address)? });
            continue;
        }
        for from in 0..size {
            let at = translate(address.wrapping_add(from as u64))?;
            parts.push(Part { piece, from, size: 1, at });
        }
    }
    Ok(parts)
}

/// The bytes of a vector register in [`Fp`], as its 64-bit halves.
fn half(reg: u8, byte: u8) -> (usize, u32) {
    (usize::from(reg % 32) * 2 + usize::from(byte / 8 % 2), u32::from(byte % 8) * 8)
}

/// All bits of a piece.
fn all(size: u8) -> u64 {
    u64::MAX >> (64 - 8 * u32::from(size))
}

fn store(access: &Access, parts: &[Part], memory: &mut impl Memory, general: &General, fp: Option<&Fp>) {
    for part in parts {
        let value = match access.pieces[part.piece].place {
            Place::Zero => 0,
            Place::General(reg, _) => x(general, reg),
            Place::Vector { reg, byte, .. } => {
                let (half, shift) = half(reg, byte);
                fp.map_or(0, |fp| fp.v[half]) >> shift
            }
        };
        let bytes = &value.to_le_bytes()[part.from..part.from + part.size];
        if !memory.ram_write(part.at, bytes) {
            memory.device_write(part.at, bytes);
        }
    }
}

fn load(access: &Access, parts: &[Part], memory: &mut impl Memory, general: &mut General, mut fp: Option<&mut Fp>) {
    let mut values = vec![[0; 8]; access.pieces.len()];
    for part in parts {
        let bytes = &mut values[part.piece][part.from..part.from + part.size];
        if !memory.ram_read(part.at, bytes) {
            memory.device_read(part.at, bytes);
        }
    }
    if let Some(fp) = &mut fp {
        for (reg, halves) in fp.v.chunks_exact_mut(2).enumerate() {
            if access.clears >> reg & 1 != 0 {
                halves.fill(0);
            }
        }
    }
    for (piece, bytes) in access.pieces.iter().zip(values) {
        let value = u64::from_le_bytes(bytes);
        match piece.place {
            Place::Zero => {}
            Place::General(reg, extend) => {
                let unused = 64 - 8 * u32::from(piece.size);
                let signed = (value << unused) as i64 >> unused;
                set_x(
                    general,
                    reg,
                    match extend {
                        Extend::Zero => value,
                        Extend::Sign32 => u64::from(signed as u32),
                        Extend::Sign64 => signed as u64,
                    },
                );
            }
            Place::Vector { reg, byte, copies } => {
                for copy in 0..copies {
                    let (half, shift) = half(reg, byte + copy * piece.size);
                    if let Some(fp) = &mut fp {
                        fp.v[half] = fp.v[half] & !(all(piece.size) << shift) | value << shift;
                    }
                }
            }
        }
    }
}
