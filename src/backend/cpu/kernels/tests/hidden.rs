//! Keys that a row does not see add nothing to it, whatever bits they hold.

use super::harness::{Data, Output, Random, build, everywhere, shape};
use crate::DType;
use crate::attention::oracle;
use crate::attention::{MaskSpec, Problem, ProblemBuilder, QueryOffset};

const HIDDEN: f64 = f64::NEG_INFINITY;
const FLOATS: [DType; 3] = [DType::BF16, DType::F16, DType::F32];

fn largest(dtype: DType) -> f64 {
    match dtype {
        DType::BF16 => f64::from(half::bf16::MAX.to_f32()),
        DType::F16 => 65504.0,
        _ => f64::from(f32::MAX),
    }
}

/// Whether row `i` of head `h` in sequence `b` sees key `j`.
type Sees<'a> = &'a dyn Fn(usize, usize, usize, usize) -> bool;

/// Runs on every instruction set, and on tiles in plain Rust.
fn runs(data: &Data, threads: usize) -> Vec<(&'static str, Output)> {
    let dtype = data.problem.kv_dtype();
    everywhere(dtype)
        .into_iter()
        .map(|(name, kernels)| (name, data.run_with(kernels, threads)))
        .collect()
}

/// Poisons some keys, of both kinds: seen by nobody, and seen by some rows.
fn check(what: &str, data: &Data, sees: Sees<'_>) {
    let problem = &data.problem;
    let shape = problem.shape();
    let (dim, group) = (shape.qk_dim, problem.group());
    let top = largest(problem.kv_dtype());
    let poison = [f64::NAN, f64::INFINITY, HIDDEN, top, -top];
    for threads in [1, 3] {
        let expected = runs(data, threads);
        for (n, x) in poison.into_iter().enumerate() {
            let mut bad = data.clone();
            let mut random = Random::new(n as u64 + 1);
            // Keys of K and V that are bad, and the column where V is bad alone.
            let mut whole = vec![];
            let mut columns = vec![];
            for b in 0..shape.batch {
                let s = problem.sequence(b);
                for h in 0..shape.kv_heads {
                    for j in 0..s.key_len {
                        let mut rows = (0..s.query_len)
                            .flat_map(|i| (h * group..(h + 1) * group).map(move |h| (h, i)));
                        if !rows.any(|(h, i)| sees(b, h, i, j)) {
                            bad.set_key((b, h, j), x, poison[random.below(5) as usize]);
                        } else if random.below(40) == 0 {
                            bad.set_key((b, h, j), x, x);
                            whole.push((b, h, j));
                        } else if random.below(40) == 0 && n < 3 {
                            let column = random.below(dim as u64) as usize;
                            bad.set_value((b, h, j), column, x);
                            columns.push((b, h, j, column));
                        }
                    }
                }
            }
            for ((name, got), (_, good)) in runs(&bad, threads).into_iter().zip(&expected) {
                for b in 0..shape.batch {
                    let s = problem.sequence(b);
                    for h in 0..shape.heads {
                        for i in 0..s.query_len {
                            let row = oracle::reference_row(problem, &s, h, i);
                            let what = format!("{what} {name} {threads} threads, {x}: {b} {h} {i}");
                            let of = |o: &Output| o.o[row * dim..(row + 1) * dim].to_vec();
                            let (got_row, good_row) = (of(&got), of(good));
                            let touches = |key: &(usize, usize, usize)| {
                                key.0 == b && key.1 == h / group && sees(b, h, i, key.2)
                            };
                            if whole.iter().any(touches) {
                                if x.is_nan() {
                                    assert!(got_row.iter().all(|x| x.is_nan()), "{what}");
                                }
                                continue;
                            }
                            assert_eq!(got.lse[row].to_bits(), good.lse[row].to_bits(), "{what}");
                            for d in 0..dim {
                                let hit = columns
                                    .iter()
                                    .any(|c| c.3 == d && touches(&(c.0, c.1, c.2)));
                                if hit {
                                    assert_eq!(got_row[d].to_string(), x.to_string(), "{what} {d}");
                                } else {
                                    assert_eq!(
                                        got_row[d].to_bits(),
                                        good_row[d].to_bits(),
                                        "{what} {d}"
                                    );
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

fn by_bounds(what: &str, problem: ProblemBuilder, seed: u64) {
    let data = Data::new(build(problem.lse(true)), seed);
    let problem = data.problem.clone();
    check(what, &data, &|b, _, i, j| {
        problem.sequence(b).visibility.attended(i as i64, j as i64)
    });
}

#[test]
fn keys_outside_the_bounds_add_nothing() {
    for (n, dtype) in FLOATS.into_iter().enumerate() {
        let seed = n as u64;
        let causal = Problem::builder(dtype, shape(1, (2, 1), (37, 100), 64)).causal(true);
        let causal = causal.query_offset(QueryOffset::At(n as i64 * 20));
        by_bounds("causal", causal, seed);
        let window = Problem::builder(dtype, shape(2, (2, 2), (21, 300), 32))
            .causal(true)
            .query_offset(QueryOffset::At(200))
            .window(30 + 7 * n);
        by_bounds("window", window, seed);
        let few = Problem::builder(dtype, shape(1, (2, 2), (3, 90), 64))
            .causal(true)
            .query_offset(QueryOffset::At(50));
        by_bounds("few rows", few, seed);
        let packed = Problem::varlen(dtype, 2, 1, 32, &[0, 3, 20, 45], &[0, 50, 70, 200]);
        let packed = packed.causal(true).query_offset(QueryOffset::At(0));
        by_bounds("packed", packed, seed);
    }
}

#[test]
fn keys_behind_a_mask_add_nothing() {
    for (n, dtype) in FLOATS.into_iter().enumerate() {
        let cells = [DType::U8, DType::BF16, DType::F16, DType::F32];
        for (ql, kl, cells) in [
            (1, 300, cells[n]),
            (5, 70, cells[n + 1]),
            (40, 290, cells[n]),
        ] {
            let sizes = shape(2, (4, 2), (ql, kl), 64);
            let mask = MaskSpec::broadcast(cells, [2, 1, ql, kl]);
            let problem = Problem::builder(dtype, sizes).mask(mask).lse(true);
            let mut data = Data::new(build(problem), 3);
            // The first row sees nothing, others a prefix with holes.
            let sees =
                |i: usize, j: usize| (ql == 1 || i > 0) && j < 37 + 5 * i && (j + i) % 11 != 4;
            data.set_mask(|_, i, j| if sees(i, j) { 0.0 } else { HIDDEN });
            check("mask", &data, &|_, _, i, j| sees(i, j));
        }
    }
}

#[test]
fn keys_in_skipped_tiles_add_nothing() {
    for dim in [64, 512] {
        let (ql, kl) = (40, 200);
        let tile = crate::attention::class_tile(dim);
        let (nq, nk) = tile.count(ql, kl);
        let problem = Problem::builder(DType::BF16, shape(1, (2, 2), (ql, kl), dim))
            .mask(MaskSpec::plane(DType::BF16, kl))
            .tile_classes(true)
            .lse(true);
        let mut data = Data::new(build(problem), 3);
        data.set_mask(|_, i, j| {
            if (i + j).is_multiple_of(3) {
                HIDDEN
            } else {
                0.0
            }
        });
        data.set_classes((0..nq * nk).map(|n| (n % 3) as u8).collect());
        let sees = |i: usize, j: usize| match (i / tile.bq * nk + j / tile.bk) % 3 {
            0 => false,
            1 => !(i + j).is_multiple_of(3),
            _ => true,
        };
        check("classes", &data, &|_, _, i, j| sees(i, j));
    }
}

#[test]
fn keys_in_other_chunks_add_nothing() {
    for dtype in FLOATS {
        let problem = Problem::builder(dtype, shape(1, (4, 2), (3, 2600), 64))
            .causal(true)
            .query_offset(QueryOffset::At(2300))
            .window(2200);
        by_bounds("chunks", problem, 8);
    }
}

#[test]
fn tiles_of_a_long_task_add_nothing() {
    let problem = Problem::builder(DType::BF16, shape(1, (1, 1), (700, 700), 256)).causal(true);
    by_bounds("tiles", problem, 8);
}

/// A score that is NaN is no reason to take a row for one without keys, nor to leave the key out.
#[test]
fn a_visible_key_of_nan_gives_nan() {
    for dtype in FLOATS {
        for (ql, all) in [(1, true), (1, false), (20, true), (20, false)] {
            let problem = Problem::builder(dtype, shape(1, (1, 1), (ql, 40), 64)).lse(true);
            let mut data = Data::new(build(problem), 1);
            for j in (0..40).filter(|j| all || *j == 17) {
                data.set_key((0, 0, j), f64::NAN, 1.0);
            }
            for (name, got) in runs(&data, 1) {
                assert!(
                    got.o.iter().all(|x| x.is_nan()),
                    "{name} {dtype} {ql} {all}"
                );
                assert!(
                    got.lse.iter().all(|x| x.is_nan()),
                    "{name} {dtype} {ql} {all}"
                );
            }
        }
    }
}
