// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! Bits of the VMCB's control fields: what is intercepted, and the virtual interrupt (APM vol. 2 appendix B, table B-1).

/// Bits of [`Vmcb::intercept1`](super::Vmcb::intercept1).
pub(crate) mod intercept1 {
    pub(crate) const INTR: u32 = 1 << 0;
    pub(crate) const NMI: u32 = 1 << 1;
    pub(crate) const SMI: u32 = 1 << 2;
    pub(crate) const INIT: u32 = 1 << 3;
    pub(crate) const VINTR: u32 = 1 << 4;
    pub(crate) const CR0_SELECTIVE: u32 = 1 << 5;
    pub(crate) const RDPMC: u32 = 1 << 15;
    pub(crate) const CPUID: u32 = 1 << 18;
    pub(crate) const RSM: u32 = 1 << 19;
    pub(crate) const IRET: u32 = 1 << 20;
    pub(crate) const INVD: u32 = 1 << 22;
    pub(crate) const PAUSE: u32 = 1 << 23;
    pub(crate) const HLT: u32 = 1 << 24;
    pub(crate) const INVLPGA: u32 = 1 << 26;
    pub(crate) const IOIO: u32 = 1 << 27;
    pub(crate) const MSR: u32 = 1 << 28;
    pub(crate) const TASK_SWITCH: u32 = 1 << 29;
    pub(crate) const FERR_FREEZE: u32 = 1 << 30;
    pub(crate) const SHUTDOWN: u32 = 1 << 31;
}

/// Bits of [`Vmcb::intercept2`](super::Vmcb::intercept2).
pub(crate) mod intercept2 {
    pub(crate) const VMRUN: u32 = 1 << 0;
    pub(crate) const VMMCALL: u32 = 1 << 1;
    pub(crate) const VMLOAD: u32 = 1 << 2;
    pub(crate) const VMSAVE: u32 = 1 << 3;
    pub(crate) const STGI: u32 = 1 << 4;
    pub(crate) const CLGI: u32 = 1 << 5;
    pub(crate) const SKINIT: u32 = 1 << 6;
    pub(crate) const RDTSCP: u32 = 1 << 7;
    pub(crate) const WBINVD: u32 = 1 << 9;
    pub(crate) const MONITOR: u32 = 1 << 10;
    pub(crate) const MWAIT: u32 = 1 << 11;
    pub(crate) const MWAIT_ARMED: u32 = 1 << 12;
    pub(crate) const XSETBV: u32 = 1 << 13;
    pub(crate) const RDPRU: u32 = 1 << 14;
}

/// Bits of [`Vmcb::intercept3`](super::Vmcb::intercept3).
pub(crate) mod intercept3 {
    pub(crate) const INVLPGB: u32 = 1 << 0;
    pub(crate) const INVLPGB_ILLEGAL: u32 = 1 << 1;
    pub(crate) const INVPCID: u32 = 1 << 2;
    pub(crate) const MCOMMIT: u32 = 1 << 3;
    pub(crate) const TLBSYNC: u32 = 1 << 4;
}

/// Bits of [`Vmcb::int_control`](super::Vmcb::int_control).
pub(crate) mod int_control {
    /// V_TPR: the guest's CR8, in the low 8 bits.
    pub(crate) const TPR: u32 = 0xf;
    /// V_IRQ: a virtual interrupt is pending.
    pub(crate) const IRQ: u32 = 1 << 8;
    /// V_INTR_PRIO, at its highest.
    pub(crate) const PRIORITY_MAX: u32 = 0xf << 16;
    /// V_IGN_TPR: the virtual interrupt does not mind V_TPR.
    pub(crate) const IGNORE_TPR: u32 = 1 << 20;
    /// V_INTR_MASKING: the guest's IF and CR8 concern virtual interrupts, the host's IF physical ones.
    pub(crate) const MASKING: u32 = 1 << 24;
}
