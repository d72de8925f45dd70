// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! [`Interface`]: the CPU interface of a vCPU. Its registers are the hardware's while the guest runs; what is decided here is
//! which interrupts go into the list registers ([`fill`](Interface::fill)), and what it means in which state they come back
//! ([`fold`](Interface::fold)). All that the distributor knows is up to date between the two.
//!
//! If there are more interrupts than list registers, the best one that is pending gets one for sure, then come those
//! that are active, by priority, then the others that are pending. The CPU tells when none is pending any more (NPIE), and
//! there is room for the next; it counts the ends of interrupts that it does not find in a list register (EOIcount), which are
//! those of the best that are active.
//!
//! With EOImode 1, an interrupt is deactivated by itself, which only the CPU that has it in a list register could do without
//! us; an SPI may be deactivated by any. So where there are several vCPUs, or an active interrupt without a list register, that
//! is trapped (TDIR).
//!
//! A level-triggered interrupt is never pending while it is active: its end is told (EOI), and the line is looked at again.
//! Until the end has been told ([`told`](Interface::told)) the line may be up for what has ended, so till then an SPI stays out
//! of all list registers: the vCPU that has it holds it, or, if another one has deactivated it, it stays active.

use core::sync::atomic::Ordering::SeqCst;

use axvcpu_uapi::arm64::GIC_TIMER_PPI;

use super::bank::{bits, Bank};
use super::distributor::{Distributor, FIRST_SPI, INTIDS, SPI_BANKS};

/// List registers that a CPU can have.
pub(super) const MAX_LISTS: usize = 16;

/// A list register, `ICH_LR<n>_EL2` (IHI 0069 section 12.4.7): the states,
const PENDING: u64 = 1 << 62;
const ACTIVE: u64 = 1 << 63;
/// group 1 rather than 0,
const GROUP1: u64 = 1 << 60;
/// a maintenance interrupt when the interrupt ends,
const TELL_END: u64 = 1 << 41;
/// or the physical interrupt in bits 44:32 that is deactivated with it. Bits 55:48 are the priority, 31:0 the INTID.
const PHYSICAL: u64 = 1 << 61;
const PHYSICAL_SHIFT: u32 = 32;

/// ICH_HCR_EL2: the interface is on.
const ENABLE: u64 = 1 << 0;
/// ICH_HCR_EL2.LRENPIE: a maintenance interrupt when an end was counted.
const TELL_COUNTED: u64 = 1 << 2;
/// ICH_HCR_EL2.NPIE: a maintenance interrupt when nothing is pending.
const TELL_NONE_PENDING: u64 = 1 << 3;
/// ICH_HCR_EL2.TDIR: ICC_DIR_EL1 is trapped.
const TRAP_DEACTIVATION: u64 = 1 << 14;

/// ICH_HCR_EL2.EOIcount.
pub(super) const COUNT: u64 = 31 << COUNT_SHIFT;
const COUNT_SHIFT: u32 = 27;

/// ICH_VMCR_EL2.VEOIM: the end of an interrupt and its deactivation are two things.
const EOI_MODE: u64 = 1 << 9;

/// What others must be told after list registers were folded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Notices {
    /// vCPUs that must look at their interrupts, as bits.
    pub wake: u64,
    /// SPIs whose lines were asserted and that the guest has ended, as bits from INTID 32 on.
    pub ended: [u32; SPI_BANKS],
    /// Those of them that another vCPU holds, to be made inactive when that is told.
    elsewhere: [u32; SPI_BANKS],
}

impl Notices {
    /// Whether there is nothing to tell.
    #[inline]
    pub fn is_empty(&self) -> bool {
        // Without a branch for each word: it is asked at each exit.
        self.ended.iter().fold(self.wake, |all, word| all | u64::from(*word)) == 0
    }

    /// SPI `intid` has ended. Of others nobody is told.
    fn add_end(&mut self, intid: usize) {
        add_spi(&mut self.ended, intid);
    }

    /// SPI `intid` has ended, and another vCPU holds it.
    fn add_end_elsewhere(&mut self, intid: usize) {
        add_spi(&mut self.ended, intid);
        add_spi(&mut self.elsewhere, intid);
    }

    fn add_wake(&mut self, cpu: usize) {
        self.wake |= 1u64.checked_shl(cpu as u32).unwrap_or(0);
    }

    /// The INTIDs of `ended`.
    pub fn ended(self) -> impl Iterator<Item = u8> {
        (0..).zip(self.ended).flat_map(|(bank, word)| bits(word).map(move |bit| (FIRST_SPI + 32 * bank + bit) as u8))
    }
}

/// Sets the bit of SPI `intid`. Others have none.
fn add_spi(words: &mut [u32; SPI_BANKS], intid: usize) {
    if let Some(word) = (intid / 32).checked_sub(1).and_then(|index| words.get_mut(index)) {
        *word |= 1 << (intid % 32);
    }
}

/// An interrupt that a list register is wanted for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Candidate {
    priority: u8,
    intid: u8,
}

const _: () = assert!(INTIDS <= 256, "an INTID is kept in a byte");

/// The best few candidates, and whether there were more.
#[derive(Default)]
struct Best {
    list: [Candidate; MAX_LISTS],
    count: usize,
    more: bool,
}

impl Best {
    /// Adds a candidate. They come in the order of their INTIDs, which decides among equal priorities.
    fn add(&mut self, new: Candidate) {
        let mut carried = new;
        for slot in self.list.iter_mut().take(self.count) {
            if carried.priority < slot.priority {
                core::mem::swap(slot, &mut carried);
            }
        }
        match self.list.get_mut(self.count) {
            Some(slot) => {
                *slot = carried;
                self.count += 1;
            }
            None => self.more = true,
        }
    }

    fn taken(&self) -> &[Candidate] {
        self.list.get(..self.count).unwrap_or_default()
    }
}

/// The registers of a CPU interface while they are not in the CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interface {
    /// ICH_VMCR_EL2.
    pub(crate) vmcr: u64,
    /// `ICH_AP0R<n>_EL2` and `ICH_AP1R<n>_EL2`: the active priorities of each group.
    pub(crate) active_priorities: [[u32; 4]; 2],
    /// `ICH_LR<n>_EL2`: the first `used` of them.
    pub(crate) lists: [u64; MAX_LISTS],
    /// ICH_HCR_EL2.
    pub(crate) control: u64,
    /// List registers that are in use.
    pub(crate) used: u64,
    /// List registers that were filled with what a latch held, as bits.
    latched: u32,
    /// List registers that were filled with what was active, as bits.
    was_active: u32,
    /// SPIs that this vCPU holds.
    held: [u32; SPI_BANKS],
    /// The INTID of the physical interrupt that stands behind the timer's: it is kept active as long as the virtual one is
    /// pending or active, and deactivated with it, so that it comes again if the timer still asks. Or 0.
    pub(crate) timer: u32,
    /// Zero: the size is a multiple of 8.
    pub(crate) reserved: u32,
    /// Bits of a priority that can decide on preemption: 5 to 7.
    pub(crate) preemption_bits: u32,
}

impl Interface {
    /// ICH_VMCR_EL2 has the priority mask in bits 31:24, the binary points of groups 0 and 1 in 23:21 and 20:18, CBPR in bit 4,
    /// and the groups' enable bits in 1:0.
    fn group_enabled(&self, group: u32) -> bool {
        self.vmcr >> group & 1 != 0
    }

    /// The part of a priority that decides on preemption, by the binary point of its group (IHI 0069 section 4.8.2).
    fn group_priority(&self, priority: u8, group: u32) -> u8 {
        let common = self.vmcr >> 4 & 1 != 0;
        let lowest = if group == 0 || common { (self.vmcr >> 21 & 7) + 1 } else { self.vmcr >> 18 & 7 };
        (u16::from(priority) >> lowest << lowest) as u8
    }

    /// The running priority: the lowest bit that is set in the active priorities, of which there is one for each group
    /// priority that the CPU tells apart (IHI 0069 section 12.4.3).
    fn running_priority(&self) -> Option<u8> {
        let [zero, one] = self.active_priorities;
        let mut words = (0u32..).zip(zero.iter().zip(one).map(|(zero, one)| zero | one));
        let (number, word) = words.find(|(_, word)| *word != 0)?;
        Some(((32 * number + word.trailing_zeros()) << 8u32.saturating_sub(self.preemption_bits)) as u8)
    }

    /// Whether the guest would be interrupted, were its exceptions not masked, by a pending interrupt.
    fn takes(&self, priority: u8, group: u32) -> bool {
        let mask = (self.vmcr >> 24) as u8;
        self.group_enabled(group)
            && priority < mask
            && self
                .running_priority()
                .is_none_or(|running| self.group_priority(priority, group) < self.group_priority(running, group))
    }

    /// The banks that vCPU `cpu` sees, with the number of each.
    fn banks(gic: &Distributor, cpu: usize) -> impl Iterator<Item = (usize, &Bank)> {
        gic.private(cpu).into_iter().chain(&gic.spis).enumerate()
    }

    /// Whether the vCPU `cpu`, which waits with nothing in its list registers, has an interrupt to wait no longer for; or one
    /// to let go of, since another vCPU has made it inactive.
    pub fn wants(&self, gic: &Distributor, cpu: usize) -> bool {
        let groups = gic.groups();
        if gic.spis.iter().zip(self.held).any(|(bank, held)| held & !bank.active.load(SeqCst) != 0) {
            return true;
        }
        Self::banks(gic, cpu).any(|(number, bank)| {
            let ready = bank.ready(groups) & !bank.active.load(SeqCst);
            bits(ready).any(|bit| {
                let mine = match number.checked_sub(1) {
                    None => true,
                    Some(index) => {
                        let intid = 32 * number + bit;
                        self.holds(index, bit) || gic.holder(intid).is_none() && gic.target(intid) == Some(cpu)
                    }
                };
                mine && self.takes(bank.priority(bit), bank.group.load(SeqCst) >> bit & 1)
            })
        })
    }

    fn holds(&self, index: usize, bit: usize) -> bool {
        self.held.get(index).is_some_and(|word| word >> bit & 1 != 0)
    }

    fn set_held(&mut self, index: usize, bit: usize, held: bool) {
        if let Some(word) = self.held.get_mut(index) {
            *word = *word & !(1 << bit) | u32::from(held) << bit;
        }
    }

    /// Fills up to `count` list registers, all of which are empty, with the interrupts of vCPU `cpu`.
    pub fn fill(&mut self, gic: &Distributor, cpu: usize, count: usize, notices: &mut Notices) {
        self.let_go(gic, cpu, notices);
        self.control = if gic.cpus() > 1 { ENABLE | TRAP_DEACTIVATION } else { ENABLE };
        let mut busy = Self::banks(gic, cpu).filter(|(_, bank)| !bank.is_quiet());
        if let Some(first) = busy.next() {
            self.fill_from(core::iter::once(first).chain(busy), gic, cpu, count, notices);
        }
    }

    /// Fills list registers with the interrupts of these banks.
    fn fill_from<'a>(
        &mut self,
        banks: impl Iterator<Item = (usize, &'a Bank)>,
        gic: &Distributor,
        cpu: usize,
        count: usize,
        notices: &mut Notices,
    ) {
        let groups = gic.groups();
        let (mut pending, mut active) = (Best::default(), Best::default());
        for (number, bank) in banks {
            let (is_ready, is_active) = (bank.ready(groups), bank.active.load(SeqCst));
            let untold = number.checked_sub(1).and_then(|index| notices.ended.get(index)).copied().unwrap_or(0);
            for bit in bits((is_ready | is_active) & !untold) {
                let intid = 32 * number + bit;
                if let Some(index) = number.checked_sub(1) {
                    if !self.holds(index, bit) {
                        if !gic.hold(cpu, intid) {
                            continue;
                        }
                        self.set_held(index, bit, true);
                    }
                }
                let candidate = Candidate { priority: bank.priority(bit), intid: intid as u8 };
                if is_active >> bit & 1 != 0 {
                    active.add(candidate);
                } else {
                    pending.add(candidate);
                }
            }
        }
        let count = count.min(MAX_LISTS);
        let first = pending.count.min(1);
        let from_active = active.count.min(count.saturating_sub(first));
        let from_pending = pending.count.min(count.saturating_sub(from_active));
        if pending.more || from_pending < pending.count {
            self.control |= TELL_NONE_PENDING;
        }
        if active.more || from_active < active.count {
            self.control |= TELL_COUNTED | TRAP_DEACTIVATION;
        }
        let chosen = pending.taken().iter().take(from_pending).chain(active.taken().iter().take(from_active));
        for candidate in chosen {
            self.put(gic, cpu, *candidate, groups, notices);
        }
    }

    /// Puts an interrupt into the next list register.
    fn put(&mut self, gic: &Distributor, cpu: usize, candidate: Candidate, groups: u32, notices: &mut Notices) {
        let intid = usize::from(candidate.intid);
        let Some((bank, bit)) = gic.find(cpu, intid) else { return };
        let edge = bank.edge.load(SeqCst) & bit != 0;
        let mut is_active = bank.active.load(SeqCst) & bit != 0;
        // Whoever has made it inactive until now has found it so, since nothing was in a list register, or has not seen yet what
        // was last in one.
        if bank.take_retired(bit) != 0 && is_active {
            Self::end(gic, cpu, intid, notices);
            is_active = false;
            if !edge {
                return;
            }
        }
        let mut value = u64::from(candidate.intid) | u64::from(candidate.priority) << 48;
        let mut latched = false;
        if bank.group.load(SeqCst) & bit != 0 {
            value |= GROUP1;
        }
        if is_active {
            value |= ACTIVE;
        }
        if intid == GIC_TIMER_PPI as usize && self.timer != 0 {
            value |= PHYSICAL | u64::from(self.timer) << PHYSICAL_SHIFT;
        } else if !edge {
            value |= TELL_END;
        }
        if bank.ready(groups) & bit != 0 && (edge || !is_active) {
            // The latch goes with the interrupt. It may have been cleared this moment.
            latched = bank.latch.fetch_and(!bit, SeqCst) & bit != 0;
            if latched || !edge {
                value |= PENDING;
            }
        }
        if value & (PENDING | ACTIVE) == 0 {
            return;
        }
        let Some(slot) = self.lists.get_mut(self.used as usize) else { return };
        *slot = value;
        self.latched |= u32::from(latched) << self.used;
        self.was_active |= u32::from(is_active) << self.used;
        self.used += 1;
    }

    /// Takes what the CPU has made of the list registers, which are empty then, and lets go of SPIs that are neither pending
    /// nor active.
    pub fn fold(&mut self, gic: &Distributor, cpu: usize, notices: &mut Notices) {
        if self.used != 0 || self.control & COUNT != 0 {
            self.fold_some(gic, cpu, notices);
        }
        self.let_go(gic, cpu, notices);
    }

    /// Takes what the CPU has made of list registers that are in use, or counted.
    fn fold_some(&mut self, gic: &Distributor, cpu: usize, notices: &mut Notices) {
        let mut listed = [0u32; SPI_BANKS + 1];
        for (index, list) in (0..).zip(&mut self.lists).take(self.used as usize) {
            let value = core::mem::take(list);
            let intid = (value & 0xff) as usize;
            let Some((bank, bit)) = gic.find(cpu, intid) else { continue };
            if let Some(word) = listed.get_mut(intid / 32) {
                *word |= bit;
            }
            // Only what has changed: others may have set or cleared the bit meanwhile.
            match (self.was_active >> index & 1 != 0, value & ACTIVE != 0) {
                (false, true) => _ = bank.active.fetch_or(bit, SeqCst),
                (true, false) => _ = bank.active.fetch_and(!bit, SeqCst),
                _ => {}
            }
            if value & PENDING != 0 && self.latched >> index & 1 != 0 {
                bank.latch.fetch_or(bit, SeqCst);
            }
            if bank.take_retired(bit) != 0 && value & ACTIVE != 0 {
                Self::end(gic, cpu, intid, notices);
            }
            if value & (TELL_END | PHYSICAL) == TELL_END && value & (PENDING | ACTIVE) == 0 {
                notices.add_end(intid);
            }
        }
        // With EOImode 1, what is counted may be the drop of a priority, and deactivations are trapped.
        let counted = if self.vmcr & EOI_MODE == 0 { (self.control & COUNT) >> COUNT_SHIFT } else { 0 };
        for _ in 0..counted {
            self.end_unlisted(gic, cpu, &listed, notices);
        }
        (self.used, self.latched, self.was_active) = (0, 0, 0);
        self.control &= !COUNT;
    }

    /// Of the interrupts that are active but not in a list register, ends the one with the best priority: the guest has.
    fn end_unlisted(&mut self, gic: &Distributor, cpu: usize, listed: &[u32], notices: &mut Notices) {
        let mut best: Option<(u8, usize)> = None;
        for ((number, bank), listed) in Self::banks(gic, cpu).zip(listed) {
            for bit in bits(bank.active.load(SeqCst) & !listed) {
                let mine = number.checked_sub(1).is_none_or(|index| self.holds(index, bit));
                let priority = bank.priority(bit);
                if mine && best.is_none_or(|(least, _)| priority < least) {
                    best = Some((priority, 32 * number + bit));
                }
            }
        }
        if let Some((_, intid)) = best {
            Self::end(gic, cpu, intid, notices);
        }
    }

    fn end(gic: &Distributor, cpu: usize, intid: usize, notices: &mut Notices) {
        let Some((bank, bit)) = gic.find(cpu, intid) else { return };
        if bank.active.fetch_and(!bit, SeqCst) & !bank.edge.load(SeqCst) & bit != 0 {
            notices.add_end(intid);
        }
    }

    /// The guest on vCPU `cpu` has written `value` to ICC_DIR_EL1, which is trapped. List registers are folded.
    pub fn deactivate(&mut self, gic: &Distributor, cpu: usize, value: u64, notices: &mut Notices) {
        let intid = (value & 0xff_ffff) as usize;
        // Without EOImode 1, the write means nothing.
        if self.vmcr & EOI_MODE == 0 || intid >= INTIDS {
            return;
        }
        match gic.holder(intid) {
            // An SPI that another vCPU has in its list registers, if it runs, and lets go of.
            Some(holder) if holder != cpu => {
                let Some((bank, bit)) = gic.find(cpu, intid) else { return };
                if bank.active.load(SeqCst) & !bank.edge.load(SeqCst) & bit != 0 {
                    notices.add_end_elsewhere(intid);
                } else {
                    if bank.deactivate(bit) & !bank.edge.load(SeqCst) != 0 {
                        notices.add_end(intid);
                    }
                    notices.add_wake(holder);
                }
            }
            _ => {
                Self::end(gic, cpu, intid, notices);
                self.let_go(gic, cpu, notices);
            }
        }
    }

    /// All that is in `told` has been told, and the lines of what has ended are what the devices want now. Adds to `notices` who is
    /// to be woken for that.
    pub fn told(&mut self, gic: &Distributor, cpu: usize, told: &Notices, notices: &mut Notices) {
        for (index, (bank, elsewhere)) in gic.spis.iter().zip(told.elsewhere).enumerate() {
            if elsewhere != 0 {
                bank.deactivate(elsewhere);
                for bit in bits(elsewhere) {
                    if let Some(holder) = gic.holder(FIRST_SPI + 32 * index + bit) {
                        notices.add_wake(holder);
                    }
                }
            }
        }
        self.let_go(gic, cpu, notices);
    }

    /// Lets go of SPIs that are not active, and whose end need not be told.
    #[inline]
    fn let_go(&mut self, gic: &Distributor, cpu: usize, notices: &mut Notices) {
        if self.held.iter().fold(0, |all, word| all | word) != 0 {
            self.let_go_of_some(gic, cpu, notices);
        }
    }

    fn let_go_of_some(&mut self, gic: &Distributor, cpu: usize, notices: &mut Notices) {
        for (index, bank) in gic.spis.iter().enumerate() {
            let held = self.held.get(index).copied().unwrap_or(0);
            if held == 0 {
                continue;
            }
            let untold = notices.ended.get(index).copied().unwrap_or(0);
            for bit in bits(held & !bank.active.load(SeqCst) & !untold) {
                let intid = FIRST_SPI + 32 * index + bit;
                gic.let_go(intid);
                self.set_held(index, bit, false);
                // Who made it pending before this may have told us, and nobody else.
                if bank.pending() >> bit & 1 != 0 {
                    if let Some(target) = gic.target(intid).filter(|target| *target != cpu) {
                        notices.add_wake(target);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
