// SPDX-License-Identifier: MIT OR Apache-2.0
//! The clock: vm-superio's PL031 (Arm DDI 0224) on the bus. Its alarm does not interrupt.

use vm_superio::rtc_pl031::{NoEvents, Rtc};

use crate::device::Device;

/// The clock's registers.
pub struct Clock(Rtc<NoEvents>);

impl Clock {
    /// A clock that shows the host's time.
    #[must_use]
    pub fn new() -> Self {
        Self(Rtc::new())
    }
}

impl Default for Clock {
    fn default() -> Self {
        Self::new()
    }
}

impl Device for Clock {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        // Registers are 32 bits wide. Narrower reads see a part of one, wider ones see one and zeros.
        let mut word = [0; 4];
        self.0.read((offset & !3) as u16, &mut word);
        data.fill(0);
        for (byte, value) in data.iter_mut().zip(word.iter().skip((offset & 3) as usize)) {
            *byte = *value;
        }
    }
    fn write(&mut self, offset: u64, data: &[u8]) {
        // Only whole registers can be written.
        if let (0, Ok(word)) = (offset & 3, data.try_into()) {
            self.0.write(offset as u16, word);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{SystemTime, UNIX_EPOCH};

    fn read(clock: &mut Clock, offset: u64) -> u32 {
        let mut word = [0; 4];
        clock.read(offset, &mut word);
        u32::from_le_bytes(word)
    }

    #[test]
    fn it_shows_the_hosts_time_until_it_is_set() {
        let mut clock = Clock::new();
        let host = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() as u32;
        assert!(read(&mut clock, 0).abs_diff(host) <= 1);
        clock.write(8, &1000u32.to_le_bytes());
        assert!(read(&mut clock, 0).abs_diff(1000) <= 1);
        clock.write(8, &[1, 2]);
        assert!(read(&mut clock, 0).abs_diff(1000) <= 1, "half a register is not written");
    }

    #[test]
    fn the_identification_of_a_pl031_reads_in_every_width() {
        let mut clock = Clock::new();
        let id: Vec<u32> = (0..8).map(|i| read(&mut clock, 0xfe0 + 4 * i)).collect();
        assert_eq!(id, [0x31, 0x10, 0x04, 0x00, 0x0d, 0xf0, 0x05, 0xb1]);
        let (mut byte, mut double) = ([0xff], [0xff; 8]);
        clock.read(0xff5, &mut byte);
        clock.read(0xff0, &mut double);
        assert_eq!((byte, double), ([0], [0x0d, 0, 0, 0, 0, 0, 0, 0]));
    }
}
