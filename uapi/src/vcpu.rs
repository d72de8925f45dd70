// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! Arguments of the ioctls of a vCPU.

use crate::layout::abi_struct;

abi_struct! {
    /// `SET_ENTRY`: once, before `SETUP`.
    pub struct Entry: 8 {
        /// Guest physical address of the first instruction. On x86 it is below 4 GiB and the vCPU starts there in real mode,
        /// with a code segment based at the address's upper bits, unless register sets say otherwise after `SETUP`. On AArch64 it
        /// is a multiple of 4 and the vCPU starts there at EL1 with its MMU off and all exceptions masked.
        pub guest_addr: u64,
    }
}

abi_struct! {
    /// `SET_EPT_ROOT`: once, before `SETUP`. The file descriptor is the capability; no address of a page table is ever passed.
    pub struct EptRoot: 8 {
        /// File descriptor of an address space of the same VM.
        pub aspace_fd: i32,
        /// Zero.
        pub reserved: u32,
    }
}

/// [`Setup::flags`]: emulate the local APIC (and its timer) in the kernel. `HLT` then sleeps in `RUN`, and vCPUs other than 0
/// wait for INIT and SIPI. On AArch64: the vCPU has a CPU interface of the VM's GIC ([`crate::ioctl::CREATE_GIC`] comes
/// before), its virtual timer interrupts it, and `WFI` sleeps in `RUN`.
pub const SETUP_IN_KERNEL_APIC: u32 = 1 << 0;

abi_struct! {
    /// `SETUP`: once, after `SET_ENTRY` and `SET_EPT_ROOT`.
    pub struct Setup: 64 {
        /// `SETUP_*`.
        pub flags: u32,
        /// Number of CPUID entries, at most [`crate::system::SystemInfo::max_cpuid_entries`].
        pub cpuid_count: u32,
        /// Address of the [`crate::x86::CpuidEntry`] array. Leaves and bits beyond `SUPPORTED_CPUID` are refused (`EINVAL`)
        /// where the hardware would be needed to honour them.
        pub cpuid_addr: u64,
        /// Zero.
        pub reserved: [u64; 6],
    }
}

abi_struct! {
    /// `SET_GPR`: legal as soon as the vCPU is set up.
    pub struct Gpr: 16 {
        /// Register number in the hardware's encoding (x86: 0 RAX, 1 RCX, 2 RDX, 3 RBX, 4 RSP, 5 RBP, 6 RSI, 7 RDI, 8..15
        /// R8..R15; AArch64: 0..30 X0..X30).
        pub reg: u32,
        /// Zero.
        pub reserved: u32,
        /// The value.
        pub value: u64,
    }
}

/// [`RegisterSet::set`]: [`crate::x86::General`].
pub const SET_GENERAL: u32 = 1;
/// [`RegisterSet::set`]: [`crate::x86::Segments`].
pub const SET_SEGMENTS: u32 = 2;
/// [`RegisterSet::set`]: [`crate::x86::Control`].
pub const SET_CONTROL: u32 = 3;
/// [`RegisterSet::set`]: [`crate::x86::Debug`].
pub const SET_DEBUG: u32 = 4;
/// [`RegisterSet::set`]: an array of [`crate::x86::Msr`], at most [`MAX_MSRS`]; reading fills in the values of the indices given.
pub const SET_MSRS: u32 = 5;
/// [`RegisterSet::set`]: the extended state in the standard (non-compacted) XSAVE format, [`crate::system::SystemInfo::xsave_size`] bytes.
pub const SET_XSAVE: u32 = 6;
/// [`RegisterSet::set`]: [`crate::x86::Events`].
pub const SET_EVENTS: u32 = 7;
/// [`RegisterSet::set`]: [`crate::x86::LocalApic`].
pub const SET_LOCAL_APIC: u32 = 8;

/// [`RegisterSet::set`]: [`crate::arm64::General`].
pub const SET_ARM64_GENERAL: u32 = 16;
/// [`RegisterSet::set`]: [`crate::arm64::System`].
pub const SET_ARM64_SYSTEM: u32 = 17;
/// [`RegisterSet::set`]: [`crate::arm64::Fp`].
pub const SET_ARM64_FP: u32 = 18;

/// Entries in one [`SET_MSRS`] access, at most.
pub const MAX_MSRS: u32 = 128;

abi_struct! {
    /// `GET_REGS` and `SET_REGS`: one register set, copied to or from the caller's memory. A set that is refused leaves the
    /// vCPU as it was.
    pub struct RegisterSet: 16 {
        /// `SET_*`.
        pub set: u32,
        /// Size of the buffer in bytes; must be exactly the set's size.
        pub len: u32,
        /// Address of the buffer.
        pub addr: u64,
    }
}

/// [`Event::kind`]: an external interrupt that the caller's interrupt controller acknowledged (8259 vector). It waits for the
/// interrupt window; one can wait at a time.
pub const EVENT_EXTERNAL_INTERRUPT: u32 = 0;
/// [`Event::kind`]: a non-maskable interrupt.
pub const EVENT_NMI: u32 = 2;
/// [`Event::kind`]: an exception, delivered at the next entry before any instruction.
pub const EVENT_EXCEPTION: u32 = 3;
/// [`Event::kind`]: a software interrupt (`INT n`), delivered at the next entry; RIP must already point behind the instruction.
pub const EVENT_SOFTWARE_INTERRUPT: u32 = 4;

/// [`Event::flags`]: the exception pushes [`Event::error_code`].
pub const EVENT_HAS_ERROR_CODE: u32 = 1 << 0;
/// [`Event::flags`]: a page fault whose address, [`Event::address`], goes to CR2.
pub const EVENT_HAS_ADDRESS: u32 = 1 << 1;

abi_struct! {
    /// `INJECT`. The numbers of `kind` are those of the VMCB's EVENTINJ type (APM vol. 2 section 15.20).
    pub struct Event: 24 {
        /// `EVENT_*`.
        pub kind: u32,
        /// Vector, 0 to 255; exceptions 0 to 31 without 2. Ignored for an NMI.
        pub vector: u32,
        /// Error code, if [`EVENT_HAS_ERROR_CODE`].
        pub error_code: u32,
        /// `EVENT_HAS_*`.
        pub flags: u32,
        /// Fault address, if [`EVENT_HAS_ADDRESS`].
        pub address: u64,
    }
}

/// [`ApicAccess::flags`]: write `value`; otherwise read.
pub const APIC_WRITE: u32 = 1 << 0;

abi_struct! {
    /// `APIC_ACCESS`: carries out the access that a guest made to the xAPIC page, decoded by the caller.
    pub struct ApicAccess: 16 {
        /// Byte offset in the page, below 4096.
        pub offset: u32,
        /// `APIC_*`.
        pub flags: u32,
        /// The value read, or to be written.
        pub value: u32,
        /// Zero.
        pub reserved: u32,
    }
}

/// Kinds of exit that [`VcpuStats::exits`] counts, in its order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum ExitKind {
    /// A host interrupt arrived.
    HostInterrupt = 0,
    /// Port I/O.
    PortIo,
    /// Nested page fault resolved by the module.
    PageFault,
    /// Nested page fault on an address that is not memory.
    Mmio,
    /// CPUID.
    Cpuid,
    /// RDMSR handled in the kernel.
    MsrRead,
    /// WRMSR handled in the kernel.
    MsrWrite,
    /// RDMSR or WRMSR handed to the caller.
    MsrUser,
    /// HLT.
    Halt,
    /// Interrupt or NMI window opened.
    Window,
    /// Hypercall (VMMCALL, VMCALL).
    Hypercall,
    /// XSETBV.
    Xsetbv,
    /// Control or debug register access.
    Register,
    /// PAUSE.
    Pause,
    /// Inter-processor interrupt sent.
    Ipi,
    /// Anything else.
    Other,
    /// The CPU virtualizes the local APIC, and has left something of an access to it to the module.
    Apic,
    /// The local APIC's timer has expired, as the CPU has seen by itself.
    Timer,
}

impl ExitKind {
    /// How many kinds there are.
    pub const COUNT: usize = 18;
    /// Every kind, in the order of [`VcpuStats::exits`].
    pub const ALL: [ExitKind; Self::COUNT] = [
        Self::HostInterrupt,
        Self::PortIo,
        Self::PageFault,
        Self::Mmio,
        Self::Cpuid,
        Self::MsrRead,
        Self::MsrWrite,
        Self::MsrUser,
        Self::Halt,
        Self::Window,
        Self::Hypercall,
        Self::Xsetbv,
        Self::Register,
        Self::Pause,
        Self::Ipi,
        Self::Other,
        Self::Apic,
        Self::Timer,
    ];
    /// A short lower-case name for tables.
    pub const fn name(self) -> &'static str {
        match self {
            Self::HostInterrupt => "host-interrupt",
            Self::PortIo => "port-io",
            Self::PageFault => "page-fault",
            Self::Mmio => "mmio",
            Self::Cpuid => "cpuid",
            Self::MsrRead => "msr-read",
            Self::MsrWrite => "msr-write",
            Self::MsrUser => "msr-user",
            Self::Halt => "halt",
            Self::Window => "window",
            Self::Hypercall => "hypercall",
            Self::Xsetbv => "xsetbv",
            Self::Register => "register",
            Self::Pause => "pause",
            Self::Ipi => "ipi",
            Self::Other => "other",
            Self::Apic => "apic",
            Self::Timer => "timer",
        }
    }
}

abi_struct! {
    /// `VCPU_STATS`: counters since the vCPU was created.
    pub struct VcpuStats: 256 {
        /// Calls of `RUN`.
        pub runs: u64,
        /// Windows: stretches in which the vCPU was bound to a CPU.
        pub windows: u64,
        /// Entries into the guest.
        pub entries: u64,
        /// Exits that the caller saw.
        pub user_exits: u64,
        /// Events injected (interrupts, NMIs, exceptions).
        pub injections: u64,
        /// Guest TLB flushes asked of the CPU.
        pub tlb_flushes: u64,
        /// Times the vCPU moved to another CPU.
        pub migrations: u64,
        /// Nanoseconds bound to a CPU.
        pub run_ns: u64,
        /// Nanoseconds asleep in `HLT`.
        pub halt_ns: u64,
        /// The CPU it ran on last, or all ones.
        pub last_cpu: u32,
        /// State: 0 created, 1 free, 2 ready, 3 running, 4 blocked, 5 failed.
        pub state: u32,
        /// Exits by [`ExitKind`].
        pub exits: [u64; 18],
        /// Zero.
        pub reserved: [u64; 4],
    }
}
