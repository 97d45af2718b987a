//! Boundaries of packed sequences, from tensors of a file or from options.

use anyhow::{Result, bail};
use safetensors::tensor::SafeTensors;

use crate::args::Numbers;
use crate::tensors::{integers, optional};

/// Sequence `i` owns query rows `queries[i]..queries[i + 1]`, and keys likewise.
#[derive(Debug, Clone)]
pub(crate) struct Packed {
    pub(crate) queries: Vec<u32>,
    pub(crate) keys: Vec<u32>,
}

const NAMES: [&str; 2] = ["cu_seqlens_q", "cu_seqlens_k"];

/// Tensors of sequences whose keys are not packed; their queries may be.
pub(crate) const OWN_KEYS: [&str; 2] = ["block_table", "key_lengths"];

impl Packed {
    /// The boundaries in a file, if it packs keys.
    pub(crate) fn of(tensors: &SafeTensors<'_>) -> Result<Option<Self>> {
        let own_keys = OWN_KEYS
            .iter()
            .any(|name| optional(tensors, name).is_some());
        match NAMES.map(|name| optional(tensors, name)) {
            [None, None] => Ok(None),
            [Some(_), None] if own_keys => Ok(None),
            [Some(queries), Some(keys)] => Ok(Some(Self {
                queries: integers(NAMES[0], &queries)?,
                keys: integers(NAMES[1], &keys)?,
            })),
            [queries, _] => {
                let [here, missing] = match queries {
                    Some(_) => NAMES,
                    None => [NAMES[1], NAMES[0]],
                };
                bail!("tensor `{missing}`: expected to be there with `{here}`")
            }
        }
    }

    /// The boundaries of options, if they are given.
    pub(crate) fn asked(queries: Option<&Numbers>, keys: Option<&Numbers>) -> Option<Self> {
        queries.zip(keys).map(|(queries, keys)| Self {
            queries: queries.0.clone(),
            keys: keys.0.clone(),
        })
    }

    /// Refuses boundaries past the rows that there are; what else they must be, the problem checks.
    pub(crate) fn check(&self, query_rows: usize, key_rows: usize) -> Result<()> {
        for (name, boundaries, rows) in [
            (NAMES[0], &self.queries, query_rows),
            (NAMES[1], &self.keys, key_rows),
        ] {
            check_last(name, boundaries, rows)?;
        }
        Ok(())
    }

    /// Numbers of queries and keys of each sequence.
    pub(crate) fn lengths(&self) -> Vec<(usize, usize)> {
        lengths(&self.queries).zip(lengths(&self.keys)).collect()
    }

    pub(crate) fn longest_keys(&self) -> usize {
        lengths(&self.keys).max().unwrap_or(0)
    }
}

/// Refuses boundaries past the rows that there are.
pub(crate) fn check_last(name: &str, boundaries: &[u32], rows: usize) -> Result<()> {
    let last = boundaries.last().copied().unwrap_or(0);
    if last as usize > rows {
        bail!("`{name}`: expected a last boundary of at most {rows} rows, found {last}");
    }
    Ok(())
}

/// How far apart boundaries lie.
pub(crate) fn lengths(boundaries: &[u32]) -> impl Iterator<Item = usize> {
    boundaries
        .windows(2)
        .map(|pair| pair[1].saturating_sub(pair[0]) as usize)
}
