//! The check of a dispatch before any device has it: what is bound is as large as params and constants
//! say. A device that runs the kernels' own text (Metal, the emulator) also needs the grid and the
//! threadgroup that a plan gives, and params that say the same as the constants. The CPU's and CUDA's
//! kernels work these out by themselves; the text trusts them.

use bytemuck::AnyBitPattern;

use super::{Args, Classes, Fill, Partials, Prefill, Reduce};
use crate::attention::Problem;
use crate::attention::bindings::{constant, names, other, prefill};
use crate::attention::params::{AttnExtraParamsGpu, AttnParamsGpu};
use crate::attention::plan::{Plan, PlanArg, PlanOptions};
use crate::attention::variant::{self, Family, Variant};
use crate::backend::Dispatch;
use crate::error::{MlxError, Result};

/// Refuses a dispatch of one of this crate's kernels that would go wrong on a device of `family`. A
/// text that is not ours passes: who registered it has promised that it stays in bounds.
pub(crate) fn check(dispatch: &Dispatch, family: Family) -> Result<()> {
    let launch = Launch(dispatch);
    let args = Args::new(dispatch);
    let trusts_the_grid = family == Family::Apple;
    match dispatch.kernel.name.as_str() {
        _ if dispatch.kernel.foreign => Ok(()),
        names::MASK_FILL => {
            let fill = Fill::read(dispatch)?;
            if !trusts_the_grid {
                return Ok(());
            }
            args.aligned(other::FILL_PARAMS, 4)?;
            launch.grid([fill.params.seq_len_q.into(), 1, 1])?;
            // Any number of threads shares a row.
            let [threads, y, z] = dispatch.threadgroup;
            launch.same(
                "a threadgroup along x only",
                [threads.max(1), 1, 1],
                [threads, y, z],
            )
        }
        names::BLK => {
            let Classes { params, tile, .. } = Classes::read(dispatch)?;
            if !trusts_the_grid {
                return Ok(());
            }
            args.aligned(other::BLK_PARAMS, 8)?;
            let (nq, nk) = tile.count(params.seq_len_q as usize, params.seq_len_k as usize);
            let tiles = [nq as u64, nk as u64];
            launch.same("NQ and NK", tiles, [params.nq.into(), params.nk.into()])?;
            launch.grid([tiles[1], tiles[0], 1])?;
            launch.threadgroup([32, 1, 1])
        }
        names::VEC_F32 | names::VEC_F16 => {
            let params = Partials::read(dispatch)?.params;
            if !trusts_the_grid {
                return Ok(());
            }
            args.aligned(other::VEC_PARAMS, 4)?;
            launch.grid([params.splits.into(), params.num_heads.into(), 1])?;
            launch.threadgroup([32, 1, 1])
        }
        names::VEC_REDUCE => {
            let params = Reduce::read(dispatch)?.params;
            if !trusts_the_grid {
                return Ok(());
            }
            args.aligned(other::REDUCE_PARAMS, 4)?;
            launch.grid([params.num_heads.into(), 1, 1])?;
            launch.threadgroup([32, 1, 1])
        }
        name => match variant::by_name(name) {
            Some(variant) => {
                let problem = Prefill::read(dispatch)?.problem;
                if trusts_the_grid {
                    launch.prefill(variant, &problem)
                } else {
                    Ok(())
                }
            }
            None => Err(launch.fail("is no kernel of this crate")),
        },
    }
}

struct Launch<'a>(&'a Dispatch);

impl Launch<'_> {
    fn fail(&self, what: impl std::fmt::Display) -> MlxError {
        MlxError::CommandBufferError(format!("{}: {what}", self.0.kernel.name))
    }

    fn same<T: PartialEq + std::fmt::Debug>(&self, what: &str, expected: T, got: T) -> Result<()> {
        if expected == got {
            return Ok(());
        }
        Err(self.fail(format!("{what}: expected {expected:?}, got {got:?}")))
    }

    fn grid(&self, expected: [u64; 3]) -> Result<()> {
        self.same("the grid", expected, self.0.grid)
    }

    fn threadgroup(&self, expected: [u64; 3]) -> Result<()> {
        self.same("the threadgroup", expected, self.0.threadgroup)
    }

    /// Compares with what the problem's own plan would dispatch.
    fn prefill(&self, variant: &'static Variant, problem: &Problem) -> Result<()> {
        let args = Args::new(self.0);
        let given = &self.0.kernel.constants;
        let simdgroups = given.int(constant::NSG);
        let chosen = simdgroups.filter(|_| variant.head_dim == 512);
        if let (Some(n), None) = (simdgroups, chosen) {
            self.same("simdgroups", variant.simdgroups as i64, n.into())?;
        }
        let options = PlanOptions {
            // A negative one is no 4 or 8 either.
            nsg: chosen.map(|n| u32::try_from(n).unwrap_or(0)),
            variant: Some(variant),
        };
        let plan = Plan::new(problem, Family::Apple, options).map_err(|e| self.fail(e))?;
        self.grid(plan.grid)?;
        self.threadgroup(plan.threadgroup)?;

        for (index, what) in [(constant::ALIGN_Q, "query"), (constant::ALIGN_K, "key")] {
            if given.bool(index) && !plan.constants.bool(index) {
                return Err(self.fail(format!(
                    "constant {index}: expected false where the last {what} tile is partial, got true"
                )));
            }
        }
        args.aligned(prefill::PARAMS, 8)?;
        let params: AttnParamsGpu = args.params(prefill::PARAMS)?;
        if let Some(planned) = planned::<AttnParamsGpu>(&plan, prefill::PARAMS) {
            self.same("NQ in the params", planned.nq, params.nq)?;
        }
        if given.bool(constant::HAS_MASK) {
            args.aligned(prefill::MASK_PARAMS, 8)?;
        }
        let packed = given.bool(constant::IS_VARLEN);
        if packed {
            args.aligned(prefill::CU_SEQLENS_Q, 4)?;
            args.aligned(prefill::CU_SEQLENS_K, 4)?;
        }
        let writes_lse = given.bool(constant::HAS_LSE);
        if packed || writes_lse || given.bool(constant::HAS_WINDOW) {
            args.aligned(prefill::EXTRA_PARAMS, 8)?;
            let extra: AttnExtraParamsGpu = args.params(prefill::EXTRA_PARAMS)?;
            let planned = planned::<AttnExtraParamsGpu>(&plan, prefill::EXTRA_PARAMS);
            if let (true, Some(planned)) = (writes_lse, planned) {
                let what = "strides of the log-sum-exp";
                self.same(what, planned.lse_strides, extra.lse_strides)?;
            }
        }
        Ok(())
    }
}

/// The params that a plan binds at an index.
fn planned<T: AnyBitPattern>(plan: &Plan, index: usize) -> Option<T> {
    plan.args.iter().find_map(|(i, arg)| match arg {
        PlanArg::Bytes(bytes) if *i == index && bytes.len() == size_of::<T>() => {
            Some(bytemuck::pod_read_unaligned(bytes))
        }
        _ => None,
    })
}
