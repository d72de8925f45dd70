// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where everything lies in the guest, as the device tree tells it.
//!
//! | address | what |
//! |---|---|
//! | `0x0800_0000` | GICv3 distributor |
//! | `0x080a_0000` | GICv3 redistributors, 128 KiB for each vCPU |
//! | `0x0900_0000` | serial port |
//! | `0x0901_0000` | clock |
//! | `0x4000_0000` | memory: the kernel at its start, RAM disk and device tree at the end of its first region |

use std::ops::Range;

use crate::config::MemoryRegion;

/// The distributor's registers.
pub const DISTRIBUTOR: u64 = 0x0800_0000;
/// Their size.
pub const DISTRIBUTOR_SIZE: u64 = 0x1_0000;
/// The redistributors' registers: those of vCPU 0, and the others behind.
pub const REDISTRIBUTORS: u64 = 0x080a_0000;
/// Their size for one vCPU.
pub const REDISTRIBUTOR_SIZE: u64 = 0x2_0000;
/// Where the interrupt controller is, whose registers are the hypervisor's.
pub const INTERRUPT_CONTROLLER: Range<u64> = DISTRIBUTOR..SERIAL;
/// The serial port's registers, one page.
pub const SERIAL: u64 = 0x0900_0000;
/// The clock's registers, one page.
pub const CLOCK: u64 = 0x0901_0000;
/// Size of the registers of a device on a page of its own.
pub const DEVICE_SIZE: u64 = 0x1000;

/// Where memory begins.
pub const RAM_START: u64 = 0x4000_0000;
/// The last address at which a raw binary can start: where guest physical addresses end.
pub const LAST_ENTRY: u64 = (1 << 46) - 1;
/// The smallest guest memory.
pub const MIN_MEMORY: u64 = 2 << 20;
/// The addresses that devices may occupy: no memory can be there.
pub const DEVICE_HOLE: Range<u64> = 0..RAM_START;

/// The first INTID of shared peripheral interrupts (SPIs).
pub const FIRST_SPI: u32 = 32;
/// INTIDs that the interrupt controller has.
pub const INTIDS: u32 = 256;
/// INTID of the serial port's interrupt, an SPI; its rising edges count.
pub const SERIAL_INTID: u32 = FIRST_SPI + 1;

/// Memory of `size` bytes: in one piece.
#[must_use]
pub fn default_regions(size: u64) -> Vec<MemoryRegion> {
    vec![MemoryRegion { base: RAM_START, size }]
}

/// There are no I/O ports that a device could own.
#[must_use]
pub fn port_owner(_first: u16, _count: u16) -> Option<&'static str> {
    None
}

/// MPIDR_EL1's affinity fields of vCPU `id`: 16 CPUs in each cluster, since one software-generated interrupt reaches 16
/// (`ICC_SGI1R_EL1`). Both hypervisors count so.
#[must_use]
pub fn affinity(id: u32) -> u64 {
    u64::from(id % 16) | u64::from(id / 16) << 8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_do_not_overlap_for_as_many_vcpus_as_can_be() {
        let pieces = [
            DISTRIBUTOR..DISTRIBUTOR + DISTRIBUTOR_SIZE,
            REDISTRIBUTORS..REDISTRIBUTORS + 64 * REDISTRIBUTOR_SIZE,
            SERIAL..SERIAL + DEVICE_SIZE,
            CLOCK..CLOCK + DEVICE_SIZE,
        ];
        for pair in pieces.windows(2) {
            assert!(pair[0].end <= pair[1].start, "{pair:x?}");
        }
        assert!(pieces[3].end <= DEVICE_HOLE.end);
    }

    #[test]
    fn vcpus_are_numbered_in_clusters_of_16() {
        assert_eq!([0, 15, 16, 63].map(affinity), [0, 0xf, 0x100, 0x30f]);
    }
}
