// SPDX-License-Identifier: MIT OR Apache-2.0
//! Filters of system calls (seccomp, Linux `Documentation/userspace-api/seccomp_filter.rst`), and what happens at a call that
//! they do not let through: the kernel sends SIGSYS instead of making it, whose handler says which call it was and ends the
//! program.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};

use nix::errno::Errno;
use nix::libc;
use nix::sys::signal::{sigaction, SaFlags, SigAction, SigHandler, SigSet, Signal};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen as Length, SeccompCmpOp as Compare, SeccompCondition as Condition,
    SeccompFilter, SeccompRule as Rule,
};

use super::calls::{self, Must, Thread};
use super::Ioctls;
use crate::exit::ExitCode;
use crate::terminal;

/// A filter, ready to be entered by any number of threads.
#[derive(Debug)]
pub(super) struct Filter(BpfProgram);

impl Filter {
    /// For threads of a kind, on a hypervisor with `ioctls`.
    ///
    /// # Errors
    /// [`seccompiler`]'s, if the filter could not be one: a mistake in the lists, or an architecture without filters.
    pub(super) fn new(thread: Thread, ioctls: &Ioctls) -> Result<Self, seccompiler::Error> {
        let rules = rules(thread, ioctls)?;
        let architecture = std::env::consts::ARCH.try_into()?;
        let filter = SeccompFilter::new(rules, SeccompAction::Trap, SeccompAction::Allow, architecture)?;
        Ok(Self(filter.try_into()?))
    }

    /// Puts the calling thread under the filter, for good.
    ///
    /// # Errors
    /// [`seccompiler`]'s, if the kernel refuses.
    pub(super) fn enter(&self) -> Result<(), seccompiler::Error> {
        seccompiler::apply_filter(&self.0)
    }
}

type Rules = BTreeMap<i64, Vec<Rule>>;

fn rules(thread: Thread, ioctls: &Ioctls) -> Result<Rules, seccompiler::BackendError> {
    let one = |argument, length, compare, value| Rule::new(vec![Condition::new(argument, length, compare, value)?]);
    let mut rules = Rules::new();
    for (call, must) in calls::of(thread) {
        // No rule at all is one that holds for every argument.
        let allowed = match must {
            Must::Any => vec![],
            Must::Lack(argument, bits) => vec![one(argument, Length::Qword, Compare::MaskedEq(bits), 0)?],
            Must::BeOurs => vec![one(0, Length::Dword, Compare::Eq, std::process::id().into())?],
            Must::BeKnownIoctl => {
                let own: &[u32] = if thread == Thread::Vcpu { ioctls.vcpu } else { &[] };
                let known = own.iter().chain(ioctls.any).copied().chain(calls::terminal());
                known.map(|request| one(1, Length::Dword, Compare::Eq, request.into())).collect::<Result<_, _>>()?
            }
        };
        rules.insert(call, allowed);
    }
    Ok(rules)
}

/// Installs the handler of SIGSYS.
///
/// # Errors
/// None that a valid signal could cause.
pub(super) fn explain_violations() -> Result<(), Errno> {
    let action = SigAction::new(SigHandler::SigAction(violation), SaFlags::SA_SIGINFO, SigSet::empty());
    // SAFETY: the handler does only what may be done in one, see there.
    unsafe { sigaction(Signal::SIGSYS, &action) }.map(drop)
}

/// The part of `siginfo_t` that comes with SIGSYS (Linux `include/uapi/asm-generic/siginfo.h`), which the C library's type
/// does not show.
#[repr(C)]
struct SigSys {
    /// `si_signo`, `si_errno`, `si_code`, and the gap before pointers.
    head: [i32; 4],
    /// Address of the instruction.
    call_addr: usize,
    /// Number of the system call.
    syscall: i32,
    /// `AUDIT_ARCH_*` of its caller.
    arch: u32,
}

const _: () = assert!(size_of::<SigSys>() <= size_of::<libc::siginfo_t>());

/// `SYS_SECCOMP` of `si_code`: it was a filter.
const BY_FILTER: i32 = 1;

/// A message without allocation: what does not fit is left out.
struct Message {
    bytes: [u8; 256],
    length: usize,
}

impl fmt::Write for Message {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = self.bytes.get_mut(self.length..).unwrap_or_default();
        let count = room.len().min(text.len());
        room[..count].copy_from_slice(&text.as_bytes()[..count]);
        self.length += count;
        Ok(())
    }
}

/// A system call that the filter did not let through, or a SIGSYS that somebody sent. Called in the thread concerned, wherever
/// it was: no allocation and no lock that is waited for.
extern "C" fn violation(_signal: libc::c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the kernel passes a structure that is as large as the C library's type, of which this is a prefix.
    let SigSys { head, syscall, .. } = unsafe { &*info.cast::<SigSys>() };
    terminal::restore_unless_busy();
    let mut message = Message { bytes: [0; 256], length: 0 };
    let name = usize::try_from(*syscall).ok().and_then(syscalls::Sysno::new).map_or("unknown", |call| call.name());
    // It cannot fail, and there is nobody to tell.
    let _ = if head[2] == BY_FILTER {
        write!(
            message,
            "axvmm: the sandbox stopped the system call {name} ({syscall}), which a running VM does not need\n\
             Either the guest has broken into this program, or this is a bug in axvmm; --no-sandbox does without.\n"
        )
    } else {
        writeln!(message, "axvmm: ended by SIGSYS")
    };
    // SAFETY: the bytes are the message's own, and `_exit` ends every thread without running anything of this program.
    unsafe {
        libc::write(libc::STDERR_FILENO, message.bytes.as_ptr().cast(), message.length);
        libc::_exit(u8::from(ExitCode::Sandbox).into());
    }
}

#[cfg(test)]
mod tests;
