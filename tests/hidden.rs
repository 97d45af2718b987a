//! What a row does not see adds nothing to it: small problems whose right values are plain to see.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Qkv, attend, devices, download, output, shape, upload};
use mlx_flash_attn::DType;
use mlx_flash_attn::attention::{MaskSpec, Shape};
use mlx_flash_attn::ops::Operands;

/// Operands of ones.
fn ones(dtype: DType, shape: Shape) -> Qkv {
    let mut data = Qkv::new(1, dtype, shape);
    for operand in [&mut data.q, &mut data.k, &mut data.v] {
        operand.fill(1.0);
    }
    data
}

/// Fills the rows of `operand` for which `which` holds, counted over all batches and heads.
fn fill_rows(operand: &mut [f32], dim: usize, value: f32, which: impl Fn(usize) -> bool) {
    let rows = operand.chunks_mut(dim).enumerate();
    rows.filter(|(row, _)| which(*row))
        .for_each(|(_, row)| row.fill(value));
}

/// NaN, infinities and the largest numbers of either sign.
fn poison(dtype: DType) -> [f32; 5] {
    let top = match dtype {
        DType::F16 => 65_504.0,
        DType::BF16 => half::bf16::MAX.to_f32(),
        _ => f32::MAX,
    };
    [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, top, -top]
}

#[test]
fn unused_cache_rows_behind_a_padding_mask_do_not_reach_batched_decode() {
    // Batch 0 has 37 of 300 cache rows, batch 1 all of them.
    let shape = shape([2, 4, 2], (1, 300), 128);
    let seen = |b: usize, j: usize| b == 1 || j < 37;
    let cells: Vec<f32> = (0..600)
        .map(|c| f32::from(u8::from(seen(c / 300, c % 300))))
        .collect();
    let padding = MaskSpec {
        dtype: DType::U8,
        batch_stride: 300,
        head_stride: 0,
        row_stride: 0,
    };
    for device in devices() {
        for value in poison(DType::F16) {
            let mut data = ones(DType::F16, shape);
            let unused = |row: usize| !seen(row / 600, row % 300);
            fill_rows(&mut data.k, 128, value, unused);
            fill_rows(&mut data.v, 128, value, unused);
            let problem = data.builder().mask(padding).build().unwrap();
            let mask = upload(&device, &cells, DType::U8, &[2, 1, 1, 300]);
            let (_, got) = data.run_masked(&device, &problem, &mask);
            assert!(got.iter().all(|x| *x == 1.0), "{} {value}", device.kind());
        }
    }
}

#[test]
fn values_that_a_mask_hides_from_some_key_on_do_not_reach_any_row() {
    for device in devices() {
        for (dtype, dim) in [(DType::F32, 64), (DType::BF16, 128), (DType::F16, 512)] {
            // Borders on, before and after the edges of tiles.
            for border in [1, 7, 16, 31, 40, 64, 100, 127] {
                for value in poison(dtype) {
                    let mut data = ones(dtype, shape([1, 1, 1], (4, 128), dim));
                    fill_rows(&mut data.v, dim, value, |j| j >= border);
                    let cells: Vec<f32> = (0..4 * 128)
                        .map(|c| f32::from(u8::from(c % 128 < border)))
                        .collect();
                    let mask = upload(&device, &cells, DType::U8, &[4, 128]);
                    let spec = MaskSpec::plane(DType::U8, 128);
                    let problem = data.builder().mask(spec).build().unwrap();
                    let (_, got) = data.run_masked(&device, &problem, &mask);
                    let what = format!("{} {dtype} from {border} {value}", device.kind());
                    assert!(got.iter().all(|x| *x == 1.0), "{what}: {got:?}");
                }
            }
        }
    }
}

#[test]
fn a_row_without_keys_is_exactly_zero_beside_a_nan_that_nobody_sees() {
    for device in devices() {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let mut data = ones(dtype, shape([1, 1, 1], (2, 8), 64));
            fill_rows(&mut data.v, 64, f32::NAN, |j| j == 5);
            let cells: Vec<f32> = (0..16)
                .map(|c| f32::from(u8::from(c < 8 && c != 5)))
                .collect();
            let mask = upload(&device, &cells, DType::U8, &[2, 8]);
            let spec = MaskSpec::plane(DType::U8, 8);
            let problem = data.builder().mask(spec).build().unwrap();
            let (_, got) = data.run_masked(&device, &problem, &mask);
            let what = format!("{} {dtype}", device.kind());
            assert!(got[..64].iter().all(|x| *x == 1.0), "{what}: row 0");
            assert!(got[64..].iter().all(|x| *x == 0.0), "{what}: row 1");
        }
    }
}

#[test]
fn a_bias_of_minus_2e38_over_a_whole_row_weighs_all_keys_alike() {
    for device in devices() {
        let mut data = ones(DType::F32, shape([1, 1, 1], (1, 4), 64));
        data.q.fill(0.0);
        data.k.fill(0.0);
        for (j, row) in data.v.chunks_mut(64).enumerate() {
            row.fill(j as f32 + 1.0);
        }
        let spec = MaskSpec::plane(DType::F32, 4);
        let problem = data.builder().mask(spec).lse(true).build().unwrap();
        let mask = upload(&device, &[-2.0e38; 4], DType::F32, &[1, 4]);
        let [q, k, v, out] = data.buffers(&device);
        let lse = output(&device, 1, DType::F32);
        let operands = Operands {
            mask: Some(&mask),
            lse: Some(&lse),
            ..Operands::new(&q, &k, &v, &out)
        };
        attend(&device, &problem, &operands);
        let (got, lse) = (download(&out), download(&lse)[0]);
        let what = format!("{}: {} {lse:e}", device.kind(), got[0]);
        assert!(got.iter().all(|x| (x - 2.5).abs() < 1e-6), "{what}");
        assert!((lse / -2.0e38 - 1.0).abs() < 1e-6, "{what}");
    }
}
