//! Decode: one query at the last position, over a key/value cache.

use std::sync::Arc;

use crate::attention::HEAD_DIMS;
use crate::attention::Role;
use crate::backend::command::{DecodePartials, JoinPartials, Slot, Task, Work};
use crate::backend::metal::bindings::names;
use crate::backend::metal::sources;
use crate::compat::decode::DecodeStep;
use crate::compat::registry::KernelRegistry;
use crate::dtype::DType;
use crate::error::{MlxError, Result};
use crate::ops::check_buffer;
use crate::runtime::buffer::MlxBuffer;
use crate::runtime::device::MlxDevice;
use crate::runtime::encoder::{CapturedOpKind, CommandEncoder};

/// Text of the decode kernels.
pub static FLASH_ATTN_VEC_SHADER_SOURCE: &str = sources::VEC_TEXT;

/// Partial results of each head.
const SPLITS: u32 = 32;

/// Registers the kernels. A new registry knows them already.
pub fn register(registry: &mut KernelRegistry) {
    for name in [names::VEC_F32, names::VEC_F16, names::VEC_REDUCE] {
        registry.register_source(name, FLASH_ATTN_VEC_SHADER_SOURCE);
    }
}

/// Sizes and options of a decode step. The query stands at position `kv_seq_len - 1`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FlashAttnVecParams {
    /// Query heads H.
    pub num_heads: u32,
    /// Key/value heads Hkv; divides H.
    pub num_kv_heads: u32,
    /// Head dimension D.
    pub head_dim: u32,
    /// Valid keys.
    pub kv_seq_len: u32,
    /// Rows that K and V have room for.
    pub kv_capacity: u32,
    /// Score scale, usually `1 / sqrt(D)`.
    pub scale: f32,
    /// 0: none; 1: causal (the same, as the query is last); 2: sliding window.
    pub mask_type: u32,
    /// Keys of the window with `mask_type` 2, self included; 0 means none.
    pub sliding_window: u32,
    /// Softcap of the scores; 0 means none.
    pub softcap: f32,
}

/// Bytes of the partial results: for each head and split D values, a maximum and a sum, in f32.
/// Saturates where the product overflows, so no buffer satisfies it.
pub fn tmp_buffer_bytes(num_heads: u32, head_dim: u32) -> usize {
    let per_split = (head_dim as usize).saturating_add(2).saturating_mul(4);
    (num_heads as usize)
        .saturating_mul(SPLITS as usize)
        .saturating_mul(per_split)
}

fn check(params: &FlashAttnVecParams) -> Result<()> {
    let p = params;
    let sizes = [
        ("num_heads", p.num_heads),
        ("num_kv_heads", p.num_kv_heads),
        ("kv_seq_len", p.kv_seq_len),
        ("kv_capacity", p.kv_capacity),
    ];
    for (name, size) in sizes {
        if size == 0 || i32::try_from(size).is_err() {
            return Err(MlxError::expected(name, "1 to 2147483647", size));
        }
    }
    if !p.num_heads.is_multiple_of(p.num_kv_heads) {
        return Err(MlxError::InvalidArgument(format!(
            "num_heads ({}) must be divisible by num_kv_heads ({})",
            p.num_heads, p.num_kv_heads
        )));
    }
    if !HEAD_DIMS.contains(&(p.head_dim as usize)) {
        return Err(MlxError::expected(
            "head_dim",
            format!("one of {HEAD_DIMS:?}"),
            p.head_dim,
        ));
    }
    if p.kv_seq_len > p.kv_capacity {
        return Err(MlxError::expected(
            "kv_seq_len",
            format!("at most kv_capacity = {}", p.kv_capacity),
            p.kv_seq_len,
        ));
    }
    if !p.scale.is_finite() {
        return Err(MlxError::expected("scale", "a finite number", p.scale));
    }
    if !(p.softcap.is_finite() && p.softcap >= 0.0) {
        return Err(MlxError::expected(
            "softcap",
            "0 or a finite number above it",
            p.softcap,
        ));
    }
    if p.mask_type > 2 {
        return Err(MlxError::expected("mask_type", "0, 1 or 2", p.mask_type));
    }
    Ok(())
}

/// Sizes, dtypes and overlap of Q, K, V, the output and `tmp`.
fn check_operands(
    params: &FlashAttnVecParams,
    kv_dtype: DType,
    [q, k, v, output, tmp]: [&MlxBuffer; 5],
) -> Result<()> {
    let product = |sizes: &[u32]| {
        sizes
            .iter()
            .try_fold(1usize, |n, size| n.checked_mul(*size as usize))
            .ok_or_else(|| MlxError::InvalidArgument(format!("K: sizes {sizes:?} overflow")))
    };
    let rows = product(&[params.num_heads, params.head_dim])?;
    let cache = product(&[params.num_kv_heads, params.kv_capacity, params.head_dim])?;
    check_buffer("Q", q, DType::F32, rows)?;
    check_buffer("K", k, kv_dtype, cache)?;
    check_buffer("V", v, kv_dtype, cache)?;
    check_buffer("output", output, DType::F32, rows)?;
    check_buffer(
        "tmp",
        tmp,
        DType::F32,
        tmp_buffer_bytes(params.num_heads, params.head_dim) / 4,
    )?;
    for (name, written) in [("output", output), ("tmp", tmp)] {
        let others = [
            ("Q", q),
            ("K", k),
            ("V", v),
            ("tmp", tmp),
            ("output", output),
        ];
        if let Some((other, _)) = others
            .iter()
            .find(|(n, b)| *n != name && b.overlaps(written))
        {
            return Err(MlxError::expected(
                name,
                "memory that overlaps no other operand",
                format!("the memory of {other}"),
            ));
        }
    }
    Ok(())
}

/// Encodes one decode step; the caller commits.
///
/// `q` and `output` are f32 `[H, D]`; `k` and `v` are `[Hkv, kv_capacity, D]`, both f32 or both f16;
/// `tmp` holds [`tmp_buffer_bytes`] bytes of f32.
///
/// # Errors
/// `InvalidArgument` for sizes that do not fit together, a scale or softcap that is no number, a
/// wrong dtype, a buffer too small, or written buffers that overlap others. Nothing is encoded then.
#[allow(clippy::too_many_arguments)]
pub fn flash_attn_vec(
    encoder: &mut CommandEncoder,
    registry: &mut KernelRegistry,
    device: &MlxDevice,
    q: &MlxBuffer,
    k: &MlxBuffer,
    v: &MlxBuffer,
    output: &MlxBuffer,
    tmp: &MlxBuffer,
    params: &FlashAttnVecParams,
) -> Result<()> {
    check(params)?;
    let (kernel, kv_dtype) = match k.dtype() {
        DType::F32 => (names::VEC_F32, DType::F32),
        DType::F16 => (names::VEC_F16, DType::F16),
        other => return Err(MlxError::expected("K", "dtype f32 or f16", other)),
    };
    check_operands(params, kv_dtype, [q, k, v, output, tmp])?;
    let windowed = params.mask_type == 2 && params.sliding_window > 0;
    let step = DecodeStep {
        heads: params.num_heads,
        kv_heads: params.num_kv_heads,
        head_dim: params.head_dim,
        key_len: params.kv_seq_len,
        capacity: params.kv_capacity,
        kv_dtype,
        scale: params.scale,
        softcap: params.softcap,
        window: windowed.then_some(params.sliding_window),
    };
    // Count among the built kernels, as a caller of the kernels' names expects.
    registry.get_pipeline(names::VEC_REDUCE, device.metal_device())?;
    registry.get_pipeline(kernel, device.metal_device())?;
    let first = Work::DecodePartials(DecodePartials {
        problem: Arc::new(step.problem()?),
        splits: SPLITS,
    });
    let second = Work::JoinPartials(JoinPartials {
        heads: params.num_heads,
        head_dim: params.head_dim,
        splits: SPLITS,
    });
    let operand = |role, buffer: &MlxBuffer| (Slot::Operand(role), buffer.clone());
    let partials = Task {
        planned: encoder.device().plan(first)?,
        operands: [
            operand(Role::Query, q),
            operand(Role::Key, k),
            operand(Role::Value, v),
            (Slot::Partials, tmp.clone()),
        ]
        .into(),
    };
    let join = Task {
        planned: encoder.device().plan(second)?,
        operands: [(Slot::Partials, tmp.clone()), operand(Role::Output, output)].into(),
    };
    // Both checks first: an error must leave the encoder as it was.
    encoder.check_task(&join)?;
    encoder.task(partials, CapturedOpKind::Sdpa)?;
    encoder.task(join, CapturedOpKind::Sdpa)
}
