//! The reference that every kernel is held against: attention in f64, and the naive computation in
//! the operands' own dtype, whose error sets the tolerance.

use half::{bf16, f16};
use rayon::prelude::*;

use super::keys::KeyLengths;
use super::problem::{Problem, Sequence};
use super::score::Terms;
use crate::dtype::DType;
use crate::error::{MlxError, Result};

/// Elements of an operand on the host.
#[derive(Debug, Clone, Copy)]
pub enum Values<'a> {
    /// binary32.
    F32(&'a [f32]),
    /// binary16.
    F16(&'a [f16]),
    /// bfloat16.
    BF16(&'a [bf16]),
    /// Booleans: nonzero attends.
    U8(&'a [u8]),
}

impl<'a> Values<'a> {
    /// Views bytes as elements of `dtype`; refuses misaligned bytes and other dtypes.
    ///
    /// # Errors
    /// `InvalidArgument` for bytes that are misaligned or no whole number of elements, `UnsupportedDtype` for a
    /// dtype that no operand has.
    pub fn from_bytes(dtype: DType, bytes: &'a [u8]) -> Result<Self> {
        fn cast<T: bytemuck::Pod>(bytes: &[u8]) -> Result<&[T]> {
            bytemuck::try_cast_slice(bytes)
                .map_err(|e| MlxError::InvalidArgument(format!("operand bytes: {e}")))
        }
        match dtype {
            DType::F32 => cast(bytes).map(Self::F32),
            DType::F16 => cast(bytes).map(Self::F16),
            DType::BF16 => cast(bytes).map(Self::BF16),
            DType::U8 => Ok(Self::U8(bytes)),
            other => Err(MlxError::UnsupportedDtype(format!("operand: {other}"))),
        }
    }

    /// How many elements there are.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(v) => v.len(),
            Self::F16(v) => v.len(),
            Self::BF16(v) => v.len(),
            Self::U8(v) => v.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Element `i` as f64; NaN past the end.
    #[inline]
    pub fn get(&self, i: usize) -> f64 {
        match self {
            Self::F32(v) => v.get(i).map_or(f64::NAN, |x| f64::from(*x)),
            Self::F16(v) => v.get(i).map_or(f64::NAN, |x| x.to_f64()),
            Self::BF16(v) => v.get(i).map_or(f64::NAN, |x| x.to_f64()),
            Self::U8(v) => v.get(i).map_or(f64::NAN, |x| f64::from(*x)),
        }
    }
}

/// A problem's inputs on the host, each as the problem's strides say: what the device's buffer holds.
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a> {
    /// Q.
    pub q: Values<'a>,
    /// K.
    pub k: Values<'a>,
    /// V.
    pub v: Values<'a>,
    /// The mask, if the problem has one.
    pub mask: Option<Values<'a>>,
    /// Sink logits, if the problem has them.
    pub sinks: Option<&'a [f32]>,
    /// ALiBi slopes, if the problem has them.
    pub alibi_slopes: Option<&'a [f32]>,
    /// The block table, if keys are paged.
    pub block_table: Option<&'a [i32]>,
    /// Keys of each sequence, if the device decides them.
    pub key_lengths: Option<&'a [u32]>,
}

impl<'a> Inputs<'a> {
    /// Queries, keys and values; the optional inputs start out absent.
    pub fn new(q: Values<'a>, k: Values<'a>, v: Values<'a>) -> Self {
        Self {
            q,
            k,
            v,
            mask: None,
            sinks: None,
            alibi_slopes: None,
            block_table: None,
            key_lengths: None,
        }
    }

    /// Sequence `b` with the keys that it has.
    fn sequence(&self, problem: &Problem, b: usize) -> Sequence {
        let given = self
            .key_lengths
            .filter(|_| *problem.key_lengths() == KeyLengths::Device);
        match given.and_then(|lengths| lengths.get(b)) {
            Some(len) => problem.sequence_of(b, (*len as usize).min(problem.shape().key_len)),
            None => problem.sequence(b),
        }
    }
}

/// A result of the reference: dense `[B, H, qL, D]`, or `[H, total_q, D]` for packed sequences.
#[derive(Debug, Clone, PartialEq)]
pub struct Reference {
    /// O.
    pub o: Vec<f64>,
    /// Log-sum-exp, `[B, H, qL]` or `[H, total_q]`.
    pub lse: Vec<f64>,
}

/// How the reference computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// f64 throughout.
    Exact,
    /// As separate operations on tensors of the problem's dtype would: the result of each is rounded
    /// to the dtype (product, scale, the steps of a softcap, biases, probabilities, output), while
    /// products accumulate and the softmax works in f32.
    Naive,
    /// The impostor: the plain mean of the visible V rows. Every numeric check must refuse it.
    MeanOfVisible,
}

/// `x` rounded to `dtype`, to nearest, ties to even.
pub fn round_to(dtype: DType, x: f64) -> f64 {
    match dtype {
        DType::F32 => f64::from(x as f32),
        DType::F16 => f16::from_f64(x).to_f64(),
        DType::BF16 => bf16::from_f64(x).to_f64(),
        _ => x,
    }
}

/// Index of row `i` of head `h` of a sequence in the reference's dense order, in rows.
pub fn reference_row(problem: &Problem, s: &Sequence, h: usize, i: usize) -> usize {
    problem.lse_at(s, h, i)
}

/// Computes the problem on the host.
///
/// # Errors
/// `InvalidArgument` where an operand is missing or has too few elements. K and V that lie in blocks are given
/// dequantised, an element for each element.
pub fn attention(
    problem: &Problem,
    inputs: &Inputs<'_>,
    precision: Precision,
) -> Result<Reference> {
    attention_with_progress(problem, inputs, precision, || {})
}

/// As [`attention`]; calls `row_done` after each query row of each head, from whichever thread.
///
/// # Errors
/// As for [`attention`].
pub fn attention_with_progress(
    problem: &Problem,
    inputs: &Inputs<'_>,
    precision: Precision,
    row_done: impl Fn() + Sync,
) -> Result<Reference> {
    check(problem, inputs)?;
    let shape = problem.shape();
    let dim = shape.v_dim;
    let rows: Vec<(Sequence, usize, usize)> = (0..shape.batch)
        .flat_map(|b| {
            let s = inputs.sequence(problem, b);
            (0..shape.heads).flat_map(move |h| (0..s.query_len).map(move |i| (s, h, i)))
        })
        .collect();
    let results: Vec<(usize, Vec<f64>, f64)> = rows
        .into_par_iter()
        .map(|(s, h, i)| {
            let (o, lse) = row(problem, inputs, precision, &s, h, i);
            row_done();
            (reference_row(problem, &s, h, i), o, lse)
        })
        .collect();
    let mut reference = Reference {
        o: vec![0.0; results.len() * dim],
        lse: vec![0.0; results.len()],
    };
    for (index, o, lse) in results {
        reference.o[index * dim..(index + 1) * dim].copy_from_slice(&o);
        reference.lse[index] = lse;
    }
    Ok(reference)
}

fn check(problem: &Problem, inputs: &Inputs<'_>) -> Result<()> {
    use super::operand::Role;
    let given = [
        (Role::Query, Some(inputs.q.len())),
        (Role::Key, Some(inputs.k.len())),
        (Role::Value, Some(inputs.v.len())),
        (Role::Mask, inputs.mask.map(|m| m.len())),
        (Role::Sinks, inputs.sinks.map(<[f32]>::len)),
        (Role::AlibiSlopes, inputs.alibi_slopes.map(<[f32]>::len)),
        (Role::BlockTable, inputs.block_table.map(<[i32]>::len)),
        (Role::KeyLengths, inputs.key_lengths.map(<[u32]>::len)),
    ];
    for (role, len) in given {
        let Some(spec) = problem.operand(role) else {
            continue;
        };
        let elements = match role {
            Role::Key => problem.key_format().elements(spec.elements),
            Role::Value => problem.value_format().elements(spec.elements),
            _ => spec.elements,
        };
        if len.is_none_or(|len| len < elements) {
            return Err(MlxError::expected(
                role.name(),
                format!("{elements} elements"),
                len.map_or("none".into(), |len| len.to_string()),
            ));
        }
    }
    Ok(())
}

/// Whether row `i` of head `h` sees key `j`: by position, and by the mask, whose cell hides the key
/// where it is false or -inf. Every finite cell leaves it visible.
pub(crate) fn sees(
    problem: &Problem,
    mask: Option<Values<'_>>,
    s: &Sequence,
    (h, i, j): (usize, usize, usize),
) -> bool {
    s.visibility.attended(i as i64, j as i64)
        && match (problem.mask(), mask) {
            (Some(spec), Some(mask)) => {
                let cell = mask.get(problem.mask_at(s, h, i) + j);
                let hides = if spec.is_bool() {
                    0.0
                } else {
                    f64::NEG_INFINITY
                };
                cell != hides
            }
            _ => true,
        }
}

/// Score and bias of one visible pair; `None` where it is hidden.
fn score(
    problem: &Problem,
    inputs: &Inputs<'_>,
    precision: Precision,
    s: &Sequence,
    (h, i, j): (usize, usize, usize),
) -> Option<f64> {
    if !sees(problem, inputs.mask, s, (h, i, j)) {
        return None;
    }
    // A table that names no page hides the key.
    let row = problem.key_row(s, j, inputs.block_table)?;
    let (q, k) = (
        problem.q_at(s, h, i),
        problem.k_of(row, h / problem.group()),
    );
    let dim = problem.shape().qk_dim;
    let products = (0..dim).map(|d| (inputs.q.get(q + d), inputs.k.get(k + d)));
    let naive = precision == Precision::Naive;
    let round = |x: f64| {
        if !naive {
            return x;
        }
        // A bias that the dtype does not reach is added in f32, whose range bounds every score.
        match round_to(problem.dtype(), x) {
            r if r.is_infinite() && x.is_finite() => {
                round_to(DType::F32, x).clamp(-f64::from(f32::MAX), f64::from(f32::MAX))
            }
            r => r,
        }
    };
    let dot = if naive {
        f64::from(products.fold(0.0f32, |sum, (a, b)| sum + a as f32 * b as f32))
    } else {
        products.map(|(a, b)| a * b).sum()
    };
    let position = i as i64 + s.visibility.q_offset;
    let cell = inputs
        .mask
        .map(|mask| mask.get(problem.mask_at(s, h, i) + j));
    let slope = inputs.alibi_slopes.and_then(|slopes| slopes.get(h));
    let terms = Terms {
        mask: cell.unwrap_or(0.0),
        slope: f64::from(slope.copied().unwrap_or(0.0)),
        distance: (position - j as i64).abs() as f64,
    };
    let steps = problem.score_steps();
    Some(steps.fold(round(dot), |s, step| step.apply(s, &terms, round)))
}

fn row(
    problem: &Problem,
    inputs: &Inputs<'_>,
    precision: Precision,
    s: &Sequence,
    h: usize,
    i: usize,
) -> (Vec<f64>, f64) {
    let dim = problem.shape().v_dim;
    let visible: Vec<(usize, f64)> = (0..s.key_len)
        .filter_map(|j| score(problem, inputs, precision, s, (h, i, j)).map(|x| (j, x)))
        .collect();
    if visible.is_empty() {
        return (vec![0.0; dim], f64::NEG_INFINITY);
    }
    let sink = inputs
        .sinks
        .filter(|_| problem.has_sinks())
        .and_then(|s| s.get(h))
        .copied();
    let sink = sink.map_or(f64::NEG_INFINITY, f64::from);
    let max = visible.iter().fold(sink, |m, (_, x)| m.max(*x));
    let (f32s, naive) = (DType::F32, precision == Precision::Naive);
    let exp = |x: f64| {
        if naive {
            round_to(f32s, round_to(f32s, x - max).exp())
        } else {
            (x - max).exp()
        }
    };
    let terms = visible.iter().map(|(_, x)| exp(*x)).chain([exp(sink)]);
    let sum = if naive {
        f64::from(terms.fold(0.0f32, |sum, term| sum + term as f32))
    } else {
        terms.sum()
    };
    let weight = |x: f64| match precision {
        Precision::Exact => exp(x) / sum,
        Precision::Naive => round_to(problem.dtype(), round_to(f32s, exp(x) / sum)),
        Precision::MeanOfVisible => 1.0 / visible.len() as f64,
    };
    let mut o = vec![0.0; dim];
    for (j, x) in &visible {
        let Some(row) = problem.key_row(s, *j, inputs.block_table) else {
            continue;
        };
        let (p, v) = (weight(*x), problem.v_of(row, h / problem.group()));
        for (d, out) in o.iter_mut().enumerate() {
            let term = p * inputs.v.get(v + d);
            *out = if naive {
                f64::from((*out + term) as f32)
            } else {
                *out + term
            };
        }
    }
    if naive {
        for out in &mut o {
            *out = round_to(problem.dtype(), *out);
        }
    }
    (o, max + sum.ln())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::Shape;

    fn shape(query_len: usize, key_len: usize) -> Shape {
        Shape {
            batch: 1,
            heads: 1,
            kv_heads: 1,
            query_len,
            key_len,
            qk_dim: 32,
            v_dim: 32,
        }
    }

    #[test]
    fn equal_scores_give_the_mean_and_the_log_count() {
        let problem = Problem::builder(DType::F32, shape(1, 4))
            .lse(true)
            .build()
            .unwrap();
        let (q, k) = (vec![0.0f32; 32], vec![1.0f32; 128]);
        let v: Vec<f32> = (0..128).map(|i| (i / 32) as f32).collect();
        let inputs = Inputs::new(Values::F32(&q), Values::F32(&k), Values::F32(&v));
        let r = attention(&problem, &inputs, Precision::Exact).unwrap();
        assert!(r.o.iter().all(|o| (o - 1.5).abs() < 1e-12));
        assert!((r.lse[0] - 4.0f64.ln()).abs() < 1e-12);
    }

    #[test]
    fn a_row_with_no_visible_key_is_zero_with_minus_infinite_lse() {
        let offset = crate::attention::QueryOffset::At(-1);
        let problem = Problem::builder(DType::F32, shape(2, 4))
            .causal(true)
            .query_offset(offset)
            .build()
            .unwrap();
        let x = vec![1.0f32; 128];
        let v = Values::F32(&x);
        let inputs = Inputs::new(v, v, v);
        let r = attention(&problem, &inputs, Precision::Exact).unwrap();
        assert_eq!(r.o[..32], [0.0; 32]);
        assert_eq!(r.lse[0], f64::NEG_INFINITY);
        assert_eq!(r.o[32..], [1.0; 32]);
    }

    /// One query over keys of equal scores: K is 0, V of key `j` is `j + 1`.
    fn biased(dtype: DType, biases: &[f32], sink: Option<f32>, precision: Precision) -> (f64, f64) {
        let problem = Problem::builder(dtype, shape(1, biases.len()))
            .kv_dtype(dtype)
            .mask(crate::attention::MaskSpec::plane(DType::F32, biases.len()))
            .sinks(sink.is_some())
            .lse(true)
            .build()
            .unwrap();
        let n = biases.len() * 32;
        let v: Vec<f32> = (0..n).map(|i| (i / 32 + 1) as f32).collect();
        let zeros = vec![0.0f32; n];
        let narrow = |x: &[f32]| x.iter().map(|x| f16::from_f32(*x)).collect::<Vec<_>>();
        let (v16, zeros16) = (narrow(&v), narrow(&zeros));
        let values = |wide, narrow| match dtype {
            DType::F32 => Values::F32(wide),
            _ => Values::F16(narrow),
        };
        let inputs = Inputs {
            mask: Some(Values::F32(biases)),
            sinks: sink.as_ref().map(std::slice::from_ref),
            ..Inputs::new(
                values(&zeros, &zeros16),
                values(&zeros, &zeros16),
                values(&v, &v16),
            )
        };
        let r = attention(&problem, &inputs, precision).unwrap();
        (r.o[0], r.lse[0])
    }

    #[test]
    fn the_largest_finite_biases_and_sinks_are_weighed_like_any_other() {
        for dtype in [DType::F32, DType::F16] {
            for precision in [Precision::Exact, Precision::Naive] {
                for bias in [-f32::MAX, -2.0e38, -1.0e5, 0.0, 1.0e5, 2.0e38, f32::MAX] {
                    let (o, lse) = biased(dtype, &[bias; 4], None, precision);
                    assert!((o - 2.5).abs() < 1e-6, "{dtype} {precision:?} {bias}: {o}");
                    let size = 1.0 + f64::from(bias).abs();
                    let want = f64::from(bias) + 4.0f64.ln();
                    assert!((lse - want).abs() <= 1e-6 * size, "{bias}: {lse}");
                    for sink in [f32::NEG_INFINITY, -f32::MAX] {
                        let (o, _) = biased(dtype, &[bias; 4], Some(sink), precision);
                        // As high as the sink, five share the weight, which is no power of two.
                        let want = if sink == bias { 2.0 } else { 2.5 };
                        assert!((o - want).abs() < 1e-3, "{bias} {sink}: {o}");
                    }
                }
                // The higher of two lows decides, and a high sink leaves nothing.
                let (o, lse) = biased(dtype, &[-3.0e38, -2.0e38, -3.0e38], None, precision);
                assert_eq!((o, lse as f32), (2.0, -2.0e38));
                let (o, lse) = biased(dtype, &[0.0, 1.0], Some(3.0e38), precision);
                assert_eq!((o, lse as f32), (0.0, 3.0e38));
            }
        }
    }

    #[test]
    fn too_few_elements_are_refused() {
        let problem = Problem::builder(DType::F32, shape(2, 4)).build().unwrap();
        let x = vec![1.0f32; 127];
        let v = Values::F32(&x);
        let inputs = Inputs::new(v, v, v);
        assert!(attention(&problem, &inputs, Precision::Exact).is_err());
    }
}
