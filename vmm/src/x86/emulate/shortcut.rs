// SPDX-License-Identifier: MIT OR Apache-2.0
//! A short way for accesses to devices that come again and again: drivers have few instructions for them.
//!
//! A plain move between a register, or a constant, and a device (`plain.rs`) is remembered with its bytes, where they lie, and the entries of the page tables that led there. When the guest stands at the same place in the same mode,
//! and entries and bytes are what they were, then fetching and decoding would give the same instruction; and where its operand
//! leads the CPU has said with the exit. Nothing is taken for granted that the guest could have changed since: there is no
//! moment at which this would have to be told to forget.
//!
//! Only 64-bit code has it easy enough: no segment limits, and of five levels of tables all entries are in memory.

use axvcpu_uapi::addr::{GuestPhysAddr, GuestVirtAddr};
use axvcpu_uapi::client::Brief;
use axvcpu_uapi::exit::AccessFlags;
use axvcpu_uapi::x86::General;

use super::memory::PAGE;
use super::plain::{self, Action, Plain};
use super::state::{read_register, rflags, seg, sign_extend, write_register};
use super::{Bus, Config, CpuState};
use crate::x86::paging::{bits, trace, Access, PagingState, Path};

/// How many instructions are remembered; a power of two.
const PLACES: usize = 16;
/// The longest x86 instruction.
const MAX_LENGTH: usize = 15;

/// An access that the CPU has left to the VMM: what a
/// [`NestedPageFault`](axvcpu_uapi::exit::AxVCpuExitReason::NestedPageFault) tells.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    /// Where it leads.
    pub addr: GuestPhysAddr,
    /// What it is.
    pub access: AccessFlags,
    /// Whether it is user mode's.
    pub user_mode: bool,
}

/// The moves that one vCPU has made.
#[derive(Debug, Default)]
pub struct Shortcuts([Option<Box<Move>>; PLACES]);

/// A move, and what makes the instruction at RIP be this one.
#[derive(Debug)]
struct Move {
    mode: Mode,
    code: GuestPhysAddr,
    path: Path,
    bytes: [u8; MAX_LENGTH],
    plain: Plain,
}

/// What decides how an instruction is fetched and decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mode {
    rip: u64,
    cr0: u64,
    cr3: u64,
    cr4: u64,
    efer: u64,
    code_attributes: u16,
    user_mode: bool,
}

impl Mode {
    fn new(rip: u64, brief: &Brief, user_mode: bool) -> Self {
        let Brief { cr0, cr3, cr4, efer, code_attributes, .. } = *brief;
        Self { rip, cr0, cr3, cr4, efer, code_attributes, user_mode }
    }

    /// Where a move at this RIP is remembered.
    fn place(&self) -> usize {
        // Instructions are a few bytes long.
        (self.rip ^ self.rip >> 4) as usize % PLACES
    }
}

impl Shortcuts {
    /// None remembered.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Carries out the instruction at RIP, if it is one that is remembered and `fault` its access to a device. Gives whether
    /// it was: otherwise nothing has been done. As after [`step`](super::step), [`Retired`](super::Outcome::Retired) without
    /// trap and shadow.
    ///
    /// # Errors
    /// The bus's own.
    pub fn take<B: Bus>(
        &self,
        general: &mut General,
        brief: &Brief,
        fault: &Fault,
        bus: &mut B,
    ) -> Result<bool, B::Error> {
        let mode = Mode::new(general.rip, brief, fault.user_mode);
        let Some(known) = self.0.get(mode.place()).and_then(Option::as_deref).filter(|known| known.mode == mode) else {
            return Ok(false);
        };
        let plain = &known.plain;
        let write = !matches!(plain.action, Action::Load { .. });
        let of_operand = fault.access.contains(AccessFlags::WRITE) == write
            && !fault.access.contains(AccessFlags::PAGE_WALK)
            && !fault.access.contains(AccessFlags::EXECUTE);
        // The CPU has translated it, and found that the guest may access it. It is all of the operand if that does not go on in
        // another page.
        let in_page = fault.addr.as_u64() % PAGE;
        if !of_operand
            || general.rflags & rflags::TF != 0
            || plain.operand.address(general, brief) % PAGE != in_page
            || in_page + plain.width as u64 > PAGE
            || bus.is_ram(fault.addr, write)
            || !known.is_still_there(bus)?
        {
            return Ok(false);
        }
        known.carry_out(general, fault.addr, bus)?;
        Ok(true)
    }

    /// Remembers the instruction at RIP in `cpu`, with which the CPU has left and which has not been carried out yet, if it is
    /// one that can be. Gives whether it is: then [`take`](Self::take) may do it.
    ///
    /// # Errors
    /// The bus's own.
    pub fn learn<B: Bus>(
        &mut self,
        config: &Config,
        cpu: &CpuState,
        fault: &Fault,
        bus: &mut B,
    ) -> Result<bool, B::Error> {
        if !cpu.is_64bit() || cpu.cr0 & bits::CR0_PG == 0 {
            return Ok(false);
        }
        let state = PagingState {
            cr0: cpu.cr0,
            cr3: cpu.cr3,
            cr4: cpu.cr4,
            efer: cpu.efer,
            cpl: cpu.cpl,
            ac: false,
            phys_bits: config.phys_bits,
            gib_pages: config.gib_pages,
        };
        let Ok((translation, path)) = trace(&state, bus, GuestVirtAddr::new(cpu.rip), Access::Execute) else {
            return Ok(false);
        };
        let code = translation.gpa;
        if !bus.is_ram(code, false) {
            return Ok(false);
        }
        let mut bytes = [0; MAX_LENGTH];
        let there = ((PAGE - code.as_u64() % PAGE) as usize).min(MAX_LENGTH);
        bus.read(code, &mut bytes[..there])?;
        let mode = Mode {
            rip: cpu.rip,
            cr0: cpu.cr0,
            cr3: cpu.cr3,
            cr4: cpu.cr4,
            efer: cpu.efer,
            code_attributes: cpu.segments[seg::CS].attributes,
            user_mode: fault.user_mode,
        };
        let (Some(plain), Some(slot)) = (plain::decode(&bytes[..there], cpu.rip), self.0.get_mut(mode.place())) else {
            return Ok(false);
        };
        *slot = Some(Box::new(Move { mode, code, path, bytes, plain }));
        Ok(true)
    }
}

impl Move {
    /// Whether RIP still leads to these bytes.
    fn is_still_there<B: Bus>(&self, bus: &mut B) -> Result<bool, B::Error> {
        let (mut bytes, length) = ([0; MAX_LENGTH], self.plain.length);
        bus.read(self.code, &mut bytes[..length])?;
        Ok(bytes[..length] == self.bytes[..length] && self.path.holds(bus)?)
    }

    /// At a device at `at`.
    fn carry_out<B: Bus>(&self, general: &mut General, at: GuestPhysAddr, bus: &mut B) -> Result<(), B::Error> {
        let mut data = [0; 8];
        let Plain { length, width, action, .. } = self.plain;
        match action {
            Action::Load { to, sign_extends } => {
                bus.mmio_read(at, &mut data[..width])?;
                let value = u64::from_le_bytes(data);
                let value = if sign_extends { sign_extend(value, width) } else { value };
                let _ = write_register(&mut general.gpr, to, value);
            }
            Action::Store(from) => {
                data = read_register(&general.gpr, from).unwrap_or(0).to_le_bytes();
                bus.mmio_write(at, &data[..width])?;
            }
            Action::StoreConstant(value) => {
                data = value.to_le_bytes();
                bus.mmio_write(at, &data[..width])?;
            }
        }
        general.rip = general.rip.wrapping_add(length as u64);
        general.rflags &= !rflags::RF;
        Ok(())
    }
}
