// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which guest memory is taken, by what: nothing that is loaded may overlap anything else.

use std::ops::Range;

use super::ImageError;
use crate::memory::Ram;

/// Guest memory in use, and the RAM that files can go to.
pub(crate) struct Placement {
    used: Vec<(String, Range<u64>)>,
    /// The first region of RAM, where everything goes.
    first: Range<u64>,
}

impl Placement {
    /// With nothing in use yet.
    pub(crate) fn new(ram: &Ram) -> Self {
        Self { used: Vec::new(), first: ram.first() }
    }

    /// Takes `range` for `what`.
    ///
    /// # Errors
    /// [`ImageError::Overlap`].
    pub(crate) fn claim(&mut self, what: &str, range: Range<u64>) -> Result<(), ImageError> {
        if let Some((other, _)) = self.used.iter().find(|(_, used)| range.start < used.end && used.start < range.end) {
            return Err(ImageError::Overlap {
                what: what.into(),
                start: range.start,
                end: range.end,
                other: other.clone(),
            });
        }
        self.used.push((what.into(), range));
        Ok(())
    }

    /// A page-aligned place of `size` bytes within `limits` and the first region of RAM, the highest or the lowest.
    ///
    /// # Errors
    /// The size of the largest free place.
    pub(crate) fn find(&self, size: u64, limits: Range<u64>, high: bool) -> Result<u64, u64> {
        let mut used: Vec<&Range<u64>> = self.used.iter().map(|(_, range)| range).collect();
        used.sort_by_key(|range| range.start);
        let end = limits.end.min(self.first.end);
        let mut gaps = Vec::new();
        let mut start = limits.start.max(self.first.start);
        for range in used {
            gaps.push(start..range.start.min(end));
            start = start.max(range.end);
        }
        gaps.push(start..end);
        let place = |gap: &Range<u64>| {
            let low = gap.start.checked_next_multiple_of(4096)?;
            let highest = gap.end.checked_sub(size)? & !4095;
            (low <= highest).then_some(if high { highest } else { low })
        };
        let found = if high { gaps.iter().rev().find_map(place) } else { gaps.iter().find_map(place) };
        found.ok_or_else(|| {
            let sizes = gaps.iter().map(|gap| gap.end.saturating_sub(gap.start.next_multiple_of(4096)));
            sizes.max().unwrap_or(0)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::MemoryRegion;

    fn placement() -> Placement {
        let mut placement = Placement::new(&Ram::new(&[MemoryRegion { base: 0, size: 16 << 20 }]).unwrap());
        placement.claim("tables", 0xe_0000..0x10_0000).unwrap();
        placement
    }

    #[test]
    fn overlaps_are_refused_and_named() {
        let mut placement = placement();
        placement.claim("a", 0x10_0000..0x20_0000).unwrap();
        placement.claim("b", 0x20_0000..0x20_0001).unwrap();
        let error = placement.claim("c", 0x1f_ffff..0x20_0000).unwrap_err();
        assert_eq!(error.to_string(), "c at 0x1fffff to 0x200000 overlaps a");
        let error = placement.claim("c", 0xd_0000..0xf_0000).unwrap_err();
        assert!(error.to_string().ends_with("overlaps tables"));
    }

    #[test]
    fn files_go_to_the_ends_of_the_gaps() {
        let mut placement = placement();
        placement.claim("kernel", 0x10_0000..0x80_0001).unwrap();
        let limits = 0x10_0000..u64::MAX;
        assert_eq!(placement.find(0x1800, limits.clone(), true), Ok((16 << 20) - 0x2000));
        assert_eq!(placement.find(0x1800, limits.clone(), false), Ok(0x80_1000));
        assert_eq!(placement.find(8 << 20, limits.clone(), true), Err((8 << 20) - 0x1000));
        assert_eq!(placement.find((8 << 20) - 0x1000, limits, true), Ok(0x80_1000));
        assert_eq!(placement.find(0x1000, 0..0x10_0000, false), Ok(0));
        assert_eq!(placement.find(0x1000, 0x10_0000..0x20_0000, false), Err(0), "all of it is used");
    }

    #[test]
    fn files_stay_in_the_first_region() {
        let regions = [MemoryRegion { base: 1 << 30, size: 1 << 20 }, MemoryRegion { base: 2 << 30, size: 1 << 20 }];
        let placement = Placement::new(&Ram::new(&regions).unwrap());
        assert_eq!(placement.find(0x1000, 0..u64::MAX, false), Ok(1 << 30));
        assert_eq!(placement.find(0x1000, 0..u64::MAX, true), Ok((1 << 30) + (1 << 20) - 0x1000));
    }
}
