//! From what an encoder recorded to what its device runs: guards of the host are respected, params are
//! read once and checked, and whole commands take turns.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::buffer::MlxBuffer;
use super::capture::{CapturedBinding, CapturedDispatch, CapturedNode, Name, RawDispatch, Run};
use super::device::DeviceHandle;
use super::encoder::CommandEncoder;
use super::hazards::Use;
use super::turns::{Touches, Turn};
use super::uses::{Hold, overlap};
use crate::backend::access::Access;
use crate::backend::command::Span;
use crate::backend::{Arg, DeviceKind, Dispatch, Step};
use crate::error::{MlxError, Result};

impl CommandEncoder {
    /// Takes what was recorded and hands it to `submit` when its turn has come; the turn ends when
    /// `submit` returns. The second part of the result is kept until the command has run. On an error
    /// nothing was handed over, except what precedes a dispatch whose params lie in a buffer: `flush`
    /// must run that and wait for it, for the params are read after it.
    pub(crate) fn submit_with<R>(
        &mut self,
        mut flush: impl FnMut(Vec<Step>) -> Result<()>,
        submit: impl FnOnce(Vec<Step>) -> Result<R>,
    ) -> (Result<R>, Vec<Hold>) {
        let (nodes, mut holds) = self.take_recorded();
        let device = self.device().clone();
        let kind = device.backend.kind();
        let submitted = nodes.and_then(|nodes| {
            let touches = begin(kind, &nodes, &mut holds)?;
            // What a GPU's queue takes needs no thread of rayon's.
            let may_wait = matches!(kind, DeviceKind::Metal | DeviceKind::Cuda)
                || rayon::current_thread_index().is_none();
            let _turn = Turn::take(touches, may_wait)?;
            submit(steps(&device, nodes, &mut flush)?)
        });
        (submitted, holds)
    }
}

/// Holds what a command touches; an error where a guard of the host's is in the way.
fn begin(kind: DeviceKind, nodes: &[CapturedNode], holds: &mut Vec<Hold>) -> Result<Touches> {
    let dispatches = || nodes.iter().filter_map(CapturedNode::dispatch);
    let mut storages = BTreeMap::new();
    let mut uses = Vec::new();
    for dispatch in dispatches() {
        // The other devices' memory shows what was queued before, once it is looked at.
        if let (DeviceKind::Metal, Run::Late(raw, late, _)) = (kind, &dispatch.run) {
            let mut params = raw.buffers().filter(|(index, ..)| late.contains(index));
            let written = params.find(|(_, b, _)| b.storage().is_being_written(&b.range()));
            if let Some((index, buffer, _)) = written {
                let why = "a committed command writes these params; wait for it first";
                return Err(refused(Name::Bound(raw.kernel(), index), buffer, why));
            }
        }
        for (buffer, access) in dispatch.buffers() {
            let memory = Arc::as_ptr(buffer.storage()).addr();
            storages.insert(memory, buffer.storage());
            uses.push(Use {
                memory,
                range: buffer.range(),
                writes: access.writes(),
            });
        }
    }
    let touches = Touches::new(&uses);
    for (span, writes) in touches.spans() {
        let Some(storage) = storages.get(&span.memory) else {
            continue;
        };
        let hold = Hold::running(storage, span.range.clone(), writes).map_err(|(lent, why)| {
            let meets = |(_, buffer, access): &(Name<'_>, &MlxBuffer, Access)| {
                Arc::ptr_eq(buffer.storage(), storage)
                    && access.writes() == writes
                    && overlap(&buffer.range(), &lent)
            };
            match dispatches().flat_map(CapturedDispatch::named).find(meets) {
                Some((name, buffer, _)) => refused(name, buffer, why),
                None => MlxError::InvalidArgument(format!("buffer: {why}")),
            }
        })?;
        holds.push(hold);
    }
    Ok(touches)
}

fn refused(name: Name<'_>, buffer: &MlxBuffer, why: &str) -> MlxError {
    let (dtype, shape) = (buffer.dtype(), buffer.shape());
    MlxError::InvalidArgument(format!("{name} ({dtype} {shape:?}): {why}"))
}

/// Why a dispatch cannot follow others into the caller's own queue: its params lie in a buffer and are
/// read after those have run.
#[cfg(any(feature = "cuda", all(feature = "metal", target_vendor = "apple")))]
pub(super) fn params_are_written(entry: &str) -> MlxError {
    MlxError::InvalidArgument(format!(
        "{entry}: params that lie in a buffer come first in their command; bind them as bytes or commit \
         what precedes them"
    ))
}

/// What a backend runs: spans of memory for buffers. Params in buffers are read when what precedes them
/// has run.
fn steps(
    device: &DeviceHandle,
    nodes: Vec<CapturedNode>,
    flush: &mut impl FnMut(Vec<Step>) -> Result<()>,
) -> Result<Vec<Step>> {
    let mut steps = Vec::with_capacity(nodes.len());
    for node in nodes {
        let CapturedNode::Dispatch(dispatch) = node else {
            steps.push(Step::Barrier);
            continue;
        };
        let step = match dispatch.run {
            Run::Task(task) => Step::Task(task.map(span)),
            Run::Foreign(raw) => Step::Foreign(foreign(&raw)),
            Run::Late(raw, _, read) => {
                if steps.iter().any(|step| !matches!(step, Step::Barrier)) {
                    flush(std::mem::take(&mut steps))?;
                }
                Step::Task(read(device, &raw)?.map(span))
            }
        };
        steps.push(step);
    }
    Ok(steps)
}

fn span(buffer: &MlxBuffer) -> Span {
    Span {
        memory: Arc::clone(&buffer.storage().memory),
        offset: buffer.range().start,
        len: buffer.range().len(),
    }
}

fn foreign(raw: &RawDispatch) -> Dispatch {
    let args = raw.bindings.iter().map(|(index, binding)| {
        let arg = match binding {
            CapturedBinding::Buffer(buffer, _) => {
                let Span {
                    memory,
                    offset,
                    len,
                } = span(buffer);
                Arg::Memory {
                    memory,
                    offset,
                    len,
                }
            }
            CapturedBinding::Bytes(bytes) => Arg::Bytes(Arc::clone(bytes)),
        };
        (*index, arg)
    });
    Dispatch {
        kernel: Arc::clone(&raw.kernel),
        args: args.collect(),
        grid: raw.grid.to_array(),
        threadgroup: raw.threadgroup.to_array(),
        problem: None,
    }
}

impl CapturedNode {
    fn dispatch(&self) -> Option<&CapturedDispatch> {
        match self {
            Self::Dispatch(dispatch) => Some(dispatch),
            Self::Barrier => None,
        }
    }
}
