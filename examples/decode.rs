//! Decoding: one query a step over a growing key/value cache with room to spare. A step sends its token's
//! query and its one row of K and of V to the device, and replays a command that was prepared once.
//!
//! ```sh
//! cargo run --release --example decode
//! ```
#![allow(clippy::print_stdout)]

use half::f16;
use mlx_flash_attn::attention::oracle::{self, Inputs, Precision, Values};
use mlx_flash_attn::attention::{Layout, Problem, QueryOffset, Shape, tolerance};
use mlx_flash_attn::ops::{self, Operands};
use mlx_flash_attn::{DType, MlxDevice, Result};

const HEADS: usize = 8;
const KV_HEADS: usize = 2;
const DIM: usize = 128;
const CAPACITY: usize = 64;
/// Elements of a token in a cache `[CAPACITY, KV_HEADS, DIM]`: all heads lie side by side.
const ROW: usize = KV_HEADS * DIM;

/// One query over the first `key_len` tokens of the cache.
fn problem(key_len: usize) -> Result<Problem> {
    let shape = Shape {
        batch: 1,
        heads: HEADS,
        kv_heads: KV_HEADS,
        query_len: 1,
        key_len,
        qk_dim: DIM,
        v_dim: DIM,
    };
    Problem::builder(DType::F16, shape)
        .layout(Layout::SeqMajor)
        .key_capacity(CAPACITY)
        .causal(true)
        .query_offset(QueryOffset::BottomRight)
        .build()
}

/// A token's projection, as a model would compute it.
fn projected(token: usize, len: usize, phase: f32) -> Vec<f16> {
    let value = |i: usize| ((token * 31 + i * 7) as f32 * 0.17 + phase).sin();
    (0..len).map(|i| f16::from_f32(value(i))).collect()
}

fn main() -> Result<()> {
    let device = MlxDevice::new()?;
    let buffer = |len: usize| device.alloc_buffer(len * 2, DType::F16, vec![len]);
    let (k, v) = (buffer(CAPACITY * ROW)?, buffer(CAPACITY * ROW)?);
    let (q, out) = (buffer(HEADS * DIM)?, buffer(HEADS * DIM)?);
    let mut step = device.prepare_command(|encoder| {
        ops::attention(encoder, &problem(1)?, &Operands::new(&q, &k, &v, &out))
    })?;
    let mut encoder = device.command_encoder()?;

    // What the host has of the cache, for the check alone.
    let (mut keys, mut values) = (Vec::new(), Vec::new());
    for token in 0..8 {
        let query = projected(token, HEADS * DIM, 0.0);
        let (key, value) = (projected(token, ROW, 1.0), projected(token, ROW, 2.0));
        q.upload(0, &query)?;
        k.upload(token * ROW, &key)?;
        v.upload(token * ROW, &value)?;
        step.set_key_len(token + 1)?;
        encoder.replay_prepared(&step)?;
        encoder.commit_and_wait()?;
        let mut o = [f16::ZERO; HEADS * DIM];
        out.download(0, &mut o)?;

        keys.extend(key);
        values.extend(value);
        let problem = problem(token + 1)?;
        let inputs = Inputs::new(
            Values::F16(&query),
            Values::F16(&keys),
            Values::F16(&values),
        );
        let reference = |precision| oracle::attention(&problem, &inputs, precision);
        let (exact, naive) = (reference(Precision::Exact)?, reference(Precision::Naive)?);
        let got: Vec<f64> = o.iter().map(|x| x.to_f64()).collect();
        let error = tolerance::compare(&problem, &got, &exact, &naive);
        println!(
            "token {token}: head 0 gives {:+.4} {:+.4} ..., off by {:.1e}",
            o[0], o[1], error.rel_fro
        );
        assert!(error.ok, "{error:?}");
    }
    Ok(())
}
