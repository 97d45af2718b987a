//! Results against float64 from the definition, on each device.
#![allow(clippy::unwrap_used)]

mod common;

use candle_core::{DType, Device, Tensor};
use common::{cells, check, devices, error, random, reference};
use mlx_flash_attn_candle::{
    Layout, Mask, Options, QueryOffset, attention, attention_varlen, attention_varlen_with_lse,
    attention_with_lse,
};

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

fn qkv(dtype: DType, [b, h, hkv, ql, kl, d]: [usize; 6], device: &Device) -> [Tensor; 3] {
    [
        random(1, &[b, h, ql, d], dtype, device),
        random(2, &[b, hkv, kl, d], dtype, device),
        random(3, &[b, hkv, kl, d], dtype, device),
    ]
}

#[test]
fn every_dtype_and_head_dim() {
    for device in &devices() {
        for dtype in DTYPES {
            for d in [32, 64, 80, 96, 128, 192, 256, 512] {
                let [q, k, v] = qkv(dtype, [2, 4, 2, 37, 37, d], device);
                let got = attention(&q, &k, &v, &Options::default()).unwrap();
                assert_eq!((got.dims(), got.dtype()), (q.dims(), dtype));
                let (want, _) = reference(&q, &k, &v, None, &|s, _| Some(s));
                check(&format!("{dtype:?} {d}"), &got, &want);
            }
        }
    }
}

#[test]
fn f16_keys_under_f32_queries() {
    for device in &devices() {
        let [q, k, v] = qkv(DType::F32, [1, 4, 2, 5, 70, 64], device);
        let [k, v] = [k, v].map(|x| x.to_dtype(DType::F16).unwrap());
        let got = attention(&q, &k, &v, &Options::default()).unwrap();
        let (want, _) = reference(&q, &k, &v, None, &|s, _| Some(s));
        check("f16 under f32", &got, &want);
    }
}

/// The same cells, laid out in another way.
type View<'a> = (&'a str, &'a dyn Fn(&Tensor) -> Tensor);

#[test]
fn views_are_read_as_they_lie() {
    for device in &devices() {
        for dtype in DTYPES {
            let dims = [2, 4, 2, 23, 41, 64];
            let [q, k, v] = qkv(dtype, dims, device);
            let (want, _) = reference(&q, &k, &v, None, &|s, _| Some(s));
            let copy = |x: &Tensor| x.contiguous().unwrap();
            let swapped = |x: &Tensor| copy(&x.transpose(1, 2).unwrap()).transpose(1, 2).unwrap();
            let inside = |x: &Tensor| {
                let before = random(9, x.dims(), dtype, device);
                let wide = Tensor::cat(&[&before, x, &before], 2).unwrap();
                wide.narrow(2, x.dim(2).unwrap(), x.dim(2).unwrap())
                    .unwrap()
            };
            let apart = |x: &Tensor| copy(&x.transpose(2, 3).unwrap()).transpose(2, 3).unwrap();
            let views: [View<'_>; 4] = [
                ("dense", &copy),
                ("swapped", &swapped),
                ("inside a longer cache", &inside),
                ("with the head dim apart", &apart),
            ];
            for (a, of_q) in views {
                for (b, of_kv) in views {
                    let (q, k, v) = (of_q(&q), of_kv(&k), of_kv(&v));
                    let got = attention(&q, &k, &v, &Options::default()).unwrap();
                    check(&format!("{dtype:?}: Q {a}, K and V {b}"), &got, &want);
                }
            }
            // One K and V for both batches, through a stride of 0.
            let one = |x: &Tensor| x.narrow(0, 0, 1).unwrap().broadcast_as(x.shape()).unwrap();
            let (k, v) = (one(&k), one(&v));
            let got = attention(&q, &k, &v, &Options::default()).unwrap();
            let (want, _) = reference(&q, &k, &v, None, &|s, _| Some(s));
            check("one K and V", &got, &want);
        }
    }
}

#[test]
fn seq_major_is_the_same_with_heads_and_rows_swapped() {
    for device in &devices() {
        let [q, k, v] = qkv(DType::F32, [2, 4, 2, 23, 41, 64], device);
        let options = Options {
            causal: true,
            offset: Some(QueryOffset::BottomRight),
            ..Options::default()
        };
        let want = attention(&q, &k, &v, &options).unwrap();
        let seq = |x: &Tensor| x.transpose(1, 2).unwrap();
        let options = Options {
            layout: Layout::SeqMajor,
            ..options
        };
        let got = attention(&seq(&q), &seq(&k), &seq(&v), &options).unwrap();
        assert_eq!(got.dims(), [2, 23, 4, 64]);
        assert_eq!(cells(&seq(&got)), cells(&want));
    }
}

#[test]
fn bounds_and_offsets() {
    for device in &devices() {
        let [q, k, v] = qkv(DType::F32, [1, 2, 1, 30, 47, 64], device);
        for (offset, at) in [
            (QueryOffset::BottomRight, 17),
            (QueryOffset::At(0), 0),
            (QueryOffset::At(5), 5),
        ] {
            for (window, window_right, causal) in [
                (None, None, true),
                (Some(1), None, true),
                (Some(8), None, true),
                (Some(8), Some(3), false),
                (None, Some(3), false),
            ] {
                let options = Options {
                    causal,
                    offset: Some(offset),
                    window,
                    window_right,
                    ..Options::default()
                };
                let got = attention(&q, &k, &v, &options).unwrap();
                let (want, _) = reference(&q, &k, &v, None, &|s, [_, _, i, j]| {
                    let distance = (i + at) as i64 - j as i64;
                    let seen = (!causal || distance >= 0)
                        && window.is_none_or(|w| distance < w as i64)
                        && window_right.is_none_or(|w| -distance <= w as i64);
                    seen.then_some(s)
                });
                check(&format!("{options:?}"), &got, &want);
            }
        }
    }
}

/// Masks of every shape that broadcasts, as views whose strides differ.
#[test]
fn additive_masks_broadcast() {
    for device in &devices() {
        let (b, h, ql, kl) = (2, 4, 19, 33);
        let [q, k, v] = qkv(DType::F32, [b, h, 2, ql, kl, 64], device);
        let shapes: [&[usize]; 11] = [
            &[kl],
            &[1],
            &[ql, kl],
            &[ql, 1],
            &[1, kl],
            &[h, ql, kl],
            &[b, h, ql, kl],
            &[1, h, ql, kl],
            &[b, 1, ql, kl],
            &[b, 1, 1, kl],
            &[b, h, ql, 1],
        ];
        for dtype in [DType::F32, DType::F16, DType::BF16, DType::F64] {
            for shape in shapes {
                let mask = random(7, shape, dtype, device);
                // The same cells with the last two dimensions swapped in memory.
                let turned = match shape.len() {
                    1 => mask.clone(),
                    _ => {
                        let t = mask.t().unwrap().contiguous().unwrap();
                        t.t().unwrap()
                    }
                };
                let full = cells(&mask.broadcast_as((b, h, ql, kl)).unwrap());
                let (want, _) = reference(&q, &k, &v, None, &|s, [b, head, i, j]| {
                    Some(s + full[((b * h + head) * ql + i) * kl + j])
                });
                for mask in [mask, turned] {
                    let options = Options {
                        mask: Some(Mask::Add(mask)),
                        ..Options::default()
                    };
                    let got = attention(&q, &k, &v, &options).unwrap();
                    check(&format!("{dtype:?} {shape:?}"), &got, &want);
                }
            }
        }
    }
}

/// The same cells as both kinds of integer masks: 1 means what the variant says.
#[test]
fn integer_masks_attend_or_hide_by_type() {
    for device in &devices() {
        let (b, h, ql, kl) = (2, 2, 9, 33);
        let [q, k, v] = qkv(DType::F32, [b, h, 2, ql, kl, 64], device);
        let set = |b: usize, i: usize, j: usize| i != 4 && (i * 7 + j * 3 + b).is_multiple_of(4);
        let cells: Vec<u8> = (0..b * ql * kl)
            .map(|n| 3 * u8::from(set(n / (ql * kl), n / kl % ql, n % kl)))
            .collect();
        let cells = Tensor::from_vec(cells, (b, 1, ql, kl), device).unwrap();
        for dtype in [DType::U8, DType::U32, DType::I64] {
            let cells = cells.to_dtype(dtype).unwrap();
            for (mask, attends) in [
                (Mask::Attend(cells.clone()), true),
                (Mask::Hide(cells), false),
            ] {
                let what = format!("{dtype:?}, 1 attends: {attends}");
                let options = Options {
                    mask: Some(mask),
                    ..Options::default()
                };
                let got = attention(&q, &k, &v, &options).unwrap();
                let (want, _) = reference(&q, &k, &v, None, &|s, [b, _, i, j]| {
                    (set(b, i, j) == attends).then_some(s)
                });
                check(&what, &got, &want);
                // Row 4 sees nothing, or everything.
                let row = common::cells(&got.narrow(2, 4, 1).unwrap());
                assert_eq!(row.iter().all(|x| *x == 0.0), attends, "{what}");
            }
        }
    }
}

#[test]
fn cap_sinks_slopes_and_log_sum_exp() {
    for device in &devices() {
        let (h, len) = (4, 45);
        let [q, k, v] = qkv(DType::F32, [2, h, 2, len, len, 64], device);
        let (sinks, slopes) = ([0.5, -1.0, 2.0, 0.0], [0.5, 0.25, 0.125, 0.0625]);
        let per_head = |x: [f64; 4]| Tensor::new(&x, device).unwrap();
        let options = Options {
            softcap: Some(1.5),
            causal: true,
            sinks: Some(per_head(sinks)),
            alibi_slopes: Some(per_head(slopes)),
            ..Options::default()
        };
        let (got, lse) = attention_with_lse(&q, &k, &v, &options).unwrap();
        let (want, want_lse) = reference(&q, &k, &v, Some(&sinks), &|s, [_, h, i, j]| {
            let s = 1.5 * (s / 1.5).tanh() - slopes[h] * (i as f64 - j as f64).abs();
            (j <= i).then_some(s)
        });
        check("output", &got, &want);
        assert_eq!((lse.dims(), lse.dtype()), (&[2, h, len][..], DType::F32));
        check("log-sum-exp", &lse, &want_lse);
        // Without asking for it the same output.
        assert_eq!(
            cells(&attention(&q, &k, &v, &options).unwrap()),
            cells(&got)
        );
    }
}

#[test]
fn scale_is_the_callers() {
    for device in &devices() {
        let [q, k, v] = qkv(DType::F32, [1, 2, 2, 20, 20, 64], device);
        let options = Options {
            scale: Some(0.5),
            ..Options::default()
        };
        let got = attention(&q, &k, &v, &options).unwrap();
        let (want, _) = reference(&q, &k, &v, None, &|s, _| Some(s * 4.0));
        check("scale", &got, &want);
    }
}

#[test]
fn packed_sequences_are_each_their_own() {
    for device in &devices() {
        let (h, hkv, d) = (4, 2, 64);
        let (lens_q, lens_k) = ([7, 1, 20], [9, 30, 20]);
        let sum = |lens: [usize; 3]| -> Vec<u32> {
            let ends = lens.iter().scan(0, |at, len| {
                *at += *len as u32;
                Some(*at)
            });
            std::iter::once(0).chain(ends).collect()
        };
        let (cu_q, cu_k) = (sum(lens_q), sum(lens_k));
        let q = random(1, &[28, h, d], DType::F32, device);
        let (k, v) = (
            random(2, &[59, hkv, d], DType::F32, device),
            random(3, &[59, hkv, d], DType::F32, device),
        );
        let mask = random(4, &[h, 28, 30], DType::F32, device);
        for masked in [false, true] {
            let options = Options {
                causal: true,
                offset: Some(QueryOffset::BottomRight),
                mask: masked.then(|| Mask::Add(mask.clone())),
                ..Options::default()
            };
            let (got, lse) = attention_varlen_with_lse(&q, &k, &v, &cu_q, &cu_k, &options).unwrap();
            let alone = attention_varlen(&q, &k, &v, &cu_q, &cu_k, &options).unwrap();
            assert_eq!(cells(&alone), cells(&got));
            assert_eq!((got.dims(), lse.dims()), (q.dims(), &[h, 28][..]));
            for n in 0..3 {
                let (at, len) = (cu_q[n] as usize, lens_q[n]);
                let rows = |x: &Tensor, at: u32, len: usize| {
                    let x = x.narrow(0, at as usize, len).unwrap();
                    x.transpose(0, 1).unwrap().unsqueeze(0).unwrap()
                };
                let options = Options {
                    mask: masked.then(|| {
                        let rows = mask.narrow(1, at, len).unwrap();
                        Mask::Add(rows.narrow(2, 0, lens_k[n]).unwrap())
                    }),
                    ..options.clone()
                };
                let (want, want_lse) = attention_with_lse(
                    &rows(&q, cu_q[n], len),
                    &rows(&k, cu_k[n], lens_k[n]),
                    &rows(&v, cu_k[n], lens_k[n]),
                    &options,
                )
                .unwrap();
                let part = rows(&got, cu_q[n], len);
                let off = error(&cells(&part), &cells(&want));
                assert!(off < 1e-6, "sequence {n}, masked {masked}: {off}");
                let off = error(&cells(&lse.narrow(1, at, len).unwrap()), &cells(&want_lse));
                assert!(off < 1e-6, "sequence {n}, masked {masked}: lse {off}");
            }
        }
    }
}

/// Calls one after another whose operands and results are dropped at once, while other work of the
/// same stream still reads them: on several threads, each with a stream of its own.
#[test]
fn memory_is_given_back_in_the_streams_order() {
    fn each(device: &Device, thread: u64) -> Vec<f32> {
        let sums: Vec<Tensor> = (0..100)
            .map(|n| {
                let x = random(100 * thread + n % 7, &[1, 2, 300, 64], DType::F32, device);
                let y = attention(&x, &x, &x, &Options::default()).unwrap();
                // Long enough to be running when what it reads is dropped.
                let products = y.matmul(&y.t().unwrap()).unwrap();
                products.matmul(&y).unwrap().sum_all().unwrap()
            })
            .collect();
        let sums = Tensor::stack(&sums, 0).unwrap();
        sums.to_vec1().unwrap()
    }
    let on = |place: usize| {
        std::thread::scope(|scope| {
            let threads =
                [0, 1, 2].map(|thread| scope.spawn(move || each(&devices()[place], thread)));
            threads.map(|thread| thread.join().unwrap())
        })
    };
    for place in 0..devices().len() {
        for sums in on(place) {
            for (n, sum) in sums.iter().enumerate() {
                assert!(
                    (sum - sums[n % 7]).abs() <= 1e-3 * sum.abs(),
                    "{n}: {sums:?}"
                );
            }
        }
    }
}
