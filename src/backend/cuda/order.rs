//! The order of work on several streams: what is submitted later runs later, on the device's own stream and on callers'.
//!
//! A stream waits for another when it gets work, and only for one that got work since it did last: dispatch after dispatch
//! on one caller's stream needs no wait.

use std::sync::Arc;

use super::driver::{Context, Event, Stream};
use crate::error::Result;

/// Most events that are kept to be used again.
const KEPT_EVENTS: usize = 64;

/// What was submitted last. Held while a stream gets work.
#[derive(Debug)]
pub(super) struct Order {
    /// The caller's stream that got work last, by its id, and where that work ends: all that was submitted before runs
    /// before that, but for what `own` stands for. None where the device's own stream waits for all.
    caller: Option<(u64, Arc<Event>)>,
    /// Whether the device's own stream may have work that `caller` does not wait for.
    own: bool,
    spare: Vec<Event>,
}

impl Order {
    pub(super) fn new() -> Self {
        Self {
            caller: None,
            own: true,
            spare: Vec::new(),
        }
    }

    /// Makes the device's own stream wait for the callers' work.
    pub(super) fn join(&self, own: &Stream) -> Result<()> {
        match &self.caller {
            Some((_, end)) => own.wait(end),
            None => Ok(()),
        }
    }

    /// The same, before it gets work that later work waits for.
    pub(super) fn before_own(&mut self, own: &Stream) -> Result<()> {
        self.join(own)?;
        self.own = true;
        if let Some((_, end)) = self.caller.take() {
            self.give_back(end);
        }
        Ok(())
    }

    /// Makes a caller's stream wait for what was submitted before.
    pub(super) fn before_callers(
        &mut self,
        context: &Arc<Context>,
        own: &Stream,
        stream: &Stream,
    ) -> Result<()> {
        let id = stream.id()?;
        if let Some((other, end)) = &self.caller
            && *other != id
        {
            stream.wait(end)?;
        }
        if self.own {
            let before = self.event(context)?;
            before.record(own)?;
            stream.wait(&before)?;
            // A stream waits for what the event stood for when it was told to.
            self.give_back(Arc::new(before));
        }
        Ok(())
    }

    /// After a caller's stream got work that ends at `end`.
    pub(super) fn after_callers(&mut self, stream: &Stream, end: &Arc<Event>) -> Result<()> {
        let last = self.caller.replace((stream.id()?, Arc::clone(end)));
        self.own = false;
        if let Some((_, end)) = last {
            self.give_back(end);
        }
        Ok(())
    }

    /// An event that streams wait for.
    pub(super) fn event(&mut self, context: &Arc<Context>) -> Result<Event> {
        let kept = self.spare.pop();
        kept.map_or_else(|| Event::without_time(context), Ok)
    }

    /// Keeps the event for later, once nobody else has it.
    pub(super) fn give_back(&mut self, event: Arc<Event>) {
        if let Some(event) = Arc::into_inner(event)
            && self.spare.len() < KEPT_EVENTS
        {
            self.spare.push(event);
        }
    }
}
