// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! What is done so that guests, and guest and host, learn nothing of each other by the CPU's speculation: Linux' own decisions
//! for KVM's guests, from the flags that it leaves to modules ([`HostFlags`]), and ours where it tells modules nothing.
//!
//! What Linux does besides needs nothing here. VERW for MMIO stale data alone (`X86_FEATURE_CLEAR_CPU_BUF_VM_MMIO`) concerns
//! guests that reach the host's devices; memory of guests comes from `get_user_pages`, which gives RAM only. TSA is part of
//! `X86_FEATURE_CLEAR_CPU_BUF_VM`, VMSCAPE of `X86_FEATURE_IBPB_EXIT_TO_USER`; against GDS, SRBDS and RFDS beyond VERW it is
//! microcode that helps, and against ITS how the kernel is compiled.

/// What Linux has found out about the host's CPU and decided: bits of which each is a flag of its own (Linux:
/// arch/x86/include/asm/cpufeatures.h).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostFlags(pub u32);

impl HostFlags {
    /// `X86_FEATURE_CLEAR_CPU_BUF_VM`.
    pub const CLEAR_CPU_BUF_VM: u32 = 1 << 0;
    /// `X86_FEATURE_RSB_VMEXIT` or `X86_FEATURE_RSB_VMEXIT_LITE`.
    pub const RSB_VMEXIT: u32 = 1 << 1;
    /// `X86_FEATURE_UNRET`.
    pub const UNRET: u32 = 1 << 2;
    /// `X86_FEATURE_IBPB_ON_VMEXIT`.
    pub const IBPB_ON_VMEXIT: u32 = 1 << 3;
    /// `X86_FEATURE_IBPB_EXIT_TO_USER`.
    pub const IBPB_EXIT_TO_USER: u32 = 1 << 4;
    /// `X86_FEATURE_CLEAR_BHB_VMEXIT`. Not set where the CPU's own control does it (`X86_FEATURE_CLEAR_BHB_HW`).
    pub const CLEAR_BHB_VMEXIT: u32 = 1 << 5;
    /// `X86_FEATURE_KERNEL_IBRS`: the kernel sets SPEC_CTRL.IBRS whenever it is entered.
    pub const KERNEL_IBRS: u32 = 1 << 6;
    /// `X86_BUG_L1TF`.
    pub const L1TF: u32 = 1 << 7;
    /// `ARCH_CAP_SKIP_VMENTRY_L1DFLUSH`: the hypervisor below flushes the L1 data cache.
    pub const SKIP_L1D_FLUSH: u32 = 1 << 8;
    /// `cpu_mitigations_off()`: the host's owner wants none.
    pub const MITIGATIONS_OFF: u32 = 1 << 9;
    /// Threads of a core share its L1 data cache, and more than one of them is in use.
    pub const SMT_ACTIVE: u32 = 1 << 10;
    /// `X86_BUG_ITLB_MULTIHIT`.
    pub const ITLB_MULTIHIT: u32 = 1 << 11;

    const fn has(self, flag: u32) -> bool {
        self.0 & flag != 0
    }
}

/// When the L1 data cache is flushed, which a guest could read on CPUs with L1 terminal fault (CVE-2018-3646): the translation
/// of a guest's page table entry that is not present is used speculatively as a host physical address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum L1dFlush {
    /// Never.
    #[default]
    Never,
    /// Before the first entry after the host has had its interrupts on, and so may have run anything. From there to the next such
    /// time only this vCPU's own state is handled. Linux' `l1tf=flush` lets more pass between two flushes.
    AfterHost,
    /// Before each entry.
    Always,
}

impl L1dFlush {
    /// What the host needs if its owner has chosen `level` (the module's parameter `l1d_flush`): 0 for never, 1 for
    /// [`AfterHost`](Self::AfterHost), more for [`Always`](Self::Always). Linux' own choice (`l1tf=`) is kept from modules.
    fn new(host: HostFlags, level: u32) -> Self {
        if !host.has(HostFlags::L1TF) || host.has(HostFlags::SKIP_L1D_FLUSH) || host.has(HostFlags::MITIGATIONS_OFF) {
            return Self::Never;
        }
        match level {
            0 => Self::Never,
            1 => Self::AfterHost,
            _ => Self::Always,
        }
    }
}

/// Measures against speculative execution attacks, and one against a guest that would stop the machine. The default is all that a
/// host need not know of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mitigations {
    /// Clear the CPU's buffers by VERW before each entry.
    pub clear_buffers: bool,
    /// Refill the return stack buffer after each exit.
    pub refill_rsb: bool,
    /// Indirect branch prediction barrier when a CPU goes from one vCPU to another (Linux: `switch_vcpu_ibpb`, of which modules
    /// are not told: always).
    pub branch_barrier: bool,
    /// Make the CPU forget return predictions that the guest has trained, after each exit, by the kernel's own
    /// `entry_untrain_ret`. Not part of the default, as the routine exists only where it is needed.
    pub untrain_returns: bool,
    /// Indirect branch prediction barrier after each exit.
    pub barrier_at_exit: bool,
    /// Indirect branch prediction barrier before userspace runs on a CPU that ran a guest.
    pub barrier_before_user: bool,
    /// Clear the branch history after each exit, on VMX: no other CPU has the fault (Linux: `X86_BUG_BHI`).
    pub clear_history: bool,
    /// Write SPEC_CTRL after each exit even if the guest has the host's value: legacy IBRS restricts predictions that were made
    /// before the write.
    pub rewrite_spec_ctrl: bool,
    /// When to flush the L1 data cache.
    pub flush_l1d: L1dFlush,
    /// Have code in leaves of 4 KiB only, on VMX (iTLB multihit, CVE-2018-12207): the condition of KVM's parameter
    /// `nx_huge_pages` where it is left to itself.
    pub small_code: bool,
}

impl Mitigations {
    /// What `host` needs; `l1d_flush` as in the module's parameter of that name.
    pub fn new(host: HostFlags, l1d_flush: u32) -> Self {
        Self {
            clear_buffers: host.has(HostFlags::CLEAR_CPU_BUF_VM),
            refill_rsb: host.has(HostFlags::RSB_VMEXIT),
            branch_barrier: true,
            untrain_returns: host.has(HostFlags::UNRET),
            barrier_at_exit: host.has(HostFlags::IBPB_ON_VMEXIT),
            barrier_before_user: host.has(HostFlags::IBPB_EXIT_TO_USER),
            clear_history: host.has(HostFlags::CLEAR_BHB_VMEXIT),
            rewrite_spec_ctrl: host.has(HostFlags::KERNEL_IBRS),
            flush_l1d: L1dFlush::new(host, l1d_flush),
            small_code: host.has(HostFlags::ITLB_MULTIHIT) && !host.has(HostFlags::MITIGATIONS_OFF),
        }
    }

    /// Whether a guest can read the L1 data cache all the same, from another thread of the core.
    pub fn leaves_l1d_to_siblings(host: HostFlags) -> bool {
        host.has(HostFlags::L1TF) && host.has(HostFlags::SMT_ACTIVE)
    }
}

impl Default for Mitigations {
    fn default() -> Self {
        Self::new(HostFlags(HostFlags::CLEAR_CPU_BUF_VM | HostFlags::RSB_VMEXIT | HostFlags::CLEAR_BHB_VMEXIT), 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One flag of the host, and what follows from it alone.
    type Consequence = (u32, fn(&mut Mitigations));

    /// Of a host that needs nothing.
    const NOTHING: Mitigations = Mitigations {
        clear_buffers: false,
        refill_rsb: false,
        branch_barrier: true,
        untrain_returns: false,
        barrier_at_exit: false,
        barrier_before_user: false,
        clear_history: false,
        rewrite_spec_ctrl: false,
        flush_l1d: L1dFlush::Never,
        small_code: false,
    };

    #[test]
    fn each_flag_has_its_own_consequence() {
        let consequences: [Consequence; 12] = [
            (HostFlags::CLEAR_CPU_BUF_VM, |m| m.clear_buffers = true),
            (HostFlags::RSB_VMEXIT, |m| m.refill_rsb = true),
            (HostFlags::UNRET, |m| m.untrain_returns = true),
            (HostFlags::IBPB_ON_VMEXIT, |m| m.barrier_at_exit = true),
            (HostFlags::IBPB_EXIT_TO_USER, |m| m.barrier_before_user = true),
            (HostFlags::CLEAR_BHB_VMEXIT, |m| m.clear_history = true),
            (HostFlags::KERNEL_IBRS, |m| m.rewrite_spec_ctrl = true),
            (HostFlags::L1TF, |m| m.flush_l1d = L1dFlush::AfterHost),
            (HostFlags::SMT_ACTIVE, |_| {}),
            (HostFlags::ITLB_MULTIHIT, |m| m.small_code = true),
            (HostFlags::ITLB_MULTIHIT | HostFlags::MITIGATIONS_OFF, |_| {}),
            (0, |_| {}),
        ];
        for (flag, change) in consequences {
            let mut expected = NOTHING;
            change(&mut expected);
            assert_eq!(Mitigations::new(HostFlags(flag), 1), expected, "{flag:#x}");
        }
    }

    #[test]
    fn the_l1d_is_flushed_where_it_leaks_and_as_often_as_wanted() {
        let of = |flags, level| L1dFlush::new(HostFlags(flags), level);
        let levels = [(0, L1dFlush::Never), (1, L1dFlush::AfterHost), (2, L1dFlush::Always), (9, L1dFlush::Always)];
        for (level, expected) in levels {
            assert_eq!(of(HostFlags::L1TF, level), expected);
            for other in [0, HostFlags::SKIP_L1D_FLUSH, HostFlags::MITIGATIONS_OFF] {
                let flags = if other == 0 { 0 } else { HostFlags::L1TF | other };
                assert_eq!(of(flags, level), L1dFlush::Never, "{flags:#x}");
            }
        }
    }

    #[test]
    fn siblings_matter_only_with_the_fault() {
        let leaves = |flags| Mitigations::leaves_l1d_to_siblings(HostFlags(flags));
        assert!(leaves(HostFlags::L1TF | HostFlags::SMT_ACTIVE));
        assert!(!leaves(HostFlags::L1TF) && !leaves(HostFlags::SMT_ACTIVE) && !leaves(0));
    }
}
