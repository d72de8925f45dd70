// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! What can go wrong, one variant for each operation, and the sentence that tells people the cause and the cure.

use crate::exit::UnknownExit;
use nix::errno::Errno;
use std::fmt;
use std::path::PathBuf;

/// Result of the operations on handles.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failed operation. Variants with an [`Errno`] are refusals by the kernel; axvcpu(4) lists the causes of each.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Error {
    /// The device node could not be opened.
    Open {
        /// Its path.
        path: PathBuf,
        /// Why.
        errno: Errno,
    },
    /// The file that was opened is not an axvcpu device.
    NotAxvcpu {
        /// Its path.
        path: PathBuf,
        /// What `INFO` answered.
        errno: Errno,
    },
    /// The module speaks another version of the ABI.
    AbiVersion {
        /// The module's version.
        module: u32,
        /// [`crate::ABI_VERSION`], this program's.
        program: u32,
    },
    /// The module's run page is smaller than this program's.
    RunPageSize {
        /// The module's size, in bytes.
        module: u32,
    },
    /// `INFO` failed.
    Info(Errno),
    /// `SUPPORTED_CPUID` failed.
    SupportedCpuid(Errno),
    /// `CREATE_VM` failed.
    CreateVm(Errno),
    /// `CREATE_ADDRESS_SPACE` failed.
    CreateAddressSpace(Errno),
    /// `CREATE_VCPU` failed.
    CreateVcpu {
        /// The number asked for.
        id: u32,
        /// Why.
        errno: Errno,
    },
    /// The run page could not be mapped.
    MapRunPage(Errno),
    /// `CREATE_GIC` failed.
    CreateGic(Errno),
    /// `SIGNAL_MSI` failed.
    SignalMsi(Errno),
    /// `IRQFD` failed to attach.
    AttachInterrupt(Errno),
    /// `IRQFD` failed to detach.
    DetachInterrupt(Errno),
    /// `IOEVENTFD` failed to attach.
    AttachIo(Errno),
    /// `IOEVENTFD` failed to detach.
    DetachIo(Errno),
    /// `VM_STATS` failed.
    VmStats(Errno),
    /// Memory could not be allocated.
    AllocateMemory {
        /// Bytes asked for.
        size: usize,
        /// Why.
        errno: Errno,
    },
    /// Memory could not be handed back to the system (`madvise`).
    AdviseMemory(Errno),
    /// An access or a mapping reaches beyond the end of its memory.
    OutOfBounds {
        /// First byte, as an offset into the memory.
        offset: usize,
        /// Length in bytes.
        size: usize,
        /// Length of the memory in bytes.
        memory_size: usize,
    },
    /// `MAP` failed.
    Map {
        /// First guest physical address.
        guest_addr: u64,
        /// Length in bytes.
        size: u64,
        /// Why.
        errno: Errno,
    },
    /// `UNMAP` failed.
    Unmap {
        /// First guest physical address.
        guest_addr: u64,
        /// Length in bytes.
        size: u64,
        /// Why.
        errno: Errno,
    },
    /// `PROTECT` failed.
    Protect {
        /// First guest physical address.
        guest_addr: u64,
        /// Length in bytes.
        size: u64,
        /// Why.
        errno: Errno,
    },
    /// `START_DIRTY_LOG` failed.
    StartDirtyLog {
        /// First guest physical address.
        guest_addr: u64,
        /// Length in bytes.
        size: u64,
        /// Why.
        errno: Errno,
    },
    /// `READ_DIRTY_LOG` failed.
    ReadDirtyLog(Errno),
    /// `STOP_DIRTY_LOG` failed.
    StopDirtyLog(Errno),
    /// `SET_ENTRY` failed.
    SetEntry(Errno),
    /// `SET_EPT_ROOT` failed.
    SetEptRoot(Errno),
    /// `SETUP` failed.
    Setup(Errno),
    /// `RUN` failed.
    Run(Errno),
    /// `RUN` returned an exit that this program does not know.
    UnknownExit(UnknownExit),
    /// `SET_GPR` failed.
    SetGpr(Errno),
    /// `GET_REGS` failed.
    GetRegisters {
        /// Number of the register set.
        set: u32,
        /// Why.
        errno: Errno,
    },
    /// `SET_REGS` failed.
    SetRegisters {
        /// Number of the register set.
        set: u32,
        /// Why.
        errno: Errno,
    },
    /// `INJECT` failed.
    Inject(Errno),
    /// `KICK` failed.
    Kick(Errno),
    /// `APIC_ACCESS` failed.
    ApicAccess(Errno),
    /// `VCPU_STATS` failed.
    VcpuStats(Errno),
}

impl Error {
    /// The errno that the kernel gave, if it was the kernel that refused.
    pub const fn errno(&self) -> Option<Errno> {
        match self {
            Self::Open { errno, .. }
            | Self::NotAxvcpu { errno, .. }
            | Self::CreateVcpu { errno, .. }
            | Self::AllocateMemory { errno, .. }
            | Self::Map { errno, .. }
            | Self::Unmap { errno, .. }
            | Self::Protect { errno, .. }
            | Self::StartDirtyLog { errno, .. }
            | Self::GetRegisters { errno, .. }
            | Self::SetRegisters { errno, .. }
            | Self::Info(errno)
            | Self::SupportedCpuid(errno)
            | Self::CreateVm(errno)
            | Self::CreateAddressSpace(errno)
            | Self::MapRunPage(errno)
            | Self::CreateGic(errno)
            | Self::SignalMsi(errno)
            | Self::ReadDirtyLog(errno)
            | Self::StopDirtyLog(errno)
            | Self::AttachInterrupt(errno)
            | Self::DetachInterrupt(errno)
            | Self::AttachIo(errno)
            | Self::DetachIo(errno)
            | Self::VmStats(errno)
            | Self::AdviseMemory(errno)
            | Self::SetEntry(errno)
            | Self::SetEptRoot(errno)
            | Self::Setup(errno)
            | Self::Run(errno)
            | Self::SetGpr(errno)
            | Self::Inject(errno)
            | Self::Kick(errno)
            | Self::ApicAccess(errno)
            | Self::VcpuStats(errno) => Some(*errno),
            Self::AbiVersion { .. } | Self::RunPageSize { .. } | Self::OutOfBounds { .. } | Self::UnknownExit(_) => {
                None
            }
        }
    }

    /// The likely cause and its cure, where the errno has one meaning for this operation.
    fn hint(&self) -> Option<&'static str> {
        let errno = self.errno()?;
        Some(match (self, errno) {
            (Self::Open { .. }, Errno::ENOENT) => "is the module loaded? (insmod axvcpu.ko)",
            (Self::Open { .. }, Errno::EACCES | Errno::EPERM) => {
                "the device belongs to root; give it to a group with a udev rule, see axvcpu(4)"
            }
            (Self::Open { .. }, Errno::ENXIO | Errno::ENODEV) => "the device node is stale: its module is not loaded",
            (_, Errno::EXDEV) => "the VM belongs to another process; its handles cannot be used after fork",
            (Self::Run(_) | Self::Setup(_) | Self::CreateVm(_) | Self::CreateVcpu { .. }, Errno::EBUSY) => {
                "another hypervisor (normally KVM) owns the CPU's virtualization extension; \
                 stop its guests and unload it (modprobe -r kvm_amd kvm_intel)"
            }
            (Self::CreateVcpu { .. }, Errno::EEXIST) => "the VM has a vCPU of this number already",
            (Self::Run(_) | Self::Setup(_) | Self::CreateVm(_) | Self::CreateVcpu { .. }, Errno::ENODEV) => {
                "this CPU has no virtualization extension that the module can use; in a virtual machine, \
                 nested virtualization must be enabled outside"
            }
            (Self::Run(_) | Self::Setup(_) | Self::CreateVm(_) | Self::CreateVcpu { .. }, Errno::EPERM) => {
                "the firmware has switched virtualization off; enable SVM or VT-x in its setup"
            }
            (Self::Run(_), Errno::EFAULT) => {
                "the guest used memory that the program has mapped into it but unmapped or protected itself"
            }
            (Self::Run(_), Errno::EIO) => {
                "the virtualization extension was switched off under the running guest by other software"
            }
            (Self::Run(_), Errno::EUCLEAN) => {
                "the CPU has overwritten the guest's state with the host's, which only a defective or an emulated one does; \
                 the guest must be started anew"
            }
            (Self::Run(_), Errno::ENOTRECOVERABLE) => "the vCPU failed earlier and must be created anew",
            (Self::Run(_), Errno::EALREADY) => "the vCPU is being run by another thread",
            (
                Self::SetGpr(_)
                | Self::GetRegisters { .. }
                | Self::SetRegisters { .. }
                | Self::Inject(_)
                | Self::ApicAccess(_)
                | Self::SetEntry(_)
                | Self::SetEptRoot(_)
                | Self::Setup(_),
                Errno::EALREADY,
            ) => "the vCPU is running; kick it first",
            (Self::SetEntry(_), Errno::EEXIST) => "the entry point is already set",
            (Self::SetEptRoot(_), Errno::EEXIST) => "the address space is already set",
            (Self::Setup(_), Errno::EEXIST) => "the vCPU is already set up",
            (Self::Setup(_), Errno::ENODATA) => "the entry point and the address space must be set before",
            (Self::Setup(_), Errno::EINVAL) => "the CPUID table asks for something that SUPPORTED_CPUID does not offer",
            (_, Errno::EBADFD) => "the vCPU is not set up yet",
            (Self::Map { .. }, Errno::EEXIST) => "the range overlaps a mapped one",
            (Self::Unmap { .. } | Self::Protect { .. }, Errno::ENOENT) => "part of the range is not mapped",
            (Self::Map { .. } | Self::Unmap { .. } | Self::Protect { .. }, Errno::EINVAL) => {
                "addresses and sizes must be multiples of 4096 inside the guest's address width, and the access rights \
                 must include reading"
            }
            (Self::AttachInterrupt(_), Errno::EEXIST) => "the eventfd is attached already",
            (Self::AttachIo(_), Errno::EEXIST) => "an eventfd is attached to such writes already",
            (Self::DetachInterrupt(_) | Self::DetachIo(_), Errno::ENOENT) => "nothing of that kind is attached",
            (Self::StartDirtyLog { .. }, Errno::EEXIST) => "the address space is being logged already",
            (Self::ReadDirtyLog(_) | Self::StopDirtyLog(_), Errno::ENOENT) => "the address space is not being logged",
            (Self::StartDirtyLog { .. } | Self::ReadDirtyLog(_), Errno::EINVAL) => {
                "address and size must be multiples of 256 KiB, and what is read inside what is logged"
            }
            (Self::Inject(_), Errno::EAGAIN) => "an event of that kind is still waiting to be delivered",
            (_, Errno::ENOSPC) => "a limit of the module is reached, see axvcpu(4)",
            _ => return None,
        })
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Open { path, .. } => write!(f, "cannot open {}", path.display())?,
            Self::NotAxvcpu { path, .. } => write!(f, "{} is not an axvcpu device", path.display())?,
            Self::AbiVersion { module, program } => {
                let older = if module < program { "module" } else { "program" };
                write!(
                    f,
                    "the module speaks version {module} of the axvcpu ABI and this program version {program}; \
                     install a newer {older}"
                )?;
            }
            Self::RunPageSize { module } => {
                write!(f, "the module's run page has {module} bytes, which is too small for this program")?;
            }
            Self::Info(_) => f.write_str("cannot ask the module for its capabilities")?,
            Self::SupportedCpuid(_) => f.write_str("cannot read the supported CPUID leaves")?,
            Self::CreateVm(_) => f.write_str("cannot create a virtual machine")?,
            Self::CreateAddressSpace(_) => f.write_str("cannot create an address space")?,
            Self::CreateVcpu { id, .. } => write!(f, "cannot create vCPU {id}")?,
            Self::MapRunPage(_) => f.write_str("cannot map the vCPU's run page")?,
            Self::CreateGic(_) => f.write_str("cannot create the interrupt controller")?,
            Self::SignalMsi(_) => f.write_str("cannot deliver an interrupt message")?,
            Self::AttachInterrupt(_) => f.write_str("cannot let an eventfd interrupt the guest")?,
            Self::DetachInterrupt(_) => f.write_str("cannot stop an eventfd from interrupting the guest")?,
            Self::AttachIo(_) => f.write_str("cannot let the guest signal an eventfd")?,
            Self::DetachIo(_) => f.write_str("cannot stop the guest from signalling an eventfd")?,
            Self::VmStats(_) => f.write_str("cannot read the virtual machine's statistics")?,
            Self::AllocateMemory { size, .. } => write!(f, "cannot allocate {size} bytes of guest memory")?,
            Self::AdviseMemory(_) => f.write_str("cannot change how the system treats guest memory")?,
            Self::OutOfBounds { offset, size, memory_size } => {
                write!(f, "{size} bytes at offset {offset:#x} are not inside a memory of {memory_size:#x} bytes")?;
            }
            Self::Map { guest_addr, size, .. } => {
                write!(f, "cannot map {size:#x} bytes at guest physical address {guest_addr:#x}")?;
            }
            Self::Unmap { guest_addr, size, .. } => {
                write!(f, "cannot unmap {size:#x} bytes at guest physical address {guest_addr:#x}")?;
            }
            Self::Protect { guest_addr, size, .. } => {
                write!(f, "cannot change access to {size:#x} bytes at guest physical address {guest_addr:#x}")?;
            }
            Self::StartDirtyLog { guest_addr, size, .. } => {
                write!(f, "cannot log writes to {size:#x} bytes at guest physical address {guest_addr:#x}")?;
            }
            Self::ReadDirtyLog(_) => f.write_str("cannot read the dirty log")?,
            Self::StopDirtyLog(_) => f.write_str("cannot stop the dirty log")?,
            Self::SetEntry(_) => f.write_str("cannot set the entry point")?,
            Self::SetEptRoot(_) => f.write_str("cannot set the vCPU's address space")?,
            Self::Setup(_) => f.write_str("cannot set up the vCPU")?,
            Self::Run(_) => f.write_str("cannot run the vCPU")?,
            Self::UnknownExit(UnknownExit(record)) => write!(
                f,
                "the vCPU stopped for a reason this program does not know: number {}, {:#x?}",
                record.reason, record.data
            )?,
            Self::SetGpr(_) => f.write_str("cannot set a general register")?,
            Self::GetRegisters { set, .. } => write!(f, "cannot read register set {set}")?,
            Self::SetRegisters { set, .. } => write!(f, "cannot write register set {set}")?,
            Self::Inject(_) => f.write_str("cannot inject an event")?,
            Self::Kick(_) => f.write_str("cannot kick the vCPU")?,
            Self::ApicAccess(_) => f.write_str("cannot access the local APIC")?,
            Self::VcpuStats(_) => f.write_str("cannot read the vCPU's statistics")?,
        }
        match (self.hint(), self.errno()) {
            (Some(hint), _) => write!(f, ": {hint}"),
            (None, Some(errno)) => write!(f, ": {}", errno.desc()),
            (None, None) => Ok(()),
        }
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;
    use std::string::ToString;

    #[test]
    fn messages_name_operation_cause_and_cure() {
        assert_eq!(
            Error::Open { path: "/dev/axvcpu".into(), errno: Errno::ENOENT }.to_string(),
            "cannot open /dev/axvcpu: is the module loaded? (insmod axvcpu.ko)"
        );
        assert!(Error::Run(Errno::EBUSY).to_string().contains("KVM"));
        assert_eq!(Error::Kick(Errno::EIO).to_string(), "cannot kick the vCPU: I/O error");
        assert_eq!(
            Error::AbiVersion { module: 2, program: 1 }.to_string(),
            "the module speaks version 2 of the axvcpu ABI and this program version 1; install a newer program"
        );
    }

    #[test]
    fn errno_is_the_kernels() {
        assert_eq!(Error::Map { guest_addr: 0, size: 1, errno: Errno::EINVAL }.errno(), Some(Errno::EINVAL));
        assert_eq!(Error::OutOfBounds { offset: 1, size: 2, memory_size: 0 }.errno(), None);
    }
}
