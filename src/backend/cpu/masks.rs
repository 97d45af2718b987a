//! The mask fills and the tile classes on the CPU.

use bytemuck::Pod;
use half::{bf16, f16};
use rayon::prelude::*;

use super::processors::Cpu;
use crate::attention::Role;
use crate::attention::mask::TileClass;
use crate::backend::command::{ClassifyTiles, FillBlocks, FillMask, Slot, Span, Task, hidden_bits};
use crate::dtype::DType;
use crate::error::Result;

/// Writes 0 where a key is visible and `-inf` where it is not.
pub(super) fn fill(cpu: &Cpu, fill: &FillMask, task: &Task<Span>) -> Result<()> {
    let (rows, keys) = (fill.query_len as usize, fill.key_len as usize);
    let hidden = hidden_bits(fill.dtype);
    // SAFETY: the CPU's memory is this process's own, operands were found aligned when the task was made, and
    // nobody else uses written ones while it runs.
    let mask = unsafe { task.slice_mut::<u16>(Slot::Operand(Role::Mask), rows * keys)? };
    let row = |(q, row): (usize, &mut [u16])| {
        let visible = fill.visibility.keys(q as i64, keys);
        row.fill(hidden);
        row[visible].fill(0);
    };
    cpu.install(|| mask.par_chunks_mut(keys).enumerate().for_each(row));
    Ok(())
}

/// Writes 0 where a key is of the row's sequence and visible, and `-inf` elsewhere.
pub(super) fn fill_blocks(cpu: &Cpu, fill: &FillBlocks, task: &Task<Span>) -> Result<()> {
    let len = fill.len as usize;
    let hidden = hidden_bits(DType::BF16);
    // SAFETY: the CPU's memory is this process's own, operands were found aligned when the task was made, and
    // nobody else writes them while it runs.
    let (ids, positions, mask) = unsafe {
        (
            task.slice::<u32>(Slot::SequenceIds, len)?,
            task.slice::<u32>(Slot::Positions, len)?,
            task.slice_mut::<u16>(Slot::Operand(Role::Mask), len * len)?,
        )
    };
    let row = |(q, row): (usize, &mut [u16])| {
        for (k, cell) in row.iter_mut().enumerate() {
            let ahead = i64::from(positions[q]) - i64::from(positions[k]);
            let visible = ids[q] == ids[k]
                && (!fill.causal || ahead >= 0)
                && fill.window.is_none_or(|window| ahead < i64::from(window));
            *cell = if visible { 0 } else { hidden };
        }
    };
    cpu.install(|| mask.par_chunks_mut(len).enumerate().for_each(row));
    Ok(())
}

/// Writes the class of every tile of a mask.
pub(super) fn classify(cpu: &Cpu, classify: &ClassifyTiles, task: &Task<Span>) -> Result<()> {
    match classify.dtype {
        DType::F16 => classify_cells::<f16>(cpu, classify, task),
        _ => classify_cells::<bf16>(cpu, classify, task),
    }
}

fn classify_cells<T: Pod + Sync + Into<f32>>(
    cpu: &Cpu,
    classify: &ClassifyTiles,
    task: &Task<Span>,
) -> Result<()> {
    let &ClassifyTiles {
        tile, row_stride, ..
    } = classify;
    let (rows, keys) = (classify.query_len as usize, classify.key_len as usize);
    let (tiles_down, tiles_across) = tile.count(rows, keys);
    // SAFETY: the CPU's memory is this process's own, operands were found aligned when the task was made, and
    // nobody else writes them while it runs.
    let (mask, classes) = unsafe {
        (
            task.slice::<T>(Slot::Operand(Role::Mask), (rows - 1) * row_stride + keys)?,
            task.slice_mut::<u8>(Slot::Operand(Role::TileClasses), tiles_down * tiles_across)?,
        )
    };
    let (bq, bk) = (tile.bq, tile.bk);
    let row = |(qt, row): (usize, &mut [u8])| {
        for (kt, class) in row.iter_mut().enumerate() {
            let (q, k) = (qt * bq, kt * bk);
            *class = TileClass::of_mask(q..q + bq, k..k + bk, rows, keys, |q, k| {
                mask[q * row_stride + k].into()
            }) as u8;
        }
    };
    cpu.install(|| {
        classes
            .par_chunks_mut(tiles_across)
            .enumerate()
            .for_each(row);
    });
    Ok(())
}
