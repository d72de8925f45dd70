// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! Eventfds of a [`Vm`]: those that interrupt the guest, and those that the guest signals.
//!
//! The second kind comes in two. Where the kernel can tell the write from others it signals the eventfd itself and the guest
//! goes on at once. Otherwise the write comes as an exit, which the program decodes and hands to
//! [`Vm::notify_write`]; the same is true of a write to an attached address by an instruction that the kernel does not know.
//! So a program attaches what it wants, and offers every write to [`Vm::notify_write`] before it looks for a device.
#![allow(unsafe_code)]

use super::error::{Error, Result};
use super::sys;
use super::vm::Vm;
use crate::exit::AccessWidth;
use crate::ioctl;
use crate::vm::{
    IoEventfd, Irqfd, IOEVENTFD_DATAMATCH, IOEVENTFD_DETACH, IOEVENTFD_PORT, IRQFD_DETACH, IRQFD_RESAMPLE,
};
use nix::errno::Errno;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{PoisonError, RwLock};
use std::vec::Vec;

/// Where a guest writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum IoAddress {
    /// A port (x86).
    Port(u16),
    /// A guest physical address that is not memory.
    Memory(u64),
}

/// Which writes signal an eventfd: those to an address, of a width (or any), of a value (or any).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct IoPattern {
    address: IoAddress,
    width: Option<AccessWidth>,
    value: Option<u64>,
}

impl IoPattern {
    /// Any write to `address`. On x86, of writes to memory addresses only these can be handled in the kernel.
    pub const fn any(address: IoAddress) -> Self {
        Self { address, width: None, value: None }
    }

    /// Writes of `width` to `address`.
    pub const fn of_width(address: IoAddress, width: AccessWidth) -> Self {
        Self { address, width: Some(width), value: None }
    }

    /// Writes of `value` with `width` to `address`.
    pub const fn of_value(address: IoAddress, width: AccessWidth, value: u64) -> Self {
        Self { address, width: Some(width), value: Some(value) }
    }

    /// Whether a write of `value` with `width` to `address` is one of these.
    fn matches(&self, address: IoAddress, width: AccessWidth, value: u64) -> bool {
        self.address == address
            && self.width.is_none_or(|wanted| wanted == width)
            && self.value.is_none_or(|wanted| wanted == value & width.mask())
    }

    /// Whether one write can be of both.
    fn overlaps(&self, other: &Self) -> bool {
        let agree = |a: Option<u64>, b: Option<u64>| a == b || a.is_none() || b.is_none();
        let size = |width: Option<AccessWidth>| width.map(|width| width.size() as u64);
        self.address == other.address && agree(size(self.width), size(other.width)) && agree(self.value, other.value)
    }

    fn argument(&self, fd: i32, flags: u32) -> IoEventfd {
        let (address, port) = match self.address {
            IoAddress::Port(port) => (port.into(), IOEVENTFD_PORT),
            IoAddress::Memory(address) => (address, 0),
        };
        IoEventfd {
            address,
            data: self.value.unwrap_or(0),
            fd,
            width: self.width.map_or(0, |width| width.size() as u32),
            flags: flags | port | if self.value.is_some() { IOEVENTFD_DATAMATCH } else { 0 },
            reserved: 0,
        }
    }
}

/// An eventfd that the guest signals.
#[derive(Debug)]
struct Attached {
    pattern: IoPattern,
    event: OwnedFd,
    in_kernel: bool,
}

/// All of a VM.
#[derive(Debug, Default)]
pub(super) struct IoEvents(RwLock<Vec<Attached>>);

impl Vm {
    /// Lets each signal of the eventfd `event` deliver an interrupt message, as [`signal_msi`](Self::signal_msi) does. Signals
    /// that came before count as one.
    ///
    /// With `resample`, the message is one of a level-triggered interrupt: while the guest handles it further signals have
    /// no effect, and at its end the eventfd `resample` is signalled, at which a device that still wants attention signals
    /// `event` again. `RUN` does not return with [`InterruptEnd`](crate::exit::AxVCpuExitReason::InterruptEnd) then.
    ///
    /// # Errors
    /// [`Error::AttachInterrupt`]: `EEXIST` if `event` is attached already, `EINVAL` if one of the files is no eventfd or the
    /// message none (or, with `resample`, edge-triggered), `ENOSPC` if there are too many.
    pub fn attach_interrupt(
        &self,
        event: impl AsFd,
        address: u64,
        data: u32,
        resample: Option<BorrowedFd<'_>>,
    ) -> Result<()> {
        let (resample_fd, flags) = resample.map_or((0, 0), |resample| (resample.as_raw_fd(), IRQFD_RESAMPLE));
        let mut argument = Irqfd { fd: event.as_fd().as_raw_fd(), resample_fd, address, data, flags };
        // SAFETY: the structure holds no address of this process.
        unsafe { sys::with(self.as_fd(), ioctl::IRQFD, &mut argument) }.map_err(Error::AttachInterrupt)?;
        Ok(())
    }

    /// Undoes [`attach_interrupt`](Self::attach_interrupt). When this returns, signals have no effect any more.
    ///
    /// # Errors
    /// [`Error::DetachInterrupt`]: `ENOENT` if `event` is not attached.
    pub fn detach_interrupt(&self, event: impl AsFd) -> Result<()> {
        let mut argument = Irqfd { fd: event.as_fd().as_raw_fd(), flags: IRQFD_DETACH, ..Irqfd::default() };
        // SAFETY: the structure holds no address of this process.
        unsafe { sys::with(self.as_fd(), ioctl::IRQFD, &mut argument) }.map_err(Error::DetachInterrupt)?;
        Ok(())
    }

    /// Has the eventfd `event` signalled by the writes of a pattern. Returns whether the kernel does it; otherwise, such writes
    /// are exits and [`notify_write`](Self::notify_write) does it.
    ///
    /// # Errors
    /// [`Error::AttachIo`]: `EEXIST` if a write can be of this and an attached pattern, `EINVAL` if there cannot be such
    /// writes or `event` is no eventfd, `ENOSPC` if there are too many.
    pub fn attach_io(&self, event: impl AsFd, pattern: IoPattern) -> Result<bool> {
        let mut attached = self.io_events().0.write().unwrap_or_else(PoisonError::into_inner);
        if attached.iter().any(|other| other.pattern.overlaps(&pattern)) {
            return Err(Error::AttachIo(Errno::EEXIST));
        }
        let event = event
            .as_fd()
            .try_clone_to_owned()
            .map_err(|error| Error::AttachIo(error.raw_os_error().map_or(Errno::UnknownErrno, Errno::from_raw)))?;
        let mut argument = pattern.argument(event.as_raw_fd(), 0);
        // SAFETY: the structure holds no address of this process.
        let in_kernel = match unsafe { sys::with(self.as_fd(), ioctl::IOEVENTFD, &mut argument) } {
            Ok(_) => true,
            Err(Errno::EOPNOTSUPP) => false,
            Err(errno) => return Err(Error::AttachIo(errno)),
        };
        attached.push(Attached { pattern, event, in_kernel });
        Ok(in_kernel)
    }

    /// Undoes [`attach_io`](Self::attach_io) with the same pattern.
    ///
    /// # Errors
    /// [`Error::DetachIo`]: `ENOENT` if nothing is attached to it.
    pub fn detach_io(&self, pattern: IoPattern) -> Result<()> {
        let mut attached = self.io_events().0.write().unwrap_or_else(PoisonError::into_inner);
        let index = attached.iter().position(|other| other.pattern == pattern).ok_or(Error::DetachIo(Errno::ENOENT))?;
        if attached[index].in_kernel {
            let mut argument = pattern.argument(-1, IOEVENTFD_DETACH);
            // SAFETY: the structure holds no address of this process.
            unsafe { sys::with(self.as_fd(), ioctl::IOEVENTFD, &mut argument) }.map_err(Error::DetachIo)?;
        }
        attached.remove(index);
        Ok(())
    }

    /// The guest's write came as an exit: if an eventfd is attached to it, that is signalled, and the write is complete.
    /// Returns whether there was one.
    pub fn notify_write(&self, address: IoAddress, width: AccessWidth, value: u64) -> bool {
        let attached = self.io_events().0.read().unwrap_or_else(PoisonError::into_inner);
        let found = attached.iter().find(|attached| attached.pattern.matches(address, width, value));
        if let Some(attached) = found {
            // The count cannot get too high but by others' doing, and then who waits is awake already.
            let _ = nix::unistd::write(&attached.event, &1u64.to_ne_bytes());
        }
        found.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_tell_writes_apart() {
        let at = IoAddress::Memory(0x1000);
        let (any, word) = (IoPattern::any(at), IoPattern::of_width(at, AccessWidth::Word));
        let seven = IoPattern::of_value(at, AccessWidth::Word, 7);
        for (address, width, value, matching) in [
            (at, AccessWidth::Word, 7, [true, true, true]),
            (at, AccessWidth::Word, 0xf_0007, [true, true, true]),
            (at, AccessWidth::Word, 8, [true, true, false]),
            (at, AccessWidth::Dword, 7, [true, false, false]),
            (IoAddress::Memory(0x1001), AccessWidth::Word, 7, [false; 3]),
            (IoAddress::Port(0x1000), AccessWidth::Word, 7, [false; 3]),
        ] {
            assert_eq!([any, word, seven].map(|p| p.matches(address, width, value)), matching, "{address:?} {width:?}");
        }
        let eight = IoPattern::of_value(at, AccessWidth::Word, 8);
        assert!(any.overlaps(&word) && word.overlaps(&seven) && seven.overlaps(&seven));
        assert!(!seven.overlaps(&eight));
        assert!(!word.overlaps(&IoPattern::of_width(at, AccessWidth::Byte)));
        assert!(!any.overlaps(&IoPattern::any(IoAddress::Port(0x1000))));
    }
}
