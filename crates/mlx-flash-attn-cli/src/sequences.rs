//! Sequences that differ, from tensors of a file: a number of keys for each, pages of a pool, queries packed over
//! either.

use anyhow::{Result, bail};
use mlx_flash_attn::attention::{KeyLengths, Pages};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use crate::packed::{OWN_KEYS, lengths};
use crate::tensors::{Tensor, integers, optional, tensor};

pub(crate) const BLOCK_TABLE: &str = OWN_KEYS[0];
pub(crate) const KEY_LENGTHS: &str = OWN_KEYS[1];
const QUERIES: &str = "cu_seqlens_q";

/// How sequences whose keys are not packed differ.
#[derive(Debug, Default)]
pub(crate) struct Sequences<'a> {
    /// Boundaries of the queries, where those are packed.
    pub(crate) queries: Option<Vec<u32>>,
    /// Keys of each.
    pub(crate) keys: Option<Vec<u32>>,
    /// Pages of each, I32 `[B, pages of a sequence]`.
    pub(crate) table: Option<Tensor<'a>>,
}

impl<'a> Sequences<'a> {
    /// What a file says of them; nothing where it has none of the tensors.
    pub(crate) fn of(tensors: &SafeTensors<'a>) -> Result<Self> {
        let [table, keys] = OWN_KEYS.map(|name| optional(tensors, name));
        if table.is_none() && keys.is_none() {
            return Ok(Self::default());
        }
        if optional(tensors, "cu_seqlens_k").is_some() {
            let name = table.map_or(KEY_LENGTHS, |_| BLOCK_TABLE);
            bail!("tensor `{name}`: expected no `cu_seqlens_k` beside it, which packs the keys");
        }
        let queries = optional(tensors, QUERIES);
        Ok(Self {
            queries: queries.map(|view| integers(QUERIES, &view)).transpose()?,
            keys: keys.map(|view| key_lengths(&view)).transpose()?,
            table: table.map(|view| block_table(&view)).transpose()?,
        })
    }

    /// How many sequences there are: `of_q`, the batch size of `q`, unless queries are packed.
    pub(crate) fn batch(&self, of_q: usize) -> Result<usize> {
        let batch = match &self.queries {
            Some(boundaries) => boundaries.len().saturating_sub(1),
            None => of_q,
        };
        let whose = self.queries.as_ref().map_or("q", |_| QUERIES);
        let rows = self.table.as_ref().map(|table| table.shape[0]);
        let found = [
            (BLOCK_TABLE, "a row", rows),
            (KEY_LENGTHS, "a length", self.keys.as_ref().map(Vec::len)),
        ];
        for (name, what, found) in found {
            if let Some(found) = found.filter(|found| *found != batch) {
                bail!(
                    "tensor `{name}`: expected {what} for each of the {batch} sequences of `{whose}`, \
                     found {found}"
                );
            }
        }
        Ok(batch)
    }

    /// The pool of `count` pages of `page_size` keys, if the keys are in pages.
    pub(crate) fn pages(&self, count: usize, page_size: usize) -> Result<Option<Pages>> {
        let Some(table) = &self.table else {
            return Ok(None);
        };
        if !page_size.is_power_of_two() || page_size > 1024 {
            bail!(
                "tensor `k`: expected pages of a power of two keys, at most 1024, as `{BLOCK_TABLE}` is \
                 there, found {page_size}"
            );
        }
        Ok(Some(Pages {
            count,
            page_size,
            per_sequence: table.shape[1],
        }))
    }

    /// Refuses more keys of a sequence than there is room for.
    pub(crate) fn check(&self, key_len: usize) -> Result<()> {
        let keys = self.keys.iter().flatten();
        match keys.enumerate().find(|(_, n)| **n as usize > key_len) {
            Some((b, n)) => bail!(
                "tensor `{KEY_LENGTHS}`: expected at most {key_len} keys, found {n} for sequence {b}"
            ),
            None => Ok(()),
        }
    }

    /// As a problem states the lengths.
    pub(crate) fn key_lengths(&self) -> KeyLengths {
        match &self.keys {
            None => KeyLengths::All,
            Some(keys) => KeyLengths::Host(keys.as_slice().into()),
        }
    }

    /// Numbers of queries and keys of each of `batch` sequences: `query_len` and `key_len` where the file has none.
    pub(crate) fn lengths(
        &self,
        batch: usize,
        query_len: usize,
        key_len: usize,
    ) -> Vec<(usize, usize)> {
        let queries: Vec<usize> = match &self.queries {
            Some(boundaries) => lengths(boundaries).collect(),
            None => vec![query_len; batch],
        };
        let keys = self.keys.as_ref();
        let of = |b: usize| {
            keys.and_then(|keys| keys.get(b))
                .map_or(key_len, |n| *n as usize)
        };
        let each = queries.into_iter().enumerate();
        each.map(|(b, queries)| (queries, of(b))).collect()
    }
}

fn block_table<'a>(view: &TensorView<'a>) -> Result<Tensor<'a>> {
    if view.shape().len() != 2 {
        bail!(
            "tensor `{BLOCK_TABLE}`: expected rank 2 [B, pages of a sequence], found {:?}",
            view.shape()
        );
    }
    tensor(BLOCK_TABLE, view, &[Dtype::I32])
}

fn key_lengths(view: &TensorView<'_>) -> Result<Vec<u32>> {
    if !matches!(view.dtype(), Dtype::I32 | Dtype::U32) {
        bail!(
            "tensor `{KEY_LENGTHS}`: expected dtype I32 or U32, found {}",
            view.dtype()
        );
    }
    integers(KEY_LENGTHS, view)
}
