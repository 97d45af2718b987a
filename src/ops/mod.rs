//! What callers encode: [`attention`] over a checked [`Problem`](crate::attention::Problem). The modules are
//! the named entry points of programs that were written for `mlx-native`.

mod attention;
mod operands;

pub use attention::attention;
pub(crate) use attention::encode;
pub use operands::Operands;
pub(crate) use operands::check_buffer;

pub use crate::compat::{
    encode_helpers, flash_attn_prefill, flash_attn_prefill_blk, flash_attn_prefill_d512,
    flash_attn_prefill_mask, flash_attn_vec,
};
