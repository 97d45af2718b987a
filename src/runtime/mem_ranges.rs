//! Which dispatches may run side by side, for a program that asks this itself. The encoder does not need
//! it: it finds hazards from what each dispatch binds.

use std::sync::Arc;

use super::buffer::MlxBuffer;

/// Whether a dispatch reads or writes a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MemRangeRole {
    /// It reads the range.
    Src,
    /// It writes the range.
    Dst,
}

/// The bytes of an allocation that a dispatch reads or writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BufferRange {
    /// The allocation: the same for all views of it, and unique while one of them lives.
    pub buf_id: usize,
    /// First byte, counted from the start of the allocation.
    pub p0: u64,
    /// One past the last byte.
    pub p1: u64,
    /// What the dispatch does with the bytes.
    pub role: MemRangeRole,
}

impl BufferRange {
    /// The bytes of a view.
    pub fn from_buffer(buf: &MlxBuffer, role: MemRangeRole) -> Self {
        let range = buf.range();
        Self {
            buf_id: Arc::as_ptr(buf.storage()).addr(),
            p0: range.start as u64,
            p1: range.end as u64,
            role,
        }
    }

    /// Whether the two share a byte that one of them writes.
    pub fn conflicts_with(&self, other: &Self) -> bool {
        let writes = MemRangeRole::Dst;
        (self.role == writes || other.role == writes)
            && self.buf_id == other.buf_id
            && self.p0.max(other.p0) < self.p1.min(other.p1)
    }
}

/// The ranges of dispatches that run side by side, up to the next barrier.
///
/// ```
/// # use mlx_flash_attn::{DType, MemRanges, MlxDevice};
/// # fn main() -> mlx_flash_attn::Result<()> {
/// let whole = MlxDevice::new()?.alloc_buffer(16, DType::F32, vec![4])?;
/// let (left, right) = (whole.slice_view(0, 2), whole.slice_view(8, 2));
/// let mut ranges = MemRanges::new();
/// ranges.add_dispatch(&[], &[&left]);
/// assert!(ranges.check_dispatch(&[&right], &[]), "other bytes");
/// assert!(!ranges.check_dispatch(&[&whole], &[]), "needs a barrier, then `reset`");
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, Default)]
pub struct MemRanges {
    ranges: Vec<BufferRange>,
    checks: u64,
    barriers_forced: u64,
}

impl MemRanges {
    /// No ranges.
    pub fn new() -> Self {
        Self::default()
    }

    /// Forgets all ranges: a barrier was encoded.
    pub fn reset(&mut self) {
        self.ranges.clear();
    }

    /// How many ranges there are.
    pub fn len(&self) -> usize {
        self.ranges.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// How often [`Self::check_dispatch`] was called.
    pub fn checks(&self) -> u64 {
        self.checks
    }

    /// How often [`Self::check_dispatch`] found a conflict.
    pub fn barriers_forced(&self) -> u64 {
        self.barriers_forced
    }

    /// Adds one range.
    pub fn push(&mut self, range: BufferRange) {
        self.ranges.push(range);
    }

    /// Adds what a dispatch reads and writes.
    pub fn add_dispatch(&mut self, reads: &[&MlxBuffer], writes: &[&MlxBuffer]) {
        self.ranges.extend(ranges(reads, writes));
    }

    /// Whether a dispatch may run beside those that were added; false where a barrier must come first.
    /// Adds nothing.
    pub fn check_dispatch(&mut self, reads: &[&MlxBuffer], writes: &[&MlxBuffer]) -> bool {
        let conflict =
            ranges(reads, writes).any(|new| self.ranges.iter().any(|old| old.conflicts_with(&new)));
        self.checks += 1;
        self.barriers_forced += u64::from(conflict);
        !conflict
    }

    /// As [`Self::check_dispatch`], and adds the dispatch where it may run beside those that were added.
    /// Where it may not, the caller encodes a barrier, calls [`Self::reset`] and adds the dispatch itself.
    pub fn check_and_record(&mut self, reads: &[&MlxBuffer], writes: &[&MlxBuffer]) -> bool {
        let beside = self.check_dispatch(reads, writes);
        if beside {
            self.add_dispatch(reads, writes);
        }
        beside
    }
}

fn ranges<'a>(
    reads: &'a [&MlxBuffer],
    writes: &'a [&MlxBuffer],
) -> impl Iterator<Item = BufferRange> + 'a {
    let of = |buffers: &'a [&MlxBuffer], role| {
        buffers
            .iter()
            .map(move |buffer| BufferRange::from_buffer(buffer, role))
    };
    of(reads, MemRangeRole::Src).chain(of(writes, MemRangeRole::Dst))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CpuOptions, DType, MlxDevice};

    #[test]
    fn only_a_shared_byte_that_one_side_writes_is_a_conflict() {
        let device = MlxDevice::cpu(CpuOptions::default()).unwrap();
        let alloc = || device.alloc_buffer(8, DType::U8, vec![8]).unwrap();
        let (whole, other) = (alloc(), alloc());
        let (left, right) = (whole.slice_view(0, 4), whole.slice_view(4, 4));
        let mut ranges = MemRanges::new();
        assert!(ranges.is_empty() && ranges.check_dispatch(&[&whole], &[&other]));
        ranges.add_dispatch(&[&left], &[&other]);
        assert_eq!((ranges.len(), ranges.is_empty()), (2, false));
        // Reads beside reads, writes of other bytes.
        assert!(ranges.check_dispatch(&[&whole], &[&right]));
        // A write of what is read, a read of what is written, a write of what is written.
        assert!(!ranges.check_dispatch(&[], &[&whole]));
        assert!(!ranges.check_dispatch(&[&other], &[]));
        assert!(!ranges.check_dispatch(&[], &[&other]));
        assert_eq!((ranges.checks(), ranges.barriers_forced()), (5, 3));
        ranges.reset();
        assert!(ranges.is_empty() && ranges.check_dispatch(&[], &[&other]));
    }

    #[test]
    fn a_range_is_the_views_bytes_within_its_allocation() {
        let device = MlxDevice::cpu(CpuOptions::default()).unwrap();
        let whole = device.alloc_buffer(16, DType::F32, vec![4]).unwrap();
        let range = BufferRange::from_buffer(&whole.slice_view(4, 2), MemRangeRole::Dst);
        assert_eq!((range.p0, range.p1), (4, 12));
        let all = BufferRange::from_buffer(&whole, MemRangeRole::Src);
        assert_eq!((all.buf_id, all.p1), (range.buf_id, 16));
        assert!(range.conflicts_with(&all) && all.conflicts_with(&range));
        let empty = BufferRange::from_buffer(&whole.slice_view(8, 0), MemRangeRole::Dst);
        assert!(!empty.conflicts_with(&all), "no byte, no conflict");
    }
}
