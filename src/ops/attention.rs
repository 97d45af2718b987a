//! Attention over a checked [`Problem`].

use std::sync::Arc;

use super::operands::{Operands, check_operands};
use crate::attention::{Problem, Role};
use crate::backend::command::{Hint, Planned, Slot, Task};
use crate::error::Result;
use crate::runtime::encoder::{CapturedOpKind, CommandEncoder};

/// Encodes attention; the caller commits.
///
/// Empty work is work: a problem without batches or queries encodes nothing, one without keys writes
/// zeros, and -inf as log-sum-exp, whatever form its keys would have. An operand without elements may be any buffer of its dtype.
///
/// # Errors
/// `InvalidArgument` where a buffer does not fit the problem (absent, surplus, dtype, size, overlap
/// of an output) or the device has no kernel for it. Nothing is encoded then.
pub fn attention(
    encoder: &mut CommandEncoder,
    problem: &Problem,
    operands: &Operands<'_>,
) -> Result<()> {
    encode(encoder, problem, operands, Hint::default()).map(|_| ())
}

/// Checks, plans and encodes. Gives the plan where there was work to do.
pub(crate) fn encode(
    encoder: &mut CommandEncoder,
    problem: &Problem,
    operands: &Operands<'_>,
    hint: Hint,
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
        check_operands(&problem, &stand_in)?;
        return record(encoder, &problem, &stand_in, hint).map(Some);
    }
    record(encoder, problem, operands, hint).map(Some)
}

/// Encodes a checked problem that has rows and keys.
fn record(
    encoder: &mut CommandEncoder,
    problem: &Problem,
    operands: &Operands<'_>,
    hint: Hint,
) -> Result<Arc<Planned>> {
    let planned = encoder.device().plan_attention(problem, hint)?;
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
