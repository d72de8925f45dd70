// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! A physical interrupt that an exit has taken from the CPU's local APIC, and that the host has still to see (SDM vol. 3
//! section 28.2.2, "acknowledge interrupt on exit"). It belongs to the CPU, not to the vCPU: whatever becomes of that, the
//! interrupt must reach its handler.

use core::arch::global_asm;

use crate::hal::X86Hal;
use crate::switch::function_return;

/// The interrupt.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a device waits for it"]
pub struct HostInterrupt(u8);

impl HostInterrupt {
    /// Takes the one that waits on this CPU, if one does. Preemption is off, and a vCPU exists.
    pub fn take<H: X86Hal>() -> Option<Self> {
        // SAFETY: Preemption is off, so the record is this CPU's, and nobody else uses it until it is on again.
        unsafe { H::per_cpu().as_mut() }.host_interrupt.take().map(Self)
    }

    /// Calls the handler, as the interrupt would have. Interrupts are on when it returns.
    ///
    /// # Safety
    /// At CPL 0 with interrupts off that may go on, and the host's state loaded, with an IDT.
    pub unsafe fn deliver(self) {
        // SAFETY: The caller's promise; the vector came from the local APIC, so the host has a handler for it.
        unsafe { deliver(self.0.into()) }
    }
}

extern "C" {
    /// Raises interrupt `vector`, of 32 to 255, with RFLAGS.IF set: a handler of Linux' looks whether what it has interrupted had
    /// interrupts on, and leaves work undone if not. The shadow of STI covers INT, so nothing comes between.
    #[link_name = "axvcpu_deliver_interrupt"]
    fn deliver(vector: u32);
}

// INT has its vector in the instruction, so there is one for each: leaves of a tree, which needs no indirect branch.
global_asm!(
    ".pushsection .text, \"ax\"",
    ".macro axvcpu_interrupts low, count",
    ".if (\\count) > 1",
    "cmp edi, (\\low)+(\\count)/2",
    "jae .Laxvcpu_interrupts_\\@",
    "axvcpu_interrupts ((\\low)),((\\count)/2)",
    ".Laxvcpu_interrupts_\\@:",
    "axvcpu_interrupts ((\\low)+(\\count)/2),((\\count)/2)",
    ".else",
    "sti",
    "int (\\low)",
    "jmp 9f",
    ".endif",
    ".endm",
    ".balign 16",
    ".global axvcpu_deliver_interrupt",
    ".type axvcpu_deliver_interrupt, @function",
    "axvcpu_deliver_interrupt:",
    "push rbp",
    "mov rbp, rsp",
    "cmp edi, 128",
    "jae 2f",
    "cmp edi, 64",
    "jae 3f",
    "axvcpu_interrupts 32,32",
    "3:",
    "axvcpu_interrupts 64,64",
    "2:",
    "axvcpu_interrupts 128,128",
    "9:",
    "pop rbp",
    function_return!(),
    ".size axvcpu_deliver_interrupt, . - axvcpu_deliver_interrupt",
    ".purgem axvcpu_interrupts",
    ".popsection",
);
