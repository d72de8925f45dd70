// SPDX-License-Identifier: MIT OR Apache-2.0
//! FPU, SSE and AVX registers: the guest's survive exits, preemption and the host's use of the FPU, and the host's
//! survive the guest.

use crate::harness::{Case, CaseResult, Stop};
use crate::hypervisor::Vcpu;
use crate::machine::{Machine, Mode, CR4_OSXSAVE, DATA};
use crate::{code, ensure, ensure_eq, table};
use axvcpu_uapi::x86::Control;
use std::arch::asm;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

pub(super) fn cases() -> Vec<Case> {
    table! {
        "fpu/sse-over-exits-with-host-use-between" => sse;
        "fpu/avx-over-exits-with-host-use-between" => avx;
        "fpu/x87-over-exits" => x87;
        "fpu/over-preemption" => preemption [abi];
        "fpu/host-registers-survive-the-guest" => host [abi];
        "fpu/two-guests-keep-apart" => two;
    }
}

/// Overwrites every vector register of this thread, and the x87 stack.
fn clobber() {
    // SAFETY: the asm statement declares the registers that it changes and touches no memory; FNINIT empties the x87
    // stack, as the ABI wants it.
    unsafe {
        asm!(
            "pcmpeqd xmm0, xmm0", "movaps xmm1, xmm0", "movaps xmm2, xmm0", "movaps xmm3, xmm0", "movaps xmm4, xmm0",
            "movaps xmm5, xmm0", "movaps xmm6, xmm0", "movaps xmm7, xmm0", "movaps xmm8, xmm0", "movaps xmm9, xmm0",
            "movaps xmm10, xmm0", "movaps xmm11, xmm0", "movaps xmm12, xmm0", "movaps xmm13, xmm0", "movaps xmm14, xmm0",
            "movaps xmm15, xmm0", "fldpi", "fninit",
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _, out("xmm6") _,
            out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _, out("xmm12") _, out("xmm13") _,
            out("xmm14") _, out("xmm15") _, out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _, out("st(4)") _,
            out("st(5)") _, out("st(6)") _, out("st(7)") _, options(nomem, nostack),
        );
    }
}

/// Fills DATA with bytes that differ from line to line.
fn fill(m: &Machine, size: u64) -> CaseResult {
    for i in 0..size / 8 {
        m.write_u64(DATA + 8 * i, 0x0123_4567_89ab_cdef_u64.wrapping_mul(2 * i + 1))?;
    }
    Ok(())
}

fn sse() -> CaseResult {
    let code = code!(
        sse,
        64,
        "mov edi, 0x20000",
        "movups xmm0, [rdi]",
        "movups xmm1, [rdi + 16]",
        "movups xmm7, [rdi + 0x70]",
        "movups xmm8, [rdi + 0x80]",
        "movups xmm15, [rdi + 0xf0]",
        "ldmxcsr [rdi + 0x800]",
        "out 0x80, al",
        "out 0x80, al",
        "mov eax, 0",
        "cpuid",
        "out 0x80, al",
        "movups [rdi + 0x1000], xmm0",
        "movups [rdi + 0x1010], xmm1",
        "movups [rdi + 0x1070], xmm7",
        "movups [rdi + 0x1080], xmm8",
        "movups [rdi + 0x10f0], xmm15",
        "stmxcsr [rdi + 0x1800]",
        "hlt",
    );
    let mut m = Machine::new(Mode::Long, code)?;
    fill(&m, 0x100)?;
    m.write(DATA + 0x800, &0x7f80u32.to_le_bytes())?;
    for _ in 0..3 {
        m.expect_mark(0x80)?;
        clobber();
        thread::yield_now();
    }
    m.expect_halt()?;
    for offset in [0, 16, 0x70, 0x80, 0xf0] {
        ensure_eq!(m.read::<16>(DATA + 0x1000 + offset)?, m.read::<16>(DATA + offset)?, "XMM{}", offset / 16);
    }
    ensure_eq!(m.read::<4>(DATA + 0x1800)?, 0x7f80u32.to_le_bytes(), "MXCSR");
    Ok(())
}

fn avx() -> CaseResult {
    let code = code!(
        avx,
        64,
        "mov edi, 0x20000",
        "xor ecx, ecx",
        "xor edx, edx",
        "mov eax, 7",
        "xsetbv",
        "vmovups ymm0, [rdi]",
        "vmovups ymm9, [rdi + 0x20]",
        "vmovups ymm15, [rdi + 0x40]",
        "out 0x80, al",
        "out 0x80, al",
        "vmovups [rdi + 0x1000], ymm0",
        "vmovups [rdi + 0x1020], ymm9",
        "vmovups [rdi + 0x1040], ymm15",
        "hlt",
    );
    let mut m = Machine::new(Mode::Long, code)?;
    if m.system.xcr0_supported()? & 4 == 0 {
        return Err(Stop::Skip("this CPU has no AVX".into()));
    }
    let mut control: Control = m.vcpu.get()?;
    control.cr4 |= CR4_OSXSAVE;
    m.vcpu.set(&control)?;
    fill(&m, 0x60)?;
    for _ in 0..2 {
        m.expect_mark(0x80)?;
        clobber();
        // SAFETY: VZEROALL changes the vector registers, all declared, and nothing else; the guest has AVX, so the host
        // has.
        unsafe {
            asm!("vzeroall", out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _,
                out("xmm6") _, out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _, out("xmm12") _,
                out("xmm13") _, out("xmm14") _, out("xmm15") _, options(nomem, nostack));
        }
    }
    m.expect_halt()?;
    for offset in [0, 0x20, 0x40] {
        ensure_eq!(m.read::<32>(DATA + 0x1000 + offset)?, m.read::<32>(DATA + offset)?, "vector at {offset:#x}");
    }
    ensure_eq!(m.vcpu.get::<Control>()?.xcr0, 7, "XCR0");
    Ok(())
}

fn x87() -> CaseResult {
    let code = code!(
        x87,
        64,
        "mov edi, 0x20000",
        "fninit",
        "fldcw [rdi]",
        "fldpi",
        "fld1",
        "out 0x80, al",
        "faddp",
        "out 0x80, al",
        "fstp qword ptr [rdi + 8]",
        "fnstcw [rdi + 2]",
        "fnstsw ax",
        "hlt",
    );
    let mut m = Machine::new(Mode::Long, code)?;
    m.write(DATA, &0x0e7fu16.to_le_bytes())?;
    for _ in 0..2 {
        m.expect_mark(0x80)?;
        clobber();
    }
    m.expect_halt()?;
    // Rounded towards zero, as the control word says.
    let sum = f64::from_bits(m.read_u64(DATA + 8)?);
    let error = (sum - (std::f64::consts::PI + 1.0)).abs();
    ensure_eq!(error < 1e-12, true, "whether pi + 1 is {sum}");
    ensure_eq!(m.read::<2>(DATA + 2)?, 0x0e7fu16.to_le_bytes(), "control word");
    ensure_eq!((m.vcpu.general().gpr[0] >> 11) & 7, 0, "top of the stack");
    Ok(())
}

/// A guest that compares its registers for a while without any exit of its own, beside threads that use the FPU on
/// every CPU.
fn preemption() -> CaseResult {
    let code = code!(
        preemption,
        64,
        "mov edi, 0x20000",
        "movups xmm3, [rdi]",
        "movups xmm12, [rdi + 16]",
        "movups xmm4, xmm3",
        "mov ecx, [rdi + 0x100]",
        "2: movups xmm5, xmm3",
        "pxor xmm5, [rdi]",
        "ptest xmm5, xmm5",
        "jnz 3f",
        "movups xmm5, xmm12",
        "pxor xmm5, [rdi + 16]",
        "ptest xmm5, xmm5",
        "jnz 3f",
        "dec ecx",
        "jnz 2b",
        "out 0x80, al",
        "3: out 0x81, al",
    );
    let mut m = Machine::new(Mode::Long, code)?;
    fill(&m, 0x20)?;
    m.write_u64(DATA + 0x100, 3_000_000)?;
    let stop = AtomicBool::new(false);
    let cpus = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        for _ in 0..=cpus {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    clobber();
                }
            });
        }
        let result = m.expect_mark(0x80);
        stop.store(true, Ordering::Relaxed);
        result
    })?;
    let stats = m.vcpu.stats()?;
    ensure!(stats.windows > 1, "the guest was never preempted: {} window", stats.windows);
    Ok(())
}

/// Loads known values into the vector registers, makes the system call, and looks at what is left of them. Registers
/// that the system call may change are not compared: it may change none.
fn run_with_registers(vcpu: &Vcpu, pattern: &[[u8; 16]; 4]) -> Result<[[u8; 16]; 4], Stop> {
    let mut after = [[0; 16]; 4];
    let mut result: i64 = nix::libc::SYS_ioctl;
    let fd = i64::from(vcpu.as_fd().as_raw_fd());
    // SAFETY: RUN takes no argument and writes no memory of this process but the run page. The statement reads
    // `pattern` and writes `after`, 64 bytes each, and declares every register that it or SYSCALL changes.
    unsafe {
        asm!(
            "movups xmm0, [{pattern}]", "movups xmm6, [{pattern} + 16]", "movups xmm11, [{pattern} + 32]",
            "movups xmm15, [{pattern} + 48]", "syscall", "movups [{after}], xmm0", "movups [{after} + 16], xmm6",
            "movups [{after} + 32], xmm11", "movups [{after} + 48], xmm15",
            pattern = in(reg) pattern, after = in(reg) &mut after, inlateout("rax") result, in("rdi") fd,
            in("rsi") i64::from(axvcpu_uapi::ioctl::RUN), in("rdx") 0, out("rcx") _, out("r11") _, out("xmm0") _,
            out("xmm6") _, out("xmm11") _, out("xmm15") _,
        );
    }
    ensure_eq!(result, 0, "result of RUN");
    Ok(after)
}

fn host() -> CaseResult {
    let code = code!(
        host,
        64,
        "2: pcmpeqd xmm0, xmm0",
        "movaps xmm6, xmm0",
        "movaps xmm11, xmm0",
        "movaps xmm15, xmm0",
        "ldmxcsr [0x20000]",
        "out 0x80, al",
        "jmp 2b",
    );
    let m = Machine::new(Mode::Long, code)?;
    m.write(DATA, &0x7f80u32.to_le_bytes())?;
    let pattern = [[0x11; 16], [0x66; 16], [0xbb; 16], [0xff; 16]];
    for _ in 0..100 {
        ensure_eq!(run_with_registers(&m.vcpu, &pattern)?, pattern, "vector registers of the host");
    }
    let mut mxcsr = 0u32;
    // SAFETY: STMXCSR stores 4 bytes at the address of `mxcsr`.
    unsafe { asm!("stmxcsr [{}]", in(reg) &mut mxcsr, options(nostack)) };
    ensure_eq!(mxcsr & 0xffc0, 0x1f80, "MXCSR of the host, without its sticky flags");
    Ok(())
}

/// Two guests on one thread in turns, each with registers of its own.
fn two() -> CaseResult {
    let code = code!(
        two,
        64,
        "mov edi, 0x20000",
        "movups xmm2, [rdi]",
        "2: out 0x80, al",
        "movups [rdi + 16], xmm2",
        "mov rax, [rdi + 16]",
        "jmp 2b",
    );
    let mut guests = Vec::new();
    for i in 0..2u64 {
        let m = Machine::new(Mode::Long, code)?;
        m.write_u64(DATA, 0x1111_1111_1111_1111 * (i + 1))?;
        guests.push(m);
    }
    for round in 0..4 {
        for (i, m) in (1..).zip(&mut guests) {
            m.expect_mark(0x80)?;
            if round > 0 {
                ensure_eq!(m.read_u64(DATA + 16)?, 0x1111_1111_1111_1111 * i, "register of guest {i}");
            }
        }
    }
    Ok(())
}
