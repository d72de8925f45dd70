// SPDX-License-Identifier: MIT OR Apache-2.0
//! The host's state: what a process had in the CPU's registers before its guest ran is there afterwards. What the kernel
//! itself could not live without (SP_EL0, VBAR_EL2, HCR_EL2, TPIDR_EL0) every case needs.

use crate::harness::{self, Case, CaseResult, Stop};
use crate::machine::Machine;
use crate::pin::{pin, Allowed, SELF};
use crate::{code, ensure, ensure_eq, table};
use axvcpu_uapi::ioctl;
use nix::libc;
use std::arch::{asm, is_aarch64_feature_detected};
use std::fs;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

/// The cases.
pub(super) fn cases() -> Vec<Case> {
    table! {
        "host/thread-registers" => thread_registers;
        "host/floating-point-of-the-thread" => own_floating_point;
        "host/watchpoints" => watchpoints;
        "host/cycle-counter-of-the-program" => cycle_counter;
        "host/floating-point-of-another-thread" => floating_point, in 60;
        "host/sve-of-another-thread" => sve, in 60;
        "host/pointer-authentication" => pointer_authentication;
    }
}

/// A guest that leaves something else in every register that it can reach, and calls.
fn trespasser() -> &'static [u8] {
    code!(
        trespasser,
        "mov x9, #-1",
        "2: msr tpidr_el0, x9",
        "msr tpidrro_el0, x9",
        "msr tpidr_el1, x9",
        "msr contextidr_el1, x9",
        "msr mdscr_el1, xzr",
        "msr cntkctl_el1, xzr",
        "msr fpcr, xzr",
        "dup v0.2d, x9",
        "dup v7.2d, x9",
        "dup v31.2d, x9",
        "hvc #0",
        "b 2b"
    )
}

fn thread_registers() -> CaseResult {
    fn read() -> [u64; 3] {
        let (own, read_only, control);
        // SAFETY: the registers may be read at EL0.
        unsafe {
            asm!("mrs {}, tpidr_el0", "mrs {}, tpidrro_el0", "mrs {}, fpcr", out(reg) own, out(reg) read_only, out(reg) control);
        }
        [own, read_only, control]
    }
    let mut m = Machine::new(trespasser())?;
    let before = read();
    for round in 0..50 {
        m.expect_call()?;
        ensure_eq!(read(), before, "TPIDR_EL0, TPIDRRO_EL0 and FPCR in round {round}");
    }
    Ok(())
}

/// `RUN`, as a system call: with `mark` and more in the vector registers and FPCR rounding down. Whether all are the same behind it.
fn run_with_registers(m: &Machine, mark: u64) -> Result<bool, Stop> {
    const ROUND_DOWN: u64 = 2 << 22;
    let mut result = i64::from(m.vcpu.as_fd().as_raw_fd());
    let wrong: u64;
    // SAFETY: RUN takes no argument and writes no memory of this process but the run page. The statement declares every register
    // that it changes, and FPCR is what it was.
    unsafe {
        asm!(
            "mrs {own}, fpcr",
            "msr fpcr, {down}",
            ".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31",
            "add {value}, {mark}, #\\n",
            "dup v\\n\\().2d, {value}",
            ".endr",
            "svc #0",
            "mrs {wrong}, fpcr",
            "eor {wrong}, {wrong}, {down}",
            "msr fpcr, {own}",
            ".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31",
            "umov {value}, v\\n\\().d[0]",
            "sub {value}, {value}, {mark}",
            "sub {value}, {value}, #\\n",
            "orr {wrong}, {wrong}, {value}",
            "umov {value}, v\\n\\().d[1]",
            "sub {value}, {value}, {mark}",
            "sub {value}, {value}, #\\n",
            "orr {wrong}, {wrong}, {value}",
            ".endr",
            own = out(reg) _,
            down = in(reg) ROUND_DOWN,
            mark = in(reg) mark,
            value = out(reg) _,
            wrong = out(reg) wrong,
            inlateout("x0") result,
            in("x1") u64::from(ioctl::RUN),
            in("x2") 0u64,
            in("x8") libc::SYS_ioctl,
            out("v0") _, out("v1") _, out("v2") _, out("v3") _, out("v4") _, out("v5") _, out("v6") _, out("v7") _,
            out("v8") _, out("v9") _, out("v10") _, out("v11") _, out("v12") _, out("v13") _, out("v14") _, out("v15") _,
            out("v16") _, out("v17") _, out("v18") _, out("v19") _, out("v20") _, out("v21") _, out("v22") _, out("v23") _,
            out("v24") _, out("v25") _, out("v26") _, out("v27") _, out("v28") _, out("v29") _, out("v30") _, out("v31") _,
        );
    }
    ensure_eq!(result, 0, "result of RUN");
    Ok(wrong == 0)
}

fn own_floating_point() -> CaseResult {
    let m = Machine::new(trespasser())?;
    for round in 0..50 {
        ensure!(
            run_with_registers(&m, 0x1234_5678_9abc_de00 + (round << 32))?,
            "the vector registers and FPCR in round {round}"
        );
    }
    Ok(())
}

/// `struct perf_event_attr` (Linux: include/uapi/linux/perf_event.h), in its version 5.
#[repr(C)]
#[derive(Default)]
struct PerfAttributes {
    kind: u32,
    size: u32,
    config: u64,
    sample_period: u64,
    sample_type: u64,
    read_format: u64,
    flags: u64,
    wakeup: u32,
    breakpoint_type: u32,
    config1: u64,
    config2: u64,
    rest: [u64; 5],
}

/// Flags of [`PerfAttributes`]: not the kernel, and not a hypervisor.
const PERF_USER_ONLY: u64 = 1 << 5 | 1 << 6;

/// An event counter of this thread.
fn perf(attributes: PerfAttributes) -> Result<OwnedFd, Stop> {
    let attributes = PerfAttributes { size: size_of::<PerfAttributes>() as u32, flags: PERF_USER_ONLY, ..attributes };
    // SAFETY: the structure is as long as it says; this thread, any CPU, no group.
    let fd = unsafe { libc::syscall(libc::SYS_perf_event_open, &raw const attributes, 0, -1, -1, 0) };
    match i32::try_from(fd) {
        // SAFETY: the call has just made the descriptor.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(Stop::Skip(format!("no such event: {}", std::io::Error::last_os_error()))),
    }
}

fn count(event: &OwnedFd) -> Result<u64, Stop> {
    let mut value = [0; 8];
    nix::unistd::read(event, &mut value)?;
    Ok(u64::from_ne_bytes(value))
}

fn watchpoints() -> CaseResult {
    static WATCHED: AtomicU64 = AtomicU64::new(0);
    const PERF_TYPE_BREAKPOINT: u32 = 5;
    const WRITES: u32 = 2;
    // config1 and config2: address and length.
    let event = perf(PerfAttributes {
        kind: PERF_TYPE_BREAKPOINT,
        breakpoint_type: WRITES,
        config1: WATCHED.as_ptr() as u64,
        config2: 8,
        ..PerfAttributes::default()
    })?;
    WATCHED.store(1, Ordering::SeqCst);
    ensure_eq!(count(&event)?, 1, "the watchpoint works");
    let mut m = Machine::new(trespasser())?;
    for round in 2..52 {
        m.expect_call()?;
        WATCHED.store(round, Ordering::SeqCst);
        ensure_eq!(count(&event)?, round, "hits");
    }
    Ok(())
}

/// With `perf_user_access`, a program may read its counters itself: a trap that is left on would kill it.
fn cycle_counter() -> CaseResult {
    const ACCESS: &str = "/proc/sys/kernel/perf_user_access";
    /// `struct perf_event_mmap_page`: a word with the counter's number plus one, and one with the capabilities.
    const INDEX: usize = 12;
    const CAPABILITIES: usize = 40;
    const USER_READS: u64 = 1 << 2;
    fs::write(ACCESS, "1").map_err(|error| Stop::Skip(format!("{ACCESS}: {error}")))?;
    // PERF_TYPE_HARDWARE, PERF_COUNT_HW_CPU_CYCLES; config1: 64 bits, read by the user.
    let event = perf(PerfAttributes { config1: 3, ..PerfAttributes::default() })?;
    // SAFETY: a new mapping of the event's page.
    let page =
        unsafe { libc::mmap(std::ptr::null_mut(), 0x1000, libc::PROT_READ, libc::MAP_SHARED, event.as_raw_fd(), 0) };
    ensure!(page != libc::MAP_FAILED, "the event's page: {}", std::io::Error::last_os_error());
    let page = page.cast::<u8>().cast_const();
    // SAFETY: both lie in the page, aligned, and stay until the process ends.
    let (index, capabilities) = unsafe {
        (page.add(INDEX).cast::<u32>().read_volatile(), page.add(CAPABILITIES).cast::<u64>().read_volatile())
    };
    if capabilities & USER_READS == 0 || index != 32 {
        return Err(Stop::Skip(format!("the cycle counter cannot be read: {index} {capabilities:#x}")));
    }
    let cycles = || {
        let value: u64;
        // SAFETY: the kernel says that this program may.
        unsafe { asm!("mrs {}, pmccntr_el0", out(reg) value) };
        value
    };
    let mut m = Machine::new(trespasser())?;
    let mut last = cycles();
    for round in 0..50 {
        m.expect_call()?;
        let now = cycles();
        ensure!(now > last, "round {round}: the counter went from {last} to {now}");
        last = now;
    }
    Ok(())
}

/// Runs a guest that overwrites vector registers, and `check` on a thread of its own on the same CPU, which makes no system call
/// and says whether its registers stayed what they were: each for a while, in turns as the kernel sees fit.
fn beside(check: impl Fn(u64) -> bool + Sync) -> CaseResult {
    let allowed = Allowed::now()?;
    let cpu = *allowed.cpus.first().ok_or_else(|| Stop::Fail("no CPU".into()))?;
    let mut m = Machine::new(trespasser())?;
    let (stop, rounds) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        let checker = scope.spawn(|| -> CaseResult {
            pin(SELF, cpu)?;
            let mut mark = 0x1234_5678_9abc_def1u64;
            while !stop.load(Ordering::SeqCst) {
                ensure!(check(mark), "another one's value in a vector register, in round {rounds:?}");
                mark = mark.rotate_left(7) ^ 0x55;
                rounds.fetch_add(1, Ordering::SeqCst);
            }
            Ok(())
        });
        pin(SELF, cpu)?;
        let result = (0..3000).try_for_each(|_| m.expect_call().map(|_| ()));
        // The last turns are the checker's.
        let seen = rounds.load(Ordering::SeqCst);
        let waited = harness::wait_until("the other thread", || {
            Ok(checker.is_finished() || rounds.load(Ordering::SeqCst) > seen + 5)
        });
        stop.store(true, Ordering::SeqCst);
        harness::joined(checker.join())?.and(result).and(waited)
    })?;
    ensure!(rounds.load(Ordering::SeqCst) >= 10, "it ran {rounds:?} rounds");
    Ok(())
}

fn floating_point() -> CaseResult {
    beside(|mark| {
        let wrong: u64;
        // SAFETY: nothing but registers that the compiler is told of.
        unsafe {
            asm!(
                "dup v0.2d, {mark}",
                "dup v7.2d, {mark}",
                "dup v31.2d, {mark}",
                "2: cmeq v1.2d, v0.2d, v7.2d",
                "cmeq v2.2d, v7.2d, v31.2d",
                "and v1.16b, v1.16b, v2.16b",
                "umov {wrong}, v1.d[0]",
                "umov {other}, v1.d[1]",
                "and {wrong}, {wrong}, {other}",
                "umov {other}, v31.d[1]",
                "eor {other}, {other}, {mark}",
                "bic {wrong}, {wrong}, {other}",
                "mvn {wrong}, {wrong}",
                "cbnz {wrong}, 3f",
                "subs {count}, {count}, #1",
                "b.ne 2b",
                "3:",
                mark = in(reg) mark,
                wrong = out(reg) wrong,
                other = out(reg) _,
                count = inout(reg) 20_000u64 => _,
                out("v0") _, out("v1") _, out("v2") _, out("v7") _, out("v31") _,
            );
        }
        wrong == 0
    })
}

fn sve() -> CaseResult {
    if !is_aarch64_feature_detected!("sve") {
        return Err(Stop::Skip("the CPU has no SVE".into()));
    }
    beside(|mark| {
        // Vectors of 256 bytes, or as long as they can be: not what other threads have. For this thread only, each time anew.
        const PR_SVE_SET_VL: i32 = 50;
        const LONGEST: u64 = 256;
        // SAFETY: the vector length is this thread's own, and it keeps nothing in vector registers over the call.
        let length = unsafe { libc::prctl(PR_SVE_SET_VL, LONGEST, 0, 0, 0) };
        let words = (length & 0xffff) as u64 / 8;
        let wrong: u64;
        // SAFETY: nothing but registers that the compiler is told of: vector and predicate registers are all lost.
        unsafe {
            asm!(
                ".arch_extension sve",
                "ptrue p0.d",
                "ptrue p3.b",
                "index z7.d, {mark}, #1",
                "index z31.d, {mark}, #3",
                "ptrue p7.b, vl3",
                "wrffr p7.b",
                "mov {wrong}, #1",
                "2: cntd {other}",
                "cmp {other}, {words}",
                "b.ne 3f",
                "index z1.d, {mark}, #1",
                "cmpne p1.d, p0/z, z1.d, z7.d",
                "b.ne 3f",
                "index z1.d, {mark}, #3",
                "cmpne p1.d, p0/z, z1.d, z31.d",
                "b.ne 3f",
                "rdffr p2.b",
                "eors p2.b, p3/z, p2.b, p7.b",
                "b.ne 3f",
                "subs {count}, {count}, #1",
                "b.ne 2b",
                "mov {wrong}, #0",
                "3:",
                ".arch_extension nosve",
                mark = in(reg) mark,
                words = in(reg) words,
                wrong = out(reg) wrong,
                other = out(reg) _,
                count = inout(reg) 5_000u64 => _,
                out("v0") _, out("v1") _, out("v7") _, out("v31") _,
                out("p0") _, out("p1") _, out("p2") _, out("p3") _, out("p7") _, out("ffr") _,
            );
        }
        wrong == 0
    })
}

/// What was signed before the guest ran is authentic afterwards: the keys are this process's.
fn pointer_authentication() -> CaseResult {
    if !is_aarch64_feature_detected!("paca") {
        return Err(Stop::Skip("the CPU has no pointer authentication".into()));
    }
    let sign_one = |pointer: u64| {
        let mut signed = pointer;
        // SAFETY: an instruction on a general register. PACIZA, by its encoding for X9.
        unsafe { asm!(".inst 0xdac123e9", inout("x9") signed) };
        signed
    };
    let mut m = Machine::new(trespasser())?;
    // A signature can be as short as three bits, where addresses have 52, and then one in eight changes nothing.
    let pointers: [u64; 64] = std::array::from_fn(|index| &raw const m as u64 + 16 * index as u64);
    let sign = || pointers.map(sign_one);
    let signed = sign();
    ensure!(signed != pointers, "signing does nothing");
    for round in 0..50 {
        m.expect_call()?;
        ensure_eq!(sign(), signed, "round {round}");
    }
    Ok(())
}
