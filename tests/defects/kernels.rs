//! Defects that give wrong numbers.

use mlx_flash_attn::attention::tolerance::relative_bound;
use mlx_flash_attn::attention::{MaskSpec, Role, Strides};
use mlx_flash_attn::ops::Operands;
use mlx_flash_attn::ops::flash_attn_prefill::{
    FlashAttnPrefillLayout, dispatch_flash_attn_prefill_bf16_d64,
    dispatch_flash_attn_prefill_bf16_d256, dispatch_flash_attn_prefill_bf16_d256_with_blk,
};
use mlx_flash_attn::ops::flash_attn_prefill_d512::{
    dispatch_flash_attn_prefill_bf16_d512, dispatch_flash_attn_prefill_bf16_d512_with_blk,
};
use mlx_flash_attn::{DType, KernelRegistry, MlxBuffer, MlxDevice, MlxError};

use crate::common::{
    Plain, Qkv, assert_close, classify, commit, devices, distance, download, output, round, seen,
    shape, tiles, upload, upload_guarded,
};
use crate::prefill;

const BF16: DType = DType::BF16;

#[test]
fn defect_01_tile_classes_look_at_every_column() {
    for device in devices() {
        // One visible cell anywhere makes a tile mixed, one masked cell makes it not free.
        for (dim, bq, bk) in [(512, 8, 64), (256, 32, 16)] {
            for (common, odd) in [(f32::NEG_INFINITY, 0.0), (0.0, f32::NEG_INFINITY)] {
                let cells = bq * bk;
                // A tile for each cell, one above the other.
                let mut mask = vec![common; cells * cells];
                (0..cells).for_each(|tile| mask[tile * cells + tile] = odd);
                let mask = upload(&device, &mask, BF16, &[bq * cells, bk]);
                let blk = classify(&device, &mask, &tiles((bq * cells) as u32, bk as u32, dim));
                let classes = download(&blk);
                assert!(
                    classes[..cells].iter().all(|c| *c == 1.0),
                    "d{dim} {common}"
                );
            }
        }
        // So a causal mask with classes lets no later token through, however loud it is.
        for (dim, lengths) in [(512, (100, 100)), (256, (70, 90))] {
            let mut data = Qkv::new(1, BF16, shape([1, 1, 1], lengths, dim as usize));
            for (j, row) in data.v.chunks_mut(dim as usize).enumerate() {
                row.iter_mut()
                    .for_each(|x| *x = round(*x * (1.0 + j as f32), BF16));
            }
            let (ql, kl) = (lengths.0 as u32, lengths.1 as u32);
            let cells: Vec<f32> = (0..lengths.0 * lengths.1)
                .map(|c| match c % lengths.1 <= c / lengths.1 {
                    true => 0.0,
                    false => f32::NEG_INFINITY,
                })
                .collect();
            let mask = upload(&device, &cells, BF16, &[lengths.0, lengths.1]);
            let blk = classify(&device, &mask, &tiles(ql, kl, dim));
            let [q, k, v, out] = data.buffers(&device);
            let params = prefill((1, 1), (ql, kl), dim, false);
            let dispatch = match dim {
                512 => dispatch_flash_attn_prefill_bf16_d512_with_blk,
                _ => dispatch_flash_attn_prefill_bf16_d256_with_blk,
            };
            commit(&device, |e| {
                let registry = &mut KernelRegistry::new();
                let (mask, blk) = (Some(&mask), Some(&blk));
                dispatch(e, &device, registry, &q, &k, &v, mask, blk, &out, &params)
            });
            let want = data.plain(&Plain::new(&|_, i, j| seen(j <= i)));
            assert_close("causal with classes", &download(&out), &want, BF16);
        }
    }
}

#[test]
fn defect_02_causal_stops_at_the_last_key() {
    for device in devices() {
        for (ql, kl) in [(33u32, 33u32), (70, 20), (40, 1), (65, 64)] {
            for dim in [64u32, 256, 512] {
                let data = Qkv::new(
                    2,
                    BF16,
                    shape([1, 2, 1], (ql as usize, kl as usize), dim as usize),
                );
                let [q, k, v, out] = data.buffers(&device);
                let params = prefill((2, 1), (ql, kl), dim, true);
                commit(&device, |e| {
                    let registry = &mut KernelRegistry::new();
                    match dim {
                        64 => dispatch_flash_attn_prefill_bf16_d64(
                            e,
                            &device,
                            registry,
                            &q,
                            &k,
                            &v,
                            None,
                            &out,
                            &params,
                            FlashAttnPrefillLayout::HeadMajor,
                        ),
                        256 => dispatch_flash_attn_prefill_bf16_d256(
                            e, &device, registry, &q, &k, &v, None, &out, &params,
                        ),
                        _ => dispatch_flash_attn_prefill_bf16_d512(
                            e, &device, registry, &q, &k, &v, None, &out, &params,
                        ),
                    }
                });
                let want = data.plain(&Plain::new(&|_, i, j| seen(j <= i)));
                let what = format!("d{dim} {ql}x{kl}");
                assert_close(&what, &download(&out), &want, BF16);
            }
        }
    }
}

#[test]
fn defect_03_nothing_past_the_last_key_is_read_at_head_dim_512() {
    for device in devices() {
        for kl in [1usize, 2, 7, 31, 63, 64, 65, 100] {
            let data = Qkv::new(3, BF16, shape([1, 1, 1], (9, kl), 512));
            // K and V end in NaNs, at least 64 rows of them.
            let guard = 64 * 512;
            let [q, k, v] =
                [&data.q, &data.k, &data.v].map(|x| upload_guarded(&device, x, BF16, guard));
            let out = output(&device, data.q.len(), BF16);
            let params = prefill((1, 1), (9, kl as u32), 512, false);
            commit(&device, |e| {
                let registry = &mut KernelRegistry::new();
                dispatch_flash_attn_prefill_bf16_d512(
                    e, &device, registry, &q, &k, &v, None, &out, &params,
                )
            });
            let want = data.plain(&Plain::new(&|_, _, _| seen(true)));
            assert_close(&format!("kL {kl}"), &download(&out), &want, BF16);
        }
    }
}

#[test]
fn defect_04_rows_past_65536_are_their_own() {
    for device in devices() {
        let data = Qkv::new(4, BF16, shape([1, 1, 1], (65_600, 6), 64));
        let (_, got) = data.run(&device, &data.builder().build().unwrap());
        let want = data.plain(&Plain::new(&|_, _, _| seen(true)));
        // The rows that a 16-bit index would write twice, and those it would never reach.
        for rows in [0..64, 65_530..65_600] {
            let rows = rows.start * 64..rows.end * 64;
            assert_close("rows", &got[rows.clone()], &want[rows], BF16);
        }
    }
}

/// A sparse buffer of `bytes`: zeroed memory that nobody touches is not there.
fn sparse(device: &MlxDevice, bytes: usize, dtype: DType) -> Option<MlxBuffer> {
    match device.alloc_buffer(bytes, dtype, vec![bytes / dtype.size_of()]) {
        Ok(buffer) => Some(buffer),
        Err(MlxError::BufferAllocationError { bytes }) => {
            eprintln!("SKIPPED on {}: no {bytes} bytes", device.kind());
            None
        }
        Err(other) => panic!("{other}"),
    }
}

#[test]
fn defect_04_mask_offsets_past_32_bits_are_their_own() {
    for device in devices() {
        let (rows, keys, dim) = (2usize, 40usize, 64usize);
        let data = Qkv::new(5, BF16, shape([1, 1, 1], (rows, keys), dim));
        let visible = |i: usize, j: usize| (i + j).is_multiple_of(3);
        // Row 1 starts past 2^32 cells of a bool mask, past 2^31 cells of a bf16 one.
        for (dtype, row_stride) in [
            (DType::U8, (1usize << 32) + 24),
            (BF16, (1usize << 31) + 24),
        ] {
            let len = (row_stride + keys) * dtype.size_of();
            let Some(mut mask) = sparse(&device, len, dtype) else {
                continue;
            };
            {
                let cells = mask.as_mut_slice::<u8>().unwrap();
                for i in 0..rows {
                    for j in 0..keys {
                        let at = (i * row_stride + j) * dtype.size_of();
                        match dtype {
                            DType::U8 => cells[at] = u8::from(visible(i, j)),
                            // The upper byte of -inf is 0xff, the lower 0x80.
                            _ if !visible(i, j) => {
                                cells[at..at + 2].copy_from_slice(&0xff80u16.to_ne_bytes());
                            }
                            _ => {}
                        }
                    }
                }
            }
            let spec = MaskSpec {
                dtype,
                batch_stride: 0,
                head_stride: 0,
                row_stride,
            };
            let problem = data.builder().mask(spec).build().unwrap();
            let (_, got) = data.run_masked(&device, &problem, &mask);
            let want = data.plain(&Plain::new(&|_, i, j| seen(visible(i, j))));
            assert_close(&format!("{dtype} mask"), &got, &want, BF16);
        }
    }
}

#[test]
fn defect_04_key_and_value_offsets_past_32_bits_are_their_own() {
    for device in devices() {
        let (batch, keys, dim) = (2usize, 33usize, 64usize);
        let data = Qkv::new(6, BF16, shape([batch, 1, 1], (5, keys), dim));
        let stride = (1usize << 31) + 4096;
        let Some(mut cache) = sparse(&device, (stride + 2 * keys * dim) * 2, BF16) else {
            continue;
        };
        {
            let cells = cache.as_mut_slice::<half::bf16>().unwrap();
            for b in 0..batch {
                for (first, values) in [(0, &data.k), (keys * dim, &data.v)] {
                    for x in 0..keys * dim {
                        cells[b * stride + first + x] =
                            half::bf16::from_f32(values[b * keys * dim + x]);
                    }
                }
            }
        }
        let strides = Strides {
            batch: stride,
            head: 0,
            seq: dim,
        };
        let problem = data
            .builder()
            .strides(Role::Key, strides)
            .strides(Role::Value, strides)
            .build()
            .unwrap();
        let [q, _, _, out] = data.buffers(&device);
        let elements = stride + keys * dim;
        let k = cache.slice_view(0, elements);
        let v = cache.slice_view((keys * dim * 2) as u64, elements);
        crate::common::attend(&device, &problem, &Operands::new(&q, &k, &v, &out));
        let want = data.plain(&Plain::new(&|_, _, _| seen(true)));
        assert_close("keys and values", &download(&out), &want, BF16);
    }
}

#[test]
fn defect_05_scores_are_scaled_in_f32() {
    for device in devices() {
        for (dtype, gain) in [(BF16, 8.0), (DType::F16, 20.0)] {
            // Large scores, so that their relative error shows in the weights.
            let data = Qkv::new(7, dtype, shape([1, 2, 2], (40, 60), 128));
            let scale = gain / 128f32.sqrt();
            let problem = data.builder().scale(scale).build().unwrap();
            let plain = Plain {
                scale: Some(f64::from(scale)),
                ..Plain::new(&|_, _, _| seen(true))
            };
            let (_, got) = data.run(&device, &problem);
            let want = data.plain(&plain);
            assert_close("scaled once", &got, &want, dtype);

            // What scaling Q in its own dtype gives is refused.
            let log2e = std::f32::consts::LOG2_E;
            let twice = Qkv {
                q: data
                    .q
                    .iter()
                    .map(|x| round(x * scale * log2e, dtype))
                    .collect(),
                k: data.k.clone(),
                v: data.v.clone(),
                ..data
            };
            let impostor = twice.plain(&Plain {
                scale: Some(1.0 / f64::from(log2e)),
                ..Plain::new(&|_, _, _| seen(true))
            });
            let impostor: Vec<f32> = impostor.iter().map(|x| round(*x as f32, dtype)).collect();
            let off = distance(&impostor, &want);
            assert!(off > relative_bound(dtype), "{dtype}: {off:.2e}");
        }
    }
}

#[test]
fn defect_06_biases_below_the_range_of_f16_stay_finite() {
    for device in devices() {
        // The one bias of every cell cancels out; scores are multiples of 1/64 that no sum rounds.
        let (ql, kl, dim) = (9usize, 70usize, 512usize);
        let mut data = Qkv::new(8, BF16, shape([1, 1, 1], (ql, kl), dim));
        data.q.iter_mut().enumerate().for_each(|(n, x)| {
            *x = if n % dim == 0 { 1.0 } else { 0.0 };
        });
        data.k.iter_mut().enumerate().for_each(|(n, x)| {
            *x = if n % dim == 0 {
                (n / dim % 9) as f32 / 4.0
            } else {
                0.0
            };
        });
        let bias = round(-70_000.0, BF16);
        assert!((-1e5..-65_504.0).contains(&bias));
        let mask = upload(&device, &vec![bias; ql * kl], BF16, &[ql, kl]);
        let [q, k, v, out] = data.buffers(&device);
        let mut params = prefill((1, 1), (ql as u32, kl as u32), dim as u32, false);
        params.scale = 1.0;
        commit(&device, |e| {
            let registry = &mut KernelRegistry::new();
            dispatch_flash_attn_prefill_bf16_d512(
                e,
                &device,
                registry,
                &q,
                &k,
                &v,
                Some(&mask),
                &out,
                &params,
            )
        });
        let want = data.plain(&Plain {
            scale: Some(1.0),
            ..Plain::new(&|_, _, _| Some(f64::from(bias)))
        });
        // A sum of -70,000 and a score keeps two digits of it.
        let off = distance(&download(&out), &want);
        assert!(off < 2e-2, "off by {off:.2e}");
    }
}

#[test]
fn defect_13_inputs_tell_attention_from_a_mean() {
    for device in devices() {
        for (dtype, dim) in [
            (BF16, 64),
            (DType::F16, 256),
            (DType::F32, 128),
            (BF16, 512),
        ] {
            let data = Qkv::new(10, dtype, shape([1, 2, 2], (50, 70), dim));
            // Zero mean, and scores that deviate by about 1.
            let mean = data.q.iter().sum::<f32>() / data.q.len() as f32;
            assert!(mean.abs() < 0.05, "{mean}");
            let mut squares = 0.0;
            for (i, j) in (0..50).flat_map(|i| (0..70).map(move |j| (i, j))) {
                let products = (0..dim).map(|x| data.q[i * dim + x] * data.k[j * dim + x]);
                squares += (products.sum::<f32>() / (dim as f32).sqrt()).powi(2);
            }
            let deviation = (squares / 3500.0).sqrt();
            assert!(deviation > 0.9, "{deviation}");

            let want = data.plain(&Plain::new(&|_, _, _| seen(true)));
            let (_, got) = data.run(&device, &data.builder().build().unwrap());
            assert_close("attention", &got, &want, dtype);
            // The mean of V, which equal scores would make right, is far off.
            let impostor = data.plain(&Plain {
                scale: Some(0.0),
                ..Plain::new(&|_, _, _| seen(true))
            });
            let impostor: Vec<f32> = impostor.iter().map(|x| *x as f32).collect();
            assert!(distance(&impostor, &want) > 0.3);
        }
    }
}
