//! Which keys a query sees, with every rule written out here by hand: the crate's kernels and its
//! oracle share one predicate, so neither can show that it is right.
#![allow(clippy::unwrap_used)]

mod common;

use std::ops::Range;

use common::{
    Plain, Qkv, assert_close, bytes, classify, devices, round, seen, shape, tiles, upload,
};
use mlx_flash_attn::attention::{MaskSpec, QueryOffset};
use mlx_flash_attn::{DType, MlxDevice};

/// A rule: flags for the builder, and the same by hand.
#[derive(Clone, Copy, Debug)]
struct Rule {
    causal: bool,
    offset: i64,
    window: Option<usize>,
    right: Option<usize>,
}

const RULES: [Rule; 15] = [
    rule(true, 0, None, None),
    rule(true, 4, None, None),
    rule(true, -3, None, None),
    rule(true, 30, None, None),
    rule(true, 0, Some(1), None),
    rule(true, 0, Some(2), None),
    rule(true, 5, Some(16), None),
    rule(true, -2, Some(9), None),
    rule(true, 0, Some(40), None),
    rule(false, 0, Some(3), None),
    rule(false, 20, Some(17), None),
    rule(false, 0, None, Some(0)),
    rule(false, 2, None, Some(5)),
    rule(false, 0, Some(4), Some(4)),
    rule(false, -50, None, Some(8)),
];

const fn rule(causal: bool, offset: i64, window: Option<usize>, right: Option<usize>) -> Rule {
    Rule {
        causal,
        offset,
        window,
        right,
    }
}

impl Rule {
    /// The contract in plain arithmetic.
    fn sees(&self, i: usize, j: usize) -> bool {
        let (i, j) = (i as i64, j as i64);
        if self.causal && j > i + self.offset {
            return false;
        }
        if let Some(w) = self.window
            && i + self.offset - j >= w as i64
        {
            return false;
        }
        if let Some(r) = self.right
            && j - (i + self.offset) > r as i64
        {
            return false;
        }
        true
    }
}

fn flags_are_what_they_say(device: &MlxDevice, dtype: DType, dim: usize) {
    for (n, lengths) in [(33, 33), (50, 20), (20, 70)].into_iter().enumerate() {
        let data = Qkv::new(n as u64 + 10, dtype, shape([1, 2, 1], lengths, dim));
        for rule in RULES {
            let mut flags = data
                .builder()
                .causal(rule.causal)
                .query_offset(QueryOffset::At(rule.offset));
            if let Some(w) = rule.window {
                flags = flags.window(w);
            }
            if let Some(r) = rule.right {
                flags = flags.window_right(r);
            }
            let what = format!("{} {dtype} d{dim} {lengths:?} {rule:?}", device.kind());
            let want = data.plain(&Plain::new(&|_, i, j| seen(rule.sees(i, j))));
            let (_, got) = data.run(device, &flags.build().unwrap());
            assert_close(&what, &got, &want, dtype);
            for (i, row) in got.chunks(dim).enumerate() {
                if !(0..lengths.1).any(|j| rule.sees(i % lengths.0, j)) {
                    assert!(
                        row.iter().all(|x| *x == 0.0),
                        "{what}: row {i} sees nothing"
                    );
                }
            }

            // The same rule as an explicit mask instead of flags.
            let cells: Vec<f32> = (0..lengths.0 * lengths.1)
                .map(|c| match rule.sees(c / lengths.1, c % lengths.1) {
                    true => 0.0,
                    false => f32::NEG_INFINITY,
                })
                .collect();
            let mask = upload(device, &cells, dtype, &[lengths.0, lengths.1]);
            let explicit = data.builder().mask(MaskSpec::plane(dtype, lengths.1));
            let (_, masked) = data.run_masked(device, &explicit.build().unwrap(), &mask);
            assert_close(&what, &masked, &want, dtype);
        }
    }
}

#[test]
fn flags_are_what_they_say_in_bf16() {
    for device in devices() {
        flags_are_what_they_say(&device, DType::BF16, 64);
        flags_are_what_they_say(&device, DType::BF16, 512);
    }
}

#[test]
fn flags_are_what_they_say_in_f16() {
    for device in devices() {
        flags_are_what_they_say(&device, DType::F16, 80);
    }
}

#[test]
fn flags_are_what_they_say_in_f32() {
    for device in devices() {
        flags_are_what_they_say(&device, DType::F32, 32);
    }
}

#[test]
fn bottom_right_puts_the_last_query_on_the_last_key() {
    for device in devices() {
        for lengths in [(5, 40), (40, 40), (40, 5)] {
            let data = Qkv::new(3, DType::F32, shape([1, 1, 1], lengths, 64));
            let problem = data
                .builder()
                .causal(true)
                .query_offset(QueryOffset::BottomRight);
            let want = data.plain(&Plain::new(&|_, i, j| {
                seen(lengths.1 as i64 - j as i64 >= lengths.0 as i64 - i as i64)
            }));
            let (_, got) = data.run(&device, &problem.build().unwrap());
            assert_close("bottom right", &got, &want, DType::F32);
        }
    }
}

#[test]
fn packed_sequences_see_only_their_own_keys() {
    use mlx_flash_attn::attention::Problem;
    use mlx_flash_attn::ops::Operands;
    for device in devices() {
        let (cu_q, cu_k) = ([0u32, 3, 3, 20], [0u32, 9, 13, 30]);
        let (dim, heads) = (64, 2);
        for offset in [QueryOffset::At(0), QueryOffset::BottomRight] {
            let problem = Problem::varlen(DType::F32, heads, heads, dim, &cu_q, &cu_k)
                .causal(true)
                .query_offset(offset)
                .build()
                .unwrap();
            let row = heads * dim;
            let q = common::normal(1, 20 * row, DType::F32);
            let k = common::normal(2, 30 * row, DType::F32);
            let v = common::normal(3, 30 * row, DType::F32);
            let buffers = [&q, &k, &v].map(|x| upload(&device, x, DType::F32, &[x.len()]));
            let out = common::output(&device, q.len(), DType::F32);
            let operands = Operands::new(&buffers[0], &buffers[1], &buffers[2], &out);
            common::attend(&device, &problem, &operands);
            let got = common::download(&out);
            for b in 0..3 {
                let (q0, q1) = (cu_q[b] as usize, cu_q[b + 1] as usize);
                let (k0, k1) = (cu_k[b] as usize, cu_k[b + 1] as usize);
                // Each sequence and head alone, as a dense problem.
                for h in 0..heads {
                    let pick = |x: &[f32], rows: std::ops::Range<usize>| -> Vec<f32> {
                        rows.flat_map(|r| x[r * row + h * dim..][..dim].to_vec())
                            .collect()
                    };
                    let one = Qkv {
                        dtype: DType::F32,
                        shape: shape([1, 1, 1], (q1 - q0, k1 - k0), dim),
                        q: pick(&q, q0..q1),
                        k: pick(&k, k0..k1),
                        v: pick(&v, k0..k1),
                    };
                    let shift = match offset {
                        QueryOffset::At(o) => o,
                        QueryOffset::BottomRight => (k1 - k0) as i64 - (q1 - q0) as i64,
                    };
                    let want =
                        one.plain(&Plain::new(&|_, i, j| seen(j as i64 <= i as i64 + shift)));
                    if q1 > q0 {
                        let what = format!("sequence {b} head {h} {offset:?}");
                        assert_close(&what, &pick(&got, q0..q1), &want, DType::F32);
                    }
                }
            }
        }
    }
}

#[test]
fn any_nonzero_byte_of_a_bool_mask_attends() {
    for device in devices() {
        let data = Qkv::new(4, DType::BF16, shape([1, 1, 1], (9, 40), 64));
        let cells: Vec<f32> = (0..9 * 40)
            .map(|c| [0.0, 1.0, 2.0, 128.0, 255.0][c % 5])
            .collect();
        let mask = upload(&device, &cells, DType::U8, &[9, 40]);
        let problem = data
            .builder()
            .mask(MaskSpec::plane(DType::U8, 40))
            .build()
            .unwrap();
        let want = data.plain(&Plain::new(&|_, i, j| seen(cells[i * 40 + j] != 0.0)));
        let (_, got) = data.run_masked(&device, &problem, &mask);
        assert_close("bool mask", &got, &want, DType::BF16);
    }
}

#[test]
fn softcap_sinks_and_slopes_are_what_they_say() {
    use mlx_flash_attn::ops::Operands;
    for device in devices() {
        let data = Qkv::new(5, DType::F32, shape([1, 4, 2], (20, 33), 64));
        let (sinks, slopes) = ([0.5f32, 2.0, -1.0, 4.0], [0.5f32, 0.25, 0.125, 0.0625]);
        let given = |x: &[f32]| upload(&device, x, DType::F32, &[4]);
        let (sink_buffer, slope_buffer) = (given(&sinks), given(&slopes));
        for (softcap, with_sinks, with_slopes) in [
            (Some(1.5f32), false, false),
            (None, true, false),
            (None, false, true),
            (Some(2.0), true, true),
        ] {
            let mut builder = data
                .builder()
                .scale(0.3)
                .query_offset(QueryOffset::At(7))
                .sinks(with_sinks)
                .alibi(with_slopes);
            if let Some(c) = softcap {
                builder = builder.softcap(c);
            }
            let [q, k, v, out] = data.buffers(&device);
            let operands = Operands {
                sinks: with_sinks.then_some(&sink_buffer),
                alibi_slopes: with_slopes.then_some(&slope_buffer),
                ..Operands::new(&q, &k, &v, &out)
            };
            common::attend(&device, &builder.build().unwrap(), &operands);
            let bias = |h: usize, i: usize, j: usize| {
                let distance = (i as f64 + 7.0 - j as f64).abs();
                Some(if with_slopes {
                    -f64::from(slopes[h]) * distance
                } else {
                    0.0
                })
            };
            let want = data.plain(&Plain {
                scale: Some(f64::from(0.3f32)),
                softcap: softcap.map(f64::from),
                sinks: with_sinks.then_some(&sinks),
                cell: &bias,
            });
            let what = format!("softcap {softcap:?} sinks {with_sinks} slopes {with_slopes}");
            assert_close(&what, &common::download(&out), &want, DType::F32);
        }
    }
}

#[test]
fn masks_broadcast_over_batches_heads_and_rows() {
    let (batch, heads, ql, kl) = (2usize, 3usize, 9usize, 21usize);
    for device in devices() {
        let data = Qkv::new(6, DType::F32, shape([batch, heads, 1], (ql, kl), 64));
        // Which of batch, head and row the mask tells apart.
        for own in (0..8).map(|n| [n & 1 == 1, n & 2 == 2, n & 4 == 4]) {
            let sizes = [(own[0], batch), (own[1], heads), (own[2], ql)];
            let [b_size, h_size, rows] = sizes.map(|(own, n)| if own { n } else { 1 });
            let cells = common::normal(70, b_size * h_size * rows * kl, DType::F32);
            let mask = upload(&device, &cells, DType::F32, &[cells.len()]);
            let stride = |own: bool, n: usize| if own { n } else { 0 };
            let spec = MaskSpec {
                dtype: DType::F32,
                batch_stride: stride(own[0], h_size * rows * kl),
                head_stride: stride(own[1], rows * kl),
                row_stride: stride(own[2], kl),
            };
            let bias = |bh: usize, i: usize, j: usize| {
                let b = if own[0] { bh / heads } else { 0 };
                let h = if own[1] { bh % heads } else { 0 };
                let i = if own[2] { i } else { 0 };
                Some(f64::from(cells[((b * h_size + h) * rows + i) * kl + j]))
            };
            let want = data.plain(&Plain::new(&bias));
            let problem = data.builder().mask(spec).build().unwrap();
            let (_, got) = data.run_masked(&device, &problem, &mask);
            assert_close(&format!("{own:?}"), &got, &want, DType::F32);
        }
    }
}

#[test]
fn the_log_sum_exp_is_in_natural_logs_a_row_after_the_other() {
    use mlx_flash_attn::attention::Problem;
    use mlx_flash_attn::ops::Operands;
    let (heads, dim) = (2usize, 64usize);
    for device in devices() {
        // Two sequences, as a batch and packed; rows see the keys up to their own.
        for packed in [false, true] {
            let lengths: [(usize, usize); 2] = if packed {
                [(3, 9), (5, 4)]
            } else {
                [(4, 7); 2]
            };
            let total = lengths.iter().fold((0, 0), |t, l| (t.0 + l.0, t.1 + l.1));
            let (q, k) = (
                common::normal(80, total.0 * heads * dim, DType::F32),
                common::normal(81, total.1 * heads * dim, DType::F32),
            );
            let builder = if packed {
                let cu_q = [0, lengths[0].0 as u32, total.0 as u32];
                let cu_k = [0, lengths[0].1 as u32, total.1 as u32];
                Problem::varlen(DType::F32, heads, heads, dim, &cu_q, &cu_k)
            } else {
                Problem::builder(DType::F32, shape([2, heads, heads], lengths[0], dim))
            };
            let builder = builder.causal(true).query_offset(QueryOffset::At(0));
            let problem = builder.lse(true).build().unwrap();
            let [q_buffer, k_buffer] = [&q, &k].map(|x| upload(&device, x, DType::F32, &[x.len()]));
            let out = common::output(&device, q.len(), DType::F32);
            let lse = common::output(&device, total.0 * heads, DType::F32);
            let operands = Operands {
                lse: Some(&lse),
                ..Operands::new(&q_buffer, &k_buffer, &k_buffer, &out)
            };
            common::attend(&device, &problem, &operands);
            let got = common::download(&lse);

            let mut start = (0, 0);
            for (b, (ql, kl)) in lengths.into_iter().enumerate() {
                for (h, i) in (0..heads).flat_map(|h| (0..ql).map(move |i| (h, i))) {
                    // Packed: [total, H, D]; a batch: [B, H, L, D].
                    let row = |x: &[f32], len: usize, start: usize, i: usize| -> Vec<f64> {
                        let at = match packed {
                            true => (start + i) * heads + h,
                            false => (b * heads + h) * len + i,
                        };
                        x[at * dim..][..dim].iter().map(|x| f64::from(*x)).collect()
                    };
                    let query = row(&q, ql, start.0, i);
                    let sum: f64 = (0..kl.min(i + 1))
                        .map(|j| {
                            let key = row(&k, kl, start.1, j);
                            let dot: f64 = query.iter().zip(&key).map(|(a, b)| a * b).sum();
                            (dot / 8.0).exp()
                        })
                        .sum();
                    // Packed: [H, total]; a batch: [B, H, L].
                    let at = match packed {
                        true => h * total.0 + start.0 + i,
                        false => (b * heads + h) * ql + i,
                    };
                    let error = (f64::from(got[at]) - sum.ln()).abs();
                    assert!(
                        error < 1e-5,
                        "packed {packed} {b} {h} {i}: off by {error:.1e}"
                    );
                }
                start = (start.0 + ql, start.1 + kl);
            }
        }
    }
}

/// The class of the tile at `row` and `key` of a mask of `[ql, kl]` cells.
fn class(cells: &[f32], (ql, kl): (usize, usize), row: Range<usize>, key: Range<usize>) -> u8 {
    let all = |is: fn(f32) -> bool| {
        let mut rows = row.start..row.end.min(ql);
        rows.all(|i| cells[i * kl..][key.clone()].iter().all(|x| is(*x)))
    };
    match () {
        () if key.end > kl => 1,
        () if all(|x| round(x, DType::BF16) <= -1e30) => 0,
        () if all(|x| x == 0.0) => 2,
        () => 1,
    }
}

/// Tiles of one value, most with a single cell of another; lengths that rows of 16 bytes have, and not.
#[test]
fn a_tile_is_of_the_class_that_its_cells_say() {
    const MOST: [f32; 5] = [0.0, -0.0, f32::NEG_INFINITY, -1.01e30, -0.99e30];
    const ONE: [f32; 6] = [0.0, f32::NEG_INFINITY, -1.01e30, -0.99e30, f32::NAN, 2.0];
    let lengths = [(97, 200), (70, 333), (33, 1_112)];
    for (dim, (ql, kl)) in [64, 512].into_iter().flat_map(|d| lengths.map(|n| (d, n))) {
        let tiles = tiles(ql as u32, kl as u32, dim);
        let (bq, bk) = (tiles.bq as usize, tiles.bk as usize);
        let corners = (0..ql)
            .step_by(bq)
            .flat_map(|row| (0..kl).step_by(bk).map(move |key| (row, key)));
        let corners: Vec<_> = corners.collect();
        let mut cells = vec![0.0; ql * kl];
        for (tile, &(row, key)) in corners.iter().enumerate() {
            let (rows, keys) = (bq.min(ql - row), bk.min(kl - key));
            for i in row..row + rows {
                cells[i * kl + key..][..keys].fill(MOST[tile % 5]);
            }
            if let Some(one) = ONE.get(tile / 5 % 7) {
                cells[(row + tile * 7 % rows) * kl + key + tile * 11 % keys] = *one;
            }
        }
        let want = corners
            .iter()
            .map(|&(row, key)| class(&cells, (ql, kl), row..row + bq, key..key + bk));
        let want: Vec<u8> = want.collect();
        for device in devices() {
            let mask = upload(&device, &cells, DType::BF16, &[ql, kl]);
            let blk = classify(&device, &mask, &tiles);
            let what = format!("{}: {tiles:?}", device.name());
            assert_eq!(bytes(&blk)[..want.len()], want, "{what}");
        }
    }
}
