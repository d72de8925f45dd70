// SPDX-License-Identifier: MIT OR Apache-2.0
//! The table of assembled guests: each case is a few instructions, an initial state, and the exits and registers that
//! must come of them. The cases are the same for every backend.

mod allocation;
mod apic;
mod clock;
mod control;
mod cpuid;
mod delivery;
mod dirty;
mod eventfds;
mod events;
mod fpu;
mod host_memory;
mod hostile;
mod instructions;
mod interrupts;
mod io;
mod ipi;
mod memory;
mod mmio;
mod modes;
mod msr;
mod programs;
mod promptness;
mod registers;
mod smp;
mod spaces;
mod speculation;
mod stale;
mod threads;
mod x2apic;

use crate::harness::Case;

/// Every case.
pub fn cases() -> Vec<Case> {
    [
        modes::cases(),
        registers::cases(),
        control::cases(),
        io::cases(),
        mmio::cases(),
        cpuid::cases(),
        msr::cases(),
        speculation::cases(),
        instructions::cases(),
        events::cases(),
        interrupts::cases(),
        apic::cases(),
        delivery::cases(),
        ipi::cases(),
        eventfds::cases(),
        fpu::cases(),
        hostile::cases(),
        memory::cases(),
        stale::cases(),
        host_memory::cases(),
        dirty::cases(),
        clock::cases(),
        spaces::cases(),
        threads::cases(),
        promptness::cases(),
        smp::cases(),
        allocation::cases(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

#[cfg(test)]
mod tests {
    use crate::harness::Only;

    #[test]
    fn every_difference_is_explained() {
        let document = include_str!("../../../docs/differences.md");
        for case in super::cases().iter().filter(|case| case.only == Some(Only::Differs)) {
            assert!(document.contains(&format!("`{}`", case.name)), "docs/differences.md lacks {}", case.name);
        }
    }

    #[test]
    fn names_are_unique_and_many() {
        let mut names: Vec<_> = super::cases().iter().map(|case| case.name).collect();
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count);
        assert!(count >= 40, "{count} cases");
    }
}
