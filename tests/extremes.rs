//! Finite inputs at the ends of their ranges never give a NaN.
#![allow(clippy::unwrap_used)]

mod common;

use half::{bf16, f16};

use common::{
    Plain, Qkv, assert_close, attend, devices, distance, download, output, seen, shape, upload,
};
use mlx_flash_attn::attention::oracle::{self, Inputs, Precision, Values};
use mlx_flash_attn::attention::{MaskSpec, QueryOffset};
use mlx_flash_attn::ops::Operands;
use mlx_flash_attn::{CpuOptions, DType, DeviceKind, MlxDevice};

const DTYPES: [DType; 3] = [DType::BF16, DType::F16, DType::F32];

#[test]
fn scores_that_overflow_give_no_nan() {
    for device in devices() {
        for dtype in DTYPES {
            // Products that f32 holds, times a scale that it does not.
            let size = if dtype == DType::F16 { 1.0e4 } else { 1.0e18 };
            for (size, scale) in [(1.0, f32::MAX), (size, 1.0e31)] {
                let mut data = Qkv::new(1, dtype, shape([1, 1, 1], (9, 40), 64));
                let sized = |x: f32| common::round(x.signum() * size, dtype);
                data.q.iter_mut().for_each(|x| *x = sized(*x));
                data.k.iter_mut().for_each(|x| *x = sized(*x));
                let problem = data.builder().scale(scale).build().unwrap();
                let (_, got) = data.run(&device, &problem);
                let what = format!("{} {dtype} {size} {scale}", device.kind());
                assert!(got.iter().all(|x| x.is_finite()), "{what}");
            }
        }
    }
}

#[test]
fn values_near_the_end_of_the_range_come_out() {
    // Tiles sum weighted values before they divide, so some headroom is theirs.
    for device in devices() {
        for (dtype, top) in [
            (DType::BF16, 5.0e36),
            (DType::F16, 6.0e4),
            (DType::F32, 5.0e36),
        ] {
            let mut data = Qkv::new(2, dtype, shape([1, 1, 1], (5, 33), 64));
            data.v
                .iter_mut()
                .for_each(|x| *x = common::round(x.signum() * top, dtype));
            let want = data.plain(&Plain::new(&|_, _, _| seen(true)));
            let (_, got) = data.run(&device, &data.builder().build().unwrap());
            let scaled: Vec<f32> = got.iter().map(|x| x / top).collect();
            let want: Vec<f64> = want.iter().map(|x| x / f64::from(top)).collect();
            assert_close(&format!("{dtype}"), &scaled, &want, dtype);
        }
    }
}

#[test]
fn the_largest_finite_biases_decide_and_give_no_nan() {
    for device in devices() {
        for (dtype, big) in [
            (DType::F32, 3.0e38f32),
            (DType::BF16, 3.0e38),
            (DType::F16, 6.0e4),
        ] {
            let data = Qkv::new(3, DType::F32, shape([1, 1, 1], (4, 40), 64));
            // All as low as can be; all as high; one key high; one key low.
            for (base, odd) in [(-big, -big), (big, big), (-big, big), (0.0, -big)] {
                let cells: Vec<f32> = (0..4 * 40)
                    .map(|c| if c % 40 == 7 { odd } else { base })
                    .collect();
                let mask = upload(&device, &cells, dtype, &[4, 40]);
                let problem = data
                    .builder()
                    .mask(MaskSpec::plane(dtype, 40))
                    .build()
                    .unwrap();
                let (_, got) = data.run_masked(&device, &problem, &mask);
                let what = format!("{dtype} {base} {odd}");
                assert!(got.iter().all(|x| x.is_finite()), "{what}");
                if base != odd {
                    let want = data.plain(&Plain::new(&|_, _, j| seen((j == 7) == (odd > 0.0))));
                    assert!(
                        distance(&got, &want) < 1e-5,
                        "{what}: {}",
                        distance(&got, &want)
                    );
                }
            }
        }
    }
}

#[test]
fn every_finite_mask_and_sink_counts_as_in_float64() {
    // The largest finite number of each dtype, and what log2 units, which f32 overflows above 2.4e38,
    // would take for an infinity.
    let sizes = [0.0, 1.0, 1e20, 1e38, 1.2e38, 1.7e38, 2e38, 2.5e38, 3.4e38];
    let levels: Vec<f32> = sizes.into_iter().flat_map(|x| [-x, x]).collect();
    let sinks = [None, Some(f32::NEG_INFINITY)]
        .into_iter()
        .chain([-3.4e38, -2e38, 0.0, 2e38, 3.4e38].map(Some));
    let (rows, keys) = (levels.len(), 40);
    for device in devices() {
        for (dtype, top) in [
            (DType::F32, f32::MAX),
            (DType::BF16, 3.389e38),
            (DType::F16, 65504.0),
        ] {
            let mut data = Qkv::new(4, DType::F32, shape([1, 1, 1], (rows, keys), 64));
            // Scores of 0, so that no sum of a score and a mask is rounded.
            data.q.fill(0.0);
            // A row of one level, in which one key stands out.
            let cells: Vec<f32> = (0..rows * keys)
                .map(|c| levels[c / keys] * if c % keys == 7 { 0.9 } else { 1.0 })
                .map(|x| common::round(x.clamp(-top, top), dtype))
                .collect();
            let mask = upload(&device, &cells, dtype, &[rows, keys]);
            for sink in sinks.clone() {
                let problem = data.builder().mask(MaskSpec::plane(dtype, keys)).lse(true);
                let problem = problem.sinks(sink.is_some()).build().unwrap();
                let sink_values = [sink.unwrap_or(0.0)];
                let sink_buffer = upload(&device, &sink_values, DType::F32, &[1]);
                let lse = output(&device, rows, DType::F32);
                let [q, k, v, out] = data.buffers(&device);
                let operands = Operands {
                    mask: Some(&mask),
                    sinks: sink.map(|_| &sink_buffer),
                    lse: Some(&lse),
                    ..Operands::new(&q, &k, &v, &out)
                };
                attend(&device, &problem, &operands);
                let mask_values: (Vec<bf16>, Vec<f16>) = cells
                    .iter()
                    .map(|x| (bf16::from_f32(*x), f16::from_f32(*x)))
                    .unzip();
                let mask = match dtype {
                    DType::BF16 => Values::BF16(&mask_values.0),
                    DType::F16 => Values::F16(&mask_values.1),
                    _ => Values::F32(&cells),
                };
                let [q, k, v] = [&data.q, &data.k, &data.v].map(|x| Values::F32(x));
                let inputs = Inputs {
                    mask: Some(mask),
                    sinks: sink.map(|_| &sink_values[..]),
                    ..Inputs::new(q, k, v)
                };
                let want = oracle::attention(&problem, &inputs, Precision::Exact).unwrap();
                let what = format!("{} {dtype} sink {sink:?}", device.kind());
                assert_close(&what, &download(&out), &want.o, DType::F32);
                for (row, got) in download(&lse).into_iter().enumerate() {
                    let score = want.lse[row];
                    let error = (f64::from(got) - score).abs();
                    assert!(
                        error <= 2e-5 * (1.0 + score.abs()),
                        "{what}, row of {}: {got}, expected {score}",
                        levels[row]
                    );
                }
            }
        }
    }
}

#[test]
fn a_softcap_of_any_size_caps_as_in_float64() {
    for device in devices() {
        for (n, cap) in [1e-3, 0.5, 50.0, 1e4, 1e20, 1e30, 5e37, 1e38, f32::MAX]
            .into_iter()
            .enumerate()
        {
            for dtype in DTYPES {
                let data = Qkv::new(60 + n as u64, dtype, shape([1, 2, 1], (9, 40), 64));
                let problem = data.builder().softcap(cap).build().unwrap();
                let (_, got) = data.run(&device, &problem);
                let [q, k, v] = [&data.q, &data.k, &data.v];
                let inputs = Inputs::new(Values::F32(q), Values::F32(k), Values::F32(v));
                let want = oracle::attention(&problem, &inputs, Precision::Exact).unwrap();
                let what = format!("{} {dtype} softcap {cap}", device.kind());
                assert_close(&what, &got, &want.o, dtype);
            }
        }
    }
}

#[test]
fn keys_whose_scores_overflow_downwards_are_seen() {
    // Every product is below f32's lowest number: the keys tie there, and the row is their mean.
    for device in devices() {
        for dtype in [DType::BF16, DType::F32] {
            for masked in [false, true] {
                // A Hopper kernel cannot tell such a row under a mask from one that sees no key; f32 has another.
                if masked && device.kind() == DeviceKind::Cuda && dtype != DType::F32 {
                    continue;
                }
                let mut data = Qkv::new(7, dtype, shape([1, 2, 1], (70, 150), 64));
                data.q.fill(common::round(1.0e19, dtype));
                data.k.fill(common::round(-1.0e20, dtype));
                let shows = |i: usize, j: usize| !masked || !(i + j).is_multiple_of(3);
                let cells: Vec<u8> = (0..70 * 150)
                    .map(|c| u8::from(shows(c / 150, c % 150)))
                    .collect();
                let mask = device
                    .buffer_from_slice(&cells, DType::U8, vec![70, 150])
                    .unwrap();
                let mut builder = data.builder();
                if masked {
                    builder = builder.mask(MaskSpec::plane(DType::U8, 150));
                }
                let problem = builder.build().unwrap();
                let (_, got) = if masked {
                    data.run_masked(&device, &problem, &mask)
                } else {
                    data.run(&device, &problem)
                };
                data.q.fill(0.0);
                let want = data.plain(&Plain::new(&|_, i, j| seen(shows(i, j))));
                assert_close(
                    &format!("{} {dtype} {masked}", device.kind()),
                    &got,
                    &want,
                    dtype,
                );
            }
        }
    }
}

#[test]
fn small_weights_count_together_beside_a_large_one() {
    // The kernels sum weights in f32 and multiply them in 16 bits: both must hold what thousands of keys
    // weigh together beside one whose score is higher, wherever it lies among the tiles.
    let keys = 4097;
    for device in devices() {
        for dtype in [DType::BF16, DType::F16] {
            for high in [8.0, 10.5, 12.0, 30.0] {
                for at in [0, keys / 2, keys - 1] {
                    let mut data = Qkv::new(8, dtype, shape([1, 1, 1], (65, keys), 64));
                    let scaled = |i: usize, x: f32| if i.is_multiple_of(64) { x } else { 0.0 };
                    let set = |values: &mut [f32], x: &dyn Fn(usize) -> f32| {
                        for (i, value) in values.iter_mut().enumerate() {
                            *value = scaled(i, x(i / 64));
                        }
                    };
                    set(&mut data.q, &|_| 8.0);
                    set(&mut data.k, &|key| if key == at { high } else { 0.0 });
                    data.v.fill(1.0);
                    let (_, got) = data.run(&device, &data.builder().build().unwrap());
                    let what = format!("{} {dtype} {high} at {at}", device.kind());
                    assert_close(&what, &got, &vec![1.0; got.len()], dtype);
                }
            }
        }
    }
}

#[test]
fn scores_may_leap_from_tile_to_tile() {
    // From the last key to the first, and for every second row from the first to the last: by as much as f16's
    // weights hold, by more, and by more than any f32 weight holds. (In f32 such scores lose the bits that its tolerance asks for.)
    let leaps = [0.0f32, 4.0, 8.4, 10.0, 12.0, 40.0, 85.0, 87.0, 90.0, 200.0];
    let (rows, keys, each) = (65, 1500, 150);
    for device in devices() {
        for (dtype, dim) in [
            (DType::BF16, 64),
            (DType::F16, 64),
            (DType::F16, 128),
            (DType::F16, 256),
        ] {
            let mut data = Qkv::new(11, dtype, shape([1, 1, 1], (rows, keys), dim));
            for (i, row) in data.q.chunks_mut(dim).enumerate() {
                row[0] = if i % 2 == 0 { 8.0 } else { -8.0 };
            }
            for (j, key) in data.k.chunks_mut(dim).enumerate() {
                let lead: f32 = leaps[..(keys - 1 - j) / each + 1].iter().sum();
                key[0] = common::round(lead * (dim as f32).sqrt() / 8.0, dtype);
            }
            let want = data.plain(&Plain::new(&|_, _, _| seen(true)));
            let (_, got) = data.run(&device, &data.builder().build().unwrap());
            let what = format!("{} {dtype} {dim}", device.kind());
            assert_close(&what, &got, &want, dtype);
        }
    }
}

#[test]
fn a_nan_among_overflowed_scores_gives_the_same_bits_on_any_number_of_threads() {
    let (rows, keys) = (600, 96);
    let mut data = Qkv::new(9, DType::F32, shape([1, 1, 1], (rows, keys), 64));
    data.q.fill(1.0e19);
    // One row whose scores are usual, and which is done again for the NaN, with rows beside it.
    data.q[..64].fill(0.0);
    data.k.fill(-1.0e20);
    data.v[70 * 64 + 5] = f32::NAN;
    let cells: Vec<u8> = (0..rows * keys)
        .map(|c| u8::from(c % keys == 70 || (c / keys * 7 + c % keys * 5) % 11 < 4))
        .collect();
    let outputs: Vec<Vec<u8>> = [1, 2, 7]
        .into_iter()
        .map(|threads| {
            let options = CpuOptions {
                threads: Some(threads),
                ..CpuOptions::default()
            };
            let device = MlxDevice::cpu(options).unwrap();
            let mask = device
                .buffer_from_slice(&cells, DType::U8, vec![rows, keys])
                .unwrap();
            let problem = data
                .builder()
                .mask(MaskSpec::plane(DType::U8, keys))
                .build()
                .unwrap();
            data.run_masked(&device, &problem, &mask).0
        })
        .collect();
    assert!(outputs.iter().all(|bytes| *bytes == outputs[0]));
}

#[test]
fn a_class_of_2_shows_keys_whose_scores_overflowed_behind_a_mask_of_infinities() {
    for device in devices() {
        let mut data = Qkv::new(10, DType::F32, shape([1, 1, 1], (40, 64), 64));
        data.q.fill(1.0e19);
        data.k.fill(-1.0e20);
        let cells = vec![f32::NEG_INFINITY; 40 * 64];
        let mask = upload(&device, &cells, DType::F32, &[40, 64]);
        let classes = upload(&device, &[2.0; 2 * 4], DType::U8, &[2, 4]);
        let problem = data
            .builder()
            .mask(MaskSpec::plane(DType::F32, 64))
            .tile_classes(true)
            .build()
            .unwrap();
        let [q, k, v, out] = data.buffers(&device);
        let operands = Operands {
            mask: Some(&mask),
            tile_classes: Some(&classes),
            ..Operands::new(&q, &k, &v, &out)
        };
        attend(&device, &problem, &operands);
        data.q.fill(0.0);
        let want = data.plain(&Plain::new(&|_, _, _| seen(true)));
        assert_close(
            &device.kind().to_string(),
            &download(&out),
            &want,
            DType::F32,
        );
    }
}

#[test]
fn a_slope_that_overflows_leaves_what_is_hidden_hidden() {
    for device in devices() {
        for slope in [-1.0e37, -3.0e38, 3.0e38] {
            let data = Qkv::new(11, DType::F32, shape([1, 1, 1], (9, 70), 64));
            let cells: Vec<u8> = (0..9 * 70).map(|c| u8::from(c % 70 % 3 == 0)).collect();
            let mask = device
                .buffer_from_slice(&cells, DType::U8, vec![9, 70])
                .unwrap();
            let slopes = upload(&device, &[slope], DType::F32, &[1]);
            let problem = data
                .builder()
                .mask(MaskSpec::plane(DType::U8, 70))
                .alibi(true)
                .query_offset(QueryOffset::At(0))
                .build()
                .unwrap();
            let [q, k, v, out] = data.buffers(&device);
            let operands = Operands {
                mask: Some(&mask),
                alibi_slopes: Some(&slopes),
                ..Operands::new(&q, &k, &v, &out)
            };
            attend(&device, &problem, &operands);
            let what = format!("{} {slope:e}", device.kind());
            assert!(download(&out).iter().all(|x| x.is_finite()), "{what}");
        }
    }
}
