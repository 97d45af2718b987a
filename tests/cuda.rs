//! What only the CUDA device has: an engine's own memory and stream, host views that follow the
//! device, splits of the keys, kernels compiled ahead. Without a GPU each test says that it is
//! skipped, but for those that need none.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod common;

use std::ffi::c_void;

use common::{Qkv, attend, bytes, download, output, shape, upload};
use cudarc::driver::result;
use mlx_flash_attn::attention::tolerance::relative_bound;
use mlx_flash_attn::attention::variant::{HEAD_DIMS, class_tile};
use mlx_flash_attn::attention::{MaskSpec, Problem, ProblemBuilder, QueryOffset, Shape};
use mlx_flash_attn::cuda::{compile_images, pack_images};
use mlx_flash_attn::encoder::CommandEncoder;
use mlx_flash_attn::ops::flash_attn_prefill_blk::{
    BlkParams, alloc_blk_buffer, dispatch_flash_attn_prefill_blk,
};
use mlx_flash_attn::ops::{self, Operands};
use mlx_flash_attn::{
    CpuOptions, DType, DeviceKind, KernelRegistry, MlxBuffer, MlxDevice, MlxError,
};

const BF16: DType = DType::BF16;

fn cuda() -> Option<MlxDevice> {
    MlxDevice::open(DeviceKind::Cuda)
        .inspect_err(|error| eprintln!("SKIPPED: {error}"))
        .ok()
}

fn record(encoder: &mut CommandEncoder, device: &MlxDevice, problem: &Problem, b: &[MlxBuffer; 4]) {
    let [q, k, v, out] = b;
    let mut registry = KernelRegistry::new();
    let operands = Operands::new(q, k, v, out);
    ops::attention(encoder, device, &mut registry, problem, &operands).unwrap();
}

/// Relative Frobenius distance.
fn distance(got: &[f32], want: &[f32]) -> f64 {
    let square = |x: f32| f64::from(x) * f64::from(x);
    let off: f64 = got.iter().zip(want).map(|(a, b)| square(a - b)).sum();
    let norm: f64 = want.iter().map(|x| square(*x)).sum();
    assert_eq!(got.len(), want.len());
    (off / norm).sqrt()
}

#[test]
fn a_device_that_is_not_there_says_why() {
    match MlxDevice::open(DeviceKind::Cuda) {
        Ok(device) => assert_eq!(device.kind(), DeviceKind::Cuda),
        Err(MlxError::DeviceUnavailable { device, reason }) => {
            assert_eq!(device, "cuda");
            assert!(reason.len() > 20, "{reason}");
        }
        Err(other) => panic!("{other}"),
    }
    let far = MlxDevice::cuda(1_000_000).unwrap_err();
    assert!(matches!(far, MlxError::DeviceUnavailable { .. }), "{far}");
    // Other devices take no CUDA objects.
    let cpu = MlxDevice::cpu(CpuOptions::default()).unwrap();
    // SAFETY: refused before the address is looked at.
    let wrapped = unsafe { cpu.cuda_wrap(256, 4, DType::F32, vec![1]) };
    assert!(matches!(wrapped, Err(MlxError::InvalidArgument(_))));
    let mut encoder = cpu.command_encoder().unwrap();
    // SAFETY: refused before the stream is looked at.
    let encoded = unsafe { encoder.encode_into_stream(std::ptr::null_mut()) };
    assert!(matches!(encoded, Err(MlxError::InvalidArgument(_))));
    assert!(cpu.cuda_warm_up(&[]).is_err());
}

#[test]
fn memory_that_is_not_there_is_an_error_and_the_device_goes_on() {
    let Some(device) = cuda() else { return };
    let bytes = 1usize << 45;
    let error = device
        .alloc_buffer(bytes, DType::U8, vec![bytes])
        .unwrap_err();
    assert_eq!(error, MlxError::BufferAllocationError { bytes });
    let buffer = device.alloc_buffer(4096, DType::U8, vec![4096]).unwrap();
    assert!(buffer.as_slice::<u8>().unwrap().iter().all(|x| *x == 0));
}

#[test]
fn host_views_follow_the_device_and_the_device_follows_them() {
    let Some(device) = cuda() else { return };
    let data = Qkv::new(1, BF16, shape([1, 2, 1], (33, 70), 64));
    let problem = data.builder().build().unwrap();
    let [q, k, mut v, mut out] = data.buffers(&device);
    attend(&device, &problem, &Operands::new(&q, &k, &v, &out));
    let first = bytes(&out);
    // What the host writes over an output is there, until the device writes it again.
    out.as_mut_slice::<u8>().unwrap().fill(7);
    assert!(bytes(&out).iter().all(|x| *x == 7));
    attend(&device, &problem, &Operands::new(&q, &k, &v, &out));
    assert_eq!(bytes(&out), first);
    // Twice the values give twice the output, exactly.
    let doubled: Vec<f32> = data.v.iter().map(|x| 2.0 * x).collect();
    v = upload(&device, &doubled, BF16, &[doubled.len()]);
    attend(&device, &problem, &Operands::new(&q, &k, &v, &out));
    let once = download(&upload_bytes(&device, &first));
    assert!(download(&out).iter().zip(once).all(|(a, b)| *a == 2.0 * b));
    // The seed's callers write through the address.
    let at = out.contents_ptr().cast::<u8>();
    // SAFETY: the buffer has more than one byte, and no command uses it.
    unsafe { at.write(0x55) };
    assert_eq!(bytes(&out)[0], 0x55);
}

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
    let noise = common::normal(8, ql * kl, BF16);
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
        let tile = class_tile(s.head_dim);
        let params = BlkParams {
            seq_len_q: s.query_len as u32,
            seq_len_k: s.key_len as u32,
            bq: tile.bq as u32,
            bk: tile.bk as u32,
        };
        let blk = alloc_blk_buffer(device, &params).unwrap();
        common::commit(device, |e| {
            dispatch_flash_attn_prefill_blk(
                e,
                device,
                &mut KernelRegistry::new(),
                mask,
                &blk,
                &params,
            )
        });
        blk
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
        let (dtype, dim) = (data.dtype, data.shape.head_dim);
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
                .for_each(|x| *x = common::round(*x * leap, dtype));
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

fn upload_bytes(device: &MlxDevice, bytes: &[u8]) -> MlxBuffer {
    device
        .buffer_from_slice(
            bytemuck::cast_slice::<u8, u16>(bytes),
            BF16,
            vec![bytes.len() / 2],
        )
        .unwrap()
}

#[test]
fn the_same_bits_each_time_with_and_without_splits() {
    let Some(device) = cuda() else { return };
    for (dtype, ql, kl, dim) in [
        (BF16, 1, 9_001, 128),
        (DType::F16, 3, 5_000, 256),
        (BF16, 2, 3_000, 512),
        (DType::F32, 1, 4_097, 64),
        (BF16, 700, 700, 128),
    ] {
        let data = Qkv::new(2, dtype, shape([1, 4, 2], (ql, kl), dim));
        let problem = data
            .builder()
            .causal(true)
            .query_offset(QueryOffset::BottomRight);
        let problem = problem.build().unwrap();
        let (first, got) = data.run(&device, &problem);
        for _ in 0..5 {
            assert_eq!(
                data.run(&device, &problem).0,
                first,
                "{dtype} {ql} {kl} {dim}"
            );
        }
        let cpu = MlxDevice::cpu(CpuOptions::default()).unwrap();
        let (_, want) = data.run(&cpu, &problem);
        let off = distance(&got, &want);
        assert!(
            off < 2.0 * relative_bound(dtype),
            "{dtype} {ql} {kl} {dim}: {off}"
        );
    }
}

/// Dispatches of one command have one memory for the results of their parts.
#[test]
fn splits_of_one_command_keep_to_themselves() {
    let Some(device) = cuda() else { return };
    let runs: Vec<_> = (0..9)
        .map(|i| {
            let (rows, keys) = ([1, 9, 3][i % 3], 9_000 - 500 * i);
            let data = Qkv::new(20 + i as u64, BF16, shape([1, 4, 2], (rows, keys), 128));
            let problem = if rows == 3 {
                Problem::varlen(BF16, 4, 2, 128, &[0, 1, 3], &[0, 2_000, keys as u32])
            } else {
                data.builder()
            };
            let problem = problem.build().unwrap();
            let want = data.run(&device, &problem).0;
            (problem, data.buffers(&device), want)
        })
        .collect();
    let mut encoder = device.command_encoder().unwrap();
    for (problem, buffers, _) in &runs {
        record(&mut encoder, &device, problem, buffers);
    }
    encoder.commit_and_wait().unwrap();
    for (i, (_, buffers, want)) in runs.iter().enumerate() {
        assert!(bytes(&buffers[3]) == *want, "dispatch {i}");
    }
}

#[test]
fn few_queries_over_many_keys_keep_sinks_masks_and_the_log_sum_exp() {
    let Some(device) = cuda() else { return };
    let cpu = MlxDevice::cpu(CpuOptions::default()).unwrap();
    let s = shape([2, 4, 2], (2, 6_000), 128);
    let data = Qkv::new(3, BF16, s);
    let problem = data
        .builder()
        .softcap(5.0)
        .sinks(true)
        .lse(true)
        .alibi(true);
    let problem = problem
        .window(4_000)
        .query_offset(QueryOffset::BottomRight)
        .causal(true);
    let problem = problem.build().unwrap();
    let run = |device: &MlxDevice| {
        let [q, k, v, out] = data.buffers(device);
        let sinks = upload(device, &[0.5, -1.0, 2.0, 0.0], DType::F32, &[4]);
        let slopes = upload(device, &[0.01, 0.001, 0.0, 0.1], DType::F32, &[4]);
        let lse = output(device, 2 * 4 * 2, DType::F32);
        let operands = Operands {
            sinks: Some(&sinks),
            alibi_slopes: Some(&slopes),
            lse: Some(&lse),
            ..Operands::new(&q, &k, &v, &out)
        };
        attend(device, &problem, &operands);
        (download(&out), download(&lse))
    };
    let ((got, got_lse), (want, want_lse)) = (run(&device), run(&cpu));
    assert!(distance(&got, &want) < 2.0 * relative_bound(BF16));
    assert!(distance(&got_lse, &want_lse) < 1e-5);
}

#[test]
fn a_head_of_131072_tokens_runs() {
    let Some(device) = cuda() else { return };
    let n = 131_072;
    let data = Qkv::new(4, BF16, shape([1, 1, 1], (n, n), 64));
    let (_, got) = data.run(&device, &data.builder().causal(true).build().unwrap());
    // The last rows alone, on the CPU.
    let (rows, from) = (64, (n - 64) * 64);
    let last = Qkv {
        shape: Shape {
            query_len: rows,
            ..data.shape
        },
        q: data.q[from..].to_vec(),
        k: data.k.clone(),
        v: data.v.clone(),
        dtype: BF16,
    };
    let cpu = MlxDevice::cpu(CpuOptions::default()).unwrap();
    let problem = last
        .builder()
        .causal(true)
        .query_offset(QueryOffset::BottomRight);
    let (_, want) = last.run(&cpu, &problem.build().unwrap());
    assert!(distance(&got[from..], &want) < 2.0 * relative_bound(BF16));
    // Row 0 sees key 0 alone.
    assert_eq!(got[..64], data.v[..64]);
}

#[test]
fn a_callers_stream_and_memory_give_the_same_bits() {
    let Some(device) = cuda() else { return };
    let data = Qkv::new(5, BF16, shape([2, 4, 2], (100, 130), 128));
    let problem = data.builder().causal(true).build().unwrap();
    let (want, _) = data.run(&device, &problem);

    // SAFETY: the device is open, so the driver is there; the context is the primary one.
    let (context, stream) = unsafe {
        let gpu = result::device::get(0).unwrap();
        let context = result::primary_ctx::retain(gpu).unwrap();
        result::ctx::set_current(context).unwrap();
        (
            context,
            result::stream::create(result::stream::StreamKind::NonBlocking).unwrap(),
        )
    };
    assert!(!context.is_null());
    let mut own = Vec::new();
    let mut wrap = |values: &[f32]| {
        let host = common::to_bytes(values, BF16);
        // SAFETY: freed below, after the last use; the copy has as many bytes.
        unsafe {
            let at = result::malloc_sync(host.len()).unwrap();
            result::memcpy_htod_sync(at, &host).unwrap();
            own.push(at);
            device
                .cuda_wrap(at, host.len(), BF16, vec![values.len()])
                .unwrap()
        }
    };
    let out = vec![f32::NAN; data.q.len()];
    let buffers = [wrap(&data.q), wrap(&data.k), wrap(&data.v), wrap(&out)];
    // A copy of pageable memory may still be under way when it returns, and a stream that does not
    // block does not wait for it.
    result::ctx::synchronize().unwrap();
    let mut encoder = device.command_encoder().unwrap();
    for raw in [stream.cast::<c_void>(), std::ptr::null_mut()] {
        record(&mut encoder, &device, &problem, &buffers);
        // SAFETY: the stream is the primary context's, and destroyed below.
        let in_flight = unsafe { encoder.encode_into_stream(raw) }.unwrap();
        assert!(buffers[3].as_slice::<u8>().is_err(), "it has not finished");
        in_flight.wait().unwrap();
        drop(in_flight);
        assert_eq!(bytes(&buffers[3]), want);
    }
    // What others write to the caller's memory is seen.
    // SAFETY: the memory has as many bytes; nothing runs.
    unsafe { result::memset_d8_sync(own[3], 0, want.len()).unwrap() };
    assert!(bytes(&buffers[3]).iter().all(|x| *x == 0));
    // Commands of the device's own come after those on the stream, and the other way round.
    record(&mut encoder, &device, &problem, &buffers);
    // SAFETY: as above.
    let in_flight = unsafe { encoder.encode_into_stream(stream.cast()) }.unwrap();
    let second = output(&device, data.q.len(), BF16);
    let [_, k, v, out] = buffers.clone();
    record(
        &mut encoder,
        &device,
        &problem,
        &[out, k, v, second.clone()],
    );
    encoder.commit_and_wait().unwrap();
    drop(in_flight);
    let [_, k, v, out] = &buffers;
    let third = output(&device, data.q.len(), BF16);
    attend(&device, &problem, &Operands::new(out, k, v, &third));
    assert_eq!(bytes(&second), bytes(&third));

    drop(buffers);
    // SAFETY: made above, used no more.
    unsafe {
        result::stream::destroy(stream).unwrap();
        own.into_iter()
            .for_each(|at| result::free_sync(at).unwrap());
        result::primary_ctx::release(result::device::get(0).unwrap()).unwrap();
    }
}

#[test]
fn kernels_compiled_ahead_are_not_compiled_again_and_timing_is_the_gpus() {
    let Some(device) = cuda() else { return };
    let data = Qkv::new(6, DType::F16, shape([1, 8, 8], (2_048, 2_048), 96));
    let problem = data.builder().build().unwrap();
    device.cuda_warm_up([&problem, &problem]).unwrap();
    let buffers = data.buffers(&device);
    let mut encoder = device.command_encoder().unwrap();
    let mut last = 0.0;
    for _ in 0..3 {
        record(&mut encoder, &device, &problem, &buffers);
        let (start, end) = encoder.commit_wait_with_gpu_time().unwrap();
        assert!(
            start >= last && end > start && end - start < 0.1,
            "{start} {end}"
        );
        last = end;
    }
}

#[test]
fn images_compiled_ahead_give_the_same_bits_and_torn_ones_an_error() {
    let Some(device) = cuda() else { return };
    let data = Qkv::new(14, BF16, shape([1, 2, 1], (300, 300), 64));
    let problem = data.builder().causal(true).build().unwrap();
    let want = data.run(&device, &problem).0;
    let arch = device
        .details()
        .into_iter()
        .find(|(name, _)| *name == "compute capability")
        .map(|(_, value)| {
            if value == "9.0" {
                "sm_90a".into()
            } else {
                format!("sm_{}", value.replace('.', ""))
            }
        });
    let causal = |name: &str| name.contains("D=64 ") && !name.contains("VARLEN=1");
    let images = compile_images(&arch.unwrap(), causal, |_, _| ()).unwrap();
    let file = pack_images(&images);
    // SAFETY: written by `pack_images`.
    let ahead = unsafe { MlxDevice::cuda_with_images(0, file.clone()) }.unwrap();
    assert!(data.run(&ahead, &problem).0 == want);
    let cut = file[..file.len() - 1].to_vec();
    // SAFETY: refused before an image is looked at.
    let error = unsafe { MlxDevice::cuda_with_images(0, cut) }.unwrap_err();
    assert!(matches!(error, MlxError::InvalidArgument { .. }), "{error}");
}

/// Hopper kernels start under the one before them: none may read what that has not written yet, on one
/// stream or across two, whatever else keeps the GPU busy.
#[test]
fn kernels_in_a_chain_wait_for_each_other() {
    let Some(device) = cuda() else { return };
    let data = Qkv::new(15, BF16, shape([1, 8, 8], (700, 700), 128));
    let problem = data.builder().causal(true).build().unwrap();
    let [first, k, v, _] = data.buffers(&device);
    let [other, ..] = Qkv::new(17, BF16, data.shape).buffers(&device);
    // By turns, so that what the round before left is not what this one makes.
    let queries = [first, other];
    let chain: Vec<MlxBuffer> = (0..6)
        .map(|_| output(&device, data.q.len(), BF16))
        .collect();
    let link = |round: usize, i: usize| {
        let query = if i == 0 {
            &queries[round % 2]
        } else {
            &chain[i - 1]
        };
        [query.clone(), k.clone(), v.clone(), chain[i].clone()]
    };
    let mut encoder = device.command_encoder().unwrap();
    let want = [0, 1].map(|round| {
        let links = chain.iter().enumerate().map(|(i, out)| {
            record(&mut encoder, &device, &problem, &link(round, i));
            encoder.commit_and_wait().unwrap();
            bytes(out)
        });
        links.collect::<Vec<_>>()
    });
    assert_ne!(want[0], want[1]);
    let stream = result::stream::create(result::stream::StreamKind::NonBlocking).unwrap();
    let busy = std::sync::atomic::AtomicBool::new(true);
    let mut wrong = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let device = cuda().unwrap();
            let data = Qkv::new(16, BF16, shape([1, 4, 4], (2048, 2048), 64));
            let problem = data.builder().build().unwrap();
            while busy.load(std::sync::atomic::Ordering::Relaxed) {
                data.run(&device, &problem);
            }
        });
        for round in 0..60 {
            let mut in_flight = Vec::new();
            for i in 0..chain.len() {
                record(&mut encoder, &device, &problem, &link(round, i));
                match round % 3 {
                    // All on one stream, then all on the caller's, then by turns.
                    0 if i + 1 < chain.len() => {}
                    0 => encoder.commit(),
                    // SAFETY: the stream is the primary context's, and destroyed below.
                    1 => in_flight
                        .push(unsafe { encoder.encode_into_stream(stream.cast()) }.unwrap()),
                    _ if i % 2 == 1 => encoder.commit(),
                    // SAFETY: as above.
                    _ => in_flight
                        .push(unsafe { encoder.encode_into_stream(stream.cast()) }.unwrap()),
                }
            }
            drop(in_flight);
            encoder.wait_until_completed().unwrap();
            for (i, out) in chain.iter().enumerate() {
                if bytes(out) != want[round % 2][i] {
                    wrong.push((round, i));
                }
            }
        }
        busy.store(false, std::sync::atomic::Ordering::Relaxed);
    });
    // SAFETY: made above, used no more.
    unsafe { result::stream::destroy(stream).unwrap() };
    assert!(wrong.is_empty(), "rounds and links: {wrong:?}");
}

#[test]
fn many_threads_share_a_device() {
    let Some(device) = cuda() else { return };
    let data = Qkv::new(7, BF16, shape([1, 2, 2], (64, 64), 64));
    let problem = data.builder().build().unwrap();
    let (want, _) = data.run(&device, &problem);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for _ in 0..10 {
                    assert_eq!(data.run(&device, &problem).0, want);
                }
            });
        }
    });
}

/// Device memory of the driver's, freed when dropped.
struct Raw(u64);

impl Raw {
    fn zeroed(bytes: usize) -> Self {
        // SAFETY: the device is open and its context current; the memory has as many bytes.
        unsafe {
            let at = result::malloc_sync(bytes).unwrap();
            result::memset_d8_sync(at, 0, bytes).unwrap();
            Self(at)
        }
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // SAFETY: allocated once, freed once, after the last use.
        unsafe { result::free_sync(self.0).unwrap() };
    }
}

#[test]
fn more_than_2_to_the_31_elements_are_reached() {
    let Some(device) = cuda() else { return };
    let dim = 128;
    // The last row of a long cache, and the last of many heads.
    for (heads, rows, keys) in [(1, 1, (1 << 24) + 1_000), (64, 200, 270_000)] {
        let s = shape([1, heads, heads], (rows, keys), dim);
        let elements = heads * keys * dim;
        assert!(elements > 1 << 31);
        // SAFETY: the device is open, so the driver is there; released below.
        unsafe {
            let gpu = result::device::get(0).unwrap();
            result::ctx::set_current(result::primary_ctx::retain(gpu).unwrap()).unwrap();
        }
        let (k, v) = (Raw::zeroed(2 * elements), Raw::zeroed(2 * elements));
        let key = common::to_bytes(&vec![8.0; dim], BF16);
        let value = common::to_bytes(&common::normal(3, dim, BF16), BF16);
        let at = 2 * (elements - dim) as u64;
        // SAFETY: the last row of either.
        unsafe {
            result::memcpy_htod_sync(k.0 + at, &key).unwrap();
            result::memcpy_htod_sync(v.0 + at, &value).unwrap();
        }
        // SAFETY: the memory is there until the buffers are dropped.
        let wrap = |raw: &Raw| unsafe {
            device
                .cuda_wrap(raw.0, 2 * elements, BF16, vec![elements])
                .unwrap()
        };
        let (kb, vb) = (wrap(&k), wrap(&v));
        let q = upload(
            &device,
            &vec![1.0; heads * rows * dim],
            BF16,
            &[heads * rows * dim],
        );
        let out = output(&device, heads * rows * dim, BF16);
        let problem = Problem::builder(BF16, s).build().unwrap();
        attend(&device, &problem, &Operands::new(&q, &kb, &vb, &out));
        let last = 2 * (heads * rows - 1) * dim;
        assert!(bytes(&out)[last..] == value, "{heads} heads");
        drop((kb, vb));
        drop((k, v));
        // SAFETY: retained above.
        unsafe { result::primary_ctx::release(result::device::get(0).unwrap()).unwrap() };
    }
}

/// A figure: seconds from nothing to the first result. `MLX_FLASH_CUDA_CACHE=off` has it compile.
#[test]
#[ignore = "prints a figure"]
fn first_result() {
    let data = Qkv::new(12, BF16, shape([1, 2, 2], (256, 256), 128));
    let problem = data.builder().causal(true).build().unwrap();
    let begin = std::time::Instant::now();
    let Some(device) = cuda() else { return };
    let opened = begin.elapsed();
    data.run(&device, &problem);
    let done = begin.elapsed();
    eprintln!("first result after {done:.3?}, the device open after {opened:.3?}");
}

/// A figure: what recording a dispatch and giving it to the driver takes of the host.
#[test]
#[ignore = "prints a figure"]
fn host_time_of_a_dispatch() {
    let Some(device) = cuda() else { return };
    for (heads, rows, keys) in [(2, 256, 256), (2, 1, 256), (8, 1, 8_192)] {
        let data = Qkv::new(13, BF16, shape([1, heads, heads], (rows, keys), 128));
        let problem = data.builder().build().unwrap();
        let [q, k, v, out] = data.buffers(&device);
        let operands = Operands::new(&q, &k, &v, &out);
        let mut registry = KernelRegistry::new();
        let mut encoder = device.command_encoder().unwrap();
        let (mut recorded, mut encoded) = (Vec::new(), Vec::new());
        let n = 100u32;
        for _ in 0..20 {
            let begin = std::time::Instant::now();
            for _ in 0..n {
                ops::attention(&mut encoder, &device, &mut registry, &problem, &operands).unwrap();
            }
            recorded.push(begin.elapsed() / n);
            // SAFETY: the default stream is always there.
            let in_flight = unsafe { encoder.encode_into_stream(std::ptr::null_mut()) }.unwrap();
            encoded.push(begin.elapsed() / n);
            in_flight.wait().unwrap();
        }
        recorded.sort();
        encoded.sort();
        eprintln!(
            "{heads} heads, {rows} x {keys}: recorded in {:?}, with the launch {:?}",
            recorded[10], encoded[10]
        );
    }
}

#[test]
fn other_texts_are_refused() {
    let Some(device) = cuda() else { return };
    let mut registry = KernelRegistry::new();
    registry.register_source("theirs", "__global__ void theirs() {}");
    let error = registry
        .get_pipeline("theirs", device.metal_device())
        .unwrap_err();
    assert!(
        matches!(error, MlxError::ShaderCompilationError { .. }),
        "{error}"
    );
}
