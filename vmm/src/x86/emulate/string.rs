// SPDX-License-Identifier: MIT OR Apache-2.0
//! MOVS, LODS, STOS, SCAS and CMPS, alone and repeated; and the machinery of repetition that INS and OUTS share.

use iced_x86::{Mnemonic, OpKind, Register};

use super::alu;
use super::memory::Span;
use super::state::{mask, rflags, seg};
use super::{Bus, Done, Exec, Stop};
use crate::x86::paging::Access;

/// Index of the count register.
const RCX: usize = 1;
/// Index of the source pointer.
const RSI: usize = 6;
/// Index of the destination pointer.
const RDI: usize = 7;

/// Whether the comparing instructions (REPE, REPNE) go on after an iteration.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Until {
    /// The count alone decides.
    CountIsZero,
    /// ZF decides, too.
    Compared,
}

impl<B: Bus> Exec<'_, B> {
    /// One call's worth of a string instruction.
    pub(super) fn string(&mut self) -> Result<Done, Stop<B::Error>> {
        let size = self.insn.memory_size().size();
        match self.insn.mnemonic() {
            Mnemonic::Movsb | Mnemonic::Movsw | Mnemonic::Movsd | Mnemonic::Movsq => {
                self.repeat(Until::CountIsZero, |exec| {
                    let source = exec.string_source(size)?;
                    let target = exec.string_target(size, Access::Write)?;
                    let value = exec.read_value(&source)?;
                    exec.write_value(&target, value)?;
                    exec.advance_source(size);
                    exec.advance_target(size);
                    Ok(())
                })
            }
            Mnemonic::Lodsb | Mnemonic::Lodsw | Mnemonic::Lodsd | Mnemonic::Lodsq => {
                let accumulator = accumulator(size);
                self.repeat(Until::CountIsZero, |exec| {
                    let source = exec.string_source(size)?;
                    let value = exec.read_value(&source)?;
                    exec.cpu.write(accumulator, value).ok_or(Stop::Unsupported)?;
                    exec.advance_source(size);
                    Ok(())
                })
            }
            Mnemonic::Stosb | Mnemonic::Stosw | Mnemonic::Stosd | Mnemonic::Stosq => {
                self.repeat(Until::CountIsZero, |exec| {
                    let target = exec.string_target(size, Access::Write)?;
                    exec.write_value(&target, exec.cpu.gpr[0])?;
                    exec.advance_target(size);
                    Ok(())
                })
            }
            Mnemonic::Scasb | Mnemonic::Scasw | Mnemonic::Scasd | Mnemonic::Scasq => {
                self.repeat(Until::Compared, |exec| {
                    let target = exec.string_target(size, Access::Read)?;
                    let value = exec.read_value(&target)?;
                    let flags = alu::sub(exec.cpu.gpr[0], value, false, size).flags;
                    exec.cpu.set_flags(alu::ARITHMETIC, flags);
                    exec.advance_target(size);
                    Ok(())
                })
            }
            Mnemonic::Cmpsb | Mnemonic::Cmpsw | Mnemonic::Cmpsd | Mnemonic::Cmpsq => {
                self.repeat(Until::Compared, |exec| {
                    let source = exec.string_source(size)?;
                    let target = exec.string_target(size, Access::Read)?;
                    let left = exec.read_value(&source)?;
                    let right = exec.read_value(&target)?;
                    exec.cpu.set_flags(alu::ARITHMETIC, alu::sub(left, right, false, size).flags);
                    exec.advance_source(size);
                    exec.advance_target(size);
                    Ok(())
                })
            }
            // INS and OUTS come with an exit of their own; see `string_io`.
            _ => Err(Stop::Unsupported),
        }
    }

    /// Runs `iteration` as the prefixes say (APM volume 3, section 1.2.6). An iteration changes registers only when
    /// nothing can stop it any more, so the state is consistent between any two.
    pub(super) fn repeat(
        &mut self,
        until: Until,
        mut iteration: impl FnMut(&mut Self) -> Result<(), Stop<B::Error>>,
    ) -> Result<Done, Stop<B::Error>> {
        let while_equal = self.insn.has_rep_prefix();
        let while_unequal = self.insn.has_repne_prefix();
        if !while_equal && !while_unequal {
            iteration(self)?;
            return Ok(self.retire());
        }
        let width = self.string_address_width();
        let single_step = self.cpu.rflags & rflags::TF != 0;
        let limit = if single_step { 1 } else { self.config.rep_limit.max(1) };
        for _ in 0..limit {
            let count = self.cpu.gpr[RCX] & mask(width);
            if count == 0 {
                return Ok(self.retire());
            }
            iteration(self)?;
            self.cpu.write_sized(RCX, width, count - 1);
            let equal = self.cpu.rflags & rflags::ZF != 0;
            let compared_out = until == Until::Compared && equal != while_equal;
            if count == 1 || compared_out {
                return Ok(self.retire());
            }
        }
        Ok(Done::Unfinished)
    }

    /// The element at the source pointer, in the segment the instruction names.
    pub(super) fn string_source(&mut self, size: usize) -> Result<Span, Stop<B::Error>> {
        let offset = self.cpu.gpr[RSI] & mask(self.string_address_width());
        self.span(self.insn.memory_segment().number(), offset, size, Access::Read)
    }

    /// The element at the destination pointer, always in ES.
    pub(super) fn string_target(&mut self, size: usize, access: Access) -> Result<Span, Stop<B::Error>> {
        let offset = self.cpu.gpr[RDI] & mask(self.string_address_width());
        self.span(seg::ES, offset, size, access)
    }

    /// Moves the source pointer by one element.
    pub(super) fn advance_source(&mut self, size: usize) {
        self.advance(RSI, size);
    }

    /// Moves the destination pointer by one element.
    pub(super) fn advance_target(&mut self, size: usize) {
        self.advance(RDI, size);
    }

    fn advance(&mut self, register: usize, size: usize) {
        let step = if self.cpu.rflags & rflags::DF != 0 { (size as u64).wrapping_neg() } else { size as u64 };
        let moved = self.cpu.gpr[register].wrapping_add(step);
        self.cpu.write_sized(register, self.string_address_width(), moved);
    }

    /// Width in bytes of the pointers and the count.
    fn string_address_width(&self) -> usize {
        let width = |kind| match kind {
            OpKind::MemorySegSI | OpKind::MemoryESDI => Some(2),
            OpKind::MemorySegESI | OpKind::MemoryESEDI => Some(4),
            OpKind::MemorySegRSI | OpKind::MemoryESRDI => Some(8),
            _ => None,
        };
        self.insn.op_kinds().find_map(width).unwrap_or(8)
    }
}

fn accumulator(size: usize) -> Register {
    match size {
        1 => Register::AL,
        2 => Register::AX,
        4 => Register::EAX,
        _ => Register::RAX,
    }
}
