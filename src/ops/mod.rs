//! What callers encode: attention over a checked [`Problem`], and the seed's entry points, thin over
//! the same problem and plan.

pub mod encode_helpers;
pub mod flash_attn_prefill;
pub mod flash_attn_prefill_blk;
pub mod flash_attn_prefill_d512;
pub mod flash_attn_prefill_mask;
pub mod flash_attn_vec;

use std::sync::Arc;

use crate::attention::{Problem, Role};
use crate::backend::command::{Planned, Slot, Task};
use crate::backend::metal::plan::PlanOptions;
use crate::error::{MlxError, Result};
use crate::runtime::buffer::MlxBuffer;
use crate::runtime::encoder::{CapturedOpKind, CommandEncoder};

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
    /// Tile classes of the mask, from [`flash_attn_prefill_blk`].
    pub tile_classes: Option<&'a MlxBuffer>,
    /// Sink logits, `[H]`, f32.
    pub sinks: Option<&'a MlxBuffer>,
    /// ALiBi slopes, `[H]`, f32.
    pub alibi_slopes: Option<&'a MlxBuffer>,
    /// Log-sum-exp, `[B, H, qL]` (packed: `[H, total_q]`), f32; written.
    pub lse: Option<&'a MlxBuffer>,
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
        }
    }

    fn get(&self, role: Role) -> Option<&'a MlxBuffer> {
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
        }
    }
}

/// Encodes attention; the caller commits.
///
/// Empty work is work: a problem without batches or queries encodes nothing, one without keys writes
/// zeros, and -inf as log-sum-exp. An operand without elements may be any buffer of its dtype.
///
/// # Errors
/// `InvalidArgument` where a buffer does not fit the problem (absent, surplus, dtype, size, overlap
/// of an output) or the device has no kernel for it. Nothing is encoded then.
pub fn attention(
    encoder: &mut CommandEncoder,
    problem: &Problem,
    operands: &Operands<'_>,
) -> Result<()> {
    encode(encoder, problem, operands, PlanOptions::default()).map(|_| ())
}

/// Checks, plans and encodes. Gives the plan where there was work to do.
pub(crate) fn encode(
    encoder: &mut CommandEncoder,
    problem: &Problem,
    operands: &Operands<'_>,
    options: PlanOptions,
) -> Result<Option<Arc<Planned>>> {
    check_operands(problem, operands)?;
    if problem.has_no_rows() {
        return Ok(None);
    }
    // No device binds empty memory or launches over no keys: it gets a key that no row sees, for which
    // Q's memory stands in.
    if let Some(problem) = problem.without_keys() {
        let stand_in = Operands {
            lse: operands.lse,
            ..Operands::new(operands.q, operands.q, operands.q, operands.out)
        };
        return record(encoder, &problem, &stand_in, options).map(Some);
    }
    record(encoder, problem, operands, options).map(Some)
}

/// Encodes a checked problem that has rows and keys.
fn record(
    encoder: &mut CommandEncoder,
    problem: &Problem,
    operands: &Operands<'_>,
    options: PlanOptions,
) -> Result<Arc<Planned>> {
    let planned = encoder.device().plan_attention(problem, options)?;
    let taken = Role::ALL
        .into_iter()
        .filter(|role| problem.operand(*role).is_some());
    let given = taken.filter_map(|role| Some((Slot::Operand(role), operands.get(role)?.clone())));
    let task = Task {
        planned: Arc::clone(&planned),
        operands: given.collect(),
    };
    encoder.task(task, CapturedOpKind::Sdpa)?;
    Ok(planned)
}

fn check_operands(problem: &Problem, operands: &Operands<'_>) -> Result<()> {
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
                check_buffer(role.name(), buffer, spec.dtype, spec.elements)?;
            }
        }
    }
    if let (true, Some(classes)) = (problem.has_tile_classes(), operands.tile_classes) {
        let shape = problem.shape();
        let tile = crate::attention::class_tile(shape.qk_dim);
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
    dtype: crate::DType,
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
