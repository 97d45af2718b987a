//! From work to a dispatch of a Metal kernel: its name and text, its constants, what is bound where, the
//! grid. The emulator runs the same dispatches.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use super::bindings::{Constants, constant, names, other};
use super::plan::{Plan, PlanArg};
use super::sources;
use super::table::{self, MaskKind};
use crate::attention::{Problem, Role};
use crate::backend::DeviceKind;
use crate::backend::abilities::Abilities;
use crate::backend::command::{
    ClassifyTiles, DecodePartials, FillBlocks, FillMask, JoinPartials, Planned, Slot, Span, Task,
    Work,
};
use crate::backend::shared_params::VecParamsGpu;
use crate::backend::{self, Arg, Dispatch, Kernel};
use crate::dtype::DType;
use crate::error::{MlxError, Result, Unsupported};

/// What is bound at an index.
#[derive(Debug, Clone)]
enum Bound {
    Operand(Slot),
    Bytes(Arc<[u8]>),
}

/// A dispatch but for the operands' memory.
#[derive(Debug)]
pub(crate) struct Launch {
    pub(crate) kernel: &'static str,
    pub(crate) source: &'static str,
    pub(crate) constants: Constants,
    args: Vec<(usize, Bound)>,
    grid: [u64; 3],
    threadgroup: [u64; 3],
}

/// Threads of a threadgroup of the mask fill, which share a row.
const FILL_THREADS: u64 = 256;

fn operand(role: Role) -> Bound {
    Bound::Operand(Slot::Operand(role))
}

fn bytes(params: &impl bytemuck::NoUninit) -> Bound {
    Bound::Bytes(bytemuck::bytes_of(params).into())
}

impl Launch {
    pub(crate) fn of(work: &Work) -> Result<Self> {
        match work {
            Work::Attention(problem, hint) => Ok(Self::attention(Plan::new(problem, *hint)?)),
            Work::FillMask(fill) => Ok(Self::fill(fill)),
            Work::FillBlocks(fill) => Ok(Self::fill_blocks(fill)),
            Work::ClassifyTiles(classify) => Self::classify(classify),
            Work::DecodePartials(decode) => Self::partials(decode),
            Work::JoinPartials(join) => Ok(Self::join(join)),
        }
    }

    fn attention(plan: Plan) -> Self {
        let bound = |arg| match arg {
            PlanArg::Operand(role) => operand(role),
            PlanArg::Bytes(bytes) => Bound::Bytes(bytes.into()),
        };
        let args = plan.args.into_iter();
        Self {
            kernel: plan.variant.kernel,
            source: sources::PREFILL_TEXT,
            constants: plan.constants,
            args: args.map(|(index, arg)| (index, bound(arg))).collect(),
            grid: plan.grid,
            threadgroup: plan.threadgroup,
        }
    }

    fn fill(fill: &FillMask) -> Self {
        let params = fill.params();
        Self {
            kernel: match fill.dtype {
                DType::F16 => names::MASK_FILL_F16,
                _ => names::MASK_FILL,
            },
            source: sources::MASK_TEXT,
            constants: Constants::default(),
            args: vec![
                (other::FILL_OUT, operand(Role::Mask)),
                (other::FILL_PARAMS, bytes(&params)),
            ],
            grid: [fill.query_len.into(), 1, 1],
            threadgroup: [FILL_THREADS, 1, 1],
        }
    }

    fn fill_blocks(fill: &FillBlocks) -> Self {
        Self {
            kernel: names::MASK_FILL_BLOCKS,
            source: sources::MASK_TEXT,
            constants: Constants::default(),
            args: vec![
                (other::BLOCKS_OUT, operand(Role::Mask)),
                (other::BLOCKS_PARAMS, bytes(&fill.params())),
                (other::BLOCKS_IDS, Bound::Operand(Slot::SequenceIds)),
                (other::BLOCKS_POSITIONS, Bound::Operand(Slot::Positions)),
            ],
            grid: [fill.len.into(), 1, 1],
            threadgroup: [FILL_THREADS, 1, 1],
        }
    }

    fn classify(classify: &ClassifyTiles) -> Result<Self> {
        let (params, (bq, bk)) = (classify.params()?, classify.sides()?);
        Ok(Self {
            kernel: match classify.dtype {
                DType::F16 => names::BLK_F16,
                _ => names::BLK,
            },
            source: sources::MASK_TEXT,
            constants: Constants::new(&[], &[(constant::BLK_BQ, bq), (constant::BLK_BK, bk)]),
            args: vec![
                (other::BLK_MASK, operand(Role::Mask)),
                (other::BLK_OUT, operand(Role::TileClasses)),
                (other::BLK_PARAMS, bytes(&params)),
            ],
            grid: [params.nk.into(), params.nq.into(), 1],
            threadgroup: [32, 1, 1],
        })
    }

    fn partials(decode: &DecodePartials) -> Result<Self> {
        let params = decode.params()?;
        let kernel = match decode.problem.kv_dtype() {
            DType::F16 => names::VEC_F16,
            _ => names::VEC_F32,
        };
        Ok(Self {
            kernel,
            source: sources::VEC_TEXT,
            constants: Constants::default(),
            args: vec![
                (other::VEC_Q, operand(Role::Query)),
                (other::VEC_K, operand(Role::Key)),
                (other::VEC_V, operand(Role::Value)),
                (other::VEC_TMP, Bound::Operand(Slot::Partials)),
                (other::VEC_PARAMS, bytes(&params)),
            ],
            grid: [decode.splits.into(), params.num_heads.into(), 1],
            threadgroup: [32, 1, 1],
        })
    }

    fn join(join: &JoinPartials) -> Self {
        let params = VecParamsGpu {
            num_heads: join.heads,
            head_dim: join.head_dim,
            splits: join.splits,
            ..bytemuck::Zeroable::zeroed()
        };
        Self {
            kernel: names::VEC_REDUCE,
            source: sources::VEC_TEXT,
            constants: Constants::default(),
            args: vec![
                (other::REDUCE_TMP, Bound::Operand(Slot::Partials)),
                (other::REDUCE_OUT, operand(Role::Output)),
                (other::REDUCE_PARAMS, bytes(&params)),
            ],
            grid: [join.heads.into(), 1, 1],
            threadgroup: [32, 1, 1],
        }
    }
}

const ABILITIES: Abilities = Abilities {
    pages: true,
    queries_packed_alone: true,
    host_lengths: true,
    device_lengths: true,
    ..Abilities::ALIKE
};

/// Whether a device of the Metal family has a kernel for the problem.
pub(crate) fn supports(
    device: DeviceKind,
    problem: &Problem,
) -> std::result::Result<(), Unsupported> {
    ABILITIES.check(device, problem)?;
    table::select(
        problem.dtype(),
        problem.shape().qk_dim,
        MaskKind::of(problem),
    )
    .map(|_| ())
    .map_err(|refusal| Unsupported {
        device: device.name(),
        ..refusal
    })
}

/// What a device of the Metal family prepares: a launch with its compiled kernel.
pub(crate) struct Prepared {
    pub(crate) launch: Launch,
    pub(crate) kernel: Arc<Kernel>,
}

impl Prepared {
    /// Prepares work with the kernel that `build` gives, or that of `before` where it is the same: of the
    /// function constants some depend on lengths.
    pub(crate) fn new(
        work: &Work,
        before: Option<&Planned>,
        build: impl FnOnce(&Launch) -> Result<Arc<Kernel>>,
    ) -> Result<Self> {
        let launch = Launch::of(work)?;
        let before = before.and_then(|planned| planned.state.downcast_ref::<Self>());
        let kept = before.map(|before| &before.kernel);
        let same = |k: &&Arc<Kernel>| k.name == launch.kernel && k.constants == launch.constants;
        let kernel = match kept.filter(same) {
            Some(kernel) => Arc::clone(kernel),
            None => build(&launch)?,
        };
        Ok(Self { launch, kernel })
    }
}

/// The dispatch of a task that a device of the Metal family prepared.
pub(crate) fn dispatch(task: &Task<Span>) -> Result<Dispatch> {
    let Some(Prepared { launch, kernel }) = task.planned.state.downcast_ref::<Prepared>() else {
        let name = task.work().name();
        return Err(MlxError::CommandBufferError(format!(
            "{name}: was prepared for another device"
        )));
    };
    let arg = |bound: &Bound| match bound {
        Bound::Bytes(bytes) => Ok(Arg::Bytes(Arc::clone(bytes))),
        Bound::Operand(slot) => match task.get(*slot) {
            Some(span) => Ok(Arg::Memory {
                memory: Arc::clone(&span.memory),
                offset: span.offset,
                len: span.len,
            }),
            None => Err(MlxError::expected(slot.name(), "an operand", "none")),
        },
    };
    let args = launch.args.iter();
    Ok(Dispatch {
        kernel: Arc::clone(kernel),
        args: args
            .map(|(index, bound)| Ok((*index, arg(bound)?)))
            .collect::<Result<_>>()?,
        grid: launch.grid,
        threadgroup: launch.threadgroup,
        problem: match task.work() {
            Work::Attention(problem, _) => Some(Arc::clone(problem)),
            _ => None,
        },
    })
}

/// A step of a command as the Metal family runs it.
#[derive(Debug, Clone)]
pub(crate) enum Step {
    Dispatch(Dispatch),
    Barrier,
}

/// The steps, with each task as the dispatch that it is.
pub(crate) fn dispatches(steps: &[backend::Step]) -> Result<Vec<Step>> {
    let dispatched = steps.iter().map(|step| {
        Ok(match step {
            backend::Step::Barrier => Step::Barrier,
            backend::Step::Foreign(dispatch) => Step::Dispatch(dispatch.clone()),
            backend::Step::Task(task) => Step::Dispatch(dispatch(task)?),
        })
    });
    dispatched.collect()
}

/// A kernel that is built once, by whoever asks first.
type Once = Arc<OnceLock<Result<Arc<Kernel>>>>;

/// The kernels of this crate that a device has built, by name and constants. The lock is held for the
/// map, not while a kernel compiles.
#[derive(Debug, Default)]
pub(crate) struct Kernels(Mutex<HashMap<(String, Constants), Once>>);

impl Kernels {
    pub(crate) fn get(
        &self,
        kernel: &str,
        constants: &Constants,
        build: impl FnOnce() -> Result<Kernel>,
    ) -> Result<Arc<Kernel>> {
        let key = (kernel.to_owned(), constants.clone());
        let once = {
            let mut kernels = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(kernels.entry(key).or_default())
        };
        once.get_or_init(|| build().map(Arc::new)).clone()
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::attention::Shape;
    use crate::backend::Limits;
    use crate::backend::command::Hint;
    use crate::backend::metal::bindings::accesses;

    #[test]
    fn another_length_keeps_the_kernel_where_its_constants_are_the_same() {
        let built = Cell::new(0);
        let build = |launch: &Launch| {
            built.set(built.get() + 1);
            let limits = Limits {
                thread_execution_width: 32,
                max_threads: 1024,
                static_threadgroup_bytes: 0,
            };
            let kernel = Kernel::new(
                launch.kernel,
                &launch.constants,
                limits,
                accesses(launch.kernel),
                (),
            );
            Ok(Arc::new(kernel))
        };
        let prepare = |key_len: usize, before: Option<&Planned>| {
            let shape = Shape {
                batch: 1,
                heads: 1,
                kv_heads: 1,
                query_len: 1,
                key_len,
                qk_dim: 64,
                v_dim: 64,
            };
            let problem = Problem::builder(DType::F16, shape).build().unwrap();
            let work = Work::Attention(Arc::new(problem), Hint::default());
            let prepared = Prepared::new(&work, before, build).unwrap();
            assert_eq!(prepared.kernel.constants, prepared.launch.constants);
            Planned {
                device: 0,
                work,
                state: Box::new(prepared),
            }
        };
        // Whole tiles of keys, then ragged ones, which another kernel takes.
        let mut planned = prepare(160, None);
        for (key_len, kernels) in [(32, 1), (97, 2), (99, 2), (1, 2), (64, 3)] {
            planned = prepare(key_len, Some(&planned));
            assert_eq!(built.get(), kernels, "{key_len} keys");
        }
    }
}
