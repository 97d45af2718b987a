//! Tiled prefill at head dim 512: 8 query rows a threadgroup, 64 keys a chunk, 4 or 8 simdgroups.
//!
//! Operands, masks and errors are those of [`super::flash_attn_prefill`], head-major. `sinks` is `[H]` in f32: a
//! logit a head, which joins the softmax's denominator alone.

use crate::attention::Layout;
use crate::backend::metal::bindings::constant;
use crate::backend::metal::sources;
pub use crate::compat::flash_attn_prefill::{
    AttnMaskParamsGpu, AttnParamsGpu, FlashAttnPrefillParams, FlashAttnPrefillResumeParams,
};
use crate::compat::prefill::{PrefillCall, dispatchers, resumed, with_sinks};
use crate::compat::registry::KernelRegistry;
use crate::error::{MlxError, Result};
use crate::runtime::buffer::MlxBuffer;
use crate::runtime::device::MlxDevice;
use crate::runtime::encoder::CommandEncoder;

/// Query rows of a threadgroup.
pub const NQPSG_D512: u32 = 8;
/// Keys of a chunk.
pub const NCPSG_D512: u32 = 64;
/// Simdgroups of a threadgroup, unless the caller asks for 4.
pub const NSG_D512: u32 = 8;
/// Function constant (int) that holds the simdgroups.
pub const FC_IDX_NSG: usize = constant::NSG;
/// Threadgroup memory to budget, in bytes; the kernels keep their output in registers and use less
/// (see [`crate::backend::metal::table`]).
pub const TGMEM_BYTES_D512: u32 = 28_672;

/// Text of the prefill kernels: the same as at the other head dims.
pub static FLASH_ATTN_PREFILL_D512_SHADER_SOURCE: &str = sources::PREFILL_TEXT;

/// bf16, additive bf16 mask.
pub const K_LLAMACPP_BF16_D512: &str = "flash_attn_prefill_llamacpp_bf16_d512";
/// bf16, bool mask.
pub const K_LLAMACPP_BF16_D512_BOOLMASK: &str = "flash_attn_prefill_llamacpp_bf16_d512_boolmask";
/// f16, additive f16 mask.
pub const K_LLAMACPP_F16_D512: &str = "flash_attn_prefill_llamacpp_f16_d512";
/// f16, bool mask.
pub const K_LLAMACPP_F16_D512_BOOLMASK: &str = "flash_attn_prefill_llamacpp_f16_d512_boolmask";

/// The kernels of this module.
pub const ALL_KERNEL_NAMES: &[&str] = &[
    K_LLAMACPP_BF16_D512,
    K_LLAMACPP_BF16_D512_BOOLMASK,
    K_LLAMACPP_F16_D512,
    K_LLAMACPP_F16_D512_BOOLMASK,
];

/// Registers this module's kernels. A new registry knows them already.
pub fn register(registry: &mut KernelRegistry) {
    for name in ALL_KERNEL_NAMES.iter().copied() {
        registry.register_source(name, FLASH_ATTN_PREFILL_D512_SHADER_SOURCE);
    }
}

dispatchers! {
    /// bf16, additive bf16 mask.
    dispatch_flash_attn_prefill_bf16_d512("flash_attn_prefill_llamacpp_bf16_d512");
    /// bf16, additive bf16 mask with the classes of its 8x64 tiles.
    dispatch_flash_attn_prefill_bf16_d512_with_blk("flash_attn_prefill_llamacpp_bf16_d512", blk: blk);
    /// bf16, additive bf16 mask, with 4 or 8 simdgroups.
    dispatch_flash_attn_prefill_bf16_d512_with_nsg("flash_attn_prefill_llamacpp_bf16_d512", nsg: nsg);
    /// bf16, additive bf16 mask with the classes of its 8x64 tiles, with 4 or 8 simdgroups.
    dispatch_flash_attn_prefill_bf16_d512_with_nsg_and_blk("flash_attn_prefill_llamacpp_bf16_d512", blk: blk, nsg: nsg);
    /// bf16, bool mask.
    /// `mlx-native` has no dispatcher of this kernel: the name is this crate's own.
    dispatch_flash_attn_prefill_bf16_d512_boolmask("flash_attn_prefill_llamacpp_bf16_d512_boolmask");
    /// f16, additive f16 mask.
    /// `mlx-native` has no dispatcher of this kernel: the name is this crate's own.
    dispatch_flash_attn_prefill_f16_d512("flash_attn_prefill_llamacpp_f16_d512");
    /// f16, additive f16 mask with the classes of its 8x64 tiles.
    /// A name of version 0.15.16.
    dispatch_flash_attn_prefill_f16_d512_with_blk("flash_attn_prefill_llamacpp_f16_d512", blk: blk);
    /// f16, additive f16 mask with the classes of its 8x64 tiles, with 4 or 8 simdgroups.
    /// A name of version 0.15.16.
    dispatch_flash_attn_prefill_f16_d512_with_nsg_and_blk("flash_attn_prefill_llamacpp_f16_d512", blk: blk, nsg: nsg);
    /// f16, bool mask.
    /// `mlx-native` has no dispatcher of this kernel: the name is this crate's own.
    dispatch_flash_attn_prefill_f16_d512_boolmask("flash_attn_prefill_llamacpp_f16_d512_boolmask");
}

resumed! {
    /// bf16, no mask: queries at an offset among the keys of a cache.
    dispatch_flash_attn_prefill_bf16_d512_resume("flash_attn_prefill_llamacpp_bf16_d512");
    /// f16, no mask: queries at an offset among the keys of a cache.
    dispatch_flash_attn_prefill_f16_d512_resume("flash_attn_prefill_llamacpp_f16_d512");
}

with_sinks! {
    /// bf16, additive bf16 mask, with sinks.
    dispatch_flash_attn_prefill_bf16_d512_with_sinks("flash_attn_prefill_llamacpp_bf16_d512", mask: Option<&MlxBuffer>);
    /// bf16, additive bf16 mask with the classes of its 8x64 tiles, with sinks.
    dispatch_flash_attn_prefill_bf16_d512_with_blk_and_sinks("flash_attn_prefill_llamacpp_bf16_d512", mask: &MlxBuffer, blk: blk);
    /// bf16, additive bf16 mask with the classes of its 8x64 tiles, with sinks; Q and the output are
    /// `[B, qL, H, D]`, K and V `[B, Hkv, kL, D]`.
    dispatch_flash_attn_prefill_bf16_d512_token_major_with_blk_and_sinks(
        "flash_attn_prefill_llamacpp_bf16_d512", mask: &MlxBuffer, blk: blk, queries: Layout::SeqMajor
    );
    /// f16, additive f16 mask, with sinks.
    dispatch_flash_attn_prefill_f16_d512_with_sinks("flash_attn_prefill_llamacpp_f16_d512", mask: Option<&MlxBuffer>);
    /// f16, additive f16 mask with the classes of its 8x64 tiles, with sinks.
    dispatch_flash_attn_prefill_f16_d512_with_blk_and_sinks("flash_attn_prefill_llamacpp_f16_d512", mask: &MlxBuffer, blk: blk);
}

/// Heads, and rows of each, that [`dispatch_flash_attn_prefill_bf16_d512_heads_as_rows_with_sinks`] takes.
const HEADS_AS_ROWS: u32 = 8;

/// bf16, one query of 64 heads over a single K/V head, with sinks.
///
/// The params call the 64 heads 8 heads of 8 query rows: `n_heads` and `seq_len_q` are 8, `n_kv_heads` is 1. Q
/// and the output are `[B, 64, 512]`, `mask` is `[B, 1, kL]`, one row for all heads of a batch, and `sinks` is
/// `[64]`.
///
/// # Errors
/// As the [module](self)'s, and `InvalidArgument` for other counts, another mask's shape or `do_causal`,
/// which has no meaning for rows that are heads.
#[allow(clippy::too_many_arguments)]
pub fn dispatch_flash_attn_prefill_bf16_d512_heads_as_rows_with_sinks(
    encoder: &mut CommandEncoder,
    device: &MlxDevice,
    registry: &mut KernelRegistry,
    q: &MlxBuffer,
    k: &MlxBuffer,
    v: &MlxBuffer,
    mask: &MlxBuffer,
    sinks: &MlxBuffer,
    out: &MlxBuffer,
    params: &FlashAttnPrefillParams,
) -> Result<()> {
    for (name, expected, got) in [
        ("n_heads", HEADS_AS_ROWS, params.n_heads),
        ("seq_len_q", HEADS_AS_ROWS, params.seq_len_q),
        ("n_kv_heads", 1, params.n_kv_heads),
        ("do_causal", 0, params.do_causal.into()),
    ] {
        if got != expected {
            return Err(MlxError::expected(name, expected, got));
        }
    }
    let row = [params.batch as usize, 1, params.seq_len_k as usize];
    if mask.shape() != row {
        return Err(MlxError::expected(
            "mask",
            format!("shape {row:?}"),
            format!("{:?}", mask.shape()),
        ));
    }
    let of_one_query = FlashAttnPrefillParams {
        n_heads: HEADS_AS_ROWS * HEADS_AS_ROWS,
        seq_len_q: 1,
        ..*params
    };
    let kernel = K_LLAMACPP_BF16_D512;
    let mut call = PrefillCall::new(kernel, [q, k, v, out], &of_one_query);
    call.mask = Some(mask);
    call.sinks = Some(sinks);
    call.encode(encoder, device, registry)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::metal::table;

    #[test]
    fn constants_are_the_tables() {
        for name in ALL_KERNEL_NAMES {
            let v = table::by_name(name).unwrap();
            assert_eq!(v.tile.bq as u32, NQPSG_D512);
            assert_eq!(v.tile.bk as u32, NCPSG_D512);
            assert_eq!(v.simdgroups as u32, NSG_D512);
            assert!(v.shared_bytes <= TGMEM_BYTES_D512 as usize);
        }
        assert_eq!(FC_IDX_NSG, 322);
    }
}
