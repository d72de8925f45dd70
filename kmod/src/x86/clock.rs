// SPDX-License-Identifier: GPL-2.0-only
//! The paravirtual clock: writing its structures to guest memory, between windows, where that may fault.
//!
//! Locks: `AddressSpace::state`, for the address and for the dirty log; not while guest memory is written.

use axvcpu_uapi::aspace::MEM_WRITE;
use kernel::{
    bindings,
    prelude::*,
    uaccess::{UserPtr, UserSlice},
};
use vcpu_core::GuestPhysAddr;

use crate::{
    aspace::AddressSpace,
    tables::Spare,
    vcpu::{Inner, Vcpu},
};

/// Guest memory is contiguous in the host within a page only.
const PAGE: u64 = 4096;

impl Vcpu {
    /// Writes the clock structures that the guest asked for. An address that is not writable memory is the guest's own
    /// mistake: nothing is written.
    pub(crate) fn update_clock(&self, inner: &mut Inner) {
        let Ok(arch) = inner.vcpu.arch_mut() else { return };
        let (Some(aspace), spare) = (&inner.aspace, &mut inner.spare) else { return };
        let base = self.vm.arch();
        while let Some(update) =
            arch.clock_update(base, || real_time_ns().wrapping_sub(base.system_ns(x86_vcpu::read_tsc())))
        {
            let _ = update.apply(|addr, bytes| write_guest(aspace, spare, addr, bytes));
        }
    }
}

/// Nanoseconds since 1970.
fn real_time_ns() -> u64 {
    // SAFETY: Callable from any context.
    unsafe { bindings::ktime_get_real_fast_ns() }
}

fn write_guest(aspace: &AddressSpace, spare: &mut Spare, addr: GuestPhysAddr, bytes: &[u8]) -> Result {
    let mut addr = addr;
    let mut rest = bytes;
    while !rest.is_empty() {
        let room = PAGE.wrapping_sub(addr.as_u64() & (PAGE - 1)) as usize;
        let (part, next) = rest.split_at_checked(room.min(rest.len())).ok_or(EFAULT)?;
        let host = aspace.host_address(addr, MEM_WRITE).ok_or(EFAULT)?;
        let to = UserPtr::from_addr(usize::try_from(host).map_err(|_| EFAULT)?);
        UserSlice::new(to, part.len()).writer().write_slice(part)?;
        aspace.wrote(addr, spare)?;
        addr = addr.checked_add(part.len() as u64).ok_or(EFAULT)?;
        rest = next;
    }
    Ok(())
}
