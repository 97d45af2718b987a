//! Working memory has bounds, and what stays within them has the same bits.

use super::harness::{Data, Random, build, isas, kernels_for, shape};
use crate::DType;
use crate::attention::{MaskSpec, Problem, QueryOffset, Role, Strides};
use crate::backend::cpu::job::Job;
use crate::backend::cpu::kernels::bound_call::BoundCall;
use crate::backend::cpu::kernels::mask_map::MaskMap;
use crate::backend::cpu::kernels::split::Split;
use crate::backend::cpu::kernels::{Team, chunks, schedule};

const TEAM: Team<'_> = Team {
    pool: None,
    threads: 2,
};

#[test]
fn waves_of_chunks_give_the_bits_of_one() {
    for (dtype, keys) in [(DType::BF16, [2600, 1100]), (DType::F32, [4200, 40])] {
        let (q, k) = (
            [0, 5, 5, 7, 9],
            [
                0,
                keys[0],
                2 * keys[0],
                2 * keys[0] + keys[1],
                2 * keys[0] + 2 * keys[1],
            ],
        );
        let problem = Problem::varlen(dtype, 4, 2, 64, &q, &k);
        let mut data = Data::new(build(problem.lse(true)), 3);
        for poisoned in [false, true] {
            if poisoned {
                data.set_value((0, 1, 2300), 3, f64::NAN);
                data.set_value((3, 0, 20), 60, f64::INFINITY);
            }
            for isa in isas() {
                let expected = data.run(isa, 1);
                for slots in [3, 4, 6] {
                    let got = data.run_by(kernels_for(isa, dtype), |job, kernels| {
                        let call = BoundCall::new(job, kernels).unwrap();
                        let tasks = call.tasks().unwrap();
                        let split = Split::plan(&call, &tasks).unwrap().unwrap();
                        chunks::run_in(&call, &tasks, &split, TEAM, slots).unwrap();
                    });
                    assert!(got.bits == expected.bits, "{isa} {dtype} {slots}");
                    assert!(
                        got.lse
                            .iter()
                            .zip(&expected.lse)
                            .all(|(a, b)| a.to_bits() == b.to_bits())
                    );
                }
            }
        }
    }
}

#[test]
fn a_task_too_large_to_pack_gives_the_same_bits() {
    let problem = Problem::builder(DType::BF16, shape(2, (4, 2), (90, 700), 64)).causal(true);
    let problem = problem.query_offset(QueryOffset::BottomRight).lse(true);
    let data = Data::new(build(problem), 3);
    for isa in isas() {
        let expected = data.run(isa, 1);
        for most in [0, usize::MAX] {
            let got = data.run_by(kernels_for(isa, DType::BF16), |job, kernels| {
                let call = BoundCall::new(job, kernels).unwrap();
                let tasks = call.tasks().unwrap();
                schedule::by_tiles(&call, &tasks, TEAM, most).unwrap();
            });
            assert!(got == expected, "{isa} {most}");
        }
    }
}

#[test]
fn a_mask_too_large_to_map_gives_the_same_bits() {
    for cells in [DType::U8, DType::F32] {
        let problem = Problem::builder(DType::F32, shape(2, (2, 1), (60, 600), 64));
        let problem = problem.mask(MaskSpec::plane(cells, 600)).lse(true);
        let mut data = Data::new(build(problem), 3);
        let mut random = Random::new(2);
        data.set_mask(|_, i, j| {
            if j / 32 % (i + 1) == 0 || random.below(3) == 0 {
                f64::NEG_INFINITY
            } else {
                0.0
            }
        });
        for isa in isas() {
            let expected = data.run(isa, 1);
            let got = data.run_by(kernels_for(isa, DType::F32), |job, kernels| {
                schedule::run(&BoundCall::new(job, kernels).unwrap(), TEAM).unwrap();
            });
            assert!(got == expected, "{isa} {cells}");
        }
    }
}

/// One key and one cell, strided by 0 or 1, stand for more than any machine could hold.
#[test]
fn working_memory_does_not_grow_with_strides_of_zero() {
    let keys = (1usize << 31) - 1024;
    let same = Strides {
        batch: 0,
        head: 0,
        seq: 0,
    };
    let small = Data::new(
        build(Problem::builder(DType::F32, shape(1, (1, 1), (1, 1), 512))),
        1,
    );
    let sizes = shape(1, (1, 1), (64, keys), 512);
    let long = build(
        Problem::builder(DType::F32, sizes)
            .strides(Role::Key, same)
            .strides(Role::Value, same),
    );
    let overlapping = MaskSpec {
        dtype: DType::U8,
        batch_stride: 0,
        head_stride: 0,
        row_stride: 1,
    };
    let sizes = shape(1, (1, 1), (1 << 20, 1 << 20), 64);
    let masked = build(
        Problem::builder(DType::F32, sizes)
            .mask(overlapping)
            .strides(Role::Key, same)
            .strides(Role::Value, same),
    );
    small.with_job(|job| {
        for isa in isas() {
            let kernels = kernels_for(isa, DType::F32);
            let of = |problem| Job {
                problem,
                at: job.at,
            };
            let job = of(&long);
            let call = BoundCall::new(&job, kernels).unwrap();
            let tasks = call.tasks().unwrap();
            let split = Split::plan(&call, &tasks).unwrap().unwrap();
            assert!(chunks::slots(&split) * split.slot_bytes() <= 64 << 20);
            assert_eq!(split.chunks(), keys.div_ceil(1024));
            let job = of(&masked);
            let call = BoundCall::new(&job, kernels).unwrap();
            assert!(MaskMap::of(&call, TEAM).is_none());
        }
    });
}
