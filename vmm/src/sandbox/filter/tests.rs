// SPDX-License-Identifier: MIT OR Apache-2.0
//! Filters at work, each in a process of its own, since the first violation ends it.

use std::io::Read as _;

use nix::sys::wait::{waitpid, WaitStatus};
use nix::unistd::{dup2_stderr, fork, pipe, ForkResult};

use super::*;

const IOCTLS: Ioctls = Ioctls { vcpu: &[0x1111], any: &[0x2222] };

/// Forks a process that enters the filter and then makes `call`: its exit status, 0 if it went on behind the call, and what
/// it said.
fn confined(thread: Thread, call: fn()) -> (i32, String) {
    let (read, write) = pipe().unwrap();
    // SAFETY: nothing of this program but the allocator has locks that the child takes, and the C library keeps that usable
    // in a child.
    match unsafe { fork() }.unwrap() {
        ForkResult::Child => {
            let entered = dup2_stderr(&write).is_ok()
                && explain_violations().is_ok()
                && Filter::new(thread, &IOCTLS).is_ok_and(|filter| filter.enter().is_ok());
            if entered {
                call();
            }
            // SAFETY: ends the process at once.
            unsafe { libc::_exit(if entered { 0 } else { 99 }) }
        }
        ForkResult::Parent { child } => {
            drop(write);
            let mut said = String::new();
            std::fs::File::from(read).read_to_string(&mut said).unwrap();
            match waitpid(child, None).unwrap() {
                WaitStatus::Exited(_, status) => (status, said),
                other => panic!("{other:?}"),
            }
        }
    }
}

/// A system call, whose result does not matter.
fn call(number: libc::c_long, arguments: [i64; 6]) {
    let [a, b, c, d, e, f] = arguments;
    // SAFETY: the tests' calls ask for nothing that this program could notice: files that are only opened, anonymous memory,
    // a program that is not there, descriptors that are none.
    unsafe { libc::syscall(number, a, b, c, d, e, f) };
}

/// The address of a path, as an argument.
fn path(path: &'static std::ffi::CStr) -> i64 {
    path.as_ptr() as i64
}

/// The call was stopped, and named.
fn stopped(name: &str, thread: Thread, call: fn()) {
    let (status, said) = confined(thread, call);
    assert_eq!(status, i32::from(u8::from(ExitCode::Sandbox)), "{name}: {said}");
    assert!(said.contains(&format!("the system call {name} (")), "{said}");
}

#[test]
fn what_a_vm_does_not_need_is_stopped_and_named() {
    for thread in [Thread::Main, Thread::Vcpu] {
        stopped("openat", thread, || {
            call(libc::SYS_openat, [libc::AT_FDCWD.into(), path(c"/etc/passwd"), libc::O_RDONLY.into(), 0, 0, 0]);
        });
        stopped("socket", thread, || {
            call(libc::SYS_socket, [libc::AF_UNIX.into(), libc::SOCK_STREAM.into(), 0, 0, 0, 0]);
        });
        stopped("execve", thread, || call(libc::SYS_execve, [path(c"/nowhere"), 0, 0, 0, 0, 0]));
        stopped("getuid", thread, || call(libc::SYS_getuid, [0; 6]));
    }
}

#[test]
fn arguments_count() {
    stopped("mmap", Thread::Vcpu, || {
        let (protection, flags) = (libc::PROT_READ | libc::PROT_EXEC, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        call(libc::SYS_mmap, [0, 4096, protection.into(), flags.into(), -1, 0]);
    });
    stopped("tgkill", Thread::Main, || call(libc::SYS_tgkill, [1, 1, 0, 0, 0, 0]));
    stopped("ioctl", Thread::Main, || call(libc::SYS_ioctl, [-1, 0x1111, 0, 0, 0, 0]));
    stopped("ioctl", Thread::Vcpu, || call(libc::SYS_ioctl, [-1, 0x3333, 0, 0, 0, 0]));
}

#[test]
fn what_it_needs_goes_through() {
    for thread in [Thread::Main, Thread::Vcpu] {
        let (status, said) = confined(thread, || {
            let bytes = std::hint::black_box(vec![1u8; 4 << 20]);
            let mut text = Message { bytes: [0; 256], length: 0 };
            let _ = write!(text, "{}", bytes.len());
            call(libc::SYS_write, [2, text.bytes.as_ptr() as i64, text.length as i64, 0, 0, 0]);
            call(libc::SYS_ioctl, [-1, 0x2222, 0, 0, 0, 0]);
            call(
                libc::SYS_tgkill,
                [nix::unistd::getpid().as_raw().into(), nix::unistd::gettid().as_raw().into(), 0, 0, 0, 0],
            );
        });
        assert_eq!((status, said.as_str()), (0, "4194304"), "{thread:?}");
    }
    assert_eq!(confined(Thread::Vcpu, || call(libc::SYS_ioctl, [-1, 0x1111, 0, 0, 0, 0])), (0, String::new()));
}
