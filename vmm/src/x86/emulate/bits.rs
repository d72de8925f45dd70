// SPDX-License-Identifier: MIT OR Apache-2.0
//! Bit tests, bit scans and bit counts.

use iced_x86::{Mnemonic, OpKind};

use super::alu::{self, when};
use super::operand::Place;
use super::state::rflags;
use super::{Bus, Done, Exec, Stop};
use crate::x86::paging::Access;

impl<B: Bus> Exec<'_, B> {
    /// The instructions of this file; `None` if `mnemonic` is none of them.
    pub(super) fn bit_operation(&mut self, mnemonic: Mnemonic) -> Result<Option<Done>, Stop<B::Error>> {
        let done = match mnemonic {
            Mnemonic::Bt => self.bit_test(None)?,
            Mnemonic::Bts => self.bit_test(Some(|value, bit| value | bit))?,
            Mnemonic::Btr => self.bit_test(Some(|value, bit| value & !bit))?,
            Mnemonic::Btc => self.bit_test(Some(|value, bit| value ^ bit))?,
            Mnemonic::Bsf => self.bit_scan(u64::trailing_zeros)?,
            Mnemonic::Bsr => self.bit_scan(|value| 63 - value.leading_zeros())?,
            Mnemonic::Tzcnt => self.zero_count(|value, bits| value.trailing_zeros().min(bits))?,
            Mnemonic::Lzcnt => self.zero_count(|value, bits| value.leading_zeros() - (64 - bits))?,
            Mnemonic::Popcnt => self.population()?,
            _ => return Ok(None),
        };
        Ok(Some(done))
    }

    /// BT, BTS, BTR, BTC. An immediate offset stays within the operand; a register is a signed offset into a bit
    /// string that begins at the memory operand, and may lead outside of it in either direction.
    fn bit_test(&mut self, change: Option<fn(u64, u64) -> u64>) -> Result<Done, Stop<B::Error>> {
        let width = self.width(0);
        let source = self.place(1, Access::Read)?;
        let offset = self.load_signed(1, &source)?;
        let access = if change.is_some() { Access::Write } else { Access::Read };
        let is_string = self.insn.op_kind(0) == OpKind::Memory && self.insn.op_kind(1) == OpKind::Register;
        let target = if is_string {
            let bits = 8 * width as i64;
            let displacement = (offset as i64).div_euclid(bits) * width as i64;
            Place::Memory(self.place_memory(displacement as u64, access)?)
        } else {
            self.place(0, access)?
        };
        let bit = 1 << (offset & (8 * width as u64 - 1));
        let value = self.load(&target)?;
        if let Some(change) = change {
            self.update(&target, value, change(value, bit), self.insn.has_lock_prefix())?;
        }
        self.cpu.set_flags(rflags::CF, when(value & bit != 0, rflags::CF));
        Ok(self.retire())
    }

    /// BSF and BSR: with a source of 0 the destination keeps its value, as every processor has done (APM volume 3).
    fn bit_scan(&mut self, find: impl FnOnce(u64) -> u32) -> Result<Done, Stop<B::Error>> {
        let source = self.place(1, Access::Read)?;
        let target = self.place(0, Access::Write)?;
        let value = self.load(&source)?;
        if value != 0 {
            self.store(&target, find(value).into())?;
        }
        self.cpu.set_flags(rflags::ZF, when(value == 0, rflags::ZF));
        Ok(self.retire())
    }

    /// TZCNT and LZCNT: a source of 0 gives the operand size and sets CF.
    fn zero_count(&mut self, count: impl FnOnce(u64, u32) -> u32) -> Result<Done, Stop<B::Error>> {
        let bits = 8 * self.width(0) as u32;
        let source = self.place(1, Access::Read)?;
        let target = self.place(0, Access::Write)?;
        let value = self.load(&source)?;
        let result = count(value, bits);
        self.store(&target, result.into())?;
        let flags = when(value == 0, rflags::CF) | when(result == 0, rflags::ZF);
        self.cpu.set_flags(rflags::CF | rflags::ZF, flags);
        Ok(self.retire())
    }

    fn population(&mut self) -> Result<Done, Stop<B::Error>> {
        let source = self.place(1, Access::Read)?;
        let target = self.place(0, Access::Write)?;
        let value = self.load(&source)?;
        self.store(&target, value.count_ones().into())?;
        self.cpu.set_flags(alu::ARITHMETIC, when(value == 0, rflags::ZF));
        Ok(self.retire())
    }
}
