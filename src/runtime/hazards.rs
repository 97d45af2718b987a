//! Which dispatches may run side by side: those that touch no byte that another one writes.

use std::ops::Range;

use super::uses::overlap;

/// What one dispatch does with one span of memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Use {
    /// Tells allocations apart.
    pub(crate) memory: usize,
    pub(crate) range: Range<usize>,
    pub(crate) writes: bool,
}

impl Use {
    fn conflicts(&self, other: &Use) -> bool {
        (self.writes || other.writes)
            && self.memory == other.memory
            && overlap(&self.range, &other.range)
    }
}

/// The uses since the last barrier.
#[derive(Debug, Default)]
pub(crate) struct Hazards(Vec<Use>);

impl Hazards {
    /// Adds a dispatch; true where a barrier must come before it.
    pub(crate) fn add(&mut self, uses: &[Use]) -> bool {
        let barrier = uses
            .iter()
            .any(|new| self.0.iter().any(|old| old.conflicts(new)));
        if barrier {
            self.0.clear();
        }
        self.0.extend_from_slice(uses);
        barrier
    }

    /// How many uses there are since the last barrier.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// Notes a barrier.
    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::{Hazards, Use};

    fn u(memory: usize, range: std::ops::Range<usize>, writes: bool) -> Use {
        Use {
            memory,
            range,
            writes,
        }
    }

    #[test]
    fn reads_run_side_by_side() {
        let mut h = Hazards::default();
        assert!(!h.add(&[u(1, 0..8, false)]));
        assert!(!h.add(&[u(1, 0..8, false)]));
    }

    #[test]
    fn each_kind_of_conflict_needs_a_barrier_and_one_is_enough() {
        for (first, second) in [(true, false), (false, true), (true, true)] {
            let mut h = Hazards::default();
            assert!(!h.add(&[u(1, 0..8, first)]));
            assert!(h.add(&[u(1, 7..9, second)]), "{first} {second}");
            h.clear();
            assert!(!h.add(&[u(1, 7..9, second)]));
        }
    }

    #[test]
    fn other_bytes_and_other_memory_do_not_conflict() {
        let mut h = Hazards::default();
        assert!(!h.add(&[u(1, 0..8, true)]));
        assert!(!h.add(&[u(1, 8..9, true), u(2, 0..8, true)]));
    }
}
