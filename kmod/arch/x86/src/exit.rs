// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! What is done about an exit. The same for all backends, which have said in [`Exit`] what the exit was.

use axvcpu_uapi::vcpu::ExitKind;
use axvcpu_uapi::x86::{RAX, RBX, RCX, RDI, RDX, RSI};
use vcpu_core::npt::Format;
use vcpu_core::AxVCpuExitReason as Reason;

use crate::apic::{self, Effect, Mode};
use crate::backend::{ControlAccess, Exit, Exited, Instruction, Io, Refusal, Simple};
use crate::cpu;
use crate::cpuid::Dynamic;
use crate::events::{Activity, Injection, Plan};
use crate::hal::X86Hal;
use crate::length::{self, Found, MAX_LENGTH};
use crate::linear::Paging;
use crate::msr::{Access, Written, PRED_CMD, PRED_CMD_IBPB, TSC_AUX};
use crate::nested::{NestedMemory, Recorded};
use crate::regs::{cr0, rflags, DR6_BS};
use crate::state::{is_long_code, Guest, Registers};

/// R8.
const R8: usize = 8;

/// CR0 after LMSW of `value`: the low four bits, except that PE cannot be cleared.
const fn after_lmsw(cr0: u64, value: u16) -> u64 {
    cr0 & !(cr0::MP | cr0::EM | cr0::TS) | value as u64 & 0xf
}

/// What an exit to userspace has left open, to be finished with its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pending {
    /// Nothing.
    None,
    /// IN: the value goes to the low `bytes` of RAX.
    Input { bytes: usize },
    /// RDMSR at `rip`: the value goes to EDX:EAX, or #GP.
    MsrRead { rip: u64 },
    /// WRMSR at `rip`: done, or #GP.
    MsrWrite { rip: u64 },
    /// A hypercall: the value goes to RAX.
    Hypercall,
}

/// An answer from userspace.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reply {
    /// The value read, or the hypercall's result.
    pub value: u64,
    /// Refuse an access to a system register: the guest gets #GP(0).
    pub fault: bool,
}

/// `old` with its low `bytes` replaced, as an instruction of that operand size writes a register: 4 bytes clear the upper half.
fn merge(old: u64, value: u64, bytes: usize) -> u64 {
    match bytes {
        1 => old & !0xff | value & 0xff,
        2 => old & !0xffff | value & 0xffff,
        _ => value & 0xffff_ffff,
    }
}

impl<H: X86Hal> Guest<H> {
    /// Deals with an exit of an entry that was made with `plan`. What there is to tell goes to `reason`, which is
    /// [`Nothing`](Reason::Nothing) before.
    #[inline]
    pub(crate) fn handle(&mut self, regs: &mut impl Registers, plan: &Plan, reason: &mut Reason) {
        if let Exited { exit: Exit::Instruction(instruction, next), interrupted: None } = self.exited {
            self.exit_kind = instruction.kind();
            return self.execute(regs, instruction, next, reason);
        }
        self.handle_event(regs, plan, reason);
    }

    /// An exit that is not just an instruction.
    #[inline(never)]
    fn handle_event(&mut self, regs: &mut impl Registers, plan: &Plan, reason: &mut Reason) {
        let Exited { exit, interrupted } = self.exited;
        self.exit_kind = exit.kind();
        match exit {
            // Exceptions combine with what was being delivered; after a triple fault there is nothing to go on with.
            Exit::Exception(_) | Exit::NotEntered(_) | Exit::TripleFault => {}
            _ => {
                if let Some(event) = interrupted {
                    self.events.requeue(event, plan.inject);
                }
            }
        }
        *reason = match exit {
            Exit::Instruction(instruction, next) => return self.execute(regs, instruction, next, reason),
            Exit::Interrupt => Reason::ExternalInterrupt { vector: 0 },
            Exit::PreemptionTimer if self.deadline_reached() => {
                self.exit_kind = ExitKind::Timer;
                Reason::Nothing
            }
            Exit::PreemptionTimer => Reason::PreemptionTimer,
            Exit::PageFault { addr, access } => Reason::NestedPageFault { addr, access_flags: access },
            Exit::Window if self.events.window_requested() && self.window_open(regs) => Reason::InterruptWindow,
            Exit::Window | Exit::Done(_) => Reason::Nothing,
            Exit::Apic(effect) => self.after_apic(effect),
            Exit::Exception(exception) => {
                if self.events.exception_exit(exception, interrupted) {
                    Reason::TripleFault
                } else {
                    Reason::Nothing
                }
            }
            Exit::Raise(exception) => {
                self.events.raise(exception);
                Reason::Nothing
            }
            Exit::TaskSwitch { selector, source } => Reason::TaskSwitch { selector, source },
            Exit::TripleFault => Reason::TripleFault,
            Exit::MachineCheck => Reason::MachineCheck,
            Exit::Unsupported(code) => Reason::UnsupportedInstruction { code },
            Exit::Unknown { code, info1, info2 } => Reason::Unknown { code, info1, info2 },
            Exit::NotEntered(refusal) => self.not_entered(plan, refusal),
        };
    }

    #[cold]
    fn not_entered(&mut self, plan: &Plan, refusal: Refusal) -> Reason {
        self.events.undo(plan.inject);
        match refusal {
            Refusal::Controls(code) => Reason::FailEntry { hardware_entry_failure_reason: code },
            Refusal::State { reason, qualification, field } => {
                Reason::InvalidGuestState { reason, qualification, field }
            }
            Refusal::MachineCheck => Reason::MachineCheck,
        }
    }

    // --- Instructions ---

    /// Executes a frequent instruction for the guest. What there is to tell goes to `reason`, which is
    /// [`Nothing`](Reason::Nothing) before: mostly it stays so, and reasons are long.
    #[inline(always)] // Into the hot path; the other caller is rare.
    pub(crate) fn execute_simple(
        &mut self,
        regs: &mut impl Registers,
        instruction: Simple,
        next: u64,
        reason: &mut Reason,
    ) {
        self.exit_kind = instruction.kind();
        match instruction {
            Simple::Cpuid => {
                self.cpuid(regs);
                self.private = true;
                self.advance(regs, next);
            }
            Simple::Rdmsr => self.rdmsr(regs, next, reason),
            Simple::Wrmsr => self.wrmsr(regs, next, reason),
            Simple::Io(io) => self.io(regs, io, next, reason),
        }
    }

    /// Executes an instruction for the guest.
    #[inline(never)]
    fn execute(&mut self, regs: &mut impl Registers, instruction: Instruction, next: u64, reason: &mut Reason) {
        *reason = match instruction {
            Instruction::Simple(simple) => return self.execute_simple(regs, simple, next, reason),
            Instruction::CacheFlush | Instruction::Pause => self.go_on(regs, next),
            Instruction::IoString(Io { port, width, input, rep, .. }) => Reason::IoString { port, width, input, rep },
            Instruction::Hlt => self.hlt(regs, next),
            Instruction::Control(access) => self.control(regs, access, next),
            Instruction::Xsetbv => self.set_xcr0(regs, next),
            Instruction::Hypercall => self.hypercall(regs, next),
        };
    }

    /// Goes on behind an instruction that has been executed for the guest.
    #[inline]
    pub(crate) fn advance(&mut self, regs: &mut impl Registers, next_rip: u64) {
        // Outside of 64-bit code the instruction pointer has 32 bits.
        regs.set_rip(if is_long_code(regs) { next_rip } else { next_rip & 0xffff_ffff });
        regs.set_shadow(false);
        let flags = regs.rflags();
        regs.set_rflags(flags & !rflags::RF);
        if flags & rflags::TF != 0 {
            regs.set_dr6(regs.dr6() | DR6_BS);
            self.events.raise_trap();
        }
    }

    /// Goes on behind the instruction at RIP if it is a plain store of 64-bit code, which does nothing but the write that the
    /// last exit, a nested page fault, has told of. False, with nothing done, if it is another instruction or if an event was
    /// being delivered. Interrupts have been off since the exit.
    pub(crate) fn skip_store<F: Format>(&mut self, regs: &mut impl Registers) -> bool {
        if self.events.event_waits() || !is_long_code(regs) {
            return false;
        }
        let paging = Paging { cr0: regs.cr0(), cr3: regs.cr3(), cr4: regs.cr4(), efer: regs.efer() };
        let rip = regs.rip();
        // SAFETY: Interrupts have been off since the exit, and were before: the TLB had been flushed for all translations that had
        // been taken away, and with that the store forgotten.
        let known = self.store.as_ref().and_then(|store| unsafe { store.length::<H>(rip, &paging) });
        let Some(length) = known.or_else(|| self.measure_store::<F>(rip, paging)) else { return false };
        self.advance(regs, rip.wrapping_add(length.into()));
        true
    }

    /// The length of the plain store at `rip`, if there is one, which is remembered. Interrupts have been off since the exit.
    #[inline(never)]
    fn measure_store<F: Format>(&mut self, rip: u64, paging: Paging) -> Option<u8> {
        // SAFETY: The root is the module's nested page table of `npt_levels` levels, in the backend's format (`set_ept_root`);
        // interrupts are off until the caller has the answer, and the object is gone by then.
        let memory = unsafe { NestedMemory::<H, F>::new(self.root, self.caps.npt_levels) };
        let mut bytes = [0; MAX_LENGTH];
        let recorded = Recorded::new(&memory);
        let count = paging.read(&recorded, rip, u64::MAX, &mut bytes);
        let Found { length, .. } = length::find(bytes.get(..count)?, true, length::Instruction::Store)?;
        self.store = recorded.known(rip, paging, bytes.get(..length.into())?);
        Some(length)
    }

    /// #GP(0) at the current instruction.
    pub(crate) fn general_protection(&mut self) {
        self.events.raise(Injection::GENERAL_PROTECTION);
    }

    /// Answers CPUID.
    #[inline]
    pub(crate) fn cpuid(&mut self, regs: &mut impl Registers) {
        use axvcpu_uapi::x86::{RAX, RBX, RCX, RDX};
        let dynamic = Dynamic {
            cr4: regs.cr4(),
            xcr0: self.xcr0,
            apic_enabled: self.lapic().map_or(self.apic_base() & 1 << 11 != 0, |lapic| lapic.mode() != Mode::Disabled),
            apic_id: self.apic_id(),
        };
        let Some(table) = &self.cpuid else { return };
        let answer = table.lookup(regs.gpr(RAX) as u32, regs.gpr(RCX) as u32, &dynamic);
        regs.set_gpr(RAX, answer.eax.into());
        regs.set_gpr(RBX, answer.ebx.into());
        regs.set_gpr(RCX, answer.ecx.into());
        regs.set_gpr(RDX, answer.edx.into());
    }

    /// XSETBV: whether XCR0 has a new value; otherwise #GP is due.
    pub(crate) fn xsetbv(&mut self, regs: &impl Registers) -> bool {
        use axvcpu_uapi::x86::{RAX, RCX, RDX};
        let value = regs.gpr(RDX) << 32 | regs.gpr(RAX) & 0xffff_ffff;
        let valid = regs.cpl() == 0 && regs.gpr(RCX) as u32 == 0 && self.limits.xcr0_valid(value);
        if valid {
            self.xcr0 = value;
        }
        valid
    }

    /// Finishes what the last exit left open.
    pub(crate) fn complete(&mut self, regs: &mut impl Registers, reply: Reply) {
        use axvcpu_uapi::x86::{RAX, RDX};
        match core::mem::replace(&mut self.pending, Pending::None) {
            Pending::None => {}
            Pending::Input { bytes } => {
                let old = regs.gpr(RAX);
                regs.set_gpr(RAX, merge(old, reply.value, bytes));
            }
            Pending::MsrRead { rip } | Pending::MsrWrite { rip } if reply.fault => {
                // The access has not happened: back to the instruction, and no trap for having completed it.
                regs.set_rip(rip);
                self.events.cancel_trap();
                self.general_protection();
            }
            Pending::MsrRead { .. } => {
                regs.set_gpr(RAX, reply.value & 0xffff_ffff);
                regs.set_gpr(RDX, reply.value >> 32);
            }
            Pending::MsrWrite { .. } => {}
            Pending::Hypercall => regs.set_gpr(RAX, reply.value),
        }
    }

    /// The instruction has been executed.
    fn go_on(&mut self, regs: &mut impl Registers, next: u64) -> Reason {
        self.advance(regs, next);
        Reason::Nothing
    }

    /// The instruction raises #GP(0).
    fn fault(&mut self) -> Reason {
        self.private = true;
        self.general_protection();
        Reason::Nothing
    }

    #[inline(never)]
    fn rdmsr(&mut self, regs: &mut impl Registers, next: u64, reason: &mut Reason) {
        let rip = regs.rip();
        let index = regs.gpr(RCX) as u32;
        match self.read_msr(regs, index) {
            Access::Done(value) => {
                // Reading the local APIC's timer may let it expire.
                self.private = !apic::owns_msr(index);
                regs.set_gpr(RAX, value & 0xffff_ffff);
                regs.set_gpr(RDX, value >> 32);
                self.advance(regs, next);
            }
            Access::Fault => *reason = self.fault(),
            Access::User => {
                self.exit_kind = ExitKind::MsrUser;
                self.advance(regs, next);
                self.pending = Pending::MsrRead { rip };
                *reason = Reason::SysRegRead { addr: index.into(), reg: 0 };
            }
        }
    }

    #[inline(never)]
    fn wrmsr(&mut self, regs: &mut impl Registers, next: u64, reason: &mut Reason) {
        let rip = regs.rip();
        let index = regs.gpr(RCX) as u32;
        let value = regs.gpr(RDX) << 32 | regs.gpr(RAX) & 0xffff_ffff;
        match self.write_msr(regs, index, value) {
            Access::Done(written) => {
                self.advance(regs, next);
                self.after_write(index, written, reason);
            }
            Access::Fault => *reason = self.fault(),
            Access::User => {
                self.exit_kind = ExitKind::MsrUser;
                self.advance(regs, next);
                self.pending = Pending::MsrWrite { rip };
                *reason = Reason::SysRegWrite { addr: index.into(), value };
            }
        }
    }

    /// What a write of an MSR has set off.
    #[inline]
    fn after_write(&mut self, index: u32, written: Written, reason: &mut Reason) {
        match written {
            Written::Quiet => {
                if index == TSC_AUX {
                    // SAFETY: In a window, which has TSC_AUX for the guest; the CPU has it, or the guest could not write it.
                    unsafe { cpu::wrmsr(index, self.msrs.tsc_aux) };
                }
            }
            Written::BranchBarrier => {
                // SAFETY: Kernel context; the CPU has it, or the guest could not write it.
                unsafe { cpu::wrmsr(PRED_CMD, PRED_CMD_IBPB) };
            }
            Written::Apic(Effect::None) => self.private = apic::is_own_affair(index),
            Written::Apic(effect) => *reason = self.after_apic(effect),
        }
    }

    /// What an access to the local APIC has set off.
    #[inline]
    fn after_apic(&mut self, effect: Effect) -> Reason {
        match effect {
            Effect::None => Reason::Nothing,
            Effect::InterruptEnd(vector) => Reason::InterruptEnd { vector: Some(vector) },
            Effect::Ipi(command) => {
                self.exit_kind = ExitKind::Ipi;
                Reason::SendIPI {
                    target_cpu: command >> 32,
                    target_cpu_aux: 0,
                    send_to_all: command >> 18 & 3 >= 2,
                    send_to_self: command >> 18 & 3 == 1 || command >> 18 & 3 == 2,
                    vector: command & 0xffff_ffff,
                }
            }
        }
    }

    #[inline]
    fn io(&mut self, regs: &mut impl Registers, io: Io, next: u64, reason: &mut Reason) {
        let Io { port, width, input, .. } = io;
        self.advance(regs, next);
        if input {
            self.pending = Pending::Input { bytes: width.size() };
            *reason = Reason::IoRead { port, width };
        } else {
            *reason = Reason::IoWrite { port, width, data: regs.gpr(RAX) & width.mask() };
        }
    }

    fn hlt(&mut self, regs: &mut impl Registers, next: u64) -> Reason {
        self.advance(regs, next);
        if self.lapic().is_none() {
            return Reason::Halt;
        }
        self.events.set_activity(Activity::Halted);
        if self.update_activity(regs) {
            Reason::Nothing
        } else {
            Reason::Halt
        }
    }

    fn control(&mut self, regs: &mut impl Registers, access: ControlAccess, next: u64) -> Reason {
        let allowed = match access {
            ControlAccess::Write { number, register } => {
                // Outside of 64-bit code the operand has 32 bits.
                let value = regs.gpr(register.into()) & if is_long_code(regs) { u64::MAX } else { 0xffff_ffff };
                match number {
                    0 => self.write_cr0(regs, value).is_ok(),
                    4 => self.write_cr4(regs, value).is_ok(),
                    8 if value <= 15 => {
                        self.set_cr8(value as u8);
                        true
                    }
                    _ => false,
                }
            }
            ControlAccess::Read { number: 8, register } => {
                regs.set_gpr(register.into(), self.cr8().into());
                true
            }
            ControlAccess::Read { .. } => false,
            ControlAccess::Clts => {
                regs.set_cr0(regs.cr0() & !cr0::TS);
                true
            }
            ControlAccess::Lmsw(value) => self.write_cr0(regs, after_lmsw(regs.cr0(), value)).is_ok(),
        };
        if allowed {
            self.go_on(regs, next)
        } else {
            self.fault()
        }
    }

    fn set_xcr0(&mut self, regs: &mut impl Registers, next: u64) -> Reason {
        if !self.xsetbv(regs) {
            return self.fault();
        }
        // SAFETY: In a window, which has XCR0 for the guest and puts the host's back; the CPU takes the value, since it is a
        // valid combination of components that the host itself has enabled.
        unsafe { cpu::set_xcr0(self.xcr0) };
        self.go_on(regs, next)
    }

    fn hypercall(&mut self, regs: &mut impl Registers, next: u64) -> Reason {
        self.advance(regs, next);
        self.pending = Pending::Hypercall;
        let gpr = |register| regs.gpr(register);
        Reason::Hypercall { nr: gpr(RAX), args: [gpr(RBX), gpr(RCX), gpr(RDX), gpr(RSI), gpr(RDI), gpr(R8)] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lmsw_sets_but_does_not_clear_protected_mode() {
        assert_eq!(after_lmsw(0x8000_0011, 0), 0x8000_0011);
        assert_eq!(after_lmsw(0x10, 0xffff), 0x1f);
        assert_eq!(after_lmsw(0x1e, 1), 0x11);
    }

    #[test]
    fn input_replaces_as_much_of_rax_as_the_instruction_does() {
        let old = 0x1122_3344_5566_7788;
        assert_eq!(merge(old, !0, 1), 0x1122_3344_5566_77ff);
        assert_eq!(merge(old, !0, 2), 0x1122_3344_5566_ffff);
        assert_eq!(merge(old, 0xaaaa_bbbb_cccc_dddd, 4), 0xcccc_dddd);
    }
}
