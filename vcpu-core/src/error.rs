// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! Errors: one variant for each cause, and the errno that userspace sees for it.

/// Result of everything that can fail.
pub type AxResult<T = ()> = Result<T, AxError>;

/// An errno value of Linux (`include/uapi/asm-generic/errno.h`), positive.
pub type Errno = i32;

macro_rules! errors {
    ($($(#[$meta:meta])* $name:ident => $errno:literal $text:literal,)+) => {
        /// Why a call was refused or failed. None of them changes the vCPU it was made on, except that
        /// [`Failed`](Self::Failed) tells of an earlier, fatal one.
        #[non_exhaustive]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum AxError { $($(#[$meta])* $name,)+ }

        impl AxError {
            /// Every error, for tests and documentation.
            pub const ALL: &'static [AxError] = &[$(Self::$name,)+];

            /// The errno that an ioctl returns for it.
            pub const fn errno(self) -> Errno {
                match self { $(Self::$name => $errno,)+ }
            }

            /// One clause for people.
            pub const fn message(self) -> &'static str {
                match self { $(Self::$name => $text,)+ }
            }
        }
    };
}

errors! {
    /// A value is out of its domain. `EINVAL`.
    InvalidInput => 22 "a value is invalid",
    /// A register value is one that the architecture forbids. `EINVAL`.
    InvalidRegister => 22 "a register value is invalid",
    /// A userspace address cannot be accessed. `EFAULT`.
    BadAddress => 14 "an address cannot be accessed",
    /// An allocation failed. `ENOMEM`.
    NoMemory => 12 "out of memory",
    /// A limit of the module is reached. `ENOSPC`.
    LimitReached => 28 "a limit is reached",
    /// The entry point has been set already. `EEXIST`.
    EntryAlreadySet => 17 "the entry point is already set",
    /// The nested page table's root has been set already. `EEXIST`.
    EptRootAlreadySet => 17 "the address space is already set",
    /// `setup` has been done already. `EEXIST`.
    AlreadySetUp => 17 "the vCPU is already set up",
    /// `setup` before `set_entry`. `ENODATA`.
    EntryNotSet => 61 "the entry point is not set",
    /// `setup` before `set_ept_root`. `ENODATA`.
    EptRootNotSet => 61 "the address space is not set",
    /// Something that needs a vCPU that is set up. `EBADFD`.
    NotSetUp => 77 "the vCPU is not set up",
    /// `run` or `unbind` while not bound to a CPU. `ENOTCONN`.
    NotBound => 107 "the vCPU is not bound to a CPU",
    /// `bind` while bound. `EISCONN`.
    AlreadyBound => 106 "the vCPU is already bound to a CPU",
    /// `run` on another CPU than the bound one. `EXDEV`.
    WrongCpu => 18 "the vCPU is bound to another CPU",
    /// The vCPU is being run. `EALREADY`.
    Running => 114 "the vCPU is running",
    /// The vCPU is asleep and must be woken first. `EINPROGRESS`.
    Blocked => 115 "the vCPU is asleep",
    /// The vCPU has failed for good. `ENOTRECOVERABLE`.
    Failed => 131 "the vCPU has failed",
    /// Another hypervisor owns the CPU's virtualization extension. `EBUSY`.
    HardwareBusy => 16 "another hypervisor owns the CPU's virtualization extension",
    /// The CPU has no usable virtualization extension. `ENODEV`.
    NoHardware => 19 "the CPU has no usable virtualization extension",
    /// The firmware has switched the extension off. `EPERM`.
    DisabledByFirmware => 1 "the firmware has disabled the CPU's virtualization extension",
    /// The extension went away while it was in use. `EIO`.
    HardwareLost => 5 "the CPU's virtualization extension was switched off under a running vCPU",
    /// The CPU has left the host's state where the guest's was. `EUCLEAN`.
    StateLost => 117 "the CPU has overwritten the guest's state with the host's",
    /// Not offered by this backend. `EOPNOTSUPP`.
    Unsupported => 95 "not supported by this backend",
    /// The event slot is taken. `EAGAIN`.
    EventPending => 11 "an event of that kind is already pending",
    /// The range overlaps a mapped one. `EEXIST`.
    AlreadyMapped => 17 "the range overlaps a mapped one",
    /// Part of the range is not mapped. `ENOENT`.
    NotMapped => 2 "the range is not mapped",
}

impl core::fmt::Display for AxError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(self.message())
    }
}

impl core::error::Error for AxError {}
