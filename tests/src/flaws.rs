// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the CPUs that the lab emulates do otherwise than their architecture says, each flaw under the name of what it
//! means. A case that depends on the behaviour is skipped where the flaw is, or does without, and nowhere else: every
//! other CPU, another emulator's or a real one, has to pass it. Bochs' Intel CPUs have none that matters here, and its AMD
//! ones few, once the lab has mended them (`scripts/lab/bochs/*.patch`).

use crate::harness::{CaseResult, Stop};
use std::sync::OnceLock;

/// A CPU that the lab emulates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Emulated {
    /// The AMD CPU of QEMU without hardware acceleration (10.0).
    Qemu,
    /// The AMD CPUs of Bochs (3.0).
    BochsSvm,
}

/// A behaviour that is missing, and the emulated CPUs that lack it.
pub struct Flaw {
    on: &'static [Emulated],
    what: &'static str,
}

/// MOV to CR0 with a bit of the upper half set does not fault.
pub const CR0_HALF_CHECKED: Flaw = Flaw { on: &[Emulated::Qemu], what: "does not check CR0's upper half" };

/// MOV to CR3 with a reserved bit set does not fault.
pub const CR3_UNCHECKED: Flaw = Flaw { on: &[Emulated::Qemu], what: "does not check what MOV writes to CR3" };

/// MOV to CR8 with a reserved bit set does not fault.
pub const CR8_UNCHECKED: Flaw = Flaw { on: &[Emulated::Qemu], what: "does not check what MOV writes to CR8" };

/// WRMSR of an address that is not canonical does not fault.
pub const MSR_ADDRESSES_UNCHECKED: Flaw = Flaw { on: &[Emulated::Qemu], what: "does not check addresses in MSRs" };

/// The intercept of task switches never comes.
pub const TASK_SWITCHES_UNSEEN: Flaw = Flaw { on: &[Emulated::Qemu], what: "does not intercept task switches" };

/// The emulator ends itself at some of what hostile guests do: QEMU at a busy TSS in TR at a change of privilege, and at
/// virtual interrupts while its big lock is held.
pub const ASSERTS: Flaw = Flaw { on: &[Emulated::Qemu, Emulated::BochsSvm], what: "aborts with assertions of its own" };

/// DR6 is not yet set when the intercept of #DB comes (APM vol. 2 section 15.12.2). By it the end of an NMI's handler
/// is known.
pub const DR6_LATE: Flaw = Flaw { on: &[Emulated::BochsSvm], what: "does not set DR6 before the intercept of #DB" };

/// The first CPU's flags may be put back to what they were by any FXRSTOR or XRSTOR of another one (`cpu_clear_ignne`), an exit
/// then be done twice: once in some six hundred runs. The lab leaves that CPU alone where there are several; the module notices
/// and ends the vCPU: EUCLEAN.
pub const STATE_LOST: Flaw = Flaw {
    on: &[Emulated::Qemu],
    what: "has stored the host's state in place of the guest's at an exit, as it does hardly ever",
};

impl Flaw {
    /// Whether this CPU has it.
    pub fn here(&self) -> bool {
        emulated().is_some_and(|cpu| self.on.contains(&cpu))
    }

    /// Ends the case if this CPU has it.
    ///
    /// # Errors
    /// The reason to skip.
    pub fn skip(&self) -> CaseResult {
        if self.here() {
            return Err(Stop::Skip(format!("the emulated CPU {}", self.what)));
        }
        Ok(())
    }
}

/// Which of the lab's emulated CPUs this is, if any. QEMU says so in CPUID. Bochs is like the CPU that it emulates, so the
/// lab's host tells (scripts/lab/host-init).
fn emulated() -> Option<Emulated> {
    static CPU: OnceLock<Option<Emulated>> = OnceLock::new();
    *CPU.get_or_init(|| {
        if vendor(0x4000_0000) == *b"TCGTCGTCGTCG" {
            Some(Emulated::Qemu)
        } else if std::env::var_os("AXVCPU_LAB").is_none_or(|lab| lab != "bochs") {
            None
        } else {
            (vendor(0) == *b"AuthcAMDenti").then_some(Emulated::BochsSvm)
        }
    })
}

/// EBX, ECX and EDX of a leaf of CPUID, as text.
fn vendor(leaf: u32) -> [u8; 12] {
    // Newer compilers know CPUID to be safe.
    #[allow(unused_unsafe)]
    // SAFETY: every x86-64 CPU has CPUID; an unknown leaf gives some other leaf's answer.
    let leaf = unsafe { std::arch::x86_64::__cpuid(leaf) };
    let mut text = [0; 12];
    for (bytes, register) in text.chunks_exact_mut(4).zip([leaf.ebx, leaf.ecx, leaf.edx]) {
        bytes.copy_from_slice(&register.to_le_bytes());
    }
    text
}
