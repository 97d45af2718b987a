//! The mask fill and the tile classes.

use half::bf16;

use super::{Args, Span};
use crate::attention::bindings::{Access, constant, other};
use crate::attention::params::{BlkParamsGpu, MaskFillParamsGpu};
use crate::attention::variant::Tile;
use crate::backend::Dispatch;
use crate::error::{MlxError, Result};

fn overflow(dispatch: &Dispatch) -> MlxError {
    MlxError::CommandBufferError(format!(
        "{}: a product of sizes overflows",
        dispatch.kernel.name
    ))
}

/// A mask fill, read back.
pub(crate) struct Fill<'a> {
    pub(crate) params: MaskFillParamsGpu,
    pub(crate) mask: Span<'a, bf16>,
}

impl<'a> Fill<'a> {
    pub(crate) fn read(dispatch: &'a Dispatch) -> Result<Self> {
        let args = Args::new(dispatch);
        let params: MaskFillParamsGpu = args.params(other::FILL_PARAMS)?;
        let cells = (params.seq_len_q as usize)
            .checked_mul(params.seq_len_k as usize)
            .filter(|n| *n > 0)
            .ok_or_else(|| overflow(dispatch))?;
        let mask = args.span(other::FILL_OUT, cells, Access::Write)?;
        Ok(Self { params, mask })
    }
}

/// A classification of tiles, read back.
pub(crate) struct Classes<'a> {
    pub(crate) params: BlkParamsGpu,
    pub(crate) tile: Tile,
    /// Elements from one row of the mask to the next.
    pub(crate) stride: usize,
    pub(crate) mask: Span<'a, bf16>,
    pub(crate) classes: Span<'a, u8>,
}

impl<'a> Classes<'a> {
    pub(crate) fn read(dispatch: &'a Dispatch) -> Result<Self> {
        let args = Args::new(dispatch);
        args.check_aliasing()?;
        let p: BlkParamsGpu = args.params(other::BLK_PARAMS)?;
        let (rows, keys) = (p.seq_len_q as usize, p.seq_len_k as usize);
        let side = |index| {
            let size = dispatch.kernel.constants.int(index).unwrap_or(0);
            usize::try_from(size)
                .ok()
                .filter(|n| *n > 0)
                .ok_or_else(|| {
                    let name = &dispatch.kernel.name;
                    MlxError::CommandBufferError(format!(
                        "{name}: constant {index}: expected a tile side, got {size}"
                    ))
                })
        };
        let tile = Tile {
            bq: side(constant::BLK_BQ)?,
            bk: side(constant::BLK_BK)?,
        };
        let (nq, nk) = tile.count(rows, keys);
        let stride = usize::try_from(p.row_stride).map_err(|_| overflow(dispatch))?;
        let cells = rows
            .checked_sub(1)
            .and_then(|last| last.checked_mul(stride))
            .and_then(|start| start.checked_add(keys))
            .filter(|_| keys > 0)
            .ok_or_else(|| overflow(dispatch))?;
        let tiles = nq.checked_mul(nk).ok_or_else(|| overflow(dispatch))?;
        Ok(Self {
            params: p,
            tile,
            stride,
            mask: args.span(other::BLK_MASK, cells, Access::Read)?,
            classes: args.span(other::BLK_OUT, tiles, Access::Write)?,
        })
    }
}
