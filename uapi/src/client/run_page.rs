// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The run page as a vCPU handle sees it: mapped memory that the kernel writes, read and written field by field.
//!
//! Accesses are volatile: the kernel writes the page during `RUN`, and whoever else has the file descriptor may map it
//! too.
#![allow(unsafe_code)]

use super::error::{Error, Result};
use super::General;
use crate::exit::{AxVCpuExitReason, ExitRecord};
use crate::run::{RunPage, STATE_INTERRUPT_WINDOW_OPEN, STATE_SNAPSHOT_VALID, STATE_USER_MODE};
use crate::x86::{Control, Segments};
use nix::sys::mman::{mmap, munmap, MapFlags, ProtFlags};
use std::num::NonZeroUsize;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;

/// An exit, copied out of the run page: it stays what it is while registers are read and written and the vCPU runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// Why `RUN` returned.
    pub reason: AxVCpuExitReason,
    state: u32,
    insn_len: u8,
    insn: [u8; 16],
    next_rip: u64,
}

impl Exit {
    /// An exit that comes from elsewhere than a run page, without instruction bytes: for programs that also carry guests
    /// by another hypervisor and speak of them in the words of this ABI. `state` is a set of `STATE_*` of [`crate::run`],
    /// without [`STATE_SNAPSHOT_VALID`].
    pub const fn new(reason: AxVCpuExitReason, state: u32) -> Self {
        Self { reason, state, insn_len: 0, insn: [0; 16], next_rip: 0 }
    }

    /// Whether an external interrupt injected now would be delivered at once.
    pub fn interrupt_window_open(&self) -> bool {
        self.state & STATE_INTERRUPT_WINDOW_OPEN != 0
    }

    /// Whether the guest runs in user mode (x86: CPL 3).
    pub fn user_mode(&self) -> bool {
        self.state & STATE_USER_MODE != 0
    }

    /// The bytes of the instruction at the instruction pointer, as many as the CPU gave (none on many CPUs). There may
    /// be bytes of the following instruction behind it.
    pub fn insn(&self) -> &[u8] {
        self.insn.get(..usize::from(self.insn_len)).unwrap_or(&self.insn)
    }

    /// Address of the next instruction, where the CPU told it.
    pub fn next_rip(&self) -> Option<u64> {
        (self.next_rip != 0).then_some(self.next_rip)
    }
}

/// Control registers and segments at an exit that needs them for decoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Control registers.
    pub control: Control,
    /// Segment and descriptor-table registers.
    pub segments: Segments,
}

/// Of a [`Snapshot`], what is enough to know an instruction again that was decoded before, and to find its operand in 64-bit
/// mode. Far less to read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Brief {
    /// CR0.
    pub cr0: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// EFER.
    pub efer: u64,
    /// Attributes of CS.
    pub code_attributes: u16,
    /// Base of FS.
    pub fs_base: u64,
    /// Base of GS.
    pub gs_base: u64,
}

impl From<&Snapshot> for Brief {
    fn from(snapshot: &Snapshot) -> Self {
        let Snapshot { control: Control { cr0, cr3, cr4, efer, .. }, segments: Segments { cs, fs, gs, .. } } =
            *snapshot;
        Self { cr0, cr3, cr4, efer, code_attributes: cs.attributes, fs_base: fs.base, gs_base: gs.base }
    }
}

/// A mapping of a vCPU's run page.
#[derive(Debug)]
pub(super) struct Mapping {
    page: NonNull<RunPage>,
}

// SAFETY: the mapping belongs to the process, not to the thread that made it.
unsafe impl Send for Mapping {}

/// Reads one field of the page.
macro_rules! get {
    ($mapping:expr, $($field:ident).+) => {
        // SAFETY: the page stays mapped, and aligned, as long as the mapping; every bit pattern is valid for an ABI
        // structure.
        unsafe { std::ptr::read_volatile(&raw const (*$mapping.page.as_ptr()).$($field).+) }
    };
}
/// Writes one field of the page.
macro_rules! set {
    ($mapping:expr, $field:ident, $value:expr) => {{
        let value = $value;
        // SAFETY: the page stays mapped writable, and aligned, as long as the mapping, and no reference to it exists.
        unsafe { std::ptr::write_volatile(&raw mut (*$mapping.page.as_ptr()).$field, value) }
    }};
}

impl Mapping {
    /// Maps the run page of the vCPU `fd`.
    ///
    /// # Errors
    /// [`Error::MapRunPage`].
    pub(super) fn new(fd: BorrowedFd<'_>) -> Result<Self> {
        const SIZE: NonZeroUsize = NonZeroUsize::new(size_of::<RunPage>()).expect("the run page is not empty");
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice disturbs no existing memory.
        let page = unsafe { mmap(None, SIZE, protection, MapFlags::MAP_SHARED, fd, 0) }.map_err(Error::MapRunPage)?;
        Ok(Self { page: page.cast() })
    }

    /// Decodes the last exit.
    ///
    /// # Errors
    /// [`Error::UnknownExit`].
    #[inline]
    pub(super) fn exit(&self) -> Result<Exit> {
        let record: ExitRecord = get!(self, exit);
        let state = get!(self, state);
        // What the page says of the instruction is of the last exit that came with a snapshot.
        let decoded = state & STATE_SNAPSHOT_VALID != 0;
        Ok(Exit {
            reason: AxVCpuExitReason::decode(&record).map_err(Error::UnknownExit)?,
            state,
            insn_len: if decoded { get!(self, insn_len).min(16) as u8 } else { 0 },
            insn: if decoded { get!(self, insn) } else { [0; 16] },
            next_rip: if decoded { get!(self, next_rip) } else { 0 },
        })
    }

    /// Control registers and segments, if the last exit came with them.
    pub(super) fn snapshot(&self) -> Option<Snapshot> {
        (get!(self, state) & STATE_SNAPSHOT_VALID != 0)
            .then(|| Snapshot { control: get!(self, control), segments: get!(self, segments) })
    }

    /// Some of that.
    #[inline]
    pub(super) fn brief(&self) -> Option<Brief> {
        (get!(self, state) & STATE_SNAPSHOT_VALID != 0).then(|| Brief {
            cr0: get!(self, control.cr0),
            cr3: get!(self, control.cr3),
            cr4: get!(self, control.cr4),
            efer: get!(self, control.efer),
            code_attributes: get!(self, segments.cs.attributes),
            fs_base: get!(self, segments.fs.base),
            gs_base: get!(self, segments.gs.base),
        })
    }

    /// The general registers.
    #[inline]
    #[cfg(not(target_arch = "aarch64"))]
    pub(super) fn general(&self) -> General {
        get!(self, general)
    }

    /// The general registers.
    #[cfg(target_arch = "aarch64")]
    pub(super) fn general(&self) -> General {
        get!(self, arm64)
    }

    /// Stores the general registers; without `REQUEST_LOAD_GENERAL` the kernel does not look at them.
    #[inline]
    #[cfg(not(target_arch = "aarch64"))]
    pub(super) fn set_general(&mut self, general: &General) {
        set!(self, general, *general);
    }

    /// Stores the general registers; without `REQUEST_LOAD_GENERAL` the kernel does not look at them.
    #[cfg(target_arch = "aarch64")]
    pub(super) fn set_general(&mut self, general: &General) {
        set!(self, arm64, *general);
    }

    /// ESR_EL2 and FAR_EL2 of the last synchronous exception (AArch64).
    pub(super) fn syndrome(&self) -> (u64, u64) {
        (get!(self, esr), get!(self, far))
    }

    /// Stores the answer to a read: a value, and `REPLY_*`.
    pub(super) fn set_reply(&mut self, value: u64, reply: u32) {
        set!(self, value, value);
        set!(self, reply, reply);
    }

    /// Sets (`on`) or clears bits of the request field.
    pub(super) fn request(&mut self, bits: u32, on: bool) {
        let request = get!(self, request);
        set!(self, request, if on { request | bits } else { request & !bits });
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `new` mapped exactly this range, and nothing refers to it after the drop. It cannot fail for a mapped
        // range.
        let _ = unsafe { munmap(self.page.cast(), size_of::<RunPage>()) };
    }
}
