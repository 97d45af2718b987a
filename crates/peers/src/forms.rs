//! Our own time of one way to ask against that of another: masks against parameters, odd sizes
//! against round ones, long against short, one token against the speed of memory.

use std::hint::black_box;
use std::time::Instant;

use anyhow::Result;
use half::bf16;
use mlx_flash_attn::attention::class_tile;
use mlx_flash_attn::attention::{MaskSpec, Problem, QueryOffset, Shape};
use mlx_flash_attn::ops::flash_attn_prefill_blk::{
    BlkParams, alloc_blk_buffer, dispatch_flash_attn_prefill_blk,
};
use mlx_flash_attn::{DType, KernelRegistry, MlxBuffer, MlxDevice};

use crate::findings::Form;
use crate::inputs;
use crate::ours::Ours;
use crate::race::{self, Contestant, Runner, median};
use crate::rows::{ROWS, Row};

/// Well past any last-level cache.
const MEMORY_BYTES: usize = 1 << 30;

/// `[B, H, Hkv, Sq, Sk, D]`.
const fn shape([batch, heads, kv_heads, query_len, key_len, head_dim]: [usize; 6]) -> Shape {
    Shape {
        batch,
        heads,
        kv_heads,
        query_len,
        key_len,
        qk_dim: head_dim,
        v_dim: head_dim,
    }
}

/// Shapes whose time for the same work is compared; the first of each is what the others are held
/// against.
const SHAPES: [(&str, &[(&str, Shape)]); 4] = [
    (
        "odd length",
        &[
            ("S 768, D 80", shape([1, 8, 8, 768, 768, 80])),
            ("S 777, D 80", shape([1, 8, 8, 777, 777, 80])),
            ("S 768, D 64", shape([1, 8, 8, 768, 768, 64])),
        ],
    ),
    (
        "odd lengths",
        &[
            ("320 x 2048, D 96", shape([1, 8, 8, 320, 2048, 96])),
            ("333 x 1999, D 96", shape([1, 8, 8, 333, 1999, 96])),
        ],
    ),
    (
        "odd heads",
        &[
            ("16 on 2", shape([1, 16, 2, 512, 512, 128])),
            ("14 on 2", shape([1, 14, 2, 512, 512, 128])),
        ],
    ),
    (
        "long",
        &[
            ("S 2048", shape([1, 8, 8, 2048, 2048, 64])),
            ("S 16384", shape([1, 8, 8, 16384, 16384, 64])),
        ],
    ),
];

/// One token over 32,768 keys, each far more than caches hold.
const DECODES: [Shape; 4] = [
    shape([1, 32, 8, 1, 32768, 128]),
    shape([1, 16, 8, 1, 32768, 256]),
    shape([1, 14, 2, 1, 32768, 256]),
    shape([1, 12, 12, 1, 32768, 64]),
];

/// Times everything in each of `dtypes`; decoding in bf16 alone. `progress` hears what comes next.
pub(crate) fn run(
    device: &MlxDevice,
    dtypes: &[DType],
    threads: usize,
    rounds: usize,
    progress: impl Fn(&str),
) -> Result<Vec<Form>> {
    let mut forms = Vec::new();
    for dtype in dtypes {
        for row in ROWS.iter().filter(|row| row.causal && row.number != 5) {
            progress(&format!("masks, {}, {dtype}", row.label()));
            let what = row.label();
            forms.extend(group(&what, *dtype, masks(device, row, *dtype)?, rounds)?);
        }
        for (what, shapes) in SHAPES {
            progress(&format!("{what}, {dtype}"));
            let contestants = shapes
                .iter()
                .map(|(form, shape)| {
                    let problem = Problem::builder(*dtype, *shape).build()?;
                    contestant(device, form, problem)
                })
                .collect::<Result<Vec<_>>>()?;
            forms.extend(group(what, *dtype, contestants, rounds)?);
        }
    }
    progress("one token, bf16");
    forms.extend(decode(device, threads, rounds)?);
    Ok(forms)
}

fn contestant(device: &MlxDevice, form: &str, problem: Problem) -> Result<Contestant> {
    let dtype = problem.dtype();
    let operands = inputs::operands(problem.shape(), &[dtype]);
    let ours = operands
        .first()
        .map(|operands| Ours::new(device, problem, operands))
        .transpose()?
        .ok_or_else(|| anyhow::anyhow!("{form}: no operands"))?;
    Ok(Contestant {
        peer: "ours".into(),
        variant: form.to_owned(),
        dtype: dtype.name().into(),
        runner: Runner::Ours(Box::new(ours)),
    })
}

/// One row as a parameter, as a bool mask and as an additive mask, with and without tile classes.
fn masks(device: &MlxDevice, row: &Row, dtype: DType) -> Result<Vec<Contestant>> {
    let parameter = row.problem(dtype)?;
    let Shape {
        query_len, key_len, ..
    } = row.shape;
    let visible = parameter.visibility(query_len, key_len);
    let cells = (0..query_len)
        .flat_map(|q| (0..key_len).map(move |k| visible.attended(q as i64, k as i64)));
    let bools: Vec<u8> = cells.map(u8::from).collect();
    let hidden = |seen: &u8| match seen {
        0 => bf16::NEG_INFINITY,
        _ => bf16::ZERO,
    };
    let biases: Vec<bf16> = bools.iter().map(hidden).collect();
    let plane = vec![query_len, key_len];
    let bools = device.buffer_from_slice(&bools, DType::U8, plane.clone())?;
    let biases = device.buffer_from_slice(&biases, DType::BF16, plane)?;
    let classes = classes(device, row.shape, &biases)?;
    let mut contestants = vec![contestant(device, "parameter", parameter)?];
    for (form, mask, classes) in [
        ("bool mask", &bools, None),
        ("additive mask with tile classes", &biases, Some(classes)),
        ("additive mask", &biases, None),
    ] {
        let problem = Problem::builder(dtype, row.shape)
            .mask(MaskSpec::plane(mask.dtype(), key_len))
            .tile_classes(classes.is_some())
            .build()?;
        let mut contestant = contestant(device, form, problem)?;
        if let Runner::Ours(ours) = &mut contestant.runner {
            ours.mask = Some(mask.clone());
            ours.tile_classes = classes;
        }
        contestants.push(contestant);
    }
    Ok(contestants)
}

/// Tile classes of an additive mask.
fn classes(device: &MlxDevice, shape: Shape, mask: &MlxBuffer) -> Result<MlxBuffer> {
    let tile = class_tile(shape.qk_dim);
    let params = BlkParams {
        seq_len_q: u32::try_from(shape.query_len)?,
        seq_len_k: u32::try_from(shape.key_len)?,
        bq: u32::try_from(tile.bq)?,
        bk: u32::try_from(tile.bk)?,
    };
    let classes = alloc_blk_buffer(device, &params)?;
    let (mut encoder, mut registry) = (device.command_encoder()?, KernelRegistry::new());
    dispatch_flash_attn_prefill_blk(&mut encoder, device, &mut registry, mask, &classes, &params)?;
    encoder.commit_and_wait()?;
    Ok(classes)
}

/// Times contestants and compares each with the first: its time for the same work. A mask does the
/// work of the parameter that it stands for.
fn group(
    what: &str,
    dtype: DType,
    mut contestants: Vec<Contestant>,
    rounds: usize,
) -> Result<Vec<Form>> {
    let flops = |c: &Contestant| match &c.runner {
        Runner::Ours(ours) => ours.problem().flops(),
        Runner::Peer { .. } => 0.0,
    };
    let first = contestants.first().map_or(0.0, flops);
    let works: Vec<f64> = contestants
        .iter()
        .map(|c| match &c.runner {
            Runner::Ours(ours) if ours.mask.is_some() => first,
            _ => flops(c),
        })
        .collect();
    let times = race::run(&mut contestants, &mut [], rounds)
        .into_iter()
        .collect::<Result<Vec<_>>>()?;
    let mut forms: Vec<Form> = Vec::new();
    for ((contestant, times), work) in contestants.iter().zip(times).zip(works) {
        let ms = median(times.clone());
        let rate = work / ms / 1e6;
        let (against, base) = forms
            .first()
            .map_or((contestant.variant.clone(), rate), |f| {
                (f.form.clone(), f.rate)
            });
        forms.push(Form {
            what: what.to_owned(),
            dtype: dtype.name().into(),
            form: contestant.variant.clone(),
            ms_median: ms,
            ms_min: times.iter().copied().fold(f64::INFINITY, f64::min),
            ms_max: times.iter().copied().fold(0.0, f64::max),
            unit: "GFLOP/s",
            rate,
            against,
            ratio: base / rate,
        });
    }
    Ok(forms)
}

/// One token at the end of a cache: bytes of keys and values against what memory gives at best.
fn decode(device: &MlxDevice, threads: usize, rounds: usize) -> Result<Vec<Form>> {
    let memory = read_bandwidth(threads);
    let against = format!("reading at {memory:.1} GB/s");
    let mut forms = Vec::new();
    for shape in DECODES {
        let problem = Problem::builder(DType::BF16, shape)
            .causal(true)
            .query_offset(QueryOffset::BottomRight)
            .build()?;
        let name = format!("{} on {}, D {}", shape.heads, shape.kv_heads, shape.qk_dim);
        let contestant = contestant(device, &name, problem)?;
        let bytes = (4 * shape.kv_heads * shape.key_len * shape.qk_dim) as f64;
        for form in group(
            "one token, 32768 keys",
            DType::BF16,
            vec![contestant],
            rounds,
        )? {
            let rate = bytes / form.ms_median / 1e6;
            forms.push(Form {
                unit: "GB/s",
                rate,
                against: against.clone(),
                ratio: memory / rate,
                ..form
            });
        }
    }
    Ok(forms)
}

/// GB/s at which `threads` threads together read memory, at best.
fn read_bandwidth(threads: usize) -> f64 {
    let buffer = vec![1u64; MEMORY_BYTES / size_of::<u64>()];
    let part = buffer.len().div_ceil(threads.max(1));
    let sum = |part: &[u64]| part.iter().fold(0u64, |a, x| a.wrapping_add(*x));
    let seconds = (0..7).map(|_| {
        let start = Instant::now();
        std::thread::scope(|scope| {
            for part in buffer.chunks(part) {
                scope.spawn(move || black_box(sum(black_box(part))));
            }
        });
        start.elapsed().as_secs_f64()
    });
    MEMORY_BYTES as f64 / seconds.fold(f64::INFINITY, f64::min) / 1e9
}
