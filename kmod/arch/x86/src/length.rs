// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! Lengths of intercepted instructions, for CPUs without NRIP save and decode assists (APM vol. 2 sections 15.7.1 and 15.8.4;
//! opcodes and prefixes: vol. 3 section 1.2 and appendix A).
//!
//! This is no decoder: the exit has already told what the instruction is. Prefixes are skipped, and the opcode must be the one
//! that the exit told of, or else the guest's memory has changed since and the instruction is to be executed anew.

/// An instruction has at most 15 bytes.
pub(crate) const MAX_LENGTH: usize = 15;

/// An instruction that exits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Instruction {
    /// CPUID.
    Cpuid,
    /// RDMSR.
    Rdmsr,
    /// WRMSR.
    Wrmsr,
    /// HLT.
    Hlt,
    /// PAUSE.
    Pause,
    /// INVD.
    Invd,
    /// WBINVD, or WBNOINVD, which is the same with a prefix.
    Wbinvd,
    /// XSETBV.
    Xsetbv,
    /// VMMCALL.
    Vmmcall,
    /// MOV to a control register, by number.
    MovToCr(u8),
    /// MOV from a general register or an immediate value to memory, in 64-bit code.
    Store,
}

/// What was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    /// Length in bytes, 1 to 15.
    pub(crate) length: u8,
    /// The general register of the ModRM byte's r/m field; 0 for instructions without one.
    pub(crate) register: u8,
}

/// Finds `instruction` at the start of `bytes`, which are the first of the instruction stream (as many as could be read, or
/// 15). `long` says whether this is 64-bit code.
pub(crate) fn find(bytes: &[u8], long: bool, instruction: Instruction) -> Option<Found> {
    let bytes = bytes.get(..bytes.len().min(MAX_LENGTH))?;
    let (mut at, mut rex, mut lock, mut word) = (0usize, 0u8, false, false);
    loop {
        match *bytes.get(at)? {
            // F3 90 is PAUSE: the prefix is part of it. Any other run of prefixes ends at the opcode.
            0x66 => (rex, word) = (0, true),
            0x67 | 0xf2 | 0xf3 | 0x2e | 0x36 | 0x3e | 0x26 | 0x64 | 0x65 => rex = 0,
            0xf0 => (rex, lock) = (0, true),
            // A REX prefix counts only directly before the opcode.
            byte @ 0x40..=0x4f if long => rex = byte,
            _ => break,
        }
        at += 1;
    }
    let rest = bytes.get(at..)?;
    let (opcode_length, register) = match (instruction, rest) {
        (Instruction::Cpuid, [0x0f, 0xa2, ..])
        | (Instruction::Rdmsr, [0x0f, 0x32, ..])
        | (Instruction::Wrmsr, [0x0f, 0x30, ..])
        | (Instruction::Invd, [0x0f, 0x08, ..])
        | (Instruction::Wbinvd, [0x0f, 0x09, ..]) => (2, 0),
        (Instruction::Hlt, [0xf4, ..]) => (1, 0),
        (Instruction::Pause, [0x90, ..]) if bytes.get(..at)?.contains(&0xf3) => (1, 0),
        (Instruction::Xsetbv, [0x0f, 0x01, 0xd1, ..]) | (Instruction::Vmmcall, [0x0f, 0x01, 0xd9, ..]) => (3, 0),
        (Instruction::MovToCr(number), [0x0f, 0x22, modrm, ..]) => {
            // The mod field is ignored: the operand is always a register. LOCK in front of CR0 means CR8 (CPUID
            // Fn8000_0001_ECX.AltMovCr8), which is how 32-bit code reaches it.
            let alternative = if lock && modrm >> 3 & 7 == 0 { 8 } else { 0 };
            let cr = modrm >> 3 & 7 | (rex & 4) << 1 | alternative;
            if cr != number {
                return None;
            }
            (3, modrm & 7 | (rex & 1) << 3)
        }
        // From a register, of a byte and of more.
        (Instruction::Store, [0x88 | 0x89, operand @ ..]) if long => (1 + memory_operand(operand)?, 0),
        // Immediate: a byte; two bytes with an operand size prefix, unless REX.W overrides it, otherwise four.
        (Instruction::Store, [opcode @ (0xc6 | 0xc7), modrm, ..]) if long && modrm >> 3 & 7 == 0 => {
            let immediate = match (opcode, word && rex & 8 == 0) {
                (0xc6, _) => 1,
                (_, true) => 2,
                (_, false) => 4,
            };
            (1 + memory_operand(rest.get(1..)?)? + immediate, 0)
        }
        _ => return None,
    };
    let length = at + opcode_length;
    (length <= bytes.len()).then_some(Found { length: length as u8, register })
}

/// Length of a ModRM byte and what belongs to it, if it names memory, with 32 or 64 address bits (vol. 3 section 1.4).
fn memory_operand(bytes: &[u8]) -> Option<usize> {
    let (modrm, sib) = (*bytes.first()?, bytes.get(1).copied());
    let (mode, register) = (modrm >> 6, modrm & 7);
    let (length, base) = if register == 4 { (2, sib? & 7) } else { (1, register) };
    let displacement = match (mode, base) {
        // A base of 5 stands for an address of 32 bits; without a SIB byte it is relative to RIP.
        (0, 5) => 4,
        (0, _) => 0,
        (1, _) => 1,
        (2, _) => 4,
        _ => return None,
    };
    Some(length + displacement)
}

#[cfg(test)]
mod tests {
    use super::*;
    use Instruction::*;

    fn length(bytes: &[u8], long: bool, instruction: Instruction) -> Option<u8> {
        find(bytes, long, instruction).map(|found| found.length)
    }

    #[test]
    fn plain_forms() {
        for (bytes, instruction, expected) in [
            (&[0x0f, 0xa2, 0x90][..], Cpuid, 2),
            (&[0x0f, 0x32], Rdmsr, 2),
            (&[0x0f, 0x30], Wrmsr, 2),
            (&[0xf4], Hlt, 1),
            (&[0xf3, 0x90], Pause, 2),
            (&[0x0f, 0x08], Invd, 2),
            (&[0x0f, 0x09], Wbinvd, 2),
            (&[0xf3, 0x0f, 0x09], Wbinvd, 3),
            (&[0x0f, 0x01, 0xd1], Xsetbv, 3),
            (&[0x0f, 0x01, 0xd9], Vmmcall, 3),
            (&[0x0f, 0x22, 0xe0], MovToCr(4), 3),
        ] {
            assert_eq!(length(bytes, true, instruction), Some(expected), "{instruction:?}");
            assert_eq!(length(bytes, false, instruction), Some(expected), "{instruction:?}");
        }
    }

    #[test]
    fn prefixes_count() {
        assert_eq!(length(&[0x66, 0x67, 0x2e, 0x64, 0xf2, 0x0f, 0xa2], false, Cpuid), Some(7));
        assert_eq!(length(&[0x48, 0x0f, 0xa2], true, Cpuid), Some(3));
        assert_eq!(length(&[0x66, 0xf3, 0x90], true, Pause), Some(3));
        assert_eq!(length(&[0x48, 0xf3, 0x41, 0xf4], true, Hlt), Some(4), "REX before and after other prefixes");
        assert_eq!(length(&[0x48, 0x0f, 0xa2], false, Cpuid), None, "48 is DEC in 32-bit code");
    }

    #[test]
    fn the_longest_instruction_has_15_bytes() {
        let mut bytes = [0x66u8; 17];
        bytes[13..15].copy_from_slice(&[0x0f, 0xa2]);
        assert_eq!(length(&bytes, true, Cpuid), Some(15));
        bytes[13..16].copy_from_slice(&[0x66, 0x0f, 0xa2]);
        assert_eq!(length(&bytes, true, Cpuid), None);
        assert_eq!(length(&[0x66; 15], true, Cpuid), None);
    }

    #[test]
    fn what_is_not_there_is_not_found() {
        for (bytes, instruction) in [
            (&[][..], Cpuid),
            (&[0x0f], Cpuid),
            (&[0x66], Cpuid),
            (&[0x0f, 0xa2], Rdmsr),
            (&[0x90], Pause),
            (&[0xf2, 0x90], Pause),
            (&[0x0f, 0x01], Xsetbv),
            (&[0x0f, 0x01, 0xd0], Xsetbv),
            (&[0x0f, 0x22], MovToCr(4)),
            (&[0x0f, 0x22, 0xe0], MovToCr(8)),
            (&[0x0f, 0x20, 0xe0], MovToCr(4)),
        ] {
            assert_eq!(find(bytes, true, instruction), None, "{bytes:x?} {instruction:?}");
        }
    }

    #[test]
    fn stores_end_behind_operand_and_immediate() {
        for (bytes, expected) in [
            (&[0x88, 0x03][..], 2),                        // mov [rbx], al
            (&[0x66, 0x89, 0x02], 3),                      // mov [rdx], ax
            (&[0x89, 0x43, 0x10], 3),                      // mov [rbx + 0x10], eax
            (&[0x48, 0x89, 0x83, 0, 1, 0, 0], 7),          // mov [rbx + 0x100], rax
            (&[0x89, 0x05, 0, 0, 0, 0], 6),                // mov [rip], eax
            (&[0x41, 0x89, 0x04, 0x24], 4),                // mov [r12], eax
            (&[0x89, 0x04, 0x25, 0, 0, 0xa, 0], 7),        // mov [0xa0000], eax
            (&[0x41, 0x89, 0x45, 0x00], 4),                // mov [r13], eax
            (&[0x89, 0x44, 0x8b, 0x04], 4),                // mov [rbx + 4 * rcx + 4], eax
            (&[0x89, 0x84, 0x8d, 0, 0, 0, 1], 7),          // mov [rbp + 4 * rcx + 0x1000000], eax
            (&[0xc6, 0x03, 0x07], 3),                      // mov byte ptr [rbx], 7
            (&[0xc7, 0x03, 1, 0, 0, 0], 6),                // mov dword ptr [rbx], 1
            (&[0x66, 0xc7, 0x03, 1, 0], 5),                // mov word ptr [rbx], 1
            (&[0x48, 0xc7, 0x03, 1, 0, 0, 0], 7),          // mov qword ptr [rbx], 1
            (&[0x66, 0x48, 0xc7, 0x03, 1, 0, 0, 0], 8),    // the same with a prefix too many
            (&[0x48, 0x66, 0xc7, 0x03, 1, 0], 6),          // REX that does not count
            (&[0x67, 0xc7, 0x44, 0x24, 8, 1, 0, 0, 0], 9), // mov dword ptr [esp + 8], 1
            (&[0x64, 0x88, 0x03], 3),                      // mov fs:[rbx], al
        ] {
            for cut in 0..bytes.len() {
                assert_eq!(length(&bytes[..cut], true, Store), None, "{bytes:x?} up to {cut}");
            }
            assert_eq!(length(bytes, true, Store), Some(expected), "{bytes:x?}");
            assert_eq!(length(&[bytes, &[0x90; 4]].concat(), true, Store), Some(expected), "{bytes:x?} and more");
            assert_eq!(length(bytes, false, Store), None, "{bytes:x?} outside of 64-bit code");
        }
    }

    #[test]
    fn what_does_more_than_a_store_is_none() {
        for bytes in [
            &[0x89, 0xc3][..],            // mov ebx, eax
            &[0xc6, 0xf8, 0x00],          // xabort 0
            &[0xc7, 0x43, 0, 1, 0, 0],    // cut off
            &[0x8b, 0x03, 0, 0, 0, 0],    // mov eax, [rbx]
            &[0x01, 0x03, 0, 0, 0, 0],    // add [rbx], eax
            &[0x87, 0x03, 0, 0, 0, 0],    // xchg [rbx], eax
            &[0xf3, 0xab, 0, 0, 0, 0],    // rep stosd
            &[0xff, 0x33, 0, 0, 0, 0],    // push qword ptr [rbx]
            &[0x0f, 0x11, 0x03, 0, 0, 0], // movups [rbx], xmm0
        ] {
            assert_eq!(find(bytes, true, Store), None, "{bytes:x?}");
        }
    }

    #[test]
    fn moves_name_their_registers() {
        for (bytes, cr, register, length) in [
            (&[0x0f, 0x22, 0xe0][..], 4, 0, 3),
            (&[0x0f, 0x22, 0xe7], 4, 7, 3),
            (&[0x41, 0x0f, 0x22, 0xe7], 4, 15, 4),
            (&[0x44, 0x0f, 0x22, 0xc0], 8, 0, 4),
            (&[0x45, 0x0f, 0x22, 0xc3], 8, 11, 4),
            (&[0xf0, 0x0f, 0x22, 0xc1], 8, 1, 4),
            (&[0x0f, 0x22, 0x20], 4, 0, 3),
            (&[0x41, 0x66, 0x0f, 0x22, 0xe0], 4, 0, 5),
        ] {
            assert_eq!(find(bytes, true, MovToCr(cr)), Some(Found { length, register }), "{bytes:x?}");
        }
    }
}
