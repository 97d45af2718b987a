//! A causal window of 64 keys: what lies outside is neither computed nor able to change a result.
//!
//! ```sh
//! cargo run --release --example sliding_window
//! ```
#![allow(clippy::print_stdout)]

use half::f16;
use mlx_flash_attn::attention::class_tile;
use mlx_flash_attn::attention::{Problem, Shape, TileClass};
use mlx_flash_attn::ops::{self, Operands};
use mlx_flash_attn::{DType, MlxDevice, Result};

const LEN: usize = 512;
const DIM: usize = 64;
const WINDOW: usize = 64;

fn attend(problem: &Problem, q: &[f16], k: &[f16], v: &[f16]) -> Result<Vec<f16>> {
    let device = MlxDevice::new()?;
    let buffer = |data: &[f16]| device.buffer_from_slice(data, DType::F16, vec![1, 1, LEN, DIM]);
    let (q, k, v) = (buffer(q)?, buffer(k)?, buffer(v)?);
    let out = device.alloc_buffer(q.byte_len(), DType::F16, q.shape().to_vec())?;
    let mut encoder = device.command_encoder()?;
    let operands = Operands::new(&q, &k, &v, &out);
    ops::attention(&mut encoder, problem, &operands)?;
    encoder.commit_and_wait()?;
    Ok(out.as_slice::<f16>()?.to_vec())
}

fn main() -> Result<()> {
    let shape = Shape {
        batch: 1,
        heads: 1,
        kv_heads: 1,
        query_len: LEN,
        key_len: LEN,
        qk_dim: DIM,
        v_dim: DIM,
    };
    let problem = Problem::builder(DType::F16, shape)
        .causal(true)
        .window(WINDOW)
        .build()?;

    // Row 300 sees exactly 64 keys, itself included.
    let visibility = problem.sequence(0).visibility;
    println!("row 300 sees keys {:?}", visibility.keys(300, LEN));

    let tile = class_tile(DIM);
    let (rows, columns) = tile.count(LEN, LEN);
    let skipped = (0..rows * columns)
        .filter(|i| {
            let (r, c) = (i / columns * tile.bq, i % columns * tile.bk);
            let class = visibility.tile_class(r..r + tile.bq, c..c + tile.bk, LEN);
            class == TileClass::Skip
        })
        .count();
    println!("{skipped} of {} tiles are skipped", rows * columns);

    let data = |phase: f32| -> Vec<f16> {
        let value = |i: usize| f16::from_f32((i as f32 * 0.37 + phase).sin());
        (0..LEN * DIM).map(value).collect()
    };
    let (q, mut k, mut v) = (data(0.0), data(1.0), data(2.0));
    let before = attend(&problem, &q, &k, &v)?;
    // Key 100 is seen by rows 100 to 163 and by no other.
    for x in [&mut k, &mut v] {
        x[100 * DIM..101 * DIM].fill(f16::from_f32(10.0));
    }
    let after = attend(&problem, &q, &k, &v)?;
    let changed: Vec<usize> = (0..LEN)
        .filter(|row| {
            let row = row * DIM..(row + 1) * DIM;
            before[row.clone()] != after[row]
        })
        .collect();
    assert_eq!(changed, (100..164).collect::<Vec<_>>());
    println!("a change of key 100 reaches rows 100 to 163 and no other");
    Ok(())
}
