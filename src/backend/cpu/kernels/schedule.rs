//! How a call's work is laid out over threads. Every layout gives the same bits: rows never share
//! arithmetic, and strips of keys begin at the same places.

use std::ops::Range;

use super::bound_call::BoundCall;
use super::buffer::{room, with_shared};
use super::call::HeadTask;
use super::chunks;
use super::packed::Packed;
use super::pass::Pass;
use super::scratch::{Scratch, with_scratch};
use super::split::Split;
use super::team::{Shared, Team};
use super::tile::Tile;
use crate::error::Result;

/// Packed K and V that a wave of head tasks shares, in bytes; a single head task may take more.
const WAVE_BYTES: usize = 8 << 20;

/// Most packed K and V of a single head task, in bytes. Where it has more keys, its tiles pack them anew, a
/// strip at a time: a stride of 0 makes keys without end out of one.
const TASK_BYTES: usize = 512 << 20;

/// State of the rows of one tile, in bytes: beside a packed strip it stays in a core's second-level
/// cache.
const TILE_BYTES: usize = 192 << 10;

/// Most state of all rows of a head task, in bytes, for one thread to take the head task as a whole.
const WHOLE_BYTES: usize = 2 << 20;

/// Runs a call. Whether a head task is packed depends on the head task alone, as its bits do.
pub(super) fn run(call: &BoundCall<'_>, team: Team<'_>) -> Result<()> {
    let tasks = call.tasks()?;
    if let Some(split) = Split::plan(call, &tasks)? {
        return chunks::run(call, &tasks, &split, team);
    }
    let fits = tasks
        .iter()
        .all(|task| task.rows(call) * call.row_bytes() <= WHOLE_BYTES);
    let threads = team.threads;
    let spread = tasks.len() >= 4 * threads || tasks.len().is_multiple_of(threads);
    let few = tasks.iter().all(|task| task.in_place(call));
    if few || fits && spread {
        whole_tasks(call, &tasks, team)
    } else {
        by_tiles(call, &tasks, team, TASK_BYTES)
    }
}

/// One thread takes a whole head task: it packs a strip and takes all rows over it, while both are in
/// cache.
fn whole_tasks(call: &BoundCall<'_>, tasks: &[HeadTask], team: Team<'_>) -> Result<()> {
    let mut order: Vec<usize> = room(tasks.len())?;
    order.extend(0..tasks.len());
    order.sort_by_key(|i| {
        let task = &tasks[*i];
        std::cmp::Reverse(task.rows(call).saturating_mul(task.strips.len()))
    });
    team.for_each(tasks.len(), |i| {
        let task = &tasks[order[i]];
        // Most likely this thread's next.
        let next = order.get(i + team.threads).map(|index| &tasks[*index]);
        with_scratch(|scratch| {
            by_itself(call, task, 0..task.rows(call), &task.strips, next, scratch);
        });
    });
    Ok(())
}

/// Some rows of a head task from their first strip to their outputs, packing the strips on the way unless
/// there are too few rows to pay for it.
fn by_itself(
    call: &BoundCall<'_>,
    task: &HeadTask,
    rows: Range<usize>,
    strips: &Range<usize>,
    next: Option<&HeadTask>,
    scratch: &mut Scratch,
) {
    let pass = Pass {
        call,
        task,
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

/// Waves of head tasks: their K and V are packed once, by all threads, then tiles of rows share them. A head task
/// whose packed K and V would take more than `most` bytes, or more than there are, is not packed at once.
pub(super) fn by_tiles(
    call: &BoundCall<'_>,
    tasks: &[HeadTask],
    team: Team<'_>,
    most: usize,
) -> Result<()> {
    // One buffer for all waves: an allocator keeps the pages of one that was freed beside the next.
    with_shared(|buffer| {
        let mut wave = 0;
        while wave < tasks.len() {
            let mut bytes = call.packed_bytes(&tasks[wave]);
            let mut end = wave + 1;
            while end < tasks.len()
                && bytes.saturating_add(call.packed_bytes(&tasks[end])) <= WAVE_BYTES
            {
                bytes += call.packed_bytes(&tasks[end]);
                end += 1;
            }
            let packed = if bytes <= most {
                buffer.try_reserve(bytes / 4).ok().map(Shared)
            } else {
                None
            };
            run_wave(call, &tasks[wave..end], packed, team)?;
            wave = end;
        }
        Ok(())
    })
}

fn run_wave(
    call: &BoundCall<'_>,
    tasks: &[HeadTask],
    packed: Option<Shared<u32>>,
    team: Team<'_>,
) -> Result<()> {
    // Strips of all head tasks in a row; V's follow K's strip by strip.
    let mut strips = Vec::new();
    let mut first = room(tasks.len())?;
    for (index, task) in tasks.iter().enumerate() {
        first.push(strips.len());
        if task.in_place(call) || packed.is_none() {
            continue;
        }
        strips.extend(task.strips.clone().map(|strip| (index, strip)));
    }
    let size = call.strip_words();
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
            let task = &tasks[index];
            let rows = task.strip_rows(call, strip);
            // SAFETY: the job's promises hold, the kernels suit this machine, and the slot is this
            // head task's.
            unsafe { (call.kernels.pack)(call, rows, k, v) };
        });
    }

    let tiles = tiles(call, tasks, team.threads)?;
    team.for_each(tiles.len(), |i| {
        let (index, rows) = &tiles[i];
        let task = &tasks[*index];
        let strips = call.strips(&task.keys(call, rows));
        with_scratch(|scratch| {
            let Some(packed) = packed.filter(|_| !task.in_place(call)) else {
                return by_itself(call, task, rows.clone(), &strips, None, scratch);
            };
            let last = strips.clone().last();
            let mut tile = Tile::new(call, task, rows.clone(), last, &mut scratch.tile);
            // SAFETY: the job's promises hold, the kernels suit this machine, and all strips are
            // packed.
            unsafe {
                (call.kernels.begin)(&mut tile);
                for strip in strips.clone() {
                    let (k, v) = place(packed, first[*index] + strip - task.strips.start);
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
                    task,
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
    tasks: &[HeadTask],
    threads: usize,
) -> Result<Vec<(usize, Range<usize>)>> {
    let total: usize = tasks.iter().map(|u| u.rows(call)).sum();
    let quantum = call.kernels.shape.rows;
    // As many as cache holds, but several head tasks for each thread.
    let rows = (TILE_BYTES / call.row_bytes()).min(total / (6 * threads));
    let rows = (rows / quantum * quantum).max(quantum);
    let counts = tasks.iter().map(|u| u.rows(call).div_ceil(rows));
    let mut tiles = room(counts.sum())?;
    for (index, task) in tasks.iter().enumerate() {
        let count = task.rows(call);
        tiles.extend(
            (0..count)
                .step_by(rows)
                .map(|r| (index, r..(r + rows).min(count))),
        );
    }
    tiles.sort_by_key(|(index, rows)| {
        let keys = tasks[*index].keys(call, rows).len();
        std::cmp::Reverse(rows.len().saturating_mul(keys))
    });
    Ok(tiles)
}
