// SPDX-License-Identifier: MIT OR Apache-2.0
//! Repeated string instructions as a VMM meets them: bounded, interrupted by faults, single-stepped, in narrow modes.

use super::*;

fn limited(rep_limit: u32) -> Config {
    Config { rep_limit, ..Config::default() }
}

#[test]
fn the_bound_leaves_rip_at_the_instruction_and_the_registers_advanced() {
    let mut machine = Machine::new(&[0xf3, 0x48, 0xab]); // rep stosq
    let mut cpu = long_mode();
    (cpu.gpr[0], cpu.gpr[1], cpu.gpr[7]) = (0x0102_0304_0506_0708, 5, DEVICE);
    let outcome = step(&limited(3), &mut cpu, &mut machine, &[]).unwrap();
    assert_eq!(outcome, Outcome::Unfinished { debug_trap: false });
    assert_eq!((cpu.rip, cpu.gpr[1], cpu.gpr[7], machine.events.len()), (CODE, 2, DEVICE + 24, 3));
    assert_eq!(step(&limited(3), &mut cpu, &mut machine, &[]).unwrap(), RETIRED);
    assert_eq!((cpu.rip, cpu.gpr[1], cpu.gpr[7], machine.events.len()), (CODE + 3, 0, DEVICE + 40, 5));
    // A bound of 0 would never get anywhere; it means 1.
    (cpu.rip, cpu.gpr[1]) = (CODE, 2);
    step(&limited(0), &mut cpu, &mut machine, &[]).unwrap();
    assert_eq!(cpu.gpr[1], 1);
}

#[test]
fn a_count_of_zero_touches_nothing() {
    let mut cpu = long_mode();
    (cpu.gpr[6], cpu.gpr[7]) = (1 << 63, 1 << 63);
    for code in [&[0xf3, 0xa4][..], &[0xf3, 0xaa], &[0xf3, 0xac], &[0xf3, 0xa6], &[0xf2, 0xae]] {
        let before = cpu.clone();
        assert!(retire(&mut cpu, code).events.is_empty());
        assert_eq!(cpu, CpuState { rip: CODE + 2, ..before });
    }
}

#[test]
fn a_fault_in_the_middle_keeps_the_iterations_before_it() {
    // Writing upwards through a 32-bit segment with a limit.
    let mut cpu = protected_mode();
    cpu.segments[seg::ES] = Segment { limit: 7, base: DEVICE, ..flat(DATA | seg::BIG) };
    (cpu.gpr[1], cpu.gpr[7]) = (4, 0);
    let mut machine = Machine::new(&[0xf3, 0xab]); // rep stosd
    let outcome = run(&mut cpu, &mut machine).unwrap();
    assert_eq!(outcome, Outcome::Exception(Exception::GeneralProtection));
    assert_eq!((cpu.rip, cpu.gpr[1], cpu.gpr[7], machine.events.len()), (CODE, 2, 8, 2));
}

#[test]
fn single_stepping_stops_after_each_iteration() {
    let mut cpu = long_mode();
    cpu.rflags |= rflags::TF;
    (cpu.gpr[1], cpu.gpr[7]) = (2, DEVICE);
    let mut machine = Machine::new(&[0xf3, 0xaa]); // rep stosb
    assert_eq!(run(&mut cpu, &mut machine).unwrap(), Outcome::Unfinished { debug_trap: true });
    let last = Outcome::Retired { debug_trap: true, interrupt_shadow: false };
    assert_eq!(run(&mut cpu, &mut machine).unwrap(), last);
    assert_eq!((cpu.gpr[1], machine.events.len()), (0, 2));
}

#[test]
fn moves_between_device_and_ram_keep_element_width_and_order() {
    let mut machine = Machine::new(&[0xf3, 0xa5]); // rep movsd
    machine.poke(RAM, &[1, 2, 3, 4, 5, 6, 7, 8]);
    let mut cpu = long_mode();
    cpu.rflags |= rflags::DF;
    (cpu.gpr[1], cpu.gpr[6], cpu.gpr[7]) = (2, RAM + 4, DEVICE + 4);
    assert_eq!(run(&mut cpu, &mut machine).unwrap(), RETIRED);
    assert_eq!(machine.events, [Event::Write(DEVICE + 4, vec![5, 6, 7, 8]), Event::Write(DEVICE, vec![1, 2, 3, 4])]);
    assert_eq!((cpu.gpr[6], cpu.gpr[7]), (RAM - 4, DEVICE - 4));
}

#[test]
fn the_source_segment_can_be_overridden_the_destination_cannot() {
    let mut cpu = protected_mode();
    cpu.segments[seg::FS].base = DEVICE;
    cpu.segments[seg::ES].base = RAM;
    (cpu.gpr[6], cpu.gpr[7]) = (0x10, 0x20);
    let mut machine = Machine::new(&[]);
    machine.poke(DEVICE + 0x10, &[0x5a]);
    retire_on(&mut cpu, &mut machine, &[0x64, 0xa4]); // fs movsb
    assert_eq!(machine.events, [Event::Read(DEVICE + 0x10, 1)]);
    assert_eq!(machine.peek(RAM + 0x20, 1), [0x5a]);
}

#[test]
fn sixteen_bit_pointers_and_counts_wrap_and_keep_the_upper_half() {
    let mut cpu = real_mode();
    cpu.segments[seg::ES].base = 0x4_0000;
    (cpu.gpr[0], cpu.gpr[1], cpu.gpr[7]) = (0x77, 0xaaaa_0002, 0xbbbb_ffff);
    let machine = retire(&mut cpu, &[0xf3, 0xaa]);
    assert_eq!((cpu.gpr[1], cpu.gpr[7]), (0xaaaa_0000, 0xbbbb_0001));
    assert_eq!((machine.peek(0x4_ffff, 1), machine.peek(0x4_0000, 1)), (vec![0x77], vec![0x77]));
}

#[test]
fn comparisons_stop_at_the_first_difference_or_match() {
    let mut machine = Machine::new(&[]);
    machine.poke(DEVICE, b"needle in");
    let mut cpu = long_mode();
    (cpu.gpr[0], cpu.gpr[1], cpu.gpr[7]) = (b' '.into(), 9, DEVICE);
    retire_on(&mut cpu, &mut machine, &[0xf2, 0xae]); // repne scasb
    assert_eq!((cpu.gpr[1], cpu.gpr[7]), (2, DEVICE + 7));
    assert_ne!(cpu.rflags & rflags::ZF, 0);

    machine.poke(RAM, b"neither..");
    (cpu.gpr[1], cpu.gpr[6], cpu.gpr[7]) = (9, RAM, DEVICE);
    retire_on(&mut cpu, &mut machine, &[0xf3, 0xa6]); // repe cmpsb: 'i' against 'e' at index 2
    assert_eq!((cpu.gpr[1], cpu.gpr[6], cpu.gpr[7]), (6, RAM + 3, DEVICE + 3));
    assert_eq!(cpu.rflags & (rflags::ZF | rflags::CF), 0);
}
