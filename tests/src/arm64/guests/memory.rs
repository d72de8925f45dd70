// SPDX-License-Identifier: MIT OR Apache-2.0
//! Guest memory: stage 2, filled on demand and emptied by the host, and the guest's own tables on top of it.

use super::smp;
use crate::harness::{self, Case, CaseResult, Stop};
use crate::machine::{Machine, CODE, DATA, RAM, RAM_SIZE, TABLES, VECTORS};
use crate::{code, ensure, ensure_eq, table};
use axvcpu_uapi::addr::GuestPhysAddr;
use axvcpu_uapi::arm64::{General, System};
use axvcpu_uapi::client::Apic;
use axvcpu_uapi::exit::{AccessFlags, AccessWidth, AxVCpuExitReason as Exit};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// The cases.
pub(super) fn cases() -> Vec<Case> {
    table! {
        "memory/on-demand" => on_demand;
        "memory/given-back-and-zero-again" => given_back;
        "memory/gone-while-mapped" => gone;
        "memory/huge-pages" => huge_pages;
        "memory/new-code-at-the-same-place" => new_code;
        "memory/guest-tables" => guest_tables;
        "memory/guest-tables-in-no-memory" => walk_of_no_memory;
        "memory/guest-tables-change-behind-a-fault" => tables_change, in 60;
    }
}

fn on_demand() -> CaseResult {
    // Adds 1 to the first word of each of 256 pages.
    let code = code!(
        on_demand,
        "movz x1, #0x4010, lsl #16",
        "mov x2, #256",
        "2: ldr x3, [x1]",
        "add x3, x3, #1",
        "str x3, [x1]",
        "add x1, x1, #0x1000",
        "subs x2, x2, #1",
        "b.ne 2b",
        "hvc #0"
    );
    let mut machine = Machine::new(code)?;
    for page in 0..256 {
        machine.write_u64(DATA + 0x1000 * page, page * page)?;
    }
    machine.expect_call()?;
    for page in 0..256 {
        ensure_eq!(machine.read_u64(DATA + 0x1000 * page)?, page * page + 1, "page {page}");
    }
    ensure!(machine.vm.stats()?.pages_4k + 512 * machine.vm.stats()?.pages_2m >= 256, "mapped pages");
    Ok(())
}

/// Reads the word at DATA, again and again.
fn reader() -> &'static [u8] {
    code!(reader, "movz x1, #0x4010, lsl #16", "2: ldr x0, [x1]", "hvc #0", "b 2b")
}

fn given_back() -> CaseResult {
    let mut machine = Machine::new(reader())?;
    machine.write_u64(DATA, 0x1234)?;
    ensure_eq!(machine.expect_call()?[0], 0x1234, "what the host wrote");
    machine.ram.discard((DATA - RAM) as usize, 0x1000)?;
    ensure_eq!(machine.expect_call()?[0], 0, "after MADV_DONTNEED");
    machine.write_u64(DATA, 0x5678)?;
    ensure_eq!(machine.expect_call()?[0], 0x5678, "after a new write");
    Ok(())
}

fn gone() -> CaseResult {
    let mut machine = Machine::new(reader())?;
    machine.expect_call()?;
    let (low, high) = machine.slots.remove(0).split((DATA - RAM) as usize)?;
    machine.slots.push(low);
    drop(high);
    let addr = GuestPhysAddr::new(DATA);
    let (width, reg_width) = (AccessWidth::Qword, AccessWidth::Qword);
    machine.expect(Exit::MmioRead { addr, width, reg: 0, reg_width, signed_ext: false })
}

fn huge_pages() -> CaseResult {
    let mut machine = Machine::new(reader())?;
    machine.ram.prefer_huge_pages()?;
    // All of it, so that the host takes huge pages where it can.
    for page in 0..1024 {
        machine.write_u64(RAM + 0x20_0000 + 0x800 * page, page)?;
    }
    machine.modify(|general| general.x[1] = RAM + 0x20_0800)?;
    machine.modify(|general| general.pc = CODE + 4)?;
    ensure_eq!(machine.expect_call()?[0], 1, "a word");
    // Out of the middle.
    machine.ram.discard(0x20_0000, 0x1000)?;
    ensure_eq!(machine.expect_call()?[0], 0, "after MADV_DONTNEED");
    Ok(())
}

fn new_code() -> CaseResult {
    let mut machine = Machine::new(code!(first_code, "mov x0, #1", "hvc #0"))?;
    ensure_eq!(machine.expect_call()?[0], 1, "the first code");
    // The host writes other code, at the same place of a new page: the old translations and instructions are gone.
    machine.ram.discard((CODE - RAM) as usize, 0x1000)?;
    machine.write(CODE, code!(second_code, "mov x0, #2", "hvc #0"))?;
    machine.modify(|general| general.pc = CODE)?;
    ensure_eq!(machine.expect_call()?[0], 2, "the second code");
    Ok(())
}

/// Code that switches EL1's MMU on with TTBR0_EL1 in X1 and TCR_EL1 in X2, and reads at X3.
fn with_tables() -> &'static [u8] {
    code!(
        with_tables,
        "msr ttbr0_el1, x1",
        "msr tcr_el1, x2",
        "mov x4, #0xff",
        "msr mair_el1, x4",
        "isb",
        "mrs x4, sctlr_el1",
        "orr x4, x4, #1",
        "orr x4, x4, #4",
        "orr x4, x4, #0x1000",
        "msr sctlr_el1, x4",
        "isb",
        "ldr x0, [x3]",
        "hvc #0"
    )
}

/// TCR_EL1: 39-bit addresses (T0SZ 25), 4 KiB granule, write-back walks, inner shareable, no TTBR1 (EPD1), 40-bit output.
const TCR: u64 = 25 | 1 << 8 | 1 << 10 | 3 << 12 | 1 << 23 | 2 << 32;

fn guest_tables() -> CaseResult {
    let mut machine = Machine::new(with_tables())?;
    // Level 1: 1 GiB blocks, identical, and behind them one table whose first 2 MiB are the RAM.
    machine.write_u64(TABLES + 8, RAM | 0x701)?;
    machine.write_u64(TABLES + 16, (TABLES + 0x1000) | 3)?;
    machine.write_u64(TABLES + 0x1000, RAM | 0x701)?;
    machine.write_u64(DATA, 0xabcd)?;
    machine.modify(|general| {
        general.x[1] = TABLES;
        general.x[2] = TCR;
        general.x[3] = 0x8010_0000;
    })?;
    ensure_eq!(machine.expect_call()?[0], 0xabcd, "through the guest's tables");
    ensure_eq!(machine.registers()?.sctlr_el1 & 0x1005, 0x1005, "MMU and caches are on");
    Ok(())
}

fn walk_of_no_memory() -> CaseResult {
    let mut machine = Machine::new(with_tables())?;
    machine.write_u64(TABLES + 8, RAM | 0x701)?;
    machine.write_u64(TABLES + 16, 0x0800_0000 | 3)?;
    machine.modify(|general| {
        general.x[1] = TABLES;
        general.x[2] = TCR;
        general.x[3] = 0x8020_0000;
    })?;
    let access_flags = AccessFlags::READ.union(AccessFlags::PAGE_WALK);
    machine.expect(Exit::NestedPageFault { addr: GuestPhysAddr::new(0x0800_0000), access_flags })
}

/// Two vCPUs. vCPU 0, whose MMU is on, stores a count at X3 again and again; vCPU 1, whose MMU is off, takes the entry at X1 away
/// and makes it X2 again, with what the architecture wants around it, each for a while. Both do so until the word at X5 is no
/// more 0, and then tell how often.
fn storing_while_tables_change() -> &'static [u8] {
    code!(
        storing_while_tables_change,
        "mov x0, #0",
        "cbnz x19, 3f",
        "2: add x0, x0, #1",
        "str x0, [x3]",
        "ldr x6, [x5]",
        "cbz x6, 2b",
        "hvc #0",
        "3: add x0, x0, #1",
        "str xzr, [x1]",
        "dc civac, x1",
        "dsb ish",
        "tlbi vmalle1is",
        "dsb ish",
        "mov x7, #300",
        "4: subs x7, x7, #1",
        "b.ne 4b",
        "str x2, [x1]",
        "dc civac, x1",
        "dsb ish",
        "mov x7, #300",
        "4: subs x7, x7, #1",
        "b.ne 4b",
        "ldr x6, [x5]",
        "cbz x6, 3b",
        "hvc #0"
    )
}

/// A permission fault of stage 2 tells no guest physical address: the guest's own tables are asked, which another vCPU may have
/// changed since. The dirty log makes the faults.
fn tables_change() -> CaseResult {
    const ENTRY: u64 = RAM | 0x701;
    const STOP: u64 = DATA + 0x1000;
    const FAULTS: u64 = 100;
    const ENOUGH: u64 = 10;
    const PATIENCE: Duration = Duration::from_secs(10);
    let mut machine = Machine::new(storing_while_tables_change())?;
    machine.write_u64(TABLES + 8, ENTRY)?;
    machine.write_u64(TABLES + 16, (TABLES + 0x1000) | 3)?;
    machine.write_u64(TABLES + 0x1000, ENTRY)?;
    // What finds no entry tries again: ERET, as the synchronous vector.
    machine.write(VECTORS + 0x200, &0xd69f_03e0_u32.to_le_bytes())?;
    let mut system: System = machine.vcpu.get()?;
    (system.ttbr0_el1, system.tcr_el1, system.mair_el1) = (TABLES, TCR, 0xff);
    system.sctlr_el1 |= 0x1005;
    machine.vcpu.set(&system)?;
    machine.modify(|general| (general.x[3], general.x[5]) = (0x8010_0000, STOP))?;
    let mut others = vec![Machine::vcpu_of(&machine.vm, &machine.space, 1, Apic::None)?];
    let mut general: General = others[0].get()?;
    (general.x[1], general.x[2], general.x[5], general.x[19]) = (TABLES + 0x1000, ENTRY, STOP, 1);
    others[0].set(&general)?;
    let (space, ram) = (machine.space.clone(), GuestPhysAddr::new(RAM));
    space.start_dirty_log(ram, RAM_SIZE as u64)?;
    let memory = Arc::clone(&machine.ram);
    let (told, said) = thread::scope(|scope| -> Result<_, Stop> {
        let reader = scope.spawn(|| -> Result<_, Stop> {
            let (mut told, mut log) = ([0; 2], [0; RAM_SIZE / 0x1000 / 64]);
            let begin = Instant::now();
            // How long a vCPU makes nothing of its time is the host scheduler's choice: so both are waited for, and the log is
            // read with pauses, as one whose pages are taken away again and again gets nothing done.
            while told.iter().any(|&told| told < FAULTS) && begin.elapsed() < PATIENCE {
                space.read_dirty_log(ram, &mut log)?;
                for (told, page) in told.iter_mut().zip([DATA, TABLES + 0x1000]) {
                    let page = (page - RAM) as usize / 0x1000;
                    *told += log[page / 64] >> (page % 64) & 1;
                }
                thread::sleep(Duration::from_micros(50));
            }
            memory.write_u64((STOP - RAM) as usize, 1)?;
            Ok(told)
        });
        let said = smp::all(&mut machine, &mut others);
        Ok((harness::joined(reader.join())??, said?))
    })?;
    println!("# the pages were told {told:?} times, after {} stores and {} changes", said[0].0, said[1].0);
    let counts = [told[0], told[1], said[0].0, said[1].0];
    ensure!(counts.iter().all(|&count| count > ENOUGH), "too few stores, or changes");
    Ok(())
}
