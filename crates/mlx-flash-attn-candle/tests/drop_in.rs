//! The functions that stand in for candle's, against their definitions.
#![allow(clippy::unwrap_used)]

mod common;

use candle_core::{DType, Device, Tensor};
use common::{cells, check, devices, random, reference};
use mlx_flash_attn_candle::{
    flash_attn, flash_attn_varlen, flash_attn_varlen_windowed, flash_attn_windowed, sdpa,
};

fn seq_major(x: &Tensor) -> Tensor {
    x.transpose(1, 2).unwrap()
}

#[test]
fn sdpa_is_candles() {
    for device in &devices() {
        let q = random(1, &[2, 4, 9, 64], DType::F32, device);
        let (k, v) = (
            random(2, &[2, 2, 31, 64], DType::F32, device),
            random(3, &[2, 2, 31, 64], DType::F32, device),
        );
        let mask = random(4, &[2, 4, 9, 31], DType::F32, device);
        let bias = cells(&mask);
        let capped = |s: f64| 3.0 * (s * 8.0 * 0.2 / 3.0).tanh();
        let (want, _) = reference(&q, &k, &v, None, &|s, [b, h, i, j]| {
            Some(capped(s) + bias[((b * 4 + h) * 9 + i) * 31 + j])
        });
        // A mask takes the place of the causal bound, as there.
        for causal in [false, true] {
            check(
                "a mask",
                &sdpa(&q, &k, &v, Some(&mask), causal, 0.2, 3.0).unwrap(),
                &want,
            );
        }
        let (want, _) = reference(&q, &k, &v, None, &|s, [_, _, i, j]| {
            (j <= i + 22).then_some(capped(s))
        });
        check(
            "causal",
            &sdpa(&q, &k, &v, None, true, 0.2, 3.0).unwrap(),
            &want,
        );
        // 1.0 is no cap, as there.
        let (want, _) = reference(&q, &k, &v, None, &|s, _| Some(s * 8.0 * 0.2));
        check(
            "no cap",
            &sdpa(&q, &k, &v, None, false, 0.2, 1.0).unwrap(),
            &want,
        );
    }
}

/// candle's takes floats of Q's dtype and of the whole shape, and nothing else.
#[test]
fn sdpa_refuses_the_masks_that_candles_refuses() {
    let q = random(1, &[2, 4, 3, 64], DType::F16, &Device::Cpu);
    let kv = random(2, &[2, 2, 5, 64], DType::F16, &Device::Cpu);
    let run = |dims: &[usize], dtype| {
        let mask = Tensor::zeros(dims, dtype, &Device::Cpu).unwrap();
        sdpa(&q, &kv, &kv, Some(&mask), false, 0.125, 1.0)
    };
    let whole = [2, 4, 3, 5];
    run(&whole, DType::F16).unwrap();
    let refused = |result: candle_core::Result<Tensor>, words: &[&str]| {
        let message = result.unwrap_err().to_string();
        for word in words {
            assert!(message.contains(word), "no {word:?} in {message:?}");
        }
    };
    for dtype in [DType::U8, DType::U32, DType::I64] {
        let words = ["mask", "F16", "Mask::Hide", "Mask::Attend"];
        refused(run(&whole, dtype), &words);
    }
    refused(
        run(&whole, DType::F32),
        &["mask", "F16", "F32", "Mask::Add"],
    );
    for dims in [&[3, 5][..], &[1, 1, 3, 5], &[2, 4, 3, 4]] {
        let got = format!("{dims:?}");
        refused(
            run(dims, DType::F16),
            &["[2, 4, 3, 5]", &got, "broadcast_as"],
        );
    }
}

/// A bound wider than the keys is none, and a left bound alone ends `kL` keys to the right.
#[test]
fn flash_attn_bounds_past_the_keys_are_candles() {
    let q = random(1, &[1, 2, 12, 64], DType::F32, &Device::Cpu);
    let kv = random(2, &[1, 2, 4, 64], DType::F32, &Device::Cpu);
    let (sq, skv) = (seq_major(&q), seq_major(&kv));
    for (left, right, bounds) in [
        (None, Some(5), (None, None)),
        (Some(5), None, (None, None)),
        (Some(5), Some(0), (None, Some(0))),
        (Some(2), Some(5), (Some(2), Some(4))),
        (Some(2), None, (Some(2), Some(4))),
        (None, Some(4), (None, Some(4))),
    ] {
        let got = flash_attn_windowed(&sq, &skv, &skv, 0.125, left, right).unwrap();
        let (left, right): (Option<i64>, Option<i64>) = bounds;
        let (want, _) = reference(&q, &kv, &kv, None, &|s, [_, _, i, j]| {
            let distance = i as i64 - 8 - j as i64;
            let seen = left.is_none_or(|l| distance <= l) && right.is_none_or(|r| -distance <= r);
            seen.then_some(s)
        });
        check(&format!("{left:?} {right:?}"), &seq_major(&got), &want);
    }
}

#[test]
fn flash_attn_is_candles() {
    for device in &devices() {
        let q = random(1, &[2, 4, 9, 64], DType::F16, device);
        let (k, v) = (
            random(2, &[2, 2, 31, 64], DType::F16, device),
            random(3, &[2, 2, 31, 64], DType::F16, device),
        );
        let (sq, sk, sv) = (seq_major(&q), seq_major(&k), seq_major(&v));
        for (left, right) in [
            (None, None),
            (None, Some(0)),
            (Some(5), Some(0)),
            (Some(5), Some(2)),
            (Some(3), None),
        ] {
            let got = flash_attn_windowed(&sq, &sk, &sv, 0.125, left, right).unwrap();
            let (want, _) = reference(&q, &k, &v, None, &|s, [_, _, i, j]| {
                let distance = i as i64 + 22 - j as i64;
                let seen = left.is_none_or(|l| distance <= l as i64)
                    && right.is_none_or(|r| -distance <= r as i64);
                seen.then_some(s)
            });
            check(&format!("{left:?} {right:?}"), &seq_major(&got), &want);
            if left.is_none() {
                let causal = right.is_some();
                let same = flash_attn(&sq, &sk, &sv, 0.125, causal).unwrap();
                assert_eq!(cells(&same), cells(&got));
            }
        }
    }
}

#[test]
fn flash_attn_varlen_is_candles() {
    for device in &devices() {
        let pack = |x: &Tensor| x.flatten(0, 1).unwrap();
        let [q, k, v] = [1, 2, 3].map(|n| random(n, &[3, 12, 2, 64], DType::F32, device));
        let (pq, pk, pv) = (pack(&q), pack(&k), pack(&v));
        let cu = Tensor::new(&[0_u32, 12, 24, 36], device).unwrap();
        for causal in [false, true] {
            let got = flash_attn_varlen(&pq, &pk, &pv, &cu, &cu, 12, 12, 0.125, causal).unwrap();
            let want = flash_attn(&q, &k, &v, 0.125, causal).unwrap();
            // On a GPU another kernel may serve them.
            check("packed", &got, &cells(&want));
        }
        let windowed = |longest| {
            flash_attn_varlen_windowed(
                &pq,
                &pk,
                &pv,
                &cu,
                &cu,
                longest,
                12,
                0.125,
                Some(3),
                Some(0),
            )
        };
        let want = flash_attn_windowed(&q, &k, &v, 0.125, Some(3), Some(0)).unwrap();
        check("windowed", &windowed(12).unwrap(), &cells(&want));
        // Rows past the last boundary, as an engine with fixed shapes has them.
        let pad = |x: &Tensor| x.pad_with_zeros(0, 0, 4).unwrap();
        let (pq, pk, pv) = (pad(&pq), pad(&pk), pad(&pv));
        let got = flash_attn_varlen(&pq, &pk, &pv, &cu, &cu, 12, 12, 0.125, true).unwrap();
        let want = flash_attn(&q, &k, &v, 0.125, true).unwrap();
        check("padded", &got, &cells(&pad(&pack(&want))));
        let message = windowed(11).unwrap_err().to_string();
        assert!(
            message.contains("seqlens_q") && message.contains("max_seqlen = 11"),
            "{message}"
        );
    }
}
