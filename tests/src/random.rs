// SPDX-License-Identifier: MIT OR Apache-2.0
//! Random numbers for tests, repeatable by their seed.

use crate::harness::Stop;
use std::time::SystemTime;

/// A small generator of random numbers (xorshift64*, Vigna 2016).
pub struct Random(u64);

impl Random {
    /// The generator that starts with `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    /// The next 64 random bits.
    pub fn word(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    /// A number below `limit`, which is not 0.
    pub fn below(&mut self, limit: usize) -> usize {
        (self.word() % limit as u64) as usize
    }
    /// One of `from`, which is not empty.
    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }
}

/// The seed: from `AXVCPU_SEED`, or else from the clock. It is printed, so that a failure can be repeated.
///
/// # Errors
/// If the variable is not a hexadecimal number.
pub fn seed() -> Result<u64, Stop> {
    let seed = match std::env::var("AXVCPU_SEED") {
        Ok(text) => u64::from_str_radix(text.trim_start_matches("0x"), 16)
            .map_err(|_| Stop::Fail("AXVCPU_SEED is not a hexadecimal number".into()))?,
        Err(_) => SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(1, |time| time.as_nanos() as u64),
    };
    println!("# AXVCPU_SEED={seed:#x}");
    Ok(seed)
}
