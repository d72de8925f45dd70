// SPDX-License-Identifier: GPL-2.0-only
//! What the backends keep for the whole system, from the module's load to its unload: the CPUs' records and the permission
//! maps that all vCPUs share.

use core::{
    ptr,
    sync::atomic::{AtomicPtr, Ordering},
};

use kernel::prelude::*;
use vcpu_core::AxError;
use x86_vcpu::{Capabilities, Mitigations, PermissionMaps, X86Hal};

use crate::{abi, hal::Host, percpu::PerCpu};

/// The permission maps, while [`Backends`] exists.
static MAPS: AtomicPtr<PermissionMaps<Host>> = AtomicPtr::new(ptr::null_mut());

/// The system-wide state of the backends. On a CPU without one there is none.
pub(crate) struct Backends {
    _per_cpu: PerCpu,
    _maps: Maps,
}

struct Maps;

impl Backends {
    /// Makes it, if the CPU has a backend.
    ///
    /// # Errors
    /// `ENOMEM`, `ENOSPC`.
    pub(crate) fn new() -> Result<Option<Self>> {
        if let Err(error) = x86_vcpu::detect() {
            if let (AxError::Unsupported, Some(missing)) = (error, x86_vcpu::missing_feature()) {
                pr_warn!("no vCPUs on this CPU: it lacks {}\n", missing);
            }
            return Ok(None);
        }
        tell_mitigations();
        let maps = KBox::new(PermissionMaps::<Host>::new().map_err(abi::errno)?, GFP_KERNEL)?;
        MAPS.store(KBox::into_raw(maps), Ordering::Release);
        Ok(Some(Self { _maps: Maps, _per_cpu: PerCpu::new()? }))
    }
}

/// Says what is done so that guests, and host and guest, learn nothing of each other by the CPU's speculation. It is Linux'
/// decision for KVM's guests, but for the barrier between vCPUs, which is not told to modules.
fn tell_mitigations() {
    let Mitigations {
        clear_buffers,
        refill_rsb,
        untrain_returns,
        barrier_at_exit,
        barrier_before_user,
        branch_barrier,
    } = Host::mitigations();
    let word = |wanted: bool, word: &'static str| if wanted { word } else { "" };
    pr_info!(
        "at a change of vCPU:{} before entry:{} after exit:{}{}{} before userspace:{}\n",
        word(branch_barrier && Capabilities::host().branch_barrier, " IBPB"),
        word(clear_buffers, " VERW"),
        word(refill_rsb, " RSB-refill"),
        word(untrain_returns, " untrained-returns"),
        word(barrier_at_exit, " IBPB"),
        word(barrier_before_user, " IBPB"),
    );
}

impl Drop for Maps {
    fn drop(&mut self) {
        let maps = MAPS.swap(ptr::null_mut(), Ordering::AcqRel);
        // SAFETY: The pointer came from `KBox::into_raw` in `new`, and no vCPU exists any more that could use it.
        drop(unsafe { KBox::from_raw(maps) });
    }
}

/// The permission maps. A vCPU exists.
pub(crate) fn maps() -> &'static PermissionMaps<Host> {
    // SAFETY: A vCPU exists, so a VM could be created, so the CPU has a backend; and the module holds on to the maps until
    // the last vCPU has gone with its file.
    unsafe { &*MAPS.load(Ordering::Acquire) }
}
