//! Odd but legal problems, held against the oracle on every device.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

#[allow(dead_code)]
#[path = "common/wild.rs"]
mod wild;

use common::{devices, shape};
use mlx_flash_attn::DType;
use mlx_flash_attn::attention::{Layout, MaskSpec, QueryOffset, Strides};
use wild::{Reached, Wild, check};

fn plain(dtype: DType, [batch, heads, kv_heads]: [usize; 3], lengths: (usize, usize)) -> Wild {
    Wild {
        dtype,
        kv_dtype: None,
        shape: shape([batch, heads, kv_heads], lengths, 64),
        packed: None,
        layout: Layout::HeadMajor,
        capacity: None,
        strides: [None; 4],
        mask: None,
        causal: false,
        offset: QueryOffset::At(0),
        window: None,
        window_right: None,
        gain: None,
        softcap: None,
        tile_classes: false,
        sinks: false,
        alibi: false,
        lse: true,
        seed: 11,
    }
}

fn hold(problems: &[Wild]) {
    for device in devices() {
        for problem in problems {
            let reached = check(problem, &device, 1 << 26);
            assert_eq!(reached, Reached::Compared, "{} {problem:#?}", device.kind());
        }
    }
}

#[test]
fn positions_at_the_ends_of_their_range_do_not_wrap() {
    let far = i64::from(i32::MAX);
    let mut all = Vec::new();
    for offset in [far, far - 3, -far, -far - 1, 40, -40] {
        for (window, window_right) in [
            (None, None),
            (Some(i32::MAX as usize), None),
            (Some(7), None),
            (None, Some(i32::MAX as usize)),
            (Some(i32::MAX as usize), Some(i32::MAX as usize)),
            (Some(1), Some(0)),
        ] {
            for causal in [false, true] {
                all.push(Wild {
                    offset: QueryOffset::At(offset),
                    causal,
                    window,
                    window_right,
                    ..plain(DType::BF16, [1, 2, 1], (20, 40))
                });
            }
        }
    }
    hold(&all);
}

#[test]
fn masks_whose_rows_overlap_or_repeat() {
    let spec = |dtype, batch_stride, head_stride, row_stride| MaskSpec {
        dtype,
        batch_stride,
        head_stride,
        row_stride,
    };
    let mut all = Vec::new();
    for dtype in [DType::F32, DType::BF16, DType::U8] {
        for mask in [
            // A bias by distance: each row is the one before it, moved by one.
            spec(dtype, 0, 0, 1),
            spec(dtype, 0, 300, 1),
            spec(dtype, 1, 1, 1),
            spec(dtype, 3, 0, 0),
            spec(dtype, 0, 77, 0),
            spec(dtype, 0, 0, 0),
            spec(dtype, 50_000, 10_007, 211),
        ] {
            all.push(Wild {
                mask: Some(mask),
                ..plain(DType::BF16, [2, 2, 1], (37, 75))
            });
        }
    }
    hold(&all);
}

#[test]
fn keys_that_are_all_one_row_or_that_overlap() {
    let strides = |batch, head, seq| Some(Strides { batch, head, seq });
    let mut all = Vec::new();
    for dtype in [DType::F32, DType::F16] {
        for (k, v) in [
            (strides(0, 0, 0), strides(0, 0, 0)),
            (strides(0, 0, 64), strides(0, 0, 64)),
            (strides(1, 1, 1), strides(5, 3, 2)),
            (None, strides(0, 0, 1_000)),
        ] {
            all.push(Wild {
                strides: [None, k, v, None],
                ..plain(dtype, [2, 4, 2], (21, 70))
            });
            all.push(Wild {
                strides: [strides(0, 0, 0), k, v, None],
                ..plain(dtype, [2, 4, 2], (1, 70))
            });
        }
    }
    hold(&all);
}

#[test]
fn single_keys_and_packed_sequences_with_gaps_between() {
    let mut all = Vec::new();
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for lengths in [(1, 1), (70, 1), (1, 2)] {
            for sinks in [false, true] {
                all.push(Wild {
                    sinks,
                    offset: QueryOffset::BottomRight,
                    causal: true,
                    capacity: Some(9),
                    ..plain(dtype, [3, 6, 2], lengths)
                });
            }
        }
        for (cu_q, cu_k) in [
            (vec![0, 0, 5, 5, 5, 38, 38], vec![0, 7, 7, 7, 20, 21, 21]),
            (vec![0, 0, 0, 1], vec![0, 0, 9, 9]),
            (vec![0, 1, 2, 3, 4], vec![0, 0, 1, 1, 200]),
        ] {
            for causal in [false, true] {
                all.push(Wild {
                    packed: Some((cu_q.clone(), cu_k.clone())),
                    layout: Layout::SeqMajor,
                    offset: QueryOffset::BottomRight,
                    causal,
                    sinks: causal,
                    window: causal.then_some(3),
                    ..plain(dtype, [1, 4, 2], (0, 0))
                });
            }
        }
    }
    hold(&all);
}
