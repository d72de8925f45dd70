// SPDX-License-Identifier: MIT OR Apache-2.0
//! INS and OUTS.

use super::super::{Direction, StringIo};
use super::*;

const PORT: u16 = 0x3f8;

fn io(cpu: &mut CpuState, machine: &mut Machine, width: u8, direction: Direction) -> Outcome {
    string_io(&Config::default(), cpu, machine, StringIo { port: PORT, width, direction }, &[]).unwrap()
}

fn at_port(mut cpu: CpuState) -> CpuState {
    cpu.gpr[2] = 0xffff_0000 | u64::from(PORT);
    cpu
}

#[test]
fn each_width_in_both_directions() {
    let cases: [(&[u8], &[u8], u8); 3] =
        [(&[0x6c], &[0x6e], 1), (&[0x66, 0x6d], &[0x66, 0x6f], 2), (&[0x6d], &[0x6f], 4)];
    for (ins, outs, width) in cases {
        for down in [false, true] {
            let step = if down { -i64::from(width) } else { i64::from(width) };
            let mut cpu = at_port(long_mode());
            cpu.rflags |= if down { rflags::DF } else { 0 };
            cpu.gpr[7] = RAM + 8;
            let mut machine = Machine::new(ins);
            machine.port_byte = 1;
            assert_eq!(io(&mut cpu, &mut machine, width, Direction::In), RETIRED);
            assert_eq!(machine.events, [Event::In(PORT, width.into())]);
            assert_eq!(machine.peek(RAM + 8, width.into()), [1, 2, 3, 4][..width.into()]);
            assert_eq!(cpu.gpr[7], (RAM + 8).wrapping_add_signed(step));

            machine.poke(CODE, outs);
            machine.events.clear();
            (cpu.rip, cpu.gpr[6]) = (CODE, RAM + 8);
            assert_eq!(io(&mut cpu, &mut machine, width, Direction::Out), RETIRED);
            assert_eq!(machine.events, [Event::Out(PORT, vec![1, 2, 3, 4][..width.into()].to_vec())]);
            assert_eq!(cpu.gpr[6], (RAM + 8).wrapping_add_signed(step));
        }
    }
}

#[test]
fn repeated_input_crosses_pages_and_reaches_devices() {
    let mut cpu = at_port(long_mode());
    (cpu.gpr[1], cpu.gpr[7]) = (3, DEVICE - 6);
    let mut machine = Machine::new(&[0xf3, 0x6d]); // rep insd
    assert_eq!(io(&mut cpu, &mut machine, 4, Direction::In), RETIRED);
    assert_eq!((cpu.gpr[1], cpu.gpr[7]), (0, DEVICE + 6));
    assert_eq!(machine.peek(DEVICE - 6, 12), (0..12).collect::<Vec<u8>>());
    let writes: Vec<_> = machine.events.iter().filter(|event| matches!(event, Event::Write(..))).collect();
    assert_eq!(writes, [&Event::Write(DEVICE, vec![6, 7]), &Event::Write(DEVICE + 2, vec![8, 9, 10, 11])]);
}

#[test]
fn the_bound_applies() {
    let mut cpu = at_port(long_mode());
    (cpu.gpr[1], cpu.gpr[6]) = (5, RAM);
    let mut machine = Machine::new(&[0xf3, 0x6e]); // rep outsb
    let config = Config { rep_limit: 2, ..Config::default() };
    let request = StringIo { port: PORT, width: 1, direction: Direction::Out };
    let mut calls = 0;
    while string_io(&config, &mut cpu, &mut machine, request, &[]).unwrap() != RETIRED {
        calls += 1;
        assert_eq!((cpu.rip, cpu.gpr[1]), (CODE, 5 - 2 * calls));
    }
    assert_eq!((calls, machine.events.len(), cpu.rip), (2, 5, CODE + 2));
}

#[test]
fn input_to_memory_that_faults_does_not_read_the_port() {
    let mut cpu = at_port(protected_mode());
    cpu.segments[seg::ES].limit = 0xff;
    cpu.gpr[7] = 0xfe;
    let mut machine = Machine::new(&[0x6d]);
    let before = cpu.clone();
    assert_eq!(io(&mut cpu, &mut machine, 4, Direction::In), Outcome::Exception(Exception::GeneralProtection));
    assert_eq!((cpu, machine.events), (before, vec![]));
}

#[test]
fn output_honours_segment_overrides_and_16_bit_addresses() {
    let mut cpu = at_port(real_mode());
    cpu.segments[seg::FS].base = 0x5_0000;
    (cpu.gpr[1], cpu.gpr[6]) = (0xaaaa_0002, 0xbbbb_ffff);
    let mut machine = Machine::new(&[0x64, 0xf3, 0x6e]); // fs rep outsb
    machine.poke(0x5_ffff, b"x");
    machine.poke(0x5_0000, b"y");
    assert_eq!(io(&mut cpu, &mut machine, 1, Direction::Out), RETIRED);
    assert_eq!(machine.events, [Event::Out(PORT, b"x".to_vec()), Event::Out(PORT, b"y".to_vec())]);
    assert_eq!((cpu.gpr[1], cpu.gpr[6]), (0xaaaa_0000, 0xbbbb_0001));
}

#[test]
fn an_exit_that_describes_another_instruction_is_refused() {
    let request = StringIo { port: PORT, width: 1, direction: Direction::Out };
    let cases: [(&[u8], u64); 4] =
        [(&[0x6c], PORT.into()), (&[0x6f], PORT.into()), (&[0x6e], 0x80), (&[0x90], PORT.into())];
    for (code, port) in cases {
        let mut cpu = long_mode();
        cpu.gpr[2] = port;
        let mut machine = Machine::new(code);
        let result = string_io(&Config::default(), &mut cpu, &mut machine, request, &[]);
        assert!(matches!(result, Err(Error::ExitMismatch(_))), "{code:02x?}");
        assert!(machine.events.is_empty());
    }
    // And MMIO emulation leaves port instructions alone.
    let mut machine = Machine::new(&[0x6e]);
    assert!(matches!(run(&mut long_mode(), &mut machine), Err(Error::Unsupported(_))));
}
