// SPDX-License-Identifier: MIT OR Apache-2.0
//! INS and OUTS, which the hypervisor hands up undone: memory on one side, a port on the other.

use iced_x86::Mnemonic;

use super::memory::{low_half, MAX_OPERAND};
use super::string::Until;
use super::{run, Bus, Config, CpuState, Done, Error, Exec, Outcome, Stop};
use crate::x86::paging::Access;

/// A bus that has I/O ports, too.
pub trait PortBus: Bus {
    /// Reads 1, 2 or 4 bytes (`data.len()`) from `port`, little endian. Where no device answers: all ones.
    ///
    /// # Errors
    /// The VMM cannot go on.
    fn port_read(&mut self, port: u16, data: &mut [u8]) -> Result<(), Self::Error>;

    /// Writes 1, 2 or 4 bytes to `port`.
    ///
    /// # Errors
    /// The VMM cannot go on.
    fn port_write(&mut self, port: u16, data: &[u8]) -> Result<(), Self::Error>;
}

/// Which way string I/O goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// INS: port to memory.
    In,
    /// OUTS: memory to port.
    Out,
}

/// What the exit says of the instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StringIo {
    /// The port, as in DX.
    pub port: u16,
    /// Bytes per element: 1, 2 or 4.
    pub width: u8,
    /// Direction.
    pub direction: Direction,
}

/// Executes the INS or OUTS at RIP, with its repetitions up to [`Config::rep_limit`], as [`super::step`] does for
/// other instructions. The processor has checked the guest's right to the port before it exited.
///
/// # Errors
/// As for [`super::step`]; [`Error::ExitMismatch`] if the instruction at RIP is not the one `io` describes.
pub fn string_io<B: PortBus>(
    config: &Config,
    cpu: &mut CpuState,
    bus: &mut B,
    io: StringIo,
    bytes: &[u8],
) -> Result<Outcome, Error<B::Error>> {
    run(config, cpu, bus, bytes, |exec| exec.string_io(io))
}

impl<B: PortBus> Exec<'_, B> {
    fn string_io(&mut self, io: StringIo) -> Result<Done, Stop<B::Error>> {
        let (direction, width) = match self.insn.mnemonic() {
            Mnemonic::Insb => (Direction::In, 1),
            Mnemonic::Insw => (Direction::In, 2),
            Mnemonic::Insd => (Direction::In, 4),
            Mnemonic::Outsb => (Direction::Out, 1),
            Mnemonic::Outsw => (Direction::Out, 2),
            Mnemonic::Outsd => (Direction::Out, 4),
            _ => return Err(Stop::Mismatch),
        };
        let port = self.cpu.gpr[2] as u16;
        if (StringIo { port, width, direction }) != io {
            return Err(Stop::Mismatch);
        }
        let size = usize::from(width);
        self.repeat(Until::CountIsZero, |exec| {
            let mut data = [0; MAX_OPERAND];
            match direction {
                Direction::In => {
                    let target = exec.string_target(size, Access::Write)?;
                    exec.bus.port_read(port, &mut data[..size]).map_err(Stop::Bus)?;
                    exec.write_value(&target, low_half(&data))?;
                    exec.advance_target(size);
                }
                Direction::Out => {
                    let source = exec.string_source(size)?;
                    exec.read(&source, &mut data)?;
                    exec.bus.port_write(port, &data[..size]).map_err(Stop::Bus)?;
                    exec.advance_source(size);
                }
            }
            Ok(())
        })
    }
}
