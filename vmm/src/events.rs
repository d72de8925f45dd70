// SPDX-License-Identifier: MIT OR Apache-2.0
//! The event loop, on the main thread while the vCPUs run on theirs: typed input, signals, the timer, and the end.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use nix::time::{clock_gettime, ClockId as Time};

use crate::control::{Control, Stop};
use crate::device::clock::{Clock, Timed};
use crate::device::lock;
use crate::device::serial::SerialPort;
use crate::error::Error;
use crate::terminal::{EscapeFilter, RawTerminal, Typed, HELP};

/// Signals that end the VM, in the order of their numbers.
const ENDING: [Signal; 4] = [Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTERM];

/// Signals that come through a file descriptor instead of interrupting anything.
#[derive(Debug)]
pub struct Signals(SignalFd);

impl Signals {
    /// Blocks the signals that end the VM, and SIGCONT, for this thread and those it starts later. Signals that the
    /// parent had ignored (as `nohup` does) stay ignored.
    ///
    /// # Errors
    /// [`Error::Host`].
    pub fn block() -> Result<Self, Error> {
        let fail = |errno: Errno| Error::host("take over signals", errno.desc());
        let ignored = ignored_signals();
        let mut set = SigSet::empty();
        for signal in ENDING.into_iter().filter(|signal| ignored >> (*signal as u32 - 1) & 1 == 0) {
            set.add(signal);
        }
        set.add(Signal::SIGCONT);
        set.thread_block().map_err(fail)?;
        SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC).map(Self).map_err(fail)
    }

    fn next(&self) -> Option<Signal> {
        let info = self.0.read_signal().ok()??;
        i32::try_from(info.ssi_signo).ok().and_then(|number| Signal::try_from(number).ok())
    }

    /// Waits until somebody [wakes](Control::wake) the main thread, a signal comes, or `limit` is over. Says whether a signal
    /// that ends the VM has come.
    ///
    /// # Errors
    /// [`Error::Host`] if waiting fails.
    pub fn wait(&self, control: &Control, limit: Option<Duration>) -> Result<bool, Error> {
        // Longer than can be told is as good as for ever.
        let limit = limit.and_then(|limit| PollTimeout::try_from(limit).ok()).unwrap_or(PollTimeout::NONE);
        wait(&[(Source::Wake, control.wake_fd()), (Source::Signal, self.0.as_fd())], limit)?;
        control.clear_wake();
        Ok(std::iter::from_fn(|| self.next()).fold(false, |ends, signal| ends | (signal != Signal::SIGCONT)))
    }
}

/// The mask of ignored signals, bit 0 for signal 1, from the process's status; 0 if it cannot be read.
fn ignored_signals() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}

/// A timer of the host, on the monotonic clock.
#[derive(Clone, Debug)]
pub struct HostTimer(Arc<TimerFd>);

impl HostTimer {
    /// A timer that is not armed.
    ///
    /// # Errors
    /// [`Error::Host`].
    pub fn new() -> Result<Self, Error> {
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, flags);
        timer.map(|timer| Self(Arc::new(timer))).map_err(|errno| Error::host("create a timer", errno.desc()))
    }

    /// Whether it expired since the last call.
    fn take_expired(&self) -> bool {
        self.0.wait().is_ok()
    }
}

impl Clock for HostTimer {
    fn now(&self) -> u64 {
        // The monotonic clock exists on every Linux.
        clock_gettime(Time::CLOCK_MONOTONIC)
            .map_or(0, |time| time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64)
    }

    fn arm(&self, deadline: Option<u64>) {
        let result = match deadline {
            Some(ns) => {
                // Zero would disarm it.
                let ns = ns.max(1);
                let at = TimeSpec::new((ns / 1_000_000_000) as i64, (ns % 1_000_000_000) as i64);
                self.0.set(Expiration::OneShot(at), TimerSetTimeFlags::TFD_TIMER_ABSTIME)
            }
            None => self.0.unset(),
        };
        if let Err(errno) = result {
            tracing::warn!(%errno, "the timer cannot be set");
        }
    }
}

/// The devices that the loop serves.
#[derive(Clone)]
pub struct Served {
    /// The serial port, if there is one.
    pub serial: Option<Arc<Mutex<SerialPort>>>,
    /// A device that waits for times, if there is one, and the timer that tells it.
    pub timer: Option<(HostTimer, Arc<Mutex<dyn Timed>>)>,
}

/// What the loop listens to.
pub struct EventLoop<'a> {
    /// The end.
    pub control: &'a Control,
    /// Devices that are served.
    pub served: Served,
    /// Signals.
    pub signals: &'a Signals,
    /// The terminal, if it is in raw mode.
    pub terminal: Option<RawTerminal>,
    /// Whether standard input goes to the guest.
    pub input: bool,
    /// What was typed and the serial port has not taken yet.
    pub typed: Vec<u8>,
}

/// How long to wait before asking a serial port again that is busy: its output may be blocked by whoever reads it, and this
/// loop must not be, or no signal would be heard.
const BUSY_MS: u16 = 10;

impl EventLoop<'_> {
    /// Runs until the VM stops. The terminal is back in its old mode then.
    ///
    /// # Errors
    /// [`Error::Host`] if waiting fails.
    pub fn run(mut self) -> Result<(), Error> {
        let stdin = io::stdin();
        let mut filter = self.terminal.is_some().then(EscapeFilter::default);
        while !self.control.is_stopping() {
            let busy = !self.pass_on();
            let mut descriptors: Vec<(Source, BorrowedFd<'_>)> =
                vec![(Source::Wake, self.control.wake_fd()), (Source::Signal, self.signals.0.as_fd())];
            if let Some((timer, _)) = &self.served.timer {
                descriptors.push((Source::Timer, timer.0.as_fd()));
            }
            if self.input && self.typed.is_empty() {
                descriptors.push((Source::Input, stdin.as_fd()));
            }
            let ready = wait(&descriptors, if busy { BUSY_MS.into() } else { PollTimeout::NONE })?;
            for source in ready {
                match source {
                    Source::Wake => self.control.clear_wake(),
                    Source::Signal => self.signal(),
                    Source::Timer => {
                        if let Some((timer, device)) = &self.served.timer {
                            if timer.take_expired() {
                                lock(device).expire();
                            }
                        }
                    }
                    Source::Input => self.read_input(filter.as_mut()),
                }
            }
        }
        Ok(())
    }

    fn signal(&self) {
        while let Some(signal) = self.signals.next() {
            if signal != Signal::SIGCONT {
                self.control.stop(Stop::Signal(signal));
            } else if let Some(terminal) = &self.terminal {
                // Whoever had the terminal meanwhile has changed it.
                let _ = terminal.apply();
            }
        }
    }

    /// Gives the serial port what was typed, as far as it has room; what is left waits until it says that it has. Says
    /// whether the port could be asked.
    fn pass_on(&mut self) -> bool {
        if self.typed.is_empty() {
            return true;
        }
        let Some(serial) = &self.served.serial else {
            self.typed.clear();
            return true;
        };
        let Ok(mut serial) = serial.try_lock() else { return false };
        while !self.typed.is_empty() && serial.room() > 0 {
            let count = serial.room().min(self.typed.len());
            let rest = self.typed.split_off(count);
            serial.input(&self.typed);
            self.typed = rest;
        }
        true
    }

    fn read_input(&mut self, filter: Option<&mut EscapeFilter>) {
        let mut buffer = [0; 512];
        // Not through the standard library's buffer: poll would not see what is in there.
        let count = match nix::unistd::read(io::stdin(), &mut buffer).map_err(io::Error::from) {
            Ok(0) => {
                // The guest's console just gets no more input.
                self.input = false;
                return;
            }
            Ok(count) => count,
            Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => return,
            Err(error) => {
                tracing::debug!(%error, "standard input failed");
                self.input = false;
                return;
            }
        };
        let typed = match filter {
            Some(filter) => filter.filter(&buffer[..count]),
            None => vec![Typed::Input(buffer[..count].to_vec())],
        };
        for item in typed {
            match item {
                Typed::Input(bytes) => self.typed.extend_from_slice(&bytes),
                Typed::Quit => self.control.stop(Stop::Quit),
                Typed::Help => eprint!("{HELP}"),
            }
        }
    }
}

#[derive(Clone, Copy)]
enum Source {
    Wake,
    Signal,
    Timer,
    Input,
}

/// Waits until something can be read or the time is over, and says what.
fn wait(descriptors: &[(Source, BorrowedFd<'_>)], timeout: PollTimeout) -> Result<Vec<Source>, Error> {
    let mut polled: Vec<PollFd<'_>> =
        descriptors.iter().map(|(_, descriptor)| PollFd::new(*descriptor, PollFlags::POLLIN)).collect();
    match poll(&mut polled, timeout) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(errno) => return Err(Error::host("wait for events", errno.desc())),
    }
    // Hang-ups and errors count: the read that follows finds out.
    let ready = polled.iter().map(|poll| poll.revents().is_some_and(|events| !events.is_empty()));
    Ok(descriptors.iter().zip(ready).filter(|(_, ready)| *ready).map(|((source, _), _)| *source).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_timer_expires_at_its_deadline() {
        let timer = HostTimer::new().unwrap();
        assert!(!timer.take_expired());
        let deadline = timer.now() + 2_000_000;
        timer.arm(Some(deadline));
        wait(&[(Source::Timer, timer.0.as_fd())], PollTimeout::NONE).unwrap();
        assert!(timer.now() >= deadline && timer.take_expired() && !timer.take_expired());
        timer.arm(Some(0));
        wait(&[(Source::Timer, timer.0.as_fd())], PollTimeout::NONE).unwrap();
        assert!(timer.take_expired(), "a deadline in the past is due at once");
        timer.arm(Some(timer.now() + 3_600_000_000_000));
        timer.arm(None);
        assert!(!timer.take_expired());
    }

    #[test]
    fn status_file_tells_ignored_signals() {
        // The Rust runtime ignores SIGPIPE, number 13.
        assert_eq!(ignored_signals() >> 12 & 1, 1);
    }
}
