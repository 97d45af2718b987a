//! Defects of checks, buffers, ordering and caches.

use mlx_flash_attn::attention::{MaskSpec, Problem, Role, Strides};
use mlx_flash_attn::encoder::{CapturedNode, CapturedOpKind};
use mlx_flash_attn::ops::flash_attn_prefill::{
    FlashAttnPrefillLayout, FlashAttnPrefillParams, dispatch_flash_attn_prefill_bf16_d64,
    dispatch_flash_attn_prefill_bf16_d256, dispatch_flash_attn_prefill_bf16_d256_with_blk,
};
use mlx_flash_attn::ops::flash_attn_prefill_blk::{
    BlkParams, alloc_blk_buffer, blk_buffer_byte_len, dispatch_flash_attn_prefill_blk,
};
use mlx_flash_attn::ops::flash_attn_prefill_d512::dispatch_flash_attn_prefill_bf16_d512;
use mlx_flash_attn::ops::flash_attn_prefill_mask::{SdpaMaskParams, build_sdpa_mask_bf16};
use mlx_flash_attn::ops::flash_attn_vec::{FlashAttnVecParams, flash_attn_vec, tmp_buffer_bytes};
use mlx_flash_attn::ops::{self, Operands};
use mlx_flash_attn::{DType, KernelRegistry, MlxBuffer, MlxDevice, MlxError, Result};

use crate::common::{
    Plain, Qkv, assert_close, bytes, commit, devices, download, seen, shape, tiles, to_bytes,
    upload,
};
use crate::prefill;

const BF16: DType = DType::BF16;

#[track_caller]
fn refused<T>(result: Result<T>, words: &str) {
    match result {
        Err(MlxError::InvalidArgument(message)) => {
            assert!(message.contains(words), "`{words}` is not in: {message}");
        }
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("accepted, where `{words}` was expected"),
    }
}

#[test]
fn defect_07_sizes_that_overflow_and_scales_that_are_no_numbers_are_refused() {
    for device in devices() {
        let small = upload(&device, &[0.0; 64], BF16, &[64]);
        let out = upload(&device, &[0.0; 64], BF16, &[64]);
        let registry = &mut KernelRegistry::new();
        let mut encoder = device.command_encoder().unwrap();
        let mut call = |p: FlashAttnPrefillParams| {
            let (e, d) = (&mut encoder, &device);
            match p.head_dim {
                64 => dispatch_flash_attn_prefill_bf16_d64(
                    e,
                    d,
                    registry,
                    &small,
                    &small,
                    &small,
                    None,
                    &out,
                    &p,
                    FlashAttnPrefillLayout::SeqMajor,
                ),
                256 => dispatch_flash_attn_prefill_bf16_d256(
                    e, d, registry, &small, &small, &small, None, &out, &p,
                ),
                _ => dispatch_flash_attn_prefill_bf16_d512(
                    e, d, registry, &small, &small, &small, None, &out, &p,
                ),
            }
        };
        for dim in [64, 256, 512] {
            let base = prefill((1, 1), (1, 1), dim, true);
            for scale in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                refused(call(FlashAttnPrefillParams { scale, ..base }), "scale");
            }
            let huge = FlashAttnPrefillParams {
                n_heads: 1 << 20,
                n_kv_heads: 1 << 20,
                seq_len_q: 1 << 30,
                seq_len_k: 1 << 30,
                batch: 1 << 30,
                ..base
            };
            refused(call(huge), "overflow");
            let signs = [
                FlashAttnPrefillParams {
                    seq_len_q: 1 << 31,
                    ..base
                },
                FlashAttnPrefillParams {
                    seq_len_k: u32::MAX,
                    ..base
                },
                FlashAttnPrefillParams {
                    batch: u32::MAX,
                    ..base
                },
            ];
            for params in signs {
                refused(call(params), "a size from");
            }
            // Sums that just fit, of buffers that do not exist.
            let large = FlashAttnPrefillParams {
                seq_len_q: (1 << 31) - 1024,
                seq_len_k: (1 << 31) - 1024,
                ..base
            };
            refused(call(large), "at least");
            // Kernels count on to the end of a tile, in 31 bits.
            let past = FlashAttnPrefillParams {
                seq_len_k: (1 << 31) - 1023,
                ..base
            };
            refused(call(past), "2147482624");
        }
        encoder.commit_and_wait().unwrap();

        // Problems, masks, classes and decode.
        let s = shape([1, 1, 1], (1, 1), 64);
        for x in [f32::NAN, f32::INFINITY, -f32::INFINITY] {
            refused(Problem::builder(BF16, s).scale(x).build(), "scale");
            refused(Problem::builder(BF16, s).softcap(x).build(), "softcap");
        }
        let max = usize::MAX;
        for sizes in [
            shape([max, 1, 1], (1, 1), 64),
            shape([1, max, 1], (1, 1), 64),
            shape([1, 1, max], (1, 1), 64),
            shape([1, 1, 1], (max, 1), 64),
            shape([1, 1, 1], (1, max), 64),
            shape([1, 1, 1], (1, 1), max),
        ] {
            assert!(Problem::builder(BF16, sizes).build().is_err(), "{sizes:?}");
        }
        let wide = shape([1 << 30, 1 << 30, 1], (1 << 30, 1 << 30), 512);
        assert!(Problem::builder(BF16, wide).build().is_err());
        let strides = Strides {
            batch: max,
            head: max,
            seq: max,
        };
        for role in [Role::Query, Role::Key, Role::Value, Role::Output] {
            let builder = Problem::builder(BF16, shape([2, 2, 2], (2, 2), 64));
            assert!(builder.strides(role, strides).build().is_err());
        }
        let mask = MaskSpec {
            dtype: BF16,
            batch_stride: max,
            head_stride: max,
            row_stride: max,
        };
        let builder = Problem::builder(BF16, shape([2, 2, 2], (2, 2), 64));
        refused(builder.mask(mask).build(), "overflows");

        let side = u32::MAX;
        let blk = BlkParams {
            seq_len_q: side,
            seq_len_k: side,
            bq: 1,
            bk: 1,
        };
        refused(blk_buffer_byte_len(&blk), "2147483647");
        let mask = SdpaMaskParams {
            seq_len_q: side,
            seq_len_k: side,
            window_size: None,
            causal: true,
            q_abs_offset: 0,
        };
        let registry = &mut KernelRegistry::new();
        let result = build_sdpa_mask_bf16(&device, registry, &mut encoder, &mask);
        assert!(result.is_err());
        assert!(tmp_buffer_bytes(side, side) > isize::MAX as usize / 4);
    }
}

#[test]
fn defect_08_views_are_exact_and_never_alias() {
    for device in devices() {
        let data = Qkv::new(20, BF16, shape([1, 2, 1], (20, 33), 64));
        let problem = data.builder().build().unwrap();

        // All operands in one buffer: views at their own offsets, each as long as it says.
        let parts = [&data.q, &data.k, &data.v, &data.q];
        let whole: Vec<f32> = parts.iter().flat_map(|x| x.iter().copied()).collect();
        let whole = upload(&device, &whole, BF16, &[whole.len()]);
        let mut at = 0;
        let views: Vec<MlxBuffer> = parts
            .iter()
            .map(|x| {
                let view = whole.slice_view(at, x.len());
                assert_eq!(view.byte_offset(), at);
                assert_eq!(view.byte_len(), x.len() * 2);
                assert_eq!(view.as_slice::<u8>().unwrap(), to_bytes(x, BF16));
                at += view.byte_len() as u64;
                view
            })
            .collect();
        let operands = Operands::new(&views[0], &views[1], &views[2], &views[3]);
        crate::common::attend(&device, &problem, &operands);
        assert_eq!(
            bytes(&views[3]),
            data.run(&device, &problem).0,
            "as on copies"
        );

        // A view past the end does not panic and is refused by name.
        let past = whole.slice_view(at, 1);
        let mut encoder = device.command_encoder().unwrap();
        let mut attention =
            |operands: &Operands<'_>| ops::attention(&mut encoder, &problem, operands);
        refused(
            attention(&Operands {
                k: &past,
                ..operands
            }),
            "slice_view",
        );
        // A view a few bytes short of its size is too small, though its memory is not.
        let short = whole.slice_view(0, data.q.len() - 1);
        refused(
            attention(&Operands {
                q: &short,
                ..operands
            }),
            "Q",
        );
        // The output may be no input, nor share a byte with one.
        for name in ["Q", "K", "V"] {
            let input = match name {
                "Q" => operands.q,
                "K" => operands.k,
                _ => operands.v,
            };
            let out = &upload(&device, &data.q, BF16, &[data.q.len()]);
            let shared = match name {
                "Q" => Operands {
                    q: out,
                    out,
                    ..operands
                },
                "K" => Operands {
                    k: out,
                    out,
                    ..operands
                },
                _ => Operands {
                    v: out,
                    out,
                    ..operands
                },
            };
            refused(attention(&shared), &format!("the memory of {name}"));
            let one_row_in = whole.slice_view(input.byte_offset() + 128, data.q.len());
            refused(
                attention(&Operands {
                    out: &one_row_in,
                    ..operands
                }),
                "overlaps",
            );
        }
        drop((views, past, short));

        // Two handles never give two mutable slices.
        let mut a = whole;
        let mut b = a.clone();
        refused(a.as_mut_slice::<u8>(), "only handle");
        refused(b.as_mut_slice::<u8>(), "only handle");
        drop(b);
        a.as_mut_slice::<u8>().unwrap();
    }
}

#[test]
fn defect_09_a_pre_pass_and_its_attention_share_an_encoder() {
    for device in devices() {
        for (dim, with_blk) in [(256u32, true), (256, false), (512, true)] {
            let (ql, kl) = (70u32, 90u32);
            let data = Qkv::new(21, BF16, shape([1, 1, 1], (70, 90), dim as usize));
            let [q, k, v, out] = data.buffers(&device);
            let mask_params = SdpaMaskParams {
                seq_len_q: ql,
                seq_len_k: kl,
                window_size: Some(30),
                causal: true,
                q_abs_offset: 7,
            };
            let mut encoder = device.command_encoder().unwrap();
            let registry = &mut KernelRegistry::new();
            encoder.start_capture();
            let mask = build_sdpa_mask_bf16(&device, registry, &mut encoder, &mask_params).unwrap();
            let blk = with_blk.then(|| {
                let params = tiles(ql, kl, dim);
                let blk = alloc_blk_buffer(&device, &params).unwrap();
                let e = &mut encoder;
                dispatch_flash_attn_prefill_blk(e, &device, registry, &mask, &blk, &params)
                    .unwrap();
                blk
            });
            let params = prefill((1, 1), (ql, kl), dim, false);
            let e = &mut encoder;
            let (m, b) = (Some(&mask), blk.as_ref());
            let dispatch = match dim {
                512 => ops::flash_attn_prefill_d512::dispatch_flash_attn_prefill_bf16_d512_with_blk,
                _ => dispatch_flash_attn_prefill_bf16_d256_with_blk,
            };
            dispatch(e, &device, registry, &q, &k, &v, m, b, &out, &params).unwrap();

            // Each step waits for the one that it reads from.
            let nodes = encoder.take_capture().unwrap();
            let kinds: Vec<&str> = nodes
                .iter()
                .map(|node| match node {
                    CapturedNode::Barrier => "|",
                    CapturedNode::Dispatch(d) if d.op_kind() == CapturedOpKind::Sdpa => "sdpa",
                    CapturedNode::Dispatch(_) => "other",
                })
                .collect();
            let expected: &[&str] = match with_blk {
                true => &["other", "|", "other", "|", "sdpa"],
                false => &["other", "|", "sdpa"],
            };
            assert_eq!(kinds, expected);

            // And so the result is right, with one commit and no barrier of the caller's.
            let want = data.plain(&Plain::new(&|_, i, j| {
                let p = i + 7;
                seen(j <= p && p - j < 30)
            }));
            for _ in 0..3 {
                encoder.replay(&nodes).unwrap();
                encoder.commit_and_wait().unwrap();
                assert_close("one encoder", &download(&out), &want, BF16);
            }
        }
    }
}

#[test]
fn defect_10_a_cache_that_is_too_small_is_refused() {
    for device in devices() {
        let params = FlashAttnVecParams {
            num_heads: 2,
            num_kv_heads: 1,
            head_dim: 64,
            kv_seq_len: 10,
            kv_capacity: 12,
            scale: 0.125,
            mask_type: 1,
            sliding_window: 0,
            softcap: 0.0,
        };
        let f32s = |n: usize| upload(&device, &vec![0.0; n], DType::F32, &[n]);
        let (q, k, v, out) = (f32s(128), f32s(12 * 64), f32s(12 * 64), f32s(128));
        let (short, tmp) = (f32s(11 * 64), f32s(tmp_buffer_bytes(2, 64) / 4));
        let registry = &mut KernelRegistry::new();
        let mut encoder = device.command_encoder().unwrap();
        let mut call = |k, v, params: &FlashAttnVecParams| {
            flash_attn_vec(
                &mut encoder,
                registry,
                &device,
                &q,
                k,
                v,
                &out,
                &tmp,
                params,
            )
        };
        refused(call(&short, &v, &params), "K");
        refused(call(&k, &short, &params), "V");
        let over = FlashAttnVecParams {
            kv_seq_len: 13,
            ..params
        };
        refused(call(&k, &v, &over), "kv_capacity");
        call(&k, &v, &params).unwrap();
        encoder.commit_and_wait().unwrap();
    }
}

fn run_with(device: &MlxDevice, registry: &mut KernelRegistry, data: &Qkv, causal: bool) {
    let [q, k, v, out] = data.buffers(device);
    let size = |n: usize| u32::try_from(n).unwrap();
    let params = FlashAttnPrefillParams {
        n_heads: size(data.shape.heads),
        n_kv_heads: size(data.shape.kv_heads),
        head_dim: size(data.shape.qk_dim),
        seq_len_q: size(data.shape.query_len),
        seq_len_k: size(data.shape.key_len),
        batch: size(data.shape.batch),
        scale: 0.125,
        do_causal: causal,
    };
    let layout = FlashAttnPrefillLayout::HeadMajor;
    let dispatch = match data.dtype {
        DType::F16 => mlx_flash_attn::ops::flash_attn_prefill::dispatch_flash_attn_prefill_f16_d64,
        _ => mlx_flash_attn::ops::flash_attn_prefill::dispatch_flash_attn_prefill_bf16_d64,
    };
    commit(device, |e| {
        dispatch(e, device, registry, &q, &k, &v, None, &out, &params, layout)
    });
}

#[test]
fn defect_11_each_name_and_constants_are_built_once() {
    for device in devices() {
        let data = Qkv::new(22, BF16, shape([1, 1, 1], (5, 5), 64));
        let mut registry = KernelRegistry::new();
        let mut clones = [registry.clone(), registry.clone()];
        for _ in 0..3 {
            run_with(&device, &mut registry, &data, false);
        }
        assert_eq!(registry.cached_count(), 1);
        run_with(&device, &mut registry, &data, true);
        assert_eq!(registry.cached_count(), 2, "other constants");
        assert!(registry.is_cached("flash_attn_prefill_bf16_d64"));
        assert!(!registry.is_cached("flash_attn_prefill_f16_d64"));

        // From other threads, through clones: what there is, is shared, both ways.
        std::thread::scope(|scope| {
            for clone in &mut clones {
                let (device, data) = (&device, &data);
                scope.spawn(move || {
                    run_with(device, clone, data, true);
                    run_with(device, clone, data, false);
                });
            }
        });
        assert_eq!(registry.cached_count(), 2);
        let f16 = Qkv::new(23, DType::F16, data.shape);
        run_with(&device, &mut clones[0], &f16, false);
        assert_eq!(registry.cached_count(), 3);

        // Many threads that ask for the same at once build it once.
        let fresh = KernelRegistry::new();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                let (mut mine, device, data) = (fresh.clone(), &device, &data);
                scope.spawn(move || run_with(device, &mut mine, data, true));
            }
        });
        assert_eq!(fresh.cached_count(), 1);
    }
}
