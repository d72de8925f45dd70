// SPDX-License-Identifier: MIT OR Apache-2.0
//! The rows of the table: what is measured, and what is wanted of it. Each architecture has those that mean something there.

use clap::ValueEnum;

/// What the project wants of a row, against KVM in the same boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// At most a third: handled in the kernel.
    Third,
    /// At most a half: a round trip to userspace.
    Half,
    /// No more.
    Equal,
    /// Nothing is.
    None,
}

impl Target {
    /// The largest ratio to KVM that meets it.
    pub(crate) const fn limit(self) -> Option<f64> {
        match self {
            Self::Third => Some(1.0 / 3.0),
            Self::Half => Some(0.5),
            Self::Equal => Some(1.0),
            Self::None => None,
        }
    }

    /// In the table.
    pub(crate) const fn sign(self) -> &'static str {
        match self {
            Self::Third => "⅓",
            Self::Half => "½",
            Self::Equal => "1",
            Self::None => "",
        }
    }
}

macro_rules! rows {
    ($($(#[$meta:meta])* $row:ident, $target:ident, $title:literal;)*) => {
        /// A row, in the table's order.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
        pub(crate) enum Row {
            $($(#[$meta])* $row,)*
        }

        impl Row {
            /// All of them.
            pub(crate) const ALL: &'static [Self] = &[$(Self::$row),*];

            /// What it is called in the table.
            pub(crate) const fn title(self) -> &'static str {
                match self {
                    $(Self::$row => $title,)*
                }
            }

            /// What is wanted.
            pub(crate) const fn target(self) -> Target {
                match self {
                    $(Self::$row => Target::$target,)*
                }
            }
        }
    };
}

rows! {
    /// HVC, answered in the kernel.
    Hvc, Third, "HVC: PSCI_VERSION";
    /// MRS of an ID register.
    IdRead, Third, "MRS of ID_AA64ISAR0_EL1";
    /// MRS, refused in the kernel.
    RegisterRefused, Third, "MRS refused in the kernel: exit, undefined instruction, handler";
    /// A read of the distributor.
    Distributor, Third, "read of the distributor: GICD_TYPER";
    /// SGI to itself, handler and end.
    SelfSgi, Third, "SGI to itself: send, handler, end of interrupt";
    /// The virtual timer with its interrupt.
    VirtualTimer, Third, "virtual timer: arm, interrupt, handler, end of interrupt";
    /// WFI.
    WfiWake, Third, "WFI of a sleeping vCPU, woken by a message from userspace";
    /// irqfd.
    WfiIrqfd, Third, "WFI of a sleeping vCPU, woken by an irqfd";
    /// SGI.
    Sgi, Third, "SGI to another vCPU, asleep in WFI, on the same host CPU";
    /// CPUID.
    Cpuid, Third, "CPUID, leaf 1";
    /// RDMSR, answered in the kernel.
    MsrRead, Third, "RDMSR of IA32_APIC_BASE";
    /// WRMSR, refused in the kernel.
    MsrRefused, Third, "WRMSR refused in the kernel: exit, #GP, handler";
    /// Self-IPI, handler and EOI.
    SelfIpi, Third, "self-IPI by x2APIC: send, handler, end of interrupt";
    /// End of interrupt.
    Eoi, Third, "x2APIC end of interrupt";
    /// TSC deadline, armed only.
    DeadlineArm, Third, "WRMSR of IA32_TSC_DEADLINE";
    /// TSC deadline with its interrupt.
    Deadline, Third, "TSC deadline: arm, timer interrupt, handler, end of interrupt";
    /// HLT.
    HltWake, Third, "HLT to a sleeping vCPU, woken by a message from userspace";
    /// irqfd.
    Irqfd, Third, "the same, woken by an irqfd";
    /// IPI.
    Ipi, Third, "IPI to another vCPU, asleep in HLT, on the same host CPU";
    /// ioeventfd.
    Ioeventfd, Third, "OUT to an ioeventfd";
    /// ioeventfd at an address.
    IoeventfdMmio, Third, "MMIO write to an ioeventfd";
    /// 4 KiB page.
    Fault4k, Third, "nested page fault, 4 KiB of host memory";
    /// 2 MiB page.
    Fault2m, Third, "nested page fault, 2 MiB of host memory";
    /// OUT.
    Out, Half, "OUT to userspace and back";
    /// IN.
    In, Half, "IN from userspace and back";
    /// MMIO write.
    MmioWrite, Half, "MMIO write to userspace and back, decoded";
    /// MMIO read.
    MmioRead, Half, "MMIO read from userspace and back, decoded";
    /// Hypercall.
    Hypercall, Half, "hypercall to userspace and back";
    /// Unknown MSR.
    MsrUser, Half, "RDMSR refused by userspace: exit, #GP, handler";
    /// Life of a VM.
    Life, Equal, "a VM with one vCPU: create, run to its first exit to userspace, destroy";
    /// Kernel memory.
    KernelMemory, Equal, "kernel memory of such a VM, bytes";
    /// Boot.
    Boot, Equal, "Linux guest: start of axvmm to its userspace";
    /// Exits of that boot.
    BootExits, None, "the same, exits";
    /// Memory of axvmm.
    Resident, Equal, "resident memory of axvmm beside guest memory, KiB";
}
