//! Tensor maps: how Hopper's bulk copies see an operand.

use std::ffi::c_void;
use std::mem::MaybeUninit;

use cudarc::driver::sys;

use super::driver::failed;
use super::table::Row;
use crate::attention::{Problem, Role, Strides};
use crate::backend::checked::Pointers;
use crate::dtype::DType;
use crate::error::Result;

/// Maps of Q, K, V and O, in the kernels' order.
pub(super) type Maps = [sys::CUtensorMap; 4];

/// Columns of a copy: 128 bytes.
const PANEL: usize = 64;

/// Lengths of up to five dimensions, the innermost first; steps of all but that, in elements; and
/// the part that a copy brings.
#[derive(Debug, PartialEq, Eq)]
struct View {
    lengths: Vec<usize>,
    steps: Vec<usize>,
    part: Vec<usize>,
}

impl View {
    fn new(problem: &Problem, role: Role, rows: usize, row: &Row) -> Option<Self> {
        let (shape, strides) = (problem.shape(), problem.strides(role)?);
        let of_query = matches!(role, Role::Query | Role::Output);
        let (heads, len) = match (of_query, problem.cu_seqlens()) {
            (true, _) => (shape.heads, problem.query_rows()),
            (false, None) => (shape.kv_heads, shape.key_len),
            (false, Some((_, keys))) => (shape.kv_heads, *keys.last()? as usize),
        };
        let batch = if problem.cu_seqlens().is_some() {
            1
        } else {
            shape.batch
        };
        let Strides {
            seq,
            head,
            batch: step,
        } = strides;
        let (mut lengths, mut steps, mut part) = (
            vec![shape.head_dim, len, heads, batch],
            vec![seq, head, step],
            vec![PANEL, rows, 1, 1],
        );
        if row.halves() && role == Role::Value {
            lengths[0] = PANEL;
            lengths.insert(2, shape.head_dim / PANEL);
            steps.insert(1, PANEL);
            part.insert(2, 4);
            part[1] = 16;
        }
        // Where there is nothing to step to, any step does.
        for (step, length) in steps.iter_mut().zip(&lengths[1..]) {
            if *length == 1 {
                *step = PANEL;
            }
        }
        Some(Self {
            lengths,
            steps,
            part,
        })
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
        let lengths: Vec<u64> = self.lengths.iter().map(|n| *n as u64).collect();
        let steps: Vec<u64> = self.steps.iter().map(|n| 2 * *n as u64).collect();
        let part: Vec<u32> = self.part.iter().map(|n| *n as u32).collect();
        let ones = [1u32; 5];
        let mut map = MaybeUninit::<sys::CUtensorMap>::zeroed();
        // SAFETY: the arrays have a value for each dimension, the steps one fewer; the driver writes
        // the map, which is aligned as its type says, and only looks at the address.
        unsafe {
            sys::cuTensorMapEncodeTiled(
                map.as_mut_ptr(),
                dtype,
                lengths.len() as u32,
                at.cast_mut().cast::<c_void>(),
                lengths.as_ptr(),
                steps.as_ptr(),
                part.as_ptr(),
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

/// The operands that are mapped, their addresses, and the rows that a copy brings.
fn operands(at: Option<&Pointers>, row: &Row) -> [(Role, *const u8, usize); 4] {
    let at = |of: fn(&Pointers) -> *const u8| at.map_or(std::ptr::null(), of);
    [
        (Role::Query, at(|at| at.q), 64),
        (Role::Key, at(|at| at.k), row.bn),
        (Role::Value, at(|at| at.v), row.bn),
        (Role::Output, at(|at| at.o.cast_const()), 64),
    ]
}

/// Whether all operands can be mapped; addresses that are not known yet are taken to be.
pub(super) fn fit(problem: &Problem, at: Option<&Pointers>, row: &Row) -> bool {
    operands(at, row).into_iter().all(|(role, at, rows)| {
        at.addr().is_multiple_of(16)
            && View::new(problem, role, rows, row).is_some_and(|view| view.fits())
    })
}

/// The maps of a problem for which [`fit`] holds.
pub(super) fn maps(problem: &Problem, at: &Pointers, row: &Row) -> Result<Option<Maps>> {
    let mut maps = Vec::with_capacity(4);
    for (role, at, rows) in operands(Some(at), row) {
        let Some(view) = View::new(problem, role, rows, row) else {
            return Ok(None);
        };
        maps.push(view.encode(problem.dtype(), at)?);
    }
    Ok(Maps::try_from(maps).ok())
}
