// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The run page: 4096 bytes that `mmap` of a vCPU gives, shared by the kernel and the thread that runs the vCPU.
//!
//! The kernel writes the upper part before `RUN` returns and reads the reply fields, once each, when the next `RUN` starts.
//! Nothing in it is trusted: the vCPU's own state lives in the kernel.

use crate::exit::ExitRecord;
use crate::layout::abi_struct;
use crate::x86::{Control, General, Segments};

/// [`RunPage::state`]: an external interrupt injected now would be delivered at once.
pub const STATE_INTERRUPT_WINDOW_OPEN: u32 = 1 << 0;
/// [`RunPage::state`]: [`RunPage::control`] and [`RunPage::segments`] are up to date. They are at exits that need decoding
/// (nested page fault, string I/O).
pub const STATE_SNAPSHOT_VALID: u32 = 1 << 1;
/// [`RunPage::state`]: the guest's CPL is 3.
pub const STATE_USER_MODE: u32 = 1 << 2;

/// [`RunPage::request`]: load [`RunPage::general`] (AArch64: [`RunPage::arm64`]) into the vCPU first. The kernel clears it.
pub const REQUEST_LOAD_GENERAL: u32 = 1 << 0;
/// [`RunPage::request`]: return with [`InterruptWindow`](crate::exit::AxVCpuExitReason::InterruptWindow) as soon as the
/// guest can take an external interrupt. Stays until cleared by the caller. (x86; elsewhere `EINVAL`.)
pub const REQUEST_INTERRUPT_WINDOW: u32 = 1 << 1;

/// [`RunPage::reply`]: refuse the access: the guest gets #GP(0) (x86, system registers), an undefined instruction exception
/// (AArch64, system registers) or a synchronous external abort (AArch64, MMIO).
pub const REPLY_FAULT: u32 = 1 << 0;

abi_struct! {
    /// The run page.
    pub struct RunPage: 4096 {
        /// Why the last `RUN` returned.
        pub exit: ExitRecord,
        /// `STATE_*`.
        pub state: u32,
        /// Number of valid bytes in `insn`: 0 if the CPU gave none.
        pub insn_len: u32,
        /// Instruction bytes at RIP.
        pub insn: [u8; 16],
        /// Address of the next instruction where the CPU told it, otherwise 0.
        pub next_rip: u64,
        /// Zero.
        pub reserved0: [u64; 4],
        /// `REQUEST_*`, written by the caller.
        pub request: u32,
        /// `REPLY_*`, written by the caller to answer a read or write exit; the kernel clears it when it has been used.
        pub reply: u32,
        /// The value read from a port or system register, or the result of a hypercall.
        pub value: u64,
        /// Zero.
        pub reserved1: [u64; 14],
        /// General registers at the exit (x86).
        pub general: General,
        /// Control registers at the exit (x86), if [`STATE_SNAPSHOT_VALID`].
        pub control: Control,
        /// Segments at the exit (x86), if [`STATE_SNAPSHOT_VALID`].
        pub segments: Segments,
        /// General registers at the exit (AArch64).
        pub arm64: crate::arm64::General,
        /// ESR_EL2 of the last exit that was a synchronous exception (AArch64).
        pub esr: u64,
        /// FAR_EL2 of that exit: the guest virtual address of a fault (AArch64).
        pub far: u64,
        /// Zero; room for other architectures.
        pub reserved2: [u64; 398],
    }
}
