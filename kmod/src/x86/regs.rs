// SPDX-License-Identifier: GPL-2.0-only
//! `GET_REGS` and `SET_REGS`: register sets between the caller's memory and the backend, which checks their values.

use axvcpu_uapi::{
    vcpu::{
        RegisterSet, MAX_MSRS, SET_CONTROL, SET_DEBUG, SET_EVENTS, SET_GENERAL, SET_LOCAL_APIC, SET_MSRS, SET_SEGMENTS,
        SET_XSAVE,
    },
    x86::Msr,
    AbiStruct,
};
use kernel::{
    alloc::KVVec,
    prelude::*,
    uaccess::{UserPtr, UserSlice},
};
use x86_vcpu::X86VCpu;

use crate::{abi, hal::Host, vcpu::Inner};

type Arch = X86VCpu<Host>;

/// `GET_REGS`.
///
/// # Errors
/// `EBADFD` before set-up, `EINVAL` for an unknown set or a wrong length, `EFAULT`, and the backend's.
pub(crate) fn get(inner: &mut Inner, arg: RegisterSet) -> Result<isize> {
    synchronize(inner, arg.set)?;
    let arch = inner.vcpu.arch().map_err(abi::errno)?;
    let addr = usize::try_from(arg.addr).map_err(|_| EFAULT)?;
    match arg.set {
        SET_GENERAL => abi::put_set(&arg, addr, arch.general()),
        SET_SEGMENTS => abi::put_set(&arg, addr, arch.segments()),
        SET_CONTROL => abi::put_set(&arg, addr, arch.control()),
        SET_DEBUG => abi::put_set(&arg, addr, arch.debug()),
        SET_EVENTS => abi::put_set(&arg, addr, arch.events()),
        SET_LOCAL_APIC => {
            let state = inner.vcpu.arch_mut().and_then(Arch::local_apic).map_err(abi::errno)?;
            abi::put_set(&arg, addr, state)
        }
        SET_MSRS => get_msrs(inner.vcpu.arch_mut().map_err(abi::errno)?, &arg),
        SET_XSAVE => {
            let mut area = xsave_area(arch, &arg)?;
            arch.xsave_to(&mut area).map_err(abi::errno)?;
            UserSlice::new(UserPtr::from_addr(addr), area.len()).writer().write_slice(&area)
        }
        _ => Err(EINVAL),
    }?;
    Ok(0)
}

/// `SET_REGS`.
///
/// # Errors
/// As [`get`]; the vCPU is then as it was.
pub(crate) fn set(inner: &mut Inner, arg: RegisterSet) -> Result<isize> {
    synchronize(inner, arg.set)?;
    let arch = inner.vcpu.arch_mut().map_err(abi::errno)?;
    let addr = usize::try_from(arg.addr).map_err(|_| EFAULT)?;
    match arg.set {
        SET_GENERAL => arch.set_general(&abi::take_set(&arg, addr)?),
        SET_SEGMENTS => arch.set_segments(&abi::take_set(&arg, addr)?),
        SET_CONTROL => arch.set_control(&abi::take_set(&arg, addr)?),
        SET_DEBUG => arch.set_debug(&abi::take_set(&arg, addr)?),
        SET_EVENTS => arch.set_events(&abi::take_set(&arg, addr)?),
        SET_LOCAL_APIC => arch.set_local_apic(&abi::take_set(&arg, addr)?),
        SET_MSRS => return set_msrs(arch, &arg).map(|()| 0),
        SET_XSAVE => {
            let mut area = xsave_area(arch, &arg)?;
            UserSlice::new(UserPtr::from_addr(addr), area.len()).reader().read_slice(&mut area)?;
            arch.xsave_from(&area)
        }
        _ => return Err(EINVAL),
    }
    .map_err(abi::errno)?;
    Ok(0)
}

/// Has the backend's copy of `set` completed, if it is one that it may have left in the CPU's control block. What a vCPU that has
/// failed had there is lost.
fn synchronize(inner: &mut Inner, set: u32) -> Result {
    match inner.vcpu.arch_mut() {
        Ok(arch) if matches!(set, SET_SEGMENTS | SET_CONTROL | SET_MSRS) => arch.synchronize().map_err(abi::errno),
        _ => Ok(()),
    }
}

/// A buffer for the XSAVE area, if the caller's has the right size.
fn xsave_area(arch: &Arch, arg: &RegisterSet) -> Result<KVVec<u8>> {
    let size = arch.xsave_size();
    if arg.len != size {
        return Err(EINVAL);
    }
    let mut area = KVVec::with_capacity(size as usize, GFP_KERNEL_ACCOUNT)?;
    area.extend_with(size as usize, 0, GFP_KERNEL_ACCOUNT)?;
    Ok(area)
}

/// Number of entries of an MSR array.
fn msr_count(arg: &RegisterSet) -> Result<usize> {
    let len = arg.len as usize;
    let count = len / Msr::SIZE;
    if len % Msr::SIZE != 0 || count == 0 || count > MAX_MSRS as usize {
        return Err(EINVAL);
    }
    Ok(count)
}

fn read_msr(arg: &RegisterSet, index: usize) -> Result<Msr> {
    let msr: Msr = abi::read(abi::element::<Msr>(arg.addr, index)?)?;
    abi::must_be_zero(&[msr.reserved.into()])?;
    Ok(msr)
}

fn get_msrs(arch: &mut Arch, arg: &RegisterSet) -> Result {
    for index in 0..msr_count(arg)? {
        let mut msr = read_msr(arg, index)?;
        msr.value = arch.msr(msr.index).map_err(abi::errno)?;
        abi::write(abi::element::<Msr>(arg.addr, index)?, msr)?;
    }
    Ok(())
}

/// Sets all or none: what was set before one is refused is put back.
fn set_msrs(arch: &mut Arch, arg: &RegisterSet) -> Result {
    let count = msr_count(arg)?;
    let mut old: KVVec<Msr> = KVVec::with_capacity(count, GFP_KERNEL_ACCOUNT)?;
    let result = (0..count).try_for_each(|index| {
        let msr = read_msr(arg, index)?;
        let value = arch.msr(msr.index).map_err(abi::errno)?;
        arch.set_msr(msr.index, msr.value).map_err(abi::errno)?;
        old.push(Msr { value, ..msr }, GFP_KERNEL_ACCOUNT)?;
        Ok(())
    });
    if result.is_err() {
        for msr in old.iter().rev() {
            // A value that was there is a value that may be there.
            let _ = arch.set_msr(msr.index, msr.value);
        }
    }
    result
}
