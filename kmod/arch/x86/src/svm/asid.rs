// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! Address space identifiers: which one a vCPU uses on a CPU, and what the CPU must flush at the next entry.
//!
//! Nothing is taken for granted about what a CPU or an emulator flushes by itself (APM vol. 2 section 15.16): a vCPU never
//! runs under an ASID that anything else has used on this CPU since the last flush.

/// TLB_CONTROL: nothing (APM vol. 2 table 15-9).
pub(super) const FLUSH_NOTHING: u8 = 0;
/// TLB_CONTROL: every entry of every ASID.
const FLUSH_ALL: u8 = 1;
/// TLB_CONTROL: every entry of this guest's ASID.
const FLUSH_ASID: u8 = 3;

/// The ASIDs of one CPU. ASID 0 is the host's.
///
/// # Invariants
/// `1 <= next`; every ASID below `next` has been handed out in `generation`, none at or above it has.
#[derive(Debug)]
pub(crate) struct AsidAllocator {
    generation: u64,
    next: u32,
    /// First number that is no ASID: CPUID Fn8000_000A_EBX.
    count: u32,
}

/// The ASID that a vCPU got, and where.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Assignment {
    cpu: usize,
    /// 0: none. Generations of an allocator start at 1.
    generation: u64,
    asid: u32,
}

/// What goes into the VMCB for the next entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// The ASID.
    pub(crate) asid: u32,
    /// TLB_CONTROL.
    pub(crate) tlb_control: u8,
}

impl Entry {
    /// Whether the CPU flushes.
    pub(crate) fn flushes(self) -> bool {
        self.tlb_control != FLUSH_NOTHING
    }
}

impl AsidAllocator {
    /// The ASIDs of a CPU with `count` of them, 0 (the host's) included.
    pub(crate) const fn new(count: u32) -> Self {
        // The first request finds the generation exhausted and starts one with a flush.
        Self { generation: 0, next: u32::MAX, count }
    }

    /// Forgets all assignments: somebody else may have used any ASID on this CPU.
    pub(crate) fn invalidate(&mut self) {
        self.next = u32::MAX;
    }

    /// Prepares an entry on this CPU, number `cpu`, for a vCPU that last entered as `last` says. `flush` asks that nothing
    /// cached of its translations be used again; `by_asid` that the CPU can flush one ASID.
    pub(crate) fn enter(&mut self, cpu: usize, last: &mut Assignment, flush: bool, by_asid: bool) -> Entry {
        let exhausted = self.next >= self.count;
        // After `invalidate` the generation still has the old number until it is replaced here, so test for that first.
        let current = last.cpu == cpu && last.generation == self.generation && self.next != u32::MAX;
        if current && !flush {
            return Entry { asid: last.asid, tlb_control: FLUSH_NOTHING };
        }
        if current && by_asid {
            return Entry { asid: last.asid, tlb_control: FLUSH_ASID };
        }
        // A fresh ASID has no translations, which is also how to flush one without flush-by-ASID.
        let tlb_control = if exhausted {
            self.generation = self.generation.wrapping_add(1);
            // INVARIANT: no ASID of the new generation has been handed out.
            self.next = 1;
            FLUSH_ALL
        } else {
            FLUSH_NOTHING
        };
        let asid = self.next;
        // INVARIANT: `asid` is handed out now.
        self.next = self.next.wrapping_add(1);
        *last = Assignment { cpu, generation: self.generation, asid };
        Entry { asid, tlb_control }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;
    use std::vec::Vec;

    #[test]
    fn first_entry_flushes_everything_and_later_ones_nothing() {
        let mut cpu = AsidAllocator::new(8);
        let mut a = Assignment::default();
        assert_eq!(cpu.enter(0, &mut a, false, false), Entry { asid: 1, tlb_control: FLUSH_ALL });
        assert_eq!(cpu.enter(0, &mut a, false, false), Entry { asid: 1, tlb_control: FLUSH_NOTHING });
        assert_eq!(cpu.enter(0, &mut a, true, true), Entry { asid: 1, tlb_control: FLUSH_ASID });
        assert_eq!(cpu.enter(0, &mut a, true, false), Entry { asid: 2, tlb_control: FLUSH_NOTHING });
    }

    #[test]
    fn two_asids_leave_one_for_all_guests() {
        // The least an SVM CPU can have: every change of guest is a full flush.
        let mut cpu = AsidAllocator::new(2);
        let (mut a, mut b) = (Assignment::default(), Assignment::default());
        for _ in 0..3 {
            assert_eq!(cpu.enter(0, &mut a, false, false), Entry { asid: 1, tlb_control: FLUSH_ALL });
            assert_eq!(cpu.enter(0, &mut b, false, false), Entry { asid: 1, tlb_control: FLUSH_ALL });
        }
    }

    #[test]
    fn invalidation_takes_every_asid_back() {
        let mut cpu = AsidAllocator::new(100);
        let mut a = Assignment::default();
        cpu.enter(0, &mut a, false, true);
        cpu.invalidate();
        assert!(cpu.enter(0, &mut a, false, true).tlb_control == FLUSH_ALL);
        cpu.invalidate();
        assert!(cpu.enter(0, &mut a, true, true).tlb_control == FLUSH_ALL);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Enter { cpu: usize, vcpu: usize, flush: bool },
        Foreign { cpu: usize },
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            8 => (0..3usize, 0..5usize, any::<bool>()).prop_map(|(cpu, vcpu, flush)| Step::Enter { cpu, vcpu, flush }),
            1 => (0..3usize).prop_map(|cpu| Step::Foreign { cpu }),
        ];
        prop::collection::vec(step, 1..if cfg!(miri) { 20 } else { 200 })
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            cases: if cfg!(miri) { 4 } else { 500 },
            failure_persistence: None,
            ..ProptestConfig::default()
        })]

        /// Against a model of TLBs that never lose an entry by themselves: no vCPU ever runs with translations in its ASID
        /// that are another guest's, or its own from before a flush or from an earlier visit to the CPU.
        #[test]
        fn nobody_sees_stale_translations(steps in steps(), count in 2u32..6, by_asid in any::<bool>()) {
            let mut cpus: [AsidAllocator; 3] = core::array::from_fn(|_| AsidAllocator::new(count));
            // cpu -> asid -> (vCPU, version of its page tables, visit) whose translations are cached.
            let mut tlbs: [BTreeMap<u32, (usize, u32)>; 3] = Default::default();
            let mut vcpus: [(Assignment, u32, Option<usize>); 5] = Default::default();
            for step in steps {
                match step {
                    Step::Foreign { cpu } => {
                        tlbs[cpu] = (1..count).map(|asid| (asid, (usize::MAX, 0))).collect();
                        cpus[cpu].invalidate();
                    }
                    Step::Enter { cpu, vcpu, flush } => {
                        let (assignment, version, last_cpu) = &mut vcpus[vcpu];
                        // What the vCPU cached on a CPU it has left counts as stale when it returns.
                        if flush || *last_cpu != Some(cpu) {
                            *version += 1;
                        }
                        *last_cpu = Some(cpu);
                        let entry = cpus[cpu].enter(cpu, assignment, flush, by_asid);
                        prop_assert!(entry.asid >= 1 && entry.asid < count);
                        match entry.tlb_control {
                            FLUSH_ALL => tlbs[cpu].clear(),
                            FLUSH_ASID => { tlbs[cpu].remove(&entry.asid); }
                            _ => (),
                        }
                        let cached = *tlbs[cpu].entry(entry.asid).or_insert((vcpu, *version));
                        prop_assert_eq!(cached, (vcpu, *version));
                    }
                }
            }
        }
    }
}
