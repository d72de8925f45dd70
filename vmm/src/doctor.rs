// SPDX-License-Identifier: MIT OR Apache-2.0
//! `axvmm doctor`: looks at everything a VM needs from the host, and says of each thing how it is and how to mend it.

use std::fmt;
use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use axvcpu_uapi::client::{self, Errno, System};
use axvcpu_uapi::system::{self, SystemInfo};
use axvcpu_uapi::ABI_VERSION;
use nix::sys::resource::{getrlimit, Resource};

use crate::arch;
use crate::config::Hypervisor;
use crate::error::Error;
use crate::exit::ExitCode;
use crate::hypervisor::{self, axvcpu::not_ready};

mod kvm;

/// Locked memory below which a VM of ordinary size may hit the limit: page tables and vCPU state are charged to it.
const ENOUGH_MEMLOCK: u64 = 8 << 20;

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// As it should be.
    Good,
    /// VMs run, but mind this.
    Note,
    /// No VM can run.
    Bad(ExitCode),
}

/// One thing looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// What was found.
    pub text: String,
    /// What to do about it; empty if nothing is to be done.
    pub cure: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mark = match self.severity {
            Severity::Good => "ok     ",
            Severity::Note => "note   ",
            Severity::Bad(_) => "PROBLEM",
        };
        write!(f, "{mark}  {}", self.text)?;
        if !self.cure.is_empty() {
            write!(f, "\n         {}", self.cure)?;
        }
        Ok(())
    }
}

/// What the device node is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Node {
    Missing,
    NoDevice,
    Device,
}

/// The state of the host, gathered before it is judged.
#[derive(Debug)]
struct Facts {
    cpuinfo: String,
    module_loaded: bool,
    /// KVM's modules that are loaded.
    kvm: Vec<&'static str>,
    device: PathBuf,
    node: Node,
    /// The result of opening the device, if there is a node.
    opened: Option<Result<SystemInfo, client::Error>>,
    /// The result of creating a VM, if the device could be opened.
    created: Option<Result<(), client::Error>>,
    /// Soft limit of locked memory in bytes, and whether the user is root, who has none.
    memlock: u64,
    is_root: bool,
    strict_overcommit: bool,
}

impl Facts {
    fn gather(device: &Path) -> Self {
        let node = match fs::metadata(device) {
            Err(_) => Node::Missing,
            Ok(metadata) if metadata.file_type().is_char_device() => Node::Device,
            Ok(_) => Node::NoDevice,
        };
        let system = (node == Node::Device).then(|| System::open_path(device));
        let created = match &system {
            Some(Ok(system)) => Some(system.create_vm().map(drop)),
            _ => None,
        };
        Self {
            cpuinfo: cpuinfo(),
            module_loaded: !loaded(&["axvcpu"]).is_empty(),
            kvm: loaded(arch::doctor::KVM_MODULES),
            device: device.to_owned(),
            node,
            opened: system.map(|system| system.and_then(|system| system.info())),
            created,
            memlock: getrlimit(Resource::RLIMIT_MEMLOCK).map_or(u64::MAX, |(soft, _)| soft),
            is_root: nix::unistd::geteuid().is_root(),
            strict_overcommit: fs::read_to_string("/proc/sys/vm/overcommit_memory")
                .is_ok_and(|mode| mode.trim() == "2"),
        }
    }

    fn judge(&self) -> Vec<Finding> {
        let mut findings: Vec<Finding> = arch::doctor::cpu(&self.cpuinfo).into_iter().collect();
        findings.extend(self.device_findings());
        if let Some(Ok(info)) = &self.opened {
            findings.extend(self.module(info));
        }
        if let Some(Err(error)) = &self.created {
            let code = hypervisor::Error::from(error.clone()).exit_code();
            findings.push(bad(code, format!("a VM could not be created: {error}"), ""));
        }
        findings.extend(self.limits());
        findings
    }

    fn device_findings(&self) -> Vec<Finding> {
        let device = self.device.display();
        let mut findings = Vec::new();
        if self.module_loaded {
            findings.push(good("the module axvcpu is loaded"));
        }
        match (self.node, self.module_loaded) {
            (Node::Missing, false) => findings.push(bad(
                ExitCode::NoDevice,
                format!("{device} is missing: the module axvcpu is not loaded"),
                "Load it: insmod axvcpu.ko (the README says how to build it).\n         \
                 Or do without it: axvmm doctor --hypervisor kvm says whether KVM can carry VMs.",
            )),
            (Node::Missing, true) => findings.push(bad(
                ExitCode::NoDevice,
                format!("{device} is missing, although the module is loaded"),
                "Is /dev a devtmpfs? In a container the device has to be passed in (--device /dev/axvcpu).",
            )),
            (Node::NoDevice, _) => findings.push(bad(
                ExitCode::NoDevice,
                format!("{device} is no device"),
                "Remove what is there and load the module again.",
            )),
            (Node::Device, _) => match &self.opened {
                Some(Ok(_)) => findings.push(good(format!("{device} can be opened"))),
                Some(Err(error)) => findings.push(self.open_failure(error)),
                None => {}
            },
        }
        findings
    }

    fn open_failure(&self, error: &client::Error) -> Finding {
        let device = self.device.display();
        match error {
            client::Error::Open { errno: Errno::EACCES | Errno::EPERM, .. } => bad(
                ExitCode::NoPermission,
                format!("no permission to open {device}"),
                "Run as root, or give the device to a group that you are in: a udev rule for it is in axvcpu(4).",
            ),
            client::Error::AbiVersion { module, .. } => bad(
                ExitCode::AbiMismatch,
                format!("the module speaks version {module} of the ABI, and this axvmm version {ABI_VERSION}"),
                "Install module and axvmm from the same release; then rmmod axvcpu and load the new one.",
            ),
            error => bad(hypervisor::Error::from(error.clone()).exit_code(), error.to_string(), ""),
        }
    }

    fn module(&self, info: &SystemInfo) -> Vec<Finding> {
        let backend = match info.backend {
            system::BACKEND_SVM => "AMD SVM",
            system::BACKEND_VMX => "Intel VMX",
            system::BACKEND_VHE => "Arm VHE",
            _ => "no",
        };
        let mut findings = vec![good(format!("the module speaks ABI version {}, {backend} backend", info.abi_version))];
        match not_ready(info.status) {
            None => findings.push(good(format!(
                "vCPUs can run now; {} VMs exist, {} vCPUs each at most",
                info.vms, info.max_vcpus
            ))),
            Some((reason, cure)) => {
                let code = Error::NotReady { status: info.status, reason, cure }.exit_code();
                findings.push(bad(code, reason, cure));
            }
        }
        if let (system::STATUS_READY, Some(lack)) = (info.status, arch::axvcpu::lacks(info)) {
            findings.push(bad(ExitCode::AbiMismatch, lack, "Install a newer module."));
        }
        findings
    }

    fn limits(&self) -> Vec<Finding> {
        let mut findings = Vec::new();
        let in_use = matches!(&self.opened, Some(Ok(info)) if info.status == system::STATUS_IN_USE);
        if !self.kvm.is_empty() && !in_use {
            findings.push(Finding {
                severity: Severity::Note,
                text: format!("KVM is loaded ({})", self.kvm.join(", ")),
                cure: "If axvmm says that the CPU is held, unload it: modprobe -r kvm_amd kvm_intel".into(),
            });
        }
        if self.memlock < ENOUGH_MEMLOCK && !self.is_root {
            findings.push(Finding {
                severity: Severity::Note,
                text: format!(
                    "only {} KiB of memory may be locked; page tables of VMs count as locked",
                    self.memlock >> 10
                ),
                cure: "Raise the limit: ulimit -l, or memlock in /etc/security/limits.conf".into(),
            });
        }
        if self.strict_overcommit {
            findings.push(Finding {
                severity: Severity::Note,
                text: "the host does not overcommit memory (vm.overcommit_memory = 2)".into(),
                cure: "Guest memory counts in full against the commit limit, used or not.".into(),
            });
        }
        findings
    }
}

/// Which of a number of modules are loaded.
fn loaded(modules: &[&'static str]) -> Vec<&'static str> {
    modules.iter().copied().filter(|module| Path::new("/sys/module").join(module).exists()).collect()
}

/// Whether the CPU can virtualize.
/// What Linux tells of the host's CPUs.
fn cpuinfo() -> String {
    fs::read_to_string("/proc/cpuinfo").unwrap_or_default()
}

pub(crate) fn good(text: impl Into<String>) -> Finding {
    Finding { severity: Severity::Good, text: text.into(), cure: String::new() }
}

pub(crate) fn bad(code: ExitCode, text: impl Into<String>, cure: impl Into<String>) -> Finding {
    Finding { severity: Severity::Bad(code), text: text.into(), cure: cure.into() }
}

/// Looks at what `hypervisor` needs of the host; `device` is its device node, if that is not the usual one.
#[must_use]
pub fn examine(hypervisor: Hypervisor, device: Option<&Path>) -> Vec<Finding> {
    match hypervisor {
        Hypervisor::Axvcpu => Facts::gather(device.unwrap_or(Path::new(axvcpu_uapi::DEVICE_PATH))).judge(),
        Hypervisor::Kvm => kvm::examine(device.unwrap_or(Path::new(hypervisor::kvm::DEVICE_PATH))),
    }
}

/// The exit code that findings add up to: that of the last problem, or success. Later findings are closer to the device, and
/// so to the truth: the module knows better than the CPU's flags.
#[must_use]
pub fn exit_code(findings: &[Finding]) -> ExitCode {
    let mut problems = findings.iter().filter_map(|finding| match finding.severity {
        Severity::Bad(code) => Some(code),
        _ => None,
    });
    problems.next_back().unwrap_or(ExitCode::Shutdown)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> Facts {
        let info = SystemInfo {
            abi_version: ABI_VERSION,
            backend: system::BACKEND_SVM,
            features: system::FEATURE_IN_KERNEL_APIC,
            max_vcpus: 8,
            ..SystemInfo::default()
        };
        Facts {
            cpuinfo: "flags\t: svm\n".into(),
            module_loaded: true,
            kvm: vec![],
            device: "/dev/axvcpu".into(),
            node: Node::Device,
            opened: Some(Ok(info)),
            created: Some(Ok(())),
            memlock: u64::MAX,
            is_root: false,
            strict_overcommit: false,
        }
    }

    fn shown(facts: &Facts) -> (ExitCode, String) {
        let findings = facts.judge();
        let text: Vec<String> = findings.iter().map(ToString::to_string).collect();
        (exit_code(&findings), text.join("\n"))
    }

    fn with_status(status: u32) -> Facts {
        let mut facts = facts();
        if let Some(Ok(info)) = &mut facts.opened {
            info.status = status;
        }
        facts
    }

    #[test]
    fn a_healthy_host_has_no_problem() {
        let (code, text) = shown(&facts());
        assert_eq!(code, ExitCode::Shutdown);
        assert!(!text.contains("PROBLEM") && text.contains("vCPUs can run now"), "{text}");
    }

    #[test]
    fn each_problem_has_its_code_and_cure() {
        let open = |errno| client::Error::Open { path: "/dev/axvcpu".into(), errno };
        let closed = |error| Facts { opened: Some(Err(error)), created: None, ..facts() };
        let missing =
            |module_loaded| Facts { node: Node::Missing, opened: None, created: None, module_loaded, ..facts() };
        let cases = [
            (missing(false), ExitCode::NoDevice, "insmod axvcpu.ko"),
            (missing(true), ExitCode::NoDevice, "--device /dev/axvcpu"),
            (Facts { node: Node::NoDevice, ..missing(true) }, ExitCode::NoDevice, "is no device"),
            (closed(open(Errno::EACCES)), ExitCode::NoPermission, "udev rule"),
            (closed(client::Error::AbiVersion { module: 9, program: 1 }), ExitCode::AbiMismatch, "version 9"),
            (with_status(system::STATUS_IN_USE), ExitCode::InUse, "modprobe -r"),
            (with_status(system::STATUS_DISABLED_BY_FIRMWARE), ExitCode::FirmwareDisabled, "firmware's setup"),
            (with_status(system::STATUS_UNSUPPORTED), ExitCode::NoVirtualization, "nested virtualization"),
            (with_status(system::STATUS_TOO_OLD), ExitCode::NoVirtualization, arch::axvcpu::TOO_OLD_CURE),
            (with_status(system::STATUS_HOST_NOT_AT_EL2), ExitCode::NoVirtualization, "lacks VHE"),
            (
                Facts { created: Some(Err(client::Error::CreateVm(Errno::ENOSPC))), ..facts() },
                ExitCode::NoResources,
                "could not be created",
            ),
        ];
        for (facts, code, words) in cases {
            let (found, text) = shown(&facts);
            assert_eq!(found, code, "{text}");
            assert!(text.contains("PROBLEM") && text.contains(words), "{words}: {text}");
        }
    }

    #[test]
    fn notes_do_no_harm() {
        let facts = Facts { kvm: vec!["kvm_amd"], memlock: 64 << 10, strict_overcommit: true, ..facts() };
        let (code, text) = shown(&facts);
        assert_eq!(code, ExitCode::Shutdown);
        assert_eq!(text.matches("note").count(), 3, "{text}");
    }

    #[test]
    fn this_host_can_be_examined() {
        for hypervisor in [Hypervisor::Axvcpu, Hypervisor::Kvm] {
            let findings = examine(hypervisor, Some(Path::new("/nonexistent")));
            assert_eq!(exit_code(&findings), ExitCode::NoDevice);
        }
    }
}
