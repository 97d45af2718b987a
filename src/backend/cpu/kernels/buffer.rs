//! Memory that outlives a call, so that small problems neither allocate nor fault pages in.

use std::sync::Mutex;

use crate::error::{MlxError, Result};

/// An empty vector with room for `count`. What grows with a caller's sizes is asked for here: too much
/// is an error, not the end of the process.
pub(crate) fn room<T>(count: usize) -> Result<Vec<T>> {
    let mut room = Vec::new();
    room.try_reserve_exact(count)
        .map_err(|_| MlxError::BufferAllocationError {
            bytes: count.saturating_mul(size_of::<T>()),
        })?;
    Ok(room)
}

/// A cache line; only ever reached by address.
#[allow(dead_code)]
#[derive(Debug, Clone, Copy)]
#[repr(align(64))]
struct Line([u32; 16]);

/// Four-byte words, aligned to a cache line.
#[derive(Debug, Default)]
pub(super) struct Buffer(Vec<Line>);

impl Buffer {
    /// Room for `words`, whose number has a bound; what they hold is unspecified, but initialized.
    pub(super) fn reserve(&mut self, words: usize) -> *mut u32 {
        let lines = words.div_ceil(16);
        if self.0.len() < lines {
            // Nothing worth copying to a larger place.
            self.0.clear();
            self.0.resize(lines, Line([0; 16]));
        }
        self.0.as_mut_ptr().cast()
    }

    /// As [`Self::reserve`], for much memory, which may not be there.
    pub(super) fn try_reserve(&mut self, words: usize) -> Result<*mut u32> {
        let lines = words.div_ceil(16);
        if self.0.capacity() < lines {
            self.0 = Vec::new();
            self.0 = room(lines)?;
        }
        Ok(self.reserve(words))
    }

    fn bytes(&self) -> usize {
        self.0.len() * size_of::<Line>()
    }
}

/// Memory kept for the next call's packed keys and values.
static SHARED: Mutex<Option<Buffer>> = Mutex::new(None);

/// What is worth keeping between calls, in bytes.
const KEEP: usize = 9 << 20;

/// Lends a buffer that all threads of a call share.
pub(super) fn with_shared<R>(body: impl FnOnce(&mut Buffer) -> R) -> R {
    let mut buffer = SHARED
        .lock()
        .map_or(None, |mut kept| kept.take())
        .unwrap_or_default();
    let result = body(&mut buffer);
    if buffer.bytes() <= KEEP
        && let Ok(mut kept) = SHARED.lock()
    {
        *kept = Some(buffer);
    }
    result
}
