//! The shapes and names of candle's own functions, on every device.
//!
//! What they mean is what candle's mean. What candle's kernels cannot compute for want of a device, a
//! dtype or a head dim may work here; what candle refuses because its meaning would be open stays an
//! error, which names the way to ask for it.

use candle_core::{Error, Result, Tensor};
use mlx_flash_attn::attention::{Layout, QueryOffset};

use crate::request::refused;
use crate::{Mask, Options, attention, attention_varlen};

/// In place of `candle_nn::ops::sdpa`, which runs on Metal alone: `q` `[B, H, qL, D]`, `k` and `v`
/// `[B, Hkv, kL, D]`, `softcapping` 1.0 for none. The causal bound lets the last query see the last
/// key; with a mask it has no effect, as there: the mask holds it already.
///
/// The mask is added to the scores, has Q's dtype and the shape `[B, H, qL, kL]` (a broadcast view
/// will do). Integers are refused, as there: candle's models write 1 for hidden, others for attended,
/// and [`Mask`] says which.
///
/// Unlike there, a cap goes with any `qL`, a mask with `qL > kL`, and a mask is also added to a single
/// query's scores, which candle's kernel for single queries forgets.
///
/// # Errors
/// As for [`attention`], and for other masks.
pub fn sdpa(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    mask: Option<&Tensor>,
    do_causal: bool,
    scale: f32,
    softcapping: f32,
) -> Result<Tensor> {
    if let Some(mask) = mask {
        check_sdpa_mask(mask, q, k)?;
    }
    let options = Options {
        scale: Some(scale),
        softcap: (softcapping != 1.0).then_some(softcapping),
        causal: do_causal && mask.is_none(),
        offset: Some(QueryOffset::BottomRight),
        mask: mask.cloned().map(Mask::Add),
        ..Options::default()
    };
    attention(q, k, v, &options)
}

/// Refuses what candle's `sdpa` refuses, and says what takes it.
fn check_sdpa_mask(mask: &Tensor, q: &Tensor, k: &Tensor) -> Result<()> {
    let wrong = |expected: String, got: &dyn std::fmt::Debug, instead: &str| {
        Err(Error::msg(format!(
            "sdpa: mask: expected {expected}, got {got:?}: {instead}"
        )))
    };
    if mask.dtype().is_int() {
        return wrong(
            format!("floats of q's dtype {:?}, added to the scores", q.dtype()),
            &mask.dtype(),
            "give `attention` a `Mask::Hide` (not 0 hides, as candle's models write) or a \
             `Mask::Attend` (not 0 attends)",
        );
    }
    if mask.dtype() != q.dtype() {
        return wrong(
            format!("q's dtype {:?}", q.dtype()),
            &mask.dtype(),
            "convert it, or give `attention` a `Mask::Add`, which takes any float",
        );
    }
    // Operands of another rank are refused with the problem.
    if let (&[batch, heads, rows, _], &[_, _, keys, _]) = (q.dims(), k.dims())
        && mask.dims() != [batch, heads, rows, keys]
    {
        return wrong(
            format!("the shape {:?}", [batch, heads, rows, keys]),
            &mask.dims(),
            "use `broadcast_as`, or give `attention` a `Mask::Add`, which broadcasts",
        );
    }
    Ok(())
}

/// In place of `candle_flash_attn::flash_attn`: `q` `[B, qL, H, D]`, `k` and `v` `[B, kL, Hkv, D]`.
/// The causal bound lets the last query see the last key.
///
/// # Errors
/// As for [`attention`].
pub fn flash_attn(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    softmax_scale: f32,
    causal: bool,
) -> Result<Tensor> {
    flash_attn_windowed(q, k, v, softmax_scale, None, causal.then_some(0))
}

/// In place of `candle_flash_attn::flash_attn_windowed`: a query sees at most `window_size_left` keys
/// before its own position (so `window_size_left + 1` with itself) and `window_size_right` after it;
/// the last query stands at the last key. A bound wider than the keys is none.
///
/// # Errors
/// As for [`attention`].
pub fn flash_attn_windowed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
) -> Result<Tensor> {
    let keys = k.dims().get(1).copied().unwrap_or(0);
    let options = windowed(softmax_scale, window_size_left, window_size_right, keys);
    attention(q, k, v, &options)
}

/// In place of `candle_flash_attn::flash_attn_varlen`: `q` `[total_q, H, D]`, `k` and `v`
/// `[total_k, Hkv, D]`, cumulative lengths as tensors of integers, which are read back to the host.
/// Rows past the last boundary are not read, and are zeros in the result.
///
/// # Errors
/// As for [`attention_varlen`], and where a sequence is longer than its `max_seqlen`.
#[allow(clippy::too_many_arguments)] // The signature that is replaced.
pub fn flash_attn_varlen(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    seqlens_q: &Tensor,
    seqlens_k: &Tensor,
    max_seqlen_q: usize,
    max_seqlen_k: usize,
    softmax_scale: f32,
    causal: bool,
) -> Result<Tensor> {
    flash_attn_varlen_windowed(
        q,
        k,
        v,
        seqlens_q,
        seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale,
        None,
        causal.then_some(0),
    )
}

/// In place of `candle_flash_attn::flash_attn_varlen_windowed`; windows as in
/// [`flash_attn_windowed`]. Rows past the last boundary are not read, and are zeros in the result.
///
/// # Errors
/// As for [`flash_attn_varlen`].
#[allow(clippy::too_many_arguments)] // The signature that is replaced.
pub fn flash_attn_varlen_windowed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    seqlens_q: &Tensor,
    seqlens_k: &Tensor,
    max_seqlen_q: usize,
    max_seqlen_k: usize,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
) -> Result<Tensor> {
    let cu_seqlens_q = boundaries("seqlens_q", seqlens_q, max_seqlen_q)?;
    let cu_seqlens_k = boundaries("seqlens_k", seqlens_k, max_seqlen_k)?;
    let options = windowed(
        softmax_scale,
        window_size_left,
        window_size_right,
        max_seqlen_k,
    );
    attention_varlen(q, k, v, &cu_seqlens_q, &cu_seqlens_k, &options)
}

/// candle's rule: a bound wider than the keys is none, and a window with a left bound alone reaches
/// `keys` to the right, which hides keys from a query that stands before the first key.
fn windowed(scale: f32, left: Option<usize>, right: Option<usize>, keys: usize) -> Options {
    let [left, right] = [left, right].map(|bound| bound.filter(|n| *n <= keys));
    let right = right.or(left.map(|_| keys));
    Options {
        layout: Layout::SeqMajor,
        scale: Some(scale),
        causal: right == Some(0),
        offset: Some(QueryOffset::BottomRight),
        window: left.map(|left| left.saturating_add(1)),
        window_right: right.filter(|right| *right > 0),
        ..Options::default()
    }
}

fn boundaries(name: &str, x: &Tensor, longest: usize) -> Result<Vec<u32>> {
    if x.rank() != 1 || !x.dtype().is_int() {
        let got = (x.dims(), x.dtype());
        return Err(refused(name, "a vector of integers", got));
    }
    let wide: Vec<i64> = x.to_dtype(candle_core::DType::I64)?.to_vec1()?;
    let cu: Vec<u32> = wide
        .iter()
        .map(|n| u32::try_from(*n).map_err(|_| refused(name, "boundaries of 32 bits", n)))
        .collect::<Result<_>>()?;
    let most = cu.windows(2).map(|w| w[1].saturating_sub(w[0])).max();
    match most {
        Some(most) if most as usize > longest => Err(refused(
            name,
            format!("sequences of at most max_seqlen = {longest} rows"),
            most,
        )),
        _ => Ok(cu),
    }
}
