//! Packed sequences of different lengths, given by their cumulative lengths.

use crate::error::{MlxError, Result};

/// Boundaries of packed sequences: sequence `b` owns rows `cu[b]..cu[b + 1]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Boundaries {
    cu: Box<[u32]>,
    longest: usize,
}

impl Boundaries {
    /// Checks that `cu` starts at 0 and never falls.
    pub(crate) fn new(operand: &str, cu: &[u32]) -> Result<Self> {
        match cu.first() {
            Some(0) => {}
            None => return Err(MlxError::expected(operand, "a first boundary of 0", "none")),
            Some(first) => {
                return Err(MlxError::expected(operand, "a first boundary of 0", first));
            }
        }
        let mut longest = 0;
        for (i, pair) in cu.windows(2).enumerate() {
            let Some(len) = pair[1].checked_sub(pair[0]) else {
                return Err(MlxError::expected(
                    operand,
                    "boundaries that never fall",
                    format!("{} after {} at index {}", pair[1], pair[0], i + 1),
                ));
            };
            longest = longest.max(len as usize);
        }
        Ok(Self {
            cu: cu.into(),
            longest,
        })
    }

    /// One row in the first of `count` sequences, at least one, and none in the others.
    pub(crate) fn one_row(count: usize) -> Self {
        let cu = std::iter::once(0).chain(std::iter::repeat_n(1, count));
        Self {
            cu: cu.collect(),
            longest: 1,
        }
    }

    pub(crate) fn cu(&self) -> &[u32] {
        &self.cu
    }

    pub(crate) fn count(&self) -> usize {
        self.cu.len() - 1
    }

    pub(crate) fn longest(&self) -> usize {
        self.longest
    }

    pub(crate) fn total(&self) -> usize {
        self.cu[self.count()] as usize
    }

    pub(crate) fn start(&self, sequence: usize) -> usize {
        self.cu[sequence] as usize
    }

    pub(crate) fn len(&self, sequence: usize) -> usize {
        (self.cu[sequence + 1] - self.cu[sequence]) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::Boundaries;

    #[test]
    fn checks() {
        let b = Boundaries::new("cu", &[0, 3, 3, 10]).unwrap();
        assert_eq!((b.count(), b.longest(), b.total()), (3, 7, 10));
        assert_eq!((b.start(2), b.len(1), b.len(2)), (3, 0, 7));
        for bad in [&[][..], &[1], &[1, 2], &[0, 5, 4]] {
            assert!(Boundaries::new("cu", bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn sequences_may_be_empty_or_none() {
        let lengths = |cu: &[u32]| {
            let b = Boundaries::new("cu", cu).unwrap();
            (b.count(), b.longest(), b.total())
        };
        assert_eq!(lengths(&[0]), (0, 0, 0));
        assert_eq!(lengths(&[0, 0, 0]), (2, 0, 0));
        assert_eq!(Boundaries::one_row(3).cu(), [0, 1, 1, 1]);
    }
}
