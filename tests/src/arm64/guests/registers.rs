// SPDX-License-Identifier: MIT OR Apache-2.0
//! Registers: what is set is what the guest has, and what the guest leaves is what is read.

use crate::harness::{Case, CaseResult};
use crate::machine::{Machine, CODE, STACK};
use crate::{code, ensure, ensure_eq, table};
use axvcpu_uapi::arm64::{Fp, General, System, PSTATE_DAIF, PSTATE_EL0};
use axvcpu_uapi::client::Errno;
use axvcpu_uapi::exit::AxVCpuExitReason as Exit;

/// The cases.
pub(super) fn cases() -> Vec<Case> {
    table! {
        "registers/general-survive-every-exit" => general;
        "registers/system-registers-are-the-guests" => system;
        "registers/bad-states-are-refused" => refused;
        "registers/stack-pointers" => stack_pointers;
        "registers/simd" => simd;
        "registers/simd-over-many-windows" => simd_windows;
        "registers/el0-and-back" => el0;
        "registers/aarch32-at-el0-is-told" => aarch32;
        "registers/set-gpr" => set_gpr;
    }
}

fn general() -> CaseResult {
    // Three exits of different kinds, none of which touches a register but X0 of the call.
    let code = code!(general, "wfi", "wfe", "ldr xzr, [x1]", "hvc #0");
    let mut machine = Machine::new(code)?;
    let mut expected = [0u64; 31];
    for (number, register) in expected.iter_mut().enumerate() {
        *register = 0x1111_1111_1111_1111u64.wrapping_mul(number as u64 + 1);
    }
    expected[1] = 0x0900_0000;
    machine.modify(|general| {
        general.x = expected;
        general.sp_el0 = 0x5e0;
        general.pstate |= 0xa << 28; // N and C
    })?;
    machine.expect(Exit::Halt)?;
    machine.run()?;
    machine.expect_call()?;
    let found: General = machine.vcpu.get()?;
    ensure_eq!(found.x, expected, "X0 to X30");
    ensure_eq!((found.sp_el0, found.pstate), (0x5e0, 0xa << 28 | 0x3c5), "SP_EL0 and flags");
    ensure_eq!(found, machine.vcpu.general(), "the run page");
    Ok(())
}

fn system() -> CaseResult {
    let code = code!(
        system,
        "mrs x0, tpidr_el1",
        "mrs x1, tpidr_el0",
        "mrs x2, tpidrro_el0",
        "mrs x3, contextidr_el1",
        "mrs x4, far_el1",
        "mrs x5, elr_el1",
        "mrs x6, par_el1",
        "hvc #0",
        "add x0, x0, #1",
        "msr tpidr_el1, x0",
        "msr tpidr_el0, x0",
        "msr mair_el1, x0",
        "msr contextidr_el1, x0",
        "msr far_el1, x0",
        "msr elr_el1, x0",
        "msr tpidrro_el0, x0",
        "msr ttbr0_el1, x0",
        "msr ttbr1_el1, x0",
        "msr cntkctl_el1, xzr",
        "msr cntv_cval_el0, x0",
        "hvc #0"
    );
    let mut machine = Machine::new(code)?;
    let registers = System {
        tpidr_el1: 0x11,
        tpidr_el0: 0x22,
        tpidrro_el0: 0x33,
        contextidr_el1: 0x44,
        far_el1: 0x55,
        elr_el1: 0x66,
        par_el1: 0x1,
        cntv_cval_el0: 0x99,
        ..machine.registers()?
    };
    machine.vcpu.set(&registers)?;
    ensure_eq!(machine.registers()?, registers, "what was set");
    ensure_eq!(machine.expect_call()?, [0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x1], "what the guest has");
    machine.vcpu.reply(0x11);
    machine.expect_call()?;
    let expected = System {
        tpidr_el1: 0x12,
        tpidr_el0: 0x12,
        tpidrro_el0: 0x12,
        mair_el1: 0x12,
        contextidr_el1: 0x12,
        far_el1: 0x12,
        elr_el1: 0x12,
        ttbr0_el1: 0x12,
        ttbr1_el1: 0x12,
        cntv_cval_el0: 0x12,
        ..registers
    };
    ensure_eq!(machine.registers()?, expected, "what the guest leaves");
    Ok(())
}

fn refused() -> CaseResult {
    let mut machine = Machine::new(code!(refused, "hvc #0"))?;
    let before: General = machine.vcpu.get()?;
    // EL2, EL3, AArch32, reserved bits.
    for pstate in [0b1001, 0b1000, 0b1101, 0b1_0000, 0b1_0011, 0b0101 | 1 << 40, 0b0110] {
        let result = machine.vcpu.set(&General { pstate, ..before });
        ensure_eq!(result.err().and_then(|error| error.errno()), Some(Errno::EINVAL), "processor state {pstate:#x}");
    }
    ensure_eq!(machine.vcpu.get::<General>()?, before, "nothing has changed");
    machine.expect_call().map(|_| ())
}

fn stack_pointers() -> CaseResult {
    let code = code!(
        stack_pointers,
        "mov x0, sp",
        "msr spsel, #0",
        "mov x1, sp",
        "add sp, sp, #16",
        "msr spsel, #1",
        "sub sp, sp, #32",
        "hvc #0"
    );
    let mut machine = Machine::new(code)?;
    machine.modify(|general| general.sp_el0 = 0x1230)?;
    let [el1, el0, ..] = machine.expect_call()?;
    ensure_eq!((el1, el0), (STACK, 0x1230), "as set");
    ensure_eq!(machine.vcpu.general().sp_el0, 0x1240, "SP_EL0");
    ensure_eq!(machine.registers()?.sp_el1, STACK - 32, "SP_EL1");
    Ok(())
}

/// Sums of V0 and V31, FPCR and FPSR, again and again; V31 and FPSR change.
fn simd_code() -> &'static [u8] {
    code!(
        simd_code,
        "2: umov x0, v0.d[0]",
        "umov x1, v0.d[1]",
        "umov x2, v31.d[0]",
        "umov x3, v31.d[1]",
        "mrs x4, fpcr",
        "mrs x5, fpsr",
        "hvc #0",
        "add v31.2d, v31.2d, v0.2d",
        "b 2b"
    )
}

/// Values that differ in every register, with flush-to-zero in FPCR and a sticky flag in FPSR.
fn simd_values() -> Fp {
    let mut fp = Fp { fpcr: 1 << 24, fpsr: 1 << 4, ..Fp::default() };
    for (number, half) in fp.v.iter_mut().enumerate() {
        *half = 0x0101_0101_0101_0101u64.wrapping_mul(number as u64 + 3);
    }
    fp
}

fn simd() -> CaseResult {
    let mut machine = Machine::new(simd_code())?;
    let fp = simd_values();
    machine.vcpu.set(&fp)?;
    ensure_eq!(machine.vcpu.get::<Fp>()?, fp, "what was set");
    let call = machine.expect_call()?;
    ensure_eq!(call[..6], [fp.v[0], fp.v[1], fp.v[62], fp.v[63], 1 << 24, 1 << 4], "what the guest has");
    machine.expect_call()?;
    let found: Fp = machine.vcpu.get()?;
    let mut expected = fp;
    expected.v[62] = fp.v[62].wrapping_add(fp.v[0]);
    expected.v[63] = fp.v[63].wrapping_add(fp.v[1]);
    ensure_eq!(found, expected, "what the guest leaves");
    let result = machine.vcpu.set(&Fp { fpcr: 1 << 32, ..fp });
    ensure!(result.is_err(), "reserved bits are refused");
    Ok(())
}

/// Floating point of our own between the guest's windows: neither sees the other's.
fn simd_windows() -> CaseResult {
    let mut machine = Machine::new(simd_code())?;
    let fp = simd_values();
    machine.vcpu.set(&fp)?;
    let (mut own, mut other) = (1.5f64, 1.5f64);
    for round in 0..2000u64 {
        let call = machine.expect_call()?;
        ensure_eq!(call[2], fp.v[62].wrapping_add(fp.v[0].wrapping_mul(round)), "round {round}");
        ensure_eq!((call[0], call[4]), (fp.v[0], 1 << 24), "round {round}");
        own = std::hint::black_box(own * 1.000_1 + 0.25);
        other = std::hint::black_box(other).mul_add(1.0, 0.0) * 1.000_1 + 0.25;
        ensure!(own.to_bits() == other.to_bits(), "round {round}: {own} and {other}");
    }
    Ok(())
}

fn el0() -> CaseResult {
    // EL1 enters EL0 (X9), which calls back.
    let code =
        code!(el0, "adr x9, 2f", "msr elr_el1, x9", "msr spsr_el1, xzr", "eret", "2: mrs x0, tpidrro_el0", "svc #0x21");
    let mut machine = Machine::new(code)?;
    let registers = System { tpidrro_el0: 0x4321, ..machine.registers()? };
    machine.vcpu.set(&registers)?;
    let registers = machine.expect_exception(8)?;
    ensure_eq!(registers.esr_el1, 0x15 << 26 | 1 << 25 | 0x21, "SVC");
    ensure_eq!((registers.elr_el1, registers.spsr_el1 & 15), (CODE + 24, PSTATE_EL0), "where from");
    ensure_eq!(machine.vcpu.general().x[0], 0x4321, "TPIDRRO_EL0");
    // Straight into EL0 by a register set.
    machine.modify(|general| {
        general.pc = CODE + 16;
        general.pstate = PSTATE_EL0;
    })?;
    machine.expect_exception(8).map(|_| ())
}

fn aarch32() -> CaseResult {
    let code = code!(
        aarch32,
        "adr x9, 2f",
        "msr elr_el1, x9",
        "mov x9, #0x1d0",
        "msr spsr_el1, x9",
        "eret",
        "2: .inst 0xef000000", // SVC, in A32
        "b ."
    );
    let mut machine = Machine::new(code)?;
    // A CPU that has AArch32 takes the SVC from there to EL1, and HVC leaves from EL1 in AArch64; one that has not makes the
    // return illegal (PSTATE.IL), which EL1 is told of.
    machine.expect_call()?;
    let pc = machine.vcpu.general().pc;
    let vector = (pc - crate::machine::VECTORS) / 0x80;
    ensure!(vector == 12 || vector == 4, "vector {vector}");
    // What leaves from AArch32 is an exit of its own. Without interrupts from AArch32 this is a kick's.
    if vector == 12 {
        machine.modify(|general| general.pstate = PSTATE_DAIF | 0b0101)?;
    }
    Ok(())
}

fn set_gpr() -> CaseResult {
    let mut machine = Machine::new(code!(set_gpr, "hvc #0", "hvc #1"))?;
    machine.vcpu.set_gpr(3, 0x33)?;
    ensure_eq!(machine.expect_call()?[3], 0x33, "X3");
    let result = machine.vcpu.set_gpr(31, 1);
    ensure_eq!(result.err().and_then(|error| error.errno()), Some(Errno::EINVAL), "X31");
    machine.vcpu.set_gpr(6, 0x66)?;
    machine.vcpu.reply(0x10);
    let call = machine.expect_call()?;
    ensure_eq!((call[0], call[6]), (0x10, 0x66), "X0 and X6");
    Ok(())
}
