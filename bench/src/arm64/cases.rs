// SPDX-License-Identifier: MIT OR Apache-2.0
//! How each row is measured on AArch64: what its guest does. All have an interrupt controller.

use axvcpu_tests::code;
use axvcpu_uapi::client::IoAddress;

use super::guest::{assemble, FAULT_INSTRUCTIONS, INTERRUPT_INSTRUCTIONS, MMIO};
use crate::machine::{Factory, Result};
use crate::measure::Effort;
use crate::rows::Row;
use crate::ways::{self, HUGE_PAGES, SMALL_PAGES};
use crate::work::{Loop, Spinning};

/// Measures a row; `None` if it is none of these.
pub(crate) fn measure(row: Row, device: &dyn Factory, effort: Effort) -> Option<Result<Vec<f64>>> {
    let exits = |work: &Loop| ways::exits(device, effort, true, work);
    Some(match row {
        Row::Hvc => exits(&hvc()),
        Row::IdRead => exits(&id_read()),
        Row::RegisterRefused => exits(&register_refused()),
        Row::Distributor => exits(&distributor()),
        Row::SelfSgi => exits(&self_sgi()),
        Row::VirtualTimer => ways::spinning(device, effort, &timer()),
        Row::WfiWake => ways::wake_by_message(device, effort, &sleeper()),
        Row::WfiIrqfd => ways::wake_by_irqfd(device, effort, &sleeper()),
        Row::Sgi => ways::ipi(device, effort, sgi()),
        Row::IoeventfdMmio => ways::ioeventfd(device, effort, IoAddress::Memory(MMIO), &mmio_write()),
        Row::Fault4k => ways::faults(device, effort, &SMALL_PAGES, &small_pages()),
        Row::Fault2m => ways::faults(device, effort, &HUGE_PAGES, &huge_pages()),
        Row::MmioWrite => exits(&mmio_write()),
        Row::MmioRead => exits(&mmio_read()),
        Row::Hypercall => exits(&hypercall()),
        Row::Life => ways::lives(device, effort, &nothing()),
        Row::KernelMemory => ways::kernel_memory(device, &nothing()),
        _ => return None,
    })
}

/// Code that switches the vCPU's part of the interrupt controller on, with all interrupts up to 63 in group 1 and
/// enabled, and number 40 edge-triggered; and more behind it.
macro_rules! gic {
    ($name:ident, $($line:literal),* $(,)?) => {
        code!(
            $name,
            "mov w9, #2",
            "str w9, [x20]",
            "mov w9, #-1",
            "str w9, [x21, #0x80]",
            "str w9, [x21, #0x100]",
            "str w9, [x20, #0x84]",
            "str w9, [x20, #0x104]",
            "movz w9, #2, lsl #16",
            "str w9, [x20, #0xc08]",
            "mov x9, #0xf0",
            "msr icc_pmr_el1, x9",
            "mov x9, #1",
            "msr icc_igrpen1_el1, x9",
            "isb",
            $($line),*
        )
    };
}

/// PSCI_VERSION.
fn hvc() -> Loop {
    Loop { before: &[], body: code!(hvc, "movz x0, #0x8400, lsl #16", "hvc #0"), instructions: 2 }
}

fn id_read() -> Loop {
    Loop { before: &[], body: code!(id_read, "mrs x0, id_aa64isar0_el1"), instructions: 1 }
}

/// Neither guest has a performance monitor.
fn register_refused() -> Loop {
    Loop { before: &[], body: code!(refused, "mrs x0, pmcr_el0"), instructions: 1 + FAULT_INSTRUCTIONS }
}

/// GICD_TYPER.
fn distributor() -> Loop {
    Loop { before: &[], body: code!(distributor, "ldr w0, [x20, #4]"), instructions: 1 }
}

/// SGI 3 to vCPU 0.
fn self_sgi() -> Loop {
    Loop {
        before: gic!(self_sgi_before, "movz x5, #0x300, lsl #16", "movk x5, #1", "msr daifclr, #2"),
        body: code!(self_sgi, "msr icc_sgi1r_el1, x5"),
        instructions: 1 + INTERRUPT_INSTRUCTIONS,
    }
}

/// The timer is always as far away; X13 counts turns of the inner loop, until the handler changes X14.
fn timer() -> Spinning {
    let before = gic!(timer_before, "movz x11, #0x86a0", "movk x11, #1, lsl #16", "mov x13, #0", "msr daifclr, #2");
    let body = code!(
        timer,
        "mov x12, x14",
        "mrs x9, cntvct_el0",
        "add x9, x9, x11",
        "msr cntv_cval_el0, x9",
        "mov x9, #1",
        "msr cntv_ctl_el0, x9",
        "isb",
        "2: add x13, x13, #1",
        "cmp x14, x12",
        "b.eq 2b",
    );
    let after = code!(timer_after, "mov x14, x13");
    // Seven in a turn, and two that end the loop.
    Spinning { code: assemble(before, body, after), spin: 3, fixed: 7 + 2 + INTERRUPT_INSTRUCTIONS as u64 }
}

/// WFI may end without an interrupt, and then is executed again.
fn sleeper() -> Loop {
    Loop {
        before: gic!(sleeper_before, "mov x12, #0", "msr daifclr, #2"),
        body: code!(sleeper, "2: wfi", "cmp x14, x12", "b.eq 2b", "mov x12, x14"),
        instructions: 0,
    }
}

/// Two vCPUs execute this, and part by their number.
fn sgi() -> &'static [u8] {
    gic!(
        sgi,
        "cbz x19, 3f",
        "mov x12, #0",
        "msr daifclr, #2",
        "2: wfi",
        "cmp x14, x12",
        "b.eq 2b",
        "mov x12, x14",
        "sub x15, x15, #1",
        "cbnz x15, 2b",
        "str wzr, [x28]",
        "3: movz x5, #0x300, lsl #16",
        "movk x5, #2",
        "4: msr icc_sgi1r_el1, x5",
        "sub x15, x15, #1",
        "cbnz x15, 4b",
        "str wzr, [x28]",
    )
}

fn small_pages() -> Loop {
    Loop {
        before: code!(small_before, "mov x25, x23"),
        body: code!(small, "strb wzr, [x25]", "add x25, x25, #1, lsl #12"),
        instructions: 2,
    }
}

fn huge_pages() -> Loop {
    Loop {
        before: code!(huge_before, "mov x25, x24"),
        body: code!(huge, "strb wzr, [x25]", "add x25, x25, #0x200, lsl #12"),
        instructions: 2,
    }
}

fn mmio_write() -> Loop {
    Loop { before: &[], body: code!(mmio_write, "str w0, [x22]"), instructions: 1 }
}

fn mmio_read() -> Loop {
    Loop { before: &[], body: code!(mmio_read, "ldr w0, [x22]"), instructions: 1 }
}

/// A function of an OEM's.
fn hypercall() -> Loop {
    Loop { before: &[], body: code!(hypercall, "movz x0, #0xc300, lsl #16", "hvc #0"), instructions: 2 }
}

/// A guest that ends as soon as it begins.
fn nothing() -> Loop {
    Loop { before: &[], body: &[], instructions: 0 }
}
