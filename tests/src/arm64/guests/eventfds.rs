// SPDX-License-Identifier: MIT OR Apache-2.0
//! Eventfds that the guest signals by a store: in the kernel, which goes by what the CPU tells of the store, or through the
//! client library, for stores of which it tells nothing.

use crate::eventfd::{count, eventfd};
use crate::harness::{self, Case, CaseResult, Stop};
use crate::machine::{Machine, HOLE};
use crate::{code, ensure, ensure_eq, table};
use axvcpu_uapi::addr::GuestPhysAddr;
use axvcpu_uapi::client::{Errno, Error, IoAddress, IoPattern};
use axvcpu_uapi::exit::AccessWidth::{self, Byte, Dword, Qword, Word};
use axvcpu_uapi::exit::{AccessFlags, AxVCpuExitReason as Exit};
use axvcpu_uapi::vcpu::ExitKind;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

/// The cases.
pub(super) fn cases() -> Vec<Case> {
    table! {
        "eventfds/stores-by-width-and-value" => patterns;
        "eventfds/other-stores-are-exits" => undecoded;
        "eventfds/stores-to-read-only-memory-are-exits" => read_only;
        "eventfds/table-replaced-while-the-guest-uses-it" => replaced;
    }
}

const AT: IoAddress = IoAddress::Memory(HOLE);

/// Stores of each width to HOLE, which X1 has; the value is X2. Between them, a call.
fn stores() -> &'static [u8] {
    code!(
        stores,
        "2: strb w2, [x1]",
        "strh w2, [x1]",
        "str w2, [x1]",
        "str x2, [x1]",
        "hvc #0",
        "strb w2, [x1, #1]",
        "hvc #0",
        "b 2b"
    )
}

fn patterns() -> CaseResult {
    let mut m = Machine::new(stores())?;
    m.modify(|general| (general.x[1], general.x[2]) = (HOLE, 0x1_0007))?;
    let event = eventfd()?;
    let is_exit = |m: &mut Machine, at, width: AccessWidth| {
        m.expect(Exit::MmioWrite { addr: GuestPhysAddr::new(at), width, data: 0x1_0007 & width.mask() })
    };
    // Which of the four stores a pattern takes.
    for (pattern, takes) in [
        (IoPattern::any(AT), [true; 4]),
        (IoPattern::of_width(AT, Word), [false, true, false, false]),
        (IoPattern::of_value(AT, Byte, 7), [true, false, false, false]),
        (IoPattern::of_value(AT, Byte, 8), [false; 4]),
        (IoPattern::of_value(AT, Dword, 0x1_0007), [false, false, true, false]),
        (IoPattern::of_value(AT, Qword, 7), [false; 4]),
    ] {
        ensure!(m.vm.attach_io(&event, pattern)?, "{pattern:?} is the kernel's");
        ensure_eq!(m.vm.attach_io(&event, pattern), Err(Error::AttachIo(Errno::EEXIST)), "{pattern:?} again");
        let before = m.vcpu.stats()?.user_exits;
        for (width, taken) in [Byte, Word, Dword, Qword].into_iter().zip(takes) {
            if !taken {
                is_exit(&mut m, HOLE, width)?;
            }
        }
        m.expect_call()?;
        let signals = takes.iter().filter(|taken| **taken).count() as u64;
        ensure_eq!(count(&event)?, signals, "{pattern:?}");
        ensure_eq!(m.vcpu.stats()?.user_exits - before, 5 - signals, "exits that the program saw: {pattern:?}");
        // Another address is another matter.
        is_exit(&mut m, HOLE + 1, Byte)?;
        m.expect_call()?;
        m.vm.detach_io(pattern)?;
    }
    for width in [Byte, Word, Dword, Qword] {
        is_exit(&mut m, HOLE, width)?;
    }
    m.expect_call()?;
    ensure_eq!(count(&event)?, 0, "detached");
    ensure!(m.vcpu.stats()?.exits[ExitKind::Mmio as usize] >= 8, "stores are counted");
    let port = m.vm.attach_io(&event, IoPattern::any(IoAddress::Port(0x80)));
    ensure_eq!(port, Err(Error::AttachIo(Errno::EINVAL)), "there are no ports");
    Ok(())
}

fn undecoded() -> CaseResult {
    let mut m = Machine::new(code!(undecoded, "stp x2, x2, [x1]", "str x2, [x1], #8", "ldr x3, [x1]", "hvc #0"))?;
    m.modify(|general| general.x[1] = HOLE)?;
    let event = eventfd()?;
    m.vm.attach_io(&event, IoPattern::any(AT))?;
    for offset in [0, 0] {
        m.expect(Exit::NestedPageFault { addr: GuestPhysAddr::new(HOLE + offset), access_flags: AccessFlags::WRITE })?;
        ensure_eq!(count(&event)?, 0, "not signalled by the kernel");
        ensure!(m.vm.notify_write(AT, Qword, 0), "the library knows the address");
        ensure_eq!(count(&event)?, 1, "signalled by the library");
        m.modify(|general| general.pc += 4)?;
    }
    // A load is none.
    ensure!(matches!(m.run()?.reason, Exit::MmioRead { .. }), "a load");
    m.vcpu.reply(5);
    m.expect_call()?;
    ensure_eq!((m.vcpu.general().x[3], count(&event)?), (5, 0), "a load");
    Ok(())
}

fn read_only() -> CaseResult {
    let code = code!(read_only, "ldr x3, [x1]", "strb w2, [x1]", "hvc #0");
    let mut m = Machine::new(code)?;
    m.slots.clear();
    let (ram, at) = (std::sync::Arc::clone(&m.ram), GuestPhysAddr::new(crate::machine::RAM));
    m.slots.push(m.space.map_all(at, ram, axvcpu_uapi::client::Permissions::RX)?);
    let address = crate::machine::DATA;
    m.modify(|general| general.x[1] = address)?;
    let event = eventfd()?;
    m.vm.attach_io(&event, IoPattern::any(IoAddress::Memory(address)))?;
    // Memory goes before the eventfd once it is mapped, which the load has done.
    m.expect(Exit::MmioWrite { addr: GuestPhysAddr::new(address), width: Byte, data: 0 })?;
    m.expect_call()?;
    ensure_eq!(count(&event)?, 0, "not signalled");
    Ok(())
}

fn replaced() -> CaseResult {
    // X9 stores; each is either signalled or an exit, however often the table changes.
    let code = code!(replaced, "2: strb w2, [x1]", "add x9, x9, #1", "cmp x9, x10", "b.ne 2b", "hvc #0");
    let mut m = Machine::new(code)?;
    m.modify(|general| (general.x[1], general.x[10]) = (HOLE, 5000))?;
    let event = eventfd()?;
    let (done, vm) = (AtomicBool::new(false), m.vm.clone());
    let (exits, changes) = thread::scope(|scope| -> Result<(u64, u64), Stop> {
        let changer = scope.spawn(|| -> Result<u64, Stop> {
            let mut changes = 0;
            while !done.load(Ordering::SeqCst) {
                vm.attach_io(&event, IoPattern::any(AT))?;
                vm.detach_io(IoPattern::any(AT))?;
                changes += 1;
            }
            Ok(changes)
        });
        let mut exits = 0;
        let result = loop {
            match m.run().map(|exit| exit.reason) {
                Ok(Exit::MmioWrite { .. }) => exits += 1,
                Ok(Exit::Hypercall { .. }) => break Ok(()),
                Ok(Exit::Interrupted) => {}
                Ok(other) => break Err(Stop::Fail(format!("{other:x?}"))),
                Err(stop) => break Err(stop),
            }
        };
        done.store(true, Ordering::SeqCst);
        let changes = harness::joined(changer.join())??;
        result.map(|()| (exits, changes))
    })?;
    ensure_eq!(exits + count(&event)?, 5000, "stores ({changes} changes)");
    ensure!(changes >= 10, "only {changes} changes");
    Ok(())
}
