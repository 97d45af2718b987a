//! Commands of our own, on the device's stream.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use super::driver::{Event, Stream};
use super::gpu::Gpu;
use super::launch::{Temporary, compile_first, encode};
use crate::backend::{Pending, Step, Timing};
use crate::error::{MlxError, Result};

/// What a command uses until it has run. It is dropped once a stream says that it has.
#[derive(Default)]
struct Held {
    steps: Vec<Step>,
    temporaries: Vec<Temporary>,
}

/// Lets go of what a command uses once `waited` says that it has run. Where the wait failed nobody
/// knows whether the GPU still uses it, so it is never freed nor used again.
fn release<H>(held: H, waited: &Result<()>) {
    if waited.is_err() {
        std::mem::forget(held);
    }
}

/// Encodes into `held`. Where that fails, what was put on the stream before may be running: `wait`
/// comes before `held` is dropped.
fn encode_or_wait<H>(
    mut held: H,
    encode: impl FnOnce(&mut H) -> Result<()>,
    wait: impl FnOnce() -> Result<()>,
) -> Result<H> {
    match encode(&mut held) {
        Ok(()) => Ok(held),
        Err(error) => {
            release(held, &wait());
            Err(error)
        }
    }
}

/// A command that the GPU has, with what it touches.
struct Running {
    gpu: Arc<Gpu>,
    start: Event,
    end: Event,
    held: Held,
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

fn held(steps: Vec<Step>) -> Held {
    Held {
        steps,
        temporaries: Vec::new(),
    }
}

fn commit(gpu: &Arc<Gpu>, steps: Vec<Step>) -> Result<Running> {
    compile_first(gpu, &steps);
    let _submitting = gpu.submitting_own()?;
    let (start, end) = (gpu.event()?, gpu.event()?);
    let encode = |held: &mut Held| {
        start.record(&gpu.stream)?;
        encode(gpu, &held.steps, &gpu.stream, &mut held.temporaries)?;
        end.record(&gpu.stream)
    };
    let held = encode_or_wait(held(steps), encode, || gpu.stream.synchronize())?;
    Ok(Running {
        gpu: Arc::clone(gpu),
        start,
        end,
        held,
    })
}

impl Running {
    fn finish(self) -> Result<Timing> {
        let Self {
            gpu,
            start,
            end,
            held,
        } = self;
        let waited = end.synchronize();
        release(held, &waited);
        waited?;
        let begun = gpu.epoch.seconds_to(&start)?;
        // The difference is finer than the two distances to the epoch.
        let ended = begun + start.seconds_to(&end)?;
        gpu.give_back(start);
        gpu.give_back(end);
        Ok(Timing {
            start: begun,
            end: ended,
        })
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

    fn is_done(&self) -> bool {
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        match &*running {
            Some(running) => running.end.has_happened(),
            // Another thread is waiting for it, or has.
            None => self.outcome.get().is_some(),
        }
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
    gpu: Arc<Gpu>,
    end: Option<Arc<Event>>,
    held: Held,
}

/// Puts steps on a stream of the caller's: after all that was submitted before, and before what comes later.
pub(super) fn enqueue(gpu: &Arc<Gpu>, steps: Vec<Step>, stream: &Stream) -> Result<Enqueued> {
    compile_first(gpu, &steps);
    let mut order = gpu.submitting();
    gpu.context.enter()?;
    order.before_callers(&gpu.context, &gpu.stream, stream)?;
    let end = Arc::new(order.event(&gpu.context)?);
    let encode = |held: &mut Held| {
        encode(gpu, &held.steps, stream, &mut held.temporaries)?;
        end.record(stream)?;
        order.after_callers(stream, &end)
    };
    let held = encode_or_wait(held(steps), encode, || stream.synchronize())?;
    drop(order);
    Ok(Enqueued {
        gpu: Arc::clone(gpu),
        end: Some(end),
        held,
    })
}

impl Enqueued {
    pub(crate) fn wait(&self) -> Result<()> {
        self.end.as_ref().map_or(Ok(()), |end| end.synchronize())
    }

    pub(crate) fn is_done(&self) -> bool {
        self.end.as_ref().is_none_or(|end| end.has_happened())
    }
}

impl Drop for Enqueued {
    fn drop(&mut self) {
        let waited = self.wait();
        release(std::mem::take(&mut self.held), &waited);
        if let Some(end) = self.end.take() {
            self.gpu.submitting().give_back(end);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::rc::Rc;

    use super::*;

    /// Says in `log` when it is dropped, as scratch memory goes back to its pool.
    struct Lent(Rc<RefCell<Vec<&'static str>>>);

    impl Drop for Lent {
        fn drop(&mut self) {
            self.0.borrow_mut().push("dropped");
        }
    }

    fn failed() -> Result<()> {
        Err(MlxError::CommandBufferError("it failed".into()))
    }

    #[test]
    fn scratch_of_a_command_that_failed_goes_back_once_the_stream_is_done() {
        let log = Rc::new(RefCell::new(Vec::new()));
        let encode = |held: &mut Vec<Lent>| {
            held.push(Lent(Rc::clone(&log)));
            failed()
        };
        let wait = || {
            log.borrow_mut().push("waited");
            Ok(())
        };
        assert!(encode_or_wait(Vec::new(), encode, wait).is_err());
        assert_eq!(*log.borrow(), ["waited", "dropped"]);
    }

    #[test]
    fn scratch_is_never_lent_again_where_nobody_knows_that_the_stream_is_done() {
        let log = Rc::new(RefCell::new(Vec::new()));
        let encode = |held: &mut Vec<Lent>| {
            held.push(Lent(Rc::clone(&log)));
            failed()
        };
        assert!(encode_or_wait(Vec::new(), encode, failed).is_err());
        release(Lent(Rc::clone(&log)), &failed());
        assert!(log.borrow().is_empty());
        release(Lent(Rc::clone(&log)), &Ok(()));
        assert_eq!(*log.borrow(), ["dropped"]);
    }
}
