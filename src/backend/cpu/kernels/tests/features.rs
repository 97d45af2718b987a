//! Masks, visibility, softcap, sinks and ALiBi, alone and together.

use super::harness::{Data, Random, build, isas, shape};
use crate::DType;
use crate::attention::{MaskSpec, Problem, QueryOffset};

const HIDDEN: f64 = f64::NEG_INFINITY;

/// Small enough for Miri, with a bit of everything.
#[test]
fn a_small_problem() {
    for dtype in [DType::BF16, DType::F32] {
        let problem = build(
            Problem::builder(dtype, shape(1, (2, 1), (3, 11), 32))
                .mask(MaskSpec::plane(DType::BF16, 11))
                .window(9)
                .causal(true)
                .query_offset(QueryOffset::BottomRight)
                .softcap(3.0)
                .sinks(true)
                .alibi(true)
                .lse(true),
        );
        let mut data = Data::new(problem, 1);
        data.set_mask(|_, i, j| if i == 1 || j == 5 { HIDDEN } else { 0.25 });
        data.check("small");
    }
}

#[test]
fn windows_and_offsets() {
    let (windows, rights) = (
        [None, Some(1), Some(20), Some(300)],
        [None, Some(0), Some(9)],
    );
    let offsets = [
        QueryOffset::At(-40),
        QueryOffset::At(0),
        QueryOffset::At(33),
    ];
    for window in windows {
        for right in rights {
            for offset in offsets.into_iter().chain([QueryOffset::BottomRight]) {
                for causal in [false, true] {
                    let mut builder =
                        Problem::builder(DType::BF16, shape(1, (2, 1), (70, 290), 32))
                            .causal(causal)
                            .query_offset(offset)
                            .lse(true);
                    if let Some(w) = window {
                        builder = builder.window(w);
                    }
                    if let Some(r) = right {
                        builder = builder.window_right(r);
                    }
                    let what = format!("{window:?} {right:?} {offset:?} {causal}");
                    Data::new(build(builder), 17).check(&what);
                }
            }
        }
    }
}

#[test]
fn combinations() {
    for choice in 0..64u64 {
        let on = |bit: u64| choice >> bit & 1 == 1;
        let dtype = [DType::BF16, DType::F16, DType::F32][choice as usize % 3];
        let mask = [DType::BF16, DType::F16, DType::F32, DType::U8][choice as usize / 3 % 4];
        let sizes = shape(2, (4, 2), (35, 270), [64, 80][choice as usize % 2]);
        let mut builder = Problem::builder(dtype, sizes)
            .causal(on(0))
            .query_offset(QueryOffset::BottomRight)
            .sinks(on(2))
            .alibi(on(3))
            .lse(true);
        if on(1) {
            builder = builder.softcap(1.5);
        }
        if on(4) {
            builder = builder.window(190);
        }
        let head = on(2);
        if on(5) {
            let plane = [2, if head { 4 } else { 1 }, 35, 270];
            builder = builder.mask(MaskSpec::broadcast(mask, plane));
        }
        let mut data = Data::new(build(builder), choice);
        if on(5) {
            let mut random = Random::new(choice);
            data.set_mask(|_, i, j| {
                if i % 7 == 3 || j < 40 || random.below(3) == 0 {
                    HIDDEN
                } else {
                    random.normal()
                }
            });
        }
        data.check(&format!("choice {choice:06b} {dtype} {mask}"));
    }
}

#[test]
fn masks_that_broadcast_and_masks_with_gaps() {
    let sizes = shape(2, (4, 2), (21, 77), 64);
    let specs = [
        MaskSpec::plane(DType::F16, 77),
        MaskSpec {
            dtype: DType::U8,
            batch_stride: 77,
            head_stride: 0,
            row_stride: 0,
        },
        MaskSpec {
            dtype: DType::BF16,
            batch_stride: 0,
            head_stride: 80,
            row_stride: 0,
        },
        MaskSpec {
            dtype: DType::F32,
            batch_stride: 9000,
            head_stride: 2000,
            row_stride: 83,
        },
    ];
    for mask in specs {
        let problem = build(Problem::builder(DType::BF16, sizes).mask(mask).lse(true));
        let mut data = Data::new(problem, 4);
        let mut random = Random::new(8);
        data.set_mask(|_, _, _| if random.below(2) == 0 { HIDDEN } else { 0.0 });
        data.check(&format!("{mask:?}"));
    }
}

#[test]
fn hidden_rows_are_zero_even_with_a_sink() {
    for dtype in [DType::BF16, DType::F16, DType::F32] {
        let problem = build(
            Problem::builder(dtype, shape(1, (2, 2), (40, 600), 64))
                .mask(MaskSpec::plane(DType::F32, 600))
                .sinks(true)
                .lse(true),
        );
        let mut data = Data::new(problem, 6);
        // Whole strips, whole rows, and strips before the first visible key.
        data.set_mask(|_, i, j| {
            if i % 3 == 0 || (i % 3 == 1 && j < 530) {
                HIDDEN
            } else {
                0.0
            }
        });
        data.check("hidden rows");
        for isa in isas() {
            let got = data.run(isa, 1);
            for r in (0..80).filter(|r| r % 40 % 3 == 0) {
                assert_eq!(got.lse[r], f32::NEG_INFINITY);
                assert!(got.o[r * 64..(r + 1) * 64].iter().all(|x| x.to_bits() == 0));
            }
        }
    }
}

#[test]
fn extreme_scores_and_masks_stay_finite() {
    let lowest = f64::from(f32::MIN);
    for (scale, cells) in [
        (1.0, [0.0, -1e30]),
        (1.0, [lowest, lowest]),
        (1.0, [lowest, -3.0e38]),
        (1.0, [3.0e38, -3.0e38]),
        (300.0, [0.0, 0.0]),
        (-1.0, [0.0, -5.0]),
        (0.0, [0.0, 0.0]),
    ] {
        let problem = build(
            Problem::builder(DType::F32, shape(1, (1, 1), (20, 280), 64))
                .scale(scale)
                .mask(MaskSpec::plane(DType::F32, 280))
                .lse(true),
        );
        let mut data = Data::new(problem, 12);
        data.set_mask(|_, _, j| cells[usize::from(j < 260)]);
        for isa in isas() {
            let got = data.run(isa, 1);
            assert!(
                got.o.iter().all(|x| x.is_finite()),
                "{isa} {scale} {cells:?}"
            );
            assert!(
                got.lse.iter().all(|x| x.is_finite()),
                "{isa} {scale} {cells:?}"
            );
        }
        if scale < 10.0 {
            data.check(&format!("{scale} {cells:?}"));
        }
    }
}
