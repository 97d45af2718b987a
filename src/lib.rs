//! Exact tiled flash attention for Rust inference engines, with no C toolchain in the build.
//!
//! One checked description of the work, [`attention::Problem`], runs on every device that
//! [`MlxDevice`] opens. Operands are `[B, H, L, D]` (head-major), `[B, L, H, D]` (seq-major) or any
//! strides with a contiguous head dimension; strides are in elements, offsets in bytes.
//!
//! ```
//! use half::bf16;
//! use mlx_flash_attn::attention::{Problem, Shape};
//! use mlx_flash_attn::ops::{self, Operands};
//! use mlx_flash_attn::{DType, MlxDevice};
//!
//! # fn main() -> mlx_flash_attn::Result<()> {
//! let shape = Shape { batch: 1, heads: 8, kv_heads: 2, query_len: 100, key_len: 100, qk_dim: 64, v_dim: 64 };
//! let problem = Problem::builder(DType::BF16, shape).causal(true).build()?;
//!
//! let device = MlxDevice::new()?;
//! let buffer = |heads: usize| {
//!     let data: Vec<bf16> = (0..heads * 100 * 64).map(|i| bf16::from_f32((i as f32).sin())).collect();
//!     device.buffer_from_slice(&data, DType::BF16, vec![1, heads, 100, 64])
//! };
//! let (q, k, v) = (buffer(8)?, buffer(2)?, buffer(2)?);
//! let out = device.alloc_buffer(8 * 100 * 64 * 2, DType::BF16, vec![1, 8, 100, 64])?;
//!
//! let mut encoder = device.command_encoder()?;
//! ops::attention(&mut encoder, &problem, &Operands::new(&q, &k, &v, &out))?;
//! encoder.commit_and_wait()?;
//!
//! let o: &[bf16] = out.as_slice()?;
//! assert!(o.iter().all(|x| x.is_finite()));
//! // Row 0 of a causal head sees key 0 alone, so it is V's row 0.
//! assert_eq!(o[..64], v.as_slice::<bf16>()?[..64]);
//! # Ok(())
//! # }
//! ```
//!
//! The crate root and the modules of [`ops`] carry the names of version 0.6.3 of the crate `mlx-native`,
//! so that a program written for its attention compiles with the dependency renamed. What of it is
//! [not there][absent], and why, is listed in the guide.
//!
//! [absent]: https://github.com/mlx-flash-attn/mlx-flash-attn/blob/main/docs/guide.md#what-is-not-there-of-063
#![cfg_attr(docsrs, feature(doc_cfg))]
#![warn(clippy::missing_errors_doc)]

/// The Metal kernels as a raw dispatch must know them: names, constants, bindings, params.
pub mod abi {
    pub use crate::backend::metal::{bindings, table};

    /// The structs that the kernels read.
    pub mod params {
        pub use crate::backend::metal::params::{
            AttnExtraParamsGpu, AttnMaskParamsGpu, AttnPagesParamsGpu, AttnParamsGpu,
        };
        pub use crate::backend::shared_params::{
            BlkParamsGpu, BlockFillParamsGpu, MaskFillParamsGpu, VecParamsGpu,
        };
    }
}
pub mod attention;
mod backend;
mod compat;
mod dtype;
pub mod error;
mod hash;
pub mod ops;
pub mod runtime;
pub mod verify;

pub use backend::DeviceKind;
pub use backend::cpu::{CpuOptions, Isa};
#[cfg(feature = "cuda")]
pub use backend::cuda::{CudaKernels, CudaOptions};
#[cfg(feature = "emulator")]
pub use backend::emulator::EmulatorOptions;
pub use compat::registry as kernel_registry;
pub use compat::registry::KernelRegistry;
pub use dtype::DType;
pub use error::{Cause, DriverError, MlxError, Result, Unsupported};
#[cfg(feature = "emulator")]
pub use msl_emulator::Counters as EmulatorCounters;
pub use runtime::buffer::MlxBuffer;
pub use runtime::capture::{CapturedNode, CapturedOpKind};
#[cfg(feature = "cuda")]
pub use runtime::cuda;
pub use runtime::device::MlxDevice;
pub use runtime::encoder::{CommandEncoder, KernelArg, MTLSize};
pub use runtime::mem_ranges::{BufferRange, MemRangeRole, MemRanges};
#[cfg(all(feature = "metal", target_vendor = "apple"))]
pub use runtime::metal;
pub use runtime::prepared::PreparedCommand;
pub use runtime::submission::Submission;
pub use runtime::{buffer, device, encoder};

/// The README's quickstart, compiled and run.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
pub struct Readme;

/// The guide's snippets, compiled and run.
#[cfg(doctest)]
#[doc = include_str!("../docs/guide.md")]
pub struct Guide;
