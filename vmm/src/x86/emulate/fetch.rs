// SPDX-License-Identifier: MIT OR Apache-2.0
//! Instruction bytes: those the CPU recorded, or those at RIP; and their decoding.

use iced_x86::{Decoder, DecoderError, DecoderOptions, FastFormatter, Instruction};

use super::memory::PAGE;
use super::state::seg;
use super::{Bus, Exception, Exec, Stop, Unsupported};
use crate::x86::paging::Access;

/// The longest x86 instruction.
const MAX_LENGTH: usize = 15;

/// Bytes of one instruction, as many as are known.
pub(super) struct Code {
    bytes: [u8; MAX_LENGTH],
    length: usize,
}

impl Code {
    /// Starts with what the CPU recorded; bytes beyond the 15th are ignored.
    pub(super) fn new(recorded: &[u8]) -> Self {
        let length = recorded.len().min(MAX_LENGTH);
        let mut bytes = [0; MAX_LENGTH];
        bytes[..length].copy_from_slice(&recorded[..length]);
        Code { bytes, length }
    }

    fn known(&self) -> &[u8] {
        &self.bytes[..self.length]
    }

    /// For a message: the instruction's own bytes, or all there are if it did not decode.
    pub(super) fn describe(&self, insn: &Instruction, rip: u64) -> Unsupported {
        let length = if insn.is_invalid() { self.length } else { insn.len().min(self.length) };
        let mut disassembly = String::new();
        FastFormatter::new().format(insn, &mut disassembly);
        Unsupported { rip, bytes: self.bytes[..length].to_vec(), disassembly }
    }
}

impl<B: Bus> Exec<'_, B> {
    /// Decodes the instruction at RIP, fetching only as many pages as it needs.
    pub(super) fn decode(&mut self, code: &mut Code) -> Result<(), Stop<B::Error>> {
        loop {
            let mut decoder = Decoder::with_ip(self.cpu.code_bits(), code.known(), self.cpu.rip, DecoderOptions::NONE);
            self.insn = decoder.decode();
            match decoder.last_error() {
                DecoderError::None => return Ok(()),
                DecoderError::NoMoreBytes if code.length < MAX_LENGTH => self.fetch(code)?,
                _ => return Err(Stop::Unsupported),
            }
        }
    }

    /// Adds the bytes from the first unknown one to the end of its page.
    fn fetch(&mut self, code: &mut Code) -> Result<(), Stop<B::Error>> {
        let segment = self.cpu.segments[seg::CS];
        let offset = self.cpu.rip.wrapping_add(code.length as u64);
        let mut count = MAX_LENGTH - code.length;
        let linear = if self.cpu.is_64bit() {
            self.canonical(offset).ok_or(Exception::GeneralProtection)?
        } else {
            let left = u64::from(segment.limit).checked_sub(offset).ok_or(Exception::GeneralProtection)?;
            count = count.min(usize::try_from(left).unwrap_or(usize::MAX).saturating_add(1));
            self.wrap(segment.base.wrapping_add(offset))
        };
        count = count.min((PAGE - linear.as_u64() % PAGE) as usize);
        let at = self.translate(linear, Access::Execute)?;
        if !self.bus.is_ram(at, false) {
            return Err(Stop::FetchFromDevice(at));
        }
        let target = &mut code.bytes[code.length..code.length + count];
        self.bus.read(at, target).map_err(Stop::Bus)?;
        code.length += count;
        Ok(())
    }
}
