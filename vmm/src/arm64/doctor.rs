// SPDX-License-Identifier: MIT OR Apache-2.0
//! What `axvmm doctor` looks at on AArch64 only.

use crate::doctor::Finding;

/// KVM's modules: it is built into the kernel.
pub(crate) const KVM_MODULES: &[&str] = &[];

/// What is behind KVM's device.
pub(crate) const KVM_HAS: &str = "PSCI 0.2";

/// Whether the CPUs that `/proc/cpuinfo` tells of can virtualize: it does not tell. The module knows (its status), and so
/// does KVM (its device).
pub(crate) fn cpu(_cpuinfo: &str) -> Option<Finding> {
    None
}
