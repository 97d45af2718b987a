//! What `bench` is asked for, as a problem and as keys of its lines.

use anyhow::{Result, bail};
use mlx_flash_attn::DType;
use mlx_flash_attn::attention::{
    Format, KeyLengths, Pages, Problem, ProblemBuilder, QueryOffset, Shape,
};
use serde_json::{Map, Value, json};

use crate::args::{LayoutArg, Numbers};
use crate::cli::BenchArgs;
use crate::packed::{Packed, check_last};
use crate::score::mask_spec;

/// The problem of a shape: packed sequences lie in its rows.
pub(crate) fn builder(args: &BenchArgs, shape: Shape, dtype: DType) -> Result<ProblemBuilder> {
    let (mut builder, keys) = rows(args, shape, dtype)?;
    if let Some(capacity) = args.key_capacity {
        builder = builder.key_capacity(capacity);
    }
    if let Some(format) = args.kv {
        builder = builder.key_format(format).value_format(format);
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

/// The rows of Q, K and V, and the most keys that a mask has columns for.
fn rows(args: &BenchArgs, shape: Shape, dtype: DType) -> Result<(ProblemBuilder, usize)> {
    let Shape {
        batch,
        heads,
        kv_heads,
        query_len,
        key_len,
        qk_dim: dim,
        ..
    } = shape;
    let of_queries = args.cu_seqlens_q.as_ref();
    if let Some(packed) = Packed::asked(of_queries, args.cu_seqlens_k.as_ref()) {
        if batch != 1 {
            bail!("expected B 1, as --cu-seqlens-q packs sequences, got {batch}");
        }
        packed.check(query_len, key_len)?;
        let (queries, keys) = (&packed.queries, &packed.keys);
        let builder = Problem::varlen(dtype, heads, kv_heads, dim, queries, keys);
        return Ok((builder, packed.longest_keys()));
    }
    let builder = match of_queries {
        None => Problem::builder(dtype, shape).layout(args.layout.into()),
        Some(_) if args.paged.is_none() && args.lengths.is_none() => {
            bail!("--cu-seqlens-q: expected --cu-seqlens-k, --paged or --lengths beside it")
        }
        Some(Numbers(boundaries)) => {
            let sequences = boundaries.len().saturating_sub(1);
            if batch != sequences {
                bail!("expected B {sequences}, the sequences of --cu-seqlens-q, got {batch}");
            }
            check_last("--cu-seqlens-q", boundaries, query_len)?;
            Problem::varlen_queries(dtype, heads, kv_heads, key_len, dim, boundaries)
        }
    };
    Ok((own_keys(args, shape, builder)?, key_len))
}

/// A number of keys for each sequence, and pages for all that it may have.
fn own_keys(args: &BenchArgs, shape: Shape, builder: ProblemBuilder) -> Result<ProblemBuilder> {
    let Shape { batch, key_len, .. } = shape;
    let builder = match &args.lengths {
        None => builder,
        Some(Numbers(lengths)) => {
            if lengths.len() != batch {
                bail!(
                    "--lengths: expected one for each of the {batch} sequences, got {}",
                    lengths.len()
                );
            }
            if let Some(over) = lengths.iter().find(|n| **n as usize > key_len) {
                bail!("--lengths: expected at most SK = {key_len} keys, got {over}");
            }
            builder.key_lengths(KeyLengths::Host(lengths.as_slice().into()))
        }
    };
    let Some(page_size) = args.paged else {
        return Ok(builder);
    };
    let per_sequence = key_len.div_ceil(page_size);
    let Some(count) = batch.checked_mul(per_sequence) else {
        bail!("--paged: {batch} x {per_sequence} pages overflow")
    };
    Ok(builder.pages(Pages {
        count,
        page_size,
        per_sequence,
    }))
}

/// What was asked for besides what every line says; what is as it is by default is left out.
pub(crate) fn besides(args: &BenchArgs) -> Map<String, Value> {
    let numbers = |cu: &Numbers| json!(cu.0);
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
    let kv = args.kv.map(|format| json!(Format::from(format).name()));
    [
        ("kv", kv),
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
        ("paged", args.paged.map(Into::into)),
        ("lengths", args.lengths.as_ref().map(numbers)),
        ("cu_seqlens_q", args.cu_seqlens_q.as_ref().map(numbers)),
        ("cu_seqlens_k", args.cu_seqlens_k.as_ref().map(numbers)),
    ]
    .into_iter()
    .filter_map(|(name, value)| Some((name.to_owned(), value?)))
    .collect()
}
