// SPDX-License-Identifier: MIT OR Apache-2.0
//! 16- and 32-bit code: address forms, wrapping, segment bases and limits, operand sizes, stack widths.

use super::*;

/// Real mode with the device page within reach: DS at 0x2000:0, device memory at linear 0x20000.
const LOW_DEVICE: u64 = 0x2_0000;

fn real_with_device() -> (CpuState, Machine) {
    let mut cpu = real_mode();
    cpu.segments[seg::DS] = Segment { selector: 0x2000, attributes: DATA, limit: 0xffff, base: LOW_DEVICE };
    let mut machine = Machine::new(&[]);
    machine.devices.insert(LOW_DEVICE / 4096);
    (cpu, machine)
}

#[test]
fn sixteen_bit_address_forms() {
    let cases: [(&[u8], u64); 6] = [
        (&[0x8b, 0x00], 0x150),                    // mov ax, [bx+si]
        (&[0x8b, 0x41, 0x10], 0x170),              // mov ax, [bx+di+0x10]
        (&[0x8b, 0x07], 0x100),                    // mov ax, [bx]
        (&[0x8b, 0x06, 0x34, 0x02], 0x234),        // mov ax, [0x234]
        (&[0xa1, 0x34, 0x02], 0x234),              // mov ax, moffs 0x234
        (&[0x67, 0x8b, 0x04, 0x73], 0x100 + 0xa0), // mov ax, [ebx+esi*2]
    ];
    for (code, offset) in cases {
        let (mut cpu, mut machine) = real_with_device();
        (cpu.gpr[3], cpu.gpr[6], cpu.gpr[7]) = (0x100, 0x50, 0x60);
        cpu.gpr[0] = 0xdead_beef;
        machine.poke(LOW_DEVICE + offset, &[0x12, 0x34]);
        retire_on(&mut cpu, &mut machine, code);
        assert_eq!(machine.events, [Event::Read(LOW_DEVICE + offset, 2)], "{code:02x?}");
        assert_eq!(cpu.gpr[0], 0xdead_3412, "{code:02x?}");
    }
}

#[test]
fn sixteen_bit_addresses_wrap_at_64_kib_and_bp_means_ss() {
    let (mut cpu, mut machine) = real_with_device();
    (cpu.gpr[3], cpu.gpr[6]) = (0xfff0, 0x20);
    retire_on(&mut cpu, &mut machine, &[0x8a, 0x00]); // mov al, [bx+si]
    assert_eq!(machine.events, [Event::Read(LOW_DEVICE + 0x10, 1)]);

    cpu.segments[seg::SS].base = LOW_DEVICE + 0x100;
    cpu.gpr[5] = 8;
    retire_on(&mut cpu, &mut machine, &[0x8a, 0x46, 0x00]); // mov al, [bp+0]
    assert_eq!(machine.events[1], Event::Read(LOW_DEVICE + 0x108, 1));
    // An override beats the default.
    retire_on(&mut cpu, &mut machine, &[0x3e, 0x8a, 0x46, 0x00]);
    assert_eq!(machine.events[2], Event::Read(LOW_DEVICE + 8, 1));
}

#[test]
fn operand_and_address_size_prefixes_toggle() {
    // In 16-bit code 66 and 67 give 32 bits, in 32-bit code 16.
    let (mut cpu, mut machine) = real_with_device();
    cpu.gpr[0] = 0x1122_3344;
    retire_on(&mut cpu, &mut machine, &[0x66, 0xa3, 0x00, 0x00]); // mov [0], eax
    assert_eq!(machine.events, [Event::Write(LOW_DEVICE, vec![0x44, 0x33, 0x22, 0x11])]);

    let mut cpu = protected_mode();
    cpu.segments[seg::DS].base = DEVICE;
    cpu.gpr[0] = 0x1122_3344;
    cpu.gpr[3] = 0xffff_0010;
    let machine = retire(&mut cpu, &[0x66, 0x67, 0x89, 0x07]); // mov [bx], ax
    assert_eq!(machine.events, [Event::Write(DEVICE + 0x10, vec![0x44, 0x33])]);
}

#[test]
fn linear_addresses_wrap_at_4_gib_outside_64_bit_mode() {
    let mut cpu = protected_mode();
    cpu.segments[seg::DS].base = DEVICE + 0x1000;
    cpu.gpr[3] = 0xffff_f004; // base + offset = DEVICE + 4 modulo 2^32
    let machine = retire(&mut cpu, &[0x8b, 0x03]);
    assert_eq!(machine.events, [Event::Read(DEVICE + 4, 4)]);
}

/// Stores through DS at the offset, which is within its limit or not.
fn store_within(data: Segment, offset: u64, fits: bool) {
    let store: &[u8] = &[0x89, 0x03]; // mov [ebx], eax
    let mut cpu = protected_mode();
    cpu.segments[seg::DS] = data;
    cpu.gpr[3] = offset;
    if fits {
        retire(&mut cpu, store);
    } else {
        assert_eq!(fault(&cpu, &mut Machine::new(&[]), store), Exception::GeneralProtection, "{offset:#x}");
    }
}

#[test]
fn limits_are_checked_for_every_byte() {
    let data = Segment { limit: 0xfff, base: DEVICE, ..flat(DATA | seg::BIG) };
    for (offset, fits) in [(0xffc, true), (0xffd, false), (0x1000, false), (0xffff_fffd, false)] {
        store_within(data, offset, fits);
    }
}

#[test]
fn expand_down_segments_begin_above_their_limit() {
    let big = seg::BIG;
    for (attributes, offset, fits) in [
        (big, 0x1000, true),
        (big, 0xfff, false),
        (big, 0xffff_fffc, true),
        (0, 0xfffc, true),
        (0, 0xfffd, false),
        (0, 0x1_0000, false),
    ] {
        store_within(Segment { limit: 0xfff, base: 0, ..flat(DATA | seg::EXPAND_DOWN | attributes) }, offset, fits);
    }
}

#[test]
fn segment_types_restrict_access() {
    let load: &[u8] = &[0x8b, 0x03];
    let store: &[u8] = &[0x89, 0x03];
    let read_only = DATA & !seg::READ_WRITE;
    let execute_only = TEXT & !seg::READ_WRITE;
    let cases: [(u16, bool, bool); 5] = [
        (DATA, true, true),
        (read_only, true, false),
        (TEXT, true, false),
        (execute_only, false, false),
        (DATA & !seg::PRESENT, false, false),
    ];
    for (attributes, readable, writable) in cases {
        for (code, allowed) in [(load, readable), (store, writable)] {
            let mut cpu = protected_mode();
            cpu.segments[seg::DS].attributes = attributes | seg::BIG;
            cpu.gpr[3] = DEVICE;
            if allowed {
                retire(&mut cpu, code);
            } else {
                assert_eq!(fault(&cpu, &mut Machine::new(&[]), code), Exception::GeneralProtection);
            }
        }
    }
}

#[test]
fn real_mode_knows_limits_but_no_types() {
    let (mut cpu, mut machine) = real_with_device();
    cpu.segments[seg::DS].attributes = TEXT & !seg::READ_WRITE;
    retire_on(&mut cpu, &mut machine, &[0xa3, 0x00, 0x00]);
    assert_eq!(fault(&cpu, &mut machine, &[0xa3, 0xff, 0xff]), Exception::GeneralProtection);
    // "Unreal mode": a limit loaded in protected mode stays.
    cpu.segments[seg::DS].limit = u32::MAX;
    cpu.segments[seg::DS].base = 0;
    cpu.gpr[3] = DEVICE;
    machine.events.clear();
    retire_on(&mut cpu, &mut machine, &[0x67, 0x8b, 0x03]); // mov ax, [ebx]
    assert_eq!(machine.events, [Event::Read(DEVICE, 2)]);
}

#[test]
fn segment_registers_load_in_real_mode_and_ss_opens_a_shadow() {
    let (mut cpu, mut machine) = real_with_device();
    machine.poke(LOW_DEVICE, &[0x34, 0x12]);
    retire_on(&mut cpu, &mut machine, &[0x8e, 0x06, 0x00, 0x00]); // mov es, [0]
    let es = cpu.segments[seg::ES];
    assert_eq!((es.selector, es.base, es.limit), (0x1234, 0x1_2340, 0xffff));

    cpu.rflags |= rflags::TF;
    cpu.rip = CODE;
    machine.poke(CODE, &[0x8e, 0x16, 0x00, 0x00]); // mov ss, [0]
    let outcome = run(&mut cpu, &mut machine).unwrap();
    assert_eq!(outcome, Outcome::Retired { debug_trap: false, interrupt_shadow: true });

    // With descriptor tables it is out of reach, and says so.
    let mut cpu = protected_mode();
    let mut machine = Machine::new(&[0x8e, 0x03]);
    assert!(matches!(run(&mut cpu, &mut machine), Err(Error::Unsupported(_))));
}

#[test]
fn push_and_pop_follow_the_stack_segment_s_size() {
    // 16-bit stack: only SP moves and wraps.
    let (mut cpu, mut machine) = real_with_device();
    machine.poke(LOW_DEVICE, &[0x34, 0x12]);
    cpu.gpr[4] = 0xabcd_0000;
    retire_on(&mut cpu, &mut machine, &[0xff, 0x36, 0x00, 0x00]); // push word [0]
    assert_eq!((cpu.gpr[4], machine.peek(0xfffe, 2)), (0xabcd_fffe, vec![0x34, 0x12]));
    retire_on(&mut cpu, &mut machine, &[0x8f, 0x06, 0x08, 0x00]); // pop word [8]
    assert_eq!((cpu.gpr[4], machine.peek(LOW_DEVICE + 8, 2)), (0xabcd_0000, vec![0x34, 0x12]));

    // 32-bit stack.
    let mut cpu = protected_mode();
    cpu.gpr[3] = DEVICE;
    let machine = retire(&mut cpu, &[0xff, 0x33]); // push dword [ebx]
    assert_eq!((cpu.gpr[4], machine.events), (STACK - 4, vec![Event::Read(DEVICE, 4)]));
}

#[test]
fn near_branches_in_16_bit_code() {
    let (mut cpu, mut machine) = real_with_device();
    machine.poke(LOW_DEVICE, &[0x78, 0x56]);
    machine.poke(CODE, &[0xff, 0x16, 0x00, 0x00]); // call [0]
    assert_eq!(run(&mut cpu, &mut machine).unwrap(), RETIRED);
    assert_eq!((cpu.rip, cpu.gpr[4]), (0x5678, 0x7ffe));
    assert_eq!(machine.peek(0x7ffe, 2), (CODE as u16 + 4).to_le_bytes());

    cpu.segments[seg::CS].limit = 0x5677;
    cpu.rip = CODE;
    machine.poke(CODE, &[0xff, 0x26, 0x00, 0x00]); // jmp [0]
    assert_eq!(run(&mut cpu, &mut machine).unwrap(), Outcome::Exception(Exception::GeneralProtection));
}

#[test]
fn compatibility_mode_is_32_bit_code_in_long_mode() {
    let mut cpu = long_mode();
    cpu.segments[seg::CS] = flat(TEXT | seg::BIG);
    cpu.gpr[3] = 0xffff_ffff_0000_0000 | DEVICE;
    let machine = retire(&mut cpu, &[0x40, 0x8b, 0x03][1..]); // mov eax, [ebx]
    assert_eq!(machine.events, [Event::Read(DEVICE, 4)]);
    // 40 is INC EAX here, not a REX prefix.
    let mut cpu = protected_mode();
    cpu.gpr[0] = 0xffff_ffff;
    retire(&mut cpu, &[0x40]);
    assert_eq!(cpu.gpr[0], 0);
}

#[test]
fn virtual_8086_mode_is_16_bit_whatever_cs_says() {
    let mut cpu = real_mode();
    cpu.cr0 = bits::CR0_PE;
    cpu.rflags |= rflags::VM;
    cpu.cpl = 3;
    cpu.segments[seg::CS].attributes |= seg::BIG;
    cpu.segments[seg::DS].base = DEVICE;
    cpu.gpr[3] = 0x1_0004;
    let machine = retire(&mut cpu, &[0x8b, 0x07]); // mov ax, [bx]
    assert_eq!(machine.events, [Event::Read(DEVICE + 4, 2)]);
}
