// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the comparison with the processor cannot show: moffs and segment forms, RIP-relative and FS/GS addresses,
//! branches through memory, atomicity, and the extra facts an outcome carries.

use super::*;

#[test]
fn moffs_forms_in_64_bit_mode() {
    let mut cpu = long_mode();
    cpu.gpr[0] = 0x1122_3344_5566_7788;
    // mov [0x300010], rax with a 64-bit offset; then al back from one byte of it with a 32-bit offset.
    let machine = retire(&mut cpu, &[0x48, 0xa3, 0x10, 0, 0x30, 0, 0, 0, 0, 0]);
    assert_eq!(machine.peek_u64(DEVICE + 0x10), 0x1122_3344_5566_7788);
    let mut machine = machine;
    retire_on(&mut cpu, &mut machine, &[0x67, 0xa0, 0x11, 0, 0x30, 0]);
    assert_eq!(cpu.gpr[0], 0x1122_3344_5566_7777);
    assert_eq!(
        machine.events,
        [Event::Write(DEVICE + 0x10, 0x1122_3344_5566_7788u64.to_le_bytes().to_vec()), Event::Read(DEVICE + 0x11, 1),]
    );
}

#[test]
fn rip_relative_operands_count_from_the_next_instruction() {
    let mut cpu = long_mode();
    cpu.gpr[1] = 0xaabb_ccdd;
    // mov [rip + disp32], ecx: 6 bytes long.
    let displacement = (DEVICE - (CODE + 6)) as u32;
    let mut code = vec![0x89, 0x0d];
    code.extend(displacement.to_le_bytes());
    let machine = retire(&mut cpu, &code);
    assert_eq!(machine.events, [Event::Write(DEVICE, 0xaabb_ccddu32.to_le_bytes().to_vec())]);
}

#[test]
fn only_fs_and_gs_have_a_base_in_64_bit_mode() {
    for (prefix, segment, moved) in
        [(0x26, seg::ES, 0), (0x36, seg::SS, 0), (0x3e, seg::DS, 0), (0x64, seg::FS, 0x100), (0x65, seg::GS, 0x100)]
    {
        let mut cpu = long_mode();
        cpu.segments[segment].base = 0x100;
        cpu.gpr[3] = DEVICE;
        let machine = retire(&mut cpu, &[prefix, 0x8a, 0x03]);
        assert_eq!(machine.events, [Event::Read(DEVICE + moved, 1)], "prefix {prefix:#x}");
    }
}

#[test]
fn segment_selectors_are_stored_as_16_bits_in_memory() {
    let mut cpu = long_mode();
    cpu.segments[seg::GS].selector = 0x1234;
    cpu.gpr[3] = DEVICE;
    // mov [rbx], gs with REX.W still moves 16 bits.
    let machine = retire(&mut cpu, &[0x48, 0x8c, 0x2b]);
    assert_eq!(machine.events, [Event::Write(DEVICE, vec![0x34, 0x12])]);
}

#[test]
fn jumps_and_calls_take_their_target_from_a_device() {
    let mut machine = Machine::new(&[0xff, 0x23]);
    machine.poke(DEVICE, &0x7fff_1234_5678u64.to_le_bytes());
    let mut cpu = long_mode();
    cpu.gpr[3] = DEVICE;
    assert_eq!(run(&mut cpu, &mut machine).unwrap(), RETIRED);
    assert_eq!(cpu.rip, 0x7fff_1234_5678);

    machine.poke(CODE, &[0xff, 0x13]);
    cpu.rip = CODE;
    assert_eq!(run(&mut cpu, &mut machine).unwrap(), RETIRED);
    assert_eq!((cpu.rip, cpu.gpr[4]), (0x7fff_1234_5678, STACK - 8));
    assert_eq!(machine.peek_u64(STACK - 8), CODE + 2);

    machine.poke(CODE, &[0xff, 0x23]);
    machine.poke(DEVICE, &(1u64 << 46).to_le_bytes());
    cpu.rip = CODE;
    assert_eq!(run(&mut cpu, &mut machine).unwrap(), RETIRED);
    assert_eq!(cpu.rip, 1 << 46);
    machine.poke(DEVICE, &(1u64 << 47).to_le_bytes());
    cpu.rip = CODE;
    let before = cpu.clone();
    assert_eq!(run(&mut cpu, &mut machine).unwrap(), Outcome::Exception(Exception::GeneralProtection));
    assert_eq!(cpu, before);
}

#[test]
fn pop_addresses_its_operand_with_the_stack_pointer_after_the_pop() {
    let mut machine = Machine::new(&[]);
    machine.poke(STACK, &0x1111u64.to_le_bytes());
    machine.poke(STACK + 8, &0x2222u64.to_le_bytes());
    let mut cpu = long_mode();
    // pop qword [rsp]: writes where RSP points after the increment.
    retire_on(&mut cpu, &mut machine, &[0x8f, 0x04, 0x24]);
    assert_eq!((cpu.gpr[4], machine.peek_u64(STACK + 8)), (STACK + 8, 0x1111));
    // push qword [rsp]: reads where RSP points before the decrement.
    retire_on(&mut cpu, &mut machine, &[0xff, 0x34, 0x24]);
    assert_eq!((cpu.gpr[4], machine.peek_u64(STACK)), (STACK, 0x1111));
    // pop rsp: the value popped wins.
    retire_on(&mut cpu, &mut machine, &[0x5c]);
    assert_eq!(cpu.gpr[4], 0x1111);
}

#[test]
fn a_locked_instruction_that_loses_the_race_has_not_happened() {
    let code = [0xf0, 0x83, 0x03, 0x01]; // lock add dword [rbx], 1
    let mut machine = Machine::new(&code);
    machine.poke(RAM, &[5, 0, 0, 0]);
    machine.interference = Some((RAM, 9));
    let mut cpu = long_mode();
    cpu.gpr[3] = RAM;
    let before = cpu.clone();
    assert_eq!(run(&mut cpu, &mut machine).unwrap(), Outcome::Unfinished { debug_trap: false });
    assert_eq!(cpu, before);
    assert_eq!(machine.peek(RAM, 1), [9]);
    assert_eq!(run(&mut cpu, &mut machine).unwrap(), RETIRED);
    assert_eq!(machine.peek(RAM, 1), [10]);
}

#[test]
fn xchg_with_memory_is_atomic_without_a_prefix() {
    let code = [0x87, 0x0b]; // xchg [rbx], ecx
    let mut machine = Machine::new(&code);
    machine.poke(RAM, &[5, 0, 0, 0]);
    machine.interference = Some((RAM, 9));
    let mut cpu = long_mode();
    cpu.gpr[3] = RAM;
    cpu.gpr[1] = 7;
    assert_eq!(run(&mut cpu, &mut machine).unwrap(), Outcome::Unfinished { debug_trap: false });
    assert_eq!(run(&mut cpu, &mut machine).unwrap(), RETIRED);
    assert_eq!((machine.peek(RAM, 1), cpu.gpr[1]), (vec![7], 9));
}

#[test]
fn the_trap_flag_is_reported_and_the_resume_flag_cleared() {
    let mut cpu = long_mode();
    cpu.gpr[3] = DEVICE;
    cpu.rflags |= rflags::TF | rflags::RF;
    let mut machine = Machine::new(&[0x8b, 0x03]);
    let outcome = run(&mut cpu, &mut machine).unwrap();
    assert_eq!(outcome, Outcome::Retired { debug_trap: true, interrupt_shadow: false });
    assert_eq!(cpu.rflags, 2 | rflags::TF);
}

#[test]
fn instruction_bytes_from_the_cpu_are_used_and_completed() {
    // The page at RIP holds something else; the CPU recorded `mov eax, [rbx]`.
    let mut machine = Machine::new(&[0xcc; 16]);
    let mut cpu = long_mode();
    cpu.gpr[3] = DEVICE;
    step(&Config::default(), &mut cpu, &mut machine, &[0x8b, 0x03, 0x90]).unwrap();
    assert_eq!((cpu.rip, machine.events.len()), (CODE + 2, 1));

    // The first byte is recorded, the others come from memory.
    machine.poke(CODE, &[0xcc, 0x43, 0x08]);
    cpu.rip = CODE;
    step(&Config::default(), &mut cpu, &mut machine, &[0x8b]).unwrap();
    assert_eq!((cpu.rip, machine.events.last()), (CODE + 3, Some(&Event::Read(DEVICE + 8, 4))));
}

#[test]
fn what_is_not_emulated_is_named() {
    let mut machine = Machine::new(&[0x0f, 0x6f, 0x03]);
    let mut cpu = long_mode();
    let before = cpu.clone();
    let Err(Error::Unsupported(what)) = run(&mut cpu, &mut machine) else { panic!("movq mm0, [rbx] was emulated") };
    assert_eq!(what.bytes, [0x0f, 0x6f, 0x03]);
    assert!(what.disassembly.starts_with("movq mm0"), "{}", what.disassembly);
    assert_eq!(what.to_string(), format!("`{}` at rip 0x1000 (bytes 0f 6f 03)", what.disassembly));
    assert_eq!(cpu, before);

    machine.poke(CODE, &[0x06; 15]);
    let Err(Error::Unsupported(what)) = run(&mut cpu, &mut machine) else { panic!("push es exists in 64-bit mode") };
    assert_eq!((what.bytes.len(), what.disassembly.as_str()), (15, "(bad)"));
}

#[test]
fn code_in_device_memory_is_an_error_of_its_own() {
    let mut cpu = long_mode();
    cpu.rip = DEVICE + 4;
    let error = run(&mut cpu, &mut Machine::new(&[])).unwrap_err();
    assert!(matches!(error, Error::FetchFromDevice { rip, at } if rip == DEVICE + 4 && at.as_u64() == DEVICE + 4));
}

#[test]
fn cache_line_instructions_check_and_do_nothing() {
    let mut cpu = long_mode();
    cpu.gpr[3] = DEVICE + 1;
    for code in [&[0x0f, 0xae, 0x3b][..], &[0x66, 0x0f, 0xae, 0x3b], &[0x66, 0x0f, 0xae, 0x33]] {
        assert!(retire(&mut cpu, code).events.is_empty());
    }
    cpu.gpr[3] = 1 << 60;
    assert_eq!(fault(&cpu, &mut Machine::new(&[]), &[0x0f, 0xae, 0x3b]), Exception::GeneralProtection);
}

#[test]
fn state_comes_from_the_register_sets_of_the_device() {
    use axvcpu_uapi::x86::{Control, General, Segments};
    let mut general = General { rip: 0x1234, rflags: 2, ..General::default() };
    general.gpr[15] = 15;
    let mut segments = Segments { gs: flat(DATA), ..Segments::default() };
    segments.ss.attributes = DATA | 2 << 5;
    let mut control = Control { cr0: bits::CR0_PE, cr3: 3, cr4: 4, efer: 5, ..Control::default() };
    let cpu = CpuState::from_registers(&general, &segments, &control);
    assert_eq!((cpu.cpl, cpu.cr3, cpu.cr4, cpu.efer), (2, 3, 4, 5));
    assert_eq!((cpu.segments[seg::GS], cpu.general()), (flat(DATA), general));
    general.rflags |= rflags::VM;
    assert_eq!(CpuState::from_registers(&general, &segments, &control).cpl, 3);
    general.rflags = 2;
    control.cr0 = 0;
    assert_eq!(CpuState::from_registers(&general, &segments, &control).cpl, 0);
}
