//! Classifies the tiles of a mask, so that prefill skips those that are wholly masked (class 0) and
//! adds no mask where it masks nothing (class 2); elsewhere the mask is added (class 1). Cells of -1e30
//! and lower count as masked. Prefill gives the same bits with and without classes where all masked
//! cells are -inf: without classes a finite cell leaves its key visible.

use crate::attention::Role;
use crate::attention::Tile;
use crate::backend::command::{ClassifyTiles, Slot, Task, Work};
use crate::backend::metal::bindings::{constant, names};
use crate::backend::metal::sources;
use crate::compat::registry::KernelRegistry;
use crate::dtype::DType;
use crate::error::{MlxError, Result};
use crate::ops::check_buffer;
use crate::runtime::buffer::MlxBuffer;
use crate::runtime::device::MlxDevice;
use crate::runtime::encoder::{CapturedOpKind, CommandEncoder};

/// Text of the mask-fill and tile-class kernels.
pub static FLASH_ATTN_PREFILL_BLK_SHADER_SOURCE: &str = sources::MASK_TEXT;

/// Classifies the tiles of a bf16 mask.
pub const K_BLK_BF16: &str = names::BLK;
/// Classifies the tiles of an f16 mask.
pub const K_BLK_F16: &str = names::BLK_F16;
/// Function constant (int): query rows of a tile.
pub const FC_IDX_BQ: usize = constant::BLK_BQ;
/// Function constant (int): keys of a tile.
pub const FC_IDX_BK: usize = constant::BLK_BK;
/// Function constant (bool) of the prefill kernels: tile classes are bound.
pub const FC_IDX_HAS_BLK: usize = constant::HAS_BLK;

/// Class buffers are a whole number of these, in bytes.
const GRANULE: usize = 32;

/// Registers the kernels. A new registry knows them already.
pub fn register(registry: &mut KernelRegistry) {
    for name in [K_BLK_BF16, K_BLK_F16] {
        registry.register_source(name, FLASH_ATTN_PREFILL_BLK_SHADER_SOURCE);
    }
}

/// Sizes of a mask and of its tiles: 32 x 16 for head dims up to 256, 8 x 64 for 512.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlkParams {
    /// Rows of the mask, qL.
    pub seq_len_q: u32,
    /// Columns of the mask, kL.
    pub seq_len_k: u32,
    /// Query rows of a tile.
    pub bq: u32,
    /// Keys of a tile.
    pub bk: u32,
}

impl BlkParams {
    /// Tiles down and across.
    fn tiles(&self) -> Result<(u32, u32)> {
        let sizes = [
            ("seq_len_q", self.seq_len_q),
            ("seq_len_k", self.seq_len_k),
            ("bq", self.bq),
            ("bk", self.bk),
        ];
        for (name, size) in sizes {
            if size == 0 || i32::try_from(size).is_err() {
                return Err(MlxError::expected(name, "1 to 2147483647", size));
            }
        }
        Ok((
            self.seq_len_q.div_ceil(self.bq),
            self.seq_len_k.div_ceil(self.bk),
        ))
    }
}

/// Bytes of a class buffer: one a tile, rounded up to 32.
///
/// # Errors
/// `InvalidArgument` for a size of 0, or so many tiles that their count overflows.
pub fn blk_buffer_byte_len(params: &BlkParams) -> Result<usize> {
    let (nq, nk) = params.tiles()?;
    (nq as usize)
        .checked_mul(nk as usize)
        .and_then(|tiles| tiles.checked_next_multiple_of(GRANULE))
        .ok_or_else(|| MlxError::InvalidArgument(format!("blk: {nq} x {nk} tiles overflow")))
}

/// A class buffer: `U8`, shape `[NQ, NK]`.
///
/// # Errors
/// As for [`blk_buffer_byte_len`], and `BufferAllocationError` where the device has no room.
pub fn alloc_blk_buffer(device: &MlxDevice, params: &BlkParams) -> Result<MlxBuffer> {
    let (nq, nk) = params.tiles()?;
    let shape = vec![nq as usize, nk as usize];
    device.alloc_buffer(blk_buffer_byte_len(params)?, DType::U8, shape)
}

/// Encodes the classification of `mask` (bf16, `[qL, kL]`) into `blk_out`; the caller commits.
///
/// Row-major, a byte a tile, the first rule that fits: starts at or past kL: 0; reaches past kL: 1;
/// every cell at or below -1e30: 0 (skip); every cell zero: 2 (no mask add); else 1. Rows past qL do
/// not count.
///
/// # Errors
/// `InvalidArgument` for zero sizes, a mask that is not bf16 `[qL, kL]`, or a buffer too small.
pub fn dispatch_flash_attn_prefill_blk(
    encoder: &mut CommandEncoder,
    device: &MlxDevice,
    registry: &mut KernelRegistry,
    mask: &MlxBuffer,
    blk_out: &MlxBuffer,
    params: &BlkParams,
) -> Result<()> {
    classify(
        encoder,
        device,
        registry,
        [mask, blk_out],
        params,
        DType::BF16,
    )
}

/// As [`dispatch_flash_attn_prefill_blk`], of an f16 mask (a name of version 0.15.16).
///
/// # Errors
/// As [`dispatch_flash_attn_prefill_blk`], for a mask that is not f16.
pub fn dispatch_flash_attn_prefill_blk_f16(
    encoder: &mut CommandEncoder,
    device: &MlxDevice,
    registry: &mut KernelRegistry,
    mask: &MlxBuffer,
    blk_out: &MlxBuffer,
    params: &BlkParams,
) -> Result<()> {
    classify(
        encoder,
        device,
        registry,
        [mask, blk_out],
        params,
        DType::F16,
    )
}

fn classify(
    encoder: &mut CommandEncoder,
    device: &MlxDevice,
    registry: &mut KernelRegistry,
    [mask, blk_out]: [&MlxBuffer; 2],
    params: &BlkParams,
    dtype: DType,
) -> Result<()> {
    let (nq, nk) = params.tiles()?;
    let overflow =
        |what: &str| MlxError::InvalidArgument(format!("{what}: sizes of {params:?} overflow"));
    let cells = (params.seq_len_q as usize)
        .checked_mul(params.seq_len_k as usize)
        .ok_or_else(|| overflow("mask"))?;
    let tiles = (nq as usize)
        .checked_mul(nk as usize)
        .ok_or_else(|| overflow("blk"))?;
    check_buffer("mask", mask, dtype, cells)?;
    check_buffer("blk", blk_out, DType::U8, tiles)?;
    if mask.shape().len() > 2 && mask.shape().iter().rev().skip(2).any(|n| *n != 1) {
        return Err(MlxError::expected(
            "mask",
            "one plane [qL, kL]",
            format!("shape {:?}", mask.shape()),
        ));
    }
    let kernel = match dtype {
        DType::F16 => K_BLK_F16,
        _ => K_BLK_BF16,
    };
    let sides = [(FC_IDX_BQ, params.bq as i32), (FC_IDX_BK, params.bk as i32)];
    // Counts among the built kernels, as a caller of the kernel's name expects.
    registry.get_pipeline_with_constants(kernel, device.metal_device(), &[], &sides)?;
    let classify = ClassifyTiles {
        query_len: params.seq_len_q,
        key_len: params.seq_len_k,
        row_stride: params.seq_len_k as usize,
        dtype,
        tile: Tile {
            bq: params.bq as usize,
            bk: params.bk as usize,
        },
    };
    let task = Task {
        planned: encoder.device().plan(Work::ClassifyTiles(classify))?,
        operands: [
            (Slot::Operand(Role::Mask), mask.clone()),
            (Slot::Operand(Role::TileClasses), blk_out.clone()),
        ]
        .into(),
    };
    encoder.task(task, CapturedOpKind::Other)
}
