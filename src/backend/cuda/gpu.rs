//! What everything of one GPU shares.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::driver::{Context, Event, Stream};
use super::fit::Machine;
use super::images::Images;
use super::modules::{Function, Modules};
use super::options::CudaOptions;
use super::order::Order;
use super::scratch::Pool;
use super::spec::Spec;
use super::table::Capability;
use crate::error::Result;

/// What everything of one GPU shares.
#[derive(Debug)]
pub(crate) struct Gpu {
    pub(super) modules: Modules,
    pub(super) pool: Pool,
    /// Events to use again.
    events: Mutex<Vec<Event>>,
    /// Held while a command is put on a stream, so that commands follow each other whole, and what a command
    /// uploads on a caller's stream counts as uploaded only where others wait for it.
    order: Mutex<Order>,
    /// When the clock that timings are read from began.
    pub(super) epoch: Event,
    pub(super) stream: Stream,
    /// The capability whose rows of the table it takes.
    pub(super) rows: Capability,
    pub(super) context: Arc<Context>,
}

impl Gpu {
    /// Opens a GPU.
    pub(super) fn open(options: CudaOptions, images: Option<Arc<Images>>) -> Result<Self> {
        let context = Context::open(options.ordinal)?;
        let rows = options.kernels.rows(context.capability)?;
        let stream = Stream::create(&context)?;
        let epoch = Event::create(&context)?;
        epoch.record(&stream)?;
        Ok(Self {
            modules: Modules::new(images),
            pool: Pool::default(),
            events: Mutex::default(),
            order: Mutex::new(Order::new()),
            epoch,
            stream,
            rows,
            context,
        })
    }

    pub(super) fn event(&self) -> Result<Event> {
        let kept = self
            .events
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop();
        kept.map_or_else(|| Event::create(&self.context), Ok)
    }

    pub(super) fn give_back(&self, event: Event) {
        let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        if events.len() < 64 {
            events.push(event);
        }
    }

    /// The right to put a command on a stream of this GPU.
    pub(super) fn submitting(&self) -> MutexGuard<'_, Order> {
        self.order.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The right to put work on the device's own stream, which waits for all that was submitted before.
    pub(super) fn submitting_own(&self) -> Result<MutexGuard<'_, Order>> {
        let mut order = self.submitting();
        self.context.enter()?;
        order.before_own(&self.stream)?;
        Ok(order)
    }

    /// Makes the device's own stream wait for all that was submitted on callers'.
    pub(super) fn join(&self) -> Result<()> {
        self.context.enter()?;
        self.submitting().join(&self.stream)
    }

    pub(super) fn machine(&self) -> Machine {
        Machine {
            processors: self.context.processors as usize,
            l2_bytes: self.context.l2_bytes,
        }
    }

    pub(super) fn function(&self, spec: &Spec) -> Result<Arc<Function>> {
        self.modules.get(&self.context, spec)
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // What is still on the stream may use what is freed next.
        if self.context.enter().is_ok() {
            let _: Result<()> = self.stream.synchronize();
        }
    }
}
