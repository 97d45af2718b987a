//! Params that the kernels of the mask fill, the tile classes and decode read, on every GPU alike.

use super::command::{ClassifyTiles, DecodePartials, FillMask};
use crate::attention::Role;
use crate::attention::params::{BlkParamsGpu, MaskFillParamsGpu, VecParamsGpu};
use crate::error::{MlxError, Result};

fn narrow<N: TryFrom<usize>>(what: &str, n: usize) -> Result<N> {
    N::try_from(n).map_err(|_| MlxError::expected(what, "a size that fits the kernel's params", n))
}

impl FillMask {
    // Offsets of a mask fill are within u32.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    pub(super) fn params(&self) -> MaskFillParamsGpu {
        MaskFillParamsGpu {
            seq_len_q: self.query_len,
            seq_len_k: self.key_len,
            window: self.visibility.window.unwrap_or(0),
            causal: u32::from(self.visibility.causal),
            q_abs_offset: self.visibility.q_offset as u32,
        }
    }
}

impl ClassifyTiles {
    pub(super) fn params(&self) -> Result<BlkParamsGpu> {
        let (nq, nk) = self
            .tile
            .count(self.query_len as usize, self.key_len as usize);
        Ok(BlkParamsGpu {
            seq_len_q: self.query_len,
            seq_len_k: self.key_len,
            nq: narrow("query tiles", nq)?,
            nk: narrow("key tiles", nk)?,
            row_stride: narrow("the mask's row stride", self.row_stride)?,
        })
    }

    /// Query rows and keys of a tile.
    pub(super) fn sides(&self) -> Result<(i32, i32)> {
        let side = |n| narrow("a tile's side", n);
        Ok((side(self.tile.bq)?, side(self.tile.bk)?))
    }
}

impl DecodePartials {
    pub(super) fn params(&self) -> Result<VecParamsGpu> {
        let (problem, shape) = (&self.problem, self.problem.shape());
        let visibility = problem.visibility(shape.query_len, shape.key_len);
        let key_len: u32 = narrow("kv_seq_len", shape.key_len)?;
        // Heads of the cache lie one after another.
        let head = problem.strides(Role::Key).map_or(0, |strides| strides.head);
        Ok(VecParamsGpu {
            num_heads: narrow("num_heads", shape.heads)?,
            num_kv_heads: narrow("num_kv_heads", shape.kv_heads)?,
            head_dim: narrow("head_dim", shape.head_dim)?,
            kv_seq_len: key_len,
            kv_capacity: narrow("kv_capacity", head / shape.head_dim.max(1))?,
            kv_start: visibility
                .window
                .map_or(0, |window| key_len.saturating_sub(window)),
            scale: problem.scale(),
            softcap: problem.softcap().unwrap_or(0.0),
            splits: self.splits,
            _pad: 0,
        })
    }
}
