// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! What exits mean (APM vol. 2 section 15.9 to 15.14 and appendix C), and what is done about each. Every code that our
//! intercepts can bring is named in [`Exit::decode`]; any other is reported as it is.

use axvcpu_uapi::vcpu::ExitKind;
use axvcpu_uapi::x86::{RAX, RBX, RCX, RDI, RDX, RSI};
use vcpu_core::npt::Npt;
use vcpu_core::{AccessFlags, AccessWidth, AxVCpuExitReason as Reason, GuestPhysAddr};

use super::vmcb::{int_control, Vmcb};
use super::{Iret, SvmVCpu};
use crate::apic::Effect;
use crate::cpu;
use crate::events::{Activity, Injection, AC, DB};
use crate::hal::X86Hal;
use crate::length::{self, Found, Instruction, MAX_LENGTH};
use crate::linear::Paging;
use crate::msr::{Access, Written, PRED_CMD, PRED_CMD_IBPB};
use crate::nested::NestedMemory;
use crate::regs::{cr0, cr4, efer, segment};
use crate::state::{is_long_code, Pending, Registers};

/// R8.
const R8: usize = 8;
/// TSC_AUX.
const TSC_AUX: u32 = 0xc000_0103;

/// EXITINFO1 of a control register access: the low half is the register's number (decode assists).
const MOV_CR_VALID: u64 = 1 << 63;

/// An exit code, understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Exit {
    /// MOV to this control register.
    WriteCr(u8),
    /// A write of CR0 that changes more than TS and MP, by MOV or LMSW.
    WriteCr0,
    /// Access to a debug register.
    DebugRegister,
    /// #DB.
    Debug,
    /// #AC.
    AlignmentCheck,
    /// #MC.
    MachineCheck,
    /// A physical interrupt.
    Interrupt,
    /// A physical NMI, SMI or INIT, which the host takes (or has taken) when GIF is set again.
    HostEvent,
    /// The virtual interrupt of an interrupt window.
    InterruptWindow,
    /// An instruction that does not exist for guests.
    Undefined,
    /// RDPMC.
    Rdpmc,
    /// CPUID.
    Cpuid,
    /// IRET.
    Iret,
    /// INVD.
    Invd,
    /// WBINVD.
    Wbinvd,
    /// PAUSE.
    Pause,
    /// HLT.
    Hlt,
    /// IN, OUT, INS, OUTS.
    Io,
    /// RDMSR, WRMSR.
    Msr,
    /// A task switch.
    TaskSwitch,
    /// The CPU would freeze for an external x87 error handler.
    FerrFreeze,
    /// Shutdown.
    Shutdown,
    /// VMMCALL.
    Vmmcall,
    /// XSETBV.
    Xsetbv,
    /// A nested page fault.
    NestedPageFault,
    /// The entry was refused.
    Invalid,
    /// Something else.
    Other,
}

impl Exit {
    /// Of EXITCODE (APM vol. 2 appendix C).
    const fn decode(code: u64) -> Self {
        // Error codes are negative, and some implementations store 32 bits only.
        if code as u32 == u32::MAX {
            return Self::Invalid;
        }
        match code {
            0x10..=0x1f => Self::WriteCr((code & 0xf) as u8),
            0x20..=0x3f => Self::DebugRegister,
            0x41 => Self::Debug,
            0x51 => Self::AlignmentCheck,
            0x52 => Self::MachineCheck,
            0x60 => Self::Interrupt,
            0x61..=0x63 => Self::HostEvent,
            0x64 => Self::InterruptWindow,
            0x65 => Self::WriteCr0,
            0x6f => Self::Rdpmc,
            0x72 => Self::Cpuid,
            0x74 => Self::Iret,
            0x76 => Self::Invd,
            0x77 => Self::Pause,
            0x78 => Self::Hlt,
            0x7b => Self::Io,
            0x7c => Self::Msr,
            0x7d => Self::TaskSwitch,
            0x7e => Self::FerrFreeze,
            0x7f => Self::Shutdown,
            0x81 => Self::Vmmcall,
            0x89 => Self::Wbinvd,
            0x8d => Self::Xsetbv,
            // RSM, INVLPGA; VMRUN, VMLOAD, VMSAVE, STGI, CLGI, SKINIT, RDTSCP; MONITOR, MWAIT (also armed), RDPRU; INVLPGB (also
            // illegal), INVPCID, MCOMMIT, TLBSYNC.
            0x73 | 0x7a | 0x80 | 0x82..=0x87 | 0x8a..=0x8c | 0x8e | 0xa0..=0xa4 => Self::Undefined,
            0x400 => Self::NestedPageFault,
            _ => Self::Other,
        }
    }

    /// For the statistics.
    const fn kind(self) -> ExitKind {
        match self {
            Self::WriteCr(_) | Self::WriteCr0 | Self::DebugRegister => ExitKind::Register,
            Self::Interrupt => ExitKind::HostInterrupt,
            Self::InterruptWindow | Self::Iret => ExitKind::Window,
            Self::Cpuid => ExitKind::Cpuid,
            Self::Pause => ExitKind::Pause,
            Self::Hlt => ExitKind::Halt,
            Self::Io => ExitKind::PortIo,
            Self::Msr => ExitKind::MsrRead,
            Self::Vmmcall => ExitKind::Hypercall,
            Self::Xsetbv => ExitKind::Xsetbv,
            Self::NestedPageFault => ExitKind::PageFault,
            _ => ExitKind::Other,
        }
    }
}

/// An event in the format of EVENTINJ (APM vol. 2 section 15.20).
pub(super) fn encode_event(event: Injection) -> u64 {
    const VALID: u64 = 1 << 31;
    const HAS_CODE: u64 = 1 << 11;
    let kind = |number: u64, vector: u8| VALID | number << 8 | u64::from(vector);
    match event {
        Injection::External(vector) => kind(0, vector),
        Injection::Nmi => kind(2, 2),
        Injection::Exception(vector, None) => kind(3, vector),
        Injection::Exception(vector, Some(code)) => kind(3, vector) | HAS_CODE | u64::from(code) << 32,
        Injection::Software(vector) => kind(4, vector),
    }
}

/// The event in EXITINTINFO, which has the same format.
fn decode_event(info: u64) -> Option<Injection> {
    if info >> 31 & 1 == 0 {
        return None;
    }
    let vector = info as u8;
    Some(match info >> 8 & 7 {
        0 => Injection::External(vector),
        2 => Injection::Nmi,
        3 => Injection::Exception(vector, (info >> 11 & 1 != 0).then_some((info >> 32) as u32)),
        4 => Injection::Software(vector),
        _ => return None,
    })
}

/// EXITINFO1 of an I/O exit (APM vol. 2 section 15.10.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Io {
    port: u16,
    width: AccessWidth,
    input: bool,
    string: bool,
    rep: bool,
}

impl Io {
    fn decode(info: u64) -> Self {
        let width = match info >> 4 & 7 {
            1 => AccessWidth::Byte,
            2 => AccessWidth::Word,
            _ => AccessWidth::Dword,
        };
        let bit = |bit: u32| info >> bit & 1 != 0;
        Self { port: (info >> 16) as u16, width, input: bit(0), string: bit(2), rep: bit(3) }
    }
}

/// Whether the last exit is one of INS or OUTS, at which EXITINFO2 is the next RIP.
pub(super) fn is_string_io(vmcb: &Vmcb) -> bool {
    Exit::decode(vmcb.exit_code()) == Exit::Io && Io::decode(vmcb.exit_info1()).string
}

/// EXITINFO1 of a nested page fault as access flags (APM vol. 2 section 15.25.6), or `None` if a table has reserved bits.
fn access_flags(info: u64) -> Option<AccessFlags> {
    let bit = |bit: u32| info >> bit & 1 != 0;
    if bit(3) {
        return None;
    }
    let mut flags = match (bit(1), bit(4)) {
        (true, _) => AccessFlags::WRITE,
        (false, true) => AccessFlags::EXECUTE,
        (false, false) => AccessFlags::READ,
    };
    if bit(0) {
        flags = flags.union(AccessFlags::PRESENT);
    }
    if bit(33) {
        flags = flags.union(AccessFlags::PAGE_WALK);
    }
    Some(flags)
}

/// EXITINFO1 and 2 of a task switch (APM vol. 2 section 15.14.1).
fn task_switch(info1: u64, info2: u64) -> Reason {
    let source = match (info2 >> 36 & 1, info2 >> 38 & 1) {
        (1, _) => 1,
        (0, 1) => 2,
        _ => 0,
    };
    Reason::TaskSwitch { selector: info1 as u16, source }
}

impl<H: X86Hal> SvmVCpu<H> {
    /// Deals with the exit that the VMCB holds.
    pub(super) fn handle_exit(&mut self) -> Reason {
        let vmcb = &mut self.regs.vmcb;
        let efer = vmcb.efer() | core::mem::take(&mut self.local.hidden_efer);
        vmcb.set_efer(efer);
        let code = vmcb.exit_code();
        let (info1, info2) = (vmcb.exit_info1(), vmcb.exit_info2());
        let exit = Exit::decode(code);
        self.local.exit_kind = exit.kind();
        if exit == Exit::Invalid {
            return self.refused();
        }
        let interrupted = decode_event(vmcb.exit_int_info());
        let cr8 = (vmcb.int_control() & int_control::TPR) as u8;
        vmcb.set_event_injection(0);
        self.guest.set_cr8(cr8);
        let injected = self.local.injected.take();
        let own_step = self.local.iret != Iret::No && self.follow_iret(exit == Exit::Debug);
        // Exceptions that are intercepted themselves combine with what was being delivered.
        // After a shutdown there is nothing to go on with.
        if !matches!(exit, Exit::Debug | Exit::AlignmentCheck | Exit::Shutdown) {
            if let Some(info) = interrupted {
                self.guest.events.requeue(info, injected);
            }
        }
        match exit {
            Exit::Interrupt => Reason::ExternalInterrupt { vector: 0 },
            Exit::NestedPageFault => match access_flags(info1) {
                Some(access_flags) => Reason::NestedPageFault { addr: GuestPhysAddr::new(info2), access_flags },
                None => Reason::Unknown { code, info1, info2 },
            },
            Exit::HostEvent => Reason::Nothing,
            Exit::InterruptWindow => {
                if self.guest.events.window_requested() && self.guest.window_open(&self.regs) {
                    Reason::InterruptWindow
                } else {
                    Reason::Nothing
                }
            }
            Exit::Cpuid => self.instruction(Instruction::Cpuid, |vcpu| vcpu.guest.cpuid(&mut vcpu.regs)),
            Exit::Invd => self.instruction(Instruction::Invd, |_| {}),
            Exit::Wbinvd => self.instruction(Instruction::Wbinvd, |_| {}),
            Exit::Pause => self.instruction(Instruction::Pause, |_| {}),
            Exit::Msr => self.msr_access(info1 & 1 != 0),
            Exit::Io => self.io(Io::decode(info1), info2),
            Exit::Hlt => self.hlt(),
            Exit::WriteCr0 => self.write_cr0(),
            Exit::WriteCr(number) => self.write_cr(number),
            Exit::DebugRegister => {
                self.load_breakpoints();
                Reason::Nothing
            }
            Exit::Xsetbv => self.xsetbv(),
            Exit::Vmmcall => self.vmmcall(),
            Exit::Iret => {
                self.local.iret = Iret::Due { rip: self.regs.rip() };
                Reason::Nothing
            }
            Exit::Debug if own_step => {
                if let Some(info) = interrupted {
                    self.guest.events.requeue(info, injected);
                }
                Reason::Nothing
            }
            Exit::Debug => self.reflect(Injection::Exception(DB, None), interrupted),
            Exit::AlignmentCheck => self.reflect(Injection::Exception(AC, Some(info1 as u32)), interrupted),
            Exit::MachineCheck => {
                if !self.guest.caps.fred {
                    // SAFETY: Kernel context with the host's IDT, since this is not a FRED host.
                    unsafe { cpu::raise_machine_check() };
                }
                Reason::MachineCheck
            }
            Exit::Undefined => {
                self.guest.undefined();
                Reason::Nothing
            }
            Exit::Rdpmc => {
                self.guest.general_protection();
                Reason::Nothing
            }
            Exit::TaskSwitch => task_switch(info1, info2),
            Exit::FerrFreeze => Reason::UnsupportedInstruction { code },
            Exit::Shutdown => Reason::TripleFault,
            Exit::Invalid | Exit::Other => Reason::Unknown { code, info1, info2 },
        }
    }

    /// The hardware refused to enter. What it has left in the VMCB is not to be trusted.
    #[cold]
    fn refused(&mut self) -> Reason {
        let before = self.local.before;
        self.regs.vmcb.restore_hardware_state(&before);
        self.regs.vmcb.set_event_injection(0);
        let injected = self.local.injected.take();
        self.guest.events.undo(injected);
        // `follow_iret` must not take the refusal for progress; a step that was armed is armed again.
        if let Iret::Stepped { rip, trap } = self.local.iret {
            if !trap {
                let flags = self.regs.rflags() & !crate::regs::rflags::TF;
                self.regs.set_rflags(flags);
            }
            self.local.iret = Iret::Due { rip };
        }
        match self.fault_of_state() {
            0 => Reason::FailEntry { hardware_entry_failure_reason: u64::MAX },
            field => Reason::InvalidGuestState { reason: u64::MAX, qualification: 0, field },
        }
    }

    /// What VMRUN finds wrong with the state, by the list in APM vol. 2 section 15.5.1: 0 nothing, 1 EFER.SVME, 2 CR0.NW without
    /// CD, 3 CR0 upper half, 4 CR3, 5 CR4, 6 DR6, 7 DR7, 8 EFER, 9 long mode without PAE, 10 long mode without protection, 11 CS
    /// with both L and D, 12 ASID. The numbers are documented in axvcpu(4).
    fn fault_of_state(&self) -> u64 {
        let vmcb = &self.regs.vmcb;
        let (cr0, cr4, efer) = (vmcb.cr0(), vmcb.cr4(), vmcb.efer());
        let limits = &self.guest.limits;
        let long = cr0 & cr0::PG != 0 && efer & efer::LME != 0;
        let both = segment::L | segment::DB;
        let faults = [
            efer & efer::SVME == 0,
            cr0 & (cr0::NW | cr0::CD) == cr0::NW,
            cr0 >> 32 != 0,
            !limits.cr3_valid(vmcb.cr3()),
            cr4 & !limits.cr4 != 0,
            vmcb.dr6() >> 32 != 0,
            vmcb.dr7() >> 32 != 0,
            efer & !(limits.efer | efer::SVME) != 0,
            long && cr4 & cr4::PAE == 0,
            long && cr0 & cr0::PE == 0,
            long && cr4 & cr4::PAE != 0 && self.regs.cs().attributes & both == both,
            vmcb.asid() == 0,
        ];
        faults.iter().position(|&fault| fault).map_or(0, |index| index as u64 + 1)
    }

    /// The guest gets `exception`, which the exit has kept from it.
    fn reflect(&mut self, exception: Injection, interrupted: Option<Injection>) -> Reason {
        if self.guest.events.exception_exit(exception, interrupted) {
            return Reason::TripleFault;
        }
        Reason::Nothing
    }

    // --- Instructions ---

    /// Where the instruction of the exit ends, and its register operand. `None` if it cannot be read (any more), or is another
    /// one by now: then the guest is to execute it again.
    fn find(&mut self, instruction: Instruction) -> Option<(u64, u8)> {
        let rip = self.regs.rip();
        let caps = &self.guest.caps;
        let next = self.regs.vmcb.next_rip();
        let needs_register = matches!(instruction, Instruction::MovToCr(_));
        if caps.next_rip && next != 0 && !needs_register {
            return Some((next, 0));
        }
        let info1 = self.regs.vmcb.exit_info1();
        if caps.next_rip && next != 0 && caps.decode_assists && info1 & MOV_CR_VALID != 0 {
            return Some((next, (info1 & 0xf) as u8));
        }
        let long = is_long_code(&self.regs);
        let (linear, wrap) =
            if long { (rip, u64::MAX) } else { (self.regs.cs().base.wrapping_add(rip & 0xffff_ffff), 0xffff_ffff) };
        let paging =
            Paging { cr0: self.regs.cr0(), cr3: self.regs.cr3(), cr4: self.regs.cr4(), efer: self.regs.efer() };
        // SAFETY: The root is the module's nested page table of `npt_levels` levels (`set_ept_root`), interrupts are off until
        // `run` returns, and the object is gone by then.
        let memory = unsafe { NestedMemory::<H, Npt>::new(self.local.root, caps.npt_levels) };
        let mut bytes = [0; MAX_LENGTH];
        let count = paging.read(&memory, linear, wrap, &mut bytes);
        match bytes.get(..count).and_then(|bytes| length::find(bytes, long, instruction)) {
            Some(Found { length, register }) => Some((rip.wrapping_add(length.into()), register)),
            None => {
                // If the guest has changed its page tables without flushing, it is to see them as we do.
                self.regs.flush_tlb();
                None
            }
        }
    }

    /// Executes `instruction` by `f` and goes on behind it.
    fn instruction(&mut self, instruction: Instruction, f: impl FnOnce(&mut Self)) -> Reason {
        if let Some((next, _)) = self.find(instruction) {
            f(self);
            self.guest.advance(&mut self.regs, next);
        }
        Reason::Nothing
    }

    fn msr_access(&mut self, write: bool) -> Reason {
        let instruction = if write { Instruction::Wrmsr } else { Instruction::Rdmsr };
        let Some((next, _)) = self.find(instruction) else { return Reason::Nothing };
        let rip = self.regs.rip();
        let index = self.regs.gpr(RCX) as u32;
        if write {
            self.local.exit_kind = ExitKind::MsrWrite;
            let value = self.regs.gpr(RDX) << 32 | self.regs.gpr(RAX) & 0xffff_ffff;
            match self.guest.write_msr(&mut self.regs, index, value) {
                Access::Done(written) => {
                    self.guest.advance(&mut self.regs, next);
                    self.after_write(index, written)
                }
                Access::Fault => {
                    self.guest.general_protection();
                    Reason::Nothing
                }
                Access::User => {
                    self.local.exit_kind = ExitKind::MsrUser;
                    self.guest.advance(&mut self.regs, next);
                    self.guest.pending = Pending::MsrWrite { rip };
                    Reason::SysRegWrite { addr: index.into(), value }
                }
            }
        } else {
            match self.guest.read_msr(&self.regs, index) {
                Access::Done(value) => {
                    self.regs.set_gpr(RAX, value & 0xffff_ffff);
                    self.regs.set_gpr(RDX, value >> 32);
                    self.guest.advance(&mut self.regs, next);
                    Reason::Nothing
                }
                Access::Fault => {
                    self.guest.general_protection();
                    Reason::Nothing
                }
                Access::User => {
                    self.local.exit_kind = ExitKind::MsrUser;
                    self.guest.advance(&mut self.regs, next);
                    self.guest.pending = Pending::MsrRead { rip };
                    Reason::SysRegRead { addr: index.into(), reg: 0 }
                }
            }
        }
    }

    /// What a write of an MSR has set off.
    fn after_write(&mut self, index: u32, written: Written) -> Reason {
        match written {
            Written::Quiet => {
                if index == TSC_AUX {
                    // SAFETY: In a window, which has TSC_AUX for the guest; the CPU has it, or the guest could not write it.
                    unsafe { cpu::wrmsr(index, self.guest.msrs.tsc_aux) };
                }
                Reason::Nothing
            }
            Written::BranchBarrier => {
                // SAFETY: Kernel context; the CPU has it, or the guest could not write it.
                unsafe { cpu::wrmsr(PRED_CMD, PRED_CMD_IBPB) };
                Reason::Nothing
            }
            Written::Apic(Effect::None) => Reason::Nothing,
            Written::Apic(Effect::InterruptEnd(vector)) => Reason::InterruptEnd { vector: Some(vector) },
            Written::Apic(Effect::Ipi(command)) => {
                self.local.exit_kind = ExitKind::Ipi;
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

    fn io(&mut self, io: Io, next: u64) -> Reason {
        let Io { port, width, input, string, rep } = io;
        if string {
            return Reason::IoString { port, width, input, rep };
        }
        self.guest.advance(&mut self.regs, next);
        if input {
            self.guest.pending = Pending::Input { bytes: width.size() };
            Reason::IoRead { port, width }
        } else {
            Reason::IoWrite { port, width, data: self.regs.gpr(RAX) & width.mask() }
        }
    }

    fn hlt(&mut self) -> Reason {
        let Some((next, _)) = self.find(Instruction::Hlt) else { return Reason::Nothing };
        self.guest.advance(&mut self.regs, next);
        if self.guest.lapic.is_none() {
            return Reason::Halt;
        }
        self.guest.events.set_activity(Activity::Halted);
        if self.guest.update_activity(&self.regs) {
            Reason::Nothing
        } else {
            Reason::Halt
        }
    }

    fn write_cr0(&mut self) -> Reason {
        let Some((next, register)) = self.find(Instruction::MovToCr(0)) else {
            // LMSW can set PE only, which is always allowed: the CPU does it. If this is something else by now, so be it.
            self.local.pass_cr0 = true;
            return Reason::Nothing;
        };
        let value = self.operand(register);
        if self.guest.write_cr0(&mut self.regs, value).is_ok() {
            self.guest.advance(&mut self.regs, next);
        } else {
            self.guest.general_protection();
        }
        Reason::Nothing
    }

    /// The general register operand of a MOV to a control register: 32 bits outside of 64-bit code.
    fn operand(&self, register: u8) -> u64 {
        let value = self.regs.gpr(register.into());
        if is_long_code(&self.regs) {
            value
        } else {
            value & 0xffff_ffff
        }
    }

    fn write_cr(&mut self, number: u8) -> Reason {
        let Some((next, register)) = self.find(Instruction::MovToCr(number)) else { return Reason::Nothing };
        let value = self.operand(register);
        let allowed = match number {
            4 => self.guest.write_cr4(&mut self.regs, value).is_ok(),
            8 if value <= 15 => {
                self.guest.set_cr8(value as u8);
                true
            }
            _ => false,
        };
        if allowed {
            self.guest.advance(&mut self.regs, next);
        } else {
            self.guest.general_protection();
        }
        Reason::Nothing
    }

    fn xsetbv(&mut self) -> Reason {
        let Some((next, _)) = self.find(Instruction::Xsetbv) else { return Reason::Nothing };
        if self.guest.xsetbv(&self.regs) {
            // SAFETY: In a window, which has XCR0 for the guest and puts the host's back; the CPU takes the value, since it is a
            // valid combination of components that the host itself has enabled.
            unsafe { cpu::set_xcr0(self.guest.xcr0) };
            self.guest.advance(&mut self.regs, next);
        } else {
            self.guest.general_protection();
        }
        Reason::Nothing
    }

    fn vmmcall(&mut self) -> Reason {
        let Some((next, _)) = self.find(Instruction::Vmmcall) else { return Reason::Nothing };
        self.guest.advance(&mut self.regs, next);
        self.guest.pending = Pending::Hypercall;
        let gpr = |register| self.regs.gpr(register);
        Reason::Hypercall { nr: gpr(RAX), args: [gpr(RBX), gpr(RCX), gpr(RDX), gpr(RSI), gpr(RDI), gpr(R8)] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_those_of_appendix_c() {
        for (code, exit) in [
            (0x14, Exit::WriteCr(4)),
            (0x18, Exit::WriteCr(8)),
            (0x20, Exit::DebugRegister),
            (0x37, Exit::DebugRegister),
            (0x41, Exit::Debug),
            (0x51, Exit::AlignmentCheck),
            (0x52, Exit::MachineCheck),
            (0x60, Exit::Interrupt),
            (0x61, Exit::HostEvent),
            (0x62, Exit::HostEvent),
            (0x63, Exit::HostEvent),
            (0x64, Exit::InterruptWindow),
            (0x65, Exit::WriteCr0),
            (0x6f, Exit::Rdpmc),
            (0x72, Exit::Cpuid),
            (0x73, Exit::Undefined),
            (0x74, Exit::Iret),
            (0x76, Exit::Invd),
            (0x77, Exit::Pause),
            (0x78, Exit::Hlt),
            (0x7a, Exit::Undefined),
            (0x7b, Exit::Io),
            (0x7c, Exit::Msr),
            (0x7d, Exit::TaskSwitch),
            (0x7e, Exit::FerrFreeze),
            (0x7f, Exit::Shutdown),
            (0x80, Exit::Undefined),
            (0x81, Exit::Vmmcall),
            (0x86, Exit::Undefined),
            (0x87, Exit::Undefined),
            (0x89, Exit::Wbinvd),
            (0x8a, Exit::Undefined),
            (0x8b, Exit::Undefined),
            (0x8c, Exit::Undefined),
            (0x8d, Exit::Xsetbv),
            (0x8e, Exit::Undefined),
            (0xa2, Exit::Undefined),
            (0x400, Exit::NestedPageFault),
            (u64::MAX, Exit::Invalid),
            (0xffff_ffff, Exit::Invalid),
            (0x00, Exit::Other),
            (0x40, Exit::Other),
            (0x75, Exit::Other),
            (0x88, Exit::Other),
            (0x8f, Exit::Other),
            (0x401, Exit::Other),
            (0x403, Exit::Other),
            (u64::MAX - 1, Exit::Other),
        ] {
            assert_eq!(Exit::decode(code), exit, "{code:#x}");
        }
    }

    #[test]
    fn every_intercept_has_a_meaning() {
        for (first, word) in
            [(0x60, super::super::INTERCEPT1), (0x80, super::super::INTERCEPT2), (0xa0, super::super::INTERCEPT3)]
        {
            for bit in (0..32).filter(|bit| word >> bit & 1 != 0) {
                assert_ne!(Exit::decode(first + bit), Exit::Other, "{:#x}", first + bit);
            }
        }
        for bit in (0..32).filter(|bit| super::super::EXCEPTIONS >> bit & 1 != 0) {
            assert_ne!(Exit::decode(0x40 + bit), Exit::Other, "exception {bit}");
        }
    }

    #[test]
    fn events_have_the_format_of_eventinj() {
        for (event, bits) in [
            (Injection::External(0x30), 0x8000_0030),
            (Injection::Nmi, 0x8000_0202),
            (Injection::Exception(6, None), 0x8000_0306),
            (Injection::Exception(14, Some(0x15)), 0x15_8000_0b0e),
            (Injection::Software(0x80), 0x8000_0480),
        ] {
            assert_eq!(encode_event(event), bits, "{event:?}");
            assert_eq!(decode_event(bits), Some(event), "{bits:#x}");
            assert_eq!(decode_event(bits & !(1 << 31)), None);
        }
        assert_eq!(decode_event(0x8000_0130), None, "type 1 is reserved");
    }

    #[test]
    fn io_information() {
        let io = |port, width, input, string, rep| Io { port, width, input, string, rep };
        assert_eq!(Io::decode(0x03f8_0010), io(0x3f8, AccessWidth::Byte, false, false, false));
        assert_eq!(Io::decode(0x03f8_0011), io(0x3f8, AccessWidth::Byte, true, false, false));
        assert_eq!(Io::decode(0x01f0_002d), io(0x1f0, AccessWidth::Word, true, true, true));
        assert_eq!(Io::decode(0x0cf8_0240), io(0xcf8, AccessWidth::Dword, false, false, false));
        assert_eq!(Io::decode(0xffff_0014), io(0xffff, AccessWidth::Byte, false, true, false));
    }

    #[test]
    fn page_fault_information() {
        let union = |flags: &[AccessFlags]| flags.iter().fold(AccessFlags::empty(), |all, &flag| all.union(flag));
        use AccessFlags as F;
        for (info, flags) in [
            (0x4, union(&[F::READ])),
            (0x6, union(&[F::WRITE])),
            (0x7, union(&[F::WRITE, F::PRESENT])),
            (0x14, union(&[F::EXECUTE])),
            (0x1_0000_0015, union(&[F::EXECUTE, F::PRESENT])),
            (0x2_0000_0006, union(&[F::WRITE, F::PAGE_WALK])),
        ] {
            assert_eq!(access_flags(info), Some(flags), "{info:#x}");
        }
        assert_eq!(access_flags(0xd), None, "reserved bits in our tables are a bug, not a fault of the guest's");
    }

    #[test]
    fn task_switch_information() {
        assert_eq!(task_switch(0x28, 0), Reason::TaskSwitch { selector: 0x28, source: 0 });
        assert_eq!(task_switch(0x28, 1 << 36), Reason::TaskSwitch { selector: 0x28, source: 1 });
        assert_eq!(task_switch(0x28, 1 << 38), Reason::TaskSwitch { selector: 0x28, source: 2 });
    }
}
