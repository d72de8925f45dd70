// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The world switch: from the host into the guest and back (APM vol. 2 sections 15.5 and 15.6), in one piece of assembly.
//!
//! VMRUN and the exit switch CR0, CR3, CR4, EFER, RFLAGS, RIP, RSP, RAX, GDTR, IDTR, CS, SS, DS, ES and CPL, and load CR2, DR6
//! and DR7. VMLOAD and VMSAVE switch FS, GS, TR, LDTR, KernelGSBase and the SYSCALL and SYSENTER MSRs. This code switches the other
//! general registers and SPEC_CTRL. All the rest is switched once per window ([`super::window`]).

use core::arch::global_asm;

use crate::switch::{
    annotate_place, begin, clear_buffers, end, function_return, load_registers, load_spec_ctrl, restore_speculation,
    save_registers, speculate,
};

/// What the world switch works on. The assembly knows the offsets.
#[repr(C)]
pub(crate) struct Frame {
    /// RAX and RSP live in the VMCB; their places here are not used.
    pub(crate) common: crate::switch::Frame,
    /// Physical address of the guest's VMCB.
    pub(crate) vmcb: u64,
    /// Physical address of the VMCB with the host's state for VMLOAD.
    pub(crate) host_vmcb: u64,
}

const _: () = {
    assert!(core::mem::offset_of!(Frame, common) == 0);
    assert!(core::mem::offset_of!(Frame, vmcb) == 152);
    assert!(core::mem::offset_of!(Frame, host_vmcb) == 160);
};

// SAFETY: These are the signatures of the two functions below.
unsafe extern "C" {
    /// Enters the guest and returns at its exit: 0, or 1 if SVM has been switched off under us and the guest was not entered.
    ///
    /// # Safety
    /// On the CPU whose state `host_vmcb` holds, with EFER.SVME set, VM_HSAVE_PA ours and interrupts off. `frame` and the
    /// VMCB at `vmcb` are valid and nobody else's.
    #[link_name = "axvcpu_svm_enter"]
    pub(crate) unsafe fn enter(frame: *mut Frame) -> u32;

    /// The address behind VMRUN, where the host goes on after an exit.
    #[cfg(not(miri))]
    #[link_name = "axvcpu_svm_behind_vmrun"]
    pub(crate) safe fn behind_vmrun() -> u64;
}

/// Miri has no assembly, and enters no guest.
#[cfg(miri)]
pub(crate) const fn behind_vmrun() -> u64 {
    u64::MAX
}

global_asm!(
    ".pushsection .noinstr.text, \"ax\"",
    ".balign 16",
    ".global axvcpu_svm_enter",
    ".type axvcpu_svm_enter, @function",
    "axvcpu_svm_enter:",
    begin!(),
    // From here on neither interrupts nor NMIs: FS, GS and TR will be the guest's. #UD if EFER.SVME has gone: to 772.
    "771:",
    "clgi",
    load_spec_ctrl!(),
    "mov rax, [rdi + 152]",
    "vmload rax",
    load_registers!(),
    clear_buffers!(),
    // With V_INTR_MASKING it is the host's IF that lets physical interrupts end the guest. GIF=0 holds them back until then.
    "sti",
    "vmrun rax",
    // GIF is 0 again.
    "774:",
    annotate_place!(),
    "cli",
    "push rdi",
    "mov rdi, [rsp + 8]",
    save_registers!(),
    restore_speculation!(),
    speculate!(),
    "mov rax, [rdi + 152]",
    "vmsave rax",
    "mov rax, [rdi + 160]",
    "vmload rax",
    // A pending NMI is taken here.
    "stgi",
    "xor eax, eax",
    "773:",
    end!(),
    "772:",
    "mov eax, 1",
    "jmp 773b",
    // Linux arch/x86/include/asm/asm.h: from, to, EX_TYPE_DEFAULT.
    ".pushsection __ex_table, \"a\"",
    ".balign 4",
    ".long 771b - .",
    ".long 772b - .",
    ".long 1",
    ".popsection",
    ".size axvcpu_svm_enter, . - axvcpu_svm_enter",
    ".balign 16",
    ".global axvcpu_svm_behind_vmrun",
    ".type axvcpu_svm_behind_vmrun, @function",
    "axvcpu_svm_behind_vmrun:",
    "lea rax, [rip + 774b]",
    function_return!(),
    ".size axvcpu_svm_behind_vmrun, . - axvcpu_svm_behind_vmrun",
    ".popsection",
);
