//! Commands of our own: command buffers with one concurrent encoder each, one where that is enough.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use objc2::msg_send;
use objc2::rc::{Retained, autoreleasepool};
use objc2::runtime::ProtocolObject;
use objc2_foundation::{NSError, ns_string};
use objc2_metal::{
    MTLCommandBuffer, MTLCommandBufferStatus, MTLCommandEncoder, MTLCommandQueue,
    MTLComputeCommandEncoder, MTLDevice, MTLDispatchType, MTLFence,
};

use super::device::Metal;
use super::encode::{Temporary, encode_into};
use super::launch::{self, Step};
use super::lowering;
use super::split;
use super::target::DirectTarget;
use crate::backend::{self, Pending, Timing};
use crate::error::{DriverError, MlxError, Result};

/// A command that the GPU has, with what it touches: until it has run, the host may not write that.
struct Running {
    /// In the order in which they run; at least one.
    buffers: Vec<CommandBuffer>,
    /// Kept, and not looked at again.
    #[allow(dead_code)]
    steps: Vec<Vec<Step>>,
    #[allow(dead_code)]
    temporaries: Vec<Temporary>,
}

type CommandBuffer = Retained<ProtocolObject<dyn MTLCommandBuffer>>;

// SAFETY: the command buffers are committed, so all that is left is to wait for them and to read how
// they ended, which Metal allows on any thread; `Committed` does it under a lock.
unsafe impl Send for Running {}

/// A command that was submitted, or why it was not.
struct Committed {
    running: Mutex<Option<Running>>,
    outcome: OnceLock<Result<Timing>>,
}

pub(super) fn submit(metal: &Metal, steps: &[backend::Step]) -> Arc<dyn Pending> {
    let committed = match autoreleasepool(|_| commit(metal, steps)) {
        Ok(running) => Committed {
            running: Mutex::new(Some(running)),
            outcome: OnceLock::new(),
        },
        Err(error) => Committed {
            running: Mutex::new(None),
            outcome: OnceLock::from(Err(error)),
        },
    };
    Arc::new(committed)
}

/// Commits the steps in as many command buffers as keep each within the time that the system gives it.
/// A fence makes each wait for the one before it, also where what they touch is not hazard-tracked.
fn commit(metal: &Metal, steps: &[backend::Step]) -> Result<Running> {
    let steps = launch::dispatches(steps)?;
    let commands = split::commands(steps, split::COMMAND_FLOPS);
    let fence = match commands.len() {
        0 | 1 => None,
        _ => Some(metal.device().newFence().ok_or_else(|| refused("fence"))?),
    };
    // What is at fault in the steps is found before the first of them runs.
    for steps in &commands {
        lowering::lower(steps)?;
    }
    let mut running = Running {
        buffers: Vec::with_capacity(commands.len()),
        steps: Vec::new(),
        temporaries: Vec::new(),
    };
    for (i, steps) in commands.iter().enumerate() {
        let temporaries = &mut running.temporaries;
        match encode(metal, steps, i > 0, fence.as_deref(), temporaries) {
            // Committed at once: a queue hands out no more than 64 that have not run.
            Ok(buffer) => {
                buffer.commit();
                running.buffers.push(buffer);
            }
            Err(error) => {
                // What was committed uses what is dropped now.
                for buffer in &running.buffers {
                    buffer.waitUntilCompleted();
                }
                return Err(error);
            }
        }
    }
    running.steps = commands;
    Ok(running)
}

fn refused(what: &str) -> MlxError {
    MlxError::CommandBufferError(format!("the GPU gave no {what}"))
}

/// Encodes steps into a command buffer of their own, which is not committed yet.
fn encode(
    metal: &Metal,
    steps: &[Step],
    waits: bool,
    fence: Option<&ProtocolObject<dyn MTLFence>>,
    temporaries: &mut Vec<Temporary>,
) -> Result<CommandBuffer> {
    let label = ns_string!("mlx-flash-attn");
    let buffer = metal
        .queue()
        .commandBuffer()
        .ok_or_else(|| refused("command buffer"))?;
    buffer.setLabel(Some(label));
    let encoder = buffer
        .computeCommandEncoderWithDispatchType(MTLDispatchType::Concurrent)
        .ok_or_else(|| refused("compute encoder"))?;
    encoder.setLabel(Some(label));
    if let Some(fence) = fence.filter(|_| waits) {
        encoder.waitForFence(fence);
    }
    // SAFETY: the encoder is open and ours alone; every range lies inside its memory, and `ops`
    // binds what its kernels read; the command buffer retains what is bound.
    let mut target = unsafe { DirectTarget::new(&encoder) };
    let encoded = encode_into(metal.device(), steps, &mut target);
    if let Some(fence) = fence {
        encoder.updateFence(fence);
    }
    // An encoder must be ended before it is dropped, also where nothing is committed.
    encoder.endEncoding();
    temporaries.extend(encoded?);
    Ok(buffer)
}

impl Pending for Committed {
    fn wait(&self) -> Result<Timing> {
        let wait = || {
            let running = self
                .running
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take();
            match running {
                Some(running) => autoreleasepool(|_| finish(&running.buffers)),
                None => Err(MlxError::CommandBufferError("the command is gone".into())),
            }
        };
        self.outcome.get_or_init(wait).clone()
    }

    fn is_done(&self) -> bool {
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let ended = |buffer: &CommandBuffer| {
            let status = buffer.status();
            status == MTLCommandBufferStatus::Completed || status == MTLCommandBufferStatus::Error
        };
        match &*running {
            Some(running) => running.buffers.iter().all(ended),
            // Another thread is waiting for it, or has.
            None => self.outcome.get().is_some(),
        }
    }
}

/// What Metal has to say of a command that failed.
fn reported(error: &NSError) -> DriverError {
    DriverError {
        code: error.code() as i64,
        name: error.domain().to_string(),
        message: error.localizedDescription().to_string(),
    }
}

/// Waits for all, then tells when the first began and the last ended, or why one failed.
fn finish(buffers: &[CommandBuffer]) -> Result<Timing> {
    for buffer in buffers {
        buffer.waitUntilCompleted();
    }
    let mut whole: Option<Timing> = None;
    for buffer in buffers {
        if buffer.status() != MTLCommandBufferStatus::Completed {
            return Err(buffer.error().map_or_else(
                || {
                    let message = "the GPU did not complete it and gave no reason";
                    MlxError::CommandBufferError(message.into())
                },
                |error| reported(&error).while_doing("Metal: the command"),
            ));
        }
        let Timing { start, end } = times(buffer);
        whole = Some(Timing {
            start: whole.map_or(start, |whole| whole.start),
            end,
        });
    }
    whole.ok_or_else(|| MlxError::CommandBufferError("the command is gone".into()))
}

/// When the GPU began and ended. Sent by hand: the typed methods would bring another crate, for a
/// name of `f64`.
fn times(buffer: &ProtocolObject<dyn MTLCommandBuffer>) -> Timing {
    // SAFETY: the method takes nothing and returns a double.
    let start = unsafe { msg_send![buffer, GPUStartTime] };
    // SAFETY: as above.
    let end = unsafe { msg_send![buffer, GPUEndTime] };
    Timing { start, end }
}
