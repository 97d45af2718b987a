//! Commands of our own, on the device's stream.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use super::driver::{Event, Stream};
use super::gpu::Gpu;
use super::launch::{Temporary, encode};
use crate::backend::{Pending, Step, Timing};
use crate::error::{MlxError, Result};

/// A command that the GPU has, with what it touches.
struct Running {
    gpu: Arc<Gpu>,
    start: Event,
    end: Event,
    _steps: Vec<Step>,
    _temporaries: Vec<Temporary>,
}

/// A command that was submitted, or why it was not.
struct Committed {
    running: Mutex<Option<Running>>,
    outcome: OnceLock<Result<Timing>>,
}

pub(super) fn submit(gpu: &Arc<Gpu>, steps: Vec<Step>) -> Arc<dyn Pending> {
    let (running, outcome) = match commit(gpu, steps) {
        Ok(running) => (Some(running), OnceLock::new()),
        Err(error) => (None, OnceLock::from(Err(error))),
    };
    Arc::new(Committed {
        running: Mutex::new(running),
        outcome,
    })
}

fn commit(gpu: &Arc<Gpu>, steps: Vec<Step>) -> Result<Running> {
    gpu.context.enter()?;
    let (start, end) = (gpu.event()?, gpu.event()?);
    start.record(&gpu.stream)?;
    let temporaries = match encode(gpu, &steps, &gpu.stream) {
        Ok(temporaries) => temporaries,
        Err(error) => {
            // Dispatches before the one that failed may be running on what is dropped now.
            let _ = gpu.stream.synchronize();
            return Err(error);
        }
    };
    end.record(&gpu.stream)?;
    Ok(Running {
        gpu: Arc::clone(gpu),
        start,
        end,
        _steps: steps,
        _temporaries: temporaries,
    })
}

impl Running {
    fn finish(self) -> Result<Timing> {
        self.end.synchronize()?;
        let start = self.gpu.epoch.seconds_to(&self.start)?;
        // The difference is finer than the two distances to the epoch.
        let end = start + self.start.seconds_to(&self.end)?;
        let gpu = Arc::clone(&self.gpu);
        let Self {
            start: first,
            end: last,
            ..
        } = self;
        gpu.give_back(first);
        gpu.give_back(last);
        Ok(Timing { start, end })
    }
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
                Some(running) => running.finish(),
                None => Err(MlxError::CommandBufferError("the command is gone".into())),
            }
        };
        self.outcome.get_or_init(wait).clone()
    }
}

impl Drop for Committed {
    /// What the command touches is kept until it has run.
    fn drop(&mut self) {
        let running = self
            .running
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(running) = running.take() {
            let _ = running.finish();
        }
    }
}

/// A command on a stream of the caller's, with what it touches. Dropping it waits.
pub(crate) struct Enqueued {
    end: Event,
    _steps: Vec<Step>,
    _temporaries: Vec<Temporary>,
}

/// Puts steps on a stream of the caller's: after what our own stream has, and before what it gets.
pub(super) fn enqueue(gpu: &Arc<Gpu>, steps: Vec<Step>, stream: &Stream) -> Result<Enqueued> {
    gpu.context.enter()?;
    let (before, end) = (gpu.event()?, gpu.event()?);
    before.record(&gpu.stream)?;
    stream.wait(&before)?;
    let encoded = encode(gpu, &steps, stream);
    let ordered = end.record(stream).and_then(|()| gpu.stream.wait(&end));
    if encoded.is_err() || ordered.is_err() {
        // What was queued before may be running on what is dropped now.
        let _ = stream.synchronize();
    }
    let temporaries = encoded?;
    ordered?;
    gpu.give_back(before);
    Ok(Enqueued {
        end,
        _steps: steps,
        _temporaries: temporaries,
    })
}

impl Enqueued {
    pub(crate) fn wait(&self) -> Result<()> {
        self.end.synchronize()
    }
}

impl Drop for Enqueued {
    fn drop(&mut self) {
        let _ = self.wait();
    }
}
