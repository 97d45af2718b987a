//! Copies of a buffer's bytes that its handle keeps, so that a plain slice can be given out while
//! later commands write the buffer.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use super::uses::Storage;
use crate::backend::Memory;
use crate::backend::access::Access;
use crate::backend::host_memory::HostMemory;
use crate::error::Result;

/// A copy of a view's bytes.
#[derive(Debug)]
pub(super) struct Snapshot {
    pub(super) memory: HostMemory,
    /// The allocation's version that was copied.
    pub(super) version: u64,
}

/// The copies of one handle, oldest first. One that was given out stays until [`Snapshots::clear`].
#[derive(Debug, Default)]
pub(super) struct Snapshots(Mutex<Vec<Snapshot>>);

impl Snapshots {
    /// Address of a copy of `range` as it is now: the last one where that is still right, else a new
    /// one. It stays as it is until `clear` or drop.
    pub(super) fn of(&self, storage: &Storage, range: Range<usize>) -> Result<*const u8> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (new, version) = storage.snapshot(range, kept.last())?;
        match (new, kept.last_mut()) {
            (None, Some(last)) => {
                last.version = version;
                Ok(last.memory.host(Access::Read)?)
            }
            (new, _) => {
                let memory = new.map_or_else(|| HostMemory::zeroed(0), Ok)?;
                let at = memory.host(Access::Read)?;
                kept.push(Snapshot { memory, version });
                Ok(at)
            }
        }
    }

    /// Frees the copies. No slice shows them: the handle is borrowed mutably.
    pub(super) fn clear(&mut self) {
        self.0
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).len()
    }
}
