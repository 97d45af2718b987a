//! Boundaries of packed sequences, from tensors of a file or from options.

use anyhow::{Result, anyhow, bail};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use crate::args::CuSeqlens;
use crate::input::optional;

/// Sequence `i` owns query rows `queries[i]..queries[i + 1]`, and keys likewise.
#[derive(Debug, Clone)]
pub(crate) struct Packed {
    pub(crate) queries: Vec<u32>,
    pub(crate) keys: Vec<u32>,
}

const NAMES: [&str; 2] = ["cu_seqlens_q", "cu_seqlens_k"];

impl Packed {
    /// The boundaries in a file, if it has them.
    pub(crate) fn of(tensors: &SafeTensors<'_>) -> Result<Option<Self>> {
        match NAMES.map(|name| optional(tensors, name)) {
            [None, None] => Ok(None),
            [Some(queries), Some(keys)] => Ok(Some(Self {
                queries: boundaries(NAMES[0], &queries)?,
                keys: boundaries(NAMES[1], &keys)?,
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
    pub(crate) fn asked(queries: Option<&CuSeqlens>, keys: Option<&CuSeqlens>) -> Option<Self> {
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
            let last = boundaries.last().copied().unwrap_or(0);
            if last as usize > rows {
                bail!("`{name}`: expected a last boundary of at most {rows} rows, found {last}");
            }
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

fn lengths(boundaries: &[u32]) -> impl Iterator<Item = usize> {
    boundaries
        .windows(2)
        .map(|pair| pair[1].saturating_sub(pair[0]) as usize)
}

fn boundaries(name: &str, view: &TensorView<'_>) -> Result<Vec<u32>> {
    if view.shape().len() != 1 {
        bail!("tensor `{name}`: expected rank 1, found {:?}", view.shape());
    }
    let number: fn(&[u8]) -> Option<i128> = match view.dtype() {
        Dtype::I32 => |x| Some(i32::from_le_bytes(x.try_into().ok()?).into()),
        Dtype::U32 => |x| Some(u32::from_le_bytes(x.try_into().ok()?).into()),
        Dtype::I64 => |x| Some(i64::from_le_bytes(x.try_into().ok()?).into()),
        Dtype::U64 => |x| Some(u64::from_le_bytes(x.try_into().ok()?).into()),
        other => bail!("tensor `{name}`: expected dtype I32, U32, I64 or U64, found {other}"),
    };
    let wide = view.data().chunks_exact(view.dtype().bitsize() / 8);
    wide.map(|bytes| {
        let found = number(bytes).unwrap_or(-1);
        u32::try_from(found)
            .map_err(|_| anyhow!("tensor `{name}`: expected 0 to 4294967295, found {found}"))
    })
    .collect()
}
