// SPDX-License-Identifier: MIT OR Apache-2.0
//! Moves, exchanges and conditional moves of integer data, and cache-line instructions, which move nothing.

use iced_x86::{ConditionCode, Mnemonic, OpKind};

use super::alu;
use super::memory::MAX_OPERAND;
use super::operand::Place;
use super::state::{mask, rflags, seg};
use super::{Bus, Done, Exception, Exec, Stop};
use crate::x86::paging::Access;

/// Indices of the registers CMPXCHG8B and CMPXCHG16B use.
const RAX: usize = 0;
const RCX: usize = 1;
const RDX: usize = 2;
const RBX: usize = 3;

impl<B: Bus> Exec<'_, B> {
    /// The instructions of this file; `None` if `mnemonic` is none of them.
    pub(super) fn data(&mut self, mnemonic: Mnemonic) -> Result<Option<Done>, Stop<B::Error>> {
        let done = match mnemonic {
            Mnemonic::Mov => self.mov()?,
            Mnemonic::Movzx | Mnemonic::Movnti => self.convert(|value, _| value)?,
            Mnemonic::Movbe => self.convert(|value, width| value.swap_bytes() >> (64 - 8 * width))?,
            Mnemonic::Movsx | Mnemonic::Movsxd => self.convert(super::state::sign_extend)?,
            Mnemonic::Xchg => self.xchg()?,
            Mnemonic::Xadd => self.xadd()?,
            Mnemonic::Cmpxchg => self.cmpxchg()?,
            Mnemonic::Cmpxchg8b => self.cmpxchg8b()?,
            Mnemonic::Cmpxchg16b => self.cmpxchg16b()?,
            Mnemonic::Clflush | Mnemonic::Clflushopt | Mnemonic::Clwb => self.cache_line()?,
            _ => return self.conditional(),
        };
        Ok(Some(done))
    }

    /// MOV between registers, immediates, memory, and from segment registers.
    fn mov(&mut self) -> Result<Done, Stop<B::Error>> {
        if self.insn.op_kind(0) == OpKind::Register && self.insn.op0_register().is_segment_register() {
            return self.mov_to_segment();
        }
        self.convert(|value, _| value)
    }

    /// A load of a segment register outside protected mode: base is 16 times the selector, the rest stays
    /// (APM volume 2, section 4.5.1). In protected mode it needs descriptor tables, which this emulator does not have.
    fn mov_to_segment(&mut self) -> Result<Done, Stop<B::Error>> {
        if !self.cpu.is_real_or_v86() {
            return Err(Stop::Unsupported);
        }
        let index = self.insn.op0_register().number();
        let source = self.place(1, Access::Read)?;
        let selector = self.load(&source)? as u16;
        let segment = self.cpu.segments.get_mut(index).ok_or(Stop::Unsupported)?;
        segment.selector = selector;
        segment.base = u64::from(selector) << 4;
        self.retire();
        Ok(Done::Retired { interrupt_shadow: index == seg::SS })
    }

    /// `op0 = convert(op1, width of op1)`.
    fn convert(&mut self, convert: impl FnOnce(u64, usize) -> u64) -> Result<Done, Stop<B::Error>> {
        let width = self.width(1);
        let target = self.place(0, Access::Write)?;
        let source = self.place(1, Access::Read)?;
        let value = self.load(&source)?;
        self.store(&target, convert(value, width))?;
        Ok(self.retire())
    }

    /// XCHG; locked with memory even without the prefix.
    fn xchg(&mut self) -> Result<Done, Stop<B::Error>> {
        let target = self.place(0, Access::Write)?;
        let other = self.place(1, Access::Write)?;
        let a = self.load(&target)?;
        let b = self.load(&other)?;
        // The memory operand, which can still fail, goes first; it may be either in Intel's order.
        let (first, first_value, second, second_value) =
            if matches!(other, Place::Memory(_)) { (other, a, target, b) } else { (target, b, other, a) };
        self.update(&first, second_value, first_value, true)?;
        self.store(&second, second_value)?;
        Ok(self.retire())
    }

    fn xadd(&mut self) -> Result<Done, Stop<B::Error>> {
        let width = self.width(0);
        let target = self.place(0, Access::Write)?;
        let source = self.place(1, Access::Write)?;
        let a = self.load(&target)?;
        let b = self.load(&source)?;
        let out = alu::add(a, b, false, width);
        if let Place::Memory(_) = target {
            self.update(&target, a, out.value, self.insn.has_lock_prefix())?;
            self.store(&source, a)?;
        } else {
            // With the same register twice the sum is what stays.
            self.store(&source, a)?;
            self.store(&target, out.value)?;
        }
        self.cpu.set_flags(alu::ARITHMETIC, out.flags);
        Ok(self.retire())
    }

    /// CMPXCHG. Memory is written in either case, as the processor does (APM volume 3).
    fn cmpxchg(&mut self) -> Result<Done, Stop<B::Error>> {
        let width = self.width(0);
        let target = self.place(0, Access::Write)?;
        let source = self.place(1, Access::Read)?;
        let found = self.load(&target)?;
        let new = self.load(&source)?;
        let expected = self.cpu.gpr[RAX] & mask(width);
        let out = alu::sub(expected, found, false, width);
        if found == expected {
            self.update(&target, found, new, self.insn.has_lock_prefix())?;
        } else {
            if let Place::Memory(_) = target {
                self.update(&target, found, found, self.insn.has_lock_prefix())?;
            }
            let merged = if width == 1 { (self.cpu.gpr[RAX] & !0xff) | found } else { found };
            self.cpu.write_sized(RAX, width.max(2), merged);
        }
        self.cpu.set_flags(alu::ARITHMETIC, out.flags);
        Ok(self.retire())
    }

    fn cmpxchg8b(&mut self) -> Result<Done, Stop<B::Error>> {
        let target = self.place(0, Access::Write)?;
        let found = self.load(&target)?;
        let pair = |high: u64, low: u64| (high << 32) | (low & mask(4));
        let equal = found == pair(self.cpu.gpr[RDX], self.cpu.gpr[RAX]);
        let new = if equal { pair(self.cpu.gpr[RCX], self.cpu.gpr[RBX]) } else { found };
        self.update(&target, found, new, self.insn.has_lock_prefix())?;
        if !equal {
            self.cpu.gpr[RAX] = found & mask(4);
            self.cpu.gpr[RDX] = found >> 32;
        }
        self.cpu.set_flags(rflags::ZF, alu::when(equal, rflags::ZF));
        Ok(self.retire())
    }

    fn cmpxchg16b(&mut self) -> Result<Done, Stop<B::Error>> {
        let target = self.place_aligned(0, Access::Write)?;
        let mut data = [0; MAX_OPERAND];
        self.read(&target, &mut data)?;
        let pair = |high: u64, low: u64| u128::from(high) << 64 | u128::from(low);
        let found = u128::from_le_bytes(data);
        let equal = found == pair(self.cpu.gpr[RDX], self.cpu.gpr[RAX]);
        let new = if equal { pair(self.cpu.gpr[RCX], self.cpu.gpr[RBX]) } else { found };
        self.write(&target, &new.to_le_bytes())?;
        if !equal {
            self.cpu.gpr[RAX] = found as u64;
            self.cpu.gpr[RDX] = (found >> 64) as u64;
        }
        self.cpu.set_flags(rflags::ZF, alu::when(equal, rflags::ZF));
        Ok(self.retire())
    }

    /// Write-back of a cache line: checked as a read of one byte (APM volume 3, CLFLUSH); devices have no cached lines.
    fn cache_line(&mut self) -> Result<Done, Stop<B::Error>> {
        self.place(0, Access::Read)?;
        Ok(self.retire())
    }

    /// The memory operand `index` of an instruction that demands 16-byte alignment (#GP otherwise).
    pub(super) fn place_aligned(&mut self, index: u32, access: Access) -> Result<super::memory::Span, Stop<B::Error>> {
        match self.place(index, access)? {
            Place::Memory(span) if span.is_aligned(MAX_OPERAND) => Ok(span),
            Place::Memory(_) => Err(Exception::GeneralProtection.into()),
            _ => Err(Stop::Unsupported),
        }
    }

    /// SETcc and CMOVcc; `None` for anything else.
    fn conditional(&mut self) -> Result<Option<Done>, Stop<B::Error>> {
        let Some(holds) = self.condition() else { return Ok(None) };
        let operand = |kind| matches!(kind, OpKind::Register | OpKind::Memory);
        if !self.insn.op_kinds().all(operand) {
            return Ok(None);
        }
        match self.insn.op_count() {
            1 => {
                let target = self.place(0, Access::Write)?;
                self.store(&target, holds.into())?;
            }
            2 => {
                // The source is read, and 32-bit destinations are zero-extended, whether the condition holds or not.
                let target = self.place(0, Access::Write)?;
                let source = self.place(1, Access::Read)?;
                let new = self.load(&source)?;
                let old = self.load(&target)?;
                self.store(&target, if holds { new } else { old })?;
            }
            _ => return Ok(None),
        }
        Ok(Some(self.retire()))
    }

    /// Whether the instruction's condition holds; `None` if it has none (APM volume 3, section 1.2.4, tttn field).
    fn condition(&self) -> Option<bool> {
        let flag = |bit| self.cpu.rflags & bit != 0;
        let (cf, zf, sf, of, pf) =
            (flag(rflags::CF), flag(rflags::ZF), flag(rflags::SF), flag(rflags::OF), flag(rflags::PF));
        Some(match self.insn.condition_code() {
            ConditionCode::None => return None,
            ConditionCode::o => of,
            ConditionCode::no => !of,
            ConditionCode::b => cf,
            ConditionCode::ae => !cf,
            ConditionCode::e => zf,
            ConditionCode::ne => !zf,
            ConditionCode::be => cf || zf,
            ConditionCode::a => !cf && !zf,
            ConditionCode::s => sf,
            ConditionCode::ns => !sf,
            ConditionCode::p => pf,
            ConditionCode::np => !pf,
            ConditionCode::l => sf != of,
            ConditionCode::ge => sf == of,
            ConditionCode::le => zf || sf != of,
            ConditionCode::g => !zf && sf == of,
        })
    }
}
