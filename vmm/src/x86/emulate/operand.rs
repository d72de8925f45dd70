// SPDX-License-Identifier: MIT OR Apache-2.0
//! Operands: effective addresses, and registers, immediates and memory behind one kind of value.

use iced_x86::{OpKind, Register};

use super::memory::Span;
use super::state::{mask, sign_extend};
use super::{Bus, Exec, Stop};
use crate::x86::paging::Access;

/// An operand that has been checked and can be used without faulting.
#[derive(Clone, Copy, Debug)]
pub(super) enum Place {
    Register(Register),
    Immediate(u64),
    Memory(Span),
}

impl<B: Bus> Exec<'_, B> {
    /// Resolves operand `index` for `access`.
    pub(super) fn place(&mut self, index: u32, access: Access) -> Result<Place, Stop<B::Error>> {
        match self.insn.op_kind(index) {
            OpKind::Register => Ok(Place::Register(self.insn.op_register(index))),
            OpKind::Memory => self.place_memory(0, access).map(Place::Memory),
            _ => self.insn.try_immediate(index).map(Place::Immediate).map_err(|_| Stop::Unsupported),
        }
    }

    /// Resolves the memory operand, moved by `displacement` bytes (for bit strings and the like).
    pub(super) fn place_memory(&mut self, displacement: u64, access: Access) -> Result<Span, Stop<B::Error>> {
        let length = self.insn.memory_size().size();
        let segment = self.insn.memory_segment().number();
        let offset = self.effective_address()?.wrapping_add(displacement) & mask(self.address_width());
        self.span(segment, offset, length, access)
    }

    /// Bytes of operand `index`.
    pub(super) fn width(&self, index: u32) -> usize {
        match self.insn.op_kind(index) {
            OpKind::Register => self.insn.op_register(index).size(),
            _ => self.insn.memory_size().size(),
        }
    }

    /// The operand's value, zero-extended; immediates are sign-extended to 64 bits as encoded.
    pub(super) fn load(&mut self, place: &Place) -> Result<u64, Stop<B::Error>> {
        match place {
            Place::Register(register) => self.cpu.read(*register).ok_or(Stop::Unsupported),
            Place::Immediate(value) => Ok(*value),
            Place::Memory(span) => self.read_value(span),
        }
    }

    /// Stores the low bytes of `value`.
    pub(super) fn store(&mut self, place: &Place, value: u64) -> Result<(), Stop<B::Error>> {
        match place {
            Place::Register(register) => self.cpu.write(*register, value).ok_or(Stop::Unsupported),
            Place::Immediate(_) => Err(Stop::Unsupported),
            Place::Memory(span) => self.write_value(span, value),
        }
    }

    /// Stores `new` where `old` was read: atomically if the instruction is locked, as XCHG always is.
    pub(super) fn update(&mut self, place: &Place, old: u64, new: u64, locked: bool) -> Result<(), Stop<B::Error>> {
        match place {
            Place::Memory(span) if locked => self.exchange(span, old, new),
            _ => self.store(place, new),
        }
    }

    /// Width in bytes of the memory operand's address: 2, 4 or 8.
    pub(super) fn address_width(&self) -> usize {
        let base = self.insn.memory_base();
        let index = self.insn.memory_index();
        match (base, index) {
            (Register::None, Register::None) => self.insn.memory_displ_size() as usize,
            (Register::None, index) => index.size(),
            (base, _) => base.size(),
        }
    }

    /// The offset in the segment, base + index * scale + displacement, before it is cut to the address size.
    fn effective_address(&self) -> Result<u64, Stop<B::Error>> {
        let base = self.insn.memory_base();
        if !matches!(self.address_width(), 2 | 4 | 8) {
            return Err(Stop::Unsupported);
        }
        // For RIP-relative operands the decoder gives the target itself.
        let displacement = self.insn.memory_displacement64();
        if matches!(base, Register::RIP | Register::EIP) {
            return Ok(displacement);
        }
        let value = |register| match register {
            Register::None => Some(0),
            _ => self.cpu.read(register),
        };
        let base = value(base).ok_or(Stop::Unsupported)?;
        let index = value(self.insn.memory_index()).ok_or(Stop::Unsupported)?;
        let scale = u64::from(self.insn.memory_index_scale());
        Ok(base.wrapping_add(index.wrapping_mul(scale)).wrapping_add(displacement))
    }

    /// The value of operand `index` read as a source, sign-extended from its own width.
    pub(super) fn load_signed(&mut self, index: u32, place: &Place) -> Result<u64, Stop<B::Error>> {
        let value = self.load(place)?;
        Ok(match place {
            Place::Immediate(_) => value,
            _ => sign_extend(value, self.width(index)),
        })
    }
}
