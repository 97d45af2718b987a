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
    let mask = task.address(Slot::Operand(Role::Mask))?.cast::<bf16>();
    // SAFETY: whoever made the task has checked that the operand holds so many elements; the CPU's memory
    // is this process's own, and nobody else uses written operands while the task runs.
    let mask = unsafe { std::slice::from_raw_parts_mut(mask, rows * keys) };
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
    let mask = task.address(Slot::Operand(Role::Mask))?.cast::<bf16>();
    let classes = task.address(Slot::Operand(Role::TileClasses))?;
    // SAFETY: whoever made the task has checked that the operands hold so many elements; the CPU's memory
    // is this process's own, and nobody else writes them while the task runs.
    let (mask, classes) = unsafe {
        (
            std::slice::from_raw_parts(mask, (rows - 1) * row_stride + keys),
            std::slice::from_raw_parts_mut(classes, tiles_down * tiles_across),
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
