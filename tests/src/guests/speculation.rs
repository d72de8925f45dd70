// SPDX-License-Identifier: MIT OR Apache-2.0
//! What guests are told of the CPU's speculation, and SPEC_CTRL, by which they restrict it: each has its own value, and the host
//! keeps its own.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::process::Command;

use crate::harness::{Case, CaseResult, Stop};
use crate::machine::{open, Machine, Mode, CODE, STACK};
use crate::pin::{pin, Allowed, SELF};
use crate::{code, ensure, ensure_eq, table};
use axvcpu_uapi::client::Apic;
use axvcpu_uapi::exit::AxVCpuExitReason::SysRegRead;
use axvcpu_uapi::system::BACKEND_VMX;
use axvcpu_uapi::vcpu::ExitKind;
use axvcpu_uapi::x86::{CpuidEntry, Msr};

pub(super) fn cases() -> Vec<Case> {
    table! {
        "speculation/weaknesses-are-told-and-controls-are-not" => told [differs];
        "speculation/control-is-each-guests-own" => own;
        "speculation/control-once-used-does-not-exit" => without_exits [abi];
    }
}

const SPEC_CTRL: u32 = 0x48;
const ARCH_CAPABILITIES: u32 = 0x10a;

/// CPUID 7, EDX: SPEC_CTRL with IBRS.
const IBRS: u32 = 1 << 26;
/// CPUID 7, EDX: ARCH_CAPABILITIES.
const HAS_ARCH_CAPABILITIES: u32 = 1 << 29;

/// EDX of leaf 7.
fn leaf_7(table: &mut [CpuidEntry]) -> Option<&mut u32> {
    table.iter_mut().find(|entry| (entry.function, entry.index) == (7, 0)).map(|entry| &mut entry.edx)
}

/// An MSR of the host's CPU `cpu`, if the kernel's module `msr` can be had.
fn host_msr(cpu: usize, index: u32) -> Option<u64> {
    let path = format!("/dev/cpu/{cpu}/msr");
    let file = File::open(&path).or_else(|_| {
        Command::new("modprobe").arg("msr").status()?;
        File::open(&path)
    });
    let mut value = [0; 8];
    match file.and_then(|file| file.read_exact_at(&mut value, index.into())) {
        Ok(()) => Some(u64::from_le_bytes(value)),
        Err(error) => {
            println!("# the host's MSR {index:#x} is not looked at: {path}: {error}");
            None
        }
    }
}

/// Reads the MSR to R9 and R8, then writes it. A fault is told on port 0x82.
fn asker() -> &'static [u8] {
    code!(
        asker,
        64,
        "mov ecx, 0x10a",
        "rdmsr",
        "mov r8, rax",
        "mov r9, rdx",
        "out 0x80, al",
        "wrmsr",
        "hlt",
        ".org 77b + 0x100",
        "out 0x82, al",
        "hlt",
    )
}

/// A guest that reads ARCH_CAPABILITIES, without these bits of leaf 7.
fn asking(without: u32) -> Result<Machine, Stop> {
    let system = open()?;
    let mut table = system.supported_cpuid()?;
    if let Some(edx) = leaf_7(&mut table) {
        *edx &= !without;
    }
    let m = Machine::build(system, Mode::Long, asker(), Apic::None, &table)?;
    m.vector(13, CODE + 0x100)?;
    Ok(m)
}

/// What the guest reads; it cannot write.
fn answer(m: &mut Machine) -> Result<u64, Stop> {
    m.expect_mark(0x80)?;
    let gpr = m.vcpu.general().gpr;
    let value = gpr[8] | gpr[9] << 32;
    ensure_eq!(m.vcpu.msrs(&[ARCH_CAPABILITIES])?[0].value, value, "ARCH_CAPABILITIES as the program reads it");
    m.expect_mark(0x82)?;
    ensure_eq!(m.read_u64(STACK - 48)?, 0, "error code of the fault");
    m.expect_halt()?;
    Ok(value)
}

fn told() -> CaseResult {
    // Bits that say that another MSR or control exists, or that are for hypervisors (SDM vol. 4, IA32_ARCH_CAPABILITIES).
    const CONTROLS: [u32; 14] = [3, 7, 9, 10, 11, 12, 16, 18, 21, 22, 23, 25, 29, 30];
    const IBRS_ALL: u64 = 2;
    let mut m = asking(HAS_ARCH_CAPABILITIES)?;
    m.expect(SysRegRead { addr: ARCH_CAPABILITIES.into(), reg: 0 })?;
    let mut table = m.system.supported_cpuid()?;
    if leaf_7(&mut table).is_none_or(|edx| *edx & HAS_ARCH_CAPABILITIES == 0) {
        return Err(Stop::Skip("this CPU has no ARCH_CAPABILITIES".into()));
    }
    let value = answer(&mut asking(0)?)?;
    for bit in CONTROLS {
        ensure!(value >> bit & 1 == 0, "ARCH_CAPABILITIES is {value:#x}, with bit {bit}");
    }
    if let Some(host) = Allowed::now()?.cpus.first().and_then(|&cpu| host_msr(cpu, ARCH_CAPABILITIES)) {
        ensure_eq!(value & !host, 0, "bits that the host does not have: it has {host:#x}");
        ensure_eq!(value & 3, host & 3, "RDCL_NO and IBRS_ALL");
    }
    ensure_eq!(answer(&mut asking(IBRS)?)?, value & !IBRS_ALL, "ARCH_CAPABILITIES of a guest without SPEC_CTRL");
    Ok(())
}

/// Writes what port 0x10 gives to SPEC_CTRL, tells so on port 0x80, and what it reads then on port 0x11; for ever.
fn user() -> &'static [u8] {
    code!(
        user,
        64,
        "mov ecx, 0x48",
        "2: in eax, 0x10",
        "xor edx, edx",
        "wrmsr",
        "out 0x80, al",
        "rdmsr",
        "out 0x11, eax",
        "jmp 2b",
    )
}

/// Values of SPEC_CTRL that guests may have, each unlike the one before.
fn values(m: &Machine) -> Result<Vec<u64>, Stop> {
    let table = m.system.supported_cpuid()?;
    let has = |function, register: fn(&CpuidEntry) -> u32, bit: u32| {
        table.iter().any(|e| (e.function, e.index) == (function, 0) && register(e) >> bit & 1 != 0)
    };
    // IBRS, STIBP and SSBD, as Intel and as AMD tell them.
    let bits: Vec<_> = [(0, 26, 14), (1, 27, 15), (2, 31, 24)]
        .into_iter()
        .filter(|&(_, intel, amd)| has(7, |e| e.edx, intel) || has(0x8000_0008, |e| e.ebx, amd))
        .map(|(bit, ..)| 1u64 << bit)
        .collect();
    let (Some(first), Some(last)) = (bits.first(), bits.last()) else {
        return Err(Stop::Skip("this CPU has no SPEC_CTRL".into()));
    };
    Ok(vec![*first, 0, bits.iter().sum(), 0, *last, 0])
}

fn own() -> CaseResult {
    let mut a = Machine::new(Mode::Long, user())?;
    let mut b = Machine::new(Mode::Long, user())?;
    let values = values(&a)?;
    let allowed = Allowed::now()?;
    let cpu = allowed.cpus[0];
    pin(SELF, cpu)?;
    let before = host_msr(cpu, SPEC_CTRL);
    let value_of = |m: &Machine| -> Result<u64, Stop> { Ok(m.vcpu.msrs(&[SPEC_CTRL])?[0].value) };
    for round in 0..4 {
        for (i, &mine) in values.iter().enumerate() {
            let others = values[(i + 1) % values.len()];
            for (m, value) in [(&mut a, mine), (&mut b, others)] {
                m.feed_word(0x10, value as u32)?;
                m.expect_mark(0x80)?;
                ensure_eq!(value_of(m)?, value, "round {round}: SPEC_CTRL as the program reads it");
                ensure_eq!(
                    host_msr(cpu, SPEC_CTRL),
                    before,
                    "round {round}: the host's, with {value:#x} for the guest"
                );
            }
            // What the program sets counts as much as what the guest does.
            let set = if round % 2 == 1 { others } else { mine };
            a.vcpu.set_msrs(&[Msr { index: SPEC_CTRL, value: set, reserved: 0 }])?;
            ensure_eq!(a.expect_word(0x11)?, set, "round {round}: SPEC_CTRL of the first guest");
            ensure_eq!(b.expect_word(0x11)?, others, "round {round}: SPEC_CTRL of the second guest");
        }
    }
    Ok(())
}

fn without_exits() -> CaseResult {
    const COUNT: u64 = 100;
    let mut m = Machine::new(Mode::Long, user())?;
    let values = values(&m)?;
    let exits = |m: &Machine, kind| -> Result<u64, Stop> { Ok(m.vcpu.stats()?.exits[kind as usize]) };
    let round = |m: &mut Machine, value: u64| -> CaseResult {
        m.feed_word(0x10, value as u32)?;
        m.expect_mark(0x80)?;
        ensure_eq!(m.expect_word(0x11)?, value, "SPEC_CTRL as the guest reads it");
        Ok(())
    };
    // Zero is what it has; as long as nothing else is written, it stays with the kernel.
    for _ in 0..3 {
        round(&mut m, 0)?;
    }
    ensure_eq!(
        (exits(&m, ExitKind::MsrWrite)?, exits(&m, ExitKind::MsrRead)?),
        (3, 3),
        "exits of a guest without use for it"
    );
    round(&mut m, values[0])?;
    round(&mut m, 0)?;
    let before = (exits(&m, ExitKind::MsrWrite)?, exits(&m, ExitKind::MsrRead)?);
    for i in 0..COUNT {
        round(&mut m, values[i as usize % values.len()])?;
    }
    let after = (exits(&m, ExitKind::MsrWrite)?, exits(&m, ExitKind::MsrRead)?);
    let expected = if m.system.info()?.backend == BACKEND_VMX { 0 } else { COUNT };
    ensure_eq!((after.0 - before.0, after.1 - before.1), (expected, expected), "exits at writes and reads");
    Ok(())
}
