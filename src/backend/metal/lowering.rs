//! From steps to the calls that a compute encoder takes, all checked before the first is made.

use std::sync::Arc;

use super::launch::Step;
use crate::backend::access::Access;
use crate::backend::{Arg, Dispatch, Kernel, Memory};
use crate::error::{MlxError, Result};

/// Most bytes that a command holds inline; more go through a buffer.
pub(crate) const INLINE_BYTES: usize = 4096;

/// Buffers that a kernel can have bound.
const BUFFERS: usize = 31;

/// One call.
#[derive(Debug)]
pub(crate) enum Op<'a> {
    Pipeline(&'a Arc<Kernel>),
    Buffer {
        index: usize,
        memory: &'a dyn Memory,
        offset: usize,
        access: Access,
    },
    /// At most [`INLINE_BYTES`].
    Inline {
        index: usize,
        bytes: &'a [u8],
    },
    /// Bytes that need a buffer of their own.
    Staged {
        index: usize,
        bytes: &'a [u8],
    },
    Dispatch {
        kernel: &'a str,
        grid: [usize; 3],
        threadgroup: [usize; 3],
    },
    Barrier,
}

/// The calls for `steps`. A pipeline is set where it changes, a barrier where work precedes and
/// follows it.
pub(crate) fn lower(steps: &[Step]) -> Result<Vec<Op<'_>>> {
    let mut ops = Vec::new();
    let mut current: Option<&Arc<Kernel>> = None;
    let mut barrier = false;
    for step in steps {
        let dispatch = match step {
            Step::Barrier => {
                barrier = !ops.is_empty();
                continue;
            }
            Step::Dispatch(dispatch) => dispatch,
        };
        if std::mem::take(&mut barrier) {
            ops.push(Op::Barrier);
        }
        let kernel = &dispatch.kernel;
        if !current.is_some_and(|set| Arc::ptr_eq(set, kernel)) {
            ops.push(Op::Pipeline(kernel));
            current = Some(kernel);
        }
        for (index, arg) in &dispatch.args {
            ops.push(bind(kernel, *index, arg)?);
        }
        ops.push(grid(dispatch)?);
    }
    Ok(ops)
}

fn bind<'a>(kernel: &Kernel, index: usize, arg: &'a Arg) -> Result<Op<'a>> {
    let name = &kernel.name;
    if index >= BUFFERS {
        return Err(MlxError::expected(
            name,
            format!("a buffer index below {BUFFERS}"),
            index,
        ));
    }
    Ok(match arg {
        Arg::Memory { memory, offset, .. } => Op::Buffer {
            index,
            memory: &**memory,
            offset: *offset,
            access: kernel.accesses.of(index),
        },
        Arg::Bytes(bytes) if bytes.is_empty() => {
            return Err(MlxError::expected(
                &format!("{name}: bytes {index}"),
                "at least 1",
                0,
            ));
        }
        Arg::Bytes(bytes) if bytes.len() <= INLINE_BYTES => Op::Inline { index, bytes },
        Arg::Bytes(bytes) => Op::Staged { index, bytes },
    })
}

fn grid(dispatch: &Dispatch) -> Result<Op<'_>> {
    let kernel = &dispatch.kernel;
    let sizes = |what: &str, sizes: [u64; 3]| {
        let refused = || {
            MlxError::expected(
                &format!("{}: {what}", kernel.name),
                "1 or more",
                format!("{sizes:?}"),
            )
        };
        let mut out = [0; 3];
        for (out, size) in out.iter_mut().zip(sizes) {
            *out = usize::try_from(size).map_err(|_| refused())?;
        }
        if out.contains(&0) {
            Err(refused())
        } else {
            Ok(out)
        }
    };
    let threadgroup = sizes("threads of a threadgroup", dispatch.threadgroup)?;
    let threads = dispatch
        .threadgroup
        .iter()
        .try_fold(1u64, |n, size| n.checked_mul(*size));
    let most = kernel.limits.max_threads;
    if threads.is_none_or(|n| n > most) {
        return Err(MlxError::expected(
            &format!("{}: threads of a threadgroup", kernel.name),
            format!("at most {most}"),
            format!("{:?}", dispatch.threadgroup),
        ));
    }
    Ok(Op::Dispatch {
        kernel: &kernel.name,
        grid: sizes("threadgroups", dispatch.grid)?,
        threadgroup,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Limits;
    use crate::backend::metal::bindings::{Constants, accesses, names};

    #[derive(Debug)]
    struct Fake(usize);

    impl Memory for Fake {
        fn len(&self) -> usize {
            self.0
        }

        fn host(&self, _access: Access) -> Result<*mut u8> {
            Ok(std::ptr::null_mut())
        }
    }

    fn kernel(name: &str) -> Arc<Kernel> {
        let limits = Limits {
            thread_execution_width: 32,
            max_threads: 128,
            static_threadgroup_bytes: 0,
        };
        Arc::new(Kernel::new(
            name,
            &Constants::default(),
            limits,
            accesses(name),
            (),
        ))
    }

    fn step(kernel: &Arc<Kernel>, args: Vec<(usize, Arg)>, threadgroup: [u64; 3]) -> Step {
        Step::Dispatch(Dispatch {
            kernel: Arc::clone(kernel),
            args,
            grid: [2, 3, 4],
            threadgroup,
            problem: None,
        })
    }

    fn memory(offset: usize) -> Arg {
        Arg::Memory {
            memory: Arc::new(Fake(64)),
            offset,
            len: 64 - offset,
        }
    }

    /// One letter a call.
    fn shape(steps: &[Step]) -> String {
        lower(steps)
            .unwrap()
            .iter()
            .map(|op| match op {
                Op::Pipeline(_) => 'P',
                Op::Buffer { .. } => 'b',
                Op::Inline { .. } => 'i',
                Op::Staged { .. } => 's',
                Op::Dispatch { .. } => 'D',
                Op::Barrier => '|',
            })
            .collect()
    }

    #[test]
    fn pipelines_and_barriers_are_set_only_where_they_matter() {
        let (a, b) = (kernel("a"), kernel("b"));
        let one = |k| step(k, vec![(0, memory(0))], [32, 4, 1]);
        let steps = [
            Step::Barrier,
            one(&a),
            one(&a),
            Step::Barrier,
            Step::Barrier,
            one(&b),
            one(&a),
            Step::Barrier,
        ];
        assert_eq!(shape(&steps), "PbDbD|PbDPbD");
        assert_eq!(shape(&[]), "");
        assert_eq!(shape(&[Step::Barrier]), "");
    }

    #[test]
    fn bytes_over_the_inline_limit_are_staged() {
        let k = kernel("k");
        let bytes = |n: usize| Arg::Bytes(vec![0; n].into());
        let args = vec![(0, bytes(1)), (1, bytes(4096)), (2, bytes(4097))];
        assert_eq!(shape(&[step(&k, args, [32, 1, 1])]), "PiisD");
        let none = lower(&[step(&k, vec![(0, bytes(0))], [32, 1, 1])]).map(|_| ());
        assert!(none.is_err());
    }

    #[test]
    fn bindings_carry_offset_and_access() {
        let fill = kernel(names::BLK);
        let steps = [step(
            &fill,
            vec![(0, memory(16)), (1, memory(0))],
            [32, 1, 1],
        )];
        let seen: Vec<_> = lower(&steps)
            .unwrap()
            .iter()
            .filter_map(|op| match op {
                Op::Buffer {
                    index,
                    offset,
                    access,
                    ..
                } => Some((*index, *offset, *access)),
                _ => None,
            })
            .collect();
        assert_eq!(seen, [(0, 16, Access::Read), (1, 0, Access::Write)]);
    }

    #[test]
    fn what_a_gpu_would_abort_on_is_refused() {
        let k = kernel("k");
        let refused = |args, threadgroup, what: &str| {
            let error = lower(&[step(&k, args, threadgroup)])
                .map(|_| ())
                .unwrap_err();
            assert!(error.to_string().contains(what), "{error}");
        };
        refused(vec![], [32, 5, 1], "at most 128");
        refused(vec![], [u64::MAX, 2, 1], "at most 128");
        refused(vec![], [32, 0, 1], "1 or more");
        refused(vec![(31, memory(0))], [32, 1, 1], "below 31");
        let empty = Step::Dispatch(Dispatch {
            kernel: Arc::clone(&k),
            args: vec![],
            grid: [0, 1, 1],
            threadgroup: [32, 1, 1],
            problem: None,
        });
        let error = lower(&[empty]).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("threadgroups"), "{error}");
    }
}
