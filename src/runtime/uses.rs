//! Who uses which bytes of an allocation: guards of the host, and commands from their encoding until
//! they have run. One lock an allocation decides who may start, so that the host and a command never
//! touch a byte at once when either writes it.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::snapshot::Snapshot;
use crate::backend::access::Access;
use crate::backend::host_memory::HostMemory;
use crate::backend::{DeviceKind, Memory};
use crate::error::{MlxError, Result};

/// What holds bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Holder {
    /// A dispatch that writes them is encoded and has not finished.
    EncodedWrite,
    /// A committed command reads them and has not finished.
    RunningRead,
    /// A committed command writes them and has not finished.
    RunningWrite,
    /// The host reads them through a guard.
    LentRead,
    /// The host writes them through a guard.
    LentWrite,
}

impl Holder {
    /// Whether `self` may not start while `other` holds a byte of the same range. Two commands never
    /// exclude each other here: they take turns.
    fn excludes(self, other: Self) -> bool {
        use Holder::{EncodedWrite, LentRead, LentWrite, RunningRead, RunningWrite};
        match self {
            EncodedWrite => false,
            RunningRead => other == LentWrite,
            RunningWrite => matches!(other, LentRead | LentWrite),
            LentRead => matches!(other, EncodedWrite | RunningWrite | LentWrite),
            LentWrite => true,
        }
    }

    fn writes(self) -> bool {
        matches!(
            self,
            Self::EncodedWrite | Self::RunningWrite | Self::LentWrite
        )
    }

    fn lent(self) -> bool {
        matches!(self, Self::LentRead | Self::LentWrite)
    }

    /// What a user reads about it, and what to do.
    fn describe(self) -> &'static str {
        match self {
            Self::EncodedWrite | Self::RunningWrite => {
                "a command that writes it is encoded and has not been waited for; commit it and wait first"
            }
            Self::RunningRead => {
                "a command that reads it is committed and has not been waited for; wait first"
            }
            Self::LentRead => "a read guard lends it to the host; drop the guard first",
            Self::LentWrite => "a write guard lends it to the host; drop the guard first",
        }
    }
}

/// The holders of one allocation.
#[derive(Debug, Default)]
struct Uses {
    /// How often each holder holds a range, given by its start and end.
    entries: BTreeMap<(usize, usize, Holder), usize>,
    /// Counts ends of writes, so that a copy of the bytes is known to be current.
    version: u64,
    /// The bytes may change without a holder: a raw pointer to them was given out, or they are the
    /// caller's.
    untracked: bool,
}

impl Uses {
    /// The holders of bytes of `range`, with what they hold.
    fn of(&self, range: &Range<usize>) -> impl Iterator<Item = (Holder, Range<usize>)> {
        let holders = self.entries.keys();
        holders
            .map(|(start, end, holder)| (*holder, *start..*end))
            .filter(|(_, held)| overlap(held, range))
    }

    fn in_the_way(&self, range: &Range<usize>, holder: Holder) -> Option<(Holder, Range<usize>)> {
        self.of(range).find(|(other, _)| holder.excludes(*other))
    }

    /// Refuses what the host would do as `holder` while another is in the way.
    fn admit(&self, range: &Range<usize>, holder: Holder) -> Result<()> {
        match self.in_the_way(range, holder) {
            Some((other, _)) => Err(busy(other)),
            None => Ok(()),
        }
    }

    fn add(&mut self, range: &Range<usize>, holder: Holder) {
        *self
            .entries
            .entry((range.start, range.end, holder))
            .or_default() += 1;
    }

    fn remove(&mut self, range: &Range<usize>, holder: Holder) {
        if let Entry::Occupied(mut entry) = self.entries.entry((range.start, range.end, holder)) {
            *entry.get_mut() -= 1;
            if *entry.get() == 0 {
                entry.remove();
            }
        }
        self.version += u64::from(holder.writes());
    }
}

/// Whether two ranges share a byte.
pub(crate) fn overlap(a: &Range<usize>, b: &Range<usize>) -> bool {
    a.start.max(b.start) < a.end.min(b.end)
}

/// One allocation, shared by every handle on it.
#[derive(Debug)]
pub(crate) struct Storage {
    pub(crate) memory: Arc<dyn Memory>,
    pub(crate) device: DeviceKind,
    uses: Mutex<Uses>,
}

impl Storage {
    pub(crate) fn new(memory: Arc<dyn Memory>, device: DeviceKind) -> Self {
        Self {
            memory,
            device,
            uses: Mutex::default(),
        }
    }

    fn uses(&self) -> MutexGuard<'_, Uses> {
        self.uses.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on the bytes may change unseen.
    pub(crate) fn untrack(&self) {
        self.uses().untracked = true;
    }

    /// The range that a host access of `range` has to hold: all of the allocation where the host sees a mirror,
    /// because a mirror is copied as a whole.
    fn host_range(&self, range: Range<usize>) -> Range<usize> {
        if self.memory.is_mirrored() && !range.is_empty() {
            0..self.memory.len()
        } else {
            range
        }
    }

    /// Address of the allocation on the host. While a guard lends a mirror to the host, the mirror is not brought
    /// up to date: that would overwrite bytes that the guard's owner reads or writes.
    fn base(&self, uses: &Uses, access: Access) -> Result<*mut u8> {
        let lent = || uses.entries.keys().any(|(.., holder)| holder.lent());
        if self.memory.is_mirrored() && lent() {
            self.memory.host_as_it_stands(access)
        } else {
            self.memory.host(access)
        }
    }

    /// Address of the allocation, for callers who order its use themselves.
    pub(crate) fn raw(&self) -> Result<*mut u8> {
        let mut uses = self.uses();
        uses.untracked = true;
        self.base(&uses, Access::ReadWrite)
    }

    /// Address of the allocation; `None` where something else has a handle on its memory.
    pub(crate) fn exclusive(&mut self) -> Option<Result<*mut u8>> {
        let memory = Arc::get_mut(&mut self.memory)?;
        Some(memory.host(Access::ReadWrite))
    }

    /// Lends `range` to the host; gives the allocation's address.
    pub(crate) fn lend(
        self: &Arc<Self>,
        range: Range<usize>,
        access: Access,
    ) -> Result<(Hold, *mut u8)> {
        let holder = if access.writes() {
            Holder::LentWrite
        } else {
            Holder::LentRead
        };
        let range = self.host_range(range);
        let mut uses = self.uses();
        uses.admit(&range, holder)?;
        let base = self.base(&uses, access)?;
        uses.add(&range, holder);
        let hold = Hold {
            storage: Arc::clone(self),
            range,
            holder,
        };
        Ok((hold, base))
    }

    /// A copy of `range` and its version; no copy where `last` is still right. No command starts to
    /// write the bytes meanwhile.
    pub(super) fn snapshot(
        &self,
        range: Range<usize>,
        last: Option<&Snapshot>,
    ) -> Result<(Option<HostMemory>, u64)> {
        let uses = self.uses();
        let all = self.host_range(range.clone());
        uses.admit(&all, Holder::LentRead)?;
        let version = uses.version;
        if !uses.untracked && last.is_some_and(|last| last.version == version) {
            return Ok((None, version));
        }
        let base = self.base(&uses, Access::Read)?;
        // SAFETY: every view lies inside its memory. No command writes these bytes and no write guard
        // lends them: either would be in the way, and neither starts before `uses` is released.
        let bytes = unsafe { std::slice::from_raw_parts(base.add(range.start), range.len()) };
        if let Some(last) = last {
            let at = last.memory.host(Access::Read)?;
            // SAFETY: a copy of the same view has as many bytes, which nobody writes.
            if unsafe { std::slice::from_raw_parts(at, bytes.len()) } == bytes {
                return Ok((None, version));
            }
        }
        let new = HostMemory::zeroed(bytes.len())?;
        let to = new.host(Access::Write)?;
        // SAFETY: the new memory has as many bytes, and nobody else has it.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
        Ok((Some(new), version))
    }

    /// Copies bytes of the host's to byte `at` and those after it, all of which are inside the memory.
    ///
    /// The allocation's lock is held during the copy in place of a guard, so that no command and no guard starts
    /// to use the bytes. A guard would bring the whole mirror up to date; here only `bytes` are copied.
    pub(super) fn upload(&self, at: usize, bytes: &[u8]) -> Result<()> {
        let mut uses = self.uses();
        uses.admit(&(at..at + bytes.len()), Holder::LentWrite)?;
        uses.version += 1;
        // SAFETY: every view lies inside its memory. No command and no guard holds these bytes: either would
        // be in the way, and neither starts before `uses` is released.
        unsafe { self.memory.upload(at, bytes) }
    }

    /// Copies byte `at` and those after it, all of which are inside the memory, to the host.
    pub(super) fn download(&self, at: usize, into: &mut [u8]) -> Result<()> {
        let uses = self.uses();
        uses.admit(&(at..at + into.len()), Holder::LentRead)?;
        // SAFETY: as for `upload`, of what would write these bytes.
        unsafe { self.memory.download(at, into) }
    }

    /// Copies bytes of `source`, which a device of the same kind has, to byte `at` and those after it. All
    /// are inside their memory, and the two ranges share no byte.
    pub(super) fn copy_from(&self, at: usize, source: &Self, range: Range<usize>) -> Result<()> {
        let written = at..at + range.len();
        // The lock at the lower address first, so that no two copies wait for each other; one lock where
        // the two are one.
        let (to, from) = (std::ptr::from_ref(self), std::ptr::from_ref(source));
        let before = (to < from).then(|| self.uses());
        let mut of_source = source.uses();
        let mut own = before.or_else(|| (to > from).then(|| self.uses()));
        of_source.admit(&range, Holder::LentRead)?;
        let uses = own.as_deref_mut().unwrap_or(&mut *of_source);
        uses.admit(&written, Holder::LentWrite)?;
        uses.version += 1;
        // SAFETY: as for `upload` and `download`.
        unsafe { self.memory.copy_from(at, &*source.memory, range) }
    }

    /// A copy of bytes for a command that holds them and has its turn.
    pub(crate) fn copy_for_command(&self, range: Range<usize>) -> Result<Vec<u8>> {
        let uses = self.uses();
        let base = self.base(&uses, Access::Read)?;
        let mut bytes = Vec::new();
        bytes
            .try_reserve_exact(range.len())
            .map_err(|_| MlxError::BufferAllocationError { bytes: range.len() })?;
        // SAFETY: every view lies inside its memory. No command writes these bytes, because the one
        // that asks has its turn, and no write guard lends them, because it holds them.
        bytes.extend_from_slice(unsafe {
            std::slice::from_raw_parts(base.add(range.start), range.len())
        });
        Ok(bytes)
    }

    /// Whether a committed command writes bytes of `range`.
    pub(crate) fn is_being_written(&self, range: &Range<usize>) -> bool {
        let uses = self.uses();
        uses.of(range)
            .any(|(holder, _)| holder == Holder::RunningWrite)
    }
}

fn busy(holder: Holder) -> MlxError {
    MlxError::InvalidArgument(format!("buffer: {}", holder.describe()))
}

/// Bytes of an allocation, held while this lives.
#[derive(Debug)]
pub(crate) struct Hold {
    storage: Arc<Storage>,
    range: Range<usize>,
    holder: Holder,
}

impl Hold {
    /// Notes that an encoded dispatch writes `range`.
    pub(crate) fn encoded_write(storage: &Arc<Storage>, range: Range<usize>) -> Self {
        storage.uses().add(&range, Holder::EncodedWrite);
        Self {
            storage: Arc::clone(storage),
            range,
            holder: Holder::EncodedWrite,
        }
    }

    /// Holds `range` for a committed command, unless the host has a guard that is in the way; gives
    /// the guard's bytes and what is to be said of it.
    pub(crate) fn running(
        storage: &Arc<Storage>,
        range: Range<usize>,
        writes: bool,
    ) -> std::result::Result<Self, (Range<usize>, &'static str)> {
        let holder = if writes {
            Holder::RunningWrite
        } else {
            Holder::RunningRead
        };
        let mut uses = storage.uses();
        if let Some((other, lent)) = uses.in_the_way(&range, holder) {
            return Err((lent, other.describe()));
        }
        uses.add(&range, holder);
        Ok(Self {
            storage: Arc::clone(storage),
            range,
            holder,
        })
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.storage.uses().remove(&self.range, self.holder);
    }
}

#[cfg(test)]
mod tests {
    use super::{Holder, overlap};

    #[test]
    fn who_excludes_whom() {
        use Holder::{EncodedWrite, LentRead, LentWrite, RunningRead, RunningWrite};
        let all = [EncodedWrite, RunningRead, RunningWrite, LentRead, LentWrite];
        let table = all.map(|new| all.map(|old| u8::from(new.excludes(old))));
        assert_eq!(
            table,
            [
                [0, 0, 0, 0, 0],
                [0, 0, 0, 0, 1],
                [0, 0, 0, 1, 1],
                [1, 0, 1, 0, 1],
                [1, 1, 1, 1, 1],
            ]
        );
    }

    #[test]
    fn empty_ranges_share_no_byte() {
        assert!(overlap(&(0..4), &(3..5)));
        assert!(!overlap(&(0..4), &(4..5)));
        assert!(!overlap(&(0..4), &(2..2)));
    }
}
