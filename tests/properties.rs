//! Random problems: building one never panics, however absurd its sizes, and what is built and small
//! runs and agrees with the oracle. `PROPTEST_CASES` asks for more than the default.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stderr)]

mod common;

#[path = "common/wild.rs"]
mod wild;

use std::cell::RefCell;
use std::collections::BTreeMap;

use common::{bytes, to_bytes};
use mlx_flash_attn::attention::{TileClass, Visibility};
use mlx_flash_attn::{DeviceKind, MlxDevice};
use proptest::prelude::*;
use proptest::test_runner::{Config, FileFailurePersistence, TestRunner};
use wild::{Reached, Source, Wild, check};

fn runner(cases: u32) -> TestRunner {
    let cases = match std::env::var("PROPTEST_CASES") {
        Ok(n) => n.parse().unwrap(),
        Err(_) => cases,
    };
    let config = Config {
        cases,
        failure_persistence: Some(Box::new(FileFailurePersistence::Off)),
        ..Config::default()
    };
    // The same cases every time.
    TestRunner::new_with_rng(
        config,
        proptest::test_runner::TestRng::deterministic_rng(
            proptest::test_runner::RngAlgorithm::ChaCha,
        ),
    )
}

fn run_all(cases: u32, wild: bool) -> BTreeMap<String, usize> {
    let device = MlxDevice::open(DeviceKind::Cpu).unwrap();
    let counts = RefCell::new(BTreeMap::new());
    let mut test = runner(cases);
    let input = prop::collection::vec(any::<u8>(), 0..400);
    let result = test.run(&input, |input| {
        let problem = Wild::read(&mut Source(&input), wild);
        let reached = check(&problem, &device, 1_000_000);
        *counts
            .borrow_mut()
            .entry(format!("{reached:?}"))
            .or_insert(0) += 1;
        Ok(())
    });
    result.unwrap();
    counts.into_inner()
}

#[test]
fn reasonable_problems_agree_with_the_oracle() {
    let counts = run_all(400, false);
    eprintln!("{counts:?}");
    let compared = counts[&format!("{:?}", Reached::Compared)];
    assert!(compared * 2 > counts.values().sum(), "{counts:?}");
}

#[test]
fn no_problem_panics_however_absurd() {
    let counts = run_all(3_000, true);
    eprintln!("{counts:?}");
    // Both ends are reached: refusals, and runs that agree.
    assert!(counts.len() == 4, "{counts:?}");
}

proptest! {
    #![proptest_config(Config { cases: 2_000, failure_persistence: None, ..Config::default() })]

    /// The interval of a row's keys and the class of a tile say what the predicate says, cell by
    /// cell, at any offset and window.
    #[test]
    fn intervals_and_tiles_follow_the_predicate(
        q_offset in prop_oneof![-300i64..300, Just(i64::from(i32::MIN)), Just(i64::from(i32::MAX))],
        causal: bool,
        window in prop::option::of(prop_oneof![1usize..80, Just(i32::MAX as usize)]),
        window_right in prop::option::of(prop_oneof![0usize..80, Just(i32::MAX as usize)]),
        key_len in 1usize..150,
        rows in (0usize..100, 1usize..40),
        keys in (0usize..160, 1usize..70),
    ) {
        let v = Visibility { q_offset, causal, window, window_right };
        let (rows, keys) = (rows.0..rows.0 + rows.1, keys.0..keys.0 + keys.1);
        let (mut any, mut all) = (false, true);
        for q in rows.clone() {
            let p = q as i64 + q_offset;
            let visible = |k: usize| {
                let d = k as i64 - p;
                (!causal || d <= 0)
                    && window.is_none_or(|w| -d < w as i64)
                    && window_right.is_none_or(|w| d <= w as i64)
            };
            let interval = v.keys(q as i64, key_len);
            for k in 0..key_len {
                prop_assert_eq!(interval.contains(&k), visible(k));
                prop_assert_eq!(v.attended(q as i64, k as i64), visible(k));
            }
            for k in keys.start..keys.end.min(key_len) {
                any |= visible(k);
                all &= visible(k);
            }
        }
        let real = keys.start < key_len;
        match v.tile_class(rows, keys, key_len) {
            TileClass::Skip => prop_assert!(!any),
            TileClass::Free => prop_assert!(real && all),
            TileClass::Mixed => prop_assert!(real && !all),
        }
    }

    /// Half-precision bytes survive the trip to a device and back.
    #[test]
    fn what_is_uploaded_comes_back(values in prop::collection::vec(-1e4f32..1e4, 1..50)) {
        use mlx_flash_attn::DType;
        let device = MlxDevice::open(DeviceKind::Cpu).unwrap();
        for dtype in [DType::BF16, DType::F16, DType::F32] {
            let buffer = common::upload(&device, &values, dtype, &[values.len()]);
            prop_assert_eq!(bytes(&buffer), to_bytes(&values, dtype));
        }
    }
}
