//! Splits long dispatches. A GPU ends a command that runs for a few seconds, sooner on an interactive system, so a
//! dispatch is split into parts, and the parts are spread over commands of about a second each, by estimate.
//!
//! A part is a dispatch of the same kernel over some batches, heads and query tiles. Its operands are offset to its
//! first batch and head. For query tiles `a..b`, `NQ` is `b` and the grid has `b - a` tiles: the kernels number
//! tiles from `NQ - 1` down, so `NQ` decides the part's last tile, and the grid's size its first.

use std::ops::Range;

use super::bindings::prefill;
use super::launch::Step;
use super::params::{AttnExtraParamsGpu, AttnMaskParamsGpu, AttnParamsGpu};
use super::table::{self, Variant};
use crate::attention::{Keys, Problem, Role};
use crate::backend::{Arg, Dispatch};

/// Floating-point operations of one command: a second of half a TFLOP/s, which is a fifth of what the
/// smallest GPU that is served multiplies at best.
pub(crate) const COMMAND_FLOPS: f64 = 5e11;

/// Where lengths of keys are bound, as bytes if the host has them.
const KEY_LENGTHS: usize = prefill::index(Role::KeyLengths);

/// A part of a grid.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Part {
    tiles: Range<usize>,
    heads: Range<usize>,
    batches: Range<usize>,
}

/// What a grid costs.
struct Costs {
    /// Of each query tile of a head.
    tiles: Vec<f64>,
    heads: usize,
    /// Query heads that share a key/value head. A part covers whole groups, or lies inside one group: one offset
    /// of K and V then serves all of its heads.
    group: usize,
    batches: usize,
}

/// `0..n` in pieces of at most `most`, as even as they can be.
fn pieces(n: usize, most: usize) -> impl Iterator<Item = Range<usize>> + Clone {
    let count = n.div_ceil(most.max(1)).max(1);
    (0..count).map(move |i| n * i / count..n * (i + 1) / count)
}

impl Costs {
    /// Parts of at most `limit` each, or of one tile where that alone costs more.
    fn parts(&self, limit: f64) -> Vec<Part> {
        let head: f64 = self.tiles.iter().sum();
        let (tiles, heads) = (0..self.tiles.len(), 0..self.heads);
        // How many of what costs `each` fit; 0 where not even one does.
        let fit = |each: f64| (limit / each) as usize;
        let part = |tiles: &Range<usize>, heads: Range<usize>, batches: Range<usize>| Part {
            tiles: tiles.clone(),
            heads,
            batches,
        };
        let batches = fit(head * self.heads as f64);
        if batches > 0 {
            return pieces(self.batches, batches)
                .map(|batches| part(&tiles, heads.clone(), batches))
                .collect();
        }
        let each_batch = (0..self.batches).map(|b| b..b + 1);
        let groups = fit(head * self.group as f64);
        let head_ranges: Vec<Range<usize>> = if groups > 0 {
            pieces(self.heads / self.group, groups)
                .map(|g| g.start * self.group..g.end * self.group)
                .collect()
        } else {
            let inside = pieces(self.group, fit(head));
            (0..self.heads / self.group)
                .flat_map(|g| {
                    let first = g * self.group;
                    inside.clone().map(move |h| first + h.start..first + h.end)
                })
                .collect()
        };
        let tile_ranges = if fit(head) > 0 {
            vec![tiles]
        } else {
            self.tile_ranges(limit)
        };
        each_batch
            .flat_map(|batch| {
                let (head_ranges, tile_ranges) = (&head_ranges, &tile_ranges);
                head_ranges.iter().flat_map(move |heads| {
                    let batch = batch.clone();
                    let range = move |tiles| part(tiles, heads.clone(), batch.clone());
                    tile_ranges.iter().map(range)
                })
            })
            .collect()
    }

    /// The tiles of a head that costs more than `limit`.
    fn tile_ranges(&self, limit: f64) -> Vec<Range<usize>> {
        let mut ranges = Vec::new();
        let (mut start, mut sum) = (0, 0.0);
        for (tile, cost) in self.tiles.iter().enumerate() {
            if tile > start && sum + cost > limit {
                ranges.push(start..tile);
                (start, sum) = (tile, 0.0);
            }
            sum += cost;
        }
        ranges.push(start..self.tiles.len());
        ranges
    }

    fn of(&self, part: &Part) -> f64 {
        let tiles: f64 = self.tiles[part.tiles.clone()].iter().sum();
        tiles * part.heads.len() as f64 * part.batches.len() as f64
    }
}

/// Multiply-adds count for two. Tiles of 8 rows and f32 run at half the speed, so they count twice.
fn tile_flops(variant: &Variant, keys: usize) -> f64 {
    let slow = variant.tile.bq < 32 || variant.dtype.size_of() > 2;
    let per_key = 4 * variant.head_dim * variant.tile.bq;
    per_key as f64 * keys as f64 * if slow { 2.0 } else { 1.0 }
}

/// A dispatch that costs more than a command may.
struct Long<'a> {
    dispatch: &'a Dispatch,
    problem: &'a Problem,
    variant: &'static Variant,
}

impl Long<'_> {
    fn costs(&self) -> Costs {
        let shape = self.problem.shape();
        let (rows, bq) = (shape.query_len, self.variant.tile.bq);
        let visibility = self.problem.visibility(rows, shape.key_len);
        let keys = |tile: usize| {
            // Sequences with lengths of their own may each have an offset of their own.
            if self.problem.has_own_lengths() {
                return shape.key_len;
            }
            let rows = tile * bq..((tile + 1) * bq).min(rows);
            visibility.keys_any(rows, shape.key_len).len()
        };
        let tiles = 0..rows.div_ceil(bq);
        Costs {
            tiles: tiles.map(|t| tile_flops(self.variant, keys(t))).collect(),
            heads: shape.heads,
            group: self.problem.group(),
            batches: shape.batch,
        }
    }

    /// The dispatch over one part; `None` where params lie in a buffer, so that they cannot be changed.
    fn over(&self, part: &Part) -> Option<Dispatch> {
        let (head, batch) = (part.heads.start as i64, part.batches.start as i64);
        // The kernels find packed rows by the cumulative lengths alone, and pages by the block table.
        let packed_queries = self.problem.cu_seqlens_q().is_some();
        let of_batch = if packed_queries { 0 } else { batch };
        let keys = self.problem.keys();
        let of_keys = if *keys == Keys::Dense { batch } else { 0 };
        let mut p: AttnParamsGpu = self.params(prefill::PARAMS)?;
        let kv_head = head / i64::from(p.gqa_factor.max(1));
        let first = |strides: &[i64], batch: i64, head: i64| {
            let batches = strides[0].checked_mul(batch)?;
            strides[1].checked_mul(head)?.checked_add(batches)
        };
        let at = |strides: &[i64], head: i64| first(strides, of_batch, head);
        let elements = |role: Role| match role {
            Role::Query => at(&p.q_strides, head),
            Role::Key => first(&p.k_strides, of_keys, kv_head),
            Role::Value => first(&p.v_strides, of_keys, kv_head),
            Role::Output => at(&p.o_strides, head),
            Role::Mask => {
                let mask: AttnMaskParamsGpu = self.params(prefill::MASK_PARAMS)?;
                at(&mask.m_strides, head)
            }
            Role::Lse => {
                let extra: AttnExtraParamsGpu = self.params(prefill::EXTRA_PARAMS)?;
                at(&extra.lse_strides, head)
            }
            Role::Sinks | Role::AlibiSlopes => Some(head),
            // All heads and batches share them.
            Role::TileClasses => Some(0),
            Role::BlockTable => match keys {
                Keys::Paged(pages) => batch.checked_mul(i64::try_from(pages.per_sequence).ok()?),
                _ => Some(0),
            },
            Role::KeyLengths => Some(batch),
        };
        let mut args = self.dispatch.args.clone();
        for (index, arg) in &mut args {
            let role = Role::ALL.into_iter().find(|r| prefill::index(*r) == *index);
            let spec = role.and_then(|role| Some((role, self.problem.operand(role)?)));
            let bytes = match (*index, spec) {
                (_, Some((role, spec))) => {
                    let elements = usize::try_from(elements(role)?).ok()?;
                    elements.checked_mul(spec.dtype.size_of())?
                }
                (prefill::CU_SEQLENS_Q | prefill::CU_SEQLENS_K | KEY_LENGTHS, None) => {
                    part.batches.start * size_of::<u32>()
                }
                _ => 0,
            };
            *arg = from(arg, bytes)?;
        }
        p.nq = i32::try_from(part.tiles.end).ok()?;
        let params = args.iter_mut().find(|(i, _)| *i == prefill::PARAMS)?;
        params.1 = Arg::Bytes(bytemuck::bytes_of(&p).into());
        let sizes = [part.tiles.len(), part.heads.len(), part.batches.len()];
        Some(Dispatch {
            args,
            grid: sizes.map(|n| n as u64),
            ..self.dispatch.clone()
        })
    }

    /// Params that lie in the command.
    fn params<T: bytemuck::AnyBitPattern>(&self, index: usize) -> Option<T> {
        let (_, arg) = self.dispatch.args.iter().find(|(i, _)| *i == index)?;
        match arg {
            Arg::Bytes(bytes) => Some(bytemuck::pod_read_unaligned(bytes.get(..size_of::<T>())?)),
            Arg::Memory { .. } => None,
        }
    }
}

/// An argument from `bytes` bytes on.
fn from(arg: &Arg, bytes: usize) -> Option<Arg> {
    Some(match arg {
        _ if bytes == 0 => arg.clone(),
        Arg::Memory {
            memory,
            offset,
            len,
        } => Arg::Memory {
            memory: memory.clone(),
            offset: offset.checked_add(bytes)?,
            len: len.checked_sub(bytes)?,
        },
        Arg::Bytes(all) => Arg::Bytes(all.get(bytes..)?.into()),
    })
}

/// Splits a dispatch into parts of at most `limit` operations (or of one tile), each with its estimated cost. A
/// dispatch stays whole where it is within the limit or where its params lie in a buffer; a dispatch of an unknown
/// kernel or without a problem stays whole at cost 0.
pub(crate) fn parts(dispatch: &Dispatch, limit: f64) -> Vec<(Dispatch, f64)> {
    let whole = |cost| vec![(dispatch.clone(), cost)];
    let Some(variant) = table::by_name(&dispatch.kernel.name) else {
        return whole(0.0);
    };
    let Some(problem) = &dispatch.problem else {
        return whole(0.0);
    };
    let shape = problem.shape();
    let tiles = shape.query_len.div_ceil(variant.tile.bq) as f64;
    let most = tile_flops(variant, shape.key_len) * tiles * (shape.heads * shape.batch) as f64;
    if most <= limit {
        return whole(most);
    }
    let long = Long {
        dispatch,
        problem,
        variant,
    };
    let costs = long.costs();
    let planned = costs.parts(limit);
    let made = planned
        .iter()
        .map(|part| Some((long.over(part)?, costs.of(part))))
        .collect::<Option<Vec<_>>>();
    made.unwrap_or_else(|| whole(most))
}

/// The steps in commands of at most `limit` operations by estimate, in order. Each command waits for
/// the one before it.
pub(crate) fn commands(steps: Vec<Step>, limit: f64) -> Vec<Vec<Step>> {
    let mut commands = Vec::new();
    let (mut command, mut sum) = (Vec::new(), 0.0);
    for step in steps {
        let dispatch = match step {
            Step::Dispatch(dispatch) => dispatch,
            other => {
                command.push(other);
                continue;
            }
        };
        for (part, cost) in parts(&dispatch, limit) {
            if sum > 0.0 && sum + cost > limit {
                commands.push(std::mem::take(&mut command));
                sum = 0.0;
            }
            sum += cost;
            command.push(Step::Dispatch(part));
        }
    }
    commands.push(command);
    commands
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::DType;
    use crate::attention::{Problem, Shape};
    use crate::backend::command::Hint;
    use crate::backend::host_memory::HostMemory;
    use crate::backend::metal::bindings::{Constants, accesses};
    use crate::backend::metal::plan::{Plan, PlanArg};
    use crate::backend::{Kernel, Limits};

    fn costs(tiles: &[f64], heads: usize, group: usize, batches: usize) -> Costs {
        Costs {
            tiles: tiles.into(),
            heads,
            group,
            batches,
        }
    }

    #[test]
    fn parts_cover_the_grid_exactly_once_and_cost_what_they_may() {
        for (n, heads, group, batches) in [(1, 1, 1, 1), (5, 6, 3, 2), (7, 8, 1, 3), (3, 8, 8, 1)] {
            let tiles: Vec<f64> = (1..=n).map(|t| t as f64).collect();
            let costs = costs(&tiles, heads, group, batches);
            let all: f64 = tiles.iter().sum::<f64>() * (heads * batches) as f64;
            for limit in [all, all / 2.0, all / 3.5, all / 17.0, 4.0, 1.0, 0.1] {
                let mut seen = vec![0; n * heads * batches];
                let parts = costs.parts(limit);
                for part in &parts {
                    let single = part.tiles.len() * part.heads.len() * part.batches.len() == 1;
                    assert!(single || costs.of(part) <= limit * 1.000_001, "{part:?}");
                    // One key/value head's queries, or whole groups of them.
                    let inside = part.heads.start / group == (part.heads.end - 1) / group;
                    assert!(inside || part.heads.start.is_multiple_of(group), "{part:?}");
                    for b in part.batches.clone() {
                        for h in part.heads.clone() {
                            for t in part.tiles.clone() {
                                seen[(b * heads + h) * n + t] += 1;
                            }
                        }
                    }
                }
                assert!(seen.iter().all(|times| *times == 1), "{limit}: {parts:?}");
                assert!(limit < all || parts.len() == 1, "a small grid stays one");
            }
        }
    }

    /// A dispatch of the problem as the Metal device gets it.
    fn dispatch(problem: &Problem) -> Dispatch {
        let plan = Plan::new(problem, Hint::default()).unwrap();
        let limits = Limits {
            thread_execution_width: 32,
            max_threads: 1024,
            static_threadgroup_bytes: 0,
        };
        let memory = |role| {
            let spec = problem.operand(role).unwrap();
            let len = spec.elements * spec.dtype.size_of();
            Arg::Memory {
                memory: Arc::new(HostMemory::zeroed(len).unwrap()),
                offset: 0,
                len,
            }
        };
        let args = plan.args.iter().map(|(index, arg)| {
            let arg = match arg {
                PlanArg::Operand(role) => memory(*role),
                PlanArg::Bytes(bytes) => Arg::Bytes(bytes.as_slice().into()),
            };
            (*index, arg)
        });
        Dispatch {
            args: args.collect(),
            kernel: Arc::new(Kernel::new(
                plan.variant.kernel,
                &plan.constants,
                limits,
                accesses(plan.variant.kernel),
                (),
            )),
            grid: plan.grid,
            threadgroup: plan.threadgroup,
            problem: Some(Arc::new(problem.clone())),
        }
    }

    fn problem(query_len: usize, key_len: usize) -> Problem {
        let shape = Shape {
            batch: 2,
            heads: 4,
            kv_heads: 2,
            query_len,
            key_len,
            qk_dim: 64,
            v_dim: 64,
        };
        Problem::builder(DType::F16, shape).build().unwrap()
    }

    fn lens(commands: &[Vec<Step>]) -> Vec<usize> {
        commands.iter().map(Vec::len).collect()
    }

    #[test]
    fn small_dispatches_share_a_command_and_a_long_one_is_spread_over_several() {
        let small = Step::Dispatch(dispatch(&problem(64, 64)));
        let cost = parts(&dispatch(&problem(64, 64)), f64::MAX)[0].1;
        let steps = vec![small.clone(), Step::Barrier, small.clone()];
        assert_eq!(lens(&commands(steps.clone(), COMMAND_FLOPS)), [3]);
        assert_eq!(lens(&commands(steps.clone(), cost * 2.5)), [3]);
        // A barrier stays where it was; the second dispatch begins a command.
        assert_eq!(lens(&commands(steps.clone(), cost * 1.5)), [2, 1]);
        assert_eq!(lens(&commands(vec![], COMMAND_FLOPS)), [0]);
        let apart = commands(vec![small.clone()], cost / 4.0);
        assert_eq!(lens(&apart), [1; 4]);
        // Nothing is known of a foreign text.
        let foreign = Step::Dispatch(Dispatch {
            problem: None,
            ..dispatch(&problem(64, 64))
        });
        let steps = vec![foreign.clone(), Step::Barrier, foreign];
        assert_eq!(lens(&commands(steps, cost / 4.0)), [3]);
        let other = Kernel::new(
            "other",
            &Constants::default(),
            dispatch(&problem(64, 64)).kernel.limits,
            accesses("other"),
            (),
        );
        let foreign = Dispatch {
            kernel: Arc::new(other),
            problem: None,
            ..dispatch(&problem(64, 64))
        };
        assert_eq!(parts(&foreign, 1.0).len(), 1);
    }

    #[test]
    fn a_part_starts_at_its_batch_and_heads_and_counts_its_tiles() {
        let whole = dispatch(&problem(64, 96));
        let grids: Vec<[u64; 3]> = parts(&whole, 1.0).iter().map(|(d, _)| d.grid).collect();
        assert_eq!(grids, [[1; 3]; 2 * 4 * 2]);
        let (last, _) = parts(&whole, 1.0).pop().unwrap();
        let offset = |index: usize| match &last.args.iter().find(|(i, _)| *i == index).unwrap().1 {
            Arg::Memory { offset, len, .. } => (*offset, *len),
            Arg::Bytes(_) => unreachable!(),
        };
        // Batch 1, head 3 of 4 queries' and 1 of 2 keys' heads, f16.
        assert_eq!(offset(0), (7 * 64 * 64 * 2, 64 * 64 * 2));
        assert_eq!(offset(1), (3 * 96 * 64 * 2, 96 * 64 * 2));
        let nq = |d: &Dispatch| match &d
            .args
            .iter()
            .find(|(i, _)| *i == prefill::PARAMS)
            .unwrap()
            .1
        {
            Arg::Bytes(bytes) => bytemuck::pod_read_unaligned::<AttnParamsGpu>(bytes).nq,
            Arg::Memory { .. } => unreachable!(),
        };
        let tiles: Vec<i32> = parts(&whole, 1.0)
            .iter()
            .take(2)
            .map(|(d, _)| nq(d))
            .collect();
        assert_eq!(tiles, [1, 2]);
    }

    /// GPUs end commands after about five seconds; one command held any dispatch.
    #[test]
    fn a_dispatch_that_outlasts_the_watchdog_is_split() {
        let shape = Shape {
            batch: 1,
            heads: 32,
            kv_heads: 8,
            query_len: 32_768,
            key_len: 32_768,
            qk_dim: 128,
            v_dim: 128,
        };
        let problem = Problem::builder(DType::F16, shape).build().unwrap();
        let long = Long {
            dispatch: &dispatch(&self::problem(64, 64)),
            problem: &problem,
            variant: table::by_name("flash_attn_prefill_f16_d128").unwrap(),
        };
        let costs = long.costs();
        let parts = costs.parts(COMMAND_FLOPS);
        assert!(parts.len() >= 32, "{}", parts.len());
        assert!(parts.iter().all(|p| costs.of(p) <= COMMAND_FLOPS));
    }
}
