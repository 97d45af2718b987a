//! Kernels written as large ones are.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use common::{bytes_mut, bytes_of, library, noise, run, ways};
use half::{bf16, f16};
use msl_emulator::{Binding, Dispatch};

const SOURCE: &str = include_str!("kernels/idioms.metal");

fn args(rows: i32, cols: i32, scale: f32, strides: [u64; 2]) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend_from_slice(&rows.to_ne_bytes());
    bytes.extend_from_slice(&cols.to_ne_bytes());
    bytes.extend_from_slice(&scale.to_ne_bytes());
    bytes.extend_from_slice(&[0; 4]);
    strides
        .iter()
        .for_each(|s| bytes.extend_from_slice(&s.to_ne_bytes()));
    bytes
}

fn gram<T: Copy + PartialEq + std::fmt::Debug>(
    kernel: &str,
    tolerance: f32,
    to: impl Fn(f32) -> T,
    from: impl Fn(T) -> f32,
) {
    let Some(lib) = library("idioms.metal", SOURCE) else {
        return;
    };
    let (groups, cols) = (5usize, 24usize);
    let a: Vec<T> = noise(groups * 8 * cols, 4).into_iter().map(&to).collect();
    let bias = [0.1f32, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8];
    let mut first: Option<Vec<T>> = None;
    for options in ways() {
        let mut out = vec![to(0.0); groups * 64];
        let dispatch = Dispatch::new(kernel)
            .constant(200, true)
            .constant(201, cols as i32)
            .bind(0, Binding::read_only(bytes_of(&a)))
            .bind(1, Binding::read_write(bytes_mut(&mut out)))
            .bytes(2, args(8, cols as i32, 2.0, [(8 * cols) as u64, 64]))
            .bind(3, Binding::read_only(bytes_of(&bias)))
            .threadgroups([groups as u32, 1, 1])
            .threads([32, 1, 1]);
        run(&lib, dispatch, &options).unwrap();
        for g in 0..groups {
            let row = |r: usize| &a[(g * 8 + r) * cols..(g * 8 + r + 1) * cols];
            for r in 0..8 {
                let dot = |c: usize| {
                    row(r)
                        .iter()
                        .zip(row(c))
                        .map(|(&x, &y)| from(x) * from(y))
                        .sum::<f32>()
                };
                let e: Vec<f32> = (0..8).map(|c| (2.0 * dot(c) + bias[c]).exp()).collect();
                let total: f32 = e.iter().sum();
                for c in 0..8 {
                    let got = from(out[g * 64 + r * 8 + c]);
                    assert!(
                        (got - e[c] / total).abs() < tolerance,
                        "{kernel}: {got} for {}",
                        e[c] / total
                    );
                }
            }
        }
        assert_eq!(first.get_or_insert_with(|| out.clone()), &out);
    }
}

#[test]
fn fragments_in_float() {
    gram("gram_softmax_f32", 1e-5, |v| v, |v| v);
}

#[test]
fn fragments_in_half() {
    gram("gram_softmax_f16", 1e-3, f16::from_f32, f16::to_f32);
}

#[test]
fn fragments_in_bfloat() {
    gram("gram_softmax_bf16", 4e-3, bf16::from_f32, bf16::to_f32);
}

#[test]
fn casts() {
    let Some(lib) = library("idioms.metal", SOURCE) else {
        return;
    };
    let src: Vec<f32> = (0..256).map(|i| (i % 128) as f32 / 64.0).collect();
    for options in ways() {
        let mut out = vec![f16::ZERO; 256];
        let dispatch = Dispatch::new("cast_rows")
            .bytes(0, args(0, 0, 0.0, [512, 256]))
            .bind(1, Binding::read_only(bytes_of(&src)))
            .bind(2, Binding::read_write(bytes_mut(&mut out)))
            .threadgroup_memory(0, 4 * 32 * 2 + 32 * 4)
            .threadgroups([2, 1, 1])
            .threads([32, 1, 1]);
        run(&lib, dispatch, &options).unwrap();
        let total: f32 = src[..128].iter().sum();
        for (i, got) in out.iter().enumerate() {
            let from = i / 128 * 128 + (31 - i % 128 / 4) * 4 + i % 4;
            assert!((got.to_f32() - src[from] / total).abs() < 1e-4);
        }
    }
}
