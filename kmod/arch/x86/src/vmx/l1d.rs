// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! Flushing a CPU's L1 data cache before a guest runs, where the host is one that it could be read on ([`L1dFlush`]).

use vcpu_core::{AxResult, AxVCpuHal};

use crate::cpu;
use crate::frame::{Frames, FRAME};
use crate::mitigations::L1dFlush;
use crate::msr::{FLUSH_CMD, FLUSH_CMD_L1D};

/// Bytes of a cache line.
const LINE: usize = 64;
/// Bytes that have been read when none of the cache's old contents are left. The CPUs with the fault have 32 KiB of it, and what
/// they replace first is not exactly the oldest (Linux: `vmx_l1d_flush`).
const FILL: usize = 64 * 1024;

/// What a CPU needs to flush its L1 data cache.
pub(super) struct L1d<H: AxVCpuHal> {
    when: L1dFlush,
    /// Memory to fill the cache with, if the CPU has no command for it.
    fill: Option<Frames<H>>,
}

impl<H: AxVCpuHal> L1d<H> {
    /// For a CPU that has IA32_FLUSH_CMD if `has_command`. May sleep.
    ///
    /// # Errors
    /// [`AxError::NoMemory`](vcpu_core::AxError::NoMemory).
    pub(super) fn new(when: L1dFlush, has_command: bool) -> AxResult<Self> {
        let fill = if when == L1dFlush::Never || has_command { None } else { Some(Self::pattern()?) };
        Ok(Self { when, fill })
    }

    /// Frames that are different, or a hypervisor below could have merged them into one.
    fn pattern() -> AxResult<Frames<H>> {
        let mut frames = Frames::new(const { Frames::<H>::order_for(FILL) })?;
        for (frame, byte) in frames.bytes_mut().chunks_exact_mut(FRAME).zip(1..) {
            frame.fill(byte);
        }
        Ok(frames)
    }

    /// Whether the first entry after the host wants it flushed.
    pub(super) fn is_wanted(&self) -> bool {
        self.when != L1dFlush::Never
    }

    /// Flushes. Gives whether the next entry wants it again, even if the host's interrupts stay off until then.
    ///
    /// # Safety
    /// [`is_wanted`](Self::is_wanted), at CPL 0 on the CPU that this was made for.
    #[cold]
    pub(super) unsafe fn flush(&self) -> bool {
        match &self.fill {
            // SAFETY: The caller's promise; by `new` the CPU has the command, which changes nothing but caches.
            None => unsafe { cpu::wrmsr(FLUSH_CMD, FLUSH_CMD_L1D) },
            Some(fill) => {
                // First the translations, so that the walks for them do not come between.
                read_each(fill.bytes(), FRAME);
                cpu::serialize();
                read_each(fill.bytes(), LINE);
                cpu::load_fence();
            }
        }
        self.when == L1dFlush::Always
    }
}

/// Reads a byte of every `stride`.
#[inline]
fn read_each(bytes: &[u8], stride: usize) {
    for byte in bytes.iter().step_by(stride) {
        // SAFETY: A reference. Volatile, as nobody wants the value.
        unsafe { core::ptr::from_ref(byte).read_volatile() };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TestHal;

    #[test]
    fn memory_is_kept_only_to_stand_in_for_the_command() {
        for when in [L1dFlush::Never, L1dFlush::AfterHost, L1dFlush::Always] {
            for has_command in [false, true] {
                let l1d = L1d::<TestHal>::new(when, has_command).unwrap();
                assert_eq!(l1d.fill.is_some(), when != L1dFlush::Never && !has_command, "{when:?}, {has_command}");
            }
        }
    }

    #[test]
    fn no_two_frames_are_alike() {
        let frames = L1d::<TestHal>::pattern().unwrap();
        let first: std::vec::Vec<u8> = frames.bytes().chunks_exact(FRAME).map(|frame| frame[0]).collect();
        assert_eq!(first, (1..=16).collect::<std::vec::Vec<u8>>());
    }
}
