// SPDX-License-Identifier: MIT OR Apache-2.0
//! Tests of the emulator, and the machine they run on: pages of RAM and of device memory that behaves like RAM but
//! records each access.

use std::collections::{HashMap, HashSet};
use std::convert::Infallible;

use axvcpu_uapi::addr::GuestPhysAddr;
use axvcpu_uapi::x86::Segment;

use super::{rflags, seg, step, string_io, Bus, Config, CpuState, Error, Exception, Outcome, PortBus};
use crate::x86::paging::{bits, GuestMemory};

mod device;
mod faults;
mod modes;
mod moves;
#[cfg(all(target_arch = "x86_64", target_os = "linux", not(miri)))]
mod native;
mod plain;
mod ports;
mod shortcut;
mod strings;

/// CR4.OSFXSR.
const CR4_OSFXSR: u64 = 1 << 9;

/// Where guests of these tests have their code, RAM and device pages (linear and physical alike).
const CODE: u64 = 0x1000;
const RAM: u64 = 0x20_0000;
const DEVICE: u64 = 0x30_0000;
const STACK: u64 = 0x28_0000;
/// Page tables come from here.
const TABLES: u64 = 0x100_0000;

/// A device access seen by the bus.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Event {
    Read(u64, usize),
    Write(u64, Vec<u8>),
    In(u16, usize),
    Out(u16, Vec<u8>),
}

/// A bus over pages that come into being, zeroed, when first written.
#[derive(Clone, Default)]
struct Machine {
    pages: HashMap<u64, Vec<u8>>,
    devices: HashSet<u64>,
    read_only: HashSet<u64>,
    events: Vec<Event>,
    xmm: [[u8; 16]; 16],
    /// What port reads return, as one counting sequence of bytes.
    port_byte: u8,
    next_table: u64,
    /// Runs before each compare-exchange, so that a test can play another vCPU.
    interference: Option<(u64, u8)>,
}

impl Machine {
    /// RAM, two device pages at [`DEVICE`], and `code` at [`CODE`].
    fn new(code: &[u8]) -> Self {
        let mut machine = Machine { next_table: TABLES, ..Machine::default() };
        machine.poke(CODE, code);
        machine.devices.extend([DEVICE / 4096, DEVICE / 4096 + 1]);
        machine
    }

    fn poke(&mut self, at: u64, data: &[u8]) {
        let (start, end) = (at % 4096, at % 4096 + data.len() as u64);
        if end > 4096 {
            let (low, high) = data.split_at((4096 - start) as usize);
            self.poke(at, low);
            return self.poke(at + low.len() as u64, high);
        }
        let page = self.pages.entry(at / 4096).or_insert_with(|| vec![0; 4096]);
        page[start as usize..end as usize].copy_from_slice(data);
    }

    fn peek(&self, at: u64, length: usize) -> Vec<u8> {
        let mut data = Vec::with_capacity(length);
        while data.len() < length {
            let at = at + data.len() as u64;
            let start = (at % 4096) as usize;
            let count = (length - data.len()).min(4096 - start);
            match self.pages.get(&(at / 4096)) {
                Some(page) => data.extend_from_slice(&page[start..start + count]),
                None => data.resize(data.len() + count, 0xff),
            }
        }
        data
    }

    fn peek_u64(&self, at: u64) -> u64 {
        u64::from_le_bytes(self.peek(at, 8).try_into().unwrap())
    }

    /// Maps a 4 KiB page in four-level tables under `root`, with `flags` at every level.
    fn map(&mut self, root: u64, linear: u64, physical: u64, flags: u64) {
        let mut table = root;
        for shift in [39, 30, 21] {
            let at = table + (linear >> shift & 511) * 8;
            if !self.pages.contains_key(&(at / 4096)) || self.peek_u64(at) & 1 == 0 {
                self.poke(at, &(self.next_table | flags).to_le_bytes());
                self.poke(self.next_table, &[0; 4096]);
                self.next_table += 4096;
            }
            table = self.peek_u64(at) & 0xf_ffff_ffff_f000;
        }
        self.poke(table + (linear >> 12 & 511) * 8, &(physical | flags).to_le_bytes());
    }
}

impl GuestMemory for Machine {
    type Error = Infallible;

    fn read(&mut self, at: GuestPhysAddr, data: &mut [u8]) -> Result<(), Infallible> {
        data.copy_from_slice(&self.peek(at.as_u64(), data.len()));
        Ok(())
    }

    fn compare_exchange(&mut self, at: GuestPhysAddr, width: usize, old: u64, new: u64) -> Result<bool, Infallible> {
        assert_eq!(at.as_u64() % width as u64, 0, "misaligned atomic");
        if let Some((at, byte)) = self.interference.take() {
            self.poke(at, &[byte]);
        }
        if self.peek(at.as_u64(), width) != old.to_le_bytes()[..width] {
            return Ok(false);
        }
        self.poke(at.as_u64(), &new.to_le_bytes()[..width]);
        Ok(true)
    }
}

impl Bus for Machine {
    fn is_ram(&self, at: GuestPhysAddr, write: bool) -> bool {
        let page = at.as_u64() / 4096;
        !(self.devices.contains(&page) || write && self.read_only.contains(&page))
    }

    fn write(&mut self, at: GuestPhysAddr, data: &[u8]) -> Result<(), Infallible> {
        assert!(at.as_u64() % 4096 + data.len() as u64 <= 4096, "a RAM access leaves its page");
        self.poke(at.as_u64(), data);
        Ok(())
    }

    fn mmio_read(&mut self, at: GuestPhysAddr, data: &mut [u8]) -> Result<(), Infallible> {
        assert!(matches!(data.len(), 1 | 2 | 4 | 8));
        assert!(at.as_u64() % 4096 + data.len() as u64 <= 4096, "a device access leaves its page");
        self.events.push(Event::Read(at.as_u64(), data.len()));
        data.copy_from_slice(&self.peek(at.as_u64(), data.len()));
        Ok(())
    }

    fn mmio_write(&mut self, at: GuestPhysAddr, data: &[u8]) -> Result<(), Infallible> {
        assert!(matches!(data.len(), 1 | 2 | 4 | 8));
        assert!(at.as_u64() % 4096 + data.len() as u64 <= 4096, "a device access leaves its page");
        self.events.push(Event::Write(at.as_u64(), data.to_vec()));
        self.poke(at.as_u64(), data);
        Ok(())
    }

    fn xmm_read(&mut self, index: usize) -> Result<[u8; 16], Infallible> {
        Ok(self.xmm[index])
    }

    fn xmm_write(&mut self, index: usize, value: [u8; 16]) -> Result<(), Infallible> {
        self.xmm[index] = value;
        Ok(())
    }
}

impl PortBus for Machine {
    fn port_read(&mut self, port: u16, data: &mut [u8]) -> Result<(), Infallible> {
        self.events.push(Event::In(port, data.len()));
        for byte in data {
            *byte = self.port_byte;
            self.port_byte += 1;
        }
        Ok(())
    }

    fn port_write(&mut self, port: u16, data: &[u8]) -> Result<(), Infallible> {
        self.events.push(Event::Out(port, data.to_vec()));
        Ok(())
    }
}

const DATA: u16 = seg::PRESENT | seg::NON_SYSTEM | seg::READ_WRITE | seg::ACCESSED;
const TEXT: u16 = DATA | seg::CODE;

fn flat(attributes: u16) -> Segment {
    Segment { selector: 0x10, attributes, limit: u32::MAX, base: 0 }
}

/// 64-bit supervisor code at [`CODE`] with paging off in all but name: the walker sees CR0.PG clear, so that linear
/// addresses below 4 GiB are physical ones.
fn long_mode() -> CpuState {
    let mut cpu = CpuState {
        rip: CODE,
        rflags: 2,
        segments: [flat(DATA | seg::BIG); 6],
        cr0: bits::CR0_PE,
        cr4: bits::CR4_PAE | CR4_OSFXSR,
        efer: bits::EFER_LMA | bits::EFER_NXE,
        ..CpuState::default()
    };
    cpu.segments[seg::CS] = flat(TEXT | seg::LONG);
    cpu.gpr[4] = STACK;
    cpu
}

/// Flat 32-bit protected mode without paging.
fn protected_mode() -> CpuState {
    let mut cpu = long_mode();
    cpu.efer = 0;
    cpu.segments[seg::CS] = flat(TEXT | seg::BIG);
    cpu
}

/// Real mode: segments at 0 with 64 KiB limits; code at [`CODE`].
fn real_mode() -> CpuState {
    let mut cpu = long_mode();
    cpu.efer = 0;
    cpu.cr0 = 0;
    cpu.cr4 = CR4_OSFXSR;
    cpu.segments = [Segment { selector: 0, attributes: DATA, limit: 0xffff, base: 0 }; 6];
    cpu.gpr[4] = 0x8000;
    cpu
}

const RETIRED: Outcome = Outcome::Retired { debug_trap: false, interrupt_shadow: false };

fn run(cpu: &mut CpuState, machine: &mut Machine) -> Result<Outcome, Error<Infallible>> {
    step(&Config::default(), cpu, machine, &[])
}

/// Runs `code` in `cpu` and expects it to retire with RIP behind it.
fn retire(cpu: &mut CpuState, code: &[u8]) -> Machine {
    let mut machine = Machine::new(code);
    retire_on(cpu, &mut machine, code);
    machine
}

fn retire_on(cpu: &mut CpuState, machine: &mut Machine, code: &[u8]) {
    machine.poke(CODE, code);
    cpu.rip = CODE;
    assert_eq!(run(cpu, machine).unwrap(), RETIRED, "{code:02x?}");
    assert_eq!(cpu.rip, CODE + code.len() as u64, "{code:02x?}");
}

/// Runs `code` and expects an exception that leaves the state and all memory alone.
fn fault(cpu: &CpuState, machine: &mut Machine, code: &[u8]) -> Exception {
    machine.poke(CODE, code);
    let cpu = CpuState { rip: CODE, ..cpu.clone() };
    let before = machine.clone();
    let mut after = cpu.clone();
    let outcome = run(&mut after, machine).unwrap();
    assert_eq!(after, cpu, "{code:02x?} faulted and changed registers");
    assert_eq!(machine.events, before.events, "{code:02x?} faulted and touched a device");
    for (page, data) in &before.pages {
        let is_table = page * 4096 >= TABLES;
        assert!(is_table || machine.pages[page] == *data, "{code:02x?} faulted and wrote memory");
    }
    match outcome {
        Outcome::Exception(exception) => exception,
        other => panic!("{code:02x?}: {other:?} instead of an exception"),
    }
}
