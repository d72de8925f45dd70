// SPDX-License-Identifier: MIT OR Apache-2.0
//! SSE moves between vector registers and memory.

use iced_x86::{Mnemonic, OpKind, Register};

use super::memory::{Span, MAX_OPERAND};
use super::operand::Place;
use super::{Bus, Done, Exception, Exec, Stop};
use crate::x86::paging::Access;

/// CR0.EM: no FPU; SSE instructions are undefined.
const CR0_EM: u64 = 1 << 2;
/// CR0.TS: FPU state belongs to another task.
const CR0_TS: u64 = 1 << 3;
/// CR4.OSFXSR: the operating system saves SSE state.
const CR4_OSFXSR: u64 = 1 << 9;

/// How an instruction maps memory to the register.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Shape {
    /// All 16 bytes, which must be aligned.
    Aligned,
    /// All 16 bytes.
    Unaligned,
    /// The low 4 or 8 bytes; a load clears the others.
    Scalar,
    /// The low 8 bytes; a load keeps the others.
    LowHalf,
    /// The high 8 bytes; a load keeps the others.
    HighHalf,
}

impl<B: Bus> Exec<'_, B> {
    /// The instructions of this file; `None` if `mnemonic` is none of them, or if no memory is involved.
    pub(super) fn sse(&mut self, mnemonic: Mnemonic) -> Result<Option<Done>, Stop<B::Error>> {
        let shape = match mnemonic {
            Mnemonic::Movaps | Mnemonic::Movapd | Mnemonic::Movdqa => Shape::Aligned,
            Mnemonic::Movntps | Mnemonic::Movntpd | Mnemonic::Movntdq | Mnemonic::Movntdqa => Shape::Aligned,
            Mnemonic::Movups | Mnemonic::Movupd | Mnemonic::Movdqu | Mnemonic::Lddqu => Shape::Unaligned,
            Mnemonic::Movd | Mnemonic::Movq | Mnemonic::Movss | Mnemonic::Movsd => Shape::Scalar,
            Mnemonic::Movlps | Mnemonic::Movlpd => Shape::LowHalf,
            Mnemonic::Movhps | Mnemonic::Movhpd => Shape::HighHalf,
            _ => return Ok(None),
        };
        let (memory, register, access) = match (self.insn.op_kind(0), self.insn.op_kind(1)) {
            (OpKind::Memory, OpKind::Register) => (0, self.insn.op1_register(), Access::Write),
            (OpKind::Register, OpKind::Memory) => (1, self.insn.op0_register(), Access::Read),
            _ => return Ok(None),
        };
        if !register.is_xmm() {
            return Ok(None);
        }
        self.check_sse_available()?;
        let span = if shape == Shape::Aligned {
            self.place_aligned(memory, access)?
        } else {
            match self.place(memory, access)? {
                Place::Memory(span) => span,
                _ => return Ok(None),
            }
        };
        if access == Access::Write {
            self.sse_store(shape, register, &span)?;
        } else {
            self.sse_load(shape, register, &span)?;
        }
        Ok(Some(self.retire()))
    }

    /// APM volume 4, section 1.2.2, table of exception conditions.
    fn check_sse_available(&self) -> Result<(), Exception> {
        if self.cpu.cr0 & CR0_EM != 0 || self.cpu.cr4 & CR4_OSFXSR == 0 {
            return Err(Exception::InvalidOpcode);
        }
        if self.cpu.cr0 & CR0_TS != 0 {
            return Err(Exception::DeviceNotAvailable);
        }
        Ok(())
    }

    fn sse_store(&mut self, shape: Shape, register: Register, span: &Span) -> Result<(), Stop<B::Error>> {
        let mut value = self.bus.xmm_read(register.number()).map_err(Stop::Bus)?;
        if shape == Shape::HighHalf {
            value.copy_within(8.., 0);
        }
        self.write(span, &value)
    }

    fn sse_load(&mut self, shape: Shape, register: Register, span: &Span) -> Result<(), Stop<B::Error>> {
        let mut data = [0; MAX_OPERAND];
        self.read(span, &mut data)?;
        let value = match shape {
            Shape::Aligned | Shape::Unaligned | Shape::Scalar => data,
            Shape::LowHalf | Shape::HighHalf => {
                let mut value = self.bus.xmm_read(register.number()).map_err(Stop::Bus)?;
                let half = if shape == Shape::LowHalf { &mut value[..8] } else { &mut value[8..] };
                half.copy_from_slice(&data[..8]);
                value
            }
        };
        self.bus.xmm_write(register.number(), value).map_err(Stop::Bus)
    }
}
