//! Records dispatches, orders them by what they read and write, and runs them.

use std::sync::{Arc, Mutex, PoisonError};

use bytemuck::Pod;

use super::buffer::MlxBuffer;
use super::capture::{CapturedDispatch, Name, RawDispatch, Run, named};
pub use super::capture::{CapturedNode, CapturedOpKind};
use super::device::{DeviceHandle, MlxDevice};
use super::hazards::{Hazards, Use};
pub use super::size::MTLSize;
use super::submission::{InParts, Submission, Submitted};
use super::uses::Hold;
use crate::backend::access::Access;
use crate::backend::command::Task;
use crate::backend::{Done, Pending};
use crate::error::{MlxError, Result};

/// What to bind at an index.
#[derive(Debug, Clone, Copy)]
pub enum KernelArg<'a> {
    /// A buffer, from the start of its view.
    Buffer(&'a MlxBuffer),
    /// A buffer that starts where its allocation starts, from this many bytes on. A view that starts
    /// further on is refused: programs for `mlx-native` count the offset from the allocation there, others
    /// from the view. Bind [`MlxBuffer::subview`] as [`KernelArg::Buffer`] instead.
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
    encoded_writes: Vec<Hold>,
    /// A dispatch that could not be recorded; the commit reports it and runs nothing.
    fault: Option<MlxError>,
    submitted: Mutex<Option<Arc<Submitted>>>,
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

impl MlxDevice {
    /// An encoder for this device's commands.
    ///
    /// # Errors
    /// None today: the signature is that of `mlx-native`, whose encoders can fail to open.
    pub fn command_encoder(&self) -> Result<CommandEncoder> {
        Ok(CommandEncoder::new(self.metal_device().clone()))
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
            encoded_writes: Vec::new(),
            fault: None,
            submitted: Mutex::new(None),
        }
    }

    /// Names what the next dispatch computes, for captures.
    pub fn set_op_kind(&mut self, kind: CapturedOpKind) {
        self.op_kind = kind;
    }

    /// From now on, writes dispatches down instead of recording them for a commit. A capture that was under
    /// way is dropped. What is written down holds no buffer until it is replayed.
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
    /// anew. A node reads what its operands hold when the commit runs it.
    ///
    /// # Errors
    /// As when the nodes were recorded, for this device: `InvalidArgument` for memory of another device, and what
    /// building a kernel for this one reports. Nothing is encoded then.
    pub fn replay(&mut self, nodes: &[CapturedNode]) -> Result<()> {
        // All checks first: an error must leave the encoder as it was.
        let mut replayed = Vec::with_capacity(nodes.len());
        for node in nodes {
            if let CapturedNode::Dispatch(dispatch) = node {
                self.check(dispatch)?;
                replayed.push(Some(self.adopt(dispatch)?));
            } else {
                replayed.push(None);
            }
        }
        for dispatch in replayed {
            match dispatch {
                None => self.memory_barrier(),
                Some(dispatch) => self.record(dispatch),
            }
        }
        Ok(())
    }

    /// The dispatch as this encoder's device runs it: work that another device prepared is prepared again.
    fn adopt(&self, dispatch: &CapturedDispatch) -> Result<CapturedDispatch> {
        let mut dispatch = dispatch.clone();
        if let Run::Task(task) = &mut dispatch.run
            && task.planned.device != self.device.id
        {
            task.planned = self.device.plan(task.work().clone())?;
        }
        Ok(dispatch)
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

    /// How many ranges of memory dispatches have touched since the last barrier.
    pub fn mem_ranges_len(&self) -> usize {
        match self.captured {
            Some(_) => self.capture_hazards.len(),
            None => self.hazards.len(),
        }
    }

    /// Records work over operands that were checked for it.
    pub(crate) fn task(&mut self, task: Task<MlxBuffer>, op_kind: CapturedOpKind) -> Result<()> {
        let named = std::mem::take(&mut self.op_kind);
        let dispatch = CapturedDispatch {
            run: Run::Task(task),
            op_kind: match named {
                CapturedOpKind::Other => op_kind,
                named => named,
            },
            raw: None,
        };
        self.check(&dispatch)?;
        self.record(dispatch);
        Ok(())
    }

    /// Records what a dispatch, which [`Self::check_raw`] has passed, was found to run.
    pub(crate) fn record_raw(&mut self, run: Run, raw: Arc<RawDispatch>) {
        let op_kind = std::mem::take(&mut self.op_kind);
        self.record(CapturedDispatch {
            run,
            op_kind,
            raw: Some(raw),
        });
    }

    /// Has the commit report an error and run nothing.
    pub(crate) fn refuse(&mut self, error: MlxError) {
        self.op_kind = CapturedOpKind::default();
        self.fault.get_or_insert(error);
    }

    /// Ends the capture and gives what it holds, or why a dispatch could not be recorded.
    pub(super) fn finish_capture(&mut self) -> Result<Vec<CapturedNode>> {
        let nodes = self.captured.take().ok_or_else(|| {
            MlxError::expected("capture", "one that is under way", "one that was taken")
        })?;
        self.fault.take().map_or(Ok(nodes), Err)
    }

    /// Records a dispatch that [`Self::check`] has passed.
    pub(super) fn record(&mut self, dispatch: CapturedDispatch) {
        let mut uses = Vec::new();
        for (buffer, access) in dispatch.buffers() {
            uses.push(Use {
                memory: Arc::as_ptr(buffer.storage()).addr(),
                range: buffer.range(),
                writes: access.writes(),
            });
            if access.writes() && self.captured.is_none() {
                let hold = Hold::encoded_write(buffer.storage(), buffer.range());
                self.encoded_writes.push(hold);
            }
        }
        let (nodes, hazards) = self.target();
        if hazards.add(&uses) {
            nodes.push(CapturedNode::Barrier);
        }
        nodes.push(CapturedNode::Dispatch(dispatch));
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

    /// Refuses a pipeline of another device and two bindings of one index.
    pub(crate) fn check_raw(&self, raw: &RawDispatch) -> Result<()> {
        let name = raw.kernel();
        if !self.device.backend.owns_kernel(&raw.kernel) {
            return Err(MlxError::expected(
                name,
                "a pipeline of this device",
                "one of another device",
            ));
        }
        for (n, (index, _)) in raw.bindings.iter().enumerate() {
            if raw.bindings[..n].iter().any(|(i, _)| i == index) {
                let operand = format!("{name}: buffer {index}");
                return Err(MlxError::expected(&operand, "one binding", "two"));
            }
        }
        self.check_buffers(|| raw.named())
    }

    pub(crate) fn check_task(&self, task: &Task<MlxBuffer>) -> Result<()> {
        self.check_buffers(|| named(task))
    }

    fn check(&self, dispatch: &CapturedDispatch) -> Result<()> {
        match &dispatch.run {
            Run::Task(task) => self.check_task(task),
            Run::Late(raw, ..) | Run::Foreign(raw) => self.check_raw(raw),
        }
    }

    /// Refuses what lies out of bounds or on another device, and a written operand that overlaps another.
    fn check_buffers<'b, I>(&self, buffers: impl Fn() -> I) -> Result<()>
    where
        I: Iterator<Item = (Name<'b>, &'b MlxBuffer, Access)>,
    {
        for (name, buffer, _) in buffers() {
            self.check_buffer(|| name.to_string(), buffer)?;
        }
        for (n, (name, written, access)) in buffers().enumerate() {
            if !access.writes() {
                continue;
            }
            let mut others = buffers().enumerate().filter(|(m, _)| *m != n);
            if let Some((_, (other, ..))) = others.find(|(_, (_, b, _))| b.overlaps(written)) {
                return Err(MlxError::expected(
                    &name.to_string(),
                    "an output that overlaps nothing",
                    format!("the memory of {other}"),
                ));
            }
        }
        Ok(())
    }

    /// Starts running what was recorded, and gives a handle that tells whether it has run and waits for it.
    /// Errors are told by a wait alone, the handle's or [`CommandEncoder::wait_until_completed`]; an
    /// encoder that is dropped before tells none. The encoder can record again at once.
    ///
    /// | call | blocks |
    /// |---|---|
    /// | a dispatch, [`Self::replay`] | no, but while the device compiles a kernel that it meets first |
    /// | `commit`, CPU and emulator | until the command has run, and before it those of other threads that it takes turns with |
    /// | `commit`, CUDA and Metal | until the encoder's commit before this one has run, unless that was waited for: two commands of an encoder are on the GPU at most; before a raw dispatch whose params lie in a buffer, until what precedes it has run |
    /// | [`Submission::is_done`] | no |
    /// | [`Submission::wait`], [`Self::wait_until_completed`], dropping the encoder | until the command has run |
    ///
    /// Where a command of another thread writes bytes that this one touches, or touches bytes that this one
    /// writes, the two run one after the other, whole, in the order of their commits. A thread of rayon's
    /// does not wait for another command: there such a commit is refused. A GPU's queue or stream orders
    /// commands in the order of their commits.
    ///
    /// A commit that writes what the host reads through a guard, or touches what the host writes through
    /// one, is refused too, with an error that names the buffer. What is refused has run nothing and is
    /// no longer recorded.
    pub fn commit(&mut self) -> Submission {
        let backend = Arc::clone(&self.device.backend);
        let mut began = None;
        let (command, mut holds) = self.submit_with(
            |steps| {
                let timing = backend.submit(steps).wait()?;
                began.get_or_insert(timing.start);
                Ok(())
            },
            |steps| Ok(backend.submit(steps)),
        );
        let command: Arc<dyn Pending> = match (command, began) {
            (Err(error), _) => {
                holds.clear();
                Arc::new(Done(Err(error)))
            }
            (Ok(command), None) => command,
            (Ok(rest), Some(start)) => Arc::new(InParts { start, rest }),
        };
        let mut submitted = self.submitted();
        // A command that is still running is waited for by the one that follows it, which also
        // reports its failure if nobody has heard of it.
        let earlier = submitted.take().map_or(Ok(()), |earlier| earlier.unheard());
        let new = Arc::new(Submitted::new(command, holds, earlier));
        *submitted = Some(Arc::clone(&new));
        Submission::new(new)
    }

    /// Takes what was recorded, with what holds its writes, or the dispatch's fault that spoils it.
    pub(super) fn take_recorded(&mut self) -> (Result<Vec<CapturedNode>>, Vec<Hold>) {
        let nodes = std::mem::take(&mut self.recorded);
        let writes = std::mem::take(&mut self.encoded_writes);
        self.hazards.clear();
        // While it captures, the fault may be a captured dispatch's: the capture's end must see it, too.
        let fault = match self.captured {
            Some(_) => self.fault.clone(),
            None => self.fault.take(),
        };
        (fault.map_or(Ok(nodes), Err), writes)
    }

    pub(crate) fn device(&self) -> &DeviceHandle {
        &self.device
    }

    fn submitted(&self) -> std::sync::MutexGuard<'_, Option<Arc<Submitted>>> {
        self.submitted
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn wait(&self) -> Result<(f64, f64)> {
        // The lock is not held meanwhile.
        let last = self.submitted().clone();
        last.map_or(Ok((0.0, 0.0)), |last| {
            last.wait_for_all().map(|t| (t.start, t.end))
        })
    }

    /// Blocks until the last commit has run and tells how it ended, or how an earlier one failed
    /// that was not waited for.
    ///
    /// # Errors
    /// How the command failed: `InvalidArgument` where the commit was refused, `CommandBufferError` where the
    /// device failed.
    pub fn wait_until_completed(&self) -> Result<()> {
        self.wait().map(|_| ())
    }

    /// Runs what was recorded and blocks until it is done.
    ///
    /// # Errors
    /// As for [`Self::wait_until_completed`].
    pub fn commit_and_wait(&mut self) -> Result<()> {
        self.commit();
        self.wait_until_completed()
    }

    /// As [`CommandEncoder::commit_and_wait`]; gives when the device began and ended, in seconds on
    /// its own clock.
    ///
    /// # Errors
    /// As for [`Self::wait_until_completed`].
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

pub(crate) fn from_offset(buffer: &MlxBuffer, offset: u64) -> Result<MlxBuffer> {
    if buffer.byte_offset() != 0 {
        return Err(MlxError::expected(
            "BufferWithOffset",
            "a buffer that starts at byte 0 of its allocation",
            format!(
                "a view that starts at byte {}: whether byte {offset} counts from the allocation or from \
                 the view is ambiguous; bind a `subview` as `Buffer`",
                buffer.byte_offset()
            ),
        ));
    }
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
    Ok(buffer.subview(offset, rest / size))
}
