// SPDX-License-Identifier: MIT OR Apache-2.0
//! Guest exceptions: which one, with which error code and address, and that nothing has happened before it.

use axvcpu_uapi::addr::GuestVirtAddr;

use super::*;
use crate::x86::paging::fault as code;

const ROOT: u64 = TABLES + 0x100_0000;
const PRESENT: u64 = 1;
const WRITABLE: u64 = 2;
const USER: u64 = 4;
const NO_EXECUTE: u64 = 1 << 63;

/// 64-bit mode with paging: code, RAM, stack and device pages mapped one to one as `flags` say, and read-only RAM in
/// the page after [`RAM`]; the page after the stack's and the third page at [`DEVICE`] are not mapped.
pub(super) fn paged(cpl: u8) -> (CpuState, Machine) {
    let mut machine = Machine::new(&[]);
    let user = if cpl == 3 { USER } else { 0 };
    machine.poke(ROOT, &[0; 4096]);
    for page in [CODE, RAM, STACK - 4096, DEVICE, DEVICE + 4096] {
        machine.map(ROOT, page, page, PRESENT | WRITABLE | user);
        machine.poke(page, &[0; 4096]);
    }
    machine.map(ROOT, RAM + 4096, RAM + 4096, PRESENT | WRITABLE | user);
    set_leaf(&mut machine, RAM + 4096, (RAM + 4096) | PRESENT | user);
    let mut cpu = long_mode();
    cpu.cr0 |= bits::CR0_PG | bits::CR0_WP;
    cpu.cr3 = ROOT;
    cpu.cpl = cpl;
    (cpu, machine)
}

/// Overwrites the last-level entry of `linear`.
pub(super) fn set_leaf(machine: &mut Machine, linear: u64, entry: u64) {
    let mut table = ROOT;
    for shift in [39, 30, 21] {
        table = machine.peek_u64(table + (linear >> shift & 511) * 8) & 0xf_ffff_ffff_f000;
    }
    machine.poke(table + (linear >> 12 & 511) * 8, &entry.to_le_bytes());
}

fn page_fault(address: u64, code: u32) -> Exception {
    Exception::PageFault { address: GuestVirtAddr::new(address), code }
}

#[test]
fn the_second_page_of_a_crossing_access_faults_at_its_start() {
    for (cpl, user) in [(0, 0), (3, code::USER)] {
        let (mut cpu, mut machine) = paged(cpl);
        cpu.gpr[3] = DEVICE + 0x1ffe;
        let store = [0x89, 0x03];
        assert_eq!(fault(&cpu, &mut machine, &store), page_fault(DEVICE + 0x2000, code::WRITE | user));
        let load = [0x8b, 0x03];
        assert_eq!(fault(&cpu, &mut machine, &load), page_fault(DEVICE + 0x2000, user));
    }
}

#[test]
fn read_modify_write_faults_as_a_write_before_the_device_is_read() {
    let (mut cpu, mut machine) = paged(0);
    cpu.gpr[3] = RAM + 4096;
    for text in [&[0xff, 0x03][..], &[0x87, 0x03], &[0x0f, 0xb1, 0x0b], &[0x0f, 0xba, 0x2b, 0x01], &[0xd1, 0x23]] {
        assert_eq!(fault(&cpu, &mut machine, text), page_fault(RAM + 4096, code::PRESENT | code::WRITE));
    }
}

#[test]
fn every_operand_is_translated_before_a_device_is_touched() {
    // push [device] with an unmapped stack.
    let (mut cpu, mut machine) = paged(0);
    cpu.gpr[3] = DEVICE;
    cpu.gpr[4] = STACK + 4096;
    assert_eq!(fault(&cpu, &mut machine, &[0xff, 0x33]), page_fault(STACK + 4096 - 8, code::WRITE));
    // call [device], likewise.
    assert_eq!(fault(&cpu, &mut machine, &[0xff, 0x13]), page_fault(STACK + 4096 - 8, code::WRITE));
    // movs from a device to read-only memory.
    cpu.gpr[6] = DEVICE;
    cpu.gpr[7] = RAM + 4096;
    assert_eq!(fault(&cpu, &mut machine, &[0xa5]), page_fault(RAM + 4096, code::PRESENT | code::WRITE));
    // pop to read-only memory: neither RSP nor the destination moves.
    cpu.gpr[4] = STACK - 8;
    cpu.gpr[3] = RAM + 4096;
    assert_eq!(fault(&cpu, &mut machine, &[0x8f, 0x03]), page_fault(RAM + 4096, code::PRESENT | code::WRITE));
}

#[test]
fn instruction_fetch_faults_where_the_missing_bytes_are() {
    // `mov eax, [rbx + disp32]` whose last bytes lie in a page that is not there, then in one that may not execute.
    let (mut cpu, mut machine) = paged(0);
    machine.poke(CODE + 0xffd, &[0x8b, 0x83, 0x00]);
    cpu.rip = CODE + 0xffd;
    let before = cpu.clone();
    assert_eq!(run(&mut cpu, &mut machine).unwrap(), Outcome::Exception(page_fault(CODE + 0x1000, code::FETCH)));
    set_leaf(&mut machine, CODE + 0x1000, (CODE + 0x1000) | PRESENT | NO_EXECUTE);
    let outcome = run(&mut cpu, &mut machine).unwrap();
    assert_eq!(outcome, Outcome::Exception(page_fault(CODE + 0x1000, code::FETCH | code::PRESENT)));
    assert_eq!(cpu, before);
    // An instruction that ends with the page does not need the next one.
    machine.poke(CODE + 0xffd, &[0x8b, 0x43, 0x00]);
    cpu.gpr[3] = DEVICE;
    assert_eq!(run(&mut cpu, &mut machine).unwrap(), RETIRED);
}

#[test]
fn code_segment_limits_bound_the_fetch() {
    let mut cpu = protected_mode();
    cpu.segments[seg::CS].limit = (CODE + 2) as u32;
    cpu.gpr[3] = DEVICE;
    let mut machine = Machine::new(&[0x8b, 0x43, 0x00]);
    assert_eq!(run(&mut cpu.clone(), &mut machine).unwrap(), RETIRED);
    cpu.segments[seg::CS].limit = (CODE + 1) as u32;
    assert_eq!(fault(&cpu, &mut machine, &[0x8b, 0x43, 0x00]), Exception::GeneralProtection);
}

#[test]
fn non_canonical_addresses() {
    let mut machine = Machine::new(&[]);
    let mut cpu = long_mode();
    // mov eax, [rbx], the last byte just beyond; then through RBP, whose segment is SS.
    cpu.gpr[3] = (1 << 47) - 3;
    cpu.gpr[5] = 1 << 47;
    assert_eq!(fault(&cpu, &mut machine, &[0x8b, 0x03]), Exception::GeneralProtection);
    assert_eq!(fault(&cpu, &mut machine, &[0x8b, 0x45, 0x00]), Exception::Stack);
    // push with a stack pointer that is none.
    cpu.gpr[4] = 1 << 60;
    assert_eq!(fault(&cpu, &mut machine, &[0x50]), Exception::Stack);
    // Five-level paging reaches further; with paging off the walker then takes the low 32 bits.
    cpu.cr4 |= bits::CR4_LA57;
    cpu.gpr[3] = (1 << 48) | DEVICE;
    machine.events.clear();
    retire_on(&mut cpu, &mut machine, &[0x8b, 0x03]);
    cpu.gpr[3] = 1 << 56;
    cpu.rip = CODE;
    assert_eq!(fault(&cpu, &mut machine, &[0x8b, 0x03]), Exception::GeneralProtection);
}

#[test]
fn aligned_vector_accesses_fault_when_misaligned() {
    let mut machine = Machine::new(&[]);
    let mut cpu = long_mode();
    cpu.gpr[3] = DEVICE + 8;
    for text in [&[0x0f, 0x29, 0x03][..], &[0x66, 0x0f, 0x6f, 0x03], &[0x66, 0x0f, 0xe7, 0x03]] {
        assert_eq!(fault(&cpu, &mut machine, text), Exception::GeneralProtection);
    }
    // cmpxchg16b
    assert_eq!(fault(&cpu, &mut machine, &[0x48, 0x0f, 0xc7, 0x0b]), Exception::GeneralProtection);
    retire_on(&mut cpu, &mut machine, &[0x0f, 0x11, 0x03]); // movups
}

#[test]
fn vector_instructions_need_the_operating_system_s_consent() {
    let text = [0x0f, 0x11, 0x03];
    let mut machine = Machine::new(&[]);
    let mut cpu = long_mode();
    cpu.gpr[3] = DEVICE;
    cpu.cr0 |= 1 << 3; // TS
    assert_eq!(fault(&cpu, &mut machine, &text), Exception::DeviceNotAvailable);
    cpu.cr0 |= 1 << 2; // EM
    assert_eq!(fault(&cpu, &mut machine, &text), Exception::InvalidOpcode);
    cpu.cr0 = bits::CR0_PE;
    cpu.cr4 &= !CR4_OSFXSR;
    assert_eq!(fault(&cpu, &mut machine, &text), Exception::InvalidOpcode);
}

#[test]
fn alignment_checks_apply_to_user_code_that_asked_for_them() {
    let (mut cpu, mut machine) = paged(3);
    cpu.cr0 |= 1 << 18; // AM
    cpu.rflags |= rflags::AC;
    cpu.gpr[3] = DEVICE + 2;
    assert_eq!(fault(&cpu, &mut machine, &[0x8b, 0x03]), Exception::Alignment);
    retire_on(&mut cpu, &mut machine, &[0x66, 0x8b, 0x03]);
    cpu.rflags &= !rflags::AC;
    retire_on(&mut cpu, &mut machine, &[0x8b, 0x03]);
}

#[test]
fn division_faults() {
    let mut machine = Machine::new(&[]);
    let mut cpu = long_mode();
    cpu.gpr[3] = RAM;
    machine.poke(RAM, &[0; 8]);
    assert_eq!(fault(&cpu, &mut machine, &[0xf7, 0x33]), Exception::Divide); // div dword [rbx]
    assert_eq!(fault(&cpu, &mut machine, &[0xf7, 0x3b]), Exception::Divide); // idiv dword [rbx]
}

#[test]
fn vectors_and_error_codes() {
    let fault = page_fault(0x1234, 6);
    assert_eq!((fault.vector(), fault.error_code()), (14, Some(6)));
    assert_eq!((Exception::Stack.vector(), Exception::Stack.error_code()), (12, Some(0)));
    assert_eq!((Exception::GeneralProtection.vector(), Exception::GeneralProtection.error_code()), (13, Some(0)));
    assert_eq!((Exception::Alignment.vector(), Exception::Alignment.error_code()), (17, Some(0)));
    assert_eq!((Exception::InvalidOpcode.vector(), Exception::InvalidOpcode.error_code()), (6, None));
    assert_eq!((Exception::DeviceNotAvailable.vector(), Exception::DeviceNotAvailable.error_code()), (7, None));
    assert_eq!((Exception::Divide.vector(), Exception::Divide.error_code()), (0, None));
}
