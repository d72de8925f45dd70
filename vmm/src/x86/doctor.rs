// SPDX-License-Identifier: MIT OR Apache-2.0
//! What `axvmm doctor` looks at on x86 only.

use crate::doctor::{bad, good, Finding};
use crate::exit::ExitCode;

/// KVM's modules.
pub(crate) const KVM_MODULES: &[&str] = &["kvm_amd", "kvm_intel"];

/// What is behind KVM's device.
pub(crate) const KVM_HAS: &str = "the split interrupt chip";

/// Whether the CPUs that `/proc/cpuinfo` tells of can virtualize.
pub(crate) fn cpu(cpuinfo: &str) -> Option<Finding> {
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags")).and_then(|line| line.split_once(':'));
    let has = |flag: &str| flags.is_some_and(|(_, flags)| flags.split_whitespace().any(|candidate| candidate == flag));
    if has("svm") {
        return Some(good("the CPU has AMD virtualization (SVM)"));
    }
    if has("vmx") {
        return Some(good("the CPU has Intel virtualization (VMX)"));
    }
    // Linux hides the flag also when the firmware has locked the extension; the module knows which it is.
    if has("hypervisor") {
        return Some(bad(
            ExitCode::NoVirtualization,
            "the CPU shows no virtualization extension, and this system runs in a virtual machine itself",
            "Enable nested virtualization outside (QEMU: -cpu host, and kvm_amd or kvm_intel with nested=1).",
        ));
    }
    Some(bad(
        ExitCode::NoVirtualization,
        "the CPU shows no virtualization extension",
        "It has none, or the firmware has switched it off: look for \"SVM\", \"AMD-V\" or \"VT-x\" in its setup.",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_decide() {
        let cases = [
            ("fpu svm", "SVM"),
            ("vmx sse", "VMX"),
            ("fpu hypervisor", "nested=1"),
            ("fpu svmx", "\"VT-x\""),
            ("", "\"VT-x\""),
        ];
        for (flags, words) in cases {
            let finding = cpu(&format!("processor\t: 0\nflags\t\t: {flags}\nbugs\t: svm\n")).unwrap().to_string();
            assert!(finding.contains(words), "{flags}: {finding}");
        }
    }
}
