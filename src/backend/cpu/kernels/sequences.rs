//! What a command's buffers say of its sequences: how many keys each has, and which pages hold them.

use super::buffer::room;
use super::kv_rows::Table;
use crate::attention::{KeyLengths, Keys, Pages, Problem, Sequence};
use crate::backend::cpu::job::Pointers;
use crate::error::{MlxError, Result};

/// The block table of a call, in which every entry names a page of the pool.
#[derive(Debug)]
struct BlockTable {
    pages: Pages,
    entries: Vec<i32>,
}

/// The sequences of a call.
#[derive(Debug)]
pub(super) struct Sequences<'a> {
    problem: &'a Problem,
    at: Pointers,
    table: Option<BlockTable>,
}

impl<'a> Sequences<'a> {
    /// Refuses a block table with an entry out of the pool for a key that some row sees.
    pub(super) fn new(problem: &'a Problem, at: Pointers) -> Result<Self> {
        let mut sequences = Self {
            problem,
            at,
            table: None,
        };
        if let Keys::Paged(pages) = problem.keys() {
            let entries = sequences.entries(pages)?;
            sequences.table = Some(BlockTable {
                pages: *pages,
                entries,
            });
        }
        Ok(sequences)
    }

    /// Sequence `b` with as many keys as it has when the call runs.
    pub(super) fn get(&self, b: usize) -> Sequence {
        if *self.problem.key_lengths() != KeyLengths::Device {
            return self.problem.sequence(b);
        }
        let most = self.problem.shape().key_len;
        // SAFETY: the operand has a length for each sequence.
        let len = unsafe { *self.at.key_lengths.add(b) };
        self.problem.sequence_of(b, (len as usize).min(most))
    }

    /// The pages of a sequence's keys, where they are paged.
    pub(super) fn pages(&self, sequence: &Sequence) -> Option<Table> {
        let table = self.table.as_ref()?;
        let of_sequence = sequence.index * table.pages.per_sequence;
        let entries = table.entries.get(of_sequence..)?;
        Some(Table::new(entries.as_ptr(), table.pages.page_size))
    }

    /// The entries of the table. Those that no row needs name the first page where they name none: strips are read whole,
    /// and what hidden keys hold does not matter.
    fn entries(&self, pages: &Pages) -> Result<Vec<i32>> {
        let batch = self.problem.shape().batch;
        let mut entries = room(batch.saturating_mul(pages.per_sequence))?;
        for b in 0..batch {
            let sequence = self.get(b);
            let seen = sequence
                .visibility
                .keys_any(0..sequence.query_len, sequence.key_len);
            let needed = if seen.is_empty() {
                0..0
            } else {
                seen.start / pages.page_size..seen.end.div_ceil(pages.page_size)
            };
            for i in 0..pages.per_sequence {
                // SAFETY: the operand has as many entries for each sequence.
                let entry = unsafe { *self.at.block_table.add(b * pages.per_sequence + i) };
                let is_page = usize::try_from(entry).is_ok_and(|page| page < pages.count);
                if !is_page && needed.contains(&i) {
                    return Err(MlxError::expected(
                        "block_table",
                        format!("a page below {} in entry {i} of sequence {b}", pages.count),
                        entry,
                    ));
                }
                entries.push(if is_page { entry } else { 0 });
            }
        }
        Ok(entries)
    }
}
