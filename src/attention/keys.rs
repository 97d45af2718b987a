//! Where the rows of K and V lie, and how many of them a sequence has.

use super::varlen::Boundaries;
use crate::error::{MlxError, Result};

/// Where the rows of K and V of a problem lie.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Keys {
    /// `[B, Hkv, kL, D]`: each batch entry has its own rows.
    Dense,
    /// `[total_k, Hkv, D]`: the rows of one sequence after those of the other, between boundaries
    /// ([`super::Problem::cu_seqlens`]).
    Packed(PackedRows),
    /// Pages of a pool, which a block table names for each sequence.
    Paged(Pages),
}

/// The boundaries of packed rows, checked.
#[derive(Debug, Clone, PartialEq)]
pub struct PackedRows(pub(super) Boundaries);

/// A pool of pages: K `[pages, Hkv, page_size, D]` or `[pages, page_size, Hkv, D]`, V likewise, the axis of
/// pages being the batch axis of their strides ([`super::Layout`]).
///
/// Key `j` of sequence `b` lies in slot `j % page_size` of page `table[b][j / page_size]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Pages {
    /// Pages of the pool.
    pub count: usize,
    /// Keys of a page: a power of two from 1 to 1,024.
    pub page_size: usize,
    /// Entries of a sequence in the block table, `i32` `[B, per_sequence]`.
    pub per_sequence: usize,
}

/// How many keys each sequence has.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum KeyLengths {
    /// All kL of them, or those between packed boundaries.
    #[default]
    All,
    /// So many for each batch entry, at most kL.
    Host(Box<[u32]>),
    /// As many as an operand of the device says when the command runs, `u32` or `i32` `[B]`; more than kL, or less than
    /// 0, count as kL.
    Device,
}

/// Where a row of K and V lies: the entry of the strides' batch axis, and the position in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeyRow {
    /// Batch entry, or page.
    pub batch: usize,
    /// Row of a batch entry, or slot of a page.
    pub position: usize,
}

impl Pages {
    /// Where key `j` of sequence `b` lies; `None` where the table names no page of the pool.
    pub fn row(&self, table: &[i32], b: usize, j: usize) -> Option<KeyRow> {
        let entry = j.checked_div(self.page_size)?;
        if entry >= self.per_sequence {
            return None;
        }
        let at = b.checked_mul(self.per_sequence)?.checked_add(entry)?;
        let page = *table.get(at)?;
        let batch = usize::try_from(page).ok().filter(|p| *p < self.count)?;
        Some(KeyRow {
            batch,
            position: j % self.page_size,
        })
    }

    /// Entries of the block table of `batch` sequences, which hold `key_len` keys each.
    pub(super) fn check(&self, batch: usize, key_len: usize) -> Result<usize> {
        if !self.page_size.is_power_of_two() || self.page_size > 1024 {
            return Err(MlxError::expected(
                "page_size",
                "a power of two from 1 to 1024",
                self.page_size,
            ));
        }
        if self.count == 0 && key_len > 0 {
            return Err(MlxError::expected("pages", "at least one page", 0));
        }
        let held = self.per_sequence.checked_mul(self.page_size);
        if held.is_none_or(|held| held < key_len) {
            return Err(MlxError::expected(
                "block_table",
                format!("pages of {} keys for kL = {key_len}", self.page_size),
                format!("{} of them for a sequence", self.per_sequence),
            ));
        }
        batch.checked_mul(self.per_sequence).ok_or_else(|| {
            MlxError::InvalidArgument(format!(
                "block_table: {batch} x {} entries overflow",
                self.per_sequence
            ))
        })
    }
}

impl KeyLengths {
    /// Refuses lengths that are not one for each of `batch` entries, or above `key_len`.
    pub(super) fn check(&self, batch: usize, key_len: usize) -> Result<()> {
        let Self::Host(lengths) = self else {
            return Ok(());
        };
        if lengths.len() != batch {
            return Err(MlxError::expected(
                "key_lengths",
                format!("one for each of {batch} batch entries"),
                lengths.len(),
            ));
        }
        let over = lengths.iter().position(|len| *len as usize > key_len);
        match over {
            Some(b) => Err(MlxError::expected(
                "key_lengths",
                format!("at most kL = {key_len}"),
                format!("{} for batch entry {b}", lengths[b]),
            )),
            None => Ok(()),
        }
    }

    /// The keys of batch entry `b` as far as the host knows: kL where the device decides.
    pub(super) fn of(&self, b: usize, key_len: usize) -> usize {
        match self {
            Self::Host(lengths) => lengths.get(b).map_or(key_len, |len| *len as usize),
            Self::All | Self::Device => key_len,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{KeyLengths, KeyRow, Pages};

    #[test]
    fn a_key_lies_where_the_table_says() {
        let pages = Pages {
            count: 5,
            page_size: 4,
            per_sequence: 2,
        };
        let table = [3, 0, 4, -1];
        let at = |batch, position| Some(KeyRow { batch, position });
        assert_eq!(pages.row(&table, 0, 3), at(3, 3));
        assert_eq!(pages.row(&table, 0, 4), at(0, 0));
        assert_eq!(pages.row(&table, 1, 2), at(4, 2));
        // No page, past the table, past the pool.
        assert_eq!(pages.row(&table, 1, 4), None);
        assert_eq!(pages.row(&table, 0, 8), None);
        assert_eq!(pages.row(&[5, 0], 0, 0), None);
        assert_eq!(pages.row(&table, usize::MAX, 0), None);
        let none = Pages {
            page_size: 0,
            ..pages
        };
        assert_eq!(none.row(&table, 0, 0), None);
    }

    #[test]
    fn pages_and_lengths_are_checked() {
        let pages = |page_size, per_sequence| Pages {
            count: 9,
            page_size,
            per_sequence,
        };
        assert_eq!(pages(16, 3).check(2, 48), Ok(6));
        for (bad, key_len) in [
            (pages(16, 3), 49),
            (pages(0, 3), 1),
            (pages(48, 3), 1),
            (pages(2048, 3), 1),
            (pages(16, usize::MAX), 1),
            (
                Pages {
                    count: 0,
                    ..pages(16, 3)
                },
                1,
            ),
        ] {
            assert!(bad.check(2, key_len).is_err(), "{bad:?}");
        }
        let host = |lengths: &[u32]| KeyLengths::Host(lengths.into());
        assert!(host(&[3, 0]).check(2, 3).is_ok());
        assert!(host(&[3]).check(2, 3).is_err());
        assert!(host(&[3, 4]).check(2, 3).is_err());
        assert_eq!(host(&[3, 1]).of(1, 7), 1);
        assert_eq!(KeyLengths::Device.of(1, 7), 7);
    }
}
