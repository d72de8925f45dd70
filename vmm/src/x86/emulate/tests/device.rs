// SPDX-License-Identifier: MIT OR Apache-2.0
//! How accesses reach devices: how many, how wide, where, and in which order.

use super::*;

/// `mov [rbx], <register a>` and back for 1, 2, 4 and 8 bytes.
const STORES: [(&[u8], usize); 4] =
    [(&[0x88, 0x03], 1), (&[0x66, 0x89, 0x03], 2), (&[0x89, 0x03], 4), (&[0x48, 0x89, 0x03], 8)];
const LOADS: [(&[u8], usize); 4] =
    [(&[0x8a, 0x03], 1), (&[0x66, 0x8b, 0x03], 2), (&[0x8b, 0x03], 4), (&[0x48, 0x8b, 0x03], 8)];
const VALUE: u64 = 0x8877_6655_4433_2211;

fn at(address: u64) -> CpuState {
    let mut cpu = long_mode();
    cpu.gpr[3] = address;
    cpu.gpr[0] = VALUE;
    cpu
}

#[test]
fn an_access_within_a_page_is_one_device_access_of_its_width() {
    for offset in [0, 1, 3, 0xff8] {
        for (code, width) in STORES {
            let machine = retire(&mut at(DEVICE + offset), code);
            assert_eq!(machine.events, [Event::Write(DEVICE + offset, VALUE.to_le_bytes()[..width].to_vec())]);
        }
        for (code, width) in LOADS {
            let machine = retire(&mut at(DEVICE + offset), code);
            assert_eq!(machine.events, [Event::Read(DEVICE + offset, width)]);
        }
    }
}

#[test]
fn sixteen_bytes_are_two_accesses_of_eight() {
    let mut cpu = at(DEVICE + 0x20);
    let mut machine = Machine::new(&[]);
    machine.xmm[1] = *b"0123456789abcdef";
    retire_on(&mut cpu, &mut machine, &[0x66, 0x0f, 0xe7, 0x0b]); // movntdq [rbx], xmm1
    let expected =
        [Event::Write(DEVICE + 0x20, b"01234567".to_vec()), Event::Write(DEVICE + 0x28, b"89abcdef".to_vec())];
    assert_eq!(machine.events, expected);
    machine.events.clear();
    retire_on(&mut cpu, &mut machine, &[0xf3, 0x0f, 0x6f, 0x13]); // movdqu xmm2, [rbx]
    assert_eq!(machine.events, [Event::Read(DEVICE + 0x20, 8), Event::Read(DEVICE + 0x28, 8)]);
    assert_eq!(machine.xmm[2], machine.xmm[1]);
}

#[test]
fn an_access_across_two_device_pages_is_cut_naturally() {
    let machine = retire(&mut at(DEVICE + 0xffd), STORES[3].0);
    let expected = [
        Event::Write(DEVICE + 0xffd, vec![0x11]),
        Event::Write(DEVICE + 0xffe, vec![0x22, 0x33]),
        Event::Write(DEVICE + 0x1000, vec![0x44, 0x55, 0x66, 0x77]),
        Event::Write(DEVICE + 0x1004, vec![0x88]),
    ];
    assert_eq!(machine.events, expected);
}

#[test]
fn an_access_across_ram_and_device_touches_each_with_its_part() {
    // RAM below, device above.
    let mut cpu = at(DEVICE - 2);
    let mut machine = retire(&mut cpu, STORES[2].0);
    assert_eq!(machine.peek(DEVICE - 2, 2), [0x11, 0x22]);
    assert_eq!(machine.events, [Event::Write(DEVICE, vec![0x33, 0x44])]);
    machine.events.clear();
    cpu.gpr[0] = 0;
    retire_on(&mut cpu, &mut machine, LOADS[2].0);
    assert_eq!((cpu.gpr[0], machine.events), (0x4433_2211, vec![Event::Read(DEVICE, 2)]));

    // Device below, RAM above.
    let machine = retire(&mut at(DEVICE + 0x1ffc), STORES[3].0);
    assert_eq!(machine.events, [Event::Write(DEVICE + 0x1ffc, vec![0x11, 0x22, 0x33, 0x44])]);
    assert_eq!(machine.peek(DEVICE + 0x2000, 4), [0x55, 0x66, 0x77, 0x88]);
}

#[test]
fn read_modify_write_reads_once_and_writes_once() {
    let cases: [&[u8]; 9] = [
        &[0x83, 0x0b, 0x01],       // or dword [rbx], 1
        &[0xf0, 0x83, 0x23, 0x0f], // lock and dword [rbx], 15
        &[0x31, 0x03],             // xor [rbx], eax
        &[0xff, 0x03],             // inc dword [rbx]
        &[0xf7, 0x13],             // not dword [rbx]
        &[0x0f, 0xba, 0x2b, 0x03], // bts dword [rbx], 3
        &[0x87, 0x03],             // xchg [rbx], eax
        &[0xf0, 0x0f, 0xb1, 0x0b], // lock cmpxchg [rbx], ecx
        &[0xd1, 0x23],             // shl dword [rbx], 1
    ];
    for code in cases {
        let machine = retire(&mut at(DEVICE), code);
        let shape: Vec<_> = machine
            .events
            .iter()
            .map(|event| match event {
                Event::Read(at, size) => ('r', *at, *size),
                Event::Write(at, data) => ('w', *at, data.len()),
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(shape, [('r', DEVICE, 4), ('w', DEVICE, 4)], "{code:02x?}");
    }
}

#[test]
fn tests_and_compares_only_read() {
    let cases: [&[u8]; 4] = [
        &[0x83, 0x3b, 0x01],                   // cmp dword [rbx], 1
        &[0xf7, 0x03, 0x01, 0x00, 0x00, 0x00], // test dword [rbx], 1
        &[0x85, 0x03],                         // test [rbx], eax
        &[0x0f, 0xba, 0x23, 0x05],             // bt dword [rbx], 5
    ];
    for code in cases {
        assert_eq!(retire(&mut at(DEVICE), code).events, [Event::Read(DEVICE, 4)], "{code:02x?}");
    }
}

#[test]
fn bit_offsets_in_registers_lead_outside_the_operand() {
    let mut cpu = at(DEVICE + 0x100);
    cpu.gpr[1] = -33i64 as u64;
    let mut machine = Machine::new(&[]);
    machine.poke(DEVICE, &[0; 4096]);
    retire_on(&mut cpu, &mut machine, &[0x0f, 0xab, 0x0b]); // bts [rbx], ecx
    let expected = [Event::Read(DEVICE + 0xf8, 4), Event::Write(DEVICE + 0xf8, vec![0, 0, 0, 0x80])];
    assert_eq!(machine.events, expected);
    cpu.gpr[1] = 100;
    let machine = retire(&mut cpu, &[0x0f, 0xab, 0x0b]);
    assert_eq!(machine.events[0], Event::Read(DEVICE + 0x10c, 4));
}

#[test]
fn memory_that_is_read_only_is_read_as_ram_and_written_as_a_device() {
    let mut machine = Machine::new(&[]);
    machine.poke(RAM, &[0x40, 0, 0, 0]);
    machine.read_only.insert(RAM / 4096);
    retire_on(&mut at(RAM), &mut machine, &[0xff, 0x03]); // inc dword [rbx]
    assert_eq!(machine.events, [Event::Write(RAM, vec![0x41, 0, 0, 0])]);
}

#[test]
fn the_bus_error_comes_back_and_nothing_has_changed() {
    struct Broken(Machine);
    impl GuestMemory for Broken {
        type Error = &'static str;
        fn read(&mut self, at: GuestPhysAddr, data: &mut [u8]) -> Result<(), Self::Error> {
            GuestMemory::read(&mut self.0, at, data).map_err(|error| match error {})
        }
        fn compare_exchange(&mut self, _: GuestPhysAddr, _: usize, _: u64, _: u64) -> Result<bool, Self::Error> {
            Err("no exchange")
        }
    }
    impl Bus for Broken {
        fn is_ram(&self, at: GuestPhysAddr, write: bool) -> bool {
            self.0.is_ram(at, write)
        }
        fn write(&mut self, _: GuestPhysAddr, _: &[u8]) -> Result<(), Self::Error> {
            Err("no write")
        }
        fn mmio_read(&mut self, _: GuestPhysAddr, _: &mut [u8]) -> Result<(), Self::Error> {
            Err("device gone")
        }
        fn mmio_write(&mut self, _: GuestPhysAddr, _: &[u8]) -> Result<(), Self::Error> {
            Err("device gone")
        }
        fn xmm_read(&mut self, _: usize) -> Result<[u8; 16], Self::Error> {
            Err("no registers")
        }
        fn xmm_write(&mut self, _: usize, _: [u8; 16]) -> Result<(), Self::Error> {
            Err("no registers")
        }
    }
    let cases: [(&[u8], u64, &str); 4] = [
        (LOADS[2].0, DEVICE, "device gone"),
        (STORES[2].0, RAM, "no write"),
        (&[0x87, 0x03], RAM, "no exchange"),
        (&[0x0f, 0x11, 0x03], RAM, "no registers"), // movups [rbx], xmm0
    ];
    for (code, address, expected) in cases {
        let mut cpu = at(address);
        let before = cpu.clone();
        match step(&Config::default(), &mut cpu, &mut Broken(Machine::new(code)), &[]) {
            Err(Error::Bus(error)) => assert_eq!(error, expected),
            other => panic!("{other:?}"),
        }
        assert_eq!(cpu, before);
    }
}
