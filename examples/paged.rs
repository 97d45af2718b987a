//! Decoding of several sequences over a paged key/value cache: sequences grow, end and begin, and one command that was
//! prepared once serves every step. Block table and lengths are buffers, which a step refills.
//!
//! ```sh
//! cargo run --release --example paged
//! ```
#![allow(clippy::print_stdout)]

use half::f16;
use mlx_flash_attn::attention::oracle::{self, Inputs, Precision, Values};
use mlx_flash_attn::attention::{
    KeyLengths, Layout, Pages, Problem, QueryOffset, Shape, tolerance,
};
use mlx_flash_attn::ops::{self, Operands};
use mlx_flash_attn::{DType, DeviceKind, MlxDevice, MlxError, Result};

const HEADS: usize = 8;
const KV_HEADS: usize = 2;
const DIM: usize = 64;
/// Elements of a token in a page `[page_size, KV_HEADS, DIM]`.
const ROW: usize = KV_HEADS * DIM;
const SEQUENCES: usize = 3;
const PAGES: Pages = Pages {
    count: 16,
    page_size: 4,
    per_sequence: 5,
};

fn problem() -> Result<Problem> {
    let shape = Shape {
        batch: SEQUENCES,
        heads: HEADS,
        kv_heads: KV_HEADS,
        query_len: 1,
        key_len: PAGES.per_sequence * PAGES.page_size,
        qk_dim: DIM,
        v_dim: DIM,
    };
    Problem::builder(DType::F16, shape)
        .layout(Layout::SeqMajor)
        .pages(PAGES)
        .key_lengths(KeyLengths::Device)
        .causal(true)
        .query_offset(QueryOffset::BottomRight)
        .build()
}

/// A projection, as a model would compute it.
fn projected(token: usize, len: usize) -> Vec<f16> {
    let value = |i: usize| f16::from_f32(((token * 31 + i * 7) as f32 * 0.17).sin());
    (0..len).map(value).collect()
}

fn none_free() -> MlxError {
    MlxError::InvalidArgument("no page is free".into())
}

fn main() -> Result<()> {
    let device = MlxDevice::open(DeviceKind::Cpu)?;
    let problem = problem()?;
    let halves = |len: usize| device.alloc_buffer(len * 2, DType::F16, vec![len]);
    let pool = PAGES.count * PAGES.page_size * ROW;
    let (k, v) = (halves(pool)?, halves(pool)?);
    let (q, out) = (
        halves(SEQUENCES * HEADS * DIM)?,
        halves(SEQUENCES * HEADS * DIM)?,
    );
    let mut table = [-1; SEQUENCES * PAGES.per_sequence];
    let mut lengths = [0u32; SEQUENCES];
    let table_buffer = device.buffer_from_slice(&table, DType::I32, vec![table.len()])?;
    let length_buffer = device.buffer_from_slice(&lengths, DType::U32, vec![SEQUENCES])?;
    let operands = Operands {
        block_table: Some(&table_buffer),
        key_lengths: Some(&length_buffer),
        ..Operands::new(&q, &k, &v, &out)
    };
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
            let (page, slot) = (
                *len as usize / PAGES.page_size,
                *len as usize % PAGES.page_size,
            );
            if slot == 0 {
                pages[page] = free.pop().ok_or_else(none_free)?;
            }
            let at = (pages[page] as usize * PAGES.page_size + slot) * ROW;
            k.upload(at, &projected(3 * token + b, ROW))?;
            v.upload(at, &projected(5 * token + b, ROW))?;
            *len += 1;
        }
        let query = projected(token, SEQUENCES * HEADS * DIM);
        q.upload(0, &query)?;
        table_buffer.upload(0, &table)?;
        length_buffer.upload(0, &lengths)?;
        encoder.replay_prepared(&step)?;
        encoder.commit_and_wait()?;

        let mut o = vec![f16::ZERO; SEQUENCES * HEADS * DIM];
        out.download(0, &mut o)?;
        let (keys, values) = (k.as_slice::<f16>()?, v.as_slice::<f16>()?);
        let inputs = Inputs {
            block_table: Some(&table),
            key_lengths: Some(&lengths),
            ..Inputs::new(Values::F16(&query), Values::F16(keys), Values::F16(values))
        };
        let reference = |precision| oracle::attention(&problem, &inputs, precision);
        let (exact, naive) = (reference(Precision::Exact)?, reference(Precision::Naive)?);
        let got: Vec<f64> = o.iter().map(|x| x.to_f64()).collect();
        let error = tolerance::compare(&problem, &got, &exact, &naive);
        println!(
            "step {token}: {lengths:?} keys, {} pages free, off by {:.1e}",
            free.len(),
            error.rel_fro
        );
        assert!(error.ok, "{error:?}");
    }
    Ok(())
}
