//! Few rows over many keys: tasks over chunks of keys, then one for each unit that joins them. Partial
//! results have a bounded place, so chunks come in waves; a unit that one wave leaves unfinished is
//! carried over to the next.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use super::bound_call::BoundCall;
use super::buffer::{room, with_shared};
use super::call::Unit;
use super::pass::Pass;
use super::scratch::{Scratch, with_scratch};
use super::split::Split;
use super::team::{Shared, Team};
use super::tile::Tile;
use crate::error::Result;

/// Places for units that are carried over: a wave reads the one that the wave before it wrote, while
/// it writes the other.
const CARRIED: usize = 2;

/// Most partial results at a time, in bytes.
const PARTIAL_BYTES: usize = 64 << 20;

/// Runs a call whose units are split.
pub(super) fn run(
    call: &BoundCall<'_>,
    units: &[Unit],
    split: &Split,
    team: Team<'_>,
) -> Result<()> {
    run_in(call, units, split, team, slots(split))
}

/// How many partial results there is room for.
pub(super) fn slots(split: &Split) -> usize {
    (PARTIAL_BYTES / split.slot_bytes()).max(CARRIED + 1)
}

/// As [`run`], with room for `slots` partial results, those of carried units among them.
pub(super) fn run_in(
    call: &BoundCall<'_>,
    units: &[Unit],
    split: &Split,
    team: Team<'_>,
    slots: usize,
) -> Result<()> {
    let mut tainted = room(units.len())?;
    tainted.resize_with(units.len(), || AtomicBool::new(false));
    let pass = Chunks {
        call,
        units,
        split,
        slots,
        tainted: &tainted,
        careful: false,
    };
    pass.run(team)?;
    let again: Vec<Unit> = units
        .iter()
        .zip(&tainted)
        .filter(|(_, tainted)| tainted.load(Ordering::Relaxed))
        .map(|(unit, _)| unit.clone())
        .collect();
    if again.is_empty() {
        return Ok(());
    }
    let split = split.of(call, &again)?;
    Chunks {
        units: &again,
        split: &split,
        careful: true,
        ..pass
    }
    .run(team)
}

#[derive(Debug)]
struct Chunks<'a> {
    call: &'a BoundCall<'a>,
    units: &'a [Unit],
    split: &'a Split,
    slots: usize,
    /// Units with an output that is not finite.
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
            let (mut chunk, mut unit) = (0, 0);
            let [mut carried, mut on] = [slot(0), slot(1)];
            while unit < self.units.len() {
                let wave = chunk..(chunk + slots - CARRIED).min(self.split.chunks());
                let place = |chunk: usize| slot(CARRIED + chunk - wave.start);
                team.for_each(wave.len(), |i| {
                    let chunk = wave.start + i;
                    self.part(chunk, place(chunk));
                });
                // Those whose last chunk is done, and the one that goes on.
                let first = &self.split.first;
                let done = first[unit + 1..].partition_point(|end| *end <= wave.end);
                let goes_on = unit + done < self.units.len() && first[unit + done] < wave.end;
                team.for_each(done + usize::from(goes_on), |i| {
                    let index = unit + i;
                    let chunks = first[index].max(wave.start)..first[index + 1].min(wave.end);
                    let carried = (first[index] < wave.start).then_some(carried);
                    self.join(index, carried, chunks.map(place), (i == done).then_some(on));
                });
                (chunk, unit) = (wave.end, unit + done);
                std::mem::swap(&mut carried, &mut on);
            }
            Ok(())
        })
    }

    /// Makes one chunk's partial result.
    fn part(&self, chunk: usize, to: Shared<u32>) {
        let index = self.split.unit_of(chunk);
        let unit = &self.units[index];
        let start = unit.strips.start + (chunk - self.split.first[index]) * self.split.strips;
        let strips = start..(start + self.split.strips).min(unit.strips.end);
        let pass = Pass {
            call: self.call,
            unit,
            rows: self.rows(unit),
            strips,
            last: None,
            next: None,
            careful: self.careful,
        };
        with_scratch(|scratch| {
            pass.run(scratch, |tile, careful| {
                let reached = self.careful.then_some(careful.reached.as_slice());
                // SAFETY: there is room for every chunk, and this one is this task's.
                unsafe { self.split.keep(tile, reached, to.get()) };
            });
        });
    }

    /// Joins partial results to what was `carried`, if anything was, and keeps the result in `on`, or
    /// writes it out.
    fn join(
        &self,
        index: usize,
        carried: Option<Shared<u32>>,
        parts: impl Iterator<Item = Shared<u32>>,
        on: Option<Shared<u32>>,
    ) {
        let (call, unit) = (self.call, &self.units[index]);
        with_scratch(|scratch| {
            let Scratch { tile, careful, .. } = scratch;
            let mut tile = Tile::new(call, unit, self.rows(unit), None, tile);
            if self.careful {
                careful.begin(call, tile.rows.len());
            }
            // SAFETY: all chunks are done; the job's promises hold.
            unsafe {
                let mut reached = self.careful.then_some(&mut careful.reached);
                if let Some(from) = carried {
                    let reached = reached.as_mut().map(|r| r.as_mut_slice());
                    self.split.restore(&mut tile, reached, from.get());
                }
                for from in parts {
                    let reached = reached.as_mut().map(|r| r.as_mut_slice());
                    self.split.join(&mut tile, reached, from.get());
                }
                if let Some(to) = on {
                    let reached = reached.as_ref().map(|r| r.as_slice());
                    return self.split.keep(&tile, reached, to.get());
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

    fn rows(&self, unit: &Unit) -> Range<usize> {
        0..unit.rows(self.call)
    }
}
