// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! Which host memory is changing or has changed lately: how a page fault that looked a page up without a lock learns whether
//! what it found is still true.
//!
//! A fault takes a [`snapshot`](Changes::snapshot), looks the page up, takes the lock, and maps the page only if nothing has
//! [disturbed](Changes::disturbed) its range since. Ranges are remembered, not only counted: changes elsewhere, however many,
//! do not hold a fault up unless more of them end during one look-up than are remembered.

use core::ops::Range;

/// Changes remembered.
const RECENT: usize = 32;

/// The changes of an address space. To be kept under its lock.
pub struct Changes {
    /// Changes that have ended. Wraps.
    ended: u64,
    /// The ranges of the last of them: number `n` at index `n % RECENT`.
    recent: [Range<u64>; RECENT],
    /// Changes that have begun and not ended.
    under_way: u32,
    /// What those cover together.
    span: Range<u64>,
}

impl Default for Changes {
    fn default() -> Self {
        Self { ended: 0, recent: [const { 0..0 }; RECENT], under_way: 0, span: 0..0 }
    }
}

/// A point in the sequence of changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Snapshot(u64);

impl Changes {
    /// Memory in `range` is about to change.
    pub fn begin(&mut self, range: Range<u64>) {
        self.span =
            if self.under_way == 0 { range } else { self.span.start.min(range.start)..self.span.end.max(range.end) };
        self.under_way = self.under_way.saturating_add(1);
    }

    /// The change of `range` that was begun is over.
    pub fn end(&mut self, range: Range<u64>) {
        self.under_way = self.under_way.saturating_sub(1);
        self.note(range);
    }

    /// Memory in `range` has changed, all at once.
    pub fn note(&mut self, range: Range<u64>) {
        if let Some(slot) = self.recent.get_mut((self.ended % RECENT as u64) as usize) {
            *slot = range;
        }
        self.ended = self.ended.wrapping_add(1);
    }

    /// The present point.
    pub fn snapshot(&self) -> Snapshot {
        Snapshot(self.ended)
    }

    /// Whether memory in `range` is changing.
    #[inline]
    pub fn is_under_way(&self, range: &Range<u64>) -> bool {
        self.under_way != 0 && overlap(&self.span, range)
    }

    /// Whether memory in `range` is changing, or may have changed since `snapshot`.
    #[inline]
    pub fn disturbed(&self, snapshot: Snapshot, range: &Range<u64>) -> bool {
        if self.is_under_way(range) {
            return true;
        }
        let since = self.ended.wrapping_sub(snapshot.0);
        if since > RECENT as u64 {
            return true;
        }
        (0..since).any(|back| {
            let number = self.ended.wrapping_sub(1).wrapping_sub(back);
            self.recent.get((number % RECENT as u64) as usize).is_none_or(|other| overlap(other, range))
        })
    }
}

#[inline]
fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_disturbs_its_range_from_its_beginning_and_faults_that_saw_it() {
        let mut changes = Changes::default();
        let before = changes.snapshot();
        assert!(!changes.disturbed(before, &(0..u64::MAX)));
        changes.begin(100..200);
        let during = changes.snapshot();
        for range in [0..101, 150..160, 199..300] {
            assert!(changes.disturbed(during, &range));
        }
        for range in [0..100, 200..300] {
            assert!(!changes.disturbed(before, &range));
        }
        changes.end(100..200);
        assert!(changes.disturbed(before, &(150..160)) && changes.disturbed(during, &(150..160)));
        assert!(!changes.disturbed(during, &(200..300)));
        assert!(!changes.disturbed(changes.snapshot(), &(150..160)));
    }

    #[test]
    fn changes_that_overlap_in_time_disturb_all_between_them_until_the_last_ends() {
        let mut changes = Changes::default();
        changes.begin(100..200);
        changes.begin(400..500);
        let now = changes.snapshot();
        assert!(changes.disturbed(now, &(300..310)));
        changes.end(100..200);
        assert!(changes.disturbed(now, &(300..310)));
        changes.end(400..500);
        assert!(!changes.disturbed(now, &(300..310)));
        changes.begin(0..10);
        assert!(!changes.disturbed(changes.snapshot(), &(300..310)), "the span starts anew");
    }

    #[test]
    fn changes_elsewhere_do_not_disturb_until_too_many_to_remember() {
        // Past the end of the ring, and of the counter.
        let mut changes = Changes { ended: u64::MAX - 30, ..Changes::default() };
        let then = changes.snapshot();
        for i in 0..RECENT as u64 {
            changes.note(1000 + i..1001 + i);
            assert!(!changes.disturbed(then, &(0..1000)), "after {i}");
            assert!(changes.disturbed(then, &(1000..1001)), "after {i}");
        }
        changes.note(5000..5001);
        assert!(changes.disturbed(then, &(0..1000)), "one too many");
    }
}
