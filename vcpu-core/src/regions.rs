// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The regions of an address space: which guest physical addresses are backed by which host virtual addresses, with which
//! rights. A sorted array in storage from outside, so that changing it under a lock never allocates.

use crate::{AxError, AxResult, GuestPhysAddr};

/// Granularity of regions, in bytes.
const PAGE: u64 = 4096;

/// A range of guest physical memory and what is behind it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Region {
    /// First guest physical address.
    pub guest: GuestPhysAddr,
    /// Length in bytes. A region never wraps.
    pub size: u64,
    /// First host virtual address.
    pub host: u64,
    /// Access rights: bits that mean something to the owner only.
    pub flags: u32,
}

impl Region {
    /// First guest physical address after it.
    const fn end(&self) -> u64 {
        self.guest.as_u64().wrapping_add(self.size)
    }

    /// Whether `addr` lies in it.
    pub const fn contains(&self, addr: GuestPhysAddr) -> bool {
        addr.as_u64().wrapping_sub(self.guest.as_u64()) < self.size
    }

    /// The host virtual address behind `addr`, which lies in the region.
    pub const fn host_of(&self, addr: GuestPhysAddr) -> u64 {
        self.host.wrapping_add(addr.as_u64().wrapping_sub(self.guest.as_u64()))
    }

    /// The guest range that is backed by the host range `start..end`, as start and size, if any of it is.
    pub fn guest_range_of(&self, start: u64, end: u64) -> Option<(GuestPhysAddr, u64)> {
        let first = start.max(self.host);
        let last = end.min(self.host.saturating_add(self.size));
        if first >= last {
            return None;
        }
        let guest = self.guest.as_u64().wrapping_add(first.wrapping_sub(self.host));
        Some((GuestPhysAddr::new(guest), last.wrapping_sub(first)))
    }

    /// The part of the region inside `start..end`.
    fn cut(&self, start: u64, end: u64) -> Option<Self> {
        let first = start.max(self.guest.as_u64());
        let last = end.min(self.end());
        (first < last).then(|| Self {
            guest: GuestPhysAddr::new(first),
            size: last.wrapping_sub(first),
            host: self.host_of(GuestPhysAddr::new(first)),
            flags: self.flags,
        })
    }
}

/// The regions, sorted and disjoint.
///
/// # Invariants
/// The first `len` slots of `slots` are the regions, in ascending order, without overlap; `len <= slots.len()`.
pub struct RegionMap<S> {
    slots: S,
    len: usize,
}

impl<S: core::ops::DerefMut<Target = [Region]>> RegionMap<S> {
    /// An empty map with room for as many regions as `slots` has elements.
    pub fn new(slots: S) -> Self {
        Self { slots, len: 0 }
    }

    /// The regions, in ascending order.
    pub fn as_slice(&self) -> &[Region] {
        self.slots.get(..self.len).unwrap_or(&[])
    }

    /// The region that `addr` lies in.
    pub fn find(&self, addr: GuestPhysAddr) -> Option<&Region> {
        let regions = self.as_slice();
        let after = regions.partition_point(|r| r.guest <= addr);
        regions.get(after.checked_sub(1)?).filter(|r| r.contains(addr))
    }

    /// Adds a region.
    ///
    /// # Errors
    /// - [`AxError::InvalidInput`]: an address or the size is not a multiple of 4096, the size is zero, or a range wraps.
    /// - [`AxError::AlreadyMapped`]: it overlaps another.
    /// - [`AxError::LimitReached`]: no slot is left.
    pub fn insert(&mut self, region: Region) -> AxResult {
        check_range(region.guest, region.size)?;
        check_range(GuestPhysAddr::new(region.host), region.size)?;
        let regions = self.as_slice();
        let at = regions.partition_point(|r| r.guest < region.guest);
        let clear_before =
            at.checked_sub(1).and_then(|i| regions.get(i)).is_none_or(|r| r.end() <= region.guest.as_u64());
        let clear_after = regions.get(at).is_none_or(|r| region.end() <= r.guest.as_u64());
        if !clear_before || !clear_after {
            return Err(AxError::AlreadyMapped);
        }
        self.splice(at, at, [Some(region), None, None])
    }

    /// Removes a range, all of which is mapped, cutting the regions at its ends.
    ///
    /// # Errors
    /// - [`AxError::InvalidInput`]: as for [`insert`](Self::insert).
    /// - [`AxError::NotMapped`]: part of it is not mapped.
    /// - [`AxError::LimitReached`]: a region would have to be split and no slot is left.
    pub fn remove(&mut self, guest: GuestPhysAddr, size: u64) -> AxResult {
        let (first, past) = self.covering(guest, size)?;
        let (head, tail) = self.rests(first, past, guest, size);
        self.splice(first, past, [head, None, tail])
    }

    /// Gives a range, all of which is mapped, new flags, cutting the regions at its ends.
    ///
    /// # Errors
    /// As [`remove`](Self::remove).
    pub fn protect(&mut self, guest: GuestPhysAddr, size: u64, flags: u32) -> AxResult {
        let (first, past) = self.covering(guest, size)?;
        // The ends are cut off first, so that in between whole regions can simply be changed.
        let end = guest.as_u64().wrapping_add(size);
        let (head, tail) = self.rests(first, past, guest, size);
        let splits = usize::from(head.is_some()).saturating_add(usize::from(tail.is_some()));
        if self.slots.len().saturating_sub(self.len) < splits {
            return Err(AxError::LimitReached);
        }
        if past == first.saturating_add(1) {
            let Some(middle) = self.as_slice().get(first).and_then(|r| r.cut(guest.as_u64(), end)) else {
                return Err(AxError::NotMapped);
            };
            return self.splice(first, past, [head, Some(Region { flags, ..middle }), tail]);
        }
        let mut first = first;
        let mut past = past;
        if let (Some(head), Some(region)) = (head, self.as_slice().get(first).copied()) {
            self.splice(first, first.saturating_add(1), [Some(head), region.cut(guest.as_u64(), end), None])?;
            first = first.saturating_add(1);
            past = past.saturating_add(1);
        }
        if let (Some(tail), Some(region)) = (tail, self.as_slice().get(past.saturating_sub(1)).copied()) {
            self.splice(past.saturating_sub(1), past, [region.cut(guest.as_u64(), end), Some(tail), None])?;
        }
        for region in self.slots.get_mut(first..past).unwrap_or(&mut []) {
            region.flags = flags;
        }
        Ok(())
    }

    /// Indices `first..past` of the regions that together cover the range.
    fn covering(&self, guest: GuestPhysAddr, size: u64) -> AxResult<(usize, usize)> {
        check_range(guest, size)?;
        let regions = self.as_slice();
        let end = guest.as_u64().wrapping_add(size);
        let first = regions.partition_point(|r| r.end() <= guest.as_u64());
        let mut reached = guest.as_u64();
        let mut past = first;
        while reached < end {
            match regions.get(past) {
                Some(r) if r.guest.as_u64() <= reached => reached = r.end(),
                _ => return Err(AxError::NotMapped),
            }
            past = past.saturating_add(1);
        }
        Ok((first, past))
    }

    /// What the regions `first..past` have before and behind the range.
    fn rests(&self, first: usize, past: usize, guest: GuestPhysAddr, size: u64) -> (Option<Region>, Option<Region>) {
        let regions = self.as_slice();
        let head = regions.get(first).and_then(|r| r.cut(0, guest.as_u64()));
        let end = guest.as_u64().wrapping_add(size);
        let tail = past.checked_sub(1).and_then(|i| regions.get(i)).and_then(|r| r.cut(end, u64::MAX));
        (head, tail)
    }

    /// Replaces the regions `first..past` by those given.
    fn splice(&mut self, first: usize, past: usize, new: [Option<Region>; 3]) -> AxResult {
        let count = new.iter().flatten().count();
        let removed = past.saturating_sub(first);
        let len = self.len.saturating_sub(removed).saturating_add(count);
        if len > self.slots.len() {
            return Err(AxError::LimitReached);
        }
        let old_len = self.len;
        let target = first.saturating_add(count);
        if count <= removed {
            if past <= old_len && target <= past {
                self.slots.copy_within(past..old_len, target);
            }
        } else if past <= old_len {
            self.slots.copy_within(past..old_len, target);
        }
        for (slot, region) in self.slots.iter_mut().skip(first).zip(new.into_iter().flatten()) {
            *slot = region;
        }
        self.len = len;
        Ok(())
    }
}

/// A range of whole pages that does not wrap and is not empty.
fn check_range(start: GuestPhysAddr, size: u64) -> AxResult {
    if size == 0 || size & (PAGE - 1) != 0 || !start.is_aligned(PAGE) || start.checked_add(size).is_none() {
        return Err(AxError::InvalidInput);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;
    use std::vec;
    use std::vec::Vec;

    fn map(slots: usize) -> RegionMap<Vec<Region>> {
        RegionMap::new(vec![Region::default(); slots])
    }

    fn region(page: u64, pages: u64) -> Region {
        Region { guest: GuestPhysAddr::new(page * PAGE), size: pages * PAGE, host: (page + 1000) * PAGE, flags: 3 }
    }

    #[test]
    fn bad_ranges_and_overlaps_are_refused() {
        let mut m = map(4);
        assert_eq!(m.insert(region(0, 0)), Err(AxError::InvalidInput));
        assert_eq!(m.insert(Region { size: 100, ..region(0, 1) }), Err(AxError::InvalidInput));
        assert_eq!(m.insert(Region { host: 5, ..region(0, 1) }), Err(AxError::InvalidInput));
        assert_eq!(
            m.insert(Region { guest: GuestPhysAddr::new(0u64.wrapping_sub(PAGE)), ..region(0, 2) }),
            Err(AxError::InvalidInput)
        );
        m.insert(region(10, 10)).unwrap();
        for (page, pages) in [(10, 10), (9, 2), (19, 1), (12, 2), (0, 100)] {
            assert_eq!(m.insert(region(page, pages)), Err(AxError::AlreadyMapped));
        }
        m.insert(region(9, 1)).unwrap();
        m.insert(region(20, 1)).unwrap();
        assert_eq!(m.as_slice().len(), 3);
        assert_eq!(m.remove(GuestPhysAddr::new(8 * PAGE), PAGE * 2), Err(AxError::NotMapped));
    }

    #[test]
    fn a_full_map_refuses_to_split_and_stays_as_it_was() {
        let mut m = map(1);
        m.insert(region(0, 10)).unwrap();
        assert_eq!(m.remove(GuestPhysAddr::new(PAGE), PAGE), Err(AxError::LimitReached));
        assert_eq!(m.protect(GuestPhysAddr::new(PAGE), PAGE, 1), Err(AxError::LimitReached));
        assert_eq!(m.as_slice(), &[region(0, 10)]);
        m.remove(GuestPhysAddr::new(0), 4 * PAGE).unwrap();
        assert_eq!(m.as_slice(), &[region(4, 6)]);
    }

    #[test]
    fn host_ranges_translate_back() {
        let r = region(10, 4);
        assert_eq!(r.guest_range_of(0, 5), None);
        assert_eq!(r.guest_range_of(1011 * PAGE, 1012 * PAGE), Some((GuestPhysAddr::new(11 * PAGE), PAGE)));
        assert_eq!(r.guest_range_of(0, u64::MAX), Some((GuestPhysAddr::new(10 * PAGE), 4 * PAGE)));
        assert_eq!(r.guest_range_of(1014 * PAGE, u64::MAX), None);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 4 } else { 256 }))]
        /// Against a map from page to (host page, flags).
        #[test]
        fn behaves_like_a_map_of_pages(ops in prop::collection::vec((0u8..3, 0u64..32, 1u64..12, 0u32..4), 1..60)) {
            let mut m = map(12);
            let mut model: BTreeMap<u64, (u64, u32)> = BTreeMap::new();
            for (op, page, pages, flags) in ops {
                let range = page..page + pages;
                let before = m.as_slice().to_vec();
                let guest = GuestPhysAddr::new(page * PAGE);
                let all = range.clone().all(|p| model.contains_key(&p));
                let any = range.clone().any(|p| model.contains_key(&p));
                let result = match op {
                    0 => m.insert(Region { flags, ..region(page, pages) }),
                    1 => m.remove(guest, pages * PAGE),
                    _ => m.protect(guest, pages * PAGE, flags),
                };
                match result {
                    Ok(()) => for p in range {
                        match op {
                            0 => prop_assert!(model.insert(p, (p + 1000, flags)).is_none()),
                            1 => prop_assert!(model.remove(&p).is_some()),
                            _ => model.get_mut(&p).unwrap().1 = flags,
                        }
                    },
                    Err(AxError::AlreadyMapped) => prop_assert!(op == 0 && any),
                    Err(AxError::NotMapped) => prop_assert!(op != 0 && !all),
                    Err(AxError::LimitReached) => prop_assert!(before.len() >= 11),
                    Err(error) => prop_assert!(false, "{error:?}"),
                }
                if result.is_err() {
                    prop_assert_eq!(m.as_slice(), &before[..]);
                }
                let mut pages_now = BTreeMap::new();
                for r in m.as_slice() {
                    for i in 0..r.size / PAGE {
                        prop_assert!(pages_now.insert(r.guest.as_u64() / PAGE + i, (r.host / PAGE + i, r.flags)).is_none());
                    }
                }
                prop_assert_eq!(&pages_now, &model);
                prop_assert!(m.as_slice().windows(2).all(|w| w[0].guest < w[1].guest));
                for p in 0..45 {
                    prop_assert_eq!(m.find(GuestPhysAddr::new(p * PAGE + 5)).is_some(), model.contains_key(&p));
                }
            }
        }
    }
}
