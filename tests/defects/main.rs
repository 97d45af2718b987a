//! The thirteen defects of the crate that this one stands in for, each with a test that it is not
//! here, on every device that opens. `kernels` and `decode` have those that give wrong numbers,
//! `runtime` the others.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stderr)]

#[path = "../common/mod.rs"]
mod common;
mod decode;
mod kernels;
mod runtime;

use mlx_flash_attn::ops::flash_attn_prefill::FlashAttnPrefillParams;

/// Sizes of a prefill over one batch, with the usual scale.
fn prefill(
    (heads, kv_heads): (u32, u32),
    (seq_len_q, seq_len_k): (u32, u32),
    head_dim: u32,
    do_causal: bool,
) -> FlashAttnPrefillParams {
    FlashAttnPrefillParams {
        n_heads: heads,
        n_kv_heads: kv_heads,
        head_dim,
        seq_len_q,
        seq_len_k,
        batch: 1,
        scale: 1.0 / (head_dim as f32).sqrt(),
        do_causal,
    }
}
