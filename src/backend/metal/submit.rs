//! Commands of our own: one command buffer with one concurrent encoder each.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use objc2::msg_send;
use objc2::rc::{Retained, autoreleasepool};
use objc2::runtime::ProtocolObject;
use objc2_foundation::ns_string;
use objc2_metal::{
    MTLCommandBuffer, MTLCommandBufferStatus, MTLCommandEncoder, MTLCommandQueue, MTLDispatchType,
};

use super::device::Metal;
use super::encode::{Temporary, encode_into};
use super::target::DirectTarget;
use crate::backend::{Pending, Step, Timing};
use crate::error::{MlxError, Result};

/// A command that the GPU has, with what it touches: until it has run, the host may not write that.
struct Running {
    buffer: Retained<ProtocolObject<dyn MTLCommandBuffer>>,
    _steps: Vec<Step>,
    _temporaries: Vec<Temporary>,
}

// SAFETY: the command buffer is committed, so all that is left is to wait for it and to read how it
// ended, which Metal allows on any thread; `Committed` does it under a lock.
unsafe impl Send for Running {}

/// A command that was submitted, or why it was not.
struct Committed {
    running: Mutex<Option<Running>>,
    outcome: OnceLock<Result<Timing>>,
}

pub(super) fn submit(metal: &Metal, steps: Vec<Step>) -> Arc<dyn Pending> {
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

fn commit(metal: &Metal, steps: Vec<Step>) -> Result<Running> {
    let label = ns_string!("mlx-flash-attn");
    let refused = |what: &str| MlxError::CommandBufferError(format!("the GPU gave no {what}"));
    let buffer = metal
        .queue()
        .commandBuffer()
        .ok_or_else(|| refused("command buffer"))?;
    buffer.setLabel(Some(label));
    let encoder = buffer
        .computeCommandEncoderWithDispatchType(MTLDispatchType::Concurrent)
        .ok_or_else(|| refused("compute encoder"))?;
    encoder.setLabel(Some(label));
    // SAFETY: the encoder is open and ours alone; every range lies inside its memory, and `ops`
    // binds what its kernels read; the command buffer retains what is bound.
    let mut target = unsafe { DirectTarget::new(&encoder) };
    let encoded = encode_into(metal.device(), &steps, &mut target);
    // An encoder must be ended before it is dropped, also where nothing is committed.
    encoder.endEncoding();
    let temporaries = encoded?;
    buffer.commit();
    Ok(Running {
        buffer,
        _steps: steps,
        _temporaries: temporaries,
    })
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
                Some(running) => autoreleasepool(|_| finish(&running.buffer)),
                None => Err(MlxError::CommandBufferError("the command is gone".into())),
            }
        };
        self.outcome.get_or_init(wait).clone()
    }
}

fn finish(buffer: &ProtocolObject<dyn MTLCommandBuffer>) -> Result<Timing> {
    buffer.waitUntilCompleted();
    if buffer.status() == MTLCommandBufferStatus::Completed {
        return Ok(times(buffer));
    }
    let message = buffer.error().map_or_else(
        || "the GPU did not complete it and gave no reason".into(),
        |error| error.localizedDescription().to_string(),
    );
    Err(MlxError::CommandBufferError(message))
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
