// SPDX-License-Identifier: MIT OR Apache-2.0
//! Executes one guest instruction in userspace: what a VMM does when a guest touches an address that is no memory.
//!
//! The hypervisor leaves the guest at the instruction, not yet executed. [`step`] fetches it (or takes the bytes the
//! CPU recorded), decodes it with `iced-x86`, and carries it out on a [`CpuState`] and a [`Bus`] with the results
//! the processor would give: registers, flags, memory, device accesses, or a guest exception. [`string_io()`] does the
//! same for INS and OUTS. Nothing here knows how the VMM obtained the state; any VMM can use it.
//!
//! Rules kept throughout:
//! - Every operand is translated and checked before the first byte is read from a device or written anywhere, so an
//!   instruction that faults has had no effect. Of a repeated string instruction this holds for each iteration;
//!   those before the faulting one stay done, as on hardware.
//! - An access that does not leave its page reaches a device as one access of the operand's size (16 bytes as two
//!   of 8, low half first). One that crosses into another page is carried out part by part, each part on RAM or
//!   device as its page says, device parts in naturally aligned pieces.
//! - LOCK on RAM is atomic towards other vCPUs for naturally aligned operands of up to 8 bytes. Locked operands that
//!   cross pages, and CMPXCHG16B on RAM, are not.
//! - What it cannot do is [`Error::Unsupported`], with bytes and disassembly, never a guess.
//!
//! Not modelled: data breakpoints (DR7), VEX and EVEX vector moves, MMX registers, loads of segment registers in
//! protected mode.
//!
//! | file | owns |
//! |---|---|
//! | `state.rs` | the CPU state handed in and out, register access |
//! | `exception.rs` | guest exceptions |
//! | `fetch.rs` | instruction bytes and decoding |
//! | `operand.rs` | effective addresses, segment checks, operand access |
//! | `memory.rs` | linear accesses: translation, page crossing, RAM or device |
//! | `alu.rs`, `shift.rs` | results and flags as pure functions |
//! | `exec.rs` | dispatch, integer arithmetic |
//! | `bits.rs`, `data.rs`, `stack.rs`, `sse.rs`, `string.rs` | instruction classes |
//! | `string_io.rs` | INS and OUTS |
//! | `plain.rs` | the plain moves, decoded by themselves |
//! | `shortcut.rs` | moves to and from devices that come again |

use std::fmt;

use iced_x86::Instruction;

use crate::x86::paging::{GuestMemory, PagingState};
use axvcpu_uapi::addr::GuestPhysAddr;

mod alu;
mod bits;
mod data;
mod exception;
mod exec;
mod fetch;
mod memory;
mod operand;
mod plain;
mod shift;
mod shortcut;
mod sse;
mod stack;
mod state;
mod string;
mod string_io;
#[cfg(test)]
mod tests;

pub use exception::Exception;
pub use shortcut::{Fault, Shortcuts};
pub use state::{rflags, seg, CpuState};
pub use string_io::{string_io, Direction, PortBus, StringIo};

/// Guest RAM, devices and vector registers, supplied by the VMM.
pub trait Bus: GuestMemory {
    /// Whether a read (or, with `write`, a write) at `at` goes to RAM rather than to a device. The answer must hold
    /// for the whole 4 KiB page. Memory the guest may read but not write, such as a ROM, is RAM for reads only.
    fn is_ram(&self, at: GuestPhysAddr, write: bool) -> bool;

    /// Writes `data` to RAM at `at`; the range lies in one page. A naturally aligned write of 2, 4 or 8 bytes should
    /// be a single access, since other vCPUs may look on.
    ///
    /// # Errors
    /// The memory cannot be written by the host.
    fn write(&mut self, at: GuestPhysAddr, data: &[u8]) -> Result<(), Self::Error>;

    /// Reads 1, 2, 4 or 8 bytes (`data.len()`) from the device at `at`, in little-endian order. The address need not
    /// be aligned. (A part of an access that crosses pages has one of these sizes, too.) Where no device answers, the
    /// VMM fills in all ones.
    ///
    /// # Errors
    /// The VMM cannot go on; the instruction is then not finished, and the error comes back as [`Error::Bus`].
    fn mmio_read(&mut self, at: GuestPhysAddr, data: &mut [u8]) -> Result<(), Self::Error>;

    /// Writes 1, 2, 4 or 8 bytes to the device at `at`.
    ///
    /// # Errors
    /// As for [`Bus::mmio_read`].
    fn mmio_write(&mut self, at: GuestPhysAddr, data: &[u8]) -> Result<(), Self::Error>;

    /// The low 128 bits of vector register `index` (0 to 15), little endian. Asked for only by SSE instructions, so
    /// that a VMM need not fetch the FPU state on other exits.
    ///
    /// # Errors
    /// The state cannot be had.
    fn xmm_read(&mut self, index: usize) -> Result<[u8; 16], Self::Error>;

    /// Sets the low 128 bits of vector register `index`; the bits above keep their value.
    ///
    /// # Errors
    /// The state cannot be set.
    fn xmm_write(&mut self, index: usize, value: [u8; 16]) -> Result<(), Self::Error>;
}

/// Properties of the virtual CPU that are not part of its state.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Physical address width in CPUID 8000_0008h EAX bits 7:0: 32 to 52.
    pub phys_bits: u8,
    /// Whether CPUID shows 1 GiB pages (8000_0001h EDX bit 26).
    pub gib_pages: bool,
    /// Iterations of a repeated string instruction done in one call, so that interrupts, signals and other devices
    /// get their turn. At least 1; 0 counts as 1.
    pub rep_limit: u32,
}

impl Default for Config {
    /// 48 address bits, 1 GiB pages, 1024 iterations.
    fn default() -> Self {
        Config { phys_bits: 48, gib_pages: true, rep_limit: 1024 }
    }
}

/// What became of the instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is done; RIP is past it (or at the branch target).
    Retired {
        /// RFLAGS.TF was set: the guest is due a #DB trap with DR6.BS, after the registers have been written back.
        debug_trap: bool,
        /// Interrupts and debug traps stay blocked for one more instruction (a load of SS). If `false`, an interrupt
        /// shadow that was in force before is over.
        interrupt_shadow: bool,
    },
    /// RIP is still at the instruction, and running it again (here or in the guest) goes on where this call stopped:
    /// a repeated string instruction reached [`Config::rep_limit`], or another vCPU changed the memory a locked
    /// instruction was about to replace.
    Unfinished {
        /// RFLAGS.TF was set: the processor traps after each iteration.
        debug_trap: bool,
    },
    /// The guest gets this exception at the RIP in the state. Of a repeated string instruction the iterations
    /// before the faulting one are done.
    Exception(Exception),
}

/// Why the emulator gave up. The state is as before the call, except that finished iterations of a repeated string
/// instruction are done.
#[derive(Debug)]
pub enum Error<E> {
    /// An instruction the emulator does not know, or one that is no instruction.
    Unsupported(Unsupported),
    /// RIP lies in memory that belongs to a device.
    FetchFromDevice {
        /// The guest's instruction pointer.
        rip: u64,
        /// The physical address it leads to.
        at: GuestPhysAddr,
    },
    /// The exit's description (port, width, direction) does not fit the instruction at RIP.
    ExitMismatch(Unsupported),
    /// The bus failed; carries the VMM's own error.
    Bus(E),
}

/// An instruction that could not be carried out, ready to be shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unsupported {
    /// RIP, an offset in the code segment.
    pub rip: u64,
    /// The instruction's bytes; if it could not be decoded, all that were there, at most 15.
    pub bytes: Vec<u8>,
    /// Its text in Intel syntax, or `(bad)`.
    pub disassembly: String,
}

impl fmt::Display for Unsupported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` at rip {:#x} (bytes", self.disassembly, self.rip)?;
        for byte in &self.bytes {
            write!(f, " {byte:02x}")?;
        }
        f.write_str(")")
    }
}

impl<E: fmt::Display> fmt::Display for Error<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Unsupported(what) => write!(f, "cannot emulate {what}"),
            Error::FetchFromDevice { rip, at } => {
                write!(f, "the guest executes device memory: rip {rip:#x} is physical address {at}")
            }
            Error::ExitMismatch(what) => write!(f, "the string I/O exit does not describe {what}"),
            Error::Bus(error) => error.fmt(f),
        }
    }
}

impl<E: std::error::Error + 'static> std::error::Error for Error<E> {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::Bus(error) => error.source(),
            _ => None,
        }
    }
}

/// Why an instruction stopped short, inside the emulator.
enum Stop<E> {
    /// The guest gets an exception.
    Exception(Exception),
    /// No code for this instruction.
    Unsupported,
    /// As [`Error::ExitMismatch`].
    Mismatch,
    /// As [`Error::FetchFromDevice`].
    FetchFromDevice(GuestPhysAddr),
    /// Locked memory changed under us; nothing was written.
    Raced,
    /// The bus failed.
    Bus(E),
}

impl<E> From<Exception> for Stop<E> {
    fn from(exception: Exception) -> Self {
        Stop::Exception(exception)
    }
}

/// How an instruction ended when nothing stopped it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Done {
    /// Retired; the flag says whether it opens an interrupt shadow.
    Retired { interrupt_shadow: bool },
    /// A repeated instruction with iterations left.
    Unfinished,
}

impl Done {
    const PLAIN: Done = Done::Retired { interrupt_shadow: false };
}

/// One instruction under execution: a working copy of the state, which replaces the caller's when it succeeds.
struct Exec<'a, B: Bus> {
    cpu: CpuState,
    bus: &'a mut B,
    config: &'a Config,
    insn: Instruction,
}

impl<B: Bus> Exec<'_, B> {
    fn paging(&self) -> PagingState {
        PagingState {
            cr0: self.cpu.cr0,
            cr3: self.cpu.cr3,
            cr4: self.cpu.cr4,
            efer: self.cpu.efer,
            cpl: self.cpu.cpl,
            ac: self.cpu.rflags & rflags::AC != 0,
            phys_bits: self.config.phys_bits,
            gib_pages: self.config.gib_pages,
        }
    }
}

/// Executes the instruction at RIP.
///
/// `bytes` are the instruction's bytes if the CPU recorded them at the exit (AMD decode assists), else empty; if they
/// are too few the rest is fetched through the guest's page tables.
///
/// # Errors
/// See [`Error`]. The guest has then not been given an exception, and cannot go on.
///
/// # Examples
/// A guest without paging stores to a device, and its bus sees the access:
/// ```
/// use axvcpu_uapi::addr::GuestPhysAddr;
/// use axvmm::x86::emulate::{seg, step, Bus, Config, CpuState, Outcome};
/// use axvmm::x86::paging::GuestMemory;
///
/// /// A register at any address, and no RAM.
/// struct Register(Vec<u8>);
///
/// impl GuestMemory for Register {
///     type Error = std::convert::Infallible;
///     fn read(&mut self, _: GuestPhysAddr, data: &mut [u8]) -> Result<(), Self::Error> {
///         data.fill(0xff);
///         Ok(())
///     }
///     fn compare_exchange(&mut self, _: GuestPhysAddr, _: usize, _: u64, _: u64) -> Result<bool, Self::Error> {
///         Ok(true)
///     }
/// }
///
/// impl Bus for Register {
///     fn is_ram(&self, _: GuestPhysAddr, _: bool) -> bool {
///         false
///     }
///     fn write(&mut self, _: GuestPhysAddr, _: &[u8]) -> Result<(), Self::Error> {
///         Ok(())
///     }
///     fn mmio_read(&mut self, _: GuestPhysAddr, data: &mut [u8]) -> Result<(), Self::Error> {
///         data.copy_from_slice(&self.0[..data.len()]);
///         Ok(())
///     }
///     fn mmio_write(&mut self, _: GuestPhysAddr, data: &[u8]) -> Result<(), Self::Error> {
///         self.0 = data.to_vec();
///         Ok(())
///     }
///     fn xmm_read(&mut self, _: usize) -> Result<[u8; 16], Self::Error> {
///         Ok([0; 16])
///     }
///     fn xmm_write(&mut self, _: usize, _: [u8; 16]) -> Result<(), Self::Error> {
///         Ok(())
///     }
/// }
///
/// let mut cpu = CpuState { rflags: 2, ..CpuState::default() };
/// cpu.segments[seg::DS].limit = 0xffff;
/// cpu.gpr[0] = 0x1234;
/// let mut bus = Register(Vec::new());
/// let code = [0xa3, 0x00, 0x40]; // real mode: mov [0x4000], ax
/// let outcome = step(&Config::default(), &mut cpu, &mut bus, &code)?;
/// assert_eq!(outcome, Outcome::Retired { debug_trap: false, interrupt_shadow: false });
/// assert_eq!((bus.0, cpu.rip), (vec![0x34, 0x12], 3));
/// # Ok::<(), axvmm::x86::emulate::Error<std::convert::Infallible>>(())
/// ```
pub fn step<B: Bus>(
    config: &Config,
    cpu: &mut CpuState,
    bus: &mut B,
    bytes: &[u8],
) -> Result<Outcome, Error<B::Error>> {
    run(config, cpu, bus, bytes, Exec::execute)
}

/// Fetches, decodes, lets `execute` do the instruction, and turns the result into an outcome.
fn run<'b, B: Bus>(
    config: &'b Config,
    cpu: &mut CpuState,
    bus: &'b mut B,
    bytes: &[u8],
    execute: impl FnOnce(&mut Exec<'b, B>) -> Result<Done, Stop<B::Error>>,
) -> Result<Outcome, Error<B::Error>> {
    let rip = cpu.rip;
    let trap = cpu.rflags & rflags::TF != 0;
    let mut exec = Exec { cpu: cpu.clone(), bus, config, insn: Instruction::default() };
    let mut code = fetch::Code::new(bytes);
    let result = exec.decode(&mut code).and_then(|()| execute(&mut exec));
    match result {
        Ok(Done::Retired { interrupt_shadow }) => {
            exec.cpu.rflags &= !rflags::RF;
            *cpu = exec.cpu;
            Ok(Outcome::Retired { debug_trap: trap && !interrupt_shadow, interrupt_shadow })
        }
        Ok(Done::Unfinished) => {
            *cpu = exec.cpu;
            Ok(Outcome::Unfinished { debug_trap: trap })
        }
        // The classes change the working copy only after the last thing that can stop them; string instructions
        // after each iteration. So it may be taken over as it is.
        Err(stop) => {
            *cpu = exec.cpu;
            cpu.rip = rip;
            match stop {
                Stop::Exception(exception) => Ok(Outcome::Exception(exception)),
                Stop::Raced => Ok(Outcome::Unfinished { debug_trap: false }),
                Stop::Unsupported => Err(Error::Unsupported(code.describe(&exec.insn, rip))),
                Stop::Mismatch => Err(Error::ExitMismatch(code.describe(&exec.insn, rip))),
                Stop::FetchFromDevice(at) => Err(Error::FetchFromDevice { rip, at }),
                Stop::Bus(error) => Err(Error::Bus(error)),
            }
        }
    }
}
