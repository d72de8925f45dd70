// SPDX-License-Identifier: MIT OR Apache-2.0
//! Words that an assembler made, and what becomes of guests around an access. That the results are the CPU's own is
//! for the lab: axvcpu-guests, undecoded/.

use std::collections::HashMap;

use proptest::prelude::*;

use super::*;

/// An access in a line: the address with what it changes by, then what goes where, `@` the offset.
fn line(access: &Access) -> String {
    let by = |offset: &Offset| match *offset {
        Offset::Fixed(bytes) => format!("{bytes:+}"),
        Offset::Register { reg, bits, signed, shift } => {
            format!("+r{reg}{}{bits}<<{shift}", if signed { "s" } else { "u" })
        }
    };
    let base = match access.base {
        Base::Register(reg) => format!("r{reg}"),
        Base::Pc => "pc".into(),
        Base::Block(reg, size) => format!("r{reg}&-{size}"),
    };
    let level = if access.unprivileged { " as EL0" } else { "" };
    let mut text = format!("{}{level} {base}{}", if access.store { "store" } else { "load" }, by(&access.offset));
    if let Some(writeback) = &access.writeback {
        text += &format!(" then {}", by(writeback));
    }
    for Piece { offset, size, place } in &access.pieces {
        text += &match place {
            Place::Zero => format!(" 0:{size}"),
            Place::General(reg, Extend::Zero) => format!(" x{reg}:{size}"),
            Place::General(reg, extend) => format!(" x{reg}:{size}{extend:?}"),
            Place::Vector { reg, byte, copies } => format!(" v{reg}[{byte}]:{size}*{copies}"),
        };
        text += &format!("@{offset}");
    }
    if access.clears != 0 {
        text += &format!(" clears {:#x}", access.clears);
    }
    text
}

#[test]
fn words_of_an_assembler() {
    for (word, assembly, expected) in [
        (0xa940_0c22, "ldp x2, x3, [x1]", "load r1+0 x2:8@0 x3:8@8"),
        (0x69ff_0c22, "ldpsw x2, x3, [x1, #-8]!", "load r1-8 then -8 x2:4Sign64@0 x3:4Sign64@4"),
        (0x2801_0fe2, "stnp w2, w3, [sp, #8]", "store r31+8 x2:4@0 x3:4@4"),
        (
            0xacbf_1825,
            "stp q5, q6, [x1], #-32",
            "store r1+0 then -32 v5[0]:8*1@0 v5[8]:8*1@8 v6[0]:8*1@16 v6[8]:8*1@24",
        ),
        (0xf850_0422, "ldr x2, [x1], #-256", "load r1+0 then -256 x2:8@0"),
        (0x380f_fc22, "strb w2, [x1, #255]!", "store r1+255 then +255 x2:1@0"),
        (0x78c0_2422, "ldrsh w2, [x1], #2", "load r1+0 then +2 x2:2Sign32@0"),
        (0xb89f_cc22, "ldrsw x2, [x1, #-4]!", "load r1-4 then -4 x2:4Sign64@0"),
        (0x3dff_fc25, "ldr q5, [x1, #65520]", "load r1+65520 v5[0]:8*1@0 v5[8]:8*1@8 clears 0x20"),
        (0x3c24_4825, "str b5, [x1, w4, uxtw]", "store r1+r4u32<<0 v5[0]:1*1@0"),
        (0xfc64_f825, "ldr d5, [x1, x4, sxtx #3]", "load r1+r4u64<<3 v5[0]:8*1@0 clears 0x20"),
        (0xbc64_d825, "ldr s5, [x1, w4, sxtw #2]", "load r1+r4s32<<2 v5[0]:4*1@0 clears 0x20"),
        (0x7c5f_d025, "ldur h5, [x1, #-3]", "load r1-3 v5[0]:2*1@0 clears 0x20"),
        (0x5800_0042, "ldr x2, .+8", "load pc+8 x2:8@0"),
        (0x9cff_ff82, "ldr q2, .-16", "load pc-16 v2[0]:8*1@0 v2[8]:8*1@8 clears 0x4"),
        (0x987f_ffe2, "ldrsw x2, .+1048572", "load pc+1048572 x2:4Sign64@0"),
        (0xc8df_fc22, "ldar x2, [x1]", "load r1+0 x2:8@0"),
        (0x489f_fc22, "stlrh w2, [x1]", "store r1+0 x2:2@0"),
        (0x38bf_c022, "ldaprb w2, [x1]", "load r1+0 x2:1@0"),
        (
            0x4c40_a83f,
            "ld1 {v31.4s, v0.4s}, [x1]",
            "load r1+0 v31[0]:4*1@0 v31[4]:4*1@4 v31[8]:4*1@8 v31[12]:4*1@12 v0[0]:4*1@16 v0[4]:4*1@20 v0[8]:4*1@24 \
             v0[12]:4*1@28 clears 0x80000001",
        ),
        (
            0x0c84_4825,
            "st3 {v5.2s, v6.2s, v7.2s}, [x1], x4",
            "store r1+0 then +r4u64<<0 v5[0]:4*1@0 v6[0]:4*1@4 v7[0]:4*1@8 v5[4]:4*1@12 v6[4]:4*1@16 v7[4]:4*1@20",
        ),
        (0x4d60_53e5, "ld2 {v5.h, v6.h}[6], [sp]", "load r31+0 v5[12]:2*1@0 v6[12]:2*1@2"),
        (0x4d9f_8425, "st1 {v5.d}[1], [x1], #8", "store r1+0 then +8 v5[8]:8*1@0"),
        (0x4d40_c425, "ld1r {v5.8h}, [x1]", "load r1+0 v5[0]:2*8@0 clears 0x20"),
        (
            0x0ddf_ec25,
            "ld3r {v5.1d, v6.1d, v7.1d}, [x1], #24",
            "load r1+0 then +24 v5[0]:8*1@0 v6[0]:8*1@8 v7[0]:8*1@16 clears 0xe0",
        ),
        (0x3880_5822, "ldtrsb x2, [x1, #5]", "load as EL0 r1+5 x2:1Sign64@0"),
        (0xd50b_7427, "dc zva, x7", "store r7&-16+0 0:8@0 0:8@8"),
    ] {
        let access = decode(word, Some(16)).unwrap_or_else(|why| panic!("{assembly}: {why}"));
        assert_eq!(line(&access), expected, "{assembly}");
    }
    for (word, assembly, expected) in [
        (0xc85f_7c22, "ldxr x2, [x1]", Refused::Exclusive),
        (0xc822_1023, "stxp w2, x3, x4, [x1]", Refused::Exclusive),
        (0x4822_7c24, "casp x2, x3, x4, x5, [x1]", Refused::Atomic),
        (0x88a2_7c23, "cas w2, w3, [x1]", Refused::Atomic),
        (0xf8e2_0023, "ldaddal x2, x3, [x1]", Refused::Atomic),
        (0x3822_8023, "swpb w2, w3, [x1]", Refused::Atomic),
        (0xa940_0822, "ldp x2, x2, [x1]", Refused::Unpredictable),
        (0xa881_0821, "stp x1, x2, [x1], #16", Refused::Unpredictable),
        (0xf840_8421, "ldr x1, [x1], #8", Refused::Unpredictable),
        (0xf980_0020, "prfm pldl1keep, [x1]", Refused::Unknown),
        (0xd50b_7e27, "dc civac, x7", Refused::Unknown),
        (0xd503_201f, "nop", Refused::Unknown),
    ] {
        assert_eq!(decode(word, Some(64)), Err(expected), "{assembly}");
    }
    assert_eq!(decode(0xd50b_7427, None), Err(Refused::Unknown), "DC ZVA where it is forbidden");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20_000))]

    /// Whatever is decoded stays within registers, and covers consecutive bytes once.
    #[test]
    fn pieces_are_consecutive(word in any::<u32>()) {
        // Bits 28:25 of loads and stores.
        let Ok(access) = decode(word & !(1 << 25) | 1 << 27, Some(64)) else { return Ok(()) };
        let mut end = 0;
        for Piece { offset, size, place } in access.pieces {
            prop_assert!(offset == end && matches!(size, 1 | 2 | 4 | 8));
            end += u64::from(size);
            match place {
                Place::Vector { reg, byte, copies } => {
                    prop_assert!(reg < 32 && copies > 0 && byte % size == 0 && byte + copies * size <= 16);
                    prop_assert!(copies == 1 || !access.store);
                }
                Place::General(reg, _) => prop_assert!(reg < 32),
                Place::Zero => prop_assert!(access.store),
            }
        }
        prop_assert!((1..=64).contains(&end));
    }
}

/// A vCPU's registers.
#[derive(Clone, PartialEq, Debug, Default)]
struct Cpu {
    general: General,
    system: System,
    fp: Fp,
}

macro_rules! registers {
    ($($set:ty, $field:ident;)+) => {
        $(impl Registers<$set> for Cpu {
            fn get(&self) -> hypervisor::Result<$set> {
                Ok(self.$field)
            }
            fn set(&mut self, set: &$set) -> hypervisor::Result<()> {
                self.$field = *set;
                Ok(())
            }
        })+
    };
}
registers! {
    General, general;
    System, system;
    Fp, fp;
}

/// Memory by bytes; what is not in it is a device that remembers.
#[derive(Clone, PartialEq, Debug, Default)]
struct Bytes {
    ram: HashMap<u64, u8>,
    written: Vec<(u64, Vec<u8>)>,
}

impl Memory for Bytes {
    fn ram_read(&self, at: GuestPhysAddr, data: &mut [u8]) -> bool {
        (at.as_u64()..).zip(data).all(|(at, byte)| self.ram.get(&at).map(|value| *byte = *value).is_some())
    }
    fn ram_write(&mut self, at: GuestPhysAddr, data: &[u8]) -> bool {
        (at.as_u64()..).zip(data).all(|(at, byte)| self.ram.get_mut(&at).map(|value| *value = *byte).is_some())
    }
    fn device_read(&mut self, at: GuestPhysAddr, data: &mut [u8]) {
        for (i, byte) in (0..).zip(data) {
            *byte = at.as_u64() as u8 + i;
        }
    }
    fn device_write(&mut self, at: GuestPhysAddr, data: &[u8]) {
        self.written.push((at.as_u64(), data.to_vec()));
    }
}

const CODE: u64 = 0x4000_0000;
const DEVICE: u64 = 0x900_0000;

/// A guest at EL1 with its MMU off, about to execute `word`.
fn guest(word: u32) -> (Cpu, Bytes) {
    let mut cpu = Cpu::default();
    (cpu.general.pc, cpu.general.pstate) = (CODE, 0b0101);
    let ram = (CODE..).zip(word.to_le_bytes()).collect();
    (cpu, Bytes { ram, written: Vec::new() })
}

fn run(cpu: &mut Cpu, memory: &mut Bytes, write: bool) -> Result<(), Error> {
    step(cpu, memory, Fault { addr: GuestPhysAddr::new(DEVICE), write }, Some(64))
}

#[test]
fn an_access_ends_behind_the_instruction() {
    // ldp x2, x3, [x1]
    let (mut cpu, mut memory) = guest(0xa940_0c22);
    cpu.general.x[1] = DEVICE + 0x10;
    // Branch type and single step are over.
    cpu.general.pstate |= 0b11 << 10 | 1 << 21 | 1 << 28;
    run(&mut cpu, &mut memory, false).unwrap();
    assert_eq!((cpu.general.x[2], cpu.general.x[3]), (0x1716_1514_1312_1110, 0x1f1e_1d1c_1b1a_1918));
    assert_eq!((cpu.general.pc, cpu.general.pstate), (CODE + 4, 0b0101 | 1 << 28));
}

#[test]
fn the_stack_pointer_is_that_of_the_level() {
    // stp x1, x2, [sp, #-16]!
    for (pstate, el1) in [(0b0101, true), (0b0100, false), (0b0000, false)] {
        let (mut cpu, mut memory) = guest(0xa9bf_0be1);
        cpu.general.pstate = pstate;
        (cpu.general.x[1], cpu.general.x[2]) = (0x0807_0605_0403_0201, 9);
        (cpu.system.sp_el1, cpu.general.sp_el0) = if el1 { (DEVICE + 16, 77) } else { (77, DEVICE + 16) };
        run(&mut cpu, &mut memory, true).unwrap();
        let expected = if el1 { (DEVICE, 77) } else { (77, DEVICE) };
        assert_eq!((cpu.system.sp_el1, cpu.general.sp_el0), expected, "{pstate:#b}");
        let expected = [(DEVICE, vec![1, 2, 3, 4, 5, 6, 7, 8]), (DEVICE + 8, vec![9, 0, 0, 0, 0, 0, 0, 0])];
        assert_eq!(memory.written, expected);
    }
}

#[test]
fn a_block_is_zeroed_from_its_beginning() {
    // dc zva, x7
    let (mut cpu, mut memory) = guest(0xd50b_7427);
    cpu.general.x[7] = DEVICE + 0x7f;
    run(&mut cpu, &mut memory, true).unwrap();
    let expected: Vec<_> = (0..8).map(|i| (DEVICE + 0x40 + 8 * i, vec![0; 8])).collect();
    assert_eq!(memory.written, expected);
    assert_eq!(cpu.general.x[7], DEVICE + 0x7f);
}

#[test]
fn what_is_not_carried_out_changes_nothing() {
    let unchanged = |word: u32, write: bool, change: &dyn Fn(&mut Cpu, &mut Bytes)| -> Error {
        let (mut cpu, mut memory) = guest(word);
        cpu.general.x[1] = DEVICE;
        change(&mut cpu, &mut memory);
        let before = (cpu.clone(), memory.clone());
        let error = run(&mut cpu, &mut memory, write).unwrap_err();
        assert!(before == (cpu, memory), "{error}");
        error
    };
    let (pc, stp) = (GuestVirtAddr::new(CODE), 0xa900_0c22);
    let elsewhere = Error::Elsewhere { pc, word: stp };
    assert_eq!(unchanged(stp, false, &|_, _| {}), elsewhere, "a store for a load");
    assert_eq!(unchanged(stp, true, &|cpu, _| cpu.general.x[1] += PAGE), elsewhere, "another page");
    assert_eq!(unchanged(stp, true, &|cpu, _| cpu.system.sctlr_el1 = SCTLR_EE), Error::BigEndian);
    assert_eq!(unchanged(stp, true, &|_, memory| memory.ram.clear()), Error::Fetch(pc));
    let word = 0xc85f_7c22;
    let why = Refused::Exclusive;
    assert_eq!(unchanged(word, false, &|_, _| {}), Error::Instruction { pc, word, why });
    // With tables, of which there are none.
    let error = unchanged(stp, true, &|cpu, _| cpu.system.sctlr_el1 = 1);
    assert!(matches!(error, Error::Address(paging::Fault::NoTable { .. })), "{error}");
}

#[test]
fn a_register_that_crosses_pages_goes_byte_by_byte() {
    // str q0, [x1], #16
    let (mut cpu, mut memory) = guest(0x3c81_0420);
    cpu.general.x[1] = DEVICE - 3;
    (cpu.fp.v[0], cpu.fp.v[1]) = (0x0706_0504_0302_0100, 0x0f0e_0d0c_0b0a_0908);
    memory.ram.extend((DEVICE - 0x1000..DEVICE).map(|at| (at, 0xff)));
    run(&mut cpu, &mut memory, true).unwrap();
    assert_eq!([3, 2, 1].map(|below| memory.ram[&(DEVICE - below)]), [0, 1, 2]);
    let mut expected: Vec<_> = (0..5).map(|i| (DEVICE + i, vec![3 + i as u8])).collect();
    expected.push((DEVICE + 5, (8..16).collect()));
    assert_eq!(memory.written, expected);
    assert_eq!(cpu.general.x[1], DEVICE + 13);
}

/// A guest that maps [`DEVICE`], which EL0 may access, and behind it in the virtual address space [`CODE`] by `entry`.
fn with_tables(word: u32, entry: u64) -> (Cpu, Bytes) {
    const TABLES: u64 = CODE + 0x1000;
    let (mut cpu, mut memory) = guest(word);
    cpu.general.pc = 0x6000;
    cpu.system.sctlr_el1 = 1 | 1 << 23;
    (cpu.system.ttbr0_el1, cpu.system.tcr_el1, cpu.system.vbar_el1) = (TABLES, 25 | 1 << 23, 0x8000);
    memory.ram.extend((TABLES..TABLES + 0x3000).map(|at| (at, 0)));
    let page = |at: u64| at | 1 << 10 | 3;
    for (at, value) in [
        (TABLES, (TABLES + 0x1000) | 3),
        (TABLES + 0x1000, (TABLES + 0x2000) | 3),
        (TABLES + 0x2000 + 8 * 4, page(DEVICE) | 1 << 6),
        (TABLES + 0x2000 + 8 * 5, entry),
        (TABLES + 0x2000 + 8 * 6, page(CODE) | 1 << 6),
    ] {
        assert!(memory.ram_write(GuestPhysAddr::new(at), &u64::to_le_bytes(value)));
    }
    (cpu, memory)
}

#[test]
fn what_the_cpu_has_not_looked_at_must_be_allowed() {
    const ALL: u64 = CODE | 1 << 10 | 3;
    const USER: u64 = 1 << 6;
    const READ_ONLY: u64 = 1 << 7;
    const PAN: u64 = abort::PSTATE_PAN;
    // stp x2, x3, [x1]; ldp x2, x3, [x1]; sttr x2, [x1]
    const STP: u32 = 0xa900_0c22;
    const LDP: u32 = 0xa940_0c22;
    const STTR: u32 = 0xf800_0822;
    for (word, entry, pstate, abort) in [
        (STP, ALL | USER, 0, None),
        (STP, ALL, 0, Some(0x0f)),
        (LDP, ALL, 0, Some(0x0f)),
        (STP, ALL | USER | READ_ONLY, 0, Some(0x0f)),
        (LDP, ALL | USER | READ_ONLY, 0, None),
        (LDP, ALL & !(1 << 10) | USER, 0, Some(0x0b)),
        (LDP, 0, 0, Some(0x07)),
        (STP, ALL, 0b0101, None),
        (STP, ALL | READ_ONLY, 0b0101, Some(0x0f)),
        (STP, ALL | USER, 0b0101 | PAN, Some(0x0f)),
        (STP, ALL, 0b0100 | PAN, None),
        (STTR, ALL, 0b0101, Some(0x0f)),
        (STTR, ALL, 0b0101 | PSTATE_UAO, None),
        (STTR, ALL | USER, 0b0101 | PAN, None),
    ] {
        let (mut cpu, mut memory) = with_tables(word, entry);
        cpu.general.x[1] = if word == STTR { 0x4ffc } else { 0x4ff8 };
        cpu.general.pstate = pstate | 1 << 29;
        let before = (cpu.clone(), memory.clone());
        let write = word != LDP;
        run(&mut cpu, &mut memory, write).unwrap();
        let Some(status) = abort else {
            assert_eq!(cpu.general.pc, 0x6004, "{word:#x} {entry:#x} {pstate:#x}");
            continue;
        };
        let (class, vector) = match pstate & PSTATE_MODE {
            0b0000 => (0x24, 0x400),
            0b0100 => (0x25, 0),
            _ => (0x25, 0x200),
        };
        let (mut general, mut system) = (before.0.general, before.0.system);
        (general.pc, general.pstate) = (0x8000 + vector, 0x3c5 | 1 << 29 | pstate & PAN);
        (system.elr_el1, system.spsr_el1, system.far_el1) = (0x6000, pstate | 1 << 29, 0x5000);
        system.esr_el1 = class << 26 | 1 << 25 | u64::from(write) << 6 | status;
        assert_eq!(cpu, Cpu { general, system, fp: before.0.fp }, "{word:#x} {entry:#x} {pstate:#x}");
        assert!(memory == before.1, "nothing is moved");
    }
}

#[test]
fn processor_state_after_an_abort_follows_sctlr() {
    for (sctlr, pstate, expected) in [
        (1 << 23, abort::PSTATE_PAN, abort::PSTATE_PAN),
        (1 << 23, 1 << 12, 0),
        (0, 0, abort::PSTATE_PAN),
        (1 << 23 | 1 << 44, 0, 1 << 12),
        (1 << 23, 0xf << 28 | 1 << 24 | 1 << 21 | 1 << 20 | 0b11 << 10, 0xf << 28 | 1 << 24),
    ] {
        let (mut general, mut system) = (General { pstate, ..General::default() }, System::default());
        system.sctlr_el1 = sctlr;
        abort::take(&mut general, &mut system, GuestVirtAddr::new(0), 0x0f, false);
        assert_eq!(general.pstate, 0x3c5 | expected, "{sctlr:#x} {pstate:#x}");
    }
}
