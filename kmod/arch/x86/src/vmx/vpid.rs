// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! Virtual-processor identifiers: which one a vCPU uses on a CPU, and whether what the CPU has cached under it is still good.
//!
//! VPIDs come from the top of the range, since KVM hands them out from the bottom: the two can share a CPU without a flush at
//! each change. What is cached survives VMXOFF, so an identifier is flushed whenever it is handed out.

/// How many VPIDs are ours: the last ones.
const COUNT: u16 = 256;

/// The VPIDs of one CPU.
///
/// # Invariants
/// `used <= COUNT`; exactly the first `used` VPIDs from the top have been handed out in `generation`.
#[derive(Debug)]
pub(crate) struct VpidAllocator {
    generation: u64,
    used: u16,
}

/// The VPID that a vCPU got, and where.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Assignment {
    cpu: usize,
    /// 0: none. Generations of an allocator start at 1.
    generation: u64,
    vpid: u16,
}

/// What goes into the next entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// The VPID, never 0.
    pub(crate) vpid: u16,
    /// It is fresh: nothing that the CPU has cached under it may be used.
    pub(crate) fresh: bool,
}

impl VpidAllocator {
    /// All VPIDs are free.
    pub(crate) const fn new() -> Self {
        Self { generation: 1, used: 0 }
    }

    /// Forgets all assignments.
    pub(crate) fn invalidate(&mut self) {
        self.generation = self.generation.wrapping_add(1);
        // INVARIANT: none of the new generation has been handed out.
        self.used = 0;
    }

    /// Prepares an entry on this CPU, number `cpu`, for a vCPU that last entered as `last` says.
    pub(crate) fn enter(&mut self, cpu: usize, last: &mut Assignment) -> Entry {
        if last.cpu == cpu && last.generation == self.generation {
            return Entry { vpid: last.vpid, fresh: false };
        }
        if self.used >= COUNT {
            self.invalidate();
        }
        let vpid = u16::MAX.wrapping_sub(self.used);
        // INVARIANT: `vpid` is handed out now; below `COUNT` by the test above.
        self.used = self.used.wrapping_add(1);
        *last = Assignment { cpu, generation: self.generation, vpid };
        Entry { vpid, fresh: true }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    #[test]
    fn a_vcpu_keeps_its_vpid_until_it_moves() {
        let mut cpus = [VpidAllocator::new(), VpidAllocator::new()];
        let mut a = Assignment::default();
        assert_eq!(cpus[0].enter(0, &mut a), Entry { vpid: 0xffff, fresh: true });
        assert_eq!(cpus[0].enter(0, &mut a), Entry { vpid: 0xffff, fresh: false });
        assert_eq!(cpus[1].enter(1, &mut a), Entry { vpid: 0xffff, fresh: true });
        assert_eq!(cpus[0].enter(0, &mut a), Entry { vpid: 0xfffe, fresh: true }, "back: what it left may be stale");
    }

    #[test]
    fn nobody_uses_anothers_vpid_without_a_flush() {
        let mut cpu = VpidAllocator::new();
        let mut vcpus = [Assignment::default(); 300];
        // Who has something cached under a VPID.
        let mut owner = BTreeMap::new();
        for round in 0..4 {
            for (number, vcpu) in vcpus.iter_mut().enumerate() {
                let entry = cpu.enter(0, vcpu);
                assert!(entry.vpid >= u16::MAX - (COUNT - 1));
                if entry.fresh {
                    owner.insert(entry.vpid, number);
                }
                assert_eq!(owner.get(&entry.vpid), Some(&number), "round {round}");
            }
        }
    }

    #[test]
    fn invalidation_takes_every_vpid_back() {
        let mut cpu = VpidAllocator::new();
        let mut a = Assignment::default();
        cpu.enter(0, &mut a);
        cpu.invalidate();
        assert!(cpu.enter(0, &mut a).fresh);
    }
}
