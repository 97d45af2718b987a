//! The poison form of a case: what a row does not see must not reach it, whatever bits it holds.

use super::case::Case;
use super::data::{Data, Host};
use super::random::Random;
use super::run::Results;
use crate::attention::{KeyRow, Keys, Problem, Shape, oracle};
use crate::dtype::DType;
use crate::error::Result;

/// Most cells that only some rows see and that are poisoned.
const SEEN_CELLS: usize = 3;

/// How the poison form of a case went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Poisoned {
    /// Keys of a key/value head that no row sees, poisoned in K and V.
    pub hidden: usize,
    /// Keys of a key/value head that some rows see, poisoned in K or V.
    pub seen: usize,
    /// Rows that see no poisoned key and must keep their bits.
    pub kept: usize,
    /// A hash of the output's and the log-sum-exp's bits; all NaN count as one.
    pub digest: u64,
    /// What was wrong, a line each.
    pub failures: Vec<String>,
}

impl Poisoned {
    /// Whether nothing was wrong.
    pub fn ok(&self) -> bool {
        self.failures.is_empty()
    }
}

/// What a row sees of the poison.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Sees {
    Nothing,
    /// NaN or infinity in each column of V.
    Value,
    /// NaN in K: the row has no score that counts.
    Key,
}

/// What must come of each row, in the oracle's order.
pub(super) struct Plan {
    rows: Vec<Sees>,
    hidden: usize,
    seen: usize,
}

/// One key of one key/value head, with the rows that see it in the oracle's order.
struct Cell {
    k: usize,
    v: usize,
    seers: Vec<usize>,
}

/// A copy of `data` with poison in K and V, and what rows see of it. All cells that no row sees are poisoned, rows
/// that are no sequence's key among them, and up to [`SEEN_CELLS`] that some rows see, half of the rows at most where
/// possible.
pub(super) fn spoil(case: &Case, data: &Data) -> Result<(Data, Plan)> {
    let problem = &data.problem;
    let Shape { qk_dim, v_dim, .. } = problem.shape();
    let mut random = Random::new(case.seed() ^ 0x9015);
    let (rows, cells) = cells(data)?;
    let mut plan = Plan {
        rows: vec![Sees::Nothing; rows],
        hidden: 0,
        seen: 0,
    };
    let mut spoilt = data.clone();
    let (hidden, mut shared): (Vec<Cell>, Vec<Cell>) = cells
        .into_iter()
        .filter(|cell| cell.seers.len() < rows)
        .partition(|cell| cell.seers.is_empty());
    let owned_by_none = match case.sequences.differ() {
        true => unowned(data),
        false => Vec::new(),
    };
    for cell in hidden.into_iter().chain(owned_by_none) {
        spoil_key(&mut spoilt.k, cell.k, qk_dim, &mut random);
        spoil_value(&mut spoilt.v, cell.v, v_dim, &mut random);
        plan.hidden += 1;
    }
    // A few of them at random; where each is seen by more than half of the rows, the one that the
    // fewest see.
    for at in 0..shared.len() {
        let other = at + random.below(shared.len() - at);
        shared.swap(at, other);
    }
    let least = shared.iter().map(|cell| cell.seers.len()).min();
    let all_widely_seen = least.is_some_and(|least| 2 * least > rows);
    for cell in shared {
        let new = |row: &&usize| plan.rows[**row] == Sees::Nothing;
        let reached = rows - plan.kept() + cell.seers.iter().filter(new).count();
        let fits = if all_widely_seen {
            plan.seen == 0 && Some(cell.seers.len()) == least
        } else {
            plan.seen < SEEN_CELLS && 2 * reached <= rows
        };
        if !fits {
            continue;
        }
        plan.seen += 1;
        let sees = random.pick(&[Sees::Value, Sees::Value, Sees::Key]);
        match sees {
            Sees::Key => spoilt.k.set(cell.k + random.below(qk_dim), f32::NAN),
            _ => fill(&mut spoilt.v, cell.v, v_dim, |d| NOT_FINITE[d % 4]),
        }
        for row in cell.seers {
            plan.rows[row] = plan.rows[row].max(sees);
        }
    }
    Ok((spoilt, plan))
}

const NOT_FINITE: [f32; 4] = [f32::NAN, f32::INFINITY, -f32::NAN, f32::NEG_INFINITY];

/// Counts the rows, and finds who sees each key of each key/value head.
fn cells(data: &Data) -> Result<(usize, Vec<Cell>)> {
    let problem = &data.problem;
    let shape = problem.shape();
    let mask = data.inputs()?.mask;
    let (mut rows, mut cells) = (0, Vec::new());
    for b in 0..shape.batch {
        let s = data.sequence(b);
        rows += shape.heads * s.query_len;
        for kv_head in 0..shape.kv_heads {
            let heads = kv_head * problem.group()..(kv_head + 1) * problem.group();
            let seers = |j: usize| -> Vec<usize> {
                let all = heads
                    .clone()
                    .flat_map(|h| (0..s.query_len).map(move |i| (h, i)));
                all.filter(|(h, i)| oracle::sees(problem, mask, &s, (*h, *i, j)))
                    .map(|(h, i)| oracle::reference_row(problem, &s, h, i))
                    .collect()
            };
            cells.extend((0..s.key_len).filter_map(|j| {
                let row = problem.key_row(&s, j, data.block_table.as_deref())?;
                Some(cell(problem, row, kv_head, seers(j)))
            }));
        }
    }
    Ok((rows, cells))
}

fn cell(problem: &Problem, row: KeyRow, kv_head: usize, seers: Vec<usize>) -> Cell {
    Cell {
        k: problem.k_of(row, kv_head),
        v: problem.v_of(row, kv_head),
        seers,
    }
}

/// The rows of K and V that are no sequence's key: past a sequence's length, slots of its last page, free pages. For
/// keys that are not packed.
fn unowned(data: &Data) -> Vec<Cell> {
    let problem = &data.problem;
    let shape = problem.shape();
    let (batches, rows) = match problem.keys() {
        Keys::Paged(pages) => (pages.count, pages.page_size),
        Keys::Dense | Keys::Packed(_) => (shape.batch, shape.key_len),
    };
    let mut owned = vec![false; batches * rows];
    for s in (0..shape.batch).map(|b| data.sequence(b)) {
        for j in 0..s.key_len {
            if let Some(row) = problem.key_row(&s, j, data.block_table.as_deref()) {
                owned[row.batch * rows + row.position] = true;
            }
        }
    }
    let free = (0..owned.len()).filter(|at| !owned[*at]).map(|at| KeyRow {
        batch: at / rows,
        position: at % rows,
    });
    free.flat_map(|row| (0..shape.kv_heads).map(move |h| cell(problem, row, h, Vec::new())))
        .collect()
}

fn fill(host: &mut Host, at: usize, dim: usize, value: impl Fn(usize) -> f32) {
    (0..dim).for_each(|d| host.set(at + d, value(d)));
}

fn largest(dtype: DType) -> f32 {
    match dtype {
        DType::F16 => half::f16::MAX.to_f32(),
        DType::BF16 => half::bf16::MAX.to_f32(),
        _ => f32::MAX,
    }
}

/// Spoils a key that no row sees, so that its scores are NaN, infinite or as large as can be.
fn spoil_key(host: &mut Host, at: usize, dim: usize, random: &mut Random) {
    let one = at + random.below(dim);
    let top = largest(host.dtype());
    match random.below(7) {
        0 => fill(host, at, dim, |_| f32::NAN),
        1 => fill(host, at, dim, |d| NOT_FINITE[d % 4]),
        2 => host.set(one, f32::NAN),
        // An infinite score, of either sign.
        3 => host.set(one, f32::INFINITY),
        4 => host.set(one, f32::NEG_INFINITY),
        // Sums that overflow, and one finite product near the end of the range.
        5 => fill(host, at, dim, |_| top),
        _ => host.set(one, -top),
    }
}

/// Spoils the value of a key that no row sees.
fn spoil_value(host: &mut Host, at: usize, dim: usize, random: &mut Random) {
    let one = at + random.below(dim);
    let top = largest(host.dtype());
    match random.below(6) {
        0 => fill(host, at, dim, |_| f32::NAN),
        1 => fill(host, at, dim, |d| NOT_FINITE[d % 4]),
        2 => host.set(one, f32::INFINITY),
        3 => host.set(one, f32::NAN),
        4 => fill(host, at, dim, |_| f32::NEG_INFINITY),
        _ => fill(host, at, dim, |d| if d % 2 == 0 { top } else { -top }),
    }
}

impl Plan {
    fn kept(&self) -> usize {
        self.rows
            .iter()
            .filter(|sees| **sees == Sees::Nothing)
            .count()
    }

    /// Holds the poisoned run against the plain one of the same device.
    pub(super) fn compare(&self, problem: &Problem, plain: &Results, got: &Results) -> Poisoned {
        let dim = problem.shape().v_dim;
        let mut failures: Vec<String> = got.failures.clone();
        let (mut strays, mut swallowed) = (Strays::default(), Strays::default());
        let (mut lse_strays, mut lse_swallowed) = (Strays::default(), Strays::default());
        for (row, sees) in self.rows.iter().enumerate() {
            let columns = row * dim..(row + 1) * dim;
            let (was, is) = (&plain.o[columns.clone()], &got.o[columns]);
            match sees {
                Sees::Nothing => strays.note(row, same_bits(was, is), is),
                _ => swallowed.note(row, is.iter().all(|x| !x.is_finite()), is),
            }
            let (Some(was), Some(is)) = (&plain.lse, &got.lse) else {
                continue;
            };
            let (was, is) = (f64::from(was[row]), f64::from(is[row]));
            match sees {
                // No value of V has a part in the log-sum-exp.
                Sees::Nothing | Sees::Value => {
                    lse_strays.note(row, was.to_bits() == is.to_bits(), &[is]);
                }
                Sees::Key => lse_swallowed.note(row, is.is_nan(), &[is]),
            }
        }
        let kept = self.kept();
        for (name, strays, what) in [
            ("out", strays, "rows that do not see the poison changed"),
            ("out", swallowed, "rows that see the poison are finite"),
            (
                "lse",
                lse_strays,
                "rows whose scores have no poison changed",
            ),
            (
                "lse",
                lse_swallowed,
                "rows that see a NaN score are not NaN",
            ),
        ] {
            if strays.rows > 0 {
                failures.push(format!(
                    "poisoned {name}: {} {what} ({} of them not finite), the first of them row {}",
                    strays.rows, strays.not_finite, strays.first
                ));
            }
        }
        Poisoned {
            hidden: self.hidden,
            seen: self.seen,
            kept,
            digest: got.digest(),
            failures,
        }
    }
}

fn same_bits(a: &[f64], b: &[f64]) -> bool {
    // Widening is exact and keeps the sign of zero, so equal bits here are equal bits there.
    a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

/// Rows that did not come out as they must.
#[derive(Default)]
struct Strays {
    rows: usize,
    not_finite: usize,
    first: usize,
}

impl Strays {
    fn note(&mut self, row: usize, right: bool, values: &[f64]) {
        if right {
            return;
        }
        if self.rows == 0 {
            self.first = row;
        }
        self.rows += 1;
        self.not_finite += usize::from(values.iter().any(|x| !x.is_finite()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::oracle::{Precision, Values};
    use crate::verify::case::{Bounds, MaskKind};
    use crate::verify::sequences::{KeyCounts, PageForm, Sequences};
    use crate::{DeviceKind, MlxDevice, verify};

    fn reference(data: &Data) -> Results {
        let inputs = data.inputs().unwrap();
        let exact = oracle::attention(&data.problem, &inputs, Precision::Exact).unwrap();
        let lse = exact.lse.iter().map(|x| *x as f32).collect();
        Results {
            o: exact.o,
            lse: data.problem.has_lse().then_some(lse),
            failures: Vec::new(),
        }
    }

    /// A causal case with a mask, whose last key the last row alone may see.
    fn small() -> Case {
        Case {
            mask: MaskKind::PlaneBool,
            mask_dtype: DType::U8,
            bounds: Bounds {
                label: "causal",
                causal: true,
                ..Bounds::default()
            },
            lse: true,
            ..Case::new(32, DType::F32, (6, 9))
        }
    }

    #[test]
    fn the_oracle_keeps_rows_from_poison_that_they_do_not_see() {
        let cpu = MlxDevice::open(DeviceKind::Cpu).unwrap();
        let cases = if cfg!(miri) {
            vec![small()]
        } else {
            verify::cases(verify::Scope::Quick, &cpu)
        };
        let (mut hidden, mut seen) = (0, 0);
        for case in &cases {
            let data = Data::of(case).unwrap();
            let (spoilt, plan) = spoil(case, &data).unwrap();
            let (plain, got) = (reference(&data), reference(&spoilt));
            let outcome = plan.compare(&data.problem, &plain, &got);
            assert!(outcome.ok(), "{}: {:?}", case.name(), outcome.failures);
            hidden += usize::from(outcome.hidden > 0);
            seen += usize::from(outcome.seen > 0 && outcome.kept > 0);
        }
        assert!(
            2 * hidden > cases.len() && 2 * seen > cases.len(),
            "{hidden} {seen} {}",
            cases.len()
        );
    }

    #[test]
    fn rows_that_are_no_sequences_key_are_poisoned_with_numbers_too() {
        let case = Case {
            batch: 2,
            sequences: Sequences {
                queries: None,
                keys: Some(KeyCounts {
                    of_each: vec![5, 12],
                    on_device: false,
                }),
                pages: Some(PageForm {
                    size: 8,
                    spare_entries: 0,
                }),
            },
            ..Case::new(32, DType::F32, (2, 12))
        };
        let data = Data::of(&case).unwrap();
        // Three slots of one page, four of another, two free pages.
        let free = unowned(&data);
        assert_eq!(free.len(), 3 + 4 + 2 * 8);
        let (spoilt, plan) = spoil(&case, &data).unwrap();
        assert!(plan.hidden >= free.len());
        let inputs = spoilt.inputs().unwrap();
        let numbers = |values: Values<'_>, at: usize| {
            (at..at + 32).any(|i| values.get(i).abs() == f64::from(f32::MAX))
        };
        assert!(free.iter().any(|cell| numbers(inputs.k, cell.k)));
        assert!(free.iter().any(|cell| numbers(inputs.v, cell.v)));
    }

    #[test]
    fn a_changed_bit_a_swallowed_nan_and_a_wrong_log_sum_exp_are_seen() {
        let case = small();
        let data = Data::of(&case).unwrap();
        let (spoilt, plan) = spoil(&case, &data).unwrap();
        let (plain, got) = (reference(&data), reference(&spoilt));
        let verdict = |spoil: &dyn Fn(&mut Results)| {
            let mut got = Results {
                o: got.o.clone(),
                lse: got.lse.clone(),
                failures: Vec::new(),
            };
            spoil(&mut got);
            plan.compare(&data.problem, &plain, &got).failures
        };
        assert!(verdict(&|_| ()).is_empty());
        let row = |sees: &dyn Fn(Sees) -> bool| plan.rows.iter().position(|s| sees(*s)).unwrap();
        let kept = row(&|sees| sees == Sees::Nothing);
        let spoilt = row(&|sees| sees != Sees::Nothing);
        let one_bit = |x: f64| f64::from_bits(x.to_bits() ^ 1);
        let failures = verdict(&|r| r.o[kept * 32 + 31] = one_bit(r.o[kept * 32 + 31]));
        assert!(failures[0].contains("do not see"), "{failures:?}");
        let failures = verdict(&|r| r.o[kept * 32] = f64::NAN);
        assert!(failures[0].contains("1 of them not finite"), "{failures:?}");
        let failures = verdict(&|r| r.o[spoilt * 32 + 5] = 0.0);
        assert!(failures[0].contains("are finite"), "{failures:?}");
        let failures = verdict(&|r| r.lse.as_mut().unwrap()[kept] += 1.0);
        assert!(failures[0].contains("lse"), "{failures:?}");
    }
}
