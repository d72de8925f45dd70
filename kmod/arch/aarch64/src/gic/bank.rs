// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The state of 32 interrupts: a bit for each in every word. It is the truth but for what a running vCPU has in its list
//! registers.

use core::sync::atomic::{AtomicU32, AtomicU8, Ordering::SeqCst};

/// Bits of a priority that are there: 32 priorities, the least that the architecture allows with two security states, and
/// what a CPU interface with the fewest bits can tell apart.
pub(super) const PRIORITY_MASK: u8 = 0xf8;

/// The bank.
#[derive(Debug, Default)]
#[repr(C)]
pub(super) struct Bank {
    /// GICD_ISENABLER.
    pub(super) enabled: AtomicU32,
    /// Pending whatever the line says: an edge, an SGI, or a write to GICD_ISPENDR.
    pub(super) latch: AtomicU32,
    /// The line is asserted.
    pub(super) line: AtomicU32,
    /// GICD_ISACTIVER.
    pub(super) active: AtomicU32,
    /// To be made inactive by the vCPU that has them in its list registers, where they may have become active.
    pub(super) retired: AtomicU32,
    /// Edge-triggered, not level-triggered.
    pub(super) edge: AtomicU32,
    /// Group 1, not group 0.
    pub(super) group: AtomicU32,
    priority: [AtomicU8; 32],
}

impl Bank {
    /// The interrupts that are pending.
    pub(super) fn pending(&self) -> u32 {
        self.latch.load(SeqCst) | self.line.load(SeqCst) & !self.edge.load(SeqCst)
    }

    /// Whether nothing is active, nor pending whoever may be told of it.
    #[inline]
    pub(super) fn is_quiet(&self) -> bool {
        self.latch.load(SeqCst) | self.line.load(SeqCst) | self.active.load(SeqCst) == 0
    }

    /// The interrupts that a CPU interface is to be told of, when the distributor forwards the `groups` (bit 0 and 1).
    pub(super) fn ready(&self, groups: u32) -> u32 {
        let pending = self.pending() & self.enabled.load(SeqCst);
        if pending == 0 {
            return 0;
        }
        let group = self.group.load(SeqCst);
        pending & (if groups & 1 != 0 { !group } else { 0 } | if groups & 2 != 0 { group } else { 0 })
    }

    /// Makes `which` active, for anybody.
    pub(super) fn activate(&self, which: u32) {
        self.take_retired(which);
        self.active.fetch_or(which, SeqCst);
    }

    /// Makes `which` inactive, for anybody, and returns those that were active here. The others may be active in the list
    /// registers of a vCPU that runs, which must be told: it makes them inactive when it [`folds`](super::Interface::fold).
    pub(super) fn deactivate(&self, which: u32) -> u32 {
        let known = self.active.fetch_and(!which, SeqCst) & which;
        if known == which {
            return known;
        }
        self.retired.fetch_or(which & !known, SeqCst);
        // It may have folded since, and not have found them retired.
        let late = self.take_retired(which & !known & self.active.load(SeqCst));
        self.active.fetch_and(!late, SeqCst);
        known | late
    }

    /// By the vCPU that has taken `which` out of its list registers: those that others have made inactive meanwhile. They are
    /// retired no more.
    pub(super) fn take_retired(&self, which: u32) -> u32 {
        if self.retired.load(SeqCst) & which == 0 {
            return 0;
        }
        self.retired.fetch_and(!which, SeqCst) & which
    }

    /// The priority of interrupt `index` of the bank.
    pub(super) fn priority(&self, index: usize) -> u8 {
        self.priority.get(index).map_or(0, |priority| priority.load(SeqCst))
    }

    /// Sets it.
    pub(super) fn set_priority(&self, index: usize, priority: u8) {
        if let Some(cell) = self.priority.get(index) {
            cell.store(priority & PRIORITY_MASK, SeqCst);
        }
    }
}

/// Sets or clears `bits` of a word.
pub(super) fn assign(word: &AtomicU32, bits: u32, set: bool) {
    if set {
        word.fetch_or(bits, SeqCst);
    } else {
        word.fetch_and(!bits, SeqCst);
    }
}

/// The numbers of the bits that are set, lowest first.
pub(super) fn bits(word: u32) -> impl Iterator<Item = usize> {
    let mut rest = word;
    core::iter::from_fn(move || {
        let bit = rest.trailing_zeros();
        rest &= rest.wrapping_sub(1);
        (bit < 32).then_some(bit as usize)
    })
}
