//! A problem as the CUDA attention kernels read it.

use super::table::{Row, type_code};
use crate::attention::params::CudaParams;
use crate::attention::variant::class_tile;
use crate::attention::{Problem, QueryOffset, Role, Strides};
use crate::backend::checked::Pointers;
use crate::error::{MlxError, Result};

/// What of the GPU decides how work is cut.
#[derive(Debug, Clone, Copy)]
pub(super) struct Machine {
    pub(super) processors: usize,
    pub(super) l2_bytes: usize,
}

// Every size here passed `Problem::build`, which keeps it within i32; strides within isize.
#[allow(clippy::cast_possible_truncation)]
fn int(n: usize) -> i32 {
    n as i32
}

fn strides(strides: Option<Strides>) -> [i64; 3] {
    strides.map_or([0; 3], |s| [s.batch, s.head, s.seq].map(|n| n as i64))
}

/// Whether every row of an operand lies on `bytes` bytes.
fn on(bytes: usize, size: usize, address: *const u8, strides: Option<Strides>) -> bool {
    address.addr().is_multiple_of(bytes)
        && strides.is_none_or(|s| {
            let steps = [s.batch, s.head, s.seq];
            steps
                .iter()
                .all(|n| n.wrapping_mul(size).is_multiple_of(bytes))
        })
}

/// Keys before and after a query's own position that it sees; -1 for all.
fn reach(problem: &Problem) -> (i32, i32) {
    let shape = problem.shape();
    let v = problem.visibility(shape.query_len, shape.key_len);
    // `Problem::build` keeps windows within i32.
    let bound = |n: u32| i32::try_from(n).unwrap_or(i32::MAX);
    let left = v.window.map_or(-1, |w| bound(w.saturating_sub(1)));
    let right = match (v.causal, v.window_right) {
        (true, _) => 0,
        (false, right) => right.map_or(-1, bound),
    };
    (left, right)
}

/// How many query heads of a key/value head share a tile: all, where that makes much fewer tiles.
fn pack(problem: &Problem, row: &Row) -> usize {
    let (group, rows) = (problem.group(), problem.shape().query_len);
    let apart = rows.div_ceil(row.bm).saturating_mul(group);
    let together = rows.saturating_mul(group).div_ceil(row.bm);
    let fewer = i32::try_from(rows.saturating_mul(group)).is_ok() && together * 3 <= apart * 2;
    if row.packs() && group > 1 && fewer {
        group
    } else {
        1
    }
}

/// How many parts the keys are cut into, so that few queries over many keys keep the GPU busy: none
/// where there is a tile for most processors.
fn splits(row: &Row, tiles: usize, key_len: usize, reach: (i32, i32), machine: Machine) -> usize {
    let seen = match reach {
        (left, right) if left >= 0 && right >= 0 => {
            let window = left as usize + right as usize + row.bm;
            key_len.min(window)
        }
        _ => key_len,
    };
    let key_tiles = seen.div_ceil(row.bn);
    let busy = machine.processors * row.blocks;
    if tiles * 2 > busy || key_tiles < 8 {
        return 1;
    }
    (busy / tiles.max(1)).clamp(1, key_tiles / 4).min(128)
}

/// The parameters, but for scratch memory: `cu_q`, `cu_k` and `partials` are left null.
pub(super) fn params(
    problem: &Problem,
    at: &Pointers,
    row: &Row,
    machine: Machine,
) -> Result<CudaParams> {
    let shape = problem.shape();
    let (left, right) = reach(problem);
    let packed = problem.cu_seqlens().is_some();
    let visibility = problem.visibility(shape.query_len, shape.key_len);
    let pack = pack(problem, row);
    let tiles_m = (shape.query_len * pack).div_ceil(row.bm);
    let heads = shape.batch.checked_mul(shape.heads / pack);
    let tiles = heads
        .and_then(|n| n.checked_mul(tiles_m))
        .filter(|n| i32::try_from(*n).is_ok())
        .ok_or_else(|| {
            MlxError::CommandBufferError(format!(
                "expected at most 2147483647 tiles of {} rows, got {} batches x {} heads x {tiles_m}",
                row.bm, shape.batch, shape.heads
            ))
        })?;
    let splits = splits(row, tiles, shape.key_len, (left, right), machine);

    let kv_size = problem.kv_dtype().size_of();
    let keys_bytes = shape
        .key_len
        .saturating_mul(2 * shape.head_dim * kv_size)
        .max(1);
    let section = (machine.l2_bytes / 2 / keys_bytes)
        .max(1)
        .saturating_mul(problem.group() / pack)
        .min(shape.batch * (shape.heads / pack));

    let size = problem.dtype().size_of();
    let of = |role| problem.strides(role);
    let vector = on(16, size, at.q, of(Role::Query))
        && on(16, kv_size, at.k, of(Role::Key))
        && on(16, kv_size, at.v, of(Role::Value));
    let rows = problem.query_rows() as i64;
    let mask = problem.mask();
    Ok(CudaParams {
        batch: int(shape.batch),
        heads: int(shape.heads),
        kv_group: int(problem.group()),
        sq: int(shape.query_len),
        sk: int(shape.key_len),
        q_off: visibility.q_offset as i32,
        left,
        right,
        tiles_m: int(tiles_m),
        tiles: int(tiles),
        section: int(section),
        bottom_right: i32::from(packed && problem.query_offset() == QueryOffset::BottomRight),
        scale: problem.scale(),
        scale_log2: problem.scale() * std::f32::consts::LOG2_E,
        softcap: problem.softcap().unwrap_or(0.0),
        inv_scale: 1.0 / problem.scale(),
        sinks: at.sinks.addr() as u64,
        slopes: at.alibi_slopes.addr() as u64,
        lse: at.lse.addr() as u64,
        mask: at.mask.addr() as u64,
        classes: at.tile_classes.addr() as u64,
        cu_q: 0,
        cu_k: 0,
        o: at.o.addr() as u64,
        o_strides: strides(of(Role::Output)),
        lse_strides: [if packed { 0 } else { shape.heads as i64 * rows }, rows],
        mask_strides: mask.map_or([0; 3], |m| {
            [m.batch_stride, m.head_stride, m.row_stride].map(|n| n as i64)
        }),
        q: at.q.addr() as u64,
        k: at.k.addr() as u64,
        v: at.v.addr() as u64,
        q_strides: strides(of(Role::Query)),
        k_strides: strides(of(Role::Key)),
        v_strides: strides(of(Role::Value)),
        partials: 0,
        rows,
        classes_stride: class_tile(shape.head_dim)
            .count(shape.query_len, shape.key_len)
            .1 as i64,
        splits: int(splits),
        mask_type: mask.map_or(0, |m| type_code(m.dtype)),
        vector: i32::from(vector) | i32::from(on(4, size, at.o, of(Role::Output))) << 1,
        result_batch: if packed { 1 } else { int(shape.batch) },
        pack: int(pack),
        _pad: 0,
    })
}
