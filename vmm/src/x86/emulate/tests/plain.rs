// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the decoder of plain moves says is what `iced-x86` says of the same bytes, and it leaves out nothing that is plain.

use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};
use proptest::prelude::*;

use super::super::plain::{decode, Action, Operand, Plain};
use super::super::state::mask;

const RIP: u64 = 0xffff_ffff_8100_1000;

/// The plain move that `insn` is, if it is one.
fn expected(insn: &Instruction) -> Option<Plain> {
    let general = |index| Some(insn.op_register(index)).filter(|register| register.is_gpr());
    let action = match (insn.mnemonic(), insn.op0_kind(), insn.op1_kind()) {
        (Mnemonic::Mov | Mnemonic::Movzx, OpKind::Register, OpKind::Memory) => {
            Action::Load { to: general(0)?, sign_extends: false }
        }
        (Mnemonic::Movsx | Mnemonic::Movsxd, OpKind::Register, OpKind::Memory) => {
            Action::Load { to: general(0)?, sign_extends: true }
        }
        (Mnemonic::Mov, OpKind::Memory, OpKind::Register) => Action::Store(general(1)?),
        (Mnemonic::Mov, OpKind::Memory, _) => {
            Action::StoreConstant(insn.immediate(1) & mask(insn.memory_size().size()))
        }
        _ => return None,
    };
    let (base, index) = (insn.memory_base(), insn.memory_index());
    let relative = matches!(base, Register::RIP | Register::EIP);
    let address_width = match (base, index) {
        (Register::None, Register::None) => insn.memory_displ_size() as usize,
        (Register::None, register) | (register, _) => register.size(),
    };
    let segment = insn.segment_prefix();
    let operand = Operand {
        segment: if matches!(segment, Register::FS | Register::GS) { segment } else { Register::None },
        base: if relative { Register::None } else { base },
        index,
        scale: if index == Register::None { 1 } else { insn.memory_index_scale().into() },
        displacement: insn.memory_displacement64() & mask(address_width),
        mask: mask(address_width),
    };
    Some(Plain { length: insn.len(), operand, width: insn.memory_size().size(), action })
}

fn iced(bytes: &[u8]) -> Option<Plain> {
    let insn = Decoder::with_ip(64, bytes, RIP, DecoderOptions::NONE).decode();
    if insn.is_invalid() {
        None
    } else {
        expected(&insn)
    }
}

/// Prefixes of which each is there once, and before REX.
fn simple_prefixes() -> impl Strategy<Value = Vec<u8>> {
    let one = |bytes: &'static [u8]| prop::option::weighted(0.2, prop::sample::select(bytes));
    (one(&[0x66]), one(&[0x67]), one(&[0x64, 0x65]), prop::option::of(0x40u8..=0x4f))
        .prop_map(|(first, second, third, rex)| [first, second, third, rex].into_iter().flatten().collect())
}

fn opcode() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        prop::sample::select(&[0x88u8, 0x89, 0x8a, 0x8b, 0xc6, 0xc7, 0xa0, 0xa1, 0xa2, 0xa3][..])
            .prop_map(|byte| vec![byte]),
        prop::sample::select(&[0xb6u8, 0xb7, 0xbe, 0xbf][..]).prop_map(|byte| vec![0x0f, byte]),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 64 } else { 4_000 }))]

    #[test]
    fn plain_moves_are_what_the_other_decoder_says(
        prefixes in simple_prefixes(),
        opcode in opcode(),
        rest in prop::array::uniform12(any::<u8>()),
    ) {
        let mut bytes = [prefixes, opcode, rest.to_vec()].concat();
        bytes.truncate(15);
        prop_assert_eq!(decode(&bytes, RIP), iced(&bytes), "{:02x?}", bytes);
    }

    #[test]
    fn nothing_else_is_taken_for_one(bytes in prop::array::uniform15(any::<u8>())) {
        if let Some(plain) = decode(&bytes, RIP) {
            prop_assert_eq!(Some(plain), iced(&bytes), "{:02x?}", bytes);
        }
    }

    #[test]
    fn it_wants_all_of_the_bytes(opcode in opcode(), rest in prop::array::uniform12(any::<u8>())) {
        let bytes = [opcode, rest.to_vec()].concat();
        if let Some(plain) = decode(&bytes, RIP) {
            for length in 0..plain.length {
                prop_assert_eq!(decode(&bytes[..length], RIP), None, "{} of {:02x?}", length, bytes);
            }
        }
    }
}

#[test]
fn sign_extension_of_double_words_needs_rex_w() {
    assert_eq!(decode(&[0x48, 0x63, 0x07], RIP), iced(&[0x48, 0x63, 0x07]));
    assert_eq!(decode(&[0x63, 0x07], RIP), None);
}
