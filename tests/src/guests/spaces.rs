// SPDX-License-Identifier: MIT OR Apache-2.0
//! Address spaces: several in one VM, changed all the time under running vCPUs, and very large ones.

use crate::harness::{self, Case, CaseResult, Stop};
use crate::hypervisor::Vcpu;
use crate::machine::{Machine, Mode, CODE, CR0_PG, DATA, HOLE, TABLES};
use crate::{code, ensure, ensure_eq, table};
use axvcpu_uapi::addr::GuestPhysAddr;
use axvcpu_uapi::client::{Apic, Backing, Memory, Permissions};
use axvcpu_uapi::exit::AxVCpuExitReason::{Interrupted, IoWrite, NestedPageFault};
use axvcpu_uapi::x86::{Control, General, Segments};
use nix::sys::mman::{mmap_anonymous, munmap, MapFlags, ProtFlags};
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Arc;
use std::thread;

pub(super) fn cases() -> Vec<Case> {
    table! {
        "spaces/two-vcpus-in-different-spaces" => different [abi];
        "spaces/mapped-and-unmapped-thousands-of-times" => remapped [abi], in 100;
        "spaces/a-sparse-terabyte" => sparse [abi];
    }
}

fn gpa(addr: u64) -> GuestPhysAddr {
    GuestPhysAddr::new(addr)
}

/// The same guest physical page in two address spaces, by two vCPUs at the same time: each has its own, and what happens to
/// one is nothing to the other.
fn different() -> CaseResult {
    let code = code!(
        different,
        64,
        "mov ebx, 0xa0000",
        "2: mov ecx, 1000",
        "3: mov rax, [rbx]",
        "cmp rax, r8",
        "jne 4f",
        "inc qword ptr [rbx + 8]",
        "dec ecx",
        "jnz 3b",
        "out 0x80, al",
        "jmp 2b",
        "4: out 0x81, al",
    );
    let mut m = Machine::new(Mode::Long, code)?;
    let space = m.vm.create_address_space()?;
    let ram = space.map_all(gpa(0), Arc::clone(&m.ram), Permissions::RWX);
    ensure!(ram.is_ok(), "the same memory cannot be in two address spaces");
    let ram = ram?;
    let pages = [Arc::new(Memory::anonymous(0x1000)?), Arc::new(Memory::anonymous(0x1000)?)];
    for (page, value) in pages.iter().zip([11, 22]) {
        page.write_u64(0, value)?;
    }
    // In the second one the RAM is there without a hole: the page takes the place of a part of it.
    let (low, rest) = ram.split(HOLE as usize)?;
    let (page, high) = rest.split(0x1000)?;
    drop(page);
    let mut slots = vec![m.space.map_all(gpa(HOLE), Arc::clone(&pages[0]), Permissions::RW)?];
    let other = space.map_all(gpa(HOLE), Arc::clone(&pages[1]), Permissions::RW)?;
    let mut second = m.vm.create_vcpu(1)?;
    harness::watch(second.kicker());
    second.set_entry(gpa(CODE))?;
    second.set_ept_root(&space)?;
    second.setup(Apic::None, &m.system.supported_cpuid()?)?;
    second.set(&m.vcpu.get::<Control>()?)?;
    second.set(&m.vcpu.get::<Segments>()?)?;
    let mut general: General = m.vcpu.get()?;
    general.gpr[8] = 22;
    second.set(&general)?;
    m.modify(|general| general.gpr[8] = 11)?;
    let stop = AtomicBool::new(false);
    thread::scope(|scope| -> CaseResult {
        let runner = scope.spawn(|| -> Result<u64, Stop> {
            let mut rounds = 0;
            while !stop.load(Ordering::Relaxed) {
                harness::check_time()?;
                match second.run()?.reason {
                    IoWrite { port: 0x80, .. } => rounds += 1,
                    Interrupted => {}
                    other => return Err(Stop::Fail(format!("exit of the second vCPU: {other:x?}"))),
                }
            }
            Ok(rounds)
        });
        let result: CaseResult = (|| {
            for _ in 0..20 {
                m.expect_mark(0x80)?;
                // Away and back, in the first one only.
                slots.clear();
                slots.push(m.space.map_all(gpa(HOLE), Arc::clone(&pages[0]), Permissions::RW)?);
            }
            Ok(())
        })();
        stop.store(true, Ordering::Relaxed);
        let rounds = harness::joined(runner.join())??;
        result?;
        ensure_eq!(pages[0].read_u64(8)?, 20_000, "writes in the first address space");
        ensure_eq!(pages[1].read_u64(8)?, rounds * 1000, "writes in the second");
        Ok(())
    })?;
    drop((low, high, other));
    Ok(())
}

/// A page comes and goes under two vCPUs that read and write it all the time. When it is gone the program fills it with
/// poison: no vCPU may ever read that, nor write to the page any more.
fn remapped() -> CaseResult {
    const POISON: u64 = 0xdead_dead_dead_dead;
    const TIMES: u64 = 3000;
    let code = code!(
        remapped,
        64,
        "mov ebx, 0xa0000",
        "mov r15, 0xdeaddeaddeaddead",
        "2: mov rax, [rbx]",
        "cmp rax, r15",
        "je 3f",
        "lock inc qword ptr [rbx + r9]",
        "inc r10",
        "jmp 2b",
        "3: out 0x81, al",
    );
    let mut m = Machine::new(Mode::Long, code)?;
    let mut vcpus = vec![m.add_vcpu(1)?];
    let Machine { vm, space, ram, slots, vcpu, .. } = m;
    vcpus.push(vcpu);
    let kickers: Vec<_> = vcpus.iter().map(Vcpu::kicker).collect();
    for (index, vcpu) in (1u64..).zip(&mut vcpus) {
        let mut general: General = vcpu.get()?;
        general.gpr[9] = 8 * index;
        vcpu.set(&general)?;
    }
    let (stop, faults) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| -> CaseResult {
        let run = |mut vcpu: Vcpu| -> Result<u64, Stop> {
            while !stop.load(Ordering::Relaxed) {
                match vcpu.run()?.reason {
                    // The page is not there just now.
                    NestedPageFault { addr, .. } if addr.as_u64() & !0xfff == HOLE => {
                        faults.fetch_add(1, Ordering::Relaxed);
                        thread::yield_now();
                    }
                    Interrupted => {}
                    IoWrite { port: 0x81, .. } => {
                        return Err(Stop::Fail("a vCPU has read a page that was gone".into()))
                    }
                    other => return Err(Stop::Fail(format!("exit {other:x?}"))),
                }
            }
            Ok(vcpu.general().gpr[10])
        };
        let runners: Vec<_> = vcpus.into_iter().map(|vcpu| scope.spawn(move || run(vcpu))).collect();
        let changing: CaseResult = (|| {
            let pages = [Arc::new(Memory::anonymous(0x1000)?), Arc::new(Memory::anonymous(0x1000)?)];
            for time in 0..TIMES {
                harness::check_time().map_err(|stop| stop.context(format_args!("time {time}")))?;
                let page = &pages[time as usize % 2];
                for word in 0..3 {
                    page.write_u64(8 * word, 0)?;
                }
                let slot = space.map_all(gpa(HOLE), Arc::clone(page), Permissions::RW)?;
                // Now and then until both use it.
                if time % 16 == 0 {
                    harness::wait_until("the vCPUs to use the page", || {
                        Ok(page.read_u64(8)? > 0 && page.read_u64(16)? > 0 || runners.iter().any(|r| r.is_finished()))
                    })?;
                }
                drop(slot);
                page.write_u64(0, POISON)?;
                let counts = [page.read_u64(8)?, page.read_u64(16)?];
                if time % 4 == 0 {
                    thread::yield_now();
                }
                ensure_eq!(
                    [page.read_u64(8)?, page.read_u64(16)?],
                    counts,
                    "counts in a page that is gone, time {time}"
                );
            }
            Ok(())
        })();
        stop.store(true, Ordering::Relaxed);
        for kicker in &kickers {
            kicker.kick()?;
        }
        let mut accesses = 0;
        for runner in runners {
            accesses += harness::joined(runner.join())??;
        }
        changing?;
        ensure!(accesses > TIMES, "the guest was there only {accesses} times");
        Ok(())
    })?;
    ensure!(faults.load(Ordering::Relaxed) > 0, "no vCPU ever found the page gone");
    // On one CPU none can be: the thread that takes the page away is there.
    if thread::available_parallelism().map_or(1, usize::from) > 1 {
        ensure!(vm.stats()?.shootdowns > 0, "no vCPU was ever in the guest when the page went");
    }
    drop((ram, slots));
    Ok(())
}

/// A range of the process's addresses, reserved but not there.
struct Reserved {
    start: NonNull<u8>,
    size: usize,
}

// SAFETY: The range belongs to the process, not to a thread, and nothing refers to it.
unsafe impl Send for Reserved {}
// SAFETY: As above.
unsafe impl Sync for Reserved {}
// SAFETY: The range stays mapped, readable and writable, as long as the value, and only guests use it.
unsafe impl Backing for Reserved {
    fn start(&self) -> NonNull<u8> {
        self.start
    }
    fn size(&self) -> usize {
        self.size
    }
}

impl Reserved {
    fn new(size: usize) -> Result<Self, Stop> {
        let length = NonZeroUsize::new(size).ok_or(Stop::Fail("no size".into()))?;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: A new mapping at an address of the kernel's choice disturbs no existing memory.
        let start = unsafe { mmap_anonymous(None, length, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, flags) }?;
        Ok(Self { start: start.cast(), size })
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        // SAFETY: The range was mapped by `new`; slots hold the value, so none is left. It cannot fail for such a range.
        let _ = unsafe { munmap(self.start.cast(), self.size) };
    }
}

/// A TiB (or all that the CPU can address but for the first GiB) of which the guest touches 64 pages far apart: that costs the
/// tables on the way to each, and no more.
fn sparse() -> CaseResult {
    const TOUCHED: u64 = 64;
    let code = code!(
        sparse,
        64,
        "mov ecx, 64",
        "2: mov [rbx], rbx",
        "add rbx, rdx",
        "dec ecx",
        "jnz 2b",
        "out 0x80, al",
        "hlt",
    );
    let mut m = Machine::new(Mode::Long, code)?;
    let limit = 1u64 << m.system.info()?.guest_phys_bits.min(47);
    let base = 1u64 << 30;
    let size = (1u64 << 40).min(limit - base);
    let memory = match Reserved::new(size as usize) {
        Ok(memory) => Arc::new(memory),
        Err(_) => return Err(Stop::Skip("the process cannot have that many addresses".into())),
    };
    let start = memory.start.as_ptr() as u64;
    let slot = m.space.map_all(gpa(base), memory, Permissions::RW)?;
    // The guest sees it at 512 GiB and above, by a table of GiB pages (bits P, RW, PS) for each entry of the PML4.
    let gib = size >> 30;
    for i in 0..gib {
        let table = DATA + 0x1000 * (i / 512);
        m.write_u64(TABLES + 8 * (1 + i / 512), table | 3)?;
        m.write_u64(table + 8 * (i % 512), (base + (i << 30)) | 0x83)?;
    }
    let step = (size / TOUCHED) & !0xfff;
    ensure!(m.vcpu.get::<Control>()?.cr0 & CR0_PG != 0, "the guest has no paging");
    m.modify(|general| (general.gpr[3], general.gpr[2]) = (1 << 39, step))?;
    let before = m.vm.stats()?;
    m.expect_mark(0x80)?;
    let after = m.vm.stats()?;
    for i in 0..TOUCHED {
        // SAFETY: The address is in the reserved range, and aligned; the guest, which shares it, has stopped.
        let word = unsafe { ((start + i * step) as *const u64).read_volatile() };
        ensure_eq!(word, (1 << 39) + i * step, "word {i}");
    }
    // For each page a table of level 1 and one of level 2, on the way there level 3, and what the code and its tables need.
    let tables = after.table_pages - before.table_pages;
    println!("# {} GiB, {TOUCHED} pages touched: {tables} pages of tables", size >> 30);
    ensure!(tables <= 2 * TOUCHED + (base + size).div_ceil(1 << 39) + 8, "{tables} pages of tables");
    drop(slot);
    Ok(())
}
