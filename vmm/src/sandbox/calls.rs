// SPDX-License-Identifier: MIT OR Apache-2.0
//! The system calls that threads make while the guest runs, and what for. Everything is opened, mapped and started by then.
//!
//! The lists hold for every architecture but for what is marked; a call that is new in one of them goes here, with the reason.

use nix::libc;

/// Kinds of threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Thread {
    /// The one that listens to events, and ends the program.
    Main,
    /// One that runs a vCPU.
    Vcpu,
}

/// What an argument must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Must {
    /// Anything goes.
    Any,
    /// Argument number .0 has none of the bits .1.
    Lack(u8, u64),
    /// Argument 0 is this process.
    BeOurs,
    /// Argument 1 is an ioctl of the hypervisor's or of the terminal's.
    BeKnownIoctl,
}

/// Of both kinds.
const COMMON: &[(libc::c_long, Must)] = &[
    // Devices: the serial port's output, eventfds, the timer; and messages.
    (libc::SYS_read, Must::Any),
    (libc::SYS_write, Must::Any),
    (libc::SYS_writev, Must::Any),
    (libc::SYS_timerfd_settime, Must::Any),
    // The hypervisor, and the terminal's mode when a thread panics.
    (libc::SYS_ioctl, Must::BeKnownIoctl),
    // Clocks: where the kernel has none that can be read without it.
    (libc::SYS_clock_gettime, Must::Any),
    // Locks, channels, and waiting for a reader who is slow.
    (libc::SYS_futex, Must::Any),
    (libc::SYS_sched_yield, Must::Any),
    (libc::SYS_clock_nanosleep, Must::Any),
    (libc::SYS_restart_syscall, Must::Any),
    // The allocator, and stacks of threads that have ended. Memory never becomes executable.
    (libc::SYS_brk, Must::Any),
    (libc::SYS_mmap, Must::Lack(2, libc::PROT_EXEC as u64)),
    (libc::SYS_mprotect, Must::Lack(2, libc::PROT_EXEC as u64)),
    (libc::SYS_mremap, Must::Any),
    (libc::SYS_munmap, Must::Any),
    (libc::SYS_madvise, Must::Any),
    // Seeds of hash tables.
    (libc::SYS_getrandom, Must::Any),
    // Kicks by signals, and ending by the signal that asked for it.
    (libc::SYS_getpid, Must::Any),
    (libc::SYS_gettid, Must::Any),
    (libc::SYS_tgkill, Must::BeOurs),
    (libc::SYS_rt_sigprocmask, Must::Any),
    (libc::SYS_rt_sigreturn, Must::Any),
    // The end of a thread, and of the program.
    (libc::SYS_sigaltstack, Must::Any),
    (libc::SYS_close, Must::Any),
    (libc::SYS_exit, Must::Any),
    (libc::SYS_exit_group, Must::Any),
];

/// Of the main thread.
const MAIN: &[(libc::c_long, Must)] = &[
    // The event loop.
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_poll, Must::Any),
    (libc::SYS_ppoll, Must::Any),
    // KVM's counters.
    (libc::SYS_pread64, Must::Any),
];

/// Of a vCPU's thread.
const VCPU: &[(libc::c_long, Must)] = &[
    // KVM: the signal that ends a run.
    (libc::SYS_rt_sigaction, Must::Any),
];

/// Modes of a terminal: reading and setting them, as the C library does in one way or another.
const TERMINAL: &[libc::Ioctl] = &[
    libc::TCGETS,
    libc::TCSETS,
    libc::TCSETSW,
    libc::TCSETSF,
    libc::TCGETS2,
    libc::TCSETS2,
    libc::TCSETSW2,
    libc::TCSETSF2,
];

/// What a thread may call.
pub(super) fn of(thread: Thread) -> impl Iterator<Item = (libc::c_long, Must)> {
    let own = match thread {
        Thread::Main => MAIN,
        Thread::Vcpu => VCPU,
    };
    COMMON.iter().chain(own).copied()
}

/// The ioctls of terminals.
pub(super) fn terminal() -> impl Iterator<Item = u32> {
    // Requests have 32 bits, whatever the C library's type for them.
    TERMINAL.iter().map(|request| *request as u32)
}
