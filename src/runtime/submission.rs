//! Commands that were committed: asked whether they have run, and waited for.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::uses::Hold;
use crate::backend::{Pending, Timing};
use crate::error::Result;

/// A command that [`commit`](super::encoder::CommandEncoder::commit) has handed to its device. Its encoder
/// keeps it too, so dropping this neither waits nor changes anything.
///
/// ```
/// # use mlx_flash_attn::MlxDevice;
/// # fn main() -> mlx_flash_attn::Result<()> {
/// let mut encoder = MlxDevice::new()?.command_encoder()?;
/// let command = encoder.commit();
/// while !command.is_done() {
///     // Something else.
/// }
/// command.wait()?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Submission(Arc<Submitted>);

impl Submission {
    pub(super) fn new(submitted: Arc<Submitted>) -> Self {
        Self(submitted)
    }

    /// Whether the command has run, failed or was refused; never blocks. Once it says so, the host may use
    /// the command's buffers as after [`Self::wait`], which then returns at once.
    ///
    /// On CUDA this queries an event behind the command, on Metal the status of the command buffers. On the
    /// CPU and the emulator a command has run when `commit` returns.
    pub fn is_done(&self) -> bool {
        let done = self.0.command.is_done();
        if done {
            // Returns at once; the error, if it failed, is for a wait to tell.
            let _ = self.0.finish();
        }
        done
    }

    /// Blocks until the command has run. The same answer every time, whoever else waits for it.
    ///
    /// # Errors
    /// Why the command was refused, as [`commit`](super::encoder::CommandEncoder::commit) lists it, or
    /// `CommandBufferError` where it failed while it ran.
    pub fn wait(&self) -> Result<()> {
        self.0.wait().map(|_| ())
    }
}

impl fmt::Debug for Submission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Submission").finish_non_exhaustive()
    }
}

/// A committed command, as its encoder and its handles share it.
pub(super) struct Submitted {
    command: Arc<dyn Pending>,
    state: Mutex<State>,
}

struct State {
    /// What the command touches, held until it is known to have run.
    holds: Vec<Hold>,
    /// Whether a wait has told how it ended.
    reported: bool,
    /// How an earlier commit of the encoder ended that nobody waited for.
    earlier: Result<()>,
    /// Whether a wait of the encoder has told that.
    earlier_reported: bool,
}

impl Submitted {
    pub(super) fn new(command: Arc<dyn Pending>, holds: Vec<Hold>, earlier: Result<()>) -> Self {
        Self {
            command,
            state: Mutex::new(State {
                holds,
                reported: false,
                earlier,
                earlier_reported: false,
            }),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until it has run and lets go of what it touched. The lock is not held meanwhile, so that
    /// others can ask whether it is done.
    fn finish(&self) -> Result<Timing> {
        let timing = self.command.wait();
        self.state().holds.clear();
        timing
    }

    fn wait(&self) -> Result<Timing> {
        let timing = self.finish();
        self.state().reported = true;
        timing
    }

    /// Waits for it; an earlier commit's failure that nobody has heard of comes first.
    pub(super) fn wait_for_all(&self) -> Result<Timing> {
        let timing = self.wait();
        let mut state = self.state();
        state.earlier_reported = true;
        state.earlier.clone().and(timing)
    }

    /// How it and the commits before it ended, as far as nobody has heard of it.
    pub(super) fn unheard(&self) -> Result<()> {
        let state = self.state();
        let reported = state.reported;
        // A handle's wait tells how its own command ended, not how an earlier one did.
        if !state.earlier_reported {
            state.earlier.clone()?;
        }
        drop(state);
        if reported {
            return Ok(());
        }
        self.wait().map(|_| ())
    }
}

/// A command whose first part has run.
pub(super) struct InParts {
    pub(super) start: f64,
    pub(super) rest: Arc<dyn Pending>,
}

impl Pending for InParts {
    fn wait(&self) -> Result<Timing> {
        let rest = self.rest.wait()?;
        Ok(Timing {
            start: self.start,
            ..rest
        })
    }

    fn is_done(&self) -> bool {
        self.rest.is_done()
    }
}
