//! What no query may see, and work that is empty.
#![allow(clippy::unwrap_used)]

mod common;

use candle_core::{DType, Tensor};
use common::{cells, check, devices, random, reference};
use mlx_flash_attn_candle::{
    Mask, Options, QueryOffset, attention, attention_varlen_with_lse, attention_with_lse,
};

/// A padded batch over a cache of which the rest was never written, as decode has it.
#[test]
fn hidden_nan_of_a_padded_cache_reaches_no_result() {
    for device in &devices() {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            for ql in [1, 5] {
                let (b, h, hkv, kl, d) = (2, 4, 2, 300, 64);
                let q = random(1, &[b, h, ql, d], dtype, device);
                let [k, v] = [2, 3].map(|n| random(n, &[b, hkv, kl, d], dtype, device));
                let used = [37, 300];
                let unwritten = |x: &Tensor, fill: f32| {
                    let parts: Vec<Tensor> = (0..b)
                        .map(|i| {
                            let rows = x.narrow(0, i, 1).unwrap().narrow(2, 0, used[i]).unwrap();
                            let rest = Tensor::full(fill, (1, hkv, kl - used[i], d), device);
                            Tensor::cat(&[rows, rest.unwrap().to_dtype(dtype).unwrap()], 2).unwrap()
                        })
                        .collect();
                    Tensor::cat(&parts, 0).unwrap()
                };
                let seen: Vec<u8> = (0..b * kl)
                    .map(|n| u8::from(n % kl < used[n / kl]))
                    .collect();
                let attend = Tensor::from_vec(seen, (b, 1, 1, kl), device).unwrap();
                let hide = attend.eq(0_u8).unwrap();
                let add = Tensor::full(f32::NEG_INFINITY, attend.dims(), device).unwrap();
                let add = attend.where_cond(&add.zeros_like().unwrap(), &add).unwrap();
                let with = |mask: &Mask, fill: f32| {
                    let options = Options {
                        mask: Some(mask.clone()),
                        ..Options::default()
                    };
                    let (k, v) = (unwritten(&k, fill), unwritten(&v, fill));
                    cells(&attention(&q, &k, &v, &options).unwrap())
                };
                for mask in [Mask::Attend(attend), Mask::Hide(hide), Mask::Add(add)] {
                    let want = with(&mask, 0.0);
                    for fill in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                        let got = with(&mask, fill);
                        assert!(got == want, "{dtype:?}, {ql} queries, {fill}: {mask:?}");
                    }
                }
            }
        }
    }
}

/// A finite number that f32 does not hold hides no key: a row of them is the mean of V.
#[test]
fn the_lowest_f64_is_added_and_hides_nothing() {
    for device in &devices() {
        let q = random(1, &[1, 1, 3, 64], DType::F32, device);
        let [k, v] = [2, 3].map(|n| random(n, &[1, 1, 20, 64], DType::F32, device));
        for (cell, seen) in [(f64::MIN, true), (f64::NEG_INFINITY, false)] {
            let mask = Tensor::full(cell, (3, 20), device).unwrap();
            let options = Options {
                mask: Some(Mask::Add(mask)),
                ..Options::default()
            };
            let got = attention(&q, &k, &v, &options).unwrap();
            if seen {
                let (want, _) = reference(&q, &k, &v, None, &|_, _| Some(0.0));
                check("the mean", &got, &want);
            } else {
                assert!(cells(&got).iter().all(|x| *x == 0.0));
            }
        }
    }
}

/// Padding to a fixed shape: rows past the last boundary are not read, and are zeros in the result.
#[test]
fn boundaries_may_end_before_the_last_row() {
    for device in &devices() {
        let pad = |x: &Tensor, rows: usize| {
            let dims = (rows, x.dim(1).unwrap(), x.dim(2).unwrap());
            let rest = Tensor::full(f32::NAN, dims, device).unwrap();
            Tensor::cat(&[x, &rest], 0).unwrap()
        };
        let q = random(1, &[12, 4, 64], DType::F32, device);
        let (k, v) = (
            random(2, &[30, 2, 64], DType::F32, device),
            random(3, &[30, 2, 64], DType::F32, device),
        );
        let bias = random(4, &[1, 20], DType::F32, device);
        let options = Options {
            causal: true,
            offset: Some(QueryOffset::BottomRight),
            mask: Some(Mask::Add(bias)),
            ..Options::default()
        };
        let (cu_q, cu_k) = ([0, 5, 12], [0, 10, 30]);
        let run = |q, k, v| attention_varlen_with_lse(q, k, v, &cu_q, &cu_k, &options).unwrap();
        let (want, want_lse) = run(&q, &k, &v);
        let (got, lse) = run(&pad(&q, 20), &pad(&k, 7), &pad(&v, 7));
        assert_eq!((got.dims(), lse.dims()), (&[32, 4, 64][..], &[4, 32][..]));
        assert_eq!(cells(&got.narrow(0, 0, 12).unwrap()), cells(&want));
        assert_eq!(cells(&lse.narrow(1, 0, 12).unwrap()), cells(&want_lse));
        let rest = cells(&got.narrow(0, 12, 20).unwrap());
        assert!(rest.iter().all(|x| *x == 0.0));
        let rest = cells(&lse.narrow(1, 12, 20).unwrap());
        assert!(rest.iter().all(|x| *x == f64::NEG_INFINITY));
    }
}

#[test]
fn empty_work_gives_empty_results_or_zeros() {
    for device in &devices() {
        let zeros = |dims: &[usize]| Tensor::zeros(dims, DType::F16, device).unwrap();
        let check = |(got, lse): (Tensor, Tensor), dims: &[usize], lse_dims: &[usize]| {
            assert_eq!((got.dims(), got.dtype()), (dims, DType::F16));
            assert_eq!((lse.dims(), lse.dtype()), (lse_dims, DType::F32));
            assert!(cells(&got).iter().all(|x| *x == 0.0));
            assert!(cells(&lse).iter().all(|x| *x == f64::NEG_INFINITY));
        };
        let sinks = Tensor::zeros(4, DType::F32, device).unwrap();
        for (b, ql, kl) in [(0, 3, 5), (2, 0, 5), (2, 3, 0), (2, 0, 0)] {
            let (q, kv) = (zeros(&[b, 4, ql, 64]), zeros(&[b, 2, kl, 64]));
            let masks = [
                None,
                Some(Mask::Add(zeros(&[ql, kl]))),
                Some(Mask::Hide(
                    Tensor::zeros((b, 1, 1, kl), DType::U8, device).unwrap(),
                )),
            ];
            for mask in masks {
                let options = Options {
                    causal: true,
                    mask,
                    sinks: Some(sinks.clone()),
                    ..Options::default()
                };
                let got = attention_with_lse(&q, &kv, &kv, &options).unwrap();
                check(got, &[b, 4, ql, 64], &[b, 4, ql]);
            }
        }
        // Sequences without queries, without keys, and none that has any.
        let (q, kv) = (
            random(1, &[6, 4, 64], DType::F16, device),
            zeros(&[8, 2, 64]),
        );
        for (cu_q, cu_k) in [
            ([0, 0, 0], [0, 0, 0]),
            ([0, 2, 6], [0, 0, 0]),
            ([0, 0, 0], [0, 5, 8]),
        ] {
            let options = Options::default();
            let got = attention_varlen_with_lse(&q, &kv, &kv, &cu_q, &cu_k, &options).unwrap();
            check(got, &[6, 4, 64], &[4, 6]);
        }
    }
}
