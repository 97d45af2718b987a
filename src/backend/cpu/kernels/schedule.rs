//! How a call's work is laid out over threads. Every layout gives the same bits: rows never share
//! arithmetic, and strips of keys begin at the same places.

use std::ops::Range;

use super::call::{Call, Unit};
use super::scratch::{Scratch, with_scratch, with_shared};
use super::split::Split;
use super::step::Packed;
use super::team::Team;
use super::tile::Tile;

/// Packed K and V that a wave of units shares, in bytes; a single unit may take more.
const WAVE_BYTES: usize = 8 << 20;

/// State of the rows of one tile, in bytes: beside a packed strip it stays in a core's second-level
/// cache.
const TILE_BYTES: usize = 192 << 10;

/// Most state of all rows of a unit, in bytes, for one thread to take the unit as a whole.
const WHOLE_BYTES: usize = 2 << 20;

/// An address that threads share.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shared<T>(pub(super) *mut T);
// SAFETY: an address; whoever uses it keeps to parts of its own, or only reads.
unsafe impl<T> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Shared<T> {}

impl<T> Shared<T> {
    pub(super) fn get(self) -> *mut T {
        self.0
    }
}

/// Runs a call. Whether a unit is packed depends on the unit alone, as its bits do.
pub(super) fn run(call: &Call<'_>, team: Team<'_>) {
    let units = call.units();
    if let Some(split) = Split::plan(call, &units) {
        return by_chunks(call, &units, &split, team);
    }
    let fits = units
        .iter()
        .all(|u| u.rows(call) * call.row_bytes() <= WHOLE_BYTES);
    let threads = team.threads;
    let spread = units.len() >= 4 * threads || units.len().is_multiple_of(threads);
    let few = units.iter().all(|u| u.in_place(call));
    if few || fits && spread {
        whole_units(call, &units, team);
    } else {
        by_tiles(call, &units, team);
    }
}

/// One task for each unit: it packs a strip and takes all rows over it, while both are in cache.
fn whole_units(call: &Call<'_>, units: &[Unit], team: Team<'_>) {
    let mut order: Vec<usize> = (0..units.len()).collect();
    order.sort_by_key(|i| {
        let unit = &units[*i];
        std::cmp::Reverse(unit.rows(call) * unit.strips.len())
    });
    team.for_each(units.len(), |i| {
        let unit = &units[order[i]];
        with_scratch(|scratch| {
            // Most likely this thread's next.
            let next = order.get(i + team.threads).map(|index| &units[*index]);
            let strips = unit.strips.clone();
            let last = strips.clone().last();
            pass(call, unit, strips, last, next, scratch, |tile| {
                // SAFETY: the job's promises hold, and the kernels suit this machine.
                unsafe { (call.kernels.finish)(tile) };
            });
        });
    });
}

/// Takes all rows of a unit over some of its strips, packing them on the way unless there are too
/// few rows to pay for it. The `last` of all writes the rows out. `next` is what this thread will pass
/// after it.
fn pass(
    call: &Call<'_>,
    unit: &Unit,
    strips: Range<usize>,
    last: Option<usize>,
    next: Option<&Unit>,
    scratch: &mut Scratch,
    end: impl FnOnce(&mut Tile<'_>),
) {
    let (mut parts, keys, values) = scratch.split();
    let mut tile = Tile::new(call, unit, 0..unit.rows(call), last, &mut parts);
    // SAFETY: the job's promises hold, the kernels suit this machine, and the buffers have room for
    // a strip.
    unsafe {
        (call.kernels.begin)(&mut tile);
        if unit.in_place(call) {
            for strip in strips {
                (call.kernels.step_in_place)(&mut tile, strip);
            }
        } else {
            let (k, v) = (
                keys.reserve(call.strip_units()),
                values.reserve(call.strip_units()),
            );
            let next = next.map(|unit| (unit, unit.strips.start));
            for strip in strips.clone() {
                (call.kernels.pack)(call, unit, strip, k, v);
                let packed = Packed {
                    strip,
                    k,
                    v,
                    next: if strip + 1 < strips.end {
                        Some((unit, strip + 1))
                    } else {
                        next
                    },
                };
                (call.kernels.step)(&mut tile, packed);
            }
        }
    }
    end(&mut tile);
}

/// Tasks over chunks of keys, then one for each unit that joins them.
fn by_chunks(call: &Call<'_>, units: &[Unit], split: &Split, team: Team<'_>) {
    with_shared(|buffer| {
        let partials = Shared(buffer.reserve(split.elements()).cast::<f32>());
        team.for_each(split.chunks(), |chunk| {
            let index = split.unit_of(chunk);
            let unit = &units[index];
            let start = unit.strips.start + (chunk - split.first[index]) * split.strips;
            let end = (start + split.strips).min(unit.strips.end);
            with_scratch(|scratch| {
                pass(call, unit, start..end, None, None, scratch, |tile| {
                    // SAFETY: there is room for every chunk, and this one is this task's.
                    unsafe { split.keep(chunk, tile, partials.get()) };
                });
            });
        });
        team.for_each(units.len(), |index| {
            let unit = &units[index];
            with_scratch(|scratch| {
                let mut parts = scratch.split().0;
                let mut tile = Tile::new(call, unit, 0..unit.rows(call), None, &mut parts);
                // SAFETY: all chunks are done; the job's promises hold.
                unsafe {
                    for chunk in split.first[index]..split.first[index + 1] {
                        split.join(chunk, &mut tile, partials.get());
                    }
                    (call.kernels.finish)(&mut tile);
                }
            });
        });
    });
}

/// Waves of units: their K and V are packed once, by all threads, then tiles of rows share them.
fn by_tiles(call: &Call<'_>, units: &[Unit], team: Team<'_>) {
    let mut wave = 0;
    while wave < units.len() {
        let mut bytes = call.packed_bytes(&units[wave]);
        let mut end = wave + 1;
        while end < units.len() && bytes + call.packed_bytes(&units[end]) <= WAVE_BYTES {
            bytes += call.packed_bytes(&units[end]);
            end += 1;
        }
        with_shared(|buffer| {
            let packed = Shared(buffer.reserve(bytes / 4));
            run_wave(call, &units[wave..end], packed, team);
        });
        wave = end;
    }
}

fn run_wave(call: &Call<'_>, units: &[Unit], packed: Shared<u32>, team: Team<'_>) {
    // Strips of all units in a row; V's follow K's strip by strip.
    let mut strips = Vec::new();
    let mut first = Vec::with_capacity(units.len());
    for (index, unit) in units.iter().enumerate() {
        first.push(strips.len());
        if unit.in_place(call) {
            continue;
        }
        strips.extend(unit.strips.clone().map(|strip| (index, strip)));
    }
    let size = call.strip_units();
    let place = |slot: usize| {
        // SAFETY: there is room for every slot.
        let k = unsafe { packed.get().add(2 * slot * size) };
        // SAFETY: as above.
        (k, unsafe { k.add(size) })
    };
    team.for_each(strips.len(), |slot| {
        let (index, strip) = strips[slot];
        let (k, v) = place(slot);
        // SAFETY: the job's promises hold, the kernels suit this machine, and the slot is this
        // task's.
        unsafe { (call.kernels.pack)(call, &units[index], strip, k, v) };
    });

    let tiles = tiles(call, units, team.threads);
    team.for_each(tiles.len(), |i| {
        let (index, rows) = &tiles[i];
        let unit = &units[*index];
        with_scratch(|scratch| {
            let mut parts = scratch.split().0;
            let strips = call.strips(&unit.keys(call, rows));
            let last = strips.clone().last();
            let mut tile = Tile::new(call, unit, rows.clone(), last, &mut parts);
            // SAFETY: the job's promises hold, the kernels suit this machine, and all strips are
            // packed.
            unsafe {
                (call.kernels.begin)(&mut tile);
                for strip in strips {
                    if unit.in_place(call) {
                        (call.kernels.step_in_place)(&mut tile, strip);
                        continue;
                    }
                    let (k, v) = place(first[*index] + strip - unit.strips.start);
                    let packed = Packed {
                        strip,
                        k,
                        v,
                        next: None,
                    };
                    (call.kernels.step)(&mut tile, packed);
                }
                (call.kernels.finish)(&mut tile);
            }
        });
    });
}

/// Tiles of rows, those with the most keys first.
fn tiles(call: &Call<'_>, units: &[Unit], threads: usize) -> Vec<(usize, Range<usize>)> {
    let total: usize = units.iter().map(|u| u.rows(call)).sum();
    let quantum = call.kernels.rows;
    // As many as cache holds, but several tasks for each thread.
    let rows = (TILE_BYTES / call.row_bytes()).min(total / (6 * threads));
    let rows = (rows / quantum * quantum).max(quantum);
    let mut tiles = Vec::new();
    for (index, unit) in units.iter().enumerate() {
        let count = unit.rows(call);
        tiles.extend(
            (0..count)
                .step_by(rows)
                .map(|r| (index, r..(r + rows).min(count))),
        );
    }
    tiles.sort_by_key(|(index, rows)| {
        std::cmp::Reverse(rows.len() * units[*index].keys(call, rows).len())
    });
    tiles
}
