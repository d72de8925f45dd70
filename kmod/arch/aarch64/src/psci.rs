// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! Power State Coordination Interface 1.1 (Arm DEN 0022) and the SMC calling convention (DEN 0028): what a guest may ask of
//! its "firmware", by HVC or by SMC. An SMC never reaches the real one.

use vcpu_core::{AxVCpuExitReason as Exit, GuestPhysAddr};

/// Function numbers.
pub mod function {
    /// PSCI_VERSION.
    pub const VERSION: u32 = 0x8400_0000;
    /// CPU_SUSPEND, 32-bit.
    pub const CPU_SUSPEND_32: u32 = 0x8400_0001;
    /// CPU_SUSPEND, 64-bit.
    pub const CPU_SUSPEND_64: u32 = 0xc400_0001;
    /// CPU_OFF.
    pub const CPU_OFF: u32 = 0x8400_0002;
    /// CPU_ON, 32-bit.
    pub const CPU_ON_32: u32 = 0x8400_0003;
    /// CPU_ON, 64-bit.
    pub const CPU_ON_64: u32 = 0xc400_0003;
    /// AFFINITY_INFO, 32-bit.
    pub const AFFINITY_INFO_32: u32 = 0x8400_0004;
    /// AFFINITY_INFO, 64-bit.
    pub const AFFINITY_INFO_64: u32 = 0xc400_0004;
    /// MIGRATE_INFO_TYPE.
    pub const MIGRATE_INFO_TYPE: u32 = 0x8400_0006;
    /// SYSTEM_OFF.
    pub const SYSTEM_OFF: u32 = 0x8400_0008;
    /// SYSTEM_RESET.
    pub const SYSTEM_RESET: u32 = 0x8400_0009;
    /// PSCI_FEATURES.
    pub const FEATURES: u32 = 0x8400_000a;
    /// SMCCC_VERSION.
    pub const SMCCC_VERSION: u32 = 0x8000_0000;
    /// SMCCC_ARCH_FEATURES.
    pub const SMCCC_ARCH_FEATURES: u32 = 0x8000_0001;
}

/// Return value: the function is not there.
pub const NOT_SUPPORTED: i64 = -1;

/// What becomes of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is done, with this value in X0.
    Done(i64),
    /// It does not return a value before userspace has done its part.
    Exit(Exit),
    /// It is no function of ours.
    Foreign,
}

/// A call with its function in X0 and its arguments in X1 to X3.
pub fn call(registers: [u64; 4]) -> Outcome {
    use function as f;
    let [x0, x1, x2, x3] = registers;
    // The function is a 32-bit value; the rest of X0 is to be ignored (DEN 0028, section 3.1).
    let number = x0 as u32;
    // 32-bit calls have 32-bit arguments.
    let narrow = |value: u64| if number >> 30 & 1 == 0 { value & 0xffff_ffff } else { value };
    match number {
        f::VERSION | f::SMCCC_VERSION => Outcome::Done(0x1_0001),
        f::SMCCC_ARCH_FEATURES => match x1 as u32 {
            f::SMCCC_VERSION | f::SMCCC_ARCH_FEATURES => Outcome::Done(0),
            _ => Outcome::Done(NOT_SUPPORTED),
        },
        f::FEATURES => match x1 as u32 {
            f::VERSION
            | f::CPU_SUSPEND_32
            | f::CPU_SUSPEND_64
            | f::CPU_OFF
            | f::CPU_ON_32
            | f::CPU_ON_64
            | f::AFFINITY_INFO_32
            | f::AFFINITY_INFO_64
            | f::MIGRATE_INFO_TYPE
            | f::SYSTEM_OFF
            | f::SYSTEM_RESET
            | f::FEATURES
            | f::SMCCC_VERSION => Outcome::Done(0),
            _ => Outcome::Done(NOT_SUPPORTED),
        },
        // A trusted OS that would have to move with the CPUs: there is none (2).
        f::MIGRATE_INFO_TYPE => Outcome::Done(2),
        // The power state is no deeper than WFI's, and the call returns SUCCESS when it ends.
        f::CPU_SUSPEND_32 | f::CPU_SUSPEND_64 => Outcome::Exit(Exit::Halt),
        f::CPU_OFF => Outcome::Exit(Exit::CpuDown { state: 0 }),
        f::CPU_ON_32 | f::CPU_ON_64 => Outcome::Exit(Exit::CpuUp {
            target_cpu: narrow(x1),
            entry_point: GuestPhysAddr::new(narrow(x2)),
            arg: narrow(x3),
        }),
        // Only who owns the VM knows the other CPUs.
        f::AFFINITY_INFO_32 | f::AFFINITY_INFO_64 => {
            Outcome::Exit(Exit::Hypercall { nr: number.into(), args: [narrow(x1), narrow(x2), narrow(x3), 0, 0, 0] })
        }
        f::SYSTEM_OFF => Outcome::Exit(Exit::SystemDown),
        f::SYSTEM_RESET => Outcome::Exit(Exit::SystemReset),
        _ => Outcome::Foreign,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_and_features() {
        assert_eq!(call([0x8400_0000, 0, 0, 0]), Outcome::Done(0x1_0001));
        assert_eq!(call([0xdead_beef_8000_0000, 0, 0, 0]), Outcome::Done(0x1_0001), "upper half ignored");
        assert_eq!(call([0x8400_000a, 0xc400_0003, 0, 0]), Outcome::Done(0));
        // SYSTEM_RESET2 and SYSTEM_SUSPEND are optional.
        for absent in [0xc400_0012, 0x8400_000e, 0x8400_ffff] {
            assert_eq!(call([0x8400_000a, absent, 0, 0]), Outcome::Done(NOT_SUPPORTED));
            assert_eq!(call([absent, 0, 0, 0]), Outcome::Foreign);
        }
        // Workarounds for speculation are not offered by this call.
        assert_eq!(call([0x8000_0001, 0x8000_8000, 0, 0]), Outcome::Done(NOT_SUPPORTED));
    }

    #[test]
    fn cpu_on_takes_its_arguments_in_the_width_of_the_call() {
        let wide = [0xc400_0003, 0x1_0000_0002, 0x12_4000_0000, u64::MAX];
        let entry_point = GuestPhysAddr::new(0x12_4000_0000);
        let up = Exit::CpuUp { target_cpu: 0x1_0000_0002, entry_point, arg: u64::MAX };
        assert_eq!(call(wide), Outcome::Exit(up));
        let narrow = [0x8400_0003, wide[1], wide[2], wide[3]];
        let up = Exit::CpuUp { target_cpu: 2, entry_point: GuestPhysAddr::new(0x4000_0000), arg: 0xffff_ffff };
        assert_eq!(call(narrow), Outcome::Exit(up));
    }

    #[test]
    fn power_goes_to_userspace() {
        assert_eq!(call([0x8400_0008, 0, 0, 0]), Outcome::Exit(Exit::SystemDown));
        assert_eq!(call([0x8400_0009, 0, 0, 0]), Outcome::Exit(Exit::SystemReset));
        assert_eq!(call([0x8400_0002, 0, 0, 0]), Outcome::Exit(Exit::CpuDown { state: 0 }));
        assert_eq!(call([0xc400_0001, 0, 0, 0]), Outcome::Exit(Exit::Halt));
    }
}
