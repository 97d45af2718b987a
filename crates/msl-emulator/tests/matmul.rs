//! Matrix kernels against a plain computation.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use common::{bytes_mut, bytes_of, library, noise, run, ways};
use half::{bf16, f16};
use msl_emulator::{Binding, Dispatch, DispatchOptions};

const SOURCE: &str = include_str!("kernels/matmul.metal");

fn reference(a: &[f32], b: &[f32], [m, n, k]: [usize; 3]) -> Vec<f64> {
    let mut c = vec![0.0; m * n];
    for i in 0..m {
        for j in 0..n {
            c[i * n + j] = (0..k)
                .map(|x| f64::from(a[i * k + x]) * f64::from(b[x * n + j]))
                .sum();
        }
    }
    c
}

fn check<T: Copy>(kernel: &str, shape: [usize; 3], to: impl Fn(f32) -> T, from: impl Fn(T) -> f32) {
    let Some(lib) = library("matmul.metal", SOURCE) else {
        return;
    };
    let [m, n, k] = shape;
    let a: Vec<T> = noise(m * k, 1).into_iter().map(&to).collect();
    let b: Vec<T> = noise(k * n, 2).into_iter().map(&to).collect();
    let wide = |v: &[T]| v.iter().map(|&x| from(x)).collect::<Vec<f32>>();
    let expected = reference(&wide(&a), &wide(&b), shape);
    let mut first: Option<Vec<u32>> = None;
    for options in ways() {
        let mut c = vec![f32::NAN; m * n];
        let groups = [n.div_ceil(32) as u32, m.div_ceil(32) as u32, 1];
        let dispatch = Dispatch::new(kernel)
            .bind(0, Binding::read_only(bytes_of(&a)))
            .bind(1, Binding::read_only(bytes_of(&b)))
            .bind(2, Binding::read_write(bytes_mut(&mut c)))
            .bytes(3, bytes_of(&[m as u32, n as u32, k as u32]))
            .threadgroups(groups)
            .threads([128, 1, 1]);
        let counters = run(&lib, dispatch, &options).unwrap();
        for (got, want) in c.iter().zip(&expected) {
            assert!(
                (f64::from(*got) - want).abs() < 1e-4,
                "{kernel}: {got} for {want}"
            );
        }
        let bits: Vec<u32> = c.iter().map(|v| v.to_bits()).collect();
        assert_eq!(
            *first.get_or_insert_with(|| bits.clone()),
            bits,
            "{kernel} under {options:?}"
        );
        let tiles = u64::from(groups[0]) * u64::from(groups[1]);
        let bk = if kernel.ends_with("32") { 32 } else { 16 };
        let k_tiles = k.div_ceil(bk) as u64;
        assert_eq!(
            counters.matrix_multiplies,
            tiles * k_tiles * (bk as u64 / 8) * 16
        );
        assert_eq!(counters.threadgroup_barriers, tiles * k_tiles * 2);
        assert_eq!(
            counters.simdgroup_barriers,
            tiles * k_tiles * (bk as u64 / 8) * 4
        );
        if options.check {
            assert_eq!(counters.device_bytes_written, 4 * (m * n) as u64);
        }
    }
}

#[test]
fn half_matmul() {
    check("matmul_half_bk16", [64, 96, 48], f16::from_f32, f16::to_f32);
    check("matmul_half_bk16", [33, 47, 29], f16::from_f32, f16::to_f32);
}

#[test]
fn bfloat_matmul() {
    check(
        "matmul_bfloat_bk16",
        [64, 64, 64],
        bf16::from_f32,
        bf16::to_f32,
    );
    check(
        "matmul_bfloat_bk16",
        [31, 65, 17],
        bf16::from_f32,
        bf16::to_f32,
    );
}

#[test]
fn float_matmul() {
    check("matmul_float_bk16", [40, 40, 40], |v| v, |v| v);
    check("matmul_float_bk32", [32, 70, 100], |v| v, |v| v);
}

#[test]
fn elements_and_transposes() {
    let Some(lib) = library("matmul.metal", SOURCE) else {
        return;
    };
    let a: Vec<f16> = noise(64, 3).into_iter().map(f16::from_f32).collect();
    for options in ways() {
        let mut out = vec![0.0f32; 129];
        let dispatch = Dispatch::new("scale_and_transpose")
            .bind(0, Binding::read_only(bytes_of(&a)))
            .bind(1, Binding::read_write(bytes_mut(&mut out)))
            .threads([32, 1, 1]);
        run(&lib, dispatch, &options).unwrap();
        for r in 0..8 {
            for c in 0..8 {
                // Columns 0, 2, 4 and 6 are the first elements of their lanes.
                let want = a[c * 8 + r].to_f32() * 2.0 + if c % 2 == 0 { 1.0 } else { 0.0 };
                assert_eq!(out[c * 8 + r], want, "({r}, {c})");
                assert_eq!(out[64 + r * 8 + c], want, "({r}, {c})");
            }
        }
        assert_eq!(out[128], 7.0);
    }
}

#[test]
fn matrices_outlive_the_ring() {
    let Some(lib) = library("matmul.metal", SOURCE) else {
        return;
    };
    let mut a = vec![0.0f32; 128];
    for i in 0..8 {
        a[i * 9] = 3.0;
        a[64 + i * 9] = 0.5;
    }
    for options in ways() {
        let mut out = vec![0.0f32; 64];
        let dispatch = Dispatch::new("long_lived")
            .bind(0, Binding::read_only(bytes_of(&a)))
            .bind(1, Binding::read_write(bytes_mut(&mut out)))
            .threads([32, 1, 1]);
        run(&lib, dispatch, &options).unwrap();
        assert!(
            (0..64).all(|i| out[i] == if i % 9 == 0 { 700.0 * 0.25 + 9.0 } else { 0.0 }),
            "{out:?}"
        );
    }
}

#[test]
fn kernels_are_listed() {
    let Some(lib) = library("matmul.metal", SOURCE) else {
        return;
    };
    let k = lib.kernel("matmul_half_bk16").unwrap();
    assert_eq!(k.max_threads, Some(128));
    assert_eq!(k.threadgroup_bytes, 32 * 24 * 2 + 16 * 40 * 2);
    assert_eq!(
        lib.kernel("matmul_float_bk32").unwrap().threadgroup_bytes,
        32 * 40 * 4 + 32 * 40 * 4
    );
    let e = lib.kernel("nothing").unwrap_err().to_string();
    assert!(
        e.contains("nothing") && e.contains("matmul_half_bk16"),
        "{e}"
    );
    assert!(run(&lib, Dispatch::new("nothing"), &DispatchOptions::default()).is_err());
}
