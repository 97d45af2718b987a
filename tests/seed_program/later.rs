//! Names of version 0.15.16 that stand beside those of 0.6.3: resumed prefill, sinks, masks in f16 and of
//! several sequences.

use half::{bf16, f16};
use mlx_flash_attn as mlx_native;
use mlx_native::ops::flash_attn_prefill::{
    FlashAttnPrefillResumeParams, dispatch_flash_attn_prefill_bf16_d256_resume,
    dispatch_flash_attn_prefill_f16_d256_resume, dispatch_flash_attn_prefill_f16_d256_with_blk,
};
use mlx_native::ops::flash_attn_prefill_blk::{
    BlkParams, K_BLK_F16, alloc_blk_buffer, dispatch_flash_attn_prefill_blk,
    dispatch_flash_attn_prefill_blk_f16,
};
use mlx_native::ops::flash_attn_prefill_d512::{
    dispatch_flash_attn_prefill_bf16_d512_heads_as_rows_with_sinks,
    dispatch_flash_attn_prefill_bf16_d512_resume,
    dispatch_flash_attn_prefill_bf16_d512_token_major_with_blk_and_sinks,
    dispatch_flash_attn_prefill_bf16_d512_with_blk_and_sinks,
    dispatch_flash_attn_prefill_bf16_d512_with_sinks, dispatch_flash_attn_prefill_f16_d512_resume,
    dispatch_flash_attn_prefill_f16_d512_with_blk,
    dispatch_flash_attn_prefill_f16_d512_with_blk_and_sinks,
    dispatch_flash_attn_prefill_f16_d512_with_nsg_and_blk,
    dispatch_flash_attn_prefill_f16_d512_with_sinks,
};
use mlx_native::ops::flash_attn_prefill_mask::{
    K_FILL_BLOCKDIAG_BF16, K_FILL_F16, SdpaMaskParams, build_block_diagonal_sdpa_mask_bf16,
    build_sdpa_mask_bf16, build_sdpa_mask_f16,
};
use mlx_native::{DType, KernelRegistry, MlxBuffer, MlxDevice, MlxError, Result};

use crate::call::{Call, Dispatcher, Encoder, Mask, Program, params, swapped};
use crate::common::{self, Plain, Qkv, assert_close, seen, shape};
use crate::kernels::Form;

type Resume = fn(
    &mut Encoder,
    &MlxDevice,
    &mut KernelRegistry,
    &MlxBuffer,
    &MlxBuffer,
    &MlxBuffer,
    &MlxBuffer,
    &FlashAttnPrefillResumeParams,
) -> Result<()>;

/// K or V `[Hkv, kL, D]` in a cache of `capacity` rows a head, NaN behind the valid ones.
fn cache(x: &[f32], rows: usize, capacity: usize, dim: usize) -> Vec<f32> {
    x.chunks(rows * dim)
        .flat_map(|head| [head, &vec![f32::NAN; (capacity - rows) * dim]].concat())
        .collect()
}

#[test]
fn chunks_of_a_prompt_follow_the_keys_of_a_cache() -> Result<()> {
    let (ql, kl, capacity) = (13, 50, 60);
    let table: [(DType, usize, Resume); 4] = [
        (
            DType::BF16,
            256,
            dispatch_flash_attn_prefill_bf16_d256_resume,
        ),
        (DType::F16, 256, dispatch_flash_attn_prefill_f16_d256_resume),
        (
            DType::BF16,
            512,
            dispatch_flash_attn_prefill_bf16_d512_resume,
        ),
        (DType::F16, 512, dispatch_flash_attn_prefill_f16_d512_resume),
    ];
    for device in common::devices() {
        for ((dtype, dim, resume), (causal, offset)) in table
            .into_iter()
            .flat_map(|row| [(true, 37), (true, 20), (false, 37)].map(|how| (row, how)))
        {
            let data = Qkv::new(70, dtype, shape([1, 4, 2], (ql, kl), dim));
            let [k, v] = [&data.k, &data.v].map(|x| {
                common::upload(
                    &device,
                    &cache(x, kl, capacity, dim),
                    dtype,
                    &[2, capacity, dim],
                )
            });
            let q = common::upload(&device, &data.q, dtype, &[1, 4, ql, dim]);
            let out = common::output(&device, data.q.len(), dtype);
            let fresh = params(&data, causal);
            let params = FlashAttnPrefillResumeParams {
                n_heads: fresh.n_heads,
                n_kv_heads: fresh.n_kv_heads,
                head_dim: fresh.head_dim,
                seq_len_q: fresh.seq_len_q,
                seq_len_k: fresh.seq_len_k,
                batch: fresh.batch,
                scale: fresh.scale,
                do_causal: causal,
                q_offset_in_k: offset as u32,
                kv_capacity: capacity as u32,
            };
            let mut program = Program::new(&device);
            let mut call = |params: &FlashAttnPrefillResumeParams| {
                let (e, r) = (&mut program.encoder, &mut program.registry);
                resume(e, &device, r, &q, &k, &v, &out, params)
            };
            for (name, wrong) in [
                (
                    "q_offset_in_k",
                    FlashAttnPrefillResumeParams {
                        q_offset_in_k: 38,
                        ..params
                    },
                ),
                (
                    "kv_capacity",
                    FlashAttnPrefillResumeParams {
                        kv_capacity: 49,
                        ..params
                    },
                ),
                (
                    "head_dim",
                    FlashAttnPrefillResumeParams {
                        head_dim: 64,
                        ..params
                    },
                ),
            ] {
                match call(&wrong) {
                    Err(MlxError::InvalidArgument(text)) => assert!(text.contains(name), "{text}"),
                    other => panic!("{name}: {other:?}"),
                }
            }
            call(&params)?;
            program.encoder.commit_and_wait()?;
            let visible = |_, i, j| seen(!causal || j <= i + offset);
            let want = data.plain(&Plain::new(&visible));
            let what = format!(
                "{dtype} d{dim} causal {causal} at {offset} on {}",
                device.kind()
            );
            assert_close(&what, &common::download(&out), &want, dtype);
        }
    }
    Ok(())
}

/// Sink logits of as many heads: some that weigh much, some that weigh little.
fn sinks(heads: usize) -> Vec<f32> {
    (0..heads).map(|h| 3.0 - 2.0 * (h % 4) as f32).collect()
}

#[test]
fn sinks_join_the_denominator_of_their_head() -> Result<()> {
    use Dispatcher::{MaskBlkSinks, MaskSinks};
    let (bf16, f16) = (DType::BF16, DType::F16);
    let any = &[Mask::None, Mask::Plane, Mask::PerBatch, Mask::PerHead][..];
    let plane = &[Mask::Plane][..];
    let table = [
        (
            bf16,
            any,
            false,
            MaskSinks(dispatch_flash_attn_prefill_bf16_d512_with_sinks),
        ),
        (
            f16,
            any,
            false,
            MaskSinks(dispatch_flash_attn_prefill_f16_d512_with_sinks),
        ),
        (
            bf16,
            plane,
            false,
            MaskBlkSinks(dispatch_flash_attn_prefill_bf16_d512_with_blk_and_sinks),
        ),
        (
            bf16,
            plane,
            true,
            MaskBlkSinks(dispatch_flash_attn_prefill_bf16_d512_token_major_with_blk_and_sinks),
        ),
        (
            f16,
            plane,
            false,
            MaskBlkSinks(dispatch_flash_attn_prefill_f16_d512_with_blk_and_sinks),
        ),
    ];
    let (heads, ql, kl, dim) = (4, 19, 70, 512);
    for device in common::devices() {
        for (row, (dtype, masks, token_major, dispatcher)) in table.into_iter().enumerate() {
            for (mask, causal) in masks.iter().flat_map(|m| [(*m, false), (*m, true)]) {
                let data = Qkv::new(71, dtype, shape([2, heads, 2], (ql, kl), dim));
                let logits = sinks(heads);
                let sinks = common::upload(&device, &logits, DType::F32, &[heads]);
                let q = swapped(token_major, &data.q, [heads, ql, dim]);
                let q = common::upload(&device, &q, dtype, &[q.len()]);
                let [_, k, v, out] = data.buffers(&device);
                let mask_buffer = mask.upload(&device, &data, dtype);
                let params = params(&data, causal);
                let mut program = Program::new(&device);
                let blk = match (&mask_buffer, dispatcher.takes_blk()) {
                    (Some(mask), true) => Some(classes(&mut program, mask, dtype)?),
                    _ => None,
                };
                let call = Call {
                    mask: mask_buffer.as_ref(),
                    blk: blk.as_ref(),
                    sinks: Some(&sinks),
                    ..Call::new([&q, &k, &v, &out], &params)
                };
                program.prefill(dispatcher, &call)?;
                program.encoder.commit_and_wait()?;
                let visible = |h, i, j| seen(mask.shows(heads, h, i, j) && (!causal || j <= i));
                let want = data.plain(&Plain {
                    sinks: Some(&logits),
                    ..Plain::new(&visible)
                });
                let want: Vec<f32> = want.iter().map(|x| *x as f32).collect();
                let want = swapped(token_major, &want, [heads, ql, dim]);
                let want: Vec<f64> = want.iter().map(|x| f64::from(*x)).collect();
                let what = format!("row {row} {mask:?} causal {causal} on {}", device.kind());
                assert_close(&what, &common::download(&out), &want, dtype);
            }
        }
    }
    Ok(())
}

/// Classes of the 8x64 tiles of a mask in bf16 or f16.
fn classes(program: &mut Program<'_>, mask: &MlxBuffer, dtype: DType) -> Result<MlxBuffer> {
    let [rows, keys] = [mask.shape()[0], mask.shape()[1]];
    let tiles = common::tiles(rows as u32, keys as u32, 512);
    classified(program, mask, dtype, &tiles)
}

fn classified(
    program: &mut Program<'_>,
    mask: &MlxBuffer,
    dtype: DType,
    tiles: &BlkParams,
) -> Result<MlxBuffer> {
    let blk = alloc_blk_buffer(program.device, tiles)?;
    let dispatch = match dtype {
        DType::F16 => dispatch_flash_attn_prefill_blk_f16,
        _ => dispatch_flash_attn_prefill_blk,
    };
    let (encoder, registry) = (&mut program.encoder, &mut program.registry);
    dispatch(encoder, program.device, registry, mask, &blk, tiles)?;
    Ok(blk)
}

#[test]
fn f16_prefill_takes_the_classes_of_its_mask() {
    use Dispatcher::{MaskBlk, MaskBlkNsg};
    let with_nsg = dispatch_flash_attn_prefill_f16_d512_with_nsg_and_blk;
    let table = [
        (256, MaskBlk(dispatch_flash_attn_prefill_f16_d256_with_blk)),
        (512, MaskBlk(dispatch_flash_attn_prefill_f16_d512_with_blk)),
        (512, MaskBlkNsg(with_nsg, 4)),
        (512, MaskBlkNsg(with_nsg, 8)),
    ];
    for (row, (dim, dispatcher)) in table.into_iter().enumerate() {
        let form = Form {
            masks: &[Mask::None, Mask::Plane],
            ..Form::head_major(DType::F16, dim)
        };
        form.check(&format!("row {row}, d{dim}"), &|program, call| {
            let tiles = common::tiles(call.params.seq_len_q, call.params.seq_len_k, dim as u32);
            let blk = call
                .mask
                .map(|mask| classified(program, mask, DType::F16, &tiles));
            let blk = blk.transpose()?;
            let blk = blk.as_ref();
            program.prefill(dispatcher, &Call { blk, ..*call })
        });
    }
}

#[test]
fn heads_as_rows_are_heads_of_one_query() -> Result<()> {
    let (batch, kl) = (2, 70);
    for device in common::devices() {
        let data = Qkv::new(72, DType::BF16, shape([batch, 64, 1], (1, kl), 512));
        let logits = sinks(64);
        let sinks = common::upload(&device, &logits, DType::F32, &[64]);
        let [q, k, v, out] = data.buffers(&device);
        let mask = Mask::PerBatch.upload(&device, &data, DType::BF16).unwrap();
        let mut params = params(&data, false);
        (params.n_heads, params.seq_len_q) = (8, 8);
        let dispatcher = Dispatcher::MaskOfAllSinks(
            dispatch_flash_attn_prefill_bf16_d512_heads_as_rows_with_sinks,
        );
        let mut program = Program::new(&device);
        let mut causal = params;
        causal.do_causal = true;
        let mut wider = params;
        wider.n_heads = 16;
        let plane = mask.slice_view(0, kl);
        for (name, mask, params) in [
            ("do_causal", &mask, causal),
            ("n_heads", &mask, wider),
            ("mask", &plane, params),
        ] {
            let call = Call {
                mask: Some(mask),
                sinks: Some(&sinks),
                ..Call::new([&q, &k, &v, &out], &params)
            };
            match program.prefill(dispatcher, &call) {
                Err(MlxError::InvalidArgument(text)) => assert!(text.contains(name), "{text}"),
                other => panic!("{name}: {other:?}"),
            }
        }
        let call = Call {
            mask: Some(&mask),
            sinks: Some(&sinks),
            ..Call::new([&q, &k, &v, &out], &params)
        };
        program.prefill(dispatcher, &call)?;
        program.encoder.commit_and_wait()?;
        let visible = |h, i, j| seen(Mask::PerBatch.shows(64, h, i, j));
        let want = data.plain(&Plain {
            sinks: Some(&logits),
            ..Plain::new(&visible)
        });
        let what = format!("heads as rows on {}", device.kind());
        assert_close(&what, &common::download(&out), &want, DType::BF16);
    }
    Ok(())
}

#[test]
fn masks_in_f16_say_what_masks_in_bf16_say() -> Result<()> {
    for device in common::devices() {
        for (window_size, causal) in [(Some(9), true), (None, true), (Some(9), false)] {
            let params = SdpaMaskParams {
                seq_len_q: 37,
                seq_len_k: 70,
                window_size,
                causal,
                q_abs_offset: 20,
            };
            let mut program = Program::new(&device);
            let (encoder, registry) = (&mut program.encoder, &mut program.registry);
            let mask = build_sdpa_mask_f16(&device, registry, encoder, &params)?;
            let twin = build_sdpa_mask_bf16(&device, registry, encoder, &params)?;
            assert_eq!((mask.dtype(), mask.shape()), (DType::F16, &[37, 70][..]));
            let mut blks = Vec::new();
            // Keys of a tile that the wide and the other kernels of CUDA take.
            for (bq, bk) in [(32, 16), (8, 64), (3, 5)] {
                let tiles = BlkParams {
                    seq_len_q: 37,
                    seq_len_k: 70,
                    bq,
                    bk,
                };
                let blk = classified(&mut program, &mask, DType::F16, &tiles)?;
                blks.push((blk, classified(&mut program, &twin, DType::BF16, &tiles)?));
            }
            program.encoder.commit_and_wait()?;
            let cells: &[f16] = mask.as_slice()?;
            for (c, (cell, twin)) in cells.iter().zip(twin.as_slice::<bf16>()?).enumerate() {
                let (position, key) = (c / 70 + 20, c % 70);
                let hidden = (causal && key > position)
                    || window_size.is_some_and(|w| position >= key + w as usize);
                let want = if hidden { f16::NEG_INFINITY } else { f16::ZERO };
                assert_eq!(cell.to_bits(), want.to_bits(), "cell {c}");
                assert_eq!(twin.to_f32(), want.to_f32(), "cell {c}");
            }
            for (blk, twin) in &blks {
                assert_eq!(common::bytes(blk), common::bytes(twin), "{:?}", blk.shape());
            }
            assert!(blks.iter().any(|(blk, _)| common::bytes(blk).contains(&0)));
            for kernel in [K_FILL_F16, K_BLK_F16] {
                assert!(program.registry.is_cached(kernel), "{kernel}");
            }
        }
    }
    Ok(())
}

#[test]
fn a_tile_of_an_f16_mask_is_classed_by_its_values() -> Result<()> {
    // The largest finite biases are no -inf, and their bits are those of masked cells in bf16.
    let values = [f32::NEG_INFINITY, 0.0, -0.0, -65_504.0, 0.5, f32::NAN];
    let (rows, keys) = (40, 128);
    for device in common::devices() {
        for (bq, bk) in [(32, 16), (8, 64), (4, 2)] {
            // Each tile has one value, and every fourth a cell of another.
            let cell = |c: usize| {
                let (row, key) = (c / keys, c % keys);
                let tile = row / bq * (keys / bk) + key / bk;
                let odd = tile % 4 == 3 && row % bq == 1 && key % bk == bk - 1;
                values[(tile + usize::from(odd)) % values.len()]
            };
            let cells: Vec<f32> = (0..rows * keys).map(cell).collect();
            let mask = common::upload(&device, &cells, DType::F16, &[rows, keys]);
            let tiles = BlkParams {
                seq_len_q: rows as u32,
                seq_len_k: keys as u32,
                bq: bq as u32,
                bk: bk as u32,
            };
            let mut program = Program::new(&device);
            let blk = classified(&mut program, &mask, DType::F16, &tiles)?;
            program.encoder.commit_and_wait()?;
            let classes = common::bytes(&blk);
            let across = keys / bk;
            for (tile, class) in classes[..rows.div_ceil(bq) * across].iter().enumerate() {
                let (row0, key0) = (tile / across * bq, tile % across * bk);
                let of_tile = |(c, _): &(usize, &f32)| {
                    (row0..row0 + bq).contains(&(c / keys))
                        && (key0..key0 + bk).contains(&(c % keys))
                };
                let inside = || cells.iter().enumerate().filter(of_tile).map(|(_, x)| *x);
                let want = if inside().all(|x| x <= -1.0e30) {
                    0
                } else if inside().all(|x| x == 0.0) {
                    2
                } else {
                    1
                };
                let what = format!("tile {tile} of {bq}x{bk} on {}", device.kind());
                assert_eq!(*class, want, "{what}");
            }
        }
    }
    Ok(())
}

#[test]
fn a_token_sees_the_window_of_its_own_sequence() -> Result<()> {
    // Three sequences, their tokens not in order, and a position past 2^31.
    let ids: Vec<u32> = (0..45).map(|t| [7, 0, u32::MAX][t % 3]).collect();
    let positions: Vec<u32> = (0..45)
        .map(|t| match t {
            44 => u32::MAX,
            t => 14 - t as u32 / 3,
        })
        .collect();
    for device in common::devices() {
        let upload = |x: &[u32]| device.buffer_from_slice(x, DType::U32, vec![x.len()]);
        let (seq_id, local_pos) = (upload(&ids)?, upload(&positions)?);
        for (window, causal) in [
            (Some(4), true),
            (Some(4), false),
            (None, true),
            (None, false),
        ] {
            let mut program = Program::new(&device);
            let (e, r) = (&mut program.encoder, &mut program.registry);
            let mask = build_block_diagonal_sdpa_mask_bf16(
                &device, r, e, &seq_id, &local_pos, 45, window, causal,
            )?;
            assert_eq!((mask.dtype(), mask.shape()), (DType::BF16, &[45, 45][..]));
            program.encoder.commit_and_wait()?;
            for (c, cell) in mask.as_slice::<bf16>()?.iter().enumerate() {
                let (q, k) = (c / 45, c % 45);
                let ahead = i64::from(positions[q]) - i64::from(positions[k]);
                let hidden = ids[q] != ids[k]
                    || (causal && ahead < 0)
                    || window.is_some_and(|w| ahead >= i64::from(w));
                let want = if hidden {
                    bf16::NEG_INFINITY
                } else {
                    bf16::ZERO
                };
                assert_eq!(
                    cell.to_bits(),
                    want.to_bits(),
                    "cell {c} {window:?} {causal}"
                );
            }
            assert!(program.registry.is_cached(K_FILL_BLOCKDIAG_BF16));
        }
        let floats = common::output(&device, 45, DType::F32);
        let wrong: [(&str, &MlxBuffer, u32, Option<u32>); 4] = [
            ("t", &local_pos, 0, None),
            ("window_size", &local_pos, 45, Some(0)),
            ("local_pos", &local_pos, 46, None),
            ("local_pos", &floats, 45, None),
        ];
        for (name, local_pos, t, window) in wrong {
            let ids = device.buffer_from_slice(&[0u32; 46], DType::U32, vec![46])?;
            let (mut e, mut r) = (device.command_encoder()?, KernelRegistry::new());
            match build_block_diagonal_sdpa_mask_bf16(
                &device, &mut r, &mut e, &ids, local_pos, t, window, true,
            ) {
                Err(MlxError::InvalidArgument(text)) => assert!(text.contains(name), "{text}"),
                other => panic!("{name}: {other:?}"),
            }
        }
    }
    Ok(())
}
