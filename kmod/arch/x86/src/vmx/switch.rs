// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The world switch: from the host into the guest and back (SDM vol. 3, chapters 27 and 28), in one piece of assembly.
//!
//! The VMCS switches RIP, RSP, RFLAGS, the control and segment registers, the descriptor tables, EFER, PAT, DR7, DEBUGCTL
//! and SYSENTER's MSRs. This code switches the other general registers and SPEC_CTRL. All the rest is switched once per
//! window ([`super::window`]).

use core::arch::global_asm;

use super::fields::Field;
use crate::switch::{
    begin, clear_buffers, clear_history, end, load_registers, load_spec_ctrl, restore_speculation, save_registers,
    speculate,
};

/// What the world switch works on. RSP is in the VMCS while the guest runs; its place here is not the assembly's.
pub(crate) use crate::switch::Frame;

/// [`enter`] has been in the guest, or the CPU has found its state invalid: the exit reason tells.
pub(crate) const EXITED: u32 = 0;
/// [`enter`] has been refused: the VM-instruction error tells why.
pub(crate) const REFUSED: u32 = 1;

extern "C" {
    /// Enters the guest and returns at its exit: [`EXITED`], [`REFUSED`], or 2 if VMX has been switched off under us.
    ///
    /// # Safety
    /// The current VMCS is the vCPU's and complete but for the host's RIP and RSP, and interrupts are off. `frame` is valid and
    /// nobody else's, and its `result` is [`EXITED`].
    #[link_name = "axvcpu_vmx_enter"]
    pub(crate) fn enter(frame: *mut Frame) -> u32;
}

global_asm!(
    ".pushsection .noinstr.text, \"ax\"",
    ".balign 16",
    ".global axvcpu_vmx_enter",
    ".type axvcpu_vmx_enter, @function",
    "axvcpu_vmx_enter:",
    begin!(),
    // Where the exit leads: the label 2, with this stack. A fault goes to 775.
    "mov ecx, {host_rsp}",
    "771:",
    "vmwrite rcx, rsp",
    "lea rdx, [rip + 2f]",
    "mov ecx, {host_rip}",
    "772:",
    "vmwrite rcx, rdx",
    load_spec_ctrl!(),
    "mov rax, [rdi]",
    load_registers!(),
    clear_buffers!(),
    // LAUNCHED.
    "bt dword ptr [rsp + 16], 5",
    "jc 3f",
    "773:",
    "vmlaunch",
    "jmp 2f",
    "3:",
    "774:",
    "vmresume",
    // Here with CF or ZF set if the entry has been refused; an exit clears the flags. All general registers are the guest's.
    "2:",
    "push rdi",
    "mov rdi, [rsp + 8]",
    "setbe byte ptr [rdi + 148]",
    "9:",
    "mov [rdi], rax",
    save_registers!(),
    restore_speculation!(),
    clear_history!(),
    speculate!(),
    "mov eax, [rdi + 148]",
    "777:",
    end!(),
    // VMWRITE has faulted: nothing is the guest's yet.
    "775:",
    "mov eax, 2",
    "jmp 777b",
    // The entry has faulted: the registers are the guest's already.
    "776:",
    "push rdi",
    "mov rdi, [rsp + 8]",
    "mov dword ptr [rdi + 148], 2",
    "jmp 9b",
    // Linux arch/x86/include/asm/asm.h: from, to, EX_TYPE_DEFAULT.
    ".pushsection __ex_table, \"a\"",
    ".balign 4",
    ".long 771b - .",
    ".long 775b - .",
    ".long 1",
    ".long 772b - .",
    ".long 775b - .",
    ".long 1",
    ".long 773b - .",
    ".long 776b - .",
    ".long 1",
    ".long 774b - .",
    ".long 776b - .",
    ".long 1",
    ".popsection",
    ".size axvcpu_vmx_enter, . - axvcpu_vmx_enter",
    ".popsection",
    host_rsp = const Field::HostRsp as u32,
    host_rip = const Field::HostRip as u32,
);
