// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! Reads guest memory through the nested page table, in the short time after an exit in which the module guarantees that no
//! mapping is taken away: interrupts are off, and whoever takes one away waits until they are on again.

use core::cell::Cell;
use core::marker::PhantomData;
use core::sync::atomic::{AtomicU64, AtomicU8, Ordering};

use vcpu_core::npt::{self, Format, Levels, Permissions};
use vcpu_core::{AxVCpuHal, GuestPhysAddr, HostPhysAddr};

use crate::length::MAX_LENGTH;
use crate::linear::{GuestMemory, Paging};

/// The memory behind a nested page table.
///
/// # Invariants
/// `root` is a table of `levels` levels in the format `F`, whose tables and pages stay as long as this object.
pub(crate) struct NestedMemory<H: AxVCpuHal, F: Format> {
    root: HostPhysAddr,
    levels: Levels,
    hal: PhantomData<(H, F)>,
}

impl<H: AxVCpuHal, F: Format> NestedMemory<H, F> {
    /// # Safety
    /// As the invariant says. The object must not outlive the stretch with interrupts off.
    pub(crate) unsafe fn new(root: HostPhysAddr, levels: Levels) -> Self {
        // INVARIANT: The caller's promise.
        Self { root, levels, hal: PhantomData }
    }

    /// Where the host has the byte at `gpa`, if it is mapped.
    fn locate(&self, gpa: u64) -> Option<HostPhysAddr> {
        let read_entry = |table: HostPhysAddr, index: usize| {
            // SAFETY: By the type invariant `table` is a live table of 512 entries, and the walk's index is below that. Others
            // change entries at the same time, so the load is atomic.
            unsafe { AtomicU64::from_ptr(H::phys_to_virt(table).cast::<u64>().add(index & 511)) }
                .load(Ordering::Acquire)
        };
        let mapping = npt::walk::<F>(self.root, self.levels, read_entry, GuestPhysAddr::new(gpa))?;
        mapping.perms.contains(Permissions::READ).then_some(mapping.hpa)
    }

    /// Fills `buffer` from `at`.
    ///
    /// # Safety
    /// [`locate`](Self::locate) would give `at` for some address, and the buffer does not run over the end of that page.
    #[inline]
    unsafe fn load(at: HostPhysAddr, buffer: &mut [u8]) {
        let from = H::phys_to_virt(at);
        for (offset, byte) in buffer.iter_mut().enumerate() {
            // SAFETY: The page is mapped, so it stays (type invariant); the caller's buffer does not run over its end. Other
            // vCPUs may write it at the same time, so each byte is loaded atomically.
            *byte = unsafe { AtomicU8::from_ptr(from.add(offset)) }.load(Ordering::Relaxed);
        }
    }
}

impl<H: AxVCpuHal, F: Format> GuestMemory for NestedMemory<H, F> {
    fn read(&self, gpa: u64, buffer: &mut [u8]) -> bool {
        let Some(at) = self.locate(gpa) else { return false };
        // SAFETY: Just located, and the caller's buffer stays in the page.
        unsafe { Self::load(at, buffer) };
        true
    }
}

/// Words of guest memory that are read on the way to an instruction: an entry of each level of the guest's page tables.
const PATH_WORDS: usize = 5;
/// Those, and the aligned words that an instruction can be in.
const MAX_WORDS: usize = PATH_WORDS + (MAX_LENGTH + 7).div_ceil(8);

/// An aligned word of memory. Other vCPUs may write it at the same time.
///
/// # Safety
/// `at` is a multiple of 8, in a page that stays.
#[inline]
unsafe fn load_word<H: AxVCpuHal>(at: HostPhysAddr) -> u64 {
    // SAFETY: The caller's promise.
    unsafe { AtomicU64::from_ptr(H::phys_to_virt(at).cast()) }.load(Ordering::Relaxed).to_le()
}

/// An instruction that has been read, and what that depended on.
///
/// Drivers kick their devices by the same store each time, and reading it takes a walk of the guest's page tables, of which each
/// step takes one of the nested page table. What is found is a function of the registers and of what is read; and as long as
/// the nested page table has lost no translation, it would be read in the same places. So if registers and contents are the
/// same, so is the instruction.
///
/// # Invariants
/// The addresses of the first `count` words were [located](NestedMemory::locate) and are multiples of 8, and no translation has been
/// taken away since.
#[derive(Clone, Copy)]
pub(crate) struct Known {
    rip: u64,
    paging: Paging,
    /// Entries of page tables, and what the instruction is in.
    words: [(HostPhysAddr, u64); MAX_WORDS],
    count: usize,
    length: u8,
}

impl Known {
    /// The length of the instruction at `rip`, if it is this one.
    ///
    /// # Safety
    /// Interrupts are off, and have been since a time at which the invariant held.
    #[inline]
    pub(crate) unsafe fn length<H: AxVCpuHal>(&self, rip: u64, paging: &Paging) -> Option<u8> {
        if self.rip != rip || self.paging != *paging {
            return None;
        }
        for &(at, value) in self.words.get(..self.count)? {
            // SAFETY: Aligned by the type invariant. The page is there: it was mapped, by the same, and whoever has taken that away
            // since the interrupts are off waits until they are on.
            if unsafe { load_word::<H>(at) } != value {
                return None;
            }
        }
        Some(self.length)
    }
}

/// Guest memory, with a record of what is read of it.
pub(crate) struct Recorded<'a, H: AxVCpuHal, F: Format> {
    memory: &'a NestedMemory<H, F>,
    words: [Cell<(HostPhysAddr, u64)>; PATH_WORDS],
    count: Cell<usize>,
    code: Cell<Option<HostPhysAddr>>,
}

impl<'a, H: AxVCpuHal, F: Format> Recorded<'a, H, F> {
    /// Nothing has been read yet.
    pub(crate) fn new(memory: &'a NestedMemory<H, F>) -> Self {
        Self {
            memory,
            words: [const { Cell::new((HostPhysAddr::new(0), 0)) }; PATH_WORDS],
            count: Cell::new(0),
            code: Cell::new(None),
        }
    }

    /// The instruction at `rip`, for which all has been read: it consists of `bytes`. `None` if it is not in one piece, or another one
    /// by now.
    pub(crate) fn known(&self, rip: u64, paging: Paging, bytes: &[u8]) -> Option<Known> {
        let (code, mut count) = (self.code.get()?, self.count.get());
        let mut words = core::array::from_fn(|index| self.words.get(index).map_or((code, 0), Cell::get));
        if count > PATH_WORDS {
            return None;
        }
        let (mut at, mut offset, mut rest) = (code.align_down(8), (code.as_u64() & 7) as usize, bytes);
        while !rest.is_empty() {
            // SAFETY: Aligned as just seen. The instruction was located in one piece, so this is all in its page, which stays as long as
            // `memory`.
            let value = unsafe { load_word::<H>(at) };
            let (part, others) = rest.split_at_checked(8usize.wrapping_sub(offset)).unwrap_or((rest, &[]));
            if !value.to_le_bytes().get(offset..)?.starts_with(part) {
                return None;
            }
            *words.get_mut(count)? = (at, value);
            (at, offset, rest, count) = (at.checked_add(8)?, 0, others, count.wrapping_add(1));
        }
        // INVARIANT: Entries of page tables, which are aligned, and the words just read; all located in this stretch with interrupts
        // off.
        Some(Known { rip, paging, words, count, length: u8::try_from(bytes.len()).ok()? })
    }
}

impl<H: AxVCpuHal, F: Format> GuestMemory for Recorded<'_, H, F> {
    fn read(&self, gpa: u64, buffer: &mut [u8]) -> bool {
        let Some(at) = self.memory.locate(gpa) else { return false };
        // SAFETY: Just located, and the caller's buffer stays in the page.
        unsafe { NestedMemory::<H, F>::load(at, buffer) };
        match <[u8; 8]>::try_from(&*buffer) {
            Ok(word) => {
                if let Some(slot) = self.words.get(self.count.get()) {
                    slot.set((at, u64::from_le_bytes(word)));
                }
                self.count.set(self.count.get().saturating_add(1));
            }
            Err(_) => self.code.set((buffer.len() == MAX_LENGTH).then_some(at)),
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::regs::{cr0, cr4, efer};
    use crate::testing::TestHal;
    use std::vec::Vec;
    use vcpu_core::npt::{MemoryType, NestedPageTable, Npt, PageSize, TableMemory};

    /// Guest page tables in the guest's first pages, and the page behind them; all in frames of their own.
    struct Machine {
        frames: Vec<HostPhysAddr>,
        table: NestedPageTable<Npt>,
    }

    struct Tables(Vec<HostPhysAddr>);

    fn word(at: HostPhysAddr, index: usize) -> *mut u64 {
        TestHal::phys_to_virt(at).cast::<u64>().wrapping_add(index)
    }

    impl TableMemory for Tables {
        fn alloc(&mut self) -> Option<HostPhysAddr> {
            let frame = TestHal::alloc_frames(0)?;
            self.0.push(frame);
            Some(frame)
        }
        fn free(&mut self, _table: HostPhysAddr) {}
        fn give_back(&mut self, _frame: HostPhysAddr) {}
        fn read(&self, table: HostPhysAddr, index: usize) -> u64 {
            // SAFETY: An entry of a frame.
            unsafe { word(table, index).read() }
        }
        fn write(&mut self, table: HostPhysAddr, index: usize, entry: u64) {
            // SAFETY: As above.
            unsafe { word(table, index).write(entry) }
        }
    }

    impl Machine {
        /// Four levels in pages 0 to 3, which translate the addresses of page 4 to it; there is `code`.
        fn new(code: &[u8]) -> Self {
            let mut tables = Tables(Vec::new());
            let mut table = NestedPageTable::new(Levels::Four, &mut tables).unwrap();
            let mut frames = Vec::new();
            for page in 0..5u64 {
                let frame = TestHal::alloc_frames(0).unwrap();
                let gpa = GuestPhysAddr::new(page * 4096);
                let (size, perms) = (PageSize::Size4K, Permissions::ALL);
                let _ = table.map(gpa, frame, size, perms, MemoryType::WriteBack, &mut tables).unwrap();
                frames.push(frame);
            }
            for (page, index) in [(0, 0), (1, 0), (2, 0), (3, 4)] {
                // SAFETY: An entry of a frame.
                unsafe { word(frames[page], index).write(((page as u64 + 1) * 4096) | 7) };
            }
            for (offset, byte) in code.iter().enumerate() {
                // SAFETY: In a frame.
                unsafe { TestHal::phys_to_virt(frames[4]).add(offset).write(*byte) };
            }
            Self { frames: [frames, tables.0].concat(), table }
        }

        /// What is `length` bytes long at `rip`.
        fn known(&self, rip: u64, length: usize) -> Known {
            // SAFETY: The table stays as it is.
            let memory = unsafe { NestedMemory::<TestHal, Npt>::new(self.table.root(), Levels::Four) };
            let recorded = Recorded::new(&memory);
            let mut bytes = [0; MAX_LENGTH];
            assert_eq!(PAGING.read(&recorded, rip, u64::MAX, &mut bytes), MAX_LENGTH);
            let known = recorded.known(rip, PAGING, &bytes[..length]).unwrap();
            bytes[length - 1] ^= 1;
            assert!(recorded.known(rip, PAGING, &bytes[..length]).is_none(), "another one by now");
            known
        }
    }

    impl Drop for Machine {
        fn drop(&mut self) {
            self.frames.drain(..).for_each(|frame| TestHal::free_frames(frame, 0));
        }
    }

    const PAGING: Paging = Paging { cr0: cr0::PG, cr3: 0, cr4: cr4::PAE, efer: efer::LMA };

    fn length(known: &Known, rip: u64, paging: &Paging) -> Option<u8> {
        // SAFETY: The table stays as it is.
        unsafe { known.length::<TestHal>(rip, paging) }
    }

    #[test]
    fn an_instruction_is_known_again_until_something_that_led_to_it_changes() {
        let machine = Machine::new(&[0x89, 0x03, 0x90]);
        let known = machine.known(0x4000, 2);
        assert_eq!(length(&known, 0x4000, &PAGING), Some(2));
        assert_eq!(length(&known, 0x4002, &PAGING), None, "elsewhere");
        assert_eq!(length(&known, 0x4000, &Paging { cr3: 0x1000, ..PAGING }), None, "by other tables");
        for (page, index) in [(0, 0), (1, 0), (2, 0), (3, 4)] {
            let entry = word(machine.frames[page], index);
            // SAFETY: An entry of a frame.
            unsafe {
                let old = entry.read();
                entry.write(old ^ (1 << 5));
                assert_eq!(length(&known, 0x4000, &PAGING), None, "an entry of page {page}");
                entry.write(old);
            }
        }
        assert_eq!(length(&known, 0x4000, &PAGING), Some(2));
    }

    #[test]
    fn an_instruction_is_another_one_if_a_word_that_it_is_in_changes() {
        let machine = Machine::new(&[0x89, 0x03, 0x90]);
        for (rip, size, words) in [(0x4000, 2, 0..8), (0x4006, 2, 0..8), (0x4007, 2, 0..16), (0x400f, 15, 8..32)] {
            let known = machine.known(rip, size);
            for offset in 0..40 {
                let expected = (!words.contains(&offset)).then_some(size as u8);
                // SAFETY: In a frame.
                unsafe {
                    let byte = TestHal::phys_to_virt(machine.frames[4]).add(offset);
                    let old = byte.read();
                    byte.write(!old);
                    assert_eq!(length(&known, rip, &PAGING), expected, "{size} bytes at {rip:#x}, byte {offset}");
                    byte.write(old);
                }
            }
        }
    }

    #[test]
    fn an_instruction_on_two_pages_is_not_remembered() {
        let machine = Machine::new(&[]);
        // SAFETY: The table stays as it is.
        let memory = unsafe { NestedMemory::<TestHal, Npt>::new(machine.table.root(), Levels::Four) };
        for rip in 0x4ff2..0x5000 {
            let recorded = Recorded::new(&memory);
            let mut bytes = [0; MAX_LENGTH];
            // The page behind is not mapped.
            assert_eq!(PAGING.read(&recorded, rip, u64::MAX, &mut bytes) as u64, 0x5000 - rip);
            assert!(recorded.known(rip, PAGING, &bytes[..1]).is_none(), "{rip:#x}");
        }
    }
}
