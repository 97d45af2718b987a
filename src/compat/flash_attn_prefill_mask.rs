//! Builds masks on the device: of a causal or sliding-window layer, and of several sequences side by side.

use crate::attention::{Role, Visibility};
use crate::backend::command::{FillBlocks, FillMask, Slot, Task, Work};
use crate::backend::metal::bindings::names;
use crate::backend::metal::sources;
use crate::compat::registry::KernelRegistry;
use crate::dtype::DType;
use crate::error::{MlxError, Result};
use crate::ops::check_buffer;
use crate::runtime::buffer::MlxBuffer;
use crate::runtime::device::MlxDevice;
use crate::runtime::encoder::{CapturedOpKind, CommandEncoder};

/// Text of the mask-fill and tile-class kernels.
pub static FLASH_ATTN_PREFILL_MASK_SHADER_SOURCE: &str = sources::MASK_TEXT;

/// Fills a bf16 mask.
pub const K_FILL_BF16: &str = names::MASK_FILL;
/// Fills an f16 mask.
pub const K_FILL_F16: &str = names::MASK_FILL_F16;
/// Fills a bf16 mask of several sequences.
pub const K_FILL_BLOCKDIAG_BF16: &str = names::MASK_FILL_BLOCKS;

/// Registers the kernels. A new registry knows them already.
pub fn register(registry: &mut KernelRegistry) {
    for name in [K_FILL_BF16, K_FILL_F16, K_FILL_BLOCKDIAG_BF16] {
        registry.register_source(name, FLASH_ATTN_PREFILL_MASK_SHADER_SOURCE);
    }
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
    build(device, registry, encoder, params, DType::BF16)
}

/// As [`build_sdpa_mask_bf16`], in f16 (a name of version 0.15.16).
///
/// # Errors
/// As [`build_sdpa_mask_bf16`].
pub fn build_sdpa_mask_f16(
    device: &MlxDevice,
    registry: &mut KernelRegistry,
    encoder: &mut CommandEncoder,
    params: &SdpaMaskParams,
) -> Result<MlxBuffer> {
    build(device, registry, encoder, params, DType::F16)
}

fn build(
    device: &MlxDevice,
    registry: &mut KernelRegistry,
    encoder: &mut CommandEncoder,
    params: &SdpaMaskParams,
    dtype: DType,
) -> Result<MlxBuffer> {
    check_window(params.window_size)?;
    let sizes = [
        ("seq_len_q", params.seq_len_q),
        ("seq_len_k", params.seq_len_k),
    ];
    let mask = alloc(device, sizes, dtype)?;
    let kernel = match dtype {
        DType::F16 => K_FILL_F16,
        _ => K_FILL_BF16,
    };
    // Counts among the built kernels, as a caller of the kernel's name expects.
    registry.get_pipeline(kernel, device.metal_device())?;
    let fill = FillMask {
        query_len: params.seq_len_q,
        key_len: params.seq_len_k,
        dtype,
        visibility: Visibility {
            q_offset: i64::from(params.q_abs_offset),
            causal: params.causal,
            window: params.window_size.map(|keys| keys as usize),
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

/// Encodes the fill of a new bf16 mask `[t, t]` for the tokens of several sequences (a name of version
/// 0.15.16); the caller commits.
///
/// `seq_id` and `local_pos` are `[t]` in u32 or i32: each token's sequence, and its position there. A query
/// sees the keys of its own sequence: up to its own position where `causal`, and exactly `window_size`
/// positions up to its own.
///
/// # Errors
/// `InvalidArgument` for no tokens, a window of 0, a size that overflows, or a buffer of another dtype or
/// too small; `BufferAllocationError` where the mask does not fit the device.
#[allow(clippy::too_many_arguments)]
pub fn build_block_diagonal_sdpa_mask_bf16(
    device: &MlxDevice,
    registry: &mut KernelRegistry,
    encoder: &mut CommandEncoder,
    seq_id: &MlxBuffer,
    local_pos: &MlxBuffer,
    t: u32,
    window_size: Option<u32>,
    causal: bool,
) -> Result<MlxBuffer> {
    check_window(window_size)?;
    for (name, buffer) in [("seq_id", seq_id), ("local_pos", local_pos)] {
        let dtype = match buffer.dtype() {
            DType::I32 => DType::I32,
            _ => DType::U32,
        };
        check_buffer(name, buffer, dtype, t as usize)?;
    }
    let mask = alloc(device, [("t", t), ("t", t)], DType::BF16)?;
    registry.get_pipeline(K_FILL_BLOCKDIAG_BF16, device.metal_device())?;
    let fill = FillBlocks {
        len: t,
        causal,
        window: window_size,
    };
    let task = Task {
        planned: encoder.device().plan(Work::FillBlocks(fill))?,
        operands: [
            (Slot::Operand(Role::Mask), mask.clone()),
            (Slot::SequenceIds, seq_id.clone()),
            (Slot::Positions, local_pos.clone()),
        ]
        .into(),
    };
    encoder.task(task, CapturedOpKind::Other)?;
    Ok(mask)
}

fn check_window(window: Option<u32>) -> Result<()> {
    match window {
        Some(0) => Err(MlxError::expected("window_size", "at least 1 key", 0)),
        _ => Ok(()),
    }
}

/// A mask of rows and keys, with what messages call them.
fn alloc(device: &MlxDevice, sizes: [(&str, u32); 2], dtype: DType) -> Result<MlxBuffer> {
    for (name, size) in sizes {
        if size == 0 {
            return Err(MlxError::expected(name, "at least 1", 0));
        }
    }
    let [rows, keys] = sizes.map(|(_, size)| size as usize);
    let bytes = rows
        .checked_mul(keys)
        .and_then(|cells| cells.checked_mul(dtype.size_of()))
        .filter(|bytes| *bytes <= isize::MAX as usize)
        .ok_or_else(|| {
            MlxError::InvalidArgument(format!("mask: {rows} x {keys} cells overflow"))
        })?;
    device.alloc_buffer(bytes, dtype, vec![rows, keys])
}
