// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! What the two world switches (`svm/switch.rs`, `vmx/switch.rs`) have in common: the frame that they work on, and the pieces
//! of assembly around the instruction that enters the guest.
//!
//! Each piece is a string for `global_asm!`. All count on the frame in RDI, except while the guest's registers are loaded, and on
//! [`begin`]'s three words at the top of the stack.

use crate::caps::Capabilities;
use crate::cpu;
use crate::mitigations::Mitigations;
use crate::msr::SPEC_CTRL;

/// What a world switch works on. The assembly knows the offsets.
#[repr(C)]
pub(crate) struct Frame {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 .. R15. Not those that the hardware switches.
    pub(crate) gpr: [u64; 16],
    /// The guest's SPEC_CTRL. Exits keep it up to date, if [`DIRECT_SPEC_CTRL`].
    guest_spec_ctrl: u64,
    /// The host's SPEC_CTRL, if [`SWITCH_SPEC_CTRL`].
    host_spec_ctrl: u64,
    /// The flags below.
    pub(crate) flags: u32,
    /// For the world switch.
    pub(crate) result: u32,
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
/// [`Frame::flags`], VMX: the VMCS has been launched since VMCLEAR.
pub(crate) const LAUNCHED: u32 = 1 << 5;
/// [`Frame::flags`], VMX: clear the branch history after the exit.
pub(crate) const CLEAR_HISTORY: u32 = 1 << 6;
/// [`Frame::flags`]: [`SWITCH_SPEC_CTRL`] stays set whatever the guest's value.
const REWRITE_SPEC_CTRL: u32 = 1 << 7;
/// [`Frame::flags`], VMX: the guest reads and writes SPEC_CTRL without an exit. [`SWITCH_SPEC_CTRL`] stays set too; whether there
/// is a difference is found out at each entry and exit. Once set it stays.
const DIRECT_SPEC_CTRL: u32 = 1 << 8;

const _: () = {
    assert!(core::mem::offset_of!(Frame, guest_spec_ctrl) == 128);
    assert!(core::mem::offset_of!(Frame, host_spec_ctrl) == 136);
    assert!(core::mem::offset_of!(Frame, flags) == 144);
    assert!(core::mem::offset_of!(Frame, result) == 148);
    assert!(size_of::<Frame>() == 152);
};

impl Frame {
    /// All zero.
    pub(crate) const fn new() -> Self {
        Self { gpr: [0; 16], guest_spec_ctrl: 0, host_spec_ctrl: 0, flags: 0, result: 0 }
    }

    /// The flags that a CPU with these mitigations has in every window.
    pub(crate) fn flags_for(caps: &Capabilities, mitigations: &Mitigations) -> u32 {
        [
            (mitigations.refill_rsb, REFILL_RSB),
            (mitigations.clear_buffers, CLEAR_BUFFERS),
            (mitigations.untrain_returns, UNTRAIN_RETURNS),
            (caps.branch_barrier && mitigations.barrier_at_exit, BARRIER_AT_EXIT),
            (mitigations.clear_history, CLEAR_HISTORY),
            (caps.spec_ctrl && !caps.virtual_spec_ctrl && mitigations.rewrite_spec_ctrl, REWRITE_SPEC_CTRL),
        ]
        .into_iter()
        .filter(|(wanted, _)| *wanted)
        .fold(0, |flags, (_, flag)| flags | flag)
    }

    /// Begins a window, with `flags` of [`flags_for`](Self::flags_for).
    ///
    /// # Safety
    /// At CPL 0, on the CPU of the window.
    #[inline]
    pub(crate) unsafe fn open(&mut self, caps: &Capabilities, flags: u32) {
        self.flags = flags | self.flags & DIRECT_SPEC_CTRL;
        if caps.spec_ctrl && !caps.virtual_spec_ctrl {
            // SAFETY: The caller's promise, and the CPU has it.
            self.host_spec_ctrl = unsafe { cpu::rdmsr(SPEC_CTRL) };
            // A guest that writes it directly may have found bits that it was not told of, and that another CPU may lack.
            self.set_spec_ctrl(self.guest_spec_ctrl & caps.spec_ctrl_bits);
        }
    }

    /// The guest's SPEC_CTRL, as it is or was at the last exit.
    pub(crate) fn spec_ctrl(&self) -> u64 {
        self.guest_spec_ctrl
    }

    /// Sets the guest's SPEC_CTRL. In a window the host's is known, so whether there is a difference is too; otherwise
    /// [`open`](Self::open) finds out.
    pub(crate) fn set_spec_ctrl(&mut self, guest: u64) {
        self.guest_spec_ctrl = guest;
        if guest == self.host_spec_ctrl && self.flags & (REWRITE_SPEC_CTRL | DIRECT_SPEC_CTRL) == 0 {
            self.flags &= !SWITCH_SPEC_CTRL;
        } else {
            self.flags |= SWITCH_SPEC_CTRL;
        }
    }

    /// Whether the guest has begun to use SPEC_CTRL but its accesses exit: whether [`direct_spec_ctrl`](Self::direct_spec_ctrl)
    /// is worth it. Those who never write it cost nothing more.
    pub(crate) fn wants_direct_spec_ctrl(&self) -> bool {
        self.guest_spec_ctrl != 0 && self.flags & DIRECT_SPEC_CTRL == 0
    }

    /// From now on the guest's accesses to SPEC_CTRL do not exit. In a window.
    pub(crate) fn direct_spec_ctrl(&mut self) {
        self.flags |= DIRECT_SPEC_CTRL | SWITCH_SPEC_CTRL;
    }
}

// Saves the host's registers, and leaves on the stack: [rsp + 16] the flags, [rsp + 8] the selector that VERW needs, any writable
// data segment, [rsp] the frame. Clobbers RAX.
macro_rules! begin {
    () => {
        "push rbp
        mov rbp, rsp
        push r15
        push r14
        push r13
        push r12
        push rbx
        mov eax, [rdi + 144]
        push rax
        mov eax, ss
        push rax
        push rdi"
    };
}

// The guest's SPEC_CTRL. If the guest writes it directly, this is the place where the two are compared: most guests set it once, to
// what the host has. (The entry waits for the branches.) Clobbers RAX, RCX, RDX.
macro_rules! load_spec_ctrl {
    () => {
        "test dword ptr [rdi + 144], 1
        jz 6f
        mov ecx, 0x48
        mov eax, [rdi + 128]
        mov edx, [rdi + 132]
        test dword ptr [rdi + 144], 256
        jz 7f
        cmp eax, [rdi + 136]
        jne 7f
        cmp edx, [rdi + 140]
        je 6f
        7:
        wrmsr
        6:"
    };
}

// The guest's general registers but RAX and RSP.
macro_rules! load_registers {
    () => {
        "mov rcx, [rdi + 8]
        mov rdx, [rdi + 16]
        mov rbx, [rdi + 24]
        mov rbp, [rdi + 40]
        mov rsi, [rdi + 48]
        mov r8, [rdi + 64]
        mov r9, [rdi + 72]
        mov r10, [rdi + 80]
        mov r11, [rdi + 88]
        mov r12, [rdi + 96]
        mov r13, [rdi + 104]
        mov r14, [rdi + 112]
        mov r15, [rdi + 120]
        mov rdi, [rdi + 56]"
    };
}

// VERW. The last that the host does with its memory before the guest, but for what is no secret.
macro_rules! clear_buffers {
    () => {
        "test byte ptr [rsp + 16], 4
        jz 7f
        verw word ptr [rsp + 8]
        7:"
    };
}

// The guest's general registers but RAX and RSP to the frame in RDI; its own RDI has been pushed.
macro_rules! save_registers {
    () => {
        "pop qword ptr [rdi + 56]
        mov [rdi + 8], rcx
        mov [rdi + 16], rdx
        mov [rdi + 24], rbx
        mov [rdi + 40], rbp
        mov [rdi + 48], rsi
        mov [rdi + 64], r8
        mov [rdi + 72], r9
        mov [rdi + 80], r10
        mov [rdi + 88], r11
        mov [rdi + 96], r12
        mov [rdi + 104], r13
        mov [rdi + 112], r14
        mov [rdi + 120], r15"
    };
}

// Measures against what the guest has taught the CPU's predictors, before the first RET; then the guest's SPEC_CTRL, if it may have
// changed, to the frame, and the host's, unless the two are equal and no write is wanted for its own sake. The return
// stack buffer gets 32 returns that lead nowhere. Clobbers RAX, RCX, RDX. To be followed by `speculate` before the first RET or
// indirect branch.
macro_rules! restore_speculation {
    () => {
        concat!(
            "test byte ptr [rsp + 16], 2
            jz 4f
            .rept 32
            880:
            call 881f
            int3
            881:
            ",
            crate::switch::annotate_call!(),
            "
            .endr
            add rsp, 256
            4:
            test byte ptr [rsp + 16], 8
            jz 7f
            ",
            crate::switch::untrain_returns!(),
            "
            7:
            test byte ptr [rsp + 16], 16
            jz 8f
            mov ecx, 0x49
            mov eax, 1
            xor edx, edx
            wrmsr
            8:
            test byte ptr [rsp + 16], 1
            jz 5f
            mov ecx, 0x48
            test dword ptr [rsp + 16], 256
            jz 4f
            rdmsr
            mov [rdi + 128], eax
            mov [rdi + 132], edx
            xor eax, [rdi + 136]
            xor edx, [rdi + 140]
            or eax, edx
            jnz 4f
            test byte ptr [rsp + 16], 128
            jz 5f
            4:
            mov eax, [rdi + 136]
            mov edx, [rdi + 140]
            wrmsr
            5:"
        )
    };
}

// Overwrites the branch history, from which the CPU tells indirect branches apart, and which the guest has written (Intel, "Branch
// History Injection and Intra-mode Branch Target Injection"). Every taken branch moves the oldest one out. Intel's sequence has 64
// of them for the CPUs before Alder Lake, which is where Linux asks for it; the longest history among those is of 93 (Yavarzadeh
// et al., "Half&Half", 2023), so here are 96. They are in a row, since a short loop might run from the loop stream detector,
// which leaves the history alone: Intel's sequence has CALL and RET in its loop for that reason. Eight bytes each, as branch
// predictors find few branches in a fetched line. The RETs and indirect branches that follow must not overtake: `speculate`.
macro_rules! clear_history {
    () => {
        "test byte ptr [rsp + 16], 64
        jz 4f
        .rept 96
        jmp 880f
        .balign 8, 0xcc
        880:
        .endr
        4:"
    };
}

// From here on the CPU may speculate on what the measures have left in its predictors. Behind all of them, since the jumps over
// those that are not wanted are predicted, too, and WRMSR of SPEC_CTRL waits for nothing.
macro_rules! speculate {
    () => {
        "lfence"
    };
}

// Returns the value in EAX. No value of the guest's stays in a register, where speculation might use it.
macro_rules! end {
    () => {
        concat!(
            "xor ecx, ecx
            xor edx, edx
            xor esi, esi
            xor edi, edi
            xor r8d, r8d
            xor r9d, r9d
            xor r10d, r10d
            xor r11d, r11d
            add rsp, 24
            pop rbx
            pop r12
            pop r13
            pop r14
            pop r15
            pop rbp
            ",
            crate::switch::function_return!()
        )
    };
}

// How a function returns. In a kernel built so, by the thunk that its mitigations patch, which objtool insists on.
#[cfg(all(axvcpu_kernel, CONFIG_MITIGATION_RETHUNK))]
macro_rules! function_return {
    () => {
        "jmp __x86_return_thunk"
    };
}
#[cfg(not(all(axvcpu_kernel, CONFIG_MITIGATION_RETHUNK)))]
macro_rules! function_return {
    () => {
        "ret\nint3"
    };
}

// Tells objtool something of the instruction at a label (Linux include/linux/objtool_types.h).
#[cfg(axvcpu_kernel)]
macro_rules! annotate {
    ($label:literal, $what:literal) => {
        concat!(
            ".pushsection .discard.annotate_insn,\"M\",@progbits,8\n.long ",
            $label,
            " - .\n.long ",
            $what,
            "\n.popsection"
        )
    };
}
#[cfg(not(axvcpu_kernel))]
macro_rules! annotate {
    ($label:literal, $what:literal) => {
        ""
    };
}

// The call at label 880 stays in the function (ANNOTYPE_INTRA_FUNCTION_CALL).
macro_rules! annotate_call {
    () => {
        crate::switch::annotate!("880b", 7)
    };
}

// Nobody jumps to label 774, whose address is taken (ANNOTYPE_NOENDBR).
macro_rules! annotate_place {
    () => {
        crate::switch::annotate!("774b", 1)
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

pub(crate) use {
    annotate, annotate_call, annotate_place, begin, clear_buffers, clear_history, end, function_return, load_registers,
    load_spec_ctrl, restore_speculation, save_registers, speculate, untrain_returns,
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spec_ctrl_is_switched_where_it_differs() {
        let mut frame = Frame { host_spec_ctrl: 1, ..Frame::new() };
        frame.set_spec_ctrl(4);
        assert_eq!((frame.spec_ctrl(), frame.flags), (4, SWITCH_SPEC_CTRL));
        frame.set_spec_ctrl(1);
        assert_eq!((frame.spec_ctrl(), frame.flags), (1, 0));
        frame.flags = REWRITE_SPEC_CTRL;
        frame.set_spec_ctrl(1);
        assert_eq!(frame.flags, REWRITE_SPEC_CTRL | SWITCH_SPEC_CTRL, "the write counts, not the value");
    }

    #[test]
    fn spec_ctrl_is_the_guests_once_it_has_been_used() {
        let mut frame = Frame::new();
        assert!(!frame.wants_direct_spec_ctrl(), "nobody has used it");
        frame.set_spec_ctrl(1);
        assert!(frame.wants_direct_spec_ctrl());
        frame.direct_spec_ctrl();
        assert!(!frame.wants_direct_spec_ctrl(), "it is");
        // The guest may change it at any time, so it is looked at whatever it is now.
        frame.set_spec_ctrl(0);
        assert_eq!(frame.flags, DIRECT_SPEC_CTRL | SWITCH_SPEC_CTRL);
    }
}
