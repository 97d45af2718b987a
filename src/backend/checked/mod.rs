//! Dispatches read back: what params, constants and bindings of this crate's kernels say, with every
//! size checked, for they may come from any caller of the encoder. No device is given a dispatch that
//! neither `ops` made of a checked problem nor [`check`] has passed.

mod args;
pub(crate) mod launch;
mod masks;
mod params;
mod prefill;
mod vec;

pub(crate) use args::{Args, Span};
pub(crate) use launch::check;
pub(crate) use masks::{Classes, Fill};
pub(crate) use params::params;
pub(crate) use prefill::Prefill;
pub(super) use prefill::Stated;
pub(crate) use vec::{Partials, Reduce};

/// Addresses of a problem's operands. Whoever makes one promises that each pointer is valid for the
/// elements that [`Problem::operand`] asks for, aligned for its dtype, that outputs overlap nothing
/// else, and that nobody else writes any of it while the job runs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pointers {
    pub(crate) q: *const u8,
    pub(crate) k: *const u8,
    pub(crate) v: *const u8,
    pub(crate) o: *mut u8,
    /// Null without a mask.
    pub(crate) mask: *const u8,
    /// Null without tile classes.
    pub(crate) tile_classes: *const u8,
    /// Null without sinks.
    pub(crate) sinks: *const f32,
    /// Null without ALiBi.
    pub(crate) alibi_slopes: *const f32,
    /// Null without a log-sum-exp output.
    pub(crate) lse: *mut f32,
}

// SAFETY: the pointers are only addresses; the promise above makes their use from several threads
// sound, since kernels write disjoint rows.
unsafe impl Send for Pointers {}
// SAFETY: as above.
unsafe impl Sync for Pointers {}
