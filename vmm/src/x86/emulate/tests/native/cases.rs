// SPDX-License-Identifier: MIT OR Apache-2.0
//! Random instructions and states, built from the decoder's own table of encodings.

use std::sync::LazyLock;

use iced_x86::{Code, Encoder, EncodingKind, Instruction, Mnemonic, OpCodeOperandKind as Kind, OpKind, Register};
use proptest::prelude::*;

use super::super::*;
use super::trampoline::AREA;
use crate::x86::emulate::alu::ARITHMETIC;

/// The raw material of one case; everything else follows from it.
#[derive(Clone, Debug)]
pub(super) struct Seed {
    pub(super) code: prop::sample::Index,
    pub(super) gpr: [u64; 16],
    pub(super) xmm: [[u8; 16]; 16],
    pub(super) flags: u64,
    /// Choices: registers, addressing form, prefixes.
    pub(super) picks: [u8; 12],
    /// Where the operand lies.
    pub(super) offset: u16,
    pub(super) immediate: u64,
    /// Which pages of the area are devices.
    pub(super) devices: u8,
    pub(super) memory: u16,
}

fn value() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => any::<u64>(),
        1 => 0u64..80,
        1 => Just(u64::MAX),
        1 => (0u32..64).prop_map(|bit| 1 << bit),
        1 => (0u32..64).prop_map(|bit| (1 << bit) - 1),
    ]
}

prop_compose! {
    pub(super) fn seed()(
        code in any::<prop::sample::Index>(),
        gpr in prop::array::uniform16(value()),
        xmm in prop::array::uniform16(any::<u128>()),
        flags in any::<u64>(),
        picks in any::<[u8; 12]>(),
        offset in 0u16..48,
        immediate in value(),
        devices in 0u8..8,
        memory in any::<u16>(),
    ) -> Seed {
        Seed { code, gpr, xmm: xmm.map(u128::to_le_bytes), flags, picks, offset, immediate, devices, memory }
    }
}

impl Seed {
    /// The start of the operand: around the first page boundary of the area, or anywhere in its second page.
    pub(super) fn target(&self, area: u64) -> u64 {
        if self.picks[0] % 4 != 0 {
            area + 4096 - 24 + u64::from(self.offset)
        } else {
            area + 4096 + u64::from(self.picks[1]) * 8
        }
    }

    pub(super) fn flags(&self) -> u64 {
        2 | self.flags & (ARITHMETIC | rflags::DF)
    }

    /// A general register other than RSP.
    fn register(&self, pick: usize) -> usize {
        let index = usize::from(self.picks[pick] % 15);
        if index >= 4 {
            index + 1
        } else {
            index
        }
    }

    /// The area's contents: one random sequence, begun at a random place.
    pub(super) fn memory(&self) -> Vec<u8> {
        static SEQUENCE: LazyLock<Vec<u8>> = LazyLock::new(|| {
            let mut state = 0x9e37_79b9_7f4a_7c15u64;
            let mut next = || {
                // xorshift64; G. Marsaglia, "Xorshift RNGs", 2003.
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state
            };
            (0..AREA).map(|_| (next() >> 32) as u8).collect()
        });
        let mut bytes = SEQUENCE.clone();
        bytes.rotate_left(usize::from(self.memory) % AREA);
        bytes
    }
}

fn gpr(size: usize, index: usize) -> Register {
    let first = match size {
        1 => return gpr8(index),
        2 => Register::AX,
        4 => Register::EAX,
        _ => Register::RAX,
    };
    first + index as u32
}

fn gpr8(index: usize) -> Register {
    const LOW: [Register; 16] = [
        Register::AL,
        Register::CL,
        Register::DL,
        Register::BL,
        Register::SPL,
        Register::BPL,
        Register::SIL,
        Register::DIL,
        Register::R8L,
        Register::R9L,
        Register::R10L,
        Register::R11L,
        Register::R12L,
        Register::R13L,
        Register::R14L,
        Register::R15L,
    ];
    LOW[index]
}

/// The encodings that read or write memory among those the emulator claims for 64-bit mode.
pub(super) fn encodings(wanted: impl Fn(Mnemonic) -> bool) -> Vec<Code> {
    let memory = |kind: &Kind| {
        matches!(
            kind,
            Kind::mem | Kind::r8_or_mem | Kind::r16_or_mem | Kind::r32_or_mem | Kind::r64_or_mem | Kind::xmm_or_mem
        )
    };
    let foreign =
        |kind: &Kind| matches!(kind, Kind::mm_reg | Kind::mm_rm | Kind::seg_reg | Kind::cr_reg | Kind::dr_reg);
    Code::values()
        .filter(|code| wanted(code.mnemonic()))
        .filter(|code| {
            let info = code.op_code();
            info.is_instruction()
                && info.mode64()
                && info.encoding() == EncodingKind::Legacy
                && info.op_kinds().iter().any(memory)
                && !info.op_kinds().iter().any(foreign)
        })
        .collect()
}

/// Builds `code` with a memory operand at `target`, adjusting `gpr` so that the address comes out.
pub(super) fn build(seed: &Seed, code: Code, target: u64, gpr_values: &mut [u64; 16]) -> Option<Vec<u8>> {
    let picks = &seed.picks;
    let mut insn = Instruction::new();
    insn.set_code(code);
    let address_size = if picks[2] % 4 == 0 { 4 } else { 8 };
    let base = seed.register(3);
    let index = seed.register(4);
    let with_index = picks[5] % 3 == 0 && index != base;
    let scale = 1 << (picks[6] % 4);
    let displacement = match picks[7] % 3 {
        0 => 0,
        1 => i64::from(picks[8] as i8),
        _ => seed.immediate as i32 as i64 >> 4,
    };
    let bit_string = matches!(code.mnemonic(), Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc);
    let mut memory_operand = None;
    for (position, kind) in code.op_code().op_kinds().iter().enumerate() {
        let position = position as u32;
        let any_register = usize::from(picks[9] % 16);
        match kind {
            Kind::mem | Kind::r8_or_mem | Kind::r16_or_mem | Kind::r32_or_mem | Kind::r64_or_mem | Kind::xmm_or_mem => {
                insn.set_op_kind(position, OpKind::Memory);
                memory_operand = Some(position);
            }
            Kind::r8_reg if picks[10] % 4 == 0 => {
                let high = [Register::AH, Register::CH, Register::DH, Register::BH][any_register % 4];
                insn.set_op_register(position, high);
            }
            Kind::r8_reg => insn.set_op_register(position, gpr(1, any_register)),
            Kind::r16_reg | Kind::r32_reg | Kind::r64_reg => {
                let size = match kind {
                    Kind::r16_reg => 2,
                    Kind::r32_reg => 4,
                    _ => 8,
                };
                insn.set_op_register(position, gpr(size, any_register));
                if bit_string {
                    if any_register == base || (with_index && any_register == index) {
                        return None;
                    }
                    // Bit offsets up to 2 KiB to either side, under whatever the upper register bits hold.
                    let offset = (i64::from(seed.immediate as i16) >> 2) as u64;
                    let keep = crate::x86::emulate::state::mask(size);
                    gpr_values[any_register] = (gpr_values[any_register] & !keep) | (offset & keep);
                }
            }
            Kind::xmm_reg => insn.set_op_register(position, Register::XMM0 + u32::from(picks[9] % 16)),
            Kind::al => insn.set_op_register(position, Register::AL),
            Kind::cl => insn.set_op_register(position, Register::CL),
            Kind::ax => insn.set_op_register(position, Register::AX),
            Kind::eax => insn.set_op_register(position, Register::EAX),
            Kind::rax => insn.set_op_register(position, Register::RAX),
            Kind::imm8 => set_immediate(&mut insn, position, OpKind::Immediate8, seed.immediate),
            Kind::imm8_const_1 => set_immediate(&mut insn, position, OpKind::Immediate8, 1),
            Kind::imm8sex16 => set_immediate(&mut insn, position, OpKind::Immediate8to16, seed.immediate),
            Kind::imm8sex32 => set_immediate(&mut insn, position, OpKind::Immediate8to32, seed.immediate),
            Kind::imm8sex64 => set_immediate(&mut insn, position, OpKind::Immediate8to64, seed.immediate),
            Kind::imm16 => set_immediate(&mut insn, position, OpKind::Immediate16, seed.immediate),
            Kind::imm32 => set_immediate(&mut insn, position, OpKind::Immediate32, seed.immediate),
            Kind::imm32sex64 => set_immediate(&mut insn, position, OpKind::Immediate32to64, seed.immediate),
            _ => panic!("{code:?} has an operand this test cannot make: {kind:?}"),
        }
    }

    let operand = memory_operand?;
    insn.set_memory_base(gpr(address_size, base));
    if with_index {
        insn.set_memory_index(gpr(address_size, index));
        insn.set_memory_index_scale(scale);
    }
    insn.set_memory_displacement64(displacement as u64);
    // The encoder widens a displacement that does not fit a byte.
    insn.set_memory_displ_size(if displacement == 0 { 0 } else { 1 });
    if with_index && address_size == 8 {
        gpr_values[index] %= 1 << 20;
    }
    let scaled = if with_index { gpr_values[index].wrapping_mul(scale.into()) } else { 0 };
    let address = target.wrapping_sub(scaled).wrapping_sub(displacement as u64);
    gpr_values[base] = if address_size == 4 {
        // The upper half of the register must not count.
        (gpr_values[base] & !0xffff_ffff) | (address & 0xffff_ffff)
    } else {
        address
    };
    let lockable = code.op_code().can_use_lock_prefix() && operand == 0;
    insn.set_has_lock_prefix(lockable && picks[11] % 2 == 0);

    let mut encoder = Encoder::new(64);
    // A high byte register cannot be combined with REX; such a draw is dropped.
    encoder.encode(&insn, 0).ok()?;
    Some(encoder.take_buffer())
}

fn set_immediate(insn: &mut Instruction, position: u32, kind: OpKind, value: u64) {
    insn.set_op_kind(position, kind);
    let value = match kind {
        OpKind::Immediate16 => u64::from(value as u16),
        OpKind::Immediate32 => u64::from(value as u32),
        OpKind::Immediate32to64 => value as i32 as u64,
        OpKind::Immediate8 => u64::from(value as u8),
        _ => value as i8 as u64,
    };
    insn.set_immediate_u64(position, value);
}
