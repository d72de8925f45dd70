// SPDX-License-Identifier: MIT OR Apache-2.0
//! Runs cases and reports them: `ok - name`, `not ok - name: why`, `skip - name: why`, and `1..N` at the end.
//!
//! Each case runs on a thread of its own. When its time is up the harness kicks every vCPU that the case has created,
//! over and over, and the case fails; one that does not come back even so ends the program, since nothing can be said
//! about the cases after it.

use axvcpu_uapi::client;
use std::fmt::Display;
use std::io::Write;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{channel, RecvTimeoutError};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// The environment variable that multiplies all time limits, for a host that is slower than others.
const PATIENCE: &str = "AXVCPU_PATIENCE";

/// Time a case gets unless it says otherwise. Cases take milliseconds; this is for a slow, busy emulator.
pub const TIME_LIMIT: Duration = Duration::from_secs(20);

/// Time that a case gets to come back once its vCPUs are being kicked.
const GRACE: Duration = Duration::from_secs(10);

/// Why a case ended early.
#[derive(Debug)]
pub enum Stop {
    /// The behaviour is not what it must be.
    Fail(String),
    /// It cannot be tested here.
    Skip(String),
}

/// What a case gives back.
pub type CaseResult = Result<(), Stop>;

impl From<String> for Stop {
    fn from(why: String) -> Self {
        Self::Fail(why)
    }
}
impl From<client::Error> for Stop {
    fn from(error: client::Error) -> Self {
        Self::Fail(error.errno().map_or_else(|| error.to_string(), |errno| format!("{error} [{errno:?}]")))
    }
}
impl From<nix::errno::Errno> for Stop {
    fn from(errno: nix::errno::Errno) -> Self {
        Self::Fail(errno.to_string())
    }
}
impl From<std::io::Error> for Stop {
    fn from(error: std::io::Error) -> Self {
        Self::Fail(error.to_string())
    }
}

impl Stop {
    /// The same with words before the reason.
    #[must_use]
    pub fn context(self, words: impl Display) -> Self {
        match self {
            Self::Fail(why) => Self::Fail(format!("{words}: {why}")),
            Self::Skip(why) => Self::Skip(why),
        }
    }
}

/// One test: a behaviour, and the function that proves it.
pub struct Case {
    /// The behaviour, as `group/what`.
    pub name: &'static str,
    /// Time it gets.
    pub limit: Duration,
    /// Why it is for axvcpu alone, if it is.
    pub only: Option<Only>,
    /// The proof.
    pub run: fn() -> CaseResult,
}

/// Why a case does not run on KVM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Only {
    /// It is about axvcpu's own interface.
    Abi,
    /// The guest sees something else there; docs/differences.md says what and why.
    Differs,
}

impl Only {
    /// In words, for the line of a case that is skipped.
    const fn reason(self) -> &'static str {
        match self {
            Self::Abi => "it is about axvcpu's own interface",
            Self::Differs => "KVM differs here: docs/differences.md",
        }
    }
}

/// Builds a table: `table! { "group/what" => function; ... }`. After the function `[abi]` marks a case that is about
/// axvcpu's own interface, and `[differs]` one whose guest sees something else on KVM: neither runs there. `in SECONDS`
/// gives a case a time limit of its own. `#[cfg(...)]` before an entry leaves it out elsewhere.
#[macro_export]
macro_rules! table {
    (@only) => { None };
    (@only abi) => { Some($crate::harness::Only::Abi) };
    (@only differs) => { Some($crate::harness::Only::Differs) };
    ($($(#[$attribute:meta])* $name:literal => $run:path $([$only:tt])? $(, in $seconds:literal)?;)*) => {
        Vec::from([$($(#[$attribute])* $crate::harness::Case {
            name: $name,
            limit: {
                let limit = $crate::harness::TIME_LIMIT;
                $(
                    let _ = limit;
                    let limit = std::time::Duration::from_secs($seconds);
                )?
                limit
            },
            only: $crate::table!(@only $($only)?),
            run: $run,
        },)*])
    };
}

/// Ends the case with a failure unless the condition holds: `ensure!(condition, "what is wrong: {}", detail)`.
#[macro_export]
macro_rules! ensure {
    ($condition:expr, $($format:tt)+) => {
        if !$condition {
            return Err($crate::harness::Stop::Fail(format!($($format)+)));
        }
    };
}

/// Ends the case with a failure unless both values are equal: `ensure_eq!(found, expected, "what it is")`. Integers are
/// shown in hexadecimal.
#[macro_export]
macro_rules! ensure_eq {
    ($found:expr, $expected:expr, $($format:tt)+) => {{
        let (found, expected) = (&$found, &$expected);
        if found != expected {
            return Err($crate::harness::Stop::Fail(
                format!("{}: found {found:#x?}, expected {expected:#x?}", format!($($format)+)),
            ));
        }
    }};
}

/// What carries the machines of the cases.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Hypervisor {
    /// The module.
    #[default]
    Axvcpu,
    /// KVM, for comparison.
    Kvm,
}

static CHOSEN: OnceLock<Hypervisor> = OnceLock::new();

fn choose_hypervisor(hypervisor: Hypervisor) {
    let _ = CHOSEN.set(hypervisor);
}

/// What the command line chose.
pub fn hypervisor() -> Hypervisor {
    *CHOSEN.get_or_init(Hypervisor::default)
}

/// Makes a vCPU return.
pub trait Kick: Send {
    /// Kicks. One that cannot be kicked cannot be saved; the grace period ends the wait.
    fn kick(&self);
}

impl Kick for client::Kicker {
    fn kick(&self) {
        let _ = client::Kicker::kick(self);
    }
}

/// The vCPUs of the running case, and whether its time is up.
#[derive(Default)]
struct Watch {
    kickers: Mutex<Vec<Box<dyn Kick>>>,
    expired: AtomicBool,
}

static WATCH: Mutex<Option<Arc<Watch>>> = Mutex::new(None);

fn current() -> Option<Arc<Watch>> {
    WATCH.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

/// Puts a vCPU under the watch of the running case.
pub fn watch(kicker: impl Kick + 'static) {
    if let Some(watch) = current() {
        watch.kickers.lock().unwrap_or_else(PoisonError::into_inner).push(Box::new(kicker));
    }
}

/// Fails if the running case has used up its time. A case calls it wherever it waits for something.
///
/// # Errors
/// The failure to end with.
pub fn check_time() -> CaseResult {
    match current() {
        Some(watch) if watch.expired.load(Ordering::Relaxed) => Err(Stop::Fail("hung: stopped by the watchdog".into())),
        _ => Ok(()),
    }
}

/// Waits until `condition` holds.
///
/// # Errors
/// A failure that names `what` if it does not within the case's time.
pub fn wait_until(what: &str, mut condition: impl FnMut() -> Result<bool, Stop>) -> CaseResult {
    while !condition()? {
        check_time().map_err(|stop| stop.context(format_args!("waiting for {what}")))?;
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// What a thread came to, from its `join`.
///
/// # Errors
/// A failure if it panicked.
pub fn joined<T>(result: std::thread::Result<T>) -> Result<T, Stop> {
    result.map_err(|_| Stop::Fail("a thread panicked".into()))
}

/// By how much slower than others this host is, as it was told.
pub fn patience() -> u32 {
    std::env::var(PATIENCE).ok().and_then(|text| text.parse().ok()).unwrap_or(1)
}

/// Runs one case under the watchdog, with its limit multiplied. `None` if it never came back.
fn run_case(case: &Case, patience: u32) -> Option<CaseResult> {
    let limit = case.limit * patience;
    let watch = Arc::new(Watch::default());
    *WATCH.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&watch));
    let (sender, receiver) = channel();
    let run = case.run;
    let thread = std::thread::spawn(move || {
        let result = catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<&str>().copied().or(panic.downcast_ref::<String>().map(String::as_str));
            Err(Stop::Fail(format!("panicked: {}", text.unwrap_or("no message"))))
        });
        // The receiver gives up only when it ends the program.
        let _ = sender.send(result);
    });
    let started = Instant::now();
    let result = loop {
        let elapsed = started.elapsed();
        let wait = if elapsed < limit { limit - elapsed } else { Duration::from_millis(20) };
        match receiver.recv_timeout(wait) {
            Ok(result) => break Some(result),
            Err(RecvTimeoutError::Disconnected) => break Some(Err(Stop::Fail("ended without a result".into()))),
            Err(RecvTimeoutError::Timeout) if elapsed > limit + GRACE * patience => break None,
            Err(RecvTimeoutError::Timeout) => {
                watch.expired.store(true, Ordering::Relaxed);
                for kicker in watch.kickers.lock().unwrap_or_else(PoisonError::into_inner).iter() {
                    kicker.kick();
                }
            }
        }
    };
    if result.is_some() {
        // The result was its last word, so it ends at once; its panic, if any, is in the result.
        let _ = thread.join();
    }
    *WATCH.lock().unwrap_or_else(PoisonError::into_inner) = None;
    match result {
        Some(Ok(())) if watch.expired.load(Ordering::Relaxed) => {
            Some(Err(Stop::Fail("took longer than its limit".into())))
        }
        other => other,
    }
}

/// Runs the cases that the command line chooses, and reports. Fails if a case fails, or if no case is chosen.
pub fn main(cases: &[Case]) -> ExitCode {
    let mut list = false;
    let mut patterns = Vec::new();
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--list" => list = true,
            "--hypervisor" => match arguments.next().as_deref() {
                Some("axvcpu") => choose_hypervisor(Hypervisor::Axvcpu),
                Some("kvm") if cfg!(target_arch = "x86_64") => choose_hypervisor(Hypervisor::Kvm),
                Some("kvm") => {
                    eprintln!("--hypervisor kvm: on this architecture the cases run on axvcpu only");
                    return ExitCode::from(2);
                }
                other => {
                    eprintln!("--hypervisor takes axvcpu or kvm, not {}", other.unwrap_or("nothing"));
                    return ExitCode::from(2);
                }
            },
            option if option.starts_with('-') => {
                eprintln!("unknown option {option}; usage: [--hypervisor axvcpu|kvm] [--list] [PATTERN]...");
                return ExitCode::from(2);
            }
            _ => patterns.push(argument),
        }
    }
    let chosen =
        cases.iter().filter(|case| patterns.is_empty() || patterns.iter().any(|p| case.name.contains(p.as_str())));
    if list {
        chosen.for_each(|case| println!("{}", case.name));
        return ExitCode::SUCCESS;
    }
    let patience = patience();
    let (mut count, mut failed) = (0, 0);
    // The message of a panic goes into the case's line.
    std::panic::set_hook(Box::new(|_| {}));
    for case in chosen {
        count += 1;
        let mut hung = false;
        let skipped = case.only.filter(|_| hypervisor() == Hypervisor::Kvm);
        let result = match skipped {
            Some(only) => Some(Err(Stop::Skip(only.reason().into()))),
            None => run_case(case, patience),
        };
        match result {
            Some(Ok(())) => println!("ok - {}", case.name),
            Some(Err(Stop::Skip(why))) => println!("skip - {}: {}", case.name, line(&why)),
            Some(Err(Stop::Fail(why))) => {
                failed += 1;
                println!("not ok - {}: {}", case.name, line(&why));
            }
            None => {
                (failed, hung) = (failed + 1, true);
                println!("not ok - {}: hung, and kicks do not end it", case.name);
            }
        }
        if std::io::stdout().flush().is_err() || hung {
            println!("1..{count}");
            // Threads of the hung case would be waited for by an orderly exit.
            std::process::exit(1);
        }
    }
    println!("1..{count}");
    if count == 0 {
        eprintln!("no case matches");
    }
    if failed == 0 && count > 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// The text on one line.
fn line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Held by every test that runs a case or asks for its time: there is one watch in a program.
    pub(crate) static ALONE: Mutex<()> = Mutex::new(());

    #[test]
    fn results_panics_and_overruns_are_told_apart() {
        let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let case = |run| Case { name: "x", limit: Duration::from_millis(25), only: None, run };
        let run = |run| run_case(&case(run), 2);
        assert!(matches!(run(|| Ok(())), Some(Ok(()))));
        assert!(matches!(run(|| Err(Stop::Skip("s".into()))), Some(Err(Stop::Skip(_)))));
        assert!(matches!(run(|| panic!("boom")), Some(Err(Stop::Fail(why))) if why.contains("boom")));
        let slow = run(|| wait_until("the end", || Ok(false)));
        assert!(matches!(slow, Some(Err(Stop::Fail(why))) if why.contains("the end") && why.contains("hung")));
    }
}
