// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! A nested page table in the format that the backend's hardware walks.

use vcpu_core::npt::{
    Ept, Flush, LeafCount, Levels, Mapping, MemoryType, NestedPageTable, Npt, PageSize, Permissions, TableMemory,
};
use vcpu_core::{AxResult, GuestPhysAddr, HostPhysAddr};

use crate::caps::Backend;

/// A nested page table. Its methods are those of [`NestedPageTable`].
pub enum NestedTable {
    /// For SVM.
    Npt(NestedPageTable<Npt>),
    /// For VMX.
    Ept(NestedPageTable<Ept>),
}

macro_rules! on {
    ($self:ident, $table:ident => $body:expr) => {
        match $self {
            NestedTable::Npt($table) => $body,
            NestedTable::Ept($table) => $body,
        }
    };
}

impl NestedTable {
    /// An empty table for `backend`.
    ///
    /// # Errors
    /// As [`NestedPageTable::new`].
    pub fn new(backend: Backend, levels: Levels, memory: &mut impl TableMemory) -> AxResult<Self> {
        match backend {
            Backend::Svm => NestedPageTable::new(levels, memory).map(Self::Npt),
            Backend::Vmx => NestedPageTable::new(levels, memory).map(Self::Ept),
        }
    }

    /// Address of the root table.
    pub fn root(&self) -> HostPhysAddr {
        on!(self, table => table.root())
    }

    /// How many leaves there are.
    pub fn leaf_count(&self) -> LeafCount {
        on!(self, table => table.leaf_count())
    }

    /// How many frames are in use, the root included.
    pub fn table_count(&self) -> u64 {
        on!(self, table => table.table_count())
    }

    /// Maps a page.
    ///
    /// # Errors
    /// As [`NestedPageTable::map`].
    pub fn map(
        &mut self,
        gpa: GuestPhysAddr,
        hpa: HostPhysAddr,
        size: PageSize,
        perms: Permissions,
        memory_type: MemoryType,
        memory: &mut impl TableMemory,
    ) -> AxResult<Flush> {
        on!(self, table => table.map(gpa, hpa, size, perms, memory_type, memory))
    }

    /// Drops every leaf that has a byte in the range. The TLBs must be flushed if there were any.
    #[must_use = "the TLBs must be flushed if anything was dropped"]
    pub fn zap(&mut self, gpa: GuestPhysAddr, size: u64, memory: &mut impl TableMemory) -> LeafCount {
        on!(self, table => table.zap(gpa, size, memory))
    }

    /// Takes all permissions but `perms` away from what is mapped in the range.
    ///
    /// # Errors
    /// See [`NestedPageTable::restrict`].
    pub fn restrict(
        &mut self,
        gpa: GuestPhysAddr,
        size: u64,
        perms: Permissions,
        memory: &mut impl TableMemory,
    ) -> AxResult<Flush> {
        on!(self, table => table.restrict(gpa, size, perms, memory))
    }

    /// What is mapped at `gpa`.
    pub fn query(&self, gpa: GuestPhysAddr, memory: &impl TableMemory) -> Option<Mapping> {
        on!(self, table => table.query(gpa, memory))
    }

    /// Frees all frames.
    pub fn free_all(self, memory: &mut impl TableMemory) {
        on!(self, table => table.free_all(memory));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

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
            let mut table = NestedTable::new(backend, Levels::Four, &mut frames).unwrap();
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
}
