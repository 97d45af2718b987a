//! Sizes: ragged lengths, every head dimension and dtype, groups, layouts, packed sequences.

use super::harness::{Data, build, isas, shape};
use crate::DType;
use crate::attention::oracle::Precision;
use crate::attention::{Layout, Problem, QueryOffset, Role, Strides};

const FLOATS: [DType; 3] = [DType::BF16, DType::F16, DType::F32];

#[test]
fn ragged_lengths() {
    let lengths = [1, 2, 15, 17, 33, 63, 65, 130, 259];
    for (n, ql) in lengths.into_iter().enumerate() {
        for (m, kl) in lengths.into_iter().enumerate() {
            let dtype = FLOATS[(n + m) % 3];
            let causal = (n + 2 * m) % 4 < 2;
            let problem = build(
                Problem::builder(dtype, shape(1, (2, 1), (ql, kl), 64))
                    .causal(causal)
                    .query_offset(QueryOffset::BottomRight)
                    .lse(true),
            );
            Data::new(problem, (n * 31 + m) as u64).check(&format!("{dtype} {ql}x{kl} {causal}"));
        }
    }
}

#[test]
fn every_head_dim_and_dtype() {
    for dim in crate::attention::HEAD_DIMS {
        for dtype in FLOATS {
            let problem =
                build(Problem::builder(dtype, shape(2, (2, 2), (37, 300), dim)).lse(true));
            Data::new(problem, dim as u64).check(&format!("{dtype} D {dim}"));
        }
        let problem = build(
            Problem::builder(DType::F32, shape(1, (2, 1), (19, 75), dim)).kv_dtype(DType::F16),
        );
        Data::new(problem, dim as u64).check(&format!("f32 over f16, D {dim}"));
    }
}

#[test]
fn few_rows_of_a_query_between_poison() {
    for dim in crate::attention::HEAD_DIMS {
        for (n, dtype) in FLOATS.into_iter().enumerate() {
            let sizes = shape(1, (2, 2), (1 + 2 * n, 70), dim);
            let gaps = Strides {
                batch: 2 * 8 * (dim + 16),
                head: 8 * (dim + 16),
                seq: dim + 16,
            };
            let problem = build(Problem::builder(dtype, sizes).strides(Role::Query, gaps));
            Data::new(problem, dim as u64).check(&format!("{dtype} D {dim}"));
        }
    }
}

#[test]
fn groups_of_heads() {
    for heads in [(1, 1), (4, 1), (6, 2), (14, 2), (5, 5)] {
        for (ql, kl) in [(1, 70), (3, 40), (29, 29)] {
            let problem = build(
                Problem::builder(DType::BF16, shape(2, heads, (ql, kl), 32))
                    .causal(true)
                    .query_offset(QueryOffset::BottomRight),
            );
            Data::new(problem, kl as u64).check(&format!("{heads:?} {ql}x{kl}"));
        }
    }
}

#[test]
fn a_single_query_over_many_keys_is_split() {
    for (dtype, kl) in [(DType::BF16, 5000), (DType::F16, 2049), (DType::F32, 4096)] {
        let problem = build(
            Problem::builder(dtype, shape(2, (4, 2), (2, kl), 64))
                .causal(true)
                .query_offset(QueryOffset::BottomRight)
                .key_capacity(kl + 100)
                .sinks(true)
                .lse(true),
        );
        Data::new(problem, 3).check(&format!("split {dtype} {kl}"));
    }
}

#[test]
fn strides_views_and_capacity() {
    let sizes = shape(2, (4, 2), (33, 50), 64);
    let plain = Data::new(build(Problem::builder(DType::BF16, sizes)), 5);
    let gap = |heads: usize, len: usize| Strides {
        batch: heads * (len * 96 + 7),
        head: len * 96 + 7,
        seq: 96,
    };
    let others = [
        Problem::builder(DType::BF16, sizes)
            .layout(Layout::SeqMajor)
            .key_capacity(64),
        Problem::builder(DType::BF16, sizes).key_capacity(64),
        Problem::builder(DType::BF16, sizes)
            .strides(Role::Query, gap(4, 33))
            .strides(Role::Key, gap(2, 50))
            .strides(Role::Value, gap(2, 51))
            .strides(Role::Output, gap(4, 34)),
    ];
    for isa in isas() {
        let expected = plain.run(isa, 1).o;
        for other in others.clone() {
            let view = plain.with_problem(build(other));
            assert_eq!(view.run(isa, 1).o, expected, "{isa} {:?}", view.problem);
        }
    }
}

#[test]
fn inputs_may_broadcast() {
    let none = Strides {
        batch: 0,
        head: 0,
        seq: 0,
    };
    let one_key = Strides {
        batch: 64,
        head: 0,
        seq: 0,
    };
    let problem = build(
        Problem::builder(DType::F32, shape(2, (4, 2), (9, 40), 64))
            .strides(Role::Query, none)
            .strides(Role::Value, one_key),
    );
    Data::new(problem, 9).check("broadcast");
}

#[test]
fn packed_sequences() {
    let (cu_q, cu_k) = ([0, 5, 5, 70, 71], [0, 12, 20, 20, 300]);
    for (dtype, offset) in [
        (DType::BF16, QueryOffset::BottomRight),
        (DType::F16, QueryOffset::At(0)),
        (DType::F32, QueryOffset::At(-3)),
    ] {
        let problem = build(
            Problem::varlen(dtype, 4, 2, 64, &cu_q, &cu_k)
                .causal(true)
                .query_offset(offset)
                .lse(true),
        );
        Data::new(problem, 11).check(&format!("packed {dtype}"));
    }
}

#[test]
fn errors_are_as_small_as_promised() {
    for (dtype, goal) in [
        (DType::BF16, 2.3e-3),
        (DType::F16, 2.9e-4),
        (DType::F32, 5e-7),
    ] {
        for dim in [64, 256] {
            let problem = build(Problem::builder(dtype, shape(1, (2, 2), (200, 520), dim)));
            let error = Data::new(problem, 21).check("accuracy");
            assert!(error <= goal, "{dtype} D {dim}: {error}");
        }
    }
}

#[test]
fn the_mean_of_visible_values_is_refused() {
    for dtype in FLOATS {
        let problem = build(Problem::builder(dtype, shape(1, (2, 2), (33, 130), 64)));
        let data = Data::new(problem, 2);
        assert!(!data.compare(&data.reference(Precision::MeanOfVisible).o).ok);
    }
}
