// SPDX-License-Identifier: GPL-2.0-only
//! What there is for the whole system, from the module's load to its unload.

use kernel::prelude::*;

use crate::percpu::PerCpu;

mod raw {
    extern "C" {
        pub(super) fn axvcpu_flush_ipis();
        pub(super) fn axvcpu_find_timer_irq();
    }
}

/// The system-wide state of the backend. On a host without one there is none.
pub(crate) struct Backends {
    _per_cpu: PerCpu,
}

impl Backends {
    /// Makes it, if the host has the backend.
    ///
    /// # Errors
    /// `ENOMEM`, `ENOSPC`.
    pub(crate) fn new() -> Result<Option<Self>> {
        if super::detect().is_err() {
            if let Some(missing) = super::missing_feature() {
                pr_warn!("no vCPUs on this host: it lacks {}\n", missing);
            }
            return Ok(None);
        }
        // SAFETY: No precondition but a context that may sleep, which loading is.
        unsafe { raw::axvcpu_find_timer_irq() };
        let per_cpu = PerCpu::new()?;
        match arm_vcpu::history::branches() {
            0 => {}
            branches => pr_info!("after exit: {} branches over the guest's history\n", branches),
        }
        match arm_vcpu::history::unprotected() {
            0 => {}
            cpus => pr_warn!("{} CPUs want their firmware to clear branch history, which is not asked to\n", cpus),
        }
        match arm_vcpu::history::trainable() {
            0 => {}
            cpus => {
                pr_warn!("{} CPUs want their firmware to clear branch predictors, which is not asked to\n", cpus)
            }
        }
        Ok(Some(Self { _per_cpu: per_cpu }))
    }
}

impl Drop for Backends {
    fn drop(&mut self) {
        // SAFETY: No precondition but a context that may sleep, which unloading is. No vCPU exists any more that could ask for
        // another interrupt.
        unsafe { raw::axvcpu_flush_ipis() };
    }
}
