// SPDX-License-Identifier: MIT OR Apache-2.0
//! Guest RAM: allocated here, written by the loaders, mapped into the guest's address space.

use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use axvcpu_uapi::addr::GuestPhysAddr;
use axvcpu_uapi::client::{self, AddressSpace, Backing, Permissions, Slot};
use vm_memory::{
    Bytes as _, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, MmapRegion,
    VolatileMemory,
};

use crate::config::{Bytes, MemoryRegion};
use crate::error::Error;

/// Guest RAM.
#[derive(Clone, Debug)]
pub struct Ram {
    memory: GuestMemoryMmap,
    /// The same regions, for mapping them.
    regions: Vec<Arc<GuestRegionMmap>>,
}

/// A range of guest physical addresses that is not RAM from end to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("guest memory has no {size} bytes at {at}")]
pub struct OutOfRam {
    /// First address.
    pub at: GuestPhysAddr,
    /// Length in bytes.
    pub size: u64,
}

impl Ram {
    /// Allocates `regions`, all zero. Pages are taken from the host when they are first used.
    ///
    /// # Errors
    /// [`Error::Memory`].
    pub fn new(regions: &[MemoryRegion]) -> Result<Self, Error> {
        let size = Bytes(regions.iter().map(|region| region.size).sum());
        let fail = |reason: String| Error::Memory { size, reason };
        let regions: Vec<Arc<GuestRegionMmap>> = regions
            .iter()
            .map(|region| {
                let size = usize::try_from(region.size).map_err(|error| fail(error.to_string()))?;
                let mapping = MmapRegion::new(size).map_err(|error| fail(error.to_string()))?;
                let region = GuestRegionMmap::new(mapping, GuestAddress(region.base));
                region.map(Arc::new).ok_or_else(|| fail("it reaches beyond the last address".into()))
            })
            .collect::<Result<_, Error>>()?;
        let memory = GuestMemoryMmap::from_arc_regions(regions.clone()).map_err(|error| fail(error.to_string()))?;
        Ok(Self { memory, regions })
    }

    /// The regions for code that speaks vm-memory.
    #[must_use]
    pub fn as_vm_memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// Whether all of `range` is RAM.
    #[must_use]
    pub fn contains(&self, range: &Range<u64>) -> bool {
        let Some(size) = range.end.checked_sub(range.start) else { return false };
        usize::try_from(size).is_ok_and(|size| size == 0 || self.memory.check_range(GuestAddress(range.start), size))
    }

    /// The first region: where kernels and what they are given go.
    #[must_use]
    pub fn first(&self) -> Range<u64> {
        self.memory.iter().next().map_or(0..0, |region| region.start_addr().0..region.start_addr().0 + region.len())
    }

    /// Copies `data` to `at`.
    ///
    /// # Errors
    /// [`OutOfRam`]; some of it may have been copied.
    pub fn write(&self, at: GuestPhysAddr, data: &[u8]) -> Result<(), OutOfRam> {
        self.memory.write_slice(data, GuestAddress(at.as_u64())).map_err(|_| OutOfRam { at, size: data.len() as u64 })
    }

    /// Copies from `at` into `data`. A naturally aligned access of 2, 4 or 8 bytes is a single one.
    ///
    /// # Errors
    /// [`OutOfRam`].
    pub fn read(&self, at: GuestPhysAddr, data: &mut [u8]) -> Result<(), OutOfRam> {
        use std::sync::atomic::Ordering::Relaxed;
        let address = GuestAddress(at.as_u64());
        let aligned = at.is_aligned((data.len() as u64).max(1).next_power_of_two());
        let done = match data.len() {
            2 if aligned => self.memory.load::<u16>(address, Relaxed).map(|v| data.copy_from_slice(&v.to_ne_bytes())),
            4 if aligned => self.memory.load::<u32>(address, Relaxed).map(|v| data.copy_from_slice(&v.to_ne_bytes())),
            8 if aligned => self.memory.load::<u64>(address, Relaxed).map(|v| data.copy_from_slice(&v.to_ne_bytes())),
            _ => self.memory.read_slice(data, address),
        };
        done.map_err(|_| OutOfRam { at, size: data.len() as u64 })
    }

    /// Like [`write`](Self::write), but a naturally aligned access of 2, 4 or 8 bytes is a single one, as other vCPUs
    /// expect it.
    ///
    /// # Errors
    /// [`OutOfRam`].
    pub fn write_atomically(&self, at: GuestPhysAddr, data: &[u8]) -> Result<(), OutOfRam> {
        use std::sync::atomic::Ordering::Release;
        let address = GuestAddress(at.as_u64());
        let aligned = at.is_aligned((data.len() as u64).max(1).next_power_of_two());
        let done = match *data {
            [a, b] if aligned => self.memory.store(u16::from_ne_bytes([a, b]), address, Release),
            [a, b, c, d] if aligned => self.memory.store(u32::from_ne_bytes([a, b, c, d]), address, Release),
            [a, b, c, d, e, f, g, h] if aligned => {
                self.memory.store(u64::from_ne_bytes([a, b, c, d, e, f, g, h]), address, Release)
            }
            _ => self.memory.write_slice(data, address),
        };
        done.map_err(|_| OutOfRam { at, size: data.len() as u64 })
    }

    /// Replaces the naturally aligned word of `width` bytes (1, 2, 4 or 8) at `at` by `new` if it is `old`, atomically,
    /// and says whether it did.
    ///
    /// # Errors
    /// [`OutOfRam`], also for a width or an address that is not allowed.
    pub fn compare_exchange(&self, at: GuestPhysAddr, width: usize, old: u64, new: u64) -> Result<bool, OutOfRam> {
        use std::sync::atomic::Ordering::{AcqRel, Acquire};
        use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, AtomicU8};
        let fail = OutOfRam { at, size: width as u64 };
        let slice = self.memory.get_slice(GuestAddress(at.as_u64()), width).map_err(|_| fail)?;
        // The values are `width` bytes wide, so the casts keep all of them.
        macro_rules! exchange {
            ($atomic:ty, $int:ty) => {
                slice
                    .get_atomic_ref::<$atomic>(0)
                    .map_err(|_| fail)?
                    .compare_exchange(old as $int, new as $int, AcqRel, Acquire)
                    .is_ok()
            };
        }
        Ok(match width {
            1 => exchange!(AtomicU8, u8),
            2 => exchange!(AtomicU16, u16),
            4 => exchange!(AtomicU32, u32),
            8 => exchange!(AtomicU64, u64),
            _ => return Err(fail),
        })
    }

    /// Maps all of it into `space`. The slots unmap it when they are dropped.
    ///
    /// # Errors
    /// [`client::Error::Map`].
    pub fn map(&self, space: &AddressSpace) -> client::Result<Vec<Slot<RamRegion>>> {
        self.backings().map(|(at, region)| space.map_all(at, Arc::new(region), Permissions::RWX)).collect()
    }

    /// The regions for mapping them, with the address of each.
    pub fn backings(&self) -> impl Iterator<Item = (GuestPhysAddr, RamRegion)> + '_ {
        let at = |region: &GuestRegionMmap| GuestPhysAddr::new(region.start_addr().0);
        self.regions.iter().map(move |region| (at(region), RamRegion(Arc::clone(region))))
    }
}

/// One region of RAM as the axvcpu handles want it.
#[derive(Debug)]
pub struct RamRegion(Arc<GuestRegionMmap>);

// SAFETY: a `GuestRegionMmap` is a mapping of its own, readable and writable, that stays where it is until the last `Arc` is
// gone, and this value holds one. vm-memory accesses it through volatile slices and atomics only and forms no references
// to its bytes other than to atomics; it holds guest memory and nothing else.
unsafe impl Backing for RamRegion {
    fn start(&self) -> NonNull<u8> {
        NonNull::new(self.0.as_ptr()).unwrap_or(NonNull::dangling())
    }
    fn size(&self) -> usize {
        self.0.size()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ram() -> Ram {
        Ram::new(&[MemoryRegion { base: 0, size: 2 << 20 }, MemoryRegion { base: 1 << 32, size: 1 << 20 }]).unwrap()
    }

    #[test]
    fn holes_are_not_ram() {
        let ram = ram();
        assert!(ram.contains(&(0..2 << 20)) && ram.contains(&((1 << 32)..(1 << 32) + 5)));
        assert!(!ram.contains(&(0..(2 << 20) + 1)) && !ram.contains(&(3 << 20..(3 << 20) + 1)));
        assert_eq!(ram.first(), 0..2 << 20);
        let at = GuestPhysAddr::new((2 << 20) - 2);
        assert_eq!(ram.write(at, &[0; 4]), Err(OutOfRam { at, size: 4 }));
        assert_eq!(ram.read(at, &mut [0; 4]), Err(OutOfRam { at, size: 4 }));
    }

    #[test]
    fn accesses_of_every_width_agree() {
        let ram = ram();
        for (at, len) in [(0x1000, 8), (0x1001, 8), (0x1004, 4), (0x1002, 2), (0x1003, 2), (0x1fff, 1), (0x1000, 5)] {
            let data: Vec<u8> = (1..=len).collect();
            let mut back = vec![0; data.len()];
            ram.write_atomically(GuestPhysAddr::new(at), &data).unwrap();
            ram.read(GuestPhysAddr::new(at), &mut back).unwrap();
            assert_eq!(back, data);
        }
    }

    #[test]
    fn compare_exchange_compares() {
        let ram = ram();
        let at = GuestPhysAddr::new(0x2000);
        ram.write(at, &0x1122_3344_5566_7788u64.to_le_bytes()).unwrap();
        assert_eq!(ram.compare_exchange(at, 8, 1, 2), Ok(false));
        assert_eq!(ram.compare_exchange(at, 4, 0x5566_7788, 0xaabb_ccdd), Ok(true));
        assert_eq!(ram.compare_exchange(at, 1, 0xdd, 0xee), Ok(true));
        let mut back = [0; 8];
        ram.read(at, &mut back).unwrap();
        assert_eq!(u64::from_le_bytes(back), 0x1122_3344_aabb_ccee);
        assert!(ram.compare_exchange(GuestPhysAddr::new(0x2001), 8, 0, 0).is_err(), "not aligned");
        assert!(ram.compare_exchange(GuestPhysAddr::new(3 << 20), 8, 0, 0).is_err(), "no memory");
    }
}
