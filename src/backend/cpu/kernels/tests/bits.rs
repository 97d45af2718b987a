//! What must not change a single bit: threads, tile classes, the form of a mask.

use super::harness::{Data, Random, build, isas, shape};
use crate::DType;
use crate::attention::ProblemBuilder;
use crate::attention::mask::TileClass;
use crate::attention::{MaskSpec, Problem, QueryOffset};

const HIDDEN: f64 = f64::NEG_INFINITY;

#[test]
fn threads_do_not_matter() {
    let problems: [ProblemBuilder; 5] = [
        Problem::builder(DType::BF16, shape(1, (4, 2), (300, 300), 64)).causal(true),
        Problem::builder(DType::F32, shape(1, (3, 3), (130, 700), 128)),
        Problem::builder(DType::F16, shape(3, (4, 2), (1, 3000), 64)),
        Problem::builder(DType::BF16, shape(4, (7, 1), (50, 400), 80))
            .window(90)
            .query_offset(QueryOffset::At(0))
            .causal(true),
        Problem::varlen(DType::BF16, 4, 2, 64, &[0, 3, 200, 201], &[0, 30, 31, 600]),
    ];
    for problem in problems {
        let data = Data::new(build(problem.lse(true)), 31);
        for isa in isas() {
            let one = data.run(isa, 1);
            for threads in [2, 3, 7] {
                assert!(
                    data.run(isa, threads) == one,
                    "{isa} {threads} {:?}",
                    data.problem
                );
            }
        }
    }
}

#[test]
fn a_bool_mask_is_an_additive_mask_of_zero_and_minus_infinity() {
    let sizes = shape(1, (4, 2), (50, 333), 64);
    let runs: Vec<_> = [DType::U8, DType::F32, DType::F16, DType::BF16]
        .into_iter()
        .map(|dtype| {
            let mask = MaskSpec::plane(dtype, 333);
            let mut data = Data::new(
                build(Problem::builder(DType::BF16, sizes).mask(mask).lse(true)),
                3,
            );
            let mut random = Random::new(5);
            let cells: Vec<bool> = (0..50 * 333).map(|_| random.below(4) == 0).collect();
            data.set_mask(|_, i, j| {
                if cells[i * 333 + j] || j < 70 {
                    HIDDEN
                } else {
                    0.0
                }
            });
            data
        })
        .collect();
    for isa in isas() {
        let expected = runs[0].run(isa, 1);
        for other in &runs[1..] {
            assert!(other.run(isa, 1) == expected, "{isa}");
        }
    }
}

#[test]
fn causal_and_window_as_parameters_or_as_a_mask() {
    for (dtype, window) in [(DType::BF16, 0), (DType::F16, 100), (DType::F32, 7)] {
        let sizes = shape(1, (4, 2), (290, 400), 64);
        let mut builder = Problem::builder(dtype, sizes)
            .causal(true)
            .query_offset(QueryOffset::BottomRight)
            .lse(true);
        if window > 0 {
            builder = builder.window(window);
        }
        let flagged = Data::new(build(builder), 40);
        let visible = flagged.problem.sequence(0).visibility;
        for mask in [DType::U8, DType::BF16] {
            let builder = Problem::builder(dtype, sizes)
                .lse(true)
                .mask(MaskSpec::plane(mask, 400));
            let mut data = flagged.with_problem(build(builder));
            data.set_mask(|_, i, j| {
                if visible.attended(i as i64, j as i64) {
                    0.0
                } else {
                    HIDDEN
                }
            });
            for isa in isas() {
                assert!(
                    data.run(isa, 1) == flagged.run(isa, 1),
                    "{isa} {dtype} {mask}"
                );
            }
        }
    }
}

#[test]
fn tile_classes_do_not_matter() {
    for dim in [64, 512] {
        let (ql, kl) = (70, 600);
        let builder = Problem::builder(DType::BF16, shape(1, (4, 2), (ql, kl), dim))
            .mask(MaskSpec::plane(DType::BF16, kl))
            .lse(true);
        let mut plain = Data::new(build(builder.clone()), 50);
        let mut random = Random::new(1);
        let cells: Vec<f64> = (0..ql * kl)
            .map(|n| {
                let (i, j) = (n / kl, n % kl);
                if j > 4 * i + 100 || (j / 64 == 2 && i < 64) {
                    HIDDEN
                } else if j < 64 {
                    random.normal()
                } else {
                    0.0
                }
            })
            .collect();
        plain.set_mask(|_, i, j| cells[i * kl + j]);
        let mut classed = plain.with_problem(build(builder.tile_classes(true)));
        classed.set_mask(|_, i, j| cells[i * kl + j]);
        let tile = crate::attention::class_tile(dim);
        let (nq, nk) = tile.count(ql, kl);
        let classes: Vec<u8> = (0..nq * nk)
            .map(|n| {
                let (r, c) = (n / nk * tile.bq, n % nk * tile.bk);
                let of = |q, k| cells[q * kl + k] as f32;
                TileClass::of_mask(r..r + tile.bq, c..c + tile.bk, ql, kl, of) as u8
            })
            .collect();
        assert!((0..3).all(|class| classes.contains(&class)));
        classed.set_classes(classes);
        for isa in isas() {
            assert!(classed.run(isa, 1) == plain.run(isa, 1), "{isa} D {dim}");
        }
        classed.check("classes");
    }
}
