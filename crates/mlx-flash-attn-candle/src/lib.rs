#![doc = include_str!("../README.md")]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod attention;
mod drop_in;
mod engine;
mod op;
mod options;
mod request;

pub use attention::{attention, attention_varlen, attention_varlen_with_lse, attention_with_lse};
pub use drop_in::{
    flash_attn, flash_attn_varlen, flash_attn_varlen_windowed, flash_attn_windowed, sdpa,
};
pub use mlx_flash_attn::attention::{Layout, QueryOffset};
pub use options::{Mask, Options};
