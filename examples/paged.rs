//! Decoding of several sequences over a paged key/value cache: sequences grow, end and begin, and one command that was
//! prepared once serves every step. Block table and lengths are buffers, which a step refills.
//!
//! ```sh
//! cargo run --release --example paged
//! ```
#![allow(clippy::print_stdout)]

use half::f16;
use mlx_flash_attn::attention::oracle::{self, Inputs, Precision, Values};
use mlx_flash_attn::attention::{KeyLengths, Pages, Problem, QueryOffset, tolerance};
use mlx_flash_attn::ops::{self, Operands};
use mlx_flash_attn::{DType, DeviceKind, MlxDevice, MlxError, Result};

const HEADS: usize = 8;
const KV_HEADS: usize = 2;
const DIM: usize = 64;
/// Elements of a token in a page `[page_size, KV_HEADS, DIM]`.
const ROW: usize = KV_HEADS * DIM;
const SEQUENCES: usize = 3;
/// Elements of a query of each sequence, `[SEQUENCES, HEADS, DIM]`.
const QUERIES: usize = SEQUENCES * HEADS * DIM;
const PAGES: Pages = Pages {
    count: 16,
    page_size: 4,
    per_sequence: 5,
};

/// A projection, as a model would compute it.
fn projected(token: usize, len: usize) -> Vec<f16> {
    let value = |i: usize| f16::from_f32(((token * 31 + i * 7) as f32 * 0.17).sin());
    (0..len).map(value).collect()
}

fn main() -> Result<()> {
    let most = PAGES.per_sequence * PAGES.page_size;
    let problem = Problem::varlen_queries(DType::F16, HEADS, KV_HEADS, most, DIM, &[0, 1, 2, 3])
        .pages(PAGES)
        .key_lengths(KeyLengths::Device)
        .causal(true)
        .query_offset(QueryOffset::BottomRight)
        .build()?;
    let device = MlxDevice::open(DeviceKind::Cpu)?;
    let halves = |len: usize| device.alloc_buffer(len * 2, DType::F16, vec![len]);
    let pool = PAGES.count * PAGES.page_size * ROW;
    let (q, out) = (halves(QUERIES)?, halves(QUERIES)?);
    let (k, v) = (halves(pool)?, halves(pool)?);
    let (mut table, mut lengths) = ([-1; SEQUENCES * PAGES.per_sequence], [0u32; SEQUENCES]);
    let table_buffer = device.buffer_from_slice(&table, DType::I32, vec![table.len()])?;
    let length_buffer = device.buffer_from_slice(&lengths, DType::U32, vec![SEQUENCES])?;
    let mut operands = Operands::new(&q, &k, &v, &out);
    operands.block_table = Some(&table_buffer);
    operands.key_lengths = Some(&length_buffer);
    let step = device.prepare_command(|encoder| ops::attention(encoder, &problem, &operands))?;
    let mut encoder = device.command_encoder()?;
    let mut free: Vec<i32> = (0..16).rev().collect();
    for token in 0..12 {
        for (b, len) in lengths.iter_mut().enumerate() {
            let pages = &mut table[b * PAGES.per_sequence..][..PAGES.per_sequence];
            // Sequence b ends after 5 + 2 b tokens, and another takes its place.
            if *len as usize == 5 + 2 * b {
                free.extend(pages.iter().filter(|page| **page >= 0));
                pages.fill(-1);
                *len = 0;
            }
            let page = &mut pages[*len as usize / PAGES.page_size];
            let slot = *len as usize % PAGES.page_size;
            if slot == 0 {
                let none = || MlxError::InvalidArgument("no page is free".into());
                *page = free.pop().ok_or_else(none)?;
            }
            let at = (*page as usize * PAGES.page_size + slot) * ROW;
            k.upload(at, &projected(3 * token + b, ROW))?;
            v.upload(at, &projected(5 * token + b, ROW))?;
            *len += 1;
        }
        let query = projected(token, QUERIES);
        q.upload(0, &query)?;
        table_buffer.upload(0, &table)?;
        length_buffer.upload(0, &lengths)?;
        encoder.replay_prepared(&step)?;
        encoder.commit_and_wait()?;
        let (keys, values) = (k.as_slice::<f16>()?, v.as_slice::<f16>()?);
        let mut inputs = Inputs::new(Values::F16(&query), Values::F16(keys), Values::F16(values));
        inputs.block_table = Some(&table);
        inputs.key_lengths = Some(&lengths);
        let reference = |precision| oracle::attention(&problem, &inputs, precision);
        let (exact, naive) = (reference(Precision::Exact)?, reference(Precision::Naive)?);
        // The reference has heads outside, the output inside.
        let o = out.as_slice::<f16>()?;
        let of = |n: usize| o[(n / DIM % SEQUENCES * HEADS + n / DIM / SEQUENCES) * DIM + n % DIM];
        let got: Vec<f64> = (0..QUERIES).map(|n| of(n).to_f64()).collect();
        let error = tolerance::compare(&problem, &got, &exact, &naive);
        let (left, off) = (free.len(), error.rel_fro);
        println!("step {token}: {lengths:?} keys, {left} pages free, off by {off:.1e}");
        assert!(error.ok, "{error:?}");
    }
    Ok(())
}
