// SPDX-License-Identifier: MIT OR Apache-2.0
//! How soon a guest stops for its host. A clock could not tell on an emulated CPU or a busy host, whose own ticks stop every
//! guest after some milliseconds in any case. So the guest itself counts what it still does: whoever wants it to stop says so
//! first, and tells the guest by its memory when that is done; the guest counts its turns from there on. They are none or a few
//! if it was really stopped, and what a CPU does until the next tick if it was not.

use crate::harness::{self, Case, CaseResult, Stop};
use crate::hypervisor::Kicker;
use crate::machine::{Machine, Mode, DATA};
use crate::pin::{pin, Allowed, SELF};
use crate::random::{seed, Random};
use crate::{code, ensure, table};
use axvcpu_uapi::client::Memory;
use axvcpu_uapi::exit::AxVCpuExitReason::Interrupted;
use nix::sys::pthread::{pthread_kill, pthread_self};
use nix::sys::signal::{sigaction, SaFlags, SigAction, SigHandler, SigSet, Signal};
use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use std::thread;

pub(super) fn cases() -> Vec<Case> {
    table! {
        "prompt/a-kick-stops-a-running-guest" => kick_running [abi], in 60;
        "prompt/a-kick-on-the-way-in" => kick_entering [abi], in 60;
        "prompt/a-signal-on-the-way-in" => signal_entering [abi], in 60;
    }
}

/// Turns that a guest may do after it should have stopped. An interrupt from CPU to CPU takes a microsecond or two, and tens of them
/// where the host is a guest itself: some thousand turns. Until the next tick a guest does hundreds of thousands, on an emulated
/// CPU as well, where it otherwise stops after one or none.
const LATE: u64 = 20_000;

/// How often a guest is stopped that runs.
const RUNNING: u64 = 60;
/// How often one that is on its way in.
const ENTERING: u64 = 150;

/// Where the guest counts all its turns, and where it finds how often it has been told to stop.
const TURNS: usize = DATA as usize;
const TOLD: usize = TURNS + 8;

/// Counts its turns at [`TURNS`], and in R10 those since the word at [`TOLD`] is not R9 any more.
fn counter() -> &'static [u8] {
    code!(counter, 64, "2: inc qword ptr [0x20000]", "cmp [0x20008], r9", "je 2b", "inc r10", "jmp 2b",)
}

/// What the thread that runs the vCPU and the one that stops it share.
struct Rounds {
    ram: Arc<Memory>,
    /// The round that is about to start, and the last that is over.
    started: AtomicU64,
    ended: AtomicU64,
}

impl Rounds {
    /// Waits until `round` is about to start. Not asleep: it would be over before the sleeper is awake.
    fn wait_for(&self, round: u64) -> CaseResult {
        while self.started.load(Ordering::Acquire) < round {
            harness::check_time()?;
        }
        Ok(())
    }

    /// Waits until the guest runs.
    fn wait_for_guest(&self) -> CaseResult {
        let before = self.ram.read_u64(TURNS)?;
        harness::wait_until("the guest to run", || {
            Ok(self.ram.read_u64(TURNS)? > before || self.ended.load(Ordering::Acquire) == u64::MAX)
        })
    }

    /// Tells the guest that it has been stopped.
    fn tell(&self, round: u64) -> CaseResult {
        Ok(self.ram.write_u64(TOLD, round)?)
    }
}

/// Runs a guest `rounds` times on one CPU, and on another `stop` in each round: it is to stop the guest, to
/// [`tell`](Rounds::tell) it at once, and to say whether the round counts. Gives the guest's late turns in each that does.
fn late_turns(
    rounds: u64,
    mut stop: impl FnMut(&Rounds, &Kicker, u64) -> Result<bool, Stop> + Send,
) -> Result<Vec<u64>, Stop> {
    let allowed = Allowed::several()?;
    let (here, there) = (allowed.cpus[1], allowed.cpus[0]);
    let mut m = Machine::new(Mode::Long, counter())?;
    pin(SELF, here)?;
    let kicker = m.vcpu.kicker();
    let shared = Rounds { ram: Arc::clone(&m.ram), started: AtomicU64::new(0), ended: AtomicU64::new(0) };
    thread::scope(|scope| {
        let stopper = scope.spawn(|| -> Result<Vec<bool>, Stop> {
            pin(SELF, there)?;
            (1..=rounds).map(|round| stop(&shared, &kicker, round)).collect()
        });
        let mut run = || -> Result<Vec<u64>, Stop> {
            let mut late = Vec::new();
            for round in 1..=rounds {
                m.modify(|general| (general.gpr[9], general.gpr[10]) = (round - 1, 0))?;
                shared.started.store(round, Ordering::Release);
                m.expect(Interrupted)?;
                late.push(m.vcpu.general().gpr[10]);
                shared.ended.store(round, Ordering::Release);
                // Told late, the next round would take it for its own.
                harness::wait_until("the guest to be told", || Ok(shared.ram.read_u64(TOLD)? == round))?;
            }
            Ok(late)
        };
        let late = run();
        // If it has failed, nobody is to wait for the next round.
        shared.started.store(u64::MAX, Ordering::Release);
        shared.ended.store(u64::MAX, Ordering::Release);
        let counts = harness::joined(stopper.join())?;
        Ok(late?.into_iter().zip(counts?).filter_map(|(late, counts)| counts.then_some(late)).collect())
    })
}

/// Fails if more than `allowed` of the rounds were late.
fn judge(late: &[u64], allowed: usize, what: &str) -> CaseResult {
    let count = late.iter().filter(|turns| **turns > LATE).count();
    let most = late.iter().max().copied().unwrap_or(0);
    println!("# {what}: {count} of {} late, by up to {most} turns", late.len());
    ensure!(count <= allowed, "{count} of {} {what} left the guest running, for up to {most} turns", late.len());
    Ok(())
}

fn kick_running() -> CaseResult {
    let late = late_turns(RUNNING, |rounds, kicker, round| {
        rounds.wait_for(round)?;
        rounds.wait_for_guest()?;
        kicker.kick()?;
        rounds.tell(round)?;
        Ok(true)
    })?;
    judge(&late, late.len() / 50, "kicks")
}

/// Passes a time, random up to what it takes a thread to get into the guest.
fn dawdle(random: &mut Random) {
    for i in 0..random.below(20_000) {
        black_box(i);
    }
}

fn kick_entering() -> CaseResult {
    let mut random = Random::new(seed()?);
    let late = late_turns(ENTERING, |rounds, kicker, round| {
        rounds.wait_for(round)?;
        dawdle(&mut random);
        kicker.kick()?;
        rounds.tell(round)?;
        Ok(true)
    })?;
    judge(&late, late.len() / 100, "kicks")
}

/// How often the signal below has been taken.
static TAKEN: AtomicU64 = AtomicU64::new(0);

extern "C" fn take(_: i32) {
    TAKEN.fetch_add(1, Ordering::SeqCst);
}

/// A signal that is taken before RUN stops nothing: that round is ended by a kick, and does not count.
fn signal_entering() -> CaseResult {
    let action = SigAction::new(SigHandler::Handler(take), SaFlags::empty(), SigSet::empty());
    // SAFETY: the handler touches an atomic variable only, so it is async-signal-safe.
    let old = unsafe { sigaction(Signal::SIGUSR1, &action) }?;
    TAKEN.store(0, Ordering::SeqCst);
    let (target, mut random) = (pthread_self(), Random::new(seed()?));
    let late = late_turns(ENTERING, |rounds, kicker, round| {
        rounds.wait_for(round)?;
        dawdle(&mut random);
        pthread_kill(target, Signal::SIGUSR1)?;
        rounds.tell(round)?;
        let mut looks = 0;
        harness::wait_until("the signal to be taken, and the run to end if that ends it", || {
            looks += u32::from(TAKEN.load(Ordering::SeqCst) >= round);
            Ok(rounds.ended.load(Ordering::Acquire) >= round || looks > 5)
        })?;
        let over = rounds.ended.load(Ordering::Acquire) >= round;
        if !over {
            kicker.kick()?;
        }
        Ok(over)
    });
    // SAFETY: this is the handler that was there before.
    unsafe { sigaction(Signal::SIGUSR1, &old) }?;
    let late = late?;
    ensure!(late.len() as u64 > ENTERING / 10, "{} of {ENTERING} signals came while the vCPU ran", late.len());
    judge(&late, late.len() / 100, "signals")
}
