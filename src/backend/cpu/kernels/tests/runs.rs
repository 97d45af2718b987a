//! K and V that lie in several runs give the bits of K and V in one.

use super::harness::{Data, build, everywhere, shape};
use crate::DType;
use crate::attention::{Problem, QueryOffset, Role, Strides};
use crate::backend::cpu::job::{Job, Pointers};
use crate::backend::cpu::kernels::bound_call::BoundCall;
use crate::backend::cpu::kernels::kv_rows::Breaks;
use crate::backend::cpu::kernels::{Team, schedule};

const DIM: usize = 64;
const KV_HEADS: usize = 2;
const TEAM: Team<'_> = Team {
    pool: None,
    threads: 2,
};

/// A copy of rows of K or V with NaN in the breaks.
fn broken(job: &Job<'_>, role: Role, breaks: Breaks) -> Vec<u64> {
    let (problem, sequence) = (job.problem, job.problem.sequence(0));
    let size = problem.kv_dtype().size_of();
    let elements = problem.operand(role).unwrap().elements;
    let mut copy =
        vec![u64::MAX; (elements * size + breaks.bytes_before(sequence.key_len)) / 8 + 1];
    let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut copy);
    for head in 0..KV_HEADS {
        for key in 0..sequence.key_len {
            let (from, at) = match role {
                Role::Key => (job.at.k, problem.k_at(&sequence, head, key)),
                _ => (job.at.v, problem.v_at(&sequence, head, key)),
            };
            // SAFETY: the operand has this row.
            let row = unsafe { std::slice::from_raw_parts(from.add(at * size), DIM * size) };
            let to = at * size + breaks.bytes_before(key);
            bytes[to..to + DIM * size].copy_from_slice(row);
        }
    }
    copy
}

#[test]
fn breaks_between_rows_of_keys_do_not_matter() {
    // In place, in place over chunks of keys, and packed.
    for (queries, keys) in [(3, 77), (1, 1300), (21, 300)] {
        for dtype in [DType::BF16, DType::F16, DType::F32] {
            let apart = Strides {
                batch: 0,
                head: 2 * keys * DIM,
                seq: DIM,
            };
            let problem = Problem::builder(dtype, shape(1, (4, KV_HEADS), (queries, keys), DIM))
                .strides(Role::Key, apart)
                .strides(Role::Value, apart)
                .causal(true)
                .query_offset(QueryOffset::BottomRight)
                .lse(true);
            let mut data = Data::new(build(problem), 9);
            for careful in [false, true] {
                if careful {
                    data.set_value((0, 1, keys / 2), 7, f64::NAN);
                    data.set_value((0, 0, keys - 1), 9, f64::INFINITY);
                }
                for (name, kernels) in everywhere(dtype) {
                    let expected = data.run_with(kernels, 1);
                    for every in [1, 3, 16, 50] {
                        let breaks = Breaks {
                            every,
                            bytes: 84,
                            skipped: 0,
                        };
                        let got = data.run_by(kernels, |job, kernels| {
                            let (k, v) = (
                                broken(job, Role::Key, breaks),
                                broken(job, Role::Value, breaks),
                            );
                            let at = Pointers {
                                k: k.as_ptr().cast(),
                                v: v.as_ptr().cast(),
                                ..job.at
                            };
                            let problem = job.problem;
                            let mut call = BoundCall::new(&Job { problem, at }, kernels).unwrap();
                            call.call.breaks = Some(breaks);
                            schedule::run(&call, TEAM).unwrap();
                        });
                        let bits =
                            |lse: &[f32]| lse.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                        assert!(
                            got.bits == expected.bits && bits(&got.lse) == bits(&expected.lse),
                            "{name} {dtype} {queries} x {keys}, a break every {every} keys, careful {careful}"
                        );
                    }
                }
            }
        }
    }
}
