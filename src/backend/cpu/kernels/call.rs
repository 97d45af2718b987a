//! A job as the kernels take it apart: its constants, and its head tasks.

use std::ops::Range;

use crate::attention::{MaskSpec, Problem, Role, Sequence};
use crate::attention::{Tile as ClassTile, class_tile};
use crate::backend::cpu::job::{Job, Pointers};
use crate::error::{MlxError, Result};

use super::buffer::room;
use super::kv_rows::{KvRows, StripRows};
use super::mask_map::{MaskMap, Panels};
use super::sequences::Sequences;
use super::types::{Cells, Float, Stored};

/// Most query rows of a head task whose K and V are read where they lie: packing would not pay for itself.
pub(super) const FEW_ROWS: usize = 8;

/// Most keys of a strip, and the words from one row of scores to the next. Strips start at
/// multiples of their length, so that a row's result depends on nothing but its visible keys.
pub(super) const STRIP: usize = 256;

/// Packed bytes of one strip of K; as many again for V. Both stay in a core's second-level cache
/// beside the rows' state.
const STRIP_BYTES: usize = 256 << 10;

/// Shape of the micro-kernel that a call runs, and so of what is packed for it.
#[derive(Debug, Clone, Copy)]
pub(super) struct KernelShape {
    /// Elements in a word.
    pub(super) pair: usize,
    /// What the rows of a micro-kernel must be a multiple of.
    pub(super) side: usize,
    /// Rows of the micro-kernel.
    pub(super) rows: usize,
    /// Elements of a vector: rows of V and O are whole vectors.
    pub(super) lanes: usize,
}

/// Reads some strips of the row of the mask that begins at a cell: [`super::mask_scan::scan`] for one
/// instruction set.
pub(super) type ScanMask = unsafe fn(&Call<'_>, usize, Range<usize>, *mut Panels);

/// What holds for a whole call.
#[derive(Debug)]
pub(super) struct Call<'a> {
    pub(super) problem: &'a Problem,
    pub(super) at: Pointers,
    pub(super) kernel: KernelShape,
    pub(super) scan_mask: ScanMask,
    /// Elements of Q and O.
    pub(super) float: Float,
    pub(super) k: Stored,
    pub(super) v: Stored,
    pub(super) dim: usize,
    /// Words of a row of Q or K.
    pub(super) dim_words: usize,
    /// The same, up to whole tiles where those multiply: packed rows of Q or K hold zeros there.
    pub(super) depth: usize,
    /// Words from one packed row of Q to the next: off the powers of two that would put all rows into
    /// the same cache sets.
    pub(super) query_row: usize,
    /// Keys of a strip.
    pub(super) strip: usize,
    /// Most terms of a score that one chain of multiply-adds sums; the sums of chains are then added up.
    /// Rounding grows with the length of a chain, which only f32 results would show.
    pub(super) chain: usize,
    /// Query heads that share a key/value head.
    pub(super) group: usize,
    pub(super) scale: f32,
    pub(super) softcap: Option<f32>,
    pub(super) mask: Option<MaskSpec>,
    pub(super) cells: Option<Cells>,
    pub(super) class_tile: ClassTile,
    /// What the mask hides, where there is one without tile classes and that is worth keeping.
    pub(super) map: Option<MaskMap>,
    /// Elements from one row of Q to the next.
    pub(super) query_stride: usize,
    pub(super) sequences: Sequences<'a>,
    /// Where a test breaks K and V into runs.
    #[cfg(test)]
    pub(super) breaks: Option<super::kv_rows::Breaks>,
}

/// The keys and values of one sequence's key/value head, with all query rows that use them.
#[derive(Debug, Clone)]
pub(super) struct HeadTask {
    pub(super) sequence: Sequence,
    pub(super) kv_head: usize,
    /// Strips that some row sees, as far as the problem's parameters tell.
    pub(super) strips: Range<usize>,
}

impl<'a> Call<'a> {
    /// Refuses a kernel that does not take the problem's elements.
    pub(super) fn new(job: &Job<'a>, kernel: KernelShape, scan_mask: ScanMask) -> Result<Self> {
        let problem = job.problem;
        let float = Float::of(problem.dtype())?;
        let (k, v) = (
            Stored::of(problem.key_format())?,
            Stored::of(problem.value_format())?,
        );
        let bf16 = Stored::Plain(Float::Bf16);
        if kernel.pair == 2 && (Stored::Plain(float), k, v) != (bf16, bf16, bf16) {
            return Err(MlxError::UnsupportedDtype(format!(
                "kernels for bf16: got {}, {} and {}",
                problem.dtype(),
                problem.key_format(),
                problem.value_format()
            )));
        }
        let dim = problem.shape().qk_dim;
        if !dim.is_multiple_of(kernel.lanes) {
            return Err(MlxError::expected(
                "head_dim",
                format!("a multiple of {} elements", kernel.lanes),
                dim,
            ));
        }
        let dim_words = dim / kernel.pair;
        let depth = dim_words.next_multiple_of(kernel.side);
        Ok(Self {
            problem,
            at: job.at,
            kernel,
            scan_mask,
            float,
            k,
            v,
            dim,
            dim_words,
            depth,
            query_row: depth + 16,
            strip: STRIP.min(STRIP_BYTES / (4 * dim_words)),
            chain: if float == Float::F32 { 128 } else { 512 },
            group: problem.group(),
            scale: problem.scale(),
            softcap: problem.softcap(),
            mask: problem.mask(),
            cells: problem.mask().map(|m| Cells::of(m.dtype)).transpose()?,
            class_tile: class_tile(dim),
            map: None,
            query_stride: problem.strides(Role::Query).map_or(0, |s| s.seq),
            sequences: Sequences::new(problem, job.at)?,
            #[cfg(test)]
            breaks: None,
        })
    }

    /// Every head task that has query rows.
    pub(super) fn tasks(&self) -> Result<Vec<HeadTask>> {
        let shape = self.problem.shape();
        let sequences = (0..shape.batch).filter(|b| self.problem.sequence(*b).query_len > 0);
        let mut tasks = room(sequences.count().saturating_mul(shape.kv_heads))?;
        for b in 0..shape.batch {
            let sequence = self.sequences.get(b);
            if sequence.query_len == 0 {
                continue;
            }
            let keys = sequence
                .visibility
                .keys_any(0..sequence.query_len, sequence.key_len);
            let strips = self.strips(&keys);
            tasks.extend((0..shape.kv_heads).map(|kv_head| HeadTask {
                sequence,
                kv_head,
                strips: strips.clone(),
            }));
        }
        Ok(tasks)
    }

    /// The strips that hold some of `keys`.
    pub(super) fn strips(&self, keys: &Range<usize>) -> Range<usize> {
        if keys.is_empty() {
            return 0..0;
        }
        keys.start / self.strip..keys.end.div_ceil(self.strip)
    }

    /// Packed words of one strip of K or V.
    pub(super) fn strip_words(&self) -> usize {
        self.strip * self.depth
    }

    /// Packed bytes of the K and V of a head task.
    pub(super) fn packed_bytes(&self, task: &HeadTask) -> usize {
        (8 * self.strip_words()).saturating_mul(task.strips.len())
    }

    /// Bytes of state that a query row takes while its keys go by.
    pub(super) fn row_bytes(&self) -> usize {
        4 * (self.dim + self.depth)
    }
}

impl HeadTask {
    /// Query rows over all heads of the group. Row `f` is row `f / group` of head `f % group`, so
    /// that rows which stand next to each other see nearly the same keys.
    pub(super) fn rows(&self, call: &Call<'_>) -> usize {
        self.sequence.query_len * call.group
    }

    /// Whether its K and V are read as they lie: with few rows, packing does not pay.
    pub(super) fn in_place(&self, call: &Call<'_>) -> bool {
        self.rows(call) <= FEW_ROWS
    }

    /// The keys that some of `rows` sees.
    pub(super) fn keys(&self, call: &Call<'_>, rows: &Range<usize>) -> Range<usize> {
        let positions = rows.start / call.group..rows.end.div_ceil(call.group);
        self.sequence
            .visibility
            .keys_any(positions, self.sequence.key_len)
    }

    /// K and V of a strip, where the caller has them.
    pub(super) fn strip_rows(&self, call: &Call<'_>, strip: usize) -> StripRows {
        let (problem, sequence) = (call.problem, &self.sequence);
        let pages = call.sequences.pages(sequence);
        let first = problem.first_key_row(sequence);
        let rows = |role, stored: Stored, operand: *const u8, at: usize| {
            // A stride over a single row or page is never used, and may be any number.
            let strides = problem.strides(role).unwrap_or_default();
            let first = operand.wrapping_add(stored.bytes(at));
            let rows = KvRows::strided(first, stored.bytes(strides.seq), sequence.key_len);
            let rows = match pages {
                Some(table) => rows.in_pages(table, stored.bytes(strides.batch)),
                None => rows,
            };
            #[cfg(test)]
            let rows = rows.with_breaks(call.breaks);
            rows.of(self.strip_keys(call, strip))
        };
        StripRows {
            k: rows(
                Role::Key,
                call.k,
                call.at.k,
                problem.k_of(first, self.kv_head),
            ),
            v: rows(
                Role::Value,
                call.v,
                call.at.v,
                problem.v_of(first, self.kv_head),
            ),
        }
    }

    /// The valid keys of a strip.
    pub(super) fn strip_keys(&self, call: &Call<'_>, strip: usize) -> Range<usize> {
        let start = strip * call.strip;
        start..(start + call.strip).min(self.sequence.key_len)
    }
}
