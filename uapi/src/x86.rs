// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! Register sets of x86-64.

use crate::layout::abi_struct;

abi_struct! {
    /// General registers, in the hardware's encoding order.
    pub struct General: 144 {
        /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 .. R15.
        pub gpr: [u64; 16],
        /// Instruction pointer.
        pub rip: u64,
        /// Flags. Bit 1 reads as one; reserved bits are zero.
        pub rflags: u64,
    }
}

/// Index of RAX in [`General::gpr`].
pub const RAX: usize = 0;
/// Index of RCX in [`General::gpr`].
pub const RCX: usize = 1;
/// Index of RDX in [`General::gpr`].
pub const RDX: usize = 2;
/// Index of RBX in [`General::gpr`].
pub const RBX: usize = 3;
/// Index of RSP in [`General::gpr`].
pub const RSP: usize = 4;
/// Index of RBP in [`General::gpr`].
pub const RBP: usize = 5;
/// Index of RSI in [`General::gpr`].
pub const RSI: usize = 6;
/// Index of RDI in [`General::gpr`].
pub const RDI: usize = 7;

abi_struct! {
    /// A segment register with its hidden part.
    pub struct Segment: 16 {
        /// Base address.
        pub base: u64,
        /// Limit in bytes, granularity already applied.
        pub limit: u32,
        /// Selector.
        pub selector: u16,
        /// Attributes as in the VMCB (APM vol. 2 section 15.5.1): bits 3:0 type, 4 S, 6:5 DPL, 7 P, 8 AVL, 9 L, 10 D/B, 11 G.
        /// P clear means the segment is unusable.
        pub attributes: u16,
    }
}

abi_struct! {
    /// GDTR or IDTR.
    pub struct DescriptorTable: 16 {
        /// Base address.
        pub base: u64,
        /// Limit in bytes.
        pub limit: u16,
        /// Zero.
        pub reserved: [u16; 3],
    }
}

abi_struct! {
    /// Segment and descriptor-table registers.
    pub struct Segments: 160 {
        /// ES.
        pub es: Segment,
        /// CS.
        pub cs: Segment,
        /// SS.
        pub ss: Segment,
        /// DS.
        pub ds: Segment,
        /// FS.
        pub fs: Segment,
        /// GS.
        pub gs: Segment,
        /// LDTR.
        pub ldtr: Segment,
        /// TR.
        pub tr: Segment,
        /// GDTR.
        pub gdtr: DescriptorTable,
        /// IDTR.
        pub idtr: DescriptorTable,
    }
}

abi_struct! {
    /// Control registers, EFER and the APIC base.
    pub struct Control: 64 {
        /// CR0.
        pub cr0: u64,
        /// CR2.
        pub cr2: u64,
        /// CR3.
        pub cr3: u64,
        /// CR4.
        pub cr4: u64,
        /// CR8: task priority, 0 to 15.
        pub cr8: u64,
        /// EFER as the guest sees it.
        pub efer: u64,
        /// XCR0.
        pub xcr0: u64,
        /// IA32_APIC_BASE.
        pub apic_base: u64,
    }
}

abi_struct! {
    /// Debug registers.
    pub struct Debug: 48 {
        /// DR0 to DR3.
        pub dr: [u64; 4],
        /// DR6.
        pub dr6: u64,
        /// DR7.
        pub dr7: u64,
    }
}

abi_struct! {
    /// A model-specific register.
    pub struct Msr: 16 {
        /// Index (ECX of RDMSR).
        pub index: u32,
        /// Zero.
        pub reserved: u32,
        /// Value.
        pub value: u64,
    }
}

/// [`Events::activity`]: executing instructions.
pub const ACTIVITY_RUNNING: u32 = 0;
/// [`Events::activity`]: halted by HLT.
pub const ACTIVITY_HALTED: u32 = 1;
/// [`Events::activity`]: waiting for a start-up IPI.
pub const ACTIVITY_WAIT_FOR_SIPI: u32 = 2;

/// [`Events::flags`]: the interrupt shadow of STI or MOV SS covers the next instruction.
pub const EVENTS_INTERRUPT_SHADOW: u32 = 1 << 0;
/// [`Events::flags`]: NMIs are blocked until IRET.
pub const EVENTS_NMI_MASKED: u32 = 1 << 1;
/// [`Events::flags`]: an NMI waits.
pub const EVENTS_NMI_PENDING: u32 = 1 << 2;
/// [`Events::flags`]: [`Events::external_vector`] waits for the interrupt window.
pub const EVENTS_EXTERNAL_PENDING: u32 = 1 << 3;
/// [`Events::flags`]: [`Events::event`] will be injected at the next entry.
pub const EVENTS_EVENT_PENDING: u32 = 1 << 4;

abi_struct! {
    /// Everything about events that is not in a register: for saving, restoring and testing.
    pub struct Events: 56 {
        /// `EVENTS_*`.
        pub flags: u32,
        /// `ACTIVITY_*`.
        pub activity: u32,
        /// Vector of the waiting external interrupt.
        pub external_vector: u32,
        /// Zero.
        pub reserved0: u32,
        /// The event to be injected at the next entry.
        pub event: crate::vcpu::Event,
        /// Zero.
        pub reserved: [u64; 2],
    }
}

abi_struct! {
    /// The local APIC's registers: word `i` is the register at byte offset `16 * i` of the xAPIC page.
    pub struct LocalApic: 256 {
        /// Registers.
        pub regs: [u32; 64],
    }
}

/// [`CpuidEntry::flags`]: the entry answers only for [`CpuidEntry::index`]; otherwise for every index.
pub const CPUID_INDEX_SIGNIFICANT: u32 = 1 << 0;

abi_struct! {
    /// The answer to one CPUID leaf.
    pub struct CpuidEntry: 32 {
        /// Leaf (EAX).
        pub function: u32,
        /// Sub-leaf (ECX).
        pub index: u32,
        /// `CPUID_*`.
        pub flags: u32,
        /// Result in EAX.
        pub eax: u32,
        /// Result in EBX.
        pub ebx: u32,
        /// Result in ECX.
        pub ecx: u32,
        /// Result in EDX.
        pub edx: u32,
        /// Zero.
        pub reserved: u32,
    }
}
