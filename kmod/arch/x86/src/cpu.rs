// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! Instructions of the host CPU. All of the crate's privileged instructions are here, but for the world switches
//! (`svm/switch.rs`, `vmx/switch.rs`) and what only VMX needs (`vmx/instructions.rs`); nothing in this file decides anything.

use core::arch::asm;

/// A result of CPUID.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Cpuid {
    pub(crate) eax: u32,
    pub(crate) ebx: u32,
    pub(crate) ecx: u32,
    pub(crate) edx: u32,
}

/// CPUID of the host.
pub(crate) fn cpuid(leaf: u32, index: u32) -> Cpuid {
    // SAFETY: Every x86-64 CPU has CPUID.
    #[allow(unused_unsafe)]
    let r = unsafe { core::arch::x86_64::__cpuid_count(leaf, index) };
    Cpuid { eax: r.eax, ebx: r.ebx, ecx: r.ecx, edx: r.edx }
}

/// The time-stamp counter.
#[inline]
pub(crate) fn rdtsc() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: Reads a counter; Linux leaves it readable at every privilege level that runs this.
    unsafe { asm!("rdtsc", out("eax") low, out("edx") high, options(nomem, nostack, preserves_flags)) };
    u64::from(high) << 32 | u64::from(low)
}

/// Waits until all that precedes is done, memory included (SDM vol. 3, serializing instructions).
pub(crate) fn serialize() {
    cpuid(0, 0);
}

/// LFENCE: waits until all that precedes has been executed.
#[inline]
pub(crate) fn load_fence() {
    // SAFETY: Changes nothing.
    unsafe { asm!("lfence", options(nostack, preserves_flags)) };
}

/// Reads an MSR.
///
/// # Safety
/// At CPL 0, and the MSR exists.
#[inline]
pub(crate) unsafe fn rdmsr(index: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: The caller's promise: no fault; reading changes nothing.
    unsafe { asm!("rdmsr", in("ecx") index, out("eax") low, out("edx") high, options(nostack, preserves_flags)) };
    u64::from(high) << 32 | u64::from(low)
}

/// Writes an MSR.
///
/// # Safety
/// At CPL 0, the MSR exists and takes `value`, and the caller answers for what that does to the host.
#[inline]
pub(crate) unsafe fn wrmsr(index: u32, value: u64) {
    // SAFETY: The caller's promise.
    unsafe {
        asm!("wrmsr", in("ecx") index, in("eax") value as u32, in("edx") (value >> 32) as u32, options(nostack, preserves_flags))
    };
}

/// CR4.
///
/// # Safety
/// At CPL 0.
#[inline]
pub(crate) unsafe fn cr4() -> u64 {
    let value;
    // SAFETY: The caller's promise; reading changes nothing.
    unsafe { asm!("mov {}, cr4", out(reg) value, options(nomem, nostack, preserves_flags)) };
    value
}

/// CR2.
///
/// # Safety
/// At CPL 0.
#[inline]
pub(crate) unsafe fn cr2() -> u64 {
    let value;
    // SAFETY: The caller's promise; reading changes nothing.
    unsafe { asm!("mov {}, cr2", out(reg) value, options(nomem, nostack, preserves_flags)) };
    value
}

/// Sets CR2, which holds the address of the last page fault and steers nothing.
///
/// # Safety
/// At CPL 0.
#[inline]
pub(crate) unsafe fn set_cr2(value: u64) {
    // SAFETY: The caller's promise.
    unsafe { asm!("mov cr2, {}", in(reg) value, options(nomem, nostack, preserves_flags)) };
}

/// XCR0.
///
/// # Safety
/// CR4.OSXSAVE is set.
#[inline]
pub(crate) unsafe fn xcr0() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: The caller's promise.
    unsafe { asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high, options(nomem, nostack, preserves_flags)) };
    u64::from(high) << 32 | u64::from(low)
}

/// Sets XCR0.
///
/// # Safety
/// At CPL 0, CR4.OSXSAVE is set, the CPU takes `value`, and until the host's value is back nothing else uses the FPU.
#[inline]
pub(crate) unsafe fn set_xcr0(value: u64) {
    // SAFETY: The caller's promise.
    unsafe {
        asm!("xsetbv", in("ecx") 0, in("eax") value as u32, in("edx") (value >> 32) as u32, options(nostack, preserves_flags))
    };
}

/// PKRU.
///
/// # Safety
/// CR4.PKE is set.
#[inline]
pub(crate) unsafe fn pkru() -> u32 {
    let value;
    // SAFETY: The caller's promise.
    unsafe { asm!("rdpkru", in("ecx") 0, out("eax") value, out("edx") _, options(nomem, nostack, preserves_flags)) };
    value
}

/// Sets PKRU.
///
/// # Safety
/// CR4.PKE is set, and user memory is not accessed until the host's value is back.
#[inline]
pub(crate) unsafe fn set_pkru(value: u32) {
    // SAFETY: The caller's promise.
    unsafe { asm!("wrpkru", in("ecx") 0, in("eax") value, in("edx") 0, options(nostack, preserves_flags)) };
}

/// DR0 to DR3.
///
/// # Safety
/// At CPL 0.
pub(crate) unsafe fn breakpoints() -> [u64; 4] {
    let (a, b, c, d);
    // SAFETY: The caller's promise; DR7.GD is never set by Linux.
    unsafe {
        asm!("mov {0}, dr0", "mov {1}, dr1", "mov {2}, dr2", "mov {3}, dr3",
            out(reg) a, out(reg) b, out(reg) c, out(reg) d, options(nomem, nostack, preserves_flags))
    };
    [a, b, c, d]
}

/// Sets DR0 to DR3.
///
/// # Safety
/// At CPL 0, with breakpoints disabled in DR7.
pub(crate) unsafe fn set_breakpoints([a, b, c, d]: [u64; 4]) {
    // SAFETY: The caller's promise.
    unsafe {
        asm!("mov dr0, {0}", "mov dr1, {1}", "mov dr2, {2}", "mov dr3, {3}",
            in(reg) a, in(reg) b, in(reg) c, in(reg) d, options(nomem, nostack, preserves_flags))
    };
}

/// DR6 and DR7.
///
/// # Safety
/// At CPL 0.
#[inline]
pub(crate) unsafe fn debug_status_control() -> (u64, u64) {
    let (dr6, dr7);
    // SAFETY: The caller's promise.
    unsafe {
        asm!("mov {0}, dr6", "mov {1}, dr7", out(reg) dr6, out(reg) dr7, options(nomem, nostack, preserves_flags))
    };
    (dr6, dr7)
}

/// Sets DR6.
///
/// # Safety
/// At CPL 0.
#[inline]
pub(crate) unsafe fn set_dr6(value: u64) {
    // SAFETY: The caller's promise.
    unsafe { asm!("mov dr6, {}", in(reg) value, options(nomem, nostack, preserves_flags)) };
}

/// Sets DR7.
///
/// # Safety
/// At CPL 0, and DR0 to DR3 hold what the breakpoints enabled by it mean.
#[inline]
pub(crate) unsafe fn set_dr7(value: u64) {
    // SAFETY: The caller's promise.
    unsafe { asm!("mov dr7, {}", in(reg) value, options(nostack, preserves_flags)) };
}

/// Runs `f` with interrupts off, and leaves them as they were.
///
/// # Safety
/// At CPL 0.
#[inline]
pub(crate) unsafe fn with_interrupts_off<T>(f: impl FnOnce() -> T) -> T {
    let flags: u64;
    // SAFETY: The caller's promise. Not `nomem`: memory accesses must stay inside.
    unsafe { asm!("pushfq", "pop {}", "cli", out(reg) flags) };
    let result = f();
    if flags & 1 << 9 != 0 {
        // SAFETY: They were on before.
        unsafe { asm!("sti", options(nostack)) };
    }
    result
}

/// Takes the machine check that an intercept has kept from the host, through the host's own handler.
///
/// # Safety
/// At CPL 0, with the host's IDT, whose vector 18 has a handler (no FRED).
pub(crate) unsafe fn raise_machine_check() {
    // SAFETY: The caller's promise; the handler returns here or not at all.
    unsafe { asm!("int 18") };
}

/// XSAVE of the components `mask` to `area`.
///
/// # Safety
/// CR4.OSXSAVE is set; `area` is aligned to 64 bytes and has room for the components of `mask` that XCR0 enables.
#[inline]
pub(crate) unsafe fn xsave(area: *mut u8, mask: u64) {
    // SAFETY: The caller's promise.
    unsafe {
        asm!("xsave64 [{}]", in(reg) area, in("eax") mask as u32, in("edx") (mask >> 32) as u32, options(nostack, preserves_flags))
    };
}

/// XRSTOR of the components `mask` from `area`.
///
/// # Safety
/// As [`xsave`]; the area's header is valid, MXCSR has no reserved bit, and the FPU registers are the caller's to change.
#[inline]
pub(crate) unsafe fn xrstor(area: *const u8, mask: u64) {
    // SAFETY: The caller's promise.
    unsafe {
        asm!("xrstor64 [{}]", in(reg) area, in("eax") mask as u32, in("edx") (mask >> 32) as u32, options(nostack, preserves_flags))
    };
}

/// Clears the x87 instruction and data pointers, which some CPUs neither save nor load while no exception is pending
/// (APM vol. 2 section 11.4.4.3; Linux: `X86_BUG_FXSAVE_LEAK`).
///
/// # Safety
/// The FPU registers are the caller's to change.
pub(crate) unsafe fn clear_x87_pointers() {
    let zero: u32 = 0;
    // SAFETY: The caller's promise. A load that cannot fault sets the pointers to this instruction's.
    unsafe { asm!("fnclex", "emms", "fild dword ptr [{}]", in(reg) &zero, options(nostack, readonly)) };
}

/// VMSAVE: stores the FS, GS, TR, LDTR and system call state to the VMCB at physical address `vmcb`.
///
/// # Safety
/// At CPL 0, EFER.SVME is set, and `vmcb` is a frame of the caller's.
#[inline]
pub(crate) unsafe fn vmsave(vmcb: u64) {
    // SAFETY: The caller's promise.
    unsafe { asm!("vmsave rax", in("rax") vmcb, options(nostack, preserves_flags)) };
}
