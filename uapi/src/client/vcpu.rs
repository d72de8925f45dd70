// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! [`Vcpu`]: a virtual CPU and its run page; [`Kicker`]: how other threads make it return.
#![allow(unsafe_code)]

use super::aspace::AddressSpace;
use super::error::{Error, Result};
use super::run_page::{Brief, Exit, Mapping, Snapshot};
use super::sys;
use super::General;
use crate::addr::GuestPhysAddr;
use crate::ioctl;
use crate::layout::AbiStruct;
use crate::run::{REPLY_FAULT, REQUEST_INTERRUPT_WINDOW, REQUEST_LOAD_GENERAL};
use crate::vcpu::{self, ApicAccess, Entry, EptRoot, Event, Gpr, Setup, VcpuStats, APIC_WRITE};
use crate::x86::{Control, CpuidEntry, Debug, Events, LocalApic, Msr, Segments};
use crate::{arm64, x86};
use nix::errno::Errno;
use std::cell::Cell;
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::vec::Vec;

/// Where the local APIC of a vCPU is emulated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Apic {
    /// Nowhere, or by the program: `HLT` is an exit, and interrupts come by [`Vcpu::inject`].
    None,
    /// By the module: `HLT` sleeps in [`Vcpu::run`], interrupts come by [`Vm::signal_msi`](super::Vm::signal_msi) or
    /// from other vCPUs, and vCPUs other than 0 wait for INIT and SIPI.
    InKernel,
}

/// A register set of fixed layout, for [`Vcpu::get`] and [`Vcpu::set`].
///
/// The trait is sealed, as [`AbiStruct`] is.
pub trait RegisterSet: AbiStruct {
    /// Its number in the ABI.
    const SET: u32;
}
impl RegisterSet for x86::General {
    const SET: u32 = vcpu::SET_GENERAL;
}
impl RegisterSet for arm64::General {
    const SET: u32 = vcpu::SET_ARM64_GENERAL;
}
impl RegisterSet for arm64::System {
    const SET: u32 = vcpu::SET_ARM64_SYSTEM;
}
impl RegisterSet for arm64::Fp {
    const SET: u32 = vcpu::SET_ARM64_FP;
}
impl RegisterSet for Segments {
    const SET: u32 = vcpu::SET_SEGMENTS;
}
impl RegisterSet for Control {
    const SET: u32 = vcpu::SET_CONTROL;
}
impl RegisterSet for Debug {
    const SET: u32 = vcpu::SET_DEBUG;
}
impl RegisterSet for Events {
    const SET: u32 = vcpu::SET_EVENTS;
}
impl RegisterSet for LocalApic {
    const SET: u32 = vcpu::SET_LOCAL_APIC;
}

/// A virtual CPU. It may move between threads, but is used by one at a time; everyone else has a [`Kicker`].
///
/// Set it up with [`set_entry`](Self::set_entry), [`set_ept_root`](Self::set_ept_root) and [`setup`](Self::setup), once
/// each and in that order (the first two may be swapped), then [`run`](Self::run) it.
///
/// General registers are in the run page after each exit: [`general`](Self::general) and
/// [`set_general`](Self::set_general) cost no system call. The other sets are read and written with [`get`](Self::get)
/// and [`set`](Self::set).
#[derive(Debug)]
pub struct Vcpu {
    fd: Arc<OwnedFd>,
    page: Mapping,
    xsave_size: usize,
    /// The page is read and written without synchronisation, so the handle is not for sharing.
    not_sync: PhantomData<Cell<()>>,
}

impl Vcpu {
    pub(super) fn new(fd: OwnedFd, xsave_size: usize) -> Result<Self> {
        let page = Mapping::new(fd.as_fd())?;
        Ok(Self { fd: Arc::new(fd), page, xsave_size, not_sync: PhantomData })
    }

    /// Sets the guest physical address of the first instruction: once, before [`setup`](Self::setup).
    ///
    /// # Errors
    /// [`Error::SetEntry`]: `EEXIST` the second time, `EINVAL` for an address the guest cannot start at.
    pub fn set_entry(&mut self, entry: GuestPhysAddr) -> Result<()> {
        // SAFETY: the structure holds no address of this process.
        unsafe { sys::with(self.as_fd(), ioctl::SET_ENTRY, &mut Entry { guest_addr: entry.as_u64() }) }
            .map_err(Error::SetEntry)?;
        Ok(())
    }

    /// Chooses the address space: once, before [`setup`](Self::setup). The vCPU keeps it.
    ///
    /// # Errors
    /// [`Error::SetEptRoot`]: `EEXIST` the second time, `EINVAL` for one of another VM.
    pub fn set_ept_root(&mut self, space: &AddressSpace) -> Result<()> {
        let mut root = EptRoot { aspace_fd: space.as_fd().as_raw_fd(), reserved: 0 };
        // SAFETY: the structure holds no address.
        unsafe { sys::with(self.as_fd(), ioctl::SET_EPT_ROOT, &mut root) }.map_err(Error::SetEptRoot)?;
        Ok(())
    }

    /// Completes the vCPU: once, after the entry point and the address space were set.
    ///
    /// # Errors
    /// [`Error::Setup`]: `EEXIST` the second time, `ENODATA` if something is not set yet, `EINVAL` for a CPUID table
    /// that asks for more than [`System::supported_cpuid`](super::System::supported_cpuid) offers or is too long.
    pub fn setup(&mut self, apic: Apic, cpuid: &[CpuidEntry]) -> Result<()> {
        let mut setup = Setup {
            flags: match apic {
                Apic::None => 0,
                Apic::InKernel => vcpu::SETUP_IN_KERNEL_APIC,
            },
            cpuid_count: u32::try_from(cpuid.len()).map_err(|_| Error::Setup(Errno::EINVAL))?,
            // Elsewhere than on x86 there is no table, nor an address of one.
            cpuid_addr: if cpuid.is_empty() { 0 } else { cpuid.as_ptr() as u64 },
            ..Setup::ZERO
        };
        // SAFETY: the kernel only reads `cpuid_count` entries from the address.
        unsafe { sys::with(self.as_fd(), ioctl::SETUP, &mut setup) }.map_err(Error::Setup)?;
        Ok(())
    }

    /// Runs the guest until an exit that the program must handle, first applying register changes and the reply made
    /// since the last exit. A signal or a kick ends it with
    /// [`Interrupted`](crate::exit::AxVCpuExitReason::Interrupted).
    ///
    /// # Errors
    /// [`Error::Run`]: `EBADFD` before [`setup`](Self::setup), `EBUSY` if another hypervisor owns the CPU, and others
    /// that axvcpu(4) lists; the vCPU is unharmed. [`Error::UnknownExit`] from a module that is newer than this crate.
    #[inline]
    pub fn run(&mut self) -> Result<Exit> {
        match sys::none(self.as_fd(), ioctl::RUN) {
            // A signal waits: EINTR, and the exit in the page is Interrupted.
            Ok(_) | Err(Errno::EINTR) => self.page.exit(),
            Err(errno) => Err(Error::Run(errno)),
        }
    }

    /// A handle with which any thread can make [`run`](Self::run) return.
    pub fn kicker(&self) -> Kicker {
        Kicker { fd: Arc::clone(&self.fd) }
    }

    /// The general registers as the last exit left them and [`set_general`](Self::set_general) changed them since. All
    /// zero before the first [`run`](Self::run): use [`get`](Self::get) there.
    #[inline]
    pub fn general(&self) -> General {
        self.page.general()
    }

    /// Changes the general registers with the next [`run`](Self::run).
    #[inline]
    pub fn set_general(&mut self, general: &General) {
        self.page.set_general(general);
        self.page.request(REQUEST_LOAD_GENERAL, true);
    }

    /// Reads, lets `change` alter, and writes the general registers: [`general`](Self::general) and
    /// [`set_general`](Self::set_general).
    pub fn modify_general(&mut self, change: impl FnOnce(&mut General)) {
        let mut general = self.general();
        change(&mut general);
        self.set_general(&general);
    }

    /// ESR_EL2 and FAR_EL2 of the last exit that was a synchronous exception (AArch64).
    pub fn syndrome(&self) -> (u64, u64) {
        self.page.syndrome()
    }

    /// Control registers and segments at the last exit, if it came with them: nested page faults and string I/O do.
    pub fn snapshot(&self) -> Option<Snapshot> {
        self.page.snapshot()
    }

    /// Some of [`snapshot`](Self::snapshot).
    #[inline]
    pub fn brief(&self) -> Option<Brief> {
        self.page.brief()
    }

    /// Answers the last exit, a port or system register read or a hypercall, with `value`. A system register write
    /// needs no answer.
    pub fn reply(&mut self, value: u64) {
        self.page.set_reply(value, 0);
    }

    /// Answers the last exit, a system register read or write, with a general protection fault.
    pub fn reply_fault(&mut self) {
        self.page.set_reply(0, REPLY_FAULT);
    }

    /// Asks for (or no longer for) an [`InterruptWindow`](crate::exit::AxVCpuExitReason::InterruptWindow) exit as soon
    /// as the guest can take an external interrupt.
    pub fn request_interrupt_window(&mut self, on: bool) {
        self.page.request(REQUEST_INTERRUPT_WINDOW, on);
    }

    /// Sets one general register by its number in the hardware's encoding (x86: 0 RAX, 1 RCX, ... 15 R15; AArch64: 0
    /// to 30).
    ///
    /// # Errors
    /// [`Error::SetGpr`]: `EINVAL` for a number that is none.
    pub fn set_gpr(&mut self, reg: u32, value: u64) -> Result<()> {
        // SAFETY: the structure holds no address of this process.
        unsafe { sys::with(self.as_fd(), ioctl::SET_GPR, &mut Gpr { reg, reserved: 0, value }) }
            .map_err(Error::SetGpr)?;
        let mut general = self.general();
        #[cfg(not(target_arch = "aarch64"))]
        let registers = &mut general.gpr;
        #[cfg(target_arch = "aarch64")]
        let registers = &mut general.x;
        if let Some(register) = registers.get_mut(reg as usize) {
            *register = value;
        }
        self.page.set_general(&general);
        Ok(())
    }

    /// Reads a register set from the module. A change by [`set_general`](Self::set_general) is there after the next
    /// [`run`](Self::run).
    ///
    /// # Errors
    /// [`Error::GetRegisters`]: `EBADFD` before [`setup`](Self::setup), `EALREADY` while running.
    pub fn get<S: RegisterSet>(&self) -> Result<S> {
        let mut set = S::ZERO;
        // SAFETY: `set` is exclusively ours, `SIZE` bytes long, and valid whatever bytes are stored.
        unsafe { self.transfer(ioctl::GET_REGS, S::SET, S::SIZE, (&raw mut set).cast()) }?;
        Ok(set)
    }

    /// Writes a register set. A set that is refused leaves the vCPU as it was.
    ///
    /// For [`General`] this takes the place of a change by [`set_general`](Self::set_general) that no
    /// [`run`](Self::run) has applied yet.
    ///
    /// # Errors
    /// [`Error::SetRegisters`]: `EINVAL` for a value that the architecture forbids, `EBADFD` before
    /// [`setup`](Self::setup), `EALREADY` while running.
    pub fn set<S: RegisterSet>(&mut self, set: &S) -> Result<()> {
        let mut copy = *set;
        // SAFETY: the kernel reads `SIZE` bytes, and `copy` has as many.
        unsafe { self.transfer(ioctl::SET_REGS, S::SET, S::SIZE, (&raw mut copy).cast()) }?;
        if S::SET == vcpu::SET_GENERAL {
            self.page.request(REQUEST_LOAD_GENERAL, false);
            let general = self.get::<General>()?;
            self.page.set_general(&general);
        }
        Ok(())
    }

    /// Reads model-specific registers.
    ///
    /// # Errors
    /// [`Error::GetRegisters`]: `EINVAL` if one of them has no per-vCPU value in the module, or if they are too many
    /// ([`vcpu::MAX_MSRS`]).
    pub fn msrs(&self, indices: &[u32]) -> Result<Vec<Msr>> {
        let mut msrs: Vec<Msr> = indices.iter().map(|&index| Msr { index, ..Msr::ZERO }).collect();
        let size = size_of_val(msrs.as_slice());
        // SAFETY: the vector is ours, `size` bytes long, and valid whatever bytes are stored.
        unsafe { self.transfer(ioctl::GET_REGS, vcpu::SET_MSRS, size, msrs.as_mut_ptr().cast()) }?;
        Ok(msrs)
    }

    /// Writes model-specific registers, all or none.
    ///
    /// # Errors
    /// [`Error::SetRegisters`]: `EINVAL` as for [`msrs`](Self::msrs), or for a value that the register does not take.
    pub fn set_msrs(&mut self, msrs: &[Msr]) -> Result<()> {
        let size = size_of_val(msrs);
        // SAFETY: the kernel only reads `size` bytes, and the slice has as many.
        unsafe { self.transfer(ioctl::SET_REGS, vcpu::SET_MSRS, size, msrs.as_ptr().cast_mut().cast()) }
    }

    /// Reads the extended (FPU, SSE, AVX, ...) state in the standard format of XSAVE.
    ///
    /// # Errors
    /// [`Error::GetRegisters`].
    pub fn xsave(&self) -> Result<Vec<u8>> {
        let mut area = std::vec![0; self.xsave_size];
        // SAFETY: the vector is ours and of the given length.
        unsafe { self.transfer(ioctl::GET_REGS, vcpu::SET_XSAVE, area.len(), area.as_mut_ptr()) }?;
        Ok(area)
    }

    /// Writes the extended state; `area` has the length and format that [`xsave`](Self::xsave) gives.
    ///
    /// # Errors
    /// [`Error::SetRegisters`]: `EINVAL` for a wrong length, a component that is not enabled, a set reserved bit.
    pub fn set_xsave(&mut self, area: &[u8]) -> Result<()> {
        // SAFETY: the kernel only reads, and the slice has the given length.
        unsafe { self.transfer(ioctl::SET_REGS, vcpu::SET_XSAVE, area.len(), area.as_ptr().cast_mut()) }
    }

    /// `GET_REGS` or `SET_REGS`.
    ///
    /// # Safety
    /// `buffer` is the address of `len` bytes, which the caller may write if `request` is `GET_REGS`, and which may be
    /// given any content.
    unsafe fn transfer(&self, request: u32, set: u32, len: usize, buffer: *mut u8) -> Result<()> {
        let fail = |errno| {
            if request == ioctl::GET_REGS {
                Error::GetRegisters { set, errno }
            } else {
                Error::SetRegisters { set, errno }
            }
        };
        let len = u32::try_from(len).map_err(|_| fail(Errno::EINVAL))?;
        let mut argument = vcpu::RegisterSet { set, len, addr: buffer as u64 };
        // SAFETY: the caller's promise about `buffer` is the one that is asked for.
        unsafe { sys::with(self.as_fd(), request, &mut argument) }.map_err(fail)?;
        Ok(())
    }

    /// Queues an event: an interrupt for the next interrupt window, or an NMI, exception or software interrupt for the
    /// next entry.
    ///
    /// # Errors
    /// [`Error::Inject`]: `EAGAIN` if one of that kind is waiting already, `EINVAL` for one that the architecture does
    /// not have.
    pub fn inject(&mut self, event: &Event) -> Result<()> {
        let mut event = *event;
        // SAFETY: the structure holds no address of this process.
        unsafe { sys::with(self.as_fd(), ioctl::INJECT, &mut event) }.map_err(Error::Inject)?;
        Ok(())
    }

    /// Carries out an access of the guest to its xAPIC page, at byte `offset`: a write of the given value, or a read.
    /// Returns the value read, or written.
    ///
    /// # Errors
    /// [`Error::ApicAccess`]: `EOPNOTSUPP` without in-kernel APIC, `EINVAL` for an offset that is no register's.
    pub fn apic_access(&mut self, offset: u32, write: Option<u32>) -> Result<u32> {
        let flags = if write.is_some() { APIC_WRITE } else { 0 };
        let mut access = ApicAccess { offset, flags, value: write.unwrap_or(0), reserved: 0 };
        // SAFETY: the structure holds no address of this process.
        unsafe { sys::with(self.as_fd(), ioctl::APIC_ACCESS, &mut access) }.map_err(Error::ApicAccess)?;
        Ok(access.value)
    }

    /// Counters since the vCPU was created.
    ///
    /// # Errors
    /// [`Error::VcpuStats`].
    pub fn stats(&self) -> Result<VcpuStats> {
        stats(self.as_fd())
    }
}

impl AsFd for Vcpu {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Makes a vCPU's [`run`](Vcpu::run) return, from any thread. It may outlive the [`Vcpu`].
///
/// ```no_run
/// # let mut vcpu = axvcpu_uapi::client::System::open()?.create_vm()?.create_vcpu(0)?;
/// let kicker = vcpu.kicker();
/// std::thread::spawn(move || {
///     std::thread::sleep(std::time::Duration::from_secs(1));
///     kicker.kick()
/// });
/// let exit = vcpu.run()?; // Interrupted after a second at most
/// # Ok::<(), axvcpu_uapi::client::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Kicker {
    fd: Arc<OwnedFd>,
}

impl Kicker {
    /// Makes the current [`run`](Vcpu::run), or else the next, return with
    /// [`Interrupted`](crate::exit::AxVCpuExitReason::Interrupted). Kicks do not add up. It does one system call and
    /// nothing else, so it may be called in a signal handler.
    ///
    /// # Errors
    /// [`Error::Kick`].
    pub fn kick(&self) -> Result<()> {
        sys::none(self.fd.as_fd(), ioctl::KICK).map_err(Error::Kick)?;
        Ok(())
    }

    /// The vCPU's counters, which can be read while it runs.
    ///
    /// # Errors
    /// [`Error::VcpuStats`].
    pub fn stats(&self) -> Result<VcpuStats> {
        stats(self.fd.as_fd())
    }
}

fn stats(fd: BorrowedFd<'_>) -> Result<VcpuStats> {
    let mut stats = VcpuStats::ZERO;
    // SAFETY: the structure holds no address.
    unsafe { sys::with(fd, ioctl::VCPU_STATS, &mut stats) }.map_err(Error::VcpuStats)?;
    Ok(stats)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn handles_cross_threads_as_documented() {
        const fn send<T: Send>() {}
        const fn share<T: Send + Sync + Clone>() {}
        send::<Vcpu>();
        share::<Kicker>();
        share::<super::super::Vm>();
        share::<AddressSpace>();
    }
}
