//! Few rows over many keys: threads take chunks of keys, then one thread for each head task merges their
//! partial results. Room for these is bounded, so chunks come in waves; a head task that one wave leaves
//! unfinished is carried over to the next.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use super::bound_call::BoundCall;
use super::buffer::{room, with_shared};
use super::call::HeadTask;
use super::pass::Pass;
use super::scratch::{Scratch, with_scratch};
use super::split::Split;
use super::team::{Shared, Team};
use super::tile::Tile;
use crate::error::Result;

/// Places for head tasks that are carried over: a wave reads the one that the wave before it wrote, while
/// it writes the other.
const CARRIED: usize = 2;

/// Most partial results at a time, in bytes.
const PARTIAL_BYTES: usize = 64 << 20;

/// Runs a call whose head tasks are split.
pub(super) fn run(
    call: &BoundCall<'_>,
    tasks: &[HeadTask],
    split: &Split,
    team: Team<'_>,
) -> Result<()> {
    run_in(call, tasks, split, team, slots(split))
}

/// How many partial results there is room for.
pub(super) fn slots(split: &Split) -> usize {
    (PARTIAL_BYTES / split.slot_bytes()).max(CARRIED + 1)
}

/// As [`run`], with room for `slots` partial results, those of carried head tasks among them.
pub(super) fn run_in(
    call: &BoundCall<'_>,
    tasks: &[HeadTask],
    split: &Split,
    team: Team<'_>,
    slots: usize,
) -> Result<()> {
    let mut tainted = room(tasks.len())?;
    tainted.resize_with(tasks.len(), || AtomicBool::new(false));
    let pass = Chunks {
        call,
        tasks,
        split,
        slots,
        tainted: &tainted,
        careful: false,
    };
    pass.run(team)?;
    let again: Vec<HeadTask> = tasks
        .iter()
        .zip(&tainted)
        .filter(|(_, tainted)| tainted.load(Ordering::Relaxed))
        .map(|(task, _)| task.clone())
        .collect();
    if again.is_empty() {
        return Ok(());
    }
    let split = split.of(call, &again)?;
    Chunks {
        tasks: &again,
        split: &split,
        careful: true,
        ..pass
    }
    .run(team)
}

#[derive(Debug)]
struct Chunks<'a> {
    call: &'a BoundCall<'a>,
    tasks: &'a [HeadTask],
    split: &'a Split,
    slots: usize,
    /// Head tasks with an output that is not finite.
    tainted: &'a [AtomicBool],
    /// Whether keys whose V is not finite may be among them.
    careful: bool,
}

impl Chunks<'_> {
    fn run(&self, team: Team<'_>) -> Result<()> {
        let slots = self.slots.min(self.split.chunks() + CARRIED);
        with_shared(|buffer| {
            let partials = Shared(buffer.try_reserve(slots * self.split.slot())?);
            // SAFETY: there is room for `slots` partial results.
            let slot = |i: usize| Shared(unsafe { partials.get().add(i * self.split.slot()) });
            let (mut chunk, mut task) = (0, 0);
            let [mut carried, mut on] = [slot(0), slot(1)];
            while task < self.tasks.len() {
                let wave = chunk..(chunk + slots - CARRIED).min(self.split.chunks());
                let place = |chunk: usize| slot(CARRIED + chunk - wave.start);
                team.for_each(wave.len(), |i| {
                    let chunk = wave.start + i;
                    self.part(chunk, place(chunk));
                });
                // Those whose last chunk is done, and the one that goes on.
                let first = &self.split.first;
                let done = first[task + 1..].partition_point(|end| *end <= wave.end);
                let goes_on = task + done < self.tasks.len() && first[task + done] < wave.end;
                team.for_each(done + usize::from(goes_on), |i| {
                    let index = task + i;
                    let chunks = first[index].max(wave.start)..first[index + 1].min(wave.end);
                    let carried = (first[index] < wave.start).then_some(carried);
                    self.merge(index, carried, chunks.map(place), (i == done).then_some(on));
                });
                (chunk, task) = (wave.end, task + done);
                std::mem::swap(&mut carried, &mut on);
            }
            Ok(())
        })
    }

    /// Makes one chunk's partial result.
    fn part(&self, chunk: usize, to: Shared<u32>) {
        let index = self.split.task_of(chunk);
        let task = &self.tasks[index];
        let start = task.strips.start + (chunk - self.split.first[index]) * self.split.strips;
        let strips = start..(start + self.split.strips).min(task.strips.end);
        let pass = Pass {
            call: self.call,
            task,
            rows: self.rows(task),
            strips,
            last: None,
            next: None,
            careful: self.careful,
        };
        with_scratch(|scratch| {
            pass.run(scratch, |tile, careful| {
                let reached = self.careful.then_some(careful.reached.as_slice());
                // SAFETY: there is room for every chunk, and this one is this task's.
                unsafe { self.split.save(tile, reached, to.get()) };
            });
        });
    }

    /// Merges partial results with the `carried` one, if there is one, and saves the result in `on`, or
    /// writes it out.
    fn merge(
        &self,
        index: usize,
        carried: Option<Shared<u32>>,
        parts: impl Iterator<Item = Shared<u32>>,
        on: Option<Shared<u32>>,
    ) {
        let (call, task) = (self.call, &self.tasks[index]);
        with_scratch(|scratch| {
            let Scratch { tile, careful, .. } = scratch;
            let mut tile = Tile::new(call, task, self.rows(task), None, tile);
            if self.careful {
                careful.begin(call, tile.rows.len());
            }
            // SAFETY: all chunks are done; the job's promises hold.
            unsafe {
                let mut reached = self.careful.then_some(&mut careful.reached);
                if let Some(from) = carried {
                    let reached = reached.as_mut().map(|r| r.as_mut_slice());
                    self.split.load(&mut tile, reached, from.get());
                }
                for from in parts {
                    let reached = reached.as_mut().map(|r| r.as_mut_slice());
                    self.split.merge(&mut tile, reached, from.get());
                }
                if let Some(to) = on {
                    let reached = reached.as_ref().map(|r| r.as_slice());
                    return self.split.save(&tile, reached, to.get());
                }
                (call.kernels.finish)(&mut tile);
                if self.careful {
                    careful.write(&tile);
                } else if tile.tainted {
                    self.tainted[index].store(true, Ordering::Relaxed);
                }
            }
        });
    }

    fn rows(&self, task: &HeadTask) -> Range<usize> {
        0..task.rows(self.call)
    }
}
