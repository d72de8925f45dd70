// SPDX-License-Identifier: MIT OR Apache-2.0
//! The same for KVM as the hypervisor.

use std::path::Path;

use super::{bad, cpuinfo, good, loaded, Finding};
use crate::arch;
use crate::hypervisor::kvm::{self, Error, Vm};
use crate::hypervisor::{self, Vm as _};

/// The state of the host, gathered before it is judged.
#[derive(Debug)]
struct Facts {
    cpuinfo: String,
    /// KVM's modules that are loaded; a kernel may have them built in.
    modules: Vec<&'static str>,
    /// The result of opening the device.
    opened: Result<(), Error>,
    /// The result of creating a VM, if the device could be opened.
    created: Option<Result<(), Error>>,
}

impl Facts {
    fn gather(device: &Path) -> Self {
        let opened = kvm::open(device).map(drop);
        let created = opened.is_ok().then(|| match Vm::create(device) {
            Err(crate::error::Error::Hypervisor(hypervisor::Error::Kvm(error))) => Err(error),
            _ => Ok(()),
        });
        Self { cpuinfo: cpuinfo(), modules: loaded(arch::doctor::KVM_MODULES), opened, created }
    }

    fn judge(&self) -> Vec<Finding> {
        let mut findings: Vec<Finding> = arch::doctor::cpu(&self.cpuinfo).into_iter().collect();
        if !self.modules.is_empty() {
            findings.push(good(format!("KVM is loaded ({})", self.modules.join(", "))));
        }
        findings.push(match &self.opened {
            Ok(()) => good(format!("KVM's device can be opened, and it has {}", arch::doctor::KVM_HAS)),
            Err(error) => problem(error),
        });
        match &self.created {
            Some(Ok(())) => findings.push(good("VMs can be created")),
            Some(Err(error)) => findings.push(problem(error)),
            None => {}
        }
        findings
    }
}

/// An error's first line says what is the matter, the others what to do.
fn problem(error: &Error) -> Finding {
    let text = error.to_string();
    let (what, cure) = text.split_once('\n').unwrap_or((&text, ""));
    bad(error.exit_code(), what, cure)
}

pub(super) fn examine(device: &Path) -> Vec<Finding> {
    Facts::gather(device).judge()
}

#[cfg(test)]
mod tests {
    use super::super::exit_code;
    use super::*;
    use crate::exit::ExitCode;
    use axvcpu_uapi::client::Errno;

    fn shown(facts: &Facts) -> (ExitCode, String) {
        let findings = facts.judge();
        let text: Vec<String> = findings.iter().map(ToString::to_string).collect();
        (exit_code(&findings), text.join("\n"))
    }

    fn healthy() -> Facts {
        Facts { cpuinfo: "flags\t: svm\n".into(), modules: vec!["kvm_amd"], opened: Ok(()), created: Some(Ok(())) }
    }

    #[test]
    fn a_healthy_host_has_no_problem() {
        let (code, text) = shown(&healthy());
        assert_eq!(code, ExitCode::Shutdown);
        assert!(!text.contains("PROBLEM") && text.contains("VMs can be created"), "{text}");
    }

    #[test]
    fn each_problem_has_its_code_and_cure() {
        let open = |errno| Error::Open { path: "/dev/kvm".into(), errno };
        let closed = |error| Facts { opened: Err(error), created: None, ..healthy() };
        let cases = [
            (closed(open(Errno::ENOENT)), ExitCode::NoDevice, arch::kvm::MISSING_CURE),
            (closed(open(Errno::EACCES)), ExitCode::NoPermission, "usermod -aG kvm"),
            (closed(Error::Lacks { what: "it", since: "4.4" }), ExitCode::AbiMismatch, "newer kernel"),
            (Facts { created: Some(Err(Error::CreateVm(Errno::EBUSY))), ..healthy() }, ExitCode::InUse, "rmmod axvcpu"),
        ];
        for (facts, code, words) in cases {
            let (found, text) = shown(&facts);
            assert_eq!(found, code, "{text}");
            assert!(text.contains("PROBLEM") && text.contains(words), "{words}: {text}");
        }
    }
}
