//! Params that the kernels of the mask fill, the tile classes and decode read, on every GPU alike.

use bytemuck::{Pod, Zeroable};

use super::command::{ClassifyTiles, DecodePartials, FillBlocks, FillMask};
use super::gpu_struct::gpu_struct;
use crate::attention::Role;
use crate::error::{MlxError, Result};

gpu_struct! {
    /// Arguments of the mask fill.
    MaskFillParamsGpu = "MaskFillParams", MASK_FILL_PARAMS_TEXT, 20 {
        /// Rows.
        seq_len_q: u32 = "uint seq_len_q" @ 0,
        /// Columns.
        seq_len_k: u32 = "uint seq_len_k" @ 4,
        /// Keys of the window, or 0 for none.
        window: u32 = "uint window" @ 8,
        /// 1: keys after a row's position are masked.
        causal: u32 = "uint causal" @ 12,
        /// Position of row 0.
        q_abs_offset: u32 = "uint q_abs_offset" @ 16,
    }
}

gpu_struct! {
    /// Arguments of the block-diagonal mask fill.
    BlockFillParamsGpu = "BlockFillParams", BLOCK_FILL_PARAMS_TEXT, 12 {
        /// Tokens: rows and columns.
        len: u32 = "uint len" @ 0,
        /// Positions of the window, or 0 for none.
        window: u32 = "uint window" @ 4,
        /// 1: keys at later positions than a row's are masked.
        causal: u32 = "uint causal" @ 8,
    }
}

gpu_struct! {
    /// Arguments of the tile classes; the tile itself is in constants 400 and 401.
    BlkParamsGpu = "BlkParams", BLK_PARAMS_TEXT, 24 {
        /// Rows of the mask.
        seq_len_q: u32 = "uint seq_len_q" @ 0,
        /// Columns of the mask.
        seq_len_k: u32 = "uint seq_len_k" @ 4,
        /// Tiles down.
        nq: u32 = "uint nq" @ 8,
        /// Tiles across.
        nk: u32 = "uint nk" @ 12,
        /// Elements from one mask row to the next.
        row_stride: i64 = "int64_t row_stride" @ 16,
    }
}

gpu_struct! {
    /// Arguments of the decode kernels.
    VecParamsGpu = "VecParams", VEC_PARAMS_TEXT, 40 {
        /// Query heads.
        num_heads: u32 = "uint num_heads" @ 0,
        /// Key/value heads.
        num_kv_heads: u32 = "uint num_kv_heads" @ 4,
        /// Head dimension.
        head_dim: u32 = "uint head_dim" @ 8,
        /// Valid keys; the query stands at the last.
        kv_seq_len: u32 = "uint kv_seq_len" @ 12,
        /// Rows that K and V have room for.
        kv_capacity: u32 = "uint kv_capacity" @ 16,
        /// First visible key.
        kv_start: u32 = "uint kv_start" @ 20,
        /// Score scale, not premultiplied by log2(e).
        scale: f32 = "float scale" @ 24,
        /// Softcap, or 0 for none.
        softcap: f32 = "float softcap" @ 28,
        /// Partial results of each head.
        splits: u32 = "uint splits" @ 32,
        /// Keeps the size on 8 bytes.
        _pad: u32 = "uint pad" @ 36,
    }
}

fn narrow<N: TryFrom<usize>>(what: &str, n: usize) -> Result<N> {
    N::try_from(n).map_err(|_| MlxError::expected(what, "a size that fits the kernel's params", n))
}

impl FillMask {
    // Offset and window of a mask fill are within u32.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    pub(super) fn params(&self) -> MaskFillParamsGpu {
        MaskFillParamsGpu {
            seq_len_q: self.query_len,
            seq_len_k: self.key_len,
            window: self.visibility.window.unwrap_or(0) as u32,
            causal: u32::from(self.visibility.causal),
            q_abs_offset: self.visibility.q_offset as u32,
        }
    }
}

impl FillBlocks {
    pub(super) fn params(&self) -> BlockFillParamsGpu {
        BlockFillParamsGpu {
            len: self.len,
            window: self.window.unwrap_or(0),
            causal: u32::from(self.causal),
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
        // The first key that the window shows to the one query, which stands at the last.
        let start = visibility
            .window
            .map_or(0, |window| shape.key_len.saturating_sub(window));
        // Heads of the cache lie one after another.
        let head = problem.strides(Role::Key).map_or(0, |strides| strides.head);
        Ok(VecParamsGpu {
            num_heads: narrow("num_heads", shape.heads)?,
            num_kv_heads: narrow("num_kv_heads", shape.kv_heads)?,
            head_dim: narrow("head_dim", shape.qk_dim)?,
            kv_seq_len: narrow("kv_seq_len", shape.key_len)?,
            kv_capacity: narrow("kv_capacity", head / shape.qk_dim.max(1))?,
            kv_start: narrow("kv_start", start)?,
            scale: problem.scale(),
            softcap: problem.softcap().unwrap_or(0.0),
            splits: self.splits,
            _pad: 0,
        })
    }
}
