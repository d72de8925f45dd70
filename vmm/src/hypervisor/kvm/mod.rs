// SPDX-License-Identifier: MIT OR Apache-2.0
//! KVM as a hypervisor, for comparison and for hosts without the module. Facts about the interface: Linux
//! `Documentation/virt/kvm/api.rst`.
//!
//! What only one architecture has of it is among the architecture's files; its [`Vm`] and [`Vcpu`] are made of the parts
//! here.
//!
//! | file | owns |
//! |---|---|
//! | `error.rs` | what can go wrong, and the cures |
//! | `kick.rs` | how a vCPU is made to return |
//! | `run_page.rs` | the page that KVM and a vCPU's thread share |
//! | `stats.rs` | KVM's counters |
//! | `transfer.rs` | accesses that come several at once |
//! | `vcpu.rs` | running, and the exits that every architecture has |
//! | this file | the VM: its device, its memory |

use std::ffi::CString;
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::{Arc, Mutex};

use axvcpu_uapi::addr::GuestPhysAddr;
use axvcpu_uapi::client::{Backing, Errno};
use kvm_bindings::{kvm_userspace_memory_region, KVM_API_VERSION};
use kvm_ioctls::{Cap, Kvm, VmFd};

use crate::device::lock;
use crate::memory::Ram;

pub(crate) mod error;
mod kick;
pub(crate) mod run_page;
pub(crate) mod stats;
pub mod transfer;
pub(crate) mod vcpu;

pub use crate::arch::kvm::{Vcpu, Vm};
pub use error::Error;

use error::refused;

/// KVM's device node.
pub const DEVICE_PATH: &str = "/dev/kvm";

/// A capability that axvmm needs: KVM's name of it, what it is, and the first Linux version that has it.
pub(crate) type Needed = (Cap, &'static str, &'static str);

/// Opens the device and makes sure that it is a KVM that can carry our machine.
///
/// # Errors
/// [`Error::Open`], [`Error::NotKvm`] or [`Error::Lacks`].
pub fn open(device: &Path) -> Result<Kvm, Error> {
    let fail = |errno| Error::Open { path: device.into(), errno };
    let path = CString::new(device.as_os_str().as_bytes()).map_err(|_| fail(Errno::ENOENT))?;
    let kvm = Kvm::new_with_path(path).map_err(|error| fail(Errno::from_raw(error.errno())))?;
    if kvm.get_api_version() != KVM_API_VERSION as i32 {
        return Err(Error::NotKvm { path: device.into() });
    }
    let needed: [Needed; 1] = [(Cap::ImmediateExit, "a way to stop vCPUs (KVM_CAP_IMMEDIATE_EXIT)", "4.13")];
    for (capability, what, since) in needed.into_iter().chain(crate::arch::kvm::NEEDED.iter().copied()) {
        if !kvm.check_extension(capability) {
            return Err(Error::Lacks { what, since });
        }
    }
    Ok(kvm)
}

/// A VM's descriptor with the memory behind its slots. vCPUs and whatever interrupts them keep it, and with it the guest's
/// memory.
pub(crate) struct Slots {
    pub(crate) vm: VmFd,
    /// Dropped after the VM, and after the vCPUs, which hold it through this. Nothing else is locked under it.
    memory: Mutex<Vec<Arc<dyn Backing>>>,
}

impl fmt::Debug for Slots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slots").field("vm", &self.vm).finish_non_exhaustive()
    }
}

impl Slots {
    /// For a new VM.
    pub(crate) fn new(vm: VmFd) -> Arc<Self> {
        Arc::new(Self { vm, memory: Mutex::default() })
    }

    /// Gives the guest its RAM.
    ///
    /// # Errors
    /// [`Error::Ioctl`].
    pub(crate) fn map(&self, ram: &Ram) -> Result<(), Error> {
        for (at, region) in ram.backings() {
            let size = region.size();
            self.map_part(at, Arc::new(region), 0, size)?;
        }
        Ok(())
    }

    /// Maps `size` bytes of `memory` from `offset` on at guest physical address `at`, all multiples of 4096, to be read,
    /// written and executed. The memory is kept until the VM and its vCPUs are gone.
    ///
    /// # Errors
    /// [`Error::Ioctl`]: `EINVAL` for numbers that are not such multiples or a part that is not in the memory, `EEXIST`
    /// where there is memory already.
    pub(crate) fn map_part(
        &self,
        at: GuestPhysAddr,
        memory: Arc<dyn Backing>,
        offset: usize,
        size: usize,
    ) -> Result<(), Error> {
        let name = "KVM_SET_USER_MEMORY_REGION";
        let invalid = Error::Ioctl { name, errno: Errno::EINVAL };
        if offset.checked_add(size).is_none_or(|end| end > memory.size()) {
            return Err(invalid);
        }
        let mut slots = lock(&self.memory);
        let region = kvm_userspace_memory_region {
            slot: u32::try_from(slots.len()).map_err(|_| invalid)?,
            flags: 0,
            guest_phys_addr: at.as_u64(),
            memory_size: size as u64,
            userspace_addr: memory.start().as_ptr() as u64 + offset as u64,
        };
        // SAFETY: the range is inside of memory that, as its `Backing` promises, a guest may write at any time, and that
        // `slots` keeps until the VM and all its vCPUs are gone.
        unsafe { self.vm.set_user_memory_region(region) }.map_err(refused(name))?;
        slots.push(memory);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit::ExitCode;

    #[test]
    fn devices_that_are_none() {
        let code = |path: &str| open(Path::new(path)).map(|_| ()).unwrap_err().exit_code();
        assert_eq!(code("/nonexistent"), ExitCode::NoDevice);
        assert_eq!(code("/dev/null"), ExitCode::AbiMismatch);
    }
}
