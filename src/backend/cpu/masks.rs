//! The mask fill and the tile classes on the CPU.

use half::bf16;
use rayon::prelude::*;

use super::processors::Cpu;
use crate::attention::Role;
use crate::attention::mask::TileClass;
use crate::backend::command::{ClassifyTiles, FillMask, Slot, Span, Task};
use crate::error::Result;

/// Writes 0 where a key is visible and `-inf` where it is not.
pub(super) fn fill(cpu: &Cpu, fill: &FillMask, task: &Task<Span>) -> Result<()> {
    let (rows, keys) = (fill.query_len as usize, fill.key_len as usize);
    // SAFETY: the CPU's memory is this process's own, operands were found aligned when the task was made, and
    // nobody else uses written ones while it runs.
    let mask = unsafe { task.slice_mut::<bf16>(Slot::Operand(Role::Mask), rows * keys)? };
    let row = |(q, row): (usize, &mut [bf16])| {
        let visible = fill.visibility.keys(q as i64, keys);
        row.fill(bf16::NEG_INFINITY);
        row[visible].fill(bf16::ZERO);
    };
    cpu.install(|| mask.par_chunks_mut(keys).enumerate().for_each(row));
    Ok(())
}

/// Writes the class of every tile of a mask.
pub(super) fn classify(cpu: &Cpu, classify: &ClassifyTiles, task: &Task<Span>) -> Result<()> {
    let &ClassifyTiles {
        tile, row_stride, ..
    } = classify;
    let (rows, keys) = (classify.query_len as usize, classify.key_len as usize);
    let (tiles_down, tiles_across) = tile.count(rows, keys);
    // SAFETY: the CPU's memory is this process's own, operands were found aligned when the task was made, and
    // nobody else writes them while it runs.
    let (mask, classes) = unsafe {
        (
            task.slice::<bf16>(Slot::Operand(Role::Mask), (rows - 1) * row_stride + keys)?,
            task.slice_mut::<u8>(Slot::Operand(Role::TileClasses), tiles_down * tiles_across)?,
        )
    };
    let (bq, bk) = (tile.bq, tile.bk);
    let row = |(qt, row): (usize, &mut [u8])| {
        for (kt, class) in row.iter_mut().enumerate() {
            let (q, k) = (qt * bq, kt * bk);
            *class = TileClass::of_mask(q..q + bq, k..k + bk, rows, keys, |q, k| {
                mask[q * row_stride + k].to_f32()
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
