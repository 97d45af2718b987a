//! Builds the bf16 mask of a causal or sliding-window layer on the device.

use crate::attention::{Role, Visibility};
use crate::backend::command::{FillMask, Slot, Task, Work};
use crate::backend::metal::bindings::names;
use crate::backend::metal::sources;
use crate::dtype::DType;
use crate::error::{MlxError, Result};
use crate::runtime::buffer::MlxBuffer;
use crate::runtime::device::MlxDevice;
use crate::runtime::encoder::{CapturedOpKind, CommandEncoder};
use crate::runtime::registry::KernelRegistry;

/// Text of the mask-fill and tile-class kernels.
pub static FLASH_ATTN_PREFILL_MASK_SHADER_SOURCE: &str = sources::MASK_TEXT;

/// The kernel.
pub const K_FILL_BF16: &str = names::MASK_FILL;

/// Registers the kernel. A new registry knows it already.
pub fn register(registry: &mut KernelRegistry) {
    registry.register_source(K_FILL_BF16, FLASH_ATTN_PREFILL_MASK_SHADER_SOURCE);
}

/// Which mask to build. Row `r` stands at position `r + q_abs_offset`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SdpaMaskParams {
    /// Rows qL.
    pub seq_len_q: u32,
    /// Columns kL.
    pub seq_len_k: u32,
    /// Keeps exactly this many keys up to and including a row's position; keys after it stay
    /// visible unless `causal`.
    pub window_size: Option<u32>,
    /// Masks keys after a row's position.
    pub causal: bool,
    /// Position of row 0.
    pub q_abs_offset: u32,
}

/// Encodes the fill of a new bf16 mask `[qL, kL]` (0 visible, `-inf` masked); the caller commits.
///
/// # Errors
/// `InvalidArgument` for zero lengths, a window of 0 or a size that overflows;
/// `BufferAllocationError` where the mask does not fit the device.
pub fn build_sdpa_mask_bf16(
    device: &MlxDevice,
    registry: &mut KernelRegistry,
    encoder: &mut CommandEncoder,
    params: &SdpaMaskParams,
) -> Result<MlxBuffer> {
    let (rows, keys) = (params.seq_len_q as usize, params.seq_len_k as usize);
    for (name, size) in [("seq_len_q", rows), ("seq_len_k", keys)] {
        if size == 0 {
            return Err(MlxError::expected(name, "at least 1", 0));
        }
    }
    if params.window_size == Some(0) {
        return Err(MlxError::expected("window_size", "at least 1 key", 0));
    }
    let bytes = rows
        .checked_mul(keys)
        .and_then(|cells| cells.checked_mul(DType::BF16.size_of()))
        .filter(|bytes| *bytes <= isize::MAX as usize)
        .ok_or_else(|| {
            MlxError::InvalidArgument(format!("mask: {rows} x {keys} cells overflow"))
        })?;
    let mask = device.alloc_buffer(bytes, DType::BF16, vec![rows, keys])?;
    // Counts among the built kernels, as a caller of the kernel's name expects.
    registry.get_pipeline(K_FILL_BF16, device.metal_device())?;
    let fill = FillMask {
        query_len: params.seq_len_q,
        key_len: params.seq_len_k,
        visibility: Visibility {
            q_offset: i64::from(params.q_abs_offset),
            causal: params.causal,
            window: params.window_size,
            window_right: None,
        },
    };
    let task = Task {
        planned: encoder.device().plan(Work::FillMask(fill))?,
        operands: [(Slot::Operand(Role::Mask), mask.clone())].into(),
    };
    encoder.task(task, CapturedOpKind::Other)?;
    Ok(mask)
}
