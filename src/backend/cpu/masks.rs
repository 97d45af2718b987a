//! The mask fill and the tile classes on the CPU.

use half::bf16;
use rayon::prelude::*;

use super::Cpu;
use crate::attention::mask::{TileClass, Visibility};
use crate::backend::Dispatch;
use crate::backend::checked::{Classes, Fill};
use crate::error::Result;

/// Writes 0 where a key is visible and `-inf` where it is not.
pub(crate) fn fill(cpu: &Cpu, dispatch: &Dispatch) -> Result<()> {
    let Fill { params: p, mask } = Fill::read(dispatch)?;
    // SAFETY: the CPU's memory is this process's own; written operands overlap nothing else, and
    // nobody else uses them while the dispatch runs.
    let mask = unsafe { mask.slice_mut() };
    let keys = p.seq_len_k as usize;
    let visibility = Visibility {
        q_offset: i64::from(p.q_abs_offset),
        causal: p.causal != 0,
        window: (p.window != 0).then_some(p.window),
        window_right: None,
    };
    let fill = |(q, row): (usize, &mut [bf16])| {
        let visible = visibility.keys(q as i64, keys);
        row.fill(bf16::NEG_INFINITY);
        row[visible].fill(bf16::ZERO);
    };
    cpu.install(|| mask.par_chunks_mut(keys).enumerate().for_each(fill));
    Ok(())
}

/// Writes the class of every tile of a mask.
pub(crate) fn classify(cpu: &Cpu, dispatch: &Dispatch) -> Result<()> {
    let Classes {
        params: p,
        tile,
        stride,
        mask,
        classes,
    } = Classes::read(dispatch)?;
    // SAFETY: the CPU's memory is this process's own; written operands overlap nothing else, and
    // nobody else uses them while the dispatch runs.
    let (mask, classes) = unsafe { (mask.slice(), classes.slice_mut()) };
    let (rows, keys) = (p.seq_len_q as usize, p.seq_len_k as usize);
    let (bq, bk) = (tile.bq, tile.bk);
    let columns = tile.count(rows, keys).1;
    let classify = |(qt, row): (usize, &mut [u8])| {
        for (kt, class) in row.iter_mut().enumerate() {
            let (q, k) = (qt * bq, kt * bk);
            *class = TileClass::of_mask(q..q + bq, k..k + bk, rows, keys, |q, k| {
                mask[q * stride + k].to_f32()
            }) as u8;
        }
    };
    cpu.install(|| {
        classes
            .par_chunks_mut(columns)
            .enumerate()
            .for_each(classify);
    });
    Ok(())
}
