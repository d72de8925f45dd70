// SPDX-License-Identifier: MIT OR Apache-2.0
//! Accesses to what is no memory.

use crate::harness::{Case, CaseResult};
use crate::machine::{Machine, CODE, DATA, HOLE, RAM};
use crate::{code, ensure_eq, table};
use axvcpu_uapi::addr::GuestPhysAddr;
use axvcpu_uapi::client::Permissions;
use axvcpu_uapi::exit::{AccessFlags, AccessWidth, AxVCpuExitReason as Exit};

/// The cases.
pub(super) fn cases() -> Vec<Case> {
    table! {
        "mmio/reads-of-every-width" => reads;
        "mmio/writes-of-every-width" => writes;
        "mmio/refused-read-is-an-abort" => refused_read;
        "mmio/refused-write-is-an-abort" => refused_write;
        "mmio/pairs-come-undecoded" => pair;
        "mmio/fetch" => fetch;
        "mmio/cache-maintenance-is-nothing" => cache_maintenance;
        "mmio/write-to-read-only-memory" => read_only;
    }
}

fn at(offset: u64) -> GuestPhysAddr {
    GuestPhysAddr::new(HOLE + offset)
}

fn reads() -> CaseResult {
    use AccessWidth::{Byte, Dword, Qword, Word};
    let code = code!(
        reads,
        "movz x1, #0x0900, lsl #16",
        "ldrb w2, [x1, #1]",
        "ldrh w3, [x1, #2]",
        "ldr w4, [x1, #4]",
        "ldr x5, [x1, #8]",
        "ldrsb w6, [x1, #1]",
        "ldrsb x7, [x1, #1]",
        "ldrsh x8, [x1, #2]",
        "ldrsw x9, [x1, #4]",
        "ldr xzr, [x1, #8]",
        "hvc #0"
    );
    let mut machine = Machine::new(code)?;
    machine.modify(|general| general.x = [u64::MAX; 31])?;
    let cases = [
        (1, Byte, 2, Dword, false, 0xffu64, 0xff),
        (2, Word, 3, Dword, false, 0xfffe, 0xfffe),
        (4, Dword, 4, Dword, false, 0x8000_0001, 0x8000_0001),
        (8, Qword, 5, Qword, false, 0x8123_4567_89ab_cdef, 0x8123_4567_89ab_cdef),
        (1, Byte, 6, Dword, true, 0x80, 0xffff_ff80),
        (1, Byte, 7, Qword, true, 0x80, 0xffff_ffff_ffff_ff80),
        (2, Word, 8, Qword, true, 0x7fff, 0x7fff),
        (4, Dword, 9, Qword, true, 0x8000_0000, 0xffff_ffff_8000_0000),
        (8, Qword, 31, Qword, false, 1, 0),
    ];
    for (offset, width, reg, reg_width, signed_ext, value, _) in cases {
        machine.expect(Exit::MmioRead { addr: at(offset), width, reg, reg_width, signed_ext })?;
        // Bits beyond the width are not the device's to decide.
        machine.vcpu.reply(if width == Qword { value } else { value | 0xabcd << 48 });
    }
    machine.expect_call()?;
    let general = machine.vcpu.general();
    for (_, _, reg, _, _, _, expected) in cases {
        if reg < 31 {
            ensure_eq!(general.x[reg], expected, "x{reg}");
        }
    }
    Ok(())
}

fn writes() -> CaseResult {
    use AccessWidth::{Byte, Dword, Qword, Word};
    let code = code!(
        writes,
        "movz x1, #0x0900, lsl #16",
        "movz x2, #0x8877, lsl #48",
        "movk x2, #0x6655, lsl #32",
        "movk x2, #0x4433, lsl #16",
        "movk x2, #0x2211",
        "strb w2, [x1, #1]",
        "strh w2, [x1, #2]",
        "str w2, [x1, #4]",
        "str x2, [x1, #8]",
        "str xzr, [x1, #16]",
        "hvc #0"
    );
    let mut machine = Machine::new(code)?;
    let value = 0x8877_6655_4433_2211u64;
    for (offset, width, data) in [
        (1, Byte, value & 0xff),
        (2, Word, value & 0xffff),
        (4, Dword, value & 0xffff_ffff),
        (8, Qword, value),
        (16, Qword, 0),
    ] {
        machine.expect(Exit::MmioWrite { addr: at(offset), width, data })?;
    }
    machine.expect_call().map(|_| ())
}

fn refused_read() -> CaseResult {
    let code = code!(refused_read, "movz x1, #0x0900, lsl #16", "mov x2, #7", "ldr x2, [x1, #24]", "hvc #0");
    let mut machine = Machine::new(code)?;
    machine.run()?;
    machine.vcpu.reply_fault();
    let registers = machine.expect_exception(4)?;
    // A data abort from EL1: synchronous external abort.
    ensure_eq!(registers.esr_el1, 0x25 << 26 | 1 << 25 | 0x10, "ESR_EL1");
    ensure_eq!((registers.far_el1, registers.elr_el1), (HOLE + 24, CODE + 8), "FAR_EL1, ELR_EL1");
    ensure_eq!(machine.vcpu.general().x[2], 7, "the register");
    Ok(())
}

fn refused_write() -> CaseResult {
    let code = code!(refused_write, "movz x1, #0x0900, lsl #16", "str x2, [x1]", "hvc #0");
    let mut machine = Machine::new(code)?;
    machine.run()?;
    machine.vcpu.reply_fault();
    let registers = machine.expect_exception(4)?;
    ensure_eq!(registers.esr_el1, 0x25 << 26 | 1 << 25 | 1 << 6 | 0x10, "ESR_EL1");
    ensure_eq!((registers.far_el1, registers.elr_el1), (HOLE, CODE + 4), "FAR_EL1, ELR_EL1");
    Ok(())
}

fn pair() -> CaseResult {
    let code = code!(pair, "movz x1, #0x0900, lsl #16", "ldp x2, x3, [x1, #32]", "hvc #0");
    let mut machine = Machine::new(code)?;
    machine.expect(Exit::NestedPageFault { addr: at(32), access_flags: AccessFlags::READ })?;
    ensure_eq!(machine.vcpu.general().pc, CODE + 4, "the PC is at the instruction");
    let (esr, far) = machine.vcpu.syndrome();
    ensure_eq!((esr >> 26, esr >> 24 & 1, far), (0x24, 0, HOLE + 32), "class, ISV, address");
    // Who can decode it goes on behind it.
    machine.modify(|general| {
        general.x[2] = 0x22;
        general.x[3] = 0x33;
        general.pc += 4;
    })?;
    let [_, _, x2, x3, ..] = machine.expect_call()?;
    ensure_eq!((x2, x3), (0x22, 0x33), "the registers");
    Ok(())
}

fn fetch() -> CaseResult {
    let mut machine = Machine::new(code!(fetch, "movz x1, #0x0900, lsl #16", "br x1"))?;
    machine.expect(Exit::NestedPageFault { addr: at(0), access_flags: AccessFlags::EXECUTE })
}

fn cache_maintenance() -> CaseResult {
    let code = code!(cache_maintenance, "movz x1, #0x0900, lsl #16", "dc civac, x1", "mov x0, #9", "hvc #0");
    ensure_eq!(Machine::new(code)?.expect_call()?[0], 9, "it went on");
    Ok(())
}

fn read_only() -> CaseResult {
    let code = code!(
        read_only,
        "movz x1, #0x4010, lsl #16",
        "ldr x2, [x1]",
        "add x2, x2, #1",
        "str x2, [x1]",
        "ldr x3, [x1]",
        "hvc #0"
    );
    let mut machine = Machine::new(code)?;
    machine.write_u64(DATA, 41)?;
    let (low, high) = machine.slots.remove(0).split((DATA - RAM) as usize)?;
    high.protect(Permissions::R)?;
    machine.slots = vec![low, high];
    machine.expect(Exit::MmioWrite { addr: GuestPhysAddr::new(DATA), width: AccessWidth::Qword, data: 42 })?;
    let [_, _, _, x3, ..] = machine.expect_call()?;
    ensure_eq!((x3, machine.read_u64(DATA)?), (41, 41), "the memory");
    Ok(())
}
