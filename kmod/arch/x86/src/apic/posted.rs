// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The posted-interrupt descriptor (SDM vol. 3 section 30.6): where anybody leaves edge-triggered interrupts for a vCPU, and
//! where the CPU that runs the guest takes them from by itself when the notification vector reaches it. Atomics only.
//!
//! A poster sets the interrupt's bit and then ON; who has set ON sends the notification. Whoever takes, the CPU or the vCPU's
//! thread, clears ON and then takes the bits: a bit set meanwhile is taken too, or has ON set after it.

use core::sync::atomic::{AtomicU64, Ordering};

/// [`Descriptor::control`]: an outstanding notification.
const ON: u64 = 1 << 0;

/// The descriptor; all zero without interrupts. Its bits for interrupt remapping stay zero: no device posts here.
#[derive(Debug)]
#[repr(C, align(64))]
pub(crate) struct Descriptor {
    /// Vector `64 * i + b` is bit `b` of word `i`.
    requests: [AtomicU64; 4],
    control: AtomicU64,
    reserved: [u64; 3],
}

const _: () = assert!(size_of::<Descriptor>() == 64 && core::mem::offset_of!(Descriptor, control) == 32);

impl Descriptor {
    /// Posts an interrupt. True if the caller is to notify the vCPU; otherwise somebody else has it to do.
    pub(super) fn post(&self, vector: u8) -> bool {
        if let Some(word) = self.requests.get((vector >> 6) as usize) {
            word.fetch_or(1 << (vector & 63), Ordering::Release);
        }
        self.control.fetch_or(ON, Ordering::SeqCst) & ON == 0
    }

    /// Whether there may be something to take. As the last thing before the vCPU's thread sleeps, see `mailbox.rs`.
    pub(super) fn pending(&self) -> bool {
        self.control.load(Ordering::SeqCst) & ON != 0
    }

    /// Takes everything: vectors go to `accept` by word. For the vCPU's thread, outside of the guest.
    pub(super) fn take(&self, mut accept: impl FnMut(usize, u64)) {
        if self.control.load(Ordering::Relaxed) & ON == 0 {
            return;
        }
        self.control.fetch_and(!ON, Ordering::SeqCst);
        for (index, word) in self.requests.iter().enumerate() {
            if word.load(Ordering::Relaxed) != 0 {
                accept(index, word.swap(0, Ordering::Acquire));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::Framed;
    use crate::testing::TestHal;
    use std::vec::Vec;

    fn drain(descriptor: &Descriptor) -> Vec<(usize, u64)> {
        let mut all = Vec::new();
        descriptor.take(|index, vectors| all.push((index, vectors)));
        all
    }

    #[test]
    fn the_first_poster_notifies() {
        let descriptor = Framed::<Descriptor, TestHal>::zeroed().unwrap();
        assert!(!descriptor.pending());
        assert!(descriptor.post(0x41) && !descriptor.post(0x42) && !descriptor.post(0xff));
        assert!(descriptor.pending());
        assert_eq!(drain(&descriptor), [(1, 6), (3, 1 << 63)]);
        assert!(!descriptor.pending() && drain(&descriptor).is_empty());
        assert!(descriptor.post(0x41));
    }

    #[test]
    fn the_layout_is_the_manuals() {
        let descriptor = Framed::<Descriptor, TestHal>::zeroed().unwrap();
        descriptor.post(0x80);
        let words = |i: usize| descriptor.requests[i].load(Ordering::Relaxed);
        assert_eq!((words(2), descriptor.control.load(Ordering::Relaxed), align_of::<Descriptor>()), (1, 1, 64));
    }
}
