// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! A nested page table in the format that the backend's hardware walks.

use vcpu_core::npt::{EitherTable, Ept, Levels, Npt, TableMemory};
use vcpu_core::AxResult;

use crate::caps::Backend;

/// A nested page table: [`Npt`] for SVM, [`Ept`] for VMX.
pub type NestedTable = EitherTable<Npt, Ept>;

/// An empty table for `backend`; with `small_code` it has code in leaves of 4 KiB only (see
/// [`Mitigations::small_code`](crate::Mitigations::small_code)).
///
/// # Errors
/// As [`NestedPageTable::new`](vcpu_core::npt::NestedPageTable::new).
pub fn new_table(
    backend: Backend,
    levels: Levels,
    small_code: bool,
    memory: &mut impl TableMemory,
) -> AxResult<NestedTable> {
    let table = match backend {
        Backend::Svm => EitherTable::new_a(levels, memory)?,
        Backend::Vmx => EitherTable::new_b(levels, memory)?,
    };
    Ok(if small_code { table.with_small_code() } else { table })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use vcpu_core::npt::{MemoryType, PageSize, Permissions};
    use vcpu_core::{GuestPhysAddr, HostPhysAddr};

    /// Frames by number, with their entries.
    #[derive(Default)]
    struct Frames(BTreeMap<u64, [u64; 512]>, u64);

    impl TableMemory for Frames {
        fn alloc(&mut self) -> Option<HostPhysAddr> {
            self.1 += 4096;
            self.0.insert(self.1, [0; 512]);
            Some(HostPhysAddr::new(self.1))
        }

        fn free(&mut self, table: HostPhysAddr) {
            self.0.remove(&table.as_u64()).unwrap();
        }

        fn give_back(&mut self, frame: HostPhysAddr) {
            self.free(frame);
        }

        fn read(&self, table: HostPhysAddr, index: usize) -> u64 {
            self.0[&table.as_u64()][index]
        }

        fn write(&mut self, table: HostPhysAddr, index: usize, entry: u64) {
            self.0.get_mut(&table.as_u64()).unwrap()[index] = entry;
        }
    }

    #[test]
    fn the_backend_decides_the_format() {
        // Present, writable, user for SVM; read, write, execute, and the type write-back, for VMX.
        for (backend, leaf) in [(Backend::Svm, 0x1000 | 7), (Backend::Vmx, 0x1000 | 7 | 6 << 3 | 1 << 6)] {
            let mut frames = Frames::default();
            let mut table = new_table(backend, Levels::Four, false, &mut frames).unwrap();
            let page = HostPhysAddr::new(0x1000);
            let write_back = MemoryType::WriteBack;
            let at = GuestPhysAddr::new(0);
            let flush = table.map(at, page, PageSize::Size4K, Permissions::ALL, write_back, &mut frames).unwrap();
            assert!(!flush.is_needed());
            // No table points to the root, whose number the page shares.
            let entry = frames.0.values().map(|entries| entries[0]).find(|entry| entry & !0xfff == 0x1000);
            assert_eq!(entry, Some(leaf));
            assert_eq!((table.leaf_count().size_4k, table.table_count()), (1, 4));
            assert_eq!(table.query(at, &frames).map(|mapping| mapping.hpa), Some(page));
            assert_eq!(table.zap(at, 4096, &mut frames).size_4k, 1);
            table.free_all(&mut frames);
            assert!(frames.0.is_empty());
        }
    }

    #[test]
    fn large_leaves_have_code_unless_that_is_ruled_out() {
        for backend in [Backend::Svm, Backend::Vmx] {
            for small_code in [false, true] {
                let mut frames = Frames::default();
                let mut table = new_table(backend, Levels::Four, small_code, &mut frames).unwrap();
                let (at, page) = (GuestPhysAddr::new(0), HostPhysAddr::new(0x20_0000));
                let write_back = MemoryType::WriteBack;
                let flush = table.map(at, page, PageSize::Size2M, Permissions::ALL, write_back, &mut frames).unwrap();
                assert!(!flush.is_needed());
                let perms = table.query(at, &frames).unwrap().perms;
                assert_eq!(perms.contains(Permissions::EXECUTE), !small_code);
                assert_eq!(table.has_small_code(), small_code);
                assert!(table.split(at, PageSize::Size4K, &mut frames).unwrap().is_needed());
                assert_eq!(table.query(at, &frames).unwrap().perms, Permissions::ALL);
            }
        }
    }
}
