// SPDX-License-Identifier: MIT OR Apache-2.0
//! Accesses to devices that the hardware does not decode, and axvmm's emulator does: each instruction runs twice, once in
//! memory and once in what is no memory, where a device holds the same bytes. All registers and bytes must end the same: so the
//! CPU itself says what is right.

use crate::harness::{Case, CaseResult, Stop};
use crate::machine::{Machine, CODE, DATA, HOLE, RAM, STACK, TABLES, VECTORS};
use crate::random::{self, Random};
use crate::{code, ensure, ensure_eq, table};
use axvcpu_uapi::addr::GuestPhysAddr;
use axvcpu_uapi::arm64::{Fp, General, System, PSTATE_DAIF, PSTATE_EL0, PSTATE_EL1H};
use axvcpu_uapi::client;
use axvcpu_uapi::exit::{AccessFlags, AxVCpuExitReason as Exit};
use axvmm::arm64::emulate::{self, decode, Access, Base, Error, Fault, Memory, Offset, Place, Refused};
use axvmm::arm64::vcpu::zero_block;
use std::sync::Arc;

mod rights;

/// The cases.
pub(super) fn cases() -> Vec<Case> {
    table! {
        "undecoded/every-form" => forms;
        "undecoded/random-instructions" => random_instructions, in 60;
        "undecoded/half-in-memory" => half_in_memory;
        "undecoded/half-not-allowed" => rights::half_not_allowed;
        "undecoded/literal" => literal;
        "undecoded/every-granule-and-tagged-at-el0" => granules;
        "undecoded/what-needs-memory-is-refused" => refused;
    }
}

/// Bytes that an instruction may reach: 64 KiB by an offset, and some on both sides.
const SPAN: usize = 0x1_2000;
/// Where in them addresses begin.
const MIDDLE: u64 = 0x1000;
/// Where they are in memory.
const BYTES: u64 = RAM + 0x20_0000;
/// Where code is put, two words for each instruction.
const PLACES: u64 = RAM + 0x4_0000;
/// TCR_EL1: 39-bit addresses (T0SZ 25), 4 KiB granule, write-back walks, inner shareable, no TTBR1 (EPD1), 40-bit output.
const TCR: u64 = 25 | 1 << 8 | 1 << 10 | 3 << 12 | 1 << 23 | 2 << 32;
/// SCTLR_EL1: MMU and caches on, alignment not checked, cache maintenance at EL0, and what is always one.
const SCTLR: u64 = 0x30d0_0800 | 1 << 28 | 1 << 26 | 1 << 14 | 1 << 12 | 1 << 2 | 1;
/// HVC #0.
const HVC: u32 = 0xd400_0002;

/// The RAM, and a device at [`HOLE`] that is [`SPAN`] plain bytes.
struct Board {
    ram: Arc<client::Memory>,
    bytes: Vec<u8>,
}

impl Board {
    fn device(&mut self, at: GuestPhysAddr, size: usize) -> Option<&mut [u8]> {
        let offset = usize::try_from(at.as_u64().checked_sub(HOLE)?).ok()?;
        self.bytes.get_mut(offset..offset.checked_add(size)?)
    }
}

fn in_ram(at: GuestPhysAddr) -> Option<usize> {
    usize::try_from(at.as_u64().checked_sub(RAM)?).ok()
}

impl Memory for Board {
    fn ram_read(&self, at: GuestPhysAddr, data: &mut [u8]) -> bool {
        in_ram(at).is_some_and(|offset| self.ram.read(offset, data).is_ok())
    }
    fn ram_write(&mut self, at: GuestPhysAddr, data: &[u8]) -> bool {
        in_ram(at).is_some_and(|offset| self.ram.write(offset, data).is_ok())
    }
    fn device_read(&mut self, at: GuestPhysAddr, data: &mut [u8]) {
        match self.device(at, data.len()) {
            Some(bytes) => data.copy_from_slice(bytes),
            None => data.fill(0xff),
        }
    }
    fn device_write(&mut self, at: GuestPhysAddr, data: &[u8]) {
        if let Some(bytes) = self.device(at, data.len()) {
            bytes.copy_from_slice(data);
        }
    }
}

/// A machine whose MMU is on, with everything at its own address and normal memory to stage 1, and the board.
struct Bench {
    m: Machine,
    board: Board,
    /// Accesses that the emulator has carried out.
    emulated: u64,
}

impl Bench {
    fn new() -> Result<Self, Stop> {
        let mut m = Machine::new(&HVC.to_le_bytes())?;
        // At level 1 the device, which EL0 may access (AP 0b01), and at level 2 the code, which it may not, and the data.
        m.write_u64(TABLES, 0x741)?;
        m.write_u64(TABLES + 8, (TABLES + 0x1000) | 3)?;
        m.write_u64(TABLES + 0x1000, RAM | 0x701)?;
        m.write_u64(TABLES + 0x1008, BYTES | 0x741)?;
        let mut system: System = m.vcpu.get()?;
        (system.ttbr0_el1, system.tcr_el1, system.mair_el1, system.sctlr_el1) = (TABLES, TCR, 0xff, SCTLR);
        m.vcpu.set(&system)?;
        let board = Board { ram: Arc::clone(&m.ram), bytes: vec![0; SPAN] };
        Ok(Self { m, board, emulated: 0 })
    }

    /// Runs to a hypercall, carrying out accesses to the device. Whether it came where it should, and not by an exception.
    fn run(&mut self, end: u64) -> Result<bool, Stop> {
        loop {
            match self.m.run()?.reason {
                Exit::Hypercall { .. } => return Ok(self.m.vcpu.general().pc == end),
                Exit::NestedPageFault { addr, access_flags } => {
                    let fault = Fault { addr, write: access_flags.contains(AccessFlags::WRITE) };
                    emulate::step(&mut self.m.vcpu, &mut self.board, fault, zero_block())
                        .map_err(|error| Stop::Fail(error.to_string()))?;
                    self.emulated += 1;
                }
                Exit::MmioRead { addr, width, .. } => {
                    let mut data = [0; 8];
                    self.board.device_read(addr, &mut data[..width.size()]);
                    self.m.vcpu.reply(u64::from_le_bytes(data));
                }
                Exit::MmioWrite { addr, width, data } => {
                    self.board.device_write(addr, &data.to_le_bytes()[..width.size()]);
                }
                other => return Err(Stop::Fail(format!("exit {other:x?}"))),
            }
        }
    }

    /// Puts instructions into memory, each with a hypercall behind, before any of them runs.
    fn place(&self, words: &[u32]) -> CaseResult {
        for (at, word) in (PLACES..).step_by(8).zip(words) {
            self.m.write_u64(at, u64::from(HVC) << 32 | u64::from(*word))?;
        }
        Ok(())
    }

    /// Starts the instruction at `pc` with these registers.
    fn start(&mut self, pc: u64, general: &General, fp: &Fp, stack: u64) -> CaseResult {
        // What the hypercall before returns in X0.
        self.m.vcpu.reply(general.x[0]);
        self.m.vcpu.set(&General { pc, pstate: PSTATE_EL1H | PSTATE_DAIF, ..*general })?;
        self.m.vcpu.set(fp)?;
        let mut system: System = self.m.vcpu.get()?;
        system.sp_el1 = stack;
        Ok(self.m.vcpu.set(&system)?)
    }

    /// Runs the instruction at `pc`, which is `access`, in memory and at the device. Says whether the CPU has it.
    fn compare(&mut self, pc: u64, access: &Access, random: &mut Random) -> Result<bool, Stop> {
        let mut general = General::default();
        general.x.fill_with(|| random.word());
        let mut fp = Fp::default();
        fp.v.fill_with(|| random.word());
        let bytes: Vec<u8> = (0..SPAN).map(|_| random.word() as u8).collect();
        if let Offset::Register { reg, bits, signed, .. } = access.offset {
            let near = random.below(0x80) as u64;
            let near = if bits == 64 || signed { near.wrapping_sub(0x40) } else { near };
            // What is above the low bits does not count.
            let value = if bits == 32 { near & 0xffff_ffff | random.word() << 32 } else { near };
            if let Some(x) = general.x.get_mut(usize::from(reg)) {
                *x = value;
            }
        }
        // Those that order accesses must be aligned; the stack pointer, too.
        let plain = access.offset != Offset::Fixed(0) || access.writeback.is_some() || access.pieces.len() > 1;
        let (reg, skew) = match access.base {
            Base::Register(31) => (31, 0),
            Base::Register(reg) => (reg, if plain { random.below(16) as u64 } else { 0 }),
            Base::Block(reg, size) => (reg, random.below(size as usize) as u64),
            Base::Pc => return Err(Stop::Fail("an address in the code".into())),
        };
        let mut ends = Vec::new();
        for start in [BYTES, HOLE] {
            let base = start + MIDDLE + skew;
            let mut general = general;
            if let Some(x) = general.x.get_mut(usize::from(reg)) {
                *x = base;
            }
            self.board.bytes.copy_from_slice(&bytes);
            self.m.write(BYTES, &bytes)?;
            self.start(pc, &general, &fp, if reg == 31 { base } else { STACK })?;
            if !self.run(pc + 8)? {
                return Ok(false);
            }
            let (mut general, system, fp) = (self.m.vcpu.general(), self.m.registers()?, self.m.vcpu.get::<Fp>()?);
            let mut stack = system.sp_el1;
            // What is left in the base register may be an address.
            let changed = if reg == 31 { Some(&mut stack) } else { general.x.get_mut(usize::from(reg)) };
            if let (Some(register), true) = (changed, access.writeback.is_some() || !loads(access, reg)) {
                *register = register.wrapping_sub(start);
            }
            let mut now = vec![0; SPAN];
            match start {
                BYTES => self.m.ram.read((BYTES - RAM) as usize, &mut now)?,
                _ => now.copy_from_slice(&self.board.bytes),
            }
            ends.push((general.x, stack, general.pstate, fp, now));
        }
        let [(x, stack, pstate, v, memory), (x2, stack2, pstate2, v2, memory2)] = &ends[..] else { return Ok(false) };
        ensure_eq!(x2, x, "general registers");
        ensure_eq!((stack2, pstate2), (stack, pstate), "stack pointer, PSTATE");
        ensure_eq!(v2, v, "vector registers");
        let differs = memory.iter().zip(memory2).position(|(a, b)| a != b);
        ensure!(differs.is_none(), "the byte at offset {differs:x?} differs, of {MIDDLE:#x} + {skew:#x}");
        Ok(true)
    }
}

/// Whether a general register is loaded; 31 is none there.
fn loads(access: &Access, number: u8) -> bool {
    let is = |place| matches!(place, Place::General(reg, _) if reg == number);
    number != 31 && !access.store && access.pieces.iter().any(|piece| is(piece.place))
}

/// Whether the same instruction means the same at another address: the address is not stored, nor added to itself.
fn relocates(access: &Access) -> bool {
    let Base::Register(base) = access.base else { return false };
    let stored =
        access.store && access.pieces.iter().any(|piece| matches!(piece.place, Place::General(reg, _) if reg == base));
    let added = |offset| matches!(offset, Offset::Register { reg, .. } if reg == base);
    base == 31 || !stored && !added(access.offset) && !access.writeback.is_some_and(added)
}

fn words(code: &[u8]) -> Vec<u32> {
    code.chunks_exact(4).map(|word| word.iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte))).collect()
}

fn forms() -> CaseResult {
    let words = words(code!(
        forms,
        // Pairs.
        "ldp x2, x3, [x1]",
        "ldp w2, w3, [x1, #8]",
        "ldpsw x2, x3, [x1, #-8]",
        "ldp x2, xzr, [x1], #504",
        "ldp x2, x3, [x1, #-512]!",
        "ldnp x2, x3, [x1, #16]",
        "stp x2, x3, [x1, #16]!",
        "stp w2, wzr, [x1], #-16",
        "stnp w2, w3, [x1]",
        // Addresses that change.
        "ldr x2, [x1], #8",
        "ldr w2, [x1, #-4]!",
        "ldrb w2, [x1], #1",
        "ldrsb w2, [x1, #1]!",
        "ldrsh x2, [x1, #2]!",
        "ldrsw x2, [x1], #-256",
        "str x2, [x1, #-8]!",
        "strh wzr, [x1], #255",
        "strb w2, [x1], #1",
        // Vector registers.
        "ldr b5, [x1]",
        "ldr h5, [x1, #2]",
        "ldr s5, [x1, x4]",
        "ldr d5, [x1, w4, sxtw #3]",
        "ldr q5, [x1, #16]",
        "ldr q5, [x1, w4, uxtw #4]",
        "str q5, [x1, #-16]!",
        "str b5, [x1], #1",
        "ldur q5, [x1, #-3]",
        "stur d5, [x1, #7]",
        "ldp q5, q6, [x1, #32]",
        "stp q5, q6, [x1], #32",
        "ldp s5, s6, [x1]",
        "ldnp d5, d6, [x1, #-8]",
        // Structures.
        "ld1 {{v5.16b}}, [x1]",
        "ld1 {{v5.8b, v6.8b, v7.8b, v8.8b}}, [x1], #32",
        "ld1 {{v31.1d, v0.1d, v1.1d}}, [x1]",
        "ld2 {{v5.4s, v6.4s}}, [x1]",
        "ld3 {{v30.8h, v31.8h, v0.8h}}, [x1], x4",
        "ld4 {{v5.2d, v6.2d, v7.2d, v8.2d}}, [x1], #64",
        "st1 {{v5.4h, v6.4h}}, [x1]",
        "st2 {{v5.8b, v6.8b}}, [x1], #16",
        "st3 {{v5.2s, v6.2s, v7.2s}}, [x1]",
        "st4 {{v5.16b, v6.16b, v7.16b, v8.16b}}, [x1], x4",
        "ld1 {{v5.b}}[7], [x1]",
        "ld2 {{v5.h, v6.h}}[3], [x1], #4",
        "ld3 {{v5.s, v6.s, v7.s}}[1], [x1]",
        "ld4 {{v5.d, v6.d, v7.d, v8.d}}[1], [x1], x4",
        "st1 {{v5.d}}[1], [x1], #8",
        "st2 {{v5.b, v6.b}}[15], [x1]",
        "ld1r {{v5.8h}}, [x1]",
        "ld1r {{v5.1d}}, [x1], #8",
        "ld2r {{v5.2s, v6.2s}}, [x1]",
        "ld4r {{v5.16b, v6.16b, v7.16b, v8.16b}}, [x1], #4",
        // A block.
        "dc zva, x1"
    ));
    let mut bench = Bench::new()?;
    let mut random = Random::new(random::seed()?);
    bench.place(&words)?;
    for (pc, word) in (PLACES..).step_by(8).zip(&words) {
        let access = decode(*word, zero_block()).map_err(|why| Stop::Fail(format!("{word:#010x}: {why}")))?;
        let before = bench.emulated;
        let known =
            bench.compare(pc, &access, &mut random).map_err(|stop| stop.context(format_args!("{word:#010x}")))?;
        ensure!(known, "{word:#010x}: an exception");
        ensure_eq!(bench.emulated, before + 1, "{word:#010x}: emulated accesses");
    }
    Ok(())
}

/// Whether not every CPU has the instruction: LDAPUR and STLUR.
fn optional(word: u32) -> bool {
    word & 0x3f20_0c00 == 0x1900_0000
}

/// Whether an instruction is of an extension that guests are not told of, but that the CPU executes as if it were off: memory
/// tagging (STGP, STG and its kin) and pointer authentication (LDRAA and LDRAB).
fn hidden(word: u32) -> bool {
    word & 0xfc40_0000 == 0x6800_0000 || word & 0xff20_0000 == 0xd920_0000 || word & 0xff20_0400 == 0xf820_0400
}

fn random_instructions() -> CaseResult {
    const TURNS: usize = 1500;
    let mut bench = Bench::new()?;
    let mut random = Random::new(random::seed()?);
    // Loads and stores, by bits 28:25 (Arm ARM C4.1).
    let words: Vec<u32> = (0..TURNS).map(|_| random.word() as u32 & !(1 << 25) | 1 << 27).collect();
    bench.place(&words)?;
    let (mut compared, mut missing) = (0, Vec::new());
    for (pc, word) in (PLACES..).step_by(8).zip(&words) {
        match decode(*word, zero_block()) {
            Ok(access) if relocates(&access) => {
                let known = bench
                    .compare(pc, &access, &mut random)
                    .map_err(|stop| stop.context(format_args!("{word:#010x}")))?;
                ensure!(known || optional(*word), "{word:#010x}: the CPU does not know what is decoded");
                compared += usize::from(known);
            }
            // What the CPU takes for an access is known to the decoder.
            Err(Refused::Unknown) if !hidden(*word) => {
                let mut general = General::default();
                general.x.fill(HOLE + MIDDLE);
                bench.start(pc, &general, &Fp::default(), HOLE + MIDDLE)?;
                if let Exit::NestedPageFault { .. } = bench.m.run()?.reason {
                    missing.push(format!("{word:#010x}"));
                }
            }
            Ok(_) | Err(_) => {}
        }
    }
    println!("# {compared} of {TURNS} random instructions compared, {} of them emulated", bench.emulated);
    ensure!(missing.is_empty(), "accesses that are not decoded: {missing:?}");
    ensure!(compared > TURNS / 10, "only {compared} instructions were compared");
    Ok(())
}

/// A pair of which one register comes from a device and the other from memory, and one in the middle of a register.
fn half_in_memory() -> CaseResult {
    let code = code!(
        half_in_memory,
        "movz x1, #0x4000, lsl #16",
        "ldp x2, x3, [x1, #-8]",
        "stp x4, x5, [x1, #-8]",
        "sub x6, x1, #3",
        "str q0, [x6], #16",
        "hvc #0"
    );
    let mut bench = Bench::new()?;
    bench.m.write(CODE, code)?;
    bench.m.write_u64(RAM, 0x1111)?;
    bench.m.modify(|general| (general.x[4], general.x[5]) = (4, 5))?;
    let mut fp: Fp = bench.m.vcpu.get()?;
    (fp.v[0], fp.v[1]) = (0x0807_0605_0403_0201, 0x100f_0e0d_0c0b_0a09);
    bench.m.vcpu.set(&fp)?;
    ensure!(bench.run(CODE + code.len() as u64)?, "an exception");
    let general = bench.m.vcpu.general();
    // Below the RAM no device answers.
    ensure_eq!((general.x[2], general.x[3]), (u64::MAX, 0x1111), "the pair");
    ensure_eq!(bench.m.read_u64(RAM)?, 0x0b0a_0908_0706_0504, "what is stored in memory");
    ensure_eq!(general.x[6], RAM + 13, "the base register");
    ensure_eq!(bench.emulated, 3, "emulated accesses");
    Ok(())
}

/// A load from an address that is relative to the instruction's: below the RAM.
fn literal() -> CaseResult {
    let code = code!(literal, "ldr q0, . - 0x2000", "ldr d1, . - 0x2000", "hvc #0");
    let mut bench = Bench::new()?;
    bench.m.write(CODE, code)?;
    ensure!(bench.run(CODE + code.len() as u64)?, "an exception");
    let fp: Fp = bench.m.vcpu.get()?;
    ensure_eq!(&fp.v[..4], [u64::MAX, u64::MAX, u64::MAX, 0], "what is where nothing is");
    ensure_eq!(bench.emulated, 2, "emulated accesses");
    Ok(())
}

/// The guest's tables lead to the instruction and to the device, at EL0, with each granule that the CPU has, and a tag in the
/// address.
fn granules() -> CaseResult {
    let code = code!(granules, "ldp x2, x3, [x1], #16", "svc #0");
    let mut machine = Machine::new(code!(granules_of_the_cpu, "mrs x0, id_aa64mmfr0_el1", "hvc #0"))?;
    let features = machine.expect_call()?[0];
    let (has_16k, has_64k) = (features >> 20 & 15 != 0, features >> 24 & 15 != 15);
    // Bits of an offset in a page; TG0; bits of a virtual address.
    for (granule, tg0, input, has) in [
        (12, 0b00, 39, true),
        (12, 0b00, 48, true),
        (14, 0b10, 36, has_16k),
        (14, 0b10, 47, has_16k),
        (16, 0b01, 42, has_64k),
        (16, 0b01, 48, has_64k),
    ] {
        if !has {
            println!("# no granule of {} KiB", 1 << (granule - 10));
            continue;
        }
        let mut bench = Bench::new()?;
        bench.m.write(STACK, code)?;
        // The table of each level, the last one first, of which index 0 leads to the one before.
        let table = |level: u64| DATA + 0x1_0000 * level;
        let levels = u64::div_ceil(input - granule, granule - 3);
        for level in 1..levels {
            bench.m.write_u64(table(level), table(level - 1) | 3)?;
        }
        // Pages 3 and 5 are for EL0, 7 for EL1.
        let page = |address: u64| address & !((1 << granule) - 1) | 0x703;
        bench.m.write_u64(table(0) + 3 * 8, page(STACK) | 1 << 6)?;
        bench.m.write_u64(table(0) + 5 * 8, page(HOLE) | 1 << 6)?;
        bench.m.write_u64(table(0) + 7 * 8, page(VECTORS))?;
        let vectors = 7 << granule | VECTORS & ((1 << granule) - 1);
        let mut system: System = bench.m.vcpu.get()?;
        system.ttbr0_el1 = table(levels - 1);
        // And a tag in the highest byte (TBI0).
        system.tcr_el1 = TCR & !0x3f | (64 - input) | tg0 << 14 | 1 << 37;
        system.vbar_el1 = vectors;
        bench.m.vcpu.set(&system)?;
        let mut general = General { pc: 3 << granule, pstate: PSTATE_EL0 | PSTATE_DAIF, ..General::default() };
        general.x[1] = 0x5a << 56 | 5 << granule | 0x20;
        bench.m.vcpu.set(&general)?;
        for (i, byte) in (0..).zip(&mut bench.board.bytes) {
            *byte = i;
        }
        ensure!(bench.run(vectors + 0x404)?, "{granule} {input}: not at the vector for SVC");
        let x = bench.m.vcpu.general().x;
        ensure_eq!((x[2], x[3]), (0x2726_2524_2322_2120, 0x2f2e_2d2c_2b2a_2928), "{granule} {input}: the pair");
        ensure_eq!((x[1], bench.emulated), (0x5a << 56 | 5 << granule | 0x30, 1), "{granule} {input}: X1, accesses");
    }
    Ok(())
}

fn refused() -> CaseResult {
    let cases = [
        (words(code!(exclusive, "ldxr x2, [x1]", "stxr w3, x2, [x1]", "ldaxp x2, x3, [x1]")), Refused::Exclusive),
        (
            words(code!(atomic, ".arch_extension lse", "ldadd x2, x3, [x1]", "swpb w2, w3, [x1]", "cas x2, x3, [x1]")),
            Refused::Atomic,
        ),
    ];
    for (words, expected) in cases {
        let mut bench = Bench::new()?;
        bench.place(&words)?;
        for (at, word) in (PLACES..).step_by(8).zip(&words) {
            let mut general = General::default();
            general.x[1] = HOLE;
            bench.start(at, &general, &Fp::default(), STACK)?;
            let Exit::NestedPageFault { addr, access_flags } = bench.m.run()?.reason else { continue };
            let fault = Fault { addr, write: access_flags.contains(AccessFlags::WRITE) };
            let result = emulate::step(&mut bench.m.vcpu, &mut bench.board, fault, zero_block());
            ensure!(
                matches!(result, Err(Error::Instruction { pc, word: found, why }) if (pc.as_u64(), found, why) == (at, *word, expected)),
                "{word:#010x}: {result:?}"
            );
            ensure_eq!(bench.m.vcpu.general().pc, at, "the PC");
        }
    }
    Ok(())
}
