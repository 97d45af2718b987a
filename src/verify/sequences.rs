//! What a case says of sequences that differ: a number of keys for each, pages, queries packed over either.

use super::random::Random;
use crate::attention::{KeyLengths, Keys, Pages, Problem, Sequence};

/// How the sequences of a case's batch differ; by default they do not.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Sequences {
    /// Queries of each sequence, packed over keys that are not packed; they replace the query length.
    pub(super) queries: Option<Vec<u32>>,
    /// Keys of each sequence; the key length where there are none.
    pub(super) keys: Option<KeyCounts>,
    pub(super) pages: Option<PageForm>,
}

/// Keys of each sequence, at most the key length.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct KeyCounts {
    pub(super) of_each: Vec<u32>,
    /// They are an operand of the device instead of a part of the problem.
    pub(super) on_device: bool,
}

/// Keys in pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PageForm {
    pub(super) size: usize,
    /// Entries of a sequence in the block table besides those that the key length needs.
    pub(super) spare_entries: usize,
}

/// Pages of the pool that no sequence owns.
const FREE_PAGES: usize = 2;

/// What follows a sequence's last page in the block table: no page of any pool.
const NO_PAGE: [i32; 2] = [-1, i32::MAX];

impl Sequences {
    pub(super) fn differ(&self) -> bool {
        *self != Self::default()
    }

    /// Keys of sequence `b` of a case of `key_len` keys.
    fn keys_of(&self, b: usize, key_len: usize) -> usize {
        let counts = self.keys.as_ref();
        let count = counts.and_then(|counts| counts.of_each.get(b));
        count.map_or(key_len, |n| *n as usize)
    }

    /// The case's pool of pages.
    pub(super) fn pool(&self, batch: usize, key_len: usize) -> Option<Pages> {
        let PageForm {
            size,
            spare_entries,
        } = self.pages?;
        let owned = (0..batch).map(|b| self.keys_of(b, key_len).div_ceil(size));
        Some(Pages {
            count: owned.sum::<usize>() + FREE_PAGES,
            page_size: size,
            per_sequence: key_len.div_ceil(size) + spare_entries,
        })
    }

    /// The number of keys as the problem states it.
    pub(super) fn key_lengths(&self) -> KeyLengths {
        match &self.keys {
            None => KeyLengths::All,
            Some(counts) if counts.on_device => KeyLengths::Device,
            Some(counts) => KeyLengths::Host(counts.of_each.as_slice().into()),
        }
    }

    /// The operand of key lengths, if there is one. It counts every other sequence that has all `key_len` keys as one
    /// of more: those count as all.
    pub(super) fn operand(&self, key_len: usize) -> Option<Vec<u32>> {
        let counts = self.keys.as_ref().filter(|counts| counts.on_device)?;
        let stated = |(b, n): (usize, &u32)| match *n as usize == key_len && b % 2 == 1 {
            true => u32::MAX,
            false => *n,
        };
        Some(counts.of_each.iter().enumerate().map(stated).collect())
    }

    /// The block table, if keys are in pages: those of a sequence lie scattered over the pool.
    pub(super) fn block_table(&self, problem: &Problem, seed: u64) -> Option<Vec<i32>> {
        let Keys::Paged(pages) = problem.keys() else {
            return None;
        };
        let mut random = Random::new(seed ^ 0x7ab1e);
        let mut free: Vec<i32> = (0..).take(pages.count).collect();
        let mut table = Vec::new();
        for b in 0..problem.shape().batch {
            let keys = self.keys_of(b, problem.shape().key_len);
            let owned = keys.div_ceil(pages.page_size);
            table.extend((0..pages.per_sequence).map(|entry| {
                match entry < owned && !free.is_empty() {
                    true => free.swap_remove(random.below(free.len())),
                    false => NO_PAGE[entry % NO_PAGE.len()],
                }
            }));
        }
        Some(table)
    }

    /// What the name of a case says of its sequences.
    pub(super) fn label(&self) -> String {
        let mut label = String::new();
        if let Some(counts) = &self.keys {
            label += if counts.on_device {
                "-lens.device"
            } else {
                "-lens"
            };
            label += &joined(&counts.of_each);
        }
        if let Some(form) = self.pages {
            label += &format!("-paged{}", form.size);
        }
        label
    }
}

pub(super) fn joined(lengths: &[u32]) -> String {
    let lengths: Vec<_> = lengths.iter().map(u32::to_string).collect();
    lengths.join("+")
}

/// Sequence `b` with the keys that it has; `lengths` is the operand, if there is one.
pub(super) fn operand_sequence(problem: &Problem, lengths: Option<&[u32]>, b: usize) -> Sequence {
    match lengths.and_then(|lengths| lengths.get(b)) {
        Some(n) => problem.sequence_of(b, (*n as usize).min(problem.shape().key_len)),
        None => problem.sequence(b),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::DType;
    use crate::verify::case::Case;

    #[test]
    fn each_sequence_owns_pages_of_its_own() {
        let case = Case {
            batch: 4,
            sequences: Sequences {
                queries: None,
                keys: Some(KeyCounts {
                    of_each: vec![9, 0, 4, 12],
                    on_device: true,
                }),
                pages: Some(PageForm {
                    size: 4,
                    spare_entries: 1,
                }),
            },
            ..Case::new(64, DType::F32, (1, 12))
        };
        let problem = case.problem().unwrap();
        let table = case.sequences.block_table(&problem, 7).unwrap();
        assert_eq!(table.len(), 4 * 4);
        let mut owned: Vec<_> = table.iter().filter(|page| (0..9).contains(*page)).collect();
        owned.sort();
        owned.dedup();
        assert_eq!(owned.len(), 3 + 1 + 3);
        for (b, pages) in [(0, 3), (1, 0), (2, 1), (3, 3)] {
            assert!(
                table[b * 4 + pages..(b + 1) * 4]
                    .iter()
                    .all(|page| NO_PAGE.contains(page)),
                "{table:?}"
            );
        }
        assert_eq!(case.sequences.operand(12), Some(vec![9, 0, 4, u32::MAX]));
        assert!(case.name().contains("-lens.device9+0+4+12-paged4"));
    }
}
