//! Holds a result against the float64 reference.

use anyhow::Result;
use mlx_flash_attn::attention::Problem;
use mlx_flash_attn::attention::oracle::{self, Inputs, Precision, Reference, Values};
use mlx_flash_attn::attention::tolerance::{self, Comparison};

use crate::json::CheckLine;
use crate::output::Status;
use crate::progress;
use crate::table::Fields;

/// How a result compares with the reference.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Verdict {
    comparison: Comparison,
    /// Largest error of the log-sum-exp, and what it may be.
    lse: Option<(f64, f64)>,
    /// A row of the reference that holds NaN or infinities, which no result can be held against.
    not_finite: Option<usize>,
}

impl Verdict {
    /// Compares an output, and a log-sum-exp if there is one, with the reference.
    pub(crate) fn new(
        problem: &Problem,
        inputs: &Inputs<'_>,
        out: &Values<'_>,
        lse: Option<&[f32]>,
        hidden: bool,
    ) -> Result<Self> {
        let sequences = match problem.cu_seqlens_q() {
            None => problem.shape().batch,
            // Their rows are all among `query_rows`.
            Some(_) => 1,
        };
        let rows = sequences * problem.shape().heads * problem.query_rows();
        let bar = progress::bar(2 * rows as u64, "checking against float64", hidden);
        let reference =
            |precision| oracle::attention_with_progress(problem, inputs, precision, || bar.inc(1));
        let (exact, naive) = (reference(Precision::Exact)?, reference(Precision::Naive)?);
        bar.finish_and_clear();
        let got = in_reference_order(problem, out, &exact);
        Ok(Self {
            comparison: tolerance::compare(problem, &got, &exact, &naive),
            lse: lse.map(|lse| tolerance::compare_lse(lse, &exact)),
            not_finite: exact
                .o
                .chunks_exact(problem.shape().v_dim)
                .position(|row| row.iter().any(|x| !x.is_finite())),
        })
    }

    pub(crate) fn ok(&self) -> bool {
        self.comparison.ok && self.lse.is_none_or(|(error, bound)| error <= bound)
    }

    pub(crate) fn status(&self) -> Status {
        Status::of_check(self.ok())
    }

    pub(crate) fn line(&self) -> CheckLine {
        CheckLine {
            rel_fro: self.comparison.rel_fro,
            rel_tolerance: self.comparison.rel_tolerance,
            max_abs: self.comparison.max_abs,
            tolerance: self.comparison.tolerance,
            lse_error: self.lse.map(|(error, _)| error),
            lse_tolerance: self.lse.map(|(_, bound)| bound),
            ok: self.ok(),
        }
    }

    pub(crate) fn describe(&self, fields: &mut Fields) {
        let c = &self.comparison;
        fields.add(
            "relative error",
            format_args!("{:.2e}  (at most {:.1e})", c.rel_fro, c.rel_tolerance),
        );
        fields.add(
            "largest error",
            format_args!("{:.2e}  (tolerance {:.2e})", c.max_abs, c.tolerance),
        );
        if let Some((error, bound)) = self.lse {
            fields.add(
                "lse error",
                format_args!("{error:.2e}  (tolerance {bound:.2e})"),
            );
        }
        if let Some(row) = self.not_finite {
            fields.add(
                "reference",
                format_args!(
                    "not finite in row {row} of [B, H, L], or of [H, L] if packed: it sees a NaN or an \
                     infinity in q, k, v or the mask (rows of a cache that are not filled: --key-len or `key_lengths`)"
                ),
            );
        }
        fields.add("check", if self.ok() { "passed" } else { "FAILED" });
    }
}

/// The output's rows in the reference's order, whatever the output's layout.
fn in_reference_order(problem: &Problem, out: &Values<'_>, exact: &Reference) -> Vec<f64> {
    let shape = problem.shape();
    let mut got = vec![f64::NAN; exact.o.len()];
    for b in 0..shape.batch {
        let s = problem.sequence(b);
        for h in 0..shape.heads {
            for i in 0..s.query_len {
                let from = problem.o_at(&s, h, i);
                let to = oracle::reference_row(problem, &s, h, i) * shape.v_dim;
                if let Some(row) = got.get_mut(to..to + shape.v_dim) {
                    for (d, x) in row.iter_mut().enumerate() {
                        *x = out.get(from + d);
                    }
                }
            }
        }
    }
    got
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;
    use half::bf16;
    use mlx_flash_attn::DType;
    use mlx_flash_attn::attention::{Layout, QueryOffset, Shape};

    const SHAPE: Shape = Shape {
        batch: 2,
        heads: 4,
        kv_heads: 2,
        query_len: 33,
        key_len: 40,
        qk_dim: 32,
        v_dim: 32,
    };

    fn verdict(layout: Layout, spoil: impl Fn(&mut Vec<bf16>, &mut Vec<f32>)) -> Verdict {
        let problem = Problem::builder(DType::BF16, SHAPE)
            .layout(layout)
            .causal(true)
            .query_offset(QueryOffset::At(0))
            .lse(true)
            .build()
            .unwrap();
        let mut random = Random::new(7);
        let mut operand = |heads, len| -> Vec<bf16> {
            let n = SHAPE.batch * heads * len * SHAPE.v_dim;
            (0..n).map(|_| bf16::from_f32(random.normal())).collect()
        };
        let (q, k, v) = (operand(4, 33), operand(2, 40), operand(2, 40));
        let inputs = Inputs::new(Values::BF16(&q), Values::BF16(&k), Values::BF16(&v));
        let exact = oracle::attention(&problem, &inputs, Precision::Exact).unwrap();
        // The exact result in the output's own layout.
        let mut out = vec![bf16::ZERO; q.len()];
        for b in 0..SHAPE.batch {
            let s = problem.sequence(b);
            for (h, i) in (0..4).flat_map(|h| (0..33).map(move |i| (h, i))) {
                let (to, from) = (
                    problem.o_at(&s, h, i),
                    oracle::reference_row(&problem, &s, h, i) * 32,
                );
                for d in 0..32 {
                    out[to + d] = bf16::from_f64(exact.o[from + d]);
                }
            }
        }
        let mut lse: Vec<f32> = exact.lse.iter().map(|x| *x as f32).collect();
        spoil(&mut out, &mut lse);
        Verdict::new(&problem, &inputs, &Values::BF16(&out), Some(&lse), true).unwrap()
    }

    #[test]
    fn the_exact_result_passes_in_both_layouts() {
        for layout in [Layout::HeadMajor, Layout::SeqMajor] {
            let verdict = verdict(layout, |_, _| {});
            assert_eq!(verdict.status(), Status::Done, "{verdict:?}");
            assert!(verdict.line().ok && verdict.line().rel_fro > 0.0);
        }
    }

    #[test]
    fn wrong_results_end_with_status_1() {
        type Spoil = fn(&mut Vec<bf16>, &mut Vec<f32>);
        let wrongs: [(&str, Spoil); 4] = [
            ("one element", |o, _| o[999] += bf16::from_f32(0.5)),
            ("not a number", |o, _| o[0] = bf16::NAN),
            ("two rows swapped", |o, _| {
                let (a, b) = o.split_at_mut(32);
                a.swap_with_slice(&mut b[..32]);
            }),
            ("one lse", |_, lse| lse[17] += 0.01),
        ];
        for (what, spoil) in wrongs {
            let verdict = verdict(Layout::HeadMajor, spoil);
            assert_eq!(verdict.status(), Status::CheckFailed, "{what}: {verdict:?}");
            assert_eq!(verdict.status().code(), 1);
            assert!(!verdict.line().ok);
        }
    }
}
