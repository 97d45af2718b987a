//! How a call's work is laid out over threads. Every layout gives the same bits: rows never share
//! arithmetic, and strips of keys begin at the same places.

use std::ops::Range;

use super::bound_call::BoundCall;
use super::buffer::{room, with_shared};
use super::call::Unit;
use super::chunks;
use super::packed::Packed;
use super::pass::Pass;
use super::scratch::{Scratch, with_scratch};
use super::split::Split;
use super::team::{Shared, Team};
use super::tile::Tile;
use crate::error::Result;

/// Packed K and V that a wave of units shares, in bytes; a single unit may take more.
const WAVE_BYTES: usize = 8 << 20;

/// Most packed K and V of a single unit, in bytes. Where it has more keys, its tiles pack them anew, a
/// strip at a time: a stride of 0 makes keys without end out of one.
const UNIT_BYTES: usize = 512 << 20;

/// State of the rows of one tile, in bytes: beside a packed strip it stays in a core's second-level
/// cache.
const TILE_BYTES: usize = 192 << 10;

/// Most state of all rows of a unit, in bytes, for one thread to take the unit as a whole.
const WHOLE_BYTES: usize = 2 << 20;

/// Runs a call. Whether a unit is packed depends on the unit alone, as its bits do.
pub(super) fn run(call: &BoundCall<'_>, team: Team<'_>) -> Result<()> {
    let units = call.units()?;
    if let Some(split) = Split::plan(call, &units)? {
        return chunks::run(call, &units, &split, team);
    }
    let fits = units
        .iter()
        .all(|u| u.rows(call) * call.row_bytes() <= WHOLE_BYTES);
    let threads = team.threads;
    let spread = units.len() >= 4 * threads || units.len().is_multiple_of(threads);
    let few = units.iter().all(|u| u.in_place(call));
    if few || fits && spread {
        whole_units(call, &units, team)
    } else {
        by_tiles(call, &units, team, UNIT_BYTES)
    }
}

/// One task for each unit: it packs a strip and takes all rows over it, while both are in cache.
fn whole_units(call: &BoundCall<'_>, units: &[Unit], team: Team<'_>) -> Result<()> {
    let mut order: Vec<usize> = room(units.len())?;
    order.extend(0..units.len());
    order.sort_by_key(|i| {
        let unit = &units[*i];
        std::cmp::Reverse(unit.rows(call).saturating_mul(unit.strips.len()))
    });
    team.for_each(units.len(), |i| {
        let unit = &units[order[i]];
        // Most likely this thread's next.
        let next = order.get(i + team.threads).map(|index| &units[*index]);
        with_scratch(|scratch| {
            by_itself(call, unit, 0..unit.rows(call), &unit.strips, next, scratch);
        });
    });
    Ok(())
}

/// Some rows of a unit from their first strip to their outputs, packing the strips on the way unless
/// there are too few rows to pay for it.
fn by_itself(
    call: &BoundCall<'_>,
    unit: &Unit,
    rows: Range<usize>,
    strips: &Range<usize>,
    next: Option<&Unit>,
    scratch: &mut Scratch,
) {
    let pass = Pass {
        call,
        unit,
        rows,
        strips: strips.clone(),
        last: strips.clone().last(),
        next,
        careful: false,
    };
    // SAFETY: the job's promises hold, and the kernels suit this machine.
    let finish = |tile: &mut Tile<'_>| unsafe { (call.kernels.finish)(tile) };
    let tainted = pass.run(scratch, |tile, _| {
        finish(tile);
        tile.tainted
    });
    if tainted {
        carefully(pass, scratch);
    }
}

/// Does rows again whose outputs are not finite.
fn carefully(pass: Pass<'_>, scratch: &mut Scratch) {
    let call = pass.call;
    let again = Pass {
        careful: true,
        ..pass
    };
    again.run(scratch, |tile, careful| {
        // SAFETY: the job's promises hold, and the kernels suit this machine; the rows are written.
        unsafe {
            (call.kernels.finish)(tile);
            careful.write(tile);
        }
    });
}

/// Waves of units: their K and V are packed once, by all threads, then tiles of rows share them. A unit
/// whose packed K and V would take more than `most` bytes, or more than there are, is not packed at once.
pub(super) fn by_tiles(
    call: &BoundCall<'_>,
    units: &[Unit],
    team: Team<'_>,
    most: usize,
) -> Result<()> {
    // One buffer for all waves: an allocator keeps the pages of one that was freed beside the next.
    with_shared(|buffer| {
        let mut wave = 0;
        while wave < units.len() {
            let mut bytes = call.packed_bytes(&units[wave]);
            let mut end = wave + 1;
            while end < units.len()
                && bytes.saturating_add(call.packed_bytes(&units[end])) <= WAVE_BYTES
            {
                bytes += call.packed_bytes(&units[end]);
                end += 1;
            }
            let packed = if bytes <= most {
                buffer.try_reserve(bytes / 4).ok().map(Shared)
            } else {
                None
            };
            run_wave(call, &units[wave..end], packed, team)?;
            wave = end;
        }
        Ok(())
    })
}

fn run_wave(
    call: &BoundCall<'_>,
    units: &[Unit],
    packed: Option<Shared<u32>>,
    team: Team<'_>,
) -> Result<()> {
    // Strips of all units in a row; V's follow K's strip by strip.
    let mut strips = Vec::new();
    let mut first = room(units.len())?;
    for (index, unit) in units.iter().enumerate() {
        first.push(strips.len());
        if unit.in_place(call) || packed.is_none() {
            continue;
        }
        strips.extend(unit.strips.clone().map(|strip| (index, strip)));
    }
    let size = call.strip_units();
    let place = |packed: Shared<u32>, slot: usize| {
        // SAFETY: there is room for every slot.
        let k = unsafe { packed.get().add(2 * slot * size) };
        // SAFETY: as above.
        (k, unsafe { k.add(size) })
    };
    if let Some(packed) = packed {
        team.for_each(strips.len(), |slot| {
            let (index, strip) = strips[slot];
            let (k, v) = place(packed, slot);
            let unit = &units[index];
            let rows = unit.strip_rows(call, strip);
            // SAFETY: the job's promises hold, the kernels suit this machine, and the slot is this
            // task's.
            unsafe { (call.kernels.pack)(call, rows, k, v) };
        });
    }

    let tiles = tiles(call, units, team.threads)?;
    team.for_each(tiles.len(), |i| {
        let (index, rows) = &tiles[i];
        let unit = &units[*index];
        let strips = call.strips(&unit.keys(call, rows));
        with_scratch(|scratch| {
            let Some(packed) = packed.filter(|_| !unit.in_place(call)) else {
                return by_itself(call, unit, rows.clone(), &strips, None, scratch);
            };
            let last = strips.clone().last();
            let mut tile = Tile::new(call, unit, rows.clone(), last, &mut scratch.tile);
            // SAFETY: the job's promises hold, the kernels suit this machine, and all strips are
            // packed.
            unsafe {
                (call.kernels.begin)(&mut tile);
                for strip in strips.clone() {
                    let (k, v) = place(packed, first[*index] + strip - unit.strips.start);
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
            if tile.tainted {
                let pass = Pass {
                    call,
                    unit,
                    rows: rows.clone(),
                    strips,
                    last,
                    next: None,
                    careful: true,
                };
                carefully(pass, scratch);
            }
        });
    });
    Ok(())
}

/// Tiles of rows, those with the most keys first.
fn tiles(
    call: &BoundCall<'_>,
    units: &[Unit],
    threads: usize,
) -> Result<Vec<(usize, Range<usize>)>> {
    let total: usize = units.iter().map(|u| u.rows(call)).sum();
    let quantum = call.kernels.shape.rows;
    // As many as cache holds, but several tasks for each thread.
    let rows = (TILE_BYTES / call.row_bytes()).min(total / (6 * threads));
    let rows = (rows / quantum * quantum).max(quantum);
    let counts = units.iter().map(|u| u.rows(call).div_ceil(rows));
    let mut tiles = room(counts.sum())?;
    for (index, unit) in units.iter().enumerate() {
        let count = unit.rows(call);
        tiles.extend(
            (0..count)
                .step_by(rows)
                .map(|r| (index, r..(r + rows).min(count))),
        );
    }
    tiles.sort_by_key(|(index, rows)| {
        let keys = units[*index].keys(call, rows).len();
        std::cmp::Reverse(rows.len().saturating_mul(keys))
    });
    Ok(tiles)
}
