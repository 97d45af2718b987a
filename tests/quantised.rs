//! K and V in GGML's blocks, read where they lie: a call gives what it would over the dequantised keys and values.
#![allow(clippy::unwrap_used)]

#[path = "common/blocks.rs"]
mod blocks;
mod common;

use blocks::{dequantise, quantise};
use common::{BUILDS, assert_close, attend, download, normal, output, shape, upload};
use half::f16;
use mlx_flash_attn::attention::oracle::{self, Inputs, Precision, Values};
use mlx_flash_attn::attention::{
    Format, KeyLengths, Layout, Pages, Problem, ProblemBuilder, QueryOffset, Role,
};
use mlx_flash_attn::ops::Operands;
use mlx_flash_attn::{CpuOptions, DType, Isa, MlxBuffer, MlxDevice};

const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const F32: Format = Format::Plain(DType::F32);
const F16: Format = Format::Plain(DType::F16);
/// Formats of K and of V.
const FORMATS: [[Format; 2]; 7] = [
    [Format::Q8_0, Format::Q8_0],
    [Format::Q4_0, Format::Q4_0],
    [Format::Q8_0, Format::Q4_0],
    [F32, Format::Q8_0],
    [Format::Q4_0, F32],
    [F16, Format::Q8_0],
    [F32, F16],
];

/// The CPU with each instruction set that this machine has.
fn processors() -> Vec<MlxDevice> {
    let isas = Isa::ALL.into_iter().filter(|isa| isa.is_available());
    isas.map(|isa| {
        let isa = Some(isa);
        MlxDevice::cpu(CpuOptions {
            isa,
            ..CpuOptions::default()
        })
        .unwrap()
    })
    .collect()
}

fn raw(device: &MlxDevice, format: Format, bytes: &[u8]) -> MlxBuffer {
    let dtype = format.storage();
    let count = bytes.len() / dtype.size_of();
    let mut buffer = device
        .alloc_buffer(bytes.len(), dtype, vec![count])
        .unwrap();
    buffer.as_mut_slice::<u8>().unwrap().copy_from_slice(bytes);
    buffer
}

/// O and the log-sum-exp, as bits; all NaNs are alike.
fn run(
    device: &MlxDevice,
    problem: &Problem,
    q: &[f32],
    kv: [(&[u8], Format); 2],
    other: [Option<&[i32]>; 2],
) -> Vec<u32> {
    let of = |role| problem.operand(role).map_or(0, |spec| spec.elements);
    let q = upload(device, q, problem.dtype(), &[q.len()]);
    let [k, v] = kv.map(|(bytes, format)| raw(device, format, bytes));
    let out = output(device, of(Role::Output), problem.dtype());
    let lse = output(device, of(Role::Lse), DType::F32);
    let integers = |x: &[i32]| {
        device
            .buffer_from_slice(x, DType::I32, vec![x.len()])
            .unwrap()
    };
    let [table, lengths] = other.map(|x| x.map(integers));
    let operands = Operands {
        lse: problem.has_lse().then_some(&lse),
        block_table: table.as_ref(),
        key_lengths: lengths.as_ref(),
        ..Operands::new(&q, &k, &v, &out)
    };
    attend(device, problem, &operands);
    let all = download(&out).into_iter().chain(download(&lse));
    all.map(|x| {
        if x.is_nan() {
            f32::NAN.to_bits()
        } else {
            x.to_bits()
        }
    })
    .collect()
}

/// The problem over blocks has the bits of the same over what they stand for.
fn agrees(
    what: &str,
    build: &dyn Fn(DType) -> ProblemBuilder,
    q: &[f32],
    kv: [(&[u8], Format); 2],
    other: [Option<&[i32]>; 2],
) {
    let plain = kv.map(|(bytes, format)| quantise(F32, &dequantise(format, bytes)));
    let [k, v] = [&plain[0][..], &plain[1][..]];
    let over = |[k, v]: [Format; 2]| {
        build(DType::F32)
            .key_format(k)
            .value_format(v)
            .build()
            .unwrap()
    };
    for device in processors() {
        let want = run(&device, &over([F32, F32]), q, [(k, F32), (v, F32)], other);
        let got = run(&device, &over(kv.map(|(_, format)| format)), q, kv, other);
        assert!(got == want, "{what}, {}", device.name());
        assert!(want.iter().any(|x| *x != 0), "{what}");
    }
}

#[test]
fn blocks_give_the_bits_of_what_they_stand_for() {
    for (n, dim) in [32, 64, 96, 128, 192, 256, 512].into_iter().enumerate() {
        for (m, (queries, keys)) in [(1, 300), (3, 77), (40, 130)].into_iter().enumerate() {
            let formats = FORMATS[(n + m) % FORMATS.len()];
            let build = BUILDS[(n + 2 * m) % BUILDS.len()];
            let layout = [Layout::HeadMajor, Layout::SeqMajor][n % 2];
            let q = normal(1, 2 * HEADS * queries * dim, DType::F32);
            let rows = |seed, format| {
                quantise(format, &normal(seed, 2 * KV_HEADS * keys * dim, DType::F32))
            };
            let (k, v) = (rows(2, formats[0]), rows(3, formats[1]));
            let builder = |dtype| {
                build(Problem::builder(
                    dtype,
                    shape([2, HEADS, KV_HEADS], (queries, keys), dim),
                ))
                .layout(layout)
                .lse(true)
            };
            let what = format!("d{dim} q{queries} k{keys} {formats:?} {layout:?}");
            agrees(
                &what,
                &builder,
                &q,
                [(&k, formats[0]), (&v, formats[1])],
                [None, None],
            );
        }
    }
}

/// Blocks in the room past the keys hold scales that are NaN or infinite, and so do, in V, keys that some rows see.
#[test]
fn a_scale_that_is_not_finite_reaches_the_rows_that_see_it() {
    let (dim, keys, room) = (64, 90, 100);
    let bad = [f16::NAN, f16::INFINITY, f16::NEG_INFINITY];
    let rows = |seed, format: Format, spoiled: &[usize]| {
        let mut rows = quantise(format, &normal(seed, KV_HEADS * room * dim, DType::F32));
        let row_bytes = dim / format.block() * format.block_bytes();
        for key in spoiled {
            for at in [0, 1].map(|head| (head * room + key) * row_bytes) {
                let scale = bad[key % 3];
                if format == F32 {
                    rows[at..at + 4].copy_from_slice(&scale.to_f32().to_le_bytes());
                } else {
                    // An f16 element begins as a block does.
                    rows[at..at + 2].copy_from_slice(&scale.to_le_bytes());
                }
            }
        }
        rows
    };
    let past: Vec<usize> = (keys..room).collect();
    for formats in FORMATS {
        for (queries, seen) in [(1, &[][..]), (1, &[40, 41]), (40, &[]), (40, &[40, 41])] {
            let q = normal(1, HEADS * queries * dim, DType::F32);
            let k = rows(2, formats[0], &past);
            let v = rows(3, formats[1], &[&past[..], seen].concat());
            let builder = |dtype| {
                Problem::builder(dtype, shape([1, HEADS, KV_HEADS], (queries, keys), dim))
                    .key_capacity(room)
                    .causal(true)
                    .query_offset(QueryOffset::At(if queries == 1 { 60 } else { 20 }))
                    .lse(true)
            };
            let what = format!("{formats:?} q{queries} {seen:?}");
            let kv = [(&k[..], formats[0]), (&v, formats[1])];
            agrees(&what, &builder, &q, kv, [None, None]);
        }
    }
}

#[test]
fn blocks_lie_in_pages_and_sequences_have_lengths() {
    let (dim, longest) = (128, 70);
    let pages = Pages {
        count: 16,
        page_size: 8,
        per_sequence: 9,
    };
    let table: Vec<i32> = (0..18).map(|i| (i * 7 + 3) % 16).collect();
    for formats in FORMATS {
        for queries in [1, 30] {
            let q = normal(1, 2 * HEADS * queries * dim, DType::F32);
            let rows =
                |seed, format| quantise(format, &normal(seed, 16 * KV_HEADS * 8 * dim, DType::F32));
            let (k, v) = (rows(2, formats[0]), rows(3, formats[1]));
            let builder = |dtype| {
                Problem::builder(dtype, shape([2, HEADS, KV_HEADS], (queries, longest), dim))
                    .pages(pages)
                    .key_lengths(KeyLengths::Device)
                    .causal(true)
                    .query_offset(QueryOffset::BottomRight)
                    .lse(true)
            };
            let what = format!("{formats:?} q{queries}");
            agrees(
                &what,
                &builder,
                &q,
                [(&k, formats[0]), (&v, formats[1])],
                [Some(&table), Some(&[70, 31])],
            );
        }
    }
}

/// 16-bit queries over blocks, beside the float64 oracle over what the blocks stand for.
#[test]
fn queries_of_16_bits_over_blocks_are_exact() {
    let (dim, keys) = (96, 150);
    for dtype in [DType::BF16, DType::F16] {
        for formats in FORMATS
            .into_iter()
            .filter(|pair| !pair.contains(&F32) && !pair.contains(&F16))
        {
            for queries in [1, 20] {
                let q = normal(1, HEADS * queries * dim, dtype);
                let rows = |seed, format| {
                    quantise(format, &normal(seed, KV_HEADS * keys * dim, DType::F32))
                };
                let (k, v) = (rows(2, formats[0]), rows(3, formats[1]));
                let builder = |dtype| {
                    Problem::builder(dtype, shape([1, HEADS, KV_HEADS], (queries, keys), dim))
                        .causal(true)
                        .query_offset(QueryOffset::BottomRight)
                };
                let exact = builder(DType::F32).build().unwrap();
                let (plain_k, plain_v) = (dequantise(formats[0], &k), dequantise(formats[1], &v));
                let inputs = Inputs::new(
                    Values::F32(&q),
                    Values::F32(&plain_k),
                    Values::F32(&plain_v),
                );
                let want = oracle::attention(&exact, &inputs, Precision::Exact)
                    .unwrap()
                    .o;
                let problem = builder(dtype)
                    .key_format(formats[0])
                    .value_format(formats[1])
                    .build()
                    .unwrap();
                for device in processors() {
                    let buffer = upload(&device, &q, dtype, &[q.len()]);
                    let (k, v) = (raw(&device, formats[0], &k), raw(&device, formats[1], &v));
                    let out = output(&device, q.len(), dtype);
                    attend(&device, &problem, &Operands::new(&buffer, &k, &v, &out));
                    assert_close(
                        &format!("{} {dtype} {formats:?}", device.name()),
                        &download(&out),
                        &want,
                        dtype,
                    );
                }
            }
        }
    }
}
