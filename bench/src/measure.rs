// SPDX-License-Identifier: MIT OR Apache-2.0
//! Taking samples. The unit is the tick of the host's counter (the time-stamp counter on x86), which under QEMU's
//! `-icount shift=0` and under Bochs is one instruction of the host CPU, whoever executes it; idle time counts too.

use std::thread;
use std::time::Duration;

pub(crate) use crate::arch::ticks;
use crate::machine::Result;

/// How many samples of how many turns.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Effort {
    /// Samples.
    pub(crate) samples: usize,
    /// What the usual number of turns is divided by.
    pub(crate) divisor: u64,
}

impl Effort {
    /// What a published table takes, or a first look.
    pub(crate) const fn new(quick: bool) -> Self {
        if quick {
            Self { samples: 3, divisor: 3 }
        } else {
            Self { samples: 5, divisor: 1 }
        }
    }

    /// `usual` turns or fewer, at least one.
    pub(crate) fn turns(self, usual: u64) -> u64 {
        (usual / self.divisor).max(1)
    }
}

/// Takes samples after one that warms up and does not count.
///
/// # Errors
/// The first of a sample.
pub(crate) fn samples(effort: Effort, mut sample: impl FnMut() -> Result<f64>) -> Result<Vec<f64>> {
    // What has piled up since the last row is done in idle time.
    thread::sleep(Duration::from_millis(100));
    sample()?;
    (0..effort.samples).map(|_| sample()).collect()
}

/// The middle one; of an even number the mean of both in the middle. `None` without values.
pub(crate) fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let upper = *sorted.get(sorted.len() / 2)?;
    let lower = *sorted.get((sorted.len() - 1) / 2)?;
    Some((lower + upper) / 2.0)
}

#[cfg(test)]
mod tests {
    use super::median;

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[7.0]), Some(7.0));
        assert_eq!(median(&[9.0, 1.0, 4.0]), Some(4.0));
        assert_eq!(median(&[9.0, 1.0, 4.0, 2.0]), Some(3.0));
    }
}
