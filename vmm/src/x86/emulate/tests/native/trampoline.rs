// SPDX-License-Identifier: MIT OR Apache-2.0
//! A page of generated code that runs one instruction on this CPU with chosen registers, and tells what it did.

use std::ptr;

use iced_x86::code_asm::{self as asm, CodeAssembler};
use nix::libc;

/// Bytes of test memory: three pages, so that an operand can cross in either direction.
pub(super) const AREA: usize = 3 * 4096;

/// Registers before and after, at a fixed place below 2 GiB for absolute addressing.
#[repr(C)]
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Context {
    pub(super) gpr: [u64; 16],
    pub(super) flags: u64,
    pub(super) saved_rsp: u64,
    pub(super) xmm: [[u8; 16]; 16],
}

/// A page of code, a context, and the test area, all below 2 GiB.
pub(super) struct Native {
    base: *mut u8,
    /// Where in the code page the instruction under test goes: behind the code that loads the context.
    slot: usize,
}

/// Where the code that stores the context begins.
const EPILOGUE_OFFSET: usize = 2048;
const CONTEXT_OFFSET: usize = 4096;
const AREA_OFFSET: usize = 8192;
const MAPPED: usize = AREA_OFFSET + AREA;

impl Native {
    pub(super) fn new() -> Self {
        // SAFETY: an anonymous mapping at an address of the kernel's choice touches no existing memory.
        let base = unsafe {
            libc::mmap(
                ptr::null_mut(),
                MAPPED,
                libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_32BIT,
                -1,
                0,
            )
        };
        assert_ne!(base, libc::MAP_FAILED, "cannot map an executable page");
        let mut native = Native { base: base.cast(), slot: 0 };
        let (prologue, epilogue) = native.trampoline();
        assert!(prologue.len() + 32 <= EPILOGUE_OFFSET && EPILOGUE_OFFSET + epilogue.len() <= CONTEXT_OFFSET);
        native.slot = prologue.len();
        native.put(0, &prologue);
        native.put(EPILOGUE_OFFSET, &epilogue);
        native
    }

    fn put(&self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= MAPPED);
        // SAFETY: the range lies in the mapping made in `new`, which no reference points into.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), self.base.add(offset), bytes.len()) }
    }

    pub(super) fn area(&self) -> u64 {
        self.base as u64 + AREA_OFFSET as u64
    }

    /// Runs `instruction` with `context` on `area`, and returns both as it left them.
    pub(super) fn execute(&self, instruction: &[u8], context: &Context, area: &[u8]) -> (Context, Vec<u8>) {
        assert!(instruction.len() <= 15 && area.len() == AREA);
        self.put(self.slot, instruction);
        let end = self.slot + instruction.len();
        let distance = (EPILOGUE_OFFSET - (end + 5)) as i32;
        self.put(end, &[0xe9]);
        self.put(end + 1, &distance.to_le_bytes());
        self.put(AREA_OFFSET, area);
        // SAFETY: the offsets lie in the mapping made in `new`, which no reference points into; the context's place is
        // aligned. The program saves and restores the callee-saved registers, the stack pointer and DF, and the
        // caller chose an instruction that touches the area only and falls through, so the call obeys the C ABI.
        unsafe {
            let place = self.base.add(CONTEXT_OFFSET).cast::<Context>();
            place.write(context.clone());
            let entry: extern "C" fn() = std::mem::transmute(self.base);
            entry();
            let mut after = vec![0; AREA];
            ptr::copy_nonoverlapping(self.base.add(AREA_OFFSET), after.as_mut_ptr(), AREA);
            ((*place).clone(), after)
        }
    }

    /// The code that loads everything from the context, and the code that stores everything back and returns.
    fn trampoline(&self) -> (Vec<u8>, Vec<u8>) {
        use asm::{r10, r11, r12, r13, r14, r15, r8, r9, rax, rbp, rbx, rcx, rdi, rdx, rsi, rsp};
        let registers = [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15];
        let vectors = [
            asm::xmm0,
            asm::xmm1,
            asm::xmm2,
            asm::xmm3,
            asm::xmm4,
            asm::xmm5,
            asm::xmm6,
            asm::xmm7,
            asm::xmm8,
            asm::xmm9,
            asm::xmm10,
            asm::xmm11,
            asm::xmm12,
            asm::xmm13,
            asm::xmm14,
            asm::xmm15,
        ];
        let kept = [rbx, rbp, r12, r13, r14, r15];
        let context = self.base as u64 + CONTEXT_OFFSET as u64;
        let field = |offset: usize| asm::qword_ptr(context + offset as u64);
        let flags = field(std::mem::offset_of!(Context, flags));
        let saved = field(std::mem::offset_of!(Context, saved_rsp));
        let vector = |i: usize| asm::xmmword_ptr(context + (std::mem::offset_of!(Context, xmm) + 16 * i) as u64);
        let build = || -> Result<(Vec<u8>, Vec<u8>), iced_x86::IcedError> {
            let mut a = CodeAssembler::new(64)?;
            for register in kept {
                a.push(register)?;
            }
            a.mov(saved, rsp)?;
            for (i, &xmm) in vectors.iter().enumerate() {
                a.movups(xmm, vector(i))?;
            }
            a.push(flags)?;
            a.popfq()?;
            for (i, &register) in registers.iter().enumerate() {
                a.mov(register, field(8 * i))?;
            }
            let prologue = a.assemble(self.base as u64)?;
            a.reset();
            for (i, &register) in registers.iter().enumerate() {
                a.mov(field(8 * i), register)?;
            }
            a.mov(rsp, saved)?;
            a.pushfq()?;
            a.pop(flags)?;
            a.cld()?;
            for (i, &xmm) in vectors.iter().enumerate() {
                a.movups(vector(i), xmm)?;
            }
            for &register in kept.iter().rev() {
                a.pop(register)?;
            }
            a.ret()?;
            Ok((prologue, a.assemble(self.base as u64 + EPILOGUE_OFFSET as u64)?))
        };
        build().expect("the trampoline assembles")
    }
}

impl Drop for Native {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`; nothing refers to it after this.
        unsafe {
            libc::munmap(self.base.cast(), MAPPED);
        }
    }
}
