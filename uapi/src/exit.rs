// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! Why a vCPU stopped: [`AxVCpuExitReason`], and its fixed form in the run page, [`ExitRecord`].
//!
//! The kernel encodes, userspace decodes; both do it with the code in this file, so the two cannot drift apart.

use crate::addr::GuestPhysAddr;
use crate::layout::abi_struct;

/// Width of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum AccessWidth {
    /// 8 bits.
    Byte,
    /// 16 bits.
    Word,
    /// 32 bits.
    Dword,
    /// 64 bits.
    Qword,
}

impl AccessWidth {
    /// The width in bytes: 1, 2, 4 or 8.
    pub const fn size(self) -> usize {
        match self {
            Self::Byte => 1,
            Self::Word => 2,
            Self::Dword => 4,
            Self::Qword => 8,
        }
    }

    /// The width of `bytes` bytes, if it is one.
    pub const fn from_size(bytes: u64) -> Option<Self> {
        match bytes {
            1 => Some(Self::Byte),
            2 => Some(Self::Word),
            4 => Some(Self::Dword),
            8 => Some(Self::Qword),
            _ => None,
        }
    }

    /// All bits of a value of this width.
    pub const fn mask(self) -> u64 {
        match self {
            Self::Byte => 0xff,
            Self::Word => 0xffff,
            Self::Dword => 0xffff_ffff,
            Self::Qword => u64::MAX,
        }
    }
}

/// What a faulting access tried to do: a set of [`READ`](Self::READ), [`WRITE`](Self::WRITE), [`EXECUTE`](Self::EXECUTE),
/// [`PAGE_WALK`](Self::PAGE_WALK) and [`PRESENT`](Self::PRESENT).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct AccessFlags(u32);

impl AccessFlags {
    /// Data read.
    pub const READ: Self = Self(1 << 0);
    /// Data write.
    pub const WRITE: Self = Self(1 << 1);
    /// Instruction fetch.
    pub const EXECUTE: Self = Self(1 << 2);
    /// The access was made by the CPU's walk of the guest's own page tables.
    pub const PAGE_WALK: Self = Self(1 << 3);
    /// A translation was present but did not allow the access.
    pub const PRESENT: Self = Self(1 << 4);

    /// No flag.
    pub const fn empty() -> Self {
        Self(0)
    }
    /// The flags as a bit mask, in the order above.
    pub const fn bits(self) -> u32 {
        self.0
    }
    /// Flags from a bit mask; unknown bits are dropped.
    pub const fn from_bits_truncate(bits: u32) -> Self {
        Self(bits & 0x1f)
    }
    /// Whether all of `other` is set.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
    /// Both sets together.
    #[must_use]
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// Why a run of the vCPU came back: the established names and payloads of `AxArchVCpu` backends, and variants
/// of our own for what those names lack.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AxVCpuExitReason {
    /// The guest called the hypervisor.
    Hypercall {
        /// Call number (x86: RAX).
        nr: u64,
        /// Arguments (x86: RBX, RCX, RDX, RSI, RDI, R8).
        args: [u64; 6],
    },
    /// A read of device memory within a page of 4 KiB, decoded by the hardware's syndrome (AArch64).
    MmioRead {
        /// Address.
        addr: GuestPhysAddr,
        /// Width of the access.
        width: AccessWidth,
        /// Destination register.
        reg: usize,
        /// Width of the destination register.
        reg_width: AccessWidth,
        /// Whether the value is sign-extended.
        signed_ext: bool,
    },
    /// A write of device memory within a page of 4 KiB, decoded by the hardware's syndrome (AArch64).
    MmioWrite {
        /// Address.
        addr: GuestPhysAddr,
        /// Width of the access.
        width: AccessWidth,
        /// Value.
        data: u64,
    },
    /// A read of a system register that the kernel does not handle (x86: RDMSR). Answer in the run page.
    SysRegRead {
        /// Register number (x86: ECX).
        addr: u64,
        /// Destination register (x86: 0).
        reg: usize,
    },
    /// A write of a system register that the kernel does not handle (x86: WRMSR).
    SysRegWrite {
        /// Register number (x86: ECX).
        addr: u64,
        /// Value.
        value: u64,
    },
    /// Port input (x86). Answer in the run page.
    IoRead {
        /// Port.
        port: u16,
        /// Width.
        width: AccessWidth,
    },
    /// Port output (x86).
    IoWrite {
        /// Port.
        port: u16,
        /// Width.
        width: AccessWidth,
        /// Value.
        data: u64,
    },
    /// A host interrupt arrived.
    ExternalInterrupt {
        /// Vector, where the hardware reports it; 0 otherwise.
        vector: u64,
    },
    /// An access to a guest physical address that is not memory, or is memory that does not allow it.
    NestedPageFault {
        /// Address.
        addr: GuestPhysAddr,
        /// What was tried.
        access_flags: AccessFlags,
    },
    /// The guest halted.
    Halt,
    /// The guest starts a CPU.
    CpuUp {
        /// Its number.
        target_cpu: u64,
        /// Where it starts.
        entry_point: GuestPhysAddr,
        /// Argument.
        arg: u64,
    },
    /// The guest stops this CPU.
    CpuDown {
        /// Requested power state.
        state: u64,
    },
    /// The guest switches the system off.
    SystemDown,
    /// Nothing to do: run again.
    Nothing,
    /// The preemption timer expired.
    PreemptionTimer,
    /// The guest finished handling a level-triggered interrupt.
    InterruptEnd {
        /// Its vector.
        vector: Option<u8>,
    },
    /// The guest sends an inter-processor interrupt.
    SendIPI {
        /// Target, in the format of the interrupt controller.
        target_cpu: u64,
        /// Second part of the target.
        target_cpu_aux: u64,
        /// To all but this CPU.
        send_to_all: bool,
        /// To this CPU.
        send_to_self: bool,
        /// Vector or, for x86, the low half of the interrupt command register.
        vector: u64,
    },
    /// The hardware refused to enter the guest.
    FailEntry {
        /// Its reason code.
        hardware_entry_failure_reason: u64,
    },

    // Variants beyond the established names.
    /// `RUN` was interrupted by a kick or a signal.
    Interrupted,
    /// The guest can take an external interrupt now, as asked for in the run page.
    InterruptWindow,
    /// String port I/O (x86 INS, OUTS), not executed yet: the caller carries out the instruction at RIP.
    IoString {
        /// Port.
        port: u16,
        /// Width of one item.
        width: AccessWidth,
        /// INS (into memory) rather than OUTS.
        input: bool,
        /// With a REP prefix.
        rep: bool,
    },
    /// Three faults in a row (x86 shutdown): the guest is dead until it is reset.
    TripleFault,
    /// The guest asks for a reset.
    SystemReset,
    /// The hardware found the guest's state inconsistent, with what is known about it.
    InvalidGuestState {
        /// Hardware reason code.
        reason: u64,
        /// Qualification.
        qualification: u64,
        /// What our own check found at fault: an identifier of the backend's (see axvcpu(4)), or 0.
        field: u64,
    },
    /// A hardware task switch (x86), which is not supported.
    TaskSwitch {
        /// Selector of the new task.
        selector: u16,
        /// 0 call or interrupt, 1 IRET, 2 JMP.
        source: u8,
    },
    /// An instruction that is deliberately not offered to guests, where a fault would mislead.
    UnsupportedInstruction {
        /// Hardware exit code.
        code: u64,
    },
    /// A machine check was reported while the guest ran.
    MachineCheck,
    /// An exit that nobody understands.
    Unknown {
        /// Hardware exit code.
        code: u64,
        /// First information field.
        info1: u64,
        /// Second information field.
        info2: u64,
    },
}

abi_struct! {
    /// An exit reason in the run page.
    pub struct ExitRecord: 64 {
        /// Number of the reason, see [`AxVCpuExitReason::encode`]; 0 if there was no exit yet.
        pub reason: u32,
        /// Zero.
        pub reserved: u32,
        /// Payload.
        pub data: [u64; 7],
    }
}

/// A record that no version of this crate up to the present one writes: a newer module, or a page that is not a run page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownExit(pub ExitRecord);

const fn width_code(width: AccessWidth) -> u64 {
    width.size() as u64
}

impl AxVCpuExitReason {
    /// The fixed form. Reason numbers are part of the ABI: 1 is `Hypercall`, and so on in the order of the enum.
    #[inline]
    pub const fn encode(&self) -> ExitRecord {
        let (reason, data): (u32, [u64; 7]) = match *self {
            Self::Hypercall { nr, args: [a, b, c, d, e, f] } => (1, [nr, a, b, c, d, e, f]),
            Self::MmioRead { addr, width, reg, reg_width, signed_ext } => {
                (2, [addr.as_u64(), width_code(width), reg as u64, width_code(reg_width), signed_ext as u64, 0, 0])
            }
            Self::MmioWrite { addr, width, data } => (3, [addr.as_u64(), width_code(width), data, 0, 0, 0, 0]),
            Self::SysRegRead { addr, reg } => (4, [addr, reg as u64, 0, 0, 0, 0, 0]),
            Self::SysRegWrite { addr, value } => (5, [addr, value, 0, 0, 0, 0, 0]),
            Self::IoRead { port, width } => (6, [port as u64, width_code(width), 0, 0, 0, 0, 0]),
            Self::IoWrite { port, width, data } => (7, [port as u64, width_code(width), data, 0, 0, 0, 0]),
            Self::ExternalInterrupt { vector } => (8, [vector, 0, 0, 0, 0, 0, 0]),
            Self::NestedPageFault { addr, access_flags } => {
                (9, [addr.as_u64(), access_flags.bits() as u64, 0, 0, 0, 0, 0])
            }
            Self::Halt => (10, [0; 7]),
            Self::CpuUp { target_cpu, entry_point, arg } => (11, [target_cpu, entry_point.as_u64(), arg, 0, 0, 0, 0]),
            Self::CpuDown { state } => (12, [state, 0, 0, 0, 0, 0, 0]),
            Self::SystemDown => (13, [0; 7]),
            Self::Nothing => (14, [0; 7]),
            Self::PreemptionTimer => (15, [0; 7]),
            Self::InterruptEnd { vector: Some(vector) } => (16, [1, vector as u64, 0, 0, 0, 0, 0]),
            Self::InterruptEnd { vector: None } => (16, [0; 7]),
            Self::SendIPI { target_cpu, target_cpu_aux, send_to_all, send_to_self, vector } => {
                (17, [target_cpu, target_cpu_aux, send_to_all as u64, send_to_self as u64, vector, 0, 0])
            }
            Self::FailEntry { hardware_entry_failure_reason } => {
                (18, [hardware_entry_failure_reason, 0, 0, 0, 0, 0, 0])
            }
            Self::Interrupted => (19, [0; 7]),
            Self::InterruptWindow => (20, [0; 7]),
            Self::IoString { port, width, input, rep } => {
                (21, [port as u64, width_code(width), input as u64, rep as u64, 0, 0, 0])
            }
            Self::TripleFault => (22, [0; 7]),
            Self::SystemReset => (23, [0; 7]),
            Self::InvalidGuestState { reason, qualification, field } => {
                (24, [reason, qualification, field, 0, 0, 0, 0])
            }
            Self::TaskSwitch { selector, source } => (25, [selector as u64, source as u64, 0, 0, 0, 0, 0]),
            Self::UnsupportedInstruction { code } => (26, [code, 0, 0, 0, 0, 0, 0]),
            Self::MachineCheck => (27, [0; 7]),
            Self::Unknown { code, info1, info2 } => (28, [code, info1, info2, 0, 0, 0, 0]),
        };
        ExitRecord { reason, reserved: 0, data }
    }

    /// The reason that a record holds.
    ///
    /// # Errors
    /// [`UnknownExit`] with the record itself, if its number or a field is none that this crate writes.
    #[inline]
    pub fn decode(record: &ExitRecord) -> Result<Self, UnknownExit> {
        Self::decode_fields(record).ok_or(UnknownExit(*record))
    }

    #[inline]
    fn decode_fields(record: &ExitRecord) -> Option<Self> {
        let [a, b, c, d, e, f, g] = record.data;
        let flag = |value: u64| match value {
            0 => Some(false),
            1 => Some(true),
            _ => None,
        };
        let port = |value: u64| u16::try_from(value).ok();
        Some(match record.reason {
            1 => Self::Hypercall { nr: a, args: [b, c, d, e, f, g] },
            2 => Self::MmioRead {
                addr: GuestPhysAddr::new(a),
                width: AccessWidth::from_size(b)?,
                reg: usize::try_from(c).ok()?,
                reg_width: AccessWidth::from_size(d)?,
                signed_ext: flag(e)?,
            },
            3 => Self::MmioWrite { addr: GuestPhysAddr::new(a), width: AccessWidth::from_size(b)?, data: c },
            4 => Self::SysRegRead { addr: a, reg: usize::try_from(b).ok()? },
            5 => Self::SysRegWrite { addr: a, value: b },
            6 => Self::IoRead { port: port(a)?, width: AccessWidth::from_size(b)? },
            7 => Self::IoWrite { port: port(a)?, width: AccessWidth::from_size(b)?, data: c },
            8 => Self::ExternalInterrupt { vector: a },
            9 => Self::NestedPageFault {
                addr: GuestPhysAddr::new(a),
                access_flags: AccessFlags::from_bits_truncate(u32::try_from(b).ok()?),
            },
            10 => Self::Halt,
            11 => Self::CpuUp { target_cpu: a, entry_point: GuestPhysAddr::new(b), arg: c },
            12 => Self::CpuDown { state: a },
            13 => Self::SystemDown,
            14 => Self::Nothing,
            15 => Self::PreemptionTimer,
            16 => Self::InterruptEnd { vector: if flag(a)? { Some(u8::try_from(b).ok()?) } else { None } },
            17 => Self::SendIPI {
                target_cpu: a,
                target_cpu_aux: b,
                send_to_all: flag(c)?,
                send_to_self: flag(d)?,
                vector: e,
            },
            18 => Self::FailEntry { hardware_entry_failure_reason: a },
            19 => Self::Interrupted,
            20 => Self::InterruptWindow,
            21 => Self::IoString { port: port(a)?, width: AccessWidth::from_size(b)?, input: flag(c)?, rep: flag(d)? },
            22 => Self::TripleFault,
            23 => Self::SystemReset,
            24 => Self::InvalidGuestState { reason: a, qualification: b, field: c },
            25 => Self::TaskSwitch { selector: u16::try_from(a).ok()?, source: u8::try_from(b).ok()? },
            26 => Self::UnsupportedInstruction { code: a },
            27 => Self::MachineCheck,
            28 => Self::Unknown { code: a, info1: b, info2: c },
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One of each, with payloads that differ in every field.
    const SAMPLES: &[AxVCpuExitReason] = &[
        AxVCpuExitReason::Hypercall { nr: 1, args: [2, 3, 4, 5, 6, 7] },
        AxVCpuExitReason::MmioRead {
            addr: GuestPhysAddr::new(0x1000),
            width: AccessWidth::Byte,
            reg: 3,
            reg_width: AccessWidth::Qword,
            signed_ext: true,
        },
        AxVCpuExitReason::MmioWrite { addr: GuestPhysAddr::new(1 << 40), width: AccessWidth::Word, data: 9 },
        AxVCpuExitReason::SysRegRead { addr: 0xc000_0080, reg: 2 },
        AxVCpuExitReason::SysRegWrite { addr: 0x10, value: u64::MAX },
        AxVCpuExitReason::IoRead { port: 0xffff, width: AccessWidth::Dword },
        AxVCpuExitReason::IoWrite { port: 0x3f8, width: AccessWidth::Byte, data: 65 },
        AxVCpuExitReason::ExternalInterrupt { vector: 32 },
        AxVCpuExitReason::NestedPageFault {
            addr: GuestPhysAddr::new(0xfee0_0000),
            access_flags: AccessFlags::WRITE.union(AccessFlags::PRESENT),
        },
        AxVCpuExitReason::Halt,
        AxVCpuExitReason::CpuUp { target_cpu: 1, entry_point: GuestPhysAddr::new(0x8000), arg: 5 },
        AxVCpuExitReason::CpuDown { state: 6 },
        AxVCpuExitReason::SystemDown,
        AxVCpuExitReason::Nothing,
        AxVCpuExitReason::PreemptionTimer,
        AxVCpuExitReason::InterruptEnd { vector: Some(0) },
        AxVCpuExitReason::InterruptEnd { vector: None },
        AxVCpuExitReason::SendIPI {
            target_cpu: 1,
            target_cpu_aux: 2,
            send_to_all: true,
            send_to_self: false,
            vector: 0x4500,
        },
        AxVCpuExitReason::FailEntry { hardware_entry_failure_reason: u64::MAX },
        AxVCpuExitReason::Interrupted,
        AxVCpuExitReason::InterruptWindow,
        AxVCpuExitReason::IoString { port: 0x1f0, width: AccessWidth::Word, input: true, rep: false },
        AxVCpuExitReason::TripleFault,
        AxVCpuExitReason::SystemReset,
        AxVCpuExitReason::InvalidGuestState { reason: 1, qualification: 2, field: 3 },
        AxVCpuExitReason::TaskSwitch { selector: 0x28, source: 2 },
        AxVCpuExitReason::UnsupportedInstruction { code: 0x7a },
        AxVCpuExitReason::MachineCheck,
        AxVCpuExitReason::Unknown { code: 0x403, info1: 2, info2: 3 },
    ];

    #[test]
    fn every_reason_survives_the_run_page() {
        for (i, sample) in SAMPLES.iter().enumerate() {
            assert_eq!(AxVCpuExitReason::decode(&sample.encode()), Ok(*sample), "sample {i}");
        }
    }

    #[test]
    fn numbers_are_consecutive_and_foreign_records_are_refused() {
        let mut numbers: std::vec::Vec<u32> = SAMPLES.iter().map(|s| s.encode().reason).collect();
        numbers.dedup();
        assert_eq!(numbers, (1..=28).collect::<std::vec::Vec<u32>>());
        for record in [
            ExitRecord { reason: 0, ..Default::default() },
            ExitRecord { reason: 29, ..Default::default() },
            ExitRecord { reason: 6, data: [0x1_0000, 1, 0, 0, 0, 0, 0], ..Default::default() },
            ExitRecord { reason: 6, data: [1, 3, 0, 0, 0, 0, 0], ..Default::default() },
            ExitRecord { reason: 21, data: [1, 1, 2, 0, 0, 0, 0], ..Default::default() },
        ] {
            assert_eq!(AxVCpuExitReason::decode(&record), Err(UnknownExit(record)));
        }
    }
}
