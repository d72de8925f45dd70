// SPDX-License-Identifier: MIT OR Apache-2.0
//! The serial port: vm-superio's 16550 on the bus, with input that waits until the guest has room for it.
//!
//! Two things are corrected on the way. vm-superio forgets that received data wait once the guest has read the interrupt
//! identification; hardware goes on reporting them, and drivers that read in portions (Linux) rely on it. And as long as the
//! guest has not switched the FIFO on it gets one byte at a time, each with an interrupt of its own.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use vm_superio::serial::SerialEvents;
use vm_superio::Serial;

use super::line::Line;
use super::Device;
use crate::control::Control;
use crate::terminal::Output;

/// Register offsets: interrupt enable; interrupt identification (read) and FIFO control (write).
const IER: u64 = 1;
const IIR_FCR: u64 = 2;
/// Interrupt enable: received data.
const IER_RECEIVED: u8 = 1 << 0;
/// Interrupt identification: none pending; received data.
const IIR_NONE: u8 = 1 << 0;
const IIR_RECEIVED: u8 = 1 << 2;
/// FIFO control: on.
const FCR_ENABLE: u8 = 1 << 0;
/// Size of vm-superio's FIFO.
const FIFO: usize = 64;

/// Input bytes that wait for the guest, at most; more is left with the terminal.
const MAX_WAITING: usize = 4096;

/// Tells the event loop that the guest emptied the receive buffer.
struct Drained {
    control: Arc<Control>,
    flag: Arc<AtomicBool>,
}

impl SerialEvents for Drained {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        self.flag.store(true, Ordering::Relaxed);
    }
}

impl io::Write for Output {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.put(data);
        Ok(data.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The serial port.
pub struct SerialPort {
    uart: Serial<Line, Drained, Output>,
    waiting: VecDeque<u8>,
    /// Whether the guest has switched the FIFO on.
    fifo: bool,
    drained: Arc<AtomicBool>,
    control: Arc<Control>,
}

impl SerialPort {
    /// A port that writes to `output` and interrupts by `line`.
    #[must_use]
    pub fn new(line: Line, output: Output, control: &Arc<Control>) -> Self {
        let drained = Arc::new(AtomicBool::new(false));
        let events = Drained { control: Arc::clone(control), flag: Arc::clone(&drained) };
        let uart = Serial::with_events(line, events, output);
        Self { uart, waiting: VecDeque::new(), fifo: false, drained, control: Arc::clone(control) }
    }

    /// Input bytes that are welcome now.
    #[must_use]
    pub fn room(&self) -> usize {
        MAX_WAITING.saturating_sub(self.waiting.len())
    }

    /// Gives the guest input. Bytes beyond [`room`](Self::room) are lost.
    pub fn input(&mut self, data: &[u8]) {
        let count = data.len().min(self.room());
        self.waiting.extend(&data[..count]);
        self.feed();
    }

    /// Moves what fits into the receive buffer.
    fn feed(&mut self) {
        loop {
            let free = if self.fifo { self.uart.fifo_capacity() } else { usize::from(!self.has_received()) };
            let (front, _) = self.waiting.as_slices();
            let count = free.min(front.len());
            if count == 0 {
                break;
            }
            match self.uart.enqueue_raw_bytes(&front[..count]) {
                // In loopback mode the line is cut: wait until it is back.
                Ok(0) | Err(_) => break,
                Ok(count) => drop(self.waiting.drain(..count)),
            }
        }
    }

    /// Whether the receive buffer holds anything.
    fn has_received(&self) -> bool {
        self.uart.fifo_capacity() < FIFO
    }

    fn read_register(&mut self, register: u64) -> u8 {
        let value = self.uart.read(register as u8);
        if register == IIR_FCR && self.has_received() && self.uart.read(IER as u8) & IER_RECEIVED != 0 {
            return (value & !IIR_NONE) | IIR_RECEIVED;
        }
        value
    }

    /// After an access: if the guest has read all there was, the next bytes come.
    fn after_access(&mut self) {
        if self.drained.swap(false, Ordering::Relaxed) && !self.waiting.is_empty() {
            let had_room = self.room() > 0;
            self.feed();
            if !had_room && self.room() > 0 {
                // The event loop stopped reading the terminal.
                self.uart.events().control.wake();
            }
        }
    }
}

impl Device for SerialPort {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        super::read_bytes(offset, data, |register| self.read_register(register));
        self.after_access();
    }
    fn write(&mut self, offset: u64, data: &[u8]) {
        for (register, value) in (offset..).zip(data) {
            if register == IIR_FCR {
                self.fifo = value & FCR_ENABLE != 0;
            }
            // Output never fails, and an interrupt neither; a full buffer in loopback mode is as on hardware.
            let _ = self.uart.write(register as u8, *value);
        }
        // The guest may have left loopback mode, which kept input out.
        self.feed();
        self.after_access();
    }
}

impl std::fmt::Debug for SerialPort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SerialPort")
            .field("waiting", &self.waiting.len())
            .field("stopping", &self.control.is_stopping())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::line::tests::Edges;
    use crate::device::lock;
    use std::sync::Mutex;

    fn port() -> (SerialPort, Arc<Mutex<Vec<u8>>>, Arc<Edges>) {
        let edges = Arc::new(Edges::default());
        let (output, written) = Output::memory();
        let control = Arc::new(Control::new().unwrap());
        (SerialPort::new(Line::new(&edges, 4u8), output, &control), written, edges)
    }

    fn read(port: &mut SerialPort, register: u64) -> u8 {
        let mut byte = [0];
        port.read(register, &mut byte);
        byte[0]
    }

    #[test]
    fn output_comes_out() {
        let (mut port, written, _) = port();
        for byte in b"hello" {
            assert_eq!(read(&mut port, 5) & 0x60, 0x60, "ready to send");
            port.write(0, &[*byte]);
        }
        assert_eq!(*lock(&written), b"hello");
    }

    #[test]
    fn input_interrupts_and_nothing_is_lost() {
        let (mut port, _, edges) = port();
        port.write(1, &[1]);
        port.write(2, &[1]);
        let text: Vec<u8> = (0..=255).cycle().take(1000).collect();
        port.input(&text);
        assert_eq!(edges.seen().len(), 1);
        let mut got = Vec::new();
        while read(&mut port, 5) & 1 != 0 {
            got.push(read(&mut port, 0));
        }
        assert_eq!(got, text);
        assert!(edges.seen().len() >= 1000 / 64, "each refill interrupts");
    }

    #[test]
    fn received_data_are_reported_until_all_are_read() {
        let (mut port, _, _) = port();
        port.write(1, &[1]);
        port.write(2, &[1]);
        port.input(b"x");
        let text: Vec<u8> = (0..=255).cycle().take(999).collect();
        port.input(&text);
        // As Linux does it: read up to 256 bytes, then ask again whether there is more.
        let mut got = Vec::new();
        while read(&mut port, 2) & 1 == 0 {
            for _ in 0..256 {
                if read(&mut port, 5) & 1 == 0 {
                    break;
                }
                got.push(read(&mut port, 0));
            }
        }
        assert_eq!(got, [b"x", &text[..]].concat());
        port.write(1, &[0]);
        port.input(b"y");
        assert_eq!(read(&mut port, 2) & 1, 1, "not while the interrupt is disabled");
    }

    #[test]
    fn without_fifo_each_byte_has_its_interrupt() {
        let (mut port, _, edges) = port();
        port.write(1, &[1]);
        port.input(b"abc");
        for (count, byte) in (1..).zip(b"abc") {
            assert_eq!(edges.seen().len(), count);
            assert_eq!(read(&mut port, 0), *byte);
        }
        assert_eq!(read(&mut port, 5) & 1, 0);
    }

    #[test]
    fn input_is_bounded() {
        let (mut port, _, _) = port();
        port.write(2, &[1]);
        port.input(&[1; 64]);
        assert_eq!(port.room(), MAX_WAITING);
        port.input(&[2; 5000]);
        assert_eq!(port.room(), 0);
        while read(&mut port, 5) & 1 != 0 {
            read(&mut port, 0);
        }
        assert_eq!(port.room(), MAX_WAITING);
    }
}
