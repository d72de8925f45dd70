// SPDX-License-Identifier: MIT OR Apache-2.0
//! Interrupt lines, as a device sees them: what leads where is the interrupt controllers' business.

use std::sync::Arc;

/// Interrupt controllers with numbered lines.
pub trait Lines: Send + Sync {
    /// Sets the level of line `number`.
    fn set(&self, number: u32, level: bool);
}

/// An interrupt line of a device.
#[derive(Clone)]
pub struct Line {
    lines: Arc<dyn Lines>,
    number: u32,
}

impl Line {
    /// Line `number` of `lines`.
    #[must_use]
    pub fn new<L: Lines + 'static>(lines: &Arc<L>, number: impl Into<u32>) -> Self {
        Self { lines: Arc::clone(lines) as Arc<dyn Lines>, number: number.into() }
    }

    /// Sets the level.
    pub fn set(&self, level: bool) {
        self.lines.set(self.number, level);
    }

    /// One edge: up, and down again.
    pub fn pulse(&self) {
        self.set(true);
        self.set(false);
    }
}

impl vm_superio::Trigger for Line {
    type E = std::convert::Infallible;
    fn trigger(&self) -> Result<(), Self::E> {
        self.pulse();
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::sync::Mutex;

    /// Remembers the line numbers of rising edges.
    #[derive(Default)]
    pub(crate) struct Edges(Mutex<(Vec<u32>, Vec<u32>)>);

    impl Edges {
        pub(crate) fn seen(&self) -> Vec<u32> {
            self.0.lock().unwrap().1.clone()
        }
    }

    impl Lines for Edges {
        fn set(&self, number: u32, level: bool) {
            let (high, seen) = &mut *self.0.lock().unwrap();
            let was_high = high.contains(&number);
            high.retain(|other| *other != number);
            if level {
                high.push(number);
                if !was_high {
                    seen.push(number);
                }
            }
        }
    }

    #[test]
    fn a_pulse_is_one_edge() {
        let edges = Arc::new(Edges::default());
        let line = Line::new(&edges, 7u8);
        line.pulse();
        line.set(true);
        line.set(true);
        Line::new(&edges, 9u8).pulse();
        assert_eq!(edges.seen(), [7, 7, 9]);
    }
}
