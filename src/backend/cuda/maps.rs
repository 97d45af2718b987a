//! Tensor maps: how Hopper's bulk copies see an operand.

use std::ffi::c_void;
use std::mem::MaybeUninit;

use cudarc::driver::sys;

use super::driver::failed;
use super::table::Row;
use crate::attention::{Keys, Pages, Problem, Role, Strides};
use crate::backend::command::Pointers;
use crate::dtype::DType;
use crate::error::{MlxError, Result};

/// Maps of Q, K, V and O, in the kernels' order.
pub(super) type Maps = [sys::CUtensorMap; 4];

/// Columns of a copy: 128 bytes.
const PANEL: usize = 64;

/// Lengths of up to five dimensions, the innermost first; steps of all but that, in elements; and
/// the part that a copy brings.
#[derive(Debug)]
struct View {
    rank: usize,
    lengths: [usize; 5],
    steps: [usize; 4],
    part: [u32; 5],
}

impl View {
    fn new(problem: &Problem, role: Role, rows: u32, row: &Row) -> Option<Self> {
        let (shape, strides) = (problem.shape(), problem.strides(role)?);
        let of_query = matches!(role, Role::Query | Role::Output);
        let batch = |packed| if packed { 1 } else { shape.batch };
        let (heads, len, batch, part) = if of_query {
            let packed = problem.cu_seqlens_q().is_some();
            (shape.heads, problem.query_rows(), batch(packed), rows)
        } else {
            let (len, batch, part) = match problem.keys() {
                Keys::Paged(pages) => (pages.page_size, pages.count, box_rows(pages, rows)),
                Keys::Packed(_) => (*problem.cu_seqlens()?.1.last()? as usize, 1, rows),
                Keys::Dense => (shape.key_len, shape.batch, rows),
            };
            (shape.kv_heads, len, batch, part)
        };
        let Strides {
            seq,
            head,
            batch: step,
        } = strides;
        let mut view = if row.halves() && role == Role::Value {
            Self {
                rank: 5,
                lengths: [PANEL, len, shape.qk_dim / PANEL, heads, batch],
                steps: [seq, PANEL, head, step],
                part: [PANEL as u32, 16, 4, 1, 1],
            }
        } else {
            Self {
                rank: 4,
                lengths: [shape.qk_dim, len, heads, batch, 1],
                steps: [seq, head, step, PANEL],
                part: [PANEL as u32, part, 1, 1, 1],
            }
        };
        // Where there is nothing to step to, any step does.
        for (step, length) in view.steps.iter_mut().zip(&view.lengths[1..]) {
            if *length == 1 {
                *step = PANEL;
            }
        }
        Some(view)
    }

    /// Whether the hardware takes it.
    fn fits(&self) -> bool {
        let step = |n: &usize| *n > 0 && n.is_multiple_of(8) && *n < 1 << 39;
        self.steps.iter().all(step) && self.lengths.iter().all(|n| (1..1 << 32).contains(n))
    }

    fn encode(&self, dtype: DType, at: *const u8) -> Result<sys::CUtensorMap> {
        use sys::CUtensorMapDataType as Type;
        let dtype = match dtype {
            DType::BF16 => Type::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            _ => Type::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        };
        let lengths = self.lengths.map(|n| n as u64);
        let steps = self.steps.map(|n| 2 * n as u64);
        let ones = [1u32; 5];
        let mut map = MaybeUninit::<sys::CUtensorMap>::zeroed();
        // SAFETY: the arrays have a value for each dimension, the steps one fewer; the driver writes
        // the map, which is aligned as its type says, and only looks at the address.
        unsafe {
            sys::cuTensorMapEncodeTiled(
                map.as_mut_ptr(),
                dtype,
                self.rank as u32,
                at.cast_mut().cast::<c_void>(),
                lengths.as_ptr(),
                steps.as_ptr(),
                self.part.as_ptr(),
                ones.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        }
        .result()
        .map_err(failed("describing an operand"))?;
        // SAFETY: plain bytes, zeroed and then written.
        Ok(unsafe { map.assume_init() })
    }
}

/// The rows of a copy from a page to a tile of `rows` keys: the most that divide both.
fn box_rows(pages: &Pages, rows: u32) -> u32 {
    let most = 1 << rows.trailing_zeros();
    u32::try_from(pages.page_size).map_or(most, |page| page.min(most))
}

/// The operands that are mapped, and the rows that a copy brings.
fn operands(row: &Row) -> [(Role, u32); 4] {
    [
        (Role::Query, 64),
        (Role::Key, row.bn as u32),
        (Role::Value, row.bn as u32),
        (Role::Output, 64),
    ]
}

/// Their addresses.
fn addresses(at: &Pointers) -> [*const u8; 4] {
    [at.q, at.k, at.v, at.o.cast_const()]
}

/// Whether the addresses can be mapped.
pub(super) fn round(at: &Pointers) -> bool {
    let round = |at: *const u8| at.addr().is_multiple_of(16);
    addresses(at).into_iter().all(round)
}

/// Whether the operands can be mapped where their addresses are [`round`].
pub(super) fn fit(problem: &Problem, row: &Row) -> bool {
    let fits = |(role, rows)| View::new(problem, role, rows, row).is_some_and(|view| view.fits());
    operands(row).into_iter().all(fits)
}

/// Points maps at the operands of another dispatch of the same problem, whose addresses are [`round`].
pub(super) fn point(maps: &mut Maps, at: &Pointers) -> Result<()> {
    for (map, at) in maps.iter_mut().zip(addresses(at)) {
        // SAFETY: `encode` made the map; the driver only looks at the address.
        unsafe { sys::cuTensorMapReplaceAddress(map, at.cast_mut().cast()) }
            .result()
            .map_err(failed("pointing at an operand"))?;
    }
    Ok(())
}

/// The maps of a problem that [`fit`]s, at addresses that are [`round`].
pub(super) fn maps(problem: &Problem, at: &Pointers, row: &Row) -> Result<Maps> {
    let [q_at, k_at, v_at, o_at] = addresses(at);
    let [q, k, v, o] = operands(row);
    let map = |(role, rows): (Role, u32), at| {
        View::new(problem, role, rows, row)
            .ok_or_else(|| MlxError::expected(role.name(), "an operand", "none"))?
            .encode(problem.dtype(), at)
    };
    Ok([map(q, q_at)?, map(k, k_at)?, map(v, v_at)?, map(o, o_at)?])
}
