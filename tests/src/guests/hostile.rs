// SPDX-License-Identifier: MIT OR Apache-2.0
//! Guests that execute noise: random bytes, mixed with instructions that reach for the machine, from random registers, in
//! every mode, with answers, events and kicks at random. Nothing is expected of the guest. The module must give an
//! exit for everything, the vCPU must stay usable, and the host unharmed.

use crate::flaws;
use crate::harness::{self, Case, CaseResult, Stop};
use crate::machine::{Machine, Mode, CODE, DATA, GDT, HOLE};
use crate::random::{seed, Random};
use crate::{code, ensure, table};
use axvcpu_uapi::client::{Apic, Error};
use axvcpu_uapi::exit::AxVCpuExitReason as Reason;
use axvcpu_uapi::vcpu::{Event, EVENT_EXCEPTION, EVENT_EXTERNAL_INTERRUPT, EVENT_NMI, EVENT_SOFTWARE_INTERRUPT};
use axvcpu_uapi::x86::{Control, Debug, Segments};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

pub(super) fn cases() -> Vec<Case> {
    table! {
        "hostile/real-mode" => real [abi], in 60;
        "hostile/protected-mode" => protected [abi], in 60;
        "hostile/long-mode" => long [abi], in 60;
        "hostile/with-an-interrupt-controller" => apic [abi], in 60;
        "hostile/with-random-state" => state [abi], in 60;
    }
}

/// Guests per case.
const GUESTS: usize = 60;
/// Exits per guest, at most.
const EXITS: usize = 400;
/// Time between kicks. A guest that loops is left alone after four: millions of instructions on a CPU, and an emulator
/// has to execute them all.
const KICKS: Duration = Duration::from_millis(1);

/// Instructions that reach for the machine.
const REACHING: &[&[u8]] = &[
    &[0x0f, 0xa2],             // CPUID
    &[0x0f, 0x32],             // RDMSR
    &[0x0f, 0x30],             // WRMSR
    &[0x0f, 0x31],             // RDTSC
    &[0x0f, 0x01, 0xf9],       // RDTSCP
    &[0x0f, 0x33],             // RDPMC
    &[0x0f, 0x01, 0xd1],       // XSETBV
    &[0x0f, 0x01, 0xd0],       // XGETBV
    &[0x0f, 0x01, 0xd8],       // VMRUN
    &[0x0f, 0x01, 0xd9],       // VMMCALL
    &[0x0f, 0x01, 0xda],       // VMLOAD
    &[0x0f, 0x01, 0xdb],       // VMSAVE
    &[0x0f, 0x01, 0xdc],       // STGI
    &[0x0f, 0x01, 0xdd],       // CLGI
    &[0x0f, 0x01, 0xde],       // SKINIT
    &[0x0f, 0x01, 0xdf],       // INVLPGA
    &[0x0f, 0x01, 0xc1],       // VMCALL
    &[0x0f, 0x01, 0xc8],       // MONITOR
    &[0x0f, 0x01, 0xc9],       // MWAIT
    &[0x0f, 0x01, 0xf8],       // SWAPGS
    &[0x0f, 0x05],             // SYSCALL
    &[0x0f, 0x07],             // SYSRET
    &[0x0f, 0x34],             // SYSENTER
    &[0x0f, 0x35],             // SYSEXIT
    &[0x0f, 0x08],             // INVD
    &[0x0f, 0x09],             // WBINVD
    &[0x0f, 0x06],             // CLTS
    &[0x0f, 0x22, 0xc0],       // MOV CR0, RAX
    &[0x0f, 0x22, 0xd8],       // MOV CR3, RAX
    &[0x0f, 0x22, 0xe0],       // MOV CR4, RAX
    &[0x44, 0x0f, 0x22, 0xc0], // MOV CR8, RAX
    &[0x0f, 0x20, 0xc0],       // MOV RAX, CR0
    &[0x0f, 0x23, 0xc0],       // MOV DR0, RAX
    &[0x0f, 0x23, 0xf8],       // MOV DR7, RAX
    &[0x0f, 0x21, 0xf0],       // MOV RAX, DR6
    &[0x0f, 0x01, 0xf0],       // LMSW AX
    &[0x0f, 0x01, 0x15],       // LGDT
    &[0x0f, 0x01, 0x1d],       // LIDT
    &[0x0f, 0x00, 0xd0],       // LLDT AX
    &[0x0f, 0x00, 0xd8],       // LTR AX
    &[0x0f, 0xaa],             // RSM
    &[0x0f, 0x0b],             // UD2
    &[0xf4],                   // HLT
    &[0xfa],                   // CLI
    &[0xfb],                   // STI
    &[0xcf],                   // IRET
    &[0x48, 0xcf],             // IRETQ
    &[0x9d],                   // POPF
    &[0x8e, 0xd0],             // MOV SS, AX
    &[0xcc],                   // INT3
    &[0xcd, 0x08],             // INT 8
    &[0xe6, 0x80],             // OUT
    &[0xe4, 0x80],             // IN
    &[0xf3, 0x6e],             // REP OUTSB
    &[0xf3, 0x6c],             // REP INSB
    &[0xf3, 0x90],             // PAUSE
    &[0x0f, 0xae, 0x28],       // XRSTOR
    &[0x0f, 0xc7, 0x18],       // XRSTORS
    &[0x0f, 0xae, 0x20],       // XSAVE
    &[0xdb, 0xe3],             // FNINIT
    &[0xf3, 0xab],             // REP STOS
    &[0xeb, 0xfe],             // JMP to itself
];

/// MOV AX, 0x20; LTR AX: protected mode starts with it. QEMU's emulated CPU (10.0) gives up at a change of privilege with a
/// busy TSS in TR, as the architecture has it there; after an LTR it has an available one.
const LOAD_TASK_REGISTER: &[u8] = &[0x66, 0xb8, 0x20, 0x00, 0x0f, 0x00, 0xd8];
/// Type byte of the descriptor of a TSS that is not busy.
const AVAILABLE_TSS: u8 = 0x89;

/// MSRs to reach for, and numbers around them.
const MSRS: &[u64] = &[
    0x10,
    0x1b,
    0x48,
    0x49,
    0x8b,
    0x174,
    0x1a0,
    0x1d9,
    0x277,
    0x2ff,
    0x6e0,
    0x800,
    0x830,
    0xda0,
    0x4b56_4d01,
    0xc000_0080,
    0xc000_0082,
    0xc000_0100,
    0xc000_0103,
    0xc001_0015,
    0xc001_0114,
    0xc001_0117,
];

/// A value that means something, or none.
fn value(random: &mut Random) -> u64 {
    match random.below(8) {
        0 => random.word(),
        1 => random.below(16) as u64,
        2 => 1 << random.below(64),
        3 => CODE + random.below(4096) as u64,
        4 => DATA + random.below(0x1000) as u64,
        5 => HOLE + random.below(0x100) as u64,
        6 => random.pick(MSRS) + random.below(2) as u64,
        _ => random.word() as u32 as u64,
    }
}

/// A page of code.
fn noise(random: &mut Random) -> Vec<u8> {
    let mut bytes = Vec::new();
    while bytes.len() < 4000 {
        match random.below(3) {
            0 => bytes.extend((0..1 + random.below(8)).map(|_| random.word() as u8)),
            1 => bytes.extend(random.pick(REACHING)),
            _ => {
                // MOV of a random value to a random register, so that what follows has something to work with.
                bytes.push(0xb8 + random.below(8) as u8);
                bytes.extend((value(random) as u32).to_le_bytes());
            }
        }
    }
    bytes
}

/// Runs one guest until it has had enough exits, or nothing but a kick ends its runs.
fn one(random: &mut Random, mode: Mode, apic: Apic, scramble: bool) -> CaseResult {
    let mut code = noise(random);
    if mode == Mode::Protected {
        code.splice(..0, LOAD_TASK_REGISTER.iter().copied());
    }
    let mut m = Machine::with(mode, &code, apic)?;
    m.write(GDT + 0x25, &[AVAILABLE_TSS])?;
    // Tables and stack hold noise too, or handlers that are noise.
    for vector in 0..=255 {
        if random.below(4) != 0 {
            m.vector(vector, CODE + random.below(4000) as u64)?;
        }
    }
    m.modify(|general| {
        for register in general.gpr.iter_mut() {
            if random.below(2) == 0 {
                *register = value(random);
            }
        }
    })?;
    if scramble {
        scramble_state(&mut m, random);
    }
    let done = AtomicBool::new(false);
    let kicker = m.vcpu.kicker();
    thread::scope(|scope| -> CaseResult {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                thread::sleep(KICKS);
                let _ = kicker.kick();
            }
        });
        let result = turns(&mut m, random);
        done.store(true, Ordering::Relaxed);
        result
    })
}

/// Sets what the module lets through.
fn scramble_state(m: &mut Machine, random: &mut Random) {
    for _ in 0..20 {
        if let Ok(mut control) = m.vcpu.get::<Control>() {
            let field = random.pick(&[0, 1, 2, 3, 4, 5]);
            let bit = 1 << random.below(if field == 5 { 16 } else { 34 });
            match field {
                0 => control.cr0 ^= bit,
                1 => control.cr3 ^= bit,
                2 => control.cr4 ^= bit,
                3 => control.efer ^= bit,
                4 => control.xcr0 ^= bit,
                _ => control.cr8 = bit & 15,
            }
            let _ = m.vcpu.set(&control);
        }
        if let Ok(mut segments) = m.vcpu.get::<Segments>() {
            let bits = value(random);
            // Not TR, for the reason above.
            let segment = match random.below(5) {
                0 => &mut segments.cs,
                1 => &mut segments.ss,
                2 => &mut segments.ds,
                3 => &mut segments.ldtr,
                _ => &mut segments.gs,
            };
            match random.below(3) {
                0 => segment.attributes ^= 1 << random.below(12),
                1 => segment.base = bits,
                _ => segment.limit = bits as u32,
            }
            let _ = m.vcpu.set(&segments);
        }
        let debug = Debug { dr: [value(random), value(random), 0, 0], dr6: value(random), dr7: value(random) & 0xffff };
        let _ = m.vcpu.set(&debug);
    }
}

fn turns(m: &mut Machine, random: &mut Random) -> CaseResult {
    let mut idle = 0;
    for _ in 0..EXITS {
        harness::check_time()?;
        if random.below(16) == 0 {
            let kind = random.pick(&[EVENT_EXTERNAL_INTERRUPT, EVENT_NMI, EVENT_EXCEPTION, EVENT_SOFTWARE_INTERRUPT]);
            let _ = m.vcpu.inject(&Event { kind, vector: random.below(64) as u32, ..Event::default() });
        }
        m.vcpu.request_interrupt_window(random.below(8) == 0);
        let exit = match m.vcpu.run() {
            Ok(exit) => exit,
            // Registers that a reply or a change of modes left inconsistent are refused, and that is all.
            Err(Error::Run(errno)) if errno as i32 == 22 => {
                m.modify(|general| general.rip = CODE)?;
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        match exit.reason {
            Reason::Interrupted => {
                idle += 1;
                if idle > 3 {
                    return Ok(());
                }
            }
            // Nobody emulates here: on to somewhere else.
            Reason::NestedPageFault { .. }
            | Reason::IoString { .. }
            | Reason::TaskSwitch { .. }
            | Reason::UnsupportedInstruction { .. } => {
                let rip = if random.below(2) == 0 { CODE + random.below(4000) as u64 } else { CODE };
                m.vcpu.modify_general(|general| general.rip = rip);
            }
            Reason::SysRegRead { .. } | Reason::SysRegWrite { .. } if random.below(2) == 0 => m.vcpu.reply_fault(),
            Reason::SysRegRead { .. } | Reason::IoRead { .. } | Reason::Hypercall { .. } => {
                m.vcpu.reply(value(random));
            }
            Reason::TripleFault | Reason::FailEntry { .. } | Reason::InvalidGuestState { .. } => return Ok(()),
            Reason::MachineCheck => return Err(Stop::Fail("a machine check".into())),
            Reason::Unknown { code, info1, info2 } => {
                return Err(Stop::Fail(format!("an exit that nobody understands: {code:#x} {info1:#x} {info2:#x}")));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Where the CPU itself is no match for such guests there is nothing to learn.
fn survives() -> CaseResult {
    flaws::ASSERTS.skip()
}

fn guests(mode: Mode, apic: Apic) -> CaseResult {
    survives()?;
    let mut random = Random::new(seed()?);
    for _ in 0..GUESTS {
        one(&mut random, mode, apic, false)?;
    }
    // The host is as it was: an ordinary guest runs.
    let mut m = Machine::new(Mode::Long, code!(ordinary, 64, "mov al, 0x5a", "out 0x80, al", "hlt"))?;
    ensure!(m.expect_mark(0x80)?.0 == 0x5a, "an ordinary guest afterwards");
    m.expect_halt()
}

fn real() -> CaseResult {
    guests(Mode::Real, Apic::None)
}

fn protected() -> CaseResult {
    guests(Mode::Protected, Apic::None)
}

fn long() -> CaseResult {
    guests(Mode::Long, Apic::None)
}

fn apic() -> CaseResult {
    guests(Mode::Long, Apic::InKernel)
}

fn state() -> CaseResult {
    survives()?;
    let mut random = Random::new(seed()?);
    for mode in [Mode::Real, Mode::Protected, Mode::Long] {
        for _ in 0..GUESTS / 3 {
            one(&mut random, mode, Apic::None, true)?;
        }
    }
    Ok(())
}
