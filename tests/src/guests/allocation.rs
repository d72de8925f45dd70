// SPDX-License-Identifier: MIT OR Apache-2.0
//! Every call of the interface without memory: the kernel fails its first allocation, then its second, and so on to the
//! last. Each time it must say `ENOMEM`, and the same call must work right after, on the same objects.
//!
//! Linux fails the allocations if it is built for that (Documentation/fault-injection/fault-injection.rst, "fail-nth");
//! [`Failing`] says what must be set. What a failed call has leaked is for kmemleak and the module's own counts to tell.

use crate::harness::{Case, CaseResult, Stop};
use crate::machine::{open_axvcpu, Machine, Mode, DATA};
use crate::{code, ensure, ensure_eq, table};
use axvcpu_uapi::addr::GuestPhysAddr;
use axvcpu_uapi::client::{
    AddressSpace, Apic, Errno, Error, IoAddress, IoPattern, Memory, Permissions, System, Vcpu, Vm,
};
use axvcpu_uapi::exit::{AccessWidth, AxVCpuExitReason};
use nix::sys::eventfd::EventFd;
use std::cell::RefCell;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

pub(super) fn cases() -> Vec<Case> {
    table! {
        "allocation/creating-objects" => creating [abi], in 120;
        "allocation/setting-up-a-vcpu" => setting_up [abi], in 120;
        "allocation/registers" => registers [abi], in 120;
        "allocation/memory-and-its-log" => memory [abi], in 120;
        "allocation/eventfds" => eventfds [abi], in 120;
        "allocation/running" => running [abi], in 120;
    }
}

/// More allocations than any call makes.
const MANY: u32 = 2000;

/// The current thread's allocations, of which one can be made to fail.
struct Failing(File);

impl Failing {
    /// Where the kernel says how often, and of what, allocations may fail. By default those that could wait for memory never do.
    const SETTINGS: [&'static str; 2] = ["failslab", "fail_page_alloc"];

    fn new() -> Result<Self, Stop> {
        for name in Self::SETTINGS {
            let path = format!("/sys/kernel/debug/{name}/ignore-gfp-wait");
            match std::fs::read_to_string(&path) {
                Ok(value) if value.trim() == "N" => {}
                Ok(_) => return Err(Stop::Skip(format!("allocations do not fail: {path} is not N"))),
                Err(_) => return Err(Stop::Skip("this kernel cannot make allocations fail".into())),
            }
        }
        Ok(Self(OpenOptions::new().read(true).write(true).open("/proc/thread-self/fail-nth")?))
    }

    /// Calls `call` with the `nth` allocation failing. Returns whether there was one.
    fn at<T>(&mut self, nth: u32, call: impl FnOnce() -> T) -> Result<(T, bool), Stop> {
        self.set(nth)?;
        let result = call();
        let mut left = [0; 16];
        let length = self.0.read_at(&mut left, 0)?;
        self.set(0)?;
        Ok((result, left[..length].trim_ascii() == b"0"))
    }

    fn set(&mut self, nth: u32) -> CaseResult {
        Ok(write!(self.0, "{nth}")?)
    }
}

/// Has each allocation of `call` fail once. `fresh` makes what it is called on, anew each time, and a call that has failed is
/// repeated on that.
fn each<C, T>(
    what: &str,
    mut fresh: impl FnMut() -> Result<C, Stop>,
    mut call: impl FnMut(&mut C) -> Result<T, Error>,
) -> CaseResult {
    let mut failing = Failing::new()?;
    let mut failures = 0;
    for nth in 1..MANY {
        let mut context = fresh()?;
        let (result, failed) = failing.at(nth, || call(&mut context))?;
        match result {
            Ok(_) if !failed => {
                println!("# {what}: {} allocations, {failures} of which it cannot do without", nth - 1);
                return Ok(());
            }
            // The kernel had another way, or what failed was this program's.
            Ok(_) => {}
            Err(error) => {
                ensure!(failed, "{what}: {error} without a failure, after {failures} failures");
                ensure_eq!(error.errno(), Some(Errno::ENOMEM), "{what}: error when allocation {nth} fails");
                failures += 1;
                let again = call(&mut context).map(drop);
                ensure!(again.is_ok(), "{what}, again after allocation {nth} has failed: {again:?}");
            }
        }
    }
    Err(Stop::Fail(format!("{what}: more than {MANY} allocations")))
}

fn space() -> Result<(System, Vm, AddressSpace), Stop> {
    let system = open_axvcpu()?;
    let vm = system.create_vm()?;
    let space = vm.create_address_space()?;
    Ok((system, vm, space))
}

fn creating() -> CaseResult {
    each("SUPPORTED_CPUID", open_axvcpu, |system| system.supported_cpuid())?;
    each("CREATE_VM", open_axvcpu, |system| system.create_vm())?;
    let vm = || Ok(open_axvcpu()?.create_vm()?);
    each("CREATE_ADDRESS_SPACE", vm, |vm| vm.create_address_space())?;
    // Another number each time: it is used up when only the run page could not be mapped.
    let numbered = || Ok((vm()?, 0));
    each("CREATE_VCPU", numbered, |(vm, id)| {
        *id += 1;
        vm.create_vcpu(*id)
    })?;
    let vm = vm()?;
    each("VM_STATS", || Ok(()), |()| vm.stats())
}

fn vcpu() -> Result<(AddressSpace, Vcpu), Stop> {
    let (_, vm, space) = space()?;
    let vcpu = vm.create_vcpu(0)?;
    Ok((space, vcpu))
}

fn setting_up() -> CaseResult {
    let table = open_axvcpu()?.supported_cpuid()?;
    each("SET_ENTRY", vcpu, |(_, vcpu)| vcpu.set_entry(GuestPhysAddr::new(0)))?;
    each("SET_EPT_ROOT", vcpu, |(space, vcpu)| vcpu.set_ept_root(space))?;
    for apic in [Apic::None, Apic::InKernel] {
        let ready = || {
            let (space, mut vcpu) = vcpu()?;
            vcpu.set_entry(GuestPhysAddr::new(0))?;
            vcpu.set_ept_root(&space)?;
            Ok(vcpu)
        };
        each("SETUP", ready, |vcpu| vcpu.setup(apic, &table))?;
    }
    Ok(())
}

fn registers() -> CaseResult {
    let m = Machine::new(Mode::Long, code!(nothing, 64, "hlt"))?;
    let vcpu = RefCell::new(m.vcpu);
    each("GET_REGS", || Ok(()), |()| vcpu.borrow().get::<axvcpu_uapi::x86::Segments>())?;
    let segments: axvcpu_uapi::x86::Segments = vcpu.borrow().get()?;
    each("SET_REGS", || Ok(()), |()| vcpu.borrow_mut().set(&segments))?;
    each("GET_MSRS", || Ok(()), |()| vcpu.borrow().msrs(&[0x10, 0x277]))?;
    let msrs = vcpu.borrow().msrs(&[0x277])?;
    each("SET_MSRS", || Ok(()), |()| vcpu.borrow_mut().set_msrs(&msrs))?;
    each("GET_XSAVE", || Ok(()), |()| vcpu.borrow().xsave())?;
    let area = vcpu.borrow().xsave()?;
    each("SET_XSAVE", || Ok(()), |()| vcpu.borrow_mut().set_xsave(&area))
}

fn memory() -> CaseResult {
    const SIZE: usize = 1 << 20;
    let memory = Arc::new(Memory::anonymous(SIZE)?);
    let at = GuestPhysAddr::new(0);
    let map = |space: &AddressSpace| space.map(at, Arc::clone(&memory), 0, SIZE, Permissions::RWX);
    each("MAP", space, |(.., space)| map(space))?;
    let mapped = || {
        let (.., space) = space()?;
        let slot = map(&space)?;
        Ok((space, slot))
    };
    each("PROTECT", mapped, |(_, slot)| slot.protect(Permissions::R))?;
    each("START_DIRTY_LOG", mapped, |(space, _)| space.start_dirty_log(at, 1 << 40))?;
    let logged = || {
        let (space, slot) = mapped()?;
        space.start_dirty_log(at, SIZE as u64)?;
        Ok((space, slot))
    };
    each("READ_DIRTY_LOG", logged, |(space, _)| space.read_dirty_log(at, &mut [0; 4]))?;
    each("STOP_DIRTY_LOG", logged, |(space, _)| space.stop_dirty_log())
}

fn eventfds() -> CaseResult {
    let fresh = || Ok((open_axvcpu()?.create_vm()?, EventFd::new()?, EventFd::new()?));
    each("IRQFD", fresh, |(vm, event, _)| vm.attach_interrupt(event, 0xfee0_0000, 0x40, None))?;
    each("IRQFD with resample", fresh, |(vm, event, resample)| {
        vm.attach_interrupt(event, 0xfee0_0000, 0xc040, Some(resample.as_fd()))
    })?;
    let pattern = IoPattern::of_width(IoAddress::Port(0x80), AccessWidth::Byte);
    each("IOEVENTFD", fresh, |(vm, event, _)| vm.attach_io(event, pattern))
}

/// A guest whose memory is not mapped yet: a run faults it in, by a page of tables or two each time.
fn running() -> CaseResult {
    let code = code!(
        running,
        64,
        "mov byte ptr [0x20000], 1",
        "mov byte ptr [0x200000], 1",
        "mov byte ptr [0x3ff000], 1",
        "out 0x80, al",
        "hlt"
    );
    let fresh = || {
        let m = Machine::new(Mode::Long, code)?;
        m.space.start_dirty_log(GuestPhysAddr::new(0), 4 << 20)?;
        Ok(m)
    };
    each("RUN", fresh, |m| {
        let exit = m.vcpu.run()?;
        assert!(matches!(exit.reason, AxVCpuExitReason::IoWrite { port: 0x80, .. }), "{exit:x?}");
        assert_eq!(m.ram.read_u64(DATA as usize)? & 0xff, 1);
        Ok(())
    })
}
