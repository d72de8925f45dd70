// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! Arguments of the ioctls of a VM.

use crate::layout::abi_struct;

abi_struct! {
    /// `CREATE_ADDRESS_SPACE`.
    pub struct CreateAddressSpace: 8 {
        /// No flag is defined: zero.
        pub flags: u32,
        /// Zero.
        pub reserved: u32,
    }
}

abi_struct! {
    /// `CREATE_VCPU`.
    pub struct CreateVcpu: 8 {
        /// The vCPU's number, unique in the VM, below [`crate::system::SystemInfo::max_vcpus`]. On x86 it is also the initial
        /// local APIC id, and vCPU 0 is the boot processor.
        pub id: u32,
        /// No flag is defined: zero.
        pub flags: u32,
    }
}

abi_struct! {
    /// `SIGNAL_MSI`: an interrupt message in the format of the architecture (x86: SDM vol. 3 section 12.11,
    /// APM vol. 2 section 16.11; trigger mode in bit 15 of the data. AArch64: a write to the VM's GIC distributor).
    pub struct Msi: 16 {
        /// Message address. On x86 bits 31:20 are 0xfee; bits 63:40 may hold bits 31:8 of the destination (x2APIC format).
        /// On AArch64 the distributor's address plus [`crate::arm64::GIC_SET_SPI`] or [`crate::arm64::GIC_CLEAR_SPI`].
        pub address: u64,
        /// Message data. On AArch64 the INTID, from 32 to [`crate::arm64::GIC_INTIDS`] - 1.
        pub data: u32,
        /// No flag is defined: zero.
        pub flags: u32,
    }
}

/// [`Irqfd::flags`]: detach.
pub const IRQFD_DETACH: u32 = 1 << 0;
/// [`Irqfd::flags`]: signal [`Irqfd::resample_fd`] when the guest has handled the interrupt.
pub const IRQFD_RESAMPLE: u32 = 1 << 1;

abi_struct! {
    /// `IRQFD`: an eventfd each signal of which delivers an interrupt message, in the format of [`Msi`].
    pub struct Irqfd: 24 {
        /// The eventfd.
        pub fd: i32,
        /// With [`IRQFD_RESAMPLE`]: an eventfd that is signalled at the end of the interrupt, which must be level-triggered.
        /// Otherwise zero.
        pub resample_fd: i32,
        /// Message address. Zero to detach.
        pub address: u64,
        /// Message data. Zero to detach.
        pub data: u32,
        /// `IRQFD_*`.
        pub flags: u32,
    }
}

/// [`IoEventfd::flags`]: detach what was attached with the other fields.
pub const IOEVENTFD_DETACH: u32 = 1 << 0;
/// [`IoEventfd::flags`]: the address is a port (x86), not a guest physical address.
pub const IOEVENTFD_PORT: u32 = 1 << 1;
/// [`IoEventfd::flags`]: only writes of [`IoEventfd::data`] count.
pub const IOEVENTFD_DATAMATCH: u32 = 1 << 2;

abi_struct! {
    /// `IOEVENTFD`: an eventfd that certain writes of the guest signal, which are complete with that: `RUN` does not return.
    pub struct IoEventfd: 32 {
        /// Port or guest physical address.
        pub address: u64,
        /// With [`IOEVENTFD_DATAMATCH`]: the value, which fits the width. Otherwise zero.
        pub data: u64,
        /// The eventfd; -1 to detach.
        pub fd: i32,
        /// Width of the write in bytes: 1, 2, 4 or 8 (not for ports), or 0 for any.
        pub width: u32,
        /// `IOEVENTFD_*`.
        pub flags: u32,
        /// Zero.
        pub reserved: u32,
    }
}

abi_struct! {
    /// `VM_STATS`: counters since the VM was created.
    pub struct VmStats: 64 {
        /// vCPUs that exist.
        pub vcpus: u32,
        /// Address spaces that exist.
        pub address_spaces: u32,
        /// Guest pages that are mapped now by 4 KiB leaves, over all address spaces.
        pub pages_4k: u64,
        /// Guest pages that are mapped now by 2 MiB leaves.
        pub pages_2m: u64,
        /// Pages that nested page tables occupy now, of 4 KiB.
        pub table_pages: u64,
        /// Nested page faults that the module resolved.
        pub faults: u64,
        /// Invalidations by the host's memory management (MMU notifier) that removed a mapping.
        pub invalidations: u64,
        /// TLB shoot-downs that had to interrupt a running vCPU.
        pub shootdowns: u64,
        /// Pages that dirty logs occupy now, of 4 KiB.
        pub log_pages: u64,
    }
}
