// SPDX-License-Identifier: MIT OR Apache-2.0
//! Guest memory is ordinary memory of the process: mapped and unmapped while the guest runs, shared, discarded,
//! protected, copied on write.

use crate::harness::{self, Case, CaseResult, Stop};
use crate::machine::{Machine, Mode, CODE, DATA, HIGH, HOLE, HOLE_END};
use crate::{code, ensure, ensure_eq, table};
use axvcpu_uapi::addr::GuestPhysAddr;
use axvcpu_uapi::client::{Memory, Permissions};
use axvcpu_uapi::exit::AxVCpuExitReason::{IoWrite, NestedPageFault};
use axvcpu_uapi::exit::{AccessFlags, AxVCpuExitReason};
use axvcpu_uapi::system::FEATURE_HUGE_2M;
use axvcpu_uapi::x86::General;
use nix::sys::mman::{mprotect, ProtFlags};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

pub(super) fn cases() -> Vec<Case> {
    table! {
        "memory/slot-removed-while-running" => removed [abi];
        "memory/slot-added-while-running" => added [abi];
        "memory/discarded-while-running" => discarded;
        "memory/discarded-many-times-while-running" => discard_storm [abi], in 60;
        "memory/read-only-slot" => read_only [abi];
        "memory/no-execute-slot" => no_execute [abi];
        "memory/protected-while-running" => protected [abi];
        "memory/part-of-a-slot-removed" => part [abi];
        "memory/shared-file-in-two-places" => shared [abi];
        "memory/private-copy-after-fork" => fork;
        "memory/host-protection-is-obeyed" => host_protection [abi];
        "memory/every-page-once" => every_page [abi];
        "memory/large-pages" => large_pages [abi];
        "memory/slot-outlives-its-handles" => lifetimes [abi];
    }
}

/// Reads [HOLE_END] for ever.
fn reader() -> &'static [u8] {
    code!(reader, 64, "mov ebx, 0xc0000", "out 0x80, al", "2: mov rax, [rbx]", "inc r8", "jmp 2b")
}

fn removed() -> CaseResult {
    let mut m = Machine::new(Mode::Long, reader())?;
    m.write_u64(HOLE_END, 0x77)?;
    m.expect_mark(0x80)?;
    let high = m.slots.pop().ok_or(Stop::Fail("no slot".into()))?;
    let remover = thread::spawn(move || {
        thread::sleep(Duration::from_millis(50));
        high.unmap().map(drop)
    });
    m.expect_fault(HOLE_END, AccessFlags::READ)?;
    harness::joined(remover.join())??;
    let General { gpr, .. } = m.vcpu.general();
    ensure_eq!(gpr[0], 0x77, "what the guest read before");
    ensure!(gpr[8] > 0, "the guest did not read before");
    Ok(())
}

fn added() -> CaseResult {
    let code = code!(added, 64, "mov ebx, 0xa0000", "2: mov al, [rbx]", "out 0x80, al", "hlt");
    let mut m = Machine::new(Mode::Long, code)?;
    let memory = Arc::new(Memory::anonymous(0x1000)?);
    memory.write(0, &[0x42])?;
    m.expect_fault(HOLE, AccessFlags::READ)?;
    let slot = m.space.map_all(GuestPhysAddr::new(HOLE), Arc::clone(&memory), Permissions::RWX)?;
    m.expect_mark(0x80).and_then(|(value, _)| {
        ensure_eq!(value, 0x42, "what the guest read");
        Ok(())
    })?;
    drop(slot);
    ensure_eq!(Arc::strong_count(&memory), 1, "owners of the memory after the slot is gone");
    m.modify(|general| general.rip = CODE)?;
    m.expect_fault(HOLE, AccessFlags::READ)?;
    Ok(())
}

/// The guest waits for a word to become zero, which happens when its page is discarded.
fn discarded() -> CaseResult {
    let code = code!(
        discarded,
        64,
        "mov ebx, 0x100000",
        "out 0x80, al",
        "2: cmp qword ptr [rbx], 0",
        "jne 2b",
        "out 0x81, al",
        "hlt"
    );
    let mut m = Machine::new(Mode::Long, code)?;
    m.write_u64(HIGH, 1)?;
    m.expect_mark(0x80)?;
    let ram = Arc::clone(&m.ram);
    let discarder = thread::spawn(move || {
        thread::sleep(Duration::from_millis(50));
        ram.discard(HIGH as usize, 0x1000)
    });
    m.expect_mark(0x81)?;
    harness::joined(discarder.join())??;
    Ok(())
}

/// A guest that writes and reads back 64 pages while another thread discards them: it may read its own value or zero,
/// never anything else.
fn discard_storm() -> CaseResult {
    let code = code!(
        discard_storm,
        64,
        "mov ebx, 0x100000",
        "mov ecx, 0x40",
        "2: mov rax, [rbx]",
        "test rax, rax",
        "jz 3f",
        "cmp rax, rbx",
        "jne 4f",
        "3: mov [rbx], rbx",
        "add rbx, 0x1000",
        "dec ecx",
        "jnz 2b",
        "out 0x80, al",
        "mov ebx, 0x100000",
        "mov ecx, 0x40",
        "jmp 2b",
        "4: out 0x81, al",
        "hlt",
    );
    let mut m = Machine::new(Mode::Long, code)?;
    let ram = Arc::clone(&m.ram);
    let stop = AtomicBool::new(false);
    thread::scope(|scope| -> CaseResult {
        let discarder = scope.spawn(|| -> CaseResult {
            let mut page = 0;
            while !stop.load(Ordering::Relaxed) {
                ram.discard(HIGH as usize + 0x1000 * (page % 64), 0x1000 * (1 + page % 3))?;
                page += 7;
            }
            Ok(())
        });
        let result = (|| {
            let mut round = 0;
            // Until the two have met.
            while round < 20 || m.vm.stats()?.invalidations == 0 {
                round += 1;
                m.expect_mark(0x80).map_err(|stop| stop.context(format_args!("round {round}")))?;
            }
            Ok(())
        })();
        stop.store(true, Ordering::Relaxed);
        harness::joined(discarder.join())??;
        result
    })?;
    Ok(())
}

fn read_only() -> CaseResult {
    let code = code!(
        read_only,
        64,
        "mov ebx, 0xa0000",
        "mov eax, [rbx]",
        "mov dword ptr [rbx], 0x5a5a5a5a",
        "mov ecx, [rbx]",
        "hlt"
    );
    let mut m = Machine::new(Mode::Long, code)?;
    let memory = Arc::new(Memory::anonymous(0x1000)?);
    memory.write_u64(0, 0x1234)?;
    let slot = m.space.map_all(GuestPhysAddr::new(HOLE), Arc::clone(&memory), Permissions::R)?;
    m.expect_fault(HOLE, AccessFlags::WRITE.union(AccessFlags::PRESENT))?;
    ensure_eq!(m.vcpu.general().gpr[0], 0x1234, "what the guest read");
    ensure_eq!(memory.read_u64(0)?, 0x1234, "memory after the refused write");
    slot.protect(Permissions::RW)?;
    m.expect_halt()?;
    ensure_eq!(m.vcpu.general().gpr[1], 0x5a5a_5a5a, "what the guest read after its write");
    Ok(())
}

fn no_execute() -> CaseResult {
    let code = code!(no_execute, 64, "mov ebx, 0xa0000", "mov al, [rbx]", "jmp rbx");
    let mut m = Machine::new(Mode::Long, code)?;
    let memory = Arc::new(Memory::anonymous(0x1000)?);
    memory.write(0, code!(target, 64, "out 0x80, al", "hlt"))?;
    let slot = m.space.map_all(GuestPhysAddr::new(HOLE), memory, Permissions::RW)?;
    m.expect_fault(HOLE, AccessFlags::EXECUTE.union(AccessFlags::PRESENT))?;
    slot.protect(Permissions::RX)?;
    m.expect_mark(0x80)?;
    m.expect_halt()
}

/// Taking the right to write away reaches a guest that is writing just then.
fn protected() -> CaseResult {
    let code = code!(protected, 64, "mov ebx, 0xc0000", "out 0x80, al", "2: inc qword ptr [rbx]", "jmp 2b");
    let mut m = Machine::new(Mode::Long, code)?;
    m.expect_mark(0x80)?;
    let high = m.slots.pop().ok_or(Stop::Fail("no slot".into()))?;
    let ram = Arc::clone(&m.ram);
    let protector = thread::spawn(move || -> Result<_, Stop> {
        thread::sleep(Duration::from_millis(50));
        high.protect(Permissions::RX)?;
        let count = ram.read_u64(HOLE_END as usize)?;
        thread::sleep(Duration::from_millis(20));
        Ok((high, count, ram.read_u64(HOLE_END as usize)?))
    });
    // INC faults as a write to a page that is not mapped any more, or, on a CPU that reads first (QEMU's), as one to a page
    // that the read has brought back read-only.
    let exit = m.run()?;
    ensure!(
        matches!(exit.reason, AxVCpuExitReason::NestedPageFault { addr, access_flags }
            if addr.as_u64() == HOLE_END && access_flags.contains(AccessFlags::WRITE)),
        "exit: {:x?}",
        exit.reason
    );
    let (_high, count, later) = harness::joined(protector.join())??;
    ensure!(count > 0, "the guest did not write before");
    ensure_eq!(later, count, "the word after the right to write was gone");
    Ok(())
}

/// Removing a page in the middle leaves the pages around it.
fn part() -> CaseResult {
    let code = code!(part, 64, "mov al, [rbx]", "mov al, [rcx]", "mov al, [rdx]", "hlt");
    let mut m = Machine::new(Mode::Long, code)?;
    let memory = Arc::new(Memory::anonymous(0x3000)?);
    let slot = m.space.map_all(GuestPhysAddr::new(HOLE), memory, Permissions::RWX)?;
    m.modify(|general| (general.gpr[3], general.gpr[1], general.gpr[2]) = (HOLE, HOLE + 0x2000, HOLE + 0x1000))?;
    let (first, rest) = slot.split(0x1000)?;
    let (middle, last) = rest.split(0x1000)?;
    drop(middle);
    m.expect_fault(HOLE + 0x1000, AccessFlags::READ)?;
    m.step_over(2, |_| ());
    m.expect_halt()?;
    drop((first, last));
    Ok(())
}

/// One memory at two guest addresses, and in two mappings of the process.
fn shared() -> CaseResult {
    let code = code!(
        shared,
        64,
        "mov ebx, 0xa0000",
        "mov qword ptr [rbx], 0x1234",
        "mov rax, [rbx + 0x4000]",
        "out 0x80, al",
        "mov rcx, [rbx]",
        "hlt"
    );
    let mut m = Machine::new(Mode::Long, code)?;
    let memory = Arc::new(Memory::memfd(c"axvcpu-test", 0x2000)?);
    let at = |offset| GuestPhysAddr::new(HOLE + offset);
    let slots = [
        m.space.map_all(at(0), Arc::clone(&memory), Permissions::RWX)?,
        m.space.map_all(at(0x4000), Arc::clone(&memory), Permissions::RWX)?,
    ];
    m.expect_mark(0x80)?;
    ensure_eq!(m.vcpu.general().gpr[0], 0x1234, "the word through the second mapping");
    ensure_eq!(memory.read_u64(0)?, 0x1234, "the word in the program");
    // Through the file, as another process would write it.
    let file = memory.file().ok_or(Stop::Fail("no file".into()))?;
    nix::sys::uio::pwrite(file, &0x5678u64.to_le_bytes(), 0)?;
    m.expect_halt()?;
    ensure_eq!(m.vcpu.general().gpr[1], 0x5678, "the word that came through the file");
    drop(slots);
    Ok(())
}

/// After fork, memory is copied when it is written. The guest's writes must land in this process's copy.
fn fork() -> CaseResult {
    let code = code!(
        fork,
        64,
        "mov ebx, 0x100000",
        "mov qword ptr [rbx], 1",
        "out 0x80, al",
        "mov qword ptr [rbx], 2",
        "out 0x80, al",
        "mov rax, [rbx]",
        "hlt",
    );
    let mut m = Machine::new(Mode::Long, code)?;
    m.expect_mark(0x80)?;
    // SAFETY: the child calls async-signal-safe functions only, although this process has threads.
    let child = match unsafe { nix::unistd::fork() }? {
        nix::unistd::ForkResult::Child => loop {
            // SAFETY: `pause` has no arguments; the parent ends the child.
            unsafe { nix::libc::pause() };
        },
        nix::unistd::ForkResult::Parent { child } => child,
    };
    let result = (|| {
        m.expect_mark(0x80)?;
        ensure_eq!(m.read_u64(HIGH)?, 2, "the word in the program after the guest wrote it");
        m.write_u64(HIGH, 3)?;
        m.expect_halt()?;
        ensure_eq!(m.vcpu.general().gpr[0], 3, "the word in the guest after the program wrote it");
        Ok(())
    })();
    nix::sys::signal::kill(child, nix::sys::signal::Signal::SIGKILL)?;
    nix::sys::wait::waitpid(child, None)?;
    result
}

/// Where the process itself may not write, the guest may not either; the run fails, and goes on when the memory is
/// writable again.
fn host_protection() -> CaseResult {
    let code =
        code!(host_protection, 64, "mov ebx, 0xa0000", "mov al, [rbx]", "mov byte ptr [rbx], 1", "out 0x80, al", "hlt");
    let mut m = Machine::new(Mode::Long, code)?;
    let memory = Arc::new(Memory::anonymous(0x1000)?);
    let start = axvcpu_uapi::client::Backing::start(&*memory).cast();
    let slot = m.space.map_all(GuestPhysAddr::new(HOLE), Arc::clone(&memory), Permissions::RWX)?;
    // SAFETY: the page belongs to `memory`, which the code below only reads until it is writable again.
    unsafe { mprotect(start, 0x1000, ProtFlags::PROT_READ) }?;
    let failed = m.run();
    // SAFETY: as above; this gives back what the memory had.
    unsafe { mprotect(start, 0x1000, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE) }?;
    match failed {
        Err(Stop::Fail(why)) if why.contains("EFAULT") => {}
        other => return Err(Stop::Fail(format!("a write to read-only host memory gave {other:x?}"))),
    }
    m.expect_mark(0x80)?;
    ensure_eq!(memory.read_u64(0)?, 1, "the byte that the guest wrote");
    drop(slot);
    Ok(())
}

/// The guest writes every page's number into the page, over 16 MiB, and the program finds it there.
fn every_page() -> CaseResult {
    const SIZE: usize = 16 << 20;
    let code = code!(
        every_page,
        64,
        "mov ebx, 0x1000000",
        "2: mov [rbx + 8], rbx",
        "add rbx, 0x1000",
        "cmp rbx, 0x2000000",
        "jne 2b",
        "out 0x80, al",
        "hlt",
    );
    let mut m = Machine::new(Mode::Long, code)?;
    let memory = Arc::new(Memory::anonymous(SIZE)?);
    let slot = m.space.map_all(GuestPhysAddr::new(0x100_0000), Arc::clone(&memory), Permissions::RWX)?;
    m.expect_mark(0x80)?;
    for page in (0..SIZE).step_by(0x1000) {
        ensure_eq!(memory.read_u64(page + 8)?, 0x100_0000 + page as u64, "word in page {page:#x}");
    }
    let before = m.vm.stats()?;
    ensure!(before.pages_4k * 0x1000 + before.pages_2m * 0x20_0000 >= SIZE as u64, "pages mapped: {before:?}");
    drop(slot);
    let after = m.vm.stats()?;
    ensure!(after.pages_4k + 512 * after.pages_2m < 512, "pages mapped after the slot is gone: {after:?}");
    Ok(())
}

/// Memory from the reserve of huge pages, or transparent ones, is mapped by large leaves, which split when a page goes
/// away.
fn large_pages() -> CaseResult {
    const LARGE: usize = 2 << 20;
    let code = code!(
        large_pages,
        64,
        "mov ebx, 0x1000000",
        "mov qword ptr [rbx], 1",
        "out 0x80, al",
        "mov rax, [rbx + 0x1ff000]",
        "out 0x80, al",
        "hlt",
    );
    let mut m = Machine::new(Mode::Long, code)?;
    if m.system.info()?.features & FEATURE_HUGE_2M == 0 {
        return Err(Stop::Skip("the module does not map 2 MiB leaves here".into()));
    }
    let memory = Arc::new(Memory::anonymous(2 * LARGE)?);
    if memory.prefer_huge_pages().is_err() {
        return Err(Stop::Skip("the host has no transparent huge pages".into()));
    }
    let start = axvcpu_uapi::client::Backing::start(&*memory).as_ptr() as usize;
    let aligned = start.next_multiple_of(LARGE) - start;
    memory.write_u64(aligned, 0)?;
    let slot = m.space.map(GuestPhysAddr::new(0x100_0000), Arc::clone(&memory), aligned, LARGE, Permissions::RWX)?;
    m.expect_mark(0x80)?;
    if m.vm.stats()?.pages_2m == 0 {
        return Err(Stop::Skip("the host gave no huge page".into()));
    }
    memory.discard(aligned + 0x5000, 0x1000)?;
    memory.write_u64(aligned + 0x1f_f000, 0x99)?;
    m.expect_mark(0x80)?;
    ensure_eq!(m.vcpu.general().gpr[0], 0x99, "a word in the split page");
    ensure_eq!(memory.read_u64(aligned)?, 1, "the word that the guest wrote before");
    drop(slot);
    Ok(())
}

/// The vCPU keeps the address space and its regions although every other handle is gone.
fn lifetimes() -> CaseResult {
    let code = code!(lifetimes, 64, "mov qword ptr [0x20000], 7", "out 0x80, al", "mov rax, [0xa0000]", "hlt");
    let m = Machine::new(Mode::Long, code)?;
    let Machine { vm, space, ram, slots, mut vcpu, .. } = m;
    drop((vm, space));
    let run = |vcpu: &mut crate::hypervisor::Vcpu| -> Result<_, Stop> {
        harness::check_time()?;
        Ok(vcpu.run()?.reason)
    };
    let reason = run(&mut vcpu)?;
    ensure!(matches!(reason, IoWrite { port: 0x80, .. }), "exit: {reason:?}");
    ensure_eq!(ram.read_u64(DATA as usize)?, 7, "the word that the guest wrote");
    drop(slots);
    ensure_eq!(Arc::strong_count(&ram), 1, "owners of the memory after the slots are gone");
    let reason = run(&mut vcpu)?;
    ensure!(
        matches!(reason, NestedPageFault { access_flags, .. } if !access_flags.contains(AccessFlags::PRESENT)),
        "exit without memory: {reason:?}"
    );
    Ok(())
}
