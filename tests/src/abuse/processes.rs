// SPDX-License-Identifier: MIT OR Apache-2.0
//! A VM belongs to one process: others get EXDEV, and when that process dies everything goes.

use super::{Kind, Objects, CALLS};
use crate::harness::{self, Case, CaseResult, Stop};
use crate::{ensure, ensure_eq, raw, table};
use axvcpu_uapi::client::Errno;
use axvcpu_uapi::ioctl;
use nix::sys::mman::{mmap, MapFlags, ProtFlags};
use nix::sys::socket::{recvmsg, sendmsg, ControlMessage, ControlMessageOwned, MsgFlags};
use nix::sys::wait::{waitpid, WaitStatus};
use nix::unistd::{fork, ForkResult};
use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::time::Duration;

pub(super) fn cases() -> Vec<Case> {
    table! {
        "processes/forked-child-gets-exdev" => forked;
        "processes/vcpu-of-a-dead-process" => dead;
        "processes/killed-while-running" => killed, in 60;
    }
}

/// Calls that any process may make on a file that it holds.
const FOR_ALL: [u32; 6] =
    [ioctl::INFO, ioctl::SUPPORTED_CPUID, ioctl::CREATE_VM, ioctl::VM_STATS, ioctl::VCPU_STATS, ioctl::KICK];

fn forked() -> CaseResult {
    let (mut objects, _slot) = Objects::ready()?;
    let mut buffer = [0u8; 4096];
    // SAFETY: the child makes plain system calls only, which are async-signal-safe, and leaves by _exit.
    match unsafe { fork() }? {
        ForkResult::Child => {
            let mut bad = 0;
            for (i, call) in CALLS.iter().enumerate() {
                buffer.fill(0);
                // SAFETY: the buffer is longer than any structure of the ABI, and all zero holds no address.
                let result = unsafe { raw::ioctl(objects.fd(call.kind), call.request, buffer.as_mut_ptr() as usize) };
                if !FOR_ALL.contains(&call.request) && result != Err(Errno::EXDEV) {
                    bad = i + 1;
                }
            }
            let length = NonZeroUsize::MIN.saturating_add(4095);
            // SAFETY: a new mapping at an address of the kernel's choice disturbs no existing memory.
            let page =
                unsafe { mmap(None, length, ProtFlags::PROT_READ, MapFlags::MAP_SHARED, objects.fd(Kind::Vcpu), 0) };
            if page != Err(Errno::EXDEV) {
                bad = CALLS.len() + 1;
            }
            // SAFETY: ends the process at once.
            unsafe { nix::libc::_exit(bad as i32) }
        }
        ForkResult::Parent { child } => match waitpid(child, None)? {
            WaitStatus::Exited(_, 0) => {}
            WaitStatus::Exited(_, code) => {
                let name = CALLS.get(code as usize - 1).map_or("mmap", |call| call.name);
                return Err(Stop::Fail(format!("{name} in the child is not EXDEV")));
            }
            other => return Err(Stop::Fail(format!("the child: {other:?}"))),
        },
    }
    // The child kicked the vCPU, which everyone who has its file may.
    let exit = objects.vcpu.run()?;
    ensure_eq!(exit.reason, axvcpu_uapi::exit::AxVCpuExitReason::Interrupted, "exit after the child's kick");
    Ok(())
}

/// Starts this program again as a helper that talks over its standard input, a socket.
fn helper(what: &str) -> Result<(std::process::Child, UnixStream), Stop> {
    let (ours, theirs) = UnixStream::pair()?;
    let child = Command::new("/proc/self/exe")
        .args(["--helper", what])
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .spawn()?;
    Ok((child, ours))
}

/// The helper's part: what a case of this file starts in another process. Reports by its exit status.
///
/// # Errors
/// What went wrong.
pub fn help(what: &str) -> CaseResult {
    let (mut objects, _slot) = Objects::ready()?;
    let socket = std::io::stdin();
    match what {
        "pass" => {
            let fds = [objects.vcpu.as_fd().as_raw_fd(), objects.vm.as_fd().as_raw_fd()];
            let message = [ControlMessage::ScmRights(&fds)];
            sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(b"x")], &message, MsgFlags::empty(), None)?;
            Ok(())
        }
        "spin" => {
            nix::unistd::write(socket.as_fd(), b"x")?;
            objects.vcpu.run()?;
            Ok(())
        }
        other => Err(Stop::Fail(format!("no helper {other}"))),
    }
}

/// Descriptors that a process has passed on before it died are of no use, and harmless.
fn dead() -> CaseResult {
    let before = crate::machine::open_axvcpu()?.info()?.vms;
    let (mut child, socket) = helper("pass")?;
    let mut space = nix::cmsg_space!([std::os::fd::RawFd; 2]);
    let mut byte = [0];
    let mut buffers = [IoSliceMut::new(&mut byte)];
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut buffers, Some(&mut space), MsgFlags::empty())?;
    let mut fds = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(numbers) = control {
            // SAFETY: the kernel has just made these descriptors for us.
            fds.extend(numbers.into_iter().map(|number| unsafe { OwnedFd::from_raw_fd(number) }));
        }
    }
    ensure_eq!(fds.len(), 2, "descriptors received");
    ensure!(child.wait()?.success(), "the helper failed");
    ensure_eq!(raw::none(fds[0].as_fd(), ioctl::RUN), Err(Errno::EXDEV), "RUN of the dead process's vCPU");
    ensure_eq!(raw::none(fds[0].as_fd(), ioctl::KICK), Ok(0), "KICK of it");
    let argument = axvcpu_uapi::vm::CreateVcpu { id: 7, flags: 0 };
    let result = raw::plain(fds[1].as_fd(), ioctl::CREATE_VCPU, argument);
    ensure_eq!(result, Err(Errno::EXDEV), "CREATE_VCPU in the dead process's VM");
    drop(fds);
    harness::wait_until("the VM to go", || Ok(crate::machine::open_axvcpu()?.info()?.vms == before))
}

/// SIGKILL at various moments of a run takes the VM with the process.
fn killed() -> CaseResult {
    let before = crate::machine::open_axvcpu()?.info()?.vms;
    for pause in [0, 1, 3, 10, 30, 50] {
        let (mut child, mut socket) = helper("spin")?;
        socket.read_exact(&mut [0])?;
        std::thread::sleep(Duration::from_millis(pause));
        child.kill()?;
        child.wait()?;
        harness::wait_until("the VM to go", || Ok(crate::machine::open_axvcpu()?.info()?.vms == before))?;
        // Nobody is at the other end.
        ensure!(socket.write_all(b"x").is_err(), "the helper still lives");
    }
    Ok(())
}
