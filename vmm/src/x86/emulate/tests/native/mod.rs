// SPDX-License-Identifier: MIT OR Apache-2.0
//! The processor as oracle: random instructions run on this very CPU, on real memory, and in the emulator, on RAM and
//! RAM-like devices; registers, defined flags, vector registers and memory must come out the same.
//!
//! Instructions are built from the decoder's own table of encodings, so that each encoding the emulator claims is
//! tried with random registers, addressing forms, prefixes and values.

mod cases;
mod trampoline;

use iced_x86::{Code, Encoder, Instruction, Mnemonic, OpKind, Register, RepPrefixKind, RflagsBits};
use proptest::prelude::*;
use proptest::test_runner::{RngAlgorithm, TestRunner};

use super::*;
use crate::x86::emulate::alu::ARITHMETIC;
use cases::{build, encodings, seed, Seed};
use trampoline::{Context, Native};

/// Physical page numbers of the area in the emulator, deliberately not contiguous.
const FRAMES: [u64; 3] = [0x700, 0x500, 0x900];
/// The page-table root in the emulator.
const ROOT: u64 = 0x80_0000;

/// The emulator's machine with the same memory at the same linear address.
fn emulated(seed: &Seed, native: &Native, bytes: &[u8], context: &Context, memory: &[u8]) -> (CpuState, Machine) {
    let mut machine = Machine::new(bytes);
    machine.poke(ROOT, &[0; 4096]);
    machine.map(ROOT, CODE, CODE, 7);
    for (i, frame) in FRAMES.iter().enumerate() {
        machine.map(ROOT, native.area() + 4096 * i as u64, frame * 4096, 7);
        machine.poke(frame * 4096, &memory[4096 * i..4096 * (i + 1)]);
        if seed.devices & 1 << i != 0 {
            machine.devices.insert(*frame);
        }
    }
    machine.xmm = context.xmm;
    let mut cpu = long_mode();
    cpu.cr0 |= bits::CR0_PG | bits::CR0_WP;
    cpu.cr3 = ROOT;
    cpu.cpl = 3;
    cpu.gpr = context.gpr;
    cpu.rflags = context.flags;
    (cpu, machine)
}

/// Flags that the instruction leaves undefined for these operands.
fn undefined_flags(insn: &Instruction, cpu: &CpuState) -> u64 {
    let bits = insn.rflags_undefined();
    let pairs = [
        (RflagsBits::CF, rflags::CF),
        (RflagsBits::PF, rflags::PF),
        (RflagsBits::AF, rflags::AF),
        (RflagsBits::ZF, rflags::ZF),
        (RflagsBits::SF, rflags::SF),
        (RflagsBits::OF, rflags::OF),
    ];
    let mut undefined = pairs.iter().filter(|(bit, _)| bits & bit != 0).map(|(_, flag)| flag).sum();
    let size = insn.memory_size().size();
    let count = (0..insn.op_count()).rev().find_map(|i| match insn.op_kind(i) {
        OpKind::Register if insn.op_register(i) == Register::CL => Some(cpu.gpr[1]),
        OpKind::Immediate8 => Some(insn.immediate(i)),
        _ => None,
    });
    let count = count.map_or(1, |count| crate::x86::emulate::shift::masked_count(count, size)) as usize;
    match insn.mnemonic() {
        // OF is defined for a count of 1 only, AF never, CF not once everything has been shifted out.
        Mnemonic::Rol | Mnemonic::Ror | Mnemonic::Rcl | Mnemonic::Rcr if count > 1 => undefined |= rflags::OF,
        Mnemonic::Shl | Mnemonic::Sal | Mnemonic::Shr | Mnemonic::Sar | Mnemonic::Shld | Mnemonic::Shrd
            if count > 0 =>
        {
            undefined |= rflags::AF;
            if count > 1 {
                undefined |= rflags::OF;
            }
            if count > 8 * size {
                undefined |= rflags::CF;
            }
        }
        Mnemonic::Shl | Mnemonic::Sal | Mnemonic::Shr | Mnemonic::Sar | Mnemonic::Shld | Mnemonic::Shrd => {
            // A count of 0 leaves all flags, whatever the static tables say.
            undefined = 0;
        }
        _ => {}
    }
    undefined
}

/// Runs one case on both sides. `true` if both ran, `false` if the case was dropped.
fn compare(native: &Native, seed: &Seed, bytes: &[u8], gpr: [u64; 16], memory: &[u8]) -> bool {
    let context = Context { gpr, flags: seed.flags(), saved_rsp: 0, xmm: seed.xmm };
    let (mut cpu, mut machine) = emulated(seed, native, bytes, &context, memory);
    let insn = iced_x86::Decoder::with_ip(64, bytes, CODE, 0).decode();
    let before = cpu.clone();
    // A small limit, so that repeated instructions are interrupted and resumed.
    let config = Config { rep_limit: 7, ..Config::default() };
    let outcome = loop {
        match step(&config, &mut cpu, &mut machine, &[]).unwrap_or_else(|error| panic!("{error}")) {
            Outcome::Unfinished { .. } => assert!(insn.is_string_instruction(), "{insn} did not finish"),
            outcome => break outcome,
        }
    };
    if let Outcome::Exception(exception) = outcome {
        // The CPU would raise it, too, as a signal; that it is the right one is the other tests' business.
        let expected = match exception {
            Exception::Divide => matches!(insn.mnemonic(), Mnemonic::Div | Mnemonic::Idiv),
            Exception::GeneralProtection => insn.memory_size().size() == 16 && before.gpr != [0; 16],
            _ => false,
        };
        assert!(expected, "{insn}: {exception:?}");
        return false;
    }
    assert_eq!(outcome, RETIRED);
    assert_eq!(cpu.rip, CODE + bytes.len() as u64);

    let (after, area) = native.execute(bytes, &context, memory);
    let text = || format!("{insn} ({bytes:02x?}), flags before {:#x}", context.flags);
    assert_eq!(cpu.gpr.map(Hex), after.gpr.map(Hex), "registers after {}", text());
    let defined = (ARITHMETIC | rflags::DF) & !undefined_flags(&insn, &before);
    assert_eq!(Hex(cpu.rflags & defined), Hex(after.flags & defined), "flags after {}", text());
    assert_eq!(machine.xmm, after.xmm, "vector registers after {}", text());
    for (i, frame) in FRAMES.iter().enumerate() {
        let page = &area[4096 * i..4096 * (i + 1)];
        if machine.pages[frame] != page {
            let at = machine.pages[frame].iter().zip(page).position(|(a, b)| a != b);
            panic!("memory of page {i} differs at {at:?} after {}", text());
        }
    }
    true
}

#[derive(PartialEq, Clone, Copy)]
struct Hex(u64);

impl std::fmt::Debug for Hex {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// A runner whose generator is cheap: in unoptimized builds the default one takes longer than the cases.
fn runner(cases: u32) -> TestRunner {
    TestRunner::new(ProptestConfig {
        failure_persistence: None,
        rng_algorithm: RngAlgorithm::XorShift,
        ..ProptestConfig::with_cases(cases)
    })
}

/// Random instructions of the encodings that `wanted` selects.
fn check_class(cases: u32, wanted: impl Fn(Mnemonic) -> bool) {
    let codes = encodings(wanted);
    assert!(!codes.is_empty());
    let native = Native::new();
    let ran = std::cell::RefCell::new(HashSet::new());
    let mut runner = runner(cases);
    let result = runner.run(&seed(), |seed| {
        let code = *seed.code.get(&codes);
        let mut target = seed.target(native.area());
        if seed.picks[0] & 0x80 != 0 && seed.picks[1] & 1 == 0 {
            target &= !15;
        }
        let mut gpr = seed.gpr;
        gpr[4] = native.area() + 2 * 4096 - 40 + u64::from(seed.picks[1] % 80);
        let mut memory = seed.memory();
        let Some(bytes) = build(&seed, code, target, &mut gpr) else { return Ok(()) };
        // Often let the operand be what a comparison looks for, or zero.
        let offset = (target - native.area()) as usize;
        match seed.picks[10] % 5 {
            0 => memory[offset..offset + 8].copy_from_slice(&gpr[0].to_le_bytes()),
            1 => memory[offset..offset + 8].fill(0),
            2 => {
                let pair = (gpr[2] << 32) | (gpr[0] & 0xffff_ffff);
                memory[offset..offset + 8].copy_from_slice(&pair.to_le_bytes());
            }
            3 => {
                memory[offset..offset + 8].copy_from_slice(&gpr[0].to_le_bytes());
                memory[offset + 8..offset + 16].copy_from_slice(&gpr[2].to_le_bytes());
            }
            _ => {}
        }
        if is_undefined_result(code, &gpr, &seed, &memory[offset..]) {
            return Ok(());
        }
        if compare(&native, &seed, &bytes, gpr, &memory) {
            ran.borrow_mut().insert(code);
        }
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
    let missed: Vec<_> = codes.iter().filter(|code| !ran.borrow().contains(code)).collect();
    assert!(missed.is_empty(), "never ran: {missed:?}");
}

/// Cases in which the destination itself is undefined: BSF and BSR of 0, 16-bit double shifts by more than 16.
fn is_undefined_result(code: Code, gpr: &[u64; 16], seed: &Seed, operand: &[u8]) -> bool {
    match code {
        Code::Bsf_r16_rm16 | Code::Bsr_r16_rm16 => operand[..2] == [0; 2],
        Code::Bsf_r32_rm32 | Code::Bsr_r32_rm32 => operand[..4] == [0; 4],
        Code::Bsf_r64_rm64 | Code::Bsr_r64_rm64 => operand[..8] == [0; 8],
        Code::Shld_rm16_r16_imm8 | Code::Shrd_rm16_r16_imm8 => seed.immediate & 31 > 16,
        Code::Shld_rm16_r16_CL | Code::Shrd_rm16_r16_CL => gpr[1] & 31 > 16,
        _ => false,
    }
}

fn spelled(mnemonic: Mnemonic, names: &[&str]) -> bool {
    let name = format!("{mnemonic:?}").to_lowercase();
    names.contains(&name.as_str())
}

#[test]
fn arithmetic_agrees_with_the_processor() {
    let names = [
        "add", "adc", "sub", "sbb", "and", "or", "xor", "cmp", "test", "not", "neg", "inc", "dec", "imul", "mul",
        "div", "idiv",
    ];
    check_class(12_000, |m| spelled(m, &names));
}

#[test]
fn shifts_agree_with_the_processor() {
    let names = ["rol", "ror", "rcl", "rcr", "shl", "sal", "shr", "sar", "shld", "shrd"];
    check_class(8_000, |m| spelled(m, &names));
}

#[test]
fn bit_operations_agree_with_the_processor() {
    let mut names = vec!["bt", "bts", "btr", "btc", "bsf", "bsr"];
    if is_x86_feature_detected!("bmi1") {
        names.push("tzcnt");
    }
    if is_x86_feature_detected!("lzcnt") {
        names.push("lzcnt");
    }
    if is_x86_feature_detected!("popcnt") {
        names.push("popcnt");
    }
    check_class(8_000, |m| spelled(m, &names));
}

#[test]
fn moves_agree_with_the_processor() {
    let mut names =
        vec!["mov", "movzx", "movsx", "movsxd", "movnti", "xchg", "xadd", "cmpxchg", "cmpxchg8b", "push", "pop"];
    if is_x86_feature_detected!("movbe") {
        names.push("movbe");
    }
    if is_x86_feature_detected!("cmpxchg16b") {
        names.push("cmpxchg16b");
    }
    check_class(8_000, |m| spelled(m, &names));
}

#[test]
fn conditional_moves_and_sets_agree_with_the_processor() {
    check_class(8_000, |m| {
        let name = format!("{m:?}");
        name.starts_with("Cmov") || (name.starts_with("Set") && name.len() <= 5)
    });
}

#[test]
fn vector_moves_agree_with_the_processor() {
    let mut names = vec![
        "movaps", "movapd", "movdqa", "movups", "movupd", "movdqu", "movntps", "movntpd", "movntdq", "movd", "movq",
        "movss", "movsd", "movlps", "movlpd", "movhps", "movhpd",
    ];
    if is_x86_feature_detected!("sse3") {
        names.push("lddqu");
    }
    if is_x86_feature_detected!("sse4.1") {
        names.push("movntdqa");
    }
    check_class(4_000, |m| spelled(m, &names));
}

#[test]
fn string_instructions_agree_with_the_processor() {
    type Make = fn(u32, RepPrefixKind) -> Instruction;
    macro_rules! two_sided {
        ($($make:ident),*) => { [$((|size, rep| Instruction::$make(size, Register::None, rep).unwrap()) as Make),*] };
    }
    macro_rules! one_sided {
        ($($make:ident),*) => { [$((|size, rep| Instruction::$make(size, rep).unwrap()) as Make),*] };
    }
    let mut makes = Vec::new();
    makes.extend(two_sided!(with_movsb, with_movsw, with_movsd, with_movsq));
    makes.extend(two_sided!(with_cmpsb, with_cmpsw, with_cmpsd, with_cmpsq));
    makes.extend(two_sided!(with_lodsb, with_lodsw, with_lodsd, with_lodsq));
    makes.extend(one_sided!(with_stosb, with_stosw, with_stosd, with_stosq));
    makes.extend(one_sided!(with_scasb, with_scasw, with_scasd, with_scasq));
    let native = Native::new();
    let area = native.area();
    let mut runner = runner(6_000);
    let result = runner.run(&seed(), |seed| {
        let picks = &seed.picks;
        let address_size = if picks[2] % 4 == 0 { 32 } else { 64 };
        let rep = [RepPrefixKind::None, RepPrefixKind::Repe, RepPrefixKind::Repne][usize::from(picks[3] % 3)];
        let insn = seed.code.get(&makes)(address_size, rep);
        let mut encoder = Encoder::new(64);
        encoder.encode(&insn, 0).expect("string instructions encode");
        let bytes = encoder.take_buffer();
        let mut gpr = seed.gpr;
        let high = |value: u64| if address_size == 32 { value & !0xffff_ffff } else { 0 };
        // With a 32-bit count of 0 the processors' treatment of the upper halves differs: at least 1 then.
        let count = u64::from(picks[4] % 24).max(u64::from(address_size == 32));
        gpr[1] = high(gpr[1]) | count;
        gpr[6] = high(gpr[6]) | seed.target(area);
        let distance = u64::from(picks[5] % 64);
        gpr[7] = high(gpr[7]) | (area + 4096 - 32 + distance);
        gpr[4] = area + 64;
        let mut memory = seed.memory();
        if picks[6] % 2 == 0 {
            // Runs of equal bytes, so that comparisons go on for a while.
            let byte = picks[7];
            memory[2048..8192 + 2048].fill(byte);
            memory[4096 + usize::from(picks[8])] = !byte;
            gpr[0] = u64::from_le_bytes([byte; 8]);
        }
        assert!(compare(&native, &seed, &bytes, gpr, &memory));
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
}
