// SPDX-License-Identifier: MIT OR Apache-2.0
//! The CPU at the guest's first instruction.

use axvcpu_uapi::addr::GuestPhysAddr;
use axvcpu_uapi::arm64::{General, PSTATE_DAIF, PSTATE_EL1H};

/// How the boot processor starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Start {
    /// Address of the first instruction.
    pub entry: GuestPhysAddr,
    /// Where the device tree is.
    pub fdt: GuestPhysAddr,
}

impl Start {
    /// Its general registers (Linux `Documentation/arch/arm64/booting.rst`).
    #[must_use]
    pub fn general(&self) -> General {
        general(self.entry, self.fdt.as_u64())
    }
}

/// The general registers of a CPU that starts at `entry`, with `x0` and nothing else in its registers: at EL1, all
/// interrupts masked (also PSCI, Arm DEN 0022, section 6.4).
#[must_use]
pub fn general(entry: GuestPhysAddr, x0: u64) -> General {
    let mut general = General { pc: entry.as_u64(), pstate: PSTATE_EL1H | PSTATE_DAIF, ..General::default() };
    general.x[0] = x0;
    general
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_finds_its_device_tree() {
        let start = Start { entry: GuestPhysAddr::new(0x4008_0000), fdt: GuestPhysAddr::new(0x4fff_0000) };
        let general = start.general();
        assert_eq!((general.pc, general.x[0], general.pstate), (0x4008_0000, 0x4fff_0000, 0x3c5));
        assert!(general.x[1..].iter().all(|x| *x == 0));
    }
}
