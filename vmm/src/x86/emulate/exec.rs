// SPDX-License-Identifier: MIT OR Apache-2.0
//! Dispatch by mnemonic, and the integer arithmetic that reads, computes and writes back.

use iced_x86::{Mnemonic, Register};

use super::alu::{self, Computed};
use super::shift::{self, Shift};
use super::state::{mask, rflags};
use super::{Bus, Done, Exception, Exec, Stop};
use crate::x86::paging::Access;

/// Flags that INC and DEC write: all but CF.
const ALL_BUT_CARRY: u64 = alu::ARITHMETIC & !rflags::CF;

impl<B: Bus> Exec<'_, B> {
    /// Carries out the decoded instruction on the working copy. Register, flag and RIP changes come last.
    pub(super) fn execute(&mut self) -> Result<Done, Stop<B::Error>> {
        // MOVSD and CMPSD name a string and an SSE instruction each.
        if self.insn.is_string_instruction() {
            return self.string();
        }
        match self.insn.mnemonic() {
            Mnemonic::Add => self.binary(|a, b, _, width| alu::add(a, b, false, width)),
            Mnemonic::Adc => self.binary(alu::add),
            Mnemonic::Sub => self.binary(|a, b, _, width| alu::sub(a, b, false, width)),
            Mnemonic::Sbb => self.binary(alu::sub),
            Mnemonic::And => self.binary(|a, b, _, width| alu::logic(a & b, width)),
            Mnemonic::Or => self.binary(|a, b, _, width| alu::logic(a | b, width)),
            Mnemonic::Xor => self.binary(|a, b, _, width| alu::logic(a ^ b, width)),
            Mnemonic::Cmp => self.compare(|a, b, width| alu::sub(a, b, false, width)),
            Mnemonic::Test => self.compare(|a, b, width| alu::logic(a & b, width)),
            Mnemonic::Not => self.unary(0, |a, width| Computed { value: !a & mask(width), flags: 0 }),
            Mnemonic::Neg => self.unary(alu::ARITHMETIC, |a, width| alu::sub(0, a, false, width)),
            Mnemonic::Inc => self.unary(ALL_BUT_CARRY, |a, width| alu::add(a, 1, false, width)),
            Mnemonic::Dec => self.unary(ALL_BUT_CARRY, |a, width| alu::sub(a, 1, false, width)),
            Mnemonic::Imul if self.insn.op_count() > 1 => self.imul(),
            Mnemonic::Imul => self.multiply(true),
            Mnemonic::Mul => self.multiply(false),
            Mnemonic::Div => self.divide(alu::div),
            Mnemonic::Idiv => self.divide(alu::idiv),

            Mnemonic::Rol => self.shift(Shift::Rol),
            Mnemonic::Ror => self.shift(Shift::Ror),
            Mnemonic::Rcl => self.shift(Shift::Rcl),
            Mnemonic::Rcr => self.shift(Shift::Rcr),
            Mnemonic::Shl | Mnemonic::Sal => self.shift(Shift::Shl),
            Mnemonic::Shr => self.shift(Shift::Shr),
            Mnemonic::Sar => self.shift(Shift::Sar),
            Mnemonic::Shld => self.double_shift(true),
            Mnemonic::Shrd => self.double_shift(false),

            other => self.execute_rest(other),
        }
    }

    /// The classes that live in files of their own.
    fn execute_rest(&mut self, mnemonic: Mnemonic) -> Result<Done, Stop<B::Error>> {
        if let Some(done) = self.data(mnemonic)? {
            return Ok(done);
        }
        if let Some(done) = self.bit_operation(mnemonic)? {
            return Ok(done);
        }
        if let Some(done) = self.stack_or_branch(mnemonic)? {
            return Ok(done);
        }
        if let Some(done) = self.sse(mnemonic)? {
            return Ok(done);
        }
        Err(Stop::Unsupported)
    }

    /// Moves RIP past the instruction, within the width of the code segment.
    pub(super) fn retire(&mut self) -> Done {
        self.cpu.rip = match self.cpu.code_bits() {
            64 => self.insn.next_ip(),
            32 => self.insn.next_ip() & mask(4),
            _ => self.insn.next_ip() & mask(2),
        };
        Done::PLAIN
    }

    pub(super) fn carry(&self) -> bool {
        self.cpu.rflags & rflags::CF != 0
    }

    /// `op0 = compute(op0, op1, CF)`.
    fn binary(&mut self, compute: impl FnOnce(u64, u64, bool, usize) -> Computed) -> Result<Done, Stop<B::Error>> {
        let width = self.width(0);
        let target = self.place(0, Access::Write)?;
        let source = self.place(1, Access::Read)?;
        let a = self.load(&target)?;
        let b = self.load(&source)?;
        let out = compute(a, b, self.carry(), width);
        self.update(&target, a, out.value, self.insn.has_lock_prefix())?;
        self.cpu.set_flags(alu::ARITHMETIC, out.flags);
        Ok(self.retire())
    }

    /// Flags of op0 against op1.
    fn compare(&mut self, compute: impl FnOnce(u64, u64, usize) -> Computed) -> Result<Done, Stop<B::Error>> {
        let width = self.width(0);
        let left = self.place(0, Access::Read)?;
        let right = self.place(1, Access::Read)?;
        let a = self.load(&left)?;
        let b = self.load(&right)?;
        self.cpu.set_flags(alu::ARITHMETIC, compute(a, b, width).flags);
        Ok(self.retire())
    }

    /// `op0 = compute(op0)`, setting the flags in `which`.
    fn unary(&mut self, which: u64, compute: impl FnOnce(u64, usize) -> Computed) -> Result<Done, Stop<B::Error>> {
        let width = self.width(0);
        let target = self.place(0, Access::Write)?;
        let a = self.load(&target)?;
        let out = compute(a, width);
        self.update(&target, a, out.value, self.insn.has_lock_prefix())?;
        self.cpu.set_flags(which, out.flags);
        Ok(self.retire())
    }

    /// IMUL with two or three operands.
    fn imul(&mut self) -> Result<Done, Stop<B::Error>> {
        let width = self.width(0);
        let (first, second) = if self.insn.op_count() == 2 { (0, 1) } else { (1, 2) };
        let left = self.place(first, Access::Read)?;
        let right = self.place(second, Access::Read)?;
        let a = self.load(&left)?;
        let b = self.load(&right)?;
        let out = alu::imul(a, b, width);
        let target = self.place(0, Access::Write)?;
        self.store(&target, out.value)?;
        self.cpu.set_flags(alu::ARITHMETIC, out.flags);
        Ok(self.retire())
    }

    /// MUL and IMUL with one operand: the accumulator times op0.
    fn multiply(&mut self, signed: bool) -> Result<Done, Stop<B::Error>> {
        let width = self.width(0);
        let source = self.place(0, Access::Read)?;
        let b = self.load(&source)?;
        let (low_register, high_register) = accumulator(width);
        let a = self.cpu.read(low_register).ok_or(Stop::Unsupported)?;
        let (low, high) = if signed { alu::imul_wide(a, b, width) } else { alu::mul_wide(a, b, width) };
        let lost = if signed { alu::imul(a, b, width).flags != 0 } else { high != 0 };
        self.cpu.write(low_register, low).ok_or(Stop::Unsupported)?;
        self.cpu.write(high_register, high).ok_or(Stop::Unsupported)?;
        self.cpu.set_flags(alu::ARITHMETIC, alu::when(lost, rflags::CF | rflags::OF));
        Ok(self.retire())
    }

    /// DIV and IDIV: the double-width accumulator by op0. The flags, all undefined, stay.
    fn divide(
        &mut self,
        compute: impl FnOnce(u64, u64, u64, usize) -> Option<(u64, u64)>,
    ) -> Result<Done, Stop<B::Error>> {
        let width = self.width(0);
        let source = self.place(0, Access::Read)?;
        let divisor = self.load(&source)?;
        let (low_register, high_register) = accumulator(width);
        let low = self.cpu.read(low_register).ok_or(Stop::Unsupported)?;
        let high = self.cpu.read(high_register).ok_or(Stop::Unsupported)?;
        let (quotient, remainder) = compute(low, high, divisor, width).ok_or(Exception::Divide)?;
        self.cpu.write(low_register, quotient).ok_or(Stop::Unsupported)?;
        self.cpu.write(high_register, remainder).ok_or(Stop::Unsupported)?;
        Ok(self.retire())
    }

    fn shift(&mut self, kind: Shift) -> Result<Done, Stop<B::Error>> {
        let width = self.width(0);
        let target = self.place(0, Access::Write)?;
        let counter = self.place(1, Access::Read)?;
        let count = shift::masked_count(self.load(&counter)?, width);
        let value = self.load(&target)?;
        let out = shift::shift(kind, value, count, self.carry(), width);
        self.store(&target, out.value)?;
        self.cpu.set_flags(out.written, out.flags);
        Ok(self.retire())
    }

    fn double_shift(&mut self, left: bool) -> Result<Done, Stop<B::Error>> {
        let width = self.width(0);
        let target = self.place(0, Access::Write)?;
        let filler = self.place(1, Access::Read)?;
        let counter = self.place(2, Access::Read)?;
        let count = shift::masked_count(self.load(&counter)?, width);
        let filler = self.load(&filler)?;
        let value = self.load(&target)?;
        let out = shift::double(left, value, filler, count, width);
        self.store(&target, out.value)?;
        self.cpu.set_flags(out.written, out.flags);
        Ok(self.retire())
    }
}

/// The accumulator pair of a width: low and high part. For bytes these are AL and AH.
fn accumulator(width: usize) -> (Register, Register) {
    match width {
        1 => (Register::AL, Register::AH),
        2 => (Register::AX, Register::DX),
        4 => (Register::EAX, Register::EDX),
        _ => (Register::RAX, Register::RDX),
    }
}
