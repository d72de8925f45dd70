// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The branch history that a guest leaves behind (Spectre-BHB, CVE-2022-23960): whether it must be overwritten at each exit before
//! the host takes an indirect branch, and by how many branches. Linux does the same for KVM (`arch/arm64/kernel/proton-pack.c`),
//! by vectors that it keeps to itself; the numbers are Arm's ("Spectre-BHB: Speculative Target Reuse Attacks").
//!
//! CPUs of several kinds may be in one machine: at each exit what the worst of them wants is done.

use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// What a CPU wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clearing {
    /// Nothing: it has no such history, or its history does not reach from a guest to the host.
    NotNeeded,
    /// So many taken branches, and then CLRBHB, which is no instruction on CPUs without FEAT_CLRBHB, as one branch
    /// is nothing to those with it.
    Branches(u64),
    /// A call of its firmware, as far as Arm says. We do not make it.
    Firmware,
}

/// The branches that the CPUs of this machine want at most.
static BRANCHES: AtomicU64 = AtomicU64::new(0);
/// CPUs of this machine that want a call of their firmware.
static FIRMWARE: AtomicU64 = AtomicU64::new(0);

/// CPUs of this machine whose branch predictors a guest can train for the host.
static TRAINABLE: AtomicU64 = AtomicU64::new(0);

/// A CPU by MIDR_EL1: implementer and part number.
const fn model(implementer: u64, part: u64) -> u64 {
    implementer << 24 | part << 4
}

/// The bits of MIDR_EL1 that [`model`] has.
const MODEL: u64 = 0xff << 24 | 0xfff << 4;

const ARM: u64 = 0x41;
const BROADCOM: u64 = 0x42;
const HISILICON: u64 = 0x48;
const QUALCOMM: u64 = 0x51;
const AMPERE: u64 = 0xc0;

/// CPUs that do not predict by history, or not far enough: Cortex-A35, A53, A55, A510, A520, Brahma-B53, and Kryo's small ones.
const SAFE: [u64; 9] = [
    model(ARM, 0xd04),
    model(ARM, 0xd03),
    model(ARM, 0xd05),
    model(ARM, 0xd46),
    model(ARM, 0xd80),
    model(BROADCOM, 0x100),
    model(QUALCOMM, 0x801),
    model(QUALCOMM, 0x803),
    model(QUALCOMM, 0x805),
];

/// The branches that overwrite the history of others.
const LENGTHS: [(u64, &[u64]); 6] = [
    // Cortex-X3, Neoverse V2.
    (132, &[model(ARM, 0xd4e), model(ARM, 0xd4f)]),
    // Cortex-A715, A720, A720AE.
    (38, &[model(ARM, 0xd4d), model(ARM, 0xd81), model(ARM, 0xd89)]),
    // Cortex-A78, A78AE, A78C, X1, X1C, A710, X2, Neoverse N2, V1, and TSV110.
    (
        32,
        &[
            model(ARM, 0xd41),
            model(ARM, 0xd42),
            model(ARM, 0xd4b),
            model(ARM, 0xd44),
            model(ARM, 0xd4c),
            model(ARM, 0xd47),
            model(ARM, 0xd48),
            model(ARM, 0xd49),
            model(ARM, 0xd40),
            model(HISILICON, 0xd01),
        ],
    ),
    // Cortex-A76, A76AE, A77, Neoverse N1, Kryo 4xx Gold, HIP09.
    (
        24,
        &[
            model(ARM, 0xd0b),
            model(ARM, 0xd0e),
            model(ARM, 0xd0d),
            model(ARM, 0xd0c),
            model(QUALCOMM, 0x804),
            model(HISILICON, 0xd02),
        ],
    ),
    // Ampere1.
    (11, &[model(AMPERE, 0xac3)]),
    // Cortex-A72, A57.
    (8, &[model(ARM, 0xd08), model(ARM, 0xd07)]),
];

/// What a CPU wants, by MIDR_EL1, ID_AA64PFR0_EL1, ID_AA64ISAR2_EL1 and ID_AA64MMFR1_EL1.
pub fn clearing(midr: u64, pfr0: u64, isar2: u64, mmfr1: u64) -> Clearing {
    let field = |register: u64, shift: u32| register >> shift & 15;
    // CSV2 (bits 59:56): FEAT_CSV2_3 and later. ECBHB (bits 63:60): exceptions to another level are a border for the history.
    if field(pfr0, 56) >= 3 || field(mmfr1, 60) != 0 || SAFE.contains(&(midr & MODEL)) {
        return Clearing::NotNeeded;
    }
    // CLRBHB, bits 31:28.
    if field(isar2, 28) != 0 {
        return Clearing::Branches(1);
    }
    let length = LENGTHS.iter().find(|(_, models)| models.contains(&(midr & MODEL)));
    length.map_or(Clearing::Firmware, |(branches, _)| Clearing::Branches(*branches))
}

/// Whether what a guest trains the predictors of indirect branches for (Spectre-v2, CVE-2017-5715) has no effect on the host, by
/// MIDR_EL1 and ID_AA64PFR0_EL1: with FEAT_CSV2, or on a CPU that is known not to need it. Elsewhere it takes a call of the
/// firmware.
pub fn predictors_are_apart(midr: u64, pfr0: u64) -> bool {
    const TSV110: u64 = model(HISILICON, 0xd01);
    pfr0 >> 56 & 15 != 0 || SAFE.contains(&(midr & MODEL)) || midr & MODEL == TSV110
}

/// The current CPU comes online.
#[cfg(target_arch = "aarch64")]
pub(crate) fn cpu_comes() {
    use crate::cpu::id_register;
    use aarch64_cpu::registers::{Readable, MIDR_EL1};
    let (midr, pfr0) = (MIDR_EL1.get(), id_register(4, 0));
    if !predictors_are_apart(midr, pfr0) {
        TRAINABLE.fetch_add(1, Relaxed);
    }
    match clearing(midr, pfr0, id_register(6, 2), id_register(7, 1)) {
        Clearing::NotNeeded => {}
        Clearing::Branches(branches) => _ = BRANCHES.fetch_max(branches, Relaxed),
        Clearing::Firmware => _ = FIRMWARE.fetch_add(1, Relaxed),
    }
}

/// The taken branches after each exit; 0 if there is nothing to overwrite.
#[inline]
pub fn branches() -> u64 {
    BRANCHES.load(Relaxed)
}

/// CPUs of this machine whose history nobody overwrites.
pub fn unprotected() -> u64 {
    FIRMWARE.load(Relaxed)
}

/// CPUs of this machine that a guest can train to mispredict the host's branches.
pub fn trainable() -> u64 {
    TRAINABLE.load(Relaxed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    const CSV2_3: u64 = 3 << 56;
    const CLRBHB: u64 = 1 << 28;
    const ECBHB: u64 = 1 << 60;

    #[test]
    fn models_by_any_revision() {
        for (midr, expected) in [
            (0x414f_d0c1, Clearing::Branches(24)), // Neoverse N1 r4p1
            (0x410f_d0c0, Clearing::Branches(24)),
            (0x414f_d0b1, Clearing::Branches(24)), // Cortex-A76
            (0x410f_d083, Clearing::Branches(8)),  // Cortex-A72
            (0x410f_d4f0, Clearing::Branches(132)),
            (0x480f_d010, Clearing::Branches(32)),
            (0x410f_d034, Clearing::NotNeeded), // Cortex-A53
            (0x410f_d0a0, Clearing::Firmware),  // Cortex-A75
        ] {
            assert_eq!(clearing(midr, 1 << 56, 0, 0), expected, "{midr:#x}");
        }
    }

    #[test]
    fn features_come_before_models() {
        let n1 = 0x414f_d0c1;
        assert_eq!(clearing(n1, CSV2_3, CLRBHB, 0), Clearing::NotNeeded);
        assert_eq!(clearing(n1, 0, 0, ECBHB), Clearing::NotNeeded);
        assert_eq!(clearing(n1, 2 << 56, CLRBHB, 0), Clearing::Branches(1));
        assert_eq!(clearing(0x410f_d0a0, 0, CLRBHB, 0), Clearing::Branches(1));
    }

    #[test]
    fn predictors_by_feature_and_model() {
        for (midr, pfr0, expected) in [
            (0x414f_d0c1, 1 << 56, true), // Neoverse N1
            (0x410f_d0a0, 0, false),      // Cortex-A75
            (0x410f_d0a0, 1 << 56, true), // a later one
            (0x431f_0af1, 0, false),      // ThunderX2
            (0x410f_d034, 0, true),       // Cortex-A53
            (0x481f_d010, 0, true),       // TSV110
            (0x431f_0af1, 3 << 56, true),
            (0x431f_0af1, 0xf0ff << 48, false), // the fields beside it
        ] {
            assert_eq!(predictors_are_apart(midr, pfr0), expected, "{midr:#x} {pfr0:#x}");
        }
    }

    #[test]
    fn no_model_twice() {
        let lists = LENGTHS.iter().flat_map(|(_, models)| models.iter()).chain(&SAFE);
        let mut all: Vec<u64> = lists.copied().collect();
        let count = all.len();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), count);
    }
}
