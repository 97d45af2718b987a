//! Commands that are checked and prepared once and encoded many times, over other contents and other counts
//! of keys.

use std::sync::Arc;

use super::buffer::MlxBuffer;
use super::capture::{CapturedNode, Run};
use super::device::{DeviceHandle, MlxDevice};
use super::encoder::CommandEncoder;
use crate::attention::{Problem, Role};
use crate::backend::command::{Planned, Slot, Task, Work};
use crate::error::{MlxError, Result};

/// A command that was checked and prepared for one device, with handles on its buffers. It is encoded as
/// often as wanted, at less host time than by encoding its dispatches anew, and reads what its buffers hold
/// when the commit runs it.
///
/// ```
/// # use mlx_flash_attn::attention::{Layout, Problem, QueryOffset, Shape};
/// # use mlx_flash_attn::ops::{self, Operands};
/// # use mlx_flash_attn::{DType, MlxDevice};
/// # fn main() -> mlx_flash_attn::Result<()> {
/// # let device = MlxDevice::new()?;
/// // One query over a cache `[64, 2, 32]` of 64 tokens, filled with one token a step.
/// let shape = Shape { batch: 1, heads: 4, kv_heads: 2, query_len: 1, key_len: 1, qk_dim: 32, v_dim: 32 };
/// let problem = Problem::builder(DType::F16, shape)
///     .layout(Layout::SeqMajor)
///     .key_capacity(64)
///     .causal(true)
///     .query_offset(QueryOffset::BottomRight)
///     .build()?;
/// let buffer = |n: usize| device.alloc_buffer(n * 2, DType::F16, vec![n]);
/// let (q, k, v, out) = (buffer(128)?, buffer(64 * 64)?, buffer(64 * 64)?, buffer(128)?);
/// let mut step = device.prepare_command(|encoder| {
///     ops::attention(encoder, &problem, &Operands::new(&q, &k, &v, &out))
/// })?;
/// let mut encoder = device.command_encoder()?;
/// for token in 0..3 {
///     // `upload` the token's query and its rows of K and V.
///     step.set_key_len(token + 1)?;
///     encoder.replay_prepared(&step)?;
///     encoder.commit_and_wait()?;
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct PreparedCommand {
    device: DeviceHandle,
    nodes: Vec<CapturedNode>,
}

impl MlxDevice {
    /// The command that `encode` records into the encoder that it is given, checked and prepared for this
    /// device; nothing runs. The encoder captures: its commits run nothing.
    ///
    /// # Errors
    /// What `encode` returns, what a commit would report of a dispatch that cannot be recorded, and
    /// `InvalidArgument` where `encode` puts another device's encoder in the place of its own.
    pub fn prepare_command(
        &self,
        encode: impl FnOnce(&mut CommandEncoder) -> Result<()>,
    ) -> Result<PreparedCommand> {
        let device = self.metal_device().clone();
        let mut encoder = CommandEncoder::new(device.clone());
        encoder.start_capture();
        encode(&mut encoder)?;
        // Replays check nothing, so the encoder must be the one that was lent.
        if encoder.device().id != device.id {
            return Err(MlxError::expected(
                "prepare_command",
                "the encoder that was given",
                "one of another device in its place",
            ));
        }
        let nodes = encoder.finish_capture()?;
        Ok(PreparedCommand { device, nodes })
    }
}

impl CommandEncoder {
    /// Encodes a prepared command, with the hazards that it has with what is already recorded.
    ///
    /// # Errors
    /// `InvalidArgument` where it was prepared for another device; [`Self::replay`] takes a capture of
    /// any device. Nothing is encoded then.
    pub fn replay_prepared(&mut self, command: &PreparedCommand) -> Result<()> {
        if command.device.id != self.device().id {
            let (expected, got) = (self.device(), &command.device);
            return Err(MlxError::expected(
                "command",
                format!("one that was prepared for {expected:?}"),
                format!("one for {got:?}"),
            ));
        }
        for node in &command.nodes {
            match node {
                CapturedNode::Barrier => self.memory_barrier(),
                // Checked when it was captured, for this very device; buffers do not change.
                CapturedNode::Dispatch(dispatch) => self.record(dispatch.clone()),
            }
        }
        Ok(())
    }
}

impl PreparedCommand {
    /// Has every attention of the command see `key_len` keys from the next replay on, as
    /// [`Problem::with_key_len`] has it. What the device prepared stays where it does not depend on lengths:
    /// compiled kernels do not, though another length may take another one of them. Commands that were
    /// encoded before keep their length. A command without attention, one of no query rows, say, has no length.
    ///
    /// # Errors
    /// `InvalidArgument` where the command is not made of attention ([`ops::attention`](crate::ops::attention))
    /// alone, where `key_len` is more than its operands have room for, and as for
    /// [`Problem::with_key_len`]; what compiling a kernel reports. The command is as it was then.
    pub fn set_key_len(&mut self, key_len: usize) -> Result<()> {
        let plans = self.nodes.iter().map(|node| match node {
            CapturedNode::Barrier => Ok(None),
            CapturedNode::Dispatch(dispatch) => match (&dispatch.run, &dispatch.raw) {
                (Run::Task(task), None) => self.with_key_len(task, key_len).map(Some),
                // What a caller put together has its lengths in params and grid.
                _ => Err(no_attention(dispatch.kernel())),
            },
        });
        // All of them before the first is changed.
        let plans = plans.collect::<Result<Vec<_>>>()?;
        for (node, plan) in self.nodes.iter_mut().zip(plans) {
            if let (CapturedNode::Dispatch(dispatch), Some(plan)) = (node, plan)
                && let Run::Task(task) = &mut dispatch.run
            {
                task.planned = plan;
            }
        }
        Ok(())
    }

    /// What the device prepares for a task over another count of keys.
    fn with_key_len(&self, task: &Task<MlxBuffer>, key_len: usize) -> Result<Arc<Planned>> {
        let Work::Attention(problem, options) = task.work() else {
            return Err(no_attention(task.work().name()));
        };
        let changed = problem.with_key_len(key_len)?;
        if problem.shape().key_len == key_len {
            return Ok(Arc::clone(&task.planned));
        }
        check_room(&changed, task)?;
        let work = Work::Attention(Arc::new(changed), *options);
        self.device.plan_again(&task.planned, work)
    }
}

fn no_attention(name: &str) -> MlxError {
    MlxError::expected(
        "set_key_len",
        "a command that is made of `ops::attention` alone",
        name,
    )
}

/// Refuses operands that are too short for the problem: of those that the count of keys decides.
fn check_room(problem: &Problem, task: &Task<MlxBuffer>) -> Result<()> {
    for role in [Role::Key, Role::Value, Role::Mask] {
        let (Some(spec), Some(buffer)) = (problem.operand(role), task.get(Slot::Operand(role)))
        else {
            continue;
        };
        let size = spec.dtype.size_of();
        if spec.elements > buffer.byte_len() / size {
            return Err(MlxError::expected(
                role.name(),
                format!("at least {} elements of {size} bytes", spec.elements),
                format!("{} bytes", buffer.byte_len()),
            ));
        }
    }
    Ok(())
}
