//! Tiled prefill at head dim 512: 8 query rows a threadgroup, 64 keys a chunk, 4 or 8 simdgroups.
//!
//! Operands, masks and errors are those of [`super::flash_attn_prefill`], head-major.

use crate::backend::metal::bindings::constant;
use crate::backend::metal::sources;
use crate::compat::flash_attn_prefill::dispatchers;
pub use crate::compat::flash_attn_prefill::{
    AttnMaskParamsGpu, AttnParamsGpu, FlashAttnPrefillParams,
};
use crate::compat::registry::KernelRegistry;

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
    dispatch_flash_attn_prefill_bf16_d512_boolmask("flash_attn_prefill_llamacpp_bf16_d512_boolmask");
    /// f16, additive f16 mask.
    dispatch_flash_attn_prefill_f16_d512("flash_attn_prefill_llamacpp_f16_d512");
    /// f16, additive f16 mask with the classes of its 8x64 tiles, with 4 or 8 simdgroups.
    dispatch_flash_attn_prefill_f16_d512_with_nsg_and_blk("flash_attn_prefill_llamacpp_f16_d512", blk: blk, nsg: nsg);
    /// f16, bool mask.
    dispatch_flash_attn_prefill_f16_d512_boolmask("flash_attn_prefill_llamacpp_f16_d512_boolmask");
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
