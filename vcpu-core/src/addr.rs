// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The one address type that never crosses the ABI.

axvcpu_uapi::address! {
    /// A host physical address (HPA), in bytes. It comes from the kernel's allocators only, never from userspace.
    HostPhysAddr
}
