//! Dispatches of the mask fills and the tile classes, read back into work.

use super::{Read, overflow};
use crate::attention::{Role, Tile, Visibility};
use crate::backend::access::Access;
use crate::backend::command::{ClassifyTiles, FillBlocks, FillMask, Slot, Work};
use crate::backend::metal::bindings::{constant, other};
use crate::backend::shared_params::{BlkParamsGpu, BlockFillParamsGpu, MaskFillParamsGpu};
use crate::compat::args::Args;
use crate::dtype::DType;
use crate::error::Result;
use crate::runtime::capture::RawDispatch;

pub(super) fn fill(args: &Args<'_>, raw: &RawDispatch, dtype: DType) -> Read {
    let p: MaskFillParamsGpu = args.params(other::FILL_PARAMS)?;
    let cells = (p.seq_len_q as usize)
        .checked_mul(p.seq_len_k as usize)
        .filter(|n| *n > 0)
        .ok_or_else(|| overflow(args))?;
    let mask = args.operand(other::FILL_OUT, cells, dtype, Access::Write)?;
    args.grid([p.seq_len_q.into(), 1, 1])?;
    threads_of_a_row(args, raw)?;
    let work = Work::FillMask(FillMask {
        query_len: p.seq_len_q,
        key_len: p.seq_len_k,
        dtype,
        visibility: Visibility {
            q_offset: i64::from(p.q_abs_offset),
            causal: p.causal != 0,
            window: (p.window != 0).then_some(p.window as usize),
            window_right: None,
        },
    });
    Ok((work, vec![(Slot::Operand(Role::Mask), mask)]))
}

/// Any number of threads shares a row.
fn threads_of_a_row(args: &Args<'_>, raw: &RawDispatch) -> Result<()> {
    let [threads, y, z] = raw.threadgroup.to_array();
    let along_x = [threads.max(1), 1, 1];
    args.same("a threadgroup along x only", along_x, [threads, y, z])
}

pub(super) fn fill_blocks(args: &Args<'_>, raw: &RawDispatch) -> Read {
    let p: BlockFillParamsGpu = args.params(other::BLOCKS_PARAMS)?;
    let len = p.len as usize;
    let cells = len.checked_mul(len).filter(|n| *n > 0);
    let cells = cells.ok_or_else(|| overflow(args))?;
    let mask = args.operand(other::BLOCKS_OUT, cells, DType::BF16, Access::Write)?;
    let ids = args.operand(other::BLOCKS_IDS, len, DType::U32, Access::Read)?;
    let positions = args.operand(other::BLOCKS_POSITIONS, len, DType::U32, Access::Read)?;
    args.grid([p.len.into(), 1, 1])?;
    threads_of_a_row(args, raw)?;
    let work = Work::FillBlocks(FillBlocks {
        len: p.len,
        causal: p.causal != 0,
        window: (p.window != 0).then_some(p.window),
    });
    let operands = vec![
        (Slot::Operand(Role::Mask), mask),
        (Slot::SequenceIds, ids),
        (Slot::Positions, positions),
    ];
    Ok((work, operands))
}

pub(super) fn classify(args: &Args<'_>, raw: &RawDispatch, dtype: DType) -> Read {
    let p: BlkParamsGpu = args.params(other::BLK_PARAMS)?;
    let side = |index| {
        let size = raw.constants().int(index).unwrap_or(0);
        let side = usize::try_from(size).ok().filter(|n| *n > 0);
        side.ok_or_else(|| {
            args.fail(format!(
                "constant {index}: expected a tile side, got {size}"
            ))
        })
    };
    let tile = Tile {
        bq: side(constant::BLK_BQ)?,
        bk: side(constant::BLK_BK)?,
    };
    let (rows, keys) = (p.seq_len_q as usize, p.seq_len_k as usize);
    let (nq, nk) = tile.count(rows, keys);
    let stride = usize::try_from(p.row_stride).map_err(|_| overflow(args))?;
    let cells = rows
        .checked_sub(1)
        .and_then(|last| last.checked_mul(stride))
        .and_then(|start| start.checked_add(keys))
        .filter(|_| keys > 0)
        .ok_or_else(|| overflow(args))?;
    let tiles = nq.checked_mul(nk).ok_or_else(|| overflow(args))?;
    let mask = args.operand(other::BLK_MASK, cells, dtype, Access::Read)?;
    let classes = args.operand(other::BLK_OUT, tiles, DType::U8, Access::Write)?;
    let tiles = [nq as u64, nk as u64];
    args.same("NQ and NK", tiles, [p.nq.into(), p.nk.into()])?;
    args.grid([nk as u64, nq as u64, 1])?;
    args.threadgroup(&[1])?;
    let work = Work::ClassifyTiles(ClassifyTiles {
        query_len: p.seq_len_q,
        key_len: p.seq_len_k,
        row_stride: stride,
        dtype,
        tile,
    });
    let operands = vec![
        (Slot::Operand(Role::Mask), mask),
        (Slot::Operand(Role::TileClasses), classes),
    ];
    Ok((work, operands))
}
