//! From a problem to a dispatch: which kernel, which constants, what is bound where, what grid.

use super::bindings::{Constants, constant, dtype_code, prefill};
use super::params::{AttnExtraParamsGpu, AttnMaskParamsGpu, AttnPagesParamsGpu, AttnParamsGpu};
use super::table::{self, MaskKind, Variant};
use crate::attention::{KeyLengths, Keys, Pages, Problem, QueryOffset, Role, Strides};
use crate::backend::command::Hint;
use crate::error::{MlxError, Result};

/// What a plan binds at one index.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum PlanArg {
    /// An operand's buffer.
    Operand(Role),
    /// Bytes copied into the command.
    Bytes(Vec<u8>),
}

/// One dispatch of a prefill kernel.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Plan {
    /// The row of the table.
    pub variant: &'static Variant,
    /// Function constants.
    pub constants: Constants,
    /// What is bound, by ascending index.
    pub args: Vec<(usize, PlanArg)>,
    /// Threadgroups along x, y, z: query tiles, heads, batch.
    pub grid: [u64; 3],
    /// Threads of a threadgroup along x, y, z.
    pub threadgroup: [u64; 3],
}

impl Plan {
    /// Plans `problem`: with the kernel that the hint names, which must fit the problem, else with the table's
    /// first match.
    pub(crate) fn new(problem: &Problem, hint: Hint) -> Result<Self> {
        let shape = problem.shape();
        let mask_kind = MaskKind::of(problem);
        let variant = match hint.kernel {
            None => table::select(problem.dtype(), shape.qk_dim, mask_kind)?,
            Some(name) => {
                let named = table::by_name(name);
                let named = named.ok_or_else(|| MlxError::KernelNotFound(name.into()))?;
                match problem.mask() {
                    None => named.without_mask(),
                    Some(_) => named,
                }
            }
        };
        if (variant.dtype, variant.head_dim, variant.mask)
            != (problem.dtype(), shape.qk_dim, mask_kind)
            || problem.kv_dtype() != problem.dtype()
        {
            return Err(MlxError::InvalidArgument(format!(
                "{}: takes {} queries, keys and values at head dim {} with {:?} masks, got {} over {} at {} with {mask_kind:?}",
                variant.kernel,
                variant.dtype,
                variant.head_dim,
                variant.mask,
                problem.dtype(),
                problem.kv_dtype(),
                shape.qk_dim,
            )));
        }
        let simdgroups = simdgroups(variant, hint.simdgroups)?;
        let tile = variant.tile;
        let (nq, nk) = tile.count(shape.query_len, shape.key_len);

        let mut args = Vec::with_capacity(Role::ALL.len() + 5);
        args.extend(
            Role::ALL
                .into_iter()
                .filter(|role| problem.operand(*role).is_some())
                .map(|role| (prefill::index(role), PlanArg::Operand(role))),
        );
        let mut bytes = |index, bytes: &[u8]| args.push((index, PlanArg::Bytes(bytes.to_vec())));
        bytes(
            prefill::PARAMS,
            bytemuck::bytes_of(&attn_params(problem, nq, nk, variant)),
        );
        if let Some(mask) = problem.mask() {
            let m_strides =
                [mask.batch_stride, mask.head_stride, mask.row_stride].map(|s| s as i64);
            bytes(
                prefill::MASK_PARAMS,
                bytemuck::bytes_of(&AttnMaskParamsGpu { m_strides }),
            );
        }
        if let Some(extra) = extra_params(problem) {
            bytes(prefill::EXTRA_PARAMS, bytemuck::bytes_of(&extra));
        }
        if let Some(q) = problem.cu_seqlens_q() {
            bytes(prefill::CU_SEQLENS_Q, bytemuck::cast_slice(q));
        }
        if let Some((_, k)) = problem.cu_seqlens() {
            bytes(prefill::CU_SEQLENS_K, bytemuck::cast_slice(k));
        }
        if let KeyLengths::Host(lengths) = problem.key_lengths() {
            bytes(
                prefill::index(Role::KeyLengths),
                bytemuck::cast_slice(lengths),
            );
        }
        if let Keys::Paged(pages) = problem.keys() {
            bytes(
                prefill::PAGES_PARAMS,
                bytemuck::bytes_of(&pages_params(pages)),
            );
        }
        args.sort_by_key(|(index, _)| *index);

        Ok(Self {
            variant,
            constants: constants(problem, variant, simdgroups),
            args,
            grid: [nq as u64, shape.heads as u64, shape.batch as u64],
            threadgroup: [32, simdgroups as u64, 1],
        })
    }
}

/// The simdgroups of a kernel, as the table or a caller's choice has them.
pub(crate) fn simdgroups(variant: &Variant, nsg: Option<u32>) -> Result<usize> {
    match nsg {
        None => Ok(variant.simdgroups),
        Some(n @ (4 | 8)) if variant.head_dim == 512 => Ok(n as usize),
        Some(n) => Err(MlxError::expected("nsg", "4 or 8, at head dim 512", n)),
    }
}

fn constants(problem: &Problem, variant: &Variant, simdgroups: usize) -> Constants {
    let shape = problem.shape();
    let visibility = problem.visibility(shape.query_len, shape.key_len);
    let packed = problem.cu_seqlens().is_some();
    let packed_queries = problem.cu_seqlens_q().is_some();
    let key_lengths = *problem.key_lengths() != KeyLengths::All;
    let bools = [
        (
            constant::ALIGN_Q,
            !packed_queries && shape.query_len.is_multiple_of(variant.tile.bq),
        ),
        (
            constant::ALIGN_K,
            !packed && !key_lengths && shape.key_len.is_multiple_of(variant.tile.bk),
        ),
        (constant::HAS_MASK, problem.mask().is_some()),
        (constant::DO_CAUSAL, visibility.causal),
        (constant::HAS_SINKS, problem.has_sinks()),
        (constant::HAS_BLK, problem.has_tile_classes()),
        (
            constant::HAS_WINDOW,
            visibility.window.is_some() || visibility.window_right.is_some(),
        ),
        (constant::HAS_SOFTCAP, problem.softcap().is_some()),
        (constant::HAS_ALIBI, problem.has_alibi()),
        (constant::HAS_LSE, problem.has_lse()),
        (constant::IS_VARLEN, packed),
        (constant::IS_PAGED, matches!(problem.keys(), Keys::Paged(_))),
        (constant::HAS_KEY_LENGTHS, key_lengths),
        (constant::PACKS_QUERIES, packed_queries && !packed),
    ];
    let mut ints = Vec::new();
    let additive = problem.mask().filter(|m| !m.is_bool());
    let mask_dtype = additive.map_or(problem.dtype(), |m| m.dtype);
    let operands = [
        (constant::MASK_DTYPE, mask_dtype),
        (constant::KV_DTYPE, problem.kv_dtype()),
    ];
    for (index, dtype) in operands {
        let code = dtype_code(dtype, problem.dtype());
        if code != 0 {
            ints.push((index, code));
        }
    }
    if variant.head_dim == 512 {
        ints.push((constant::NSG, simdgroups as i32));
    }
    Constants::new(&bools, &ints)
}

// Every size here passed `Problem::build`, which keeps it within i32; strides within isize.
#[allow(clippy::cast_possible_truncation)]
fn attn_params(problem: &Problem, nq: usize, nk: usize, variant: &Variant) -> AttnParamsGpu {
    let shape = problem.shape();
    let visibility = problem.visibility(shape.query_len, shape.key_len);
    let strides = |role| {
        let s = problem.strides(role).unwrap_or(Strides {
            batch: 0,
            head: 0,
            seq: 0,
        });
        [s.batch as i64, s.head as i64, s.seq as i64]
    };
    AttnParamsGpu {
        b: shape.batch as i32,
        h: shape.heads as i32,
        d: shape.qk_dim as i32,
        ql: shape.query_len as i32,
        kl: shape.key_len as i32,
        gqa_factor: problem.group() as i32,
        scale: problem.scale(),
        softcapping: problem.softcap().unwrap_or(1.0),
        nq: nq as i32,
        nk: nk as i32,
        nq_aligned: (shape.query_len / variant.tile.bq) as i32,
        nk_aligned: (shape.key_len / variant.tile.bk) as i32,
        ql_rem: (shape.query_len % variant.tile.bq) as i32,
        kl_rem: (shape.key_len % variant.tile.bk) as i32,
        ql_off: visibility.q_offset as i32,
        _pad: 0,
        q_strides: strides(Role::Query),
        k_strides: strides(Role::Key),
        v_strides: strides(Role::Value),
        o_strides: strides(Role::Output),
    }
}

fn pages_params(pages: &Pages) -> AttnPagesParamsGpu {
    AttnPagesParamsGpu {
        // The table is of i32: it names no page past these.
        count: i32::try_from(pages.count).unwrap_or(i32::MAX),
        shift: pages.page_size.trailing_zeros() as i32,
        per_sequence: pages.per_sequence as i64,
    }
}

fn extra_params(problem: &Problem) -> Option<AttnExtraParamsGpu> {
    let shape = problem.shape();
    let visibility = problem.visibility(shape.query_len, shape.key_len);
    let packed = problem.cu_seqlens_q().is_some();
    let own_lengths = problem.has_own_lengths();
    let windowed = visibility.window.is_some() || visibility.window_right.is_some();
    if !(windowed || problem.has_lse() || own_lengths) {
        return None;
    }
    // `Problem::build` keeps windows within i32.
    let bound = |w: Option<usize>| w.and_then(|w| i32::try_from(w).ok()).unwrap_or(-1);
    let rows = problem.query_rows() as i64;
    Some(AttnExtraParamsGpu {
        window: bound(visibility.window),
        window_right: bound(visibility.window_right),
        bottom_right: i32::from(own_lengths && problem.query_offset() == QueryOffset::BottomRight),
        _pad: 0,
        lse_strides: [if packed { 0 } else { shape.heads as i64 * rows }, rows],
    })
}
