// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The VMX instructions (SDM vol. 3, chapter 31), and those that read and load what a VM exit does not restore: descriptor
//! tables, task register, segment registers. Nothing here decides anything.
//!
//! In the kernel, each VMX instruction and each load of a selector has an entry in the exception table: should somebody
//! switch VMX off under us, the instruction fails instead of taking the host down.

use core::arch::asm;

/// An instruction has failed, or VMX is off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Failed;

/// Base and limit, as SGDT stores and LGDT loads them.
#[repr(C, packed)]
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Table {
    pub(super) limit: u16,
    pub(super) base: u64,
}

// An exception table entry: a fault at label 2 goes on at label 3 (Linux arch/x86/include/asm/asm.h: from, to,
// EX_TYPE_DEFAULT).
#[cfg(axvcpu_kernel)]
macro_rules! fixup {
    () => {
        ".pushsection __ex_table,\"a\"\n.balign 4\n.long 2b - .\n.long 3b - .\n.long 1\n.popsection"
    };
}
#[cfg(not(axvcpu_kernel))]
macro_rules! fixup {
    () => {
        ""
    };
}

const fn result(failed: u32) -> Result<(), Failed> {
    if failed == 0 {
        Ok(())
    } else {
        Err(Failed)
    }
}

// An instruction with a physical address in memory as its operand. CF or ZF tell of a failure, a fault leaves the 1.
macro_rules! with_pointer {
    ($(#[$meta:meta])* $name:ident, $instruction:literal) => {
        $(#[$meta])*
        pub(super) unsafe fn $name(phys: u64) -> Result<(), Failed> {
            let failed: u32;
            // SAFETY: The caller's promise; a fault is caught.
            unsafe {
                asm!(
                    "mov {failed:e}, 1",
                    concat!("2: ", $instruction, " qword ptr [{phys}]"),
                    "setbe {failed:l}",
                    "3:",
                    fixup!(),
                    failed = out(reg) failed,
                    phys = in(reg) &phys,
                    options(nostack),
                )
            };
            result(failed)
        }
    };
}

with_pointer! {
    /// VMXON: enters VMX root operation.
    ///
    /// # Safety
    /// At CPL 0, with CR4.VMXE set and interrupts off until VMXOFF. `phys` is a frame of the caller's that begins with the
    /// revision and that nobody touches until VMXOFF.
    vmxon, "vmxon"
}
with_pointer! {
    /// VMCLEAR: writes the VMCS back to memory and makes it no CPU's.
    ///
    /// # Safety
    /// At CPL 0. `phys` is a VMCS of the caller's.
    vmclear, "vmclear"
}
with_pointer! {
    /// VMPTRLD: makes the VMCS current.
    ///
    /// # Safety
    /// At CPL 0. `phys` is a VMCS that is active on no other CPU: the caller's, or the one that was current before.
    vmptrld, "vmptrld"
}

/// VMPTRST: the current VMCS; all ones for none.
///
/// # Safety
/// At CPL 0.
pub(super) unsafe fn vmptrst() -> Result<u64, Failed> {
    let mut phys = 0u64;
    let failed: u32;
    // SAFETY: The caller's promise; a fault is caught.
    unsafe {
        asm!(
            "mov {failed:e}, 1",
            "2: vmptrst qword ptr [{phys}]",
            "setbe {failed:l}",
            "3:",
            fixup!(),
            failed = out(reg) failed,
            phys = in(reg) &mut phys,
            options(nostack),
        )
    };
    result(failed).map(|()| phys)
}

/// VMXOFF: leaves VMX operation.
///
/// # Safety
/// At CPL 0, in VMX operation that the caller has entered, and no VMCS is active.
pub(super) unsafe fn vmxoff() -> Result<(), Failed> {
    let failed: u32;
    // SAFETY: The caller's promise; a fault is caught.
    unsafe {
        asm!(
            "mov {failed:e}, 1",
            "2: vmxoff",
            "setbe {failed:l}",
            "3:",
            fixup!(),
            failed = out(reg) failed,
            options(nostack),
        )
    };
    result(failed)
}

/// VMREAD of the field with this encoding; 0 if it fails.
///
/// # Safety
/// At CPL 0.
#[inline]
pub(super) unsafe fn vmread(encoding: u64) -> u64 {
    let value: u64;
    // SAFETY: The caller's promise; a fault is caught.
    unsafe {
        asm!(
            "xor {value:e}, {value:e}",
            "2: vmread {value}, {field}",
            "3:",
            fixup!(),
            value = out(reg) value,
            field = in(reg) encoding,
            options(nostack),
        )
    };
    value
}

/// VMWRITE of the field with this encoding.
///
/// # Safety
/// At CPL 0, and the current VMCS is the caller's.
#[inline]
pub(super) unsafe fn vmwrite(encoding: u64, value: u64) -> Result<(), Failed> {
    let failed: u32;
    // SAFETY: The caller's promise; a fault is caught.
    unsafe {
        asm!(
            "mov {failed:e}, 1",
            "2: vmwrite {field}, {value}",
            "setbe {failed:l}",
            "3:",
            fixup!(),
            failed = out(reg) failed,
            value = in(reg) value,
            field = in(reg) encoding,
            options(nostack),
        )
    };
    result(failed)
}

/// What INVEPT and INVVPID invalidate: the type is the same number for one context and for all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scope {
    /// One EPTP, or one VPID.
    Single = 1,
    /// All of them.
    All = 2,
}

// INVEPT and INVVPID: the scope in a register, the context in 16 bytes of memory.
macro_rules! invalidation {
    ($(#[$meta:meta])* $name:ident, $instruction:literal) => {
        $(#[$meta])*
        pub(super) unsafe fn $name(scope: Scope, context: u64) -> Result<(), Failed> {
            let descriptor = [context, 0];
            let failed: u32;
            // SAFETY: The caller's promise; a fault is caught.
            unsafe {
                asm!(
                    "mov {failed:e}, 1",
                    concat!("2: ", $instruction, " {scope}, xmmword ptr [{descriptor}]"),
                    "setbe {failed:l}",
                    "3:",
                    fixup!(),
                    failed = out(reg) failed,
                    scope = in(reg) scope as u64,
                    descriptor = in(reg) &descriptor,
                    options(nostack),
                )
            };
            result(failed)
        }
    };
}

invalidation! {
    /// INVEPT: translations by the extended page table of EPTP `context`.
    ///
    /// # Safety
    /// At CPL 0.
    invept, "invept"
}
invalidation! {
    /// INVVPID: translations under VPID `context`.
    ///
    /// # Safety
    /// At CPL 0.
    invvpid, "invvpid"
}

/// Sets CR4.
///
/// # Safety
/// At CPL 0, and the value is the present one but for VMXE, with interrupts off until it is back.
pub(super) unsafe fn set_cr4(value: u64) {
    // SAFETY: The caller's promise.
    unsafe { asm!("mov cr4, {}", in(reg) value, options(nostack, preserves_flags)) };
}

/// CR0 and CR3.
///
/// # Safety
/// At CPL 0.
pub(super) unsafe fn cr0_cr3() -> (u64, u64) {
    let (cr0, cr3);
    // SAFETY: The caller's promise; reading changes nothing.
    unsafe {
        asm!("mov {0}, cr0", "mov {1}, cr3", out(reg) cr0, out(reg) cr3, options(nomem, nostack, preserves_flags))
    };
    (cr0, cr3)
}

/// GDTR and IDTR.
///
/// # Safety
/// At CPL 0.
pub(super) unsafe fn descriptor_tables() -> (Table, Table) {
    let (mut gdtr, mut idtr) = (Table::default(), Table::default());
    // SAFETY: The caller's promise; both are stored to places of ours.
    unsafe {
        asm!("sgdt [{0}]", "sidt [{1}]", in(reg) &mut gdtr, in(reg) &mut idtr, options(nostack, preserves_flags))
    };
    (gdtr, idtr)
}

/// Loads GDTR.
///
/// # Safety
/// At CPL 0; the table holds the descriptors of all segments that are loaded until the host's is back.
pub(super) unsafe fn load_gdtr(table: &Table) {
    // SAFETY: The caller's promise.
    unsafe { asm!("lgdt [{}]", in(reg) table, options(nostack, preserves_flags)) };
}

/// Loads IDTR.
///
/// # Safety
/// At CPL 0; the table is the host's.
pub(super) unsafe fn load_idtr(table: &Table) {
    // SAFETY: The caller's promise.
    unsafe { asm!("lidt [{}]", in(reg) table, options(nostack, preserves_flags)) };
}

/// Selectors of the host.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Selectors {
    pub(super) cs: u16,
    pub(super) ss: u16,
    pub(super) ds: u16,
    pub(super) es: u16,
    pub(super) fs: u16,
    pub(super) gs: u16,
    pub(super) tr: u16,
    pub(super) ldt: u16,
}

/// The selectors that are loaded.
///
/// # Safety
/// At CPL 0, since SLDT and STR can be forbidden above.
pub(super) unsafe fn selectors() -> Selectors {
    let (cs, ss, ds, es, fs, gs, tr, ldt): (u32, u32, u32, u32, u32, u32, u32, u32);
    // SAFETY: The caller's promise; reading changes nothing.
    unsafe {
        asm!("mov {0:e}, cs", "mov {1:e}, ss", "mov {2:e}, ds", "mov {3:e}, es",
            out(reg) cs, out(reg) ss, out(reg) ds, out(reg) es, options(nomem, nostack, preserves_flags));
        asm!("mov {0:e}, fs", "mov {1:e}, gs", "str {2:e}", "sldt {3:e}",
            out(reg) fs, out(reg) gs, out(reg) tr, out(reg) ldt, options(nomem, nostack, preserves_flags));
    }
    Selectors {
        cs: cs as u16,
        ss: ss as u16,
        ds: ds as u16,
        es: es as u16,
        fs: fs as u16,
        gs: gs as u16,
        tr: tr as u16,
        ldt: ldt as u16,
    }
}

/// Loads TR.
///
/// # Safety
/// At CPL 0; the present GDT is writable and has an available TSS descriptor there, which describes the host's TSS.
pub(super) unsafe fn load_tr(selector: u16) {
    // SAFETY: The caller's promise.
    unsafe { asm!("ltr {0:x}", in(reg) selector, options(nostack, preserves_flags)) };
}

/// Loads LDTR.
///
/// # Safety
/// At CPL 0; the selector is the one that the host had loaded, and its GDT is.
pub(super) unsafe fn load_ldtr(selector: u16) {
    // SAFETY: The caller's promise.
    unsafe { asm!("lldt {0:x}", in(reg) selector, options(nostack, preserves_flags)) };
}

/// Loads DS, ES and FS. A selector that has become invalid leaves the null one.
///
/// # Safety
/// At CPL 0; FS base is set again afterwards.
pub(super) unsafe fn load_data_selectors(ds: u16, es: u16, fs: u16) {
    // SAFETY: The caller's promise. 64-bit kernel code uses none of them but FS, which user mode alone does; faults are caught.
    unsafe {
        asm!("2: mov ds, {0:e}", "3:", fixup!(), in(reg) u32::from(ds), options(nostack, preserves_flags));
        asm!("2: mov es, {0:e}", "3:", fixup!(), in(reg) u32::from(es), options(nostack, preserves_flags));
        asm!("2: mov fs, {0:e}", "3:", fixup!(), in(reg) u32::from(fs), options(nostack, preserves_flags));
    }
}

/// Loads GS without changing its base: the load's base goes to KERNEL_GS_BASE.
///
/// # Safety
/// At CPL 0 with interrupts off; KERNEL_GS_BASE holds the host's value, for an NMI that comes in between, and is set again
/// afterwards.
pub(super) unsafe fn load_gs_selector(gs: u16) {
    // SAFETY: The caller's promise; a fault is caught between the two SWAPGS, which then still match.
    unsafe {
        asm!("swapgs", "2: mov gs, {0:e}", "3: swapgs", fixup!(), in(reg) u32::from(gs), options(nostack, preserves_flags))
    };
}

/// Takes the NMI that an exit has brought, through the host's own handler, whose IRET unblocks NMIs again.
///
/// # Safety
/// At CPL 0, with the host's IDT (no FRED).
pub(super) unsafe fn raise_nmi() {
    // SAFETY: The caller's promise.
    unsafe { asm!("int 2") };
}
