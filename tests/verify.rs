//! The matrix of cases: what it covers, that devices pass it, and that an impostor does not.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::{BTreeSet, HashSet};

use mlx_flash_attn::attention::HEAD_DIMS;
use mlx_flash_attn::attention::oracle::{self, Precision};
use mlx_flash_attn::attention::tolerance::compare;
use mlx_flash_attn::verify::{self, Case, Data, Scope};
use mlx_flash_attn::{DeviceKind, KernelRegistry, MlxDevice};

fn cpu() -> MlxDevice {
    MlxDevice::open(DeviceKind::Cpu).unwrap()
}

/// Everything that a case can be told by.
fn values(case: &Case) -> BTreeSet<String> {
    let mut values: BTreeSet<String> = [
        format!("d{}", case.head_dim()),
        case.dtype().to_string(),
        format!("mask:{}", case.mask()),
        case.layout().to_string(),
    ]
    .into();
    values.extend(case.features().into_iter().map(String::from));
    values
}

#[test]
fn the_matrix_is_large_and_its_names_are_unique() {
    let (quick, full) = (
        verify::cases(Scope::Quick, &cpu()),
        verify::cases(Scope::Full, &cpu()),
    );
    assert!((230..=330).contains(&quick.len()), "{}", quick.len());
    assert!((2_800..=3_300).contains(&full.len()), "{}", full.len());
    let names: HashSet<String> = full.iter().map(Case::name).collect();
    assert_eq!(names.len(), full.len());
    assert!(quick.iter().all(|case| names.contains(&case.name())));
}

#[test]
fn quick_has_every_value_that_full_has() {
    let all = |scope| -> BTreeSet<String> {
        verify::cases(scope, &cpu())
            .iter()
            .flat_map(values)
            .collect()
    };
    let (quick, full) = (all(Scope::Quick), all(Scope::Full));
    assert_eq!(quick, full);
    for dim in HEAD_DIMS {
        assert!(full.contains(&format!("d{dim}")));
    }
    assert_eq!(full.iter().filter(|v| v.starts_with("mask:")).count(), 7);
}

fn run_all(scope: Scope, device: &MlxDevice) {
    let mut registry = KernelRegistry::new();
    let mut failed = Vec::new();
    for case in verify::cases(scope, device) {
        match verify::run_poisoned(&case, device, &mut registry) {
            Ok((plain, poisoned)) if plain.ok() && poisoned.ok() => {}
            Ok((plain, poisoned)) => failed.push(format!(
                "{}: {:?}",
                case.name(),
                [plain.failures, poisoned.failures].concat()
            )),
            Err(error) => failed.push(format!("{}: {error}", case.name())),
        }
    }
    assert!(failed.is_empty(), "{} failed: {failed:#?}", failed.len());
}

#[test]
fn every_case_passes_in_both_its_forms() {
    for device in common::devices() {
        // Other devices may be slow to emulate; the program's `verify` gives them all of it.
        let scope = match device.kind() {
            DeviceKind::Cpu => Scope::Full,
            _ => Scope::Quick,
        };
        run_all(scope, &device);
    }
}

/// Whether some row of the case sees at least two keys (else the mean is the right answer).
fn some_row_sees_two_keys(data: &Data) -> bool {
    let (problem, inputs) = (&data.problem, data.inputs().unwrap());
    // With all scores equal, the log-sum-exp is the log of the count of visible keys.
    let shape = problem.shape();
    (0..shape.batch).any(|b| {
        let s = data.sequence(b);
        (0..shape.heads).any(|h| {
            (0..s.query_len).any(|i| {
                let visible = (0..s.key_len).filter(|j| {
                    let cell = inputs
                        .mask
                        .filter(|_| problem.mask().is_some())
                        .map(|m| m.get(problem.mask_at(&s, h, i) + j));
                    let hidden = match cell {
                        Some(c) if problem.mask().unwrap().is_bool() => c == 0.0,
                        Some(c) => c == f64::NEG_INFINITY,
                        None => false,
                    };
                    !hidden && s.visibility.attended(i as i64, *j as i64)
                });
                visible.count() >= 2
            })
        })
    })
}

#[test]
fn the_mean_of_the_visible_rows_is_refused_in_every_case() {
    let mut refused = 0;
    let mut trivial = 0;
    for case in verify::cases(Scope::Quick, &cpu()) {
        let data = Data::of(&case).unwrap();
        let compute = |precision| {
            oracle::attention(&data.problem, &data.inputs().unwrap(), precision).unwrap()
        };
        let (exact, naive) = (compute(Precision::Exact), compute(Precision::Naive));
        let impostor = compute(Precision::MeanOfVisible).o;
        assert!(compare(&data.problem, &exact.o, &exact, &naive).ok);
        if some_row_sees_two_keys(&data) {
            let verdict = compare(&data.problem, &impostor, &exact, &naive);
            assert!(!verdict.ok, "{}: {verdict:?}", case.name());
            // Not by a hair: the mean is several tolerances off.
            assert!(
                verdict.rel_fro > 4.0 * verdict.rel_tolerance,
                "{}: {verdict:?}",
                case.name()
            );
            refused += 1;
        } else {
            trivial += 1;
        }
    }
    assert!(refused >= 220 && trivial < 32, "{refused} {trivial}");
}

#[test]
fn every_pair_of_values_that_can_meet_does() {
    let cases = verify::cases(Scope::Full, &cpu());
    let all: Vec<BTreeSet<String>> = cases.iter().map(values).collect();
    let pairs: HashSet<(&String, &String)> = all
        .iter()
        .flat_map(|set| {
            set.iter()
                .flat_map(move |a| set.iter().map(move |b| (a, b)))
        })
        .collect();
    let any: BTreeSet<&String> = all.iter().flatten().collect();
    let every_dim: BTreeSet<usize> = any
        .iter()
        .filter_map(|v| v.strip_prefix('d')?.parse().ok())
        .collect();
    assert_eq!(every_dim, HEAD_DIMS.into());
    let of = |names: &[&str]| -> Vec<&String> {
        any.iter()
            .filter(|v| names.contains(&v.as_str()))
            .copied()
            .collect()
    };
    let masks: Vec<&&String> = any.iter().filter(|v| v.starts_with("mask:")).collect();
    // The others have the same kernels with other constants.
    let dims = of(&["d32", "d64", "d80", "d96", "d128", "d192", "d256", "d512"]);
    let layouts = of(&["head-major", "seq-major", "strided"]);
    let dtypes = of(&["bf16", "f16", "f32"]);
    let features = of(&[
        "causal",
        "causal.br",
        "causal.at5",
        "causal.at-3",
        "window1",
        "window7",
        "window17.br",
        "window80",
        "left33",
        "left6.at60",
        "left5.right3",
        "right0",
        "right20",
        "softcap",
        "sinks",
        "alibi",
        "lse",
        "mqa",
        "gqa",
        "batch",
        "varlen",
        "varlen-empty",
        "decode",
        "q>k",
        "q<k",
        "gain",
        "packed-queries",
        "lens",
        "lens.device",
        "paged",
    ]);
    assert_eq!((features.len(), masks.len(), dims.len()), (30, 7, 8));
    let mut missing = Vec::new();
    for a in &features {
        let others = dims.iter().copied().chain(masks.iter().map(|v| **v));
        let others = others
            .chain(layouts.iter().copied())
            .chain(dtypes.iter().copied());
        missing.extend(
            others
                .filter(|b| !pairs.contains(&(*a, *b)))
                .map(|b| (*a, b)),
        );
        for b in &features {
            let bounds = |v: &str| {
                ["causal", "window", "left", "right"]
                    .iter()
                    .any(|p| v.starts_with(p))
            };
            let packed = |v: &str| v.starts_with("varlen");
            let dense = |v: &str| ["batch", "decode", "q>k", "q<k"].contains(&v);
            // Keys that are not packed; dense queries; who says how many keys there are.
            let apart = |v: &str| ["packed-queries", "lens", "lens.device", "paged"].contains(&v);
            let one_count = |v: &str| ["decode", "q>k", "q<k"].contains(&v);
            let counts = |v: &str| ["lens", "lens.device"].contains(&v);
            let groups = |v: &str| ["mqa", "gqa"].contains(&v);
            let lengths = |v: &str| ["q>k", "q<k"].contains(&v);
            // One row at position 0 sees one key, and a window of 80 cuts nothing off.
            let not_decode = |v: &str| ["q>k", "causal", "right0", "window80"].contains(&v);
            let exclusive = (bounds(a) && bounds(b))
                || (groups(a) && groups(b))
                || (lengths(a) && lengths(b))
                || (packed(a) && dense(b))
                || (dense(a) && packed(b))
                || (apart(a) && packed(b))
                || (packed(a) && apart(b))
                || (*a == "packed-queries" && one_count(b))
                || (one_count(a) && *b == "packed-queries")
                || (counts(a) && counts(b))
                || (*a == "decode" && not_decode(b))
                || (not_decode(a) && *b == "decode");
            if a != b && !exclusive && !pairs.contains(&(*a, *b)) {
                missing.push((*a, *b));
            }
        }
    }
    assert!(missing.is_empty(), "{missing:?}");
}
