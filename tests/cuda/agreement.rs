//! Problems larger than those of the contract, against the CPU, with everything that changes scores.

use mlx_flash_attn::attention::HEAD_DIMS;
use mlx_flash_attn::attention::tolerance::relative_bound;
use mlx_flash_attn::attention::{MaskSpec, Problem, ProblemBuilder, QueryOffset};
use mlx_flash_attn::ops::Operands;
use mlx_flash_attn::{CpuOptions, DType, MlxBuffer, MlxDevice};

use crate::common::{
    Qkv, attend, bytes, classify, download, normal, output, round, shape, tiles, upload,
};
use crate::{BF16, cuda, distance};

/// What a problem has besides Q, K and V.
#[derive(Clone, Copy)]
struct Extras {
    name: &'static str,
    build: fn(ProblemBuilder) -> ProblemBuilder,
    mask: Option<DType>,
    classes: bool,
}

const fn extras(name: &'static str, build: fn(ProblemBuilder) -> ProblemBuilder) -> Extras {
    Extras {
        name,
        build,
        mask: None,
        classes: false,
    }
}

const fn masked(extras: Extras, dtype: DType) -> Extras {
    Extras {
        mask: Some(dtype),
        ..extras
    }
}

const fn classed(extras: Extras) -> Extras {
    Extras {
        classes: true,
        ..masked(extras, BF16)
    }
}
const BOTTOM_RIGHT: QueryOffset = QueryOffset::BottomRight;
const FULL: Extras = extras("full", |b| b);
const CAUSAL: Extras = extras("causal", |b| b.causal(true).query_offset(BOTTOM_RIGHT));
const CAPPED: Extras = extras("softcap, window, lse", |b| {
    b.softcap(3.0).causal(true).window(150).lse(true)
});
const EXTRAS: [Extras; 20] = [
    FULL,
    CAUSAL,
    extras("causal, top left", |b| b.causal(true).lse(true)),
    extras("causal, negative offset", |b| {
        b.causal(true).query_offset(QueryOffset::At(-120)).lse(true)
    }),
    extras("window", |b| {
        b.causal(true).query_offset(BOTTOM_RIGHT).window(97)
    }),
    extras("both windows", |b| b.window(60).window_right(33)),
    extras("rows without a key", |b| {
        b.window(20)
            .window_right(2)
            .query_offset(QueryOffset::At(450))
            .lse(true)
            .sinks(true)
    }),
    extras("sinks", |b| b.causal(true).sinks(true).lse(true)),
    extras("alibi", |b| {
        b.causal(true).query_offset(BOTTOM_RIGHT).alibi(true)
    }),
    CAPPED,
    masked(FULL, BF16),
    masked(FULL, DType::F16),
    masked(FULL, DType::F32),
    masked(FULL, DType::U8),
    masked(CAUSAL, DType::F32),
    masked(CAPPED, DType::U8),
    masked(CAPPED, DType::F32),
    classed(FULL),
    classed(CAUSAL),
    classed(CAPPED),
];

/// Free tiles, hidden ones, ragged ones, and rows that see nothing.
fn cells(ql: usize, kl: usize, dtype: DType) -> Vec<f32> {
    let noise = normal(8, ql * kl, BF16);
    let cell = |c: usize| {
        let (i, j) = (c / kl, c % kl);
        match (i / 96 + j / 160) % 3 {
            _ if i == 77 => f32::NEG_INFINITY,
            0 => 0.0,
            1 => f32::NEG_INFINITY,
            _ if (i + j).is_multiple_of(7) => f32::NEG_INFINITY,
            _ => noise[c],
        }
    };
    let cells = (0..ql * kl).map(cell);
    match dtype {
        DType::U8 => cells
            .map(|x| f32::from(u8::from(x > f32::NEG_INFINITY)))
            .collect(),
        _ => cells.collect(),
    }
}

/// The output and, if the problem has one, the log-sum-exp.
fn run_with(
    device: &MlxDevice,
    data: &Qkv,
    problem: &Problem,
    extras: Extras,
) -> (MlxBuffer, Option<MlxBuffer>) {
    let s = data.shape;
    let [q, k, v, out] = data.buffers(device);
    let floats = |x: &[f32]| upload(device, x, DType::F32, &[x.len()]);
    let lse = problem
        .has_lse()
        .then(|| output(device, s.batch * s.heads * s.query_len, DType::F32));
    let sinks = problem.has_sinks().then(|| floats(&[0.5, -1.0, 3.0, 0.0]));
    let slopes = problem
        .has_alibi()
        .then(|| floats(&[0.3, 0.02, 0.0, 0.001]));
    let mask = extras.mask.map(|dtype| {
        let cells = cells(s.query_len, s.key_len, dtype);
        upload(device, &cells, dtype, &[s.query_len, s.key_len])
    });
    let classes = mask.as_ref().filter(|_| extras.classes).map(|mask| {
        let [ql, kl, dim] = [s.query_len, s.key_len, s.qk_dim].map(|n| n as u32);
        classify(device, mask, &tiles(ql, kl, dim))
    });
    let operands = Operands {
        mask: mask.as_ref(),
        tile_classes: classes.as_ref(),
        sinks: sinks.as_ref(),
        alibi_slopes: slopes.as_ref(),
        lse: lse.as_ref(),
        ..Operands::new(&q, &k, &v, &out)
    };
    attend(device, problem, &operands);
    (out, lse)
}

/// Largest relative distance of a row.
fn worst_row(got: &[f32], want: &[f32], dim: usize) -> f64 {
    let rows = got.chunks(dim).zip(want.chunks(dim));
    let off = rows.map(|(got, want)| {
        if want.iter().all(|x| *x == 0.0) {
            return if got == want { 0.0 } else { f64::INFINITY };
        }
        distance(got, want)
    });
    off.fold(
        0.0,
        |worst, x| if x > worst || x.is_nan() { x } else { worst },
    )
}

#[test]
fn larger_problems_agree_with_the_cpu() {
    let Some(device) = cuda() else { return };
    let cpu = MlxDevice::cpu(CpuOptions::default()).unwrap();
    let mut wrong = Vec::new();
    let mut all = Vec::new();
    for (n, dim) in HEAD_DIMS.into_iter().enumerate() {
        for (m, extras) in EXTRAS.into_iter().enumerate() {
            let dtype = [BF16, DType::F16][(n + m) % 2];
            let lengths = if extras.mask.is_some() {
                (330, 500)
            } else {
                (333, 777)
            };
            let data = Qkv::new(7 + n as u64, dtype, shape([2, 4, 2], lengths, dim));
            let mut builder = (extras.build)(data.builder());
            if let Some(dtype) = extras.mask {
                builder = builder.mask(MaskSpec::plane(dtype, lengths.1));
            }
            let problem = builder.tile_classes(extras.classes).build().unwrap();
            all.push((data, problem, extras));
        }
    }
    // Side by side, which one by one would take minutes.
    device
        .cuda_warm_up(all.iter().map(|(_, problem, _)| problem))
        .unwrap();
    for (data, problem, extras) in all {
        let (dtype, dim) = (data.dtype, data.shape.qk_dim);
        let (out, lse) = run_with(&device, &data, &problem, extras);
        let (want, want_lse) = run_with(&cpu, &data, &problem, extras);
        let (got, want) = (download(&out), download(&want));
        let (all, row) = (distance(&got, &want), worst_row(&got, &want, dim));
        let bound = relative_bound(dtype);
        let lse_off = lse.zip(want_lse).map_or(0.0, |(got, want)| {
            let pairs = download(&got).into_iter().zip(download(&want));
            let off = pairs.map(|(a, b)| {
                if a == b {
                    0.0
                } else {
                    f64::from((a - b).abs())
                }
            });
            off.fold(
                0.0,
                |worst, x| if x > worst || x.is_nan() { x } else { worst },
            )
        });
        // Both are rounded, and rows differ in how much.
        if !(all < 1.5 * bound && row < 4.0 * bound && lse_off < 2e-4) {
            wrong.push(format!(
                "{} {dtype} d{dim}: {all:.1e}, a row {row:.1e}, lse {lse_off:.1e}",
                extras.name
            ));
        }
        let again = run_with(&device, &data, &problem, extras).0;
        if bytes(&again) != bytes(&out) {
            wrong.push(format!("{} {dtype} d{dim}: other bits", extras.name));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Scores that leap up on the way: weights taken before the maximum is known overflow then.
#[test]
fn leaping_scores_come_out() {
    let Some(device) = cuda() else { return };
    let cpu = MlxDevice::cpu(CpuOptions::default()).unwrap();
    for (dim, (dtype, leap)) in HEAD_DIMS.into_iter().flat_map(|d| {
        [
            (BF16, 6.0),
            (BF16, 60.0),
            (DType::F16, 3.0),
            (DType::F16, 20.0),
        ]
        .map(|x| (d, x))
    }) {
        let data = Qkv::new(9, dtype, shape([1, 2, 1], (300, 900), dim));
        // Keys are read from the last to the first in places.
        for keys in [0..300, 600..900] {
            let mut data = Qkv {
                q: data.q.clone(),
                k: data.k.clone(),
                v: data.v.clone(),
                ..data
            };
            data.k[keys.start * dim..keys.end * dim]
                .iter_mut()
                .for_each(|x| *x = round(*x * leap, dtype));
            let problem = data.builder().build().unwrap();
            let (got, want) = (data.run(&device, &problem).1, data.run(&cpu, &problem).1);
            let off = distance(&got, &want);
            assert!(
                off < 2.0 * relative_bound(dtype),
                "{dtype} d{dim} {leap} {keys:?}: {off:.1e}"
            );
        }
    }
}

#[test]
fn packed_sequences_agree_with_the_cpu_and_keep_to_themselves() {
    let Some(device) = cuda() else { return };
    let cpu = MlxDevice::cpu(CpuOptions::default()).unwrap();
    let (cu_q, cu_k) = ([0u32, 130, 130, 431, 500], [0u32, 300, 310, 611, 700]);
    for (n, dim) in HEAD_DIMS.into_iter().enumerate() {
        for (m, (causal, softcap)) in [(false, None), (true, None), (true, Some(4.0))]
            .into_iter()
            .enumerate()
        {
            let dtype = [BF16, DType::F16][(n + m) % 2];
            let mut data = Qkv::new(11, dtype, shape([1, 2, 1], (500, 700), dim));
            let build = |lse| {
                let mut builder = Problem::varlen(dtype, 2, 1, dim, &cu_q, &cu_k)
                    .causal(causal)
                    .query_offset(BOTTOM_RIGHT)
                    .lse(lse);
                if let Some(c) = softcap {
                    builder = builder.softcap(c);
                }
                builder.build().unwrap()
            };
            let what = format!("{dtype} d{dim} causal {causal} softcap {softcap:?}");
            let (_, got) = data.run(&device, &build(false));
            let (_, want) = data.run(&cpu, &build(false));
            let (all, row) = (distance(&got, &want), worst_row(&got, &want, dim));
            let bound = relative_bound(dtype);
            assert!(
                all < 1.5 * bound && row < 4.0 * bound,
                "{what}: {all:.1e}, a row {row:.1e}"
            );
            // Infinities of the third sequence are its own.
            for x in [&mut data.k, &mut data.v] {
                x[310 * dim..611 * dim].fill(f32::INFINITY);
            }
            let (_, spoilt) = data.run(&device, &build(false));
            let others = |x: &[f32]| [&x[..130 * 2 * dim], &x[431 * 2 * dim..]].concat();
            assert!(others(&spoilt) == others(&got), "{what}");
        }
    }
}
