//! The entry points.

use candle_core::{Error, Result, Tensor};

use crate::Options;
use crate::op;
use crate::request::{Packed, Request};

/// Exact attention, `softmax(scale * Q K^T + mask) V`, in memory that does not grow with `qL * kL`.
///
/// - `q`: `[B, H, qL, D]`, or `[B, qL, H, D]` with [`Layout::SeqMajor`](crate::Layout);
/// - `k`, `v`: `[B, Hkv, kL, D]` likewise, `Hkv` dividing `H` (not repeated: grouped heads are read
///   where they lie).
///
/// bf16, f16 or f32 (f16 K and V under f32 Q too), head dims 32, 64, 80, 96, 128, 192, 256, 512,
/// any strides: a view is read in place, except where its last dimension is not contiguous. A query
/// that sees no key gives zeros, and a key that a query does not see adds nothing to its row, even a
/// NaN. The result has Q's shape and dtype, and is contiguous; a size of 0 gives an empty result or
/// zeros.
///
/// # Errors
/// An error that names the operand, what was expected and what was given: shapes that do not fit,
/// dtypes or head dims without a kernel, tensors on different devices, a causal bound, a window or
/// ALiBi with `qL != kL` and no [`Options::offset`]. Nothing has run then.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use mlx_flash_attn_candle::{Options, QueryOffset, attention};
///
/// # fn main() -> candle_core::Result<()> {
/// let q = Tensor::randn(0_f32, 1.0, (1, 4, 100, 64), &Device::Cpu)?;
/// let kv = Tensor::randn(0_f32, 1.0, (1, 1, 100, 64), &Device::Cpu)?;
/// let causal = Options { causal: true, ..Options::default() };
/// let all = attention(&q, &kv, &kv, &causal)?;
/// // The second half as a chunk of its own, over the same cache.
/// let chunk = Options { offset: Some(QueryOffset::BottomRight), ..causal };
/// let half = attention(&q.narrow(2, 50, 50)?, &kv, &kv, &chunk)?;
/// let apart = (all.narrow(2, 50, 50)? - half)?.abs()?.max_all()?.to_scalar::<f32>()?;
/// assert!(apart < 1e-5);
/// # Ok(())
/// # }
/// ```
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, options: &Options) -> Result<Tensor> {
    let request = Request::new(q, k, v, options, None, false)?;
    Ok(op::run(request)?.0)
}

/// As [`attention`], with the log-sum-exp of each row's scores: f32 `[B, H, qL]`, natural log, sinks
/// included, `-inf` where a query sees no key. It merges attention over parts of the keys.
///
/// # Errors
/// As for [`attention`].
pub fn attention_with_lse(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    options: &Options,
) -> Result<(Tensor, Tensor)> {
    both(Request::new(q, k, v, options, None, true)?)
}

/// Attention over packed sequences: `q` is `[total_q, H, D]`, `k` and `v` `[total_k, Hkv, D]`, and
/// sequence `i` owns the query rows `cu_seqlens_q[i]..cu_seqlens_q[i + 1]`, key rows likewise.
/// [`Options::layout`] does not matter; a mask has columns local to the sequence. Rows past the last
/// boundary (padding to a fixed shape) are not read; in the result they are zeros.
///
/// # Errors
/// As for [`attention`], and where boundaries do not start at 0, fall, or pass the rows.
pub fn attention_varlen(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    cu_seqlens_q: &[u32],
    cu_seqlens_k: &[u32],
    options: &Options,
) -> Result<Tensor> {
    let packed = Packed {
        cu_seqlens_q,
        cu_seqlens_k,
    };
    let request = Request::new(q, k, v, options, Some(packed), false)?;
    Ok(op::run(request)?.0)
}

/// As [`attention_varlen`], with the log-sum-exp, f32 `[H, total_q]`, `-inf` past the last boundary.
///
/// # Errors
/// As for [`attention_varlen`].
pub fn attention_varlen_with_lse(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    cu_seqlens_q: &[u32],
    cu_seqlens_k: &[u32],
    options: &Options,
) -> Result<(Tensor, Tensor)> {
    let packed = Packed {
        cu_seqlens_q,
        cu_seqlens_k,
    };
    both(Request::new(q, k, v, options, Some(packed), true)?)
}

fn both(request: Request) -> Result<(Tensor, Tensor)> {
    let (out, lse) = op::run(request)?;
    let lse = lse.ok_or_else(|| Error::msg("attention: the device wrote no log-sum-exp"))?;
    Ok((out, lse))
}
