//! A queue that orders whole commands by the bytes that they read and write. A command that shares a byte with
//! an earlier command, where either of the two writes that byte, starts when the earlier command has been run
//! (CPU) or put on the GPU's queue. A command takes its place in the queue for all of its bytes at once and
//! waits for earlier commands only, so that no two commands wait for each other.

use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::hazards::Use;
use super::uses::overlap;
use crate::error::{MlxError, Result};

/// Commands that run or wait, in the order of their places.
static TURNS: Turns = Turns {
    places: Mutex::new(Vec::new()),
    changed: Condvar::new(),
};

struct Turns {
    places: Mutex<Vec<Place>>,
    changed: Condvar,
}

struct Place {
    id: u64,
    touches: Touches,
    running: bool,
}

/// What a command touches: spans that share no byte and are sorted, so that two commands are compared
/// in one pass.
#[derive(Debug)]
pub(crate) struct Touches {
    reads: Vec<Span>,
    writes: Vec<Span>,
}

/// Bytes of one memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) memory: usize,
    pub(crate) range: Range<usize>,
}

impl Touches {
    pub(crate) fn new(uses: &[Use]) -> Self {
        let of = |writes| joined(uses.iter().filter(|u| u.writes == writes));
        Self {
            reads: of(false),
            writes: of(true),
        }
    }

    /// Each span, with whether it is written.
    pub(crate) fn spans(&self) -> impl Iterator<Item = (&Span, bool)> {
        let reads = self.reads.iter().map(|span| (span, false));
        reads.chain(self.writes.iter().map(|span| (span, true)))
    }

    fn conflicts(&self, other: &Self) -> bool {
        meet(&self.writes, &other.writes)
            || meet(&self.writes, &other.reads)
            || meet(&self.reads, &other.writes)
    }
}

/// The spans of these uses, those that touch each other made one.
fn joined<'a>(uses: impl Iterator<Item = &'a Use>) -> Vec<Span> {
    let mut spans: Vec<Span> = uses
        .filter(|u| !u.range.is_empty())
        .map(|u| Span {
            memory: u.memory,
            range: u.range.clone(),
        })
        .collect();
    spans.sort_unstable_by_key(|s| (s.memory, s.range.start));
    spans.dedup_by(|next, last| {
        let joins = next.memory == last.memory && next.range.start <= last.range.end;
        if joins {
            last.range.end = last.range.end.max(next.range.end);
        }
        joins
    });
    spans
}

/// Whether two sorted lists share a byte.
fn meet(a: &[Span], b: &[Span]) -> bool {
    let (mut a, mut b) = (a.iter().peekable(), b.iter().peekable());
    while let (Some(x), Some(y)) = (a.peek(), b.peek()) {
        if x.memory == y.memory && overlap(&x.range, &y.range) {
            return true;
        }
        // The one that ends first meets nothing later.
        if (x.memory, x.range.end) <= (y.memory, y.range.end) {
            a.next();
        } else {
            b.next();
        }
    }
    false
}

/// A command's turn. It ends when dropped.
#[derive(Debug)]
pub(crate) struct Turn(u64);

impl Turn {
    /// Takes a place and waits for the turn.
    ///
    /// With `may_wait` false, a command that would have to wait for a running command is refused: this thread
    /// belongs to a thread pool that the running command may need, or the running command is further down on
    /// this thread's own stack.
    pub(crate) fn take(touches: Touches, may_wait: bool) -> Result<Self> {
        let mut places = TURNS.places();
        let id = places.iter().map(|p| p.id).max().map_or(0, |id| id + 1);
        if !may_wait {
            let in_the_way = |p: &Place| p.running && p.touches.conflicts(&touches);
            if places.iter().any(in_the_way) {
                return Err(MlxError::CommandBufferError(
                    "another thread's command is running on the same memory, and a thread of rayon's \
                     cannot wait for it without holding up that command; commit on another thread, \
                     or give each command memory of its own"
                        .into(),
                ));
            }
            // Placed ahead of the commands that wait: one of them may wait for a command further down on this
            // thread's stack, which cannot end before this command does.
            places.insert(
                0,
                Place {
                    id,
                    touches,
                    running: true,
                },
            );
            return Ok(Self(id));
        }
        places.push(Place {
            id,
            touches,
            running: false,
        });
        let turn = Self(id);
        loop {
            let at = places.iter().position(|p| p.id == id).unwrap_or(0);
            let (earlier, rest) = places.split_at_mut(at);
            match rest.first_mut() {
                Some(own) if earlier.iter().any(|p| p.touches.conflicts(&own.touches)) => {}
                Some(own) => {
                    own.running = true;
                    return Ok(turn);
                }
                None => return Ok(turn),
            }
            places = TURNS
                .changed
                .wait(places)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        TURNS.places().retain(|p| p.id != self.0);
        TURNS.changed.notify_all();
    }
}

impl Turns {
    fn places(&self) -> MutexGuard<'_, Vec<Place>> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::{Touches, Use};

    fn touches(uses: &[(usize, std::ops::Range<usize>, bool)]) -> Touches {
        let uses: Vec<Use> = uses
            .iter()
            .map(|(memory, range, writes)| Use {
                memory: *memory,
                range: range.clone(),
                writes: *writes,
            })
            .collect();
        Touches::new(&uses)
    }

    #[test]
    fn spans_that_touch_become_one_and_empty_ones_none() {
        let t = touches(&[
            (1, 4..8, false),
            (1, 0..4, false),
            (1, 2..3, false),
            (2, 0..1, false),
            (1, 9..9, false),
            (1, 9..10, false),
        ]);
        let spans: Vec<_> = t
            .spans()
            .map(|(s, w)| (s.memory, s.range.clone(), w))
            .collect();
        let read = |memory, range| (memory, range, false);
        assert_eq!(spans, [read(1, 0..8), read(1, 9..10), read(2, 0..1)]);
    }

    #[test]
    fn commands_conflict_where_a_written_byte_is_shared() {
        // Against every pair of single bytes, one by one.
        let spans = [(1, 0..3), (1, 2..5), (1, 7..9), (2, 1..4), (2, 6..6)];
        let step = if cfg!(miri) { 37 } else { 1 };
        let choices = (0..1024).step_by(step);
        for (a, b) in choices.flat_map(|i| [(i, 0x2a5), (i, 0x15a), (i, i)]) {
            let pick = |bits: usize| -> Vec<_> {
                let chosen = (0..5).filter(|i| bits >> i & 1 == 1);
                chosen
                    .map(|i| (spans[i].0, spans[i].1.clone(), bits >> (5 + i) & 1 == 1))
                    .collect()
            };
            let (a, b) = (pick(a), pick(b));
            let plain = a.iter().any(|(m, r, w)| {
                b.iter().any(|(n, s, v)| {
                    m == n && (*w || *v) && r.clone().any(|byte| s.contains(&byte))
                })
            });
            assert_eq!(touches(&a).conflicts(&touches(&b)), plain, "{a:?} {b:?}");
        }
    }
}
