//! The API of version 0.6.3 of `mlx-native`: its entry points, re-exported at its paths, its registry of
//! kernels, and dispatches in its own terms (kernels by name, params as bytes or in buffers, grids). Such a
//! dispatch is read back into work once, when it is recorded, for every device alike.

mod args;
mod decode;
mod encoder;
mod params;
mod prefill;
mod raw;

pub mod encode_helpers;
pub mod flash_attn_prefill;
pub mod flash_attn_prefill_blk;
pub mod flash_attn_prefill_d512;
pub mod flash_attn_prefill_mask;
pub mod flash_attn_vec;
pub mod registry;
