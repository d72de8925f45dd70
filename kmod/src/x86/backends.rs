// SPDX-License-Identifier: GPL-2.0-only
//! What the backends keep for the whole system, from the module's load to its unload: the CPUs' records, and on SVM the
//! permission maps that all vCPUs share.

use core::{
    ptr,
    sync::atomic::{AtomicPtr, Ordering},
};

use kernel::prelude::*;
use vcpu_core::AxError;
use x86_vcpu::{Backend, Capabilities, L1dFlush, Mitigations, PermissionMaps, X86Hal};

use super::{ffi, ticks};
use crate::{abi, hal::Host, percpu::PerCpu};

/// The permission maps of SVM, while [`Backends`] exists there.
static SVM_MAPS: AtomicPtr<PermissionMaps<Host>> = AtomicPtr::new(ptr::null_mut());

/// The system-wide state of the backends. On a CPU without one there is none.
pub(crate) struct Backends {
    _per_cpu: PerCpu,
    _svm_maps: Option<SvmMaps>,
}

impl Backends {
    /// Makes it, if the CPU has a backend.
    ///
    /// # Errors
    /// `ENOMEM`, `ENOSPC`.
    pub(crate) fn new() -> Result<Option<Self>> {
        let backend = match x86_vcpu::detect() {
            Ok(backend) => backend,
            Err(error) => {
                if let (AxError::Unsupported, Some(missing)) = (error, x86_vcpu::missing_feature()) {
                    pr_warn!("no vCPUs on this CPU: it lacks {}\n", missing);
                }
                return Ok(None);
            }
        };
        tell_mitigations();
        ticks::start();
        let svm_maps = if backend == Backend::Svm { Some(SvmMaps::new()?) } else { None };
        Ok(Some(Self { _svm_maps: svm_maps, _per_cpu: PerCpu::new()? }))
    }
}

/// Says what is done so that guests, and host and guest, learn nothing of each other by the CPU's speculation, and cannot stop
/// the machine.
fn tell_mitigations() {
    let Mitigations {
        clear_buffers,
        refill_rsb,
        branch_barrier,
        untrain_returns,
        barrier_at_exit,
        barrier_before_user,
        clear_history,
        rewrite_spec_ctrl,
        flush_l1d,
        small_code,
    } = Host::mitigations();
    let word = |wanted: bool, word: &'static str| if wanted { word } else { "" };
    let ibpb = |wanted: bool| word(wanted && Capabilities::host().branch_barrier, " IBPB");
    pr_info!(
        "at a change of vCPU:{} after the host:{} before entry:{}{} after exit:{}{}{}{}{} before userspace:{}{}\n",
        ibpb(branch_barrier),
        word(flush_l1d == L1dFlush::AfterHost, " L1D-flush"),
        word(flush_l1d == L1dFlush::Always, " L1D-flush"),
        word(clear_buffers, " VERW"),
        word(refill_rsb, " RSB-refill"),
        word(untrain_returns, " untrained-returns"),
        ibpb(barrier_at_exit),
        word(rewrite_spec_ctrl, " IBRS"),
        word(clear_history, " BHB-clearing"),
        ibpb(barrier_before_user),
        word(small_code, "; no code in large pages"),
    );
    if Mitigations::leaves_l1d_to_siblings(ffi::host_flags()) {
        pr_warn!(
            "a guest can read what another thread of its core has in the L1 data cache (L1TF): use the host with 'nosmt'\n"
        );
    }
}

/// Owns what `SVM_MAPS` points to. There is one at a time: [`Backends`] is made once, at the module's load.
struct SvmMaps;

impl SvmMaps {
    fn new() -> Result<Self> {
        let maps = KBox::new(PermissionMaps::<Host>::new().map_err(abi::errno)?, GFP_KERNEL)?;
        SVM_MAPS.store(KBox::into_raw(maps), Ordering::Release);
        Ok(Self)
    }
}

impl Drop for SvmMaps {
    fn drop(&mut self) {
        let maps = SVM_MAPS.swap(ptr::null_mut(), Ordering::AcqRel);
        // SAFETY: The pointer came from `KBox::into_raw` in `new`, and no vCPU exists any more that could use it.
        drop(unsafe { KBox::from_raw(maps) });
    }
}

/// The permission maps of SVM, if that is the backend. Called for a vCPU.
pub(crate) fn svm_maps() -> Option<&'static PermissionMaps<Host>> {
    // SAFETY: Null, or what `SvmMaps::new` has made; and the module holds on to that until the last vCPU has gone with its
    // file.
    unsafe { SVM_MAPS.load(Ordering::Acquire).as_ref() }
}
