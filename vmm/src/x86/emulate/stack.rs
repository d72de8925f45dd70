// SPDX-License-Identifier: MIT OR Apache-2.0
//! PUSH, POP, and near CALL and JMP: instructions that may fetch an operand or a target from a device, or whose stack
//! may lie where the emulator is needed.

use iced_x86::{Mnemonic, OpKind};

use super::memory::Span;
use super::state::{mask, seg};
use super::{Bus, Done, Exception, Exec, Stop};
use crate::x86::paging::Access;

/// Index of RSP.
const RSP: usize = 4;

impl<B: Bus> Exec<'_, B> {
    /// The instructions of this file; `None` if `mnemonic` is none of them.
    pub(super) fn stack_or_branch(&mut self, mnemonic: Mnemonic) -> Result<Option<Done>, Stop<B::Error>> {
        let done = match mnemonic {
            Mnemonic::Push if self.is_plain_operand() => self.push()?,
            Mnemonic::Pop if self.is_plain_operand() => self.pop()?,
            Mnemonic::Call if self.insn.is_call_near_indirect() => self.call()?,
            Mnemonic::Jmp if self.insn.is_jmp_near_indirect() => {
                let target = self.branch_target()?;
                self.cpu.rip = target;
                Done::PLAIN
            }
            _ => return Ok(None),
        };
        Ok(Some(done))
    }

    /// Everything but segment registers.
    fn is_plain_operand(&self) -> bool {
        self.insn.op_kind(0) != OpKind::Register || self.insn.op0_register().is_gpr()
    }

    fn push(&mut self) -> Result<Done, Stop<B::Error>> {
        let width = self.insn.stack_pointer_increment().unsigned_abs() as usize;
        let source = self.place(0, Access::Read)?;
        let (slot, pointer) = self.push_slot(width)?;
        let value = self.load(&source)?;
        self.write_value(&slot, value)?;
        self.cpu.write_sized(RSP, self.cpu.stack_width(), pointer);
        Ok(self.retire())
    }

    fn pop(&mut self) -> Result<Done, Stop<B::Error>> {
        let width = self.insn.stack_pointer_increment().unsigned_abs() as usize;
        let stack_width = self.cpu.stack_width();
        let old = self.cpu.gpr[RSP];
        let slot = self.span(seg::SS, old & mask(stack_width), width, Access::Read)?;
        // A destination addressed through RSP is computed with the value after the pop (APM volume 3, POP).
        self.cpu.write_sized(RSP, stack_width, old.wrapping_add(width as u64));
        let popped = self.cpu.gpr[RSP];
        let target = self.place(0, Access::Write);
        self.cpu.gpr[RSP] = old;
        let target = target?;
        let value = self.read_value(&slot)?;
        if self.insn.op_kind(0) == OpKind::Register {
            self.cpu.gpr[RSP] = popped;
            self.store(&target, value)?;
        } else {
            self.store(&target, value)?;
            self.cpu.gpr[RSP] = popped;
        }
        Ok(self.retire())
    }

    fn call(&mut self) -> Result<Done, Stop<B::Error>> {
        let width = self.width(0);
        let (slot, pointer) = self.push_slot(width)?;
        let target = self.branch_target()?;
        self.write_value(&slot, self.insn.next_ip())?;
        self.cpu.write_sized(RSP, self.cpu.stack_width(), pointer);
        self.cpu.rip = target;
        Ok(Done::PLAIN)
    }

    /// The place of a push of `width` bytes, and the stack pointer after it.
    fn push_slot(&mut self, width: usize) -> Result<(Span, u64), Stop<B::Error>> {
        let pointer = self.cpu.gpr[RSP].wrapping_sub(width as u64) & mask(self.cpu.stack_width());
        Ok((self.span(seg::SS, pointer, width, Access::Write)?, pointer))
    }

    /// The checked target of an indirect near branch.
    fn branch_target(&mut self) -> Result<u64, Stop<B::Error>> {
        let source = self.place(0, Access::Read)?;
        let target = self.load(&source)?;
        let reachable = if self.cpu.is_64bit() {
            self.canonical(target).is_some()
        } else {
            target <= self.cpu.segments[seg::CS].limit.into()
        };
        if reachable {
            Ok(target)
        } else {
            Err(Exception::GeneralProtection.into())
        }
    }
}
