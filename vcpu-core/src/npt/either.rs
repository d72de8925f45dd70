// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! A table in one of two formats, for an architecture whose CPUs differ in the one that they walk.

use super::{
    Flush, Format, LeafCount, Levels, Mapping, MemoryType, NestedPageTable, PageSize, Permissions, TableMemory,
};
use crate::{AxResult, GuestPhysAddr, HostPhysAddr};

/// A nested page table of format `A` or `B`. Its methods are those of [`NestedPageTable`].
#[derive(Debug)]
pub enum EitherTable<A, B> {
    /// Of format `A`.
    A(NestedPageTable<A>),
    /// Of format `B`.
    B(NestedPageTable<B>),
}

macro_rules! on {
    ($self:ident, $table:ident => $body:expr) => {
        match $self {
            EitherTable::A($table) => $body,
            EitherTable::B($table) => $body,
        }
    };
}

impl<A: Format, B: Format> EitherTable<A, B> {
    /// An empty table of format `A`.
    ///
    /// # Errors
    /// As [`NestedPageTable::new`].
    pub fn new_a(levels: Levels, memory: &mut impl TableMemory) -> AxResult<Self> {
        NestedPageTable::new(levels, memory).map(Self::A)
    }

    /// An empty table of format `B`.
    ///
    /// # Errors
    /// As [`NestedPageTable::new`].
    pub fn new_b(levels: Levels, memory: &mut impl TableMemory) -> AxResult<Self> {
        NestedPageTable::new(levels, memory).map(Self::B)
    }

    /// See [`NestedPageTable::with_small_code`].
    #[must_use]
    pub fn with_small_code(self) -> Self {
        match self {
            Self::A(table) => Self::A(table.with_small_code()),
            Self::B(table) => Self::B(table.with_small_code()),
        }
    }

    /// See [`NestedPageTable::has_small_code`].
    pub fn has_small_code(&self) -> bool {
        on!(self, table => table.has_small_code())
    }

    /// Address of the root.
    pub fn root(&self) -> HostPhysAddr {
        on!(self, table => table.root())
    }

    /// How many leaves there are.
    pub fn leaf_count(&self) -> LeafCount {
        on!(self, table => table.leaf_count())
    }

    /// How many frames are in use, those of the root included.
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

    /// Maps a page where nothing is mapped.
    ///
    /// # Errors
    /// As [`NestedPageTable::map_empty`].
    pub fn map_empty(
        &mut self,
        gpa: GuestPhysAddr,
        hpa: HostPhysAddr,
        size: PageSize,
        perms: Permissions,
        memory_type: MemoryType,
        memory: &mut impl TableMemory,
    ) -> AxResult<bool> {
        on!(self, table => table.map_empty(gpa, hpa, size, perms, memory_type, memory))
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

    /// Splits the leaf around `gpa` until the page around `gpa` has `size`.
    ///
    /// # Errors
    /// As [`NestedPageTable::split`].
    pub fn split(&mut self, gpa: GuestPhysAddr, size: PageSize, memory: &mut impl TableMemory) -> AxResult<Flush> {
        on!(self, table => table.split(gpa, size, memory))
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
