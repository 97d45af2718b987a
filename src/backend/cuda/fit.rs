//! Which kernels take a problem's shape and memory, and how the work is cut.

use super::maps;
use super::table::{MOST_LISTED, Row};
use crate::attention::{Problem, QueryOffset};

/// What of the GPU decides how work is cut.
#[derive(Debug, Clone, Copy)]
pub(super) struct Machine {
    pub(super) processors: usize,
    pub(super) l2_bytes: usize,
}

/// A bound that no position is past: lengths and offsets are less for whoever asks.
pub(super) const FAR: i32 = 1 << 30;

/// The largest softcap of the kernels whose tanh comes from an exponential: its error, a part of the cap,
/// stays below that of a weight in 16 bits.
const LARGEST_CAP: f32 = 256.0;

/// Most parts that the keys would be cut into where a kernel that cannot cut them is still taken.
const FEW_PARTS: usize = 3;

/// Whether the kernel takes this problem, which it has the features for, at addresses that are
/// [`maps::round`] or not.
pub(super) fn takes(row: &Row, problem: &Problem, round: bool, machine: Machine) -> bool {
    let shape = problem.shape();
    if shape.query_len.saturating_mul(problem.group()) > row.rows || shape.key_len > row.keys {
        return false;
    }
    if !row.maps() {
        return true;
    }
    // Scores are taken in units of the scale, which must not make them or a mask overflow.
    let scale = (1.0 / 65_536.0..=1.0).contains(&problem.scale());
    let capped = problem.softcap().is_none_or(|cap| cap <= LARGEST_CAP);
    let near = |n: usize| n < FAR as usize / 2;
    let offset = match problem.query_offset() {
        QueryOffset::At(n) => n.unsigned_abs() < FAR as u64 / 2,
        QueryOffset::BottomRight => true,
    };
    let listed = problem.mask().is_none() || shape.key_len.div_ceil(row.bn) <= MOST_LISTED;
    let tiles = tiles(problem, row, 1).unwrap_or(usize::MAX);
    let (apart, together) = shared(problem, row.bm);
    scale
        && capped
        && near(shape.query_len)
        && near(shape.key_len)
        && offset
        && listed
        && near(tiles)
        && parts(problem, row, tiles, machine) <= FEW_PARTS
        && apart <= together.saturating_mul(2)
        && round
        && maps::fit(problem, row)
}

/// Keys before and after a query's own position that it sees; -1 for all.
pub(super) fn reach(problem: &Problem) -> (i32, i32) {
    let shape = problem.shape();
    let v = problem.visibility(shape.query_len, shape.key_len);
    // `Problem::build` keeps windows within i32.
    let bound = |n: usize| i32::try_from(n).unwrap_or(i32::MAX);
    let left = v.window.map_or(-1, |w| bound(w.saturating_sub(1)));
    let right = match (v.causal, v.window_right) {
        (true, _) => 0,
        (false, right) => right.map_or(-1, bound),
    };
    (left, right)
}

/// Tiles of the heads of one key/value head, of `bm` rows each: a tile a head, and together.
fn shared(problem: &Problem, bm: usize) -> (usize, usize) {
    let (group, rows) = (problem.group(), problem.shape().query_len);
    (
        rows.div_ceil(bm).saturating_mul(group),
        rows.saturating_mul(group).div_ceil(bm),
    )
}

/// How many query heads of a key/value head share a tile: all, where that makes much fewer tiles.
pub(super) fn pack(problem: &Problem, row: &Row) -> usize {
    let (apart, together) = shared(problem, row.bm);
    let group = problem.group();
    let rows = problem.shape().query_len.saturating_mul(group);
    let fewer = i32::try_from(rows).is_ok() && together * 3 <= apart * 2;
    if row.packs() && group > 1 && fewer {
        group
    } else {
        1
    }
}

/// Tiles of all heads, of which `pack` share each.
pub(super) fn tiles(problem: &Problem, row: &Row, pack: usize) -> Option<usize> {
    let shape = problem.shape();
    let down = shape.query_len.checked_mul(pack)?.div_ceil(row.bm);
    shape
        .batch
        .checked_mul(shape.heads / pack)?
        .checked_mul(down)
}

/// How many parts the keys are cut into, so that few queries over many keys keep the GPU busy: none
/// where there is a tile for most processors.
pub(super) fn splits(problem: &Problem, row: &Row, tiles: usize, machine: Machine) -> usize {
    if row.maps() {
        1
    } else {
        parts(problem, row, tiles, machine)
    }
}

fn parts(problem: &Problem, row: &Row, tiles: usize, machine: Machine) -> usize {
    let key_len = problem.shape().key_len;
    let seen = match reach(problem) {
        (left, right) if left >= 0 && right >= 0 => {
            let window = left as usize + right as usize + row.bm;
            key_len.min(window)
        }
        _ => key_len,
    };
    let key_tiles = seen.div_ceil(row.bn);
    let busy = machine.processors * row.blocks;
    let (fewest, start) = row.part();
    let most = (key_tiles / fewest).min(MOST_PARTS);
    // A kernel that cannot cut the keys is given up for a slower one only where its tiles leave most processors idle.
    let rounds = if row.maps() { 1 } else { ROUNDS };
    if tiles == 0 || key_tiles < 8 || most < 2 || tiles.saturating_mul(2) > rounds * busy {
        return 1;
    }
    // The time of a processor in key tiles: its rounds of threadblocks, each with a part and what comes besides.
    let time = |parts: usize| {
        let rounds = (tiles * parts).div_ceil(busy);
        rounds * (key_tiles.div_ceil(parts) + start) + if parts > 1 { start } else { 0 }
    };
    let full = (1..=rounds).map(|rounds| (rounds * busy / tiles).clamp(1, most));
    full.fold(1, |best, parts| {
        if time(parts) < time(best) {
            parts
        } else {
            best
        }
    })
}

/// Parts that one threadblock merges at once, as kernels/cuda/merge.cu defines it.
pub(super) const MERGED: usize = 16;

/// Most parts of the keys: as many as two rounds of merges take.
const MOST_PARTS: usize = MERGED * MERGED;

/// Most rounds of threadblocks among which the best cut is looked for.
const ROUNDS: usize = 3;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::{KeyLengths, Pages, ProblemBuilder, Role, Shape, Strides};
    use crate::backend::cuda::table::{Capability, Needs, attention, every_row};
    use crate::dtype::DType;
    use crate::verify::{Scope, cases};
    use crate::{CpuOptions, MlxDevice};

    const H200: Machine = Machine {
        processors: 132,
        l2_bytes: 60 << 20,
    };

    fn chosen(problem: &Problem, gpu: Capability) -> &'static Row {
        let needs = Needs::of(problem);
        attention(needs, gpu)
            .find(|row| takes(row, problem, true, H200))
            .unwrap()
    }

    fn dense(heads: [usize; 2], query_len: usize, key_len: usize) -> Problem {
        let shape = Shape {
            batch: 1,
            heads: heads[0],
            kv_heads: heads[1],
            query_len,
            key_len,
            qk_dim: 128,
            v_dim: 128,
        };
        Problem::builder(DType::BF16, shape).build().unwrap()
    }

    #[test]
    fn the_kernels_merge_as_many_parts_as_the_host_counts_on() {
        let text = include_str!("../../../kernels/cuda/merge.cu");
        assert!(text.contains(&format!("#define MERGED {MERGED}\n")));
    }

    #[test]
    fn the_matrix_reaches_every_kernel() {
        let cpu = MlxDevice::cpu(CpuOptions::default()).unwrap();
        for gpu in [Capability::OLDEST, Capability(8, 6), Capability(9, 0)] {
            let problems = cases(Scope::Full, &cpu);
            let problems = problems.iter().filter_map(|case| case.problem().ok());
            let met: Vec<&Row> = problems.map(|problem| chosen(&problem, gpu)).collect();
            let rows: Vec<_> = every_row(gpu).collect();
            assert!(rows.len() > 20, "{} rows", rows.len());
            let unmet: Vec<_> = rows.into_iter().filter(|row| !met.contains(row)).collect();
            assert!(unmet.is_empty(), "{gpu:?}: {unmet:#?}");
        }
    }

    #[test]
    fn few_queries_over_many_keys_are_split_and_heads_of_a_group_share_tiles() {
        let gpu = Capability(9, 0);
        assert!(chosen(&dense([32, 32], 4096, 4096), gpu).maps());
        assert!(chosen(&dense([8, 8], 100, 300), gpu).maps());
        assert!(chosen(&dense([35, 35], 256, 30_000), gpu).maps());
        for few in [
            dense([32, 8], 1, 4096),
            dense([32, 8], 16, 4096),
            dense([1, 1], 64, 100_000),
        ] {
            let row = chosen(&few, gpu);
            assert!(!row.maps());
            let pack = pack(&few, row);
            assert_eq!(pack, few.group());
            let tiles = tiles(&few, row, pack).unwrap();
            assert!(splits(&few, row, tiles, H200) > 1);
        }
    }

    #[test]
    fn pages_and_lengths_take_the_hopper_kernels_but_for_wide_heads() {
        for (head_dim, page_size) in [(64, 1), (128, 16), (256, 1024), (512, 64)] {
            let shape = Shape {
                qk_dim: head_dim,
                v_dim: head_dim,
                ..dense([2, 2], 200, 300).shape()
            };
            let pages = Pages {
                count: 400,
                page_size,
                per_sequence: 300usize.div_ceil(page_size),
            };
            let start = || Problem::builder(DType::BF16, shape);
            let cu = [0, 200];
            for problem in [
                start().pages(pages),
                start().key_lengths(KeyLengths::Device),
                Problem::varlen_queries(DType::BF16, 2, 2, 300, head_dim, &cu).pages(pages),
            ] {
                let problem = problem.build().unwrap();
                let own = chosen(&problem, Capability::HOPPER).maps();
                assert_eq!(own, head_dim < 512, "{problem:?}");
            }
        }
    }

    #[test]
    fn what_the_bulk_copies_cannot_take_goes_to_the_portable_kernels() {
        let gpu = Capability(9, 0);
        let shape = dense([2, 2], 200, 300).shape();
        let built = |change: fn(ProblemBuilder) -> ProblemBuilder| {
            change(Problem::builder(DType::BF16, shape))
                .build()
                .unwrap()
        };
        assert!(chosen(&built(|b| b), gpu).maps());
        assert!(chosen(&built(|b| b.softcap(256.0)), gpu).maps());
        assert!(!chosen(&built(|b| b), Capability(8, 9)).maps());
        for odd in [
            built(|b| b.scale(-0.1)),
            built(|b| b.scale(2.0)),
            built(|b| b.scale(1e-9)),
            built(|b| b.softcap(257.0)),
            built(|b| b.causal(true).query_offset(QueryOffset::At(1 << 30))),
            built(|b| {
                let strides = Strides {
                    batch: 0,
                    head: 300 * 132,
                    seq: 132,
                };
                b.strides(Role::Key, strides)
            }),
        ] {
            assert!(!chosen(&odd, gpu).maps(), "{odd:?}");
        }
    }
}
