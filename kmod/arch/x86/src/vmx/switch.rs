// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The world switch: from the host into the guest and back (SDM vol. 3, chapters 27 and 28), in one piece of assembly.
//!
//! The VMCS switches RIP, RSP, RFLAGS, the control and segment registers, the descriptor tables, EFER, PAT, DR7, DEBUGCTL
//! and SYSENTER's MSRs. This code switches the other general registers and SPEC_CTRL. All the rest is switched once per
//! window ([`super::window`]).

use core::arch::global_asm;

use super::fields::Field;

/// What the world switch works on. The assembly knows the offsets.
#[repr(C)]
pub(crate) struct Frame {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 .. R15. RSP is in the VMCS while the guest runs; its place here is not the
    /// assembly's.
    pub(crate) gpr: [u64; 16],
    /// The guest's SPEC_CTRL, if [`SWITCH_SPEC_CTRL`].
    pub(crate) guest_spec_ctrl: u64,
    /// The host's SPEC_CTRL, if [`SWITCH_SPEC_CTRL`].
    pub(crate) host_spec_ctrl: u64,
    /// The flags below.
    pub(crate) flags: u32,
    /// Set to 0 by the caller; then one of the results of [`enter`].
    pub(crate) result: u32,
}

/// [`Frame::flags`]: SPEC_CTRL differs between guest and host.
pub(crate) const SWITCH_SPEC_CTRL: u32 = 1 << 0;
/// [`Frame::flags`]: refill the return stack buffer after the exit.
pub(crate) const REFILL_RSB: u32 = 1 << 1;
/// [`Frame::flags`]: VERW before the entry.
pub(crate) const CLEAR_BUFFERS: u32 = 1 << 2;
/// [`Frame::flags`]: the VMCS has been launched since VMCLEAR.
pub(crate) const LAUNCHED: u32 = 1 << 5;

/// [`enter`] has been in the guest, or the CPU has found its state invalid: the exit reason tells.
pub(crate) const EXITED: u32 = 0;
/// [`enter`] has been refused: the VM-instruction error tells why.
pub(crate) const REFUSED: u32 = 1;

const _: () = {
    assert!(core::mem::offset_of!(Frame, guest_spec_ctrl) == 128);
    assert!(core::mem::offset_of!(Frame, host_spec_ctrl) == 136);
    assert!(core::mem::offset_of!(Frame, flags) == 144);
    assert!(core::mem::offset_of!(Frame, result) == 148);
};

impl Frame {
    /// All zero.
    pub(crate) const fn new() -> Self {
        Self { gpr: [0; 16], guest_spec_ctrl: 0, host_spec_ctrl: 0, flags: 0, result: 0 }
    }
}

extern "C" {
    /// Enters the guest and returns at its exit: [`EXITED`], [`REFUSED`], or 2 if VMX has been switched off under us.
    ///
    /// # Safety
    /// The current VMCS is the vCPU's and complete but for the host's RIP and RSP, and interrupts are off. `frame` is valid and
    /// nobody else's.
    #[link_name = "axvcpu_vmx_enter"]
    pub(crate) fn enter(frame: *mut Frame) -> u32;
}

// How a function returns. In the kernel by the thunk that its mitigations patch, which objtool insists on.
#[cfg(axvcpu_kernel)]
macro_rules! function_return {
    () => {
        "jmp __x86_return_thunk"
    };
}
#[cfg(not(axvcpu_kernel))]
macro_rules! function_return {
    () => {
        "ret\nint3"
    };
}

// Tells objtool that the call at label 880 stays in the function (ANNOTYPE_INTRA_FUNCTION_CALL of Linux'
// include/linux/objtool_types.h).
#[cfg(axvcpu_kernel)]
macro_rules! annotate_call {
    () => {
        ".pushsection .discard.annotate_insn,\"M\",@progbits,8\n.long 880b - .\n.long 7\n.popsection"
    };
}
#[cfg(not(axvcpu_kernel))]
macro_rules! annotate_call {
    () => {
        ""
    };
}

global_asm!(
    ".pushsection .noinstr.text, \"ax\"",
    ".balign 16",
    ".global axvcpu_vmx_enter",
    ".type axvcpu_vmx_enter, @function",
    "axvcpu_vmx_enter:",
    "push rbp",
    "mov rbp, rsp",
    "push r15",
    "push r14",
    "push r13",
    "push r12",
    "push rbx",
    // [rsp + 16]: flags. [rsp + 8]: the selector that VERW needs, any writable data segment. [rsp]: the frame.
    "mov eax, [rdi + 144]",
    "push rax",
    "mov eax, ss",
    "push rax",
    "push rdi",
    // Where the exit leads: the label 2, with this stack. A fault goes to 775.
    "mov ecx, {host_rsp}",
    "771:",
    "vmwrite rcx, rsp",
    "lea rdx, [rip + 2f]",
    "mov ecx, {host_rip}",
    "772:",
    "vmwrite rcx, rdx",
    "test dword ptr [rdi + 144], 1",
    "jz 6f",
    "mov ecx, 0x48",
    "mov eax, [rdi + 128]",
    "mov edx, [rdi + 132]",
    "wrmsr",
    "6:",
    "mov rax, [rdi]",
    "mov rcx, [rdi + 8]",
    "mov rdx, [rdi + 16]",
    "mov rbx, [rdi + 24]",
    "mov rbp, [rdi + 40]",
    "mov rsi, [rdi + 48]",
    "mov r8, [rdi + 64]",
    "mov r9, [rdi + 72]",
    "mov r10, [rdi + 80]",
    "mov r11, [rdi + 88]",
    "mov r12, [rdi + 96]",
    "mov r13, [rdi + 104]",
    "mov r14, [rdi + 112]",
    "mov r15, [rdi + 120]",
    "mov rdi, [rdi + 56]",
    // The last memory accesses of the host before the guest, but for one of our own flags.
    "test byte ptr [rsp + 16], 4",
    "jz 7f",
    "verw word ptr [rsp + 8]",
    "7:",
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
    "4:",
    "pop qword ptr [rdi + 56]",
    "mov [rdi], rax",
    "mov [rdi + 8], rcx",
    "mov [rdi + 16], rdx",
    "mov [rdi + 24], rbx",
    "mov [rdi + 40], rbp",
    "mov [rdi + 48], rsi",
    "mov [rdi + 64], r8",
    "mov [rdi + 72], r9",
    "mov [rdi + 80], r10",
    "mov [rdi + 88], r11",
    "mov [rdi + 96], r12",
    "mov [rdi + 104], r13",
    "mov [rdi + 112], r14",
    "mov [rdi + 120], r15",
    // The guest has filled the return stack buffer. Before the first RET: 32 returns that lead nowhere.
    "test byte ptr [rsp + 16], 2",
    "jz 9f",
    "mov ecx, 32",
    "8:",
    "880:",
    "call 881f",
    "int3",
    "881:",
    annotate_call!(),
    "add rsp, 8",
    "dec ecx",
    "jnz 8b",
    "lfence",
    "9:",
    "test dword ptr [rsp + 16], 1",
    "jz 5f",
    "mov ecx, 0x48",
    "mov eax, [rdi + 136]",
    "mov edx, [rdi + 140]",
    "wrmsr",
    "5:",
    "mov eax, [rdi + 148]",
    "777:",
    // No value of the guest's stays in a register, where speculation might use it.
    "xor ecx, ecx",
    "xor edx, edx",
    "xor esi, esi",
    "xor edi, edi",
    "xor r8d, r8d",
    "xor r9d, r9d",
    "xor r10d, r10d",
    "xor r11d, r11d",
    "add rsp, 24",
    "pop rbx",
    "pop r12",
    "pop r13",
    "pop r14",
    "pop r15",
    "pop rbp",
    function_return!(),
    // VMWRITE has faulted: nothing is the guest's yet.
    "775:",
    "mov eax, 2",
    "jmp 777b",
    // The entry has faulted: the registers are the guest's already.
    "776:",
    "push rdi",
    "mov rdi, [rsp + 8]",
    "mov dword ptr [rdi + 148], 2",
    "jmp 4b",
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
