//! Finite numbers up to the largest, as masks, sinks and scores; and tile classes made by hand.

use mlx_flash_attn::attention::HEAD_DIMS;
use mlx_flash_attn::attention::tolerance::relative_bound;
use mlx_flash_attn::attention::{MaskSpec, Problem, QueryOffset};
use mlx_flash_attn::ops::Operands;
use mlx_flash_attn::{DType, MlxBuffer, MlxDevice};

use crate::common::{
    Plain, Qkv, attend, bytes, distance, download, normal, output, round, shape, tiles, upload,
};
use crate::{BF16, cuda};

const MASKS: [DType; 3] = [BF16, DType::F16, DType::F32];

/// By a Hopper kernel where there is one, by few rows, by few rows over keys in parts, in f32.
const SHAPES: [(DType, (usize, usize)); 4] = [
    (BF16, (70, 150)),
    (DType::F16, (2, 150)),
    (BF16, (1, 2_500)),
    (DType::F32, (37, 70)),
];

/// The largest number of a mask's type.
fn largest(dtype: DType) -> f32 {
    match dtype {
        DType::F16 => 65_504.0,
        BF16 => f32::from_bits(0x7f7f_0000),
        _ => f32::MAX,
    }
}

/// The output and its log-sum-exp.
fn run(
    device: &MlxDevice,
    data: &Qkv,
    problem: &Problem,
    mask: &MlxBuffer,
    classes: Option<&MlxBuffer>,
    sinks: Option<&MlxBuffer>,
) -> (MlxBuffer, MlxBuffer) {
    let s = data.shape;
    let [q, k, v, out] = data.buffers(device);
    let lse = output(device, s.heads * s.query_len, DType::F32);
    let operands = Operands {
        mask: Some(mask),
        tile_classes: classes,
        sinks,
        lse: Some(&lse),
        ..Operands::new(&q, &k, &v, &out)
    };
    attend(device, problem, &operands);
    (out, lse)
}

/// A finite cell of a mask is visible, however low, and its size does not overflow, however high.
#[test]
fn finite_masks_and_sinks_of_any_size_give_their_value() {
    let Some(device) = cuda() else { return };
    let mut wrong = Vec::new();
    for (n, dim) in [64, 128, 256, 512].into_iter().enumerate() {
        for (dtype, lengths) in SHAPES {
            let mut data = Qkv::new(n as u64, dtype, shape([1, 2, 1], lengths, dim));
            // All scores are 0, so that the mask alone decides.
            data.q.fill(0.0);
            let (rows, keys) = lengths;
            for (mask_type, softcap) in MASKS
                .into_iter()
                .zip([None, Some(5.0), None])
                .chain(MASKS.into_iter().zip([Some(5.0), None, Some(5.0)]))
            {
                let mut builder = data
                    .builder()
                    .mask(MaskSpec::plane(mask_type, keys))
                    .lse(true);
                if let Some(softcap) = softcap {
                    builder = builder.softcap(softcap);
                }
                let (plain, sunk) = (
                    builder.clone().build().unwrap(),
                    builder.sinks(true).build().unwrap(),
                );
                for size in [
                    -1.0f32, -0.73, -0.5, -0.3, -1e-8, -1e-34, 0.0, 1e-34, 0.36, 0.5, 1.0,
                ] {
                    let (most, high) = (
                        largest(mask_type),
                        round(size * largest(mask_type), mask_type),
                    );
                    // Every third cell is hidden, and every third as low as finite ones go.
                    let cell = |j: usize| match j % 3 {
                        0 => high,
                        1 => f32::NEG_INFINITY,
                        _ => -most,
                    };
                    let cells: Vec<f32> = (0..rows * keys).map(|c| cell(c % keys)).collect();
                    let mask = upload(&device, &cells, mask_type, &[rows, keys]);
                    let shown: Vec<usize> = (0..keys).filter(|j| cell(*j) == high).collect();
                    let lowest = (0..keys).filter(|j| cell(*j) == -most).count();
                    // Weights of the lowest cells beside the high ones.
                    let below = (-f64::from(most) - f64::from(high)).exp();
                    let total = shown.len() as f64
                        + if high == -most {
                            0.0
                        } else {
                            below * lowest as f64
                        };
                    let mean = |x: usize| {
                        let sum = |js: &mut dyn Iterator<Item = usize>| -> f64 {
                            js.map(|j| f64::from(data.v[j * dim + x])).sum()
                        };
                        let of_high = sum(&mut shown.iter().copied());
                        let of_low =
                            sum(&mut (0..keys).filter(|j| cell(*j) == -most && high != -most));
                        (of_high + if below == 0.0 { 0.0 } else { below * of_low }) / total
                    };
                    let want: Vec<f64> = (0..dim).map(mean).collect();
                    for sinks in [None, Some([f32::NEG_INFINITY, -3e38]), Some([3e38, high])] {
                        let problem = if sinks.is_some() { &sunk } else { &plain };
                        let buffer = sinks.map(|x| upload(&device, &x, DType::F32, &[2]));
                        let (out, lse) = run(&device, &data, problem, &mask, None, buffer.as_ref());
                        let (got, lse) = (download(&out), download(&lse));
                        for row in 0..2 * rows {
                            let sink =
                                sinks.map_or(f64::NEG_INFINITY, |x| f64::from(x[row / rows]));
                            // Beside a huge `high` the logarithm of `total` is lost, even in f64.
                            let high = f64::from(high);
                            let share = total / (total + (sink - high).exp());
                            let top = high.max(sink);
                            let lse_want =
                                top + (total * (high - top).exp() + (sink - top).exp()).ln();
                            let scaled: Vec<f64> = want.iter().map(|x| x * share).collect();
                            let got = &got[row * dim..][..dim];
                            let right = if share < 1e-30 {
                                got.iter().all(|x| *x == 0.0)
                            } else {
                                distance(got, &scaled) < 4.0 * relative_bound(dtype)
                            };
                            let lse_off = (f64::from(lse[row]) - lse_want).abs();
                            if !right || lse_off.is_nan() || lse_off > 1e-5 + 1e-6 * lse_want.abs()
                            {
                                wrong.push(format!(
                                    "{dtype} d{dim} {lengths:?} {mask_type} {high:e} {softcap:?} {sinks:?} row {row}: \
                                     {} for {}, lse {} for {lse_want}",
                                    got[0], scaled[0], lse[row]
                                ));
                                break;
                            }
                        }
                    }
                }
            }
        }
    }
    let count = wrong.len();
    wrong.truncate(30);
    assert!(wrong.is_empty(), "{count}: {wrong:#?}");
}

/// Scores up to the largest that f32 holds.
#[test]
fn scores_of_any_size_give_their_value() {
    let Some(device) = cuda() else { return };
    let mut wrong = Vec::new();
    for dim in HEAD_DIMS {
        for (dtype, lengths) in SHAPES.into_iter().chain([(DType::F16, (70, 150))]) {
            let most = if dtype == DType::F16 { 1e4f32 } else { 1e18 };
            for size in [1e2f32, 1e4, 1e6, 1e9, 1e12, 1e15, 1e18]
                .into_iter()
                .filter(|x| *x <= most)
            {
                for of_keys in [1.0, size] {
                    let mut data = Qkv::new(7, dtype, shape([1, 2, 1], lengths, dim));
                    data.q.iter_mut().for_each(|x| *x = round(*x * size, dtype));
                    data.k
                        .iter_mut()
                        .for_each(|x| *x = round(*x * of_keys, dtype));
                    let (_, got) = data.run(&device, &data.builder().build().unwrap());
                    let want = data.plain(&Plain::new(&|_, _, _| Some(0.0)));
                    // Where two scores are as near as f32 holds them, either key may win.
                    let rows = got.chunks(dim).zip(want.chunks(dim));
                    let bad = rows
                        .filter(|(got, want)| distance(got, want) >= 0.05)
                        .count();
                    let all = got.len() / dim;
                    if got.iter().any(|x| !x.is_finite()) || bad > all / 50 {
                        wrong.push(format!(
                            "{dtype} d{dim} {lengths:?} {size:e} {of_keys:e}: {bad} of {all} rows"
                        ));
                    }
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Class 0 hides exactly its tile and class 2 adds no mask exactly there, whatever the mask holds and
/// however many class tiles a kernel's own tile has.
#[test]
fn classes_made_by_hand_are_obeyed_tile_by_tile() {
    let Some(device) = cuda() else { return };
    // A thread for each head dim, as each compiles kernels of its own.
    let wrong: Vec<String> = std::thread::scope(|scope| {
        let dims = HEAD_DIMS.into_iter().enumerate();
        let threads: Vec<_> = dims
            .map(|(n, dim)| {
                let device = &device;
                scope.spawn(move || disobeyed_classes(device, n, dim))
            })
            .collect();
        threads
            .into_iter()
            .flat_map(|t| t.join().unwrap())
            .collect()
    });
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Problems of a head dim whose classes are not obeyed.
fn disobeyed_classes(device: &MlxDevice, n: usize, dim: usize) -> Vec<String> {
    let mut wrong = Vec::new();
    for (m, (dtype, (rows, keys))) in SHAPES
        .into_iter()
        .chain([
            (BF16, (330, 500)),
            (DType::F16, (330, 512)),
            (DType::F32, (45, 512)),
        ])
        .enumerate()
    {
        for (causal, softcap, mask_type) in [
            (false, None, BF16),
            (true, None, MASKS[(n + m) % 3]),
            (true, Some(4.0), MASKS[(n + m + 1) % 3]),
        ] {
            let data = Qkv::new(30 + n as u64, dtype, shape([1, 2, 1], (rows, keys), dim));
            let tile = tiles(rows as u32, keys as u32, dim as u32);
            let (bq, bk) = (tile.bq as usize, tile.bk as usize);
            let (down, across) = (rows.div_ceil(bq), keys.div_ceil(bk));
            let classes: Vec<f32> = (0..down * across)
                .map(|t| ((t * 7 + t / across * 3) % 5 % 3) as f32)
                .collect();
            let values = normal(77, rows * keys, mask_type);
            let class = |c: usize| classes[c / keys / bq * across + c % keys / bk];
            let obeyed: Vec<f32> = (0..rows * keys)
                .map(|c| match class(c) {
                    0.0 => f32::NEG_INFINITY,
                    2.0 => 0.0,
                    _ => values[c],
                })
                .collect();
            let mut builder = data
                .builder()
                .mask(MaskSpec::plane(mask_type, keys))
                .lse(true)
                .causal(causal)
                .query_offset(QueryOffset::BottomRight);
            if let Some(softcap) = softcap {
                builder = builder.softcap(softcap);
            }
            let upload_mask = |cells: &[f32]| upload(device, cells, mask_type, &[rows, keys]);
            let given = upload(device, &classes, DType::U8, &[classes.len()]);
            let without = builder.clone().build().unwrap();
            let with = builder.tile_classes(true).build().unwrap();
            let got = run(
                device,
                &data,
                &with,
                &upload_mask(&values),
                Some(&given),
                None,
            );
            let want = run(device, &data, &without, &upload_mask(&obeyed), None, None);
            if bytes(&got.0) != bytes(&want.0) || bytes(&got.1) != bytes(&want.1) {
                let off = distance(
                    &download(&got.0),
                    &download(&want.0)
                        .iter()
                        .map(|x| f64::from(*x))
                        .collect::<Vec<_>>(),
                );
                wrong.push(format!("{dtype} d{dim} {rows}x{keys} causal {causal} {softcap:?} {mask_type}: {off:.1e}"));
            }
        }
    }
    wrong
}
