//! Where queries stand among keys of another count: stated, or an error. Established names keep 0.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Plain, Qkv, assert_close, commit, devices, download, seen, shape};
use mlx_flash_attn::attention::{Problem, ProblemBuilder, QueryOffset};
use mlx_flash_attn::ops::flash_attn_prefill::{
    FlashAttnPrefillLayout, FlashAttnPrefillParams, dispatch_flash_attn_prefill_bf16_d64,
};
use mlx_flash_attn::{DType, KernelRegistry};

#[test]
fn what_depends_on_positions_needs_an_offset_only_where_lengths_differ() {
    let by_position: [fn(ProblemBuilder) -> ProblemBuilder; 4] = [
        |b| b.causal(true),
        |b| b.window(3),
        |b| b.window_right(0),
        |b| b.alibi(true),
    ];
    let dense = |q, k| Problem::builder(DType::F32, shape([2, 2, 1], (q, k), 64));
    let packed = |q: &[u32], k: &[u32]| Problem::varlen(DType::F32, 2, 1, 64, q, k);
    let alike = [
        dense(5, 5),
        dense(0, 5),
        packed(&[0, 3, 3, 5], &[0, 3, 9, 11]),
    ];
    let unlike = [dense(5, 6), dense(1, 6), packed(&[0, 3, 5], &[0, 3, 6])];
    for change in by_position {
        for builder in &alike {
            change(builder.clone()).build().unwrap();
        }
        for builder in &unlike {
            assert!(change(builder.clone()).build().is_err());
            for offset in [
                QueryOffset::At(0),
                QueryOffset::At(7),
                QueryOffset::BottomRight,
            ] {
                change(builder.clone())
                    .query_offset(offset)
                    .build()
                    .unwrap();
            }
        }
    }
    for builder in unlike {
        builder.build().unwrap();
    }
}

#[test]
fn the_established_names_count_from_position_0() {
    for device in devices() {
        let data = Qkv::new(4, DType::BF16, shape([1, 2, 1], (5, 9), 64));
        let want = data.plain(&Plain::new(&|_, i, j| seen(j <= i)));
        let [q, k, v, out] = data.buffers(&device);
        let params = FlashAttnPrefillParams {
            n_heads: 2,
            n_kv_heads: 1,
            head_dim: 64,
            seq_len_q: 5,
            seq_len_k: 9,
            batch: 1,
            scale: 0.125,
            do_causal: true,
        };
        commit(&device, |encoder| {
            dispatch_flash_attn_prefill_bf16_d64(
                encoder,
                &device,
                &mut KernelRegistry::new(),
                &q,
                &k,
                &v,
                None,
                &out,
                &params,
                FlashAttnPrefillLayout::HeadMajor,
            )
        });
        assert_close(device.kind().name(), &download(&out), &want, DType::BF16);
    }
}
