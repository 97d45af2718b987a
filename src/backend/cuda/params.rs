//! A problem as the CUDA attention kernels read it.

use super::abi::CudaParams;
use super::fit::{self, Machine};
use super::spec::type_code;
use super::table::Row;
use crate::attention::class_tile;
use crate::attention::{Keys, Problem, QueryOffset, Role, Strides};
use crate::backend::command::Pointers;
use crate::error::{MlxError, Result};

// Every size here passed `Problem::build`, which keeps it within i32; strides within isize.
#[allow(clippy::cast_possible_truncation)]
fn int(n: usize) -> i32 {
    n as i32
}

fn strides(strides: Option<Strides>) -> [i64; 3] {
    strides.map_or([0; 3], |s| [s.batch, s.head, s.seq].map(|n| n as i64))
}

/// [`CudaParams::vector`]: Q, K and V are read by 16 bytes, O is written by 4, the mask is read by 4.
fn vector(reads: bool, writes: bool, mask: bool) -> i32 {
    i32::from(reads) | i32::from(writes) << 1 | i32::from(mask) << 2
}

/// Whether all steps of an operand are multiples of `bytes` bytes.
fn steps_by(bytes: usize, size: usize, strides: Option<Strides>) -> bool {
    strides.is_none_or(|s| {
        let steps = [s.batch, s.head, s.seq];
        steps
            .iter()
            .all(|n| n.wrapping_mul(size).is_multiple_of(bytes))
    })
}

/// Points parameters at a dispatch's operands; scratch memory (boundaries, lengths that the host knows, partial
/// results) is not among them.
pub(super) fn point(p: &mut CudaParams, at: &Pointers) {
    let on = |bytes: usize, at: *const u8| at.addr().is_multiple_of(bytes);
    let reads = [at.q, at.k, at.v].into_iter().all(|at| on(16, at));
    p.vector &= vector(reads, on(4, at.o), on(4, at.mask));
    p.sinks = at.sinks.addr() as u64;
    p.slopes = at.alibi_slopes.addr() as u64;
    p.lse = at.lse.addr() as u64;
    p.block_table = at.block_table.addr() as u64;
    p.key_lengths = at.key_lengths.addr() as u64;
    p.mask = at.mask.addr() as u64;
    p.classes = at.tile_classes.addr() as u64;
    p.o = at.o.addr() as u64;
    p.q = at.q.addr() as u64;
    p.k = at.k.addr() as u64;
    p.v = at.v.addr() as u64;
}

/// How many of `count` heads of keys and values a section takes, where `fitting` of them fit in the
/// second-level cache beside what else is read: as many in each section as far as that can be. Processors
/// idle at the end of a short last section as long as at the end of any other.
fn alike(count: usize, fitting: usize) -> usize {
    let sections = count.div_ceil(fitting.max(1)).max(1);
    count.div_ceil(sections).max(1)
}

/// Query heads whose tiles are neighbours in the grid.
fn section(problem: &Problem, row: &Row, pack: usize, machine: Machine) -> usize {
    let shape = problem.shape();
    let row_bytes = 2 * shape.qk_dim * problem.kv_dtype().size_of();
    let keys_bytes = shape.key_len.saturating_mul(row_bytes).max(1);
    // Where all rows take as long, a head after another keeps its keys in the cache by itself.
    let even = row.maps() && fit::reach(problem) == (-1, -1) && problem.mask().is_none();
    let kv_heads = if even {
        1
    } else {
        let fitting = machine.l2_bytes / 5 * 3 / keys_bytes;
        alike(shape.batch * shape.kv_heads, fitting)
    };
    kv_heads.saturating_mul(problem.group() / pack)
}

/// [`CudaParams::vector`] as far as strides decide it.
fn wide_steps(problem: &Problem) -> i32 {
    let (size, kv_size) = (problem.dtype().size_of(), problem.kv_dtype().size_of());
    let of = |role| problem.strides(role);
    let reads = steps_by(16, size, of(Role::Query))
        && steps_by(16, kv_size, of(Role::Key))
        && steps_by(16, kv_size, of(Role::Value));
    let mask_pairs = problem.mask().is_some_and(|m| {
        let steps = [m.batch_stride, m.head_stride, m.row_stride];
        steps
            .iter()
            .all(|n| n.wrapping_mul(m.dtype.size_of()).is_multiple_of(4))
    });
    vector(reads, steps_by(4, size, of(Role::Output)), mask_pairs)
}

/// The parameters of a problem, without addresses: [`point`] comes next.
pub(super) fn params(problem: &Problem, row: &Row, machine: Machine) -> Result<CudaParams> {
    let shape = problem.shape();
    let (left, right) = fit::reach(problem);
    // The Hopper kernels take bounds past all keys for none.
    let bound = |n: i32| match n {
        _ if !row.maps() => n,
        ..0 | fit::FAR.. => fit::FAR,
        _ => n,
    };
    let packed = problem.cu_seqlens_q().is_some();
    let pages = match problem.keys() {
        Keys::Paged(pages) => Some(pages),
        _ => None,
    };
    let visibility = problem.visibility(shape.query_len, shape.key_len);
    let pack = fit::pack(problem, row);
    let tiles_m = (shape.query_len * pack).div_ceil(row.bm);
    let tiles = fit::tiles(problem, row, pack)
        .filter(|n| i32::try_from(*n).is_ok())
        .ok_or_else(|| {
            MlxError::CommandBufferError(format!(
                "expected at most 2147483647 tiles of {} rows, got {} batches x {} heads x {tiles_m}",
                row.bm, shape.batch, shape.heads
            ))
        })?;
    let splits = fit::splits(problem, row, tiles, machine);
    let of = |role| problem.strides(role);
    let rows = problem.query_rows() as i64;
    let mask = problem.mask();
    Ok(CudaParams {
        batch: int(shape.batch),
        heads: int(shape.heads),
        kv_group: int(problem.group()),
        sq: int(shape.query_len),
        sk: int(shape.key_len),
        q_off: visibility.q_offset as i32,
        left: bound(left),
        right: bound(right),
        tiles_m: int(tiles_m),
        tiles: int(tiles),
        section: int(section(problem, row, pack, machine)),
        bottom_right: i32::from(
            problem.has_own_lengths() && problem.query_offset() == QueryOffset::BottomRight,
        ),
        scale: problem.scale(),
        scale_log2: (problem.scale() * std::f32::consts::LOG2_E).min(f32::MAX),
        softcap: problem.softcap().unwrap_or(0.0),
        inv_scale: 1.0 / problem.scale(),
        o_strides: strides(of(Role::Output)),
        lse_strides: [if packed { 0 } else { shape.heads as i64 * rows }, rows],
        mask_strides: mask.map_or([0; 3], |m| {
            [m.batch_stride, m.head_stride, m.row_stride].map(|n| n as i64)
        }),
        q_strides: strides(of(Role::Query)),
        k_strides: strides(of(Role::Key)),
        v_strides: strides(of(Role::Value)),
        rows,
        classes_stride: class_tile(shape.qk_dim)
            .count(shape.query_len, shape.key_len)
            .1 as i64,
        splits: int(splits),
        mask_type: mask.map_or(0, |m| type_code(m.dtype)),
        vector: wide_steps(problem),
        result_batch: if packed { 1 } else { int(shape.batch) },
        pack: int(pack),
        page_shift: pages.map_or(0, |p| p.page_size.trailing_zeros() as i32),
        per_sequence: pages.map_or(0, |p| p.per_sequence as i64),
        // The table is of i32: it names no page past these.
        pages: pages.map_or(0, |p| i32::try_from(p.count).unwrap_or(i32::MAX)),
        ..bytemuck::Zeroable::zeroed()
    })
}

#[cfg(test)]
mod tests {
    use super::alike;

    #[test]
    fn sections_are_alike_and_fit_the_cache() {
        // Of 32 heads 11, 11 and 10, not 12, 12 and 8.
        assert_eq!(alike(32, 12), 11);
        assert_eq!(alike(28, 12), 10);
        assert_eq!(alike(32, 9), 8);
        assert_eq!(alike(8, 1), 1);
        assert_eq!(alike(8, 0), 1);
        assert_eq!(alike(8, usize::MAX), 8);
        assert_eq!(alike(1, 5), 1);
        for count in 1..200 {
            for fitting in 0..50usize {
                let section = alike(count, fitting);
                assert!((1..=fitting.max(1)).contains(&section));
                // The last is short by less than there are sections.
                let sections = count.div_ceil(section);
                assert!(sections * section - count < sections, "{count} {fitting}");
            }
        }
    }
}
