//! The shapes and names of candle's own functions, on every device.

use candle_core::{Result, Tensor};
use mlx_flash_attn::attention::Layout;

use crate::request::refused;
use crate::{Options, attention, attention_varlen};

/// In place of `candle_nn::ops::sdpa`, which runs on Metal alone: `q` `[B, H, qL, D]`, `k` and `v`
/// `[B, Hkv, kL, D]`, a causal bound that ends at the last key, `softcapping` 1.0 for none.
///
/// Unlike there, the mask may have any dtype and broadcast, `qL` may exceed `kL`, and a cap goes with
/// any `qL`.
///
/// # Errors
/// As for [`attention`].
pub fn sdpa(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    mask: Option<&Tensor>,
    do_causal: bool,
    scale: f32,
    softcapping: f32,
) -> Result<Tensor> {
    let options = Options {
        scale: Some(scale),
        softcap: (softcapping != 1.0).then_some(softcapping),
        causal: do_causal,
        mask: mask.cloned(),
        ..Options::default()
    };
    attention(q, k, v, &options)
}

/// In place of `candle_flash_attn::flash_attn`: `q` `[B, qL, H, D]`, `k` and `v` `[B, kL, Hkv, D]`.
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
/// before its own position (so `window_size_left + 1` with itself) and `window_size_right` after it.
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
    let options = windowed(softmax_scale, window_size_left, window_size_right);
    attention(q, k, v, &options)
}

/// In place of `candle_flash_attn::flash_attn_varlen`: `q` `[total_q, H, D]`, `k` and `v`
/// `[total_k, Hkv, D]`, cumulative lengths as tensors of integers, which are read back to the host.
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
/// [`flash_attn_windowed`].
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
    let options = windowed(softmax_scale, window_size_left, window_size_right);
    attention_varlen(q, k, v, &cu_seqlens_q, &cu_seqlens_k, &options)
}

fn windowed(scale: f32, left: Option<usize>, right: Option<usize>) -> Options {
    Options {
        layout: Layout::SeqMajor,
        scale: Some(scale),
        causal: right == Some(0),
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
