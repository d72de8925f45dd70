// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The I/O and MSR permission maps (APM vol. 2 sections 15.10 and 15.11): everything exits, but for the MSRs that VMLOAD and
//! VMSAVE switch. They do not depend on the vCPU, so all vCPUs share one pair.

use vcpu_core::{AxResult, AxVCpuHal, HostPhysAddr};
use x86::msr;

use crate::frame::Frames;

/// 12 KiB, one bit a port, and three more bits for accesses that run over the end.
const IO_BYTES: usize = 3 * 4096;
/// 8 KiB, two bits an MSR.
const MSR_BYTES: usize = 2 * 4096;

/// MSRs that the guest may read and write directly: VMLOAD and VMSAVE switch them, hardware checks the values, and no value
/// of theirs can matter to the host.
const DIRECT: [u32; 10] = [
    msr::IA32_SYSENTER_CS,
    msr::IA32_SYSENTER_ESP,
    msr::IA32_SYSENTER_EIP,
    msr::IA32_STAR,
    msr::IA32_LSTAR,
    msr::IA32_CSTAR,
    msr::IA32_FMASK,
    msr::IA32_FS_BASE,
    msr::IA32_GS_BASE,
    msr::IA32_KERNEL_GSBASE,
];

/// The maps. Immutable once made.
pub struct PermissionMaps<H: AxVCpuHal> {
    io: Frames<H>,
    msr: Frames<H>,
}

impl<H: AxVCpuHal> PermissionMaps<H> {
    /// Makes the maps. May sleep.
    ///
    /// # Errors
    /// [`AxError::NoMemory`](vcpu_core::AxError::NoMemory).
    pub fn new() -> AxResult<Self> {
        let mut io = Frames::new(const { Frames::<H>::order_for(IO_BYTES) })?;
        let mut map = Frames::new(const { Frames::<H>::order_for(MSR_BYTES) })?;
        io.bytes_mut().fill(0xff);
        map.bytes_mut().fill(0xff);
        for index in DIRECT {
            if let Some((byte, shift)) = position(index) {
                if let Some(byte) = map.bytes_mut().get_mut(byte) {
                    *byte &= !(3 << shift);
                }
            }
        }
        Ok(Self { io, msr: map })
    }

    /// IOPM_BASE_PA.
    pub(crate) fn io(&self) -> HostPhysAddr {
        self.io.phys()
    }

    /// MSRPM_BASE_PA.
    pub(crate) fn msr(&self) -> HostPhysAddr {
        self.msr.phys()
    }
}

/// Byte of the MSR permission map that holds `index`'s read bit, and the bit's number; the write bit is the next one.
/// `None` for an MSR outside of the map, which always exits.
fn position(index: u32) -> Option<(usize, u32)> {
    // APM vol. 2 table 15-8: three ranges of 8192 MSRs, 2 KiB each.
    let base = match index & !0x1fff {
        0 => 0,
        0xc000_0000 => 0x800,
        0xc001_0000 => 0x1000,
        _ => return None,
    };
    let low = index & 0x1fff;
    Some((base + (low / 4) as usize, low % 4 * 2))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TestHal;

    #[test]
    fn msr_positions_are_those_of_the_manual() {
        for (index, expected) in [
            (0, Some((0, 0))),
            (0x174, Some((0x5d, 0))),
            (0x1fff, Some((0x7ff, 6))),
            (0xc000_0000, Some((0x800, 0))),
            (0xc000_0102, Some((0x840, 4))),
            (0xc000_1fff, Some((0xfff, 6))),
            (0xc001_0000, Some((0x1000, 0))),
            (0xc001_0015, Some((0x1005, 2))),
            (0xc001_1fff, Some((0x17ff, 6))),
            (0x2000, None),
            (0xc001_2000, None),
            (0x4b56_4d01, None),
            (u32::MAX, None),
        ] {
            assert_eq!(position(index), expected, "{index:#x}");
        }
    }

    #[test]
    fn every_port_exits() {
        let maps = PermissionMaps::<TestHal>::new().unwrap();
        assert!(maps.io.bytes()[..IO_BYTES].iter().all(|&byte| byte == 0xff));
    }

    #[test]
    fn only_the_switched_msrs_are_direct() {
        let maps = PermissionMaps::<TestHal>::new().unwrap();
        let bytes = maps.msr.bytes();
        for base in [0u32, 0xc000_0000, 0xc001_0000] {
            for index in base..base + 0x2000 {
                let (byte, shift) = position(index).unwrap();
                let exits = bytes[byte] >> shift & 3;
                assert_eq!(exits, if DIRECT.contains(&index) { 0 } else { 3 }, "{index:#x}");
            }
        }
        assert!(bytes[0x1800..].iter().all(|&byte| byte == 0xff), "reserved part");
    }
}
