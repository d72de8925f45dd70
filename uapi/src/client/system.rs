// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! [`System`]: the device, where everything begins.
#![allow(unsafe_code)]

use super::error::{Error, Result};
use super::sys;
use super::vm::Vm;
use crate::layout::AbiStruct;
use crate::run::RunPage;
use crate::system::{CpuidTable, CreateVm, SystemInfo};
use crate::x86::CpuidEntry;
use crate::{ioctl, ABI_VERSION, DEVICE_PATH};
use nix::errno::Errno;
use std::fs::OpenOptions;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::vec::Vec;

/// An open axvcpu device whose module speaks this program's ABI.
///
/// ```no_run
/// let system = axvcpu_uapi::client::System::open()?;
/// let info = system.info()?;
/// println!("backend {}, up to {} vCPUs", info.backend, info.max_vcpus);
/// # Ok::<(), axvcpu_uapi::client::Error>(())
/// ```
#[derive(Debug)]
pub struct System {
    fd: OwnedFd,
    xsave_size: usize,
}

impl System {
    /// Opens [`DEVICE_PATH`].
    ///
    /// # Errors
    /// As [`open_path`](Self::open_path).
    pub fn open() -> Result<Self> {
        Self::open_path(DEVICE_PATH)
    }

    /// Opens the device at `path` and compares ABI versions.
    ///
    /// # Errors
    /// [`Error::Open`], [`Error::NotAxvcpu`], [`Error::AbiVersion`], [`Error::RunPageSize`].
    pub fn open_path(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(|error| Error::Open {
            path: path.into(),
            errno: error.raw_os_error().map_or(Errno::EINVAL, Errno::from_raw),
        })?;
        let mut system = Self { fd: file.into(), xsave_size: 0 };
        let info = system.query().map_err(|errno| Error::NotAxvcpu { path: path.into(), errno })?;
        Self::check(&info)?;
        system.xsave_size = info.xsave_size as usize;
        Ok(system)
    }

    fn check(info: &SystemInfo) -> Result<()> {
        if info.abi_version != ABI_VERSION {
            return Err(Error::AbiVersion { module: info.abi_version, program: ABI_VERSION });
        }
        if (info.run_page_size as usize) < RunPage::SIZE {
            return Err(Error::RunPageSize { module: info.run_page_size });
        }
        Ok(())
    }

    fn query(&self) -> Result<SystemInfo, Errno> {
        let mut info = SystemInfo::ZERO;
        // SAFETY: the structure holds no address.
        unsafe { sys::with(self.fd.as_fd(), ioctl::INFO, &mut info) }?;
        Ok(info)
    }

    /// What the module is and can do, and whether it could run a vCPU just now.
    ///
    /// # Errors
    /// [`Error::Info`].
    pub fn info(&self) -> Result<SystemInfo> {
        self.query().map_err(Error::Info)
    }

    /// The CPUID leaves that a guest may be given, with every feature that this host can offer.
    ///
    /// # Errors
    /// [`Error::SupportedCpuid`].
    pub fn supported_cpuid(&self) -> Result<Vec<CpuidEntry>> {
        let mut entries = std::vec![CpuidEntry::ZERO; 64];
        loop {
            let capacity = u32::try_from(entries.len()).map_err(|_| Error::SupportedCpuid(Errno::E2BIG))?;
            let mut table = CpuidTable { entries_addr: entries.as_mut_ptr() as u64, capacity, count: 0 };
            // SAFETY: the kernel writes at most `capacity` entries to the address, which is that of as many, not used
            // by anybody else during the call.
            let result = unsafe { sys::with(self.fd.as_fd(), ioctl::SUPPORTED_CPUID, &mut table) };
            match result {
                Ok(_) => {
                    entries.truncate(table.count as usize);
                    return Ok(entries);
                }
                Err(Errno::E2BIG) if table.count > capacity => entries.resize(table.count as usize, CpuidEntry::ZERO),
                Err(errno) => return Err(Error::SupportedCpuid(errno)),
            }
        }
    }

    /// Creates a virtual machine, which belongs to this process.
    ///
    /// # Errors
    /// [`Error::CreateVm`]: `ENODEV` without usable hardware, `ENOSPC` or `ENOMEM` at a limit.
    pub fn create_vm(&self) -> Result<Vm> {
        // SAFETY: the structure holds no address, and the call returns a new file descriptor.
        let fd = unsafe { sys::create(self.fd.as_fd(), ioctl::CREATE_VM, &mut CreateVm::default()) };
        Ok(Vm::new(fd.map_err(Error::CreateVm)?, self.xsave_size))
    }
}

impl AsFd for System {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_that_are_not_the_device_are_told_apart() {
        assert_eq!(
            System::open_path("/nonexistent/axvcpu").unwrap_err(),
            Error::Open { path: "/nonexistent/axvcpu".into(), errno: Errno::ENOENT }
        );
        assert_eq!(
            System::open_path("/dev/null").unwrap_err(),
            Error::NotAxvcpu { path: "/dev/null".into(), errno: Errno::ENOTTY }
        );
    }

    #[test]
    fn another_abi_is_refused() {
        let ours = SystemInfo { abi_version: ABI_VERSION, run_page_size: 4096, ..SystemInfo::ZERO };
        assert_eq!(System::check(&ours), Ok(()));
        assert_eq!(
            System::check(&SystemInfo { abi_version: ABI_VERSION + 1, ..ours }),
            Err(Error::AbiVersion { module: ABI_VERSION + 1, program: ABI_VERSION })
        );
        assert_eq!(
            System::check(&SystemInfo { run_page_size: 2048, ..ours }),
            Err(Error::RunPageSize { module: 2048 })
        );
    }
}
