// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! Iteration over the leaves of a range.

use core::marker::PhantomData;

use super::{descend, Format, Level, Levels, Mapping, Span, TableMemory};
use crate::{GuestPhysAddr, HostPhysAddr};

/// The leaves that intersect a range, in ascending order, each with its first guest physical address, which for the first
/// leaf may lie before the range. Made by [`NestedPageTable::leaves`](super::NestedPageTable::leaves).
#[derive(Debug)]
pub struct Leaves<'a, F, M> {
    root: HostPhysAddr,
    levels: Levels,
    mem: &'a M,
    rest: Span,
    format: PhantomData<fn() -> F>,
}

impl<'a, F: Format, M: TableMemory> Leaves<'a, F, M> {
    pub(super) fn new(root: HostPhysAddr, levels: Levels, rest: Span, mem: &'a M) -> Self {
        Self { root, levels, mem, rest, format: PhantomData }
    }
}

impl<F: Format, M: TableMemory> Iterator for Leaves<'_, F, M> {
    type Item = (GuestPhysAddr, Mapping);

    fn next(&mut self) -> Option<Self::Item> {
        while self.rest.start < self.rest.end {
            let gpa = self.rest.start;
            let slot = descend::<F>(self.root, self.levels, |t, i| self.mem.read(t, i), gpa, Level::LEAVES);
            let first = gpa & !(slot.level.span() - 1);
            self.rest.start = first.saturating_add(slot.level.span());
            if let Some(mapping) = slot.mapping(first) {
                return Some((GuestPhysAddr::new(first), mapping));
            }
        }
        None
    }
}
