// SPDX-License-Identifier: MIT OR Apache-2.0
//! How each row is measured on x86: what its guest does.

use axvcpu_tests::code;
use axvcpu_uapi::client::IoAddress;

use super::guest::{assemble, FAULT_INSTRUCTIONS, INTERRUPT_INSTRUCTIONS, MMIO};
use crate::machine::{Factory, Result};
use crate::measure::Effort;
use crate::rows::Row;
use crate::ways::{self, exits, HUGE_PAGES, SMALL_PAGES};
use crate::work::{Loop, Spinning};

/// Measures a row; `None` if it is none of these.
pub(crate) fn measure(row: Row, device: &dyn Factory, effort: Effort) -> Option<Result<Vec<f64>>> {
    Some(match row {
        Row::Cpuid => exits(device, effort, false, &cpuid()),
        Row::MsrRead => exits(device, effort, true, &msr_read()),
        Row::MsrRefused => exits(device, effort, true, &msr_refused()),
        Row::SelfIpi => exits(device, effort, true, &self_ipi()),
        Row::Eoi => exits(device, effort, true, &eoi()),
        Row::DeadlineArm => exits(device, effort, true, &deadline_arm()),
        Row::Deadline => ways::spinning(device, effort, &deadline()),
        Row::HltWake => ways::wake_by_message(device, effort, &sleeper()),
        Row::Irqfd => ways::wake_by_irqfd(device, effort, &sleeper()),
        Row::Ipi => ways::ipi(device, effort, ipi()),
        Row::Ioeventfd => ways::ioeventfd(device, effort, IoAddress::Port(0x80), &out()),
        Row::IoeventfdMmio => ways::ioeventfd(device, effort, IoAddress::Memory(MMIO), &mmio_write()),
        Row::Fault4k => ways::faults(device, effort, &SMALL_PAGES, &small_pages()),
        Row::Fault2m => ways::faults(device, effort, &HUGE_PAGES, &huge_pages()),
        Row::Out => exits(device, effort, false, &out()),
        Row::In => exits(device, effort, false, &input()),
        Row::MmioWrite => exits(device, effort, false, &mmio_write()),
        Row::MmioRead => exits(device, effort, false, &mmio_read()),
        Row::Hypercall => exits(device, effort, false, &hypercall()),
        Row::MsrUser => exits(device, effort, false, &msr_user()),
        Row::Life => ways::lives(device, effort, &nothing()),
        Row::KernelMemory => ways::kernel_memory(device, &nothing()),
        _ => return None,
    })
}

/// Code that switches the local APIC on, in x2APIC mode, and more behind it.
macro_rules! x2apic {
    ($name:ident, $($line:literal),* $(,)?) => {
        code!(
            $name, 64,
            "mov ecx, 0x1b", "rdmsr", "or eax, 0xc00", "wrmsr",
            "mov ecx, 0x80f", "mov eax, 0x1ff", "xor edx, edx", "wrmsr",
            $($line),*
        )
    };
}

fn cpuid() -> Loop {
    Loop { before: &[], body: code!(cpuid, 64, "mov eax, 1", "xor ecx, ecx", "cpuid"), instructions: 3 }
}

fn msr_read() -> Loop {
    Loop { before: code!(msr_read_before, 64, "mov ecx, 0x1b"), body: code!(msr_read, 64, "rdmsr"), instructions: 1 }
}

/// IA32_APIC_BASE has no bit 0.
fn msr_refused() -> Loop {
    Loop {
        before: code!(msr_refused_before, 64, "mov ecx, 0x1b", "mov eax, 1", "xor edx, edx"),
        body: code!(msr_refused, 64, "wrmsr"),
        instructions: 1 + FAULT_INSTRUCTIONS,
    }
}

fn self_ipi() -> Loop {
    Loop {
        before: x2apic!(self_ipi_before, "sti"),
        body: code!(self_ipi, 64, "mov ecx, 0x83f", "mov eax, 0x40", "xor edx, edx", "wrmsr"),
        instructions: 4 + INTERRUPT_INSTRUCTIONS,
    }
}

fn eoi() -> Loop {
    Loop {
        before: x2apic!(eoi_before, "mov ecx, 0x80b", "xor eax, eax"),
        body: code!(eoi, 64, "wrmsr"),
        instructions: 1,
    }
}

/// A deadline that is never reached, and another one each time.
fn deadline_arm() -> Loop {
    Loop {
        before: x2apic!(
            deadline_arm_before,
            "mov ecx, 0x832",
            "mov eax, 0x40040",
            "wrmsr",
            "mov ecx, 0x6e0",
            "mov edx, 0x1000000",
            "xor eax, eax",
        ),
        body: code!(deadline_arm, 64, "wrmsr", "inc eax"),
        instructions: 2,
    }
}

fn out() -> Loop {
    Loop { before: &[], body: code!(out, 64, "out 0x80, al"), instructions: 1 }
}

fn input() -> Loop {
    Loop { before: &[], body: code!(input, 64, "in al, 0x80"), instructions: 1 }
}

fn mmio_write() -> Loop {
    Loop {
        before: code!(mmio_write_before, 64, "mov edi, 0x30000000"),
        body: code!(mmio_write, 64, "mov [rdi], eax"),
        instructions: 1,
    }
}

fn mmio_read() -> Loop {
    Loop {
        before: code!(mmio_read_before, 64, "mov edi, 0x30000000"),
        body: code!(mmio_read, 64, "mov eax, [rdi]"),
        instructions: 1,
    }
}

/// The hypercall that KVM leaves to userspace: about no page at address 0.
fn hypercall() -> Loop {
    const BEFORE: &[u8] = &[];
    let vendor_is_intel = std::fs::read_to_string("/proc/cpuinfo").is_ok_and(|text| text.contains("GenuineIntel"));
    // 16 bytes of page number 1: KVM wants a range that is not empty.
    if vendor_is_intel {
        Loop { before: BEFORE, body: hypercall_intel(), instructions: 5 }
    } else {
        Loop { before: BEFORE, body: hypercall_amd(), instructions: 5 }
    }
}

fn hypercall_intel() -> &'static [u8] {
    code!(hypercall_intel, 64, "mov eax, 12", "mov ebx, 0x1000", "mov ecx, 1", "xor edx, edx", "vmcall")
}

fn hypercall_amd() -> &'static [u8] {
    code!(hypercall_amd, 64, "mov eax, 12", "mov ebx, 0x1000", "mov ecx, 1", "xor edx, edx", "vmmcall")
}

/// An MSR that nobody knows.
fn msr_user() -> Loop {
    Loop {
        before: code!(msr_user_before, 64, "mov ecx, 0x12345678"),
        body: code!(msr_user, 64, "rdmsr"),
        instructions: 1 + FAULT_INSTRUCTIONS,
    }
}

/// The deadline is always as far away; R13 counts turns of the inner loop, until the handler changes R14.
fn deadline() -> Spinning {
    let before = x2apic!(deadline_before, "mov ecx, 0x832", "mov eax, 0x40040", "wrmsr", "xor r13d, r13d", "sti");
    let body = code!(
        deadline,
        64,
        "rdtsc",
        "shl rdx, 32",
        "lea rax, [rax + rdx + 100000]",
        "mov rdx, rax",
        "shr rdx, 32",
        "mov ecx, 0x6e0",
        "mov r12, r14",
        "wrmsr",
        "2: inc r13",
        "cmp r12, r14",
        "je 2b",
        "nop",
    );
    let after = code!(deadline_after, 64, "mov r14, r13");
    // Nine in a turn, and two that end the loop.
    Spinning { code: assemble(before, body, after), spin: 3, fixed: 9 + 2 + INTERRUPT_INSTRUCTIONS as u64 }
}

fn sleeper() -> Loop {
    Loop { before: x2apic!(sleeper_before,), body: code!(sleeper, 64, "sti", "hlt", "cli"), instructions: 0 }
}

/// Two vCPUs execute this, and part by their APIC id.
fn ipi() -> &'static [u8] {
    x2apic!(
        ipi,
        "mov ecx, 0x802",
        "rdmsr",
        "test eax, eax",
        "jz 3f",
        "2: sti",
        "hlt",
        "cli",
        "dec r15",
        "jnz 2b",
        "out 0xf4, al",
        "3: mov ecx, 0x830",
        "mov eax, 0x40",
        "mov edx, 1",
        "4: wrmsr",
        "dec r15",
        "jnz 4b",
        "out 0xf4, al",
    )
}

fn small_pages() -> Loop {
    Loop {
        before: code!(small_before, 64, "mov edi, 0x08000000"),
        body: code!(small, 64, "mov [rdi], al", "add rdi, 0x1000"),
        instructions: 2,
    }
}

fn huge_pages() -> Loop {
    Loop {
        before: code!(huge_before, 64, "mov edi, 0x10000000"),
        body: code!(huge, 64, "mov [rdi], al", "add rdi, 0x200000"),
        instructions: 2,
    }
}

/// A guest that ends as soon as it begins.
fn nothing() -> Loop {
    Loop { before: &[], body: &[], instructions: 0 }
}
