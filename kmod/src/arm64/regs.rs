// SPDX-License-Identifier: GPL-2.0-only
//! `GET_REGS` and `SET_REGS`: register sets between the caller's memory and the backend, which checks their values.

use axvcpu_uapi::vcpu::{RegisterSet, SET_ARM64_FP, SET_ARM64_GENERAL, SET_ARM64_SYSTEM};
use kernel::prelude::*;

use crate::{abi, vcpu::Inner};

/// `GET_REGS`.
///
/// # Errors
/// `EBADFD` before set-up, `EINVAL` for an unknown set or a wrong length, `EFAULT`.
pub(crate) fn get(inner: &mut Inner, arg: RegisterSet) -> Result<isize> {
    let arch = inner.vcpu.arch().map_err(abi::errno)?;
    let addr = usize::try_from(arg.addr).map_err(|_| EFAULT)?;
    match arg.set {
        SET_ARM64_GENERAL => abi::put_set(&arg, addr, arch.general()),
        SET_ARM64_SYSTEM => abi::put_set(&arg, addr, arch.system()),
        SET_ARM64_FP => abi::put_set(&arg, addr, *arch.fp()),
        _ => Err(EINVAL),
    }?;
    Ok(0)
}

/// `SET_REGS`.
///
/// # Errors
/// As [`get`], and `EINVAL` for a value that is not allowed; the vCPU is then as it was.
pub(crate) fn set(inner: &mut Inner, arg: RegisterSet) -> Result<isize> {
    let arch = inner.vcpu.arch_mut().map_err(abi::errno)?;
    let addr = usize::try_from(arg.addr).map_err(|_| EFAULT)?;
    match arg.set {
        SET_ARM64_GENERAL => arch.set_general(&abi::take_set(&arg, addr)?),
        SET_ARM64_SYSTEM => arch.set_system(&abi::take_set(&arg, addr)?),
        SET_ARM64_FP => arch.set_fp(&abi::take_set(&arg, addr)?),
        _ => return Err(EINVAL),
    }
    .map_err(abi::errno)?;
    Ok(0)
}
