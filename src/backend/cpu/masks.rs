//! The mask fill and the tile classes on the CPU.

use half::bf16;
use rayon::prelude::*;

use super::Cpu;
use super::args::Args;
use crate::attention::bindings::{constant, other};
use crate::attention::mask::{TileClass, Visibility};
use crate::attention::params::{BlkParamsGpu, MaskFillParamsGpu};
use crate::backend::Dispatch;
use crate::error::{MlxError, Result};

fn overflow(dispatch: &Dispatch) -> MlxError {
    MlxError::CommandBufferError(format!(
        "{}: a product of sizes overflows",
        dispatch.kernel.name
    ))
}

/// Writes 0 where a key is visible and `-inf` where it is not.
pub(crate) fn fill(_cpu: &Cpu, dispatch: &Dispatch) -> Result<()> {
    let args = Args::new(dispatch);
    let p: MaskFillParamsGpu = args.params(other::FILL_PARAMS)?;
    let (rows, keys) = (p.seq_len_q as usize, p.seq_len_k as usize);
    let cells = rows
        .checked_mul(keys)
        .filter(|n| *n > 0)
        .ok_or_else(|| overflow(dispatch))?;
    let mask: &mut [bf16] = args.slice_mut(other::FILL_OUT, cells)?;
    let visibility = Visibility {
        q_offset: i64::from(p.q_abs_offset),
        causal: p.causal != 0,
        window: (p.window != 0).then_some(p.window),
        window_right: None,
    };
    mask.par_chunks_mut(keys).enumerate().for_each(|(q, row)| {
        let visible = visibility.keys(q as i64, keys);
        row.fill(bf16::NEG_INFINITY);
        row[visible].fill(bf16::ZERO);
    });
    Ok(())
}

/// Writes the class of every tile of a mask.
pub(crate) fn classify(_cpu: &Cpu, dispatch: &Dispatch) -> Result<()> {
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
    let (bq, bk) = (side(constant::BLK_BQ)?, side(constant::BLK_BK)?);
    let (nq, nk) = (rows.div_ceil(bq), keys.div_ceil(bk));
    let stride = usize::try_from(p.row_stride).map_err(|_| overflow(dispatch))?;
    let cells = rows
        .checked_sub(1)
        .and_then(|last| last.checked_mul(stride))
        .and_then(|start| start.checked_add(keys))
        .filter(|_| keys > 0)
        .ok_or_else(|| overflow(dispatch))?;
    let tiles = nq.checked_mul(nk).ok_or_else(|| overflow(dispatch))?;
    let mask: &[bf16] = args.slice(other::BLK_MASK, cells)?;
    let classes: &mut [u8] = args.slice_mut(other::BLK_OUT, tiles)?;
    classes
        .par_chunks_mut(nk)
        .enumerate()
        .for_each(|(qt, row)| {
            for (kt, class) in row.iter_mut().enumerate() {
                let (q, k) = (qt * bq, kt * bk);
                *class = TileClass::of_mask(q..q + bq, k..k + bk, rows, keys, |q, k| {
                    mask[q * stride + k].to_f32()
                }) as u8;
            }
        });
    Ok(())
}
