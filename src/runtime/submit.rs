//! From what an encoder recorded to what its device runs: guards of the host are respected, params are
//! read once and checked, and whole commands take turns.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::buffer::MlxBuffer;
use super::capture::{CapturedBinding, CapturedDispatch, CapturedNode};
use super::encoder::CommandEncoder;
use super::hazards::Use;
use super::turns::{Touches, Turn};
use super::uses::{Hold, overlap};
use crate::attention::bindings::Access;
use crate::attention::variant::Family;
use crate::backend::{Arg, DeviceKind, Dispatch, Step, checked};
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
        let (kind, family) = (self.device().backend.kind(), self.device().backend.family());
        let submitted = nodes.and_then(|nodes| {
            let touches = begin(kind, &nodes, &mut holds)?;
            // What a GPU's queue takes needs no thread of rayon's.
            let may_wait = matches!(kind, DeviceKind::Metal | DeviceKind::Cuda)
                || rayon::current_thread_index().is_none();
            let _turn = Turn::take(touches, may_wait)?;
            submit(steps(family, nodes, &mut flush)?)
        });
        (submitted, holds)
    }
}

/// Holds what a command touches; an error where a guard of the host's is in the way.
fn begin(kind: DeviceKind, nodes: &[CapturedNode], holds: &mut Vec<Hold>) -> Result<Touches> {
    let dispatches = || nodes.iter().filter_map(CapturedNode::dispatch);
    let bound = || dispatches().flat_map(|d| d.buffers().map(move |buffer| (d, buffer)));
    let mut storages = BTreeMap::new();
    let mut uses = Vec::new();
    for (dispatch, (index, buffer, access)) in bound() {
        // The other devices' memory shows what was queued before, once it is looked at.
        if kind == DeviceKind::Metal
            && dispatch.states_params(index)
            && buffer.storage().is_being_written(&buffer.range())
        {
            let why = "a committed command writes these params; wait for it first";
            return Err(refused(dispatch, index, buffer, why));
        }
        let memory = Arc::as_ptr(buffer.storage()).addr();
        storages.insert(memory, buffer.storage());
        uses.push(Use {
            memory,
            range: buffer.range(),
            writes: access.writes(),
        });
    }
    let touches = Touches::new(&uses);
    for (span, writes) in touches.spans() {
        let Some(storage) = storages.get(&span.memory) else {
            continue;
        };
        let hold = Hold::running(storage, span.range.clone(), writes).map_err(|(lent, why)| {
            let meets = |(_, (_, buffer, access)): &(_, (usize, &MlxBuffer, Access))| {
                Arc::ptr_eq(buffer.storage(), storage)
                    && access.writes() == writes
                    && overlap(&buffer.range(), &lent)
            };
            match bound().find(meets) {
                Some((dispatch, (index, buffer, _))) => refused(dispatch, index, buffer, why),
                None => MlxError::InvalidArgument(format!("buffer: {why}")),
            }
        })?;
        holds.push(hold);
    }
    Ok(touches)
}

fn refused(dispatch: &CapturedDispatch, index: usize, buffer: &MlxBuffer, why: &str) -> MlxError {
    let name = &dispatch.kernel.name;
    let (dtype, shape) = (buffer.dtype(), buffer.shape());
    MlxError::InvalidArgument(format!("{name}: buffer {index} ({dtype} {shape:?}): {why}"))
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

fn steps(
    family: Family,
    nodes: Vec<CapturedNode>,
    flush: &mut impl FnMut(Vec<Step>) -> Result<()>,
) -> Result<Vec<Step>> {
    let mut steps = Vec::with_capacity(nodes.len());
    for node in nodes {
        let dispatch = match node {
            CapturedNode::Barrier => {
                steps.push(Step::Barrier);
                continue;
            }
            CapturedNode::Dispatch(dispatch) if dispatch.checked => lower(&dispatch),
            CapturedNode::Dispatch(mut dispatch) => {
                let precede = steps.iter().any(|step| matches!(step, Step::Dispatch(_)));
                if dispatch.has_bound_params() && precede {
                    flush(std::mem::take(&mut steps))?;
                }
                read_params(family, &mut dispatch)?;
                let lowered = lower(&dispatch);
                checked::check(&lowered, family)?;
                lowered
            }
        };
        steps.push(Step::Dispatch(dispatch));
    }
    Ok(steps)
}

/// Puts params that lie in buffers into the command, so that what is checked is what is used.
fn read_params(family: Family, dispatch: &mut CapturedDispatch) -> Result<()> {
    let name = dispatch.kernel.name.clone();
    for param in checked::params(&dispatch.kernel) {
        let stated = dispatch.bindings.iter().find_map(|(i, b)| match b {
            CapturedBinding::Bytes(bytes) if *i == param.count_in? => Some(&**bytes),
            _ => None,
        });
        let len = param.bytes(stated);
        let bound = dispatch
            .bindings
            .iter_mut()
            .find(|(index, _)| *index == param.index);
        let Some((_, binding @ CapturedBinding::Buffer(..))) = bound else {
            continue;
        };
        let CapturedBinding::Buffer(buffer, _) = &*binding else {
            continue;
        };
        // The kernels' own text reads them where they lie, in words of this size.
        if family == Family::Apple && !buffer.byte_offset().is_multiple_of(param.align) {
            return Err(MlxError::CommandBufferError(format!(
                "{name}: buffer {}: expected an address on {} bytes, got byte {}",
                param.index,
                param.align,
                buffer.byte_offset()
            )));
        }
        let range = buffer.range();
        let range = range.start..range.start + range.len().min(len);
        let bytes = buffer.storage().copy_for_command(range)?;
        *binding = CapturedBinding::Bytes(bytes.into());
    }
    Ok(())
}

pub(super) fn lower(dispatch: &CapturedDispatch) -> Dispatch {
    let args = dispatch.bindings.iter().map(|(index, binding)| {
        let arg = match binding {
            CapturedBinding::Buffer(buffer, _) => Arg::Memory {
                memory: Arc::clone(&buffer.storage().memory),
                offset: buffer.range().start,
                len: buffer.range().len(),
            },
            CapturedBinding::Bytes(bytes) => Arg::Bytes(Arc::clone(bytes)),
        };
        (*index, arg)
    });
    Dispatch {
        kernel: Arc::clone(&dispatch.kernel),
        args: args.collect(),
        grid: dispatch.grid.to_array(),
        threadgroup: dispatch.threadgroup.to_array(),
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

impl CapturedDispatch {
    /// What is bound that is a buffer.
    pub(super) fn buffers(&self) -> impl Iterator<Item = (usize, &MlxBuffer, Access)> + Clone {
        self.bindings
            .iter()
            .filter_map(|(index, binding)| match binding {
                CapturedBinding::Buffer(buffer, access) => Some((*index, buffer, *access)),
                CapturedBinding::Bytes(_) => None,
            })
    }

    /// Whether what is bound at `index` says what is asked, to a kernel of ours.
    fn states_params(&self, index: usize) -> bool {
        checked::params(&self.kernel).any(|param| param.index == index)
    }

    /// Whether params lie in a buffer.
    pub(super) fn has_bound_params(&self) -> bool {
        self.buffers().any(|(index, ..)| self.states_params(index))
    }
}
