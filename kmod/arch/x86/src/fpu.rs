// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The guest's x87, SSE, AVX and PKRU state: an XSAVE area in the standard format (APM vol. 2 section 11.5.2), loaded and
//! saved once per window.

use vcpu_core::{AxError, AxResult, AxVCpuHal};

use crate::caps::Capabilities;
use crate::cpu;
use crate::frame::Frames;

/// Offset of FCW in the legacy area.
const FCW: usize = 0;
/// FCW after reset by FNINIT.
const FCW_INIT: u16 = 0x37f;
/// Offset of MXCSR in the legacy area.
const MXCSR: usize = 24;
/// MXCSR after reset.
const MXCSR_INIT: u32 = 0x1f80;
/// Offset of XSTATE_BV: which components the area holds.
const XSTATE_BV: usize = 512;
/// The rest of the header: XCOMP_BV, zero in the standard format, and reserved bytes.
const HEADER_ZERO: core::ops::Range<usize> = 520..576;

/// A vCPU's FPU state while it is not loaded.
pub(crate) struct Fpu<H: AxVCpuHal> {
    area: Frames<H>,
    /// Bytes of the area.
    size: usize,
    /// The components that are saved and loaded.
    mask: u64,
    /// MXCSR bits that can be set.
    mxcsr_mask: u32,
    /// The CPU neither saves nor loads x87 pointers without a pending exception.
    leaks_pointers: bool,
}

impl<H: AxVCpuHal> Fpu<H> {
    /// The state after reset. May sleep.
    ///
    /// # Errors
    /// [`AxError::NoMemory`].
    pub(crate) fn new(caps: &Capabilities) -> AxResult<Self> {
        let size = caps.xsave_size as usize;
        let mut fpu = Self {
            area: Frames::new(Frames::<H>::order_for(size))?,
            size,
            mask: caps.xcr0,
            mxcsr_mask: caps.mxcsr_mask,
            leaks_pointers: caps.leaks_x87_pointers,
        };
        fpu.reset();
        Ok(fpu)
    }

    /// All components in their initial state.
    pub(crate) fn reset(&mut self) {
        let area = self.area.bytes_mut();
        area.fill(0);
        // XSTATE_BV 0 means all of this, except that XRSTOR takes MXCSR from the area.
        put(area, FCW, &FCW_INIT.to_le_bytes());
        put(area, MXCSR, &MXCSR_INIT.to_le_bytes());
    }

    /// Copies the state out. `buffer` has exactly the area's size.
    ///
    /// # Errors
    /// [`AxError::InvalidInput`] for a buffer of another size.
    pub(crate) fn copy_to(&self, buffer: &mut [u8]) -> AxResult {
        match self.area.bytes().get(..self.size) {
            Some(area) if buffer.len() == self.size => {
                buffer.copy_from_slice(area);
                Ok(())
            }
            _ => Err(AxError::InvalidInput),
        }
    }

    /// Replaces the state.
    ///
    /// # Errors
    /// [`AxError::InvalidInput`] for a buffer of another size, [`AxError::InvalidRegister`] for one that XRSTOR would refuse.
    pub(crate) fn copy_from(&mut self, buffer: &[u8]) -> AxResult {
        if buffer.len() != self.size {
            return Err(AxError::InvalidInput);
        }
        let components = u64::from_le_bytes(get(buffer, XSTATE_BV).ok_or(AxError::InvalidInput)?);
        let mxcsr = u32::from_le_bytes(get(buffer, MXCSR).ok_or(AxError::InvalidInput)?);
        let zero = buffer.get(HEADER_ZERO).is_some_and(|bytes| bytes.iter().all(|&byte| byte == 0));
        if components & !self.mask != 0 || mxcsr & !self.mxcsr_mask != 0 || !zero {
            return Err(AxError::InvalidRegister);
        }
        if let Some(area) = self.area.bytes_mut().get_mut(..self.size) {
            area.copy_from_slice(buffer);
        }
        Ok(())
    }

    /// Loads the state into the FPU.
    ///
    /// # Safety
    /// The FPU is ours (`fpu_begin`), and XCR0 is the host's, which enables all of the components.
    #[inline]
    pub(crate) unsafe fn load(&self) {
        if self.leaks_pointers {
            // SAFETY: The FPU is ours.
            unsafe { cpu::clear_x87_pointers() };
        }
        // SAFETY: The area is a frame, large enough for `mask` (see `Capabilities`), and was checked when it was filled from
        // outside: the header is valid, and MXCSR.
        unsafe { cpu::xrstor(self.area.as_ptr(), self.mask) };
    }

    /// Saves the state from the FPU.
    ///
    /// # Safety
    /// XCR0 is the host's.
    #[inline]
    pub(crate) unsafe fn save(&mut self) {
        // SAFETY: As in `load`.
        unsafe { cpu::xsave(self.area.as_ptr(), self.mask) };
    }
}

fn get<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    if let Some(place) = bytes.get_mut(at..).and_then(|rest| rest.get_mut(..value.len())) {
        place.copy_from_slice(value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TestHal;
    use std::{vec, vec::Vec};

    fn fpu() -> Fpu<TestHal> {
        Fpu::new(&Capabilities { xcr0: 7, xsave_size: 832, mxcsr_mask: 0xffff, ..Capabilities::none() }).unwrap()
    }

    fn saved(fpu: &Fpu<TestHal>) -> Vec<u8> {
        let mut buffer = vec![0; 832];
        fpu.copy_to(&mut buffer).unwrap();
        buffer
    }

    #[test]
    fn reset_state_is_that_of_fninit() {
        let area = saved(&fpu());
        assert_eq!((area[0], area[1]), (0x7f, 0x03));
        assert_eq!(area[24..28], [0x80, 0x1f, 0, 0]);
        assert_eq!(area.iter().filter(|&&byte| byte != 0).count(), 4);
    }

    #[test]
    fn a_good_area_goes_in_and_comes_out() {
        let mut fpu = fpu();
        let mut area = saved(&fpu);
        area[512] = 7;
        area[160..176].fill(0xaa);
        area[576..832].fill(0x55);
        assert_eq!(fpu.copy_from(&area), Ok(()));
        assert_eq!(saved(&fpu), area);
    }

    #[test]
    fn a_bad_area_changes_nothing() {
        let mut fpu = fpu();
        let good = saved(&fpu);
        for (why, at, value) in [
            ("component beyond XCR0", 513, 2),
            ("compacted format", 527, 0x80),
            ("reserved header byte", 575, 1),
            ("reserved MXCSR bit", 26, 1),
        ] {
            let mut bad = good.clone();
            bad[at] = value;
            bad[200] = 1;
            assert_eq!(fpu.copy_from(&bad), Err(AxError::InvalidRegister), "{why}");
            assert_eq!(saved(&fpu), good);
        }
        assert_eq!(fpu.copy_from(&good[1..]), Err(AxError::InvalidInput));
        assert_eq!(fpu.copy_to(&mut [0; 831]), Err(AxError::InvalidInput));
    }
}
