//! Records dispatches, orders them by what they read and write, and runs them.

use std::sync::{Arc, Mutex, PoisonError};

use bytemuck::Pod;

use super::buffer::{MlxBuffer, PendingWrite};
use super::capture::{CapturedBinding, CapturedDispatch};
pub use super::capture::{CapturedNode, CapturedOpKind};
use super::device::DeviceHandle;
use super::hazards::{Hazards, Use};
use super::registry::Pipeline;
use crate::backend::{self, Arg, Dispatch, Pending, Step};
use crate::error::{MlxError, Result};

/// Sizes along x, y and z.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MTLSize {
    /// Along x.
    pub width: u64,
    /// Along y.
    pub height: u64,
    /// Along z.
    pub depth: u64,
}

impl MTLSize {
    /// Sizes along x, y and z.
    pub const fn new(width: u64, height: u64, depth: u64) -> Self {
        Self {
            width,
            height,
            depth,
        }
    }

    const fn to_array(self) -> [u64; 3] {
        [self.width, self.height, self.depth]
    }
}

impl From<[u64; 3]> for MTLSize {
    fn from([width, height, depth]: [u64; 3]) -> Self {
        Self {
            width,
            height,
            depth,
        }
    }
}

/// What to bind at an index.
#[derive(Debug, Clone, Copy)]
pub enum KernelArg<'a> {
    /// A buffer, from the start of its view.
    Buffer(&'a MlxBuffer),
    /// A buffer, from this many bytes into its view.
    BufferWithOffset(&'a MlxBuffer, u64),
    /// Bytes copied into the command.
    Bytes(&'a [u8]),
}

/// The bytes of a params struct.
pub fn as_bytes<T: Pod>(value: &T) -> &[u8] {
    bytemuck::bytes_of(value)
}

/// Records dispatches and runs them when committed.
///
/// Dispatches run in an order that gives what recording order would: where one touches what an
/// earlier one wrote (or writes what an earlier one read), a barrier is put between them.
pub struct CommandEncoder {
    device: DeviceHandle,
    recorded: Vec<CapturedNode>,
    captured: Option<Vec<CapturedNode>>,
    hazards: Hazards,
    capture_hazards: Hazards,
    op_kind: CapturedOpKind,
    pending_writes: Vec<PendingWrite>,
    /// A dispatch that could not be recorded; the commit reports it and runs nothing.
    fault: Option<MlxError>,
    submitted: Mutex<Option<Submitted>>,
}

struct Submitted {
    command: Arc<dyn Pending>,
    writes: Vec<PendingWrite>,
    /// Whether a wait has told how it ended.
    reported: bool,
    /// How an earlier commit ended that nobody waited for.
    earlier: Result<()>,
}

impl Submitted {
    fn wait(&mut self) -> Result<backend::Timing> {
        let timing = self.command.wait();
        self.writes.clear();
        self.reported = true;
        self.earlier.clone().and(timing)
    }
}

impl std::fmt::Debug for CommandEncoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CommandEncoder")
            .field("device", &self.device)
            .field("recorded", &self.recorded.len())
            .field("captured", &self.captured.as_ref().map(Vec::len))
            .finish_non_exhaustive()
    }
}

impl CommandEncoder {
    pub(crate) fn new(device: DeviceHandle) -> Self {
        Self {
            device,
            recorded: Vec::new(),
            captured: None,
            hazards: Hazards::default(),
            capture_hazards: Hazards::default(),
            op_kind: CapturedOpKind::Other,
            pending_writes: Vec::new(),
            fault: None,
            submitted: Mutex::new(None),
        }
    }

    /// Names what the next dispatch computes, for captures.
    pub fn set_op_kind(&mut self, kind: CapturedOpKind) {
        self.op_kind = kind;
    }

    /// From now on, writes dispatches down instead of recording them for a commit.
    pub fn start_capture(&mut self) {
        self.captured = Some(Vec::new());
        self.capture_hazards = Hazards::default();
    }

    /// Whether a capture is under way.
    pub fn is_capturing(&self) -> bool {
        self.captured.is_some()
    }

    /// Ends the capture and gives what it holds; `None` where none was under way.
    pub fn take_capture(&mut self) -> Option<Vec<CapturedNode>> {
        self.captured.take()
    }

    /// Encodes captured nodes, as often as wanted. Hazards with what is already recorded are found
    /// anew.
    pub fn replay(&mut self, nodes: &[CapturedNode]) -> Result<()> {
        // All checks first: an error must leave the encoder as it was.
        for node in nodes {
            if let CapturedNode::Dispatch(dispatch) = node {
                self.check(dispatch)?;
            }
        }
        for node in nodes {
            match node {
                CapturedNode::Barrier => self.memory_barrier(),
                CapturedNode::Dispatch(dispatch) => self.record(dispatch.clone())?,
            }
        }
        Ok(())
    }

    /// Makes what follows wait for what came before. Never needed for correctness: hazards are
    /// found without it.
    pub fn memory_barrier(&mut self) {
        let (nodes, hazards) = self.target();
        if !matches!(nodes.last(), None | Some(CapturedNode::Barrier)) {
            nodes.push(CapturedNode::Barrier);
        }
        hazards.clear();
    }

    fn target(&mut self) -> (&mut Vec<CapturedNode>, &mut Hazards) {
        match &mut self.captured {
            Some(nodes) => (nodes, &mut self.capture_hazards),
            None => (&mut self.recorded, &mut self.hazards),
        }
    }

    /// Records one dispatch of `pipeline` over `grid` threadgroups. What cannot be recorded (a view
    /// out of bounds, a buffer of another device, an output that overlaps another binding) is
    /// reported by the commit, which then runs nothing.
    pub fn encode_threadgroups_with_args(
        &mut self,
        pipeline: &Pipeline,
        args: &[(u64, KernelArg<'_>)],
        grid: MTLSize,
        threadgroup: MTLSize,
    ) {
        if let Err(error) = self.try_encode(pipeline, args, grid, threadgroup) {
            self.fault.get_or_insert(error);
        }
    }

    pub(crate) fn try_encode(
        &mut self,
        pipeline: &Pipeline,
        args: &[(u64, KernelArg<'_>)],
        grid: MTLSize,
        threadgroup: MTLSize,
    ) -> Result<()> {
        let op_kind = std::mem::take(&mut self.op_kind);
        let kernel = Arc::clone(pipeline.kernel());
        let mut bindings = Vec::with_capacity(args.len());
        for (index, arg) in args {
            let index = usize::try_from(*index)
                .map_err(|_| MlxError::expected(&kernel.name, "a buffer index", index))?;
            let buffer =
                |buffer: MlxBuffer| CapturedBinding::Buffer(buffer, kernel.accesses.of(index));
            let binding = match arg {
                KernelArg::Buffer(b) => buffer((*b).clone()),
                KernelArg::BufferWithOffset(b, offset) => buffer(from_offset(b, *offset)?),
                KernelArg::Bytes(bytes) => CapturedBinding::Bytes((*bytes).into()),
            };
            bindings.push((index, binding));
        }
        self.record(CapturedDispatch {
            kernel,
            op_kind,
            bindings,
            grid,
            threadgroup,
        })
    }

    fn record(&mut self, dispatch: CapturedDispatch) -> Result<()> {
        self.check(&dispatch)?;
        let buffers = dispatch
            .bindings
            .iter()
            .filter_map(|(_, binding)| match binding {
                CapturedBinding::Buffer(buffer, access) => Some((buffer, *access)),
                CapturedBinding::Bytes(_) => None,
            });
        let mut uses = Vec::with_capacity(dispatch.bindings.len());
        uses.extend(buffers.clone().map(|(buffer, access)| Use {
            memory: Arc::as_ptr(buffer.storage()) as usize,
            range: buffer.range(),
            writes: access.writes(),
        }));
        if !self.is_capturing() {
            let written = buffers.filter(|(_, access)| access.writes());
            self.pending_writes
                .extend(written.map(|(b, _)| PendingWrite::new(b.storage())));
        }
        let (nodes, hazards) = self.target();
        if hazards.add(&uses) {
            nodes.push(CapturedNode::Barrier);
        }
        nodes.push(CapturedNode::Dispatch(dispatch));
        Ok(())
    }

    /// Refuses a view that is out of bounds and memory of another device.
    pub(crate) fn check_buffer(
        &self,
        operand: impl FnOnce() -> String,
        buffer: &MlxBuffer,
    ) -> Result<()> {
        buffer.check()?;
        let (ours, theirs) = (self.device.backend.kind(), buffer.storage().device);
        if ours != theirs {
            return Err(MlxError::expected(
                &operand(),
                format!("memory of the {ours} device"),
                format!("memory of the {theirs} device"),
            ));
        }
        if !self.device.backend.owns_memory(&*buffer.storage().memory) {
            return Err(MlxError::expected(
                &operand(),
                format!("memory of this {ours} device"),
                format!("memory of another {ours} device"),
            ));
        }
        Ok(())
    }

    fn check(&self, dispatch: &CapturedDispatch) -> Result<()> {
        let name = &dispatch.kernel.name;
        if !self.device.backend.owns_kernel(&dispatch.kernel) {
            return Err(MlxError::expected(
                name,
                "a pipeline of this device",
                "one of another device",
            ));
        }
        for (n, (index, binding)) in dispatch.bindings.iter().enumerate() {
            if dispatch.bindings[..n].iter().any(|(i, _)| i == index) {
                let operand = format!("{name}: buffer {index}");
                return Err(MlxError::expected(&operand, "one binding", "two"));
            }
            if let CapturedBinding::Buffer(buffer, _) = binding {
                self.check_buffer(|| format!("{name}: buffer {index}"), buffer)?;
            }
        }
        let buffers = dispatch
            .bindings
            .iter()
            .filter_map(|(index, binding)| match binding {
                CapturedBinding::Buffer(buffer, access) => {
                    let memory = Arc::as_ptr(&buffer.storage().memory).cast();
                    Some((*index, memory, buffer.range(), *access))
                }
                CapturedBinding::Bytes(_) => None,
            });
        match backend::overlap(buffers) {
            None => Ok(()),
            Some((a, b)) => Err(MlxError::expected(
                &format!("{name}: buffer {a}"),
                "an output that overlaps nothing",
                format!("the memory of buffer {b}"),
            )),
        }
    }

    /// Starts running what was recorded; [`CommandEncoder::wait_until_completed`] reports how it
    /// ended. The encoder can record again at once.
    pub fn commit(&mut self) {
        let (steps, writes) = self.take_steps();
        let command: Arc<dyn Pending> = match steps {
            Err(error) => Arc::new(Refused(error)),
            Ok(steps) => self.device.backend.submit(steps),
        };
        let mut submitted = self.submitted();
        // A command that is still running is waited for by the one that follows it, which also
        // reports its failure if nobody has heard of it.
        let earlier = match submitted.take() {
            Some(mut earlier) if !earlier.reported => earlier.wait().map(|_| ()),
            _ => Ok(()),
        };
        *submitted = Some(Submitted {
            command,
            writes,
            reported: false,
            earlier,
        });
    }

    /// Takes what was recorded, with the writes it makes, or the dispatch's fault that spoils it.
    pub(crate) fn take_steps(&mut self) -> (Result<Vec<Step>>, Vec<PendingWrite>) {
        let nodes = std::mem::take(&mut self.recorded);
        let writes = std::mem::take(&mut self.pending_writes);
        self.hazards.clear();
        let steps = match self.fault.take() {
            Some(error) => Err(error),
            None => Ok(nodes
                .iter()
                .map(|node| match node {
                    CapturedNode::Barrier => Step::Barrier,
                    CapturedNode::Dispatch(dispatch) => Step::Dispatch(lower(dispatch)),
                })
                .collect()),
        };
        (steps, writes)
    }

    #[cfg(any(feature = "cuda", all(feature = "metal", target_vendor = "apple")))]
    pub(crate) fn device(&self) -> &DeviceHandle {
        &self.device
    }

    fn submitted(&self) -> std::sync::MutexGuard<'_, Option<Submitted>> {
        self.submitted
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn wait(&self) -> Result<(f64, f64)> {
        let mut submitted = self.submitted();
        let Some(last) = submitted.as_mut() else {
            return Ok((0.0, 0.0));
        };
        last.wait().map(|t| (t.start, t.end))
    }

    /// Blocks until the last commit has run and tells how it ended, or how an earlier one failed
    /// that was not waited for.
    pub fn wait_until_completed(&self) -> Result<()> {
        self.wait().map(|_| ())
    }

    /// Runs what was recorded and blocks until it is done.
    pub fn commit_and_wait(&mut self) -> Result<()> {
        self.commit();
        self.wait_until_completed()
    }

    /// As [`CommandEncoder::commit_and_wait`]; gives when the device began and ended, in seconds on
    /// its own clock.
    pub fn commit_wait_with_gpu_time(&mut self) -> Result<(f64, f64)> {
        self.commit();
        self.wait()
    }
}

impl Drop for CommandEncoder {
    /// Waits for what still runs: its buffers count as being written until then.
    fn drop(&mut self) {
        let _ = self.wait();
    }
}

/// A command that was never run.
struct Refused(MlxError);

impl Pending for Refused {
    fn wait(&self) -> Result<backend::Timing> {
        Err(self.0.clone())
    }
}

fn from_offset(buffer: &MlxBuffer, offset: u64) -> Result<MlxBuffer> {
    let size = buffer.dtype().size_of();
    let rest = usize::try_from(offset)
        .ok()
        .and_then(|offset| buffer.byte_len().checked_sub(offset));
    let Some(rest) = rest else {
        return Err(MlxError::expected(
            "buffer offset",
            format!("at most {} bytes", buffer.byte_len()),
            offset,
        ));
    };
    Ok(buffer.slice_view(offset, rest / size))
}

fn lower(dispatch: &CapturedDispatch) -> Dispatch {
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
