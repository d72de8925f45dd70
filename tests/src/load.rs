// SPDX-License-Identifier: MIT OR Apache-2.0
//! What runs inside of a Linux guest with several CPUs: threads that need each other, one pinned to each CPU, and see
//! whether the CPUs keep what they promise each other. A machine without a hypervisor passes as well.

use crate::harness::{self, Case, CaseResult, Stop};
use crate::pin::{pin, Allowed, SELF};
use crate::{ensure, ensure_eq, table};
use nix::sched::sched_getcpu;
use nix::sys::mman::{mmap_anonymous, munmap, MapFlags, ProtFlags};
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Barrier, Mutex, PoisonError};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

/// Every case.
pub fn cases() -> Vec<Case> {
    table! {
        "cpus/a-thread-runs-on-each" => each, in 60;
        "clock/never-goes-backwards-between-cpus" => clock, in 60;
        "wake/ring" => ring, in 120;
        "wake/storm" => storm, in 120;
        "shootdown/no-stale-page" => shootdown, in 120;
    }
}

/// How long a case works that has no natural end.
const DURATION: Duration = Duration::from_secs(2);
/// The longest that a thread may wait to be woken: far above what a busy emulator needs.
const PATIENCE: Duration = Duration::from_secs(10);

/// Runs `work` on a thread for each CPU, pinned, all at once, and gives the first error. The argument is the thread's place
/// in the list of CPUs.
fn on_every_cpu(cpus: &[usize], work: impl Fn(usize) -> CaseResult + Sync) -> CaseResult {
    let start = Barrier::new(cpus.len());
    thread::scope(|scope| {
        let threads: Vec<_> = cpus
            .iter()
            .enumerate()
            .map(|(place, cpu)| {
                let (start, work) = (&start, &work);
                scope.spawn(move || {
                    let pinned = pin(SELF, *cpu);
                    start.wait();
                    pinned.and_then(|()| work(place))
                })
            })
            .collect();
        let results = threads.into_iter().map(|t| harness::joined(t.join()).and_then(|result| result));
        results.fold(Ok(()), CaseResult::and)
    })
}

/// A pinned thread is where it should be, also by what the CPU itself says (RDTSCP or RDPID behind `getcpu`).
fn each() -> CaseResult {
    let cpus = Allowed::now()?.cpus.clone();
    on_every_cpu(&cpus, |place| {
        for _ in 0..1000 {
            ensure_eq!(sched_getcpu()?, cpus[place], "the CPU of a thread pinned to CPU {}", cpus[place]);
        }
        Ok(())
    })
}

/// What one CPU has read of the clock, the next one to look reads no less.
fn clock() -> CaseResult {
    let (cpus, latest, base) = (Allowed::now()?.cpus.clone(), AtomicU64::new(0), Instant::now());
    on_every_cpu(&cpus, |place| {
        let mut rounds = 0u64;
        while base.elapsed() < DURATION {
            for _ in 0..100 {
                let seen = latest.load(Ordering::Acquire);
                let now = base.elapsed().as_nanos() as u64;
                ensure!(now >= seen, "CPU {} reads {} ns less than another has", cpus[place], seen - now);
                latest.fetch_max(now, Ordering::Release);
                rounds += 1;
            }
        }
        ensure!(rounds >= 100, "CPU {} looked {rounds} times", cpus[place]);
        Ok(())
    })
}

/// A token goes round the CPUs, each asleep until it comes: every hand-over wakes an idle CPU.
fn ring() -> CaseResult {
    const ROUNDS: usize = 300;
    let cpus = Allowed::now()?.cpus.clone();
    let token = AtomicUsize::new(0);
    let threads: Mutex<Vec<Option<Thread>>> = Mutex::new(vec![None; cpus.len()]);
    let ready = Barrier::new(cpus.len());
    let longest = AtomicU64::new(0);
    on_every_cpu(&cpus, |place| {
        threads.lock().unwrap_or_else(PoisonError::into_inner)[place] = Some(thread::current());
        ready.wait();
        let next = threads.lock().unwrap_or_else(PoisonError::into_inner)[(place + 1) % cpus.len()].clone();
        for round in 0..ROUNDS {
            let begin = Instant::now();
            while token.load(Ordering::Acquire) != round * cpus.len() + place {
                harness::check_time()?;
                thread::park_timeout(PATIENCE);
                ensure!(begin.elapsed() < PATIENCE, "CPU {} was not woken in round {round}", cpus[place]);
            }
            longest.fetch_max(begin.elapsed().as_micros() as u64, Ordering::Relaxed);
            token.fetch_add(1, Ordering::Release);
            if let Some(next) = &next {
                next.unpark();
            }
        }
        Ok(())
    })?;
    println!("longest wait in the ring: {} us", longest.load(Ordering::Relaxed));
    Ok(())
}

/// One CPU wakes all others again and again, and waits until each has answered.
fn storm() -> CaseResult {
    const ROUNDS: u64 = 300;
    let cpus = Allowed::now()?.cpus.clone();
    let round = Mutex::new(0u64);
    let (next_round, answered) = (std::sync::Condvar::new(), AtomicUsize::new(0));
    let leader: Mutex<Option<Thread>> = Mutex::new(None);
    let ready = Barrier::new(cpus.len());
    on_every_cpu(&cpus, |place| {
        if place == 0 {
            *leader.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread::current());
            ready.wait();
            for current in 1..=ROUNDS {
                answered.store(0, Ordering::Release);
                *round.lock().unwrap_or_else(PoisonError::into_inner) = current;
                next_round.notify_all();
                let begin = Instant::now();
                while answered.load(Ordering::Acquire) < cpus.len() - 1 {
                    thread::park_timeout(PATIENCE);
                    let count = answered.load(Ordering::Acquire);
                    ensure!(begin.elapsed() < PATIENCE, "{count} answers in round {current}");
                }
            }
            return Ok(());
        }
        ready.wait();
        let leader = leader.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for wanted in 1..=ROUNDS {
            let mut guard = round.lock().unwrap_or_else(PoisonError::into_inner);
            while *guard < wanted {
                let (again, timeout) = next_round.wait_timeout(guard, PATIENCE).unwrap_or_else(PoisonError::into_inner);
                ensure!(!timeout.timed_out(), "CPU {} was not woken for round {wanted}", cpus[place]);
                guard = again;
            }
            drop(guard);
            answered.fetch_add(1, Ordering::AcqRel);
            if let Some(leader) = &leader {
                leader.unpark();
            }
        }
        Ok(())
    })
}

/// Pages that the shoot-down case remaps.
const PAGES: usize = 16;
const PAGE: usize = 4096;

/// What a page holds: no other page and no other generation holds the same, so a stale one gives itself away.
fn content(generation: u64, page: usize) -> u64 {
    generation * PAGES as u64 + page as u64
}

/// Memory of `PAGES` pages that may be remapped under its readers.
struct Window(std::ptr::NonNull<std::ffi::c_void>);

// SAFETY: it is an address; what threads do with it is up to the methods, which access the memory atomically.
unsafe impl Sync for Window {}

impl Window {
    fn map(at: Option<NonZeroUsize>, pages: usize) -> Result<std::ptr::NonNull<std::ffi::c_void>, Stop> {
        let length = NonZeroUsize::new(pages * PAGE).ok_or(Stop::Fail("no pages".into()))?;
        let flags = if at.is_some() { MapFlags::MAP_FIXED } else { MapFlags::empty() };
        // SAFETY: a fixed address is one of the window's own pages, which `remap` alone replaces, in one step; they are accessed
        // through `word` only.
        Ok(unsafe {
            mmap_anonymous(at, length, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_PRIVATE | flags)?
        })
    }

    fn new() -> Result<Self, Stop> {
        Self::map(None, PAGES).map(Self)
    }

    fn word(&self, page: usize) -> &AtomicU64 {
        assert!(page < PAGES);
        // SAFETY: the page is mapped as long as the window is there, zeros are a valid value, and it is accessed atomically only.
        unsafe { &*self.0.as_ptr().byte_add(page * PAGE).cast::<AtomicU64>() }
    }

    /// A new page of zeros in the place of the old one.
    fn remap(&self, page: usize) -> CaseResult {
        assert!(page < PAGES);
        let at = NonZeroUsize::new(self.0.as_ptr() as usize + page * PAGE);
        Self::map(at, 1).map(drop)
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: nobody has a reference to the window's memory any more: each borrows the window.
        let _ = unsafe { munmap(self.0, PAGES * PAGE) };
    }
}

/// One CPU replaces pages that the others read all the time. Whoever knows of the new page must not see the old one, which
/// its CPU's TLB may hold until the shoot-down interrupt.
fn shootdown() -> CaseResult {
    let cpus = Allowed::now()?.cpus.clone();
    let window = Window::new()?;
    let published: [AtomicU64; PAGES] = [const { AtomicU64::new(0) }; PAGES];
    let (done, begin) = (AtomicBool::new(false), Instant::now());
    let reads = AtomicU64::new(0);
    on_every_cpu(&cpus, |place| {
        if place == 0 {
            let result = (|| {
                let mut generation = 0;
                while generation < 3 || begin.elapsed() < DURATION {
                    generation += 1;
                    for (page, published) in published.iter().enumerate() {
                        window.remap(page)?;
                        window.word(page).store(content(generation, page), Ordering::Relaxed);
                        published.store(generation, Ordering::Release);
                    }
                    // More threads than CPUs can be: the readers want a turn.
                    thread::yield_now();
                }
                println!("generations of {PAGES} pages: {generation}");
                Ok(())
            })();
            done.store(true, Ordering::Release);
            return result;
        }
        while !done.load(Ordering::Acquire) {
            for (page, published) in published.iter().enumerate() {
                let known = published.load(Ordering::Acquire);
                let found = window.word(page).load(Ordering::Relaxed);
                // A page that has just come in the place of another is zero for a moment.
                ensure!(
                    found == 0 || (found >= content(known, page) && found % PAGES as u64 == page as u64),
                    "CPU {} reads {found:#x} in page {page}, which is {:#x} or later",
                    cpus[place],
                    content(known, page)
                );
            }
            reads.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    })?;
    ensure!(cpus.len() == 1 || reads.load(Ordering::Relaxed) > 0, "nobody read");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg_attr(miri, ignore = "affinity and fixed mappings")]
    fn this_machine_passes() {
        let _alone = harness::tests::ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        for case in [each as fn() -> CaseResult, clock, ring, storm, shootdown] {
            case().unwrap();
        }
    }
}
