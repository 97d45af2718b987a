//! One thread's working memory.

use std::cell::Cell;

use super::buffer::Buffer;
use super::careful::Careful;
use super::tile::TileBuffers;

/// What a thread keeps from one call to the next.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    pub(super) tile: TileBuffers,
    /// A packed strip of K.
    pub(super) keys: Buffer,
    /// A packed strip of V.
    pub(super) values: Buffer,
    pub(super) careful: Careful,
}

thread_local! {
    static SCRATCH: Cell<Option<Box<Scratch>>> = const { Cell::new(None) };
}

/// Lends this thread's scratch.
pub(super) fn with_scratch<R>(body: impl FnOnce(&mut Scratch) -> R) -> R {
    let mut scratch = SCRATCH.take().unwrap_or_default();
    let result = body(&mut scratch);
    SCRATCH.set(Some(scratch));
    result
}
