// SPDX-License-Identifier: MIT OR Apache-2.0
//! Writes of the guest that signal: to ports and addresses, by the kernel where it can tell the write, else by the client library.

use super::{enabling_code, machine};
use crate::eventfd::{count, eventfd};
use crate::guests::x2apic::MSI;
use crate::harness::{self, Case, CaseResult};
use crate::machine::{Machine, Mode, CODE, HOLE};
use crate::{code, ensure, ensure_eq, table};
use axvcpu_uapi::client::{Errno, Error, IoAddress, IoPattern};
use axvcpu_uapi::exit::AccessWidth::{Byte, Dword, Word};
use axvcpu_uapi::exit::{AccessFlags, AxVCpuExitReason};
use axvcpu_uapi::vcpu::ExitKind;
use axvcpu_uapi::x86::RCX;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

pub(super) fn cases() -> Vec<Case> {
    table! {
        "eventfds/port-output-by-width-and-value" => ports [abi];
        "eventfds/stores-to-an-address" => stores [abi];
        "eventfds/a-store-that-has-changed-is-read-again" => changed_store [abi];
        "eventfds/other-instructions-are-exits" => other_instructions [abi];
        "eventfds/widths-and-values-of-stores-by-the-library" => library [abi];
        "eventfds/guest-interrupts-itself" => round_trip [abi];
        "eventfds/table-replaced-while-the-guest-uses-it" => replaced [abi];
    }
}

/// Output to one port: of any width; of a width; of a width and a value. What matches none is an exit.
fn ports() -> CaseResult {
    let code = code!(
        ports,
        64,
        "mov eax, 0x11223344",
        "mov edx, 0x510",
        "out dx, al",
        "out dx, ax",
        "out dx, eax",
        "mov edx, 0x520",
        "out dx, ax",
        "out dx, al",
        "mov edx, 0x530",
        "out dx, ax",
        "inc eax",
        "out dx, ax",
        "inc eax",
        "out dx, ax",
        "hlt",
    );
    let mut m = Machine::new(Mode::Long, code)?;
    let events = [eventfd()?, eventfd()?, eventfd()?, eventfd()?];
    let patterns = [
        IoPattern::any(IoAddress::Port(0x510)),
        IoPattern::of_width(IoAddress::Port(0x520), Word),
        IoPattern::of_value(IoAddress::Port(0x530), Word, 0x3344),
        IoPattern::of_value(IoAddress::Port(0x530), Word, 0x3346),
    ];
    for (event, pattern) in events.iter().zip(patterns) {
        ensure!(m.vm.attach_io(event, pattern)?, "the kernel leaves {pattern:?} to the library");
    }
    m.expect_out(0x520, Byte, 0x44)?;
    m.expect_out(0x530, Word, 0x3345)?;
    m.expect_halt()?;
    for (event, expected) in events.iter().zip([3, 1, 1, 1]) {
        ensure_eq!(count(event)?, expected, "count of {event:?}");
    }
    for pattern in patterns {
        m.vm.detach_io(pattern)?;
        ensure_eq!(m.vm.detach_io(pattern), Err(Error::DetachIo(Errno::ENOENT)), "detaching {pattern:?} again");
    }
    m.modify(|general| general.rip = CODE)?;
    m.expect_out(0x510, Byte, 0x44)?;
    Ok(())
}

/// Every form of MOV to an address with an eventfd is done in the kernel and goes on behind it.
fn stores() -> CaseResult {
    let code = code!(
        stores,
        64,
        "mov ebx, 0xa0010",
        "mov r12d, 0xa0010",
        "mov r13d, 0xa0010",
        "mov ecx, 2",
        "mov [rbx], al",
        "mov [rbx], ax",
        "mov [rbx], eax",
        "mov [rbx], rax",
        "mov byte ptr [rbx], 1",
        "mov word ptr [rbx], 0x1234",
        "mov dword ptr [rbx], 0x12345678",
        "mov qword ptr [rbx], 0x12345678",
        "mov [r12], eax",
        "mov [r13], eax",
        "mov [rbx + 8 * rcx - 16], r9d",
        "mov dword ptr [0xa0010], 7",
        "out 0x80, al",
        "mov [rbx + 4], eax",
        "mov eax, [rbx]",
        "mov [rbx], eax",
        "hlt",
    );
    let mut m = Machine::new(Mode::Long, code)?;
    let event = eventfd()?;
    let pattern = IoPattern::any(IoAddress::Memory(HOLE + 0x10));
    ensure!(m.vm.attach_io(&event, pattern)?, "the kernel leaves an address to the library");
    let before = m.vcpu.stats()?;
    m.expect_mark(0x80)?;
    ensure_eq!(count(&event)?, 12, "stores");
    let after = m.vcpu.stats()?;
    let mmio = ExitKind::Mmio as usize;
    ensure_eq!(after.exits[mmio] - before.exits[mmio], 12, "exits counted as MMIO");
    m.expect_fault(HOLE + 0x14, AccessFlags::WRITE)?;
    m.step_over(3, |_| ());
    m.expect_fault(HOLE + 0x10, AccessFlags::READ)?;
    m.step_over(2, |_| ());
    m.vm.detach_io(pattern)?;
    m.expect_fault(HOLE + 0x10, AccessFlags::WRITE)?;
    ensure_eq!(count(&event)?, 0, "signals by other accesses, and after detaching");
    Ok(())
}

/// The same place holds stores of different lengths, each of them executed twice before it changes.
fn changed_store() -> CaseResult {
    const ROOM: usize = 12;
    let code = code!(
        changed_store,
        64,
        "mov ebx, 0xa0010",
        "2:",
        "xor ecx, ecx",
        ".fill 12, 1, 0x90",
        "out 0x80, al",
        "jmp 2b",
    );
    let mut m = Machine::new(Mode::Long, code)?;
    let event = eventfd()?;
    ensure!(m.vm.attach_io(&event, IoPattern::any(IoAddress::Memory(HOLE + 0x10)))?, "no eventfd in the kernel");
    // What is skipped of the rest by mistake is not counted; what of the store is executed by mistake does not exist (UD2).
    let stores: [&[u8]; 5] = [
        &[0x89, 0x03],
        &[0xc7, 0x03, 0x0f, 0x0b, 0x0f, 0x0b],
        &[0x66, 0x89, 0x03, 0x90],
        &[0x66, 0xc7, 0x83, 0, 0, 0, 0, 0x0f, 0x0b, 0x90],
        &[0x40, 0x88, 0x03, 0x90],
    ];
    for store in stores {
        let mut room = store.to_vec();
        while room.len() < ROOM {
            room.extend([0xff, 0xc1]); // INC ECX
        }
        m.write(CODE + 7, &room)?;
        for _ in 0..2 {
            m.expect_mark(0x80)?;
            let counted = (ROOM - store.len()) / 2;
            ensure_eq!(m.vcpu.general().gpr[RCX], counted as u64, "instructions behind {store:x?}");
        }
        ensure_eq!(count(&event)?, 2, "signals by {store:x?}");
    }
    Ok(())
}

/// Instructions that do more than store are the program's to emulate.
fn other_instructions() -> CaseResult {
    let code = code!(
        other_instructions,
        64,
        "mov ebx, 0xa0000",
        "mov edi, ebx",
        "stosd",
        "pop qword ptr [rbx]",
        "xchg [rbx], eax",
        "hlt",
    );
    let mut m = Machine::new(Mode::Long, code)?;
    let event = eventfd()?;
    m.vm.attach_io(&event, IoPattern::any(IoAddress::Memory(HOLE)))?;
    for length in [1, 2, 2] {
        let exit = m.run()?;
        ensure!(
            matches!(exit.reason, AxVCpuExitReason::NestedPageFault { addr, .. } if addr.as_u64() == HOLE),
            "exit {:x?}",
            exit.reason
        );
        m.step_over(length, |_| ());
    }
    m.expect_halt()?;
    ensure_eq!(count(&event)?, 0, "signals");
    ensure!(m.vm.notify_write(IoAddress::Memory(HOLE), Dword, 0), "the library does not know the address");
    ensure_eq!(count(&event)?, 1, "signals by the library");
    Ok(())
}

/// Where width or value matter the write is an exit, and the library finds the eventfd.
fn library() -> CaseResult {
    let code = code!(library, 64, "mov ebx, 0xa0000", "mov dword ptr [rbx], 7", "out 0x80, al", "hlt");
    let mut m = Machine::new(Mode::Long, code)?;
    let (seven, eight) = (eventfd()?, eventfd()?);
    let at = IoAddress::Memory(HOLE);
    ensure!(!m.vm.attach_io(&seven, IoPattern::of_value(at, Dword, 7))?, "the kernel does not decode values");
    ensure!(!m.vm.attach_io(&eight, IoPattern::of_value(at, Dword, 8))?, "the kernel does not decode values");
    let any = m.vm.attach_io(&eight, IoPattern::any(at));
    ensure_eq!(any, Err(Error::AttachIo(Errno::EEXIST)), "a pattern that overlaps");
    m.expect_fault(HOLE, AccessFlags::WRITE)?;
    ensure!(m.vm.notify_write(at, Dword, 7), "no eventfd found");
    m.step_over(6, |_| ());
    m.expect_mark(0x80)?;
    ensure!(!m.vm.notify_write(at, Word, 7), "an eventfd found for another width");
    ensure_eq!([count(&seven)?, count(&eight)?], [1, 0], "signals");
    m.vm.detach_io(IoPattern::of_value(at, Dword, 7))?;
    ensure!(!m.vm.notify_write(at, Dword, 7), "an eventfd found that was detached");
    Ok(())
}

/// One eventfd both ways: the guest's store interrupts the guest, and no program is involved.
fn round_trip() -> CaseResult {
    let code = enabling_code!(
        round_trip,
        "sti",
        "mov ebx, 0xa0000",
        "mov r8d, 1000",
        "2: mov r9, r10",
        "mov dword ptr [rbx], eax",
        "3: cmp r9, r10",
        "je 3b",
        "dec r8d",
        "jnz 2b",
        "out 0x80, al",
        "hlt",
        ".org 77b + 0x100",
        "inc r10",
        "eoi",
        "iretq",
    );
    let mut m = machine(code)?;
    let event = eventfd()?;
    m.vm.attach_interrupt(&event, MSI, 0x40, None)?;
    m.vm.attach_io(&event, IoPattern::any(IoAddress::Memory(HOLE)))?;
    m.expect_mark(0x80)?;
    ensure_eq!(m.vcpu.general().gpr[10], 1000, "interrupts");
    Ok(())
}

/// Attaching elsewhere does not disturb a guest that uses one.
fn replaced() -> CaseResult {
    let code = code!(
        replaced,
        64,
        "mov ebx, 0xa0000",
        "2: mov ecx, 2000",
        "3: mov [rbx], eax",
        "out 0x85, al",
        "dec ecx",
        "jnz 3b",
        "out 0x80, al",
        "jmp 2b"
    );
    let mut m = Machine::new(Mode::Long, code)?;
    let (stores, outputs) = (eventfd()?, eventfd()?);
    m.vm.attach_io(&stores, IoPattern::any(IoAddress::Memory(HOLE)))?;
    m.vm.attach_io(&outputs, IoPattern::any(IoAddress::Port(0x85)))?;
    let vm = m.vm.clone();
    let (stop, changes) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| -> CaseResult {
        let changer = scope.spawn(|| -> CaseResult {
            let event = eventfd()?;
            while !stop.load(Ordering::Relaxed) {
                for address in [IoAddress::Memory(HOLE - 8), IoAddress::Memory(HOLE + 8), IoAddress::Port(0x84)] {
                    vm.attach_io(&event, IoPattern::any(address))?;
                }
                for address in [IoAddress::Memory(HOLE - 8), IoAddress::Memory(HOLE + 8), IoAddress::Port(0x84)] {
                    vm.detach_io(IoPattern::any(address))?;
                }
                changes.fetch_add(6, Ordering::Relaxed);
            }
            Ok(())
        });
        let mut rounds = 0;
        let result: CaseResult = (|| {
            // Until the two have met.
            while rounds < 5 || changes.load(Ordering::Relaxed) < 60 {
                m.expect_mark(0x80)?;
                rounds += 1;
            }
            Ok(())
        })();
        stop.store(true, Ordering::Relaxed);
        harness::joined(changer.join())??;
        result?;
        ensure_eq!([count(&stores)?, count(&outputs)?], [2000 * rounds; 2], "stores and outputs");
        Ok(())
    })
}
