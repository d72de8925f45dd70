// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! Arguments of the ioctls of `/dev/axvcpu` itself.

use crate::layout::abi_struct;

/// [`SystemInfo::arch`]: x86-64.
pub const ARCH_X86_64: u32 = 1;
/// [`SystemInfo::arch`]: AArch64.
pub const ARCH_AARCH64: u32 = 2;

/// [`SystemInfo::backend`]: the CPU has no usable virtualization extension.
pub const BACKEND_NONE: u32 = 0;
/// [`SystemInfo::backend`]: AMD Secure Virtual Machine.
pub const BACKEND_SVM: u32 = 1;
/// [`SystemInfo::backend`]: Intel VMX with EPT.
pub const BACKEND_VMX: u32 = 2;
/// [`SystemInfo::backend`]: AArch64 with the host at EL2 (VHE).
pub const BACKEND_VHE: u32 = 3;

/// [`SystemInfo::status`]: vCPUs can run.
pub const STATUS_READY: u32 = 0;
/// [`SystemInfo::status`]: the CPU has no virtualization extension that this module knows.
pub const STATUS_UNSUPPORTED: u32 = 1;
/// [`SystemInfo::status`]: the extension is there but the firmware has switched it off.
pub const STATUS_DISABLED_BY_FIRMWARE: u32 = 2;
/// [`SystemInfo::status`]: another hypervisor (normally KVM) holds the extension at the moment.
pub const STATUS_IN_USE: u32 = 3;
/// [`SystemInfo::status`]: the extension lacks something that is required (nested paging).
pub const STATUS_TOO_OLD: u32 = 4;

/// [`SystemInfo::status`]: the host kernel does not run at EL2 (AArch64): it was started at EL1, or the CPU lacks VHE.
pub const STATUS_HOST_NOT_AT_EL2: u32 = 5;

/// [`SystemInfo::features`]: the interrupt controller can live in the kernel ([`crate::vcpu::SETUP_IN_KERNEL_APIC`]): local APICs,
/// or a GICv3 (AArch64: [`crate::ioctl::CREATE_GIC`]).
pub const FEATURE_IN_KERNEL_APIC: u64 = 1 << 0;
/// [`SystemInfo::features`]: the CPU reports where the next instruction starts (NRIP save).
pub const FEATURE_NEXT_RIP: u64 = 1 << 1;
/// [`SystemInfo::features`]: the CPU hands over instruction bytes at page faults (decode assists).
pub const FEATURE_DECODE_ASSISTS: u64 = 1 << 2;
/// [`SystemInfo::features`]: guest memory can be mapped by 2 MiB leaves.
pub const FEATURE_HUGE_2M: u64 = 1 << 3;
/// [`SystemInfo::features`]: the paravirtual clock is offered.
pub const FEATURE_PV_CLOCK: u64 = 1 << 4;
/// [`SystemInfo::features`]: eventfds can interrupt guests and be signalled by them (`IRQFD`, `IOEVENTFD`).
pub const FEATURE_EVENTFD: u64 = 1 << 5;
/// [`SystemInfo::features`]: address spaces have a dirty log.
pub const FEATURE_DIRTY_LOG: u64 = 1 << 6;

abi_struct! {
    /// What the module is and can do. The layout of this structure is frozen: `INFO` has the same number in every
    /// version, so that a mismatch of [`abi_version`](Self::abi_version) can always be told.
    pub struct SystemInfo: 128 {
        /// [`crate::ABI_VERSION`] of the module.
        pub abi_version: u32,
        /// `ARCH_*`.
        pub arch: u32,
        /// `BACKEND_*`: the backend chosen for this CPU.
        pub backend: u32,
        /// `STATUS_*`: whether vCPUs can run just now.
        pub status: u32,
        /// `FEATURE_*` bits.
        pub features: u64,
        /// vCPUs per VM, at most. vCPU ids are below it.
        pub max_vcpus: u32,
        /// Address spaces per VM, at most.
        pub max_address_spaces: u32,
        /// Regions per address space, at most.
        pub max_regions: u32,
        /// CPUID entries per vCPU, at most.
        pub max_cpuid_entries: u32,
        /// Width of a guest physical address, in bits.
        pub guest_phys_bits: u32,
        /// Size of the run page that mapping a vCPU gives, in bytes.
        pub run_page_size: u32,
        /// Frequency of the time-stamp counter (x86) or generic timer (AArch64), in kHz.
        pub tsc_khz: u32,
        /// Size of the [`crate::vcpu::SET_XSAVE`] register set, in bytes (x86).
        pub xsave_size: u32,
        /// Bits that a guest may set in XCR0 (x86).
        pub xcr0_supported: u64,
        /// VMs that exist now, in the whole system.
        pub vms: u32,
        /// Eventfds per VM that interrupt the guest, at most; and as many that the guest signals.
        pub max_eventfds: u32,
        /// Zero.
        pub reserved: [u64; 7],
    }
}

abi_struct! {
    /// `SUPPORTED_CPUID`: where to put the table.
    pub struct CpuidTable: 16 {
        /// Address of an array of [`crate::x86::CpuidEntry`] in the caller's memory.
        pub entries_addr: u64,
        /// In: entries the array has room for. If it is too small the call fails with `E2BIG` and `count` says what is needed.
        pub capacity: u32,
        /// Out: entries written, or needed.
        pub count: u32,
    }
}

abi_struct! {
    /// `CREATE_VM`.
    pub struct CreateVm: 8 {
        /// No flag is defined: zero.
        pub flags: u32,
        /// Zero.
        pub reserved: u32,
    }
}
