// SPDX-License-Identifier: MIT OR Apache-2.0
//! What KVM refused, for people.

use std::path::PathBuf;

use axvcpu_uapi::client::Errno;

use crate::exit::ExitCode;

/// A failed operation on KVM.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The device node could not be opened.
    #[error("{}", open_failure(path, *errno))]
    Open {
        /// Its path.
        path: PathBuf,
        /// Why.
        errno: Errno,
    },
    /// The file that was opened is not KVM's device, or that of a KVM long gone.
    #[error("{} is not KVM's device: it does not know version 12 of KVM's interface", path.display())]
    NotKvm {
        /// Its path.
        path: PathBuf,
    },
    /// This KVM is too old, or was built without something.
    #[error("this host's KVM lacks {what}\nLinux has it since version {since}: use a newer kernel.")]
    Lacks {
        /// What is missing.
        what: &'static str,
        /// The first Linux version with it.
        since: &'static str,
    },
    /// No VM could be created.
    #[error("{}", create_failure(*.0))]
    CreateVm(Errno),
    /// There is no GICv3 for guests (AArch64).
    #[error("KVM has no GICv3 for guests here: the host's own interrupt controller is an older one, or another\nA host with a GICv3 is needed.")]
    NoGicV3,
    /// An ioctl failed.
    #[error("KVM refused {name}: {}", errno.desc())]
    Ioctl {
        /// The ioctl's name in Linux `include/uapi/linux/kvm.h`.
        name: &'static str,
        /// Why.
        errno: Errno,
    },
    /// A run page could not be mapped.
    #[error("cannot map a run page of KVM: {}", .0.desc())]
    MapRunPage(Errno),
}

fn open_failure(path: &std::path::Path, errno: Errno) -> String {
    let path = path.display();
    match errno {
        Errno::ENOENT | Errno::ENODEV => format!(
            "{path} is missing: KVM is not loaded\n\
             {}",
            crate::arch::kvm::MISSING_CURE
        ),
        Errno::EACCES | Errno::EPERM => format!(
            "no permission to open {path}\n\
             Run as root, or become a member of the device's group: usermod -aG kvm USER, then log in again."
        ),
        errno => format!("cannot open {path}: {}", errno.desc()),
    }
}

fn create_failure(errno: Errno) -> String {
    match errno {
        Errno::EBUSY | Errno::EIO => "KVM cannot switch virtualization on: another hypervisor holds the CPU\n\
             End its virtual machines, or unload it (rmmod axvcpu)."
            .into(),
        errno => format!("KVM cannot create a VM: {}", errno.desc()),
    }
}

impl Error {
    /// What the kernel answered, if it was asked.
    #[must_use]
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::Open { errno, .. } | Self::Ioctl { errno, .. } => Some(*errno),
            Self::CreateVm(errno) | Self::MapRunPage(errno) => Some(*errno),
            Self::NotKvm { .. } | Self::Lacks { .. } | Self::NoGicV3 => None,
        }
    }

    /// The exit code that tells this cause from others.
    #[must_use]
    pub fn exit_code(&self) -> ExitCode {
        match (self, self.errno()) {
            (Self::Open { .. }, Some(Errno::EACCES | Errno::EPERM)) => ExitCode::NoPermission,
            (Self::Open { .. }, _) => ExitCode::NoDevice,
            (Self::NotKvm { .. } | Self::Lacks { .. }, _) => ExitCode::AbiMismatch,
            (Self::NoGicV3, _) => ExitCode::NoVirtualization,
            (Self::CreateVm(Errno::EBUSY | Errno::EIO), _) => ExitCode::InUse,
            (_, Some(Errno::ENOMEM | Errno::ENOSPC | Errno::EMFILE | Errno::ENFILE)) => ExitCode::NoResources,
            _ => ExitCode::HostError,
        }
    }
}

/// Makes an error of an ioctl's failure: `.map_err(refused("KVM_RUN"))`.
pub(crate) fn refused(name: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Error {
    move |error| Error::Ioctl { name, errno: Errno::from_raw(error.errno()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_cause_has_its_code_and_cure() {
        let open = |errno| Error::Open { path: "/dev/kvm".into(), errno };
        let cases = [
            (open(Errno::ENOENT), ExitCode::NoDevice, crate::arch::kvm::MISSING_CURE),
            (open(Errno::EACCES), ExitCode::NoPermission, "usermod -aG kvm"),
            (open(Errno::EMFILE), ExitCode::NoDevice, "cannot open /dev/kvm"),
            (Error::NotKvm { path: "/dev/null".into() }, ExitCode::AbiMismatch, "version 12"),
            (Error::Lacks { what: "x", since: "4.4" }, ExitCode::AbiMismatch, "newer kernel"),
            (Error::CreateVm(Errno::EBUSY), ExitCode::InUse, "rmmod axvcpu"),
            (Error::NoGicV3, ExitCode::NoVirtualization, "with a GICv3 is needed"),
            (Error::CreateVm(Errno::ENOMEM), ExitCode::NoResources, "cannot create a VM"),
            (Error::Ioctl { name: "KVM_RUN", errno: Errno::EINVAL }, ExitCode::HostError, "KVM_RUN"),
        ];
        for (error, code, words) in cases {
            assert_eq!(error.exit_code(), code, "{error}");
            assert!(error.to_string().contains(words), "{error}");
        }
    }
}
