//! The forms of a problem that devices refuse: the oracle computes them as the dense problem that holds the
//! same keys, and each device says what it cannot do, beforehand and in a call alike.
#![allow(clippy::unwrap_used)]

mod common;

use common::{devices, normal, output, shape, upload};
use mlx_flash_attn::attention::oracle::{self, Inputs, Precision, Values};
use mlx_flash_attn::attention::{
    Format, KeyLengths, Layout, Pages, Problem, ProblemBuilder, QueryOffset, Role, Shape,
};
use mlx_flash_attn::ops::{self, Operands};
use mlx_flash_attn::{DType, DeviceKind, MlxBuffer, MlxDevice, MlxError};

const DIM: usize = 32;

fn dense(batch: usize, lengths: (usize, usize)) -> ProblemBuilder {
    Problem::builder(DType::F32, shape([batch, 4, 2], lengths, DIM))
}

fn exact(problem: &Problem, inputs: &Inputs<'_>) -> Vec<f64> {
    oracle::attention(problem, inputs, Precision::Exact)
        .unwrap()
        .o
}

/// Q, K and V of a problem, drawn with these seeds.
fn draw(problem: &Problem) -> [Vec<f32>; 3] {
    [Role::Query, Role::Key, Role::Value].map(|role| {
        let n = problem.operand(role).unwrap().elements;
        normal(role as u64 + 1, n, DType::F32)
    })
}

fn inputs<'a>([q, k, v]: [&'a [f32]; 3]) -> Inputs<'a> {
    Inputs::new(Values::F32(q), Values::F32(k), Values::F32(v))
}

/// Each device takes the problem; tests/serving.rs looks at what they give.
fn served(problem: &Problem) {
    for device in devices() {
        device.supports(problem).unwrap();
    }
}

/// Each device refuses the problem with the same words in `supports` and in a call, which writes nothing.
fn refused(problem: &Problem, words: &str) {
    let buffer = |device: &MlxDevice, role| -> Option<MlxBuffer> {
        let spec = problem.operand(role)?;
        let n = spec.elements.max(1);
        Some(match spec.dtype {
            DType::I32 | DType::U32 => device.alloc_buffer(4 * n, spec.dtype, vec![n]).unwrap(),
            dtype if role.is_output() => output(device, n, dtype),
            dtype => upload(device, &vec![0.0; n], dtype, &[n]),
        })
    };
    for device in devices() {
        let refusal = device.supports(problem).unwrap_err();
        assert_eq!(refusal.device, device.kind().name());
        assert!(refusal.what.contains(words), "{refusal}");
        let made = Role::ALL.map(|role| buffer(&device, role));
        let at = |role: Role| made[role as usize].as_ref();
        let [q, k, v, out] =
            [Role::Query, Role::Key, Role::Value, Role::Output].map(|role| at(role).unwrap());
        let operands = Operands {
            block_table: at(Role::BlockTable),
            key_lengths: at(Role::KeyLengths),
            ..Operands::new(q, k, v, out)
        };
        let mut encoder = device.command_encoder().unwrap();
        let error = ops::attention(&mut encoder, problem, &operands).unwrap_err();
        assert_eq!(error, MlxError::Unsupported(refusal));
        encoder.commit_and_wait().unwrap();
        assert!(out.as_slice::<f32>().unwrap().iter().all(|x| x.is_nan()));
    }
}

#[test]
fn v_of_another_width_is_the_first_columns_of_a_wider_v() {
    let wide = dense(2, (5, 9)).build().unwrap();
    let data = draw(&wide);
    let all = exact(&wide, &inputs([&data[0], &data[1], &data[2]]));

    let narrow = Problem::builder(
        DType::F32,
        Shape {
            qk_dim: 64,
            ..wide.shape()
        },
    );
    let narrow = narrow.scale(wide.scale()).build().unwrap();
    // Rows of 64 of which the last half is 0 have the scores of rows of 32.
    let widen = |rows: &[f32]| -> Vec<f32> {
        let rows = rows.chunks(DIM);
        rows.flat_map(|row| [row, &[0.0; DIM]].concat()).collect()
    };
    let (q, k) = (widen(&data[0]), widen(&data[1]));
    assert_eq!(exact(&narrow, &inputs([&q, &k, &data[2]])), all);
    assert_eq!(narrow.flops(), wide.flops() * 1.5);
    refused(&narrow, "v_dim 32 beside qk_dim 64");

    let packed = Problem::varlen(DType::F32, 4, 2, 64, &[0, 3], &[0, 5]).v_dim(32);
    assert_eq!(
        packed
            .build()
            .unwrap()
            .operand(Role::Output)
            .unwrap()
            .elements,
        3 * 4 * 32
    );
}

#[test]
fn pages_hold_the_keys_that_the_table_names() {
    let causal = |builder: ProblemBuilder| {
        let builder = builder.causal(true).query_offset(QueryOffset::BottomRight);
        builder.build().unwrap()
    };
    let plain = causal(dense(2, (3, 10)));
    let data = draw(&plain);
    let want = exact(&plain, &inputs([&data[0], &data[1], &data[2]]));
    let pages = Pages {
        count: 7,
        page_size: 4,
        per_sequence: 3,
    };
    let table = [6, 0, 3, 2, 5, 1];
    for layout in [Layout::HeadMajor, Layout::SeqMajor] {
        let paged = causal(dense(2, (3, 10)).pages(pages).layout(layout));
        let strides = paged.strides(Role::Key).unwrap();
        let elements = paged.operand(Role::Key).unwrap().elements;
        assert_eq!(elements, 7 * 4 * 2 * DIM);
        assert_eq!(paged.operand(Role::BlockTable).unwrap().elements, 6);
        let place = |rows: &[f32]| {
            let mut pool = vec![f32::NAN; elements];
            for (b, h, j) in (0..2).flat_map(|b| (0..20).map(move |i| (b, i / 10, i % 10))) {
                let page = table[3 * b + j / 4] as usize;
                let to = page * strides.batch + h * strides.head + j % 4 * strides.seq;
                let from = ((b * 2 + h) * 10 + j) * DIM;
                pool[to..to + DIM].copy_from_slice(&rows[from..from + DIM]);
            }
            pool
        };
        let (k, v) = (place(&data[1]), place(&data[2]));
        let q = if layout == Layout::HeadMajor {
            data[0].clone()
        } else {
            let at = |b: usize, i: usize, h: usize| ((b * 4 + h) * 3 + i) * DIM;
            (0..24)
                .map(|n| (n / 12, n / 4 % 3, n % 4))
                .flat_map(|(b, i, h)| data[0][at(b, i, h)..][..DIM].to_vec())
                .collect()
        };
        let got = exact(
            &paged,
            &Inputs {
                block_table: Some(&table),
                ..inputs([&q, &k, &v])
            },
        );
        assert_eq!(got, want, "{layout:?}");
        served(&paged);
    }
}

#[test]
fn each_sequence_has_its_own_number_of_keys() {
    let lengths = [7u32, 0, 10];
    let bottom_right = |builder: ProblemBuilder| {
        let builder = builder.causal(true).query_offset(QueryOffset::BottomRight);
        builder.build().unwrap()
    };
    let of_host = KeyLengths::Host(lengths.into());
    let host = bottom_right(dense(3, (2, 10)).key_lengths(of_host));
    let device = bottom_right(dense(3, (2, 10)).key_lengths(KeyLengths::Device));
    let [q, k, v] = draw(&host);
    let mut want = Vec::new();
    for (b, len) in lengths.into_iter().enumerate() {
        let one = bottom_right(dense(1, (2, len as usize)).key_capacity(10));
        let part = |x: &[f32]| -> Vec<f32> { x[b * x.len() / 3..][..x.len() / 3].to_vec() };
        want.extend(exact(&one, &inputs([&part(&q), &part(&k), &part(&v)])));
    }
    let given = inputs([&q, &k, &v]);
    assert_eq!(exact(&host, &given), want);
    let of_device = Inputs {
        key_lengths: Some(&lengths),
        ..given
    };
    assert_eq!(exact(&device, &of_device), want);
    assert_eq!(device.operand(Role::KeyLengths).unwrap().elements, 3);
    served(&host);
    served(&device);
}

#[test]
fn packed_queries_meet_the_keys_of_their_sequence() {
    let cu = [0, 2, 2, 5];
    let packed = Problem::varlen_queries(DType::F32, 4, 2, 6, DIM, &cu)
        .layout(Layout::HeadMajor)
        .causal(true)
        .query_offset(QueryOffset::BottomRight)
        .build()
        .unwrap();
    let data = draw(&packed);
    let got = exact(&packed, &inputs([&data[0], &data[1], &data[2]]));
    let keys = data[1].len() / 3;
    for (b, rows) in cu
        .windows(2)
        .enumerate()
        .filter(|(_, rows)| rows[0] < rows[1])
    {
        let (first, len) = (rows[0] as usize, (rows[1] - rows[0]) as usize);
        let one = dense(1, (len, 6))
            .causal(true)
            .query_offset(QueryOffset::BottomRight)
            .build()
            .unwrap();
        let at = |h: usize| (h * 5 + first) * DIM..(h * 5 + first + len) * DIM;
        let q: Vec<f32> = (0..4).flat_map(|h| data[0][at(h)].to_vec()).collect();
        let (k, v) = (&data[1][b * keys..][..keys], &data[2][b * keys..][..keys]);
        let want: Vec<f64> = exact(&one, &inputs([&q, k, v]));
        let rows: Vec<f64> = (0..4).flat_map(|h| got[at(h)].to_vec()).collect();
        assert_eq!(rows, want, "sequence {b}");
    }
    served(&packed);
}

#[test]
fn blocks_are_named_and_refused_by_gpus() {
    for (format, bytes) in [(Format::Q8_0, 34), (Format::Q4_0, 18)] {
        let problem = dense(2, (3, 10))
            .key_format(format)
            .value_format(DType::F32)
            .build()
            .unwrap();
        let spec = problem.operand(Role::Key).unwrap();
        assert_eq!((spec.dtype, spec.elements), (DType::U8, 2 * 2 * 10 * bytes));
        assert_eq!(problem.operand(Role::Value).unwrap().dtype, DType::F32);
        for device in devices() {
            match (device.kind(), device.supports(&problem)) {
                // tests/quantised.rs looks at what it gives.
                (DeviceKind::Cpu, supported) => supported.unwrap(),
                (_, refusal) => assert!(refusal.unwrap_err().what.contains(format.name())),
            }
        }
    }
    let mixed = dense(1, (3, 10)).key_format(DType::F16).build().unwrap();
    for device in devices() {
        let of_cpu = device.kind() == DeviceKind::Cpu;
        assert_eq!(device.supports(&mixed).is_ok(), of_cpu);
    }
}

#[test]
fn without_keys_every_form_of_them_gives_zeros() {
    for problem in [
        dense(2, (3, 0)).key_lengths(KeyLengths::Host([0, 0].into())),
        Problem::varlen_queries(DType::F32, 4, 2, 0, DIM, &[0, 2, 6]),
    ] {
        let problem = problem.build().unwrap();
        for device in devices() {
            let q = upload(&device, &draw(&problem)[0], DType::F32, &[2 * 4 * 3 * DIM]);
            let none = device
                .buffer_from_slice::<f32>(&[], DType::F32, vec![0])
                .unwrap();
            let out = output(&device, 2 * 4 * 3 * DIM, DType::F32);
            let operands = Operands::new(&q, &none, &none, &out);
            common::attend(&device, &problem, &operands);
            assert!(out.as_slice::<f32>().unwrap().iter().all(|x| *x == 0.0));
        }
    }
}

#[test]
fn lengths_of_any_size_overflow_nothing() {
    let problem = dense(1, (3, 10))
        .query_offset(QueryOffset::BottomRight)
        .build()
        .unwrap();
    for len in [0, 10, usize::MAX] {
        let _ = problem.sequence_of(0, len);
        let _ = problem.visibility(len, 1);
    }
}
