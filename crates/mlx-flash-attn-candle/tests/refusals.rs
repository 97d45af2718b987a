//! What does not fit is an error that names the operand; nothing panics.
#![allow(clippy::unwrap_used)]

mod common;

use candle_core::{DType, Device, Tensor, Var};
use common::{devices, random};
use mlx_flash_attn_candle::{Layout, Mask, Options, QueryOffset, attention, attention_varlen};

const F32: DType = DType::F32;

/// Fails unless the error's message has every one of `words`.
#[track_caller]
fn refused(result: candle_core::Result<Tensor>, words: &[&str]) {
    let message = result.unwrap_err().to_string();
    for word in words {
        assert!(message.contains(word), "no {word:?} in {message:?}");
    }
}

#[test]
fn shapes_and_dtypes() {
    let x = |dims: &[usize]| random(1, dims, F32, &Device::Cpu);
    let q = x(&[1, 4, 8, 64]);
    let run = |q: &Tensor, k: &Tensor, v: &Tensor| attention(q, k, v, &Options::default());
    let kv = x(&[1, 2, 8, 64]);
    run(&q, &kv, &kv).unwrap();
    refused(
        run(&x(&[4, 8, 64]), &kv, &kv),
        &["q:", "[batch, heads, len, head_dim]", "[4, 8, 64]"],
    );
    refused(run(&q, &x(&[1, 2, 8, 32]), &kv), &["v:", "[1, 2, 8, 32]"]);
    refused(run(&q, &kv, &x(&[1, 2, 9, 64])), &["v:", "[1, 2, 9, 64]"]);
    let k = x(&[2, 2, 8, 64]);
    refused(run(&q, &k, &k), &["k:", "batch 1"]);
    let k = x(&[1, 3, 8, 64]);
    refused(run(&q, &k, &k), &["n_heads (4)", "n_kv_heads (3)"]);
    let q36 = x(&[1, 4, 8, 36]);
    refused(run(&q36, &q36, &q36), &["head_dim", "[32, ", "512]", "36"]);
    let of = |x: &Tensor, dtype| x.to_dtype(dtype).unwrap();
    for dtype in [DType::F64, DType::U32, DType::I64] {
        refused(run(&of(&q, dtype), &kv, &kv), &["q:", "bf16, f16 or f32"]);
    }
    refused(
        run(&of(&q, DType::U8), &of(&kv, DType::U8), &of(&kv, DType::U8)),
        &["Q", "u8"],
    );
    let half = of(&kv, DType::BF16);
    refused(run(&q, &half, &half), &["K and V", "f32", "bf16"]);
    refused(run(&q, &kv, &half), &["v:", "BF16"]);
    // Seq-major reads the same shapes with heads and rows swapped.
    let options = Options {
        layout: Layout::SeqMajor,
        ..Options::default()
    };
    let k = x(&[1, 8, 3, 64]);
    refused(
        attention(&q, &k, &k, &options),
        &["n_heads (8)", "n_kv_heads (3)"],
    );
}

#[test]
fn options() {
    let q = random(1, &[1, 4, 8, 64], F32, &Device::Cpu);
    let with = |options| attention(&q, &q, &q, &options);
    let plain = Options::default;
    refused(
        with(Options {
            scale: Some(f32::NAN),
            ..plain()
        }),
        &["scale"],
    );
    refused(
        with(Options {
            softcap: Some(0.0),
            ..plain()
        }),
        &["softcap"],
    );
    refused(
        with(Options {
            window: Some(0),
            ..plain()
        }),
        &["window"],
    );
    refused(
        with(Options {
            window: Some(usize::MAX),
            ..plain()
        }),
        &["window"],
    );
    refused(
        with(Options {
            window_right: Some(1 << 40),
            ..plain()
        }),
        &["window_right"],
    );
    let offset = Some(QueryOffset::At(i64::MAX));
    refused(with(Options { offset, ..plain() }), &["q_offset"]);

    let mask = |dims: &[usize], dtype| {
        let mask = random(2, dims, F32, &Device::Cpu)
            .abs()
            .unwrap()
            .to_dtype(dtype)
            .unwrap();
        Options {
            mask: Some(Mask::Add(mask)),
            ..plain()
        }
    };
    for dims in [&[7, 8][..], &[3, 8, 8], &[2, 1, 8, 8], &[1, 1, 4, 8, 8]] {
        refused(
            with(mask(dims, F32)),
            &["mask", "[1, 4, 8, 8]", &format!("{dims:?}")],
        );
    }
    refused(with(mask(&[8, 8], DType::F8E4M3)), &["mask", "F8E4M3"]);
    let heads = |dims: &[usize]| Some(random(3, dims, F32, &Device::Cpu));
    refused(
        with(Options {
            sinks: heads(&[3]),
            ..plain()
        }),
        &["sinks", "[4]", "[3]"],
    );
    refused(
        with(Options {
            alibi_slopes: heads(&[1, 4]),
            ..plain()
        }),
        &["alibi_slopes", "[4]"],
    );
    let whole = Tensor::new(&[1_u32; 4], &Device::Cpu).unwrap();
    refused(
        with(Options {
            sinks: Some(whole),
            ..plain()
        }),
        &["sinks", "float"],
    );
}

/// Whether 1 attends or hides is said by the variant, never by the dtype.
#[test]
fn masks_of_another_kind_than_their_cells() {
    let q = random(1, &[1, 4, 8, 64], F32, &Device::Cpu);
    let (float, integer) = (
        Tensor::zeros((8, 8), F32, &Device::Cpu).unwrap(),
        Tensor::zeros((8, 8), DType::U8, &Device::Cpu).unwrap(),
    );
    for (mask, words) in [
        (Mask::Add(integer), ["mask", "U8", "Mask::Hide"]),
        (Mask::Attend(float.clone()), ["mask", "F32", "Mask::Add"]),
        (Mask::Hide(float), ["mask", "F32", "Mask::Add"]),
    ] {
        let options = Options {
            mask: Some(mask),
            ..Options::default()
        };
        refused(attention(&q, &q, &q, &options), &words);
    }
}

/// Nothing counts positions from a corner that the caller has not named.
#[test]
fn bounds_over_other_lengths_without_an_offset() {
    let q = random(1, &[1, 4, 3, 64], F32, &Device::Cpu);
    let kv = random(2, &[1, 2, 8, 64], F32, &Device::Cpu);
    let slopes = Tensor::ones(4, F32, &Device::Cpu).unwrap();
    let plain = Options::default;
    let by_position = [
        Options {
            causal: true,
            ..plain()
        },
        Options {
            window: Some(2),
            ..plain()
        },
        Options {
            window_right: Some(0),
            ..plain()
        },
        Options {
            alibi_slopes: Some(slopes),
            ..plain()
        },
    ];
    let pack = |x: &Tensor| x.squeeze(0).unwrap().transpose(0, 1).unwrap();
    let (pq, pkv) = (pack(&q), pack(&kv));
    let words = ["offset", "BottomRight", "At(0)", "3 queries", "8 keys"];
    attention(&q, &kv, &kv, &plain()).unwrap();
    for options in by_position {
        refused(attention(&q, &kv, &kv, &options), &words);
        let packed = |cu_k: &[u32]| attention_varlen(&pq, &pkv, &pkv, &[0, 3], cu_k, &options);
        refused(packed(&[0, 8]), &words);
        packed(&[0, 3]).unwrap();
        attention(
            &kv,
            &kv,
            &kv,
            &Options {
                alibi_slopes: None,
                ..options.clone()
            },
        )
        .unwrap();
        for offset in [QueryOffset::BottomRight, QueryOffset::At(0)] {
            let offset = Some(offset);
            attention(
                &q,
                &kv,
                &kv,
                &Options {
                    offset,
                    ..options.clone()
                },
            )
            .unwrap();
        }
    }
}

#[test]
fn boundaries() {
    let q = random(1, &[10, 4, 64], F32, &Device::Cpu);
    let run =
        |cu_q: &[u32], cu_k: &[u32]| attention_varlen(&q, &q, &q, cu_q, cu_k, &Options::default());
    run(&[0, 4, 10], &[0, 6, 10]).unwrap();
    refused(run(&[0, 4, 11], &[0, 6, 10]), &["cu_seqlens_q", "10", "11"]);
    refused(run(&[0, 4, 10], &[0, 6, 11]), &["cu_seqlens_k", "10", "11"]);
    refused(run(&[], &[0, 10]), &["cu_seqlens_q"]);
    refused(run(&[1, 10], &[0, 10]), &["cu_seqlens_q"]);
    refused(run(&[0, 12, 10], &[0, 6, 10]), &["cu_seqlens_q"]);
    refused(run(&[0, 10], &[0, 6, 10]), &["cu_seqlens_k"]);
    let dense = random(1, &[1, 10, 4, 64], F32, &Device::Cpu);
    let run = attention_varlen(&dense, &q, &q, &[0, 10], &[0, 10], &Options::default());
    refused(run, &["q:", "[rows, heads, head_dim]"]);
}

#[test]
fn a_backward_pass_says_that_there_is_none() {
    let q = Var::from_tensor(&random(1, &[1, 1, 4, 64], F32, &Device::Cpu)).unwrap();
    let out = attention(&q, &q, &q, &Options::default()).unwrap();
    let message = out.sum_all().unwrap().backward().unwrap_err().to_string();
    assert!(message.contains("mlx-flash-attn"), "{message}");
}

#[test]
fn operands_lie_on_one_device() {
    for device in &devices() {
        if device.is_cpu() {
            continue;
        }
        let [here, there] = [&Device::Cpu, device].map(|d| random(1, &[1, 4, 8, 64], F32, d));
        let run = |q, k, v, options: &Options| attention(q, k, v, options);
        let plain = Options::default();
        run(&there, &there, &there, &plain).unwrap();
        refused(run(&there, &here, &here, &plain), &["k:", "as q"]);
        refused(run(&here, &here, &there, &plain), &["v:", "as q"]);
        let mask = Options {
            mask: Some(Mask::Add(random(2, &[8, 8], F32, &Device::Cpu))),
            ..plain
        };
        refused(run(&there, &there, &there, &mask), &["mask", "as q"]);
    }
}
