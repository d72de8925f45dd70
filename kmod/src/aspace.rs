// SPDX-License-Identifier: GPL-2.0-only
//! An address space: regions of the process's memory, and the nested page table that is filled from them on faults.
//!
//! Locks: `state`, a spin lock, is innermost and never taken in interrupts; shooting down is done under it, with
//! interrupts on. So nobody may wait for it with interrupts off: who holds it may wait for that very CPU. MMU notifier
//! callbacks take it, so nothing that allocates or faults is done under it.
//!
//! How a fault and an invalidation meet: the invalidation first says so in `changes`, then drops the mappings, then lets the
//! host do its change, and says that it is over. A fault looks the page up without the lock, and maps it only if
//! `changes` knows of no change there meanwhile. Most pages that a guest touches first are there and in use by the host, whose
//! own page table says so: these are mapped right where the fault came, under the lock from beginning to end.

use core::sync::atomic::{AtomicU64, Ordering};

use axvcpu_uapi::{
    aspace::{MapRegion, ProtectRange, Range, MEM_EXECUTE, MEM_READ, MEM_WRITE},
    ioctl,
};
use kernel::{
    alloc::KVVec,
    new_spinlock,
    prelude::*,
    seq_file::SeqFile,
    seq_print,
    sync::{Arc, ArcBorrow, SpinLock},
};
use vcpu_core::{
    changes::Changes,
    dirty::DirtyLog,
    npt::{LeafCount, MemoryType, PageSize, Permissions},
    regions::{Region, RegionMap},
    AccessFlags, AxError, GuestPhysAddr, HostPhysAddr,
};

use crate::{
    abi,
    arch::{self, NestedTable},
    fd::{FdObject, FileOperations},
    ffi::{self, GuestPage, HostLeaf, IrqOff},
    notifier::{Invalidate, Notifier},
    tables::{Memory, Retired, Spare},
    vm::{Member, Vm},
};

mod leaf;
mod log;

use leaf::leaf_for;

/// Regions per address space.
pub(crate) const MAX_REGIONS: usize = 512;

/// Guest bytes that are unmapped under one hold of the lock, so that others get a turn.
const CHUNK: u64 = 256 << 20;

/// An address space.
#[pin_data(PinnedDrop)]
pub(crate) struct AddressSpace {
    // First, so that no callback comes any more when the rest is dropped.
    #[pin]
    notifier: Notifier<Self>,
    #[pin]
    state: SpinLock<State>,
    /// Counts up whenever a translation went away; a vCPU that has seen another value flushes before it enters the guest.
    generation: AtomicU64,
    root: HostPhysAddr,
    /// First guest physical address that cannot be mapped.
    limit: u64,
    vm: Member,
}

struct State {
    regions: RegionMap<Slots>,
    /// Always there until `drop`.
    table: Option<NestedTable>,
    retired: Retired,
    /// Changes of the host's memory, and of regions.
    changes: Changes,
    log: Option<DirtyLog<log::Places>>,
}

/// Storage of the regions.
struct Slots(KVVec<Region>);

impl core::ops::Deref for Slots {
    type Target = [Region];
    fn deref(&self) -> &[Region] {
        &self.0
    }
}

impl core::ops::DerefMut for Slots {
    fn deref_mut(&mut self) -> &mut [Region] {
        &mut self.0
    }
}

/// How a nested page fault ended.
pub(crate) enum Fault {
    /// Run again: it is mapped now, or was being changed.
    Resolved,
    /// The address is no memory, or memory that does not allow the access.
    NotMemory,
}

static OPERATIONS: FileOperations<AddressSpace> = FileOperations::new();

impl AddressSpace {
    /// An empty address space of `vm`, for the current process.
    ///
    /// # Errors
    /// `ENOMEM`, `EINTR`; `ENODEV` and the like if the CPU has no backend.
    #[inline(never)] // A stack frame of its own, gone when the caller goes on.
    pub(crate) fn new(vm: Arc<Vm>) -> Result<Arc<Self>> {
        let mut spare = Spare::empty();
        spare.fill()?;
        let mut slots = KVVec::with_capacity(MAX_REGIONS, GFP_KERNEL_ACCOUNT)?;
        for _ in 0..MAX_REGIONS {
            slots.push(Region::default(), GFP_KERNEL_ACCOUNT)?;
        }
        let mut retired = Retired::default();
        let mut memory = Memory { spare: &mut spare, retired: &mut retired };
        let (table, limit) = arch::new_table(&mut memory).map_err(abi::errno)?;
        let root = table.root();
        let state = State {
            regions: RegionMap::new(Slots(slots)),
            table: Some(table),
            retired,
            changes: Changes::default(),
            log: None,
        };
        let mm = vm.mm().clone();
        let vm = Member::address_space(vm);
        let this = Arc::pin_init(
            try_pin_init!(&this in Self {
                generation: AtomicU64::new(1),
                root,
                limit,
                vm,
                state <- new_spinlock!(state),
                // SAFETY: The notifier is a field of the pinned object it points to, initialised last and dropped first.
                notifier <- unsafe { Notifier::new(mm, this.as_ptr()) },
            }),
            GFP_KERNEL_ACCOUNT,
        )?;
        this.vm.stats.table_pages.fetch_add(1, Ordering::Relaxed);
        Ok(this)
    }

    /// The root table, for the hardware.
    pub(crate) fn root(&self) -> HostPhysAddr {
        self.root
    }

    /// A number that no other address space has while this one exists.
    pub(crate) fn identity(&self) -> usize {
        core::ptr::from_ref(self) as usize
    }

    /// Whether it belongs to `vm`.
    pub(crate) fn is_of(&self, vm: &Arc<Vm>) -> bool {
        Arc::ptr_eq(self.vm.vm(), vm)
    }

    /// The present generation of translations. To be read after the vCPU has been marked as in the guest.
    #[inline]
    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Ordering::SeqCst)
    }

    /// Where the caller's memory shows `addr`, if a region is there that has all of `rights` (`MEM_*`).
    #[cfg(CONFIG_X86_64)] // For clocks in guest memory.
    pub(crate) fn host_address(&self, addr: GuestPhysAddr, rights: u32) -> Option<u64> {
        let state = self.state.lock();
        let region = state.regions.find(addr).filter(|region| region.flags & rights == rights)?;
        Some(region.host_of(addr))
    }

    /// Resolves a nested page fault at `addr` without leaving the window, if it takes no more than a look at the host's page
    /// table: the page is mapped there as the guest needs it, the host has seen it written before the guest may write it,
    /// the guest has nothing mapped there, and `spare` has the tables that it takes. `None` if [`fault`](Self::fault) is to do it.
    ///
    /// No reference to the page is needed: as long as the lock is held nobody gets past [`begin`](Invalidate::begin), which
    /// comes before any change of the host's mapping, and afterwards it finds what has been mapped here.
    #[inline]
    pub(crate) fn fault_in_place(
        &self,
        addr: GuestPhysAddr,
        access: AccessFlags,
        spare: &mut Spare,
        irq_off: &IrqOff,
    ) -> Option<Fault> {
        let page_addr = addr.align_down(PageSize::Size4K.bytes());
        let mut state = self.state.try_lock()?;
        let Some(region) = state.regions.find(page_addr).filter(|region| allows(region, access)).copied() else {
            return Some(Fault::NotMemory);
        };
        if state.log.is_some() {
            return None;
        }
        let host = usize::try_from(region.host_of(page_addr)).ok()?;
        // SAFETY: The VM holds a reference to the structure, and the fault is one of the process itself.
        let host = unsafe { HostLeaf::usable(self.vm.mm().as_raw(), host, irq_off) }?;
        let mut perms = Permissions::from_bits(region.flags)?;
        if !host.writable() {
            perms = perms.intersection(READ_ONLY);
        }
        if access.contains(AccessFlags::WRITE) && !host.writable()
            || perms.contains(Permissions::WRITE) && !host.dirty()
        {
            return None;
        }
        let leaf = leaf_for(&state, &region, page_addr, host.phys(), || host.shift());
        let (start, bytes) = (region.host_of(leaf.guest), leaf.size.bytes());
        if leaf.size > arch::LARGEST_IN_PLACE || state.changes.is_under_way(&(start..start.saturating_add(bytes))) {
            return None;
        }
        let before = state.leaf_count();
        let State { table, retired, .. } = &mut *state;
        let table = table.as_mut()?;
        if leaf.must_be_split(table, access) {
            return None;
        }
        let tables = table.table_count();
        arch::prepare_memory(leaf.phys, bytes);
        let memory = &mut Memory { spare, retired };
        let mapped = table.map_empty(leaf.guest, leaf.phys, leaf.size, perms, MemoryType::WriteBack, memory);
        if mapped != Ok(true) {
            return None;
        }
        arch::tables_changed();
        let tables = table.table_count().wrapping_sub(tables);
        self.account(before, state.leaf_count(), tables);
        self.vm.stats.faults.fetch_add(1, Ordering::Relaxed);
        Some(Fault::Resolved)
    }

    /// Resolves a nested page fault at `addr`. May sleep.
    ///
    /// # Errors
    /// - `EFAULT`: the region's memory is not there (any more), or not so that the guest may use it.
    /// - `ENOMEM`, `EINTR`: as it says.
    pub(crate) fn fault(&self, addr: GuestPhysAddr, access: AccessFlags, spare: &mut Spare) -> Result<Fault> {
        let page_addr = addr.align_down(PageSize::Size4K.bytes());
        let write = access.contains(AccessFlags::WRITE);
        let (region, snapshot) = {
            let state = self.state.lock();
            match state.regions.find(page_addr) {
                Some(region) if allows(region, access) => (*region, state.changes.snapshot()),
                _ => return Ok(Fault::NotMemory),
            }
        };
        let host = region.host_of(page_addr);
        spare.fill()?;
        // A region that the guest may not write is looked up for reading, so that nothing is copied for it.
        let page = GuestPage::lookup(usize::try_from(host).map_err(|_| EFAULT)?, write, region.flags & MEM_WRITE != 0)?;

        let mut state = self.state.lock();
        let mut perms = Permissions::from_bits(region.flags).ok_or(EINVAL)?;
        if !page.writable() {
            perms = perms.intersection(READ_ONLY);
        }
        let leaf = leaf_for(&state, &region, page_addr, page.phys(), || {
            // SAFETY: The VM holds a reference to the structure, and the fault is one of the process itself.
            usize::try_from(host).map_or(0, |host| unsafe { ffi::host_leaf_shift(self.vm.mm().as_raw(), host) })
        });
        let (start, bytes) = (region.host_of(leaf.guest), leaf.size.bytes());
        if state.changes.disturbed(snapshot, &(start..start.saturating_add(bytes))) {
            return Ok(Fault::Resolved);
        }
        let before = state.leaf_count();
        let State { table, retired, .. } = &mut *state;
        // Another vCPU may have been faster; what it mapped may allow more than what was found here, and must not shrink.
        let present = table.as_ref().ok_or(EINVAL)?.query(page_addr, &Memory { spare, retired });
        if present.is_some_and(|mapping| mapping.perms.bits() & needed(access) == needed(access)) {
            return Ok(Fault::Resolved);
        }
        let logged = state.log_frames();
        let perms = state.admit(page_addr, write, perms, spare)?;
        self.account_log(logged, state.log_frames());
        let State { table, retired, .. } = &mut *state;
        let table = table.as_mut().ok_or(EINVAL)?;
        let tables = table.table_count();
        let replaces = !present.is_some_and(|old| old.size == leaf.size && old.hpa.align_down(bytes) == leaf.phys);
        if arch::BREAK_BEFORE_MAKE && replaces {
            let dropped = table.zap(leaf.guest, bytes, &mut Memory { spare, retired });
            if !dropped.is_empty() {
                self.shoot_down(&mut state);
            }
        }
        if present.is_none() {
            arch::prepare_memory(leaf.phys, bytes);
        }
        let State { table, retired, .. } = &mut *state;
        let table = table.as_mut().ok_or(EINVAL)?;
        let flush = leaf.install(table, perms, access, &mut Memory { spare, retired }).map_err(abi::errno)?;
        let tables = table.table_count().wrapping_sub(tables);
        self.account(before, state.leaf_count(), tables);
        self.vm.stats.faults.fetch_add(1, Ordering::Relaxed);
        if flush.is_needed() {
            self.shoot_down(&mut state);
        }
        Ok(Fault::Resolved)
    }

    /// Drops the mappings of a guest range and makes sure that no vCPU uses them. The lock is held.
    fn drop_mappings(&self, state: &mut State, guest: GuestPhysAddr, size: u64) {
        let before = state.leaf_count();
        let State { table, retired, .. } = state;
        let Some(table) = table.as_mut() else { return };
        let tables = table.table_count();
        let dropped = table.zap(guest, size, &mut Memory { spare: &mut Spare::empty(), retired });
        let tables = table.table_count().wrapping_sub(tables);
        self.account(before, state.leaf_count(), tables);
        if !dropped.is_empty() {
            self.shoot_down(state);
        }
    }

    /// Makes sure that no vCPU uses a translation that is no longer in the tables, and frees tables that are no longer in use.
    fn shoot_down(&self, state: &mut State) {
        arch::tables_changed();
        self.generation.fetch_add(1, Ordering::SeqCst);
        let me = self.identity();
        for vcpu in self.vm.vcpus() {
            if vcpu.expel(me) {
                self.vm.stats.shootdowns.fetch_add(1, Ordering::Relaxed);
            }
        }
        // SAFETY: Every vCPU that used the tables has left the guest since, and flushes its TLB before it enters again, as it
        // sees the new generation.
        unsafe { state.retired.release() };
    }

    /// Adjusts the VM's counters after a change. Differences wrap.
    fn account(&self, before: LeafCount, after: LeafCount, tables: u64) {
        let stats = &self.vm.stats;
        stats.pages_4k.fetch_add(after.size_4k.wrapping_sub(before.size_4k), Ordering::Relaxed);
        stats.pages_2m.fetch_add(after.size_2m.wrapping_sub(before.size_2m), Ordering::Relaxed);
        stats.table_pages.fetch_add(tables, Ordering::Relaxed);
    }

    fn map(&self, arg: MapRegion) -> Result<isize> {
        abi::must_be_zero(&[arg.reserved.into()])?;
        check_rights(arg.flags)?;
        self.check_range(arg.guest_addr, arg.size)?;
        if !ffi::is_user_range(arg.user_addr, arg.size) {
            return Err(EFAULT);
        }
        let region =
            Region { guest: GuestPhysAddr::new(arg.guest_addr), size: arg.size, host: arg.user_addr, flags: arg.flags };
        self.state.lock().regions.insert(region).map_err(abi::errno)?;
        Ok(0)
    }

    fn unmap(&self, arg: Range) -> Result<isize> {
        self.check_range(arg.guest_addr, arg.size)?;
        let guest = GuestPhysAddr::new(arg.guest_addr);
        self.change(guest, arg.size, |regions| regions.remove(guest, arg.size))
    }

    fn protect(&self, arg: ProtectRange) -> Result<isize> {
        abi::must_be_zero(&[arg.reserved.into()])?;
        check_rights(arg.flags)?;
        self.check_range(arg.guest_addr, arg.size)?;
        let guest = GuestPhysAddr::new(arg.guest_addr);
        self.change(guest, arg.size, |regions| regions.protect(guest, arg.size, arg.flags))
    }

    /// Changes regions in a range and drops what is mapped there, to be mapped again by faults under the new rules.
    fn change(
        &self,
        guest: GuestPhysAddr,
        size: u64,
        change: impl FnOnce(&mut RegionMap<Slots>) -> Result<(), AxError>,
    ) -> Result<isize> {
        {
            let mut state = self.state.lock();
            change(&mut state.regions).map_err(abi::errno)?;
            // Faults under way, which have seen the old region, must not map it.
            state.changes.note(0..u64::MAX);
        }
        let mut done = 0;
        while done < size {
            let part = CHUNK.min(size.wrapping_sub(done));
            let Some(at) = guest.checked_add(done) else { break };
            self.drop_mappings(&mut self.state.lock(), at, part);
            done = done.wrapping_add(part);
        }
        Ok(0)
    }

    fn check_range(&self, guest: u64, size: u64) -> Result {
        match guest.checked_add(size) {
            Some(end) if end <= self.limit => Ok(()),
            _ => Err(EINVAL),
        }
    }
}

/// All but writing.
const READ_ONLY: Permissions = Permissions::READ.union(Permissions::EXECUTE);

/// What a region must allow for an access, `MEM_*`.
#[inline]
fn needed(access: AccessFlags) -> u32 {
    let mut needed = MEM_READ;
    if access.contains(AccessFlags::WRITE) {
        needed |= MEM_WRITE;
    }
    if access.contains(AccessFlags::EXECUTE) {
        needed |= MEM_EXECUTE;
    }
    needed
}

/// Whether a region allows an access.
#[inline]
fn allows(region: &Region, access: AccessFlags) -> bool {
    region.flags & needed(access) == needed(access)
}

fn check_rights(flags: u32) -> Result {
    if flags & MEM_READ == 0 || flags & !(MEM_READ | MEM_WRITE | MEM_EXECUTE) != 0 {
        return Err(EINVAL);
    }
    Ok(())
}

impl State {
    fn leaf_count(&self) -> LeafCount {
        self.table.as_ref().map(NestedTable::leaf_count).unwrap_or_default()
    }

    /// The first piece of guest memory at or above `from`, of at most `CHUNK` bytes, that the host range `start..end` backs.
    fn backed_by(&self, from: u64, start: u64, end: u64) -> Option<(GuestPhysAddr, u64)> {
        self.regions.as_slice().iter().find_map(|region| {
            let (guest, size) = region.guest_range_of(start, end)?;
            let last = guest.as_u64().wrapping_add(size);
            let first = guest.as_u64().max(from);
            (first < last).then(|| (GuestPhysAddr::new(first), last.wrapping_sub(first).min(CHUNK)))
        })
    }
}

impl Drop for State {
    fn drop(&mut self) {
        drop(self.end_log());
        if let Some(table) = self.table.take() {
            table.free_all(&mut Memory { spare: &mut Spare::empty(), retired: &mut self.retired });
        }
        // SAFETY: Every vCPU that used the root held a reference to the address space, so there is none any more; what their
        // TLBs still hold is tagged with identifiers that are flushed before they are given out again.
        unsafe { self.retired.release() };
    }
}

#[pinned_drop]
impl PinnedDrop for AddressSpace {
    fn drop(self: Pin<&mut Self>) {
        let state = self.state.lock();
        let tables = state.table.as_ref().map_or(0, NestedTable::table_count);
        self.account(state.leaf_count(), LeafCount::default(), 0u64.wrapping_sub(tables));
        self.account_log(state.log_frames(), 0);
    }
}

impl Invalidate for AddressSpace {
    fn begin(&self, start: u64, end: u64) {
        self.state.lock().changes.begin(start..end);
        let mut from = 0;
        loop {
            let mut state = self.state.lock();
            let Some((guest, size)) = state.backed_by(from, start, end) else { break };
            if !state.leaf_count().is_empty() {
                self.vm.stats.invalidations.fetch_add(1, Ordering::Relaxed);
                self.drop_mappings(&mut state, guest, size);
            }
            from = guest.as_u64().wrapping_add(size);
        }
    }

    fn end(&self, start: u64, end: u64) {
        self.state.lock().changes.end(start..end);
    }
}

impl FdObject for AddressSpace {
    const NAME: &'static CStr = c"axvcpu-aspace";

    fn operations() -> &'static FileOperations<Self> {
        &OPERATIONS
    }

    fn ioctl(this: ArcBorrow<'_, Self>, cmd: u32, arg: usize) -> Result<isize> {
        this.vm.check_process()?;
        match cmd {
            ioctl::MAP => this.map(abi::read(arg)?),
            ioctl::UNMAP => this.unmap(abi::read(arg)?),
            ioctl::PROTECT => this.protect(abi::read(arg)?),
            ioctl::START_DIRTY_LOG => this.start_log(abi::read(arg)?),
            ioctl::READ_DIRTY_LOG => this.read_log(arg),
            ioctl::STOP_DIRTY_LOG => this.stop_log(),
            _ => Err(ENOTTY),
        }
    }

    fn show(&self, to: &SeqFile) {
        let (regions, leaves, tables, log, bytes) = {
            let state = self.state.lock();
            let regions = state.regions.as_slice();
            let bytes = regions.iter().fold(0u64, |sum, region| sum.wrapping_add(region.size));
            let tables = state.table.as_ref().map_or(0, NestedTable::table_count);
            (regions.len(), state.leaf_count(), tables, state.log_frames(), bytes)
        };
        seq_print!(to, "regions:\t{}\n", regions);
        seq_print!(to, "region-bytes:\t{}\n", bytes);
        seq_print!(to, "pages-4k:\t{}\n", leaves.size_4k);
        seq_print!(to, "pages-2m:\t{}\n", leaves.size_2m);
        seq_print!(to, "table-pages:\t{}\n", tables);
        seq_print!(to, "log-pages:\t{}\n", log);
    }
}
