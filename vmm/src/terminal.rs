// SPDX-License-Identifier: MIT OR Apache-2.0
//! The user's terminal: raw mode and its undoing, the escape key, and where guest output goes.
//!
//! Raw mode is undone when the [`RawTerminal`] is dropped, and also by [`restore`], which a panic hook calls. Signals
//! that end the program arrive through the event loop, so they take the ordinary way out.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::{Arc, Mutex, Once};

use nix::sys::termios::{self, LocalFlags, OutputFlags, SetArg, Termios};
use nix::unistd;

use crate::device::lock;
use crate::error::{describe_io, Error};

/// What standard input was like before raw mode.
static SAVED: Mutex<Option<Termios>> = Mutex::new(None);

/// The terminal in raw mode, for as long as this lives.
#[derive(Debug)]
pub struct RawTerminal(());

impl RawTerminal {
    /// Puts standard input into raw mode if it is a terminal that this process is in front of, and makes panics undo it.
    ///
    /// # Errors
    /// [`Error::Host`] if the terminal refuses.
    pub fn enter() -> Result<Option<Self>, Error> {
        let stdin = io::stdin();
        let Ok(before) = termios::tcgetattr(&stdin) else { return Ok(None) };
        // A background process would be stopped for changing the terminal of its foreground.
        if unistd::tcgetpgrp(&stdin) != Ok(unistd::getpgrp()) {
            return Ok(None);
        }
        static HOOK: Once = Once::new();
        HOOK.call_once(|| {
            let next = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |info| {
                restore();
                next(info);
            }));
        });
        lock(&SAVED).get_or_insert(before);
        let this = Self(());
        this.apply()?;
        Ok(Some(this))
    }

    /// Sets raw mode again, after somebody else had the terminal (a shell, while the program was stopped).
    ///
    /// # Errors
    /// [`Error::Host`] if the terminal refuses.
    pub fn apply(&self) -> Result<(), Error> {
        let Some(mut raw) = lock(&SAVED).clone() else { return Ok(()) };
        termios::cfmakeraw(&mut raw);
        // Line ends of messages still need their carriage return, and a guest's are not hurt by a second one.
        raw.output_flags.insert(OutputFlags::OPOST | OutputFlags::ONLCR);
        raw.local_flags.remove(LocalFlags::ECHO | LocalFlags::ICANON | LocalFlags::ISIG);
        termios::tcsetattr(io::stdin(), SetArg::TCSADRAIN, &raw)
            .map_err(|errno| Error::host("switch the terminal to raw mode", errno.desc()))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
    }
}

/// Puts the terminal back as it was before raw mode, if it was changed.
pub fn restore() {
    if let Some(before) = lock(&SAVED).take() {
        // If it fails the terminal is gone, and nobody is left to tell.
        let _ = termios::tcsetattr(io::stdin(), SetArg::TCSADRAIN, &before);
    }
}

/// The same from a signal's handler: nothing if somebody has just taken hold of the terminal.
pub(crate) fn restore_unless_busy() {
    if let Ok(saved) = SAVED.try_lock() {
        if let Some(before) = saved.as_ref() {
            let _ = termios::tcsetattr(io::stdin(), SetArg::TCSADRAIN, before);
        }
    }
}

/// What the user typed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Typed {
    /// Bytes for the guest.
    Input(Vec<u8>),
    /// Escape key, then x: end the VM.
    Quit,
    /// Escape key, then h: show help.
    Help,
}

/// The escape key: Ctrl-A.
pub const ESCAPE: u8 = 0x01;

/// Shown for Ctrl-A h.
pub const HELP: &str =
    "\naxvmm: Ctrl-A x  ends the VM\n       Ctrl-A h  shows this\n       Ctrl-A Ctrl-A  sends Ctrl-A to the guest\n";

/// Finds commands in what the user types.
#[derive(Debug, Default)]
pub struct EscapeFilter {
    escaped: bool,
}

impl EscapeFilter {
    /// Takes typed bytes; returns them with commands told apart, in order.
    pub fn filter(&mut self, typed: &[u8]) -> Vec<Typed> {
        let mut result = Vec::new();
        let mut input = Vec::new();
        for &byte in typed {
            if !self.escaped {
                if byte == ESCAPE {
                    self.escaped = true;
                } else {
                    input.push(byte);
                }
                continue;
            }
            self.escaped = false;
            let command = match byte {
                b'x' | b'X' => Typed::Quit,
                b'h' | b'H' | b'?' => Typed::Help,
                ESCAPE | b'a' => {
                    input.push(ESCAPE);
                    continue;
                }
                _ => continue,
            };
            if !input.is_empty() {
                result.push(Typed::Input(std::mem::take(&mut input)));
            }
            result.push(command);
        }
        if !input.is_empty() {
            result.push(Typed::Input(input));
        }
        result
    }
}

/// Where guest output goes. Clones write to the same place. Output that cannot be written is dropped: a guest must not
/// hang because a pipe was closed.
#[derive(Clone)]
pub struct Output {
    sink: Arc<Mutex<dyn Write + Send>>,
}

impl Output {
    /// Standard output, without the line buffer that the standard library puts in front of it.
    ///
    /// # Errors
    /// [`Error::Host`] if it cannot be had.
    pub fn stdout() -> Result<Self, Error> {
        let descriptor = io::stdout()
            .as_fd()
            .try_clone_to_owned()
            .map_err(|error| Error::host("use standard output", describe_io(&error)))?;
        Ok(Self { sink: Arc::new(Mutex::new(File::from(descriptor))) })
    }

    /// A file, appended to.
    ///
    /// # Errors
    /// [`Error::Host`] if it cannot be opened.
    pub fn file(path: &Path) -> Result<Self, Error> {
        let file = OpenOptions::new().append(true).create(true).open(path).map_err(|error| {
            Error::host(format!("write the serial port's output to {}", path.display()), describe_io(&error))
        })?;
        Ok(Self { sink: Arc::new(Mutex::new(file)) })
    }

    /// Memory, for tests and for programs that look at the output themselves.
    #[must_use]
    pub fn memory() -> (Self, Arc<Mutex<Vec<u8>>>) {
        let bytes = Arc::new(Mutex::new(Vec::new()));
        (Self { sink: bytes.clone() }, bytes)
    }

    /// Writes `data`.
    pub fn put(&self, data: &[u8]) {
        let mut sink = lock(&self.sink);
        let mut rest = data;
        while !rest.is_empty() {
            match sink.write(rest) {
                Ok(0) => break,
                Ok(count) => rest = &rest[count..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Somebody else made the terminal non-blocking.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    std::thread::sleep(std::time::Duration::from_millis(1));
                }
                Err(_) => break,
            }
        }
    }
}

impl std::fmt::Debug for Output {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Output")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn input(text: &[u8]) -> Typed {
        Typed::Input(text.to_vec())
    }

    #[test]
    fn commands_are_told_from_input() {
        let mut filter = EscapeFilter::default();
        assert_eq!(filter.filter(b"ls\r\x03"), [input(b"ls\r\x03")]);
        assert_eq!(filter.filter(b"a\x01hb\x01x"), [input(b"a"), Typed::Help, input(b"b"), Typed::Quit]);
        assert_eq!(filter.filter(b"\x01\x01x\x01az"), [input(b"\x01x\x01z")]);
        assert_eq!(filter.filter(b"\x01qx"), [input(b"x")], "unknown commands are swallowed");
    }

    #[test]
    fn a_command_may_come_in_two_pieces() {
        let mut filter = EscapeFilter::default();
        assert_eq!(filter.filter(b"\x01"), []);
        assert_eq!(filter.filter(b"x"), [Typed::Quit]);
    }

    #[test]
    fn restoring_what_was_never_changed_is_harmless() {
        restore();
        restore();
    }

    #[test]
    fn files_are_appended_to_and_errors_name_them() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        for _ in 0..2 {
            Output::file(&path).unwrap().put(b"x");
        }
        assert_eq!(std::fs::read(&path).unwrap(), b"xx");
        let error = Output::file(folder.path()).unwrap_err().to_string();
        assert!(error.contains(&folder.path().display().to_string()), "{error}");
    }
}
