//! How far a result may be from the f64 reference: no further than twice the error of the naive
//! computation in the same dtype, plus twice the most that one rounding may change of the output; and a
//! bound on the relative Frobenius error. The rule is free of scale, so it holds for any data.

use super::oracle::Reference;
use super::problem::Problem;
use crate::dtype::DType;

/// Largest relative Frobenius error by output dtype.
pub const fn relative_bound(dtype: DType) -> f64 {
    match dtype {
        DType::BF16 => 4e-3,
        DType::F16 => 6e-4,
        _ => 2e-6,
    }
}

/// A result held against the reference.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Comparison {
    /// `||o - ref|| / ||ref||`.
    pub rel_fro: f64,
    /// `max |o - ref|`.
    pub max_abs: f64,
    /// What `max_abs` may be.
    pub tolerance: f64,
    /// What `rel_fro` may be.
    pub rel_tolerance: f64,
    /// Whether both are within bounds, every element is finite, and every row without a visible key
    /// is exactly zero.
    pub ok: bool,
}

/// The most that rounding to `dtype` changes of numbers up to `largest`: half of the last bit.
fn most_rounded(dtype: DType, largest: f64) -> f64 {
    let (digits, least_exponent) = match dtype {
        DType::BF16 => (8, -126),
        DType::F16 => (11, -14),
        _ => (24, -126),
    };
    if largest == 0.0 || !largest.is_finite() {
        return 0.0;
    }
    let exponent = (largest.log2().floor() as i32).max(least_exponent);
    f64::from(exponent - digits).exp2()
}

/// Compares `got` (in the reference's order) with `exact`, given the naive computation.
///
/// ```
/// use mlx_flash_attn::DType;
/// use mlx_flash_attn::attention::oracle::{self, Inputs, Precision, Values};
/// use mlx_flash_attn::attention::{Problem, Shape, tolerance};
///
/// # fn main() -> mlx_flash_attn::Result<()> {
/// let shape = Shape { batch: 1, heads: 1, kv_heads: 1, query_len: 2, key_len: 3, qk_dim: 32, v_dim: 32 };
/// let problem = Problem::builder(DType::F32, shape).build()?;
/// let (q, k, v) = (vec![0.5; 64], vec![0.25; 96], vec![1.0; 96]);
/// let inputs = Inputs::new(Values::F32(&q), Values::F32(&k), Values::F32(&v));
/// let exact = oracle::attention(&problem, &inputs, Precision::Exact)?;
/// let naive = oracle::attention(&problem, &inputs, Precision::Naive)?;
/// let got = vec![1.0; 64]; // from a device
/// assert!(tolerance::compare(&problem, &got, &exact, &naive).ok);
/// # Ok(())
/// # }
/// ```
pub fn compare(problem: &Problem, got: &[f64], exact: &Reference, naive: &Reference) -> Comparison {
    let dtype = problem.dtype();
    let dim = problem.shape().v_dim;
    let largest = |f: &dyn Fn(usize) -> f64| (0..exact.o.len()).map(f).fold(0.0, f64::max);
    let naive_error = largest(&|i| (naive.o[i] - exact.o[i]).abs());
    // What was rounded may happen to be 0, where every result is a number of the dtype.
    let rounding = most_rounded(dtype, largest(&|i| exact.o[i].abs()));
    let tolerance = 2.0 * naive_error + 2.0 * rounding;
    let rel_tolerance = relative_bound(dtype);
    let same_len = got.len() == exact.o.len();
    let error = |i: usize| got.get(i).map_or(f64::INFINITY, |g| (g - exact.o[i]).abs());
    let max_abs = largest(&|i| {
        if error(i).is_nan() {
            f64::INFINITY
        } else {
            error(i)
        }
    });
    let squares = |f: &dyn Fn(usize) -> f64| (0..exact.o.len()).map(|i| f(i).powi(2)).sum::<f64>();
    let norm = squares(&|i| exact.o[i]).sqrt();
    let distance = squares(&error).sqrt();
    let rel_fro = if norm > 0.0 {
        distance / norm
    } else {
        distance
    };
    let hidden_rows_are_zero = exact.lse.iter().enumerate().all(|(r, lse)| {
        *lse != f64::NEG_INFINITY
            || got
                .get(r * dim..(r + 1) * dim)
                .is_some_and(|row| row.iter().all(|x| *x == 0.0))
    });
    Comparison {
        rel_fro,
        max_abs,
        tolerance,
        rel_tolerance,
        ok: same_len && max_abs <= tolerance && rel_fro <= rel_tolerance && hidden_rows_are_zero,
    }
}

/// Log-sum-exps up to this size come from scores of usual size.
const USUAL_LSE: f64 = 1e4;

/// The error of the log-sum-exp that comes closest to what it may be, or exceeds it most, and what it
/// may be; the error is infinite where one is `-inf` or NaN and the other is not. The scores' own
/// rounding in f32 bounds it: `2e-5 * (1 + max |lse|)` is generous for that, the maximum being over all
/// rows of usual size and the row itself, so that one row of huge biases excuses no other.
pub fn compare_lse(got: &[f32], exact: &Reference) -> (f64, f64) {
    let usual = exact
        .lse
        .iter()
        .map(|x| x.abs())
        .filter(|x| *x <= USUAL_LSE)
        .fold(0.0, f64::max);
    let allowed = |e: f64| {
        let size = if e.is_finite() {
            usual.max(e.abs())
        } else {
            usual
        };
        2e-5 * (1.0 + size)
    };
    if got.len() != exact.lse.len() {
        return (f64::INFINITY, allowed(0.0));
    }
    let errors = exact.lse.iter().zip(got).map(|(e, g)| {
        let g = f64::from(*g);
        let error = if *e == g {
            0.0
        } else if (e - g).is_finite() {
            (e - g).abs()
        } else {
            f64::INFINITY
        };
        (error, allowed(*e))
    });
    errors.fold((0.0, allowed(0.0)), |worst, row| {
        if row.0 / row.1 > worst.0 / worst.1 {
            row
        } else {
            worst
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::oracle::round_to;

    #[test]
    fn no_number_is_rounded_by_more_than_the_most() {
        for dtype in [DType::BF16, DType::F16, DType::F32] {
            for largest in [1.0, 1.9, 3.0, 0.1, 1e-5, 1e-7] {
                let most = most_rounded(dtype, largest);
                let rounded = (0..5000).map(|i| largest * f64::from(i) / 5000.0);
                let worst = rounded
                    .map(|x| (round_to(dtype, x) - x).abs())
                    .fold(0.0, f64::max);
                assert!(worst <= most, "{dtype} {largest}: {worst:e} over {most:e}");
                assert!(
                    worst > 0.4 * most,
                    "{dtype} {largest}: {worst:e} of {most:e}"
                );
            }
        }
    }

    #[test]
    fn a_log_sum_exp_of_huge_biases_excuses_no_other_row() {
        let exact = Reference {
            o: Vec::new(),
            lse: vec![-2.0e38, 1.0, f64::NEG_INFINITY],
        };
        let verdict = |got: [f32; 3]| {
            let (error, allowed) = compare_lse(&got, &exact);
            error <= allowed
        };
        assert!(verdict([-2.0e38, 1.00001, f32::NEG_INFINITY]));
        assert!(!verdict([-2.0e38, 1.1, f32::NEG_INFINITY]));
        assert!(!verdict([-1.9e38, 1.0, f32::NEG_INFINITY]));
        assert!(!verdict([f32::NEG_INFINITY, 1.0, f32::NEG_INFINITY]));
        assert!(!verdict([-2.0e38, 1.0, -3.0e38]));
        assert!(!verdict([-2.0e38, f32::NAN, f32::NEG_INFINITY]));
    }
}
