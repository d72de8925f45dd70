// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The world switch: from the host at EL2 into the guest and back.
//!
//! What it must put back for the host to live on is in here: SP_EL0, which holds `current`, VBAR_EL2, and X18 to X30. The rest
//! is `window.rs`'s.

use core::arch::global_asm;
use core::mem::offset_of;

use axvcpu_uapi::arm64::{Fp, General};

use crate::frame::TrapFrame;

const GENERAL: usize = offset_of!(TrapFrame, general);

// Everything runs on the host's own stack, SP_EL2, with all exceptions masked. There:
//   sp + 0    X29, X30, X19 .. X28 of the host
//   sp + 96   SP_EL0 of the host, the frame
//   sp + 112  X18 of the host
global_asm!(
    ".pushsection .noinstr.text, \"ax\"",
    ".balign 16",
    ".global axvcpu_arm_enter",
    ".type axvcpu_arm_enter, %function",
    "axvcpu_arm_enter:",
    "hint #34", // bti c
    "stp x29, x30, [sp, #-128]!",
    "stp x19, x20, [sp, #16]",
    "stp x21, x22, [sp, #32]",
    "stp x23, x24, [sp, #48]",
    "stp x25, x26, [sp, #64]",
    "stp x27, x28, [sp, #80]",
    "mrs x1, sp_el0",
    "stp x1, x0, [sp, #96]",
    "str x18, [sp, #112]",
    // From here on an exception is the guest's, or shows that we are wrong.
    "ldr x1, [x0, #{vectors}]",
    "msr vbar_el2, x1",
    "isb",
    "ldr x1, [x0, #{pc}]",
    "msr elr_el2, x1",
    "ldr x1, [x0, #{pstate}]",
    "msr spsr_el2, x1",
    "ldr x1, [x0, #{sp_el0}]",
    "msr sp_el0, x1",
    "ldp x2, x3, [x0, #{x} + 16]",
    "ldp x4, x5, [x0, #{x} + 32]",
    "ldp x6, x7, [x0, #{x} + 48]",
    "ldp x8, x9, [x0, #{x} + 64]",
    "ldp x10, x11, [x0, #{x} + 80]",
    "ldp x12, x13, [x0, #{x} + 96]",
    "ldp x14, x15, [x0, #{x} + 112]",
    "ldp x16, x17, [x0, #{x} + 128]",
    "ldp x18, x19, [x0, #{x} + 144]",
    "ldp x20, x21, [x0, #{x} + 160]",
    "ldp x22, x23, [x0, #{x} + 176]",
    "ldp x24, x25, [x0, #{x} + 192]",
    "ldp x26, x27, [x0, #{x} + 208]",
    "ldp x28, x29, [x0, #{x} + 224]",
    "ldr x30, [x0, #{x} + 240]",
    "ldp x0, x1, [x0, #{x}]",
    "eret",
    "dsb nsh", // No speculation past ERET.
    "isb",
    // The way back. On the stack the guest's X0 and X1, below what entry has put there; X1 is the vector's number.
    "axvcpu_arm_exit:",
    "ldr x0, [sp, #16 + 104]",
    "stp x2, x3, [x0, #{x} + 16]",
    "stp x4, x5, [x0, #{x} + 32]",
    "stp x6, x7, [x0, #{x} + 48]",
    "stp x8, x9, [x0, #{x} + 64]",
    "stp x10, x11, [x0, #{x} + 80]",
    "stp x12, x13, [x0, #{x} + 96]",
    "stp x14, x15, [x0, #{x} + 112]",
    "stp x16, x17, [x0, #{x} + 128]",
    "stp x18, x19, [x0, #{x} + 144]",
    "stp x20, x21, [x0, #{x} + 160]",
    "stp x22, x23, [x0, #{x} + 176]",
    "stp x24, x25, [x0, #{x} + 192]",
    "stp x26, x27, [x0, #{x} + 208]",
    "stp x28, x29, [x0, #{x} + 224]",
    "str x30, [x0, #{x} + 240]",
    "ldp x2, x3, [sp], #16",
    "stp x2, x3, [x0, #{x}]",
    "str x1, [x0, #{vector}]",
    "mrs x2, sp_el0",
    "str x2, [x0, #{sp_el0}]",
    "mrs x2, elr_el2",
    "str x2, [x0, #{pc}]",
    "mrs x2, spsr_el2",
    "str x2, [x0, #{pstate}]",
    "mrs x2, esr_el2",
    "str x2, [x0, #{esr}]",
    "mrs x2, far_el2",
    "str x2, [x0, #{far}]",
    "mrs x2, hpfar_el2",
    "str x2, [x0, #{hpfar}]",
    "ldr x2, [sp, #96]",
    "msr sp_el0, x2",
    "ldr x2, [x0, #{host_vbar}]",
    "msr vbar_el2, x2",
    "isb",
    "ldr x18, [sp, #112]",
    "ldp x27, x28, [sp, #80]",
    "ldp x25, x26, [sp, #64]",
    "ldp x23, x24, [sp, #48]",
    "ldp x21, x22, [sp, #32]",
    "ldp x19, x20, [sp, #16]",
    "ldp x29, x30, [sp], #128",
    "ret",
    ".size axvcpu_arm_enter, . - axvcpu_arm_enter",
    // The vectors (Arm ARM D1.3.6). An exception of our own goes to the host's handlers, with the host's HCR_EL2 and VBAR_EL2:
    // it ends in an oops that tells where (X17 of that is lost).
    ".macro axvcpu_arm_host offset",
    ".balign 128",
    "stp x0, x1, [sp, #-16]!",
    "ldr x0, [sp, #16 + 104]",
    "ldr x1, [x0, #{host_hcr}]",
    "msr hcr_el2, x1",
    "ldr x17, [x0, #{host_vbar}]",
    "msr vbar_el2, x17",
    "isb",
    "ldp x0, x1, [sp], #16",
    "add x17, x17, #\\offset",
    "br x17",
    ".endm",
    // The guest's branch history is overwritten before anything else (history.rs). Nothing on this way depends on it: there are two
    // sets of vectors rather than a branch that could be mispredicted.
    ".macro axvcpu_arm_guest number, clears",
    ".balign 128",
    "stp x0, x1, [sp, #-16]!",
    ".if \\clears",
    "ldr x0, [sp, #16 + 104]",
    "ldr x0, [x0, #{branches}]",
    "2: b 3f",
    "3: subs x0, x0, #1",
    "b.ne 2b",
    "hint #22", // clrbhb
    "dsb nsh",
    "isb",
    ".endif",
    "mov x1, #\\number",
    "b axvcpu_arm_exit",
    ".endm",
    ".macro axvcpu_arm_vectors clears",
    ".balign 2048",
    "axvcpu_arm_host 0x000",
    "axvcpu_arm_host 0x080",
    "axvcpu_arm_host 0x100",
    "axvcpu_arm_host 0x180",
    "axvcpu_arm_host 0x200",
    "axvcpu_arm_host 0x280",
    "axvcpu_arm_host 0x300",
    "axvcpu_arm_host 0x380",
    "axvcpu_arm_guest 0, \\clears",
    "axvcpu_arm_guest 1, \\clears",
    "axvcpu_arm_guest 2, \\clears",
    "axvcpu_arm_guest 3, \\clears",
    "axvcpu_arm_guest 4, \\clears",
    "axvcpu_arm_guest 5, \\clears",
    "axvcpu_arm_guest 6, \\clears",
    "axvcpu_arm_guest 7, \\clears",
    ".balign 128",
    ".endm",
    ".global axvcpu_arm_vectors_plain",
    ".balign 2048",
    "axvcpu_arm_vectors_plain:",
    "axvcpu_arm_vectors 0",
    ".global axvcpu_arm_vectors_clearing",
    ".balign 2048",
    "axvcpu_arm_vectors_clearing:",
    "axvcpu_arm_vectors 1",
    ".popsection",
    x = const GENERAL + offset_of!(General, x),
    sp_el0 = const GENERAL + offset_of!(General, sp_el0),
    pc = const GENERAL + offset_of!(General, pc),
    pstate = const GENERAL + offset_of!(General, pstate),
    vector = const offset_of!(TrapFrame, vector),
    esr = const offset_of!(TrapFrame, esr),
    far = const offset_of!(TrapFrame, far),
    hpfar = const offset_of!(TrapFrame, hpfar),
    vectors = const offset_of!(TrapFrame, vectors),
    branches = const offset_of!(TrapFrame, branches),
    host_vbar = const offset_of!(TrapFrame, host_vbar),
    host_hcr = const offset_of!(TrapFrame, host_hcr),
);

// SIMD and floating point. The kernel's code is compiled without them, so the assembler must be told.
global_asm!(
    ".pushsection .text, \"ax\"",
    ".arch_extension simd",
    ".macro axvcpu_arm_fp instruction",
    "\\instruction q0, q1, [x0]",
    "\\instruction q2, q3, [x0, #32]",
    "\\instruction q4, q5, [x0, #64]",
    "\\instruction q6, q7, [x0, #96]",
    "\\instruction q8, q9, [x0, #128]",
    "\\instruction q10, q11, [x0, #160]",
    "\\instruction q12, q13, [x0, #192]",
    "\\instruction q14, q15, [x0, #224]",
    "\\instruction q16, q17, [x0, #256]",
    "\\instruction q18, q19, [x0, #288]",
    "\\instruction q20, q21, [x0, #320]",
    "\\instruction q22, q23, [x0, #352]",
    "\\instruction q24, q25, [x0, #384]",
    "\\instruction q26, q27, [x0, #416]",
    "\\instruction q28, q29, [x0, #448]",
    "\\instruction q30, q31, [x0, #480]",
    ".endm",
    ".balign 16",
    ".global axvcpu_arm_fp_save",
    ".type axvcpu_arm_fp_save, %function",
    "axvcpu_arm_fp_save:",
    "hint #34",
    "axvcpu_arm_fp stp",
    "mrs x1, fpsr",
    "mrs x2, fpcr",
    "str x1, [x0, #{fpsr}]",
    "str x2, [x0, #{fpcr}]",
    "ret",
    ".size axvcpu_arm_fp_save, . - axvcpu_arm_fp_save",
    ".global axvcpu_arm_fp_load",
    ".type axvcpu_arm_fp_load, %function",
    "axvcpu_arm_fp_load:",
    "hint #34",
    "axvcpu_arm_fp ldp",
    "ldr x1, [x0, #{fpsr}]",
    "ldr x2, [x0, #{fpcr}]",
    "msr fpsr, x1",
    "msr fpcr, x2",
    "ret",
    ".size axvcpu_arm_fp_load, . - axvcpu_arm_fp_load",
    ".arch_extension nosimd",
    ".popsection",
    fpsr = const offset_of!(Fp, fpsr),
    fpcr = const offset_of!(Fp, fpcr),
);

extern "C" {
    static axvcpu_arm_vectors_plain: [u8; 2048];
    static axvcpu_arm_vectors_clearing: [u8; 2048];
    fn axvcpu_arm_enter(frame: *mut TrapFrame);
    fn axvcpu_arm_fp_save(to: *mut Fp);
    fn axvcpu_arm_fp_load(from: *const Fp);
}

/// The vectors for the time in a guest, after which `branches` overwrite its history.
pub(crate) fn vectors(branches: u64) -> u64 {
    let vectors =
        if branches == 0 { &raw const axvcpu_arm_vectors_plain } else { &raw const axvcpu_arm_vectors_clearing };
    vectors as u64
}

/// Enters the guest and comes back with its registers in `frame`.
///
/// # Safety
/// At EL2 in a window (`window.rs`): the guest's other registers are loaded, all exceptions are masked, and the frame's host
/// values are the CPU's.
#[inline]
pub(crate) unsafe fn enter(frame: &mut TrapFrame) {
    // SAFETY: The caller's promise; the code keeps what a function call must keep.
    unsafe { axvcpu_arm_enter(frame) };
}

/// Saves the SIMD and floating-point registers.
///
/// # Safety
/// At EL2 with CPTR_EL2 allowing them.
pub(crate) unsafe fn save_fp(to: &mut Fp) {
    // SAFETY: The caller's promise.
    unsafe { axvcpu_arm_fp_save(to) };
}

/// Loads the SIMD and floating-point registers.
///
/// # Safety
/// At EL2 with CPTR_EL2 allowing them, and the registers are the caller's to change.
pub(crate) unsafe fn load_fp(from: &Fp) {
    // SAFETY: The caller's promise.
    unsafe { axvcpu_arm_fp_load(from) };
}
