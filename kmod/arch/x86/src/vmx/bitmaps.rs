// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The MSR bitmap (SDM vol. 3 section 25.6.9): every access exits, but for MSRs that are switched between host and guest anyway.
//!
//! There are no I/O bitmaps: the control that makes every port access exit needs none, and covers accesses that wrap around
//! the end of the port space too.

use vcpu_core::{AxResult, AxVCpuHal, HostPhysAddr};
use x86::msr;

use crate::frame::Frames;

/// MSRs that the guest reads and writes directly: the VMCS or the window switches them, and hardware checks the values. Not those
/// of SYSCALL, which guests write once: the CPU has them only while a guest can use them.
const DIRECT: [u32; 6] = [
    msr::IA32_SYSENTER_CS,
    msr::IA32_SYSENTER_ESP,
    msr::IA32_SYSENTER_EIP,
    msr::IA32_FS_BASE,
    msr::IA32_GS_BASE,
    msr::IA32_KERNEL_GSBASE,
];

/// The bitmap: 1 KiB each for reads of low and high MSRs, then for writes of both.
pub(crate) struct MsrBitmap<H: AxVCpuHal> {
    frame: Frames<H>,
}

impl<H: AxVCpuHal> MsrBitmap<H> {
    /// Makes it. May sleep.
    ///
    /// # Errors
    /// [`AxError::NoMemory`](vcpu_core::AxError::NoMemory).
    pub(crate) fn new() -> AxResult<Self> {
        let mut frame = Frames::new(0)?;
        let bytes = frame.bytes_mut();
        bytes.fill(0xff);
        for index in DIRECT {
            for write in [false, true] {
                if let Some((byte, bit)) = position(index, write) {
                    if let Some(byte) = bytes.get_mut(byte) {
                        *byte &= !(1 << bit);
                    }
                }
            }
        }
        Ok(Self { frame })
    }

    /// Its address, for the VMCS.
    pub(crate) fn phys(&self) -> HostPhysAddr {
        self.frame.phys()
    }
}

/// Byte and bit for a read or write of MSR `index`. `None` for an MSR outside of the two ranges, which always exits.
fn position(index: u32, write: bool) -> Option<(usize, u32)> {
    let base = match index & !0x1fff {
        0 => 0,
        0xc000_0000 => 0x400,
        _ => return None,
    };
    let low = index & 0x1fff;
    let base = if write { base + 0x800 } else { base };
    Some((base + (low / 8) as usize, low % 8))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TestHal;

    #[test]
    fn positions_are_those_of_the_manual() {
        for (index, write, expected) in [
            (0, false, Some((0, 0))),
            (0x174, false, Some((0x2e, 4))),
            (0x1fff, false, Some((0x3ff, 7))),
            (0xc000_0080, false, Some((0x410, 0))),
            (0x10, true, Some((0x802, 0))),
            (0xc000_0102, true, Some((0xc20, 2))),
            (0xc000_1fff, true, Some((0xfff, 7))),
            (0x2000, false, None),
            (0xc001_0000, false, None),
            (u32::MAX, true, None),
        ] {
            assert_eq!(position(index, write), expected, "{index:#x}");
        }
    }

    #[test]
    fn only_the_switched_msrs_are_direct() {
        let bitmap = MsrBitmap::<TestHal>::new().unwrap();
        let bytes = bitmap.frame.bytes();
        for base in [0u32, 0xc000_0000] {
            for index in base..base + 0x2000 {
                for write in [false, true] {
                    let (byte, bit) = position(index, write).unwrap();
                    assert_eq!(bytes[byte] >> bit & 1 == 0, DIRECT.contains(&index), "{index:#x}");
                }
            }
        }
    }
}
