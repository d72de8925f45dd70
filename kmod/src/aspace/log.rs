// SPDX-License-Identifier: GPL-2.0-only
//! The ioctls of an address space's dirty log, whose logic is `vcpu_core::dirty`.
//!
//! Locks: the address space's. It is given up between steps, and nothing is copied to the caller under it.

use axvcpu_uapi::aspace::{DirtyLogRead, Range};
use kernel::{alloc::KVVec, prelude::*};
use vcpu_core::{
    dirty::{self, DirtyLog, GRANULE},
    npt::{Permissions, FRAME_SIZE},
    GuestPhysAddr, HostPhysAddr,
};

use super::{AddressSpace, State, CHUNK};
use crate::{
    abi,
    tables::{Memory, Spare},
};

/// Places for frames in a log, at most: 8 TiB of guest memory.
const MAX_PLACES: u64 = 1 << 16;

/// Words that are read in one step: a frame's.
const STEP: usize = (FRAME_SIZE / 8) as usize;

/// Storage of a log's places.
pub(super) struct Places(KVVec<Option<HostPhysAddr>>);

impl core::ops::Deref for Places {
    type Target = [Option<HostPhysAddr>];
    fn deref(&self) -> &[Option<HostPhysAddr>] {
        &self.0
    }
}

impl core::ops::DerefMut for Places {
    fn deref_mut(&mut self) -> &mut [Option<HostPhysAddr>] {
        &mut self.0
    }
}

impl State {
    /// How the page at `addr` may be mapped by a fault, or written by the host: see [`DirtyLog::admit`].
    pub(super) fn admit(
        &mut self,
        addr: GuestPhysAddr,
        write: bool,
        perms: Permissions,
        spare: &mut Spare,
    ) -> Result<Permissions> {
        let Self { log: Some(log), retired, .. } = self else { return Ok(perms) };
        log.admit(addr, write, perms, &mut Memory { spare, retired }).map_err(abi::errno)
    }

    /// Frames of the log.
    pub(super) fn log_frames(&self) -> u64 {
        self.log.as_ref().map_or(0, DirtyLog::frame_count)
    }

    /// Ends the log, if there is one. Its storage comes back, to be dropped without the lock.
    pub(super) fn end_log(&mut self) -> Option<(core::ops::Range<u64>, Places)> {
        let log = self.log.take()?;
        Some((log.range(), log.finish(&mut Memory { spare: &mut Spare::empty(), retired: &mut self.retired })))
    }
}

impl AddressSpace {
    /// The host has written to the page at `addr` for the guest. To be called after the write.
    ///
    /// # Errors
    /// `ENOMEM`.
    #[cfg(CONFIG_X86_64)] // It writes the paravirtual clock.
    pub(crate) fn wrote(&self, addr: GuestPhysAddr, spare: &mut Spare) -> Result {
        spare.fill()?;
        let mut state = self.state.lock();
        let before = state.log_frames();
        state.admit(addr, true, Permissions::ALL, spare)?;
        self.account_log(before, state.log_frames());
        Ok(())
    }

    /// `START_DIRTY_LOG`.
    pub(super) fn start_log(&self, arg: Range) -> Result<isize> {
        self.check_range(arg.guest_addr, arg.size)?;
        let count = dirty::frames_for(arg.size);
        if count > MAX_PLACES {
            return Err(ENOSPC);
        }
        let mut places = KVVec::with_capacity(count as usize, GFP_KERNEL_ACCOUNT)?;
        for _ in 0..count {
            places.push(None, GFP_KERNEL_ACCOUNT)?;
        }
        let log =
            DirtyLog::new(GuestPhysAddr::new(arg.guest_addr), arg.size, Places(places)).map_err(abi::errno)?;
        let range = log.range();
        let refused = {
            let mut state = self.state.lock();
            match state.log {
                Some(_) => Some(log),
                None => {
                    state.log = Some(log);
                    None
                }
            }
        };
        if refused.is_some() {
            return Err(EEXIST);
        }
        for part in parts(&range) {
            self.write_protect(part)?;
        }
        Ok(0)
    }

    /// Takes the write permission of what is mapped in a range away, and makes sure that no vCPU uses it any more.
    fn write_protect(&self, range: core::ops::Range<u64>) -> Result {
        let mut state = self.state.lock();
        // Large leaves across the ends go, so that taking permissions away has none to split: not before, as there may be some
        // again if somebody has stopped the log meanwhile.
        for end in [range.start, range.end.wrapping_sub(1)] {
            self.drop_mappings(&mut state, GuestPhysAddr::new(end), 1);
        }
        let State { table: Some(table), retired, .. } = &mut *state else { return Err(EINVAL) };
        let flush = table
            .restrict(
                GuestPhysAddr::new(range.start),
                range.end.wrapping_sub(range.start),
                Permissions::READ.union(Permissions::EXECUTE),
                &mut Memory { spare: &mut Spare::empty(), retired },
            )
            .map_err(abi::errno)?;
        if flush.is_needed() {
            self.shoot_down(&mut state);
        }
        Ok(())
    }

    /// `READ_DIRTY_LOG`.
    pub(super) fn read_log(&self, addr: usize) -> Result<isize> {
        let arg: DirtyLogRead = abi::read(addr)?;
        self.check_range(arg.guest_addr, arg.size)?;
        if arg.size == 0 || (arg.guest_addr | arg.size) & (GRANULE - 1) != 0 {
            return Err(EINVAL);
        }
        {
            let state = self.state.lock();
            let range = state.log.as_ref().ok_or(ENOENT)?.range();
            if arg.guest_addr < range.start || arg.guest_addr.wrapping_add(arg.size) > range.end {
                return Err(EINVAL);
            }
        }
        let mut words = KVec::from_elem(0u64, STEP, GFP_KERNEL)?;
        let (mut pages, mut flush) = (0u64, false);
        let result = self.read_steps(&arg, &mut words, &mut pages, &mut flush);
        // Before the caller looks at the pages, and before anybody relies on their being clean.
        if flush {
            self.shoot_down(&mut self.state.lock());
        }
        result?;
        abi::write(addr, DirtyLogRead { pages, ..arg })?;
        Ok(0)
    }

    /// Reads the log in steps into the caller's memory.
    fn read_steps(&self, arg: &DirtyLogRead, words: &mut [u64], pages: &mut u64, flush: &mut bool) -> Result {
        let total = arg.size / GRANULE;
        let mut done = 0u64;
        while done < total {
            let at = GuestPhysAddr::new(arg.guest_addr.wrapping_add(done.wrapping_mul(GRANULE)));
            let room = usize::try_from(total.wrapping_sub(done)).unwrap_or(usize::MAX).min(words.len());
            let to = words.get_mut(..room).ok_or(EINVAL)?;
            let count = {
                let mut state = self.state.lock();
                let State { log, table: Some(table), retired, .. } = &mut *state else { return Err(EINVAL) };
                // It may have been stopped, and another started elsewhere, since the caller was told that it is there.
                let log = log.as_mut().ok_or(ENOENT)?;
                let memory = &mut Memory { spare: &mut Spare::empty(), retired };
                let (count, taken) = log
                    .take(at, to, memory, |at, size, perms, memory| table.restrict(at, size, perms, memory))
                    .map_err(abi::errno)?;
                *pages = pages.wrapping_add(taken.pages);
                *flush |= taken.flush.is_needed();
                count
            };
            let taken = to.get(..count).ok_or(EINVAL)?;
            if let Err(error) = abi::write_words(arg.bitmap_addr.wrapping_add(done.wrapping_mul(8)), taken) {
                let mut state = self.state.lock();
                let State { log, retired, .. } = &mut *state;
                if let Some(log) = log.as_mut().filter(|log| log.covers(at)) {
                    log.put_back(at, taken, &mut Memory { spare: &mut Spare::empty(), retired });
                }
                return Err(error);
            }
            done = done.wrapping_add(count as u64);
        }
        Ok(())
    }

    /// `STOP_DIRTY_LOG`.
    pub(super) fn stop_log(&self) -> Result<isize> {
        let (range, places) = {
            let mut state = self.state.lock();
            let frames = state.log_frames();
            let ended = state.end_log().ok_or(ENOENT)?;
            self.account_log(frames, 0);
            // Gives the log's frames back.
            self.shoot_down(&mut state);
            ended
        };
        drop(places);
        // To be mapped anew, with write permission, and by large leaves where that is possible.
        for part in parts(&range) {
            let size = part.end.wrapping_sub(part.start);
            self.drop_mappings(&mut self.state.lock(), GuestPhysAddr::new(part.start), size);
        }
        Ok(0)
    }

    pub(super) fn account_log(&self, before: u64, after: u64) {
        self.vm.stats.log_pages.fetch_add(after.wrapping_sub(before), core::sync::atomic::Ordering::Relaxed);
    }
}

/// `range` in parts that end at multiples of `CHUNK`, so at no place inside a large leaf.
fn parts(range: &core::ops::Range<u64>) -> impl Iterator<Item = core::ops::Range<u64>> {
    let (mut at, end) = (range.start, range.end);
    core::iter::from_fn(move || {
        let next = (at & !(CHUNK - 1)).saturating_add(CHUNK).min(end);
        let part = at..next;
        at = next;
        (part.start < part.end).then_some(part)
    })
}
