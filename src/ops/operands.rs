//! The buffers of an attention, checked against its problem.

use crate::DType;
use crate::attention::{Problem, Role, class_tile};
use crate::error::{MlxError, Result};
use crate::runtime::buffer::MlxBuffer;

/// The buffers of one attention call.
#[derive(Debug, Clone, Copy)]
pub struct Operands<'a> {
    /// Q, `[B, H, qL, D]` or as the problem's strides say.
    pub q: &'a MlxBuffer,
    /// K, `[B, Hkv, kL, D]`.
    pub k: &'a MlxBuffer,
    /// V, `[B, Hkv, kL, D]`.
    pub v: &'a MlxBuffer,
    /// O, `[B, H, qL, D]`; written.
    pub out: &'a MlxBuffer,
    /// The mask.
    pub mask: Option<&'a MlxBuffer>,
    /// Tile classes of the mask, from [`flash_attn_prefill_blk`](super::flash_attn_prefill_blk).
    pub tile_classes: Option<&'a MlxBuffer>,
    /// Sink logits, `[H]`, f32.
    pub sinks: Option<&'a MlxBuffer>,
    /// ALiBi slopes, `[H]`, f32.
    pub alibi_slopes: Option<&'a MlxBuffer>,
    /// Log-sum-exp, `[B, H, qL]` (packed: `[H, total_q]`), f32; written.
    pub lse: Option<&'a MlxBuffer>,
    /// Block table of paged keys, `[B, pages of a sequence]`, i32.
    pub block_table: Option<&'a MlxBuffer>,
    /// Keys of each sequence, `[B]`, u32 or i32.
    pub key_lengths: Option<&'a MlxBuffer>,
}

impl<'a> Operands<'a> {
    /// Queries, keys, values and output; the optional operands start out absent.
    pub fn new(q: &'a MlxBuffer, k: &'a MlxBuffer, v: &'a MlxBuffer, out: &'a MlxBuffer) -> Self {
        Self {
            q,
            k,
            v,
            out,
            mask: None,
            tile_classes: None,
            sinks: None,
            alibi_slopes: None,
            lse: None,
            block_table: None,
            key_lengths: None,
        }
    }

    pub(super) fn get(&self, role: Role) -> Option<&'a MlxBuffer> {
        match role {
            Role::Query => Some(self.q),
            Role::Key => Some(self.k),
            Role::Value => Some(self.v),
            Role::Output => Some(self.out),
            Role::Mask => self.mask,
            Role::TileClasses => self.tile_classes,
            Role::Sinks => self.sinks,
            Role::AlibiSlopes => self.alibi_slopes,
            Role::Lse => self.lse,
            Role::BlockTable => self.block_table,
            Role::KeyLengths => self.key_lengths,
        }
    }
}

pub(super) fn check_operands(problem: &Problem, operands: &Operands<'_>) -> Result<()> {
    for role in Role::ALL {
        match (problem.operand(role), operands.get(role)) {
            (None, None) => {}
            (None, Some(_)) => {
                return Err(MlxError::expected(
                    role.name(),
                    "no buffer, as the problem has no such operand",
                    "one",
                ));
            }
            (Some(_), None) => return Err(MlxError::expected(role.name(), "a buffer", "none")),
            (Some(spec), Some(buffer)) => {
                let dtype = match (role, buffer.dtype()) {
                    // Read as u32, what is below 0 is above any kL.
                    (Role::KeyLengths, DType::I32) => DType::I32,
                    _ => spec.dtype,
                };
                check_buffer(role.name(), buffer, dtype, spec.elements)?;
            }
        }
    }
    if let (true, Some(classes)) = (problem.has_tile_classes(), operands.tile_classes) {
        let shape = problem.shape();
        let tile = class_tile(shape.qk_dim);
        let (nq, nk) = tile.count(shape.query_len, shape.key_len);
        if classes.shape().len() == 2 && classes.shape() != [nq, nk] {
            return Err(MlxError::expected(
                "blk",
                format!("[{nq}, {nk}] classes of {}x{} tiles", tile.bq, tile.bk),
                format!("{:?}", classes.shape()),
            ));
        }
    }
    for output in [Role::Output, Role::Lse] {
        let Some(out) = operands.get(output) else {
            continue;
        };
        let clash = Role::ALL
            .into_iter()
            .filter(|role| *role != output)
            .filter(|role| problem.operand(*role).is_some_and(|spec| spec.elements > 0))
            .find(|role| operands.get(*role).is_some_and(|other| other.overlaps(out)));
        if let Some(role) = clash {
            return Err(MlxError::expected(
                output.name(),
                "memory that overlaps no other operand",
                format!("the memory of {}", role.name()),
            ));
        }
    }
    Ok(())
}

/// Refuses a buffer of another dtype, too short, out of bounds or off its elements' alignment.
pub(crate) fn check_buffer(
    name: &str,
    buffer: &MlxBuffer,
    dtype: DType,
    elements: usize,
) -> Result<()> {
    buffer.check()?;
    if buffer.dtype() != dtype {
        return Err(MlxError::expected(
            name,
            format!("dtype {dtype}"),
            buffer.dtype(),
        ));
    }
    let size = dtype.size_of();
    match elements.checked_mul(size) {
        Some(bytes) if bytes <= buffer.byte_len() => {}
        _ => {
            return Err(MlxError::expected(
                name,
                format!("at least {elements} elements of {size} bytes"),
                format!("{} bytes", buffer.byte_len()),
            ));
        }
    }
    if !buffer.byte_offset().is_multiple_of(size as u64) {
        return Err(MlxError::expected(
            name,
            format!("a view that starts on {size} bytes"),
            format!("byte {}", buffer.byte_offset()),
        ));
    }
    Ok(())
}
