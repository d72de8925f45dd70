// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The world switch: from the host into the guest and back (APM vol. 2 sections 15.5 and 15.6), in one piece of assembly.
//!
//! VMRUN and the exit switch CR0, CR3, CR4, EFER, RFLAGS, RIP, RSP, RAX, GDTR, IDTR, CS, SS, DS, ES and CPL, and load CR2, DR6
//! and DR7. VMLOAD and VMSAVE switch FS, GS, TR, LDTR, KernelGSBase and the SYSCALL and SYSENTER MSRs. This code switches the other
//! general registers and SPEC_CTRL. All the rest is switched once per window ([`super::window`]).

use core::arch::global_asm;

/// What the world switch works on. The assembly knows the offsets.
#[repr(C)]
pub(crate) struct Frame {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 .. R15. RAX and RSP live in the VMCB; their places here are not used.
    pub(crate) gpr: [u64; 16],
    /// Physical address of the guest's VMCB.
    pub(crate) vmcb: u64,
    /// Physical address of the VMCB with the host's state for VMLOAD.
    pub(crate) host_vmcb: u64,
    /// The guest's SPEC_CTRL, if [`SWITCH_SPEC_CTRL`].
    pub(crate) guest_spec_ctrl: u64,
    /// The host's SPEC_CTRL, if [`SWITCH_SPEC_CTRL`].
    pub(crate) host_spec_ctrl: u64,
    /// The flags below.
    pub(crate) flags: u32,
}

/// [`Frame::flags`]: SPEC_CTRL differs between guest and host and the hardware does not switch it.
pub(crate) const SWITCH_SPEC_CTRL: u32 = 1 << 0;
/// [`Frame::flags`]: refill the return stack buffer after the exit.
pub(crate) const REFILL_RSB: u32 = 1 << 1;
/// [`Frame::flags`]: VERW before the entry.
pub(crate) const CLEAR_BUFFERS: u32 = 1 << 2;
/// [`Frame::flags`]: the kernel's `entry_untrain_ret` after the exit.
pub(crate) const UNTRAIN_RETURNS: u32 = 1 << 3;
/// [`Frame::flags`]: indirect branch prediction barrier after the exit.
pub(crate) const BARRIER_AT_EXIT: u32 = 1 << 4;

const _: () = {
    assert!(core::mem::offset_of!(Frame, vmcb) == 128);
    assert!(core::mem::offset_of!(Frame, host_vmcb) == 136);
    assert!(core::mem::offset_of!(Frame, guest_spec_ctrl) == 144);
    assert!(core::mem::offset_of!(Frame, host_spec_ctrl) == 152);
    assert!(core::mem::offset_of!(Frame, flags) == 160);
};

impl Frame {
    /// All zero.
    pub(crate) const fn new() -> Self {
        Self { gpr: [0; 16], vmcb: 0, host_vmcb: 0, guest_spec_ctrl: 0, host_spec_ctrl: 0, flags: 0 }
    }
}

extern "C" {
    /// Enters the guest and returns at its exit: 0, or 1 if SVM has been switched off under us and the guest was not entered.
    ///
    /// # Safety
    /// On the CPU whose state `host_vmcb` holds, with EFER.SVME set, VM_HSAVE_PA ours and interrupts off. `frame` and the
    /// VMCB at `vmcb` are valid and nobody else's.
    #[link_name = "axvcpu_svm_enter"]
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

// The kernel's routine against return predictions that the guest has trained. Weak: it exists only in kernels that may need
// it, and is called only if the flag says so. It clobbers RAX at most.
#[cfg(axvcpu_kernel)]
macro_rules! untrain_returns {
    () => {
        ".weak entry_untrain_ret\ncall entry_untrain_ret"
    };
}
#[cfg(not(axvcpu_kernel))]
macro_rules! untrain_returns {
    () => {
        ""
    };
}

global_asm!(
    ".pushsection .noinstr.text, \"ax\"",
    ".balign 16",
    ".global axvcpu_svm_enter",
    ".type axvcpu_svm_enter, @function",
    "axvcpu_svm_enter:",
    "push rbp",
    "mov rbp, rsp",
    "push r15",
    "push r14",
    "push r13",
    "push r12",
    "push rbx",
    // [rsp + 16]: flags. [rsp + 8]: the selector that VERW needs, any writable data segment. [rsp]: the frame.
    "mov eax, [rdi + 160]",
    "push rax",
    "mov eax, ss",
    "push rax",
    "push rdi",
    // From here on neither interrupts nor NMIs: FS, GS and TR will be the guest's. #UD if EFER.SVME has gone: to 772.
    "771:",
    "clgi",
    "test dword ptr [rdi + 160], 1",
    "jz 6f",
    "mov ecx, 0x48",
    "mov eax, [rdi + 144]",
    "mov edx, [rdi + 148]",
    "wrmsr",
    "6:",
    "mov rax, [rdi + 128]",
    "vmload rax",
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
    // The last memory accesses of the host before the guest are those of VMRUN.
    "test byte ptr [rsp + 16], 4",
    "jz 2f",
    "verw word ptr [rsp + 8]",
    "2:",
    // With V_INTR_MASKING it is the host's IF that lets physical interrupts end the guest. GIF=0 holds them back until then.
    "sti",
    "vmrun rax",
    // GIF is 0 again.
    "cli",
    "push rdi",
    "mov rdi, [rsp + 8]",
    "pop qword ptr [rdi + 56]",
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
    "jz 4f",
    "mov ecx, 32",
    "3:",
    "880:",
    "call 881f",
    "int3",
    "881:",
    annotate_call!(),
    "add rsp, 8",
    "dec ecx",
    "jnz 3b",
    "lfence",
    "4:",
    "test byte ptr [rsp + 16], 8",
    "jz 7f",
    untrain_returns!(),
    "7:",
    "test byte ptr [rsp + 16], 16",
    "jz 8f",
    "mov ecx, 0x49",
    "mov eax, 1",
    "xor edx, edx",
    "wrmsr",
    "8:",
    "test byte ptr [rsp + 16], 1",
    "jz 5f",
    "mov ecx, 0x48",
    "mov eax, [rdi + 152]",
    "mov edx, [rdi + 156]",
    "wrmsr",
    "5:",
    "mov rax, [rdi + 128]",
    "vmsave rax",
    "mov rax, [rdi + 136]",
    "vmload rax",
    // A pending NMI is taken here.
    "stgi",
    "xor eax, eax",
    "773:",
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
    ".popsection",
);
