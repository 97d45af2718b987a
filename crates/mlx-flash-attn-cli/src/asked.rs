//! What `bench` is asked for, as a problem and as keys of its lines.

use anyhow::{Result, bail};
use mlx_flash_attn::DType;
use mlx_flash_attn::attention::{Problem, ProblemBuilder, QueryOffset, Shape};
use serde_json::{Map, Value, json};

use crate::args::{CuSeqlens, LayoutArg};
use crate::cli::BenchArgs;
use crate::packed::Packed;
use crate::score::mask_spec;

/// The problem of a shape: packed sequences lie in its rows, and its batch is 1.
pub(crate) fn builder(args: &BenchArgs, shape: Shape, dtype: DType) -> Result<ProblemBuilder> {
    let packed = Packed::asked(args.cu_seqlens_q.as_ref(), args.cu_seqlens_k.as_ref());
    let (mut builder, keys) = match packed {
        None => {
            let builder = Problem::builder(dtype, shape).layout(args.layout.into());
            (builder, shape.key_len)
        }
        Some(packed) => {
            if shape.batch != 1 {
                bail!(
                    "expected B 1, as --cu-seqlens-q packs sequences, got {}",
                    shape.batch
                );
            }
            packed.check(shape.query_len, shape.key_len)?;
            let builder = Problem::varlen(
                dtype,
                shape.heads,
                shape.kv_heads,
                shape.qk_dim,
                &packed.queries,
                &packed.keys,
            );
            (builder, packed.longest_keys())
        }
    };
    if let Some(capacity) = args.key_capacity {
        builder = builder.key_capacity(capacity);
    }
    if let Some(dtype) = args.kv_dtype {
        builder = builder.kv_dtype(dtype.into());
    }
    if let Some(mask) = args.mask {
        let full = [shape.batch, shape.heads, shape.query_len, keys];
        builder = builder.mask(mask_spec(mask.into(), args.mask_axes.of(full)));
    }
    Ok(args
        .score
        .apply(builder)
        .query_offset(args.q_offset)
        .sinks(args.sinks)
        .alibi(args.alibi)
        .lse(args.lse))
}

/// What was asked for besides what every line says; what is as it is by default is left out.
pub(crate) fn besides(args: &BenchArgs) -> Map<String, Value> {
    let numbers = |cu: &CuSeqlens| json!(cu.0);
    let offset = match args.q_offset {
        QueryOffset::BottomRight => None,
        QueryOffset::At(offset) => Some(json!(offset)),
    };
    let layout = (args.layout != LayoutArg::HeadMajor).then(|| json!(args.layout.name()));
    let mask = args.mask.map(|mask| {
        let dtype = DType::from(mask);
        let name = match dtype {
            DType::U8 => "bool",
            _ => dtype.name(),
        };
        json!(format!("{name} {}", args.mask_axes))
    });
    let flag = |given: bool| given.then_some(Value::Bool(true));
    let kv_dtype = args.kv_dtype.map(|dtype| json!(DType::from(dtype).name()));
    [
        ("kv_dtype", kv_dtype),
        ("layout", layout),
        ("window_right", args.score.window_right.map(Into::into)),
        ("q_offset", offset),
        ("softcap", args.score.softcap.map(Into::into)),
        ("scale", args.score.scale.map(Into::into)),
        ("mask", mask),
        ("sinks", flag(args.sinks)),
        ("alibi", flag(args.alibi)),
        ("lse", flag(args.lse)),
        ("key_capacity", args.key_capacity.map(Into::into)),
        ("cu_seqlens_q", args.cu_seqlens_q.as_ref().map(numbers)),
        ("cu_seqlens_k", args.cu_seqlens_k.as_ref().map(numbers)),
    ]
    .into_iter()
    .filter_map(|(name, value)| Some((name.to_owned(), value?)))
    .collect()
}
