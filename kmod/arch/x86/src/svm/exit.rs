// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! What exits mean (APM vol. 2 section 15.9 to 15.14 and appendix C). Every code that our intercepts can bring is named in
//! [`Code::decode`]; any other is reported as it is.

use axvcpu_uapi::vcpu::ExitKind;
use vcpu_core::npt::Npt;
use vcpu_core::{AccessFlags, AccessWidth, AxError, AxResult, GuestPhysAddr};

use super::vmcb::{int_control, SegmentRegister, Vmcb};
use super::{Iret, Svm};
use crate::backend::{ControlAccess, Exit, Exited, Frequent, Instruction, Io, Refusal, Simple};
use crate::cpu;
use crate::events::{Injection, AC, DB};
use crate::hal::X86Hal;
use crate::length::{self, Found, Instruction as Opcode, MAX_LENGTH};
use crate::linear::Paging;
use crate::nested::NestedMemory;
use crate::regs::{cr0, cr4, efer, rflags, segment};
use crate::state::{is_long_code, Guest, Registers};

/// EXITINFO1 of a control register access: the low half is the register's number (decode assists).
const MOV_CR_VALID: u64 = 1 << 63;

/// Exit code of CPUID.
const CPUID: u64 = 0x72;
/// Exit code of IN, OUT, INS and OUTS.
const IO: u64 = 0x7b;
/// Exit code of RDMSR, and with bit 0 of EXITINFO1 of WRMSR.
const MSR: u64 = 0x7c;
/// Exit code of a nested page fault.
const NESTED_PAGE_FAULT: u64 = 0x400;
/// Of EVENTINJ and EXITINTINFO: there is an event.
const EVENT_VALID: u64 = 1 << 31;

/// An exit code, understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Code {
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

impl Code {
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
            CPUID => Self::Cpuid,
            0x74 => Self::Iret,
            0x76 => Self::Invd,
            0x77 => Self::Pause,
            0x78 => Self::Hlt,
            IO => Self::Io,
            MSR => Self::Msr,
            0x7d => Self::TaskSwitch,
            0x7e => Self::FerrFreeze,
            0x7f => Self::Shutdown,
            0x81 => Self::Vmmcall,
            0x89 => Self::Wbinvd,
            0x8d => Self::Xsetbv,
            // RSM, INVLPGA; VMRUN, VMLOAD, VMSAVE, STGI, CLGI, SKINIT, RDTSCP; MONITOR, MWAIT (also armed), RDPRU; INVLPGB (also
            // illegal), INVPCID, MCOMMIT, TLBSYNC.
            0x73 | 0x7a | 0x80 | 0x82..=0x87 | 0x8a..=0x8c | 0x8e | 0xa0..=0xa4 => Self::Undefined,
            NESTED_PAGE_FAULT => Self::NestedPageFault,
            _ => Self::Other,
        }
    }
}

/// An event in the format of EVENTINJ (APM vol. 2 section 15.20).
pub(super) fn encode_event(event: Injection) -> u64 {
    const HAS_CODE: u64 = 1 << 11;
    let kind = |number: u64, vector: u8| EVENT_VALID | number << 8 | u64::from(vector);
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
    if info & EVENT_VALID == 0 {
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
fn decode_io(info: u64) -> Io {
    let width = match info >> 4 & 7 {
        1 => AccessWidth::Byte,
        2 => AccessWidth::Word,
        _ => AccessWidth::Dword,
    };
    let bit = |bit: u32| info >> bit & 1 != 0;
    Io { port: (info >> 16) as u16, width, input: bit(0), string: bit(2), rep: bit(3) }
}

/// Whether the last exit is one of INS or OUTS, at which EXITINFO2 is the next RIP.
pub(super) fn is_string_io(vmcb: &Vmcb) -> bool {
    Code::decode(vmcb.exit_code()) == Code::Io && decode_io(vmcb.exit_info1()).string
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
fn task_switch(info1: u64, info2: u64) -> Exit {
    let source = match (info2 >> 36 & 1, info2 >> 38 & 1) {
        (1, _) => 1,
        (0, 1) => 2,
        _ => 0,
    };
    Exit::TaskSwitch { selector: info1 as u16, source }
}

impl<H: X86Hal> Svm<H> {
    /// The exit, if it is one that [`Backend::frequent`](crate::backend::Backend::frequent) is about. An instruction's
    /// exit comes while no event is being delivered, and no IRET is followed.
    #[inline]
    pub(super) fn frequent_exit(&mut self, guest: &mut Guest<H>) -> Option<Frequent> {
        let vmcb = &self.regs.vmcb;
        let (opcode, instruction) = match vmcb.exit_code() {
            IO => {
                let (io, next) = (decode_io(vmcb.exit_info1()), vmcb.exit_info2());
                if io.string {
                    return None;
                }
                self.taken(guest);
                return Some(Frequent::Instruction(Simple::Io(io), next));
            }
            // Not while the guest's own event was being delivered.
            NESTED_PAGE_FAULT if vmcb.exit_int_info() & EVENT_VALID == 0 => {
                let (access, addr) = (access_flags(vmcb.exit_info1())?, vmcb.exit_info2());
                self.taken(guest);
                return Some(Frequent::PageFault { addr: GuestPhysAddr::new(addr), access });
            }
            CPUID => (Opcode::Cpuid, Simple::Cpuid),
            MSR if vmcb.exit_info1() & 1 != 0 => (Opcode::Wrmsr, Simple::Wrmsr),
            MSR => (Opcode::Rdmsr, Simple::Rdmsr),
            _ => return None,
        };
        let (next, _) = self.find(guest, opcode)?;
        self.taken(guest);
        Some(Frequent::Instruction(instruction, next))
    }

    /// The CPU has entered the guest: the state is one that it takes, and the task priority is what the guest has made of it.
    #[inline]
    fn taken(&mut self, guest: &mut Guest<H>) {
        self.regs.unchecked = false;
        guest.set_cr8((self.regs.vmcb.int_control() & int_control::TPR) as u8);
    }

    /// Puts into `guest.exited` what the exit was that the VMCB holds.
    ///
    /// # Errors
    /// [`AxError::HardwareLost`]: an entry was refused for no fault of the guest's state.
    #[inline(never)]
    pub(super) fn decode_exit(&mut self, guest: &mut Guest<H>) -> AxResult {
        let vmcb = &mut self.regs.vmcb;
        let efer = vmcb.efer() | core::mem::take(&mut self.local.hidden_efer);
        vmcb.set_efer(efer);
        let number = vmcb.exit_code();
        let (info1, info2) = (vmcb.exit_info1(), vmcb.exit_info2());
        let code = Code::decode(number);
        if code == Code::Invalid {
            guest.exited = Exited { exit: Exit::NotEntered(self.refused(guest)?), interrupted: None };
            return Ok(());
        }
        let interrupted = decode_event(vmcb.exit_int_info());
        vmcb.set_event_injection(0);
        self.taken(guest);
        let own_step = self.local.iret != Iret::No && self.follow_iret(guest, code == Code::Debug);
        let exit = match code {
            Code::Interrupt => Exit::Interrupt,
            Code::NestedPageFault => match access_flags(info1) {
                Some(access) => Exit::PageFault { addr: GuestPhysAddr::new(info2), access },
                None => Exit::Unknown { code: number, info1, info2 },
            },
            Code::HostEvent => Exit::Done(ExitKind::Other),
            Code::InterruptWindow => Exit::Window,
            Code::Cpuid => self.instruction(guest, Opcode::Cpuid, Instruction::Simple(Simple::Cpuid)),
            Code::Invd => self.instruction(guest, Opcode::Invd, Instruction::CacheFlush),
            Code::Wbinvd => self.instruction(guest, Opcode::Wbinvd, Instruction::CacheFlush),
            Code::Pause => self.instruction(guest, Opcode::Pause, Instruction::Pause),
            Code::Msr if info1 & 1 != 0 => self.instruction(guest, Opcode::Wrmsr, Instruction::Simple(Simple::Wrmsr)),
            Code::Msr => self.instruction(guest, Opcode::Rdmsr, Instruction::Simple(Simple::Rdmsr)),
            Code::Io => Exit::Instruction(decode_io(info1).into(), info2),
            Code::Hlt => self.instruction(guest, Opcode::Hlt, Instruction::Hlt),
            Code::Xsetbv => self.instruction(guest, Opcode::Xsetbv, Instruction::Xsetbv),
            Code::Vmmcall => self.instruction(guest, Opcode::Vmmcall, Instruction::Hypercall),
            Code::WriteCr0 => self.write_cr(guest, 0),
            Code::WriteCr(number) => self.write_cr(guest, number),
            Code::DebugRegister => {
                self.load_breakpoints(guest);
                Exit::Done(ExitKind::Register)
            }
            Code::Iret => {
                self.local.iret = Iret::Due { rip: self.regs.rip() };
                Exit::Done(ExitKind::Window)
            }
            Code::Debug if own_step => Exit::Done(ExitKind::Other),
            Code::Debug => Exit::Exception(Injection::Exception(DB, None)),
            Code::AlignmentCheck => Exit::Exception(Injection::Exception(AC, Some(info1 as u32))),
            Code::MachineCheck => {
                if !guest.caps.fred {
                    // SAFETY: Kernel context with the host's IDT, since this is not a FRED host.
                    unsafe { cpu::raise_machine_check() };
                }
                Exit::MachineCheck
            }
            Code::Undefined => Exit::Raise(Injection::UNDEFINED),
            Code::Rdpmc => Exit::Raise(Injection::GENERAL_PROTECTION),
            Code::TaskSwitch => task_switch(info1, info2),
            Code::FerrFreeze => Exit::Unsupported(number),
            Code::Shutdown => Exit::TripleFault,
            Code::Invalid | Code::Other => Exit::Unknown { code: number, info1, info2 },
        };
        guest.exited = Exited { exit, interrupted };
        Ok(())
    }

    /// The hardware refused to enter. What it has left in the VMCB is not to be trusted.
    #[cold]
    fn refused(&mut self, guest: &Guest<H>) -> AxResult<Refusal> {
        if !self.regs.unchecked {
            // The state came from the CPU itself, which now finds something else wrong, and there is no copy.
            self.regs.forget_state();
            return Err(AxError::HardwareLost);
        }
        let before = self.local.before;
        self.regs.vmcb.restore_hardware_state(&before);
        self.regs.vmcb.set_event_injection(0);
        // `follow_iret` must not take the refusal for progress; a step that was armed is armed again.
        if let Iret::Stepped { rip, trap } = self.local.iret {
            if !trap {
                let flags = self.regs.rflags() & !rflags::TF;
                self.regs.set_rflags(flags);
            }
            self.local.iret = Iret::Due { rip };
        }
        Ok(match self.fault_of_state(guest) {
            0 => Refusal::Controls(u64::MAX),
            field => Refusal::State { reason: u64::MAX, qualification: 0, field },
        })
    }

    /// What VMRUN finds wrong with the state, by the list in APM vol. 2 section 15.5.1: 0 nothing, 1 EFER.SVME, 2 CR0.NW without
    /// CD, 3 CR0 upper half, 4 CR3, 5 CR4, 6 DR6, 7 DR7, 8 EFER, 9 long mode without PAE, 10 long mode without protection, 11 CS
    /// with both L and D, 12 ASID. The numbers are documented in axvcpu(4).
    fn fault_of_state(&self, guest: &Guest<H>) -> u64 {
        let vmcb = &self.regs.vmcb;
        let (cr0, cr4, efer) = (vmcb.cr0(), vmcb.cr4(), vmcb.efer());
        let limits = &guest.limits;
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
            long && cr4 & cr4::PAE != 0 && self.regs.code() & both == both,
            vmcb.asid() == 0,
        ];
        faults.iter().position(|&fault| fault).map_or(0, |index| index as u64 + 1)
    }

    // --- Instructions ---

    /// Where the instruction of the exit ends, and its register operand. `None` if it cannot be read (any more), or is another
    /// one by now: then the guest is to execute it again.
    #[inline]
    fn find(&mut self, guest: &Guest<H>, opcode: Opcode) -> Option<(u64, u8)> {
        let caps = &guest.caps;
        let next = self.regs.vmcb.next_rip();
        let needs_register = matches!(opcode, Opcode::MovToCr(_));
        if caps.next_rip && next != 0 && !needs_register {
            return Some((next, 0));
        }
        let info1 = self.regs.vmcb.exit_info1();
        if caps.next_rip && next != 0 && caps.decode_assists && info1 & MOV_CR_VALID != 0 {
            return Some((next, (info1 & 0xf) as u8));
        }
        self.find_in_memory(guest, opcode)
    }

    /// [`find`](Self::find), with nothing but the guest's memory to tell.
    #[inline(never)]
    fn find_in_memory(&mut self, guest: &Guest<H>, opcode: Opcode) -> Option<(u64, u8)> {
        let rip = self.regs.rip();
        let long = is_long_code(&self.regs);
        let (linear, wrap) = if long {
            (rip, u64::MAX)
        } else {
            (self.regs.vmcb.segment(SegmentRegister::Cs).base.wrapping_add(rip & 0xffff_ffff), 0xffff_ffff)
        };
        let paging =
            Paging { cr0: self.regs.cr0(), cr3: self.regs.cr3(), cr4: self.regs.cr4(), efer: self.regs.efer() };
        // SAFETY: The root is the module's nested page table of `npt_levels` levels (`set_ept_root`), interrupts are off until
        // `run` returns, and the object is gone by then.
        let memory = unsafe { NestedMemory::<H, Npt>::new(guest.root, guest.caps.npt_levels) };
        let mut bytes = [0; MAX_LENGTH];
        let count = paging.read(&memory, linear, wrap, &mut bytes);
        match bytes.get(..count).and_then(|bytes| length::find(bytes, long, opcode)) {
            Some(Found { length, register }) => Some((rip.wrapping_add(length.into()), register)),
            None => {
                // If the guest has changed its page tables without flushing, it is to see them as we do.
                self.regs.flush_tlb();
                None
            }
        }
    }

    /// The exit is `instruction`, known by its `opcode`.
    fn instruction(&mut self, guest: &Guest<H>, opcode: Opcode, instruction: Instruction) -> Exit {
        match self.find(guest, opcode) {
            Some((next, _)) => Exit::Instruction(instruction, next),
            None => Exit::Done(instruction.kind()),
        }
    }

    /// The exit is a write of control register `number`.
    fn write_cr(&mut self, guest: &Guest<H>, number: u8) -> Exit {
        match self.find(guest, Opcode::MovToCr(number)) {
            Some((next, register)) => {
                Exit::Instruction(Instruction::Control(ControlAccess::Write { number, register }), next)
            }
            None => {
                // LMSW can set PE only, which is always allowed: the CPU does it. If this is something else by now, so be it.
                self.local.pass_cr0 = number == 0;
                Exit::Done(ExitKind::Register)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_those_of_appendix_c() {
        for (code, exit) in [
            (0x14, Code::WriteCr(4)),
            (0x18, Code::WriteCr(8)),
            (0x20, Code::DebugRegister),
            (0x37, Code::DebugRegister),
            (0x41, Code::Debug),
            (0x51, Code::AlignmentCheck),
            (0x52, Code::MachineCheck),
            (0x60, Code::Interrupt),
            (0x61, Code::HostEvent),
            (0x62, Code::HostEvent),
            (0x63, Code::HostEvent),
            (0x64, Code::InterruptWindow),
            (0x65, Code::WriteCr0),
            (0x6f, Code::Rdpmc),
            (0x72, Code::Cpuid),
            (0x73, Code::Undefined),
            (0x74, Code::Iret),
            (0x76, Code::Invd),
            (0x77, Code::Pause),
            (0x78, Code::Hlt),
            (0x7a, Code::Undefined),
            (0x7b, Code::Io),
            (0x7c, Code::Msr),
            (0x7d, Code::TaskSwitch),
            (0x7e, Code::FerrFreeze),
            (0x7f, Code::Shutdown),
            (0x80, Code::Undefined),
            (0x81, Code::Vmmcall),
            (0x86, Code::Undefined),
            (0x87, Code::Undefined),
            (0x89, Code::Wbinvd),
            (0x8a, Code::Undefined),
            (0x8b, Code::Undefined),
            (0x8c, Code::Undefined),
            (0x8d, Code::Xsetbv),
            (0x8e, Code::Undefined),
            (0xa2, Code::Undefined),
            (0x400, Code::NestedPageFault),
            (u64::MAX, Code::Invalid),
            (0xffff_ffff, Code::Invalid),
            (0x00, Code::Other),
            (0x40, Code::Other),
            (0x75, Code::Other),
            (0x88, Code::Other),
            (0x8f, Code::Other),
            (0x401, Code::Other),
            (0x403, Code::Other),
            (u64::MAX - 1, Code::Other),
        ] {
            assert_eq!(Code::decode(code), exit, "{code:#x}");
        }
    }

    #[test]
    fn every_intercept_has_a_meaning() {
        for (first, word) in
            [(0x60, super::super::INTERCEPT1), (0x80, super::super::INTERCEPT2), (0xa0, super::super::INTERCEPT3)]
        {
            for bit in (0..32).filter(|bit| word >> bit & 1 != 0) {
                assert_ne!(Code::decode(first + bit), Code::Other, "{:#x}", first + bit);
            }
        }
        for bit in (0..32).filter(|bit| super::super::EXCEPTIONS >> bit & 1 != 0) {
            assert_ne!(Code::decode(0x40 + bit), Code::Other, "exception {bit}");
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
        assert_eq!(decode_io(0x03f8_0010), io(0x3f8, AccessWidth::Byte, false, false, false));
        assert_eq!(decode_io(0x03f8_0011), io(0x3f8, AccessWidth::Byte, true, false, false));
        assert_eq!(decode_io(0x01f0_002d), io(0x1f0, AccessWidth::Word, true, true, true));
        assert_eq!(decode_io(0x0cf8_0240), io(0xcf8, AccessWidth::Dword, false, false, false));
        assert_eq!(decode_io(0xffff_0014), io(0xffff, AccessWidth::Byte, false, true, false));
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
        assert!(matches!(task_switch(0x28, 0), Exit::TaskSwitch { selector: 0x28, source: 0 }));
        assert!(matches!(task_switch(0x28, 1 << 36), Exit::TaskSwitch { selector: 0x28, source: 1 }));
        assert!(matches!(task_switch(0x28, 1 << 38), Exit::TaskSwitch { selector: 0x28, source: 2 }));
    }
}
