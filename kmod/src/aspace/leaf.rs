// SPDX-License-Identifier: GPL-2.0-only
//! How large the leaf is that answers a fault, and how it gets into the table.
//!
//! A leaf is as large as the host's own mapping, the region, the alignment and the dirty log allow. Some CPUs must not fetch
//! instructions through a large one (iTLB multihit, CVE-2018-12207: when the size of a page in use changes, the entries of both
//! sizes in the TLB for instructions can stop the whole machine with a machine check, and a guest can change the size at
//! will in its own page tables). The table of such a host withholds execution from large leaves. What is only read and
//! written there stays large; at the first fetch the leaf is split, all of it, as the guest will want its neighbours too.
//!
//! Locks: the address space's, which is held.

use vcpu_core::{
    npt::{Flush, MemoryType, PageSize, Permissions},
    regions::Region,
    AccessFlags, AxResult, GuestPhysAddr, HostPhysAddr,
};

use super::{NestedTable, State};
use crate::tables::Memory;

/// A leaf that answers a fault.
#[derive(Clone, Copy)]
pub(super) struct Leaf {
    /// Where the guest has it.
    pub(super) guest: GuestPhysAddr,
    /// Where it is.
    pub(super) phys: HostPhysAddr,
    pub(super) size: PageSize,
}

/// The largest leaf that may be mapped around `addr`, whose host page is at `phys` in a mapping of the host's whose size is
/// `shift` as log2 of bytes. The answer holds if nothing is changing there.
#[inline]
pub(super) fn leaf_for(
    state: &State,
    region: &Region,
    addr: GuestPhysAddr,
    phys: HostPhysAddr,
    shift: impl FnOnce() -> u32,
) -> Leaf {
    let small = Leaf { guest: addr, phys, size: PageSize::Size4K };
    let large = PageSize::Size2M.bytes();
    let guest = addr.align_down(large);
    let host = region.host_of(addr);
    let inside = region.contains(guest)
        && guest.checked_add(large - 1).is_some_and(|last| region.contains(last))
        && (host ^ addr.as_u64()) & (large - 1) == 0
        && (phys.as_u64() ^ addr.as_u64()) & (large - 1) == 0
        && !state.log.as_ref().is_some_and(|log| log.touches(guest, PageSize::Size2M));
    if !inside || shift() < large.trailing_zeros() {
        return small;
    }
    Leaf { guest, phys: phys.align_down(large), size: PageSize::Size2M }
}

impl Leaf {
    /// Whether `access` is possible through smaller leaves only.
    #[inline]
    pub(super) fn must_be_split(&self, table: &NestedTable, access: AccessFlags) -> bool {
        self.size > PageSize::Size4K && access.contains(AccessFlags::EXECUTE) && table.has_small_code()
    }

    /// Maps it into `table`, so that `access`, which `perms` allow, is possible then. `memory` has the frames for one fault.
    ///
    /// # Errors
    /// As [`map`](vcpu_core::npt::NestedPageTable::map).
    pub(super) fn install(
        self,
        table: &mut NestedTable,
        perms: Permissions,
        access: AccessFlags,
        memory: &mut Memory<'_>,
    ) -> AxResult<Flush> {
        let mapped = table.map(self.guest, self.phys, self.size, perms, MemoryType::WriteBack, memory)?;
        if !self.must_be_split(table, access) {
            return Ok(mapped);
        }
        // A CPU may have seen the large leaf in between, so the flush that this asks for is due: whether an entry maps a page
        // is not to be changed without (SDM volume 3C, "Guidelines for Use of the INVEPT Instruction"). There are frames for
        // both steps; if there were not, the guest would fault once more.
        Ok(table.split(self.guest, PageSize::Size4K, memory).map_or(Flush::Needed, |split| mapped.or(split)))
    }
}
